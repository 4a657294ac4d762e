"""The machine: what is chosen for it, what training computes on it, what it costs."""

import json
import math
import os
import re
from copy import deepcopy
from dataclasses import asdict, replace
from fractions import Fraction
from pathlib import Path
from shutil import which
from unittest.mock import Mock, patch

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._functorch.aot_autograd import make_boxed_compiler
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode

from glassgpt import plan as module
from glassgpt.checks.plan import (
    check_fit_memory,
    check_padded_logits,
    check_rounding,
    check_scale,
    check_step_memory,
)
from glassgpt.data import TokenData
from glassgpt.gpt import GPT, GPTConfig
from glassgpt.heads import fused_attention
from glassgpt.modern import LLAMA_CHOICES, ModernConfig, MuonConfig, build
from glassgpt.plan import (
    SIZES,
    Machine,
    Plan,
    ScaledTrainer,
    compiled,
    count,
    fit_memory,
    make_loss,
    make_plan,
    measure_flops,
    padded_logits,
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
    trainer = Plan(model, training, Machine(**machine), 1e9).trainer(DATA)
    for _ in range(steps):
        trainer.take_step()
    return trainer


def weights(trainer):
    return torch.nn.utils.parameters_to_vector(trainer.model.parameters()).detach()


class FakeCard:
    """A GPU by capability and memory, for code that only asks for these."""

    def __init__(self, monkeypatch, capability, gigabytes):
        properties = type("Properties", (), {"total_memory": int(gigabytes * 1e9)})
        cuda = torch.cuda
        monkeypatch.setattr(cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(cuda, "get_device_properties", lambda device: properties)
        monkeypatch.setattr(module, "pick_device", lambda name: CUDA)
        monkeypatch.setattr(module, "measure_flops", self.speed)

    @staticmethod
    def speed(device, dtype):
        """Of a card, whose precision is asked, not measured."""
        assert device == CUDA
        return 1e14


class Products(TorchDispatchMode):
    """Notes in which formats matrices were multiplied, by the kind of product."""

    def __init__(self):
        super().__init__()
        self.formats = {"attention": set(), "mm": set()}

    def __torch_dispatch__(self, call, types, arguments=(), named=None):
        for kind, formats in self.formats.items():
            if kind in call.__name__:
                formats |= {x.dtype for x in arguments if isinstance(x, torch.Tensor)}
        return call(*arguments, **(named or {}))


@pytest.fixture
def fast_cpu(monkeypatch):
    """A CPU whose speed is known, so that nothing is timed."""
    speeds = {torch.float32: 1e11, torch.bfloat16: 3e11}
    monkeypatch.setattr(module, "measure_flops", lambda device, dtype: speeds[dtype])
    return speeds


def test_checks_pass():
    check_padded_logits(padded_logits)
    check_fit_memory(fit_memory)
    check_rounding(rounded)
    for kind in (int, float, Fraction, torch.tensor):
        check_step_memory(lambda *case, kind=kind: kind(bytes_due(*case)))


def spacing(x):
    """From a bfloat16 to the next."""
    return 2.0 ** (math.frexp(x)[1] - 8)


def whole_batch(plan, memory, given):
    return plan


def recomputing_first(plan, memory, given):
    if plan.memory > memory:
        plan = replace(plan, machine=Machine(recompute=True))
    return fit_memory(plan, memory, given)


def never_refusing(plan, memory, given):
    try:
        return fit_memory(plan, memory, set())
    except ValueError:
        return plan


def refusing_where_anything_is_given(plan, memory, given):
    if given:
        raise ValueError
    return fit_memory(plan, memory, given)


def minding(name):
    """Ignores all that is given but one name, or pairs."""

    def fit(plan, memory, given):
        return fit_memory(
            plan, memory, given if name in given or len(given) > 1 else set()
        )

    return fit


def always_doubling(plan, memory, given):
    found = fit_memory(plan, memory, given)
    parts = 1 << (found.training.accumulate - 1).bit_length()
    return replace(found, training=replace(found.training, accumulate=parts))


def rounded(x, coarse=1):
    step = spacing(x) * coarse
    return round(x / step) * step


def coarse_from_4_to_64(x):
    return rounded(x, 4 if 4 <= x < 64 else 1)


def in_one_part_first(plan, memory, given):
    plan = replace(plan, training=replace(plan.training, accumulate=1))
    return fit_memory(plan, memory, given)


def kept_first(plan, memory, given):
    plan = replace(plan, machine=replace(plan.machine, recompute=False))
    return fit_memory(plan, memory, given)


def another_rate(plan, memory, given):
    found = fit_memory(plan, memory, given)
    if found is plan:
        return plan
    return replace(found, training=replace(found.training, learning_rate=1.0))


def padded(value, multiple):
    def logits(x, weight):
        missing = -len(weight) % multiple
        bias = F.pad(x.new_zeros(len(weight)), (0, missing), value=value)
        return F.linear(x, F.pad(weight, (0, 0, 0, missing)), bias)

    return logits


def bytes_of_a_step(each, kept=36, each_logit=12):
    return lambda N, tokens, C, layers, V: (
        each * N + tokens * (kept * C * layers + each_logit * V)
    )


bytes_due = bytes_of_a_step(18)


@pytest.mark.parametrize(
    ("check", "wrong", "message"),
    [
        (check_padded_logits, padded(-math.inf, 8), "no multiple"),
        (check_padded_logits, padded(-math.inf, 256), "more than needed"),
        (check_padded_logits, lambda x, w: padded_logits(x, 2 * w), "logits differ"),
        (
            check_padded_logits,
            lambda x, w: padded_logits(x.detach(), w),
            "of x differs",
        ),
        (
            check_padded_logits,
            lambda x, w: padded_logits(x, w.detach()),
            "of the table differs",
        ),
        (
            check_padded_logits,
            lambda x, w: padded_logits(x.flatten(0, -2), w),
            r"\(6, 128\) for x \(2, 3, 8\)",
        ),
        (check_fit_memory, whole_batch, "don't fit"),
        (check_fit_memory, in_one_part_first, "must stay as it is"),
        (check_fit_memory, kept_first, "must stay as it is"),
        (check_fit_memory, recomputing_first, "recompute only"),
        (check_fit_memory, never_refusing, "only the rest may change"),
        (
            check_fit_memory,
            refusing_where_anything_is_given,
            "only the rest may change",
        ),
        (check_fit_memory, minding("accumulate"), "must be refused"),
        (check_fit_memory, minding("recompute"), "only the rest may change"),
        (check_fit_memory, another_rate, "only accumulate may change"),
        (check_fit_memory, always_doubling, "split into too many parts"),
        (check_step_memory, bytes_of_a_step(16), "a copy of 16 bits"),
        (check_step_memory, bytes_of_a_step(14), "the gradients are missing"),
        (check_step_memory, bytes_of_a_step(10), "two moments"),
        (check_step_memory, bytes_of_a_step(18, kept=64), "in float32"),
        (check_step_memory, bytes_of_a_step(16, kept=64), "all in float32"),
        (check_step_memory, bytes_of_a_step(18, each_logit=4), "three times"),
        (check_step_memory, bytes_of_a_step(18, each_logit=0), "are missing"),
        (check_step_memory, bytes_of_a_step(18, kept=32), "bytes for"),
        (check_step_memory, bytes_of_a_step(18, kept=34), "34 C is with norms"),
        (check_step_memory, lambda *case: bytes_due(*case) / 1e9, "not GB"),
        (check_step_memory, lambda *case: math.nan, "nan is no number"),
        (
            check_step_memory,
            lambda N, t, C, L, V: 18 * N + t * L * (36 * C + 12 * V),
            "logits come once",
        ),
        (
            check_step_memory,
            lambda N, tokens, *more: bytes_of_a_step(18)(N, 1, *more),
            "one token's",
        ),
        (
            check_step_memory,
            lambda N, t, C, L, V: t * (18 * N + 36 * C * L + 12 * V),
            "don't grow",
        ),
        (check_scale, lambda scale, streak, finite: (scale, streak + 1), "halves"),
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
            check_scale,
            lambda scale, streak, finite: (
                (min(scale * 2, 2.0**24), 0)
                if streak == 1999 and finite
                else ((scale, streak + 1) if finite else (scale / 2, 0))
            ),
            "no bounds",
        ),
        (
            check_scale,
            lambda scale, streak, finite: (
                ((scale * 2, 0) if streak == 1999 else (scale, streak + 1))
                if finite
                else (max(scale / 2, 1e-3), 0)
            ),
            "no bounds",
        ),
        (check_rounding, lambda x: float(round(x)), "1.7 became 2.0"),
        (check_rounding, lambda x: rounded(x, 2 if x < 1.1 else 1), "1.02 became"),
        (check_rounding, lambda x: x, "spacing"),
        (check_rounding, coarse_from_4_to_64, r"between 2\^2 and 2\^3 the spacing is"),
        (check_rounding, lambda x: torch.tensor(x).bfloat16().item(), "only once"),
    ],
)
def test_checks_name_the_mistake(check, wrong, message):
    with pytest.raises(AssertionError, match=message):
        check(wrong)


# Devices, precisions and speeds.


@pytest.mark.parametrize("name", ["abacus", "cuda:99", "meta"])
def test_a_device_that_is_not_here(name):
    with pytest.raises(ValueError, match="no device") as refused:
        pick_device(name)
    assert len(str(refused.value)) < 160


def test_the_best_device(monkeypatch):
    found = []
    monkeypatch.setattr(
        torch.accelerator,
        "current_accelerator",
        lambda check_available: found[0] if found else None,
    )
    assert pick_device() == CPU
    found.append(torch.device("cuda", 99))  # it is listed, and can't add
    with pytest.raises(ValueError, match="no device 'cuda:99'"):
        pick_device()


@pytest.mark.parametrize(
    ("capability", "precision"),
    [((6, 1), "float32"), ((7, 0), "float16"), ((7, 5), "float16")]
    + [((8, 0), "bfloat16"), ((8, 9), "bfloat16"), ((9, 0), "bfloat16")],
)
def test_a_card_says_which_units_it_has(monkeypatch, capability, precision):
    FakeCard(monkeypatch, capability, 40)
    assert pick_precision(CUDA) == precision


def test_precision_of_a_cpu_is_measured(fast_cpu):
    assert pick_precision(CPU) == "bfloat16"
    fast_cpu[torch.bfloat16] = 1.2e11
    assert pick_precision(CPU) == "float32"
    assert pick_precision(torch.device("mps")) == "float32"


def test_a_precision_without_units_is_given_up_after_small_products(monkeypatch):
    """Emulated bfloat16 takes seconds for a large product."""
    now, products = [0.0], []
    speed = 2e9  # FLOP a second, as it was seen
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    real = torch.Tensor.__matmul__

    def product(a, b):
        products.append(2 * a.shape[0] * b.numel())
        now[0] += products[-1] / speed
        return real(a, b)

    monkeypatch.setattr(torch.Tensor, "__matmul__", product)
    measure = measure_flops.__wrapped__
    assert measure(CPU, torch.float32) == pytest.approx(speed)
    assert now[0] < 0.5  # seconds of that processor
    speed, now[0] = 1e11, 0.0
    products.clear()
    assert measure(CPU, torch.float32) == pytest.approx(speed)
    assert max(products) == 8 * 2048 * 512 * 512
    assert now[0] < 0.5


def test_a_start_measures_each_precision_once():
    measure_flops.cache_clear()
    before = torch.get_rng_state()
    for _ in range(2):  # the command plans before it reads the text, and after
        make_plan(80, device="cpu")
    assert torch.equal(torch.get_rng_state(), before)  # a run's own draws are left
    assert measure_flops.cache_info().misses == 2
    make_plan(90, device="cpu", precision="float32")
    assert measure_flops.cache_info().misses == 2
    measure_flops.cache_clear()
    make_plan(80, device="cpu", precision="float32")
    assert measure_flops.cache_info().misses == 1


def test_names_of_a_machine():
    for wrong in ({"precision": "int4"}, {"compile": "yes"}, {"precision": "tf32"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Machine(**wrong)


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


@pytest.mark.parametrize(
    ("scope", "recompute", "kind"),
    [
        ("blocks", True, ModernConfig),
        ("all", False, GPTConfig),
        ("all", True, ModernConfig),
    ],
)
def test_compiled_trains_like_plain(scope, recompute, kind):
    model = kind(11, context=8, layers=1, heads=2, width=16)
    real, used = torch.compile, []

    def counting(function, **options):
        used.append(function)
        return real(function, backend="aot_eager")

    with patch("torch.compile", counting):
        fast = trained(2, model=model, compile=scope, recompute=recompute)
    assert len(used) == 1
    plain = trained(2, model=model)
    torch.testing.assert_close(weights(plain), weights(fast), atol=1e-5, rtol=1e-4)


@needs_compiler
def test_a_compiled_program_can_be_stored_for_the_next_run():
    torch.compiler.reset()  # nothing from another test in memory
    before = counters["aot_autograd"].copy()
    model = replace(SHAPE, layers=1)
    fast = trained(1, model=model, precision="bfloat16", compile="all")
    since = counters["aot_autograd"] - before
    assert since["total"] == 1
    assert since["autograd_cache_bypass"] == 0
    plain = trained(1, model=model, precision="bfloat16")
    torch.testing.assert_close(weights(plain), weights(fast), atol=1e-2, rtol=0)


def test_compiled_runs_compute_again_what_is_cheap():
    config = GPTConfig(11, context=64, layers=1, heads=2, width=32)
    model, ids = GPT(config), torch.zeros(16, 64, dtype=torch.int64)
    nothing = make_boxed_compiler(lambda graph, inputs: graph)
    backend = aot_autograd(
        fw_compiler=nothing,
        bw_compiler=nothing,
        partition_fn=min_cut_rematerialization_partition,
    )
    kept, real = [], torch.compile

    def keep(tensor):
        kept[-1][tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with patch("torch.compile", lambda function, **_: real(function, backend=backend)):
        for scope in ("off", "all"):
            kept.append({})
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                make_loss(model, Machine(compile=scope))(ids, ids)
    plain, ours = (sum(s.nbytes() for s in found.values()) for found in kept)
    assert ours < 0.8 * plain


@pytest.mark.parametrize("early", [True, False])
def test_without_a_compiler_it_goes_on(early, capsys):
    """It fails at once, or with its first program."""
    failing = Mock(side_effect=RuntimeError("no C++ compiler\nat all"))
    with patch("torch.compile", failing if early else Mock(return_value=failing)):
        slow = trained(compile="blocks")
    torch.testing.assert_close(weights(trained()), weights(slow))
    said = capsys.readouterr()
    assert (said.out + said.err).count("no C++ compiler") == 1


def test_programs_are_stored_by_their_precision():
    tags = []

    def telling(function, **options):
        def call(*inputs):
            tags.append(torch.compiler.config.cache_key_tag)
            return function(*inputs)

        return call

    with patch("torch.compile", telling):
        for precision in ("bfloat16", "float16"):
            trained(1, precision=precision, compile="all")
    assert len(set(tags)) == 2


def backward_is_broken(graph, example_inputs):
    raise RuntimeError("no backward program")


def test_a_compiler_that_fails_at_the_backward_program(capsys):
    backend = aot_autograd(
        fw_compiler=make_boxed_compiler(lambda graph, inputs: graph),
        bw_compiler=backward_is_broken,
    )
    real = torch.compile
    x = torch.ones(3, requires_grad=True)
    with patch("torch.compile", lambda function, **_: real(function, backend=backend)):
        compiled(torch.exp, Machine())(x).sum().backward()
    assert torch.allclose(x.grad, x.exp())
    said = capsys.readouterr()
    assert "no backward program" in said.out + said.err


def test_a_ninth_model_is_compiled_too():
    torch.compiler.reset()
    graphs, real = [], torch.compile

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    def use(layer):
        return lambda x: layer(x)

    with patch("torch.compile", lambda function, **_: real(function, backend=backend)):
        for width in range(1, 10):
            compiled(use(torch.nn.Linear(2, width)), Machine())(torch.ones(1, 2))
    assert len(graphs) == 9


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


@pytest.mark.parametrize("width", [10**9, 10**12, 10**20])
def test_a_model_too_large_to_count_is_refused(fast_cpu, width):
    with pytest.raises(ValueError, match="too large to count"):
        count(GPTConfig(80, context=64, layers=4, heads=4, width=width))
    with pytest.raises(ValueError, match="too large to count"):
        make_plan(80, device="cpu", width=width)


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
        (GPTConfig, {}, 256, "bfloat16", True),
        (ModernConfig, {}, 64, "float32", True),
        (ModernConfig, {}, 280, "bfloat16", False),
        (ModernConfig, LLAMA, 280, "float32", False),
        (ModernConfig, LLAMA, 280, "bfloat16", True),
    ],
)
def test_memory_is_estimated_closely(kind, choices, context, precision, recompute):
    config = kind(80, context=context, layers=3, heads=4, width=64, **choices)
    machine = Machine(precision=precision, recompute=recompute)
    plan = Plan(config, replace(TRAINING, batch_size=4), machine, 1e9)
    assert 0.8 < plan.memory / peak_of(plan) < 1.25


def test_a_split_batch_takes_less_memory():
    model = GPTConfig(80, context=128, layers=3, heads=4, width=64)
    whole, split = (
        Plan(model, replace(TRAINING, batch_size=8, accumulate=n), Machine(), 1e9)
        for n in (1, 4)
    )
    assert split.memory < 0.5 * whole.memory
    assert 0.8 < split.memory / peak_of(split) < 1.25


# Plans.


@pytest.mark.usefixtures("fast_cpu")
class TestPlan:
    def test_defaults_on_a_cpu(self):
        plan = make_plan(80, device="cpu")
        assert plan.model == GPTConfig(80, context=64, layers=4, heads=4, width=128)
        assert plan.training.batch_size == 16
        assert isinstance(plan.training, MuonConfig)
        assert plan.machine.precision == "bfloat16"
        assert plan.peak_flops == 3e11

    @pytest.mark.parametrize("size", SIZES)
    def test_sizes(self, size, monkeypatch):
        monkeypatch.setattr(os, "sysconf", lambda name: 1 << 20)  # a tebibyte
        model = make_plan(80, size, device="cpu").model
        assert (model.layers, model.heads, model.width) == SIZES[size]

    def test_recipes(self):
        sizes = {"context": 64, "layers": 4, "heads": 4, "width": 128}
        plan = make_plan(80, recipe="modern", device="cpu")
        assert plan.model == ModernConfig(80, **sizes)
        assert (plan.training.schedule, plan.training.final_rate) == ("linear", 0)
        plan = make_plan(80, recipe="llama", device="cpu", optimizer="adamw")
        assert plan.model == ModernConfig(80, **sizes, **LLAMA_CHOICES)
        assert type(plan.training) is TrainConfig

    def test_a_single_choice_makes_a_modern_model_of_gpt2(self):
        model = make_plan(80, device="cpu", norm="rms").model
        assert isinstance(model, ModernConfig)
        assert (model.norm, model.activation, model.tied) == ("rms", "gelu", True)

    def test_the_learning_rate_falls_with_the_width(self):
        def rate(**values):
            return make_plan(80, device="cpu", **values).training.learning_rate

        assert rate(optimizer="adamw") == pytest.approx(0.4 / 128)
        assert rate(optimizer="adamw", size="mini") == pytest.approx(0.4 / 384)
        assert rate(optimizer="adamw", width=64) == pytest.approx(0.4 / 64)
        assert rate() == pytest.approx(0.8 / 128)  # Muon, since the run is short
        assert rate(learning_rate=0.005) == 0.005

    def test_given_values_win(self):
        values = {"optimizer": "adamw", "width": 64, "batch_size": 3, "bias": True}
        plan = make_plan(80, "mini", "modern", "cpu", heads=2, compile="all", **values)
        assert type(plan.training) is TrainConfig
        assert (plan.model.width, plan.model.layers) == (64, 6)
        assert plan.model.bias is True
        assert plan.training.batch_size == 3
        assert plan.machine.compile == "all"

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            ({"size": "huge"}, "micro"),
            ({"recipe": "bert"}, "modern"),
            ({"optimizer": "sgd"}, "adamw, muon"),
            ({"learnig_rate": 1.0}, "learnig_rate"),
            ({"optimizer": "adamw", "matrix_learning_rate": 1.0}, "adamw has no mat"),
            ({"width": 10}, "width"),
            ({"steps": 0}, "steps"),
            ({"batch_size": 0}, "batch_size"),
            ({"precision": "int4"}, "precision"),
            ({"device": "abacus"}, "abacus"),
        ],
    )
    def test_what_does_not_exist(self, wrong, message):
        with pytest.raises(ValueError, match=message):
            make_plan(80, **{"device": "cpu", **wrong})

    def test_only_long_runs_compile(self):
        for steps, wanted in ((10, "off"), (9000, "blocks"), (10**6, "all")):
            assert make_plan(80, device="cpu", steps=steps).machine.compile == wanted

    def test_a_run_that_memory_can_not_hold_is_refused(self, monkeypatch):
        values = {"device": "cpu", "context": 512, "batch_size": 32, "steps": 10}
        normal = make_plan(80, **values)
        monkeypatch.setattr(os, "sysconf", lambda name: math.isqrt(normal.memory) - 1)
        assert make_plan(80, **values).training.accumulate > 1
        with pytest.raises(ValueError, match="lower width"):
            make_plan(80, **values, recompute=False, accumulate=1)
        assert make_plan(80, **values, accumulate=1).machine.recompute


class TestCards:
    def test_a_small_card(self, monkeypatch):
        FakeCard(monkeypatch, (7, 5), 15.8)
        plan = make_plan(1024)
        assert (plan.model.layers, plan.model.width) == (6, 384)
        assert plan.machine.precision == "float16"
        assert plan.peak_flops == 1e14
        assert type(plan.training) is TrainConfig

    @pytest.mark.parametrize("optimizer", ["adamw", "muon"])
    def test_a_small_card_never_multiplies_in_bfloat16(self, monkeypatch, optimizer):
        """It would emulate it, and has a fused attention for float16 only."""
        FakeCard(monkeypatch, (7, 5), 15.8)
        plan = make_plan(11, context=8, layers=2, heads=2, width=16, steps=6)
        if optimizer == "muon":
            plan = replace(plan, training=MuonConfig(**asdict(plan.training)))
        plan = replace(plan, machine=replace(plan.machine, device="cpu", compile="off"))
        monkeypatch.setattr(Machine, "suits_short_attention", lambda *context: False)
        trainer = plan.trainer(DATA)
        assert isinstance(trainer, ScaledTrainer)
        with Products() as seen:
            trainer.take_step()
        assert torch.float16 in seen.formats["attention"]
        assert torch.float16 in seen.formats["mm"]
        assert torch.bfloat16 not in seen.formats["attention"] | seen.formats["mm"]

    def test_a_large_card(self, monkeypatch):
        FakeCard(monkeypatch, (9, 0), 85)
        plan = make_plan(50_257)
        assert plan.model == GPTConfig(50_257)
        assert plan.machine.precision == "bfloat16"
        assert plan.machine.compile == "all"
        assert plan.memory < 85e9
        assert make_plan(50_257, steps=50).machine.compile == "off"

    def test_a_batch_is_split_until_it_fits(self, monkeypatch):
        FakeCard(monkeypatch, (7, 5), 15.8)
        plan = make_plan(50_257, "medium")
        assert plan.training.accumulate > 1
        assert plan.training.batch_size == 64
        parts = plan.training.accumulate
        assert f"batches of 64 in {parts} parts" in plan.describe()
        with pytest.raises(ValueError, match="13.4 there for tensors"):
            make_plan(50_257, "xl")

    def test_recomputation_where_one_crop_is_too_much(self, monkeypatch):
        FakeCard(monkeypatch, (7, 5), 15.8)
        plan = make_plan(50_257, "medium", context=8192)
        assert plan.training.accumulate == plan.training.batch_size
        assert plan.machine.recompute
        assert "recomputed" in plan.describe()
        with pytest.raises(ValueError, match="13.4 there for tensors"):
            make_plan(50_257, "medium", context=8192, recompute=False)


def test_cost_of_a_plan(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    training = TrainConfig(steps=10, batch_size=12, evaluate_every=5)
    plan = Plan(replace(SHAPE, context=32), training, Machine(), 1e9)
    flops = GPT(plan.model).flops_per_token()
    assert plan.tokens == 10 * 12 * 32
    assert plan.flops == plan.tokens * flops
    kept = plan.memory - replace(plan, training=replace(training, batch_size=1)).memory
    looks = 2 * 640 * 32 * flops / 3
    weights = 2 * 10 * GPT(plan.model).parameter_count()
    touched = (10 + 2 * 640 / 12 / 3) * kept * 12 / 11 + weights
    products, rest = (plan.flops + looks) / 1e9, 1.2 * touched / 2e9
    assert plan.seconds == pytest.approx(products + rest)
    for scope in ("blocks", "all"):
        fast = replace(plan, machine=Machine(compile=scope))
        assert fast.seconds == pytest.approx(products + 0.75 * rest)
    as_wide = module.kept_by_block(plan.model, plan.machine)
    with monkeypatch.context() as one:
        one.setattr(module, "kept_by_block", lambda *_: as_wide)
        narrow = replace(plan, machine=Machine(precision="bfloat16"))
        assert narrow.seconds == pytest.approx(products + 1.3 * rest)
    again = replace(plan, machine=Machine(recompute=True))
    assert again.seconds - plan.seconds == pytest.approx(plan.flops / 3e9)
    muon = replace(plan, training=MuonConfig(**asdict(training)))
    more = 10 * 2 * 176 * 16**3 / 1e9
    assert muon.seconds - plan.seconds == pytest.approx(more)
    card = replace(plan, machine=Machine("cuda"))
    assert card.seconds == pytest.approx(3 * (plan.flops + looks) / 1e9)


def test_the_chapter_says_how_the_estimates_fit():
    root = Path(__file__).parents[1]
    readme = (root / "benchmarks" / "README.md").read_text("utf-8")
    table = readme.split("<!-- estimates -->")[1].split("<!-- end of estimates -->")[0]
    ratios = [float(ratio) for ratio in re.findall(r"\| x ([\d.]+) \|", table)]
    assert 2 / 3 < min(ratios) < max(ratios) < 3 / 2
    told = f"the estimates of {len(ratios)} steps lie between"
    chapter = (root / "book" / "15_full_gpt.ipynb").read_text("utf-8")
    assert f"{told} {min(ratios):.2f} and {max(ratios):.2f} of" in chapter


def test_without_targets_the_loss_is_0_and_so_is_its_gradient():
    model = GPT(SHAPE)
    ids = torch.zeros(1, 4, dtype=torch.int64)
    loss = make_loss(model, Machine())(ids, torch.full_like(ids, -100))
    loss.backward()
    assert loss == 0
    assert not model.tokens.weight.grad.any()


def sources_of_the_chapter():
    """The source of each cell by its id."""
    path = Path(__file__).parents[1] / "book" / "15_full_gpt.ipynb"
    cells = json.loads(path.read_text("utf-8"))["cells"]
    return {cell["id"]: "".join(cell["source"]) for cell in cells}


def test_the_chapter_shows_the_recorded_speeds():
    book = Path(__file__).parents[1] / "book"
    record = json.loads((book / "runs" / "speed.json").read_text("utf-8"))
    sizes = [record["tokens per second"][size] for size in ("small", "larger")]
    shown: dict = {}
    exec(sources_of_the_chapter()["faster-ladder"], shown)
    for how, told in shown["SPEEDS"].items():
        memory = "kept" if how == "and memory kept" else "given back"
        dtype, *more = ("bfloat16, compiled" if memory == "kept" else how).split(", ")
        name = f"glassgpt GPT-2, {' '.join(more) or 'eager'} {dtype}"
        assert told == tuple(round(rows[name][memory]) for rows in sizes)
    for dtype, speed in shown["PRODUCTS"].items():
        assert speed == 1e9 * record["machine"][f"GFLOP/s {dtype}"]
    assert record["machine"]["threads"] == 2
    assert "avx512_bf16" in record["machine"]["16-bit units"]


def on_another(**changed):
    """A loss for another machine than the one that was asked for."""

    def make(model, machine):
        return make_loss(model, replace(machine, **changed))

    return make


def in_float16(model, machine):
    narrow = {"float32": "float32", "bfloat16": "float16"}[machine.precision]
    return make_loss(model, replace(machine, precision=narrow))


def times(factor):
    def make(model, machine):
        loss = make_loss(model, machine)
        return lambda ids, targets: factor(targets) * loss(ids, targets)

    return make


@pytest.mark.parametrize(
    "make",
    [
        on_another(precision="float32"),
        on_another(recompute=False),
        lambda model, machine: token_loss(model),
        times(lambda targets: (targets != -100).float().mean()),  # counts all places
        times(lambda targets: 0.999),
        in_float16,
        make_loss,
    ],
)
def test_the_chapter_refuses_a_loss_of_another_machine(make):
    sources = sources_of_the_chapter()
    torch.manual_seed(0)
    shown = {
        "model": GPT(GPTConfig(80, context=64, layers=4, heads=4, width=128)),
        "ids": torch.randint(80, (8, 64)),
        **{"torch": torch, "Machine": Machine, "token_loss": token_loss},
        "make_loss": make,
    }
    exec(sources["count-saved"], shown)
    if make is make_loss:
        exec(sources["make-loss-demo"], shown)
        return
    with pytest.raises(AssertionError):
        exec(sources["make-loss-demo"], shown)


def test_a_description():
    training = MuonConfig(steps=1000, batch_size=4, matrix_learning_rate=0.03)
    machine = Machine(precision="bfloat16", compile="all")
    text = Plan(SHAPE, training, machine, 1e9).describe()
    for part in (
        "2 layers",
        "width 16",
        "1,000 steps",
        "cpu, bfloat16, compile all",
        "muon, rate 0.03 (adamw, rate 0.003)",
    ):
        assert part in text
    assert text.count("\n") == 3
    assert text.startswith("model   GPT-2: ")


@pytest.mark.usefixtures("fast_cpu")
def test_a_description_says_what_is_no_gpt2():
    text = make_plan(80, device="cpu", positions="rotary").describe()
    assert text.startswith("model   modern, not GPT-2: ")
