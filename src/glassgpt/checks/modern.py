# Written by tools/tangle.py from book/14_after_gpt2.ipynb: change it there.


"""Checks of rotary positions, norms and Muon that name the mistake they find."""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from glassgpt.checks.expect import expect_same


def _random(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def check_rotary_tables(tables: Callable[..., tuple[Tensor, Tensor]]) -> None:
    """Cosines and sines of the position times the speed of each pair.

    tables: called as tables(positions, head_width) and with a third argument, base.

    Book: 14_after_gpt2.html#the-functions
    """

    def reference(positions: Tensor, base: float, unit: float = 1.0) -> Tensor:
        speeds = unit * base ** (-torch.arange(0, 6, 2).double() / 6)
        angles = positions[..., None] * speeds
        return torch.stack((angles.cos(), angles.sin())).float()

    for base in (10_000.0, 100.0):
        degrees = partial(reference, base=base, unit=math.pi / 180)
        expect_same(
            lambda positions, base=base: torch.stack(
                tables(positions, 6, base)
            ).float(),
            partial(reference, base=base),
            torch.tensor([[0, 1], [7, 3999]]),
            mistakes={"the angles are degrees, not radians": degrees},
            hint=f"With base {base:.0f} pair i turns by base ** (-2 * i / head_width) a"
            " position; calculate the angles in 32 bits or more",
        )


def check_rotary(apply: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    """Each pair of columns, i and i + D / 2, is rotated by the angle of its position.

    apply: called as apply(x, cos, sin) with x (..., T, D) and cos, sin (T, D / 2).

    Book: 14_after_gpt2.html#the-functions
    """

    def turned(pairs: Tensor, cos: Tensor, sin: Tensor, sign: int = -1) -> Tensor:
        first, second = pairs.unbind(-1)
        rotated = (first * cos + sign * second * sin, second * cos + first * sin)
        return torch.stack(rotated, dim=-1)

    def reference(x: Tensor, cos: Tensor, sin: Tensor, sign: int = -1) -> Tensor:
        pairs = x.unflatten(-1, (2, -1)).mT
        return turned(pairs, cos, sin, sign).mT.flatten(-2)

    def neighbors(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return turned(x.unflatten(-1, (-1, 2)), cos, sin).flatten(-2)

    mistakes = {
        "column 0 was paired with column 1: pair column i with column i + D / 2": (
            neighbors
        ),
        "both sines have one sign: vectors change their length": (
            partial(reference, sign=1)
        ),
        "it turns backwards: swap the signs of the two sines": (
            lambda x, cos, sin: reference(x, cos, -sin)
        ),
    }
    angles = torch.arange(5)[:, None] * torch.tensor([1.0, 0.3, 0.1]).double()
    given = (_random(2, 3, 5, 6), angles.cos(), angles.sin())
    expect_same(apply, reference, *given, mistakes=mistakes)


def check_orthogonalize(
    orthogonalize: Callable[[Tensor, int, torch.dtype], Tensor],
) -> None:
    """An iteration brings each matrix's singular values near 1; directions stay.

    Book: 14_after_gpt2.html#singular-values-without-computing-them
    """
    for shape in ((4, 8), (8, 4)):
        left, _, right = torch.linalg.svd(_random(*shape).float(), full_matrices=False)

        x = left @ torch.linspace(0.2, 1, 4).diag() @ right
        pair = orthogonalize(torch.stack([1000 * x, 0.001 * x]), 5, torch.float32)
        assert pair.shape == (2, *shape), f"the shape became {tuple(pair.shape)}"
        inner = left.T @ pair @ right.T
        values = inner.diagonal(dim1=1, dim2=2)
        turned = (inner - values.diag_embed()).abs().max() > 0.005 * values.abs().max()
        assert not turned, "the directions of a matrix changed"
        assert ((values > 0.5) & (values < 1.4)).all(), (
            f"the singular values are now {values.min():.2g} to {values.max():.2g}:"
            " was each matrix divided by its own norm?"
        )
        x = left @ torch.tensor([1.0, 0.01, 0.01, 0.01]).diag() @ right
        one, five = (
            (left.T @ orthogonalize(x[None], rounds, torch.float32)[0] @ right.T)[3, 3]
            for rounds in (1, 5)
        )
        assert one < 0.08 < 0.5 < five, (
            f"one round makes {one:.2g} of a value of 0.01, five make {five:.2g}: it "
            "should grow in each, to near 1 after five and not after one"
        )


def check_reorder(reorder: Callable[[Tensor], Tensor]) -> None:
    """Columns paired as neighbors move to where halves are paired.

    reorder: called as reorder(x) with x (..., D).

    Book: 14_after_gpt2.html#exercise-1-from-one-convention-to-the-other
    """

    def reference(x: Tensor) -> Tensor:
        return torch.cat((x[..., 0::2], x[..., 1::2]), dim=-1)

    hint = "columns 2 i and 2 i + 1 move to i and D / 2 + i, in every row"
    for x in (_random(2, 8), _random(2, 3, 5, 12)):
        expect_same(reorder, reference, x, gradients=False, hint=hint)


def check_pool(pool: Callable[[Tensor, int, int], Tensor]) -> None:
    """Keys and values of the heads that will share one become their mean.

    pool: called as pool(weight, heads, groups) with the weight (3 C, C) of `qkv`.

    Book: 14_after_gpt2.html#exercise-2-fewer-keys-for-a-finished-model
    """

    def pooled(weight: Tensor, heads: int, groups: int, factor: int = 1) -> Tensor:
        queries, shared = weight.tensor_split([len(weight) // 3])
        shared = shared.reshape(2 * groups, heads // groups, -1, weight.shape[1])
        return torch.cat((queries, factor * shared.mean(dim=1).flatten(0, 1)))

    for heads, groups, width in ((6, 2, 24), (6, 3, 24), (2, 1, 48)):
        summed = partial(pooled, heads=heads, groups=groups, factor=heads // groups)
        expect_same(
            lambda weight, heads=heads, groups=groups: pool(weight, heads, groups),
            partial(pooled, heads=heads, groups=groups),
            _random(3 * width, width),
            mistakes={
                "keys and values are the sum of their heads, not the mean": summed
            },
            gradients=False,
            hint=f"{heads} heads to {groups}: {width} rows of queries as they are, then"
            " the mean of each group of neighbors, row by row, for keys and values",
        )
