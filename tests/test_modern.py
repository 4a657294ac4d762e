"""What came after GPT-2: each choice by itself, and what its checks refuse."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from answers.modern import mean_of_heads, pool
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

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
    muon_optimizers,
    orthogonalize,
    rotary_tables,
    squared_relu,
)
from glassgpt.training import rate_at

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


def test_squared_relu_is_the_square_of_what_is_above_zero():
    x = torch.tensor([-2.0, -0.5, 0.0, 0.5, 3.0])
    assert squared_relu(x).tolist() == [0, 0, 0, 0.25, 9]


@torch.no_grad()
def test_with_the_choices_of_gpt2_it_is_gpt2():
    ours = GPT(GPTConfig(**SIZES)).double()
    for parameter in ours.parameters():
        parameter.normal_(0.0, 0.4)
    same = ModernGPT(ModernConfig(**SIZES, **GPT2_CHOICES)).double()
    same.load_state_dict(ours.state_dict())
    ids = torch.randint(13, (2, 10))
    assert torch.equal(ours(ids), same(ids))


@every_choice
@torch.no_grad()
def test_each_choice_does_what_it_says(choices):
    model, ids = random_model(choices), torch.randint(13, (2, 10))
    logits = model(ids)
    assert logits.shape == (2, 10, 13)
    caches = [KeyValueCache(10) for _ in range(2)]
    parts = [model(part, caches=caches) for part in ids.split((4, 1, 5), dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), logits)
    heads = model.config.key_value_heads or 2
    assert caches[0].keys.shape == (2, heads, 10, 8)

    changed = ids.clone()
    changed[:, 6] = (ids[:, 6] + 1) % 13
    torch.testing.assert_close(model(changed)[:, :6], logits[:, :6])
    assert not torch.allclose(model(changed)[:, 6:], logits[:, 6:])

    positions = torch.tensor([[0, 1, 2, 3, 4, 5], [0, 3, 4, 5, 7, 9]])
    together = model.hidden_states(ids[:, :6], positions)
    for row in range(2):
        alone = model.hidden_states(ids[row, None, :6], positions[row])
        torch.testing.assert_close(together[row, None], alone)
    usual = model.hidden_states(ids[:, :6])
    assert not torch.allclose(together[1], usual[1], atol=1e-3)
    moved = model.hidden_states(ids[:, :6], torch.arange(6) + 3)
    alike = torch.allclose(moved, usual, atol=1e-4)
    assert alike == (model.config.positions == "rotary")
    for parameter in model.blocks[0].attention.qkv.parameters():
        parameter[:16] *= 10  # the rows of queries
    assert torch.allclose(model(ids), logits) == model.config.normalize_qk


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


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"positions": "absolute"},
            r"positions must be one of \(.rotary., .learned.\)",
        ),
        ({"norm": "batch"}, "norm must be one of"),
        ({"activation": "relu"}, "activation must be one of .*squared_relu"),
        ({"rotary_base": math.nan}, "rotary_base must be positive and finite"),
        ({"norm_eps": -1e-5}, "norm_eps must be positive and finite"),
        ({"hidden": 0}, "hidden must be positive"),
        ({"hidden": 32.0}, "hidden must be a whole number"),
        ({"key_value_heads": True}, "key_value_heads must be a whole number"),
        ({"key_value_heads": -1}, "key_value_heads must be positive"),
        ({"heads": 4, "key_value_heads": 3}, "4 heads can't share 3 key-value heads"),
        ({"width": 6}, "even head width: 3"),
        ({"layers": 0}, "layers must be a whole number"),
    ],
)
def test_config_refuses_the_impossible(values, message):
    with pytest.raises(ValueError, match=message):
        ModernConfig(**SIZES | values)


def test_far_positions_are_as_exact_as_float32():
    cos, sin = rotary_tables(torch.arange(100_001), 4, base=100.0)
    assert cos[-1, 1].item() == pytest.approx(math.cos(10_000), abs=1e-7)
    assert sin[-1, 0].item() == pytest.approx(math.sin(100_000), abs=1e-7)


def test_pooled_heads_that_were_equal_already_change_nothing():
    torch.manual_seed(0)
    sizes = {"vocab_size": 9, "context": 5, "layers": 1, "heads": 4, "width": 16}
    many = ModernAttention(ModernConfig(**sizes)).double()
    few = ModernAttention(ModernConfig(**sizes, key_value_heads=2)).double()
    with torch.no_grad():
        for part in many.qkv.weight[16:].view(2, 2, 2, 4, 16):
            part[:, 1] = part[:, 0]
        few.qkv.weight.copy_(pool(mean_of_heads)(many.qkv.weight, heads=4, groups=2))
        few.projection.load_state_dict(many.projection.state_dict())
        x = torch.randn(2, 5, 16).double()
        torch.testing.assert_close(few(x), many(x))


MUON_SHAPES = ((12, 4), (4, 16), (4, 4), (12, 4), (4, 16))


def muon_steps(optimizer, steps=4, idle=(), **settings):
    """Matrices after some steps; those in `idle` never have a gradient."""
    generator = torch.Generator().manual_seed(3)
    matrices = [
        torch.nn.Parameter(torch.randn(shape, generator=generator))
        for shape in MUON_SHAPES
    ]
    made = optimizer(matrices, 0.1, 0.2, **settings)
    for _ in range(steps):
        for place, matrix in enumerate(matrices):
            gradient = torch.randn(matrix.shape, generator=generator)
            matrix.grad = None if place in idle else gradient
        made.step()
    return [matrix.detach() for matrix in matrices], made


@pytest.mark.parametrize("rounds", [0, 1, 2, 5])
@pytest.mark.parametrize("shape", [(3, 7), (7, 3)])
def test_two_rounds_at_a_time_are_single_rounds(shape, rounds):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)).double()
    x = matrix / matrix.norm()
    for _ in range(rounds):
        square = x @ x.mT
        x = 3.4445 * x - 4.7750 * square @ x + 2.0315 * square @ square @ x
    assert torch.allclose(orthogonalize([matrix], rounds, torch.float64)[0], x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_muon_is_torchs_and_leaves_out_what_has_no_gradient(dtype):
    ours, made = muon_steps(Muon, idle=(1, 2), dtype=dtype)
    torchs = {"momentum": 0.9, "ns_steps": 4}
    theirs, _ = muon_steps(torch.optim.Muon, idle=(1, 2), **torchs)
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == torch.float32
        assert torch.allclose(one, other, atol=0.03)
    assert len(made.state) == 3


def test_muon_multiplies_in_its_own_precision():
    exact, _ = muon_steps(Muon, dtype=torch.float64)
    for dtype, error in ((torch.float32, 1e-5), (torch.bfloat16, 0.03)):
        found, _ = muon_steps(Muon, dtype=dtype)
        pairs = zip(found, exact, strict=True)
        worst = max((one - other).abs().max() for one, other in pairs)
        assert error / 100 < worst < error


def test_two_optimizers_share_the_parameters():
    model = ModernGPT(ModernConfig(**SIZES, **GPT2_CHOICES))
    config = MuonConfig(
        learning_rate=0.01, matrix_learning_rate=0.1, weight_decay=0.3, beta2=0.95
    )
    muon, adamw = muon_optimizers(model, config, torch.float64)
    assert muon.dtype == torch.float64
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
    assert rest["betas"] == (0.9, 0.95)
    assert (matrices["momentum"], matrices["ns_steps"]) == (0.9, 4)


def test_the_rate_of_muon_falls_to_0():
    assert rate_at(99, MuonConfig(steps=100, warmup=0)) < 0.02


def test_an_impossible_rate_of_muon_is_refused():
    with pytest.raises(ValueError, match="matrix_learning_rate must be"):
        MuonConfig(matrix_learning_rate=math.nan)


@pytest.fixture(scope="module")
def recorded():
    record = Path(__file__).parent.parent / "book" / "runs" / "ladder.json"
    return json.loads(record.read_text("utf-8"))["rungs"]


def test_the_chapter_shows_the_recorded_ladder(recorded):
    shown = ladder_of_the_chapter()
    for (*row, tried), rung in zip(shown["LADDER"], recorded, strict=True):
        assert row == [rung[key] for key in ("name", "from", "rate", "losses")]
        assert {str(rate): loss for rate, loss in tried.items()} == rung["tried"]
    assert shown["BRANCHES"] == [rung["name"] for rung in recorded if rung["branch"]]
    assert all(len(rung["losses"]) == 3 <= len(rung["tried"]) for rung in recorded)


def ladder_of_the_chapter():
    """The names that the chapter's cell of records defines."""
    path = Path(__file__).parent.parent / "book" / "14_after_gpt2.ipynb"
    cells = json.loads(path.read_text("utf-8"))["cells"]
    shown: dict = {}
    exec(*("".join(c["source"]) for c in cells if c["id"] == "ladder-numbers"), shown)
    return shown


def test_the_text_says_what_the_ladder_shows(recorded):
    losses = {rung["name"]: rung["losses"] for rung in recorded}
    before = {rung["name"]: rung["from"] for rung in recorded}
    means = {name: sum(three) / 3 for name, three in losses.items()}
    gains = {name: means[name] - means[old] for name, old in before.items() if old}
    spread = {name: max(three) - min(three) for name, three in losses.items()}
    assert max(spread, key=spread.get) == "GPT-2, AdamW"
    assert gains["rotary positions"] < -2.9 * spread["GPT-2, AdamW"]
    assert min(gains, key=gains.get) == "Muon"
    for name, change, digits in (
        ("rotary positions", -0.19, 2),
        ("RMS norm, no biases", 0.008, 3),
        ("squared ReLU", -0.08, 2),
        ("2 key-value heads of 4", 0.015, 3),
        ("1 key-value head of 4", 0.026, 3),
        ("zero projections", 0.02, 2),
        ("untied head, random start", 0.01, 2),
        ("untied head", 0.17, 2),
        ("Muon, tied head", 0.0, 2),
        ("Muon, random start", 0.0, 2),
    ):
        assert round(gains[name], digits) == change, name
    for name, mean in (
        ("normalized queries and keys", 2.075),
        ("SwiGLU", 2.021),
        ("Llama, AdamW", 2.064),
        ("GPT-2, Muon", 1.952),
    ):
        assert round(means[name], 3) == mean, name
    for better, worse, apart in (
        ("SwiGLU", "normalized queries and keys", 0.05),
        ("untied head, random start", "untied head", 0.16),
        ("Muon", "squared ReLU", 0.16),
        ("Muon", "GPT-2, Muon", 0.11),
    ):
        assert round(means[worse] - means[better], 2) == apart, better
    best = min((name for name in means if "Muon" not in name), key=means.get)
    assert best == "squared ReLU"
    whole = means["Muon"] - means["GPT-2, AdamW"]
    assert 0.72 < gains["GPT-2, Muon"] / whole < 0.77
    longer = ladder_of_the_chapter()["LONGER"]
    assert round(min(longer.values()), 3) == 2.106
    assert round(losses["GPT-2, Muon"][0], 3) == 1.954
    for rung in recorded[2:4]:  # without normalized queries and keys, and with them
        rate, tried = rung["rate"], rung["tried"]
        lost = 0.01 if rung["name"].startswith("normalized") else 0.08
        assert round(tried[str(2 * rate)] - tried[str(rate)], 2) == lost


def test_the_text_says_what_pairs_of_one_seed_show(recorded):
    losses = {rung["name"]: rung["losses"] for rung in recorded}
    changes = {
        rung["name"]: [
            round(new - old, 4)
            for old, new in zip(losses[rung["from"]], rung["losses"], strict=True)
        ]
        for rung in recorded[1:]
    }
    for name, low, high in (
        ("normalized queries and keys", -0.017, -0.006),
        ("2 key-value heads of 4", 0.014, 0.016),
        ("1 key-value head of 4", 0.02, 0.032),
        ("zero projections", 0.013, 0.021),
    ):
        assert low <= min(changes[name]) <= max(changes[name]) <= high
    assert [c > 0 for c in changes["RMS norm, no biases"]] == [False, True, True]
    assert [round(c, 2) for c in changes["untied head, random start"]] == [0.02, 0, 0]
    assert [c > 0 for c in changes["Muon, random start"]] == [False, False, True]


def test_training_may_use_rotary_tables_that_writing_made():
    model = random_model({})
    with torch.inference_mode():
        model(torch.zeros(1, 3, dtype=torch.int64))
    model(torch.zeros(1, 6, dtype=torch.int64)).sum().backward()
    assert model.blocks[0].attention.qkv.weight.grad.any()
