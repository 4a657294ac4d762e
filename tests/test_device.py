"""Plans: what is chosen for a machine, what is refused, and what a run will cost."""

import math
import os
from dataclasses import replace

import pytest
import torch

from glassgpt import device as module
from glassgpt.checkpoints import build
from glassgpt.checks.device import (
    check_days,
    check_fit_batch,
    check_precision,
    check_rounding,
    check_scale,
)
from glassgpt.device import (
    DATA_SHEETS,
    SIZES,
    Plan,
    fit_batch,
    gpu_precision,
    make_plan,
    measure_flops,
    memory_needed,
    peak_flops,
    pick_device,
    pick_precision,
)
from glassgpt.gpt import GPT, GPTConfig
from glassgpt.modern import ModernConfig
from glassgpt.training import (
    TrainConfig,
    make_loss,
    short_attention,
    suits_short_attention,
    use_attention,
)


class FakeCard:
    """A GPU by name, capability and memory, for code that only asks for these."""

    def __init__(self, monkeypatch, name, capability, gigabytes):
        properties = type("Properties", (), {"total_memory": int(gigabytes * 1e9)})
        cuda = torch.cuda
        monkeypatch.setattr(cuda, "is_available", lambda: True)
        monkeypatch.setattr(cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(cuda, "get_device_name", lambda device: name)
        monkeypatch.setattr(cuda, "get_device_properties", lambda device: properties)


@pytest.fixture
def fast_cpu(monkeypatch):
    """A CPU whose speed is known, so that nothing is timed."""
    speeds = {torch.float32: 1e11, torch.bfloat16: 3e11}
    monkeypatch.setattr(module, "measure_flops", lambda device, dtype: speeds[dtype])
    return speeds


def test_checks_pass():
    check_precision(gpu_precision)
    check_fit_batch(fit_batch)


@pytest.mark.parametrize(
    ("check", "wrong", "message"),
    [
        (check_precision, lambda c: "bfloat16", "emulated"),
        (check_precision, lambda c: "float16", "not bfloat16"),
        (check_fit_batch, lambda m, t, b: t, "does not fit"),
        (check_days, lambda N, t, p, u: 2 * N * t / (u * p) / 86_400, "forward"),
        (check_days, lambda N, t, p, u: 6 * N * t / p / 86_400, "missing"),
        (check_days, lambda N, t, p, u: 6 * N * t / (u * p), "seconds"),
        (check_scale, lambda scale, streak, finite: (scale, streak + 1), "halves"),
        (check_days, lambda N, t, p, u: 120 * N * N / (u * p) / 86_400, "days, not"),
        (
            check_scale,
            lambda scale, streak, finite: (
                (scale * 2, 0)
                if streak == 1999
                else ((scale, streak + 1) if finite else (scale / 2, 0))
            ),
            "infinite at the 2,000th step",
        ),
        (
            check_fit_batch,
            lambda m, t, b: (
                fit_batch(m, replace(t, accumulate=1), b)
                if b < memory_needed(m, t)
                else t
            ),
            "accumulate what you split off",
        ),
        (
            check_fit_batch,
            lambda m, t, b: (
                replace(found, learning_rate=1.0)
                if (found := fit_batch(m, t, b)) != t
                else t
            ),
            "only batch_size and accumulate",
        ),
        (
            check_precision,
            lambda c: (
                "bfloat16"
                if f"{c[0]}.{c[1]}" >= "8.0"
                else gpu_precision(min(c, (7, 5)))
            ),
            "B200",
        ),
        (
            check_scale,
            lambda scale, streak, finite: (
                (min(scale * 2, 2.0**16), 0)
                if streak == 1999 and finite
                else ((scale, streak + 1) if finite else (scale / 2, 0))
            ),
            "no bounds",
        ),
        (check_rounding, lambda x: float(round(x)), "1.7 became 2.0"),
        (check_rounding, lambda x: float(int(x)), "257.5"),
        (check_rounding, lambda x: x, "spacing"),
    ],
)
def test_checks_name_the_mistake(check, wrong, message):
    with pytest.raises(AssertionError, match=message):
        check(wrong)


def test_rounding_check_agrees_with_torch():
    check_rounding(lambda x: torch.tensor(x).bfloat16().item())


def test_the_learning_rate_falls_with_the_width():
    def rate(**values):
        plan = make_plan(80, device="cpu", precision="float32", **values)
        return plan.training.learning_rate

    assert rate(optimizer="adamw") == pytest.approx(0.4 / 128)
    assert rate(optimizer="adamw", size="mini") == pytest.approx(0.4 / 384)
    assert rate(optimizer="adamw", width=64) == pytest.approx(0.4 / 64)
    assert rate() == pytest.approx(0.8 / 128)  # Muon, since the run is short
    assert rate(learning_rate=0.005) == 0.005


@pytest.mark.parametrize("name", ["abacus", "cuda:99", "meta", ""])
def test_a_device_that_is_not_here(name):
    with pytest.raises(ValueError, match="device") as refused:
        pick_device(name)
    assert len(str(refused.value)) < 120


def test_the_best_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert pick_device() == torch.device("cpu")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick_device() == torch.device("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match="no device 'cuda' to use"):
        pick_device()  # it is listed, and can't add


class Works:
    """What adding two numbers on a GPU gives, without one."""

    device = torch.device("cuda")

    def add_(self, other):
        return self

    def item(self):
        return 2.0


def test_a_gpu_that_works(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "empty", lambda *_, device: Works)
    monkeypatch.setattr(torch, "ones", lambda *_, device: Works())
    assert pick_device() == pick_device("cuda") == torch.device("cuda")


@pytest.mark.parametrize(
    ("name", "capability", "precision", "peak"),
    [
        ("Tesla T4", (7, 5), "float16", 65e12),
        ("NVIDIA A100-SXM4-40GB", (8, 0), "bfloat16", 312e12),
        ("NVIDIA L4", (8, 9), "bfloat16", 121e12),
        ("NVIDIA H100 80GB HBM3", (9, 0), "bfloat16", 989e12),
        ("NVIDIA H100 PCIe", (9, 0), "bfloat16", 756e12),
        ("NVIDIA H100 NVL", (9, 0), "bfloat16", 835e12),
        ("NVIDIA H200 NVL", (9, 0), "bfloat16", 835e12),
        ("NVIDIA H200", (9, 0), "bfloat16", 989e12),
        ("Tesla V100-SXM2-16GB", (7, 0), "float16", 125e12),
        ("Tesla V100-PCIE-16GB", (7, 0), "float16", 112e12),
    ],
)
def test_known_cards(monkeypatch, name, capability, precision, peak):
    FakeCard(monkeypatch, name, capability, 40)
    device = torch.device("cuda")
    assert pick_precision(device) == precision
    assert peak_flops(device, precision) == peak
    monkeypatch.setattr(module, "measure_flops", lambda device, dtype: (dtype, 1.0))
    tf32 = peak_flops(device, "tf32")
    newer = capability >= (8, 0)  # than those without TF32, which are measured
    assert tf32 == (peak / 2 if newer else (torch.float32, 1.0))


def test_an_unknown_card_is_measured(monkeypatch, fast_cpu):
    FakeCard(monkeypatch, "NVIDIA L40S", (8, 9), 48)
    assert peak_flops(torch.device("cuda"), "bfloat16") == fast_cpu[torch.bfloat16]
    FakeCard(monkeypatch, "NVIDIA A100-SXM4-40GB MIG 1g.5gb", (8, 0), 5)
    assert peak_flops(torch.device("cuda"), "bfloat16") == fast_cpu[torch.bfloat16]
    FakeCard(monkeypatch, "NVIDIA L40S", (8, 9), 48)
    half = fast_cpu[torch.bfloat16] / 2
    assert peak_flops(torch.device("cuda"), "tf32") == half
    FakeCard(monkeypatch, "NVIDIA L4", (8, 9), 24)
    assert peak_flops(torch.device("cuda"), "float32") == fast_cpu[torch.float32]


def test_precision_of_a_cpu_is_measured(fast_cpu):
    assert pick_precision(torch.device("cpu")) == "bfloat16"
    fast_cpu[torch.bfloat16] = 1.2e11
    assert pick_precision(torch.device("cpu")) == "float32"
    assert pick_precision(torch.device("mps")) == "float32"


def test_measured_flops_are_plausible():
    assert 1e7 < measure_flops(torch.device("cpu"), torch.float32) < 1e15


def kept_bytes(model, ids, training):
    """Bytes of what the forward pass keeps, parameters aside."""
    if suits_short_attention(model.config.context, training):
        use_attention(model, short_attention)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        make_loss(model, training, stepping=True)(ids, ids)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("make", [GPTConfig, ModernConfig])
@pytest.mark.parametrize("context", [64, 256, 512])
def test_memory_is_estimated_closely(precision, make, context):
    config = make(80, context=context, layers=3, heads=2, width=64)
    model, ids = build(config), torch.zeros(4, context, dtype=torch.int64)
    training = TrainConfig(batch_size=4, precision=precision)
    counted = kept_bytes(model, ids, training)
    counted += 16 * model.parameter_count()  # what autocast copies is in the count
    assert 0.85 < memory_needed(config, training) / counted < 1.25


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_memory_with_recomputation(precision):
    config = GPTConfig(80, context=128, layers=12, heads=2, width=64)
    model, ids = GPT(config), torch.zeros(4, 128, dtype=torch.int64)
    training = TrainConfig(batch_size=4, precision=precision, recompute=True)
    plain = replace(training, recompute=False)
    whole, little = (kept_bytes(model, ids, how) for how in (plain, training))
    one = GPT(replace(config, layers=1))  # what the backward pass makes again, at once
    counted = little + kept_bytes(one, ids, plain) + 16 * model.parameter_count()
    assert little < whole / 4
    assert 0.67 < memory_needed(config, training) / counted < 1.5


@pytest.mark.usefixtures("fast_cpu")
class TestPlan:
    def test_defaults_on_a_cpu(self):
        plan = make_plan(80, device="cpu")
        assert plan.model == GPTConfig(80, context=64, layers=4, heads=4, width=128)
        assert plan.training.batch_size == 16
        assert plan.training.precision == "bfloat16"
        assert plan.peak_flops == 3e11

    @pytest.mark.parametrize("size", SIZES)
    def test_sizes(self, size, monkeypatch):
        monkeypatch.setattr(os, "sysconf", lambda name: 1 << 20)  # a tebibyte
        model = make_plan(80, size, device="cpu").model
        assert (model.layers, model.heads, model.width) == SIZES[size]

    def test_modern_recipe(self):
        plan = make_plan(80, recipe="modern", device="cpu")
        wanted = ModernConfig(80, context=64, layers=4, heads=4, width=128)
        assert plan.model == wanted
        assert plan.training.optimizer == "muon"
        assert plan.training.schedule == "linear"
        assert plan.training.final_rate == 0

    def test_given_values_win(self):
        values = {"optimizer": "adamw", "width": 64, "batch_size": 3, "bias": True}
        plan = make_plan(80, "mini", "modern", "cpu", heads=2, compile="all", **values)
        assert plan.training.optimizer == "adamw"
        assert (plan.model.width, plan.model.layers) == (64, 6)
        assert plan.model.bias is True
        assert plan.training.batch_size == 3
        assert plan.training.compile == "all"

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            ({"size": "huge"}, "micro"),
            ({"size": ""}, "size"),
            ({"recipe": "llama"}, "modern"),
            ({"learnig_rate": 1.0}, "learnig_rate"),
            ({"width": 10}, "width"),
            ({"steps": 0}, "steps"),
            ({"precision": "int4"}, "precision"),
            ({"device": "abacus"}, "abacus"),
        ],
    )
    def test_what_does_not_exist(self, wrong, message):
        with pytest.raises(ValueError, match=message):
            make_plan(80, **{"device": "cpu", **wrong})

    def test_only_long_runs_compile(self):
        for steps, wanted in ((10, "off"), (5000, "blocks"), (10**6, "all")):
            assert make_plan(80, device="cpu", steps=steps).training.compile == wanted

    def test_a_small_card(self, monkeypatch):
        FakeCard(monkeypatch, "Tesla T4", (7, 5), 15.8)
        monkeypatch.setattr(module, "pick_device", lambda name: torch.device("cuda"))
        plan = make_plan(1024)
        assert (plan.model.layers, plan.model.width) == (6, 384)
        assert plan.training.precision == "float16"
        assert plan.peak_flops == DATA_SHEETS["T4"]

    def test_a_batch_is_split_until_it_fits(self, monkeypatch):
        FakeCard(monkeypatch, "Tesla T4", (7, 5), 15.8)
        monkeypatch.setattr(module, "pick_device", lambda name: torch.device("cuda"))
        training = make_plan(50_257, "medium").training
        assert training.accumulate > 1
        assert training.accumulate * training.batch_size == 64
        assert make_plan(50_257, "medium", batch_size=8).training.accumulate == 1
        with pytest.raises(ValueError, match="smaller size"):
            make_plan(50_257, "xl")

    def test_a_batch_that_was_given_is_refused_where_it_does_not_fit(self, monkeypatch):
        FakeCard(monkeypatch, "Tesla T4", (7, 5), 15.8)
        monkeypatch.setattr(module, "pick_device", lambda name: torch.device("cuda"))
        with pytest.raises(ValueError, match="of which there are 16"):
            make_plan(50_257, "xl", batch_size=64)
        with pytest.raises(ValueError, match="of which there are 16"):
            make_plan(50_257, "medium", context=1024, batch_size=8, recompute=False)

    def test_what_may_not_recompute_does_not(self, monkeypatch):
        values = {"device": "cpu", "context": 512, "batch_size": 32}
        normal = make_plan(80, **values)
        needed = memory_needed(normal.model, normal.training)
        monkeypatch.setattr(os, "sysconf", lambda name: math.isqrt(needed) - 1)
        with pytest.raises(ValueError, match="lower width"):
            make_plan(80, **values, recompute=False)

    def test_what_compiling_needs_is_counted(self, monkeypatch):
        """A table of attention weights is kept in float32 only when compiled."""
        values = {"device": "cpu", "precision": "float32", "steps": 50_000}
        plain = make_plan(80, **values, compile="off")
        needed = memory_needed(plain.model, plain.training)
        monkeypatch.setattr(os, "sysconf", lambda name: math.isqrt(needed) + 1)
        assert not make_plan(80, **values, compile="off").training.recompute
        chosen = make_plan(80, **values).training
        assert chosen.compile != "off"
        assert chosen.recompute

    def test_a_gpu_compiles_the_whole_model_or_nothing(self, monkeypatch):
        FakeCard(monkeypatch, "NVIDIA H100 80GB HBM3", (9, 0), 85)
        monkeypatch.setattr(module, "pick_device", lambda name: torch.device("cuda"))
        assert make_plan(50_257, steps=50).training.compile == "off"
        assert make_plan(50_257, steps=2000).training.compile == "all"

    def test_recomputation_where_one_crop_is_too_much(self, monkeypatch):
        monkeypatch.setattr(module, "pick_device", lambda name: torch.device("cuda"))
        FakeCard(monkeypatch, "Tesla T4", (7, 5), 15.8)
        plan = make_plan(50_257, "medium", context=8192)
        assert (plan.training.batch_size, plan.training.recompute) == (1, True)
        assert "recomputed" in plan.describe()

    def test_recomputation_on_a_cpu(self, monkeypatch):
        values = {"device": "cpu", "context": 512, "batch_size": 32}
        normal = make_plan(80, **values)
        needed = memory_needed(normal.model, normal.training)
        monkeypatch.setattr(os, "sysconf", lambda name: math.isqrt(needed) - 1)
        assert make_plan(80, **values).training.recompute
        assert not normal.training.recompute

    def test_a_large_card(self, monkeypatch):
        FakeCard(monkeypatch, "NVIDIA H100 80GB HBM3", (9, 0), 85)
        monkeypatch.setattr(module, "pick_device", lambda name: torch.device("cuda"))
        plan = make_plan(50_257)
        assert plan.model == GPTConfig(50_257)
        assert plan.training.precision == "bfloat16"
        assert memory_needed(plan.model, plan.training) < 85e9


def test_cost_of_a_plan():
    model = GPTConfig(80, context=32, layers=2, heads=2, width=16)
    training = TrainConfig(steps=10, batch_size=4, accumulate=3)
    plan = Plan(model, training, torch.device("cpu"), 1e9)
    assert plan.tokens == 10 * 4 * 3 * 32
    assert plan.flops == plan.tokens * GPT(model).flops_per_token()
    assert plan.seconds == pytest.approx(plan.flops / 2e8)


def test_description():
    model = GPTConfig(80, context=32, layers=2, heads=2, width=16)
    training = TrainConfig(
        steps=1000, batch_size=4, precision="bfloat16", compile="all"
    )
    text = Plan(model, training, torch.device("cpu"), 1e9).describe()
    for part in ("2 layers", "width 16", "1,000 steps", "cpu, bfloat16, compiled"):
        assert part in text
    assert text.count("\n") == 3


def test_description_names_both_rates():
    model = GPTConfig(80, context=32, layers=2, heads=2, width=16)
    training = TrainConfig(optimizer="muon", matrix_learning_rate=0.03)
    text = Plan(model, training, torch.device("cpu"), 1e9).describe()
    assert "muon, rate 0.03 (AdamW 0.003)" in text
