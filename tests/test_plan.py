"""The machine: what is chosen for it, what training computes on it, what it costs."""

import json
import math
import os
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path
from shutil import which
from unittest.mock import Mock, patch

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode

from glassgpt import plan as module
from glassgpt.data import TokenData
from glassgpt.gpt import GPT, GPTConfig
from glassgpt.heads import fused_attention
from glassgpt.modern import LLAMA_CHOICES, ModernConfig, MuonConfig, build
from glassgpt.plan import (
    SIZES,
    Machine,
    Plan,
    ScaledTrainer,
    count,
    make_loss,
    make_plan,
    pick_device,
    pick_precision,
    short_attention,
)
from glassgpt.training import TrainConfig, Trainer, token_loss, train

needs_compiler = pytest.mark.skipif(
    not which("cl" if os.name == "nt" else "c++"), reason="needs a C++ compiler"
)
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SHAPE = GPTConfig(11, context=8, layers=2, heads=2, width=16)
TRAINING = TrainConfig(steps=6, batch_size=4, warmup=3, evaluate_every=3)
IDS = [n * n % 11 for n in range(400)]
DATA = TokenData.of(IDS[:300], IDS[300:], 11)
LONG = TokenData.of(2 * IDS, IDS, 11)


def trained(steps=3, training=TRAINING, model=SHAPE, **machine):
    """A trainer after a few steps."""
    trainer = Plan(model, training, Machine(**machine)).trainer(DATA)
    for _ in range(steps):
        trainer.take_step()
    return trainer


def weights(trainer):
    return torch.nn.utils.parameters_to_vector(trainer.model.parameters()).detach()


@pytest.fixture
def gpu(monkeypatch):
    """Makes code that asks for capability and memory of a GPU find such a one."""

    def pretend(capability, gigabytes=40):
        about = type("Properties", (), {"total_memory": int(gigabytes * 1e9)})
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: about)
        monkeypatch.setattr(module, "pick_device", lambda name: CUDA)

    return pretend


# What is chosen.


def test_a_device_that_is_not_here(monkeypatch):
    with pytest.raises(ValueError, match="no device 'abacus'"):
        pick_device("abacus")
    listed = torch.device("cuda", 99)  # and can't add
    monkeypatch.setattr(
        torch.accelerator, "current_accelerator", lambda check_available: listed
    )
    with pytest.raises(ValueError, match="no device 'cuda:99'"):
        pick_device()
    monkeypatch.setattr(
        torch.accelerator, "current_accelerator", lambda check_available: None
    )
    assert pick_device() == CPU


@pytest.mark.parametrize(
    ("capability", "precision"),
    [
        ((6, 1), "float32"),
        ((7, 0), "float16"),
        ((7, 5), "float16"),
        ((8, 0), "bfloat16"),
    ],
)
def test_a_gpu_says_which_units_it_has(gpu, capability, precision):
    gpu(capability)
    assert pick_precision(CUDA) == precision


@pytest.mark.parametrize(
    ("seconds", "precision"), [(1.0, "float32"), (0.5, "bfloat16")]
)
def test_a_cpu_multiplies_in_16_bits_where_that_is_faster(
    monkeypatch, seconds, precision
):
    times = {torch.float32: 1.0, torch.bfloat16: seconds}
    monkeypatch.setattr(module, "seconds_of_product", times.__getitem__)
    assert pick_precision(CPU) == precision
    assert pick_precision(torch.device("mps")) == "float32"


def test_a_plan_leaves_the_draws_of_a_run():
    before = torch.get_rng_state()
    make_plan(80, device="cpu")
    assert torch.equal(torch.get_rng_state(), before)


def test_defaults_on_a_cpu():
    plan = make_plan(80, device="cpu")
    assert plan.model == GPTConfig(80, context=64, layers=4, heads=4, width=128)
    assert plan.training.batch_size == 16
    assert isinstance(plan.training, MuonConfig)
    assert plan.machine == Machine(precision=plan.machine.precision)


@pytest.mark.parametrize("size", SIZES)
def test_sizes(size, monkeypatch):
    monkeypatch.setattr(os, "sysconf", lambda name: 1 << 20)  # a tebibyte
    model = make_plan(80, size, device="cpu").model
    assert (model.layers, model.heads, model.width) == SIZES[size]


def test_recipes():
    sizes = {"context": 64, "layers": 4, "heads": 4, "width": 128}
    plan = make_plan(80, recipe="modern", device="cpu")
    assert plan.model == ModernConfig(80, **sizes)
    assert (plan.training.schedule, plan.training.final_rate) == ("linear", 0)
    plan = make_plan(80, recipe="llama", device="cpu", optimizer="adamw")
    assert plan.model == ModernConfig(80, **sizes, **LLAMA_CHOICES)
    assert type(plan.training) is TrainConfig
    model = make_plan(80, device="cpu", norm="rms").model  # one choice, else GPT-2
    assert isinstance(model, ModernConfig)
    assert (model.norm, model.activation, model.tied) == ("rms", "gelu", True)


@given(st.sampled_from(["adamw", "muon"]), st.integers(1, 100))
def test_the_learning_rate_falls_with_the_width(optimizer, heads):
    values = {"optimizer": optimizer, "heads": heads, "width": 8 * heads}
    plan = make_plan(80, device="cpu", precision="float32", layers=1, **values)
    rate = 0.8 if optimizer == "muon" else 0.4
    assert plan.training.learning_rate == pytest.approx(rate / (8 * heads))


@given(
    st.fixed_dictionaries(
        {"steps": st.integers(1, 300)},
        optional={
            "layers": st.integers(1, 3),
            "batch_size": st.integers(1, 9),
            "learning_rate": st.floats(1e-5, 1),
            "compile": st.sampled_from(["off", "blocks", "all"]),
            "recompute": st.booleans(),
            "bias": st.booleans(),
        },
    )
)
@example({"steps": 1, "bias": True})
def test_given_values_win(given):
    plan = make_plan(80, device="cpu", precision="float32", **given)
    found = asdict(plan.model) | asdict(plan.training) | asdict(plan.machine)
    assert given.items() <= found.items()
    assert plan.training.warmup == min(50, given["steps"] // 10)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"size": "huge"}, "micro"),
        ({"recipe": "bert"}, "modern"),
        ({"optimizer": "sgd"}, "adamw, muon"),
        ({"learnig_rate": 1.0}, "learnig_rate"),
        ({"optimizer": "adamw", "matrix_learning_rate": 1.0}, "adamw has no mat"),
        ({"width": 10}, "width"),
        ({"width": 10**12}, "too large to count"),
        ({"precision": "int4"}, "precision"),
        ({"compile": "yes"}, "compile"),
        ({"device": "abacus"}, "abacus"),
    ],
)
def test_what_does_not_exist(wrong, message):
    with pytest.raises(ValueError, match=message):
        make_plan(80, **{"device": "cpu", **wrong})


def test_a_run_that_memory_can_not_hold_is_refused(monkeypatch):
    values = {"device": "cpu", "context": 512, "batch_size": 32, "steps": 10}
    normal = make_plan(80, **values)
    monkeypatch.setattr(os, "sysconf", lambda name: math.isqrt(normal.memory) - 1)
    assert make_plan(80, **values).training.accumulate > 1
    with pytest.raises(ValueError, match="lower width"):
        make_plan(80, **values, recompute=False, accumulate=1)
    assert make_plan(80, **values, accumulate=1).machine.recompute


def test_a_small_gpu(gpu):
    gpu((7, 5), 15.8)
    plan = make_plan(1024)
    assert (plan.model.layers, plan.model.width) == (6, 384)
    per_parameter = plan.tokens / count(plan.model)[0]
    assert 20 <= per_parameter < 20.1
    assert plan.training.beta2 == 0.99
    assert plan.machine.precision == "float16"
    assert type(plan.training) is TrainConfig
    plan = make_plan(50_257, "medium")  # the batch is split until it fits
    assert plan.training.batch_size == 512
    assert (
        f"batches of 512 in {plan.training.accumulate} micro-batches" in plan.describe()
    )
    plan = make_plan(50_257, "medium", context=8192)  # one sequence is too much
    assert plan.training.accumulate == plan.training.batch_size
    assert plan.machine.recompute
    assert "recomputed" in plan.describe()
    assert make_plan(50_257, "xl", gpus=4).memory < 4 * 13.5e9
    for size, values in (("xl", {}), ("medium", {"context": 8192, "recompute": False})):
        with pytest.raises(ValueError, match="13.4 there for tensors"):
            make_plan(50_257, size, **values)


def test_a_large_gpu(gpu):
    gpu((9, 0), 85)
    plan = make_plan(50_257)
    assert plan.model == GPTConfig(50_257)
    assert plan.machine.compile == "all"
    assert plan.memory < 85e9
    tokens = plan.training.batch_size * plan.model.context
    assert tokens == 2**19
    assert plan.training.accumulate > 1
    assert 0 <= plan.tokens - 20 * count(plan.model)[0] < tokens
    assert (plan.training.beta1, plan.training.beta2) == (0.9, 0.95)
    assert make_plan(50_257, steps=7, beta2=0.9).training.steps == 7
    half = make_plan(50_257, batch_size=256).training
    assert 1 < half.steps / plan.training.steps < 2.01


class Formats(TorchDispatchMode):
    """Notes in which formats matrices are multiplied."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, call, types, arguments=(), named=None):
        if "attention" in call.__name__ or "mm" in call.__name__:
            self.found |= {x.dtype for x in arguments if isinstance(x, torch.Tensor)}
        return call(*arguments, **(named or {}))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_small_gpu_never_multiplies_in_bfloat16(gpu, optimizer):
    """It would emulate it, and has a fused attention for float16 only."""
    gpu((7, 5), 15.8)
    values = {"layers": 1, "heads": 2, "width": 16, "batch_size": 2}
    plan = make_plan(11, context=264, optimizer=optimizer, **values)
    plan = replace(plan, machine=replace(plan.machine, device="cpu", compile="off"))
    trainer = plan.trainer(LONG)
    with Formats() as formats:
        trainer.take_step()
    assert torch.float16 in formats.found
    assert torch.bfloat16 not in formats.found


# What training computes.


@pytest.mark.parametrize("config", [SHAPE, ModernConfig(**asdict(SHAPE))])
def test_the_loss_is_that_of_chapter_12(config):
    torch.manual_seed(0)
    model, ids = build(config), torch.randint(11, (3, 8))
    usual = token_loss(model)(ids, ids)
    torch.testing.assert_close(make_loss(model, Machine())(ids, ids), usual)
    for precision in ("bfloat16", "float16"):
        narrow = make_loss(model, Machine(precision=precision))(ids, ids)
        assert narrow.dtype == torch.float32
        torch.testing.assert_close(narrow, usual, atol=0.05, rtol=0)


@pytest.mark.parametrize("shared", [1, 2])
@pytest.mark.parametrize("queries", [1, 5, 8])
def test_short_attention_is_attention(shared, queries):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, 8, 6, dtype=torch.float64) for _ in range(3))
    q, k, v = q[:, :, -queries:], k[:, ::shared], v[:, ::shared]
    found = short_attention(q.requires_grad_(), k, v)
    torch.testing.assert_close(found, fused_attention(q, k, v))
    mask = torch.rand(queries, 8) < 0.7
    mask[:, 0] = True
    found = short_attention(q, k, v, mask)
    torch.testing.assert_close(found, fused_attention(q, k, v, mask))
    assert (short_attention(q, k, v, dropout=0.5) != found).any()


def test_short_attention_is_for_few_bits_and_short_contexts_on_a_cpu():
    assert Machine(precision="bfloat16").suits_short_attention(256)
    assert not Machine(precision="bfloat16").suits_short_attention(257)
    assert not Machine(precision="float32").suits_short_attention(256)
    assert not Machine("cuda", precision="bfloat16").suits_short_attention(256)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", [GPTConfig, ModernConfig])
def test_recomputing_learns_the_same(precision, kind):
    model = kind(11, context=8, layers=2, heads=2, width=16, dropout=0.1)
    plain = trained(model=model, precision=precision)
    again = trained(model=model, precision=precision, recompute=True)
    assert torch.equal(weights(plain), weights(again))


def test_a_split_batch_learns_the_same():
    parts = trained(training=replace(TRAINING, accumulate=2))
    torch.testing.assert_close(weights(trained()), weights(parts), atol=1e-5, rtol=1e-4)


@needs_compiler
@pytest.mark.parametrize(
    ("scope", "recompute", "kind"),
    [
        ("blocks", True, GPTConfig),
        ("blocks", False, ModernConfig),
        ("all", False, GPTConfig),
        ("all", True, ModernConfig),
    ],
)
def test_compiled_trains_like_plain(scope, recompute, kind):
    model = kind(11, context=8, layers=2, heads=2, width=16)
    fast = trained(2, model=model, compile=scope, recompute=recompute)
    plain = trained(2, model=model)
    torch.testing.assert_close(weights(plain), weights(fast), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("scope", ["blocks", "all"])
@pytest.mark.parametrize("early", [True, False])
def test_without_a_compiler_it_goes_on(early, scope):
    """It fails at once, or with the model."""
    failing = Mock(side_effect=RuntimeError("no C++ compiler\nat all"))
    with (
        patch("torch.compile", failing if early else Mock(return_value=failing)),
        pytest.warns(UserWarning, match=r"no C\+\+ compiler at all"),
    ):
        slow = trained(compile=scope)
    assert torch.equal(weights(trained()), weights(slow))


def test_an_error_of_the_model_is_no_error_of_the_compiler():
    model = GPT(SHAPE)
    model.blocks[0].mlp = None
    ids = torch.zeros(1, 4, dtype=torch.int64)
    loss = make_loss(model, Machine(compile="all"))
    with pytest.raises(TypeError, match="callable"):
        loss(ids, ids)


@needs_compiler
def test_only_training_is_compiled():
    programs, real = [], torch.compile

    def backend(graph, inputs):
        programs.append(graph)
        return graph

    torch.compiler.reset()
    with patch("torch.compile", lambda function, **_: real(function, backend=backend)):
        trainer = trained(1, compile="all")
    assert programs
    programs.clear()
    trainer.evaluate()
    with torch.no_grad():
        trainer.model(torch.zeros(1, 5, dtype=torch.int64))
    assert not programs


# float16 and its scale.


def spoiled(trainer, value, at):
    """Let the gradient of the loss be a value, the first `at` times."""
    loss, left = trainer.loss, [at]

    def wrong(*batch):
        result = loss(*batch)
        if left[0] and torch.is_grad_enabled():
            left[0] -= 1
            result.register_hook(lambda gradient: gradient * value)
        return result

    trainer.loss = wrong
    return trainer


@pytest.mark.parametrize("training", [TRAINING, MuonConfig(**asdict(TRAINING))])
def test_float16_skips_a_step_whose_gradient_overflows(training):
    trainer = spoiled(trained(0, training, precision="float16"), math.inf, at=1)
    assert isinstance(trainer, ScaledTrainer)
    before, scale = weights(trainer), trainer.scaler.get_scale()
    trainer.take_step()
    trainer.read_losses()  # a skipped step is no error
    assert torch.equal(weights(trainer), before)
    assert trainer.scaler.get_scale() == scale / 2
    trainer.take_step()
    assert not torch.equal(weights(trainer), before)


def test_float16_that_never_steps_is_told():
    training = replace(TRAINING, steps=30, evaluate_every=30)
    trainer = spoiled(trained(0, training, precision="float16"), math.inf, at=30)
    with pytest.raises(FloatingPointError, match="not finite"):
        train(trainer, progress=False)


def test_a_scaled_run_goes_on_where_it_was():
    whole = spoiled(trained(0, precision="float16"), math.inf, at=2)
    for _ in range(3):
        whole.take_step()
    other = trained(0, precision="float16")
    other.load_state_dict(deepcopy(whole.state_dict()))
    assert other.scaler.get_scale() == whole.scaler.get_scale()
    for trainer in (whole, other):
        trainer.take_step()
    assert torch.equal(weights(whole), weights(other))
    elsewhere = trained(0)  # a machine with another precision takes the rest
    elsewhere.load_state_dict(whole.state_dict())
    assert type(elsewhere) is Trainer
    assert elsewhere.step == 4


# Counting.


def peak_of(plan):
    """Bytes of tensors at the peak of two steps, the model's making counted in."""
    with profile(profile_memory=True) as profiler:
        trainer = plan.trainer(LONG)
        for _ in range(2):
            trainer.take_step()
    events = profiler.profiler.kineto_results.events()
    events = [event for event in events if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


LLAMA = {**LLAMA_CHOICES, "key_value_heads": 2, "hidden": 200}


@pytest.mark.parametrize(
    ("kind", "choices", "context", "precision", "recompute"),
    [
        (GPTConfig, {}, 64, "float32", False),
        (GPTConfig, {}, 256, "bfloat16", False),  # a table for each head
        (ModernConfig, {}, 64, "float32", True),
        (ModernConfig, {}, 280, "bfloat16", False),
        (ModernConfig, LLAMA, 280, "float32", False),
        (ModernConfig, LLAMA, 280, "bfloat16", True),
    ],
)
def test_memory_is_estimated_closely(kind, choices, context, precision, recompute):
    config = kind(80, context=context, layers=3, heads=4, width=64, **choices)
    machine = Machine(precision=precision, recompute=recompute)
    plan = Plan(config, replace(TRAINING, batch_size=4), machine)
    assert 0.8 < plan.memory / peak_of(plan) < 1.25


def test_a_split_batch_takes_less_memory():
    model = GPTConfig(80, context=128, layers=3, heads=4, width=64)
    whole, split = (
        Plan(model, replace(TRAINING, batch_size=8, accumulate=n), Machine())
        for n in (1, 4)
    )
    assert split.memory < 0.5 * whole.memory
    assert 0.8 < split.memory / peak_of(split) < 1.25


def test_without_targets_the_loss_is_0_and_so_is_its_gradient():
    model = GPT(SHAPE)
    ids = torch.zeros(1, 4, dtype=torch.int64)
    loss = make_loss(model, Machine())(ids, torch.full_like(ids, -100))
    loss.backward()
    assert loss == 0
    assert not model.tokens.weight.grad.any()


def test_the_chapter_shows_the_recorded_speeds():
    book = Path(__file__).parents[1] / "book"
    record = json.loads((book / "runs" / "speed.json").read_text("utf-8"))
    sizes = [record["tokens per second"][size] for size in ("small", "larger")]
    cells = json.loads((book / "15_full_gpt.ipynb").read_text("utf-8"))["cells"]
    (ladder,) = (cell["source"] for cell in cells if cell["id"] == "faster-ladder")
    shown: dict = {}
    exec("".join(ladder), shown)
    for how, told in shown["SPEEDS"].items():
        memory = "kept" if how == "and memory kept" else "given back"
        dtype, *more = ("bfloat16, compiled" if memory == "kept" else how).split(", ")
        name = f"glassgpt GPT-2, {' '.join(more) or 'eager'} {dtype}"
        assert told == tuple(round(rows[name][memory]) for rows in sizes)
    for dtype, speed in shown["PRODUCTS"].items():
        assert speed == 1e9 * record["machine"][f"GFLOP/s {dtype}"]
    assert record["machine"]["threads"] == 2
    assert "avx512_bf16" in record["machine"]["16-bit units"]


def test_a_description():
    training = MuonConfig(steps=1000, batch_size=4, matrix_learning_rate=0.03)
    machine = Machine(precision="bfloat16", compile="all")
    text = Plan(SHAPE, training, machine).describe()
    assert "GPT-2: 0.01 M parameters, 2 layers, 2 heads, width 16, context 8\n" in text
    assert "1,000 steps, 0.0 M tokens" in text
    assert "muon, rate 0.03 (adamw, rate 0.003), batches of 4\n" in text
    assert "cpu, bfloat16, compile all: about" in text
    other = make_plan(80, device="cpu", positions="rotary").describe()
    assert other.startswith("model   modern, not GPT-2: ")
