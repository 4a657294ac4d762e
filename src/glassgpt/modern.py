# Written by tools/tangle.py from book/14_after_gpt2.ipynb: change it there.
"""What came after GPT-2: the same model, its parts exchanged one by one."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glassgpt.block import Block
from glassgpt.checkpoints import ARCHITECTURES
from glassgpt.embeddings import Embedding
from glassgpt.gpt import GPT, GPTConfig
from glassgpt.heads import fused_attention, merge_heads, split_heads
from glassgpt.mlp import pytorch_gelu


def rotary_tables(
    context: int, head_width: int, base: float = 10000.0
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotation of each pair of columns at each position.

    Returns (cos, sin), each (context, head_width / 2) in float32, for `apply_rotary`.
    base: a larger one makes the slow pairs slower, for longer contexts.
    Source: Su et al. (2021).

    Book: 14_after_gpt2.html#the-functions
    """
    exponents = torch.arange(0, head_width, 2, dtype=torch.float64) / head_width
    angles = torch.arange(context, dtype=torch.float64)[:, None] * base**-exponents
    return angles.cos().float(), angles.sin().float()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair of columns of queries or keys by the angle of its position.

    x: (..., T, D); cos, sin: (T, D / 2), the rows of `rotary_tables` for the positions
    of x. Column i is paired with column i + D / 2, as in the Llama of `transformers`.
    Returns the shape and dtype of x. Source: Su et al. (2021), section 3.4.

    Book: 14_after_gpt2.html#the-functions
    """
    first, second = x.chunk(2, dim=-1)
    rotated = (first * cos - second * sin, second * cos + first * sin)
    return torch.cat(rotated, dim=-1).to(x.dtype)


def squared_relu(x: Tensor) -> Tensor:
    """max(x, 0) squared, on every number of x. Source: So et al. (2021).

    Book: 14_after_gpt2.html#squared-relu
    """
    positive = F.relu(x)
    return positive * positive  # autocast on a GPU would take `square` to 32 bits


_CHOICES = {
    "positions": ("rotary", "learned"),
    "norm": ("rms", "layer"),
    "activation": ("squared_relu", "gelu"),
}


@dataclass(frozen=True)
class ModernConfig(GPTConfig):
    """`GPTConfig` and seven choices; each can be made alone.

    positions: "rotary" or "learned". norm: "rms" or "layer". activation:
    "squared_relu" or "gelu". normalize_qk: bring queries and keys to root mean square
    1. bias: in linear layers and LayerNorm. zero_projections: start at zero what writes
    into the residual stream, and an untied head.
    Raises ValueError for choices that don't exist, or rotary heads of odd width.

    Book: 14_after_gpt2.html#the-configuration
    """

    tied: bool = False
    positions: str = "rotary"
    norm: str = "rms"
    activation: str = "squared_relu"
    normalize_qk: bool = True
    bias: bool = False
    zero_projections: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, allowed in _CHOICES.items():
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"{name} is {' or '.join(allowed)}, not {value!r}")
        head_width = self.width // self.heads
        if self.positions == "rotary" and head_width % 2:
            raise ValueError(f"rotary positions need an even width, not {head_width}")


# What makes a ModernGPT a GPT-2 again.
GPT2_CHOICES = {
    "tied": True,
    "positions": "learned",
    "norm": "layer",
    "activation": "gelu",
    "normalize_qk": False,
    "bias": True,
    "zero_projections": False,
}


class ModernAttention(nn.Module):
    """`MultiHeadAttention` with the choices of a ModernConfig: (B, T, C) in and out.

    Book: 14_after_gpt2.html#the-parts
    """

    def __init__(self, config: ModernConfig):
        super().__init__()
        c = config
        self.heads, self.dropout, self.attend = c.heads, c.dropout, fused_attention
        self.rotary, self.normalize_qk = c.positions == "rotary", c.normalize_qk
        self.qkv = nn.Linear(c.width, 3 * c.width, bias=c.bias)
        self.projection = nn.Linear(c.width, c.width, bias=c.bias)
        if self.rotary:
            cos, sin = rotary_tables(c.context, c.width // c.heads)
            self.register_buffer("cos", cos, persistent=False)
            self.register_buffer("sin", sin, persistent=False)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, cache: Any = None
    ) -> Tensor:
        parts = self.qkv(x).chunk(3, dim=-1)
        queries, keys, values = (split_heads(part, self.heads) for part in parts)
        if self.normalize_qk:
            size = queries.shape[-1:]
            queries, keys = F.rms_norm(queries, size), F.rms_norm(keys, size)
        if self.rotary:
            first = cache.length if cache is not None else 0
            here = slice(first, first + x.shape[1])
            queries = apply_rotary(queries, self.cos[here], self.sin[here])
            keys = apply_rotary(keys, self.cos[here], self.sin[here])
        if cache is not None:
            keys, values = cache.append(keys, values)
        dropout = self.dropout if self.training else 0.0
        context = self.attend(queries, keys, values, mask, dropout)
        return self.projection(merge_heads(context))


class ModernMLP(nn.Module):
    """`MLP` with the choices of a ModernConfig: (B, T, C) in and out.

    Book: 14_after_gpt2.html#the-parts
    """

    def __init__(self, config: ModernConfig):
        super().__init__()
        c = config
        self.expand = nn.Linear(c.width, 4 * c.width, bias=c.bias)
        self.projection = nn.Linear(4 * c.width, c.width, bias=c.bias)
        gelu = c.activation == "gelu"
        self.activation = pytorch_gelu if gelu else squared_relu

    def forward(self, x: Tensor) -> Tensor:
        return self.projection(self.activation(self.expand(x)))


def _norm(c: ModernConfig) -> nn.Module:
    if c.norm == "rms":
        return nn.RMSNorm(c.width, elementwise_affine=False)
    return nn.LayerNorm(c.width, bias=c.bias)


class ModernBlock(Block):
    """`Block` with the choices of a ModernConfig: (B, T, C) in and out.

    Book: 14_after_gpt2.html#the-parts
    """

    def __init__(self, config: ModernConfig):
        nn.Module.__init__(self)
        self.attention_norm, self.attention = _norm(config), ModernAttention(config)
        self.mlp_norm, self.mlp = _norm(config), ModernMLP(config)
        self.dropout = nn.Dropout(config.dropout)


class ModernGPT(GPT):
    """`GPT` with the choices of a ModernConfig; same interface, same errors.

    Book: 14_after_gpt2.html#the-model
    """

    config: ModernConfig

    def __init__(self, config: ModernConfig):
        nn.Module.__init__(self)
        self.config = c = config
        self.tokens = Embedding(c.vocab_size, c.width)
        if c.positions == "learned":
            self.positions = Embedding(c.context, c.width)
        self.dropout = nn.Dropout(c.dropout)
        self.blocks = nn.ModuleList(ModernBlock(c) for _ in range(c.layers))
        self.norm = _norm(c)
        self.head = nn.Linear(c.width, c.vocab_size, bias=False)
        if c.tied:
            self.head.weight = self.tokens.weight
        self.initialize()

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        """The vectors (B, T, C) that enter the first block."""
        x = self.tokens(ids)
        if self.config.positions == "learned":
            x = x + self.positions(positions)
        return self.dropout(x)

    @torch.no_grad()
    def initialize(self) -> None:
        """GPT-2's start, and zeros where the configuration asks for them."""
        super().initialize()
        if self.config.zero_projections:
            for block in self.blocks:
                block.attention.projection.weight.zero_()
                block.mlp.projection.weight.zero_()
            if not self.config.tied:
                self.head.weight.zero_()


ARCHITECTURES["glassgpt"] = (ModernConfig, ModernGPT)
