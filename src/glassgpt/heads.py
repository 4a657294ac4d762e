# Written by tools/tangle.py from book/07_multi_head_attention.ipynb: change it there.
"""Multi-head attention: several small attentions side by side."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from glassgpt.attention import causal_mask


def split_heads(x: Tensor, heads: int) -> Tensor:
    """Cut the width into heads: (B, T, C) to (B, H, T, D), where D = C / H.

    Head h gets the columns from h D on.

    Book: 07_multi_head_attention.html#split-and-merge
    """
    B, T, C = x.shape
    # Cut each position by itself first: view(B, heads, T, ...) would mix positions.
    return x.view(B, T, heads, C // heads).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """Put the heads side by side again: (B, H, T, D) to (B, T, H D).

    Book: 07_multi_head_attention.html#split-and-merge
    """
    B, H, T, D = x.shape
    return x.transpose(1, 2).reshape(B, T, H * D)


def fused_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attention in one kernel that need not store the (T, S) weights.

    queries: (B, H, T, D); keys, values: (B, H, S, D), or with G heads, each for H / G
    neighbors. Without a mask it is causal, and the queries are the last T of S
    positions. A mask (bool, True = may look, broadcast to (B, H, T, S)) replaces the
    causal one. dropout: the share of attention weights set to zero. Returns the
    contexts (B, H, T, D). Source: Dao et al. (2022).

    Book: 07_multi_head_attention.html#two-ways-one-result
    """
    T, S = queries.shape[-2], keys.shape[-2]
    causal = False  # right for one query, the last: nothing to hide from it
    if mask is None and T == S:  # in an `if`: compiled, T == S is no bool
        causal = True
    elif mask is None and T > 1:
        mask = causal_mask(S, device=keys.device)[-T:]
    shared = queries.shape[-3] != keys.shape[-3]
    return F.scaled_dot_product_attention(
        queries, keys, values, mask, dropout, is_causal=causal, enable_gqa=shared
    )


class MultiHeadAttention(nn.Module):
    """Causal self-attention with several heads: (B, T, C) in and out.

    width: C, a multiple of heads, or it raises ValueError. dropout: the share of
    attention weights set to zero in training. Source: Vaswani et al. (2017); layout of
    the parameters as in GPT-2.

    Book: 07_multi_head_attention.html#the-module
    """

    def __init__(self, width: int, heads: int, dropout: float = 0.0):
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is no multiple of {heads} heads")
        self.heads, self.dropout = heads, dropout
        self.attend = fused_attention
        self.qkv = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, cache: Any = None
    ) -> Tensor:
        """Contexts (B, T, C) for x (B, T, C).

        mask: as in `fused_attention`. cache: its `append` takes new keys and values
        (B, H, T, D) and returns them after all the earlier ones.
        """
        parts = self.qkv(x).chunk(3, dim=-1)
        queries, keys, values = (split_heads(part, self.heads) for part in parts)
        if cache is not None:
            keys, values = cache.append(keys, values)
        dropout = self.dropout if self.training else 0.0
        contexts = self.attend(queries, keys, values, mask, dropout)
        return self.projection(merge_heads(contexts))
