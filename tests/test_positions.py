"""Positions: parity with transformers, the properties, precision, and compiling."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)

from glassgpt.checks import positions as checks
from glassgpt.checks.grading import catch
from glassgpt.positions import apply_rotary, rotary_tables, sinusoidal_positions


def test_package_passes_its_checks():
    checks.check_sinusoidal_positions(sinusoidal_positions)
    checks.check_rotary_tables(rotary_tables)
    checks.check_rotary(apply_rotary)


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


def test_far_positions_are_as_exact_as_float32():
    cos, sin = rotary_tables(100_001, 4, base=100.0)
    assert cos[-1, 1].item() == pytest.approx(math.cos(10_000), abs=1e-7)
    assert sin[-1, 0].item() == pytest.approx(math.sin(100_000), abs=1e-7)


@pytest.mark.parametrize("base", [10_000.0, 500_000.0])
def test_tables_equal_llama(base):
    config = LlamaConfig(
        hidden_size=64,
        num_attention_heads=4,
        rope_parameters={"rope_type": "default", "rope_theta": base},
    )
    x = torch.zeros(1, 1, 64)
    theirs = LlamaRotaryEmbedding(config)(x, torch.arange(64)[None])
    for ours, table in zip(rotary_tables(64, 16, base), theirs, strict=True):
        torch.testing.assert_close(ours, table[0, :, :8], atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_turning_equals_llama(dtype):
    torch.manual_seed(0)
    q, k = torch.randn(2, 2, 3, 10, 8, dtype=dtype)
    cos, sin = rotary_tables(10, 8)
    theirs = apply_rotary_pos_emb(
        q, k, torch.cat((cos, cos), -1)[None], torch.cat((sin, sin), -1)[None]
    )
    for ours, other in zip((q, k), theirs, strict=True):
        torch.testing.assert_close(apply_rotary(ours, cos, sin), other)


@given(st.integers(0, 500), st.integers(0, 500), st.integers(0, 500))
@settings(deadline=None)
def test_scores_depend_on_the_distance_alone(s, t, shift):
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 16, dtype=torch.float64)
    cos, sin = rotary_tables(1001, 16)

    def score(s, t):
        rows = slice(s, s + 1), slice(t, t + 1)
        (a, b) = (
            apply_rotary(x, cos[r], sin[r]) for x, r in zip((q, k), rows, strict=True)
        )
        return (a @ b.T).item()

    assert score(s, t) == pytest.approx(score(s + shift, t + shift), abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bits_round_once(dtype):
    torch.manual_seed(0)
    x = torch.randn(2, 300, 32).to(dtype)
    tables = rotary_tables(300, 32)
    got = apply_rotary(x, *tables)
    assert got.dtype == dtype
    assert torch.equal(got, apply_rotary(x.float(), *tables).to(dtype))


def test_tables_may_differ_between_texts():
    cos, sin = rotary_tables(10, 4)
    x = torch.randn(2, 3, 2, 4)  # (B, H, T, D): two texts at different places
    at = torch.tensor([[0, 1], [6, 7]])
    got = apply_rotary(x, cos[at][:, None], sin[at][:, None])
    torch.testing.assert_close(got[1], apply_rotary(x[1], cos[6:8], sin[6:8]))


def test_gradient():
    cos, sin = (table.double() for table in rotary_tables(5, 4))
    x = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: apply_rotary(x, cos, sin), x)


def test_turning_compiles_as_one_graph():
    cos, sin = rotary_tables(6, 4)
    compiled = torch.compile(apply_rotary, fullgraph=True, backend="eager")
    x = torch.randn(2, 6, 4)
    assert torch.equal(compiled(x, cos, sin), apply_rotary(x, cos, sin))


@pytest.mark.parametrize("width", [0, 1, 7, -2])
def test_odd_and_empty_widths_are_refused(width):
    for function in (sinusoidal_positions, rotary_tables):
        with pytest.raises(ValueError, match=f"width is {width}"):
            function(8, width)


def test_other_impossible_values_are_refused():
    with pytest.raises(ValueError, match="context is 0"):
        rotary_tables(0, 4)
    for base in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="base is"):
            rotary_tables(4, 4, base)


@pytest.mark.parametrize("shape", [(5, 4), (1, 4), (4, 6), (4, 3)])
def test_shapes_that_do_not_fit_are_refused(shape):
    cos, sin = rotary_tables(4, 4)
    with pytest.raises(ValueError, match=r"must end in \(T, D / 2\)"):
        apply_rotary(torch.ones(shape), cos, sin)
    with pytest.raises(ValueError, match=r"must end in"):
        apply_rotary(torch.ones(4, 4), cos, sin[:1])


def tables_in(unit, first=0):
    def tables(context, head_width, base=10000.0):
        speeds = base ** -(torch.arange(0, head_width, 2) / head_width)
        angles = torch.arange(first, context + first)[:, None] * speeds * unit
        return angles.cos(), angles.sin()

    return tables


def in_bfloat16(context, head_width, base=10000.0):
    speeds = base ** -(torch.arange(0, head_width, 2) / head_width)
    angles = torch.arange(context).bfloat16()[:, None] * speeds
    return angles.cos(), angles.sin()


def slow(context, head_width, base=10000.0):
    return rotary_tables(context, head_width, base**0.5)


def neighbors(x, cos, sin):
    first, second = x[..., 0::2], x[..., 1::2]
    turned = (first * cos - second * sin, second * cos + first * sin)
    return torch.stack(turned, dim=-1).flatten(-2)


def one_sign(x, cos, sin):
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos + second * sin, second * cos + first * sin), dim=-1)


@pytest.mark.parametrize(
    ("check", "wrong", "message"),
    [
        (checks.check_sinusoidal_positions,
         lambda t, c: torch.cat(rotary_tables(t, c)[::-1], -1), "position 0"),
        (checks.check_sinusoidal_positions,
         lambda t, c: sinusoidal_positions(t, c).T, "shape"),
        (checks.check_rotary_tables, tables_in(math.pi / 180), "degrees"),
        (checks.check_rotary_tables, tables_in(2.0), "2.0000 a position"),
        (checks.check_rotary_tables, tables_in(1.0, first=1), "count from 0"),
        (checks.check_rotary_tables, slow, "its speed"),
        (checks.check_rotary_tables, in_bfloat16, "imprecise"),
        (checks.check_rotary_tables,
         lambda t, d, base=1e4: rotary_tables(t, d), "base 100"),
        (checks.check_rotary_tables, lambda t, d, base=1e4: tuple(
            torch.cat((x, x), -1) for x in rotary_tables(t, d)), "each pair"),
        (checks.check_rotary, neighbors, "paired with column 1"),
        (checks.check_rotary, lambda x, c, s: apply_rotary(x, c, -s), "backwards"),
        (checks.check_rotary, one_sign, "grew"),
        (checks.check_rotary, lambda x, c, s: x, "quarter turn"),
        (checks.check_rotary,
         lambda x, c, s: apply_rotary(x.float(), c, s), "bfloat16"),
        (checks.check_reorder, lambda x: x, "nothing moved"),
        (checks.check_reorder, lambda x: x[..., [0, 2, 4, 6, 1, 3, 5, 5]], "lost"),
    ],
)  # fmt: skip
def test_checks_name_the_mistake(check, wrong, message, capsys):
    catch(check, wrong)
    assert message in capsys.readouterr().out


def test_check_rotary_notices_scores_that_depend_on_the_place():
    def drifting(x, cos, sin):
        if x.shape[-1] == 4:  # the quarter turn by hand is done right
            return apply_rotary(x, cos, sin)
        return apply_rotary(x, cos**2, sin)

    with pytest.raises(AssertionError, match="grew|changed their dot product"):
        checks.check_rotary(drifting)
