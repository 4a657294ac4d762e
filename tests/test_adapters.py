"""The checks take other programs' functions, as they are or through a few lines."""

import math
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from glassgpt.checks.attention import check_attention, check_causal  # noqa: F401
from glassgpt.checks.block import check_layer_norm
from glassgpt.checks.gpt import check_own_parts
from glassgpt.checks.heads import (
    check_causal_attention,
    check_grouped_attention,
    check_multi_head,
)
from glassgpt.checks.mlp import check_each_alone, check_gelu, check_mlp
from glassgpt.checks.softmax import (
    check_cross_entropy,
    check_log_softmax,
    check_softmax,
)


def test_softmax_of_pytorch():
    check_softmax(torch.softmax)
    check_log_softmax(torch.log_softmax)


def test_cross_entropy_of_pytorch_wants_the_classes_on_the_second_axis():
    check_cross_entropy(lambda x, ids: F.cross_entropy(x.flatten(0, -2), ids.flatten()))


def test_gelu_of_pytorch():
    check_gelu(partial(F.gelu, approximate="tanh"))
    check_gelu(nn.GELU("tanh"))


def test_layer_norm_of_pytorch():
    check_layer_norm(
        lambda x, weight, bias, eps=1e-5: F.layer_norm(
            x, weight.shape, weight, bias, eps
        )
    )


def test_the_causal_attention_of_pytorch():
    causal = partial(F.scaled_dot_product_attention, is_causal=True)
    check_causal(lambda x: causal(x, x, x))
    check_causal_attention(causal)
    check_grouped_attention(partial(causal, enable_gqa=True))


@dataclass
class Config:
    n_embd: int
    n_head: int
    bias: bool = True


class CausalSelfAttention(nn.Module):
    """In the style of nanoGPT."""

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.register_buffer("mask", torch.tril(torch.ones(8, 8)))

    def forward(self, x):
        B, T, C = x.shape
        shape = (B, T, self.n_head, C // self.n_head)
        q, k, v = (t.view(shape).transpose(1, 2) for t in self.c_attn(x).split(C, 2))
        att = q @ k.transpose(-2, -1) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.mask[:T, :T] == 0, float("-inf"))
        y = F.softmax(att, dim=-1) @ v
        return self.c_proj(y.transpose(1, 2).contiguous().view(B, T, C))


class FeedForward(nn.Module):
    """In the style of nanoGPT."""

    def __init__(self, n_embd):
        super().__init__()
        self.c_fc = nn.Linear(n_embd, 4 * n_embd)
        self.gelu = nn.GELU("tanh")
        self.c_proj = nn.Linear(4 * n_embd, n_embd)

    def forward(self, x):
        return self.c_proj(self.gelu(self.c_fc(x)))


def test_modules_in_the_style_of_nanogpt_with_other_names():
    def attention(width, heads, bias=True):
        module = CausalSelfAttention(Config(width, heads, bias))
        module.qkv, module.projection = module.c_attn, module.c_proj
        return module

    def mlp(width):
        module = FeedForward(width)
        module.expand, module.projection = module.c_fc, module.c_proj
        return module

    check_multi_head(attention)
    check_multi_head(partial(attention, bias=False))
    check_causal(CausalSelfAttention(Config(4, 2)))
    check_mlp(mlp)
    check_each_alone(FeedForward(4))


class RotaryAttention(nn.Module):
    """In the style of Llama: turned queries and keys, shared keys, no biases."""

    def __init__(self, dim, n_heads, n_kv_heads):
        super().__init__()
        self.n_heads, self.n_kv_heads = n_heads, n_kv_heads
        self.head_dim = dim // n_heads
        self.wq = nn.Linear(dim, n_heads * self.head_dim, bias=False)
        self.wk = nn.Linear(dim, n_kv_heads * self.head_dim, bias=False)
        self.wv = nn.Linear(dim, n_kv_heads * self.head_dim, bias=False)
        self.wo = nn.Linear(dim, dim, bias=False)

    def forward(self, x, cos, sin):
        """cos, sin: (T, head_dim / 2)."""
        B, T, _ = x.shape
        q = turned(self.wq(x).view(B, T, self.n_heads, -1).transpose(1, 2), cos, sin)
        k = turned(self.wk(x).view(B, T, self.n_kv_heads, -1).transpose(1, 2), cos, sin)
        v = self.wv(x).view(B, T, self.n_kv_heads, -1).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.wo(y.transpose(1, 2).reshape(B, T, -1))


def turned(x, cos, sin):
    even, odd = x[..., 0::2], x[..., 1::2]
    pairs = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return pairs.flatten(-2)


def test_the_adapters_of_agents():
    text = (Path(__file__).parent.parent / "AGENTS.md").read_text("utf-8")
    _, adapters = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[:2]
    angles = torch.arange(5.0)[:, None] / torch.tensor([1.0, 100.0])
    given = {"cos": angles.cos(), "sin": angles.sin()}
    exec(adapters, globals() | given | {"llama_attention": RotaryAttention(16, 4, 2)})


def test_an_attention_in_the_style_of_llama_without_its_turns():
    """With angles of 0 it is the attention of chapter 7, with shared keys."""

    def attention(width, heads):
        module = RotaryAttention(width, heads, n_kv_heads=1)
        turn = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        module.forward = partial(module.forward, cos=turn[0], sin=turn[1])
        module.projection = module.wo
        module.qkv = lambda x: torch.cat(
            [module.wq(x)] + [w(x).repeat(1, 1, heads) for w in (module.wk, module.wv)],
            dim=-1,
        )
        return module

    check_multi_head(attention)


def test_a_gpt_of_pytorchs_parts():
    def attention(queries, keys, values, mask):
        scores = queries @ keys.mT / math.sqrt(queries.shape[-1])
        weights = torch.softmax(scores.masked_fill(~mask, -math.inf), dim=-1)
        return weights @ values, weights

    def gelu(x):
        return F.gelu(x, approximate="tanh")

    def layer_norm(x, weight, bias):
        return F.layer_norm(x, weight.shape, weight, bias)

    check_own_parts(lambda: (attention, gelu, layer_norm))
