# Written by tools/tangle.py from book/04_positions.ipynb: change it there.


"""Checks of positions that name the mistake they find."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from glassgpt.checks.expect import close, expect_same


def _sines(times: Tensor, width: int) -> Tensor:
    """Sinusoidal vectors of the given positions, in 64 bits."""
    speeds = 10000.0 ** (-torch.arange(0, width, 2).double() / width)
    angles = times[:, None] * speeds
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)


def check_sinusoidal_positions(positions: Callable[[int, int], Tensor]) -> None:
    """Sines in the even columns, cosines in the odd ones, turning ever more slowly.

    positions: called as positions(context, width).

    Book: 04_positions.html#the-check
    """
    for context, width in ((4000, 6), (2, 4)):

        def attempt(times: Tensor, width: int = width) -> Tensor:
            return positions(len(times), width).float()

        def right(times: Tensor, width: int = width) -> Tensor:
            return _sines(times, width).float()

        mistakes = {
            "the angles are degrees, not radians": lambda t: right(t * math.pi / 180),
            "row 0 holds position 1: count from 0": lambda t: right(t + 1),
            "the sines stand side by side: put them in even columns, cosines in odd": (
                lambda t: torch.cat((right(t)[:, 0::2], right(t)[:, 1::2]), dim=1)
            ),
        }
        expect_same(
            attempt,
            right,
            torch.arange(context),
            mistakes=mistakes,
            gradients=False,
            hint="Hand i turns by 10000 ** (-2 * i / width) a position, for its sine"
            " and its cosine",
        )


def check_add_positions(embed: Callable[[Tensor, Tensor, Tensor, int], Tensor]) -> None:
    """Each token's row plus the row of its position, which must exist.

    embed: called as embed(ids, tokens, positions, start); ids (B, T).

    Book: 04_positions.html#exercise-2-what-enters-the-model
    """
    ids = torch.tensor([[2, 0, 2], [1, 1, 0]])
    tokens = 100 * torch.tensor([[1.0, 0], [2, 0], [3, 0]])
    positions = torch.arange(10.0).view(5, 2)
    mistakes = {
        "start is ignored: the first token stands at position start": (
            lambda ids, tokens, positions: tokens[ids] + positions[:3]
        )
    }
    for start in (0, 2):
        expect_same(
            lambda *inputs, start=start: embed(*inputs, start),
            lambda ids, x, p, start=start: x[ids] + p[start : start + 3],
            ids,
            tokens,
            positions,
            mistakes=mistakes,
            hint=f"The first token stands at position {start}",
        )
    try:
        embed(ids, tokens, positions, 4)
    except (ValueError, IndexError, AssertionError):
        return
    raise AssertionError(
        "positions 4 to 6 of 5 rows were accepted: refuse them (a slice alone gives"
        " fewer rows, and no error)"
    )


def check_shift_matrix(shift: Callable[[int, int], Tensor]) -> None:
    """One matrix moves every sinusoidal position by the same distance.

    shift: called as shift(distance, width); returns (width, width).

    Book: 04_positions.html#exercise-3-a-step-is-a-matrix
    """
    t = torch.arange(20, 400, 37).double()
    for distance, width in ((1, 8), (7, 8), (7, 4), (-2, 4)):
        matrix = shift(distance, width).float().double()
        assert matrix.shape == (width, width), (
            f"the matrix has shape {tuple(matrix.shape)}, not ({width}, {width})"
        )
        moved = (_sines(t, width) @ matrix).float()
        backward, once, right = (
            _sines(t + step, width).float() for step in (-distance, 1, distance)
        )
        assert not close(moved, backward), (
            "the step goes the wrong way: mind the sign of the sines"
        )
        assert distance == 1 or not close(moved, once), "distance is ignored"
        assert close(moved, right) or not close(moved[:, :2], right[:, :2]), (
            "hand 0 arrives, the others do not: each turns at its own speed"
        )
        assert close(moved, right), (
            f"position 20 times the matrix is not position {20 + distance}"
        )
