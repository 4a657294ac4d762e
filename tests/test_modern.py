"""What came after GPT-2: parity with transformers, and each choice by itself."""

import copy
import dataclasses
import json
import math
from pathlib import Path
from types import MethodType

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import (
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)

from glassgpt.checks import modern as checks
from glassgpt.checks.grading import catch
from glassgpt.generation import KeyValueCache
from glassgpt.gpt import GPT, GPTConfig
from glassgpt.modern import (
    GPT2_CHOICES,
    LLAMA_CHOICES,
    ModernAttention,
    ModernConfig,
    ModernGPT,
    Muon,
    MuonConfig,
    apply_rotary,
    build,
    muon_optimizers,
    orthogonalize,
    rotary_tables,
    squared_relu,
    swiglu,
)

SIZES = {"vocab_size": 13, "context": 10, "layers": 2, "heads": 2, "width": 16}
ALONE = [
    {**GPT2_CHOICES, name: not value}
    if isinstance(value, bool)
    else {**GPT2_CHOICES, name: getattr(ModernConfig(**SIZES), name)}
    for name, value in GPT2_CHOICES.items()
]
ALONE += [
    {**GPT2_CHOICES, **change}
    for change in (
        {"activation": "swiglu"},
        {"hidden": 5},
        {"key_value_heads": 1},
        {"norm_eps": 0.1},
    )
]
every_choice = pytest.mark.parametrize(
    "choices",
    [{}, {"key_value_heads": 1}, GPT2_CHOICES, LLAMA_CHOICES, *ALONE],
    ids=lambda choices: ",".join(
        f"{k}={v}" for k, v in choices.items() if GPT2_CHOICES.get(k) != v
    ),
)


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
    checks.check_orthogonalize(orthogonalize)


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


def llama(heads, key_value_heads, layers, hidden, base, tied, seed):
    """A random Llama of transformers in 64 bits, and ours with its weights."""
    torch.manual_seed(seed)
    width = 8 * heads
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=31,
            hidden_size=width,
            intermediate_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=key_value_heads,
            max_position_embeddings=24,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": base},
            tie_word_embeddings=tied,
        )
    )
    theirs = theirs.double().eval()
    for parameter in theirs.parameters():
        parameter.data.normal_(0.0, 0.4)
    choices = LLAMA_CHOICES | {"tied": tied, "rotary_base": base, "hidden": hidden}
    choices["key_value_heads"] = key_value_heads
    config = ModernConfig(31, 24, layers, heads, width, **choices)
    ours, state = ModernGPT(config).double().eval(), {}
    state["tokens.weight"] = theirs.model.embed_tokens.weight
    state["norm.weight"] = theirs.model.norm.weight
    state["head.weight"] = theirs.lm_head.weight
    for i, layer in enumerate(theirs.model.layers):
        a, m = layer.self_attn, layer.mlp
        qkv = (a.q_proj.weight, a.k_proj.weight, a.v_proj.weight)
        parts = {
            "attention_norm": layer.input_layernorm.weight,
            "attention.qkv": torch.cat(qkv),
            "attention.projection": a.o_proj.weight,
            "mlp_norm": layer.post_attention_layernorm.weight,
            "mlp.expand": torch.cat((m.gate_proj.weight, m.up_proj.weight)),
            "mlp.projection": m.down_proj.weight,
        }
        state |= {f"blocks.{i}.{name}.weight": value for name, value in parts.items()}
    ours.load_state_dict(state)
    return theirs, ours


def without_detours(theirs, base):
    """Llama's norms and rotary tables are made in 32 bits: let them be made as ours."""

    def norm(self, x):
        size = (x.shape[-1],)
        return F.rms_norm(x, size, self.weight, self.variance_epsilon)

    def tables(self, x, position_ids):
        made = rotary_tables(position_ids, 8, base)
        return tuple(torch.cat((table, table), -1).double() for table in made)

    for module in theirs.modules():
        if isinstance(module, LlamaRMSNorm):
            module.forward = MethodType(norm, module)
    theirs.model.rotary_emb.forward = MethodType(tables, theirs.model.rotary_emb)


@pytest.mark.parametrize(
    "sizes",
    [
        (2, 2, 1, 12, 10_000.0, False, 0),
        (3, 1, 2, 17, 100_000.0, True, 1),
        (4, 2, 3, 40, 500_000.0, False, 2),
        (9, 3, 2, 24, 100_000.0, True, 3),
    ],
)
@torch.no_grad()
def test_with_the_choices_of_llama_it_is_llama(sizes):
    theirs, ours = llama(*sizes)
    ids = torch.randint(31, (2, 24))
    logits = ours(ids)
    torch.testing.assert_close(logits, theirs(ids).logits, atol=1e-3, rtol=1e-3)
    without_detours(theirs, sizes[4])
    torch.testing.assert_close(logits, theirs(ids).logits, atol=1e-9, rtol=1e-9)
    assert ours.parameter_count() == theirs.num_parameters()


def test_the_sizes_of_a_small_llama_of_today():
    config = ModernConfig(
        49152, 8192, 30, 9, 576, key_value_heads=3, hidden=1536,
        **LLAMA_CHOICES | {"tied": True, "rotary_base": 100_000.0},
    )  # fmt: skip
    with torch.device("meta"):
        assert build(config).parameter_count() == 134_515_008
        assert build(dataclasses.replace(config, hidden=None)).parameter_count() == (
            134_515_008  # 8 C / 3 is what its makers chose
        )


def test_build_makes_the_class_of_the_configuration():
    assert type(build(GPTConfig(**SIZES))) is GPT
    assert type(build(ModernConfig(**SIZES))) is ModernGPT


@every_choice
@torch.no_grad()
def test_each_choice_with_caches_gives_the_same(choices):
    model, ids = random_model(choices), torch.randint(13, (2, 10))
    caches = [KeyValueCache(10) for _ in range(2)]
    parts = [model(part, caches=caches) for part in ids.split((4, 1, 5), dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(ids))
    heads = model.config.key_value_heads or 2
    assert caches[0].keys.shape == (2, heads, 10, 8)


@every_choice
@torch.no_grad()
def test_positions_of_each_text_are_its_own(choices):
    model, ids = random_model(choices), torch.randint(13, (2, 6))
    positions = torch.tensor([[0, 1, 2, 3, 4, 5], [0, 3, 4, 5, 7, 9]])
    together = model.hidden_states(ids, positions)
    for row in range(2):
        alone = model.hidden_states(ids[row, None], positions[row])
        torch.testing.assert_close(together[row, None], alone)
    assert not torch.allclose(together[1], model.hidden_states(ids)[1], atol=1e-3)


@torch.no_grad()
def test_a_text_padded_on_the_left_is_the_same_text():
    model, ids = random_model({"key_value_heads": 1}), torch.randint(13, (1, 7))
    padded = torch.cat((torch.zeros(1, 3, dtype=torch.int64), ids), dim=1)
    positions = (torch.arange(10) - 3).clamp(min=0)[None]
    mask = torch.ones(10, 10, dtype=torch.bool).tril()
    mask[:, :3] = False
    mask[:3, :3] = True
    found = model.hidden_states(padded, positions, mask)[:, 3:]
    torch.testing.assert_close(found, model.hidden_states(ids))


@torch.no_grad()
def test_blocks_alone_take_the_positions_that_follow():
    model, x = random_model({}), torch.randn(2, 6, 16).double()
    whole, cache = model.blocks[0](x), KeyValueCache(10)
    parts = [model.blocks[0](part, cache=cache) for part in x.split(3, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)


@torch.no_grad()
def test_rounding_a_model_leaves_its_tables_exact():
    model, ids = random_model({}).float(), torch.randint(13, (2, 10))
    same = copy.deepcopy(model)
    for parameter in (*model.parameters(), *same.parameters()):
        parameter.copy_(parameter.bfloat16())
    assert torch.equal(model.bfloat16().float()(ids), same(ids))


@torch.no_grad()
def test_weights_without_a_table_are_enough():
    """A model made on the meta device has nothing but its parameters to fill in."""
    model, ids = random_model({}), torch.randint(13, (2, 10))
    assert not list(model.buffers())
    with torch.device("meta"):
        other = ModernGPT(model.config)
    other.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(other(ids), model(ids))


def test_swiglu_is_a_gated_silu():
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    gate, up = x[:, :4], x[:, 4:]
    torch.testing.assert_close(swiglu(x), gate / (1 + (-gate).exp()) * up)
    assert torch.autograd.gradcheck(swiglu, x)


@pytest.mark.parametrize(
    ("width", "activation", "hidden", "expanded"),
    [
        (576, "swiglu", None, 2 * 1536),
        (128, "swiglu", None, 2 * 344),
        (128, "gelu", None, 512),
        (128, "squared_relu", 300, 300),
        (128, "swiglu", 300, 600),
    ],
)
def test_the_width_of_the_mlp(width, activation, hidden, expanded):
    values = {"activation": activation, "hidden": hidden, "layers": 1, "heads": 2}
    mlp = ModernGPT(ModernConfig(9, 4, width=width, **values)).blocks[0].mlp
    assert mlp.expand.weight.shape == (expanded, width)


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
    module.config = dataclasses.replace(config, normalize_qk=False)
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
        ({"activation": "relu"}, "activation is squared_relu or swiglu or gelu"),
        ({"normalize_qk": "no"}, "normalize_qk is True or False"),
        ({"norm_weight": None}, "norm_weight is True or False"),
        ({"rotary_base": 0.0}, "rotary_base must be positive and finite"),
        ({"rotary_base": math.nan}, "rotary_base must be positive and finite"),
        ({"norm_eps": -1e-5}, "norm_eps must be positive and finite"),
        ({"hidden": 0}, "hidden must be a positive whole"),
        ({"hidden": 2.5}, "hidden must be a positive whole"),
        ({"key_value_heads": 0}, "key_value_heads must be a positive whole"),
        ({"heads": 4, "key_value_heads": 3}, "4 heads can't share 3 key-value heads"),
        ({"heads": 2, "key_value_heads": 4}, "2 heads can't share 4 key-value heads"),
        ({"width": 6}, "even head width: 3"),
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
    cos, sin = rotary_tables(torch.arange(100_001), 4, base=100.0)
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
    tables = rotary_tables(torch.arange(64), 16, base)
    for ours, table in zip(tables, theirs, strict=True):
        torch.testing.assert_close(ours, table[0, :, :8], atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_turning_equals_llama(dtype):
    torch.manual_seed(0)
    q, k = torch.randn(2, 2, 3, 10, 8, dtype=dtype)
    cos, sin = rotary_tables(torch.arange(10), 8)
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
    cos, sin = rotary_tables(torch.arange(1001), 16)

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
    tables = rotary_tables(torch.arange(300), 32)
    got = apply_rotary(x, *tables)
    assert got.dtype == dtype
    assert torch.equal(got, apply_rotary(x.float(), *tables).to(dtype))


def test_tables_may_differ_between_texts():
    cos, sin = rotary_tables(torch.arange(10), 4)
    x = torch.randn(2, 3, 2, 4)  # (B, H, T, D): two texts at different places
    at = torch.tensor([[0, 1], [6, 7]])
    got = apply_rotary(x, cos[at][:, None], sin[at][:, None])
    torch.testing.assert_close(got[1], apply_rotary(x[1], cos[6:8], sin[6:8]))


def test_gradient():
    cos, sin = (table.double() for table in rotary_tables(torch.arange(5), 4))
    x = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: apply_rotary(x, cos, sin), x)


def test_turning_compiles_as_one_graph():
    cos, sin = rotary_tables(torch.arange(6), 4)
    compiled = torch.compile(apply_rotary, fullgraph=True, backend="eager")
    x = torch.randn(2, 6, 4)
    assert torch.equal(compiled(x, cos, sin), apply_rotary(x, cos, sin))


def tables_in(unit, first=0):
    def tables(positions, head_width, base=10000.0):
        speeds = base ** -(torch.arange(0, head_width, 2) / head_width)
        angles = (positions + first)[:, None] * speeds * unit
        return angles.cos(), angles.sin()

    return tables


def in_bfloat16(positions, head_width, base=10000.0):
    speeds = base ** -(torch.arange(0, head_width, 2) / head_width)
    angles = positions.bfloat16()[:, None] * speeds
    return angles.cos(), angles.sin()


def slow(positions, head_width, base=10000.0):
    return rotary_tables(positions, head_width, base**0.5)


def neighbors(x, cos, sin):
    first, second = x[..., 0::2], x[..., 1::2]
    turned = (first * cos - second * sin, second * cos + first * sin)
    return torch.stack(turned, dim=-1).flatten(-2)


def one_sign(x, cos, sin):
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos + second * sin, second * cos + first * sin), dim=-1)


def reordered(x):
    return torch.cat((x[..., 0::2], x[..., 1::2]), dim=-1)


def pool(choose, dealt=False):
    def pooled(weight, heads, groups):
        queries, *shared = weight.chunk(3)
        width, each = weight.shape[1], heads // groups
        sizes = (each, groups, -1, width) if dealt else (groups, each, -1, width)
        parts = [part.view(sizes) for part in shared]
        parts = [part.transpose(0, 1) if dealt else part for part in parts]
        return torch.cat((queries, *(choose(p).flatten(0, 1) for p in parts)))

    return pooled


def always_two_groups(weight, heads, groups):
    return pool(lambda x: x.mean(dim=1))(weight, 6, 2)


def always_three_heads(weight, heads, groups):
    return pool(lambda x: x.mean(dim=1))(weight, heads, heads // 3)


def test_pooled_heads_that_were_equal_already_change_nothing():
    checks.check_pool(pool(lambda x: x.mean(dim=1)))
    torch.manual_seed(0)
    sizes = {"vocab_size": 9, "context": 5, "layers": 1, "heads": 4, "width": 16}
    many = ModernAttention(ModernConfig(**sizes)).double()
    few = ModernAttention(ModernConfig(**sizes, key_value_heads=2)).double()
    with torch.no_grad():
        for part in many.qkv.weight[16:].view(2, 2, 2, 4, 16):
            part[:, 1] = part[:, 0]
        few.qkv.weight.copy_(
            pool(lambda x: x.mean(dim=1))(many.qkv.weight, heads=4, groups=2)
        )
        few.projection.load_state_dict(many.projection.state_dict())
        x = torch.randn(2, 5, 16).double()
        torch.testing.assert_close(few(x), many(x))


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
        (checks.check_orthogonalize,
         lambda x, rounds, dtype: orthogonalize(x, 2, dtype), "1 after five"),
        (checks.check_orthogonalize,
         lambda x, rounds, dtype: orthogonalize(x, min(3, rounds), dtype),
         "1 after five"),
        (checks.check_orthogonalize,
         lambda x, rounds, dtype: orthogonalize(x, 5, dtype), "not after one"),
        (checks.check_orthogonalize,
         lambda x, rounds, dtype: orthogonalize(x, rounds, torch.float32),
         "asked for bfloat16"),
        (checks.check_orthogonalize,
         lambda x, rounds, dtype: orthogonalize(x / x.norm(), 0, dtype) * x.norm(),
         "singular values of a large"),
        (checks.check_orthogonalize,
         lambda x, rounds, dtype: orthogonalize(x, rounds, dtype).flip(1),
         "the directions"),
        (checks.check_orthogonalize,
         lambda x, rounds, dtype: orthogonalize(x.mT, rounds, dtype),
         "the shape became"),
        (checks.check_orthogonalize, lambda x, rounds, dtype: torch.stack(
            [orthogonalize(x, rounds, dtype)[0]] * 2) + (x[1:] == 0).all(),
         "gradient of zero"),
        (checks.check_pool, always_two_groups, "6 heads to 3"),
        (checks.check_pool, always_three_heads, "6 heads to 3"),
        (checks.check_pool, lambda weight, heads, groups: weight, "8 of keys"),
        (checks.check_pool, pool(lambda x: x[:, 0]), "the first head of each"),
        (checks.check_pool, pool(lambda x: x[:, -1]), "the last head of each"),
        (checks.check_pool, pool(lambda x: x.sum(dim=1)), "their sum"),
        (checks.check_pool, pool(lambda x: x.median(dim=1).values), "needs the mean"),
        (checks.check_pool, pool(lambda x: x.mean(dim=1), dealt=True), "every second"),
        (checks.check_pool,
         lambda weight, heads, groups: pool(lambda x: x.mean(dim=1))(
             -weight, heads, groups), "the queries changed"),
        (checks.check_reorder, lambda x: x, "nothing moved"),
        (checks.check_reorder, lambda x: x[..., [0, 2, 4, 6, 1, 3, 5, 5]], "lost"),
        (checks.check_reorder,
         lambda x: x[..., [0, 2, 4, 6, 1, 3, 5, 7]], "the shape (2, 3, 5, 12)"),
        (checks.check_reorder,
         lambda x: torch.cat((x[:, 0::2], x[:, 1::2]), 1), "nothing moved"),
        (checks.check_reorder,
         lambda x: x.unflatten(-1, (4, -1)).mT.flatten(-2), "pair 0 is made of"),
        (checks.check_reorder,
         lambda x: torch.cat((reordered(x[:1]), x[1:])), "another row is not"),
        (checks.check_reorder,
         lambda x: reordered(x[:1]).expand(x.shape), "another row is not"),
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


MUON_SHAPES = ((12, 4), (4, 16), (4, 4), (12, 4), (4, 16))


def muon_steps(optimizer, steps=4, idle=(), **settings):
    """Matrices after some steps; those in `idle` never have a gradient."""
    generator = torch.Generator().manual_seed(3)
    matrices = [
        torch.nn.Parameter(torch.randn(shape, generator=generator))
        for shape in MUON_SHAPES
    ]
    made = optimizer(matrices, lr=0.1, weight_decay=0.2, momentum=0.9, **settings)
    for _ in range(steps):
        for place, matrix in enumerate(matrices):
            gradient = torch.randn(matrix.shape, generator=generator)
            matrix.grad = None if place in idle else gradient
        made.step()
    return [matrix.detach() for matrix in matrices], made


@pytest.mark.parametrize("rounds", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("shape", [(3, 7), (7, 3), (5, 5)])
def test_two_rounds_at_a_time_are_single_rounds(shape, rounds):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)).double()
    x = matrix / matrix.norm()
    for _ in range(rounds):
        square = x @ x.mT
        x = 3.4445 * x - 4.7750 * square @ x + 2.0315 * square @ square @ x
    assert torch.allclose(orthogonalize([matrix], rounds, torch.float64)[0], x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_does_not_grow(dtype):
    """It would, were all five rounds done on X X^T before X is multiplied."""
    torch.manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(n, 64))[0] for n in (64, 256))
    matrix = (left * torch.logspace(0, -3, 64)) @ right.T
    exact = orthogonalize([matrix], 5, torch.float64)[0]
    found = orthogonalize([matrix], 5, dtype)[0].double()
    assert (found - exact).norm() < 0.1 * exact.norm()
    assert torch.linalg.matrix_norm(found, 2) < 1.3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("ns_steps", [1, 4])
def test_muon_is_torchs_in_any_precision(dtype, ns_steps):
    ours, _ = muon_steps(Muon, dtype=dtype, ns_steps=ns_steps)
    theirs, _ = muon_steps(torch.optim.Muon, ns_steps=ns_steps)
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == torch.float32
        assert torch.allclose(one, other, atol=0.03)


def test_muon_multiplies_in_its_own_precision():
    exact, _ = muon_steps(Muon, dtype=torch.float64)
    for dtype, error in ((torch.float32, 1e-5), (torch.bfloat16, 0.03)):
        found, _ = muon_steps(Muon, dtype=dtype)
        pairs = zip(found, exact, strict=True)
        worst = max((one - other).abs().max() for one, other in pairs)
        assert error / 100 < worst < error


def test_muon_refuses_what_it_does_not_do():
    matrix = torch.nn.Parameter(torch.ones(3, 2))
    with pytest.raises(TypeError, match="nesterov"):
        Muon([matrix], nesterov=False)
    with pytest.raises(TypeError, match="argument"):
        Muon([matrix]).step(lambda: 0.0)
    with pytest.raises(ValueError, match="2D"):
        Muon([torch.nn.Parameter(torch.ones(3))])


def test_muon_leaves_out_what_has_no_gradient():
    ours, made = muon_steps(Muon, idle=(1, 2))
    theirs, _ = muon_steps(torch.optim.Muon, idle=(1, 2))
    for one, other in zip(ours, theirs, strict=True):
        assert torch.allclose(one, other, atol=0.03)
    assert len(made.state) == 3


def test_muon_goes_on_from_its_state():
    _, made = muon_steps(Muon, dtype=torch.float32)
    kept, shapes = made.state_dict(), [torch.zeros(s) for s in MUON_SHAPES]
    other = Muon(map(torch.nn.Parameter, shapes), dtype=torch.float32, lr=0.1)
    other.load_state_dict(kept)
    groups = (made.param_groups[0]["params"], other.param_groups[0]["params"])
    pairs = zip(*groups, strict=True)
    for one, two in pairs:
        same = (made.state[one], other.state[two])
        assert torch.equal(*(state["momentum_buffer"] for state in same))
    assert other.param_groups[0]["momentum"] == 0.9


def test_muon_takes_a_gradient_of_zero():
    matrix = torch.nn.Parameter(torch.ones(3, 2))
    matrix.grad = torch.zeros(3, 2)
    Muon([matrix], lr=0.1, weight_decay=0.5).step()
    assert torch.allclose(matrix, torch.full((3, 2), 0.95))


def test_two_optimizers_share_the_parameters():
    model = ModernGPT(ModernConfig(**SIZES, **GPT2_CHOICES))
    config = MuonConfig(learning_rate=0.01, matrix_learning_rate=0.1, weight_decay=0.3)
    muon, adamw = muon_optimizers(model, config, torch.float64)
    assert (muon.dtype, config.schedule, config.final_rate) == (
        torch.float64, "linear", 0.0
    )  # fmt: skip
    wanted = [
        parameter
        for name, parameter in model.named_parameters()
        if name.startswith("blocks.") and parameter.dim() == 2
    ]
    (matrices,), (rest,) = muon.param_groups, adamw.param_groups
    assert list(map(id, matrices["params"])) == list(map(id, wanted))
    everything = {*map(id, matrices["params"]), *map(id, rest["params"])}
    assert everything == set(map(id, model.parameters()))
    assert (matrices["lr"], rest["lr"]) == (0.1, 0.01)
    assert (matrices["weight_decay"], rest["weight_decay"]) == (0.3, 0.0)
    assert (matrices["momentum"], matrices["ns_steps"]) == (0.9, 4)


@pytest.mark.parametrize("rate", [0.0, -1.0, math.inf, math.nan])
def test_impossible_rates_of_muon_are_refused(rate):
    with pytest.raises(ValueError, match="matrix_learning_rate must be"):
        MuonConfig(matrix_learning_rate=rate)
    with pytest.raises(ValueError, match="learning_rate must be"):
        MuonConfig(learning_rate=rate)


def test_the_chapter_shows_the_recorded_ladder():
    book = Path(__file__).parent.parent / "book"
    record = json.loads((book / "runs" / "ladder.json").read_text("utf-8"))["rungs"]
    chapter = json.loads((book / "14_after_gpt2.ipynb").read_text("utf-8"))
    sources = {cell["id"]: "".join(cell["source"]) for cell in chapter["cells"]}
    shown: dict = {}
    exec(sources["ladder-numbers"], shown)
    for (*row, tried), rung in zip(shown["LADDER"], record, strict=True):
        assert row == [rung[key] for key in ("name", "from", "rate", "losses")]
        assert {str(rate): loss for rate, loss in tried.items()} == rung["tried"]
    assert shown["BRANCHES"] == [rung["name"] for rung in record if rung["branch"]]
    assert all(len(rung["losses"]) == 3 <= len(rung["tried"]) for rung in record)


def test_kept_rotary_tables_grow_and_serve_training_after_writing():
    """They begin short and follow the longest text; training may use them later."""
    torch.manual_seed(0)
    config = ModernConfig(31, context=64, layers=1, heads=2, width=8)
    model = ModernGPT(config)
    ids = torch.randint(31, (1, 60))
    with torch.inference_mode():
        short = model(ids[:, :3])
    assert model.tables[0].shape[-2] == 6
    whole = model(ids)
    whole.sum().backward()
    positions = torch.arange(60)
    explicit = model.head(model.hidden_states(ids, positions))
    assert torch.equal(whole, explicit)
    torch.testing.assert_close(short, whole[:, :3])
    assert model.tables[0].shape[-2] == 64
    assert not any("table" in name for name in model.state_dict())
