# Written by tools/tangle.py from book/19_looking_inside.ipynb: change it there.
"""Looking inside: every activation by name, and what it does to the result."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from glassgpt.attention import attention, causal_mask
from glassgpt.gpt import GPT
from glassgpt.training import in_mode

See = Callable[[str, Tensor], Tensor]  # of a name and an activation


def _see_output(part: nn.Module, name: str, see: See) -> RemovableHandle:
    def hook(part: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        return see(name, output)

    return part.register_forward_hook(hook)


def _see_input(part: nn.Module, name: str, see: See) -> RemovableHandle:
    def hook(part: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (see(name, inputs[0]), *inputs[1:])

    return part.register_forward_pre_hook(hook)


def _seen_attention(layer: int, see: See) -> Callable[..., Tensor]:
    """Chapter 6's attention, without dropout, which shows each of its steps."""

    def attend(
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        mask: Tensor | None = None,
        dropout: float = 0.0,
    ) -> Tensor:
        queries = see(f"{layer}.queries", queries)
        keys = see(f"{layer}.keys", keys)
        values = see(f"{layer}.values", values)
        T, S = queries.shape[2], keys.shape[2]
        if mask is None:
            mask = causal_mask(S, queries.device)[S - T :]
        # Heads that share keys and values (chapter 14) get a copy each.
        copies = queries.shape[1] // keys.shape[1]
        keys = keys.repeat_interleave(copies, dim=1)
        values = values.repeat_interleave(copies, dim=1)
        _, weights = attention(queries, keys, values, mask)
        weights = see(f"{layer}.weights", weights)
        return see(f"{layer}.contexts", weights @ values)

    return attend


@contextmanager
def watch(model: GPT, see: See) -> Iterator[None]:
    """Call see(name, activation) at each step; what it returns goes on in its place.

    Book: 19_looking_inside.html#the-function
    """
    blocks: Any = model.blocks
    own_attention = [block.attention.attend for block in blocks]
    hooks = [
        _see_input(blocks[0], "embedding", see),
        _see_output(model.norm, "final", see),
        _see_output(model.head, "logits", see),
    ]
    for layer, block in enumerate(blocks):
        block.attention.attend = _seen_attention(layer, see)
        hooks += [
            _see_output(block.attention_norm, f"{layer}.attention_norm", see),
            _see_output(block.attention, f"{layer}.attention", see),
            _see_output(block.mlp_norm, f"{layer}.mlp_norm", see),
            _see_input(block.mlp.projection, f"{layer}.hidden", see),
            _see_output(block.mlp, f"{layer}.mlp", see),
            _see_output(block, f"{layer}.stream", see),
        ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for block, attend in zip(blocks, own_attention, strict=True):
            block.attention.attend = attend


def trace(model: GPT, ids: Tensor, edit: See | None = None) -> dict[str, Tensor]:
    """Run the model on ids (B, T) and return every activation by name.

    edit: called with a name and an activation; what it returns goes on in its place,
    and is what the trace holds. Dropout is off. The model stays as it was. Raises
    ValueError for ids that the model refuses, TypeError for an edit that returns None.

    Book: 19_looking_inside.html#the-function
    """
    seen: dict[str, Tensor] = {}

    def see(name: str, value: Tensor) -> Tensor:
        if edit is not None:
            value = edit(name, value)
        if value is None:
            raise TypeError(f"the edit returned None for {name}")
        seen[name] = value
        return value

    with torch.no_grad(), in_mode(model, training=False), watch(model, see):
        model(ids)
    return seen


@torch.no_grad()
def ledger(model: GPT, seen: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What each part wrote into the stream, (B, T, C) each; their sum is the last one.

    seen: a `trace` of the model. Entries: "embedding", and for each layer "0.head.0"
    for each head, "0.bias" where attention's last layer has one, and "0.mlp".

    Book: 19_looking_inside.html#the-ledger-balances
    """
    parts = {"embedding": seen["embedding"]}
    block: Any
    for layer, block in enumerate(model.blocks):
        contexts = seen[f"{layer}.contexts"]  # (B, H, T, D)
        projection = block.attention.projection
        matrices = projection.weight.chunk(contexts.shape[1], dim=1)  # H of (C, D)
        for head, matrix in enumerate(matrices):
            parts[f"{layer}.head.{head}"] = contexts[:, head] @ matrix.T
        if projection.bias is not None:
            bias = projection.bias.detach()
            parts[f"{layer}.bias"] = bias.expand_as(parts["embedding"])
        parts[f"{layer}.mlp"] = seen[f"{layer}.mlp"]
    return parts


@torch.no_grad()
def attribute(
    model: GPT, parts: Mapping[str, Tensor], direction: Tensor
) -> dict[str, Tensor]:
    """The share (B, T) of each part in final @ direction, its sum.

    parts: a `ledger`. direction: (C,), such as a row of the output head, or the
    difference of two. The last norm's bias has a share of its own, "norm.bias". The
    scale of the norm is taken as the whole stream made it, so a ledger without its
    embedding gets a ValueError. Source: Elhage et al. (2021).

    Book: 19_looking_inside.html#who-writes-the-bracket
    """
    if "embedding" not in parts:
        raise ValueError("the whole ledger is needed: it sets the scale of the norm")
    norm: Any = model.norm
    if isinstance(norm, nn.LayerNorm):  # it subtracts the mean of each part
        parts = {name: x - x.mean(-1, keepdim=True) for name, x in parts.items()}
    stream: Any = sum(parts.values())
    s = (stream.square().mean(-1) + norm.eps).sqrt()
    toward = direction if norm.weight is None else direction * norm.weight
    shares = {name: part @ toward / s for name, part in parts.items()}
    bias = getattr(norm, "bias", None)
    if bias is not None:
        shares["norm.bias"] = (bias @ direction).expand_as(s)
    return shares


def without(heads: Iterable[tuple[int, int]], usual: Mapping[str, Tensor]) -> See:
    """An edit for `trace` that lets heads (layer, head) say only what they usually say.

    usual: a trace of other texts; its mean over texts and positions takes the place of
    a head's contexts. Raises KeyError or IndexError, at once, for heads that it lacks.

    Book: 19_looking_inside.html#proof-by-removal
    """
    means: dict[str, dict[int, Tensor]] = {}
    for layer, head in heads:
        name = f"{layer}.contexts"
        mean = usual[name][:, head].mean((0, 1))  # of (B, T, D)
        means.setdefault(name, {})[head] = mean

    def edit(name: str, value: Tensor) -> Tensor:
        if name not in means:
            return value
        value = value.clone()
        for head, mean in means[name].items():
            value[:, head] = mean
        return value

    return edit


@torch.no_grad()
def logit_lens(model: GPT, stream: Tensor) -> Tensor:
    """Logits (B, T, V) as if the stream (B, T, C) were the last one.

    Source: nostalgebraist (2020).

    Book: 19_looking_inside.html#when-does-it-know
    """
    logits: Tensor = model.head(model.norm(stream))
    return logits


def fit_lens(stream: Tensor, final: Tensor) -> Callable[[Tensor], Tensor]:
    """The function x A + b that brings a stream (B, T, C) nearest to the final one.

    By least squares; try it on texts that it did not see. On a GPU the stream must vary
    in all C directions. Raises ValueError unless there are more than C + 1 positions.
    Source: Belrose et al. (2023), who fit the probabilities instead.

    Book: 19_looking_inside.html#when-does-it-know
    """
    inputs = F.pad(stream.flatten(0, -2), (0, 1), value=1.0)  # (B T, C + 1)
    if len(inputs) <= inputs.shape[1]:
        raise ValueError(f"{len(inputs)} positions fit any lens: take more")
    solution = torch.linalg.lstsq(inputs, final.flatten(0, -2)).solution  # (C + 1, C)
    A, b = solution[:-1], solution[-1]
    return lambda x: x @ A + b


def induction_scores(seen: Mapping[str, Tensor]) -> Tensor:
    """How much each head looks at what followed before: (L, H), between 0 and 1.

    seen: a trace of ids (B, 2 P) whose second half repeats the first. The score is the
    mean weight, over the second half, on the token after the earlier occurrence.
    Source: Olsson et al. (2022).

    Book: 19_looking_inside.html#watch-an-ability-appear
    """
    layers = [value for name, value in seen.items() if name.endswith(".weights")]
    weights = torch.stack(layers)  # (L, B, H, 2 P, 2 P)
    P = weights.shape[-1] // 2
    after_earlier = weights.diagonal(1 - P, -2, -1)[..., 1:]  # (L, B, H, P)
    return after_earlier.mean((1, 3))
