# Written by tools/tangle.py from book/13_generation.ipynb: change it there.


"""Checks of sampling, caches, batches and streams that name the mistake."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from glassgpt.generation import Sampling
from glassgpt.gpt import GPT, GPTConfig
from glassgpt.tokens import BPETokenizer

_FIVE = torch.tensor([0.05, 0.40, 0.15, 0.10, 0.30])


def _shares(sample: Callable[..., Tensor], sampling: Sampling) -> Tensor:
    """How often each of five tokens is drawn (5,)."""
    generator = torch.Generator().manual_seed(0)
    drawn = sample(_FIVE.log().expand(20_000, 5), sampling, generator)
    return drawn.bincount(minlength=5) / 20_000


def check_sample(sample: Callable[..., Tensor]) -> None:
    """Tokens come as often as temperature, top-k and top-p in this order allow.

    sample: called as sample(logits, sampling, generator).

    Book: 13_generation.html#the-order-of-the-filters
    """
    cases = [
        ({}, _FIVE, "tokens don't come as often as their probability says"),
        ({"temperature": 0.5}, _FIVE**2, "the temperature must divide the logits"),
        ({"top_k": 2}, _FIVE * (_FIVE > 0.2), "top_k=2 must leave two tokens"),
        (
            {"top_p": 0.8},
            _FIVE * (_FIVE > 0.12),
            "top_p=0.8 must leave the three likeliest tokens, the crossing one too",
        ),
        (
            {"temperature": 0.5, "top_p": 0.8},
            _FIVE**2 * (_FIVE > 0.2),
            "temperature must come before top-p",
        ),
        (
            {"top_k": 2, "top_p": 0.5},
            _FIVE * (_FIVE > 0.35),
            "top-k must come before top-p",
        ),
    ]
    for settings, weights, mistake in cases:
        shares = _shares(sample, Sampling(**settings))
        gap = (shares - weights / weights.sum()).abs().max()
        assert gap < 0.02, f"{mistake} (off by {gap:.2f} with {settings})"
    _check_rows_and_generator(sample)


def _check_rows_and_generator(sample: Callable[..., Tensor]) -> None:
    """Each row is drawn by its own logits, by the generator and nothing else."""
    other = torch.tensor([0.84, 0.05, 0.04, 0.04, 0.03]).log() + 200
    rows = torch.stack((_FIVE.log(), other)).repeat(500, 1)  # (1000, 5)
    drawn = sample(rows, Sampling(top_p=0.8), torch.Generator().manual_seed(0))
    assert set(drawn[0::2].tolist()) == {1, 2, 4}, "every row has its own logits"
    assert set(drawn[1::2].tolist()) == {0}, "every row has its own logits and limit"
    generator = torch.Generator().manual_seed(0)
    first, second = (sample(rows, Sampling(), generator) for _ in range(2))
    again = sample(rows, Sampling(), torch.Generator().manual_seed(0))
    assert torch.equal(first, again), "draw from the generator, and only from it"
    assert not torch.equal(first, second), "two draws in a row are the same"


def _small_gpt(context: int = 8, spread: float = 0.7, dropout: float = 0.0) -> GPT:
    """A GPT with random weights, large enough to tell tokens apart."""
    random = torch.Generator().manual_seed(0)
    config = GPTConfig(11, context, 2, 2, 16, dropout, tied=False)
    model = GPT(config).double().eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0.0, spread, generator=random)
    return model


def _check_overflow(cache: Callable[[int], Any]) -> None:
    """What doesn't fit is refused, and what was there stays."""
    part = torch.arange(24.0).view(1, 1, 6, 4)
    kept = cache(6)
    kept.append(part[:, :, :4], part[:, :, :4])
    try:
        kept.append(part[:, :, :3], part[:, :, :3])
    except ValueError:
        pass
    else:
        raise AssertionError("a cache of 6 that holds 4 took 3 more: raise ValueError")
    keys, values = kept.append(part[:, :, 4:], part[:, :, 4:])
    same = torch.equal(keys, part) and torch.equal(values, part)
    assert same, "it raised, but kept what doesn't fit"


@torch.no_grad()
def check_cache(cache: Callable[[int], Any]) -> None:
    """Piece by piece with caches a model returns the logits of all at once.

    cache: called as cache(context), like `KeyValueCache`.

    Book: 13_generation.html#what-stays-the-same
    """
    ids = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8, 1, 8]])
    model = _small_gpt()
    wanted, caches = model(ids), [cache(8) for _ in model.blocks]
    for start, end in ((0, 3), (3, 4), (4, 7), (7, 8)):
        found = model(ids[:, start:end], caches=caches)
        assert caches[0].length == end, (
            f"after {end} tokens the cache says {caches[0].length}:"
            " the next token gets a wrong position"
        )
        gap = (found - wanted[:, start:end]).abs().max().item()
        assert gap < 1e-9, (
            f"the logits of tokens {start} to {end - 1}"
            f" differ by {gap:.1e} from a pass without a cache"
        )
    _check_overflow(cache)


@torch.no_grad()
def _greedy(
    model: GPT, prompt: Sequence[int], count: int, context: int = 8
) -> list[int]:
    """The likeliest tokens, each found by a pass over the whole window."""
    ids = list(prompt)
    for _ in range(count):
        past = max(0, len(ids) - context)
        start = math.ceil(past / (context // 2)) * (context // 2)
        ids.append(int(model(torch.tensor([ids[start:]]))[0, -1].argmax()))
    return ids


def _check_stop(generate: Callable[..., list]) -> None:
    """A row ends at its own new stop token, in a model without dropout."""
    model, prompts = _small_gpt(dropout=0.5), [[8, 2], [6]]
    wanted = [_greedy(model, prompt, 12) for prompt in prompts]
    short, whole = generate(model.train(), prompts, 12, stop=[8], top_k=1)
    assert list(whole) == wanted[1], (
        "the second row differs: is dropout off, and does the stop token of one row "
        "leave the others alone?"
    )
    assert list(short) == wanted[0][: wanted[0].index(8, 2)], (
        f"the row {wanted[0]} must end before its stop token 8, the new one, "
        f"but it is {list(short)}"
    )


def check_generate(generate: Callable[..., list]) -> None:
    """Tokens come as without a cache, past the context too, and in a batch as alone.

    generate: called as generate(model, ids, max_new_tokens, top_k=1), with a prompt
    or several, and with stop; its window is that of `window_start`.

    Book: 13_generation.html#the-loop
    """
    model = _small_gpt()
    for prompt in ([3], [3, 1, 4], [1, 2, 3, 4, 5, 6, 7, 8]):
        found = generate(model, prompt, 20, top_k=1)
        wanted = _greedy(model, prompt, 20)
        assert len(found) == len(wanted), f"{len(found) - len(prompt)} tokens, not 20"
        same = [a == b for a, b in zip(found, wanted, strict=True)]
        assert all(same), (
            f"prompt of {len(prompt)}: token"
            f" {same.index(False)} differs from a pass without a cache:"
            " are positions and window the same?"
        )
    prompts = [[0, 2], [3, 1, 0, 1, 5], [6]]
    for context in (32, 8):  # with 8 the window moves on, for each row by itself
        model = _small_gpt(context)
        found = generate(model, prompts, 12, top_k=1)
        for prompt, row in zip(prompts, found, strict=True):
            wanted = _greedy(model, prompt, 12, context)
            padding = [0] * (5 - len(prompt))
            seen = _greedy(model, padding + prompt, 12, context)[len(padding) :]
            assert list(row) == wanted or list(row) != seen, (
                f"the prompt of {len(prompt)} takes its padding for words"
            )
            assert list(row) == wanted, (
                f"the prompt of {len(prompt)} gets other tokens in a batch than "
                "alone: is its padding hidden, do its positions begin at its first "
                "token, is its window its own, and does it come back in its place?"
            )
    _check_stop(generate)


@torch.no_grad()
def _parrot(ids: Sequence[int], vocab_size: int) -> GPT:
    """A GPT that says these ids, whatever it is told: only the position counts."""
    size = len(ids)
    model = GPT(GPTConfig(vocab_size, size, 1, 1, size, tied=False)).eval()
    for block in model.blocks:  # that add nothing
        block.attention.projection.weight.zero_()
        block.mlp.projection.weight.zero_()
    model.tokens.weight.zero_()
    model.positions.weight.copy_(torch.eye(size))
    for place, token in enumerate(ids[1:]):
        model.head.weight[token, place] = 100.0
    return model


def check_stream_text(stream_text: Callable[..., Iterator[str]]) -> None:
    """The pieces join to the text, come at once, and no character is cut in two.

    stream_text: called as stream_text(model, tokenizer, prompt, max_new_tokens) with
    some of temperature, top_k, top_p, seed and stop, by name.

    Book: 13_generation.html#text-as-it-comes
    """
    tokenizer = BPETokenizer.train("", 257)
    text = "a café, 一座塔 🗼!"
    ids = tokenizer.encode(text)
    model, count = _parrot(ids, 257), len(ids) - 1
    given = stream_text(model, tokenizer, "a", count, top_k=1, temperature=1, seed=0)
    pieces = [piece for piece in given if piece]
    assert "\ufffd" not in "".join(pieces), "a character was cut in two"
    assert "".join(pieces) == text[1:], f"the pieces join to {''.join(pieces)!r}"
    end = ids[text.encode().index(b"!")]
    short = "".join(stream_text(model, tokenizer, "a", count, top_k=1, stop=[end]))
    assert short == text[1:-1], "the stop token must end the text and not be shown"
    _check_at_once(stream_text, model, tokenizer, count)


def _check_at_once(
    stream_text: Callable, model: GPT, tokenizer: BPETokenizer, count: int
) -> None:
    """The first piece comes after a pass of the model or two, not after all."""
    passes: list[int] = []
    hook = model.blocks[0].register_forward_hook(lambda *_: passes.append(1))
    try:
        next(iter(stream_text(model, tokenizer, "a", count, top_k=1)))
    finally:
        hook.remove()
    assert len(passes) <= 2, (
        f"the first piece came after {len(passes)} tokens: yield each as it comes"
    )


def check_min_p(min_p: Callable[[Tensor, float], Tensor]) -> None:
    """Tokens stay that have at least a share of the likeliest one's probability.

    Book: 13_generation.html#exercise-1-another-filter
    """
    even = torch.tensor([0.24, 0.20, 0.20, 0.20, 0.16])
    logits = torch.stack((_FIVE, even)).log() + 3
    given = logits.clone()
    stays = min_p(logits, 0.3) > -math.inf
    assert torch.equal(given, logits), "the logits given were changed: return new ones"
    kept = stays[0].nonzero().flatten().tolist()
    assert kept != [1, 4], "compare with share times the largest probability, not share"
    assert kept == [1, 2, 4], f"share=0.3 kept the places {kept}, not 1, 2 and 4"
    for share, count in ((0.83, 4), (0.84, 1), (0.1, 5)):  # 0.20 / 0.24 is 0.833
        found = int((min_p(logits, share)[1] > -math.inf).sum())
        assert found == count, (
            f"share={share} kept {found} tokens of the second row, not {count}: "
            "each row has its own limit, share times its largest probability"
        )
    high = min_p(torch.tensor([[1000.0, 1000.0, 990.0]]), 1.0)[0] > -math.inf
    assert high.tolist() == [True, True, False], (
        "of the logits 1000, 1000 and 990 with share=1 the first two stay: mind ties, "
        "and numbers too large for exp"
    )


@torch.no_grad()
def likeliest_texts(
    model: GPT, ids: list[int], length: int, beams: int
) -> list[tuple[float, list[int]]]:
    """The likeliest texts after `length` steps of beam search, with their sums.

    Book: 13_generation.html#exercise-3-look-ahead
    """
    texts = [(0.0, ids)]
    for _ in range(length):
        longer = []
        for total, text in texts:
            scores = model(torch.tensor([text]))[0, -1].log_softmax(-1)
            best = scores.topk(beams)  # more of one text are never kept
            pairs = zip(best.values.tolist(), best.indices.tolist(), strict=True)
            longer += [(total + score, [*text, n]) for score, n in pairs]
        texts = sorted(longer, reverse=True)[:beams]
    return texts


def check_beam_search(beam_search: Callable[..., list[int]]) -> None:
    """It keeps the likeliest texts at each step; with one beam it is greedy.

    Book: 13_generation.html#exercise-3-look-ahead
    """
    model = _small_gpt(spread=0.25)
    for prompt in ([1, 2], [9, 0], [0], [6]):
        for length, beams in ((3, 1), (3, 3), (5, 3), (5, 8)):
            found = list(beam_search(model, list(prompt), length, beams))
            best = likeliest_texts(model, prompt, length, beams)[0][1]
            assert len(found) == len(best), (
                f"{len(found)} ids came back, not the prompt and {length} new ones"
            )
            assert found == best, (
                f"{beams} beams from {prompt} give {found}, not {best}: extend every "
                "text that was kept, and keep those with the largest sums "
                "(of log-probabilities, not of logits)"
            )
