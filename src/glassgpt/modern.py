# Written by tools/tangle.py from book/14_after_gpt2.ipynb: change it there.
"""What came after GPT-2: the same model, its parts exchanged one by one."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glassgpt.embeddings import Embedding
from glassgpt.gpt import GPT, GPTConfig
from glassgpt.heads import fused_attention, merge_heads, split_heads
from glassgpt.mlp import pytorch_gelu
from glassgpt.training import Schedule, TrainConfig, check_choices


def rotary_tables(
    positions: Tensor, head_width: int, base: float = 10_000.0
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotation of each pair of columns at each position.

    positions: (...) whole numbers. head_width: D, even. Returns (cos, sin), each
    (..., D / 2) in float32, for `apply_rotary`. base: a larger one makes the slow pairs
    slower, for longer contexts. Source: Su et al. (2021).

    Book: 14_after_gpt2.html#the-functions
    """
    # In 32 bits angles at position 10,000 are off by ten-thousandths; Apple's GPUs
    # (mps) have no 64.
    exact = torch.float32 if positions.device.type == "mps" else torch.float64
    columns = torch.arange(0, head_width, 2, dtype=exact, device=positions.device)
    angles = positions[..., None] * base ** (-columns / head_width)
    return angles.cos().float(), angles.sin().float()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair of columns of queries or keys by the angle of its position.

    x: (..., T, D); cos, sin: (T, D / 2), or more axes that broadcast, of
    `rotary_tables` for the positions of x. Column i is paired with column i + D / 2,
    as in the Llama of `transformers`. Returns the shape and dtype of x.
    Source: Su et al. (2021), section 3.4.

    Book: 14_after_gpt2.html#the-functions
    """
    first, second = x.chunk(2, dim=-1)
    rotated = (first * cos - second * sin, second * cos + first * sin)
    return torch.cat(rotated, dim=-1).to(x.dtype)


def squared_relu(x: Tensor) -> Tensor:
    """max(x, 0) squared, on every number of x. Source: So et al. (2021).

    By a product: where PyTorch computes in 16 bits, it takes `square` to 32.

    Book: 14_after_gpt2.html#squared-relu-and-swiglu
    """
    positive = F.relu(x)
    return positive * positive


def swiglu(x: Tensor) -> Tensor:
    """SiLU of the first half of x (..., 2 n), times the second half: (..., n).

    Source: Shazeer (2020).

    Book: 14_after_gpt2.html#squared-relu-and-swiglu
    """
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


_ACTIVATIONS = {"squared_relu": squared_relu, "swiglu": swiglu, "gelu": pytorch_gelu}


@dataclass(frozen=True)
class ModernConfig(GPTConfig):
    """`GPTConfig` and the choices of this chapter; each can be made alone.

    positions: "rotary", whose slowest pairs slow down with rotary_base, or "learned".
    norm: "rms" or "layer", with norm_weight or without, norm_eps inside the root.
    activation: "squared_relu", "swiglu" or "gelu". hidden: the MLP's inner width, by
    default 4 C, and 8 C / 3 rounded up for "swiglu". key_value_heads: G, for H / G
    queries each; by default H. normalize_qk: bring queries and keys to root mean square
    1. bias: in linear layers and LayerNorm. zero_projections: start at zero what writes
    into the residual stream, and an untied head.
    Raises ValueError for what no model can have.

    Book: 14_after_gpt2.html#the-configuration
    """

    tied: bool = False  # the head is the token table
    positions: Literal["rotary", "learned"] = "rotary"  # what tells the order
    rotary_base: float = 10_000.0  # larger: slower turns, for long contexts
    norm: Literal["rms", "layer"] = "rms"  # before each part
    norm_weight: bool = False  # norms learn a factor for each column
    norm_eps: float = 1e-5  # added inside the norm's root
    activation: Literal["squared_relu", "swiglu", "gelu"] = "squared_relu"  # of the MLP
    hidden: int | None = None  # the MLP's inner width; none: 4 C, swiglu 8 C / 3
    key_value_heads: int | None = None  # shared by neighboring heads; none: H
    normalize_qk: bool = True  # queries and keys to root mean square 1
    bias: bool = False  # in linear layers and layer norms
    zero_projections: bool = True  # start as if each block were absent

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self)
        for name in ("rotary_base", "norm_eps", "hidden", "key_value_heads"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive and finite, not {value}")
        for name in ("hidden", "key_value_heads"):
            value = getattr(self, name)
            if value is not None and type(value) is not int:
                raise ValueError(f"{name} must be a whole number, not {value!r}")
        if self.heads % (self.key_value_heads or self.heads):
            raise ValueError(
                f"{self.heads} heads can't share {self.key_value_heads} key-value "
                "heads evenly"
            )
        head_width = self.width // self.heads
        if self.positions == "rotary" and head_width % 2:
            raise ValueError(f"rotary positions need an even head width: {head_width}")


# What makes a ModernGPT a GPT-2 again.
GPT2_CHOICES: dict[str, Any] = {
    "tied": True,
    "positions": "learned",
    "norm": "layer",
    "norm_weight": True,
    "activation": "gelu",
    "normalize_qk": False,
    "bias": True,
    "zero_projections": False,
}
# And what makes it a Llama; sizes, rotary_base and tied differ from model to model.
LLAMA_CHOICES: dict[str, Any] = {
    "norm_weight": True,
    "activation": "swiglu",
    "normalize_qk": False,
    "zero_projections": False,
}


class ModernAttention(nn.Module):
    """`MultiHeadAttention` with the choices of a ModernConfig: (B, T, C) in and out.

    rotation: cosines and sines for `apply_rotary`; without, nothing is rotated.

    Book: 14_after_gpt2.html#the-parts
    """

    def __init__(self, config: ModernConfig):
        super().__init__()
        self.config = c = config
        self.attend = fused_attention
        head_width = c.width // c.heads
        self.heads = c.heads
        self.key_value_heads = c.key_value_heads or c.heads
        shared = self.key_value_heads * head_width
        self.widths = [c.width, shared, shared]  # of queries, keys and values
        self.qkv = nn.Linear(c.width, sum(self.widths), bias=c.bias)
        self.projection = nn.Linear(c.width, c.width, bias=c.bias)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        cache: Any = None,
        rotation: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        queries, keys, values = self.qkv(x).split(self.widths, dim=-1)
        queries = split_heads(queries, self.heads)
        keys = split_heads(keys, self.key_value_heads)
        values = split_heads(values, self.key_value_heads)
        if self.config.normalize_qk:
            queries = F.rms_norm(queries, queries.shape[-1:])
            keys = F.rms_norm(keys, keys.shape[-1:])
        if rotation is not None:
            cos, sin = rotation
            queries = apply_rotary(queries, cos, sin)
            keys = apply_rotary(keys, cos, sin)
        if cache is not None:
            keys, values = cache.append(keys, values)
        dropout = self.config.dropout if self.training else 0.0
        contexts = self.attend(queries, keys, values, mask, dropout)
        return self.projection(merge_heads(contexts))


class ModernMLP(nn.Module):
    """`MLP` with the choices of a ModernConfig: (B, T, C) in and out.

    Book: 14_after_gpt2.html#the-parts
    """

    def __init__(self, config: ModernConfig):
        super().__init__()
        c = config
        if c.activation == "swiglu":
            hidden = c.hidden or 8 * math.ceil(c.width / 3)
            expanded = 2 * hidden  # the gate, and what it lets through
        else:
            hidden = c.hidden or 4 * c.width
            expanded = hidden
        self.expand = nn.Linear(c.width, expanded, bias=c.bias)
        self.projection = nn.Linear(hidden, c.width, bias=c.bias)
        self.activation = _ACTIVATIONS[c.activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.projection(self.activation(self.expand(x)))


def _make_norm(config: ModernConfig) -> nn.Module:
    c = config
    if c.norm == "rms":
        return nn.RMSNorm(c.width, c.norm_eps, c.norm_weight)
    return nn.LayerNorm(c.width, c.norm_eps, c.norm_weight, c.bias)


class ModernBlock(nn.Module):
    """`Block` with the choices of a ModernConfig: (B, T, C) in and out.

    Book: 14_after_gpt2.html#the-parts
    """

    def __init__(self, config: ModernConfig):
        super().__init__()
        self.attention_norm = _make_norm(config)
        self.attention = ModernAttention(config)
        self.mlp_norm = _make_norm(config)
        self.mlp = ModernMLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        cache: Any = None,
        rotation: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        normal = self.attention_norm(x)
        x = x + self.dropout(self.attention(normal, mask, cache, rotation))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class ModernGPT(GPT):
    """`GPT` with the choices of a ModernConfig; same interface, same errors.

    Book: 14_after_gpt2.html#the-model
    """

    config: ModernConfig

    def make_parts(self) -> None:
        """The modules of the model, as its configuration chooses them."""
        c = self.config
        self.tokens = Embedding(c.vocab_size, c.width)
        if c.positions == "learned":
            self.positions = Embedding(c.context, c.width)
        self.dropout = nn.Dropout(c.dropout)
        self.blocks = nn.ModuleList(ModernBlock(c) for _ in range(c.layers))
        self.norm = _make_norm(c)
        self.head = nn.Linear(c.width, c.vocab_size, bias=False)
        if c.tied:
            self.head.weight = self.tokens.weight
        # Not weights: 16 bits would round them.
        self.tables: tuple[Tensor, Tensor] | None = None

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        """What enters the first block, (B, T, C)."""
        if self.config.positions == "learned":
            return super().embed(ids, positions)
        return self.dropout(self.tokens(ids))

    def rotation(self, positions: Tensor) -> tuple[Tensor, Tensor] | None:
        """The rotary tables of positions (..., T) for (B, H, T, D), or None."""
        c, device = self.config, positions.device
        if c.positions != "rotary":
            return None
        if self.tables is None or self.tables[0].device != device:
            whole = torch.arange(c.context, device=device)
            self.tables = rotary_tables(whole, c.width // c.heads, c.rotary_base)
        cos, sin = self.tables
        return cos[positions].unsqueeze(-3), sin[positions].unsqueeze(-3)

    def hidden_states(
        self,
        ids: Tensor,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        caches: list[Any] | None = None,
    ) -> Tensor:
        """As in `GPT`. All blocks share the rotary tables."""
        if positions is None:
            first = caches[0].length if caches else 0
            positions = torch.arange(first, first + ids.shape[1], device=ids.device)
        rotation = self.rotation(positions)
        x = self.embed(ids, positions)
        for layer, block in enumerate(self.blocks):
            x = block(x, mask, caches[layer] if caches else None, rotation)
        return self.norm(x)

    @torch.no_grad()
    def initialize(self) -> None:
        """GPT-2's start, and zeros where the configuration asks for them."""
        super().initialize()
        if self.config.zero_projections:
            for name, parameter in self.named_parameters():  # no head, if it is tied
                if name.endswith(("projection.weight", "head.weight")):
                    parameter.zero_()


def build(config: GPTConfig) -> GPT:
    """A new model of the class that belongs to a configuration.

    Book: 14_after_gpt2.html#the-model
    """
    if isinstance(config, ModernConfig):
        return ModernGPT(config)
    return GPT(config)


def _quintic(square: Tensor) -> Tensor:
    """The matrix a I + b S + c S S, by which a round multiplies X, from S = X X^T."""
    change = torch.baddbmm(square, square, square, beta=-4.7750, alpha=2.0315)
    change.diagonal(dim1=1, dim2=2).add_(3.4445)
    return change


def orthogonalize(
    matrices: Sequence[Tensor] | Tensor, rounds: int, dtype: torch.dtype
) -> Tensor:
    """Bring the singular values of each matrix near 1; their directions stay.

    matrices: of one shape, or stacked along a first axis, as what is returned.
    rounds: of the iteration. dtype: in which to multiply, and of the result. A value of
    at least 0.01 of its matrix's norm ends between 0.6 and 1.3 after 4 or 5 rounds.
    Source: Jordan et al. (2024), Newton-Schulz iteration; Zhang et al. (2026).

    Book: 14_after_gpt2.html#singular-values-without-computing-them
    """
    x = torch.stack([(m / m.norm().clamp(min=1e-7)).to(dtype) for m in matrices])
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    for done in range(0, rounds, 2):
        square = x @ x.mT
        change = _quintic(square)
        if done + 1 < rounds:  # change S change is the second round's X X^T
            change = _quintic(change @ square @ change) @ change
        x = change @ x
    return x.mT if tall else x


class Muon(torch.optim.Muon):
    """PyTorch's Muon, which multiplies the matrices of one shape together.

    dtype: in which to multiply; PyTorch's is always bfloat16. Raises ValueError for a
    rate below 0 or a parameter that isn't a matrix. Source: Jordan et al. (2024).

    Book: 14_after_gpt2.html#the-step-of-muon
    """

    def __init__(
        self, params: Iterable[Tensor], lr: float, decay: float, dtype: torch.dtype
    ):
        super().__init__(params, lr, decay, momentum=0.9, ns_steps=4)
        self.dtype = dtype

    @torch.no_grad()
    def step(self) -> None:
        """Move every matrix that has a gradient."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[nn.Parameter]] = {}
            for matrix in group["params"]:
                if matrix.grad is not None:
                    shapes.setdefault(matrix.shape, []).append(matrix)
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
    """`TrainConfig` for two optimizers: matrix_learning_rate is Muon's.

    learning_rate is AdamW's, for tables and vectors. Both fall on a line to 0.
    Raises ValueError as `TrainConfig` does.

    Book: 14_after_gpt2.html#the-step-of-muon
    """

    matrix_learning_rate: float = 0.02  # Muon's highest, of the blocks' matrices
    schedule: Schedule = "linear"
    final_rate: float = 0.0


def muon_optimizers(
    model: GPT, config: MuonConfig, dtype: torch.dtype = torch.float32
) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices and AdamW for the rest, which doesn't decay.

    dtype: in which Muon multiplies.

    Book: 14_after_gpt2.html#the-step-of-muon
    """
    matrices = [p for p in model.blocks.parameters() if p.dim() > 1]
    inside = set(matrices)
    rest = [p for p in model.parameters() if p not in inside]
    muon = Muon(matrices, config.matrix_learning_rate, config.weight_decay, dtype)
    betas = (config.beta1, config.beta2)
    adamw = torch.optim.AdamW(
        rest, config.learning_rate, betas, weight_decay=0.0, fused=True
    )
    return [muon, adamw]
