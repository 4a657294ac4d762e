"""Answers to the checks of chapter 9."""

import torch
import torch.nn.functional as F
from torch import nn

from glassgpt.block import Block, layer_norm
from glassgpt.checks.block import (
    check_additions,
    check_block,
    check_layer_norm,
    check_layer_norm_gradient,
    check_post_norm,
)
from glassgpt.heads import MultiHeadAttention
from glassgpt.mlp import MLP


def norm_with(spread, dim=-1):
    def norm(x, weight, bias):
        return (x - x.mean(dim, keepdim=True)) / spread(x) * weight + bias

    return norm


def in_place_norm(x, weight, bias):
    x -= x.mean(-1, keepdim=True)
    return layer_norm(x, weight, bias)


def mean_of_squares(x, weight, bias):
    mean = x.mean(-1, keepdim=True)
    variance = x.square().mean(-1, keepdim=True) - mean.square()
    return (x - mean) / (variance + 1e-5).sqrt() * weight + bias


def constant_mean(x, weight, bias):
    centered = x - x.mean(-1, keepdim=True).detach()
    spread = (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    return centered / spread.detach() * weight + bias


class Nano(nn.Module):
    """As in nanoGPT: dropout stands in the parts, and forward takes x alone."""

    def __init__(self, width, heads, dropout=0.0):
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        attention = MultiHeadAttention(width, heads, dropout)
        self.attention = nn.Sequential(attention, nn.Dropout(dropout))
        self.mlp = nn.Sequential(MLP(width), nn.Dropout(dropout))

    def forward(self, x):
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class Root(Nano):
    """Llama's norm in place of LayerNorm."""

    def __init__(self, width, heads, dropout=0.0):
        super().__init__(width, heads, dropout)
        self.attention_norm, self.mlp_norm = nn.RMSNorm(width), nn.RMSNorm(width)


class Replacing(Block):
    def forward(self, x):
        return self.mlp(self.mlp_norm(self.attention(self.attention_norm(x))))


class PostNorm(Block):
    def forward(self, x):
        x = self.attention_norm(x + self.attention(x))
        return self.mlp_norm(x + self.mlp(x))


class NormInStream(Block):
    def forward(self, x):
        x = self.attention_norm(x)
        x = x + self.attention(x)
        return x + self.mlp(self.mlp_norm(x))


class Parallel(Block):
    def forward(self, x):
        return x + self.attention(self.attention_norm(x)) + self.mlp(self.mlp_norm(x))


class BareAttention(Block):
    def forward(self, x):
        x = x + self.attention(x)
        return x + self.mlp(self.mlp_norm(x))


class BareMLP(Block):
    def forward(self, x):
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(x)


class MLPFirst(Block):
    def forward(self, x):
        x = x + self.mlp(self.mlp_norm(x))
        return x + self.attention(self.attention_norm(x))


class OneNorm(Block):
    def forward(self, x):
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.attention_norm(x))


class SeesAll(Block):
    def forward(self, x):
        return super().forward(x, mask=torch.ones(5, 5, dtype=torch.bool))


class InPlace(Block):
    def forward(self, x):
        x += self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class Detached(Block):
    def forward(self, x):
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x.detach()))


class DroppingTheStream(Block):
    def forward(self, x):
        x = self.dropout(x + self.attention(self.attention_norm(x)))
        return self.dropout(x + self.mlp(self.mlp_norm(x)))


class AlwaysDropping(Block):
    def forward(self, x):
        x = x + F.dropout(self.attention(self.attention_norm(x)), self.dropout.p)
        return x + F.dropout(self.mlp(self.mlp_norm(x)), self.dropout.p)


def additions(x, parts, norm):
    found = []
    for part in parts:
        found.append(part(norm(x)))
        x = x + found[-1]
    return found


def additions_in_place(x, parts, norm):
    found = []
    for part in parts:
        found.append(part(norm(x)))
        x += found[-1]
    return found


def streams(x, parts, norm):
    added = additions(x, parts, norm)
    return [x + sum(added[: number + 1]) for number in range(len(added))]


def post_norm(x, attention, mlp, norm_1, norm_2):
    x = norm_1(x + attention(x))
    return norm_2(x + mlp(x))


def pre_norm(x, attention, mlp, norm_1, norm_2):
    x = x + attention(norm_1(x))
    return x + mlp(norm_2(x))


def gradient(x, u, mean=True, product=True, times=1):
    spread = x.std(-1, correction=0, keepdim=True)
    normal = (x - x.mean(-1, keepdim=True)) / spread
    found = u
    if mean:
        found = found - times * u.mean(-1, keepdim=True)
    if product:
        found = found - times * (u * normal).mean(-1, keepdim=True) * normal
    return found / spread


def by_autograd(x, u):
    x = x.requires_grad_()
    return torch.autograd.grad(F.layer_norm(x, x.shape[-1:], eps=0.0), x, u)[0]


RIGHT = {
    check_layer_norm: [
        layer_norm,
        lambda x, weight, bias: F.layer_norm(x, weight.shape, weight, bias),
    ],
    check_block: [Block, Nano, Root],
    check_additions: [additions, lambda *given: tuple(additions(*given))],
    check_post_norm: [post_norm],
    check_layer_norm_gradient: [
        gradient,
        by_autograd,
        lambda x, u: gradient(x.float(), u.float()),
    ],
}
WRONG = {
    check_layer_norm: [
        (norm_with(lambda x: (x.var(-1, keepdim=True) + 1e-5).sqrt()), "by C - 1"),
        (
            norm_with(lambda x: x.std(-1, correction=0, keepdim=True) + 1e-5),
            "outside the root",
        ),
        (
            norm_with(lambda x: (x.var(-2, False, keepdim=True) + 1e-5).sqrt(), -2),
            "normalized along the words",
        ),
        (norm_with(lambda x: x.std(-1, False, keepdim=True)), "its variance + eps"),
        (lambda x, w, b: layer_norm(x, w, 0 * b), "add the bias"),
        (lambda x, w, b: w * layer_norm(x, 1, b), "then multiply by the weight"),
        (lambda x, w, b: F.layer_norm(x, w.shape, w, b, 1e-6), "variance + eps"),
        (lambda x, w, b: layer_norm(x, w, b)[0], "the shape is (3, 4)"),
        (lambda x, w, b: layer_norm(x, w, b).float(), "float64 became torch.float32"),
        (in_place_norm, "work on a copy"),
        (mean_of_squares, "subtract the mean before you square"),
        (constant_mean, "the gradient of input 1 is wrong"),
    ],
    check_block: [
        (Replacing, "add what they return to it"),
        (PostNorm, "the stream itself is normalized"),
        (NormInStream, "the stream itself is normalized"),
        (Parallel, "doesn't see what attention added"),
        (BareAttention, "add attention of its norm of x"),
        (BareMLP, "the MLP reads the stream itself"),
        (MLPFirst, "the MLP comes before attention"),
        (OneNorm, "the MLP of its own norm"),
        (SeesAll, "the mask lets the future through"),
        (InPlace, "work on a copy"),
        (Detached, "is wrong: was a part detached"),
        (lambda *sizes: nn.Sequential(Block(*sizes), nn.Flatten(0, 1)), "became"),
        (DroppingTheStream, "dropout must act on what each part adds"),
        (lambda width, heads, dropout=0: Block(width, heads), "dropout must act on"),
        (AlwaysDropping, "dropout acts after eval(), too"),
    ],
    check_additions: [
        (lambda x, parts, norm: [part(norm(x)) for part in parts], "read the start"),
        (streams, "streams after each part"),
        (lambda x, parts, norm: additions(x, parts, lambda x: x), "read the norm"),
        (additions_in_place, "work on a copy"),
        (lambda *given: sum(additions(*given)), "the shape is (2,), not (3, 2)"),
        (lambda *given: [2 * part for part in additions(*given)], "part after part"),
    ],
    check_post_norm: [
        (pre_norm, "this is pre-norm"),
        (lambda x, f, g, a, b: b(g(a(f(x)))), "nothing is added"),
        (
            lambda x, f, g, a, b: x + a(f(x)) + b(g(x + a(f(x)))),
            "only what a part returns",
        ),
        (lambda x, f, g, a, b: post_norm(x, f, g, b, a), "take norm_1(x + attention"),
        (lambda x, f, g, a, b: a(x + f(x)), "take norm_1(x + attention"),
    ],
    check_layer_norm_gradient: [
        (lambda x, u: gradient(x, u, False, False), "the mean and the variance"),
        (lambda x, u: gradient(x, u, product=False), "the variance depends on x"),
        (lambda x, u: gradient(x, u, times=5), "not their sums"),
        (lambda x, u: gradient(x, u, mean=False), "differs from autograd"),
        (lambda x, u: -gradient(x, u), "differs from autograd"),
        (lambda x, u: gradient(x, u)[0], "the shape is (5,)"),
    ],
}
