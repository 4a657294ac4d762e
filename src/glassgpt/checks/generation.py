# Written by tools/tangle.py from book/13_generation.ipynb: change it there.


"""Checks of sampling, caches, batches and streams that name the mistake."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from glassgpt.checks.expect import close, expect_same
from glassgpt.generation import Sampling
from glassgpt.gpt import GPT, GPTConfig
from glassgpt.tokens import BPETokenizer

_FIVE = torch.tensor([0.05, 0.40, 0.15, 0.10, 0.30])


_FIVE = torch.tensor([0.05, 0.40, 0.15, 0.10, 0.30])


def check_sample(sample: Callable[..., Tensor]) -> None:
    """Tokens come as often as temperature, top-k and top-p in this order allow.

    sample: called as sample(logits, sampling, generator).

    Book: 13_generation.html#the-order-of-the-filters
    """
    logits = _FIVE.log().expand(20_000, 5)
    wrong_p = "top_p=0.8 must leave the three likeliest tokens, the crossing one too"
    for settings, weights, mistake in (
        ({}, _FIVE, "tokens don't come as often as their probability says"),
        ({"temperature": 0.5}, _FIVE**2, "the temperature must divide the logits"),
        ({"top_k": 2}, _FIVE * (_FIVE > 0.2), "top_k=2 must leave two tokens"),
        ({"top_p": 0.8}, _FIVE * (_FIVE > 0.12), wrong_p),
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
    ):
        sampling = Sampling(**settings)
        drawn = sample(logits, sampling, torch.Generator().manual_seed(0))
        shares = drawn.bincount(minlength=5) / 20_000
        gap = (shares - weights / weights.sum()).abs().max()
        assert gap < 0.02, f"{mistake} (off by {gap:.2f} with {settings})"
    steep = torch.tensor([0.84, 0.05, 0.04, 0.04, 0.03])  # top_p=0.8 leaves the first
    logits = torch.stack((_FIVE.log(), steep.log() + 200)).repeat(500, 1)
    drawn = sample(logits, Sampling(top_p=0.8), torch.Generator().manual_seed(0))
    kept = set(drawn[0::2].tolist()), set(drawn[1::2].tolist())
    assert kept == ({1, 2, 4}, {0}), "every row has its own logits and limit"
    generator = torch.Generator().manual_seed(0)
    drawn, second = (sample(logits, Sampling(), generator) for _ in range(2))
    again = sample(logits, Sampling(), torch.Generator().manual_seed(0))
    assert torch.equal(drawn, again), "draw from the generator, and only from it"
    assert not torch.equal(drawn, second), "two draws in a row are the same"


def _small_gpt(context: int = 8, spread: float = 0.7, dropout: float = 0.0) -> GPT:
    """A GPT with random weights, large enough to tell tokens apart."""
    random = torch.Generator().manual_seed(0)
    config = GPTConfig(11, context, 2, 2, 16, dropout, tied=False)
    with torch.random.fork_rng([]):  # what follows draws as before
        model = GPT(config).double().eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0.0, spread, generator=random)
    return model


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
        if start == 4:
            _check_overflow(caches[0])
        found = model(ids[:, start:end], caches=caches)
        assert caches[0].length == end, (
            f"after {end} tokens the cache says {caches[0].length}:"
            " the next token gets a wrong position"
        )
        assert close(found, wanted[:, start:end]), (
            f"the logits of tokens {start} to {end - 1} differ from those of a pass"
            " without a cache"
        )


def _check_overflow(cache: Any) -> None:
    """A cache of 8 positions that holds 4 refuses 5 more."""
    part = torch.zeros(2, 2, 5, 8, dtype=torch.float64)
    try:
        cache.append(part, part)
    except ValueError:
        return
    raise AssertionError("a cache of 8 that holds 4 took 5 more: raise ValueError")


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


def check_generate(generate: Callable[..., list]) -> None:
    """Tokens come as without a cache, past the context too, and in a batch as alone.

    generate: called as generate(model, ids, max_new_tokens, top_k=1), with a prompt
    or several, and with stop; its window is that of `window_start`.

    Book: 13_generation.html#the-loop
    """
    model = _small_gpt()
    for prompt in ([3], [3, 1, 4], [1, 2, 3, 4, 5, 6, 7, 8]):
        found = generate(model, prompt, 20, top_k=1)
        assert list(found) == _greedy(model, prompt, 20), (
            f"after a prompt of {len(prompt)} the tokens differ from those of passes"
            " without a cache: are positions and window the same?"
        )
    prompts = [[0, 2], [3, 1, 0, 1, 5], [6]]
    for context in (32, 8):  # with 8 the window moves on, for each row by itself
        model = _small_gpt(context)
        found = generate(model, prompts, 12, top_k=1)
        for prompt, row in zip(prompts, found, strict=True):
            padding = [0] * (5 - len(prompt))
            seen = _greedy(model, padding + prompt, 12, context)[len(padding) :]
            wanted = _greedy(model, prompt, 12, context)
            assert list(row) == wanted or list(row) != seen, (
                f"the prompt of {len(prompt)} takes its padding for words"
            )
            assert list(row) == wanted, (
                f"the prompt of {len(prompt)} gets other tokens in a batch than alone:"
                " is its padding hidden, do its positions begin at its first token, is"
                " its window its own, and does it come back in its place?"
            )
    model, prompts = _small_gpt(dropout=0.5), [[8, 2], [6]]
    stopped, whole = (_greedy(model, prompt, 12) for prompt in prompts)
    found = generate(model.train(), prompts, 12, stop=[8], top_k=1)
    assert list(found[1]) == whole, (
        "the second row differs: is dropout off, and does the stop token of one row "
        "leave the others alone?"
    )
    assert list(found[0]) == stopped[: stopped.index(8, 2)], (
        f"the row {stopped} must end before its stop token 8, the new one, but it is"
        f" {list(found[0])}"
    )


@torch.no_grad()
def _parrot(ids: Sequence[int], vocab_size: int) -> GPT:
    """A GPT that says these ids, whatever it is told: only the position counts."""
    size = len(ids)
    with torch.random.fork_rng([]):
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
    top_k and stop by name.

    Book: 13_generation.html#text-as-it-comes
    """
    tokenizer = BPETokenizer.train("", 257)
    text = "a café, 一座塔 🗼!"
    ids = tokenizer.encode(text)
    model, count = _parrot(ids, 257), len(ids) - 1
    joined = "".join(stream_text(model, tokenizer, "a", count, top_k=1))
    assert "\ufffd" not in joined, "a character was cut in two"
    assert joined == text[1:], f"the pieces join to {joined!r}"
    end = ids[text.encode().index(b"!")]
    short = "".join(stream_text(model, tokenizer, "a", count, top_k=1, stop=[end]))
    assert short == text[1:-1], "the stop token must end the text and not be shown"
    passes: list[int] = []
    model.blocks[0].register_forward_hook(lambda *_: passes.append(1))
    next(iter(stream_text(model, tokenizer, "a", count, top_k=1)))
    assert len(passes) <= 2, (
        f"the first piece came after {len(passes)} tokens: yield each as it comes"
    )


def check_min_p(min_p: Callable[[Tensor, float], Tensor]) -> None:
    """Tokens stay that have at least a share of the likeliest one's probability.

    Book: 13_generation.html#exercise-1-another-filter
    """

    def stays(logits: Tensor, share: Tensor) -> Tensor:
        p = logits.softmax(-1)
        return (p >= share * p.amax(-1, keepdim=True)).double()

    mistakes = {
        "compare with share times the largest probability, not with share": (
            lambda logits, share: (logits.softmax(-1) >= share).double()
        ),
        "each row has its own limit, share times its largest probability": (
            lambda logits, share: (
                logits.softmax(-1) >= share * logits.softmax(-1).max()
            ).double()
        ),
    }
    even = torch.tensor([0.24, 0.20, 0.20, 0.20, 0.16])
    logits = torch.stack((_FIVE, even)).log() + 3
    high = torch.tensor([[1000.0, 1000.0, 990.0]])
    hint = "Mind ties, and numbers too large for exp"
    for x, share, known in (
        (logits, 0.3, mistakes),
        (logits, 0.83, mistakes),
        (logits, 0.84, mistakes),
        (high, 1.0, {}),
    ):
        expect_same(
            lambda x, share: (min_p(x, share.item()) > -math.inf).double(),
            stays,
            x,
            torch.tensor(share, dtype=torch.float64),
            mistakes=known,
            gradients=False,
            hint=f"1 is a token that stays with share={share}, 0 one that goes. {hint}",
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
