# Written by tools/tangle.py from book/22_many_machines.ipynb: change it there.


"""Checks of runs on many processes, of streams and of laws; they name the mistake."""

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from glassgpt import scaling
from glassgpt.data import TokenData
from glassgpt.device import Machine, Plan
from glassgpt.gpt import GPT, GPTConfig
from glassgpt.laws import Law
from glassgpt.modern import MuonConfig, muon_optimizers
from glassgpt.runs import resume_run, start_run
from glassgpt.tokens import CharTokenizer
from glassgpt.training import TrainConfig, Trainer

Vectors = list[list[float]]


def check_ring(ring: Callable[[Vectors], Iterable[Vectors]]) -> None:
    """Every process ends with the sum, and sends one chunk in each of 2 (n - 1) steps.

    ring: called with n vectors of n numbers; yields them before and after each step.

    Book: 22_many_machines.html#a-ring
    """
    for n in (2, 3, 5):
        vectors = [[float(10**rank + chunk) for chunk in range(n)] for rank in range(n)]
        wanted = [sum(column) for column in zip(*vectors, strict=True)]
        states = [[list(v) for v in held] for held in ring([list(v) for v in vectors])]
        assert states[0] == vectors, "yield what they hold before the first step, too"
        assert len(states) - 1 >= 2 * (n - 1), (
            f"{len(states) - 1} steps for {n} processes: chunks go round twice"
        )
        assert len(states) - 1 == 2 * (n - 1), f"{len(states) - 1} steps are too many"
        for before, after in zip(states, states[1:], strict=False):
            for old, new in zip(before, after, strict=True):
                changed = sum(a != b for a, b in zip(old, new, strict=True))
                assert changed <= 1, f"{changed} chunks arrived in one step, not one"
        for rank, vector in enumerate(states[-1]):
            assert all(a <= b for a, b in zip(vector, wanted, strict=True)), (
                f"process {rank} counted a number twice: whole sums replace"
            )
            assert vector == wanted, f"process {rank} does not hold the sum"


def _small_run(kind: Any, rows: int = 7, accumulate: int = 1, muon: Any = False) -> Any:
    """A trainer with 64 bits, a tied table and 101 tokens, which three can't divide."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = GPT(GPTConfig(101, 8, layers=2, heads=2, width=12)).double()
    ids = [number * number % 101 for number in range(2000)]
    values = {"steps": 6, "batch_size": rows, "accumulate": accumulate, "warmup": 2}
    values |= {"learning_rate": 1e-2, "clip": 0.5, "evaluation_crops": 4}
    config: Any = (MuonConfig if muon else TrainConfig)(**values)
    optimizers = muon_optimizers(model, config, torch.float64) if muon else None
    return kind(model, TokenData.of(ids, ids[:300], 101), config, optimizers)


def _here(tensors: Iterable[Any]) -> int:
    """How many numbers of some tensors this process holds."""
    local = [t.to_local() if hasattr(t, "to_local") else t for t in tensors]
    return sum(t.numel() for t in local if t is not None and t.dim() > 0)


def train_ways(kinds: Sequence[str], **how: Any) -> dict[str, dict[str, Any]]:
    """What six steps make of a small model, on each of the processes that call it.

    kinds: names of trainers in `glassgpt.scaling`, or "Trainer". how: rows, accumulate,
    muon. For each, weights, and how many numbers a process held: weights, gradients
    before the step, moments.

    Book: 22_many_machines.html#one-check-five-ways
    """
    found = {}
    for name in kinds:
        base: Any = getattr(scaling, name)

        class Counting(base):  # type: ignore[misc]
            def update(self) -> Tensor:
                self.held = {"weights": _here(self.model.parameters())}
                grads = [parameter.grad for parameter in self.model.parameters()]
                self.held["gradients"] = _here(grads)
                return super().update()

        trainer = _small_run(Counting, **how)
        for _ in range(6):
            trainer.take_step()
        states = [state for o in trainer.optimizers for state in o.state.values()]
        moments = [moment for state in states for moment in state.values()]
        held = trainer.held | {"moments": _here(moments)}
        loss = trainer.evaluate()["validation_loss"]
        state = trainer.state_dict()["model"]
        weights = {key: value.detach().clone() for key, value in state.items()}
        found[name] = {"weights": weights, "held": held, "loss": loss}
    return found


def _weights_of(module: str, name: str, **how: Any) -> dict[str, Tensor]:
    """Final weights on this process; the class is looked up where it was defined."""
    from importlib import import_module

    kind = getattr(import_module(module), name)
    trainer = _small_run(kind, **how)
    for _ in range(6):
        trainer.take_step()
    whole = trainer.state_dict()["model"]  # on rank 0, where it is divided
    return {key: value.detach().clone() for key, value in whole.items()}


def _each_case(module: str, name: str) -> list[dict[str, Tensor]]:
    cases = ({"rows": 6}, {"rows": 7}, {"rows": 8, "accumulate": 2})
    return [_weights_of(module, name, **case) for case in cases]


def check_parallel(kind: type[Trainer]) -> None:
    """Two processes end with the weights of one, to 1e-12 in 64 bits.

    kind: a class of a module, called as `ParallelTrainer` is.

    Book: 22_many_machines.html#one-check-five-ways
    """
    mistakes = (
        "with 3 rows on each process the gradients were not added up as they should be",
        "with 4 rows and 3: a mean of means, weight each process by its rows",
        "with parts: the last part alone was sent, or a part was sent twice",
    )
    here, there = scaling.run_processes(2, _each_case, kind.__module__, kind.__name__)
    cases = _each_case("glassgpt.training", "Trainer")
    start = _small_run(Trainer).model.tokens.weight
    frozen = (here[0]["tokens.weight"] == start).all(dim=1)
    assert not frozen.any() or frozen.all(), (
        f"{int(frozen.sum())} rows of the tied table never learned"
    )
    found = zip(cases, here, there, mistakes, strict=True)
    for wanted, first, second, mistake in found:
        for name in second:
            drift = (first[name] - second[name]).abs().max().item()
            assert drift < 1e-12, (
                f"the processes drifted apart, by {drift:.0e} in {name}: {mistake}"
            )
        gaps = {name: (first[name] - w).abs() for name, w in wanted.items()}
        worst = max(gaps, key=lambda name: gaps[name].max().item())
        most = gaps[worst].max().item()
        assert most < 1e-12, f"{worst} is off by {most:.0e}: {mistake}"


class ForgetsToExchange(scaling.ParallelTrainer):
    """Wrong: each process follows its own gradient.

    Book: 22_many_machines.html#one-check-five-ways
    """

    def exchange(self) -> None:
        pass


class MeanOfMeans(scaling.ParallelTrainer):
    """Wrong: the mean of each process's rows, then the mean of the processes.

    Book: 22_many_machines.html#one-check-five-ways
    """

    def parts(self, batch: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, ...]]:
        mine = batch[0].tensor_split(self.world)[self.rank]
        self.factor = len(batch[0]) / (len(mine) * self.world)
        return super().parts(batch)

    def backward(self, loss: Tensor) -> None:
        super().backward(loss * self.factor)


class SwitchesAfterForward(scaling.DDPTrainer):
    """Wrong: whether to send is said between the forward and the backward pass.

    Book: 22_many_machines.html#one-check-five-ways
    """

    def parts(self, batch: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, ...]]:
        parts = list(scaling.ParallelTrainer.parts(self, batch))
        for number, part in enumerate(parts):
            self.last = number == len(parts) - 1
            yield part

    def backward(self, loss: Tensor) -> None:
        self.ddp.require_backward_grad_sync = self.last
        super().backward(loss)


class FrozenRows(scaling.ParallelTrainer):
    """Wrong: the last slice of the table never moves, as in an older FSDP2.

    Book: 22_many_machines.html#one-check-five-ways
    """

    def update(self) -> Tensor:
        last = self.model.tokens.weight.detach()[-50:]
        before = last.clone()
        norm = super().update()
        last.copy_(before)
        return norm


def train_in(
    folder: str, steps: int, shard: str = "optimizer", killed_at: int | None = None
) -> list[float]:
    """Start or go on with a small run; rank 0 returns its validation losses.

    killed_at: the last rank kills itself when the checkpoint of this step is there.

    Book: 22_many_machines.html#kill-a-rank
    """
    mark = Path(folder, f"checkpoint-{killed_at or 0:08d}")

    def watch() -> None:
        while not mark.exists():
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGKILL)

    alone = not dist.is_initialized()
    if killed_at and (alone or dist.get_rank() == dist.get_world_size() - 1):
        threading.Thread(target=watch, daemon=True).start()
    text = "a miniature Eiffel tower beside a tower of paper or a tower of sand. " * 20
    tokenizer = CharTokenizer.train(text)
    ids = tokenizer.encode(text)

    def make(plan: Plan, data: TokenData, model: GPT | None) -> Any:
        return scaling.make_trainer(plan, data, model, shard)

    how: dict[str, Any] = {"progress": False, "make_trainer": make}
    with scaling.team() as leads:
        if not leads:
            return []
        if Path(folder, "run.json").exists():
            run = resume_run(folder, say=lambda _: None, steps=steps, **how)
        else:
            size = tokenizer.vocab_size
            model = GPTConfig(size, 16, layers=2, heads=2, width=32)
            kind = TrainConfig if shard == "model" else MuonConfig
            values = {"steps": steps, "batch_size": 7, "warmup": 5}
            values |= {"evaluate_every": 10, "evaluation_crops": 8}
            plan = Plan(model, kind(**values), Machine(), math.nan)
            data = TokenData.of(ids[:1200], ids[1200:], size)
            run = start_run(folder, plan, data, tokenizer, checkpoint_every=10, **how)
        return [record["validation_loss"] for record in run.trainer.records]


def check_stream(stream: Callable[..., Any]) -> None:
    """Every shard once a round; begun at any step, the batches are the same.

    stream: called as `StreamedTokens` is.

    Book: 22_many_machines.html#a-corpus-larger-than-any-disk
    """

    def fetch(shard: int) -> np.ndarray:
        return np.arange(1000 * shard, 1000 * shard + 400)

    def shards_of(tokens: Any, steps: Iterable[int], seed: int = 3) -> list[int]:
        found = []
        for step in steps:
            inputs, _ = tokens.random_batch(4, 8, (seed, step))
            numbers = {int(number) // 1000 for number in inputs.flatten()}
            assert len(numbers) == 1, f"one step learned from {len(numbers)} shards"
            found.append(numbers.pop())
        return found

    order = shards_of(stream(range(6), fetch, 2), range(36))
    for turn in range(3):
        part = order[12 * turn : 12 * turn + 12]
        assert all(a == b for a, b in zip(part[::2], part[1::2], strict=True)), (
            "a shard serves two steps here, and the first two share one"
        )
        assert sorted(part[::2]) == list(range(6)), (
            f"round {turn} learned from the shards {part[::2]}: each has to come once"
        )
    assert order[:12] != order[12:24], "every round has the same order"
    assert shards_of(stream(range(6), fetch, 2), range(17, 36)) == order[17:], (
        "begun at step 17 it gives other shards: seed and step have to decide"
    )
    other = shards_of(stream(range(6), fetch, 2), range(36), seed=4)
    assert other != order, "another seed gives the same order"


def check_gradient(combine: Callable[[list[Tensor], list[int]], Tensor]) -> None:
    """The mean over all targets, out of each process's mean and their numbers.

    combine: called as combine(gradients, targets).

    Book: 22_many_machines.html#exercise-1-one-gradient-out-of-many
    """
    ones = [torch.tensor([3.0, -6.0]), torch.tensor([0.0, 3.0])]
    for targets in ([2, 2], [2, 1], [1, 5]):
        given = [one.clone() for one in ones]
        wanted = (targets[0] * ones[0] + targets[1] * ones[1]) / sum(targets)
        found = combine(given, targets)
        means = (ones[0] + ones[1]) / 2
        assert torch.equal(given[0], ones[0]), "a gradient that was given was changed"
        assert targets == [2, 2] or not torch.allclose(found, means), (
            "a mean of means: a process with more targets counts for more"
        )
        assert torch.allclose(found, wanted), f"{found.tolist()}, not {wanted.tolist()}"
    empty = torch.tensor([math.nan, math.nan])
    found = combine([ones[0], empty], [4, 0])
    assert not found.isnan().any(), "0 times nan is nan: leave out who has no targets"
    assert torch.allclose(found, ones[0]), "who has no targets counts for nothing"


def check_memory(memory: Callable[[list[tuple[int, int]], int, str], int]) -> None:
    """Bytes of weights, gradients and two moments on the fullest process.

    memory: called as memory(shapes, processes, what is divided).

    Book: 22_many_machines.html#exercise-2-will-it-fit
    """
    shapes = [(101, 4), (8, 4), (4, 30)]
    cases = [
        (1, "nothing", 8896, "four numbers of 4 bytes for each parameter"),
        (3, "nothing", 8896, "where nothing is divided each has everything"),
        (1, "optimizer", 8896, "one process owns everything"),
        (2, "optimizer", 7936, "moments of 404 and 32 numbers lie on the fuller one"),
        (3, "optimizer", 7680, "the owner of the largest has moments of 404 numbers"),
        (1, "model", 8896, "one process has everything"),
        (2, "model", 4480, "51 of 101 rows: the fullest has the larger half"),
        (3, "model", 3328, "34 of 101 rows, 3 of 8, 2 of 4"),
    ]
    for n, divided, wanted, why in cases:
        found = memory(list(shapes), n, divided)
        assert found == wanted, f"{divided} on {n}: {found}, not {wanted}: {why}"


def check_lost_time(
    lost: Callable[[int, float, float, float], tuple[float, float]],
) -> None:
    """The best time between checkpoints, and the share that is lost with it.

    lost: called as lost(cards, years, cost, restart).

    Book: 22_many_machines.html#exercise-3-how-much-time-is-lost
    """
    cases = [(1, 1.0, 10.0, 60.0), (16_384, 5.8, 30.0, 600.0)]
    cases += [(100_000, 5.8, 5.0, 300.0)]
    for cards, years, cost, restart in cases:
        mean = years * 365 * 86_400 / cards
        best = math.sqrt(2 * cost * mean)
        share = cost / best + best / (2 * mean) + restart / mean
        found, part = lost(cards, years, cost, restart)
        single = math.sqrt(2 * cost * mean * cards)
        assert cards == 1 or abs(found / single - 1) > 1e-6, (
            "more cards fail more often: divide the time between failures by the cards"
        )
        assert abs(found / best - 1) < 1e-6, f"{found:.1f} seconds, not {best:.1f}"
        without = share - restart / mean
        assert abs(part / without - 1) > 1e-9, "the restart is lost, too"
        assert abs(part / share - 1) < 1e-6, f"a share of {part:.4g}, not {share:.4g}"


def check_optimum(optimum: Callable[[Law, float], tuple[float, float]]) -> None:
    """The size and the tokens with the lowest loss at a budget C = 6 N D.

    optimum: called as optimum(law, C).

    Book: 22_many_machines.html#exercise-4-the-best-size-for-a-budget
    """
    laws = [Law(1.7, 400.0, 0.34, 410.0, 0.28)]
    laws += [Law(1.0, 50.0, 0.5, 20.0, 0.5)]
    for law in laws:
        for C in (1e12, 1e21):
            N, D = optimum(law, C)
            assert abs(6 * N * D / C - 1) < 1e-6, (
                f"6 N D is {6 * N * D:.3g}, not the budget of {C:.0e}"
            )
            here = law(N, D)
            for factor in (1.05, 1 / 1.05):
                other = law(N * factor, D / factor)
                side = "larger" if factor > 1 else "smaller"
                assert here <= other, f"a {side} model has a lower loss"
