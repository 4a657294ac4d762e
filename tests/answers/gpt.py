"""Answers to the checks of chapter 10."""

import itertools
from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

from glassgpt.attention import attention
from glassgpt.block import Block, layer_norm
from glassgpt.checks.gpt import (
    check_budget,
    check_config,
    check_early_logits,
    check_gpt,
    check_own_parts,
    check_parameter_count,
)
from glassgpt.gpt import GPT, GPTConfig, check_ids
from glassgpt.mlp import gelu


@dataclass(frozen=True)
class OwnConfig:
    """The same sizes; it says what is wrong in other words."""

    vocab_size: int
    context: int = 8
    layers: int = 1
    heads: int = 1
    width: int = 8
    dropout: float = 0.0

    def __post_init__(self):
        for name in ("vocab_size", "context", "layers", "heads", "width"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ValueError(f"bad {name}")
        if self.width % self.heads:
            raise ValueError("bad width")
        if not 0 <= self.dropout < 1:
            raise ValueError("bad dropout")


class AsOpenAI(GPT):
    def initialize(self):
        super().initialize()
        nn.init.normal_(self.positions.weight, std=0.01)


class Plain(nn.Module):
    """A model without any of GPT's methods."""

    def __init__(self, config):
        super().__init__()
        ours = GPT(config)
        self.config, self.tokens, self.positions = config, ours.tokens, ours.positions
        self.blocks, self.norm, self.head = ours.blocks, ours.norm, ours.head
        self.dropout = ours.dropout

    def forward(self, ids):
        if ids.shape[1] > self.config.context:
            raise ValueError("too long")
        if ids.min() < 0 or ids.max() >= self.config.vocab_size:
            raise ValueError("out of range")
        x = self.tokens.weight[ids] + self.positions.weight[: ids.shape[1]]
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x)
        return self.norm(x) @ self.head.weight.T


class WithoutPositions(GPT):
    def embed(self, ids, positions):
        return self.tokens(ids)


class WithoutNorm(GPT):
    def hidden_states(self, ids, positions=None, mask=None, caches=None):
        x = self.embed(ids, torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        return x


class WithoutABlock(GPT):
    def hidden_states(self, ids, positions=None, mask=None, caches=None):
        x = self.embed(ids, torch.arange(ids.shape[1]))
        for block in self.blocks[1:]:
            x = block(x)
        return self.norm(x)


class PostNormBlock(Block):
    def forward(self, x, mask=None, cache=None):
        x = self.attention_norm(x + self.attention(x, mask, cache))
        return self.mlp_norm(x + self.mlp(x))


class PostNorm(GPT):
    def __init__(self, config):
        super().__init__(config)
        blocks = (PostNormBlock(config.width, config.heads) for _ in self.blocks)
        self.blocks = nn.ModuleList(blocks)
        self.initialize()


class Peeking(GPT):
    def hidden_states(self, ids, positions=None, mask=None, caches=None):
        everything = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool)
        return super().hidden_states(ids, positions, everything, caches)


class PeekingInTraining(Peeking):
    def hidden_states(self, *given, **named):
        kind = Peeking if self.training else GPT
        return kind.hidden_states(self, *given, **named)


class OnlyTheLast(GPT):
    def forward(self, ids):
        return super().forward(ids)[:, -1:]


class LoudStart(GPT):
    def initialize(self):
        super().initialize()
        nn.init.normal_(self.tokens.weight)


class EvenProjections(GPT):
    def initialize(self):
        super().initialize()
        for name, weight in self.named_parameters():
            if name.endswith("projection.weight"):
                nn.init.normal_(weight, std=0.02)


class Untied(GPT):
    def __init__(self, config):
        super().__init__(replace(config, tied=False))


class AlwaysTied(GPT):
    def __init__(self, config):
        super().__init__(replace(config, tied=True))


class OneHead(GPT):
    def __init__(self, config):
        super().__init__(replace(config, heads=1))


class ReadByTheTable(GPT):
    """The table of tokens is the head, whatever `tied` says."""

    def forward(self, ids):
        check_ids(ids, self.config.vocab_size, self.config.context)
        return self.hidden_states(ids) @ self.tokens.weight.T


class ExactGELU(GPT):
    def __init__(self, config):
        super().__init__(config)
        for block in self.blocks:
            block.mlp.activation = F.gelu


class Detached(GPT):
    def hidden_states(self, ids, positions=None, mask=None, caches=None):
        x = self.embed(ids, torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x.detach())
        return self.norm(x)


class WithoutGradients(GPT):
    forward = torch.no_grad()(GPT.forward)


class OtherNames(GPT):
    def __init__(self, config):
        super().__init__(config)
        for block in self.blocks:
            block.feed_forward = block.mlp
            block.mlp = nn.Identity()


class NeverDropping(GPT):
    def __init__(self, config):
        super().__init__(replace(config, dropout=0.0))


class DroppingInBlocksOnly(GPT):
    def embed(self, ids, positions):
        return self.tokens(ids) + self.positions(positions)


class AlwaysDropping(GPT):
    def eval(self):
        return self


class Forgiving(GPT):
    def forward(self, ids):
        return self.head(self.hidden_states(ids.clamp(0, self.config.vocab_size - 1)))


class Brusque(GPT):
    def forward(self, ids):
        if (ids >= self.config.vocab_size).any():
            raise IndexError("index out of range in self")
        return super().forward(ids)


def vague(**values):
    try:
        return GPTConfig(**values)
    except ValueError:
        raise ValueError("bad value") from None


def asserting(**values):
    assert values["vocab_size"] > 0
    return SimpleNamespace(**values)


def count(V, T, L, C, tables=1, positions=1, bias=13, last=2):
    return tables * V * C + positions * T * C + L * (12 * C * C + bias * C) + last * C


def early(model, ids, layers, norm=True, positions=True):
    x = model.tokens(ids)
    x = x + model.positions(torch.arange(ids.shape[1])) if positions else x
    for block in model.blocks[:layers]:
        x = block(x)
    return model.head(model.norm(x) if norm else x)


def early_by_hook(model, ids, layers):
    seen = {}
    read = model.blocks[layers] if layers < len(model.blocks) else model.norm
    hook = read.register_forward_pre_hook(lambda part, given: seen.update(x=given[0]))
    model(ids)
    hook.remove()
    return model.head(model.norm(seen["x"]))


@torch.no_grad()
def early_by_zeroing(model, ids, layers):
    for block in model.blocks[layers:]:
        for part in (block.attention, block.mlp):
            part.projection.weight.zero_()
            part.projection.bias.zero_()
    return model(ids)


def unmasked(queries, keys, values, mask):
    return attention(queries, keys, values)


def by_the_root(x, weight, bias):
    return x / x.square().mean(-1, keepdim=True).sqrt() * weight + bias


def detached(x):
    return gelu(x.detach())


def config_of(**values):
    values = {"vocab_size": 500, "context": 128, "heads": 2, "width": 64, **values}
    return lambda budget: GPTConfig(**values)


def largest(budget, layers=range(1, 9), heads=range(1, 17)):
    """The costliest that fits, by the formulas of the chapter."""
    costs = {}
    for L, C in itertools.product(layers, (32 * number for number in heads)):
        weights = 12 * L * C**2 + 500 * C
        parameters = weights + 13 * L * C + 128 * C + 2 * C
        costs[20 * parameters * (6 * weights + 12 * L * C * 128)] = L, C
    L, C = costs[max(cost for cost in costs if cost <= budget)]
    return config_of(layers=L, heads=C // 32, width=C)(budget)


RIGHT = {
    check_config: [GPTConfig, OwnConfig],
    check_gpt: [GPT, AsOpenAI, Plain],
    check_parameter_count: [count],
    check_early_logits: [early, early_by_hook],
    check_own_parts: [lambda: (attention, gelu, layer_norm)],
    check_budget: [largest],
}
WRONG = {
    check_config: [
        (SimpleNamespace, "from 1 up, not 0, but it was accepted"),
        (asserting, "not AssertionError"),
        (vague, "doesn't name it: bad value"),
        (lambda **v: SimpleNamespace(**vars(GPTConfig(**v))), "make it frozen"),
        (lambda **v: GPTConfig(**{**v, "layers": 1}), "layers=2 became 1"),
    ],
    check_gpt: [
        (WithoutPositions, "the positions are missing"),
        (WithoutNorm, "the last norm, before the head"),
        (PostNorm, "the blocks normalize after adding"),
        (Peeking, "the future leaks"),
        (PeekingInTraining, "the future leaks"),
        (Untied, "the head has a table of its own"),
        (LoudStart, "start with smaller weights"),
        (EvenProjections, "the root of the number of additions"),
        (Forgiving, "id 11 is not in a vocabulary of 11, but it was accepted"),
        (Brusque, "raise a ValueError, not IndexError"),
        (OneHead, "look at the heads, the GELU, the norms"),
        (ExactGELU, "look at the heads, the GELU, the norms"),
        (WithoutABlock, "look at the heads, the GELU, the norms"),
        (ReadByTheTable, "with 4 heads and tied=False"),
        (AlwaysTied, "tied=False was ignored"),
        (Detached, "is wrong: was a part detached"),
        (WithoutGradients, "no gradient flows back"),
        (OtherNames, "nothing in the model is called blocks.0.mlp.expand"),
        (OnlyTheLast, "the shape is (2, 1, 500), not (B, T, V)"),
        (NeverDropping, "dropout must act on tokens + positions"),
        (DroppingInBlocksOnly, "dropout must act on tokens + positions"),
    ],
    check_parameter_count: [
        (lambda *sizes: count(*sizes, tables=2), "counted twice"),
        (lambda *sizes: count(*sizes, positions=0), "table of positions"),
        (lambda *sizes: count(*sizes, bias=0, last=0), "biases and norms are missing"),
        (lambda *sizes: count(*sizes, last=1), "off by -10"),
    ],
    check_early_logits: [
        (lambda model, ids, layers: model(ids), "all three blocks still took part"),
        (lambda *given: early(*given, norm=False), "the last norm is missing"),
        (lambda m, ids, layers: early(m, ids, layers + 1), "one block too many"),
        (lambda *given: early(*given, positions=False), "were the positions added"),
        (lambda *given: early(*given)[0], "the shape is (4, 11), not (2, 4, 11)"),
        (lambda m, *given: early(m.train(), *given), "leave it as it is"),
        (early_by_zeroing, "leave it as it is"),
    ],
    check_own_parts: [
        (lambda: (unmasked, gelu, layer_norm), "with your attention"),
        (lambda: (attention, F.gelu, layer_norm), "with your GELU"),
        (lambda: (attention, gelu, by_the_root), "with your layer norm"),
        (lambda: (attention, detached, layer_norm), "was a part detached"),
    ],
    check_budget: [
        (lambda budget: None, "return a GPTConfig"),
        (config_of(vocab_size=65), "vocab_size is 65"),
        (config_of(context=64), "context is 64"),
        (config_of(width=128), "heads have width 64"),
        (config_of(layers=1), "1e+13 is used: at least 50% are"),
        (config_of(layers=40), "budget 1e+13 would be spent"),
        (lambda budget: largest(budget, range(1, 2000), (1,)), "at most 48"),
    ],
}
