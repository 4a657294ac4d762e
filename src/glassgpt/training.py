# Written by tools/tangle.py from book/12_training.ipynb: change it there.
"""Training: a loss, an optimizer, a schedule, and the loop."""

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from glassgpt.data import TokenData, Tokens
from glassgpt.gpt import GPT

_LEAST = {"warmup": 0, "final_rate": 0, "weight_decay": 0, "seed": 0}


@dataclass(frozen=True)
class TrainConfig:
    """How to train; every field can be given by name.

    learning_rate is the highest one: it rises for `warmup` steps and falls to
    `final_rate` of itself along a "cosine", "linear", or "stable" (constant, then
    linear over the last fifth) schedule. Raises ValueError for impossible values.

    Book: 12_training.html#the-schedule
    """

    steps: int = 1000  # how often the optimizer moves the weights
    batch_size: int = 32  # crops that one step learns from
    accumulate: int = 1  # parts in which a batch is computed: less memory
    learning_rate: float = 3e-3  # the highest one
    schedule: str = "cosine"  # cosine, linear or stable
    warmup: int = 50  # steps in which the rate rises
    final_rate: float = 0.1  # share of the rate that is left at the end
    weight_decay: float = 0.1  # of matrices and tables
    clip: float = 1.0  # a longer gradient is scaled to this norm
    evaluate_every: int = 250  # steps from one evaluation to the next
    evaluation_crops: int = 640  # held-out crops, the same at every evaluation
    seed: int = 0  # of the weights, the batches and dropout

    def __post_init__(self) -> None:
        numbers = [field for field in fields(self) if field.type in (int, float)]
        for kind, name in ((field.type, field.name) for field in numbers):
            value = getattr(self, name)
            least = _LEAST.get(name, 1 if kind is int else 1e-12)
            if type(value) not in (int, kind) or not least <= value < 1 << 63:
                wanted = "a whole number" if kind is int else "a number"
                due = f"{wanted} from {least} up"
                raise ValueError(f"{name} must be {due}, not {value!r}")
        if self.accumulate > self.batch_size:
            parts = f"accumulate={self.accumulate} parts"
            raise ValueError(f"{self.batch_size} crops can't be cut into {parts}")
        if self.final_rate > 1:
            raise ValueError(f"final_rate is a share, 0 to 1, not {self.final_rate}")
        if self.schedule not in ("cosine", "linear", "stable"):
            kinds = "cosine, linear or stable"
            raise ValueError(f"schedule is {kinds}, not {self.schedule!r}")


def rate_at(step: int, config: TrainConfig) -> float:
    """The share of the learning rate, 0 to 1, for a step counted from 0.

    Book: 12_training.html#the-schedule
    """
    if step < config.warmup:
        return (step + 1) / config.warmup
    done = (step - config.warmup) / max(config.steps - config.warmup, 1)
    shapes = {
        "cosine": 0.5 * (1 + math.cos(math.pi * done)),
        "linear": 1 - done,
        "stable": min(1.0, (1 - done) / 0.2),
    }
    return config.final_rate + (1 - config.final_rate) * shapes[config.schedule]


def make_optimizers(
    model: nn.Module, config: TrainConfig
) -> list[torch.optim.Optimizer]:
    """AdamW, with decay on matrices and tables. Source: Loshchilov and Hutter.

    Book: 12_training.html#what-decays
    """
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    decaying = {"params": matrices, "weight_decay": config.weight_decay}
    groups = [decaying, {"params": vectors, "weight_decay": 0.0}]
    return [torch.optim.AdamW(groups, config.learning_rate, (0.9, 0.99), fused=True)]


Loss = Callable[[Tensor, Tensor], Tensor]  # of ids and targets (B, T)


def token_loss(model: GPT) -> Loss:
    """The mean cross-entropy of ids and targets (B, T), in nats a token.

    Book: 12_training.html#a-fair-evaluation
    """
    device = next(model.parameters()).device

    def loss(ids: Tensor, targets: Tensor) -> Tensor:
        logits = model(ids.to(device))  # (B, T, V)
        return F.cross_entropy(logits.flatten(0, 1), targets.to(device).flatten())

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
    context = model.config.context
    with in_mode(model, training=False):
        for ids, targets in tokens.fixed_batches(crops, context, batch_size):
            total += loss(ids, targets).item() * len(ids)
            count += len(ids)
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


def train(
    trainer: "Trainer",
    after_step: Callable[["Trainer"], bool | None] | None = None,
    progress: bool = True,
) -> list[dict[str, float]]:
    """Train to the end, evaluate on the way, and return the records.

    after_step: called after each step (and its evaluation); True ends the training.
    Raises FloatingPointError when the loss is no longer a number.

    Book: 12_training.html#the-loop
    """
    steps, every = trainer.config.steps, trainer.config.evaluate_every
    bar = tqdm(total=steps, initial=trainer.step, disable=not progress, unit="step")
    stop = False
    with bar, in_mode(trainer.model, training=True):
        while trainer.step < steps and not stop:
            trainer.take_step()
            bar.update()
            due = trainer.step % every == 0 or trainer.step == steps
            if due or len(trainer.unread) >= 10:  # reading waits for the device
                bar.set_postfix(loss=f"{trainer.read_losses():.3f}")
            if due:
                trainer.evaluate()
            stop = bool(after_step and after_step(trainer))
    return trainer.records


class Trainer:
    """A run in progress: a model, its data, its optimizers, and how far it is.

    optimizers: by default AdamW. loss: the mean loss of ids and targets (B, T), by
    default `token_loss`. step: how many are done. records: one for each evaluation,
    with step, validation_loss and train_loss (nats a token, the second the mean since
    the record before), nats_per_character where characters are known, learning_rate,
    tokens_per_second, and seconds of training so far.
    Raises TypeError and ValueError for what can't be trained together.

    Book: 12_training.html#the-loop
    """

    def __init__(
        self,
        model: GPT,
        data: TokenData,
        config: TrainConfig,
        optimizers: Sequence[torch.optim.Optimizer] | None = None,
        loss: Loss | None = None,
    ):
        check_fit(model, data, config)
        self.model, self.data, self.config = model, data, config
        self.optimizers = list(optimizers or make_optimizers(model, config))
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group.setdefault("initial_lr", group["lr"])
        self.loss = loss or token_loss(model)
        self.device = next(model.parameters()).device
        self.step, self.seconds, self.began = 0, 0.0, 0.0
        self.last_loss = math.nan
        self.records: list[dict[str, float]] = []
        self.recent: list[float] = []  # the losses since the last record
        self.unread: list[Tensor] = []  # and those that are still on the device

    def take_step(self) -> None:
        """Learn from one batch, which seed and step decide."""
        c, context = self.config, self.model.config.context
        if not self.unread:
            self.began = time.perf_counter()
        if not self.model.training:
            self.model.train()
        self.model.zero_grad()
        with random_numbers((c.seed, self.step, 1), self.device):
            seed = (c.seed, self.step)
            ids, targets = self.data.train.random_batch(c.batch_size, context, seed)
            total = torch.zeros((), device=self.device)
            parts = ids.chunk(c.accumulate), targets.chunk(c.accumulate)
            for part in zip(*parts, strict=True):
                loss = self.loss(*part) * (len(part[0]) / c.batch_size)
                self.backward(loss)
                total += loss.detach()
            norm = self.update()
        self.unread.append(total + 0 * norm)  # nan where the gradient is
        self.step += 1

    def backward(self, loss: Tensor) -> None:
        """Add a part's gradients to those of the parts before."""
        loss.backward()

    def update(self) -> Tensor:
        """Clip the gradient, move the weights, and return the gradient's norm."""
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        share = rate_at(self.step, self.config)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = share * group["initial_lr"]
            optimizer.step()
        return norm

    def read_losses(self) -> float:
        """Wait for the device and return the last step's loss, nan before the first.

        Raises FloatingPointError where a loss or its gradient is not a number.
        """
        if self.unread:
            self.recent += torch.stack(self.unread).tolist()
            self.seconds += time.perf_counter() - self.began
            self.unread, self.last_loss = [], self.recent[-1]
        for step, loss in enumerate(self.recent, self.step - len(self.recent) + 1):
            if not math.isfinite(loss):
                what = f"the loss or its gradient at step {step} is not finite"
                raise FloatingPointError(f"{what}: lower the learning rate")
        return self.last_loss

    def evaluate(self) -> dict[str, float]:
        """Measure the model on held-out text, and add a record of all steps since."""
        self.read_losses()
        c, held_out = self.config, self.data.validation
        part = -(-c.batch_size // c.accumulate)
        loss = evaluate(self.model, held_out, c.evaluation_crops, part, self.loss)
        if not math.isfinite(loss):
            what = f"the validation loss at step {self.step}"
            raise FloatingPointError(f"{what} is {loss}: lower the learning rate")
        record = {"step": self.step, "validation_loss": loss, "seconds": self.seconds}
        if held_out.characters:
            record["nats_per_character"] = loss * len(held_out) / held_out.characters
        if self.recent:
            before = self.records[-1]["seconds"] if self.records else 0.0
            tokens = len(self.recent) * c.batch_size * self.model.config.context
            record["train_loss"] = sum(self.recent) / len(self.recent)
            record["learning_rate"] = c.learning_rate * rate_at(self.step - 1, c)
            record["tokens_per_second"] = tokens / (self.seconds - before)
        self.records, self.recent = [*self.records, record], []
        return record

    def state_dict(self) -> dict[str, Any]:
        """Everything that a step changes. As in PyTorch, tensors are not copied."""
        self.read_losses()
        return {
            "model": dict(self.model.named_parameters()),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "seconds": self.seconds,
            "records": self.records,
            "recent": self.recent,
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
        torch.manual_seed(int(np.random.default_rng(seed).integers(1 << 63)))
        yield


def check_fit(model: GPT, data: TokenData, config: TrainConfig) -> None:
    """Raise TypeError or ValueError for what can't be trained together.

    Book: 12_training.html#the-loop
    """
    if not isinstance(data, TokenData):
        raise TypeError("data must be a TokenData: take what `tokenize` returns")
    if not isinstance(config, TrainConfig):
        raise TypeError("config must be a TrainConfig, such as the training of a plan")
    if not any(parameter.dim() > 1 for parameter in model.blocks.parameters()):
        raise ValueError("a lighter model can't be trained: train the one it is from")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("nothing can be learned: no parameter has requires_grad")
    if data.vocab_size > (known := model.config.vocab_size):
        found = f"the data has {data.vocab_size} token ids"
        raise ValueError(f"{found}, the model only knows {known}")
    data.check_context(model.config.context)
