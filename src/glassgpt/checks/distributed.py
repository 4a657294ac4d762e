# Written by tools/tangle.py from book/25_many_machines.ipynb: change it there.


"""Checks of runs on many processes, and of streams; they name the mistake."""

import itertools
import math
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException
from torch.optim import AdamW

from glassgpt import distributed
from glassgpt.data import Batch, TokenData, Tokens
from glassgpt.gpt import GPT, GPTConfig
from glassgpt.modern import MuonConfig, muon_optimizers
from glassgpt.plan import Machine, Plan
from glassgpt.runs import resume_run, start_run
from glassgpt.tokens import CharTokenizer
from glassgpt.training import TrainConfig, Trainer

Vectors = list[list[float]]


def _from_neighbors(states: list[Vectors], side: int) -> bool:
    """Whether each new number is the neighbor's, or that and the old one."""
    return all(
        new[c] in (old[c], before[(rank + side) % len(before)][c])
        or new[c] == old[c] + before[(rank + side) % len(before)][c]
        for before, after in itertools.pairwise(states)
        for rank, (old, new) in enumerate(zip(before, after, strict=True))
        for c in range(len(before))
    )


def check_ring(ring: Callable[[Vectors], Iterable[Vectors]]) -> None:
    """Every process ends with the sum, and sends one chunk in each of 2 (n - 1) steps.

    ring: called with n vectors of n numbers; yields them before and after each step.

    Book: 25_many_machines.html#a-ring
    """
    for n, base in ((2, 10), (3, 10), (5, -10)):
        ranks = [float(base**rank) for rank in range(n)]
        vectors = [[number + chunk for chunk in range(n)] for number in ranks]
        wanted = [sum(column) for column in zip(*vectors, strict=True)]
        states = [[list(v) for v in held] for held in ring([list(v) for v in vectors])]
        assert states[0] == vectors, "yield what they hold before the first step, too"
        assert (steps := len(states) - 1) == 2 * (n - 1), (
            f"{steps} step{'s' * (steps != 1)}, not {2 * (n - 1)}: after n - 1 steps of"
            " adding, n - 1 more pass the sums on"
        )
        for before, after in itertools.pairwise(states):
            for old, new in zip(before, after, strict=True):
                changed = sum(a != b for a, b in zip(old, new, strict=True))
                assert changed <= 1, f"{changed} chunks arrived in one step, not one"
        assert any(_from_neighbors(states, side) for side in (-1, 1)), (
            "a number came from nowhere: what arrives is the neighbor's, or added to it"
        )
        for rank, vector in enumerate(states[-1]):
            assert base < 0 or np.less_equal(vector, wanted).all(), (
                f"process {rank} counted a number twice: whole sums replace"
            )
            assert vector == wanted, f"process {rank} does not hold the sum"


def table_slice() -> list[list[int]]:
    """The shapes of a model's table, whole and as this process holds it.

    Book: 25_many_machines.html#dividing-the-model
    """
    table: Any = _small_run(distributed.FSDPTrainer).model.tokens.weight
    return [list(table.shape), list(table.to_local().shape)]


def block_times() -> list[tuple[str, int]]:
    """How many numbers of the first block's weights lie here, and when in a step.

    Book: 25_many_machines.html#dividing-the-model
    """
    trainer = _small_run(distributed.FSDPTrainer, layers=3)
    first, found = trainer.model.blocks[0], []

    def note(when: str) -> Callable[..., None]:
        return lambda *_: found.append((when, _weights_here(first)))

    note("before the step")()
    for place, block in enumerate(trainer.model.blocks):
        block.mlp.register_forward_pre_hook(note(f"forward pass, in block {place}"))
        block.mlp.register_full_backward_hook(note(f"backward pass, in block {place}"))
    trainer.take_step()
    note("after the step")()
    return found


class _Masked(Tokens):
    """Tokens of whose targets some don't count, in a row even all."""

    def random_batch(self, batch_size: int, context: int, seed: Any) -> Batch:
        inputs, targets = super().random_batch(batch_size, context, seed)
        targets = targets.clone()
        for row in range(batch_size):
            targets[row, : (3 * row + seed[1]) % (context + 1)] = -100
        return inputs, targets


def _small_run(
    kind: Any,
    rows: int = 7,
    accumulate: int = 1,
    muon: bool = False,
    masked: bool = False,
    dropout: float = 0.0,
    layers: int = 1,
) -> Any:
    """A trainer with 64 bits, a tied table and 101 tokens, which three can't divide.

    It has two optimizers. Each process draws other weights. With dropout all rows are
    alike.
    """
    with torch.random.fork_rng([]):
        torch.manual_seed(dist.get_rank() if dist.is_initialized() else 0)
        size: Any = {"layers": layers, "heads": 2, "width": 12, "dropout": dropout}
        model = GPT(GPTConfig(101, 8, **size)).double()
    ids = [number * number * (not dropout) % 101 for number in range(2000)]
    data = TokenData.of(ids, ids[:300], 101)
    data.train = (_Masked if masked else Tokens)(data.train.ids)
    values = {"steps": 3, "batch_size": rows, "accumulate": accumulate, "warmup": 2}
    values |= {"learning_rate": 1e-2, "clip": 0.5, "evaluation_crops": 4}
    config: Any = (MuonConfig if muon else TrainConfig)(**values)
    if muon:
        return kind(model, data, config, muon_optimizers(model, config, torch.float64))
    tables, rest = [], []
    for name, parameter in model.named_parameters():
        (tables if name == "tokens.weight" else rest).append(parameter)
    return kind(model, data, config, [AdamW(part, 1e-2) for part in (tables, rest)])


def _here(tensors: Iterable[Any]) -> int:
    """How many numbers of some tensors this process holds."""
    local = [t.to_local() if hasattr(t, "to_local") else t for t in tensors]
    return sum(t.numel() for t in local if t is not None and t.dim() > 0)


def _weights_here(module: Any) -> int:
    """The same of a module's weights; those gathered ahead lie in a buffer."""
    held = _here(module.parameters())
    for part in module.modules():
        if hasattr(part, "_get_fsdp_state"):  # nothing public tells
            gathered = part._get_fsdp_state()._fsdp_param_group._all_gather_result
            if gathered:
                held += gathered.all_gather_output.numel() - _here(part.parameters())
    return held


def train_ways(kinds: Sequence[str], **how: Any) -> dict[str, dict[str, Any]]:
    """What three steps make of a small model, on each of the processes that call it.

    kinds: names of trainers in `glassgpt.distributed`, or "Trainer". how: rows,
    accumulate, muon. For each, weights, and how many numbers a process held:
    weights, gradients
    before the step, moments; "busy" are the first two in a backward pass, at the end
    of the second of three blocks.

    Book: 25_many_machines.html#one-check-six-ways
    """
    found = {}
    for name in kinds:
        base: Any = getattr(distributed, name)

        class Counting(base):  # type: ignore[misc]
            def update(self) -> Tensor:
                self.held = {"weights": _here(self.model.parameters())}
                grads = [parameter.grad for parameter in self.model.parameters()]
                self.held["gradients"] = _here(grads)
                return super().update()

            def in_block(self, *_: Any) -> None:
                # PyTorch keeps a tied table's gradient until both its uses gave theirs.
                tied = self.model.tokens.weight
                weights = self.model.parameters()
                grads = [w if w is tied else w.grad for w in weights]
                self.busy = {"weights": _weights_here(self.model)}
                self.busy["gradients"] = _here(grads)

        trainer = _small_run(Counting, layers=3, **how)
        second = trainer.model.blocks[1].attention_norm
        second.register_full_backward_hook(trainer.in_block)
        for _ in range(3):
            trainer.take_step()
        states = [state for o in trainer.optimizers for state in o.state.values()]
        moments = [moment for state in states for moment in state.values()]
        held = trainer.held | {"moments": _here(moments)}
        loss = trainer.evaluate()["validation_loss"]
        state = trainer.state_dict()["model"]
        weights = {key: value.detach().clone() for key, value in state.items()}
        found[name] = {"weights": weights, "held": held, "loss": loss}
        found[name]["busy"] = trainer.busy
    return found


_CASES: dict[str, dict[str, Any]] = {
    "not all begin with the weights of rank 0": {"steps": 0},
    "with 2 rows on each process the gradients were not added up as they should be": {
        "rows": 6
    },
    "with 3 rows, 2 and 2: a mean of means, weight each process by its rows": {},
    "with masked targets: weight each process by its targets, not its rows": {
        "masked": True
    },
    "with parts: one part was not sent (the last, if the switch comes after its forward"
    " pass)": {"rows": 8, "accumulate": 2},
    "saved and loaded: weights and moments have to come back": {"loaded": True},
    "with a process that has no targets: it adds nothing": {"rows": 3, "masked": True},
    "evaluated between two steps, which has to change nothing": {"evaluated": True},
}
Ended = tuple[dict[str, Tensor], list[float]]


def _ends(
    kind: Any,
    steps: int = 3,
    loaded: bool = False,
    evaluated: bool = False,
    **how: Any,
) -> Ended:
    """Weights and moments after some steps, as they are saved, and the losses.

    The last loss is that of the evaluation. loaded: halfway into another trainer.
    evaluated: before the last step, too.
    """
    trainer, losses = _small_run(kind, **how), []
    for step in range(steps):
        if loaded and step == 2:
            states = [trainer.state_dict()]
            if dist.is_initialized():
                dist.broadcast_object_list(states, 0)  # rank 0 has it whole
            (trainer := _small_run(kind, **how)).load_state_dict(states[0])
        if evaluated and step == 2:
            trainer.evaluate()
        trainer.take_step()
        losses.append(trainer.read_losses())
    losses.append(trainer.evaluate()["validation_loss"])
    state = trainer.state_dict()
    found = dict(state["model"])
    for number, optimizer in enumerate(state["optimizers"]):
        for place, moments in optimizer["state"].items():
            found |= {f"{key} {number}-{place}": v for key, v in moments.items()}
    return {key: value.detach().clone() for key, value in found.items()}, losses


def _each_case(module: str, name: str) -> tuple[list[Ended], list[float]]:
    """How each case ends here, and random numbers after the losses of two steps."""
    from importlib import import_module

    kind = getattr(import_module(module), name)  # where it was defined
    trainer, own = _small_run(kind, rows=4, dropout=0.5), []
    loss = trainer.loss

    def noted(*part: Tensor) -> Tensor:
        found = loss(*part)
        with torch.random.fork_rng([]):
            own.append(torch.rand(()).item())
        return found

    trainer.loss = noted
    for _ in range(2):
        trainer.take_step()
    return [_ends(kind, **case) for case in _CASES.values()], own


def check_parallel(kind: type[Trainer]) -> None:
    """Three processes end with the weights of one, to 1e-12 in 64 bits.

    With them: moments, losses, the weights at the start, dropout, and a run that is
    saved and loaded, or evaluated, between two steps.
    kind: a class of a module, called as `ParallelTrainer` is.

    Book: 25_many_machines.html#one-check-six-ways
    """
    assert kind.__module__ != "__main__", (
        "new processes can't see a class of the notebook: write it to a file, import it"
    )
    try:
        ranks = distributed.run_processes(3, _each_case, kind.__module__, kind.__name__)
    except (ProcessExitedException, ProcessRaisedException) as error:
        if isinstance(error, ProcessRaisedException) and "Timed out" not in str(error):
            raise
        what = "a process was missing from a collective call, or was killed"
        raise AssertionError(what) from error
    here = ranks[0][0]
    wanted = [_ends(Trainer, **case) for case in _CASES.values()]
    table = [ended[0]["tokens.weight"] for ended in here]
    frozen = (table[1] == table[0]).all(dim=1)
    assert not frozen.any() or frozen.all(), (
        f"{int(frozen.sum())} rows of the tied table never learned"
    )
    ends = zip(*(ended for ended, _ in ranks), strict=True)
    for mistake, one, each in zip(_CASES, wanted, ends, strict=True):
        _compare(mistake, one, each)
    first, second = zip(*(drawn for _, drawn in ranks), strict=True)
    assert len({*first}) == 3, "processes drop the same numbers: seed by rank"
    assert len({*first, *second}) == 6, "each step drops the same: seed by step, too"


def _compare(mistake: str, one: Ended, each: Sequence[Ended]) -> None:
    """What one process ended with, and three: rank 0 has all, others may have less."""
    (wanted, losses), (first, _) = one, each[0]
    for other, _ in each[1:]:
        for name in (name for name in other if name in first):
            drift = (first[name] - other[name]).abs().max().item()
            assert drift < 1e-12, (
                f"the processes drifted apart, by {drift:.0e} in {name}: {mistake}"
            )
    assert first.keys() == wanted.keys(), (
        f"{len(wanted.keys() - first.keys())} tensors are missing in rank 0's state"
    )
    for name, value in wanted.items():
        off = (first[name] - value).abs().max().item()
        assert off < 1e-12, f"{name} is off by {off:.0e}: {mistake}"
    for rank, (_, read) in enumerate(each):
        assert np.allclose(read[:-1], losses[:-1], rtol=1e-5), (
            f"rank {rank} reads a loss of {read[-2]:.3f}, not {losses[-2]:.3f}: add up"
            " the parts of all processes"
        )
        assert np.isclose(read[-1], losses[-1], rtol=1e-5), (
            f"rank {rank} evaluates to {read[-1]:.3f}, not {losses[-1]:.3f}: each"
            " measures all crops"
        )


class OneStepOfARing(distributed.ParallelTrainer):
    """Wrong: each process adds its left neighbor's gradient, which is right for two.

    Book: 25_many_machines.html#one-check-six-ways
    """

    def exchange(self) -> None:
        for parameter in self.model.parameters():
            everyone = [torch.empty_like(parameter) for _ in range(self.world)]
            dist.all_gather(everyone, parameter.grad)
            parameter.grad += everyone[self.rank - 1]


class MeanOfMeans(distributed.ParallelTrainer):
    """Wrong: the mean of each process's rows, then the mean of the processes.

    Book: 25_many_machines.html#one-check-six-ways
    """

    def parts(self, batch: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, ...]]:
        mine = batch[0].tensor_split(self.world)[self.rank]
        self.factor = len(batch[0]) / (len(mine) * self.world)
        return super().parts(batch)

    def backward(self, loss: Tensor) -> None:
        super().backward(loss * self.factor)


class SwitchesAfterForward(distributed.DDPTrainer):
    """Wrong: whether to send is said between the forward and the backward pass.

    Book: 25_many_machines.html#one-check-six-ways
    """

    def parts(self, batch: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, ...]]:
        parts = list(distributed.ParallelTrainer.parts(self, batch))
        for number, part in enumerate(parts):
            self.last = number == len(parts) - 1
            yield part

    def backward(self, loss: Tensor) -> None:
        self.ddp.require_backward_grad_sync = self.last
        super().backward(loss)


class FrozenRows(distributed.ParallelTrainer):
    """Wrong: the last slice of the table never moves, as in an older FSDP2.

    Book: 25_many_machines.html#one-check-six-ways
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
    """Start or go on with a small run; returns its validation losses.

    killed_at: the last rank kills itself when the checkpoint of this step is there.

    Book: 25_many_machines.html#kill-a-rank
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
        return distributed.make_trainer(plan, data, model, shard)

    how: dict[str, Any] = {"progress": False, "make_trainer": make}
    if Path(folder, "run.json").exists():
        run = resume_run(folder, say=lambda _: None, steps=steps, **how)
    else:
        size = tokenizer.vocab_size
        model = GPTConfig(size, 16, layers=1, heads=2, width=32)
        kind = TrainConfig if shard == "model" else MuonConfig
        values = {"steps": steps, "batch_size": 7, "warmup": 5}
        values |= {"evaluate_every": 10, "evaluation_crops": 8}
        plan = Plan(model, kind(**values), Machine())
        data = TokenData.of(ids[:1200], ids[1200:], size)
        run = start_run(folder, plan, data, tokenizer, checkpoint_every=10, **how)
    return [record["validation_loss"] for record in run.trainer.records]


def check_stream(stream: Callable[..., Any]) -> None:
    """Every shard once a round, one at a time; begun anywhere, the same batches.

    stream: called as `StreamedTokens` is.

    Book: 25_many_machines.html#a-corpus-larger-than-your-disk
    """
    names = [*"abcdef"]
    fetched: list[weakref.ref] = []

    def fetch(name: str) -> np.ndarray:
        assert name in names, f"fetch({name!r}): give it an address of `shards`"
        held = any(ids() is not None for ids in fetched)
        assert not held, "an old shard is held while the next is fetched: drop it"
        shard = names.index(name)
        ids = np.arange(10_000 * shard, 10_400 * shard + 400)
        fetched.append(weakref.ref(ids))
        return ids

    def inputs_of(steps: Any, seed: int = 3, each: int = 2, of: int = 6) -> Tensor:
        fetched.clear()
        tokens, found = stream(names[:of], fetch, each), []
        for step in steps:
            inputs, targets = tokens.random_batch(4, 8, (seed, step))
            found.append(inputs)
            shards = len((inputs // 10_000).unique())
            assert shards == 1, f"one step learned from {shards} shards"
            assert torch.equal(targets, inputs + 1), "targets are the next tokens"
        return torch.stack(found)

    inputs = inputs_of(range(36))
    order = (inputs[:, 0, 0] // 10_000).tolist()
    for turn in range(3):
        part = order[12 * turn : 12 * turn + 12]
        assert all(a == b for a, b in zip(part[::2], part[1::2], strict=True)), (
            "a shard serves two steps here, and the first two share one"
        )
        assert sorted(part[::2]) == list(range(6)), (
            f"round {turn} learned from the shards {part[::2]}: each has to come once"
        )
    starts = {tuple(step[:, 0].tolist()) for step in inputs}
    assert len(starts) == 36, "two steps got the same crops"
    assert len(inputs[0, :, 0].unique()) > 1, "all rows of a batch are the same crop"
    places = inputs[:, :, 0] % 10_000
    assert places.min() < 100 < 1800 < places.max(), "some of each shard is never seen"
    assert order[:12] != order[12:24], "every round has the same order"
    assert torch.equal(inputs_of(range(17, 36)), inputs[17:]), (
        "begun at step 17 it gives other batches: seed and step have to decide"
    )
    other = inputs_of(range(36), seed=4)[:, 0, 0] // 10_000
    assert other.tolist() != order, "another seed gives the same order"
    one, two = (inputs_of(range(36), seed, of=1) for seed in (3, 4))
    assert not torch.equal(one, two), "another seed gives the same crops"
    threes = (inputs_of(range(18), each=3)[:, 0, 0] // 10_000).reshape(6, 3)
    assert (threes == threes[:, :1]).all(), "steps_each=3: a shard serves three steps"


def check_gradient(combine: Callable[[list[Tensor], list[int]], Tensor]) -> None:
    """The mean over all targets, out of each process's mean and their numbers.

    combine: called as combine(gradients, targets).

    Book: 25_many_machines.html#exercise-1-one-gradient-out-of-many
    """
    for place, targets in enumerate(([2, 2], [2, 1], [1, 5], [1, 2, 3])):
        shape = ((6,), (2, 3))[place % 2]
        ones = [torch.arange(6.0).view(shape) * n - 6 for n in (-1, 1, 2)]
        given = [one.clone() for one in ones[: len(targets)]]
        pairs = list(zip(given, targets, strict=True))
        wanted = sum(one * n for one, n in pairs) / sum(targets)
        found = torch.as_tensor(combine(given, targets)).to(wanted)
        means = sum(ones[: len(targets)]) / len(targets)
        same = all(map(torch.equal, given, ones))
        assert same, "a gradient that was given was changed"
        assert targets == [2, 2] or not torch.allclose(found, means), (
            "a mean of means: a process with more targets counts for more"
        )
        what = f"{len(targets)} processes: {found.tolist()}, not {wanted.tolist()}"
        assert torch.allclose(found, wanted), what
    empty = ones[0] * math.nan
    for given, targets in (([ones[0], empty], [4, 0]), ([empty, ones[0]], [0, 4])):
        found = torch.as_tensor(combine(given, targets)).to(empty)
        what = f"with {targets} targets"
        assert not found.isnan().any(), (
            f"{what}, 0 times nan is nan: leave out who has none"
        )
        assert torch.allclose(found, ones[0]), f"{what}, who has none counts"
    found = torch.as_tensor(combine([ones[0], empty], [4, 1]))
    assert found.isnan().all(), "nan of a process with targets is a fault: show it"


def check_memory(memory: Callable[[list[tuple[int, int]], int, str], int]) -> None:
    """Bytes of weights, gradients and two moments on the fullest process.

    memory: called as memory(shapes, processes, what is divided).

    Book: 25_many_machines.html#exercise-2-will-it-fit
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

    Book: 25_many_machines.html#exercise-3-how-much-time-is-lost
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
        longer = best * math.sqrt(365.25 / 365)
        assert abs(found / longer - 1) > 1e-6, "a year has 365 days here"
        assert abs(found / best - 1) < 1e-6, f"{found:.1f} seconds, not {best:.1f}"
        assert abs(part / (share * mean) - 1) > 1e-6, (
            "those are seconds: as a share, divide by the time between failures"
        )
        without = share - restart / mean
        assert abs(part / without - 1) > 1e-9, "the restart is lost, too"
        assert abs(part / share - 1) < 1e-6, f"a share of {part:.4g}, not {share:.4g}"
