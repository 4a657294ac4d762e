# Written by tools/tangle.py from book/09_block.ipynb: change it there.
"""The block: attention and MLP, each added to what flows past."""

from typing import Any

import torch
from torch import Tensor, nn

from glassgpt.heads import MultiHeadAttention
from glassgpt.mlp import MLP


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """Give every vector of x (..., C) mean 0 and variance 1, then scale and shift it.

    weight, bias: (C,). The variance is divided by C, and eps stands inside the root.
    Source: Ba, Kiros and Hinton (2016).

    Book: 09_block.html#the-equation-of-layernorm
    """
    centered = x - x.mean(dim=-1, keepdim=True)
    variance = centered.square().mean(dim=-1, keepdim=True)
    return centered / torch.sqrt(variance + eps) * weight + bias


class Block(nn.Module):
    """One layer of a GPT, normalized before each part: (B, T, C) in and out.

    dropout: the share of numbers dropped in training from what each part adds, and of
    attention weights. The other arguments are those of `MultiHeadAttention`.
    Source: Radford et al. (2019).

    Book: 09_block.html#the-block
    """

    def __init__(self, width: int, heads: int, dropout: float = 0.0):
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = MultiHeadAttention(width, heads, dropout)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = MLP(width)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, cache: Any = None
    ) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), mask, cache))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))
