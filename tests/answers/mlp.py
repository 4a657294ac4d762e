"""Answers to the checks of chapter 8."""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from glassgpt.checks import mlp as checks
from glassgpt.heads import MultiHeadAttention
from glassgpt.mlp import MLP, gelu


def inner(x):
    return math.sqrt(2 / math.pi) * (x + 0.044715 * x.pow(3))


def by_sigmoid(x):
    return x * torch.sigmoid(2 * inner(x))


def by_exponentials(x):
    """The hyperbolic tangent as the page defines it: inf / inf for large numbers."""
    up, down = torch.exp(inner(x)), torch.exp(-inner(x))
    return 0.5 * x * (1 + (up - down) / (up + down))


def in_place(x):
    x *= 0.5 * (1 + torch.tanh(inner(x)))
    return x


def half_gated(x):
    return x * (0.5 * (1 + torch.tanh(inner(x)))).detach()


def through(activation, after=lambda y: y, before=lambda x: x):
    """The MLP with another activation, or more around it."""

    class Made(MLP):
        def forward(self, x):
            return after(self.projection(activation(self.expand(before(x)))))

    return Made


class Wasteful(MLP):
    def __init__(self, width):
        super().__init__(width)
        self.unused = nn.Linear(width, width)


class Narrow(MLP):
    def __init__(self, width):
        super().__init__(width)
        self.expand = nn.Linear(width, 2 * width)
        self.projection = nn.Linear(2 * width, width)


class Alike(MLP):
    def __init__(self, width):
        super().__init__(width)
        for parameter in self.parameters():
            nn.init.constant_(parameter, 0.1)


class Frozen(MLP):
    def __init__(self, width):
        super().__init__(width)
        self.expand.bias.requires_grad_(False)


class OtherInUse(MLP):
    def forward(self, x):
        return super().forward(x) * (1 if self.training else 0.9)


def row_by_row(x):
    return torch.stack([x[:, t] ** 2 + x[:, t] for t in range(x.shape[1])], 1)


def facts(expand, bias, project):
    return lambda: tuple(map(torch.tensor, (expand, bias, project)))


def shared(x, w, b, first=1.0, second=1.0, use=1.0, closed=0.0, sign=1.0):
    """The gradients of exercise 2; a factor of 0 forgets a path."""
    h = max(w * x + b, 0.0)
    p = 1 / (1 + math.exp(h - w * h))
    d_h = first * (p - 1) * w + second * (1 - p)
    d_u = sign * (d_h if h > 0 else closed * d_h)
    return d_u * w, sign * use * (p - 1) * h + d_u * x, d_u


def one_use(x, w, b):
    d_x, d_w, d_b = shared(x, w, b)
    return d_x, d_w - d_b * x, d_b


RIGHT = {
    checks.check_gelu: [gelu, by_sigmoid, nn.GELU("tanh")],
    checks.check_each_alone: [MLP(4), row_by_row],
    checks.check_mlp: [MLP, through(by_sigmoid)],
    checks.check_one_not_both: [
        facts([[1.0, 1.0]] * 2, [0.0, -1.0], [1.0, -2.0]),
        facts([[1, -1], [-1, 1]], [0, 0], [1, 1]),
    ],
    checks.check_shared_weight: [shared],
}

WRONG = {
    checks.check_gelu: [
        (F.gelu, "exact form"),
        (F.relu, "ReLU: it has a corner"),
        (lambda x: 2 * gelu(x), "multiply by one half"),
        (F.silu, "Look at sqrt(2 / pi)"),
        (lambda x: x, "Look at sqrt(2 / pi)"),
        (in_place, "changed in place"),
        (lambda x: gelu(x)[:3], "the shape is (3,)"),
        (lambda x: gelu(x.float()), "became torch.float32"),
        (lambda x: gelu(x - x.mean()), "treat each number by itself"),
        (by_exponentials, "Does e^u overflow?"),
        (lambda x: gelu(x).detach(), "no gradient flows back"),
        (half_gated, "the gradient of the input is wrong"),
    ],
    checks.check_each_alone: [
        (lambda x: x.cumsum(1), "position 0 changed row 1: positions are mixed"),
        (MultiHeadAttention(4, 2), "positions are mixed"),
        (torch.ones_like, "row 0 does not depend on its own word"),
        (lambda x: x + x.mean(0), "texts are mixed"),
    ],
    checks.check_mlp: [
        (through(lambda x: x), "there is no activation"),
        (through(F.gelu), "the exact GELU"),
        (through(gelu, after=gelu), "after the projection"),
        (through(F.relu), "expand, GELU, projection"),
        (through(gelu, before=lambda x: x - x.mean(1, True)), "position alone"),
        (through(half_gated), "the gradient of expand.weight is wrong"),
        (through(gelu, after=torch.detach), "no gradient flows back"),
        (through(gelu, before=torch.detach), "no gradient reaches the input"),
        (through(gelu, after=lambda y: y[0]), "the shape is"),
        (Narrow, "the hidden width for C = 4 is 8"),
        (Wasteful, "unused.weight is not used"),
        (Alike, "all neurons start alike"),
        (Frozen, "no gradient reaches expand.bias"),
        (OtherInUse, "after eval()"),
    ],
    checks.check_one_not_both: [
        (facts([[1.0], [1.0]], [0.0], [1.0]), "both facts hold"),
        (facts([[1.0], [1.0]], [1.0], [1.0]), "neither fact holds"),
        (facts([[0.0], [1.0]], [0.0], [1.0]), "only the first"),
        (facts([[1.0], [0.0]], [0.0], [1.0]), "only the second"),
        (facts([1.0, 1.0], [0.0], [1.0]), "shape of the first matrix"),
        (facts([[1.0], [1.0]], [0.0, 0.0], [1.0]), "shape of the bias"),
        (facts([[1.0], [1.0]], [0.0], [[1.0]]), "shape of the last weights"),
    ],
    checks.check_shared_weight: [
        (one_use, "only its use in the score w h"),
        (partial(shared, use=0), "only its use in w x + b"),
        (partial(shared, second=0), "and the second is missing"),
        (partial(shared, first=0), "and the first is missing"),
        (partial(shared, closed=1), "ReLU is flat there"),
        (partial(shared, sign=-1), "the gradient of b is"),
        (lambda *at: shared(*at)[:2], "2 gradients, not 3"),
        (lambda *at: shared(*at)[::-1], "the gradient of"),
    ],
}
