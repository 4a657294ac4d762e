# Written by tools/tangle.py from book/12_training.ipynb: change it there.
"""Training: a loss, two optimizers, a schedule, and runs that resume exactly."""

import json
import math
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._functorch import config as functorch
from torch.compiler import config as compiler
from torch.utils.checkpoint import checkpoint
from tqdm.auto import tqdm

from glassgpt.attention import causal_mask
from glassgpt.checkpoints import (
    checkpoints_in,
    read_checkpoint,
    save,
    write_checkpoint,
    write_file,
)
from glassgpt.data import TokenData, Tokens
from glassgpt.gpt import GPT
from glassgpt.heads import fused_attention
from glassgpt.mlp import pytorch_gelu

_LEAST = {"steps": 1, "batch_size": 1, "accumulate": 1, "evaluate_every": 1}
_LEAST |= {"evaluation_batches": 1, "checkpoint_every": 1, "keep": 1}
_LEAST |= {"warmup": 0, "seed": 0}
_NUMBERS = ("learning_rate", "matrix_learning_rate", "final_rate")
_NUMBERS += ("weight_decay", "clip")
_CHOICES = {
    "optimizer": ("adamw", "muon"),
    "schedule": ("cosine", "linear", "stable"),
    "precision": ("float32", "tf32", "bfloat16", "float16"),
    "compile": ("off", "blocks", "all"),
}


def _validate(settings: dict[str, Any]) -> None:
    """Raise ValueError for an impossible setting."""
    for name, value in settings.items():
        least = _LEAST.get(name)
        if least is not None and (type(value) is not int or value < least):
            raise ValueError(
                f"{name} must be a whole number from {least} up, not {value!r}"
            )
        if name in _CHOICES and value not in _CHOICES[name]:
            allowed = ", ".join(_CHOICES[name])
            raise ValueError(f"{name} must be one of {allowed}, not {value!r}")
        if name in _NUMBERS and type(value) not in (int, float):
            raise ValueError(f"{name} must be a number, not {value!r}")
    if type(settings["recompute"]) is not bool:
        raise ValueError("recompute must be True or False")
    for name in ("learning_rate", "matrix_learning_rate", "clip"):
        if not 0 < settings[name] < math.inf:
            raise ValueError(
                f"{name} must be positive and finite, not {settings[name]!r}"
            )
    if not 0 <= settings["weight_decay"] < math.inf:
        raise ValueError("weight_decay can't be negative or infinite")
    if not 0 <= settings["final_rate"] <= 1:
        raise ValueError("final_rate is a share of the learning rate, from 0 to 1")
    if settings["seed"] >= 1 << 64:
        raise ValueError(f"seed must fit into 64 bits, {settings['seed']} doesn't")


@dataclass
class TrainConfig:
    """How to train. A step learns from `accumulate` batches of `batch_size` crops.

    optimizer: "adamw", or "muon" for the matrices and AdamW for the rest.
    matrix_learning_rate: Muon's. schedule: "cosine", "linear", or "stable" (constant,
    then linear over the last fifth), each after `warmup` steps and down to `final_rate`
    of the learning rate. weight_decay: on matrices only. clip: longest gradient.
    precision: "float32", "tf32", "bfloat16" or "float16". compile: "off", "blocks" (one
    program for all blocks) or "all" (the whole model, faster, but it takes longer to
    begin). recompute: keep less for the backward pass and calculate it again. Every
    `evaluate_every` steps it is judged on `evaluation_batches` fixed batches. keep: how
    many checkpoints stay. seed: of batches and dropout. Raises ValueError for
    impossible values. With more `warmup` than steps the rate only rises.

    Book: 12_training.html#settings
    """

    steps: int = 1000
    batch_size: int = 32
    accumulate: int = 1
    optimizer: str = "adamw"
    learning_rate: float = 3e-3
    matrix_learning_rate: float = 0.02
    schedule: str = "cosine"
    warmup: int = 50
    final_rate: float = 0.1
    weight_decay: float = 0.1
    clip: float = 1.0
    precision: str = "float32"
    compile: str = "off"
    recompute: bool = False
    evaluate_every: int = 250
    evaluation_batches: int = 20
    checkpoint_every: int = 250
    keep: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():  # NumPy's numbers become Python's
            if isinstance(value, np.generic):
                setattr(self, name, value.item())
        _validate(asdict(self))

    @property
    def dtype(self) -> torch.dtype:
        """In which matrices are multiplied; "tf32" is a way to do that in float32."""
        return getattr(torch, "float32" if self.precision == "tf32" else self.precision)


def rate_at(step: int, config: TrainConfig) -> float:
    """The share of the learning rate, 0 to 1, for a step counted from 0.

    Book: 12_training.html#the-schedule
    """
    if step < config.warmup:
        return (step + 1) / config.warmup
    done = (step - config.warmup) / max(config.steps - config.warmup, 1)
    if config.schedule == "cosine":
        shape = 0.5 * (1 + math.cos(math.pi * done))
    elif config.schedule == "linear":
        shape = 1 - done
    else:
        shape = min(1.0, (1 - done) / 0.2)
    return config.final_rate + (1 - config.final_rate) * shape


def _quintic(square: Tensor) -> Tensor:
    """The matrix a I + b S + c S S, by which a round multiplies X, from S = X X^T."""
    change = torch.baddbmm(square, square, square, beta=-4.7750, alpha=2.0315)
    change.diagonal(dim1=1, dim2=2).add_(3.4445)
    return change


def orthogonalize(
    matrices: Sequence[Tensor] | Tensor, rounds: int, dtype: torch.dtype
) -> Tensor:
    """Bring the singular values of each matrix near 1; their directions stay.

    matrices: N of one shape (R, C), or a tensor (N, R, C). rounds: of the iteration.
    dtype: in which to multiply. Returns (N, R, C) in that precision. A value of at
    least 0.01 of its matrix's norm ends between 0.6 and 1.3 after 4 or 5 rounds.
    Source: Jordan et al. (2024), Newton-Schulz iteration; Zhang et al. (2026).

    Book: 12_training.html#singular-values-without-computing-them
    """
    lengths = [matrix.norm().clamp(min=1e-7) for matrix in matrices]
    pairs = zip(matrices, lengths, strict=True)
    x = torch.stack([(matrix / length).to(dtype) for matrix, length in pairs])
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    for done in range(0, rounds, 2):
        square = x @ x.mT  # (N, R, R)
        change = _quintic(square)
        if done + 1 < rounds:  # a second round, before X is touched
            change = _quintic(change @ square @ change) @ change
        x = change @ x
    return x.mT if tall else x


class Muon(torch.optim.Muon):
    """PyTorch's Muon, which multiplies the matrices of one shape together.

    dtype: in which to multiply; PyTorch's is always bfloat16. Otherwise as there.
    Raises ValueError for a rate below 0 or a parameter that isn't a matrix.
    Source: Jordan et al. (2024).

    Book: 12_training.html#the-step-of-muon
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        ns_steps: int = 5,
        dtype: torch.dtype = torch.bfloat16,
    ):
        super().__init__(params, lr, weight_decay, momentum, ns_steps=ns_steps)
        self.dtype = dtype

    @torch.no_grad()
    def step(self) -> None:
        """Move every matrix that has a gradient."""
        for group in self.param_groups:
            shapes = defaultdict(list)
            for matrix in group["params"]:
                if matrix.grad is not None:
                    shapes[matrix.shape].append(matrix)
            for matrices in shapes.values():
                self._move(matrices, group)

    def _move(self, matrices: list[nn.Parameter], group: dict[str, Any]) -> None:
        """Move matrices of one shape."""
        ahead = []
        for matrix in matrices:
            state = self.state[matrix]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(matrix)
            mean = state["momentum_buffer"].lerp_(matrix.grad, 1 - group["momentum"])
            ahead.append(matrix.grad.lerp(mean, group["momentum"]))
        updates = orthogonalize(ahead, group["ns_steps"], self.dtype)
        rows, columns = matrices[0].shape
        rate = group["lr"] * max(1, rows / columns) ** 0.5
        for matrix, update in zip(matrices, updates, strict=True):
            matrix.mul_(1 - group["lr"] * group["weight_decay"])
            matrix.add_(update, alpha=-rate)


def make_optimizers(
    model: nn.Module, config: TrainConfig
) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or Muon for the blocks' matrices and AdamW for the rest.

    Weight decay falls on the blocks' matrices, and without Muon on all others too.
    Source: Loshchilov and Hutter (2019), Jordan et al. (2024).

    Book: 12_training.html#the-step-of-muon
    """
    matrices, tables, vectors = [], [], []
    for name, parameter in model.named_parameters():
        inside = matrices if name.startswith("blocks.") else tables
        (inside if parameter.dim() > 1 else vectors).append(parameter)
    rate, decay = config.learning_rate, config.weight_decay
    optimizers: list[torch.optim.Optimizer] = []
    if config.optimizer == "muon":
        rates = {"lr": config.matrix_learning_rate, "weight_decay": decay}
        rates |= {"momentum": 0.9, "ns_steps": 4, "dtype": config.dtype}
        optimizers.append(Muon(matrices, **rates))
        groups = [(tables + vectors, 0.0)]
    else:
        groups = [(matrices + tables, decay), (vectors, 0.0)]
    parts = [{"params": part, "weight_decay": d} for part, d in groups if part]
    optimizers.append(torch.optim.AdamW(parts, rate, betas=(0.9, 0.99), fused=True))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["full_rate"] = group["lr"]
    return optimizers


def make_loss(
    model: GPT, config: TrainConfig, stepping: bool = False
) -> Callable[[Tensor, Tensor], Tensor]:
    """The mean cross-entropy of a batch, in nats a token, at the chosen precision.

    stepping: compile and recompute as the configuration says, for a loss that is
    followed by a backward pass.

    Book: 12_training.html#the-loss-and-a-fair-judgment
    """
    device = next(model.parameters()).device.type
    dtype = config.dtype
    compile = config.compile if stepping else "off"

    def call(block: nn.Module, x: Tensor) -> Tensor:
        return block(x)

    call_block = compiled(call) if compile == "blocks" else call

    def plain(ids: Tensor, targets: Tensor) -> Tensor:
        x = model.embed(ids, torch.arange(ids.shape[1], device=ids.device))
        for block in model.blocks:
            if stepping and config.recompute:
                x = checkpoint(call_block, block, x, use_reentrant=False)
            else:
                x = call_block(block, x)
        logits = model.head(model.norm(x))
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    whole = compiled(plain) if compile == "all" else plain

    # Outside: a compiled program that switches autocast (chapter 15) can't be stored.
    def loss(ids: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            return whole(ids, targets)

    return loss


@torch.no_grad()
def evaluate(model: GPT, tokens: Tokens, config: TrainConfig) -> float:
    """The mean loss, in nats a token, on fixed batches, with dropout off.

    Book: 12_training.html#the-loss-and-a-fair-judgment
    """
    loss = make_loss(model, config)
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    total, count = torch.zeros((), device=device), 0
    for ids, targets in tokens.fixed_batches(
        config.batch_size * config.evaluation_batches,
        model.config.context,
        config.batch_size,
    ):
        total += loss(ids.to(device), targets.to(device)) * len(ids)
        count += len(ids)
    model.train(training)
    return float(total) / count


@dataclass
class Run:
    """How far a run is, and one record for every evaluation.

    A record has step, train_loss and validation_loss (nats a token),
    nats_per_character, learning_rate, tokens_per_second and seconds of training.

    Book: 12_training.html#a-run
    """

    step: int = 0
    seconds: float = 0.0
    recent: list[float] = field(default_factory=list)
    records: list[dict[str, float]] = field(default_factory=list)
    stopped: bool = False

    @property
    def best(self) -> float:
        """The lowest validation loss so far, infinite before the first."""
        return min((r["validation_loss"] for r in self.records), default=math.inf)


def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`torch.compile`, falling back to the plain function where no compiler works.

    Without gradients the plain function is called.

    Book: 12_training.html#a-run
    """
    chosen = []

    def first_call(*inputs: Any) -> Tensor:
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


def short_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """`fused_attention` as two products around a softmax, for short contexts.

    Book: 12_training.html#a-run
    """
    T, S = queries.shape[-2], keys.shape[-2]
    if mask is None:
        mask = causal_mask(S, device=keys.device)[S - T :]
    # Adding one table to all heads is cheaper than filling their scores in.
    penalty = torch.zeros_like(mask, dtype=queries.dtype).masked_fill(~mask, -math.inf)
    scores = (queries / math.sqrt(queries.shape[-1])) @ keys.transpose(-2, -1)
    weights = F.dropout((scores + penalty).softmax(dim=-1), dropout)
    return weights @ values


def use_attention(model: GPT, attend: Callable[..., Tensor]) -> None:
    """Let every attention of a model calculate in this way.

    Book: 12_training.html#a-run
    """
    for block in model.blocks:
        block.attention.attend = attend


def compiled_gelu(x: Tensor) -> Tensor:
    """GELU's tanh form by a sigmoid: a compiled program is faster with it.

    Book: 12_training.html#a-run
    """
    inner = 2 * math.sqrt(2 / math.pi) * x * (1 + 0.044715 * x * x)
    return x * torch.sigmoid(inner)


def use_gelu(
    model: GPT, old: Callable[..., Tensor], new: Callable[..., Tensor]
) -> None:
    """Let every MLP that has the activation function `old` take `new`.

    Book: 12_training.html#a-run
    """
    for block in model.blocks:
        if getattr(block.mlp, "activation", None) is old:
            block.mlp.activation = new


def suits_short_attention(context: int, config: TrainConfig) -> bool:
    """Whether `short_attention` is the faster one on a CPU.

    Book: 12_training.html#a-run
    """
    limit = 64 if config.compile != "off" else 0
    return context <= (limit if config.dtype == torch.float32 else 256)


class Trainer:
    """A run in progress: the model, its optimizers, and where the files go.

    Arguments as in `train`. losses: of the steps since they were last read.

    Book: 12_training.html#a-run
    """

    def __init__(
        self,
        model: GPT,
        data: TokenData,
        config: TrainConfig,
        directory: Path | None = None,
        tokenizer: Any = None,
        peak_flops: float | None = None,
        on_record: Callable[[dict[str, float]], None] | None = None,
    ):
        self.model, self.data, self.config = model, data, config
        self.directory, self.tokenizer = directory, tokenizer
        self.peak_flops, self.on_record = peak_flops, on_record
        self.device = next(model.parameters()).device
        cpu = self.device.type == "cpu"
        if cpu and suits_short_attention(model.config.context, config):
            use_attention(model, short_attention)
        if config.compile != "off":
            use_gelu(model, pytorch_gelu, compiled_gelu)
        self.optimizers = make_optimizers(model, config)
        half = config.precision == "float16"
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=half)
        self.loss = make_loss(model, config, stepping=True)
        self.run = Run()
        self.losses: list[Tensor] = []
        self.began = self.rate = 0.0


def next_batch(trainer: Trainer, part: int = 0) -> list[Tensor]:
    """Inputs and targets of this step; seed and step alone decide, so runs resume.

    Book: 12_training.html#a-run
    """
    config, context = trainer.config, trainer.model.config.context
    seed = (config.seed, trainer.run.step, part)
    batch = trainer.data.train.random_batch(config.batch_size, context, seed)
    cuda = trainer.device.type == "cuda"
    if cuda:  # copied while the GPU computes; that takes memory in one piece
        batch = [ids.contiguous().pin_memory() for ids in batch]
    return [ids.to(trainer.device, non_blocking=cuda) for ids in batch]


def take_step(trainer: Trainer) -> None:
    """One step of the optimizers; its loss stays on the device, unread.

    Book: 12_training.html#a-run
    """
    config, scaler = trainer.config, trainer.scaler
    if not trainer.losses:
        trainer.began = time.perf_counter()
    total = torch.zeros((), device=trainer.device)
    for part in range(config.accumulate):
        loss = trainer.loss(*next_batch(trainer, part)) / config.accumulate
        scaler.scale(loss).backward()
        total += loss.detach()
    share = rate_at(trainer.run.step, config)
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["full_rate"] * share
        scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(trainer.model.parameters(), config.clip)
    # The scaler judges each optimizer by itself, but a bad gradient must stop both.
    alone = not scaler.is_enabled() or len(trainer.optimizers) == 1
    sound = alone or bool(norm.isfinite())  # waits for the device
    for optimizer in trainer.optimizers:
        if sound:
            scaler.step(optimizer)
        optimizer.zero_grad(set_to_none=True)
    scaler.update()
    # The scaler skips a step with such a gradient; nothing else does.
    trainer.losses.append(total if scaler.is_enabled() else total + 0 * norm)
    trainer.run.step += 1


def read_losses(trainer: Trainer) -> dict[str, str]:
    """Wait for the device and return what the progress bar shows.

    Raises FloatingPointError when a loss is not a number, or no gradient ever is.

    Book: 12_training.html#a-run
    """
    run, config = trainer.run, trainer.config
    values = torch.stack(trainer.losses).tolist()
    seconds = time.perf_counter() - trainer.began
    trainer.losses = []
    for step, value in enumerate(values, run.step - len(values) + 1):
        if not math.isfinite(value):
            raise FloatingPointError(
                f"the loss or its gradient at step {step} is not finite: lower the "
                "learning rate. A checkpoint, if there is one, is from before"
            )
    if trainer.scaler.is_enabled() and trainer.scaler.get_scale() < 1e-3:
        raise FloatingPointError(
            f"up to step {run.step} the gradients overflow in float16 however they are "
            "scaled: lower the learning rate, or take another precision"
        )
    batch = config.batch_size * config.accumulate * trainer.model.config.context
    trainer.rate = len(values) * batch / seconds
    run.seconds += seconds
    run.recent += values
    shown = {"loss": f"{values[-1]:.3f}", "tokens/s": f"{trainer.rate:,.0f}"}
    if trainer.peak_flops:
        flops = trainer.rate * trainer.model.flops_per_token()
        shown["MFU"] = f"{flops / trainer.peak_flops:.1%}"
    return shown


def record(trainer: Trainer, extra: bool = False) -> None:
    """Evaluate; write the metrics and, if it is the best so far, the model.

    extra: a look at a stop, which leaves a model only where there is none yet.
    Raises FloatingPointError when the validation loss is not a number.

    Book: 12_training.html#a-run
    """
    run, config, held_out = trainer.run, trainer.config, trainer.data.validation
    loss = evaluate(trainer.model, held_out, config)
    if not math.isfinite(loss):
        raise FloatingPointError(f"the validation loss at step {run.step} is {loss}")
    better = loss < run.best
    share = rate_at(run.step - 1, config)
    line = {
        "step": run.step,
        "train_loss": sum(run.recent) / len(run.recent),
        "validation_loss": loss,
        "nats_per_character": loss * len(held_out) / (held_out.characters or math.nan),
        "learning_rate": config.learning_rate * share,
        "tokens_per_second": trainer.rate,
        "seconds": run.seconds,
    }
    run.recent = []
    run.records.append(line)
    if trainer.directory:
        lines = "".join(json.dumps(line) + "\n" for line in run.records)
        write_file(trainer.directory / "metrics.jsonl", lines.encode())
        there = (trainer.directory / "model.safetensors").exists()
        if better and trainer.tokenizer and not (extra and there):
            save(trainer.directory, trainer.model, trainer.tokenizer)


_MOMENTS = {"AdamW": ("step", "exp_avg", "exp_avg_sq"), "Muon": ("momentum_buffer",)}


def tensors_of(trainer: Trainer) -> dict[str, dict[str, Tensor]]:
    """Everything that a step changes, by file and name.

    Book: 12_training.html#everything-that-a-step-changes
    """
    optimizer = {
        f"{place}.{number}.{key}": value
        for place, part in enumerate(trainer.optimizers)
        for number, values in part.state_dict()["state"].items()
        for key, value in values.items()
    }
    random = {"cpu": torch.get_rng_state()}
    if trainer.device.type == "cuda":
        random["cuda"] = torch.cuda.get_rng_state(trainer.device)
    model: dict[str, Tensor] = dict(trainer.model.named_parameters())
    return {"model": model, "optimizer": optimizer, "random": random}


def _shapes_due(trainer: Trainer) -> dict[str, dict[str, tuple[int, ...]]]:
    """The shapes that model and optimizers of this run have in a checkpoint."""
    optimizer = {
        f"{place}.{number}.{key}": () if key == "step" else tuple(parameter.shape)
        for place, part in enumerate(trainer.optimizers)
        for number, parameter in enumerate(
            p for group in part.param_groups for p in group["params"]
        )
        for key in _MOMENTS[type(part).__name__]
    }
    named = trainer.model.named_parameters()
    return {"model": {n: tuple(p.shape) for n, p in named}, "optimizer": optimizer}


def settings_of(trainer: Trainer) -> dict[str, Any]:
    """What has to be the same when a run goes on.

    Book: 12_training.html#everything-that-a-step-changes
    """
    return {
        **asdict(trainer.model.config),
        **asdict(trainer.config),
        "data": trainer.data.fingerprint,
    }


def save_run(trainer: Trainer) -> None:
    """Write a checkpoint of this moment. Raises OSError where the disk is full.

    Book: 12_training.html#everything-that-a-step-changes
    """
    state = {
        "settings": settings_of(trainer),
        "scaler": trainer.scaler.state_dict(),
        "run": asdict(trainer.run),
    }
    keep, step = trainer.config.keep, trainer.run.step
    write_checkpoint(trainer.directory, step, tensors_of(trainer), state, keep)


def _read_run(trainer: Trainer, path: Path) -> tuple[dict, dict, Run]:
    """Tensors, state and progress of a checkpoint of this very run.

    Raises ValueError where data, model or settings are others than then.
    """
    tensors, state = read_checkpoint(path)
    try:
        then, run = state["settings"], Run(**{**state["run"], "stopped": False})
        for name, value in settings_of(trainer).items():
            if then.get(name) != value:
                raise ValueError(
                    f"it was written with {name} = {then.get(name)!r}, not {value!r}: "
                    "resume with the same text and settings, or use another directory"
                )
        for kind, due in _shapes_due(trainer).items():
            found = {name: tuple(t.shape) for name, t in tensors[kind].items()}
            if kind == "optimizer":  # a parameter without a step has no moments
                moved = {name.rsplit(".", 1)[0] for name in found}
                due = {n: s for n, s in due.items() if n.rsplit(".", 1)[0] in moved}
            if found != due:
                raise ValueError(f"its {kind}.safetensors has other tensors or shapes")
        return tensors, state, run
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a checkpoint of a run: {error!r}") from None
    except ValueError as error:
        raise ValueError(f"{path} can't be resumed: {error}") from None


def resume_run(trainer: Trainer, path: Path) -> None:
    """Go back to the moment of a checkpoint.

    Raises ValueError where data, model or settings are others than then.

    Book: 12_training.html#everything-that-a-step-changes
    """
    tensors, state, run = _read_run(trainer, path)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            parameter.copy_(tensors["model"][name])
    contents = [optimizer.state_dict() for optimizer in trainer.optimizers]
    for key, value in tensors["optimizer"].items():
        place, number, name = key.split(".", 2)
        contents[int(place)]["state"].setdefault(int(number), {})[name] = value
    for optimizer, content in zip(trainer.optimizers, contents, strict=True):
        optimizer.load_state_dict(content)
    torch.set_rng_state(tensors["random"]["cpu"])
    if trainer.device.type == "cuda" and "cuda" in tensors["random"]:
        torch.cuda.set_rng_state(tensors["random"]["cuda"], trainer.device)
    trainer.scaler.load_state_dict(state["scaler"])
    trainer.run = run


@contextmanager
def polite_interrupt() -> Iterator[list[int]]:
    """Note the first Ctrl-C or SIGTERM in a list; the second one interrupts.

    Book: 12_training.html#leaving-politely
    """
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught  # Python lets only the main thread handle signals.
        return

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def on_signal(number: int, frame: Any) -> None:
        restore()
        caught.append(number)

    signals = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in signals}
    for number in signals:
        signal.signal(number, on_signal)
    try:
        yield caught
    finally:
        restore()


@contextmanager
def _memory_advice() -> Iterator[None]:
    """Turn an allocator's failure into a MemoryError that says what to lower."""
    try:
        yield
    except RuntimeError as error:
        signs = ("allocate memory", "out of memory", "ALLOC_FAILED", "Invalid buffer")
        no_memory = isinstance(error, torch.OutOfMemoryError)
        if not no_memory and not any(sign in str(error) for sign in signs):
            raise
        raise MemoryError(
            "training does not fit into memory: lower batch_size (and raise accumulate "
            "to learn from as much text a step), or the model's context, width, layers"
        ) from error


def lock_folder(folder: Path, taken: str) -> Any:
    """Lock a folder and return the lock, to be released; no other process gets it.

    Raises FileExistsError with the message `taken` while another one has it.

    Book: 12_training.html#leaving-politely
    """
    from filelock import FileLock, Timeout  # here: most programs never lock anything

    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise FileExistsError(taken) from None
    return lock


@contextmanager
def _locked(directory: Path | None, resume: bool) -> Iterator[Path | None]:
    """Hold a directory for one run, and yield the checkpoint to resume from, if any.

    Raises FileExistsError for a directory in use or with a run that isn't resumed.
    """
    if directory is None:
        yield None
        return
    directory.mkdir(parents=True, exist_ok=True)
    with lock_folder(directory, f"another run is training into {directory}"):
        found = checkpoints_in(directory)
        begun = found or (resume and (directory / "metrics.jsonl").exists())
        if not begun and (directory / "model.safetensors").exists():
            raise FileExistsError(f"{directory} holds a model: use another directory")
        if found and not resume:
            raise FileExistsError(
                f"{directory} holds a run: resume it, or use another directory"
            )
        yield found[-1] if found else None


def _check_data(
    model: GPT, data: TokenData, config: TrainConfig, tokenizer: Any
) -> None:
    """Raise TypeError or ValueError for what can't be trained together."""
    if not isinstance(data, TokenData):
        raise TypeError("data must be a TokenData: take what `tokenize` returns")
    if not isinstance(config, TrainConfig):
        raise TypeError("config must be a TrainConfig, such as the training of a plan")
    if not any(parameter.dim() > 1 for parameter in model.blocks.parameters()):
        raise ValueError(
            "a model made lighter can't be trained: train the one it comes from"
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("nothing can be learned: no parameter has requires_grad")
    if tokenizer is not None and tokenizer.vocab_size != data.vocab_size:
        raise ValueError(
            f"the data has {data.vocab_size} token ids and the tokenizer "
            f"{tokenizer.vocab_size}: it is not the one that made them"
        )
    if data.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"the data has {data.vocab_size} token ids, the model only knows "
            f"{model.config.vocab_size}"
        )
    data.check_context(model.config.context)


def fit(trainer: Trainer, progress: bool = True) -> Run:
    """Step until the end, Ctrl-C or SIGTERM; evaluate and save on the way.

    Book: 12_training.html#the-loop
    """
    config, run = trainer.config, trainer.run
    bar = tqdm(total=config.steps, initial=run.step, disable=not progress, unit="step")
    trainer.model.train()
    with bar, polite_interrupt() as caught:
        while run.step < config.steps and not run.stopped:
            take_step(trainer)
            bar.update()
            run.stopped = bool(caught) and run.step < config.steps
            last = run.step == config.steps
            due = last or run.step % config.evaluate_every == 0
            saving = last or run.stopped or run.step % config.checkpoint_every == 0
            # Reading a loss waits for the device: only every tenth step.
            if due or saving or len(trainer.losses) == 10:
                bar.set_postfix(read_losses(trainer))
            if due:
                record(trainer)
            if saving and trainer.directory:
                save_run(trainer)
            if run.stopped and not due:
                record(trainer, extra=True)
            if (due or run.stopped) and trainer.on_record:
                trainer.on_record(run.records[-1])
                trainer.model.train()  # generating had switched dropout off
    return run


@contextmanager
def _switches(model: GPT, config: TrainConfig) -> Iterator[None]:
    """Let a GPU round products to TF32 if wanted; undo all that a run switches."""
    tf32, before, mode = config.precision == "tf32", "highest", model.training
    if tf32:  # only then: asking fails where a program uses PyTorch's newer switch
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        use_attention(model, fused_attention)
        use_gelu(model, compiled_gelu, pytorch_gelu)
        if tf32:
            torch.set_float32_matmul_precision(before)
        model.train(mode)


def train(
    model: GPT,
    data: TokenData,
    config: TrainConfig,
    directory: str | Path | None = None,
    tokenizer: Any = None,
    resume: bool = False,
    progress: bool = True,
    peak_flops: float | None = None,
    on_record: Callable[[dict[str, float]], None] | None = None,
) -> Run:
    """Train a model in place and return what happened.

    directory: where checkpoints, metrics.jsonl and, with a tokenizer, the best model
    go; without one nothing is written. resume: go on from its last checkpoint, or begin
    where there is none, to the same numbers as a run that never stopped (on a GPU up to
    rounding). peak_flops: what the machine can do a second, for the share used (MFU).
    on_record: called with each new record, once what is due is saved.
    Ctrl-C, or SIGTERM, finishes the step, saves a checkpoint and returns.
    Raises TypeError for wrong kinds of things, ValueError for data that doesn't fit the
    model, FileExistsError for a directory in use or with a run that isn't resumed,
    FloatingPointError when the loss is no longer a number, MemoryError, and OSError
    where the disk is full. Resuming: ValueError for other settings or a damaged file.

    Book: 12_training.html#the-loop
    """
    _check_data(model, data, config, tokenizer)
    place = Path(directory) if directory is not None else None
    cuda = [p.device for p in model.parameters() if p.device.type == "cuda"][:1]
    # Training has random numbers of its own and leaves the caller's alone.
    with (
        _locked(place, resume) as last,
        torch.random.fork_rng(cuda),
        _memory_advice(),
        _switches(model, config),
    ):
        torch.manual_seed(config.seed)
        trainer = Trainer(model, data, config, place, tokenizer, peak_flops, on_record)
        if last:
            resume_run(trainer, last)
        return fit(trainer, progress)
