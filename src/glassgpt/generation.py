# Written by tools/tangle.py from book/13_generation.ipynb: change it there.
"""Generation: choosing the next token, again and again."""

import codecs
import math
import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from glassgpt.gpt import GPT
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

    temperature: float = 1.0  # 0: the likeliest; below 1: careful; above: bolder
    top_k: int | None = None  # draw from the k likeliest; 1: always the likeliest
    top_p: float | None = None  # draw from the likeliest whose shares reach p
    seed: int | None = None  # the same text every time

    def __post_init__(self) -> None:
        t, k, p, seed = self.temperature, self.top_k, self.top_p, self.seed
        if not isinstance(t, Real) or not 0 <= t < math.inf:
            raise ValueError(f"temperature must be finite and not negative, not {t!r}")
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
    if sampling.top_k == 1 or sampling.temperature < 1e-30:
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
    padding = [longest - len(row) for row in rows]
    padded = [[0] * count + list(row) for count, row in zip(padding, rows, strict=True)]
    starts = torch.tensor(padding, device=device) if any(padding) else None
    return torch.tensor(padded, device=device), starts


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


def _as_ids(prompt: Iterable[Any], vocab_size: int, room: int) -> list[int]:
    """A prompt as a list of integers; ValueError for what a model can't read."""
    try:
        ids = [operator.index(token) for token in prompt]
    except TypeError:
        raise ValueError(
            f"a prompt must be a list of ids, not {prompt!r:.60}: "
            "generate_text(model, tokenizer, text, ...) takes a text, "
            "and tokenizer.encode(text) makes ids of it"
        ) from None
    if not ids:
        raise ValueError("a prompt needs at least one token")
    if len(ids) > room:
        raise ValueError(
            f"{len(ids)} tokens, but the context has room for {room}: "
            "hand in the last ones, ids[-context:]"
        )
    for token in ids:
        if not 0 <= token < vocab_size:
            raise ValueError(
                f"id {token} is out of range: ids are 0 to {vocab_size - 1}"
            )
    return ids


@torch.inference_mode()
def _next_logits(
    model: GPT, ids: Tensor, starts: Tensor | None, caches: list[KeyValueCache]
) -> Tensor:
    """Logits (B, V) of the token after ids (B, T), which follow what the caches hold.

    starts: the columns where the rows begin, as of `pad_left`.
    """
    positions = mask = None
    if starts is not None:
        positions, mask = _past_padding(starts, caches[0].length, ids.shape[1])
    hidden = model.hidden_states(ids, positions, mask, caches)
    return model.head(hidden[:, -1])


def _write(
    model: GPT,
    rows: list[list[int]],
    max_new_tokens: int,
    stop: set[int],
    sampling: Sampling,
) -> Iterator[list[int | None]]:
    """Append tokens to each row, and yield them step by step."""
    context, device = model.config.context, next(model.parameters()).device
    generator = torch.Generator(device)
    seed = generator.seed() if sampling.seed is None else int(sampling.seed)
    generator.manual_seed(seed)
    running = [True] * len(rows)
    caches: list[KeyValueCache] = []
    for _ in range(max_new_tokens):
        if not caches or caches[0].length == context:  # prefill
            windows = [row[window_start(len(row), context) :] for row in rows]
            ids, starts = pad_left(windows, device)
            caches = [KeyValueCache(context) for _ in model.blocks]
        else:  # decode
            ids = torch.tensor([row[-1:] for row in rows], device=device)
        logits = _next_logits(model, ids, starts, caches)
        step: list[int | None] = []
        for index, token in enumerate(sample(logits, sampling, generator).tolist()):
            rows[index].append(token)
            if token in stop:
                running[index] = False
            step.append(token if running[index] else None)
        if not any(running):
            return
        yield step


def stream(
    model: GPT,
    prompts: Iterable[Sequence[int]],
    max_new_tokens: int,
    stop: Iterable[int] = (),
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
) -> Iterator[list[int | None]]:
    """Continue several prompts and yield the next id of each, step by step.

    Prompts may differ in length, and must fit into the context; a text that grows
    beyond it goes on in a window, see `window_start`. stop: ids that end a row; it
    yields None from there on. temperature, top_k, top_p, seed: as in `Sampling`.
    The model is put into evaluation mode and left in it. Raises ValueError, at once,
    for an empty or too long prompt, ids out of range, a negative number of tokens, and
    settings that `Sampling` refuses.

    Book: 13_generation.html#the-loop
    """
    sampling = Sampling(temperature, top_k, top_p, seed)
    size, context = model.config.vocab_size, model.config.context
    rows = [_as_ids(prompt, size, context) for prompt in prompts]
    if not rows:
        raise ValueError("give one prompt at least")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be at least 0, not {max_new_tokens}")
    stop_ids = {operator.index(token) for token in stop}
    model.eval()
    return _write(model, rows, max_new_tokens, stop_ids, sampling)


_Row = TypeVar("_Row", int, list[int], Sequence[int])  # of one prompt, or of several


def generate(
    model: GPT,
    ids: Iterable[_Row],
    max_new_tokens: int,
    stop: Iterable[int] = (),
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
) -> list[_Row]:
    """Continue a prompt, or several; return prompt and continuation as lists of ids.

    ids: one prompt, or a batch of prompts, as lists or tensors; of a text,
    `generate_text`. stop: ids that end a row; they are not returned. temperature,
    top_k, top_p, seed: as in `Sampling`. Without a seed every call differs. Greedy
    (temperature=0) rows of a batch are the same as alone, up to rounding. The model
    gets its mode back. Raises ValueError as `stream`.

    Book: 13_generation.html#the-loop
    """
    prompts = list(ids) if isinstance(ids, Iterable) else [ids]
    single = all(np.ndim(token) == 0 for token in prompts)
    size, context = model.config.vocab_size, model.config.context
    rows = [_as_ids(p, size, context) for p in ([prompts] if single else prompts)]
    with in_mode(model, training=False):
        steps = stream(
            model,
            rows,
            max_new_tokens,
            stop,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
        )
        for step in steps:
            for row, token in zip(rows, step, strict=True):
                if token is not None:
                    row.append(token)
    return rows[0] if single else rows


def stream_text(
    model: GPT,
    tokenizer: Any,
    prompt: str | Sequence[int],
    max_new_tokens: int,
    stop: Iterable[int] = (),
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
) -> Iterator[str]:
    """Continue a text and yield printable pieces of what is new, as they come.

    prompt: a text, or its ids. Bytes that are part of a character are held back until
    it is complete. tokenizer: one of this package. The rest, and errors: as in
    `stream`.

    Book: 13_generation.html#text-as-it-comes
    """
    if not hasattr(tokenizer, "decode_bytes"):
        raise ValueError(
            f"the second argument must be a tokenizer, not {tokenizer!r:.60}: "
            "to go on from ids without a tokenizer, call generate(model, ids, ...)"
        )
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    steps = stream(
        model,
        [ids],
        max_new_tokens,
        stop,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
    )
    parts = (tokenizer.decode_bytes(step) for step in steps)
    return codecs.iterdecode(parts, "utf-8", errors="replace")


def generate_text(
    model: GPT,
    tokenizer: Any,
    prompt: str,
    max_new_tokens: int,
    stop: Iterable[int] = (),
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
) -> str:
    """Continue a text; return the prompt and what is new as one text.

    stop: ids that end the text. temperature, top_k, top_p, seed: as in `Sampling`;
    temperature=0 takes the likeliest token each time. The model gets its mode back.
    Raises ValueError as `stream_text`.

    Book: 13_generation.html#text-as-it-comes
    """
    with in_mode(model, training=False):
        pieces = stream_text(
            model,
            tokenizer,
            prompt,
            max_new_tokens,
            stop,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
        )
        return prompt + "".join(pieces)


@torch.inference_mode()
def log_probabilities(model: GPT, ids: Sequence[int] | Tensor) -> Tensor:
    """How likely a text is to the model: (T - 1,) log-probabilities in nats.

    ids: T tokens, at most one more than the context. The first number belongs to the
    second token, given the first; the sum is that of the whole text, given the first.
    Raises ValueError for fewer than two ids, for more than fit, and for ids out of
    range.

    Book: 13_generation.html#how-likely-is-a-given-text
    """
    text = _as_ids(ids, model.config.vocab_size, model.config.context + 1)
    if len(text) < 2:
        raise ValueError("a text needs two ids at least: the first one is given")
    batch = torch.tensor([text], device=next(model.parameters()).device)  # (1, T)
    with in_mode(model, training=False):
        logits = model(batch[:, :-1])[0]  # (T - 1, V)
    return log_softmax(logits.float()).gather(-1, batch[0, 1:, None])[:, 0]
