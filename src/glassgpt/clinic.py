# Written by tools/tangle.py from book/22_clinic.ipynb: change it there.
"""The clinic: a small GPT of which one part may be wrong, and its examinations."""

import functools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import resources
from types import MethodType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glassgpt.attention import causal_mask
from glassgpt.data import HELD_OUT_PLAYS, shakespeare
from glassgpt.generation import KeyValueCache
from glassgpt.gpt import GPT, GPTConfig
from glassgpt.heads import merge_heads, split_heads
from glassgpt.tokens import CharTokenizer, Tokenizer
from glassgpt.training import TrainConfig, in_mode, rate_at


@dataclass(frozen=True)
class Library:
    """The plays as characters: for training, for judging, and for the doctor alone.

    Book: 22_clinic.html#choose-the-healthy-run-first
    """

    plays: dict[str, str]  # the texts of training, by name
    tokenizer: CharTokenizer
    training: Tensor  # ids (N,)
    held_out: Tensor  # two plays, by which patients judge themselves
    doctors: Tensor  # two more, which no patient ever sees


@functools.cache
def library() -> Library:
    """All 38 plays, read once.

    Book: 22_clinic.html#choose-the-healthy-run-first
    """
    plays = {play.name: play.text for play in shakespeare()}
    tokenizer = CharTokenizer.train(plays.values())
    training = {n: text for n, text in plays.items() if n not in HELD_OUT_PLAYS}

    def ids_of(texts: Sequence[str]) -> Tensor:
        return torch.tensor(tokenizer.encode("".join(texts)))

    first, second = HELD_OUT_PLAYS[:2], HELD_OUT_PLAYS[2:]
    return Library(
        plays=training,
        tokenizer=tokenizer,
        training=ids_of(list(training.values())),
        held_out=ids_of([plays[name] for name in first]),
        doctors=ids_of([plays[name] for name in second]),
    )


def crops(ids: Tensor, starts: Any, length: int) -> Tensor:
    """The pieces (B, length) of ids (N,) that begin at B starts.

    Book: 22_clinic.html#choose-the-healthy-run-first
    """
    return ids[torch.as_tensor(starts)[:, None] + torch.arange(length)]


@functools.cache
def counts(length: int) -> Tensor:
    """The share (contexts, V) of each character after length - 1 others, in training.

    Every count is 0.1 too high, so that no share is 0.

    Book: 22_clinic.html#reference-lines
    """
    V = library().tokenizer.vocab_size
    codes = codes_of(library().training, length)
    table = torch.bincount(codes, minlength=V**length).float().view(-1, V) + 0.1
    return table / table.sum(dim=-1, keepdim=True)


def codes_of(ids: Tensor, length: int) -> Tensor:
    """Each piece of `length` ids as one number, its digits to the base V.

    Book: 22_clinic.html#reference-lines
    """
    V, count = library().tokenizer.vocab_size, len(ids) - length + 1
    codes = torch.zeros(count, dtype=torch.int64)
    for place in range(length):
        codes = codes * V + ids[place : place + count]
    return codes


def loss_of_counts(length: int, ids: Tensor | None = None) -> float:
    """The mean loss in nats of a table of counts; by default on held-out text.

    Book: 22_clinic.html#reference-lines
    """
    ids = library().held_out if ids is None else ids
    return -counts(length).flatten()[codes_of(ids, length)].log().mean().item()


class Patient:
    """One run of a small GPT. Every part of it can be replaced, by name.

    seed: of the weights, batches and dropout; a new patient sets PyTorch's own seed to
    it. parts: what is replaced: a number, or a function that takes the patient first,
    as the method of that name does. Raises ValueError for a name that is no part.

    Book: 22_clinic.html#a-patient
    """

    width, heads, layers, context, dropout, tied = 64, 4, 2, 32, 0.05, True
    steps, rows, peak, warmup, decay, clip = 400, 32, 4e-3, 30, 0.1, 1.0
    shift, cached = 1, True
    scale = 1 / math.sqrt(64 / 4)  # of the scores: 1 / sqrt(D)

    def __init__(self, seed: int = 3, **parts: Any):
        self.seed, self.parts, self.operations = seed, parts, 0
        for name, part in parts.items():
            if name.startswith("_") or not hasattr(Patient, name):
                raise ValueError(f"a patient has no part {name!r}")
            setattr(self, name, MethodType(part, self) if callable(part) else part)
        torch.manual_seed(seed)
        self.model: Any = self.build()
        self.optimizer = self.make_optimizer()
        self.done = 0  # steps
        self.notes: list[dict[str, float]] = []  # of every tenth step
        self.judged: list[Tensor] = []  # held-out losses by position, every 50 steps

    # The data

    def held_out_ids(self) -> Tensor:
        return library().held_out

    def starts(self, step: int) -> np.ndarray:
        random = np.random.default_rng((self.seed, step))
        last = len(library().training) - self.context - 2
        return random.integers(last, size=self.rows)

    def pairs(self, ids: Tensor, starts: Any) -> tuple[Tensor, Tensor]:
        """Inputs and targets, each (B, T)."""
        targets = crops(ids, np.asarray(starts) + self.shift, self.context)
        return crops(ids, starts, self.context), targets

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        return self.pairs(library().training, self.starts(step))

    # The model

    def build(self) -> Any:
        sizes = self.context, self.layers, self.heads, self.width
        vocab_size = library().tokenizer.vocab_size
        model: Any = GPT(GPTConfig(vocab_size, *sizes, self.dropout, self.tied))
        model.embed = partial(self.embed, model)
        for block in model.blocks:
            block.forward = partial(self.block, block)
            block.attention.forward = partial(self.attention, block.attention)
        with torch.no_grad():
            self.start(model)
        return model

    def start(self, model: GPT) -> None:
        """What is changed in a new model: nothing."""

    def embed(self, model: Any, ids: Tensor, positions: Tensor) -> Tensor:
        return model.dropout(model.tokens(ids) + model.positions(positions))

    def block(self, block: Any, x: Tensor, mask: Any, cache: Any) -> Tensor:
        x = x + block.dropout(block.attention(block.attention_norm(x), None, cache))
        return x + block.dropout(block.mlp(block.mlp_norm(x)))

    def attention(self, layer: Any, x: Tensor, mask: Any, cache: Any) -> Tensor:
        parts = layer.qkv(x).chunk(3, dim=-1)
        queries, keys, values = (self.split(part, layer.heads) for part in parts)
        if cache is not None:
            keys, values = cache.append(keys, values)
        scores = queries @ keys.mT * self.scale  # (B, H, T, S)
        weights = self.weigh(scores, self.mask(*scores.shape[-2:]))
        layer.weights = weights.detach()  # for whoever looks
        weights = F.dropout(weights, layer.dropout, layer.training)
        return layer.projection(self.merge(weights @ values))

    def split(self, x: Tensor, heads: int) -> Tensor:
        return split_heads(x, heads)

    def merge(self, x: Tensor) -> Tensor:
        return merge_heads(x)

    def mask(self, T: int, S: int) -> Tensor:
        return causal_mask(S)[-T:]

    def weigh(self, scores: Tensor, mask: Tensor) -> Tensor:
        return scores.masked_fill(~mask, -math.inf).softmax(dim=-1)

    # One step

    def make_optimizer(self) -> torch.optim.Optimizer:
        learning = self.learning()
        decaying = [p for p in learning if self.decays(p)]
        others = [p for p in learning if not self.decays(p)]
        groups = [
            {"params": decaying, "weight_decay": self.decay},
            {"params": others, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, self.peak, (0.9, 0.99), fused=True)

    def learning(self) -> list[Tensor]:
        return list(self.model.parameters())

    def decays(self, parameter: Tensor) -> bool:
        return parameter.dim() > 1

    def losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        """In nats, (B, T)."""
        return F.cross_entropy(logits.mT, targets, reduction="none")

    def total(self, losses: Tensor) -> Tensor:
        return losses.mean()

    def clear(self) -> None:
        self.model.zero_grad()

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def rate(self, step: int) -> float:
        config = TrainConfig(steps=self.steps, warmup=self.warmup)
        return self.peak * rate_at(step, config)

    def set_rate(self, step: int) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(step)

    def take_step(self) -> None:
        inputs, targets = self.batch(self.done)
        logits = self.model(inputs)
        losses = self.losses(logits, targets)
        self.clear()
        self.backward(self.total(losses))
        if self.done % 10 == 0:
            self.note(losses.detach(), logits.detach())
        nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.set_rate(self.done)
        self.optimizer.step()
        self.done += 1

    # Judging

    @torch.no_grad()
    def judge(self) -> Tensor:
        """The losses on 320 held-out crops by position, (T,)."""
        self.before_judging()
        ids = self.held_out_ids()
        starts = np.linspace(0, len(ids) - self.context - 3, 320).astype(int)
        inputs, targets = self.pairs(ids, starts)
        losses = self.losses(self.model(inputs), targets).mean(dim=0)
        self.after_judging()
        return losses

    def before_judging(self) -> None:
        self.model.eval()

    def after_judging(self) -> None:
        self.model.train()

    def train(self) -> "Patient":
        """All steps that are left, about ten seconds, judged every 50."""
        while self.done < self.steps:
            if self.done % 50 == 0:
                self.judged.append(self.judge())
            self.take_step()
        self.judged.append(self.judge())
        return self

    # Writing

    def writer(self) -> Tokenizer:
        return library().tokenizer

    def place(self, first: int, end: int) -> Tensor:
        return torch.arange(first, end)

    def next_logits(self, ids: Sequence[int], caches: list[KeyValueCache]) -> Tensor:
        """Logits (new, V) for the ids that the caches don't hold yet."""
        first = caches[0].length
        positions = self.place(first, len(ids))
        new = torch.tensor([ids[first:]])
        x = self.model.hidden_states(new, positions, caches=caches)
        return self.model.head(x)[0]

    def draw(
        self, logits: Tensor, temperature: float, generator: torch.Generator
    ) -> int:
        shares = (logits[-1] / temperature).softmax(dim=-1)
        return int(torch.multinomial(shares, 1, generator=generator))

    @torch.no_grad()
    def write(
        self, prompt: str, count: int, temperature: float = 1.0, seed: int = 0
    ) -> str:
        """The prompt and `count` characters more, by the patient's own sampler."""
        generator = torch.Generator().manual_seed(seed)
        ids = self.writer().encode(prompt)
        window, caches = list(ids), self.new_caches()
        with in_mode(self.model, training=False):
            for _ in range(count):
                if len(window) > self.context:
                    window, caches = window[-self.context // 2 :], self.new_caches()
                if not self.cached:
                    caches = self.new_caches()
                logits = self.next_logits(window, caches)
                window.append(self.draw(logits, temperature, generator))
                ids.append(window[-1])
        return self.writer().decode(ids)

    def new_caches(self) -> list[KeyValueCache]:
        return [KeyValueCache(self.context) for _ in self.model.blocks]

    # What the chart shows

    def note(self, losses: Tensor, logits: Tensor) -> None:
        parts = {"table": self.model.tokens, "blocks": self.model.blocks}
        norms = {name: gradient_of(part).norm().item() for name, part in parts.items()}
        logs = logits.log_softmax(dim=-1)
        entropy = -(logs.exp() * logs.clamp(min=-100)).sum(dim=-1)
        self.notes.append(
            {
                "step": self.done,
                "training": losses.mean().item(),
                **norms,
                "all": gradient_of(self.model).norm().item(),
                "entropy": entropy.mean().item(),
                "spread": logits.std(dim=-1).mean().item(),
            }
        )


def gradient_of(part: nn.Module) -> Tensor:
    """All gradients of a part in one row (N,), 0 where there is none.

    Book: 22_clinic.html#a-patient
    """
    return torch.cat(
        [
            (torch.zeros_like(p) if p.grad is None else p.grad).flatten()
            for p in part.parameters()
        ]
    )


@torch.no_grad()
def chart(patient: Patient) -> dict[str, Any]:
    """What the figure of a trained patient is drawn from: plain lists of numbers.

    Book: 22_clinic.html#the-chart
    """

    def column(name: str) -> list[float]:
        return [round(note[name], 4) for note in patient.notes]

    held_out = [round(losses.mean().item(), 4) for losses in patient.judged]
    rows = crops(library().doctors, range(1000, 17000, 1000), patient.context)
    look(patient.model, rows)
    weights = patient.model.blocks[0].attention.weights.mean(dim=(0, 1))  # (T, T)
    return {
        "steps": [note["step"] for note in patient.notes],
        "training": column("training"),
        "held out steps": [*range(0, patient.done, 50), patient.done],
        "held out": held_out,
        "norm": {name: column(name) for name in ("table", "blocks", "all")},
        "entropy": column("entropy"),
        "spread": column("spread"),
        "positions": [round(loss, 4) for loss in patient.judged[-1].tolist()],
        "map": (99 * weights).round().clamp(0, 99).int().tolist(),
        "text": patient.write("ROMEO:\n", 200, seed=1),
    }


@torch.no_grad()
def look(model: GPT, ids: Tensor) -> Tensor:
    """The logits (B, T, V) with dropout off.

    Book: 22_clinic.html#the-chart
    """
    with in_mode(model, training=False):
        return model(ids)


FAULTS: dict[str, dict[str, Any]] = {"healthy": {}}  # the parts that are replaced


def everything(patient: Patient, T: int, S: int) -> Tensor:
    """A mask that hides nothing.

    Book: 22_clinic.html#the-faults
    """
    return torch.ones(T, S, dtype=torch.bool)


def upside_down(patient: Patient, T: int, S: int) -> Tensor:
    """`triu` in place of `tril`.

    Book: 22_clinic.html#the-faults
    """
    return torch.ones(S, S, dtype=torch.bool).triu()[-T:]


def masked_afterwards(patient: Patient, scores: Tensor, mask: Tensor) -> Tensor:
    """The softmax has seen the future already.

    Book: 22_clinic.html#the-faults
    """
    return scores.softmax(dim=-1) * mask


def over_queries(patient: Patient, scores: Tensor, mask: Tensor) -> Tensor:
    """Columns sum to 1, not rows.

    Book: 22_clinic.html#the-faults
    """
    return scores.masked_fill(~mask, -math.inf).softmax(dim=-2)


def split_by_view(patient: Patient, x: Tensor, heads: int) -> Tensor:
    """(B, T, C) cut up as (B, H, T, D) at once: positions are mixed.

    Book: 22_clinic.html#the-faults
    """
    B, T, C = x.shape
    return x.reshape(B, heads, T, C // heads)


def merged_by_view(patient: Patient, x: Tensor) -> Tensor:
    """(B, H, T, D) put together as (B, T, C) without moving the heads back.

    Book: 22_clinic.html#the-faults
    """
    B, H, T, D = x.shape
    return x.reshape(B, T, H * D)


FAULTS |= {
    "no_mask": {"mask": everything},
    "mask_inverted": {"mask": upside_down},
    "mask_after_softmax": {"weigh": masked_afterwards},
    "wrong_axis": {"weigh": over_queries},
    "no_scale": {"scale": 1.0},
    "view_split": {"split": split_by_view},
    "view_both": {"split": split_by_view, "merge": merged_by_view},
}


def sum_forgotten(
    patient: Patient, block: Any, x: Tensor, mask: Any, cache: Any
) -> Tensor:
    """What attention writes replaces the stream.

    Book: 22_clinic.html#the-faults
    """
    x = block.dropout(block.attention(block.attention_norm(x), None, cache))
    return x + block.dropout(block.mlp(block.mlp_norm(x)))


def norms_removed(patient: Patient, model: Any) -> None:
    """Every layer norm lets through what comes.

    Book: 22_clinic.html#the-faults
    """
    model.norm = nn.Identity()
    for block in model.blocks:
        block.attention_norm = block.mlp_norm = nn.Identity()


def tokens_alone(patient: Patient, model: Any, ids: Tensor, positions: Any) -> Tensor:
    """The table of positions is never read.

    Book: 22_clinic.html#the-faults
    """
    return model.dropout(model.tokens(ids))


def ten_times(patient: Patient, model: GPT) -> None:
    """Matrices and tables start ten times too large.

    Book: 22_clinic.html#the-faults
    """
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.mul_(10)


def usual_embedding(patient: Patient, model: GPT) -> None:
    """`nn.Embedding` starts with standard deviation 1, not 0.02.

    Book: 22_clinic.html#the-faults
    """
    model.tokens.weight.normal_()


FAULTS |= {
    "no_residual": {"block": sum_forgotten},
    "no_norm": {"start": norms_removed},
    "no_positions": {"embed": tokens_alone},
    "weights_x10": {"start": ten_times},
    "table_std_1": {"start": usual_embedding},
    "untied": {"tied": False},
}


def same_starts(patient: Patient, step: int) -> np.ndarray:
    """Every step has the seed of the first.

    Book: 22_clinic.html#the-faults
    """
    return Patient.starts(patient, 0)


def starts_in_order(patient: Patient, step: int) -> np.ndarray:
    """The plays from the first page on.

    Book: 22_clinic.html#the-faults
    """
    return (step * patient.rows + np.arange(patient.rows)) * patient.context


def shuffled_speeches(patient: Patient) -> Tensor:
    """Held out, so it seems: speeches of a second edition of the training text.

    Book: 22_clinic.html#the-faults
    """
    speeches = "".join(library().plays.values())[:400_000].split("\n\n")
    np.random.default_rng(0).shuffle(speeches)
    return torch.tensor(library().tokenizer.encode("\n\n".join(speeches)))


def training_text(patient: Patient) -> Tensor:
    """Judged on what was learned.

    Book: 22_clinic.html#the-faults
    """
    return library().training


FAULTS |= {
    "not_shifted": {"shift": 0},
    "shifted_twice": {"shift": 2},
    "same_batch": {"starts": same_starts},
    "unshuffled": {"starts": starts_in_order},
    "near_copies": {"held_out_ids": shuffled_speeches},
    "judged_on_training": {"held_out_ids": training_text},
}


def without_last_block(patient: Patient) -> list[Tensor]:
    """The optimizer never hears of the last block.

    Book: 22_clinic.html#the-faults
    """
    last = {id(p) for p in patient.model.blocks[-1].parameters()}
    return [p for p in patient.model.parameters() if id(p) not in last]


def head_replaced(patient: Patient) -> torch.optim.Optimizer:
    """The head becomes a copy when the optimizer has its list already.

    Book: 22_clinic.html#the-faults
    """
    optimizer = Patient.make_optimizer(patient)
    table = patient.model.tokens.weight
    patient.model.head.weight = nn.Parameter(table.detach().clone())
    return optimizer


def all_decay(patient: Patient, parameter: Tensor) -> bool:
    """Biases and norms, too.

    Book: 22_clinic.html#the-faults
    """
    return True


def never_cleared(patient: Patient) -> None:
    """Gradients of all steps add up.

    Book: 22_clinic.html#the-faults
    """


def summed(patient: Patient, losses: Tensor) -> Tensor:
    """The chart shows the mean, but this is what is learned from.

    Book: 22_clinic.html#the-faults
    """
    return losses.sum()


def of_probabilities(patient: Patient, logits: Tensor, targets: Tensor) -> Tensor:
    """The loss takes a softmax, too.

    Book: 22_clinic.html#the-faults
    """
    return Patient.losses(patient, logits.softmax(dim=-1), targets)


def in_float16(patient: Patient, loss: Tensor) -> None:
    """What is below float16's least number becomes 0.

    Book: 22_clinic.html#the-faults
    """
    loss.backward()
    for parameter in patient.model.parameters():
        parameter.grad = parameter.grad.half().float()


def share_of_last_rate(patient: Patient, step: int) -> float:
    """The warm-up multiplies the rate of the step before: 0 stays 0.

    Book: 22_clinic.html#the-faults
    """
    last = patient.optimizer.param_groups[0]["lr"]
    return last * min(step / patient.warmup, 1)


FAULTS |= {
    "frozen_block": {"learning": without_last_block},
    "head_left_out": {"make_optimizer": head_replaced},
    "decay_everywhere": {"decays": all_decay},
    "decay_x1000": {"decay": 100.0},
    "not_cleared": {"clear": never_cleared},
    "loss_summed": {"total": summed},
    "double_softmax": {"losses": of_probabilities},
    "half_gradients": {"backward": in_float16},
    "clip_1e-3": {"clip": 1e-3},
    "rate_x100": {"peak": 0.4},
    "rate_div100": {"peak": 4e-5},
    "rate_stuck_at_0": {"rate": share_of_last_rate},
    "no_warmup_high": {"warmup": 0, "peak": 3e-2},
}


def nothing(patient: Patient) -> None:
    """The call of `eval()` or `train()` is forgotten.

    Book: 22_clinic.html#the-faults
    """


def other_tokenizer(patient: Patient) -> Tokenizer:
    """Made without the first character of ours: all others have other ids.

    Book: 22_clinic.html#the-faults
    """
    ours = library().tokenizer
    first, *others = map(ours.decode, ([number] for number in range(ours.vocab_size)))
    return CharTokenizer([*others, first])


def one_too_early(patient: Patient, first: int, end: int) -> Tensor:
    """With something in the cache, positions begin one too early.

    Book: 22_clinic.html#the-faults
    """
    return torch.arange(first, end) - int(first > 0)


def divided_afterwards(
    patient: Patient, logits: Tensor, temperature: float, generator: torch.Generator
) -> int:
    """Shares are scaled again to sum to 1: the temperature does nothing.

    Book: 22_clinic.html#the-faults
    """
    shares = logits[-1].softmax(dim=-1) / temperature
    return int(torch.multinomial(shares, 1, generator=generator))


def last_but_one(
    patient: Patient, logits: Tensor, temperature: float, generator: torch.Generator
) -> int:
    """Drawn from the prediction for the last character, not for the next.

    Book: 22_clinic.html#the-faults
    """
    return Patient.draw(patient, logits[-2:-1], temperature, generator)


FAULTS |= {
    "dropout_on": {"before_judging": nothing},
    "never_train_again": {"after_judging": nothing},
    "wrong_tokenizer": {"writer": other_tokenizer},
    "cache_off_by_one": {"place": one_too_early},
    "temperature_after": {"draw": divided_afterwards},
    "wrong_position": {"cached": False, "draw": last_but_one},
}


INFINITY = math.inf


@dataclass(frozen=True)
class Examination:
    """A number of a patient, what it costs, and the range in which it is healthy.

    Book: 22_clinic.html#the-order-of-examinations
    """

    measure: Callable[[Patient], float]
    price: int  # 0: reads what is there; 1: before training; 10: trains again
    healthy: tuple[float, float]


EXAMINATIONS: dict[str, Examination] = {}  # in the order in which they are made


def examination(price: int, healthy: tuple[float, float]) -> Callable:
    """Makes an examination of the function below it, under the function's name.

    Book: 22_clinic.html#the-order-of-examinations
    """

    def keep(measure: Callable[[Patient], float]) -> Callable[[Patient], float]:
        EXAMINATIONS[measure.__name__] = Examination(measure, price, healthy)
        return measure

    return keep


def untrained(patient: Patient) -> Patient:
    """The same patient before its first step.

    Book: 22_clinic.html#the-order-of-examinations
    """
    return type(patient)(patient.seed, **patient.parts)


def doctors_rows(count: int = 16, length: int = 32) -> Tensor:
    """Inputs (count, length) of a text that the patient had no hand in.

    Book: 22_clinic.html#the-order-of-examinations
    """
    starts = torch.linspace(0, 90_000, count).long()
    return crops(library().doctors, starts, length)


def difference(found: Tensor, usual: Tensor) -> float:
    """The largest change of a logit, as a share of the logits' standard deviation.

    Book: 22_clinic.html#the-order-of-examinations
    """
    return ((found - usual).abs().max() / usual.std()).item()


@examination(price=0, healthy=(1, 1))
def targets(patient: Patient) -> float:
    """The share of targets that equal the next input.

    Book: 22_clinic.html#the-data
    """
    inputs, wanted = patient.batch(0)
    return (wanted[:, :-1] == inputs[:, 1:]).float().mean().item()


@examination(price=0, healthy=(0, 0.1))
def own_inputs(patient: Patient) -> float:
    """The share of targets that equal their own input.

    Book: 22_clinic.html#the-data
    """
    inputs, wanted = patient.batch(0)
    return (wanted == inputs).float().mean().item()


def six_batches(patient: Patient) -> list[str]:
    """The rows of the first six batches as texts.

    Book: 22_clinic.html#the-data
    """
    rows = torch.cat([patient.batch(step)[0] for step in range(6)])
    return [library().tokenizer.decode(row) for row in rows.tolist()]


@examination(price=0, healthy=(0.98, 1))
def distinct_rows(patient: Patient) -> float:
    """How many of the rows are different, as a share.

    Book: 22_clinic.html#the-data
    """
    rows = six_batches(patient)
    return len(set(rows)) / len(rows)


@examination(price=0, healthy=(25, 34))
def plays_seen(patient: Patient) -> float:
    """The number of plays that hold a row.

    Book: 22_clinic.html#the-data
    """
    rows = six_batches(patient)
    plays = library().plays.values()
    return float(sum(any(row in play for row in rows) for play in plays))


def found_in_training(patient: Patient, length: int) -> float:
    """The share of forty held-out pieces that stand in the training text.

    Book: 22_clinic.html#the-data
    """
    ids = patient.held_out_ids()
    starts = torch.linspace(0, len(ids) - length - 1, 40).long()
    pieces = map(library().tokenizer.decode, crops(ids, starts, length).tolist())
    text = "".join(library().plays.values())
    return sum(piece in text for piece in pieces) / 40


@examination(price=0, healthy=(0, 0.1))
def known_lines(patient: Patient) -> float:
    """The share of held-out pieces of 30 characters that were trained on.

    Book: 22_clinic.html#the-data
    """
    return found_in_training(patient, 30)


@examination(price=0, healthy=(0, 0))
def known_passages(patient: Patient) -> float:
    """The same for 1,000 characters.

    Book: 22_clinic.html#the-data
    """
    return found_in_training(patient, 1000)


@examination(price=0, healthy=(0, 0))
def left_out(patient: Patient) -> float:
    """Tensors of the model that stand in none of the optimizer's groups.

    Book: 22_clinic.html#the-lists
    """
    patient = untrained(patient)
    groups = patient.optimizer.param_groups
    listed = {id(p) for group in groups for p in group["params"]}
    return float(sum(id(p) not in listed for p in patient.model.parameters()))


@examination(price=0, healthy=(1, 1))
def tied_head(patient: Patient) -> float:
    """1 if head and token table are one tensor.

    Book: 22_clinic.html#the-lists
    """
    model = untrained(patient).model
    return float(model.head.weight is model.tokens.weight)


@examination(price=0, healthy=(0, 0))
def decaying_vectors(patient: Patient) -> float:
    """Biases and weights of norms in a group with decay.

    Book: 22_clinic.html#the-lists
    """
    groups = untrained(patient).optimizer.param_groups
    decaying = [p for g in groups if g["weight_decay"] > 0 for p in g["params"]]
    return float(sum(p.dim() < 2 for p in decaying))


@examination(price=0, healthy=(0, 1))
def strongest_decay(patient: Patient) -> float:
    """The largest weight decay of a group.

    Book: 22_clinic.html#the-lists
    """
    groups = untrained(patient).optimizer.param_groups
    return max(group["weight_decay"] for group in groups)


@examination(price=0, healthy=(1e-3, 2e-2))
def highest_rate(patient: Patient) -> float:
    """The highest learning rate that the optimizer is given.

    Book: 22_clinic.html#the-lists
    """
    return max(rates_of(patient))


@examination(price=0, healthy=(0, 0.1))
def first_rate(patient: Patient) -> float:
    """The first rate as a share of the highest.

    Book: 22_clinic.html#the-lists
    """
    rates = rates_of(patient)
    return rates[0] / max(*rates, 1e-12)


def rates_of(patient: Patient) -> list[float]:
    """The rates of all steps, asked of the optimizer without a step being taken.

    Book: 22_clinic.html#the-lists
    """
    patient, rates = untrained(patient), []
    for step in range(patient.steps):
        patient.set_rate(step)
        rates.append(patient.optimizer.param_groups[0]["lr"])
    return rates


@examination(price=1, healthy=(-0.1, 0.1))
def first_loss(patient: Patient) -> float:
    """The first loss less ln V, that of a model which knows nothing.

    Book: 22_clinic.html#the-start
    """
    patient = untrained(patient)
    inputs, wanted = patient.batch(0)
    loss = patient.losses(look(patient.model, inputs), wanted).mean().item()
    return loss - math.log(library().tokenizer.vocab_size)


@examination(price=1, healthy=(0, 1e-3))
def cut_future(patient: Patient) -> float:
    """How far the logits of 20 tokens move when the 12 after them are missing.

    Book: 22_clinic.html#the-future
    """
    model, rows = untrained(patient).model, doctors_rows()
    return difference(look(model, rows[:, :20]), look(model, rows)[:, :20])


@examination(price=1, healthy=(0, 1e-3))
def changed_future(patient: Patient) -> float:
    """The same when the 12 are replaced by those of another row.

    Book: 22_clinic.html#the-future
    """
    model, rows = untrained(patient).model, doctors_rows()
    other = torch.cat([rows[:, :20], rows.roll(5, dims=0)[:, 20:]], dim=1)
    return difference(look(model, other)[:, :20], look(model, rows)[:, :20])


def weights_of(patient: Patient) -> Tensor:
    """The attention weights (B, H, T, T) of the first block, untrained.

    Book: 22_clinic.html#the-future
    """
    model = untrained(patient).model
    look(model, doctors_rows())
    return model.blocks[0].attention.weights


@examination(price=1, healthy=(0.999, 1.001))
def row_sums(patient: Patient) -> float:
    """The sum of weights that is farthest from 1.

    Book: 22_clinic.html#the-future
    """
    sums = weights_of(patient).sum(dim=-1).flatten()
    return sums[(sums - 1).abs().argmax()].item()


@examination(price=1, healthy=(0, 0))
def above_diagonal(patient: Patient) -> float:
    """The mean weight that a row gives to its future.

    Book: 22_clinic.html#the-future
    """
    return weights_of(patient).triu(diagonal=1).sum(dim=-1).mean().item()


def seen_in_block(patient: Patient) -> dict[str, Tensor]:
    """What enters the first block and its attention, and what its parts write.

    Book: 22_clinic.html#the-block
    """
    model, seen = untrained(patient).model, {}
    block = model.blocks[0]
    parts = {"block": block, "attention": block.attention, "mlp": block.mlp}
    parts["qkv"] = block.attention.qkv

    def keep(part: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        name = next(name for name, other in parts.items() if other is part)
        seen[name], seen[f"into {name}"] = output, inputs[0]

    hooks = [part.register_forward_hook(keep) for part in parts.values()]
    look(model, doctors_rows())
    for hook in hooks:
        hook.remove()
    return seen


@examination(price=1, healthy=(0, 1e-3))
def block_ledger(patient: Patient) -> float:
    """What is left of the output less the input and the parts, beside the input.

    Book: 22_clinic.html#the-block
    """
    seen = seen_in_block(patient)
    written = seen["into block"] + seen["attention"] + seen["mlp"]
    return ((seen["block"] - written).norm() / seen["into block"].norm()).item()


@examination(price=1, healthy=(0.9, 1.1))
def entering_size(patient: Patient) -> float:
    """The root mean square of what queries, keys and values are made of.

    Book: 22_clinic.html#the-block
    """
    return seen_in_block(patient)["into qkv"].square().mean().sqrt().item()


@examination(price=1, healthy=(0.24, 0.26))
def score_slope(patient: Patient) -> float:
    """The slope of the last row's log weights over products of queries and keys.

    Book: 22_clinic.html#the-block
    """
    queries, keys, _ = seen_in_block(patient)["qkv"].chunk(3, dim=-1)
    queries, keys = (split_heads(x, patient.heads) for x in (queries, keys))
    products = (queries[:, :, -1:] @ keys.mT)[:, :, 0]  # (B, H, T)
    logs = weights_of(patient)[:, :, -1].clamp(min=1e-30).log()
    products = products - products.mean(dim=-1, keepdim=True)
    return ((products * logs).sum() / products.square().sum()).item()


@examination(price=1, healthy=(0.01, INFINITY))
def moved_text(patient: Patient) -> float:
    """How far the logits move when the same text stands at later positions.

    Book: 22_clinic.html#the-block
    """
    model, rows = untrained(patient).model, doctors_rows(length=20)
    places = torch.arange(20)
    with torch.no_grad(), in_mode(model, training=False):
        here, there = (model.hidden_states(rows, p) for p in (places, places + 7))
        return difference(model.head(there), model.head(here))


def gradients_of(patient: Patient) -> list[Tensor]:
    """Three gradients (N,) of one batch: ours, the patient's, and its second one.

    Book: 22_clinic.html#one-gradient
    """
    model, (inputs, wanted) = patient.model, patient.batch(0)
    model.eval()  # dropout would make them differ
    F.cross_entropy(model(inputs).mT, wanted).backward()
    found = [gradient_of(model).clone()]
    model.zero_grad()
    for _ in range(2):
        losses = patient.losses(model(inputs), wanted)
        patient.clear()
        patient.backward(patient.total(losses))
        found.append(gradient_of(model).clone())
    return found


@examination(price=1, healthy=(0.99, 1.01))
def gradient_ratio(patient: Patient) -> float:
    """The patient's gradient of a batch beside that of PyTorch's mean loss.

    Book: 22_clinic.html#one-gradient
    """
    ours, first, _ = gradients_of(untrained(patient))
    return (first.norm() / ours.norm()).item()


@examination(price=1, healthy=(0.99, 1.01))
def second_gradient(patient: Patient) -> float:
    """The second gradient of a batch beside the first.

    Book: 22_clinic.html#one-gradient
    """
    _, first, second = gradients_of(untrained(patient))
    return (second.norm() / first.norm()).item()


@examination(price=1, healthy=(0, 0.5))
def float16_share(patient: Patient) -> float:
    """The share of its numbers that float16 can hold without rounding.

    Book: 22_clinic.html#one-gradient
    """
    _, first, _ = gradients_of(untrained(patient))
    first = first[first != 0]
    return (first.half().float() == first).float().mean().item()


@examination(price=1, healthy=(0.1, 1.01))
def clipped_norm(patient: Patient) -> float:
    """The norm of the gradient with which the first step is taken.

    Book: 22_clinic.html#one-gradient
    """
    patient = untrained(patient)
    patient.take_step()
    return gradient_of(patient.model).norm().item()


@examination(price=1, healthy=(0, 1e-6))
def judged_twice(patient: Patient) -> float:
    """The difference of two judgments of the same weights.

    Book: 22_clinic.html#judging
    """
    patient = untrained(patient)
    return (patient.judge().mean() - patient.judge().mean()).abs().item()


@examination(price=1, healthy=(1, 1))
def mode_after(patient: Patient) -> float:
    """1 if the model is in training mode.

    Book: 22_clinic.html#judging
    """
    patient = untrained(patient)
    patient.judge()
    return float(patient.model.training)


@examination(price=1, healthy=(1, 1))
def decoded(patient: Patient) -> float:
    """The share of 2,000 characters that come back.

    Book: 22_clinic.html#writing
    """
    ids = library().doctors[5000:7000].tolist()
    found, wanted = patient.writer().decode(ids), library().tokenizer.decode(ids)
    return sum(a == b for a, b in zip(found, wanted, strict=False)) / len(wanted)


@examination(price=1, healthy=(1, 1))
def cold_texts(patient: Patient) -> float:
    """How many different texts six seeds write at a temperature of 0.0001.

    Book: 22_clinic.html#writing
    """
    patient = untrained(patient)
    return float(len({patient.write("ROMEO", 12, 1e-4, seed) for seed in range(6)}))


@examination(price=1, healthy=(0, 1e-3))
@torch.no_grad()
def cached_logits(patient: Patient) -> float:
    """How far the logits after 8 tokens move when 7 of these come from the cache.

    Book: 22_clinic.html#writing
    """
    patient, ids = untrained(patient), doctors_rows(1, 8)[0].tolist()
    with in_mode(patient.model, training=False):
        caches = patient.new_caches()
        patient.next_logits(ids[:7], caches)
        found = patient.next_logits(ids, caches)[-1]
    return difference(found, look(patient.model, torch.tensor([ids]))[0, -1])


@examination(price=1, healthy=(0.95, 1))
def greedy_text(patient: Patient) -> float:
    """The share of 12 cold characters that are the likeliest after those before.

    Book: 22_clinic.html#writing
    """
    patient = untrained(patient)
    ids = library().tokenizer.encode(patient.write("ROMEO", 12, 1e-4))
    likeliest = [
        look(patient.model, torch.tensor([ids[:end]]))[0, -1].argmax().item()
        for end in range(5, len(ids))
    ]
    return sum(a == b for a, b in zip(ids[5:], likeliest, strict=True)) / 12


@examination(price=10, healthy=(0, 0.5))
def overfit(patient: Patient) -> float:
    """The loss after 120 steps on eight crops.

    Book: 22_clinic.html#eight-crops
    """
    inputs, wanted = (each[:8] for each in patient.batch(0))
    patient = operate(patient, "batch", lambda patient, step: (inputs, wanted))
    for _ in range(120):
        patient.take_step()
    return patient.losses(look(patient.model, inputs), wanted).mean().item()


SIGNS: dict[str, dict[str, tuple[float, float]]] = {
    "not_shifted": {"targets": (0, 0.9), "own_inputs": (1, 1)},
    "shifted_twice": {"targets": (0, 0.9)},
    "same_batch": {"distinct_rows": (0, 0.5)},
    "unshuffled": {"plays_seen": (0, 10)},
    "judged_on_training": {"known_lines": (0.3, 1), "known_passages": (0.9, 1)},
    "near_copies": {"known_lines": (0.3, 1)},
    "frozen_block": {"left_out": (2, INFINITY)},
    "head_left_out": {"left_out": (1, 1)},
    "untied": {"tied_head": (0, 0)},
    "decay_everywhere": {"decaying_vectors": (1, INFINITY)},
    "decay_x1000": {"strongest_decay": (1, INFINITY)},
    "rate_x100": {"highest_rate": (0.1, INFINITY)},
    "rate_stuck_at_0": {"highest_rate": (0, 0)},
    "rate_div100": {"highest_rate": (0, 1e-3)},
    "no_warmup_high": {"first_rate": (0.5, 1)},
    "table_std_1": {"first_loss": (10, INFINITY)},
    "weights_x10": {"first_loss": (0.1, 10)},
    "mask_inverted": {"cut_future": (1e-3, INFINITY), "above_diagonal": (0.7, 1)},
    "no_mask": {"cut_future": (1e-3, INFINITY), "above_diagonal": (0.01, 0.7)},
    "wrong_axis": {"cut_future": (1e-3, INFINITY), "row_sums": (1.01, INFINITY)},
    "mask_after_softmax": {"cut_future": (1e-3, INFINITY), "row_sums": (0, 0.99)},
    "view_split": {
        "cut_future": (1e-3, INFINITY),
        "changed_future": (1e-3, INFINITY),
    },
    "view_both": {"cut_future": (1e-3, INFINITY)},
    "no_residual": {"block_ledger": (1e-3, INFINITY)},
    "no_norm": {"entering_size": (0, 0.5)},
    "no_scale": {"score_slope": (0.5, INFINITY)},
    "no_positions": {"moved_text": (0, 1e-3)},
    "loss_summed": {"gradient_ratio": (100, INFINITY)},
    "double_softmax": {"gradient_ratio": (0, 0.5)},
    "not_cleared": {"second_gradient": (1.5, INFINITY)},
    "half_gradients": {"float16_share": (0.99, 1)},
    "clip_1e-3": {"clipped_norm": (0, 0.01)},
    "dropout_on": {"judged_twice": (1e-6, INFINITY)},
    "never_train_again": {"mode_after": (0, 0)},
    "wrong_tokenizer": {"decoded": (0, 0.99)},
    "temperature_after": {"cold_texts": (2, 6)},
    "cache_off_by_one": {"cached_logits": (1e-3, INFINITY)},
    "wrong_position": {"greedy_text": (0, 0.8)},
}
NOTHING_FOUND = "healthy, or a fault that you have no examination for"


def diagnose(patient: Patient, results: dict[str, float] | None = None) -> str:
    """The name of the first fault whose signs a patient shows.

    results: numbers that are known already; those that are measured are added.
    Returns NOTHING_FOUND where no fault's signs are there.

    Book: 22_clinic.html#diagnose
    """
    results = {} if results is None else results
    for fault, signs in SIGNS.items():
        if shows(patient, signs, results):
            return fault
    return NOTHING_FOUND


def shows(
    patient: Patient,
    signs: dict[str, tuple[float, float]],
    results: dict[str, float],
) -> bool:
    """Whether all numbers lie in the ranges of a fault, measured one by one.

    Book: 22_clinic.html#diagnose
    """
    for name, (low, high) in signs.items():
        if name not in results:
            results[name] = EXAMINATIONS[name].measure(patient)
        if not low <= results[name] <= high:
            return False
    return True


def examine(patient: Patient) -> dict[str, float]:
    """The numbers of all examinations.

    Book: 22_clinic.html#diagnose
    """
    return {name: each.measure(patient) for name, each in EXAMINATIONS.items()}


BEDS = 20
IN_THE_WARD = [
    "healthy", "healthy_too", "unlucky", "not_shifted", "same_batch", "near_copies",
    "no_mask", "mask_after_softmax", "wrong_axis", "view_split", "view_both",
    "no_positions", "head_left_out", "frozen_block", "not_cleared",
    "double_softmax", "clip_1e-3", "dropout_on", "cache_off_by_one",
    "wrong_tokenizer",
]  # fmt: skip


def bed(number: int) -> tuple[str, int, dict[str, Any]]:
    """Who lies in a bed: the fault's name, the seed, and all parts that are replaced.

    Raises ValueError for a number that no bed has.

    Book: 22_clinic.html#the-ward
    """
    if type(number) is not int or not 1 <= number <= BEDS:
        raise ValueError(f"the ward has patients 1 to {BEDS}, not {number!r}")
    order = np.random.default_rng(989).permutation(BEDS)  # so that nobody peeks
    name = IN_THE_WARD[order[number - 1]]
    if name == "healthy_too":
        return "healthy", 7, {}
    if name == "unlucky":  # nothing is wrong but the seed, and a rate on the edge
        return "healthy", 1, {"peak": 1e-2}
    return name, 4, FAULTS[name]


def patient(number: int) -> Patient:
    """A patient of the ward, not yet trained: `patient(7).train()` takes ten seconds.

    Raises ValueError for a number that no bed has.

    Book: 22_clinic.html#the-ward
    """
    _, seed, parts = bed(number)
    return Patient(seed, **parts)


def operate(patient: Patient, name: str, part: Any) -> Patient:
    """A new patient, not yet trained, with one part replaced; operations are counted.

    name, part: as for `Patient`.

    Book: 22_clinic.html#the-ward
    """
    healed = Patient(patient.seed, **{**patient.parts, name: part})
    healed.operations = patient.operations + 1
    return healed


@functools.cache
def records() -> dict[str, Any]:
    """The recorded runs of the ward, as benchmarks/clinic.py wrote them.

    Book: 22_clinic.html#the-ward
    """
    file = resources.files("glassgpt") / "records" / "clinic.json"
    return json.loads(file.read_text("utf-8"))


def record(number: int) -> dict[str, Any]:
    """The recorded chart and results of a patient of the ward.

    Book: 22_clinic.html#the-ward
    """
    bed(number)
    return records()["patients"][number - 1]
