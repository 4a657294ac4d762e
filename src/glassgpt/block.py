# Written by tools/tangle.py from book/09_block.ipynb: change it there.
"""The block: attention and MLP, each added to what flows past."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glassgpt.heads import MultiHeadAttention
from glassgpt.mlp import MLP


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """Give every vector of x (..., C) mean 0 and variance 1, then scale and shift it.

    weight, bias: (C,). The variance is divided by C, and eps stands inside the root.
    Source: Ba, Kiros and Hinton (2016).

    Book: 09_block.html#layernorm
    """
    centered = x - x.mean(dim=-1, keepdim=True)
    variance = centered.square().mean(dim=-1, keepdim=True)
    normal = centered / torch.sqrt(variance + eps) * weight
    return normal if bias is None else normal + bias


class LayerNorm(nn.Module):
    """`layer_norm` with learned weight and bias (C,), computed by PyTorch's kernel.

    Takes and returns (..., C). bias: False leaves the bias out.

    Book: 09_block.html#layernorm
    """

    def __init__(self, width: int, eps: float = 1e-5, bias: bool = True):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class RMSNorm(nn.Module):
    """Divide every vector (..., C) by its root mean square; nothing is learned.

    Source: Zhang and Sennrich (2019), without their gain.

    Book: 09_block.html#rmsnorm
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:])


def make_norm(kind: str, width: int, bias: bool = True) -> nn.Module:
    """Make a LayerNorm ("layer") or an RMSNorm ("rms").

    width, bias: those of LayerNorm. Raises ValueError for another kind.

    Book: 09_block.html#rmsnorm
    """
    if kind == "layer":
        return LayerNorm(width, bias=bias)
    if kind == "rms":
        return RMSNorm()
    raise ValueError(f'norm {kind!r} is neither "layer" nor "rms"')


class Block(nn.Module):
    """One layer of a GPT, normalized before each part: (B, T, C) in and out.

    norm: "layer" or "rms". dropout: the share of numbers dropped from what each part
    adds, and of attention weights, in training. The other arguments are those of
    `MultiHeadAttention` and `MLP`; Block raises their errors.
    Source: Radford et al. (2019).

    Book: 09_block.html#the-block
    """

    def __init__(
        self,
        width: int,
        heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        norm: str = "layer",
        activation: str = "gelu",
        normalize_qk: bool = False,
    ):
        super().__init__()
        self.attention_norm = make_norm(norm, width, bias)
        self.attention = MultiHeadAttention(width, heads, dropout, bias, normalize_qk)
        self.mlp_norm = make_norm(norm, width, bias)
        self.mlp = MLP(width, activation, bias)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor] | None = None,
        mask: Tensor | None = None,
        cache: Any = None,
    ) -> Tensor:
        read = self.attention_norm(x)
        x = x + self.dropout(self.attention(read, rotary, mask, cache))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))
