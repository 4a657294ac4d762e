# Written by tools/tangle.py from book/10_gpt.ipynb: change it there.
"""The GPT: token ids in, a score for every possible next token out."""

import math
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from glassgpt.block import Block
from glassgpt.embeddings import Embedding


@dataclass(frozen=True)
class GPTConfig:
    """The sizes that make a GPT. The defaults are GPT-2's.

    vocab_size: V. context: the longest T. layers: number of blocks. heads: H.
    width: C. dropout: share dropped in training. tied: the head shares the token table.
    Raises ValueError for sizes that no model can have.

    Book: 10_gpt.html#the-configuration
    """

    vocab_size: int
    context: int = 1024
    layers: int = 12
    heads: int = 12
    width: int = 768
    dropout: float = 0.0
    tied: bool = True

    def __post_init__(self) -> None:
        for name in ("vocab_size", "context", "layers", "heads", "width"):
            size = getattr(self, name)
            if not isinstance(size, Integral) or size < 1:
                raise ValueError(
                    f"{name} must be a whole number from 1 up, not {size!r}"
                )
            object.__setattr__(self, name, int(size))  # NumPy's become Python's
        if self.width % self.heads:
            raise ValueError(
                f"width {self.width} can't be split into {self.heads} heads evenly"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), not {self.dropout!r}")


def check_ids(ids: Tensor, vocab_size: int, room: int) -> None:
    """Raise ValueError unless ids (B, T) are int64 below vocab_size and T fits `room`.

    Looking at ids on a GPU waits for it.

    Book: 10_gpt.html#the-door
    """
    if not isinstance(ids, Tensor) or ids.dtype != torch.int64 or ids.dim() != 2:
        found = f"{ids.dtype} {tuple(ids.shape)}" if isinstance(ids, Tensor) else ids
        raise ValueError(f"ids must be an int64 tensor (B, T), not {found!r}")
    if not 0 < ids.shape[1] <= room or not len(ids):
        raise ValueError(f"{ids.shape[1]} tokens, where 1 to {room} fit the context")
    lowest, highest = (int(id) for id in ids.aminmax())
    if lowest < 0 or highest >= vocab_size:
        wrong = lowest if lowest < 0 else highest
        raise ValueError(f"id {wrong} is out of range: ids are 0 to {vocab_size - 1}")


class GPT(nn.Module):
    """GPT-2. `model(ids)` turns ids (B, T) int64 into logits (B, T, V).

    Raises ValueError for ids that are out of range or of another shape, and for T
    beyond the context, on every device and before any kernel runs.
    Source: Radford et al. (2019).

    Book: 10_gpt.html#how-it-starts
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = c = config
        self.tokens = Embedding(c.vocab_size, c.width)
        self.positions = Embedding(c.context, c.width)
        self.dropout = nn.Dropout(c.dropout)
        self.blocks = nn.ModuleList(
            Block(c.width, c.heads, c.dropout) for _ in range(c.layers)
        )
        self.norm = nn.LayerNorm(c.width)
        self.head = nn.Linear(c.width, c.vocab_size, bias=False)
        if c.tied:
            self.head.weight = self.tokens.weight
        self.initialize()

    def forward(
        self,
        ids: Tensor,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        caches: list[Any] | None = None,
    ) -> Tensor:
        """Logits (B, T, V) for ids (B, T).

        positions: (T,) or (B, T), else those that follow what the caches hold.
        mask: as in `fused_attention`. caches: one for each block (chapter 13).
        """
        room = self.config.context - (caches[0].length if caches else 0)
        check_ids(ids, self.config.vocab_size, room)
        return self.head(self.hidden_states(ids, positions, mask, caches))

    def hidden_states(
        self,
        ids: Tensor,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        caches: list[Any] | None = None,
    ) -> Tensor:
        """What the head reads, (B, T, C), from ids that are known to be valid."""
        if positions is None:
            first = caches[0].length if caches else 0
            positions = torch.arange(first, first + ids.shape[1], device=ids.device)
        x = self.embed(ids, positions)
        for layer, block in enumerate(self.blocks):
            x = block(x, mask, caches[layer] if caches else None)
        return self.norm(x)

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        """The vectors (B, T, C) that enter the first block."""
        return self.dropout(self.tokens(ids) + self.positions(positions))

    @torch.no_grad()
    def initialize(self) -> None:
        """GPT-2's start: normal 0.02, smaller for what writes into the residual stream."""
        small = 0.02 / math.sqrt(2 * self.config.layers)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                writes = name.endswith("projection.weight")
                parameter.normal_(0.0, small if writes else 0.02)
            else:  # of a norm, or a bias
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)

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
        matrices = sum(p.numel() for p in self.blocks.parameters() if p.dim() == 2)
        weights = matrices + self.head.weight.numel()
        return 6 * weights + 12 * c.layers * c.width * c.context
