"""Positions: the formula, precision, and checks that name the mistake."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from glassgpt.checks import positions as checks
from glassgpt.checks.grading import catch
from glassgpt.positions import sinusoidal_positions


def test_package_passes_its_checks():
    checks.check_sinusoidal_positions(sinusoidal_positions)


@given(st.integers(1, 40), st.integers(1, 12))
def test_sinusoids_equal_the_formula(context, hands):
    width = 2 * hands
    got = sinusoidal_positions(context, width)
    assert got.shape == (context, width)
    assert got.dtype == torch.float32
    for t in range(context):
        for i in range(hands):
            angle = t / 10000 ** (2 * i / width)
            assert got[t, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-5)
            assert got[t, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-5)


def test_far_positions_stay_right():
    last = sinusoidal_positions(4_001, 4)[-1]
    assert last[0].item() == pytest.approx(math.sin(4_000), abs=1e-3)
    assert last[3].item() == pytest.approx(math.cos(40), abs=1e-3)


@given(st.integers(0, 500), st.integers(0, 500), st.integers(0, 500))
def test_dot_products_depend_on_the_distance_alone(s, t, shift):
    P = sinusoidal_positions(1001, 16)
    moved = P[s + shift] @ P[t + shift]
    assert (P[s] @ P[t]).item() == pytest.approx(moved.item(), abs=1e-3)


@pytest.mark.parametrize("width", [1, 7])
def test_odd_widths_are_refused(width):
    with pytest.raises(ValueError, match=f"width is {width}"):
        sinusoidal_positions(8, width)


def sinusoids(unit=1.0, first=0, base=10000.0, dtype=torch.float64):
    def positions(context, width):
        speeds = base ** -(torch.arange(0, width, 2) / width)
        angles = torch.arange(first, context + first).to(dtype)[:, None] * speeds * unit
        return torch.stack((angles.sin(), angles.cos()), -1).flatten(1)

    return positions


@pytest.mark.parametrize(
    "positions",
    [
        sinusoids(),
        sinusoids(dtype=torch.float32),
        lambda t, c: sinusoidal_positions(t, c).half(),
        lambda t, c: sinusoidal_positions(t + 3, c)[:t],
        lambda t, c: F.embedding(torch.arange(t), sinusoidal_positions(t, c).double()),
    ],
)
def test_right_sinusoids_pass(positions):
    checks.check_sinusoidal_positions(positions)


def embed(ids, tokens, positions, start):
    return tokens[ids] + positions[torch.arange(start, start + ids.shape[1])]


def by_layer(ids, tokens, positions, start):
    places = torch.arange(start, start + ids.shape[1]).expand(len(ids), -1)
    return F.embedding(ids, tokens) + F.embedding(places, positions)


def by_product(ids, tokens, positions, start):
    if start + ids.shape[1] > len(positions):
        raise ValueError("too far")
    places = torch.eye(len(positions))[start : start + ids.shape[1]]
    return torch.eye(len(tokens))[ids] @ tokens + places @ positions


@pytest.mark.parametrize("right", [embed, by_layer, by_product])
def test_right_embeddings_pass(right):
    checks.check_add_positions(right)


def refuse(ids, tokens, positions, start):
    if start + ids.shape[1] > len(positions):
        raise RuntimeError("shapes")
    return embed(ids, tokens, positions, start)


def ending(refused, error):
    """Slices, and refuses where a condition on start and end holds."""

    def attempt(ids, tokens, positions, start):
        end = start + ids.shape[1]
        if refused(start, end, len(positions)):
            raise error(f"{end} tokens")
        return tokens[ids] + positions[start:end]

    return attempt


def frozen(hand):
    def positions(context, width):
        P = sinusoidal_positions(context, width)
        P[:, 2 * hand : 2 * hand + 2] = torch.tensor([0.0, 1.0])
        return P

    return positions


def stopping(context, width):
    P = sinusoidal_positions(context, width)
    P[2000:, 4:] = P[2000, 4:]
    return P


def each_column(context, width):
    """A speed for each column, not for each hand."""
    angles = torch.arange(context)[:, None] * 10000.0 ** (-torch.arange(width) / width)
    return torch.stack((angles[:, 0::2].sin(), angles[:, 1::2].cos()), -1).flatten(1)


def gap(context, width):
    P = sinusoidal_positions(context, width)
    P[50:100] = 0
    return P


def spoiling(which):
    """Right, but adds to a row of a table that was given."""

    def attempt(ids, tokens, positions, start):
        right = embed(ids, tokens, positions, start)
        (tokens, positions)[which][ids[0, 0]] += 1
        return right

    return attempt


def row_by_row(ids, tokens, positions, start):
    """A loop whose += writes into the table of tokens."""
    result = torch.empty(*ids.shape, tokens.shape[1])
    for b, text in enumerate(ids):
        for t, i in enumerate(text):
            row = tokens[i]
            row += positions[start + t]
            result[b, t] = row
    return result


def shift(sign=1.0, unit=1.0, dtype=torch.float32):
    def matrix(distance, width):
        blocks = []
        for i in range(0, width, 2):
            angle = unit * distance * 10000 ** (-i / width)
            sine, cosine = sign * math.sin(angle), math.cos(angle)
            blocks.append(torch.tensor([[cosine, -sine], [sine, cosine]], dtype=dtype))
        return torch.block_diag(*blocks)

    return matrix


def fitted(distance, width):
    P, t = sinusoidal_positions(528, width).double(), torch.arange(8, 520)
    return torch.linalg.lstsq(P[t], P[t + distance]).solution


def two_rows(distance, width):
    """Fitted to two positions only, 20 and 300."""
    P = sinusoidal_positions(512, width).double()
    return torch.linalg.pinv(P[[20, 300]]) @ P[[20 + distance, 300 + distance]]


def repeated(distance, width):
    """One step so many times, and none for a distance below 0."""
    return torch.linalg.matrix_power(shift()(1, width), max(distance, 0))


@pytest.mark.parametrize("right", [shift(), shift(dtype=torch.float64), fitted])
def test_right_steps_pass(right):
    checks.check_shift_matrix(right)


@pytest.mark.parametrize(
    ("check", "wrong", "message"),
    [
        (checks.check_sinusoidal_positions, lambda t, c: torch.cat(
            sinusoidal_positions(t, c).view(t, -1, 2).unbind(-1), -1), "position 0"),
        (checks.check_sinusoidal_positions,
         lambda t, c: sinusoidal_positions(t, c).T, "shape"),
        (checks.check_sinusoidal_positions, sinusoids(math.pi / 180), "degrees"),
        (checks.check_sinusoidal_positions, sinusoids(2.0), "2.0000 a position"),
        (checks.check_sinusoidal_positions, sinusoids(first=1), "count from 0"),
        (checks.check_sinusoidal_positions, sinusoids(base=100.0), "its speed"),
        (checks.check_sinusoidal_positions,
         sinusoids(dtype=torch.bfloat16), "imprecise"),
        (checks.check_sinusoidal_positions, frozen(1), "hand 1 turns by 0.0000"),
        (checks.check_sinusoidal_positions, frozen(2), "hand 2 turns by 0.0000"),
        (checks.check_sinusoidal_positions, stopping, "position 3999"),
        (checks.check_sinusoidal_positions, each_column, "need one angle"),
        (checks.check_sinusoidal_positions, gap, "position 99 is wrong"),
        (checks.check_sinusoidal_positions,
         lambda t, c: sinusoidal_positions(4000, 6), "positions(2, 4) has shape"),
        (checks.check_sinusoidal_positions,
         lambda t, c: sinusoidal_positions(4000, 6)[:t, :c], "depends on the width"),
        (checks.check_add_positions,
         lambda i, x, p, start: x[i] + p[start : start + i.shape[1]], "accepted"),
        (checks.check_add_positions, lambda i, x, p, start: x[i] + p[
            torch.arange(start, start + i.shape[1]).clamp(max=len(p) - 1)], "refuse"),
        (checks.check_add_positions,
         lambda i, x, p, start: embed(i, x, p, 0), "start is ignored"),
        (checks.check_add_positions, lambda i, x, p, start: x[i] + p[i], "position 0"),
        (checks.check_add_positions,
         lambda i, x, p, start: x[i] + p[start], "position 0"),
        (checks.check_add_positions,
         lambda i, x, p, start: embed(i, x, p, start)[0], "give (3, 2)"),
        (checks.check_add_positions, lambda i, x, p, start: x[i].squeeze() + p[
            start : start + i.shape[1]], "ids (1, 2) give (2, 2)"),
        (checks.check_add_positions, lambda i, x, p, start: embed(
            i, x, p, start).squeeze(1), "ids (2, 1) give (2, 2)"),
        (checks.check_add_positions, lambda i, x, p, start: torch.tensor(
            embed(i, x, p, start).tolist()), "no gradient reaches one of the tables"),
        (checks.check_add_positions, lambda i, x, p, start: embed(
            i, x.detach(), p, start), "no gradient reaches one of the tables"),
        (checks.check_add_positions, lambda i, x, p, start: embed(
            i, x, p.detach(), start), "no gradient reaches one of the tables"),
        (checks.check_add_positions, row_by_row, "a table that was given has changed"),
        (checks.check_add_positions, spoiling(0), "has changed"),
        (checks.check_add_positions, spoiling(1), "has changed"),
        (checks.check_add_positions, refuse, "not in RuntimeError: shapes"),
        (checks.check_add_positions, ending(lambda start, end, rows: end >= rows,
         ValueError), "positions 2 to 4, but they are refused (ValueError: 5"),
        (checks.check_add_positions, ending(lambda start, end, rows: end >= rows,
         AssertionError), "refused (AssertionError: 5"),
        (checks.check_add_positions,
         ending(lambda start, end, rows: start > 3, ValueError), "positions 3 to 5"),
        (checks.check_add_positions, ending(lambda start, end, rows: end > rows,
         AssertionError), "not in AssertionError: 7"),
        (checks.check_add_positions,
         lambda i, x, p, start: embed(i, x, p, start).tolist(), "a list, not"),
        (checks.check_add_positions, ending(lambda start, end, rows: start >= 3,
         ValueError), "positions 3 to 4, but they are refused"),
        (checks.check_add_positions, ending(lambda start, end, rows: start + 3 > rows,
         ValueError), "positions 3 to 4, but they are refused"),
        (checks.check_add_positions, ending(lambda start, end, rows: end > 5,
         ValueError), "2 to 4 of 4 rows: say"),
        (checks.check_shift_matrix, lambda d, c: shift()(d, 8), "not (4, 4)"),
        (checks.check_shift_matrix, two_rows, "position 57 times"),
        (checks.check_shift_matrix, lambda d, c: shift()(d, 8)[:c, :c], "hand 0"),
        (checks.check_shift_matrix, shift(sign=-1), "the wrong way"),
        (checks.check_shift_matrix, shift(unit=2.0), "is not position 21"),
        (checks.check_shift_matrix, lambda d, c: torch.eye(c), "is not position"),
        (checks.check_shift_matrix, lambda d, c: shift()(1, c), "distance is ignored"),
        (checks.check_shift_matrix, lambda d, c: shift()(d, c // 2), "shape"),
        (checks.check_shift_matrix, repeated, "is not position 18"),
        (checks.check_shift_matrix, lambda d, c: shift()(abs(d), c), "the wrong way"),
        (checks.check_shift_matrix, lambda d, c: torch.block_diag(
         *[shift()(d, 2)] * (c // 2)), "hand 0 arrives, the others do not"),
    ],
)  # fmt: skip
def test_checks_name_the_mistake(check, wrong, message, capsys):
    catch(check, wrong)
    assert message in capsys.readouterr().out


def test_the_chapter_shows_the_record():
    book = Path(__file__).parent.parent / "book"
    record = json.loads((book / "runs" / "positions.json").read_text("utf-8"))
    chapter = json.loads((book / "04_positions.ipynb").read_text("utf-8"))
    sources = {cell["id"]: "".join(cell["source"]) for cell in chapter["cells"]}
    shown: dict = {}
    exec(sources["swapped-record"], shown)
    assert shown["SWAPPED"] == record["swapped"]["loss"]
