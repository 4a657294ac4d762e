"""What came after GPT-2: parity with transformers, and each choice by itself."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)

from glassgpt.checks import modern as checks
from glassgpt.checks.grading import catch
from glassgpt.gpt import GPT, GPTConfig
from glassgpt.modern import (
    GPT2_CHOICES,
    ModernAttention,
    ModernConfig,
    ModernGPT,
    apply_rotary,
    rotary_tables,
    squared_relu,
)

SIZES = {"vocab_size": 13, "context": 10, "layers": 2, "heads": 2, "width": 16}
ALONE = [
    {**GPT2_CHOICES, name: not value}
    if isinstance(value, bool)
    else {**GPT2_CHOICES, name: getattr(ModernConfig(**SIZES), name)}
    for name, value in GPT2_CHOICES.items()
]
every_choice = pytest.mark.parametrize("choices", [{}, GPT2_CHOICES, *ALONE])


def random_model(choices, seed=0):
    """A model in 64 bits whose parameters are all random."""
    random = torch.Generator().manual_seed(seed)
    model = ModernGPT(ModernConfig(**SIZES, **choices)).double().eval()
    for parameter in model.parameters():
        parameter.data.normal_(0.0, 0.4, generator=random)
    return model


def test_package_passes_its_checks():
    checks.check_rotary_tables(rotary_tables)
    checks.check_rotary(apply_rotary)
    checks.check_rms_norm(nn.RMSNorm(4, elementwise_affine=False))


@torch.no_grad()
def test_with_the_choices_of_gpt2_it_is_gpt2():
    ours = GPT(GPTConfig(**SIZES)).double()
    for parameter in ours.parameters():
        parameter.normal_(0.0, 0.4)
    same = ModernGPT(ModernConfig(**SIZES, **GPT2_CHOICES)).double()
    same.load_state_dict(ours.state_dict())
    ids = torch.randint(13, (2, 10))
    assert torch.equal(ours(ids), same(ids))
    assert same.parameter_count() == ours.parameter_count()
    assert same.flops_per_token() == ours.flops_per_token()


@every_choice
@torch.no_grad()
def test_each_choice_is_causal(choices):
    model, ids = random_model(choices), torch.randint(13, (2, 10))
    logits = model(ids)
    assert logits.shape == (2, 10, 13)
    changed = ids.clone()
    changed[:, 6] = (ids[:, 6] + 1) % 13
    torch.testing.assert_close(model(changed)[:, :6], logits[:, :6])
    assert not torch.allclose(model(changed)[:, 6:], logits[:, 6:])


@every_choice
def test_flops_are_those_that_pytorch_counts(choices):
    model = random_model(choices)
    # The fused kernel on a CPU is not counted; PyTorch's plain products are.
    plain = sdpa_kernel(SDPBackend.MATH)
    with plain, FlopCounterMode(display=False) as counter:
        model(torch.zeros(2, 10, dtype=torch.int64)).sum().backward()
    assert counter.get_total_flops() == 2 * 10 * model.flops_per_token()


@every_choice
def test_each_choice_starts_fair(choices):
    torch.manual_seed(0)
    model = ModernGPT(ModernConfig(**SIZES, **choices))
    ids, targets = torch.randint(13, (2, 64, 10))
    loss = F.cross_entropy(model(ids).flatten(0, 1), targets.flatten()).item()
    assert loss == pytest.approx(math.log(13), abs=0.02)
    assert (model.head.weight is model.tokens.weight) == model.config.tied
    names = {name.rsplit(".", 1)[1] for name, _ in model.named_parameters()}
    assert ("bias" in names) == model.config.bias
    for name, parameter in model.named_parameters():
        zeroed = model.config.zero_projections and (
            name.endswith("projection.weight")
            or (name == "head.weight" and not model.config.tied)
        )
        assert parameter.dim() < 2 or zeroed == (parameter == 0).all().item(), name


@torch.no_grad()
def test_the_size_of_normalized_queries_and_keys_does_not_matter():
    config = ModernConfig(**SIZES)
    module, x = ModernAttention(config).double(), torch.randn(1, 5, 16).double()
    before = module(x)
    module.qkv.weight[:32] *= 100  # the rows that make queries and keys
    torch.testing.assert_close(module(x), before)
    module.normalize_qk = False
    assert not torch.allclose(module(x), before, atol=1e-3)


@torch.no_grad()
def test_only_distances_count_to_rotary_attention():
    module = ModernAttention(ModernConfig(**SIZES)).double()
    x, mask = torch.randn(1, 10, 16).double(), torch.ones(10, 10).tril().bool()
    mask[6:, :6] = False
    first, later = module(x[:, 6:]), module(x, mask)[:, 6:]
    torch.testing.assert_close(first, later, atol=1e-6, rtol=1e-6)


def test_squared_relu_is_the_square_of_relu():
    x = torch.linspace(-3, 3, 61, dtype=torch.float64, requires_grad=True)
    assert torch.equal(squared_relu(x), F.relu(x).square())
    assert torch.autograd.gradcheck(squared_relu, x)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"positions": "absolute"}, "positions is rotary or learned"),
        ({"norm": "batch"}, "norm is rms or layer"),
        ({"activation": "relu"}, "activation is squared_relu or gelu"),
        ({"width": 6}, "even width, not 3"),
        ({"layers": 0}, "layers must be a whole number"),
    ],
)
def test_config_refuses_the_impossible(values, message):
    with pytest.raises(ValueError, match=message):
        ModernConfig(**SIZES | values)


@pytest.mark.parametrize(
    ("ids", "message"),
    [([[0, 13]], "id 13"), ([[-1, 0]], "id -1"), ([[0] * 11], "context")],
)
def test_ids_are_refused_as_by_gpt(ids, message):
    with pytest.raises(ValueError, match=message):
        random_model({})(torch.tensor(ids))


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
