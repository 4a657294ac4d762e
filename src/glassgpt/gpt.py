# Written by tools/tangle.py from book/10_gpt.ipynb: change it there.
"""The GPT: token ids in, a score for every possible next token out."""

import math
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from glassgpt.block import Block, make_norm
from glassgpt.embeddings import Embedding
from glassgpt.positions import rotary_tables, sinusoidal_positions


def _check_sizes(config: "GPTConfig") -> None:
    """Raise ValueError for sizes that no model can have."""
    for name in ("vocab_size", "context", "layers", "heads", "width"):
        value = getattr(config, name)
        if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be a whole number from 1 up, not {value!r}")
        object.__setattr__(config, name, int(value))  # NumPy's become Python's
    width, heads = config.width, config.heads
    if width % heads:
        raise ValueError(f"width {width} can't be split into {heads} heads evenly")
    dropout = config.dropout
    if (
        type(dropout) is bool
        or not isinstance(dropout, int | float)
        or (not 0 <= dropout < 1)
    ):
        raise ValueError(f"dropout must be a number in [0, 1), not {dropout!r}")


_CHOICES = {
    "positions": ("learned", "sinusoidal", "rotary"),
    "norm": ("layer", "rms"),
    "activation": ("gelu", "squared_relu"),
    "normalize_qk": (False, True),
    "bias": (False, True),
    "tied": (False, True),
    "zero_projections": (False, True),
}


def _check_choices(config: "GPTConfig") -> None:
    """Raise ValueError for choices that don't exist or don't go together."""
    for name, allowed in _CHOICES.items():
        value = getattr(config, name)
        if type(value) is not type(allowed[0]) or value not in allowed:
            among = ", ".join(map(str, allowed))
            raise ValueError(f"{name} must be one of {among}, not {value!r}")
    if config.positions == "sinusoidal" and config.width % 2:
        raise ValueError(f"sinusoidal positions need an even width, not {config.width}")
    if config.positions == "rotary" and config.head_width % 2:
        raise ValueError(
            f"rotary positions need heads of even width, not {config.head_width}"
        )


_MODERN = {
    "positions": "rotary",
    "norm": "rms",
    "activation": "squared_relu",
    "normalize_qk": True,
    "bias": False,
    "tied": False,
    "zero_projections": True,
}


@dataclass(frozen=True)
class GPTConfig:
    """The sizes and choices that make a GPT. The defaults are GPT-2's.

    vocab_size: V. context: the longest T. layers: number of blocks. heads: H.
    width: C. dropout: share dropped in training. positions: "learned", "sinusoidal"
    or "rotary". norm: "layer" or "rms". activation: "gelu" or "squared_relu".
    normalize_qk: normalize queries and keys. bias: in linear layers and LayerNorm.
    tied: the head shares the token table. zero_projections: start at zero what writes
    into the residual stream, and an untied head. Raises ValueError for the impossible.

    Book: 10_gpt.html#what-came-after-gpt-2
    """

    vocab_size: int
    context: int = 1024
    layers: int = 12
    heads: int = 12
    width: int = 768
    dropout: float = 0.0
    positions: str = "learned"
    norm: str = "layer"
    activation: str = "gelu"
    normalize_qk: bool = False
    bias: bool = True
    tied: bool = True
    zero_projections: bool = False

    def __post_init__(self) -> None:
        _check_sizes(self)
        _check_choices(self)

    @property
    def head_width(self) -> int:
        """The width of one head, C / H."""
        return self.width // self.heads

    @classmethod
    def modern(cls, vocab_size: int, **values: Any) -> "GPTConfig":
        """What came after GPT-2, in one switch; any value can still be overridden."""
        return cls(vocab_size, **{**_MODERN, **values})


def validate_ids(ids: Tensor, rows: int) -> None:
    """Refuse ids that a table with this many rows doesn't have.

    ids: int64 or int32, any shape. On a GPU this waits for the GPU to finish, so call
    it once at a model's door and not in every layer.
    Raises TypeError for other kinds of ids, and ValueError that names an id out of
    range.

    Book: 10_gpt.html#the-door
    """
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int64, torch.int32):
        kind = getattr(ids, "dtype", type(ids).__name__)
        raise TypeError(f"ids must be a tensor of int64 or int32, not {kind}")
    if ids.numel() == 0:
        return
    lowest, highest = (int(id) for id in ids.aminmax())
    if lowest < 0 or highest >= rows:
        wrong = lowest if lowest < 0 else highest
        raise ValueError(
            f"id {wrong} is out of range: {rows} rows have the ids 0 to {rows - 1}"
        )


def _check_ids(ids: Tensor, before: int, config: GPTConfig) -> None:
    """Raise ValueError for ids that a model can't take after `before` others."""
    tensor = isinstance(ids, Tensor)
    whole = tensor and ids.dtype in (torch.int64, torch.int32)
    if not whole or ids.dim() != 2 or ids.numel() == 0:
        found = f"{ids.dtype} {tuple(ids.shape)}" if tensor else type(ids).__name__
        raise ValueError(
            f"ids must be a tensor (B, T) of int64 with at least one id, not {found}"
        )
    length = before + ids.shape[1]
    if length > config.context:
        raise ValueError(
            f"{length} tokens don't fit the model's context of {config.context}"
        )
    validate_ids(ids, config.vocab_size)


def _may_look(before: int, columns: Tensor, starts: Tensor | None) -> Tensor | None:
    """The mask (..., T, keys) for queries at these columns; None where causal will do.

    before: how many keys a cache holds. starts: (B,), or None without padding.
    """
    if starts is None and (before == 0 or len(columns) == 1):
        return None
    keys = torch.arange(before + len(columns), device=columns.device)
    queries = columns[:, None]  # (T, 1)
    mask = keys <= queries  # (T, keys)
    if starts is None:
        return mask
    # Padding sees itself: some kernels make nan of a row that may look nowhere.
    begun = (keys >= starts[:, None, None]) | (keys == queries)  # (B, T, keys)
    return (mask & begun)[:, None]  # (B, 1, T, keys): the same for all heads


def _fixed_tables(config: GPTConfig) -> dict[str, Tensor]:
    """The tables that are computed and not learned, by name."""
    if config.positions == "sinusoidal":
        return {"position_table": sinusoidal_positions(config.context, config.width)}
    if config.positions == "rotary":
        tables = rotary_tables(config.context, config.head_width)
        return dict(zip(("rotary_cos", "rotary_sin"), tables, strict=True))
    return {}


def _call_block(block: Block, *inputs: Any) -> Tensor:
    return block(*inputs)


class GPT(nn.Module):
    """A GPT. `model(ids)` turns ids (B, T) int64 into logits (B, T, V).

    Raises ValueError for ids that are out of range or of another shape, and for T
    beyond the context, on every device and before any kernel runs.
    Source: Radford et al. (2019).

    Book: 10_gpt.html#the-class
    """

    call_block = staticmethod(_call_block)

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = c = config
        self.recompute = False  # True trades time for memory in training
        self.tokens = Embedding(c.vocab_size, c.width)
        if c.positions == "learned":
            self.positions = Embedding(c.context, c.width)
        for name, table in _fixed_tables(c).items():
            self.register_buffer(name, table, persistent=False)
        self.dropout = nn.Dropout(c.dropout)
        choices = (c.dropout, c.bias, c.norm, c.activation, c.normalize_qk)
        self.blocks = nn.ModuleList(
            Block(c.width, c.heads, *choices) for _ in range(c.layers)
        )
        self.norm = make_norm(c.norm, c.width, c.bias)
        self.head = nn.Linear(c.width, c.vocab_size, bias=False)
        self.initialize()

    @torch.no_grad()
    def initialize(self) -> None:
        """GPT-2's start: normal 0.02, smaller for what writes into the residual stream.

        Sets every parameter and fixed table, and ties the head if the configuration
        says so.
        """
        for name, table in _fixed_tables(self.config).items():
            getattr(self, name).copy_(table)
        if self.config.tied:
            self.head.weight = self.tokens.weight
        small = 0.02 / math.sqrt(2 * self.config.layers)
        for name, parameter in self.named_parameters():
            projection = name.endswith("projection.weight")
            if self.config.zero_projections and (projection or name == "head.weight"):
                parameter.zero_()
            elif parameter.dim() == 2:
                parameter.normal_(0.0, small if projection else 0.02)
            else:  # of a norm, or a bias
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)

    def forward(
        self, ids: Tensor, caches: list[Any] | None = None, starts: Tensor | None = None
    ) -> Tensor:
        """Logits (B, T, V) for ids (B, T).

        caches: one per layer; the ids then continue what the caches hold.
        starts: (B,) the column where each row begins, for rows padded on the left.
        """
        self.check(ids, caches[0].length if caches else 0)
        return self.logits(ids, caches, starts)

    def check(self, ids: Tensor, before: int = 0) -> None:
        """Raise ValueError for ids that this model can't take after `before` others."""
        _check_ids(ids, before, self.config)

    def logits(
        self, ids: Tensor, caches: list[Any] | None = None, starts: Tensor | None = None
    ) -> Tensor:
        """`forward` without its checks, for code that compiles and knows its ids."""
        return self.head(self.hidden_states(ids, caches, starts))

    def hidden_states(
        self, ids: Tensor, caches: list[Any] | None = None, starts: Tensor | None = None
    ) -> Tensor:
        """What the head reads, (B, T, C): for who needs the logits of few positions."""
        before = caches[0].length if caches else 0
        columns = torch.arange(before, before + ids.shape[1], device=ids.device)
        places = columns if starts is None else (columns - starts[:, None]).clamp(min=0)
        x, rotary = self.embed(ids, places)
        mask = _may_look(before, columns, starts)
        for layer, block in enumerate(self.blocks):
            if self.recompute and self.training and not caches:
                x = checkpoint(
                    self.call_block, block, x, rotary, mask, use_reentrant=False
                )
            else:
                cache = caches[layer] if caches else None
                x = self.call_block(block, x, rotary, mask, cache)
        return self.norm(x)

    def embed(
        self, ids: Tensor, places: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Vectors (B, T, C) for ids at the given places, and the rotary tables if any.

        places: (T,), or (B, T) where rows begin at different columns.
        """
        x, rotary = self.tokens(ids), None
        if self.config.positions == "learned":
            x = x + self.positions(places)
        elif self.config.positions == "sinusoidal":
            x = x * math.sqrt(self.config.width)
            x = x + self.position_table[places].to(x.dtype)
        else:
            cos, sin = self.rotary_cos[places], self.rotary_sin[places]
            if places.dim() == 2:  # one axis more, for the heads
                cos, sin = cos[:, None], sin[:, None]
            rotary = (cos, sin)
        return self.dropout(x), rotary

    def parameter_count(self) -> int:
        """How many numbers are learned; a tied table counts once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def flops_per_token(self) -> int:
        """Floating-point operations of training per token, forward and backward.

        6 for every weight that takes part in a matrix product, and 12 L C T for
        attention over a full context, hidden positions included.
        Source: Kaplan et al. (2020), Chowdhery et al. (2023).
        """
        c = self.config
        tables = 0 if c.tied else self.tokens.weight.numel()
        if c.positions == "learned":
            tables += self.positions.weight.numel()
        matrices = sum(p.numel() for p in self.parameters() if p.dim() == 2) - tables
        return 6 * matrices + 12 * c.layers * c.width * c.context
