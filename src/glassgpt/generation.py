# Written by tools/tangle.py from book/13_generation.ipynb: change it there.
"""Generation: choosing the next token, again and again."""

import codecs
import copy
import math
import operator
from collections.abc import Iterator, Sequence
from numbers import Integral, Real
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glassgpt.gpt import GPT
from glassgpt.softmax import softmax


def _check_settings(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raise ValueError for settings that no token could be drawn with."""
    if not isinstance(temperature, Real) or not 0 < temperature < math.inf:
        raise ValueError(
            f"temperature must be positive and finite, not {temperature!r}: for the "
            "likeliest token every time use top_k=1"
        )
    if top_k is not None and (not isinstance(top_k, Integral) or top_k < 1):
        raise ValueError(f"top_k must be a whole number from 1 up, not {top_k!r}")
    if top_p is not None and (not isinstance(top_p, Real) or not 0 < top_p <= 1):
        raise ValueError(f"top_p must lie in (0, 1], not {top_p!r}")


def keep_top_k(logits: Tensor, top_k: int) -> Tensor:
    """Logits (..., V) where all but the k highest are -inf; ties with the k-th stay.

    Raises ValueError for top_k below 1. Source: Fan, Lewis and Dauphin (2018).

    Book: 13_generation.html#the-filters
    """
    _check_settings(1.0, top_k, None)
    if top_k >= logits.shape[-1]:
        return logits
    lowest = logits.topk(top_k, dim=-1).values[..., -1:]
    return logits.masked_fill(logits < lowest, -math.inf)


def keep_top_p(logits: Tensor, top_p: float, temperature: float = 1.0) -> Tensor:
    """Logits (..., V) where only the likeliest tokens stay that reach p together.

    Their probabilities are those at the temperature; the logits that stay do so
    unchanged. The token that crosses p stays, so at least one does. Raises ValueError
    for top_p outside (0, 1]. Source: Holtzman et al. (2020).

    Book: 13_generation.html#the-filters
    """
    _check_settings(1.0, None, top_p)
    if top_p == 1:
        return logits
    ordered, order = logits.sort(dim=-1, descending=True)
    weights = softmax(ordered, temperature=temperature)
    forbidden = weights.cumsum(dim=-1) - weights >= top_p
    forbidden[..., 0] = False  # the smallest p is 0 once it is rounded
    ordered = ordered.masked_fill(forbidden, -math.inf)
    return torch.empty_like(logits).scatter(-1, order, ordered)


def sample(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw one token id (B,) for each row of logits (B, V).

    Temperature, top-k, then top-p; top_k=1 is greedy and draws nothing.
    generator: the source of randomness, on the device of the logits.
    Raises ValueError for a temperature that is not positive, top_k below 1, top_p
    outside (0, 1], or rows whose highest logit is not finite.

    Book: 13_generation.html#the-order-of-the-filters
    """
    _check_settings(temperature, top_k, top_p)
    logits = logits.float()
    highest, likeliest = logits.max(dim=-1, keepdim=True)
    if not highest.isfinite().all():
        raise ValueError("the scores are not numbers: are the model's weights damaged?")
    if top_k == 1:
        return likeliest[:, 0]
    if top_k is not None:
        logits = keep_top_k(logits, top_k)
    if top_p is not None:
        logits = keep_top_p(logits, top_p, temperature)
    probabilities = softmax(logits, temperature=temperature)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]


class KeyValueCache:
    """The keys and values of one layer, kept for every position seen so far.

    context: for how many positions room is reserved. length: how many are kept.
    Source: Pope et al. (2023).

    Book: 13_generation.html#what-stays-the-same
    """

    def __init__(self, context: int):
        self.context, self.length = context, 0

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store what is new (B, H, T, C / H) and return all of it so far.

        Raises ValueError for more positions than there is room for, and for keys of
        another shape than the earlier ones.
        """
        B, H, new, head_width = keys.shape
        end = self.length + new
        if end > self.context:
            raise ValueError(f"{end} positions don't fit a cache of {self.context}")
        if self.length == 0:
            self.keys = keys.new_empty(B, H, self.context, head_width)
            self.values = torch.empty_like(self.keys)
        elif self.keys.shape != (B, H, self.context, head_width):
            due = tuple(self.keys[:, :, end - new : end].shape)
            raise ValueError(f"keys {tuple(keys.shape)} after others of {due}")
        self.keys[:, :, self.length : end] = keys
        self.values[:, :, self.length : end] = values
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]


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
    starts = [longest - len(row) for row in rows]
    begin = torch.tensor(starts, device=device) if any(starts) else None
    return torch.tensor(ids, device=device), begin


def _check_prompts(
    prompts: Sequence[Sequence[int]], vocab_size: int
) -> list[list[int]]:
    """The prompts as lists; raise ValueError for what no model could continue."""
    try:
        rows = [[operator.index(token) for token in prompt] for prompt in prompts]
    except TypeError:
        raise ValueError("prompts must be lists of whole numbers, the ids") from None
    if not rows or not all(rows):
        raise ValueError("a prompt needs at least one token")
    for token in (token for row in rows for token in row):
        if not 0 <= token < vocab_size:
            raise ValueError(
                f"id {token} is out of range: ids are 0 to {vocab_size - 1}"
            )
    return rows


def _past_padding(starts: Tensor, first: int, count: int) -> tuple[Tensor, Tensor]:
    """Positions (B, T) and mask (B, 1, T, keys) of rows that begin at `starts` (B,).

    first: how many columns the caches hold; count: T, how many follow.
    """
    keys = torch.arange(first + count, device=starts.device)
    queries = keys[first:, None]  # (T, 1): their columns
    # Padding sees itself: some kernels make nan of a row that may look nowhere.
    begun = (keys >= starts[:, None, None]) | (keys == queries)  # (B, T, keys)
    positions = (keys[first:] - starts[:, None]).clamp(min=0)
    return positions, ((keys <= queries) & begun)[:, None]


@torch.inference_mode()
def _steps(
    model: GPT, rows: list[list[int]], count: int, draw: Any, use_cache: bool
) -> Iterator[list[int]]:
    """Append `count` tokens to each row, and yield them step by step."""
    context, device = model.config.context, next(model.parameters()).device
    caches: list[KeyValueCache] = []
    starts = None
    for _ in range(count):
        if use_cache and caches and caches[0].length < context:
            ids = torch.tensor([row[-1:] for row in rows], device=device)
        else:
            windows = [row[window_start(len(row), context) :] for row in rows]
            ids, starts = pad_left(windows, device)
            caches = [KeyValueCache(context) for _ in model.blocks]
        positions = mask = None
        if starts is not None:
            positions, mask = _past_padding(starts, caches[0].length, ids.shape[1])
        last = model.hidden_states(ids, positions, mask, caches)[:, -1]
        new = draw(model.head(last)).tolist()
        for row, token in zip(rows, new, strict=True):
            row.append(token)
        yield new


def stream(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    use_cache: bool = True,
) -> Iterator[list[int]]:
    """Continue several prompts and yield the next id of each, step by step.

    Prompts may differ in length; of one longer than the context the model sees the
    end, see `window_start`. use_cache=False computes every step anew: slow, and the
    same up to rounding. The model is put into evaluation mode. Settings as in `sample`.
    Raises ValueError for an empty prompt, ids out of range, a negative number of
    tokens or seed, and for what `sample` refuses.

    Book: 13_generation.html#the-loop
    """
    _check_settings(temperature, top_k, top_p)
    rows = _check_prompts(prompts, model.config.vocab_size)
    if not isinstance(max_new_tokens, Integral) or max_new_tokens < 0:
        raise ValueError(
            f"max_new_tokens must be a whole number from 0 up, not {max_new_tokens!r}"
        )
    if seed is not None and not (isinstance(seed, Integral) and 0 <= seed < 1 << 64):
        raise ValueError(f"seed must be a whole number of 64 bits, not {seed!r}")
    generator = torch.Generator(next(model.parameters()).device)
    generator.seed() if seed is None else generator.manual_seed(int(seed))
    model.eval()

    def draw(logits: Tensor) -> Tensor:
        return sample(logits, temperature, top_k, top_p, generator)

    return _steps(model, rows, max_new_tokens, draw, use_cache)


def _stop_ids(stop: Sequence[int]) -> set[int]:
    try:
        return {operator.index(token) for token in stop}
    except TypeError:
        raise ValueError(
            f"stop must be a list of ids, such as [5], not {stop!r}"
        ) from None


def generate(
    model: GPT,
    ids: Sequence[int] | Sequence[Sequence[int]] | Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stop: Sequence[int] = (),
) -> list:
    """Continue a prompt, or several; return prompt and continuation as lists of ids.

    ids: one prompt, or a batch of prompts, as lists or tensors. stop: ids that end a
    row; they are not returned. Without a seed every call differs. A prompt may be
    longer than the context: the model sees its end. Greedy (top_k=1) rows of a batch
    are the same as alone, up to rounding; drawn ones share one source of randomness.
    Raises ValueError as `stream`.

    Book: 13_generation.html#the-loop
    """
    ends = _stop_ids(stop)
    prompts = ids.tolist() if isinstance(ids, Tensor) else list(ids)
    if any(isinstance(part, str) for part in prompts):
        raise ValueError("ids are whole numbers: encode the text, or use stream_text")
    single = not prompts or torch.as_tensor(prompts[0]).dim() == 0
    prompts = [prompts] if single else prompts
    training = model.training
    steps = stream(model, prompts, max_new_tokens, temperature, top_k, top_p, seed)
    rows = [[int(token) for token in prompt] for prompt in prompts]
    running = set(range(len(rows)))
    try:
        for new in steps:
            running -= {row for row in running if new[row] in ends}
            for row in running:
                rows[row].append(new[row])
            if not running:
                break
    finally:
        model.train(training)
    return rows[0] if single else rows


def stream_text(
    model: GPT,
    tokenizer: Any,
    prompt: str,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stop: Sequence[int] = (),
) -> Iterator[str]:
    """Continue a text and yield printable pieces of what is new, as they come.

    tokenizer: one of this package. Bytes that are part of a character are held back
    until it is complete. stop: ids that end the text; they are not returned. Settings
    and errors as in `stream`; errors come with the first piece.

    Book: 13_generation.html#text-as-it-comes
    """
    ends = _stop_ids(stop)
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    settings = (temperature, top_k, top_p, seed)
    for (token,) in stream(
        model, [tokenizer.encode(prompt)], max_new_tokens, *settings
    ):
        if token in ends:
            break
        if hasattr(tokenizer, "decode_bytes"):
            piece = decoder.decode(tokenizer.decode_bytes([token]))
        else:
            piece = tokenizer.decode([token])
        if piece:
            yield piece
    if rest := decoder.decode(b"", final=True):
        yield rest


def _round_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Each row of x (N, C) as whole numbers from -127 to 127, and its scale (N,)."""
    largest = torch.linalg.vector_norm(x, torch.inf, dim=1)
    scale = largest.clamp(min=1e-30) / 127  # a row of zeros divides by > 0
    return (x / scale[:, None]).round_().to(torch.int8), scale


def _whole_product(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """x (..., in) times int8 weights (out, in) whose rows have these scales (out,)."""
    rows = x.reshape(-1, weight.shape[1]).float()
    if x.is_cpu:
        whole, own_scale = _round_rows(rows)
        sums = torch._int_mm(whole, weight.t())  # (N, out) int32
        products = sums * (own_scale[:, None] * scale)
    else:
        products = F.linear(rows, weight.float()) * scale
    return products.view(*x.shape[:-1], weight.shape[0])


def _narrow_product(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., in) times a weight (out, in) of 16 bits, in what is fastest for it."""
    if x.is_cpu and x.numel() == weight.shape[1]:
        before = torch.backends.mkldnn.enabled
        torch.backends.mkldnn.enabled = False
        try:
            return F.linear(x.to(weight.dtype), weight)
        finally:
            torch.backends.mkldnn.enabled = before
    if x.is_cpu and weight.dtype == torch.float16:
        return F.linear(x.float(), weight.float())
    return F.linear(x.to(weight.dtype), weight)


class LightLinear(nn.Module):
    """A linear layer with lighter weights, for generation: (..., in) to (..., out).

    weights: "bfloat16", "float16", or "int8", which also rounds each vector that comes
    in to 8 bits, and is for the CPU: elsewhere it saves memory only.
    Source of the scales: Dettmers et al. (2022).

    Book: 13_generation.html#lighter-weights
    """

    def __init__(self, linear: nn.Linear, weights: str):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight, scale = linear.weight.detach(), None
        if weights == "int8":  # in pieces, so that no large copy is made on the way
            pieces = [_round_rows(part.float()) for part in weight.split(4096)]
            weight, scale = (torch.cat(parts) for parts in zip(*pieces, strict=True))
        self.register_buffer("weight", weight.to(getattr(torch, weights)))
        self.register_buffer("scale", scale)
        bias = None if linear.bias is None else linear.bias.detach()
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        weight, scale, bias = self.weight, self.scale, self.bias
        whole = scale is not None
        y = _whole_product(x, weight, scale) if whole else _narrow_product(x, weight)
        return (y if bias is None else bias + y).to(x.dtype)


def lighten(model: GPT, weights: str = "int8") -> GPT:
    """A model for generation, with lighter weights in its linear layers.

    weights: "bfloat16", "float16" or "int8"; raises ValueError for others. Tables,
    norms and biases it shares with the model it comes from, so `train` and `save`
    refuse it: train that one, and lighten again.

    Book: 13_generation.html#lighter-weights
    """
    if weights not in ("bfloat16", "float16", "int8"):
        raise ValueError(f"weights must be bfloat16, float16 or int8, not {weights!r}")
    if not any(isinstance(layer, nn.Linear) for layer in model.modules()):
        raise ValueError("this model is light already: lighten the one it comes from")
    # deepcopy takes what `memo` has for an object instead of copying it.
    memo = {id(parameter): parameter for parameter in model.parameters()}
    memo |= {
        id(layer): LightLinear(layer, weights)
        for layer in model.modules()
        if isinstance(layer, nn.Linear)
    }
    return copy.deepcopy(model, memo).eval()
