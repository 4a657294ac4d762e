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
    assert abs(fast - math.pi / 180) > 1e-4, "the angles are degrees, not radians"
    right = abs(fast - 1) < 1e-3
    assert right, f"the first hand turns by {fast:.4f} a position, not by 1"
    wanted = 10000 ** (-2 / 6)
    assert abs(slow - wanted) < 1e-3, (
        f"hand 1 turns by {slow:.4f} a position, not {wanted:.4f}: "
        "its speed is 10000 ** (-2 * i / width)"
    )
    far = torch.tensor([math.sin(3999), math.cos(3999)], dtype=got.dtype)
    assert torch.allclose(got[-1, :2], far, atol=1e-3), (
        "position 3999 is imprecise: calculate the angles in 32 bits or more"
    )


def check_add_positions(embed: Callable[[Tensor, Tensor, Tensor, int], Tensor]) -> None:
    """Each token's row plus the row of its position, which must exist.

    embed: called as embed(ids, tokens, positions, start); ids (B, T).

    Book: 04_positions.html#exercise-2-what-enters-the-model
    """
    tokens = torch.tensor([[100.0, 0.0], [200.0, 0.0], [300.0, 0.0]])
    positions = torch.arange(10.0).view(5, 2)
    ids = torch.tensor([[2, 0, 2], [1, 1, 0]])
    for start in (0, 2):
        got = embed(ids, tokens, positions, start)
        wanted = tokens[ids] + positions[start : start + 3]
        assert got.shape == (2, 3, 2), f"ids (2, 3) give {tuple(got.shape)}"
        assert start == 0 or not torch.equal(got, tokens[ids] + positions[:3]), (
            "start is ignored: the first token stands at position start"
        )
        assert torch.allclose(got, wanted), (
            f"from position {start} the first text gives {got[0].tolist()}, "
            f"not {wanted[0].tolist()}"
        )
    try:
        embed(ids, tokens, positions, 4)
    except (ValueError, IndexError):
        return
    except RuntimeError as error:
        reason = f"say what is wrong in a ValueError, not: {error}"
        raise AssertionError(reason) from None
    raise AssertionError(
        "positions 4, 5 and 6 of 5 rows were accepted: "
        "one row was added to all three tokens"
    )


def check_shift_matrix(shift: Callable[[int, int], Tensor]) -> None:
    """One matrix moves every sinusoidal position by the same distance.

    shift: called as shift(distance, width); returns (width, width).

    Book: 04_positions.html#exercise-3-a-step-is-a-matrix
    """
    speeds = 10000.0 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)

    def row(t: int) -> Tensor:
        return torch.stack(((t * speeds).sin(), (t * speeds).cos()), dim=-1).flatten()

    for distance in (1, 7):
        matrix = shift(distance, 8).double()
        assert matrix.shape == (8, 8), f"the matrix has shape {tuple(matrix.shape)}"
        for t in (20, 300):
            got = row(t) @ matrix
            back = torch.allclose(got, row(t - distance), atol=1e-4)
            assert not back, "the step goes backwards: change the sign of the sines"
            assert torch.allclose(got, row(t + distance), atol=1e-4), (
                f"position {t} times the matrix is not position {t + distance}"
            )
