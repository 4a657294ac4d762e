# Written by tools/tangle.py from book/04_positions.ipynb: change it there.
"""Checks of sinusoidal and rotary positions that name the mistake they find."""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def check_sinusoidal_positions(positions: Callable[[int, int], Tensor]) -> None:
    """Sines in the even columns, cosines in the odd ones, turning ever more slowly.

    positions: called as positions(context, width).

    Book: 04_positions.html#the-check
    """
    got = positions(4000, 6).double()
    assert got.shape == (4000, 6), f"positions(4000, 6) has shape {tuple(got.shape)}"
    first = [round(number, 3) for number in got[0].tolist()]
    assert first == [0, 1, 0, 1, 0, 1], (
        f"position 0 is {first}, not 0 1 0 1 0 1: sines in even columns, cosines in odd"
    )
    fast, slow = (math.atan2(got[1, 2 * i], got[1, 2 * i + 1]) for i in (0, 1))
    _check_angle(fast)
    wanted = 10000 ** (-2 / 6)
    assert abs(slow - wanted) < 1e-5, (
        f"hand 1 turns by {slow:.4f} a position, not {wanted:.4f}: "
        "its speed is 10000 ** (-2 * i / width)"
    )
    _check_far(got[-1, :2], 3999)


def _check_angle(angle: float) -> None:
    assert abs(angle - math.pi / 180) > 1e-4, "the angles are degrees, not radians"
    right = abs(angle - 1) < 1e-4
    assert right, f"the first hand turns by {angle:.4f} a position, not by 1"


def _check_far(hand: Tensor, position: int) -> None:
    wanted = torch.tensor([math.sin(position), math.cos(position)], dtype=hand.dtype)
    assert torch.allclose(hand, wanted, atol=1e-3), (
        f"position {position} is imprecise: calculate the angles in 32 bits or more"
    )


def check_rotary_tables(tables: Callable[..., tuple[Tensor, Tensor]]) -> None:
    """Cosines and sines of the position times the speed of each pair.

    tables: called as tables(context, head_width) and tables(context, head_width, base).

    Book: 04_positions.html#the-checks
    """
    cos, sin = (table.double() for table in tables(4000, 6))
    for name, table in (("cos", cos), ("sin", sin)):
        assert table.shape == (4000, 3), (
            f"{name} of 4000 positions and width 6 has shape {tuple(table.shape)}, "
            "not (4000, 3): one angle for each pair of columns"
        )
    still = (cos[0] == 1).all() and (sin[0] == 0).all()
    assert still, "position 0 is turned: positions count from 0"
    _check_angle(math.atan2(sin[1, 0], cos[1, 0]))
    for base in (10000, 100):
        row = [table[1, 1] for table in tables(2, 6, float(base))]  # cos, sin
        speed, wanted = math.atan2(row[1], row[0]), base ** (-2 / 6)
        assert abs(speed - wanted) < 1e-5, (
            f"with base {base} pair 1 turns by {speed:.4f} a position, "
            f"not {wanted:.4f}: its speed is base ** (-2 * i / head_width)"
        )
    _check_far(torch.stack((sin[-1, 0], cos[-1, 0])), 3999)


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
    assert got[1].tolist() == [0, 0, 1, 0], (
        f"a quarter turn of (1, 0, 0, 0) gives {got[1].tolist()}, not (0, 0, 1, 0)"
    )


def check_rotary(apply: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    """Turning keeps lengths, and dot products depend on the distance alone.

    apply: called as apply(x, cos, sin) with x (..., T, D) and cos, sin (T, D / 2).

    Book: 04_positions.html#the-checks
    """
    _check_quarter_turn(apply)
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 3, 1, 8, generator=generator).expand(2, 3, 12, 8)
    angles = torch.arange(12)[:, None] * torch.tensor([1.0, 0.3, 0.1, 0.03])
    turned, keys = (apply(x, angles.cos(), angles.sin()) for x in (q, k))
    grown = (turned.norm(dim=-1) / q.norm(dim=-1)).max().item()
    assert grown < 1.001, f"a vector grew to {grown:.2f} times its length: check signs"
    scores = turned @ keys.mT  # (heads, T, T)
    assert torch.allclose(scores[:, :-3, :-3], scores[:, 3:, 3:], atol=1e-4), (
        "moving query and key by 3 positions changed their dot product"
    )
    half = apply(q.bfloat16(), angles.cos(), angles.sin()).dtype
    assert half == torch.bfloat16, f"x is bfloat16, but the result is {half}"


def check_reorder(reorder: Callable[[Tensor], Tensor]) -> None:
    """Columns paired as neighbors move to where halves are paired.

    reorder: called as reorder(x) with x (..., D).

    Book: 04_positions.html#exercise-3-from-one-convention-to-the-other
    """
    got = reorder(torch.arange(8.0).expand(2, 8))
    assert got.shape == (2, 8), f"the shape changed to {tuple(got.shape)}"
    moved = got[0].int().tolist()
    assert sorted(moved) == list(range(8)), f"columns were lost or repeated: {moved}"
    pairs = [(moved[i], moved[i + 4]) for i in range(4)]
    assert pairs[0] != (0, 4), f"nothing moved together: the pairs are now {pairs}"
    for i, pair in enumerate(pairs):
        assert pair == (2 * i, 2 * i + 1), (
            f"pair {i} is made of columns {pair}, not {(2 * i, 2 * i + 1)}"
        )
