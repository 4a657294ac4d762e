# Written by tools/tangle.py from book/15_full_gpt.ipynb: change it there.
"""The machine: its device and precision, and what a training run will cost on it."""

import math
import os
import timeit
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cache, partial
from textwrap import shorten
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from glassgpt import modern
from glassgpt.data import TokenData
from glassgpt.gpt import GPT, GPTConfig
from glassgpt.heads import fused_attention
from glassgpt.modern import ModernConfig, MuonConfig, build, muon_optimizers
from glassgpt.training import (
    Loss,
    TrainConfig,
    Trainer,
    check_choices,
    make_optimizers,
    mean_loss,
)


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


Precision = Literal["float32", "bfloat16", "float16"]


def pick_precision(device: torch.device) -> Precision:
    """The precision in which a device multiplies matrices best.

    A GPU says it by its compute capability: 16 bits from 7.0 on. A CPU is timed.

    Book: 15_full_gpt.html#what-the-machine-can-do
    """
    if device.type == "cuda":
        major, _ = torch.cuda.get_device_capability(device)
        if major < 7:
            return "float32"
        if major < 8:
            return "float16"
        return "bfloat16"
    if device.type != "cpu":
        return "float32"
    wide = seconds_of_product(torch.float32)
    narrow = seconds_of_product(torch.bfloat16)
    return "bfloat16" if wide > 1.3 * narrow else "float32"


def seconds_of_product(dtype: torch.dtype) -> float:
    """Seconds that this CPU takes for a product of two matrices: the best of ten.

    Book: 15_full_gpt.html#what-the-machine-can-do
    """
    x = torch.full((512, 512), 0.5, dtype=dtype)
    return min(timeit.repeat(lambda: x @ x, number=1, repeat=10))


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


def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`torch.compile`, or the plain function where its first call fails.

    Without gradients the plain function is called.

    Book: 15_full_gpt.html#compiling
    """
    chosen: Callable[..., Tensor] | None = None

    def call(*inputs: Any) -> Tensor:
        nonlocal chosen
        if not torch.is_grad_enabled():
            return function(*inputs)
        if chosen is not None:
            return chosen(*inputs)
        try:
            # GELU's tanh written out: training GPT-2 on a CPU is about 5 % faster.
            fast = torch.compile(function, options={"cpp.use_decompose_tanh": True})
            result = fast(*inputs)
        except Exception as error:  # whatever a missing compiler raises
            result = function(*inputs)  # raises what is wrong with the inputs
            reason = shorten(str(error), 150)
            warnings.warn(
                f"torch.compile does not work here, going on without: {reason}",
                stacklevel=2,
            )
            chosen = function
            return result
        chosen = fast
        return result

    return call


def make_loss(model: GPT, machine: Machine) -> Loss:
    """The loss of a `Trainer` at a machine's precision, compiled and recomputed.

    The model's blocks are prepared for that machine, and stay so.

    Book: 15_full_gpt.html#all-together-the-loss
    """
    device = torch.device(machine.device)
    cuda = device.type == "cuda"
    short = machine.suits_short_attention(model.config.context)
    forward = type(model.blocks[0]).forward  # of every block
    if machine.compile == "blocks":
        forward = compiled(forward)
    if machine.recompute:
        forward = partial(checkpoint, forward, use_reentrant=False)
    for block in model.blocks:
        block.attention.attend = short_attention if short else fused_attention
        if machine.recompute or machine.compile == "blocks":
            block.forward = partial(forward, block)
        else:
            vars(block).pop("forward", None)  # of another machine

    def loss_of(ids: Tensor, targets: Tensor) -> Tensor:
        x = model.hidden_states(ids)
        return mean_loss(model.head(x).float(), targets)

    run = compiled(loss_of) if machine.compile == "all" else loss_of

    def loss(ids: Tensor, targets: Tensor) -> Tensor:
        if cuda:  # from pinned memory a GPU fetches while the CPU goes on
            ids, targets = ids.pin_memory(), targets.pin_memory()
        ids = ids.to(device, non_blocking=cuda)
        targets = targets.to(device, non_blocking=cuda)
        narrow = machine.precision != "float32"
        with (
            torch.autocast(device.type, machine.dtype, narrow),
            # PyTorch before 2.13 stores a compiled program without its precision.
            torch.compiler.config.patch(cache_key_tag=machine.precision),
        ):
            return run(ids, targets)

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


class _SkipInit(TorchFunctionMode):
    """Nothing is drawn.

    On the meta device a first draw imports PyTorch's compiler: 1.3 seconds of a CPU for
    a small model, where 0.01 are enough.
    """

    def __torch_function__(
        self, call: Any, types: Any, arguments: Any = (), named: Any = None
    ) -> Any:
        if call.__name__ in ("normal_", "uniform_", "kaiming_uniform_"):
            return None
        return call(*arguments, **(named or {}))


def meta_model(config: GPTConfig) -> GPT:
    """A model of shapes, without memory and in no time.

    Raises ValueError for shapes that are too large to count.

    Book: 15_full_gpt.html#the-plan
    """
    try:
        with torch.device("meta"), _SkipInit():
            return build(config)
    except (RuntimeError, TypeError) as error:  # beyond 64 bits
        raise ValueError("too large to count: lower width or vocabulary") from error


@cache
def count(config: GPTConfig) -> tuple[int, int]:
    """Parameters and FLOPs a token of a model.

    Raises ValueError for shapes that are too large to count.

    Book: 15_full_gpt.html#the-plan
    """
    # All blocks are alike: two small models say what each further block adds.
    one = meta_model(replace(config, layers=1))
    two = meta_model(replace(config, layers=2))
    further = config.layers - 1
    parameters, flops = one.parameter_count(), one.flops_per_token()
    parameters += further * (two.parameter_count() - one.parameter_count())
    flops += further * (two.flops_per_token() - one.flops_per_token())
    return parameters, flops


@cache
def numbers_of_block(config: GPTConfig) -> int:
    """Numbers of a token that a block's matrices take and give, about.

    What the last ones of attention and MLP give is added to the stream, and not kept.

    Book: 15_full_gpt.html#the-plan
    """
    numbers = -2 * config.width
    for part in meta_model(replace(config, layers=1)).blocks.modules():
        if isinstance(part, nn.Linear):
            numbers += part.in_features + part.out_features
    return numbers


@dataclass(frozen=True)
class Plan:
    """A model, how to train it, and on what.

    Book: 15_full_gpt.html#the-plan
    """

    model: GPTConfig
    training: TrainConfig
    machine: Machine

    @property
    def tokens(self) -> int:
        """Tokens seen in the whole run."""
        return self.training.steps * self.training.batch_size * self.model.context

    @property
    def flops(self) -> int:
        """FLOPs of the whole run."""
        return self.tokens * count(self.model)[1]

    @property
    def memory(self) -> int:
        """About how many bytes of tensors it will need at its peak.

        16 for every parameter (weight, gradient, AdamW's moments), 18 in 16 bits. For
        every token what the blocks keep, and 12 bytes a logit. With recomputation what
        one block keeps, and 4 C bytes that flow into each.
        """
        model, training, machine = self.model, self.training, self.machine
        narrow = numbers_of_block(model)
        if machine.suits_short_attention(model.context):  # it keeps each head's table
            narrow += model.heads * model.context
        wide = 2 * model.width  # what the norms take, in 32 bits
        if isinstance(model, ModernConfig):
            wide += 4 * model.width  # queries and keys, turned and normalized
        block = 4 * wide + machine.dtype.itemsize * narrow
        if machine.recompute:
            kept = block + 4 * model.width * model.layers
        else:
            kept = block * model.layers
        crops = math.ceil(training.batch_size / training.accumulate)
        tokens = crops * model.context
        each = 16 if machine.precision == "float32" else 18
        parameters, _ = count(model)
        return each * parameters + tokens * (kept + 12 * model.vocab_size)

    def trainer(
        self,
        data: TokenData,
        model: GPT | None = None,
        kind: Callable[..., Trainer] | None = None,
        start: str | None = None,
    ) -> Trainer:
        """A trainer for data.

        model: one that has learned before. kind: its class, for many processes (chapter
        25). start: where the model is made, if not on its device.
        """
        training, machine = self.training, self.machine
        with torch.random.fork_rng():
            torch.manual_seed(training.seed)
            model = (model or build(self.model)).to(start or machine.device)
        if isinstance(training, MuonConfig):
            optimizers = muon_optimizers(model, training, machine.dtype)
        else:
            optimizers = make_optimizers(model, training)
        if kind is None:
            kind = ScaledTrainer if machine.precision == "float16" else Trainer
        return kind(model, data, training, optimizers, make_loss(model, machine))

    def describe(self) -> str:
        """The plan in a few lines, for people."""
        model, training, machine = self.model, self.training, self.machine
        architecture = "GPT-2"
        if isinstance(model, ModernConfig):
            architecture = "modern, not GPT-2"
        parameters, _ = count(model)
        rates = f"adamw, rate {training.learning_rate:.2g}"
        if isinstance(training, MuonConfig):
            rates = f"muon, rate {training.matrix_learning_rate:.2g} ({rates})"
        batches = f"batches of {training.batch_size}"
        if training.accumulate > 1:
            batches += f" in {training.accumulate} micro-batches"
        computing = f"{machine.device}, {machine.precision}, compile {machine.compile}"
        if machine.recompute:
            computing += ", recomputed"
        return (
            f"model   {architecture}: {parameters / 1e6:.2f} M parameters, "
            f"{model.layers} layers, {model.heads} heads, width {model.width}, "
            f"context {model.context}\n"
            f"run     {training.steps:,} steps, {self.tokens / 1e6:.1f} M tokens, "
            f"{self.flops:.1e} FLOPs\n"
            f"recipe  {rates}, {batches}\n"
            f"machine {computing}: about {self.memory / 1e9:.2f} GB of tensors"
        )


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
    training = plan.training
    if "accumulate" not in given:
        while plan.memory > memory and training.accumulate < training.batch_size:
            parts = min(2 * training.accumulate, training.batch_size)
            training = replace(training, accumulate=parts)
            plan = replace(plan, training=training)
    if plan.memory > memory and "recompute" not in given:
        plan = replace(plan, machine=replace(plan.machine, recompute=True))
    if plan.memory > memory:
        raise ValueError(
            f"{plan.memory / 1e9:,.1f} GB needed, {memory / 1e9:.1f} there for tensors:"
            " lower width, layers, vocabulary, context or batch size"
        )
    return plan


# Layers, heads and width. "small" to "xl" are GPT-2's four.
SIZES = {
    "micro": (4, 4, 128),
    "mini": (6, 6, 384),
    "small": (12, 12, 768),
    "medium": (24, 16, 1024),
    "large": (36, 20, 1280),
    "xl": (48, 25, 1600),
}
RECIPES = {"gpt2": modern.GPT2_CHOICES, "modern": {}, "llama": modern.LLAMA_CHOICES}
OPTIMIZERS = ("adamw", "muon")


class Preset(NamedTuple):
    """What suits a device and a size when nothing else is said.

    Book: 15_full_gpt.html#what-a-plan-chooses
    """

    context: int
    batch_size: int
    beta2: float


def usual_size(device: torch.device) -> str:
    """A small model for a CPU, a larger one for a GPU with its memory.

    Book: 15_full_gpt.html#what-a-plan-chooses
    """
    if device.type != "cuda":
        return "micro"
    return "mini" if memory_of(device) < 30e9 else "small"


def preset(device: torch.device, size: str) -> Preset:
    """Short sequences on a CPU; on a GPU half a million tokens a step from small on.

    Book: 15_full_gpt.html#what-a-plan-chooses
    """
    if device.type != "cuda":
        return Preset(context=64, batch_size=16, beta2=0.99)
    if size in ("micro", "mini"):
        return Preset(context=256, batch_size=64, beta2=0.99)
    return Preset(context=1024, batch_size=512, beta2=0.95)


def usual_steps(device: torch.device, model: GPTConfig, batch_size: int) -> int:
    """2,000 on a CPU; on a GPU what 20 tokens for each parameter take.

    Book: 15_full_gpt.html#what-a-plan-chooses
    """
    if device.type != "cuda":
        return 2000
    parameters, _ = count(model)
    return math.ceil(20 * parameters / (batch_size * model.context))


def names(*kinds: Any) -> set[str]:
    """The fields of dataclasses.

    Book: 15_full_gpt.html#what-a-plan-chooses
    """
    return {field.name for kind in kinds for field in fields(kind)}


def given_for(default: Any, given: dict[str, Any]) -> Any:
    """A dataclass like `default`, with those given values that are its fields.

    Book: 15_full_gpt.html#what-a-plan-chooses
    """
    own = names(default)
    return replace(default, **{k: v for k, v in given.items() if k in own})


def make_plan(
    vocab_size: int,
    size: str | None = None,
    recipe: str = "gpt2",
    device: str | None = None,
    gpus: int = 1,
    optimizer: str | None = None,
    **given: Any,
) -> Plan:
    """Choose everything for a run on this machine; any value can be given instead.

    size: one of `SIZES`. recipe: "gpt2", "modern" (for `ModernConfig`) or "llama".
    gpus: how many share model and batch (chapter 25). optimizer: "adamw" or
    "muon", by default Muon where a run has to be short or the recipe is modern.
    given: fields of ModernConfig, MuonConfig and Machine.
    Raises ValueError for names and values that don't exist, and for what can't fit.

    Book: 15_full_gpt.html#what-a-plan-chooses
    """
    on = pick_device(device)
    size = size or usual_size(on)
    if optimizer is None:
        optimizer = "adamw" if on.type == "cuda" and recipe != "modern" else "muon"
    for value, known in ((size, SIZES), (recipe, RECIPES), (optimizer, OPTIMIZERS)):
        if value not in known:
            raise ValueError(f"{value!r} is none of {', '.join(known)}")
    modern_only = names(ModernConfig) - names(GPTConfig)
    model_kind = GPTConfig
    if recipe != "gpt2" or modern_only & set(given):
        model_kind = ModernConfig
    training_kind = MuonConfig if optimizer == "muon" else TrainConfig
    unknown = set(given) - names(model_kind, training_kind, Machine)
    if unknown:
        raise ValueError(f"a run with {optimizer} has no {', '.join(sorted(unknown))}")

    # The model.
    usual = preset(on, size)
    layers, heads, width = SIZES[size]
    model = model_kind(
        vocab_size, context=usual.context, layers=layers, heads=heads, width=width
    )
    if isinstance(model, ModernConfig):
        model = replace(model, **RECIPES[recipe])
    model = given_for(model, given)

    # The training.
    batch_size = given.get("batch_size", usual.batch_size)
    steps = given.get("steps") or usual_steps(on, model, batch_size)
    training = training_kind(
        steps=steps,
        batch_size=batch_size,
        learning_rate=(0.8 if optimizer == "muon" else 0.4) / model.width,
        beta2=usual.beta2,
        warmup=min(50, steps // 10),
    )
    training = given_for(training, given)

    # The machine.
    machine = Machine(
        device=str(on),
        precision=given.get("precision") or pick_precision(on),
        compile="all" if on.type == "cuda" else "off",
    )
    machine = given_for(machine, given)

    # The memory.
    memory = 0.85 * memory_of(on)
    if on.type == "cuda":
        memory *= gpus
    return fit_memory(Plan(model, training, machine), memory, set(given))
