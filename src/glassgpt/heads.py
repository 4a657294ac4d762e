# Written by tools/tangle.py from book/07_multi_head_attention.ipynb: change it there.
"""Multi-head attention: several small attentions side by side."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glassgpt.attention import causal_mask
from glassgpt.positions import apply_rotary


def split_heads(x: Tensor, heads: int) -> Tensor:
    """Cut the width into heads: (B, T, C) to (B, H, T, C / H).

    Head h gets the columns from h C / H on. Raises ValueError for other axes, or when
    C is not divisible by the number of heads.

    Book: 07_multi_head_attention.html#split-and-merge
    """
    if x.ndim != 3:
        raise ValueError(f"x needs the axes (B, T, C), not the shape {tuple(x.shape)}")
    B, T, C = x.shape
    if heads < 1 or C % heads:
        raise ValueError(f"width {C} can't be split into {heads} heads of equal width")
    # Cut each position by itself first: view(B, heads, T, ...) would mix positions.
    return x.view(B, T, heads, C // heads).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """Put the heads side by side again: (B, H, T, C / H) to (B, T, C).

    Raises ValueError for other axes.

    Book: 07_multi_head_attention.html#split-and-merge
    """
    if x.ndim != 4:
        shape = tuple(x.shape)
        raise ValueError(f"x needs the axes (B, H, T, C / H), not the shape {shape}")
    B, H, T, head_width = x.shape
    return x.transpose(1, 2).reshape(B, T, H * head_width)


def short_attention(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Causal attention for short contexts: (B, H, T, C / H) in and out.

    Two matrix products around a softmax. On a CPU, in 16 bits or compiled, this trains
    faster than the fused kernel while T is small.

    Book: 07_multi_head_attention.html#for-short-contexts
    """
    scores = (queries / math.sqrt(queries.shape[-1])) @ keys.transpose(-2, -1)
    future = ~causal_mask(scores.shape[-1], device=scores.device)
    # Adding one table to all heads is cheaper than filling their scores in, and its
    # gradient costs nothing.
    penalty = torch.zeros_like(future, dtype=scores.dtype)
    penalty = penalty.masked_fill(future, -math.inf)
    return (scores + penalty).softmax(dim=-1) @ values


def fused_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attention in one kernel that never stores the (T, T) weights.

    Takes and returns (B, H, T, C / H). Without a mask it is causal. With one (bool,
    True = may look, broadcast to (B, H, T, keys)) the mask alone decides. A single
    query without a mask is taken as the last position and may look everywhere.
    dropout: the share of weights that are set to zero.
    Raises ValueError for several queries against another number of keys without a
    mask, and for a mask that isn't bool. Source: Dao et al. (2022).

    Book: 07_multi_head_attention.html#the-fused-kernel
    """
    T = queries.shape[-2]
    if mask is None and 1 < T != keys.shape[-2]:
        raise ValueError(f"{T} queries against {keys.shape[-2]} keys need a mask")
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(f"mask must be bool (True = may look), not {mask.dtype}")
    causal = mask is None
    if T == 1:  # a branch: compiled, `T > 1` may be a symbol that the kernel refuses
        causal = False
    return F.scaled_dot_product_attention(
        queries, keys, values, attn_mask=mask, dropout_p=dropout, is_causal=causal
    )


class MultiHeadAttention(nn.Module):
    """Causal self-attention with several heads: (B, T, C) in and out.

    width: C, divisible by heads. dropout: the share of attention weights dropped in
    training. normalize_qk: scale every query and key to length sqrt(C / H) first.
    Raises ValueError for sizes that don't fit and for a dropout outside of [0, 1).
    Source: Vaswani et al. (2017); layout of the weights as in GPT-2.

    Book: 07_multi_head_attention.html#the-module
    """

    def __init__(
        self,
        width: int,
        heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        normalize_qk: bool = False,
    ):
        super().__init__()
        if width < 1 or heads < 1 or width % heads:
            raise ValueError(f"width {width} is not divisible by {heads} heads")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), not {dropout}")
        self.heads, self.dropout, self.normalize_qk = heads, dropout, normalize_qk
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.projection = nn.Linear(width, width, bias=bias)

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor] | None = None,
        mask: Tensor | None = None,
        cache: Any = None,
    ) -> Tensor:
        """Contexts (B, T, C) for x (B, T, C).

        rotary: rows of `rotary_tables` for the T positions. mask: as in
        `fused_attention`. cache: its `append` takes new keys and values
        (B, H, T, C / H) and returns them after all the earlier ones.
        """
        width = self.qkv.in_features
        if x.shape[-1] != width:
            raise ValueError(f"x must be (B, T, {width}), not {tuple(x.shape)}")
        parts = self.qkv(x).chunk(3, dim=-1)
        queries, keys, values = (split_heads(part, self.heads) for part in parts)
        if self.normalize_qk:
            size = (queries.shape[-1],)
            queries, keys = F.rms_norm(queries, size), F.rms_norm(keys, size)
        if rotary is not None:
            queries, keys = apply_rotary(queries, *rotary), apply_rotary(keys, *rotary)
        if cache is not None:
            keys, values = cache.append(keys, values)
        dropout = self.dropout if self.training else 0.0
        narrow = queries.dtype != torch.float32 or torch.compiler.is_compiling()
        short = x.device.type == "cpu" and narrow and x.shape[1] <= 256
        if short and cache is None and mask is None and not dropout:
            context = short_attention(queries, keys, values)
        else:
            context = fused_attention(queries, keys, values, mask, dropout)
        return self.projection(merge_heads(context))
