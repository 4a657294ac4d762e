# Written by tools/tangle.py from book/14_after_gpt2.ipynb: change it there.


"""Checks of rotary positions, norms and Muon that name the mistake they find."""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def _check_angle(angle: float) -> None:
    assert abs(angle - math.pi / 180) > 1e-4, "the angles are degrees, not radians"
    right = abs(angle - 1) < 1e-4
    assert right, f"the first pair turns by {angle:.4f} a position, not by 1"


def _check_far(hand: Tensor, position: int) -> None:
    wanted = torch.tensor([math.sin(position), math.cos(position)], dtype=hand.dtype)
    assert torch.allclose(hand, wanted, atol=1e-3), (
        f"position {position} is imprecise: calculate the angles in 32 bits or more"
    )


def check_rotary_tables(tables: Callable[..., tuple[Tensor, Tensor]]) -> None:
    """Cosines and sines of the position times the speed of each pair.

    tables: called as tables(positions, head_width) and with a third argument, base.

    Book: 14_after_gpt2.html#the-functions
    """
    cos, sin = (table.double() for table in tables(torch.arange(4000), 6))
    for name, table in (("cos", cos), ("sin", sin)):
        assert table.shape == (4000, 3), (
            f"{name} of 4000 positions and width 6 has shape {tuple(table.shape)}, "
            "not (4000, 3): one angle for each pair of columns"
        )
    still = (cos[0] == 1).all() and (sin[0] == 0).all()
    assert still, "position 0 is rotated: positions count from 0"
    _check_angle(math.atan2(sin[1, 0], cos[1, 0]))
    for base in (10000, 100):
        row = [table[1, 1] for table in tables(torch.arange(2), 6, float(base))]
        speed, wanted = math.atan2(row[1], row[0]), base ** (-2 / 6)
        assert abs(speed - wanted) < 1e-5, (
            f"with base {base} pair 1 turns by {speed:.4f} a position, "
            f"not {wanted:.4f}: its speed is base ** (-2 * i / head_width)"
        )
    _check_far(torch.stack((sin[-1, 0], cos[-1, 0])), 3999)
    places = torch.tensor([[5, 6], [0, 9]])
    cos, sin = tables(places, 4)
    given = cos.shape == (2, 2, 2) and torch.allclose(cos[..., 0], places.cos())
    assert given, f"positions {places.tolist()} come out wrong: take them as given"


def _check_quarter_turn(apply: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    """Position 0 stays; position 1 turns its first pair by a quarter."""
    cos = torch.tensor([[1.0, 1.0], [0.0, 1.0]])
    sin = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0], [1.0, 0.0, 0.0, 0.0]])
    got = apply(x, cos, sin)
    assert got.shape == x.shape, f"the shape changed to {tuple(got.shape)}"
    assert torch.equal(got[0], x[0]), f"position 0 changed to {got[0].tolist()}"
    assert got[1].tolist() != [0, 1, 0, 0], (
        "column 0 was paired with column 1: pair column i with column i + D / 2"
    )
    assert got[1].tolist() != [0, 0, -1, 0], (
        "a quarter turn went backwards: swap the signs of the two sines"
    )
    assert torch.allclose(got[1], torch.tensor([0.0, 0, 1, 0]), atol=1e-6), (
        f"a quarter turn of (1, 0, 0, 0) gives {got[1].tolist()}, not (0, 0, 1, 0)"
    )


def check_rotary(apply: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    """Rotation keeps lengths, and dot products depend on the distance alone.

    apply: called as apply(x, cos, sin) with x (..., T, D) and cos, sin (T, D / 2).

    Book: 14_after_gpt2.html#the-functions
    """
    _check_quarter_turn(apply)
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 3, 1, 8, generator=generator).expand(2, 3, 12, 8)
    angles = torch.arange(12)[:, None] * torch.tensor([1.0, 0.3, 0.1, 0.03])
    q.requires_grad_()
    turned, keys = (apply(x, angles.cos(), angles.sin()) for x in (q, k))
    assert turned.requires_grad, "no gradient reaches x: queries would never learn"
    grown = (turned.norm(dim=-1) / q.norm(dim=-1)).max().item()
    assert grown < 1.001, f"a vector grew to {grown:.2f} times its length: check signs"
    scores = turned @ keys.mT  # (heads, T, T)
    assert torch.allclose(scores[:, :-3, :-3], scores[:, 3:, 3:], atol=1e-4), (
        "moving query and key by 3 positions changed their dot product"
    )
    half = apply(q.bfloat16(), angles.cos(), angles.sin()).dtype
    assert half == torch.bfloat16, f"x is bfloat16, but the result is {half}"


def _smallest(
    orthogonalize: Callable, left: Tensor, right: Tensor, rounds: int
) -> float:
    """What becomes of a singular value that is a hundredth of the largest."""
    values = torch.tensor([1.0] + [0.01] * (left.shape[1] - 1))
    values /= values.norm()
    found = orthogonalize((left @ values.diag() @ right.T)[None], rounds, torch.float32)
    return float((left.T @ found[0] @ right).diagonal()[-1])


def check_orthogonalize(
    orthogonalize: Callable[[Tensor, int, torch.dtype], Tensor],
) -> None:
    """An iteration brings each matrix's singular values near 1; directions stay.

    Book: 14_after_gpt2.html#singular-values-without-computing-them
    """
    torch.manual_seed(0)
    sides = []
    for rows, columns in ((4, 8), (8, 4), (6, 6)):
        count = min(rows, columns)
        left = torch.linalg.qr(torch.randn(rows, count))[0]
        right = torch.linalg.qr(torch.randn(columns, count))[0]
        sides.append((left, right))
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
    zeros = orthogonalize(torch.zeros(1, 3, 3), 5, torch.float32)
    assert not zeros.any(), "a gradient of zero should move nothing"
    for pair in sides:
        one, two, five = (_smallest(orthogonalize, *pair, n) for n in (1, 2, 5))
        assert 0.015 < one < 0.08 < two < 0.2 < 0.5 < five, (
            f"one round makes {one:.2g} of a value of 0.01, two make {two:.2g}, five "
            f"{five:.2g}: it should grow in each, to near 0.1 after two and near 1 "
            "after five, not after one"
        )
    narrow = orthogonalize(torch.ones(1, 3, 3), 5, torch.bfloat16).dtype
    assert narrow == torch.bfloat16, f"asked for bfloat16, it returned {narrow}"


def check_reorder(reorder: Callable[[Tensor], Tensor]) -> None:
    """Columns paired as neighbors move to where halves are paired.

    reorder: called as reorder(x) with x (..., D).

    Book: 14_after_gpt2.html#exercise-1-from-one-convention-to-the-other
    """
    for shape in ((2, 8), (2, 3, 5, 12)):
        width = shape[-1]
        x = torch.arange(math.prod(shape)).double().view(shape).requires_grad_()
        got = reorder(x.clone())
        assert got.shape == shape, f"the shape {shape} changed to {tuple(got.shape)}"
        assert got.dtype == x.dtype, f"the numbers became {got.dtype}"
        assert got.requires_grad, "no gradient reaches x"
        moved = got.flatten(0, -2)[0].int().tolist()
        lost = f"columns were lost or repeated: {moved}"
        assert sorted(moved) == list(range(width)), lost
        pairs = list(zip(moved[: width // 2], moved[width // 2 :], strict=True))
        assert pairs[0] != (0, width // 2), (
            f"nothing moved together: the pairs are now {pairs}"
        )
        for i, pair in enumerate(pairs):
            wanted = (2 * i, 2 * i + 1)
            assert pair == wanted, f"pair {i} is made of columns {pair}, not {wanted}"
        same = torch.equal(got, x[..., moved])
        assert same, "the first row is right, another row is not"


def check_pool(pool: Callable[[Tensor, int, int], Tensor]) -> None:
    """Keys and values of the heads that will share one become their mean.

    pool: called as pool(weight, heads, groups) with the weight (3 C, C) of `qkv`.

    Book: 14_after_gpt2.html#exercise-2-fewer-keys-for-a-finished-model
    """
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(72, 24, generator=generator)  # 6 heads of width 4
    given = weight.clone()
    found = pool(given, 6, 2)
    assert torch.equal(given, weight), "the finished model's own weight was changed"
    assert found.shape == (40, 24), (
        f"the shape is {tuple(found.shape)}: 24 rows of queries, 8 of keys, 8 of values"
    )
    assert torch.equal(found[:24], weight[:24]), "the rows of the queries changed"
    for name, rows, old in (
        ("keys", found[24:32], weight[24:48]),
        ("values", found[32:], weight[48:]),
    ):
        heads = old.view(6, 4, 24)
        mistakes = {
            "their sum, not their mean": 3 * heads.view(2, 3, 4, 24).transpose(0, 1),
            "the mean of every second head: neighbors share": heads.view(3, 2, 4, 24),
            "the first head of each group, not their mean": heads[None, [0, 3]],
            "the last head of each group, not their mean": heads[None, [2, 5]],
        }
        for mistake, parts in mistakes.items():
            wrong = parts.mean(dim=0).flatten(0, 1)
            assert not torch.allclose(rows, wrong), f"{name}: {mistake}"
        wanted = heads.view(2, 3, 4, 24).mean(dim=1).flatten(0, 1)
        right = torch.allclose(rows, wanted, atol=1e-5)
        assert right, f"{name}: each group needs the mean of its heads, row by row"
    for heads, groups, width in ((6, 3, 24), (2, 1, 48)):
        weight = torch.randn(3 * width, width, generator=generator)
        sizes = (groups, heads // groups, width // heads, width)
        parts = [part.view(sizes).mean(dim=1) for part in weight[width:].chunk(2)]
        wanted = torch.cat((weight[:width], *(part.flatten(0, 1) for part in parts)))
        found = pool(weight.clone(), heads, groups)
        right = found.shape == wanted.shape and torch.allclose(found, wanted, atol=1e-5)
        assert right, (
            f"{heads} heads to {groups}, width {width}, come out wrong: use the sizes "
            "given"
        )
