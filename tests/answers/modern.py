"""Answers to the checks of chapter 14."""

import math

import torch

from glassgpt.checks import modern as checks
from glassgpt.modern import apply_rotary, orthogonalize, rotary_tables

ONE = torch.ones((), dtype=torch.float64)


def tables_in(unit, first=0):
    def tables(positions, head_width, base=10000.0):
        speeds = base ** -(torch.arange(0, head_width, 2) / head_width)
        angles = (positions + first)[..., None] * speeds * unit
        return angles.cos(), angles.sin()

    return tables


def in_bfloat16(positions, head_width, base=10000.0):
    return rotary_tables(positions.bfloat16(), head_width, base)


def slow(positions, head_width, base=10000.0):
    return rotary_tables(positions, head_width, base**0.5)


def as_complex(x, cos, sin):
    pairs = torch.complex(*x.chunk(2, dim=-1)) * torch.complex(cos, sin)
    return torch.cat((pairs.real, pairs.imag), dim=-1)


def rotate_half(x, cos, sin):
    """As in `transformers`."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return x * torch.cat((cos, cos), dim=-1) + turned * torch.cat((sin, sin), dim=-1)


def neighbors(x, cos, sin):
    pairs = torch.complex(x[..., 0::2], x[..., 1::2]) * torch.complex(cos, sin)
    return torch.view_as_real(pairs).flatten(-2)


def one_sign(x, cos, sin):
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos + second * sin, second * cos + first * sin), dim=-1)


def rounds_are(change):
    def wrong(matrices, rounds, dtype):
        return orthogonalize(matrices, change(rounds), dtype)

    return wrong


def pool(choose, dealt=False):
    def pooled(weight, heads, groups):
        queries, *shared = weight.chunk(3)
        width, each = weight.shape[1], heads // groups
        sizes = (each, groups, -1, width) if dealt else (groups, each, -1, width)
        parts = [part.view(sizes) for part in shared]
        parts = [part.transpose(0, 1) if dealt else part for part in parts]
        return torch.cat((queries, *(choose(p).flatten(0, 1) for p in parts)))

    return pooled


def mean_of_heads(x):
    return x.mean(dim=1)


RIGHT = {
    checks.check_rotary_tables: [rotary_tables, tables_in(1.0), tables_in(ONE)],
    checks.check_rotary: [apply_rotary, as_complex, rotate_half],
    checks.check_orthogonalize: [orthogonalize],
    checks.check_reorder: [
        lambda x: torch.cat((x[..., 0::2], x[..., 1::2]), dim=-1),
        lambda x: x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2),
    ],
    checks.check_pool: [pool(mean_of_heads)],
}

WRONG = {
    checks.check_rotary_tables: [
        (tables_in(math.pi / 180), "degrees"),
        (tables_in(1.0, first=1), "is wanted"),
        (slow, "base ** (-2 * i / head_width)"),
        (in_bfloat16, "in 32 bits or more"),
        (lambda p, width, base: rotary_tables(p, width), "With base 100"),
        (lambda p, width, base: rotary_tables(p, 2 * width, base), "the shape is"),
    ],
    checks.check_rotary: [
        (neighbors, "pair column i with column i + D / 2"),
        (one_sign, "have one sign"),
        (lambda x, cos, sin: apply_rotary(x, cos, -sin), "backwards"),
        (lambda x, cos, sin: apply_rotary(x, cos**3, sin), "is wanted"),
        (lambda x, cos, sin: x, "is wanted"),
    ],
    checks.check_orthogonalize: [
        (rounds_are(lambda n: 2), "near 1 after five"),
        (rounds_are(lambda n: 5), "not after one"),
        (lambda x, n, dtype: x, "its own norm"),
        (
            lambda x, n, dtype: orthogonalize(x, n, dtype).sign() / 3,
            "directions of a matrix changed",
        ),
    ],
    checks.check_reorder: [
        (lambda x: x, "columns 2 i and 2 i + 1"),
        (lambda x: torch.stack(x.chunk(2, -1), -1).flatten(-2), "is wanted"),
        (lambda x: x[..., [0, 2, 4, 6, 1, 3, 5, 7]], "the shape is (2, 3, 5, 8)"),
    ],
    checks.check_pool: [
        (lambda weight, heads, groups: weight, "the shape is (72, 24)"),
        (pool(lambda x: x[:, 0]), "the mean of each group"),
        (pool(lambda x: x.sum(dim=1)), "the sum of their heads"),
        (pool(mean_of_heads, dealt=True), "group of neighbors"),
    ],
}
