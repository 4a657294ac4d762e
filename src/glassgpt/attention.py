# Written by tools/tangle.py from book/06_attention.ipynb: change it there.
"""Attention: each word takes in its context."""

import math

import torch
from torch import Tensor

from glassgpt.softmax import softmax


def causal_mask(size: int, device: torch.device | str | None = None) -> Tensor:
    """The (T, T) mask that hides the future: row t is True up to column t.

    True means "may look", as in PyTorch's scaled_dot_product_attention. Beware:
    its nn.MultiheadAttention means the opposite.

    Book: 06_attention.html#the-mask
    """
    return torch.ones(size, size, dtype=torch.bool, device=device).tril()


def _broadcast(*shapes: torch.Size) -> torch.Size | None:
    """The shape to which all of these broadcast, or None."""
    try:
        return torch.broadcast_shapes(*shapes)
    except RuntimeError:
        return None


def _check_inputs(
    queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None
) -> None:
    """Raise ValueError for inputs that don't belong together."""
    got = f"not {[tuple(t.shape) for t in (queries, keys, values)]}"
    if min(queries.ndim, keys.ndim, values.ndim) < 2:
        raise ValueError(f"queries, keys and values need the axes (..., T, C), {got}")
    if queries.shape[-1] != keys.shape[-1]:
        raise ValueError(f"queries and keys must have the same width, {got}")
    if keys.shape[-2] == 0:
        raise ValueError(f"there is no key to look at, {got}")
    if keys.shape[-2] != values.shape[-2]:
        raise ValueError(f"each key needs one value, {got}")
    leading = _broadcast(*(t.shape[:-2] for t in (queries, keys, values)))
    if leading is None:
        raise ValueError(f"the axes before the last two must broadcast, {got}")
    if mask is not None:
        _check_mask(mask, torch.Size((*leading, queries.shape[-2], keys.shape[-2])))


def _check_mask(mask: Tensor, scores: torch.Size) -> None:
    """Raise ValueError unless the mask is bool and broadcasts to the scores' shape."""
    if mask.dtype != torch.bool:
        raise ValueError(f"mask must be bool (True = may look), not {mask.dtype}")
    if _broadcast(mask.shape, scores) != scores:
        raise ValueError(
            f"mask {tuple(mask.shape)} must broadcast to the scores {tuple(scores)}"
        )


def attention(
    queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Mix the values of the words that each word looks at.

    queries: (..., T, C); keys: (..., S, C); values: (..., S, D), where the leading
    axes broadcast. mask: bool, broadcasts to (..., T, S), True = may look.
    Returns the context (..., T, D) and the weights (..., T, S). Each row of weights
    sums to 1; a row that may look nowhere is all zeros, and so is its context. Values
    must be finite, hidden ones too.
    Raises ValueError for shapes that don't fit or a mask that isn't bool.
    Source: Vaswani et al. (2017), equation 1.

    Book: 06_attention.html#the-function
    """
    _check_inputs(queries, keys, values, mask)
    # Divided before the product, which could overflow in 16 bits.
    scores = (queries / math.sqrt(queries.shape[-1])) @ keys.transpose(-2, -1)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    weights = softmax(scores)  # (..., T, S)
    return weights @ values, weights
