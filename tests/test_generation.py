"""Generation: filters by property, caches and batches by parity, and bad input."""

import math
from dataclasses import fields, replace
from functools import partial
from itertools import dropwhile, takewhile
from typing import get_type_hints

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import glassgpt.checks.generation as checks
from glassgpt.generation import (
    KeyValueCache,
    Sampling,
    SamplingOptions,
    generate,
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


def test_filters_at_their_edges():
    tied = keep_top_k(torch.tensor([[1.0, 0.0, 1.0, 1.0]]), 2)
    assert (tied[0] > -math.inf).tolist() == [True, False, True, True]
    assert torch.equal(keep_top_k(tied, 9), tied)
    high = torch.tensor([[1000.0, 999.0, 0.0]])  # too large for exp
    assert (keep_top_p(high, 0.9)[0] > -math.inf).tolist() == [True, True, False]


@settings(max_examples=20)
@given(
    ROWS,
    st.floats(1e-30, 1e30),
    st.none() | st.integers(1, 8),
    st.none() | st.floats(1e-9, 1.0),
)
def test_sample_draws_what_the_filters_leave(logits, temperature, k, p):
    generator = torch.Generator().manual_seed(0)
    drawn = sample(logits, Sampling(temperature, k, p), generator)
    assert drawn.shape == (len(logits),)
    assert drawn.dtype == torch.int64
    if k is not None:
        for row, token in zip(logits, drawn, strict=True):
            assert keep_top_k(row, k)[token] > -math.inf


def test_a_tiny_temperature_is_greedy():
    logits = torch.tensor([[1.0, 1.1, 0.9]])
    assert sample(logits, Sampling(temperature=1e-40)).item() == 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"temperature": 0}, "top_k=1"),
        ({"temperature": -1.0}, "positive"),
        ({"temperature": math.nan}, "positive"),
        ({"temperature": math.inf}, "finite"),
        ({"top_k": 0}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.01}, "top_p"),
        ({"top_k": 1, "top_p": 7}, "top_p"),
    ],
)
def test_impossible_settings(model, wrong, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**wrong)
    with pytest.raises(ValueError, match=message):
        generate(model, [1], 0, **wrong)
    with pytest.raises(ValueError, match=message):
        stream(model, [[1]], 3, **wrong)  # at once, not at the first token


def test_the_options_are_the_fields_of_sampling():
    known = {field.name: field.type for field in fields(Sampling)}
    assert get_type_hints(SamplingOptions) == known
    assert not SamplingOptions.__required_keys__


@pytest.mark.parametrize(
    ("ids", "count", "message"),
    [
        ([], 3, "at least one token"),
        ([[1], []], 3, "at least one token"),
        (torch.zeros(0, dtype=torch.int64), 3, "at least one token"),
        ([11], 3, "11"),
        ([[1], [11]], 3, "11"),
        ([-1], 3, "-1"),
        ([11] + [1] * 20, 3, "11"),  # even where the window doesn't reach
        (torch.tensor([0.5]), 3, "list of ids"),
        ([1], -1, "at least 0, not -1"),
        ("a tower", 3, "list of ids"),
    ],
)
def test_impossible_prompts(model, ids, count, message):
    with pytest.raises(ValueError, match=message):
        generate(model, ids, count)


@pytest.mark.parametrize("seed", [-1, 1 << 64, "1"])
def test_impossible_seeds(model, seed):
    with pytest.raises(ValueError, match="seed must be a whole number of 64 bits"):
        generate(model, [1], 1, seed=seed)
    assert len(generate(model, [1], 1, seed=(1 << 64) - 1)) == 2


def test_only_the_last_position_is_scored(model):
    rows = []
    model.head.register_forward_hook(lambda layer, x, y: rows.append(y.shape[:-1]))
    generate(model, [[1, 2, 3], [4, 5]], 3, top_k=1)
    assert rows == [(2,)] * 3


def test_a_long_prompt_goes_on_from_its_window(model):
    prompt = [5, 6] * 10
    with pytest.raises(ValueError, match="context"):
        model(torch.tensor([prompt]))
    start = window_start(len(prompt), 8)
    wanted = model(torch.tensor([prompt[start:]]))[0, -1].argmax().item()
    assert generate(model, prompt, 1, top_k=1) == [*prompt, wanted]


@torch.no_grad()
def starting_over(model, prompt, count, sampling):
    """What `generate` returns for one prompt, without a cache."""
    ids, dice = list(prompt), torch.Generator().manual_seed(sampling.seed or 0)
    for _ in range(count):
        window = ids[window_start(len(ids), model.config.context) :]
        logits = model(torch.tensor([window]))[:, -1]
        ids.append(sample(logits, sampling, dice).item())
    return ids


@pytest.mark.parametrize("length", [1, 8, 17])
def test_the_cache_changes_nothing(model, length):
    prompt = [(3 * i) % 11 for i in range(length)]
    how = {"temperature": 0.8, "top_p": 0.9, "seed": 3}
    for writer in (model, small_modern()):
        wanted = starting_over(writer, prompt, 12, Sampling(**how))
        assert generate(writer, prompt, 12, **how) == wanted


@settings(max_examples=8)
@given(
    st.lists(
        st.lists(st.integers(0, 10), min_size=1, max_size=12), min_size=2, max_size=4
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


def test_no_new_tokens(model):
    assert generate(model, [1, 2], 0) == [1, 2]
    assert generate(model, [[1], [2, 3]], 0) == [[1], [2, 3]]


def test_the_prompt_is_not_changed(model):
    prompt = [[1, 2]]
    generate(model, prompt, 3)
    assert prompt == [[1, 2]]


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


@pytest.mark.parametrize("training", [True, False])
def test_between_two_steps_the_model_is_as_it_was(training):
    model = GPT(GPTConfig(11, 8, 2, 2, 8, dropout=0.5)).train(training)
    steps = stream(model, [[1]], 5)
    modes = {module.training for _ in steps for module in model.modules()}
    assert modes == {training}
    other = stream(model, [[1]], 5)
    next(other)  # and then nobody goes on
    assert model.training is training
    with torch.no_grad():
        model.head.weight.fill_(math.nan)
    with pytest.raises(ValueError, match="damaged"):
        next(stream(model, [[1]], 5))
    assert model.training is training
    log_probabilities(model, [1, 2])
    assert model.training is training


def test_each_part_gets_its_own_mode_back():
    model = GPT(GPTConfig(11, 8, 2, 2, 8, dropout=0.5))
    for whole, block in ((True, False), (False, True)):
        model.train(whole)
        model.blocks[0].train(block)
        modes = [part.training for part in model.modules()]
        texts = {tuple(generate(model, [1], 6, top_k=1)) for _ in range(3)}
        sums = {log_probabilities(model, [1, 2, 3]).sum().item() for _ in range(3)}
        assert len(texts) == len(sums) == 1
        assert [part.training for part in model.modules()] == modes


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
    with pytest.raises(ValueError, match=r"id|context"):
        log_probabilities(model, ids)


def test_a_row_that_has_ended_yields_none():
    parrot = checks._parrot([1, 4, 2, 7, 3, 9], 11)
    steps = list(stream(parrot, [[1], [5, 4]], 5, stop=[3], top_k=1))
    assert steps == [[4, 2], [2, 7], [7, None]]


def test_a_cache_that_is_full():
    cache = KeyValueCache(2)
    part = torch.zeros(1, 1, 3, 4)
    with pytest.raises(ValueError, match="fit a cache of 2"):
        cache.append(part, part)


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


def ignores_temperature(logits, sampling, generator):
    return sample(logits, replace(sampling, temperature=1.0), generator)


class NoOffset(KeyValueCache):
    def append(self, keys, values):
        self.length = getattr(self, "kept", 0)
        everything = super().append(keys, values)
        self.kept, self.length = self.length, 0
        return everything


class OnlyTheNew(KeyValueCache):
    def append(self, keys, values):
        self.length += keys.shape[2]
        return keys, values


class ValuesReversed(KeyValueCache):
    def append(self, keys, values):
        keys, values = super().append(keys, values)
        return keys, values.flip(2)


def single(prompts):
    return isinstance(prompts[0], int)


def cuts_characters(model, tokenizer, prompt, count, top_k, stop=()):
    for (token,) in stream(model, [tokenizer.encode(prompt)], count, top_k=top_k):
        yield tokenizer.decode([token])


def shows_the_stop(model, tokenizer, prompt, count, top_k, stop=()):
    yield from stream_text(model, tokenizer, prompt, count, top_k=top_k)


def beams_capped(model, ids, length, beams):
    return checks.likeliest_texts(model, ids, length, min(beams, 2))[0][1]


def beams_at_first_only(model, ids, length, beams):
    first = checks.likeliest_texts(model, ids, 1, beams)
    return max(
        checks.likeliest_texts(model, text, length - 1, 1)[0] for _, text in first
    )[1]


def beam_that_appends(model, ids, length, beams):
    ids += checks.likeliest_texts(model, list(ids), length, beams)[0][1][len(ids) :]
    return ids


def min_p_of_batch(logits, share):
    p = logits.softmax(-1)
    return logits.masked_fill(p < share * p.max(), -math.inf)


def min_p_without_ties(logits, share):
    p = logits.softmax(-1)
    return logits.masked_fill(p <= share * p.amax(-1, keepdim=True), -math.inf)


def min_p_in_place(logits, share):
    p = logits.softmax(-1)
    return logits.masked_fill_(p < share * p.amax(-1, keepdim=True), -math.inf)


def min_p_keeps_two(logits, share):
    p = logits.softmax(-1)
    low = p < share * p.amax(-1, keepdim=True)
    return logits.masked_fill(low & (logits < logits.topk(2)[0][..., 1:]), -math.inf)


def min_p_never_under(logits, share):
    p = logits.softmax(-1)
    return logits.masked_fill(p < max(share, 0.3) * p.amax(-1, keepdim=True), -math.inf)


def min_p_of_a_power(logits, share):
    p = logits.softmax(-1)
    limit = share**1.1 * p.amax(-1, keepdim=True)
    return logits.masked_fill(p < limit, -math.inf)


def rows_of_the_first(logits, sampling, generator):
    return sample(logits[:1].expand_as(logits), sampling, generator)


def without_generator(logits, sampling, generator):
    return sample(logits, sampling)


def seeded_anew(logits, sampling, generator):
    return sample(logits, sampling, torch.Generator().manual_seed(0))


def one_limit(pick):
    """A top-k with the same limit for all rows."""

    def wrong(logits, sampling, generator):
        if sampling.top_k is not None:
            limits = logits.topk(min(sampling.top_k, 5)).values[:, -1]
            logits = logits.masked_fill(logits < pick(limits), -math.inf)
        return sample(logits, replace(sampling, top_k=None), generator)

    return wrong


def one_count(logits, sampling, generator):
    """A top-p that keeps as many tokens of each row as of the first."""
    if sampling.top_k is not None:
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.top_p is not None:
        first = keep_top_p(logits[:1], sampling.top_p, sampling.temperature)
        logits = keep_top_k(logits, int((first > -math.inf).sum()))
    return sample(logits, replace(sampling, top_k=None, top_p=None), generator)


def exp_of_large_scores(logits, sampling, generator):
    weights = logits.exp()
    logits = (weights / weights.sum(-1, keepdim=True)).log()
    return sample(logits, sampling, generator)


def more_than_there_are(logits, sampling, generator):
    logits.topk(sampling.top_k or 1)
    return sample(logits, sampling, generator)


@pytest.mark.parametrize("wrong", [exp_of_large_scores, more_than_there_are])
def test_check_sample_tries_large_scores_and_a_large_k(wrong):
    with pytest.raises((ValueError, RuntimeError)):
        checks.check_sample(wrong)


class FullTooEarly(KeyValueCache):
    def append(self, keys, values):
        if self.length + keys.shape[2] >= self.context:
            raise ValueError("full")
        return super().append(keys, values)


class GrowingCache:
    """Right, with torch.cat, unless a subclass makes it wrong."""

    def __init__(self, context):
        self.context, self.length, self.kept = context, 0, None

    def full(self, new):
        return self.length + new > self.context

    def append(self, keys, values):
        if self.full(keys.shape[2]):
            raise ValueError("full")
        if self.kept is not None:
            keys = torch.cat((self.kept[0], keys), dim=2)
            values = torch.cat((self.kept[1], values), dim=2)
        self.kept, self.length = (keys, values), keys.shape[2]
        return keys, values


class FullWithAnIndexError(GrowingCache):
    def append(self, keys, values):
        if self.full(keys.shape[2]):
            raise IndexError("full")
        return super().append(keys, values)


class FullOnlyWhenFull(GrowingCache):
    def full(self, new):
        return self.length >= self.context


class PieceByPiece(GrowingCache):
    """Looks at the piece alone, not at what it holds."""

    def full(self, new):
        return new > self.context


class EightForAll(GrowingCache):
    def full(self, new):
        return self.length + new > 8


class StoresThenRaises(GrowingCache):
    def append(self, keys, values):
        if self.kept is not None:
            keys = torch.cat((self.kept[0], keys), dim=2)
            values = torch.cat((self.kept[1], values), dim=2)
        self.kept = keys, values
        if keys.shape[2] > self.context:
            raise ValueError("full")
        self.length = keys.shape[2]
        return keys, values


def sorted_by_length(model, prompts, count, top_k):
    if single(prompts):
        return generate(model, prompts, count, top_k=top_k)
    return generate(model, sorted(prompts, key=len)[::-1], count, top_k=top_k)


def one_window_for_all(model, prompts, count, top_k):
    if single(prompts):
        return generate(model, prompts, count, top_k=top_k)
    rows = [list(prompt) for prompt in prompts]
    for _ in range(count):
        start = window_start(max(map(len, rows)), model.config.context)
        longest = max(map(len, rows))
        windows = [row[max(0, len(row) - longest + start) :] for row in rows]
        new = [generate(model, row, 1, top_k=top_k)[-1] for row in windows]
        for row, token in zip(rows, new, strict=True):
            row.append(token)
    return rows


def wakes_up(model, prompts, count, top_k, stop=()):
    """A row goes on after its stop token."""
    rows = generate(model, prompts, count, top_k=top_k)
    if not stop:
        return rows
    return [[token for token in row if token not in stop] for row in rows]


def stops_in_the_prompt(model, prompts, count, top_k, stop=()):
    """A row ends before the first stop token, its prompt's too."""
    rows = generate(model, prompts, count, top_k=top_k, stop=stop)
    if not stop:
        return rows
    return [list(takewhile(lambda token: token not in stop, row)) for row in rows]


def no_zeros(model, prompts, count, top_k, stop=(), strip=None):
    """In a batch a 0 of a prompt counts as padding."""
    if single(prompts):
        return generate(model, prompts, count, top_k=top_k, stop=stop)
    short = [strip(prompt) for prompt in prompts]
    rows = generate(model, short, count, top_k=top_k, stop=stop)
    triples = zip(prompts, rows, short, strict=True)
    return [prompt + row[len(rest) :] for prompt, row, rest in triples]


def without_leading_zeros(prompt):
    return list(dropwhile(lambda token: token == 0, prompt))


def ends_with_the_first(model, prompts, count, top_k, stop=()):
    rows = generate(model, prompts, count, top_k=top_k, stop=stop)
    if single(prompts):
        return rows
    sizes = [len(prompt) for prompt in prompts]
    new = min(len(row) - size for row, size in zip(rows, sizes, strict=True))
    return [row[: size + new] for row, size in zip(rows, sizes, strict=True)]


def leaves_dropout_on(model, prompts, count, top_k, stop=()):
    if single(prompts):
        return checks._greedy(model, prompts, count)
    return generate(model, prompts, count, top_k=top_k, stop=stop)


def leaves_eval_on(model, prompts, count, top_k, stop=()):
    return generate(model.eval(), prompts, count, top_k=top_k, stop=stop)


def moves_too_early(model, ids, count, top_k):
    ids = list(ids)
    for _ in range(count):
        start = window_start(len(ids) + 1, 8)
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids[start:]]))[0, -1].argmax()))
    return ids


def all_at_the_end(model, tokenizer, prompt, count, **options):
    yield from list(stream_text(model, tokenizer, prompt, count, **options))


def ignoring(name):
    def write(model, tokenizer, prompt, count, **options):
        options.pop(name, None)
        return stream_text(model, tokenizer, prompt, count, **options)

    return write


WRONG = [
    ("check_sample", rows_of_the_first, "every row has its own logits"),
    ("check_sample", without_generator, "draw from the generator"),
    ("check_sample", seeded_anew, "seed them once"),
    ("check_sample", one_limit(lambda limits: limits[0]), "its own logits and limit"),
    ("check_sample", one_limit(torch.min), "its own logits and limit"),
    ("check_sample", one_count, "its own logits and limit"),
    ("check_cache", PieceByPiece, "cache of 6 that holds 3 took 4 more"),
    ("check_cache", FullOnlyWhenFull, "an empty cache of 6 took 7"),
    ("check_cache", FullWithAnIndexError, "IndexError('full'): raise a ValueError"),
    ("check_cache", EightForAll, "an empty cache of 6 took 7"),
    ("check_cache", StoresThenRaises, "kept what doesn't fit"),
    ("check_cache", FullTooEarly, "8 positions must fit a cache of 8"),
    ("check_generate", sorted_by_length, "come back in its place"),
    ("check_generate", one_window_for_all, "is its window its own"),
    ("check_generate", wakes_up, "must end before its stop token"),
    ("check_generate", stops_in_the_prompt, "stop token 8, the new one"),
    (
        "check_generate",
        lambda *a, stop=(), **k: generate(*a, stop=stop[:1], **k),
        "7 must end a row too",
    ),
    (
        "check_generate",
        partial(no_zeros, strip=without_leading_zeros),
        "gets other tokens in a batch",
    ),
    (
        "check_generate",
        partial(no_zeros, strip=lambda prompt: [t for t in prompt if t]),
        "gets other tokens in a batch",
    ),
    ("check_generate", ends_with_the_first, "ended another row"),
    ("check_generate", leaves_dropout_on, "dropout must be off"),
    ("check_generate", leaves_eval_on, "must be in it afterwards"),
    ("check_generate", moves_too_early, "positions and window"),
    ("check_stream_text", all_at_the_end, "yield each as it comes"),
    ("check_stream_text", ignoring("seed"), "the seed must decide"),
    ("check_stream_text", ignoring("top_p"), "top_p is ignored"),
    ("check_stream_text", ignoring("temperature"), "temperature is ignored"),
    ("check_beam_search", beams_capped, "3 beams from"),
    ("check_beam_search", beams_at_first_only, "extend every text that was kept"),
    ("check_beam_search", beam_that_appends, "copy it"),
    (
        "check_beam_search",
        lambda m, ids, n, b: checks.likeliest_texts(m, ids, 3, b)[0][1],
        "not 5",
    ),
    (
        "check_beam_search",
        lambda m, ids, n, b: checks.likeliest_texts(m, ids, n, min(b, 7))[0][1],
        "8 beams from [6]",
    ),
    ("check_min_p", min_p_of_batch, "each row has its own"),
    ("check_min_p", min_p_without_ties, "mind ties"),
    ("check_min_p", min_p_in_place, "were changed"),
    ("check_min_p", min_p_keeps_two, "not the likeliest alone"),
    ("check_min_p", min_p_never_under, "kept 3 of 5 tokens"),
    ("check_min_p", min_p_of_a_power, "share=0.84 kept the places [0, 1, 2, 3]"),
    ("check_sample", ignores_temperature, "divide the logits"),
    ("check_cache", NoOffset, "wrong position"),
    ("check_cache", OnlyTheNew, "without a cache"),
    ("check_cache", ValuesReversed, "without a cache"),
    ("check_stream_text", cuts_characters, "cut in two"),
    ("check_stream_text", shows_the_stop, "stop token"),
    (
        "check_min_p",
        lambda x, s: x.masked_fill(x.softmax(-1) < s, -math.inf),
        "largest",
    ),
    (
        "check_beam_search",
        lambda model, ids, n, beams: generate(model, ids, n, top_k=1),
        "3 beams from",
    ),
]


@pytest.mark.parametrize(("check", "wrong", "message"), WRONG)
def test_check_names_the_mistake(check, wrong, message):
    with pytest.raises(AssertionError) as caught:
        getattr(checks, check)(wrong)
    assert message in str(caught.value)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("k", [1, None])
def test_scores_that_are_no_numbers(bad, k):
    with pytest.raises(ValueError, match="weights damaged"):
        sample(torch.full((1, 3), bad), Sampling(top_k=k))


def test_top_k_tells_scores_apart_that_the_subtraction_would_make_equal():
    rows = torch.tensor([[0.0, 1.0, -5.6e-37]]).expand(2000, 3)
    assert set(sample(rows, Sampling(temperature=2.0, top_k=2)).tolist()) == {0, 1}


@pytest.mark.parametrize("stop", [5, None, "a"])
def test_stop_is_a_list(model, stop):
    with pytest.raises(ValueError, match="stop must be a list of ids"):
        next(stream_text(model, CharTokenizer("abcdefghijk"), "a", 2, stop=stop))
    with pytest.raises(ValueError, match="stop must be a list of ids"):
        generate(model, [1], 2, stop=stop)


def test_whole_numbers_of_numpy_will_do(model):
    ids = generate(model, [1], 9, seed=3)
    assert generate(model, np.array([1]), np.int64(9), seed=np.int64(3)) == ids
    until = ids[: 1 + ids[1:].index(ids[5])]
    assert generate(model, [1], 9, seed=3, stop=np.array(ids[5:6])) == until
