# Written by tools/tangle.py from book/14_after_gpt2.ipynb: change it there.
"""What came after GPT-2: the same model, its parts exchanged one by one."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glassgpt.block import Block
from glassgpt.embeddings import Embedding
from glassgpt.gpt import GPT, GPTConfig
from glassgpt.heads import fused_attention, merge_heads, split_heads
from glassgpt.mlp import pytorch_gelu
from glassgpt.training import TrainConfig


def rotary_tables(
    context: int, head_width: int, base: float = 10000.0
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotation of each pair of columns at each position.

    Returns (cos, sin), each (context, head_width / 2) in float32, for `apply_rotary`.
    base: a larger one makes the slow pairs slower, for longer contexts.
    Source: Su et al. (2021).

    Book: 14_after_gpt2.html#the-module
    """
    exponents = torch.arange(0, head_width, 2, dtype=torch.float64) / head_width
    angles = torch.arange(context, dtype=torch.float64)[:, None] * base**-exponents
    return angles.cos().float(), angles.sin().float()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair of columns of queries or keys by the angle of its position.

    x: (..., T, D); cos, sin: (T, D / 2), the rows of `rotary_tables` for the positions
    of x. Column i is paired with column i + D / 2, as in the Llama of `transformers`.
    Returns the shape and dtype of x. Source: Su et al. (2021), section 3.4.

    Book: 14_after_gpt2.html#the-module
    """
    first, second = x.chunk(2, dim=-1)
    rotated = (first * cos - second * sin, second * cos + first * sin)
    return torch.cat(rotated, dim=-1).to(x.dtype)


def squared_relu(x: Tensor) -> Tensor:
    """max(x, 0) squared, on every number of x. Source: So et al. (2021).

    Book: 14_after_gpt2.html#the-module
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

    Book: 14_after_gpt2.html#the-module
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

    Book: 14_after_gpt2.html#the-module
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

    Book: 14_after_gpt2.html#the-module
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

    Book: 14_after_gpt2.html#the-module
    """

    def __init__(self, config: ModernConfig):
        nn.Module.__init__(self)
        self.attention_norm, self.attention = _norm(config), ModernAttention(config)
        self.mlp_norm, self.mlp = _norm(config), ModernMLP(config)
        self.dropout = nn.Dropout(config.dropout)


class ModernGPT(GPT):
    """`GPT` with the choices of a ModernConfig; same interface, same errors.

    Book: 14_after_gpt2.html#the-module
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


LLAMA_CHOICES = {}


def build(config: GPTConfig) -> GPT:
    return ModernGPT(config) if isinstance(config, ModernConfig) else GPT(config)


def _quintic(square: Tensor) -> Tensor:
    """The matrix a I + b S + c S S, by which a round multiplies X, from S = X X^T."""
    change = torch.baddbmm(square, square, square, beta=-4.7750, alpha=2.0315)
    change.diagonal(dim1=1, dim2=2).add_(3.4445)
    return change


def orthogonalize(
    matrices: Sequence[Tensor] | Tensor, rounds: int, dtype: torch.dtype
) -> Tensor:
    """Bring the singular values of each matrix near 1; their directions stay.

    matrices: N of one shape (R, C), or a tensor (N, R, C). rounds: of the iteration.
    dtype: in which to multiply. Returns (N, R, C) in that precision. A value of at
    least 0.01 of its matrix's norm ends between 0.6 and 1.3 after 4 or 5 rounds.
    Source: Jordan et al. (2024), Newton-Schulz iteration; Zhang et al. (2026).

    Book: 14_after_gpt2.html#the-module
    """
    lengths = [matrix.norm().clamp(min=1e-7) for matrix in matrices]
    pairs = zip(matrices, lengths, strict=True)
    x = torch.stack([(matrix / length).to(dtype) for matrix, length in pairs])
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    for done in range(0, rounds, 2):
        square = x @ x.mT  # (N, R, R)
        change = _quintic(square)
        if done + 1 < rounds:  # a second round, before X is touched
            change = _quintic(change @ square @ change) @ change
        x = change @ x
    return x.mT if tall else x


class Muon(torch.optim.Muon):
    """PyTorch's Muon, which multiplies the matrices of one shape together.

    dtype: in which to multiply; PyTorch's is always bfloat16. Otherwise as there.
    Raises ValueError for a rate below 0 or a parameter that isn't a matrix.
    Source: Jordan et al. (2024).

    Book: 14_after_gpt2.html#the-module
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        ns_steps: int = 5,
        dtype: torch.dtype = torch.bfloat16,
    ):
        super().__init__(params, lr, weight_decay, momentum, ns_steps=ns_steps)
        self.dtype = dtype

    @torch.no_grad()
    def step(self) -> None:
        """Move every matrix that has a gradient."""
        for group in self.param_groups:
            shapes = defaultdict(list)
            for matrix in group["params"]:
                if matrix.grad is not None:
                    shapes[matrix.shape].append(matrix)
            for matrices in shapes.values():
                self._move(matrices, group)

    def _move(self, matrices: list[nn.Parameter], group: dict[str, Any]) -> None:
        """Move matrices of one shape."""
        ahead = []
        for matrix in matrices:
            state = self.state[matrix]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(matrix)
            mean = state["momentum_buffer"].lerp_(matrix.grad, 1 - group["momentum"])
            ahead.append(matrix.grad.lerp(mean, group["momentum"]))
        updates = orthogonalize(ahead, group["ns_steps"], self.dtype)
        rows, columns = matrices[0].shape
        rate = group["lr"] * max(1, rows / columns) ** 0.5
        for matrix, update in zip(matrices, updates, strict=True):
            matrix.mul_(1 - group["lr"] * group["weight_decay"])
            matrix.add_(update, alpha=-rate)


@dataclass(frozen=True)
class MuonConfig(TrainConfig):
    schedule: str = "linear"
    final_rate: float = 0.0
    matrix_learning_rate: float = 0.02


def muon_optimizers(model, config, dtype=torch.bfloat16):
    matrices, rest = [], []
    for name, parameter in model.named_parameters():
        inside = name.startswith("blocks.") and parameter.dim() > 1
        (matrices if inside else rest).append(parameter)
    muon = Muon(
        matrices, config.matrix_learning_rate, config.weight_decay, 0.9, 4, dtype
    )
    groups = [{"params": rest, "weight_decay": 0.0}]
    return [
        muon,
        torch.optim.AdamW(groups, config.learning_rate, (0.9, 0.99), fused=True),
    ]
