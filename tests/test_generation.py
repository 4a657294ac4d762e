"""Generation: filters by property, caches and batches by parity, and bad input."""

import inspect
import math
from dataclasses import FrozenInstanceError, fields

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import glassgpt.checks.generation as checks
from glassgpt.generation import (
    Sampling,
    generate,
    generate_text,
    keep_top_k,
    keep_top_p,
    log_probabilities,
    pad_left,
    sample,
    stream,
    stream_text,
    window_start,
)
from glassgpt.gpt import GPT, GPTConfig
from glassgpt.modern import ModernConfig, ModernGPT
from glassgpt.tokens import CharTokenizer

ROWS = st.lists(
    st.lists(
        st.floats(-50, 50, width=32, allow_subnormal=False), min_size=6, max_size=6
    ),
    min_size=1,
    max_size=3,
).map(torch.tensor)


def small_modern():
    """A modern model of the sizes of `_small_gpt`, with random weights."""
    random = torch.Generator().manual_seed(0)
    model = ModernGPT(ModernConfig(11, 8, 2, 2, 16)).double().eval()
    for parameter in model.parameters():
        parameter.data.normal_(0.0, 0.7, generator=random)
    return model


@pytest.fixture(scope="module")
def model():
    return checks._small_gpt()


@settings(max_examples=20)
@given(ROWS, st.integers(1, 8))
def test_top_k_keeps_the_highest(logits, k):
    kept = keep_top_k(logits, k)
    for row, found in zip(logits, kept, strict=True):
        stays = found > -math.inf
        assert torch.equal(found[stays], row[stays])
        assert stays.sum() >= min(k, 6)
        # Only ties with the lowest that stays may exceed k.
        assert (found > row[stays].min()).sum() < k or k > 6 or stays.all()


@settings(max_examples=20)
@given(ROWS, st.floats(0.01, 1.0))
def test_top_p_keeps_the_smallest_set_that_reaches_p(logits, p):
    for row, found in zip(logits, keep_top_p(logits, p), strict=True):
        stays, weights = found > -math.inf, row.softmax(-1)
        assert torch.equal(found[stays], row[stays])
        assert weights[stays].sum() >= p - 1e-5
        assert weights[stays].sum() - weights[stays].min() < p + 1e-5
        assert stays.all() or weights[stays].min() >= weights[~stays].max()


def test_top_p_at_its_ends():
    steep = torch.tensor([[20.0, 0.0]])  # the first share is rounded to 1
    assert keep_top_p(steep, 1.0).equal(steep)
    kept = keep_top_p(torch.tensor([[1.0, 3.0, 2.0]]), 1e-46) > -math.inf
    assert kept.tolist() == [[False, True, False]]


@pytest.mark.parametrize(
    "keep", [lambda x: keep_top_k(x, 2), lambda x: keep_top_p(x, 0.8)]
)
def test_filters_change_nothing_given_and_take_more_axes(keep):
    logits = checks._FIVE.log().repeat(2, 3, 1) + 3
    given = logits.clone()
    found = keep(given)
    assert torch.equal(given, logits)
    assert torch.equal(found[1, 2], keep(logits[0, 0]))
    assert torch.equal(found[found > -math.inf], logits[found > -math.inf])


@settings(max_examples=20)
@given(
    ROWS,
    st.floats(1e-30, 1e30),
    st.none() | st.integers(1, 8),
    st.none() | st.floats(1e-9, 1.0),
)
def test_sample_draws_what_the_filters_leave(logits, temperature, k, p):
    generator = torch.Generator().manual_seed(0)
    logits = logits.repeat(30, 1)  # a draw may be right by luck, thirty are not
    drawn = sample(logits, Sampling(temperature, k, p), generator)
    assert drawn.shape == (len(logits),)
    assert drawn.dtype == torch.int64
    if k is not None:
        for row, token in zip(logits, drawn, strict=True):
            assert keep_top_k(row, k)[token] > -math.inf


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"temperature": -1.0}, "not negative"),
        ({"temperature": math.nan}, "not negative"),
        ({"temperature": math.inf}, "finite"),
        ({"top_k": 0}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.01}, "top_p"),
        ({"top_k": 1, "top_p": 7}, "top_p"),
        ({"seed": -1}, "seed must be a whole number of 64 bits"),
        ({"seed": "1"}, "seed must be a whole number of 64 bits"),
    ],
)
def test_impossible_settings(model, wrong, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**wrong)
    with pytest.raises(ValueError, match=message):
        generate(model, [1], 0, **wrong)
    with pytest.raises(ValueError, match=message):
        stream(model, [[1]], 3, **wrong)  # at once, not at the first token


def test_the_smallest_and_the_largest_seed_are_taken(model):
    for seed in (0, 2**64 - 1):
        one = generate(model, [1], 5, seed=seed)
        assert generate(model, [1], 5, seed=seed) == one


def test_sampling_is_no_place_to_write():
    with pytest.raises(FrozenInstanceError):
        Sampling().temperature = 2.0


@settings(max_examples=20)
@given(ROWS, st.floats(0.1, 3.0))
def test_a_temperature_of_0_is_greedy(logits, temperature):
    wanted = logits.argmax(-1)
    assert torch.equal(sample(logits, Sampling(temperature=0)), wanted)
    assert torch.equal(sample(logits, Sampling(temperature, top_k=1)), wanted)


@pytest.mark.parametrize("function", [generate, generate_text, stream, stream_text])
def test_the_settings_are_keywords_with_names(function):
    parameters = inspect.signature(function).parameters
    for field in fields(Sampling):
        assert parameters[field.name].default == field.default
        assert parameters[field.name].kind is inspect.Parameter.KEYWORD_ONLY
    assert all(p.kind is not p.VAR_KEYWORD for p in parameters.values())


@pytest.mark.parametrize(
    ("ids", "count", "message"),
    [
        ([], 3, "at least one token"),
        ([[1], []], 3, "at least one token"),
        (torch.zeros(0, dtype=torch.int64), 3, "at least one token"),
        ([11], 3, "11"),
        ([[1], [11]], 3, "11"),
        ([-1], 3, "-1"),
        ([1] * 9, 3, "9 tokens, but the context has room for 8"),
        ([[1], [1] * 9], 0, "9 tokens, but the context has room for 8"),
        (torch.tensor([0.5]), 3, "list of ids"),
        ([1], -1, "at least 0, not -1"),
        ("a tower", 3, r"generate_text\(model, tokenizer, text"),
        (["a", "tower"], 3, r"generate_text\(model, tokenizer, text"),
        (CharTokenizer("ab"), 3, r"generate_text\(model, tokenizer, text"),
    ],
)
def test_impossible_prompts(model, ids, count, message):
    with pytest.raises(ValueError, match=message):
        generate(model, ids, count)


def test_a_text_gives_a_text(model):
    tokenizer = CharTokenizer("abcdefghijk")
    pieces = stream_text(model, tokenizer, "ab", 5, seed=3, top_p=0.9)
    wanted = "ab" + "".join(pieces)
    assert generate_text(model, tokenizer, "ab", 5, seed=3, top_p=0.9) == wanted
    assert tokenizer.encode(wanted) == generate(model, [0, 1], 5, seed=3, top_p=0.9)
    for function in (generate_text, stream_text):
        with pytest.raises(ValueError, match=r"must be a tokenizer, .*generate\("):
            function(model, [0, 1], "ab", 5)


@torch.no_grad()
def starting_over(model, prompt, count, sampling):
    """What `generate` returns for one prompt, without a cache."""
    ids, generator = list(prompt), torch.Generator().manual_seed(sampling.seed or 0)
    for _ in range(count):
        window = ids[window_start(len(ids), model.config.context) :]
        logits = model(torch.tensor([window]))[:, -1]
        ids.append(sample(logits, sampling, generator).item())
    return ids


@pytest.mark.parametrize("length", [1, 8])
def test_the_cache_changes_nothing(model, length):
    prompt = [(3 * i) % 11 for i in range(length)]
    how = {"temperature": 0.8, "top_p": 0.9, "seed": 3}
    for writer in (model, small_modern()):
        wanted = starting_over(writer, prompt, 12, Sampling(**how))
        assert generate(writer, prompt, 12, **how) == wanted


@settings(max_examples=8)
@given(
    st.lists(
        st.lists(st.integers(0, 10), min_size=1, max_size=8), min_size=2, max_size=4
    )
)
def test_a_row_in_a_batch_is_as_alone(prompts):
    modern = small_modern()  # the check has the other
    alone = [generate(modern, prompt, 9, top_k=1) for prompt in prompts]
    assert generate(modern, prompts, 9, top_k=1) == alone


def test_shapes_in_and_out(model):
    one = generate(model, [1, 2], 3, top_k=1)
    assert generate(model, torch.tensor([1, 2]), 3, top_k=1) == one
    assert generate(model, torch.tensor([[1, 2]]), 3, top_k=1) == [one]
    assert generate(model, [torch.tensor([1, 2])], 3, top_k=1) == [one]
    assert generate(model, list(torch.tensor([1, 2])), 3, top_k=1) == one
    assert generate(model, (1, 2), 3, top_k=1) == one
    assert all(type(token) is int for token in one)


def test_seeds(model):
    texts = [generate(model, [1], 20, seed=seed) for seed in (5, 5, 6, None, None)]
    assert texts[0] == texts[1]
    assert len({tuple(text) for text in texts}) == 4
    state = torch.get_rng_state()
    generate(model, [1], 5)
    assert torch.equal(torch.get_rng_state(), state)


def test_stop():
    text = [1, 4, 2, 7, 3, 9]
    parrot = checks._parrot(text, 11)
    assert generate(parrot, [1], 5, top_k=1) == text
    assert generate(parrot, [1], 5, top_k=1, stop=[7]) == [1, 4, 2]
    assert generate(parrot, [1], 5, top_k=1, stop=[4]) == [1]
    rows = generate(parrot, [[1], [5, 4, 2, 7]], 2, top_k=1, stop=[3])
    assert rows[1] == [5, 4, 2, 7]


def test_dropout_is_off_and_each_part_gets_its_own_mode_back():
    model = GPT(GPTConfig(11, 8, 2, 2, 8, dropout=0.5))
    tokenizer = CharTokenizer("abcdefghijk")
    for whole, block in ((True, False), (False, True)):
        model.train(whole)
        model.blocks[0].train(block)
        modes = [part.training for part in model.modules()]
        texts = {tuple(generate(model, [1], 6, temperature=0)) for _ in range(3)}
        written = {generate_text(model, tokenizer, "b", 6, top_k=1) for _ in range(3)}
        sums = {log_probabilities(model, [1, 2, 3]).sum().item() for _ in range(3)}
        assert len(texts) == len(written) == len(sums) == 1
        assert [part.training for part in model.modules()] == modes
    list(stream(model.train(), [[1]], 2))
    assert not any(part.training for part in model.modules())


@pytest.mark.parametrize("modern", [False, True])
def test_log_probabilities(modern):
    model = small_modern() if modern else checks._small_gpt()
    ids = [3, 1, 4, 1, 5, 9, 2, 6, 5]  # one more than the context
    found = log_probabilities(model, ids)
    assert found.shape == (8,)
    with torch.no_grad():
        for t in range(1, 9):
            wanted = model(torch.tensor([ids[:t]]))[0, -1].log_softmax(-1)[ids[t]]
            assert abs(found[t - 1] - wanted) < 1e-5
    assert torch.equal(log_probabilities(model, torch.tensor(ids)), found)
    likeliest = generate(model, ids[:2], 1, top_k=1)
    others = [log_probabilities(model, [*ids[:2], token])[1] for token in range(11)]
    assert int(torch.stack(others).argmax()) == likeliest[2]


@pytest.mark.parametrize(
    "ids", [[], [1], [1, 11], [-1, 1], [1] * 10, "ab", [[1, 2]], [1, 2**65]]
)
def test_impossible_texts(model, ids):
    with pytest.raises(ValueError, match=r"id|context|token"):
        log_probabilities(model, ids)


def test_a_row_that_has_ended_yields_none():
    parrot = checks._parrot([1, 4, 2, 7, 3, 9], 11)
    steps = list(stream(parrot, [[1], [5, 4]], 5, stop=[3], top_k=1))
    assert steps == [[4, 2], [2, 7], [7, None]]


def test_pad_left():
    ids, starts = pad_left([[1, 2, 3], [4]])
    assert ids.tolist() == [[1, 2, 3], [0, 0, 4]]
    assert starts.tolist() == [0, 2]
    assert pad_left([[1], [2]])[1] is None


@settings(max_examples=20)
@given(st.integers(1, 10_000), st.integers(1, 300))
def test_the_window_fits_and_moves_by_half(length, context):
    start = window_start(length, context)
    assert 0 <= start < length
    assert length - start <= context
    assert start % max(context // 2, 1) == 0
    assert length > context or start == 0


def test_stream_text_of_characters():
    tokenizer = CharTokenizer.train("abcd")
    parrot = checks._parrot(tokenizer.encode("abdc"), 4)
    assert list(stream_text(parrot, tokenizer, "a", 3, top_k=1)) == ["b", "d", "c"]
    with pytest.raises(ValueError, match="at least one token"):
        next(stream_text(parrot, tokenizer, "", 3))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("k", [1, None])
def test_scores_that_are_no_numbers(bad, k):
    with pytest.raises(ValueError, match="weights damaged"):
        sample(torch.full((1, 3), bad), Sampling(top_k=k))


@pytest.mark.parametrize("stop", [5, "a"])
def test_stop_is_a_list_of_ids(model, stop):
    with pytest.raises(TypeError):
        stream(model, [[1]], 2, stop=stop)


def test_whole_numbers_of_numpy_will_do(model):
    ids = generate(model, [1], 9, seed=3)
    assert generate(model, np.array([1]), np.int64(9), seed=np.int64(3)) == ids
    until = ids[: 1 + ids[1:].index(ids[5])]
    assert generate(model, [1], 9, seed=3, stop=np.array(ids[5:6])) == until
