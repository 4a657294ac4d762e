# Written by tools/tangle.py from book/15_full_gpt.ipynb: change it there.
"""The machine: its device and precision, and what a training run will cost on it."""

import math
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from datetime import timedelta
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from tqdm.auto import tqdm

from glassgpt.attention import causal_mask
from glassgpt.data import TokenData
from glassgpt.gpt import GPT, GPTConfig
from glassgpt.heads import fused_attention
from glassgpt.mlp import pytorch_gelu
from glassgpt.modern import (
    GPT2_CHOICES,
    LLAMA_CHOICES,
    ModernConfig,
    MuonConfig,
    build,
    muon_optimizers,
)
from glassgpt.training import TrainConfig, Trainer, make_optimizers


def pick_device(name: str | None = None) -> torch.device:
    """The named device, or the best one here: a GPU, Apple's, or the CPU.

    Raises ValueError for a name that this machine does not have.

    Book: 15_full_gpt.html#the-module
    """
    if name is None:
        found = torch.accelerator.current_accelerator(check_available=True)
        name = found.type if found else "cpu"
    try:
        if torch.device(name).type == "meta":
            raise RuntimeError("it computes nothing")
        return torch.ones(1, device=name).add_(1).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0].split(". ")[0]
        raise ValueError(
            f"there is no device {name!r} to use: {reason}. Try cpu, cuda or mps"
        ) from None


def measure_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP a second of matrix products, the best of several; takes under a second.

    Book: 15_full_gpt.html#the-module
    """
    best = 0.0
    for size in (256, 1024, 8192):
        a, b = torch.ones(2, size, size, dtype=dtype, device=device)
        for _ in range(4):
            began = time.perf_counter()
            (a @ b)[0, 0].item()  # reading a number waits for the device
            best = max(best, 2 * size**3 / (time.perf_counter() - began))
        if 2 * (4 * size) ** 3 / best > 0.1:  # the next size would take too long
            break
    return best


def pick_precision(device: torch.device) -> str:
    """The precision in which a device multiplies matrices best.

    A GPU says it by its compute capability: 16 bits where it has tensor cores, units
    for products of small matrices. A CPU is measured.

    Book: 15_full_gpt.html#the-module
    """
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability >= (8, 0):
            return "bfloat16"
        return "float16" if capability >= (7, 0) else "float32"
    if device.type != "cpu":
        return "float32"
    gain = measure_flops(device, torch.bfloat16) / measure_flops(device, torch.float32)
    return "bfloat16" if gain > 1.3 else "float32"


@dataclass(frozen=True)
class Machine:
    """What computes, and how; none of it changes what is learned, up to rounding.

    Raises ValueError for names that don't exist.

    Book: 15_full_gpt.html#the-module
    """

    device: str = "cpu"  # cpu, cuda or mps
    precision: str = "float32"  # float32, bfloat16 or float16
    compile: str = "off"  # off, blocks (one program for all) or all (the whole model)
    recompute: bool = False  # keep less for the backward pass, compute it again

    def __post_init__(self) -> None:
        if self.precision not in ("float32", "bfloat16", "float16"):
            raise ValueError(
                f"precision is float32, bfloat16 or float16, not {self.precision!r}"
            )
        if self.compile not in ("off", "blocks", "all"):
            raise ValueError(f"compile is off, blocks or all, not {self.compile!r}")

    @property
    def dtype(self) -> torch.dtype:
        """In which matrices are multiplied."""
        return getattr(torch, self.precision)


def short_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """`fused_attention` as two products around a softmax: faster for short contexts.

    Book: 15_full_gpt.html#the-module
    """
    if not torch.is_grad_enabled():
        return fused_attention(queries, keys, values, mask, dropout)
    T, S = queries.shape[-2], keys.shape[-2]
    if mask is None:
        mask = causal_mask(S, device=keys.device)[S - T :]
    # Adding one table to all heads is cheaper than filling their scores in.
    penalty = torch.zeros_like(mask, dtype=queries.dtype).masked_fill(~mask, -math.inf)
    scores = (queries / math.sqrt(queries.shape[-1])) @ keys.transpose(-2, -1)
    weights = F.dropout((scores + penalty).softmax(dim=-1), dropout)
    return weights @ values


def compiled_gelu(x: Tensor) -> Tensor:
    """GELU's tanh form by a sigmoid: a compiled program is faster with it.

    Book: 15_full_gpt.html#the-module
    """
    inner = 2 * math.sqrt(2 / math.pi) * x * (1 + 0.044715 * x * x)
    return x * torch.sigmoid(inner)


def suits_short_attention(context: int, machine: Machine) -> bool:
    """Whether `short_attention` is the faster one.

    Book: 15_full_gpt.html#the-module
    """
    limit = 64 if machine.compile != "off" else 0
    limit = limit if machine.precision == "float32" else 256
    return torch.device(machine.device).type == "cpu" and context <= limit


def choose_kernels(model: GPT, machine: Machine) -> None:
    """Let attention and GELU of a model compute in the way that is fastest here.

    Book: 15_full_gpt.html#the-module
    """
    short = suits_short_attention(model.config.context, machine)
    old, new = pytorch_gelu, compiled_gelu
    if machine.compile == "off":
        old, new = new, old
    for block in model.blocks:
        block.attention.attend = short_attention if short else fused_attention
        if getattr(block.mlp, "activation", None) is old:
            block.mlp.activation = new


def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`torch.compile`, or the plain function where no compiler works.

    Without gradients the plain function is called.

    Book: 15_full_gpt.html#the-module
    """
    chosen: list[Callable[..., Tensor]] = []

    def first_call(*inputs: Any) -> Tensor:
        from torch._functorch import config as functorch  # private: it may change
        from torch.compiler import config as compiler

        choices: dict[str, Any] = {"force_non_lazy_backward_lowering": True}
        choices["activation_memory_budget"] = 1.0 if torch.cuda.is_available() else 0.9
        known = {k: v for k, v in choices.items() if hasattr(functorch, k)}
        # PyTorch before 2.13 stores a program without the precision it was made for.
        types = [str(torch.get_autocast_dtype(device)) for device in ("cpu", "cuda")]
        try:
            fast = torch.compile(function)
            with (
                functorch.patch(known),
                torch._dynamo.config.patch(recompile_limit=256),
                compiler.patch(cache_key_tag=" ".join(types)),
            ):
                result = fast(*inputs)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a missing compiler raises
            reason = " ".join((str(error).strip() or repr(error)).splitlines()[:2])
            tqdm.write(f"torch.compile does not work here, going on without: {reason}")
            chosen.append(function)
            return function(*inputs)
        chosen.append(fast)
        return result

    def call(*inputs: Any) -> Tensor:
        if not torch.is_grad_enabled():
            return function(*inputs)
        return (chosen or [first_call])[0](*inputs)

    return call


def padded_logits(x: Tensor, weight: Tensor) -> Tensor:
    """Logits of x (..., C) for a table (V, C), padded to a multiple of 64 with -inf.

    Tensor cores multiply such sizes faster; what is -inf takes no part in a softmax.

    Book: 15_full_gpt.html#the-module
    """
    missing = -len(weight) % 64
    bias = F.pad(x.new_zeros(len(weight)), (0, missing), value=-math.inf)
    return F.linear(x, F.pad(weight, (0, 0, 0, missing)), bias)


def make_loss(model: GPT, machine: Machine) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss of a `Trainer` at a machine's precision, compiled and recomputed.

    Book: 15_full_gpt.html#the-module
    """
    device, cuda = torch.device(machine.device), "cuda" in machine.device
    choose_kernels(model, machine)

    def call(block: nn.Module, x: Tensor) -> Tensor:
        return block(x)

    call_block = compiled(call) if machine.compile == "blocks" else call

    def plain(ids: Tensor, targets: Tensor) -> Tensor:
        x = model.embed(ids, torch.arange(ids.shape[1], device=ids.device))
        for block in model.blocks:
            if machine.recompute and torch.is_grad_enabled():
                x = checkpoint(call_block, block, x, use_reentrant=False)
            else:
                x = call_block(block, x)
        x = model.norm(x)
        logits = padded_logits(x, model.head.weight) if cuda else model.head(x)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    whole = compiled(plain) if machine.compile == "all" else plain

    # Outside: a compiled program that switches autocast can't be stored.
    def loss(*batch: Tensor) -> Tensor:
        if cuda:  # copied while the GPU computes; that takes memory in one piece
            batch = tuple(ids.contiguous().pin_memory() for ids in batch)
        ids, targets = (ids.to(device, non_blocking=cuda) for ids in batch)
        narrow = machine.dtype != torch.float32
        with torch.autocast(device.type, machine.dtype, enabled=narrow):
            return whole(ids, targets)

    return loss


class ScaledTrainer(Trainer):
    """A `Trainer` in float16: the loss is scaled, so that no gradient becomes zero.

    Raises FloatingPointError where gradients overflow however they are scaled.

    Book: 15_full_gpt.html#the-module
    """

    def __init__(self, *arguments: Any, **named: Any):
        super().__init__(*arguments, **named)
        self.scaler = torch.amp.GradScaler(self.device.type)

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()

    def update(self) -> Tensor:
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if norm.isfinite():
            super().update()
        elif self.scaler.get_scale() < 1e-3:
            raise FloatingPointError(
                f"at step {self.step} the gradients overflow in float16 however they "
                "are scaled: lower the learning rate, or take another precision"
            )
        self.model.zero_grad()
        self.scaler.update()
        return norm.nan_to_num(0.0, 0.0)  # a skipped step is no error

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        if "scaler" in state:
            self.scaler.load_state_dict(state["scaler"])


class _NoStart(TorchFunctionMode):
    """Nothing is drawn: on the meta device that makes PyTorch import its compiler."""

    def __torch_function__(
        self, function: Any, types: Any, inputs: Any = (), options: Any = None
    ) -> Any:
        options = options or {}
        drawing = ("normal_", "uniform_", "kaiming_uniform_")
        if getattr(function, "__name__", "") in drawing:
            return inputs[0] if inputs else options["tensor"]
        return function(*inputs, **options)


def on_paper(config: GPTConfig) -> GPT:
    """A model of shapes, without memory and in no time.

    Book: 15_full_gpt.html#the-module
    """
    with torch.device("meta"), _NoStart():
        return build(config)


def count(config: GPTConfig) -> tuple[int, int]:
    """Parameters and FLOPs a token of a model, without making its layers.

    Book: 15_full_gpt.html#the-module
    """
    one, two = (on_paper(replace(config, layers=layers)) for layers in (1, 2))
    counts = []
    for a, b in (
        (one.parameter_count(), two.parameter_count()),
        (one.flops_per_token(), two.flops_per_token()),
    ):
        counts.append(a + (config.layers - 1) * (b - a))
    return counts[0], counts[1]


def _kept_by_block(model: GPTConfig, machine: Machine) -> int:
    """Bytes that one block keeps of one token for the backward pass."""
    narrow = machine.precision != "float32"
    numbers = 36 if narrow else 64
    if getattr(model, "normalize_qk", False):
        numbers += 14 if narrow else 12
    elif getattr(model, "positions", "learned") == "rotary":
        numbers += 6 if narrow else 12
    short = suits_short_attention(model.context, machine)
    table = (2 if narrow else 4) * model.heads * model.context if short else 0
    return numbers * model.width + table


def memory_needed(model: GPTConfig, training: TrainConfig, machine: Machine) -> int:
    """Bytes that training takes at its peak, about: parameters and activations.

    16 for every parameter (weight, gradient, AdamW's two means), 18 in 16 bits. For
    every token what the blocks keep, and 12 a logit. With recomputation one block's,
    and the 4 C that flow into each. Compiled programs take less.
    Source: Korthikanti et al. (2022), section 4; counted for these blocks.

    Book: 15_full_gpt.html#the-module
    """
    each = 16 if machine.precision == "float32" else 18
    layers = model.layers * _kept_by_block(model, machine)
    if machine.recompute:
        layers = layers // model.layers + model.layers * 4 * model.width
    tokens = -(-training.batch_size // training.accumulate) * model.context
    return each * count(model)[0] + tokens * (layers + 12 * model.vocab_size)


# FLOP a second of dense 16-bit matrix products, from the makers' data sheets.
DATA_SHEETS = {"T4": 65e12, "V100": 125e12, "A100": 312e12, "L4": 121e12}
DATA_SHEETS |= {"H100": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H200": 989e12}


def peak_flops(machine: Machine) -> float:
    """FLOP a second that it can do: a GPU's data sheet, otherwise measured.

    Book: 15_full_gpt.html#the-module
    """
    device = torch.device(machine.device)
    if device.type == "cuda" and machine.precision != "float32":
        words = set(re.split(r"[\s-]", torch.cuda.get_device_name(device)))
        fitting = [name for name in DATA_SHEETS if set(name.split()) <= words]
        if fitting and "MIG" not in words:  # the longest name says most
            return DATA_SHEETS[max(fitting, key=len)]
    return measure_flops(device, machine.dtype)


@dataclass(frozen=True)
class Plan:
    """A model, how to train it, and on what. peak_flops: what it can do a second.

    Book: 15_full_gpt.html#the-module
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
        """About how long the run will take."""
        work = self.flops * (4 / 3 if self.machine.recompute else 1)
        return work / (0.2 * self.peak_flops)

    @property
    def memory(self) -> int:
        """About how many bytes of tensors it will need."""
        return memory_needed(self.model, self.training, self.machine)

    def trainer(self, data: TokenData, model: GPT | None = None) -> Trainer:
        """A trainer for data; model: one that has learned before."""
        if model is None:
            with torch.random.fork_rng():
                torch.manual_seed(self.training.seed)
                model = build(self.model)
        model.to(self.machine.device)
        if isinstance(self.training, MuonConfig):
            optimizers = muon_optimizers(model, self.training, self.machine.dtype)
        else:
            optimizers = make_optimizers(model, self.training)
        kind = ScaledTrainer if self.machine.precision == "float16" else Trainer
        loss = make_loss(model, self.machine)
        return kind(model, data, self.training, optimizers, loss)

    def describe(self) -> str:
        """The plan in a few lines, for people."""
        model, training, machine = self.model, self.training, self.machine
        rates = f"adamw, rate {training.learning_rate:.2g}"
        if isinstance(training, MuonConfig):
            rate = training.matrix_learning_rate
            rates = f"muon, rate {rate:.2g} (AdamW {training.learning_rate:.2g})"
        how = [machine.precision]
        how += [f"compiled ({machine.compile})"] * (machine.compile != "off")
        how += ["activations recomputed"] * machine.recompute
        how += [f"batches in {training.accumulate} parts"] * (training.accumulate > 1)
        return (
            f"model   {count(model)[0] / 1e6:.2f} M parameters: {model.layers} layers, "
            f"{model.heads} heads, width {model.width}, context {model.context}\n"
            f"run     {training.steps:,} steps, {self.tokens / 1e6:.1f} M tokens, "
            f"{self.flops:.1e} FLOPs\n"
            f"recipe  {rates}, batches of {training.batch_size}\n"
            f"machine {machine.device}, {', '.join(how)}: about "
            f"{self.memory / 1e9:.2f} GB of tensors, "
            f"{timedelta(seconds=round(self.seconds))}"
        )


# Layers, heads and width. "small" to "xl" are GPT-2's four.
SIZES = {
    "micro": (4, 4, 128),
    "mini": (6, 6, 384),
    "small": (12, 12, 768),
    "medium": (24, 16, 1024),
    "large": (36, 20, 1280),
    "xl": (48, 25, 1600),
}


def memory_of(device: torch.device) -> int | None:
    """Bytes of memory of a GPU, or of the computer; None where nothing tells.

    Book: 15_full_gpt.html#the-module
    """
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return None  # Windows
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def fit_memory(plan: Plan, memory: int, given: set[str]) -> Plan:
    """Split the batch, then recompute, until a plan fits; what was given stays.

    Raises ValueError where nothing fits.

    Book: 15_full_gpt.html#the-module
    """
    while plan.memory > memory:
        training, machine = plan.training, plan.machine
        if training.accumulate < training.batch_size and "accumulate" not in given:
            parts = min(2 * training.accumulate, training.batch_size)
            plan = replace(plan, training=replace(training, accumulate=parts))
        elif not machine.recompute and "recompute" not in given:
            plan = replace(plan, machine=replace(machine, recompute=True))
        else:
            raise ValueError(
                f"training would take about {plan.memory / 1e9:,.1f} GB, of which "
                f"there are {memory / 1e9:.1f}: lower width, layers, context or "
                "batch_size"
            )
    return plan


def preset(device: torch.device) -> dict[str, Any]:
    """What suits a device when nothing else is said: size, context, batch, steps.

    Book: 15_full_gpt.html#the-module
    """
    if device.type != "cuda":
        return {"size": "micro", "context": 64, "batch_size": 16, "steps": 2000}
    if (memory_of(device) or 0) < 30e9:
        return {"size": "mini", "context": 256, "batch_size": 64, "steps": 5000}
    large = {"size": "small", "context": 1024, "batch_size": 32, "steps": 5000}
    return {**large, "evaluate_every": 1000}


RECIPES = {"gpt2": GPT2_CHOICES, "modern": {}, "llama": LLAMA_CHOICES}


def make_plan(
    vocab_size: int,
    size: str | None = None,
    recipe: str = "gpt2",
    device: str | None = None,
    **values: Any,
) -> Plan:
    """Choose everything for a run on this machine; any value can be given instead.

    size: one of `SIZES`. recipe: "gpt2", "modern" (for `ModernConfig`) or "llama".
    values: fields of ModernConfig, MuonConfig and Machine, and optimizer, "adamw" or
    "muon", by default Muon where a run has to be short or the recipe is modern.
    Raises ValueError for names and values that don't exist, and for what can't fit.

    Book: 15_full_gpt.html#the-module
    """
    chosen = pick_device(device)
    suited = preset(chosen)
    size = size or suited["size"]
    if size not in SIZES:
        raise ValueError(f"size must be one of {', '.join(SIZES)}, not {size!r}")
    if recipe not in RECIPES:
        raise ValueError(f"recipe is {', '.join(RECIPES)}, not {recipe!r}")
    given = set(values)
    short = chosen.type != "cuda" or recipe == "modern"
    optimizer = values.pop("optimizer", "muon" if short else "adamw")
    if optimizer not in ("adamw", "muon"):
        raise ValueError(f"optimizer is adamw or muon, not {optimizer!r}")
    sizes = dict(zip(("layers", "heads", "width"), SIZES[size], strict=True))
    values = {**suited, **sizes, **RECIPES[recipe], **values, "device": str(chosen)}
    del values["size"]
    kinds: list[Any] = [
        ModernConfig,
        MuonConfig if optimizer == "muon" else TrainConfig,
    ]
    if recipe == "gpt2" and not (given & _names(ModernConfig)) - _names(GPTConfig):
        kinds[0] = GPTConfig
        values = {
            k: v for k, v in values.items() if k not in GPT2_CHOICES or k in given
        }
    if unknown := given - {"optimizer"} - _names(*kinds, Machine):
        raise ValueError(
            f"nothing is called {', '.join(sorted(unknown))}: see ModernConfig, "
            "TrainConfig and Machine"
        )
    if "precision" not in values:
        values["precision"] = pick_precision(chosen)
    model = _take(kinds[0], {"vocab_size": vocab_size, **values})
    rate = (0.8 if optimizer == "muon" else 0.4) / model.width
    values.setdefault("learning_rate", rate)
    values.setdefault("warmup", min(50, values["steps"] // 10))
    machine = _take(Machine, values)
    plan = Plan(model, _take(kinds[1], values), machine, peak_flops(machine))
    if "compile" not in given and chosen.type in ("cpu", "cuda") and plan.seconds > 120:
        whole = chosen.type == "cuda" or plan.seconds > 600  # it takes longer to begin
        machine = replace(machine, compile="all" if whole else "blocks")
        plan = replace(plan, machine=machine)
    memory = memory_of(chosen)
    return fit_memory(plan, int(0.85 * memory), given) if memory else plan


def _names(*kinds: Any) -> set[str]:
    return {field.name for kind in kinds for field in fields(kind)}


def _take(kind: Any, values: dict[str, Any]) -> Any:
    """A dataclass made of those values that it has fields for."""
    return kind(**{k: v for k, v in values.items() if k in _names(kind)})
