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
from typing import Any

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
from glassgpt.mlp import pytorch_gelu
from glassgpt.modern import ModernConfig, MuonConfig, build, muon_optimizers
from glassgpt.training import Loss, TrainConfig, Trainer, make_optimizers


def pick_device(name: str | None = None) -> torch.device:
    """The named device, or the best one here: a GPU (Apple's is mps), or the CPU.

    Raises ValueError for a name that this machine does not have.

    Book: 15_full_gpt.html#what-the-machine-can-do
    """
    best = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    name = str(best) if name is None else name
    try:
        (one := torch.ones(1, device=name)).add_(1).item()  # it must compute
        return one.device
    except (RuntimeError, AssertionError) as error:
        reason = shorten(str(error) or type(error).__name__, 80, placeholder=" ...")
        raise ValueError(f"no device {name!r} (cpu, cuda, mps?): {reason}") from None


@cache
def measure_flops(
    device: torch.device, dtype: torch.dtype, rows: int = 2048, width: int = 512
) -> float:
    """FLOP a second of products (rows, width) x (width, 4 width): the best of several.

    It begins with few rows, and stops where more would take over a second. What was
    measured once is not measured again.

    Book: 15_full_gpt.html#what-the-machine-can-do
    """
    weights = torch.ones(width, 4 * width, dtype=dtype, device=device)
    best = 0.0
    for part in sorted({min(32, rows), min(256, rows), rows}):
        flops = 8 * part * width * width
        if best and 4 * flops / best > 0.4:
            break
        x = torch.ones(part, width, dtype=dtype, device=device)
        for _ in range(4):
            began = time.perf_counter()
            (x @ weights)[0, 0].item()  # reading a number waits for the device
            best = max(best, flops / (time.perf_counter() - began))
    return best


def pick_precision(device: torch.device, *shape: int) -> str:
    """The precision in which a device multiplies matrices best.

    A GPU says it by its compute capability: 16 bits where it has tensor cores. A CPU
    is measured, by products of a shape, rows and width.

    Book: 15_full_gpt.html#what-the-machine-can-do
    """
    if device.type == "cuda":
        major = torch.cuda.get_device_capability(device)[0]
        return "float32" if major < 7 else "float16" if major < 8 else "bfloat16"
    if device.type != "cpu":
        return "float32"
    wide = measure_flops(device, torch.float32, *shape)
    narrow = measure_flops(device, torch.bfloat16, *shape)
    return "bfloat16" if narrow > 1.3 * wide else "float32"


@dataclass(frozen=True)
class Machine:
    """What computes, and how; it changes little of what is learned.

    That is rounding, the steps that float16 skips, and a GPU's own dropout.
    Raises ValueError for names that don't exist.

    Book: 15_full_gpt.html#what-the-machine-can-do
    """

    device: str = "cpu"  # cpu, cuda or mps
    precision: str = "float32"  # float32, bfloat16 or float16
    compile: str = "off"  # off, blocks (one program for all) or all (the whole model)
    recompute: bool = False  # keep less for the backward pass, compute it again

    def __post_init__(self) -> None:
        if self.precision not in (known := ("float32", "bfloat16", "float16")):
            raise ValueError(f"precision is one of {known}, not {self.precision!r}")
        if self.compile not in (known := ("off", "blocks", "all")):
            raise ValueError(f"compile is one of {known}, not {self.compile!r}")

    @property
    def dtype(self) -> torch.dtype:
        """In which matrices are multiplied."""
        return getattr(torch, self.precision)

    def suits_short_attention(self, context: int) -> bool:
        """Whether `short_attention` is faster than the fused kernel."""
        limit = 256 if self.precision != "float32" else 64 * (self.compile != "off")
        return self.device.startswith("cpu") and context <= limit


def short_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """`fused_attention` as two products around a softmax: faster for short contexts.

    The kernel itself runs without gradients or with a mask.

    Book: 15_full_gpt.html#fused-attention
    """
    if mask is not None or not torch.is_grad_enabled():
        return fused_attention(queries, keys, values, mask, dropout)
    T, S = queries.shape[-2], keys.shape[-2]
    if (shared := queries.shape[-3] // keys.shape[-3]) > 1:
        keys, values = (x.repeat_interleave(shared, dim=-3) for x in (keys, values))
    # -inf above the diagonal: adding it is cheaper than filling every head's scores in.
    penalty = queries.new_full((T, S), -math.inf).triu(S - T + 1)
    scores = (queries / math.sqrt(queries.shape[-1])) @ keys.mT
    return F.dropout((scores + penalty).softmax(dim=-1), dropout) @ values


def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`torch.compile`, or the plain function where no compiler works.

    Without gradients the plain function is called.

    Book: 15_full_gpt.html#compiling
    """
    fast: Callable[..., Tensor] | None = None

    def first_call(*inputs: Any) -> Tensor:
        nonlocal fast
        try:
            from torch._functorch import config as functorch  # private: it may change

            # On a CPU a GELU or a norm is calculated again, its result is not kept.
            budget = 1.0 if torch.cuda.is_available() else 0.9
            wanted: dict[str, Any] = {"activation_memory_budget": budget}
            # What would fail in the backward pass fails here.
            wanted["force_non_lazy_backward_lowering"] = True
            known = {k: v for k, v in wanted.items() if hasattr(functorch, k)}
            # One process may compile more than eight models.
            many = torch._dynamo.config.patch(recompile_limit=256)
            # PyTorch before 2.13 stores a program without its precision.
            kinds = [str(torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")]
            named = torch.compiler.config.patch(cache_key_tag=" ".join(kinds))
            fast = torch.compile(function)
            with functorch.patch(known), many, named:
                return fast(*inputs)
        except Exception as error:  # whatever a missing compiler raises
            fast = function
            reason = " ".join((str(error).strip() or repr(error)).splitlines()[:2])
            tqdm.write(f"torch.compile does not work here, going on without: {reason}")
            return function(*inputs)

    def call(*inputs: Any) -> Tensor:
        return ((fast or first_call) if torch.is_grad_enabled() else function)(*inputs)

    return call


def compiled_gelu(x: Tensor) -> Tensor:
    """GELU, as tanh(z) = 2 sigmoid(2z) - 1: on a CPU faster in a compiled program.

    Book: 15_full_gpt.html#compiling
    """
    return x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x))


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
    gelu = pytorch_gelu if machine.compile == "off" else compiled_gelu
    for block in model.blocks:
        block.attention.attend = short_attention if short else fused_attention
        if block.mlp.activation in (pytorch_gelu, compiled_gelu):
            block.mlp.activation = gelu

    def call(block: nn.Module, x: Tensor, more: dict[str, Any]) -> Tensor:
        return block(x, **more)

    run = compiled(call) if machine.compile == "blocks" else call
    if machine.recompute:
        run = partial(checkpoint, run, use_reentrant=False)

    def plain(ids: Tensor, targets: Tensor, more: dict[str, Any]) -> Tensor:
        x = model.embed(ids, torch.arange(ids.shape[1], device=ids.device))
        for block in model.blocks:
            x = run(block, x, more)
        x = model.norm(x)
        logits = padded_logits(x, model.head.weight) if cuda else model.head(x)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    whole = compiled(plain) if machine.compile == "all" else plain

    # Outside: a compiled program that switches autocast can't be stored.
    # From pinned memory a GPU fetches the batch while it computes.
    def loss(ids: Tensor, targets: Tensor) -> Tensor:
        batch = [x.pin_memory() if cuda else x for x in (ids, targets)]
        batch = [x.to(device, non_blocking=cuda) for x in batch]
        # A compiled program would calculate the rotary tables in every kernel.
        more = {}
        if isinstance(model, modern.ModernGPT):
            more["rotation"] = model.rotation(0, batch[0])
        with torch.autocast(device.type, machine.dtype, machine.precision != "float32"):
            return whole(*batch, more)

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
        if getattr(call, "__name__", "") in ("normal_", "uniform_", "kaiming_uniform_"):
            return a[0] if a else k["tensor"]
        return call(*a, **(k or {}))


def on_paper(config: GPTConfig) -> GPT:
    """A model of shapes, without memory and in no time.

    Raises ValueError for shapes that are too large to count.

    Book: 15_full_gpt.html#the-plan
    """
    try:
        with torch.device("meta"), _NoStart():
            return build(config)
    except (RuntimeError, TypeError) as error:  # beyond 64 bits
        raise ValueError("too large to count: lower width or vocab_size") from error


@cache
def count(config: GPTConfig) -> tuple[int, int]:
    """Parameters and FLOPs a token of a model, from those of one layer and of two.

    Raises ValueError for shapes that are too large to count.

    Book: 15_full_gpt.html#the-plan
    """
    models = (on_paper(replace(config, layers=layers)) for layers in (1, 2))
    one, two = ((m.parameter_count(), m.flops_per_token()) for m in models)
    more = config.layers - 1
    return one[0] + more * (two[0] - one[0]), one[1] + more * (two[1] - one[1])


def kept_by_token(model: GPTConfig, machine: Machine) -> int:
    """Bytes kept of one token for the backward pass, by the blocks and the logits.

    Counted for these blocks; Korthikanti et al. (2022) have the same terms.

    Book: 15_full_gpt.html#the-plan
    """
    C, block = model.width, on_paper(replace(model, layers=1)).blocks[0]
    # What the matrices multiply, queries, keys and values, and both sides of GELU.
    kept = 3 * C + block.attention.qkv.out_features + 2 * block.mlp.expand.out_features
    # Rotated queries and keys are new tensors; two products keep a table for each head.
    kept += 3 * C * (getattr(model, "positions", "learned") == "rotary")
    kept += machine.suits_short_attention(model.context) * model.heads * model.context
    weighted = getattr(model, "norm_weight", False) and model.norm == "rms"
    wide = 1 + getattr(model, "normalize_qk", False) + weighted  # 8 C in 32 bits
    block_bytes = machine.dtype.itemsize * kept + 8 * C * wide
    return model.layers * block_bytes + 12 * model.vocab_size


def memory_needed(model: GPTConfig, training: TrainConfig, machine: Machine) -> int:
    """Bytes that training takes at its peak, about: parameters and activations.

    16 for every parameter (weight, gradient, AdamW's two means), 18 in 16 bits. For
    every token what the blocks keep, and 12 a logit. With recomputation one block's,
    and the 4 C that flow into each. Compiled programs take less.

    Book: 15_full_gpt.html#the-plan
    """
    again, each = machine.recompute, 16 if machine.precision == "float32" else 18
    part = replace(model, layers=1) if again else model
    kept = kept_by_token(part, machine) + again * 4 * model.layers * model.width
    tokens = -(-training.batch_size // training.accumulate) * model.context
    return each * count(model)[0] + tokens * kept


# FLOP a second of 16-bit matrix products, from the makers' data sheets.
DATA_SHEETS = {"T4": 65e12, "V100": 125e12, "V100 PCIE": 112e12, "L4": 121e12}
DATA_SHEETS |= {"A100": 312e12, "H100": 989e12, "H100 PCIe": 756e12}
DATA_SHEETS |= {"H100 NVL": 835e12, "H200": 989e12, "H200 NVL": 835e12}


def peak_flops(machine: Machine, *shape: int) -> float:
    """FLOP a second that it can do: a GPU's data sheet, otherwise measured.

    shape: rows and width of the products to measure, as in `measure_flops`.

    Book: 15_full_gpt.html#the-plan
    """
    device = torch.device(machine.device)
    if device.type == "cuda":
        shape = (8192, 4096)
        words = set(torch.cuda.get_device_name(device).replace("-", " ").split())
        fitting = [name for name in DATA_SHEETS if set(name.split()) <= words]
        if fitting and "MIG" not in words and machine.precision != "float32":
            return DATA_SHEETS[max(fitting, key=len)]  # the longest name says most
    return measure_flops(device, machine.dtype, *shape)


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

        On a CPU the products at their measured speed, and 1.2 nanoseconds for each byte
        that is kept, as measured on one thread; with more we assume that they share
        it. Of a GPU's data sheet a third is assumed.
        """
        m, t, on = self.model, self.training, self.machine
        looks = t.steps // t.evaluate_every * t.evaluation_crops * m.context
        work = (self.tokens * (1 + on.recompute / 3) + looks / 3) * count(m)[1]
        if isinstance(t, MuonConfig):  # its products, 4 rounds a step
            work += t.steps * 176 * m.layers * m.width**3
        if on.device.startswith("cuda"):
            return 3 * work / self.peak_flops
        kept = self.tokens * kept_by_token(m, on)
        return work / self.peak_flops + 1.2e-9 * kept / torch.get_num_threads()

    @property
    def memory(self) -> int:
        """About how many bytes of tensors it will need."""
        return memory_needed(self.model, self.training, self.machine)

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
OPTIMIZERS = {"adamw": TrainConfig, "muon": MuonConfig}
RECIPES = {"gpt2": modern.GPT2_CHOICES, "modern": {}, "llama": modern.LLAMA_CHOICES}


def memory_of(device: torch.device) -> float:
    """Bytes of memory of a GPU, or of the computer; infinite where nothing tells.

    Book: 15_full_gpt.html#the-plan
    """
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):  # Windows
        return math.inf
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def fit_memory(plan: Plan, memory: float, given: set[str]) -> Plan:
    """Split the batch, then recompute, until a plan fits; what was given stays.

    Raises ValueError where nothing fits.

    Book: 15_full_gpt.html#the-plan
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
            advice = "lower width, layers, context or batch_size"
            raise ValueError(f"{due} needed, {there} there for tensors: {advice}")
    return plan


def preset(device: torch.device) -> dict[str, Any]:
    """What suits a device when nothing else is said: size, context, batch, steps.

    Book: 15_full_gpt.html#the-plan
    """
    if device.type != "cuda":
        return {"size": "micro", "context": 64, "batch_size": 16, "steps": 2000}
    if memory_of(device) < 30e9:
        return {"size": "mini", "context": 256, "batch_size": 64, "steps": 5000}
    large = {"size": "small", "context": 1024, "batch_size": 32, "steps": 5000}
    return {**large, "evaluate_every": 1000}


def names(*kinds: Any) -> set[str]:
    """The fields of dataclasses.

    Book: 15_full_gpt.html#the-plan
    """
    return {field.name for kind in kinds for field in fields(kind)}


def take(kind: Any, values: dict[str, Any]) -> Any:
    """A dataclass made of those values that it has fields for.

    Book: 15_full_gpt.html#the-plan
    """
    return kind(**{k: v for k, v in values.items() if k in names(kind)})


def make_plan(
    vocab_size: int,
    size: str | None = None,
    recipe: str = "gpt2",
    device: str | None = None,
    cards: int = 1,
    **values: Any,
) -> Plan:
    """Choose everything for a run on this machine; any value can be given instead.

    size: one of `SIZES`. recipe: "gpt2", "modern" (for `ModernConfig`) or "llama".
    cards: how many GPUs share model and batch (chapter 22).
    values: fields of ModernConfig, MuonConfig and Machine, and optimizer, "adamw" or
    "muon", by default Muon where a run has to be short or the recipe is modern.
    Raises ValueError for names and values that don't exist, and for what can't fit.

    Book: 15_full_gpt.html#the-plan
    """
    chosen, given = pick_device(device), set(values)
    suited = preset(chosen)
    best = "muon" if chosen.type != "cuda" or recipe == "modern" else "adamw"
    optimizer = values.pop("optimizer", best)
    size = suited["size"] if size is None else size
    for value, known in ((size, SIZES), (recipe, RECIPES), (optimizer, OPTIMIZERS)):
        if value not in known:
            raise ValueError(f"{value!r} is none of {', '.join(known)}")
    sizes = dict(zip(("layers", "heads", "width"), SIZES[size], strict=True))
    values = {**suited, **sizes, **RECIPES[recipe], **values, "device": str(chosen)}
    changed = recipe != "gpt2" or given & (names(ModernConfig) - names(GPTConfig))
    kinds = ModernConfig if changed else GPTConfig, OPTIMIZERS[optimizer], Machine
    if unknown := given - {"optimizer"} - names(*kinds):
        if "matrix_learning_rate" in unknown:
            raise ValueError("matrix_learning_rate is for the optimizer muon")
        where = ", ".join(kind.__name__ for kind in kinds)
        raise ValueError(f"no {', '.join(sorted(unknown))} in {where}")
    model = take(kinds[0], {"vocab_size": vocab_size, **values})
    rate = {"adamw": 0.4, "muon": 0.8}[optimizer] / model.width
    training = take(kinds[1], {"learning_rate": rate, **values})
    if "warmup" not in given:
        training = replace(training, warmup=min(50, training.steps // 10))
    # Larger products than these are no faster.
    shape = min(training.batch_size * model.context, 2048), min(model.width, 1024)
    if "precision" not in given:
        values["precision"] = pick_precision(chosen, *shape)
    machine = take(Machine, values)
    plan = Plan(model, training, machine, peak_flops(machine, *shape))
    if "compile" not in given and chosen.type in ("cpu", "cuda") and plan.seconds > 120:
        # To compile the whole model takes longer.
        scope = "all" if chosen.type == "cuda" or plan.seconds > 600 else "blocks"
        plan = replace(plan, machine=replace(machine, compile=scope))
    memory = 0.85 * memory_of(chosen) * (cards if chosen.type == "cuda" else 1)
    return fit_memory(plan, memory, given)
