# Written by tools/tangle.py from book/12_training.ipynb: change it there.
"""Training: a loss, an optimizer, a schedule, and the loop."""

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args, get_origin

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from tqdm.auto import tqdm

from glassgpt.data import TokenData, Tokens
from glassgpt.gpt import GPT

Schedule = Literal["cosine", "linear", "stable"]


@dataclass(frozen=True)
class TrainConfig:
    """How to train; every field can be given by name.

    learning_rate is the highest one: it rises for `warmup` steps and falls to
    `final_rate` of itself along a "cosine", "linear", or "stable" (constant, then
    linear over the last fifth of the rest) schedule. Raises ValueError for impossible
    values.

    Book: 12_training.html#the-schedule
    """

    steps: int = 1000  # how often the optimizer moves the weights
    batch_size: int = 32  # crops that one step learns from
    accumulate: int = 1  # parts in which a batch is computed: less memory
    learning_rate: float = 3e-3  # the highest one
    schedule: Schedule = "cosine"  # how the rate falls
    warmup: int = 50  # steps in which the rate rises
    final_rate: float = 0.1  # share of the rate that is left at the end
    weight_decay: float = 0.1  # of matrices and tables
    beta1: float = 0.9  # how much of its mean gradient AdamW keeps at each step
    beta2: float = 0.99  # and of the mean of its squares
    clip: float = 1.0  # a longer gradient is scaled to this norm
    evaluate_every: int = 250  # steps from one evaluation to the next
    evaluation_crops: int = 640  # held-out crops, the same at every evaluation
    seed: int = 0  # of the batches and dropout, and of new weights

    def __post_init__(self) -> None:
        _check_settings(self)


def _check_settings(config: TrainConfig) -> None:
    """Raise ValueError for impossible values."""
    may_be_zero = ("warmup", "final_rate", "weight_decay", "beta1", "beta2", "seed")
    for field in (field for field in fields(config) if field.type in (int, float)):
        name, kind, value = field.name, field.type, getattr(config, field.name)
        most = 1 << 63 if kind is int else math.inf
        if type(value) not in (int, kind):
            raise ValueError(f"{name} must be of type {kind.__name__}, not {value!r}")
        if not 0 <= value < most:
            raise ValueError(f"{name} must be from 0 to below {most}, not {value!r}")
        if value == 0 and name not in may_be_zero:
            raise ValueError(f"{name} must be above 0")
    if config.accumulate > config.batch_size:
        raise ValueError("accumulate can't exceed batch_size: no part is empty")
    if config.final_rate > 1:
        raise ValueError(f"final_rate is a share, 0 to 1, not {config.final_rate}")
    if max(config.beta1, config.beta2) >= 1:
        raise ValueError(
            f"beta1 and beta2 must be below 1, not {config.beta1} and {config.beta2}"
        )
    check_choices(config)


def check_choices(config: Any) -> None:
    """Raise ValueError unless each field that is a Literal of texts has one of them.

    Book: 12_training.html#the-schedule
    """
    for field in fields(config):
        name, kind, value = field.name, field.type, getattr(config, field.name)
        known = get_args(kind) if get_origin(kind) is Literal else (value,)
        if value not in known:
            raise ValueError(f"{name} must be one of {known}, not {value!r}")


def rate_at(step: int, config: TrainConfig) -> float:
    """The share of the learning rate, 0 to 1, for a step counted from 0.

    Book: 12_training.html#the-schedule
    """
    if step < config.warmup:
        return (step + 1) / config.warmup
    left = 1 - (step - config.warmup) / max(config.steps - config.warmup, 1)
    cosine = 0.5 * (1 + math.cos(math.pi * (1 - left)))
    falls = {"cosine": cosine, "linear": left, "stable": min(1.0, left / 0.2)}
    return config.final_rate + (1 - config.final_rate) * falls[config.schedule]


def make_optimizers(model: nn.Module, config: TrainConfig) -> list[Optimizer]:
    """AdamW, with decay on matrices and tables. Source: Loshchilov and Hutter.

    Book: 12_training.html#what-decays
    """
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    decaying = {"params": matrices, "weight_decay": config.weight_decay}
    groups = [decaying, {"params": vectors, "weight_decay": 0.0}]
    betas = (config.beta1, config.beta2)
    return [AdamW(groups, config.learning_rate, betas, fused=True)]


Loss = Callable[[Tensor, Tensor], Tensor]  # of ids and targets (B, T)


def count_targets(targets: Tensor) -> int:
    """How many targets count: all but those of -100, which no loss looks at.

    Book: 12_training.html#a-fair-evaluation
    """
    return int((targets != -100).sum())


def mean_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean cross-entropy of logits (B, T, V) at targets (B, T), in nats.

    Targets of -100 don't count; the loss is 0 where all are.

    Book: 12_training.html#a-fair-evaluation
    """
    places = targets.flatten()
    total = F.cross_entropy(logits.flatten(0, 1), places, reduction="sum")
    return total / (targets != -100).sum().clamp(min=1)


def token_loss(model: GPT) -> Loss:
    """The loss of a model, a function of ids and targets (B, T).

    Book: 12_training.html#a-fair-evaluation
    """
    device = next(model.parameters()).device

    def loss(ids: Tensor, targets: Tensor) -> Tensor:
        return mean_loss(model(ids.to(device)), targets.to(device))

    return loss


@torch.no_grad()
def evaluate(
    model: GPT,
    tokens: Tokens,
    crops: int = 640,
    batch_size: int = 32,
    loss: Loss | None = None,
) -> float:
    """The mean cross-entropy in nats a token, with dropout off.

    crops: how many, at equal distances, the same every time. batch_size: how many at
    once; it changes nothing else. loss: as for `Trainer`.

    Book: 12_training.html#a-fair-evaluation
    """
    loss, total, count = loss or token_loss(model), 0.0, 0
    with in_mode(model, training=False):
        for batch in tokens.fixed_batches(crops, model.config.context, batch_size):
            new = count_targets(batch[1])
            total += loss(*batch).item() * new
            count += new
    return total / count


@contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Dropout on or off for a while; then each part has its own mode back.

    Book: 12_training.html#a-fair-evaluation
    """
    modes = [(part, part.training) for part in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def check_fit(model: GPT, data: TokenData) -> None:
    """Raise TypeError or ValueError for what can't be trained together.

    Book: 12_training.html#the-loop
    """
    if not isinstance(data, TokenData):
        raise TypeError("data must be a TokenData: take what `tokenize` returns")
    matrices = [p for p in model.blocks.parameters() if p.dim() > 1]
    if not matrices or not any(p.requires_grad for p in model.parameters()):
        raise ValueError("this is a model without weights that can be trained")
    known = model.config.vocab_size
    if data.vocab_size > known:
        raise ValueError(
            f"the data has {data.vocab_size} token ids, the model only knows {known}"
        )
    data.check_context(model.config.context)


class Trainer:
    """A run in progress: a model, its data, its optimizers, and how far it is.

    optimizers: by default AdamW. loss: the mean loss of ids and targets (B, T) in nats,
    by default `token_loss`. step: how many are done. records: one for each evaluation,
    with step, validation_loss and train_loss (nats a token, the second the mean since
    the record before), nats_per_character where characters are known, learning_rate
    (of the last optimizer), tokens_per_second, and seconds of training so far.
    Raises TypeError and ValueError for what can't be trained together.

    Book: 12_training.html#the-loop
    """

    def __init__(
        self,
        model: GPT,
        data: TokenData,
        config: TrainConfig,
        optimizers: Sequence[Optimizer] | None = None,
        loss: Loss | None = None,
    ):
        check_fit(model, data)
        self.model, self.data, self.config = model, data, config
        self.optimizers = list(optimizers or make_optimizers(model, config))
        self.loss = loss or token_loss(model)
        self.device = next(model.parameters()).device
        self.rank = 0
        self.step, self.seconds, self.last_loss = 0, 0.0, math.nan
        self.records: list[dict[str, float]] = []
        self.recent: list[float] = []  # the losses since the last record
        self.unread: list[Tensor] = []  # and those that are still on the device
        self.unread_since = 0.0  # when the first step of the unread ones began

    def take_step(self) -> None:
        """Learn from one batch, which seed and step decide."""
        c, context = self.config, self.model.config.context
        seed = (c.seed, self.step)
        if not self.unread:
            self.unread_since = time.perf_counter()
        self.model.train().zero_grad()
        with random_numbers((*seed, 1 + self.rank), self.device):
            batch = self.data.train.random_batch(c.batch_size, context, seed)
            total = torch.zeros((), device=self.device)
            count = max(count_targets(batch[1]), 1)
            for part in self.parts(batch):
                loss = self.loss(*part) * (count_targets(part[1]) / count)
                self.backward(loss)
                total += loss.detach()
            norm = self.update()
        # A gradient that is not finite is noticed when the losses are read.
        self.unread.append(torch.where(norm.isfinite(), total, math.nan))
        self.step += 1

    def parts(self, batch: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, ...]]:
        """The parts of a batch that are computed here, one after another."""
        return zip(*(rows.chunk(self.config.accumulate) for rows in batch), strict=True)

    def backward(self, loss: Tensor) -> None:
        """Add a part's gradients to those of the parts before."""
        loss.backward()

    def update(self) -> Tensor:
        """Clip the gradient, move the weights, and return the gradient's norm."""
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        share = rate_at(self.step, self.config)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                if "initial_lr" not in group:  # the highest rate
                    group["initial_lr"] = group["lr"]
                group["lr"] = share * group["initial_lr"]
            optimizer.step()
        return norm

    def read_losses(self) -> float:
        """Wait for the device and return the last step's loss, nan before the first.

        Raises FloatingPointError where a loss or its gradient is not a number.
        """
        if self.unread:
            self.recent += torch.stack(self.unread).tolist()
            self.seconds += time.perf_counter() - self.unread_since
            self.unread, self.last_loss = [], self.recent[-1]
        for step, loss in enumerate(self.recent, self.step - len(self.recent) + 1):
            self._require_finite(loss, f"the loss or its gradient at step {step}")
        return self.last_loss

    def _require_finite(self, loss: float, what: str) -> None:
        if not math.isfinite(loss):
            raise FloatingPointError(f"{what} is not finite: lower the learning rate")

    def evaluate(self) -> dict[str, float]:
        """Measure the model on held-out text, and add a record of all steps since."""
        self.read_losses()
        c, held_out = self.config, self.data.validation
        part = math.ceil(c.batch_size / c.accumulate)
        loss = evaluate(self.model, held_out, c.evaluation_crops, part, self.loss)
        self._require_finite(loss, f"the validation loss at step {self.step}")
        record = {"step": self.step, "validation_loss": loss, "seconds": self.seconds}
        if held_out.characters:
            record["nats_per_character"] = loss * len(held_out) / held_out.characters
        if self.recent:
            before = self.records[-1]["seconds"] if self.records else 0.0
            tokens = len(self.recent) * c.batch_size * self.model.config.context
            record["train_loss"] = sum(self.recent) / len(self.recent)
            group = self.optimizers[-1].param_groups[0]
            highest = group.get("initial_lr", group["lr"])
            record["learning_rate"] = highest * rate_at(self.step - 1, c)
            record["tokens_per_second"] = tokens / (self.seconds - before)
        self.records, self.recent = [*self.records, record], []
        return record

    def whole_model(self) -> GPT:
        """The model with all its weights: that of many processes, once put together."""
        return self.model

    def state_dict(self) -> dict[str, Any]:
        """Everything that a step changes. As in PyTorch, tensors are not copied."""
        self.read_losses()
        return {
            "step": self.step,
            "seconds": self.seconds,
            "records": self.records,
            "recent": self.recent,
            "model": dict(self.model.named_parameters()),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to the moment of a `state_dict`, with the rates of this trainer."""
        for name, parameter in self.model.named_parameters():
            parameter.copy_(state["model"][name])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})
        self.step, self.seconds, self.unread = state["step"], state["seconds"], []
        self.records, self.recent = list(state["records"]), list(state["recent"])


_one_at_a_time = threading.RLock()  # all threads share PyTorch's random numbers


@contextmanager
def random_numbers(seed: Sequence[int], device: torch.device) -> Iterator[None]:
    """Let a seed alone decide what is drawn; the caller's random numbers stay.

    Book: 12_training.html#the-loop
    """
    devices = [] if device.type == "cpu" else [device]
    with _one_at_a_time, torch.random.fork_rng(devices, device_type=device.type):
        # On a CPU `torch.manual_seed` would look for every kind of GPU, at each step.
        source = torch if devices else torch.default_generator
        source.manual_seed(int(np.random.default_rng(seed).integers(1 << 63)))
        yield


def train(
    trainer: Trainer,
    after_step: Callable[[Trainer], bool | None] | None = None,
    progress: bool = True,
) -> list[dict[str, float]]:
    """Train to the end, evaluate on the way, and return the records.

    after_step: called after each step (and its evaluation); True ends the training.
    Raises FloatingPointError when the loss is no longer a number.

    Book: 12_training.html#the-loop
    """
    steps, every = trainer.config.steps, trainer.config.evaluate_every
    bar = tqdm(total=steps, initial=trainer.step, disable=not progress, unit="step")
    with bar, in_mode(trainer.model, training=True):
        while trainer.step < steps:
            trainer.take_step()
            bar.update()
            due = trainer.step % every == 0 or trainer.step == steps
            if due or len(trainer.unread) >= 10:  # reading waits for the device
                bar.set_postfix(loss=f"{trainer.read_losses():.3f}")
            if due:
                trainer.evaluate()
            if after_step and after_step(trainer):
                break
    return trainer.records
