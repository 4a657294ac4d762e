# Written by tools/tangle.py from book/14_after_gpt2.ipynb: change it there.


"""Checks of rotary positions, norms and Muon that name the mistake they find."""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def check_rotary_tables(tables: Callable[..., tuple[Tensor, Tensor]]) -> None:
    """Cosines and sines of the position times the speed of each pair.

    tables: called as tables(positions, head_width) and with a third argument, base.

    Book: 14_after_gpt2.html#the-functions
    """
    positions = torch.tensor([[0, 1], [7, 3999]])
    for base in (10000.0, 100.0):
        cos, sin = (table.double() for table in tables(positions, 6, base))
        assert cos.shape == (2, 2, 3), (
            f"positions (2, 2) and width 6 give shape {tuple(cos.shape)}, not "
            "(2, 2, 3): one angle for each pair of columns"
        )
        first = math.atan2(sin[0, 1, 0], cos[0, 1, 0])
        assert abs(first - math.pi / 180) > 1e-4, "the angles are degrees, not radians"
        speeds = torch.tensor([base ** (-2 * i / 6) for i in range(3)]).double()
        angles = positions[..., None] * speeds
        for found, wanted in ((cos, angles.cos()), (sin, angles.sin())):
            right = torch.allclose(found[0], wanted[0], atol=1e-4)
            assert right, (
                f"with base {base:.0f} positions 0 and 1 come out wrong: pair i turns "
                "by base ** (-2 * i / head_width) a position"
            )
            assert torch.allclose(found[1], wanted[1], atol=1e-3), (
                "positions 7 and 3999 are imprecise: take them as given, and calculate "
                "the angles in 32 bits or more"
            )


def check_rotary(apply: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    """Rotation keeps lengths, and dot products depend on the distance alone.

    apply: called as apply(x, cos, sin) with x (..., T, D) and cos, sin (T, D / 2).

    Book: 14_after_gpt2.html#the-functions
    """
    x = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    quarter = torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]])
    got = apply(x, *quarter)[0].tolist()
    assert got != [0, 1, 0, 0], (
        "column 0 was paired with column 1: pair column i with column i + D / 2"
    )
    assert got != [0, 0, -1, 0], (
        "a quarter turn went backwards: swap the signs of the two sines"
    )
    assert got == [0, 0, 1, 0], f"a quarter turn of (1, 0, 0, 0) gives {got}"
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 3, 1, 8, generator=generator).expand(2, 3, 12, 8)
    angles = torch.arange(12)[:, None] * torch.tensor([1.0, 0.3, 0.1, 0.03])
    queries, keys = (apply(x, angles.cos(), angles.sin()) for x in (q, k))
    grown = (queries.norm(dim=-1) / q.norm(dim=-1)).max().item()
    assert grown < 1.001, f"a vector grew to {grown:.2f} times its length: check signs"
    scores = queries @ keys.mT  # (heads, T, T)
    assert torch.allclose(scores[:, :-3, :-3], scores[:, 3:, 3:], atol=1e-4), (
        "moving query and key by 3 positions changed their dot product"
    )


def check_orthogonalize(
    orthogonalize: Callable[[Tensor, int, torch.dtype], Tensor],
) -> None:
    """An iteration brings each matrix's singular values near 1; directions stay.

    Book: 14_after_gpt2.html#singular-values-without-computing-them
    """
    torch.manual_seed(0)
    for rows, columns in ((4, 8), (8, 4), (6, 6)):
        count = min(rows, columns)
        left = torch.linalg.qr(torch.randn(rows, count))[0]
        right = torch.linalg.qr(torch.randn(columns, count))[0]
        x = left @ torch.linspace(0.2, 1, count).diag() @ right.T
        pair = orthogonalize(torch.stack([1000 * x, 0.001 * x]), 5, torch.float32)
        assert pair.shape == (2, rows, columns), f"the shape became {pair.shape}"
        for name, found in zip(("large", "small"), pair, strict=True):
            inner = left.T @ found @ right
            values, rest = inner.diagonal(), inner - inner.diagonal().diag()
            turned = rest.abs().max() > 0.005 * values.abs().max()
            assert not turned, "the directions of a matrix changed"
            assert ((values > 0.5) & (values < 1.4)).all(), (
                f"the singular values of a {name} matrix are now {values.min():.2g} to "
                f"{values.max():.2g}: was each matrix divided by its own norm?"
            )
        small = torch.tensor([1.0] + [0.01] * (count - 1))
        x = left @ small.diag() @ right.T
        once, often = (orthogonalize(x[None], n, torch.float32)[0] for n in (1, 5))
        one, five = (float((left.T @ y @ right)[-1, -1]) for y in (once, often))
        assert one < 0.08 < 0.5 < five, (
            f"one round makes {one:.2g} of a value of 0.01, five make {five:.2g}: it "
            "should grow in each, to near 1 after five and not after one"
        )


def check_reorder(reorder: Callable[[Tensor], Tensor]) -> None:
    """Columns paired as neighbors move to where halves are paired.

    reorder: called as reorder(x) with x (..., D).

    Book: 14_after_gpt2.html#exercise-1-from-one-convention-to-the-other
    """
    for shape in ((2, 8), (2, 3, 5, 12)):
        width = shape[-1]
        x = torch.arange(width).double().expand(shape).clone()
        got = reorder(x.clone())
        assert got.shape == shape, f"the shape {shape} changed to {tuple(got.shape)}"
        moved = got.flatten(0, -2)[0].int().tolist()
        lost = f"columns were lost or repeated: {moved}"
        assert sorted(moved) == list(range(width)), lost
        for i in range(width // 2):
            pair, wanted = (moved[i], moved[width // 2 + i]), (2 * i, 2 * i + 1)
            assert pair == wanted, f"pair {i} is made of columns {pair}, not {wanted}"
        same = torch.equal(got, x[..., moved])
        assert same, "the first row is right, another row is not"


def check_pool(pool: Callable[[Tensor, int, int], Tensor]) -> None:
    """Keys and values of the heads that will share one become their mean.

    pool: called as pool(weight, heads, groups) with the weight (3 C, C) of `qkv`.

    Book: 14_after_gpt2.html#exercise-2-fewer-keys-for-a-finished-model
    """
    generator = torch.Generator().manual_seed(0)
    for heads, groups, width in ((6, 2, 24), (6, 3, 24), (2, 1, 48)):
        weight = torch.randn(3 * width, width, generator=generator)
        found = pool(weight.clone(), heads, groups)
        rows = groups * width // heads
        assert found.shape == (width + 2 * rows, width), (
            f"{heads} heads to {groups}: the shape is {tuple(found.shape)}, not "
            f"{width} rows of queries, {rows} of keys, {rows} of values"
        )
        queries = torch.equal(found[:width], weight[:width])
        assert queries, "the rows of the queries changed"
        old = weight[width:].view(2, groups, heads // groups, width // heads, width)
        got = found[width:].view(2, groups, width // heads, width)
        total = torch.allclose(got, old.sum(dim=2), atol=1e-5)
        assert not total, "keys and values are the sum of their heads, not their mean"
        assert torch.allclose(got, old.mean(dim=2), atol=1e-5), (
            f"{heads} heads to {groups}: each group of neighbors needs the mean of its "
            "heads, row by row, for keys and for values"
        )
