# Written by tools/tangle.py from book/04_positions.ipynb: change it there.
"""Checks of positions that name the mistake they find."""

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
