# Written by tools/tangle.py from book/15_full_gpt.ipynb: change it there.
"""The machine: its device and precision, and what a training run will cost on it."""

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from datetime import timedelta
from functools import cache, partial
from textwrap import shorten
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from tqdm.auto import tqdm

from glassgpt import modern
from glassgpt.data import TokenData
from glassgpt.gpt import GPT, GPTConfig
from glassgpt.heads import fused_attention
from glassgpt.modern import ModernConfig, MuonConfig, build, muon_optimizers
from glassgpt.training import Loss, TrainConfig, Trainer, check_choices, make_optimizers


def pick_device(name: str | None = None) -> torch.device:
    """The named device, or the best one here: a GPU (Apple's is mps), or the CPU.

    Raises ValueError for a name that this machine does not have.

    Book: 15_full_gpt.html#what-the-machine-can-do
    """
    best = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    name = name or str(best)
    try:
        one = torch.ones(1, device=name) + 1
        one.item()  # it must compute
    except (RuntimeError, AssertionError) as error:
        reason = shorten(str(error), 80)
        raise ValueError(f"no device {name!r} (cpu, cuda, mps?): {reason}") from None
    return one.device


@cache
def measure_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP a second of products like those of an MLP: the best of several.

    It begins with few rows, and stops where four larger products would take over 0.4
    seconds. What was measured once is not measured again.

    Book: 15_full_gpt.html#what-the-machine-can-do
    """
    rows, width = (8192, 4096) if device.type == "cuda" else (2048, 512)
    # Not ones, which a GPU may multiply faster. The run's own draws stay as they are.
    own = torch.Generator(device)
    draw = partial(torch.randn, generator=own, dtype=dtype, device=device)
    weights = draw(width, 4 * width)
    best = 0.0
    for part in (32, 256, rows):
        flops = 8 * part * width * width
        if best and 4 * flops / best > 0.4:
            break
        x = draw(part, width)
        for _ in range(4):
            began = time.perf_counter()
            (x @ weights)[0, 0].item()  # reading a number waits for the device
            best = max(best, flops / (time.perf_counter() - began))
    return best


Precision = Literal["float32", "bfloat16", "float16"]


def pick_precision(device: torch.device) -> Precision:
    """The precision in which a device multiplies matrices best.

    A GPU says it by its compute capability: 16 bits from 7.0 on. A CPU is measured.

    Book: 15_full_gpt.html#what-the-machine-can-do
    """
    if device.type == "cuda":
        major = torch.cuda.get_device_capability(device)[0]
        return "float32" if major < 7 else "float16" if major < 8 else "bfloat16"
    if device.type != "cpu":
        return "float32"
    wide = measure_flops(device, torch.float32)
    narrow = measure_flops(device, torch.bfloat16)
    return "bfloat16" if narrow > 1.3 * wide else "float32"


@dataclass(frozen=True)
class Machine:
    """What computes, and how; it changes little of what is learned.

    That is rounding, the steps that float16 skips, and a GPU's own dropout.
    Raises ValueError for a precision or a way to compile that doesn't exist.

    Book: 15_full_gpt.html#what-the-machine-can-do
    """

    device: str = "cpu"  # cpu, cuda or mps
    precision: Precision = "float32"  # of matrix products
    compile: Literal["off", "blocks", "all"] = "off"  # each block, or the whole model
    recompute: bool = False  # keep less for the backward pass, compute it again

    def __post_init__(self) -> None:
        check_choices(self)

    @property
    def dtype(self) -> torch.dtype:
        """In which matrices are multiplied."""
        return getattr(torch, self.precision)

    def suits_short_attention(self, context: int) -> bool:
        """Whether `short_attention` is faster than the fused kernel."""
        narrow = self.precision != "float32"
        return narrow and self.device.startswith("cpu") and context <= 256


def short_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """`fused_attention` as two products around a softmax: faster for short contexts.

    The kernel itself runs outside of training, with a mask, and where heads share keys.

    Book: 15_full_gpt.html#fused-attention
    """
    if mask is not None or queries.shape != keys.shape or not torch.is_grad_enabled():
        return fused_attention(queries, keys, values, mask, dropout)
    T, D = queries.shape[-2:]
    # -inf above the diagonal: adding it is cheaper than filling every head's scores in.
    penalty = queries.new_full((T, T), -math.inf).triu(1)
    scores = (queries / math.sqrt(D)) @ keys.mT
    return F.dropout((scores + penalty).softmax(dim=-1), dropout) @ values


def compiled(function: Callable[..., Tensor], on: Machine) -> Callable[..., Tensor]:
    """`torch.compile`, or the plain function where no compiler works.

    Without gradients the plain function is called.

    Book: 15_full_gpt.html#compiling
    """
    fast: Callable[..., Tensor] | None = None

    def call(*inputs: Any) -> Tensor:
        nonlocal fast
        if not torch.is_grad_enabled():
            return function(*inputs)
        if fast is not None:
            return fast(*inputs)
        try:
            # Another formula of tanh: GELU is faster on a CPU.
            fast = torch.compile(function, options={"cpp.use_decompose_tanh": True})
            # A GELU or a norm is calculated again: its result is not kept.
            budget = 1.0 if on.device.startswith("cuda") else 0.9
            with (
                # PyTorch before 2.13 stores a program without its precision.
                torch.compiler.config.patch(cache_key_tag=on.precision),
                torch._dynamo.config.patch(recompile_limit=256),  # over eight models
                torch._functorch.config.patch(
                    activation_memory_budget=budget,
                    # What would fail in the backward pass fails here.
                    force_non_lazy_backward_lowering=True,
                ),
            ):
                return fast(*inputs)
        except Exception as error:  # whatever a missing compiler raises
            fast, reason = function, shorten(str(error), 150)
            tqdm.write(f"torch.compile does not work here, going on without: {reason}")
            return function(*inputs)

    return call


def padded_logits(x: Tensor, weight: Tensor) -> Tensor:
    """Logits of x (..., C) for a table (V, C), padded to a multiple of 64 with -inf.

    Tensor cores multiply such sizes faster; what is -inf takes no part in a softmax.

    Book: 15_full_gpt.html#a-vocabulary-that-suits-the-units
    """
    missing = -len(weight) % 64
    bias = F.pad(x.new_zeros(len(weight)), (0, missing), value=-math.inf)
    return F.linear(x, F.pad(weight, (0, 0, 0, missing)), bias)


def make_loss(model: GPT, machine: Machine) -> Loss:
    """The loss of a `Trainer` at a machine's precision, compiled and recomputed.

    Book: 15_full_gpt.html#all-together-the-loss
    """
    device, cuda = torch.device(machine.device), machine.device.startswith("cuda")
    short = machine.suits_short_attention(model.config.context)
    for block in model.blocks:
        block.attention.attend = short_attention if short else fused_attention

    def call(block: nn.Module, x: Tensor, more: dict[str, Any]) -> Tensor:
        return block(x, **more)

    run = compiled(call, machine) if machine.compile == "blocks" else call
    if machine.recompute:
        run = partial(checkpoint, run, use_reentrant=False)

    def plain(ids: Tensor, targets: Tensor, more: dict[str, Any]) -> Tensor:
        x = model.embed(ids, torch.arange(ids.shape[1], device=ids.device))
        for block in model.blocks:
            x = run(block, x, more)
        x = model.norm(x)
        logits = padded_logits(x, model.head.weight) if cuda else model.head(x)
        logits, places = logits.flatten(0, 1).float(), targets.flatten()
        total = F.cross_entropy(logits, places, reduction="sum")
        return total / (places != -100).sum().clamp(min=1)  # 0 without targets

    whole = compiled(plain, machine) if machine.compile == "all" else plain

    def loss(ids: Tensor, targets: Tensor) -> Tensor:
        # From pinned memory, which never moves, a GPU fetches while the CPU goes on.
        batch = (x.pin_memory() if cuda else x for x in (ids, targets))
        ids, targets = (x.to(device, non_blocking=cuda) for x in batch)
        # A compiled program would calculate the rotary tables in every kernel.
        rotary = isinstance(model, modern.ModernGPT)
        positions = torch.arange(ids.shape[1], device=device)
        more = {"rotation": model.rotation(positions)} if rotary else {}
        # Outside: a compiled program that switches autocast can't be stored.
        with torch.autocast(device.type, machine.dtype, machine.precision != "float32"):
            return whole(ids, targets, more)

    return loss


class ScaledTrainer(Trainer):
    """A `Trainer` in float16: the loss is scaled, so that no gradient becomes zero.

    A step whose gradients overflow is skipped, and the scale is halved. Raises
    FloatingPointError where they overflow however they are scaled.

    Book: 15_full_gpt.html#all-together-the-loss
    """

    def __init__(self, *arguments: Any, **named: Any):
        super().__init__(*arguments, **named)
        self.scaler = torch.amp.GradScaler(self.device.type)

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()

    def update(self) -> Tensor:
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        if norm.isfinite():
            super().update()
        self.scaler.update()
        # Skipping is no error, but a scale that falls on and on is.
        return norm if self.scaler.get_scale() < 1e-3 else norm.nan_to_num(0.0, 0.0)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.scaler.load_state_dict(state.get("scaler", self.scaler.state_dict()))


class _NoStart(TorchFunctionMode):
    """Nothing is drawn: on the meta device that makes PyTorch import its compiler."""

    def __torch_function__(self, call: Any, _: Any, a: Any = (), k: Any = None) -> Any:
        draws = ("normal_", "uniform_", "kaiming_uniform_")
        return None if call.__name__ in draws else call(*a, **(k or {}))


def meta_model(config: GPTConfig) -> GPT:
    """A model of shapes, without memory and in no time.

    Raises ValueError for shapes that are too large to count.

    Book: 15_full_gpt.html#the-plan
    """
    try:
        with torch.device("meta"), _NoStart():
            return build(config)
    except (RuntimeError, TypeError) as error:  # beyond 64 bits
        raise ValueError("too large to count: lower width or vocabulary") from error


@cache
def count(config: GPTConfig) -> tuple[int, int]:
    """Parameters and FLOPs a token of a model, from those of one layer and of two.

    Raises ValueError for shapes that are too large to count.

    Book: 15_full_gpt.html#the-plan
    """
    one, two = (meta_model(replace(config, layers=layers)) for layers in (1, 2))
    N, flops, more = one.parameter_count(), one.flops_per_token(), config.layers - 1
    N += more * (two.parameter_count() - N)
    return N, flops + more * (two.flops_per_token() - flops)


def kept_by_block(model: GPTConfig, machine: Machine) -> int:
    """Bytes that a block keeps of one token for the backward pass, about.

    What its matrices take and give; Korthikanti et al. (2022) have the same terms.

    Book: 15_full_gpt.html#the-plan
    """
    C, block = model.width, meta_model(replace(model, layers=1)).blocks[0]
    matrices = [part for part in block.modules() if isinstance(part, nn.Linear)]
    numbers = sum(part.in_features + part.out_features for part in matrices) - 2 * C
    if machine.suits_short_attention(model.context):  # it keeps each head's table
        numbers += model.heads * model.context
    # In 32 bits: the norms' inputs, and queries and keys turned or normalized.
    wide = 3 if isinstance(model, ModernConfig) else 1
    return machine.dtype.itemsize * numbers + 8 * C * wide


@dataclass(frozen=True)
class Plan:
    """A model, how to train it, and on what. peak_flops: what it can do a second.

    Book: 15_full_gpt.html#the-plan
    """

    model: GPTConfig
    training: TrainConfig
    machine: Machine
    peak_flops: float

    @property
    def tokens(self) -> int:
        """Tokens seen in the whole run."""
        return self.training.steps * self.training.batch_size * self.model.context

    @property
    def flops(self) -> int:
        """FLOPs of the whole run."""
        return self.tokens * count(self.model)[1]

    @property
    def seconds(self) -> float:
        """About how long the run will take, evaluations included.

        On a CPU the products at their measured speed, and for each byte that is kept,
        two for each parameter a step, 1.2 nanoseconds; 1.3 times that in 16 bits, three
        quarters where it is compiled, divided by the root of the number of threads. On
        cuda a third of its speed is assumed.
        """
        m, t, on = self.model, self.training, self.machine
        looks = t.steps // t.evaluate_every * t.evaluation_crops * m.context
        seen = self.tokens + looks / 3  # without a backward pass
        work = (seen + self.tokens * on.recompute / 3) * count(m)[1]
        if isinstance(t, MuonConfig):  # its products, 4 rounds a step
            work += t.steps * 176 * m.layers * m.width**3
        if on.device.startswith("cuda"):
            return 3 * work / self.peak_flops
        kept = seen * (m.layers * kept_by_block(m, on) + 12 * m.vocab_size)
        each = 1.2e-9 / math.sqrt(torch.get_num_threads())
        each *= 1.0 if on.precision == "float32" else 1.3
        each *= 1.0 if on.compile == "off" else 0.75
        return work / self.peak_flops + each * (kept + 2 * t.steps * count(m)[0])

    @property
    def memory(self) -> int:
        """About how many bytes of tensors it will need at its peak.

        16 for every parameter (weight, gradient, AdamW's moments), 18 in 16 bits. For
        every token what the blocks keep, and 12 a logit. With recomputation one
        block's, and the 4 C that flow into each. Compiled programs take less.
        """
        m, t, on = self.model, self.training, self.machine
        block, each = kept_by_block(m, on), 16 if on.precision == "float32" else 18
        kept = block + 4 * m.layers * m.width if on.recompute else m.layers * block
        tokens = -(-t.batch_size // t.accumulate) * m.context
        return each * count(m)[0] + tokens * (kept + 12 * m.vocab_size)

    def trainer(
        self,
        data: TokenData,
        model: GPT | None = None,
        kind: Callable[..., Trainer] | None = None,
        start: str | None = None,
    ) -> Trainer:
        """A trainer for data.

        model: one that has learned before. kind: its class, for many processes (chapter
        22). start: where the model is made, if not on its device.
        """
        training, machine = self.training, self.machine
        with torch.random.fork_rng():
            torch.manual_seed(training.seed)
            model = (model or build(self.model)).to(start or machine.device)
        optimizers = make_optimizers(model, training)
        if isinstance(training, MuonConfig):
            optimizers = muon_optimizers(model, training, machine.dtype)
        usual = ScaledTrainer if machine.precision == "float16" else Trainer
        loss = make_loss(model, machine)
        return (kind or usual)(model, data, training, optimizers, loss)

    def describe(self) -> str:
        """The plan in a few lines, for people."""
        m, t, on = self.model, self.training, self.machine
        rates = f"adamw, rate {t.learning_rate:.2g}"
        if isinstance(t, MuonConfig):
            rates = f"muon, rate {t.matrix_learning_rate:.2g} ({rates})"
        how = f"{on.precision}, compile {on.compile}{', recomputed' * on.recompute}"
        parts = f" in {t.accumulate} parts" * (t.accumulate > 1)
        kind = "modern, not GPT-2" if isinstance(m, ModernConfig) else "GPT-2"
        return f"""\
model   {kind}: {count(m)[0] / 1e6:.2f} M parameters, {m.layers} layers, {m.heads} \
heads, width {m.width}, context {m.context}
run     {t.steps:,} steps, {self.tokens / 1e6:.1f} M tokens, {self.flops:.1e} FLOPs
recipe  {rates}, batches of {t.batch_size}{parts}
machine {on.device}, {how}: about {self.memory / 1e9:.2f} GB of tensors, \
{timedelta(seconds=round(self.seconds))}"""


# Layers, heads and width. "small" to "xl" are GPT-2's four.
SIZES = {"micro": (4, 4, 128), "mini": (6, 6, 384), "small": (12, 12, 768)}
SIZES |= {"medium": (24, 16, 1024), "large": (36, 20, 1280), "xl": (48, 25, 1600)}
# The kind of settings, and the rate at a width of 1.
OPTIMIZERS = {"adamw": (TrainConfig, 0.4), "muon": (MuonConfig, 0.8)}
RECIPES = {"gpt2": modern.GPT2_CHOICES, "modern": {}, "llama": modern.LLAMA_CHOICES}


def memory_of(device: torch.device) -> float:
    """Bytes of memory of a GPU, or of the computer; infinite where nothing tells.

    Book: 15_full_gpt.html#what-a-plan-chooses
    """
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if not hasattr(os, "sysconf"):  # Windows
        return math.inf
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def fit_memory(plan: Plan, memory: float, given: set[str]) -> Plan:
    """Split the batch, then recompute, until a plan fits; what was given stays.

    Raises ValueError where nothing fits.

    Book: 15_full_gpt.html#what-a-plan-chooses
    """
    while plan.memory > memory:
        training, machine = plan.training, plan.machine
        if training.accumulate < training.batch_size and "accumulate" not in given:
            parts = min(2 * training.accumulate, training.batch_size)
            plan = replace(plan, training=replace(training, accumulate=parts))
        elif not machine.recompute and "recompute" not in given:
            plan = replace(plan, machine=replace(machine, recompute=True))
        else:
            due, there = f"{plan.memory / 1e9:,.1f} GB", f"{memory / 1e9:.1f}"
            advice = "lower width, layers, context or batch size"
            raise ValueError(f"{due} needed, {there} there for tensors: {advice}")
    return plan


def preset(device: torch.device) -> dict[str, Any]:
    """What suits a device when nothing else is said: size, context, batch, steps.

    Book: 15_full_gpt.html#what-a-plan-chooses
    """
    if device.type != "cuda":
        return {"size": "micro", "context": 64, "batch_size": 16, "steps": 2000}
    if memory_of(device) < 30e9:
        return {"size": "mini", "context": 256, "batch_size": 64, "steps": 5000}
    return {"size": "small", "context": 1024, "batch_size": 32, "steps": 5000}


def names(*kinds: Any) -> set[str]:
    """The fields of dataclasses.

    Book: 15_full_gpt.html#what-a-plan-chooses
    """
    return {field.name for kind in kinds for field in fields(kind)}


def take(kind: Any, values: dict[str, Any]) -> Any:
    """A dataclass made of those values that it has fields for.

    Book: 15_full_gpt.html#what-a-plan-chooses
    """
    return kind(**{k: v for k, v in values.items() if k in names(kind)})


def make_plan(
    vocab_size: int,
    size: str | None = None,
    recipe: str = "gpt2",
    device: str | None = None,
    cards: int = 1,
    optimizer: str | None = None,
    **values: Any,
) -> Plan:
    """Choose everything for a run on this machine; any value can be given instead.

    size: one of `SIZES`. recipe: "gpt2", "modern" (for `ModernConfig`) or "llama".
    cards: how many GPUs share model and batch (chapter 25). optimizer: "adamw" or
    "muon", by default Muon where a run has to be short or the recipe is modern.
    values: fields of ModernConfig, MuonConfig and Machine.
    Raises ValueError for names and values that don't exist, and for what can't fit.

    Book: 15_full_gpt.html#what-a-plan-chooses
    """
    chosen, given = pick_device(device), set(values)
    suited, cuda = preset(chosen), chosen.type == "cuda"
    size = size or suited["size"]
    optimizer = optimizer or ("adamw" if cuda and recipe != "modern" else "muon")
    for value, known in ((size, SIZES), (recipe, RECIPES), (optimizer, OPTIMIZERS)):
        if value not in known:
            raise ValueError(f"{value!r} is none of {', '.join(known)}")
    choices = names(ModernConfig) - names(GPTConfig)
    shapes = ModernConfig if recipe != "gpt2" or given & choices else GPTConfig
    settings, rate = OPTIMIZERS[optimizer]
    if unknown := given - names(shapes, settings, Machine):
        raise ValueError(f"a run with {optimizer} has no {', '.join(sorted(unknown))}")
    sizes = dict(zip(("layers", "heads", "width"), SIZES[size], strict=True))
    values = {**suited, **sizes, **RECIPES[recipe], **values, "device": str(chosen)}
    model = take(shapes, {"vocab_size": vocab_size, **values})
    warmup = min(50, values["steps"] // 10)
    usual = {"learning_rate": rate / model.width, "warmup": warmup}
    training = take(settings, {**usual, **values})
    if "precision" not in given:
        values["precision"] = pick_precision(chosen)
    machine = take(Machine, values)
    plan = Plan(model, training, machine, measure_flops(chosen, machine.dtype))
    if "compile" not in given and chosen.type != "mps" and plan.seconds > 120:
        # To compile the whole model takes longer.
        scope = "all" if cuda or plan.seconds > 600 else "blocks"
        plan = replace(plan, machine=replace(machine, compile=scope))
    if plan.seconds > 1e12:  # what comes out of a slip of the hand
        slow = "the run would take over 30,000 years"
        raise ValueError(f"{slow}: lower its steps, batch_size or evaluation_crops")
    memory = 0.85 * memory_of(chosen) * (cards if cuda else 1)
    return fit_memory(plan, memory, given)
