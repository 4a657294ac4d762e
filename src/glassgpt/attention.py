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

    Book: 06_attention.html#the-function
    """
    return torch.ones(size, size, dtype=torch.bool, device=device).tril()


def attention(
    queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Mix the values of the words that each word looks at.

    queries: (..., T, D); keys: (..., S, D); values: (..., S, any width). Leading axes,
    such as B, broadcast. mask: bool, broadcasts to (..., T, S), True = may look.
    Returns the context (..., T, any width) and the weights (..., T, S). Each row of
    weights sums to 1; every row must be allowed to look somewhere, or it gets nan.
    PyTorch raises its own errors for shapes that don't fit and masks that aren't bool.
    Source: Vaswani et al. (2017), equation 1.

    Book: 06_attention.html#the-function
    """
    scores = queries @ keys.mT / math.sqrt(queries.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    weights = softmax(scores)  # (..., T, S)
    return weights @ values, weights
