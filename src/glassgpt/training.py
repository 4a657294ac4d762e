# Written by tools/tangle.py from book/12_training.ipynb: change it there.
"""Training: a loss, an optimizer, a schedule, and a loop."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from glassgpt.data import TokenData, Tokens
from glassgpt.gpt import GPT


@dataclass(frozen=True)
class TrainConfig:
    """How to train; every field can be given by name.

    learning_rate is the highest one: it rises for `warmup` steps and falls to
    `final_rate` of itself along a "cosine", "linear", or "stable" (constant, then
    linear over the last fifth) schedule. Raises ValueError for impossible values.

    Book: 12_training.html#the-module
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
        least = dict.fromkeys(("steps", "batch_size", "accumulate"), 1)
        least |= {"evaluate_every": 1, "evaluation_crops": 1, "warmup": 0, "seed": 0}
        for name, lowest in least.items():
            value = getattr(self, name)
            if not isinstance(value, int) or not lowest <= value < 1 << 63:
                wanted = f"a whole number from {lowest} up"
                raise ValueError(f"{name} must be {wanted}, not {value!r}")
        for name in ("learning_rate", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay can't be {self.weight_decay}")
        if not 0 <= self.final_rate <= 1:
            raise ValueError(f"final_rate is a share, 0 to 1, not {self.final_rate}")
        if self.schedule not in ("cosine", "linear", "stable"):
            raise ValueError(
                f"schedule is cosine, linear or stable, not {self.schedule!r}"
            )


def rate_at(step: int, config: TrainConfig) -> float:
    """The share of the learning rate, 0 to 1, for a step counted from 0.

    Book: 12_training.html#the-module
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
    """AdamW, with weight decay on matrices and tables. Source: Loshchilov and Hutter.

    Book: 12_training.html#the-module
    """
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return [torch.optim.AdamW(groups, config.learning_rate, (0.9, 0.99), fused=True)]


@torch.no_grad()
def evaluate(
    model: GPT,
    tokens: Tokens,
    crops: int = 640,
    batch_size: int = 32,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> float:
    """The mean cross-entropy in nats a token, with dropout off.

    crops: how many, at equal distances, the same every time. batch_size: how many at
    once; it changes nothing else. loss: as for `Trainer`.

    Book: 12_training.html#the-module
    """
    loss = loss or token_loss(model)
    mode, total, count = model.training, 0.0, 0
    model.eval()
    try:
        for ids, targets in tokens.fixed_batches(
            crops, model.config.context, batch_size
        ):
            total = total + loss(ids, targets).double() * len(ids)
            count += len(ids)
    finally:
        model.train(mode)
    return float(total) / count


def token_loss(model: GPT) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss of a model: a function of ids and targets (B, T), in nats a token.

    Book: 12_training.html#the-module
    """
    device = next(model.parameters()).device

    def loss(ids: Tensor, targets: Tensor) -> Tensor:
        logits = model(ids.to(device))  # (B, T, V)
        return F.cross_entropy(logits.flatten(0, 1), targets.to(device).flatten())

    return loss


@contextmanager
def random_numbers(seed: int, step: int, device: torch.device) -> Iterator[None]:
    """Let seed and step alone decide what is drawn; the caller's numbers stay as is.

    Book: 12_training.html#the-module
    """
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(int(np.random.default_rng((seed, step)).integers(1 << 63)))
        yield


class Trainer:
    """A run in progress: a model, its data, its optimizers, and how far it is.

    optimizers: by default AdamW. loss: the mean loss of ids and targets (B, T), by
    default `token_loss`. step: how many are done. records: one for each evaluation,
    with step, train_loss and validation_loss (nats a token), nats_per_character,
    learning_rate, tokens_per_second, and seconds of training so far.
    Raises ValueError for data that the model can't learn from.

    Book: 12_training.html#the-module
    """

    def __init__(
        self,
        model: GPT,
        data: TokenData,
        config: TrainConfig,
        optimizers: Sequence[torch.optim.Optimizer] | None = None,
        loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    ):
        if data.vocab_size > model.config.vocab_size:
            raise ValueError(
                f"the data has {data.vocab_size} token ids, the model only knows "
                f"{model.config.vocab_size}"
            )
        data.check_context(model.config.context)
        self.model, self.data, self.config = model, data, config
        self.optimizers = list(optimizers or make_optimizers(model, config))
        self.rates = [[g["lr"] for g in o.param_groups] for o in self.optimizers]
        self.loss = loss or token_loss(model)
        self.device = next(model.parameters()).device
        self.step, self.seconds = 0, 0.0
        self.records: list[dict[str, float]] = []
        self.recent: list[float] = []  # the losses since the last record
        self.unread: list[Tensor] = []  # the last of them, still on the device
        self.began = 0.0

    def take_step(self) -> None:
        """Learn from one batch, which seed and step decide."""
        if not self.unread:
            self.began = time.perf_counter()
        c, context = self.config, self.model.config.context
        with random_numbers(c.seed, self.step, self.device):
            batch = self.data.train.random_batch(
                c.batch_size, context, (c.seed, self.step, 0)
            )
            total = torch.zeros((), device=self.device)
            parts = (rows.chunk(c.accumulate) for rows in batch)
            for ids, targets in zip(*parts, strict=True):
                loss = self.loss(ids, targets) * (len(ids) / c.batch_size)
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
        for optimizer, rates in zip(self.optimizers, self.rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = share * rate
            optimizer.step()
            optimizer.zero_grad()
        return norm

    def read_losses(self) -> float:
        """Wait for the device and return the last step's loss.

        Raises FloatingPointError where a loss or its gradient is not a number.
        """
        if self.unread:
            self.recent += torch.stack(self.unread).tolist()
            self.seconds += time.perf_counter() - self.began
            self.unread = []
        for step, loss in enumerate(self.recent, self.step - len(self.recent) + 1):
            if not math.isfinite(loss):
                raise FloatingPointError(
                    f"the loss or its gradient at step {step} is not finite: lower "
                    "the learning rate"
                )
        return self.recent[-1]

    def evaluate(self) -> dict[str, float]:
        """Measure the model on held-out text and add a record."""
        self.read_losses()
        c, held_out = self.config, self.data.validation
        part = -(-c.batch_size // c.accumulate)
        loss = evaluate(self.model, held_out, c.evaluation_crops, part, self.loss)
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the validation loss at step {self.step} is {loss}"
            )
        tokens = len(self.recent) * c.batch_size * self.model.config.context
        before = self.records[-1]["seconds"] if self.records else 0.0
        record = {
            "step": self.step,
            "train_loss": sum(self.recent) / len(self.recent),
            "validation_loss": loss,
            "learning_rate": c.learning_rate * rate_at(self.step - 1, c),
            "tokens_per_second": tokens / (self.seconds - before),
            "seconds": self.seconds,
        }
        if held_out.characters:
            record["nats_per_character"] = loss * len(held_out) / held_out.characters
        self.records.append(record)
        self.recent = []
        return record

    def state_dict(self) -> dict[str, Any]:
        """Everything that a step changes."""
        self.read_losses() if self.unread else None
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
        """Go back to the moment at which `state_dict` was called."""
        for name, parameter in self.model.named_parameters():
            parameter.copy_(state["model"][name])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            groups = optimizer.state_dict()["param_groups"]  # rates are the config's
            optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})
        self.step, self.seconds = state["step"], state["seconds"]
        self.records, self.recent = list(state["records"]), list(state["recent"])


def train(
    trainer: Trainer,
    after_step: Callable[[Trainer], bool] | None = None,
    progress: bool = True,
) -> list[dict[str, float]]:
    """Train to the end, evaluate on the way, and return the records.

    after_step: called after each step (and its evaluation); True ends the training.
    Raises FloatingPointError when the loss is no longer a number.

    Book: 12_training.html#the-module
    """
    config, model = trainer.config, trainer.model
    mode, stop = model.training, False
    model.train()
    bar = tqdm(
        total=config.steps, initial=trainer.step, disable=not progress, unit="step"
    )
    try:
        while trainer.step < config.steps and not stop:
            trainer.take_step()
            bar.update()
            last = trainer.step == config.steps
            due = last or trainer.step % config.evaluate_every == 0
            if due or len(trainer.unread) == 10:  # reading waits for the device
                bar.set_postfix(loss=f"{trainer.read_losses():.3f}")
            if due:
                trainer.evaluate()
            if after_step:
                stop = after_step(trainer)
    finally:
        bar.close()
        model.train(mode)
    return trainer.records
