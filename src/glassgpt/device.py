# Written by tools/tangle.py from book/15_full_gpt.ipynb: change it there.
"""The machine: its device and precision, and what a training run will cost on it."""

import os
import re
import time
from dataclasses import dataclass, fields, replace
from datetime import timedelta
from typing import Any

import torch

from glassgpt.checkpoints import build
from glassgpt.gpt import GPT, GPTConfig
from glassgpt.modern import GPT2_CHOICES, ModernConfig
from glassgpt.training import TrainConfig, suits_short_attention


def _on_paper(config: GPTConfig) -> GPT:
    """A model without memory, to be counted."""
    with torch.device("meta"):
        return build(config)


def _kept_by_block(model: GPTConfig, training: TrainConfig) -> int:
    """Bytes that one block keeps of one token for the backward pass."""
    narrow = training.precision in ("bfloat16", "float16")
    numbers = 36 if narrow else 64
    if getattr(model, "normalize_qk", False):
        numbers += 14 if narrow else 12
    elif getattr(model, "positions", "learned") == "rotary":
        numbers += 6 if narrow else 12
    short = suits_short_attention(model.context, training)
    table = (2 if narrow else 4) * model.heads * model.context if short else 0
    return numbers * model.width + table


def memory_needed(model: GPTConfig, training: TrainConfig) -> int:
    """Bytes that training takes at its peak, about: parameters and activations.

    16 for every parameter (weight, gradient, AdamW's two means), 18 in 16 bits. For
    every token what the blocks keep, and 12 a logit. With recomputation one block's,
    and the 4 C that flow into each. Compiled programs take less.
    Source: Korthikanti et al. (2022), section 4; counted for these blocks.

    Book: 15_full_gpt.html#memory
    """
    parameters = _on_paper(model).parameter_count()
    each = 18 if training.precision in ("bfloat16", "float16") else 16
    layers = model.layers * _kept_by_block(model, training)
    if training.recompute:
        layers = layers // model.layers + model.layers * 4 * model.width
    tokens = training.batch_size * model.context
    return each * parameters + tokens * (layers + 12 * model.vocab_size)


def gpu_precision(capability: tuple[int, int]) -> str:
    """The precision in which a GPU of this compute capability multiplies matrices best.

    16 bits where it has tensor cores, units for products of small matrices.

    Book: 15_full_gpt.html#which-machine-has-what
    """
    if capability >= (8, 0):
        return "bfloat16"
    return "float16" if capability >= (7, 0) else "float32"


def pick_device(name: str | None = None) -> torch.device:
    """The named device, or the best one here: a GPU, Apple's, or the CPU.

    Raises ValueError for a name that this machine does not have.

    Book: 15_full_gpt.html#which-device
    """
    if name is None and not torch.cuda.is_available():
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    name = "cuda" if name is None else name
    try:
        torch.device(name)
    except RuntimeError:
        raise ValueError(f"no device is called {name!r}: cpu, cuda or mps?") from None
    try:
        device = torch.empty(0, device=name).device
        if device.type == "cuda":
            torch.ones(1, device=device).add_(1).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0].split(". ")[0]
        raise ValueError(f"there is no device {name!r} to use: {reason}") from None
    if device.type == "meta":
        raise ValueError("the device meta computes nothing: choose cpu or cuda")
    return device


def measure_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP a second of large matrix products, the best of five tries.

    Where a try takes long there are fewer.

    Book: 15_full_gpt.html#how-fast-it-is
    """
    size, products = (1024, 1) if device.type == "cpu" else (8192, 10)
    a, b = torch.ones(2, size, size, dtype=dtype, device=device)
    seconds: list[float] = []
    while len(seconds) < 2 or (len(seconds) < 6 and sum(seconds) < 1):
        began = time.perf_counter()
        for _ in range(products):
            c = a @ b
        c[0, 0].item()  # reading a number waits for the device
        seconds.append(time.perf_counter() - began)
    return products * 2 * size**3 / min(seconds[1:])


def pick_precision(device: torch.device) -> str:
    """The precision that suits a device.

    A GPU says it by its compute capability. Of a CPU it is measured, since processors
    with the same list of features differ.

    Book: 15_full_gpt.html#how-fast-it-is
    """
    if device.type == "cuda":
        return gpu_precision(torch.cuda.get_device_capability(device))
    if device.type != "cpu":
        return "float32"
    gain = measure_flops(device, torch.bfloat16) / measure_flops(device, torch.float32)
    return "bfloat16" if gain > 1.3 else "float32"


# FLOP a second of dense 16-bit matrix products, from the makers' data sheets.
DATA_SHEETS = {
    "T4": 65e12,
    "V100": 125e12,
    "V100 PCIE": 112e12,
    "A100": 312e12,
    "L4": 121e12,
    "H100": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H200": 989e12,
    "H200 NVL": 835e12,
}


def peak_flops(device: torch.device, precision: str) -> float:
    """FLOP a second that the device can do: a GPU's data sheet, otherwise measured.

    Book: 15_full_gpt.html#how-fast-it-is
    """
    if precision == "tf32":
        gpu = device.type == "cuda"
        if gpu and torch.cuda.get_device_capability(device) >= (8, 0):
            return peak_flops(device, "bfloat16") / 2
        precision = "float32"
    if device.type == "cuda" and precision != "float32":
        words = set(re.split(r"[\s-]", torch.cuda.get_device_name(device)))
        fitting = [name for name in DATA_SHEETS if set(name.split()) <= words]
        if fitting and "MIG" not in words:  # the longest name says most
            return DATA_SHEETS[max(fitting, key=len)]
    return measure_flops(device, getattr(torch, precision))


def fit_batch(
    model: GPTConfig, training: TrainConfig, memory: float, may_recompute: bool = True
) -> TrainConfig:
    """Halve the batch and double `accumulate` until training fits into `memory` bytes.

    Where one crop doesn't fit, recompute. Raises ValueError where that doesn't fit, or
    isn't allowed.

    Book: 15_full_gpt.html#when-memory-is-short
    """
    while (needed := memory_needed(model, training)) > memory:
        if training.batch_size > 1:
            half, twice = training.batch_size // 2, training.accumulate * 2
            training = replace(training, batch_size=half, accumulate=twice)
        elif may_recompute and not training.recompute:
            training = replace(training, recompute=True)
        else:
            raise ValueError(
                f"one crop takes about {needed / 1e9:.1f} GB, of which there are "
                f"{memory / 1e9:.1f}: choose a smaller size or context"
            )
    return training


@dataclass
class Plan:
    """A model, how to train it, and on what. peak_flops: what it can do a second.

    Book: 15_full_gpt.html#the-plan
    """

    model: GPTConfig
    training: TrainConfig
    device: torch.device
    peak_flops: float

    @property
    def tokens(self) -> int:
        """Tokens seen in the whole run."""
        t = self.training
        return t.steps * t.batch_size * t.accumulate * self.model.context

    @property
    def flops(self) -> int:
        """FLOPs of the whole run."""
        return self.tokens * _on_paper(self.model).flops_per_token()

    @property
    def seconds(self) -> float:
        """Time the run will take if it uses a fifth of the machine's peak."""
        work = self.flops * (4 / 3 if self.training.recompute else 1)
        return work / (0.2 * self.peak_flops)

    def describe(self) -> str:
        """The plan in a few lines, for people."""
        model, training = self.model, self.training
        memory = memory_needed(model, training)
        duration = timedelta(seconds=round(self.seconds))
        parameters = _on_paper(model).parameter_count()
        compiled = {"off": "", "blocks": ", blocks compiled", "all": ", compiled"}
        how = training.precision + compiled[training.compile]
        rates = f"rate {training.learning_rate:.2g}"
        if training.optimizer == "muon":
            adamw = f"(AdamW {training.learning_rate:.2g})"
            rates = f"rate {training.matrix_learning_rate:.2g} {adamw}"
        again = ", activations recomputed" if training.recompute else ""
        return (
            f"model   {parameters / 1e6:.2f} M parameters: {model.layers} layers, "
            f"{model.heads} heads, width {model.width}, context {model.context}\n"
            f"run     {training.steps:,} steps, {self.tokens / 1e6:.1f} M tokens, "
            f"{self.flops:.1e} FLOPs\n"
            f"recipe  {training.optimizer}, {rates}, "
            f"batches of {training.batch_size * training.accumulate}\n"
            f"machine {self.device.type}, {how}{again}: about "
            f"{memory / 1e9:.2f} GB of tensors, {duration}"
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


# The optimizer of the modern recipe, and of every run that has to be short.
_MUON = {"optimizer": "muon", "schedule": "linear", "final_rate": 0.0}


def _memory(device: torch.device) -> int | None:
    """Bytes of memory of a GPU, or of the computer; None where nothing tells."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return None  # Windows
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _fit_memory(
    model: GPTConfig, training: TrainConfig, memory: int, may_recompute: bool
) -> TrainConfig:
    """Recompute where a run does not fit otherwise. Raises ValueError."""
    if memory_needed(model, training) > memory and may_recompute:
        training = replace(training, recompute=True)
    needed = memory_needed(model, training)
    if needed > memory:
        raise ValueError(
            f"training would take about {needed / 1e9:,.0f} GB, of which there are "
            f"{memory / 1e9:.0f}: lower width, layers, context or batch_size"
        )
    return training


def _preset(device: torch.device) -> dict[str, Any]:
    """What suits a device when nothing else is said: size, context, batch, steps."""
    if device.type != "cuda":
        short = {"size": "micro", "context": 64, "batch_size": 16, "steps": 2000}
        return {**short, **_MUON}
    if (_memory(device) or 0) < 30e9:
        return {"size": "mini", "context": 256, "batch_size": 64, "steps": 5000}
    large = {"size": "small", "context": 1024, "batch_size": 32, "steps": 5000}
    seldom = {"evaluate_every": 1000, "checkpoint_every": 1000}  # each is 1.5 GB
    return {**large, **seldom}


def _configurations(
    vocab_size: int, recipe: str, values: dict[str, Any]
) -> tuple[GPTConfig, TrainConfig]:
    """Sort values by the fields of the two configurations. ValueError if in neither."""
    model_fields = {field.name for field in fields(ModernConfig)} - {"vocab_size"}
    train_fields = {field.name for field in fields(TrainConfig)}
    unknown = sorted(set(values) - model_fields - train_fields)
    if unknown:
        raise ValueError(
            f"nothing is called {', '.join(unknown)}: see GPTConfig and TrainConfig"
        )
    sizes = {k: v for k, v in values.items() if k in model_fields}
    if recipe == "modern":
        model: GPTConfig = ModernConfig(vocab_size, **sizes)
    elif sizes.keys() <= {field.name for field in fields(GPTConfig)}:
        model = GPTConfig(vocab_size, **sizes)
    else:  # GPT-2 with single choices of chapter 14
        model = ModernConfig(vocab_size, **{**GPT2_CHOICES, **sizes})
    return model, TrainConfig(**{k: v for k, v in values.items() if k in train_fields})


def _suit(
    training: TrainConfig, model: GPTConfig, given: dict[str, Any]
) -> TrainConfig:
    """The learning rate by the width and the warm-up by the steps, unless given."""
    rate = (0.8 if training.optimizer == "muon" else 0.4) / model.width
    usual = {"learning_rate": rate, "warmup": min(50, training.steps // 10)}
    return replace(training, **{k: v for k, v in usual.items() if k not in given})


def make_plan(
    vocab_size: int,
    size: str | None = None,
    recipe: str = "gpt2",
    device: str | None = None,
    **values: Any,
) -> Plan:
    """Choose everything for a run on this machine; any value can be given instead.

    size: one of `SIZES`. recipe: "gpt2", or "modern" for `ModernConfig` and Muon,
    which short runs without a GPU use in any case. values: fields of ModernConfig and
    TrainConfig. On a GPU a batch that wasn't given is split until it fits the memory.
    Raises ValueError for names and values that don't exist.

    Book: 15_full_gpt.html#the-plan
    """
    chosen = pick_device(device)
    preset = _preset(chosen)
    suited = preset.pop("size")
    size = suited if size is None else size
    if size not in SIZES:
        raise ValueError(f"size must be one of {', '.join(SIZES)}, not {size!r}")
    if recipe not in ("gpt2", "modern"):
        raise ValueError(f'recipe must be "gpt2" or "modern", not {recipe!r}')
    preset |= dict(zip(("layers", "heads", "width"), SIZES[size], strict=True))
    preset |= _MUON if recipe == "modern" else {}
    if "precision" not in values:
        preset["precision"] = pick_precision(chosen)
    model, training = _configurations(vocab_size, recipe, preset | values)
    training = _suit(training, model, values)
    plan = Plan(model, training, chosen, peak_flops(chosen, training.precision))
    compilable = chosen.type in ("cpu", "cuda") and "compile" not in values
    if compilable and plan.seconds > 120:
        whole = chosen.type == "cuda" or plan.seconds > 600  # it takes longer
        training.compile = "all" if whole else "blocks"
    memory, may_recompute = _memory(chosen), "recompute" not in values
    if memory and chosen.type == "cuda" and "batch_size" not in values:
        plan.training = fit_batch(model, training, 0.85 * memory, may_recompute)
    elif memory and chosen.type in ("cpu", "cuda"):
        plan.training = _fit_memory(model, training, memory, may_recompute)
    return plan
