# Written by tools/tangle.py from book/10_gpt.ipynb: change it there.
"""The GPT: token ids in, a score for every possible next token out."""

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glassgpt.attention import attention, causal_mask
from glassgpt.block import Block, layer_norm
from glassgpt.embeddings import Embedding
from glassgpt.mlp import gelu


@dataclass(frozen=True)
class GPTConfig:
    """The sizes that make a GPT. The defaults are those of GPT-2's smallest model.

    vocab_size: V. context: the longest T. layers: L, the number of blocks. heads: H.
    width: C. dropout: share dropped in training. tied: the head is the token table.
    Raises ValueError for sizes that no model can have.

    Book: 10_gpt.html#the-sizes
    """

    vocab_size: int  # V
    context: int = 1024  # the longest T
    layers: int = 12  # L, the number of blocks
    heads: int = 12  # H, of each block
    width: int = 768  # C, numbers in a token's vector
    dropout: float = 0.0  # share dropped in training
    tied: bool = True  # the head is the token table

    def __post_init__(self) -> None:
        for name in ("vocab_size", "context", "layers", "heads", "width"):
            size = getattr(self, name)
            if type(size) is not int or size < 1:  # True is an int, too
                raise ValueError(
                    f"{name} must be a whole number from 1 up, not {size!r}"
                )
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is no multiple of {self.heads} heads")
        if not isinstance(self.dropout, int | float) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), not {self.dropout!r}")


class GPT(nn.Module):
    """GPT-2: `model(ids)` turns ids (B, T) int64 into logits (B, T, V).

    Raises ValueError, before anything is computed, for ids of another shape or type,
    none, ids out of range, and T beyond the context. Source: Radford et al. (2019).

    Book: 10_gpt.html#the-equation-and-the-model
    """

    __call__: Callable[..., Tensor]  # model(ids), for type checkers

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.make_parts()
        self.initialize()

    def make_parts(self) -> None:
        """The modules of the model; another architecture makes others."""
        c = self.config
        self.tokens = Embedding(c.vocab_size, c.width)
        self.positions = Embedding(c.context, c.width)
        self.dropout = nn.Dropout(c.dropout)
        blocks = (Block(c.width, c.heads, c.dropout) for _ in range(c.layers))
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(c.width)
        self.head = nn.Linear(c.width, c.vocab_size, bias=False)
        if c.tied:
            self.head.weight = self.tokens.weight

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        """What enters the first block, (B, T, C)."""
        return self.dropout(self.tokens(ids) + self.positions(positions))

    def hidden_states(
        self,
        ids: Tensor,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        caches: list[Any] | None = None,
    ) -> Tensor:
        """What the head reads, (B, T, C), for ids that are known to be valid.

        positions: (T,) or (B, T), by default those that follow what the caches hold.
        mask: as in `fused_attention`. caches: one for each block (chapter 13).
        """
        if positions is None:
            first = caches[0].length if caches else 0
            positions = torch.arange(first, first + ids.shape[1], device=ids.device)
        x = self.embed(ids, positions)  # (B, T, C)
        for layer, block in enumerate(self.blocks):
            x = block(x, mask, caches[layer] if caches else None)
        return self.norm(x)

    def forward(self, ids: Tensor, caches: list[Any] | None = None) -> Tensor:
        """Logits (B, T, V) for ids (B, T). caches: one for each block (chapter 13)."""
        room = self.config.context - (caches[0].length if caches else 0)
        check_ids(ids, self.config.vocab_size, room)
        return self.head(self.hidden_states(ids, caches=caches))

    @torch.no_grad()
    def initialize(self) -> None:
        """Normal with standard deviation 0.02, less for what writes into the stream."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.dim() == 1:  # the weight of a norm
                parameter.fill_(1.0)
            elif name.endswith("projection.weight"):  # it writes into the stream
                parameter.normal_(0.0, 0.02 / math.sqrt(2 * self.config.layers))
            else:
                parameter.normal_(0.0, 0.02)

    def parameter_count(self) -> int:
        """How many numbers are learned; a tied table counts once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def flops_per_token(self) -> int:
        """Operations of training per token, forward and backward, at full context.

        6 for each weight of a matrix product and 12 L C T for attention, masked
        positions counted. Source: Kaplan et al. (2020), Chowdhery et al. (2023).
        """
        c = self.config
        linear = [part for part in self.modules() if isinstance(part, nn.Linear)]
        weights = sum(layer.weight.numel() for layer in linear)
        return 6 * weights + 12 * c.layers * c.width * c.context


def check_ids(ids: Tensor, vocab_size: int, room: int) -> None:
    """Raise ValueError unless ids (B, T) are int64 from 0 below vocab_size.

    There must be one at least, and T at most room.

    Book: 10_gpt.html#what-it-refuses
    """
    if not isinstance(ids, Tensor) or ids.dtype != torch.int64 or ids.dim() != 2:
        found = f"{getattr(ids, 'dtype', type(ids))} {tuple(getattr(ids, 'shape', ()))}"
        raise ValueError(f"ids must be an int64 tensor (B, T), not {found}")
    if not ids.numel():
        raise ValueError(f"there must be at least one id, not {tuple(ids.shape)}")
    if ids.shape[1] > room:
        raise ValueError(f"{ids.shape[1]} tokens, but the context has room for {room}")
    lowest, highest = ids.min().item(), ids.max().item()
    if lowest < 0 or highest >= vocab_size:
        wrong = lowest if lowest < 0 else highest
        raise ValueError(f"id {wrong} is out of range: ids are 0 to {vocab_size - 1}")


class LayerNormByHand(nn.Module):
    """The layer norm of `layer` (..., C), computed by a function like `layer_norm`.

    Book: 10_gpt.html#a-gpt-of-our-own-functions
    """

    def __init__(self, layer: nn.LayerNorm, function: Callable[..., Tensor]):
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight, self.bias)


def by_hand(
    model: GPT,
    attention: Callable[..., tuple[Tensor, Tensor]] = attention,
    gelu: Callable[[Tensor], Tensor] = gelu,
    layer_norm: Callable[..., Tensor] = layer_norm,
) -> GPT:
    """A copy of a model that computes with the functions given, by default the book's.

    attention, gelu, layer_norm: called as those of chapters 6, 8 and 9. The copy has
    the same weights under the same names, gives the same logits, and can be trained.
    Raises TypeError for another class than GPT, whose parts may be others.

    Book: 10_gpt.html#a-gpt-of-our-own-functions
    """
    if type(model) is not GPT:
        raise TypeError(f"by_hand takes a plain GPT, not a {type(model).__name__}")

    def attend(
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        mask: Tensor | None = None,
        dropout: float = 0.0,
    ) -> Tensor:
        T, S = queries.shape[-2], keys.shape[-2]
        if mask is None:
            mask = causal_mask(S, device=keys.device)[-T:]
        contexts, weights = attention(queries, keys, values, mask)
        if dropout > 0:
            contexts = F.dropout(weights, dropout) @ values
        return contexts

    copy = deepcopy(model)
    for block in copy.blocks:
        block.attention_norm = LayerNormByHand(block.attention_norm, layer_norm)
        block.attention.attend = attend
        block.mlp_norm = LayerNormByHand(block.mlp_norm, layer_norm)
        block.mlp.activation = gelu
    copy.norm = LayerNormByHand(copy.norm, layer_norm)
    return copy
