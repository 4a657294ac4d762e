"""Positions: the formula, and its precision."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from glassgpt.positions import sinusoidal_positions


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


def test_the_chapter_shows_the_record():
    book = Path(__file__).parent.parent / "book"
    record = json.loads((book / "runs" / "positions.json").read_text("utf-8"))
    chapter = json.loads((book / "04_positions.ipynb").read_text("utf-8"))
    sources = {cell["id"]: "".join(cell["source"]) for cell in chapter["cells"]}
    shown: dict = {}
    exec(sources["swapped-record"], shown)
    assert shown["SWAPPED"] == record["swapped"]["loss"]
