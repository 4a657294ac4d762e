# Written by tools/tangle.py from book/13_generation.ipynb: change it there.
"""Generation: choosing the next token, again and again."""

import codecs
import math
import operator
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, TypedDict, TypeVar, Unpack

import numpy as np
import torch
from torch import Tensor

from glassgpt.gpt import GPT, check_ids
from glassgpt.softmax import log_softmax, softmax
from glassgpt.training import in_mode


def keep_top_k(logits: Tensor, top_k: int) -> Tensor:
    """Logits (..., V) where all but the k highest are -inf; ties with the k-th stay.

    Source: Fan, Lewis and Dauphin (2018).

    Book: 13_generation.html#the-filters
    """
    lowest = logits.topk(min(top_k, logits.shape[-1])).values[..., -1:]
    return logits.masked_fill(logits < lowest, -math.inf)


def keep_top_p(logits: Tensor, top_p: float, temperature: float = 1.0) -> Tensor:
    """Logits (..., V) where only the likeliest tokens stay that reach p together.

    Their probabilities are those at the temperature. The token that crosses p stays,
    so at least one does. Source: Holtzman et al. (2020).

    Book: 13_generation.html#the-filters
    """
    ordered, order = logits.sort(dim=-1, descending=True)
    weights = softmax(ordered, temperature=temperature)
    before = weights.cumsum(dim=-1) - weights  # what the likelier ones have
    forbidden = (before >= top_p) & (top_p < 1)  # at p = 1 rounding forbids none
    forbidden[..., 0] = False  # a p near 0 becomes 0: keep the first all the same
    ordered = ordered.masked_fill(forbidden, -math.inf)
    return torch.empty_like(logits).scatter(-1, order, ordered)


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn: temperature first, then top-k, then top-p.

    Raises ValueError for settings that no token could be drawn with.

    Book: 13_generation.html#the-order-of-the-filters
    """

    temperature: float = 1.0  # below 1: more careful; above: bolder
    top_k: int | None = None  # draw from the k likeliest; 1: always the likeliest
    top_p: float | None = None  # draw from the likeliest whose shares reach p
    seed: int | None = None  # the same text every time

    def __post_init__(self) -> None:
        t, k, p, seed = self.temperature, self.top_k, self.top_p, self.seed
        if not isinstance(t, Real) or not 0 < t < math.inf:
            wanted = "positive and finite (for the likeliest token, top_k=1)"
            raise ValueError(f"temperature must be {wanted}, not {t!r}")
        if k is not None and not (isinstance(k, Integral) and k >= 1):
            raise ValueError(f"top_k must be a whole number from 1 up, not {k!r}")
        if p is not None and not (isinstance(p, Real) and 0 < p <= 1):
            raise ValueError(f"top_p must lie in (0, 1], not {p!r}")
        if seed is not None and not (isinstance(seed, Integral) and 0 <= seed < 2**64):
            raise ValueError(f"seed must be a whole number of 64 bits, not {seed!r}")


def sample(
    logits: Tensor,
    sampling: Sampling = Sampling(),
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw one token id (B,) for each row of logits (B, V).

    generator: the source of randomness, on the device of the logits; by default
    PyTorch's own. (The seed is for `generate` and `stream`.)
    Raises ValueError for rows whose highest logit is not finite.

    Book: 13_generation.html#the-order-of-the-filters
    """
    logits = logits.float()
    highest, likeliest = logits.max(dim=-1)
    if not highest.isfinite().all():
        raise ValueError("the scores are not numbers: are the model's weights damaged?")
    if sampling.top_k == 1:
        return likeliest
    if sampling.top_k is not None:
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.top_p is not None:
        logits = keep_top_p(logits, sampling.top_p, sampling.temperature)
    probabilities = softmax(logits, temperature=sampling.temperature)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]


class KeyValueCache:
    """The keys and values of one layer, kept for every position seen so far.

    context: for how many positions room is reserved. length: how many are kept.
    Source: Shazeer (2019).

    Book: 13_generation.html#what-stays-the-same
    """

    def __init__(self, context: int):
        self.context, self.length = context, 0

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store what is new (B, H, T, D) and return all of it so far.

        Raises ValueError for more positions than there is room for.
        """
        B, H, new, D = keys.shape
        end = self.length + new
        if end > self.context:
            raise ValueError(f"{end} positions don't fit a cache of {self.context}")
        if self.length == 0:
            self.keys = keys.new_empty(B, H, self.context, D)
            self.values = torch.empty_like(self.keys)
        # narrow(axis, start, length) is a view of a part.
        self.keys.narrow(2, self.length, new).copy_(keys)
        self.values.narrow(2, self.length, new).copy_(values)
        self.length = end
        return self.keys.narrow(2, 0, end), self.values.narrow(2, 0, end)


def window_start(length: int, context: int) -> int:
    """Where the part of `length` tokens begins that a model still sees.

    When the context is full, the window moves on by half a context, so that the cache
    is rebuilt only once in that many tokens.

    Book: 13_generation.html#past-the-context
    """
    half = max(context // 2, 1)
    return max(0, math.ceil((length - context) / half)) * half


def pad_left(
    rows: Sequence[Sequence[int]], device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor | None]:
    """Rows of different length as ids (B, T), and the column where each begins (B,).

    The columns are None where all rows have the same length. Padding has id 0.

    Book: 13_generation.html#several-prompts-at-once
    """
    longest = max(len(row) for row in rows)
    ids = [[0] * (longest - len(row)) + list(row) for row in rows]
    padding = [longest - len(row) for row in rows]
    starts = torch.tensor(padding, device=device) if any(padding) else None
    return torch.tensor(ids, device=device), starts


def _past_padding(starts: Tensor, first: int, count: int) -> tuple[Tensor, Tensor]:
    """Positions (B, T) and mask (B, 1, T, S) of rows that begin at `starts` (B,).

    first: how many columns the caches hold; count: T, how many follow.
    """
    keys = torch.arange(first + count, device=starts.device)
    queries = keys[first:, None]  # (T, 1): their columns
    # Padding sees itself: some kernels make nan of a row that may look nowhere.
    begun = (keys >= starts[:, None, None]) | (keys == queries)  # (B, T, S)
    positions = (keys[first:] - starts[:, None]).clamp(min=0)
    return positions, ((keys <= queries) & begun)[:, None]


def _whole_numbers(ids: Iterable[Any], name: str) -> list[int]:
    """Ids as a list of integers; ValueError where they are something else."""
    try:
        return [operator.index(token) for token in ids]
    except TypeError:
        raise ValueError(f"{name} must be a list of ids, not {ids!r:.60}") from None


def _check_range(ids: Iterable[int], size: int) -> None:
    if wrong := [token for token in ids if not 0 <= token < size]:
        raise ValueError(f"id {wrong[0]} is out of range: ids are 0 to {size - 1}")


@torch.inference_mode()
def _steps(
    model: GPT, rows: list[list[int]], count: int, ends: set[int], sampling: Sampling
) -> Iterator[list[int | None]]:
    """Append up to `count` tokens to each row, and yield them step by step."""
    context, device = model.config.context, next(model.parameters()).device
    dice = torch.Generator(device)
    dice.manual_seed(dice.seed() if sampling.seed is None else int(sampling.seed))
    running = [True] * len(rows)
    caches, starts, parts = [], None, list(model.modules())
    for _ in range(count):
        if caches and caches[0].length < context:
            ids = torch.tensor([row[-1:] for row in rows], device=device)
        else:
            windows = [row[window_start(len(row), context) :] for row in rows]
            ids, starts = pad_left(windows, device)
            caches = [KeyValueCache(context) for _ in model.blocks]
        positions = mask = None
        if starts is not None:
            positions, mask = _past_padding(starts, caches[0].length, ids.shape[1])
        awake = any(part.training for part in parts)
        with in_mode(model, training=False) if awake else nullcontext():
            last = model.hidden_states(ids, positions, mask, caches)[:, -1]
            new = sample(model.head(last), sampling, dice).tolist()
        for row, token in enumerate(new):
            rows[row].append(token)
            running[row] &= token not in ends
        if not any(running):
            return
        yield [t if goes else None for t, goes in zip(new, running, strict=True)]


class SamplingOptions(TypedDict, total=False):
    """The fields of `Sampling`, each of which may be left out: for type checkers.

    Book: 13_generation.html#the-loop
    """

    temperature: float
    top_k: int | None
    top_p: float | None
    seed: int | None


def stream(
    model: GPT,
    prompts: Iterable[Sequence[int]],
    max_new_tokens: int,
    stop: Iterable[int] = (),
    **settings: Unpack[SamplingOptions],
) -> Iterator[list[int | None]]:
    """Continue several prompts and yield the next id of each, step by step.

    Prompts may differ in length; of one longer than the context the model sees the
    end, see `window_start`. stop: ids that end a row; it yields None from there on.
    settings: those of `Sampling`. Between two steps the model is in the mode in which
    it was. Raises ValueError, at once, for an empty prompt, ids out of range, a
    negative number of tokens, and settings that `Sampling` refuses.

    Book: 13_generation.html#the-loop
    """
    sampling = Sampling(**settings)
    rows = [_whole_numbers(prompt, "a prompt") for prompt in prompts]
    size, ends = model.config.vocab_size, set(_whole_numbers(stop, "stop"))
    if not rows or not all(rows):
        raise ValueError("a prompt needs at least one token")
    for row in rows:
        _check_range(row, size)
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be at least 0, not {max_new_tokens}")
    return _steps(model, rows, max_new_tokens, ends, sampling)


_Row = TypeVar("_Row", int, list[int], Sequence[int])  # of one prompt, or of several


def generate(
    model: GPT,
    ids: Iterable[_Row],
    max_new_tokens: int,
    stop: Iterable[int] = (),
    **settings: Unpack[SamplingOptions],
) -> list[_Row]:
    """Continue a prompt, or several; return prompt and continuation as lists of ids.

    ids: one prompt, or a batch of prompts, as lists or tensors. stop: ids that end a
    row; they are not returned. settings: temperature, top_k, top_p and seed, see
    `Sampling`. Without a seed every call differs. Greedy (top_k=1) rows of a batch are
    the same as alone, up to rounding. Raises ValueError as `stream`.

    Book: 13_generation.html#the-loop
    """
    prompts = list(ids)
    single = not prompts or np.ndim(prompts[0]) == 0
    prompts = [prompts] if single else prompts
    rows = [_whole_numbers(prompt, "a prompt") for prompt in prompts]
    for new in stream(model, rows, max_new_tokens, stop, **settings):
        for row, token in zip(rows, new, strict=True):
            if token is not None:
                row.append(token)
    return rows[0] if single else rows


def stream_text(
    model: GPT,
    tokenizer: Any,
    prompt: str | Sequence[int],
    max_new_tokens: int,
    stop: Iterable[int] = (),
    **settings: Unpack[SamplingOptions],
) -> Iterator[str]:
    """Continue a text and yield printable pieces of what is new, as they come.

    prompt: a text, or its ids. Bytes that are part of a character are held back until
    it is complete. tokenizer: one of this package. stop, settings and errors: as in
    `generate`.

    Book: 13_generation.html#text-as-it-comes
    """
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    steps = stream(model, [ids], max_new_tokens, stop, **settings)
    parts = (tokenizer.decode_bytes(new) for new in steps)
    return codecs.iterdecode(parts, "utf-8", errors="replace")


@torch.inference_mode()
def log_probabilities(model: GPT, ids: Sequence[int] | Tensor) -> Tensor:
    """How likely a text is to the model: (T - 1,) log-probabilities in nats.

    ids: T tokens, at most one more than the context. The first number belongs to the
    second token, given the first; the sum is that of the whole text, given the first.
    Raises ValueError for fewer than two ids and for what the model refuses.

    Book: 13_generation.html#how-likely-is-a-given-text
    """
    device = next(model.parameters()).device
    size, text = model.config.vocab_size, _whole_numbers(ids, "a text")
    _check_range(text, size)  # one beyond 64 bits fits no tensor
    ids = torch.tensor([text], device=device).long()  # (1, T)
    check_ids(ids, size, model.config.context + 1)
    with in_mode(model, training=False):
        logits = model(ids[:, :-1])[0]  # (T - 1, V)
    return log_softmax(logits.float()).gather(-1, ids[0, 1:, None])[:, 0]
