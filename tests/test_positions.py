"""Positions: the formula, and the mistakes that the check names."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glassgpt.checks import positions as checks
from glassgpt.checks.grading import catch
from glassgpt.positions import sinusoidal_positions


def test_package_passes_its_checks():
    checks.check_sinusoidal_positions(sinusoidal_positions)


@given(st.integers(1, 40), st.integers(1, 12))
@settings(deadline=None)
def test_sinusoids_equal_the_formula(context, hands):
    width = 2 * hands
    got = sinusoidal_positions(context, width)
    assert got.shape == (context, width)
    assert got.dtype == torch.float32
    for t in range(context):
        for i in range(hands):
            angle = t / 10000 ** (2 * i / width)
            assert got[t, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-6)
            assert got[t, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-6)


def sines_first(context, width):
    table = sinusoidal_positions(context, width)
    return torch.cat((table[:, 0::2], table[:, 1::2]), dim=-1)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (sines_first, "position 0"),
        (lambda context, width: sinusoidal_positions(context, width).T, "shape"),
    ],
)
def test_the_check_names_the_mistake(wrong, message, capsys):
    catch(checks.check_sinusoidal_positions, wrong)
    assert message in capsys.readouterr().out
