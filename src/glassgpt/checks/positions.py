# Written by tools/tangle.py from book/04_positions.ipynb: change it there.
"""Checks of positions that name the mistake they find."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from glassgpt.checks.embeddings import expect_tensor


def check_sinusoidal_positions(positions: Callable[[int, int], Tensor]) -> None:
    """Sines in the even columns, cosines in the odd ones, turning ever more slowly.

    positions: called as positions(context, width).

    Book: 04_positions.html#the-check
    """
    got = positions(4000, 6)
    expect_tensor(got)
    got = got.double()
    assert got.shape == (4000, 6), f"positions(4000, 6) has shape {tuple(got.shape)}"
    assert abs(got[0, 0] - math.sin(1)) > 1e-3, "row 0 holds position 1: count from 0"
    first = [round(number, 3) for number in got[0].tolist()]
    assert first == [0, 1, 0, 1, 0, 1], (
        f"position 0 is {first}, not 0 1 0 1 0 1: sines in even columns, cosines in odd"
    )
    speeds = 10000.0 ** (-torch.arange(0, 6, 2, dtype=torch.float64) / 6)
    for i, speed in enumerate(speeds.tolist()):
        hand = got[1, 2 * i : 2 * i + 2]
        assert abs(hand.norm() - 1) < 0.05, "sine and cosine of a hand need one angle"
        turn = math.atan2(*hand)
        assert abs(turn - math.pi / 180) > 1e-4, "the angles are degrees, not radians"
        assert abs(turn - speed) < 1e-3, (
            f"hand {i} turns by {turn:.4f} a position, not {speed:.4f}: "
            "its speed is 10000 ** (-2 * i / width)"
        )
    angles = torch.arange(4000)[:, None] * speeds
    wanted = torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)
    off = ~torch.isclose(got, wanted, atol=1e-3).all(-1)
    assert not off.any(), (
        f"position {off.nonzero()[-1].item()} is wrong, or imprecise: calculate the"
        " angles in 32 bits or more"
    )
    small = positions(2, 4)
    assert small.shape == (2, 4), f"positions(2, 4) has shape {tuple(small.shape)}"
    assert abs(small[1, 2] - math.sin(0.01)) < 1e-3, (
        "at width 4 hand 1 must turn by 0.01: its speed depends on the width"
    )


def check_add_positions(embed: Callable[[Tensor, Tensor, Tensor, int], Tensor]) -> None:
    """Each token's row plus the row of its position, which must exist.

    embed: called as embed(ids, tokens, positions, start); ids (B, T).

    Book: 04_positions.html#exercise-2-what-enters-the-model
    """
    tokens = 100 * torch.tensor([[1.0, 0], [2, 0], [3, 0]], requires_grad=True)
    positions = 1 * torch.arange(10.0, requires_grad=True).view(5, 2)
    every = torch.tensor([[2, 0, 2], [1, 1, 0]])
    for start, B, T in ((0, 2, 3), (2, 2, 3), (3, 1, 2), (2, 2, 1)):
        ids, end = every[:B, :T], start + T
        given = tokens.clone(), positions.clone()
        wanted = tokens[ids] + positions[start:end]
        try:
            got = embed(ids, tokens, positions, start)
        except (ValueError, IndexError, AssertionError) as error:
            raise AssertionError(
                f"the table has positions {start} to {end - 1}, but they are refused "
                f"({type(error).__name__}: {error})"
            ) from None
        expect_tensor(got)
        assert all(map(torch.equal, (tokens, positions), given)), (
            "a table that was given has changed: add to a copy of its rows"
        )
        assert got.shape == (B, T, 2), f"ids ({B}, {T}) give {tuple(got.shape)}"
        reached = got.requires_grad and all(
            part is not None and part.any()
            for part in torch.autograd.grad(
                got.sum(), (tokens, positions), allow_unused=True
            )
        )
        assert reached, "no gradient reaches one of the tables: don't detach them"
        assert start == 0 or not torch.equal(got, tokens[ids] + positions[:T]), (
            "start is ignored: the first token stands at position start"
        )
        assert torch.allclose(got, wanted), (
            f"from position {start} the first text gives {got[0].tolist()}, "
            f"not {wanted[0].tolist()}"
        )
    for start, rows in ((4, 5), (3, 5), (2, 4)):
        try:
            embed(every, tokens, positions[:rows], start)
        except (ValueError, IndexError):
            continue
        except (RuntimeError, AssertionError) as error:
            raise AssertionError(
                f"positions {start} to {start + 2} of {rows} rows: say what is wrong "
                f"in a ValueError or IndexError, not in {type(error).__name__}: {error}"
            ) from None
        raise AssertionError(
            f"positions {start} to {start + 2} of {rows} rows were accepted: "
            "refuse them (a slice alone gives fewer rows, and no error)"
        )


def check_shift_matrix(shift: Callable[[int, int], Tensor]) -> None:
    """One matrix moves every sinusoidal position by the same distance.

    shift: called as shift(distance, width); returns (width, width).

    Book: 04_positions.html#exercise-3-a-step-is-a-matrix
    """

    def row(t: int) -> Tensor:
        angles = t * 10000.0 ** (-torch.arange(0, width, 2).double() / width)
        return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten()

    for distance, width in ((1, 8), (7, 8), (7, 4), (-2, 4)):
        matrix = shift(distance, width)
        expect_tensor(matrix)
        matrix = matrix.double()
        shape, wanted = tuple(matrix.shape), (width, width)
        assert shape == wanted, f"the matrix has shape {shape}, not {wanted}"
        for t in range(20, 400, 37):
            got = row(t) @ matrix
            back = torch.allclose(got, row(t - distance), atol=1e-4)
            assert not back, "the step goes the wrong way: mind the sign of the sines"
            assert distance == 1 or not torch.allclose(got, row(t + 1), atol=1e-4), (
                "distance is ignored"
            )
            right = torch.isclose(got, row(t + distance), atol=1e-4)
            assert right.all() or not right[:2].all(), (
                "hand 0 arrives, the others do not: each turns at its own speed"
            )
            assert right.all(), (
                f"position {t} times the matrix is not position {t + distance}"
            )
