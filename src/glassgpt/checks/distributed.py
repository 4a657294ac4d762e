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


def check_ring(ring: Callable[[Vectors], Iterable[Vectors]]) -> None:
    """Every process ends with the sum, and sends one chunk in each of 2 (n - 1) steps.

    ring: called with n vectors of n numbers; yields them before and after each step.

    Book: 25_many_machines.html#a-ring
    """
    for n in (2, 3, 5):
        vectors = [[10.0**rank + chunk for chunk in range(n)] for rank in range(n)]
        wanted = [sum(column) for column in zip(*vectors, strict=True)]
        states = [[list(v) for v in held] for held in ring([list(v) for v in vectors])]
        steps = len(states) - 1
        assert steps == 2 * (n - 1), (
            f"{steps} of {2 * (n - 1)} steps: after n - 1 steps of adding, n - 1 more"
            " pass the sums on"
        )
        for before, after in itertools.pairwise(states):
            for old, new in zip(before, after, strict=True):
                changed = sum(a != b for a, b in zip(old, new, strict=True))
                assert changed <= 1, f"{changed} chunks arrived in one step, not one"
        for rank, vector in enumerate(states[-1]):
            assert vector == wanted, (
                f"process {rank} does not hold the sum: whole sums replace"
            )


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
    layers: int = 1,
) -> Any:
    """A trainer with 64 bits, a tied table and 101 tokens, which three can't divide.

    It has two optimizers. Each process draws other weights.
    """
    with torch.random.fork_rng([]):
        torch.manual_seed(dist.get_rank() if dist.is_initialized() else 0)
        model = GPT(GPTConfig(101, 8, layers, heads=2, width=12)).double()
    ids = [number * number % 101 for number in range(2000)]
    data = TokenData.of(ids, ids[:300], 101)
    if masked:
        data.train = _Masked(data.train.ids)
    values = {"steps": 3, "batch_size": rows, "accumulate": accumulate, "warmup": 2}
    values |= {"learning_rate": 1e-2, "clip": 0.5, "evaluation_crops": 4}
    config: Any = (MuonConfig if muon else TrainConfig)(**values)
    if muon:
        return kind(model, data, config, muon_optimizers(model, config, torch.float64))
    tables, *rest = model.parameters()
    return kind(model, data, config, [AdamW([tables], 1e-2), AdamW(rest, 1e-2)])


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

    kinds: names of trainers in `glassgpt.distributed`, or "Trainer". how: as
    `_small_run` takes it. For each kind the weights, the loss of an evaluation, and how
    many numbers a process held: "held" are weights, gradients before the step, and
    moments; "busy" are the first two in a backward pass, at the end of the second of
    three blocks.

    Book: 25_many_machines.html#one-check-six-ways
    """
    found = {}
    for name in kinds:
        trainer = _small_run(getattr(distributed, name), layers=3, **how)
        model, update, held, busy = trainer.model, trainer.update, {}, {}

        def count(model=model, update=update, held=held) -> Tensor:
            held["weights"] = _here(model.parameters())
            held["gradients"] = _here(weight.grad for weight in model.parameters())
            return update()

        def count_in_block(*_: Any, model=model, busy=busy) -> None:
            busy["weights"] = _weights_here(model)
            # PyTorch keeps a tied table's gradient until both its uses gave theirs.
            table, *rest = model.parameters()
            busy["gradients"] = _here([table, *(weight.grad for weight in rest)])

        trainer.update = count
        second = model.blocks[1].attention_norm
        second.register_full_backward_hook(count_in_block)
        for _ in range(3):
            trainer.take_step()
        states = [state for o in trainer.optimizers for state in o.state.values()]
        held["moments"] = sum(_here(state.values()) for state in states)
        loss = trainer.evaluate()["validation_loss"]
        state = trainer.state_dict()["model"]
        weights = {key: value.detach().clone() for key, value in state.items()}
        found[name] = {"weights": weights, "loss": loss, "held": held, "busy": busy}
    return found


_CASES: dict[str, dict[str, Any]] = {
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
}


def _end(kind: Any, loaded: bool = False, **how: Any) -> dict[str, Tensor]:
    """Weights, moments and losses after three steps, as this process saves them.

    Before the third the run is evaluated. loaded: it goes on in another trainer, too.
    """
    trainer, losses = _small_run(kind, **how), []
    for step in range(3):
        if step == 2:
            trainer.evaluate()
        if step == 2 and loaded:
            states = [trainer.state_dict()]
            if dist.is_initialized():
                dist.broadcast_object_list(states, 0)  # rank 0 has it whole
            trainer = _small_run(kind, **how)
            trainer.load_state_dict(states[0])
        trainer.take_step()
        losses.append(trainer.read_losses())
    losses.append(trainer.evaluate()["validation_loss"])
    state = trainer.state_dict()
    found = {**state["model"], "losses": torch.tensor(losses)}
    for number, optimizer in enumerate(state["optimizers"]):
        for place, moments in optimizer["state"].items():
            found |= {f"{key} {number}-{place}": v for key, v in moments.items()}
    return {key: value.detach().clone() for key, value in found.items()}


def _each_case(kind: Any) -> list[dict[str, Tensor]]:
    return [_end(kind, **how) for how in _CASES.values()]


def check_parallel(kind: type[Trainer]) -> None:
    """Three processes end with the weights of one, to 1e-12 in 64 bits.

    With them: moments and losses. kind: a class of a module, called as
    `ParallelTrainer` is.

    Book: 25_many_machines.html#one-check-six-ways
    """
    assert kind.__module__ != "__main__", (
        "new processes can't see a class of the notebook: write it to a file, import it"
    )
    ranks = distributed.run_processes(3, _each_case, kind)
    ends = zip(_CASES, _each_case(Trainer), *ranks, strict=True)
    for mistake, wanted, first, *others in ends:
        for other in others:  # rank 0 has all, others may have less
            for name in (name for name in other if name in first):
                drift = (first[name] - other[name]).abs().max().item()
                assert drift < 1e-12, (
                    f"the processes drifted apart, by {drift:.0e} in {name}: {mistake}"
                )
        missing = len(wanted.keys() - first.keys())
        assert not missing, f"{missing} tensors are missing in rank 0's state"
        for name, value in wanted.items():
            off = (first[name] - value).abs().max().item()
            assert off < (1e-5 if name == "losses" else 1e-12), (
                f"{name} is off by {off:.0e}: {mistake}"
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
    fetched: list[weakref.ref] = []

    def fetch(shard: int) -> np.ndarray:
        held = any(ids() is not None for ids in fetched)
        assert not held, "an old shard is held while the next is fetched: drop it"
        ids = np.arange(1000 * shard, 1000 * shard + 400)
        fetched.append(weakref.ref(ids))
        return ids

    def inputs_of(steps: range, seed: int = 3) -> Tensor:
        fetched.clear()
        tokens, found = stream(range(6), fetch, 2), []
        for step in steps:
            inputs, targets = tokens.random_batch(4, 8, (seed, step))
            assert torch.equal(targets, inputs + 1), "targets are the next tokens"
            found.append(inputs)
        return torch.stack(found)

    inputs = inputs_of(range(36))
    order = (inputs[:, 0, 0] // 1000).tolist()
    for turn in range(3):
        part = order[12 * turn : 12 * turn + 12]
        assert part[::2] == part[1::2], "a shard has to serve two steps here"
        assert sorted(part[::2]) == list(range(6)), (
            f"round {turn} learned from the shards {part[::2]}: each has to come once"
        )
    assert order[:12] != order[12:24], "every round has the same order"
    assert len(inputs[:, :, 0].unique()) > 100, "most sequences come more than once"
    assert torch.equal(inputs_of(range(17, 36)), inputs[17:]), (
        "begun at step 17 it gives other batches: seed and step have to decide"
    )
    assert not torch.equal(inputs_of(range(36), seed=4), inputs), (
        "another seed gives the same batches"
    )


def check_gradient(combine: Callable[[list[Tensor], list[int]], Tensor]) -> None:
    """The mean over all targets, out of each process's mean and their numbers.

    combine: called as combine(gradients, targets).

    Book: 25_many_machines.html#exercise-1-one-gradient-out-of-many
    """
    for targets in ([2, 2], [1, 5], [1, 2, 3]):
        given = [torch.arange(6.0).view(2, 3) * n - 6 for n in targets]
        wanted = sum(g * n for g, n in zip(given, targets, strict=True)) / sum(targets)
        found = torch.as_tensor(combine([g.clone() for g in given], targets))
        mean = sum(given) / len(given)
        assert targets == [2, 2] or not torch.allclose(found.to(wanted), mean), (
            "a mean of means: a process with more targets counts for more"
        )
        assert torch.allclose(found.to(wanted), wanted), (
            f"{len(targets)} processes: {found.tolist()}, not {wanted.tolist()}"
        )
    full, empty = torch.arange(6.0), torch.full((6,), math.nan)
    for given, targets in (([full, empty], [4, 0]), ([empty, full], [0, 4])):
        found = torch.as_tensor(combine(given, targets))
        assert torch.allclose(found.to(full), full), (
            f"with {targets} targets, 0 times nan is nan: leave out who has none"
        )
    found = torch.as_tensor(combine([full, empty], [4, 1]))
    assert found.isnan().all(), "nan of a process with targets is a fault: show it"


def check_memory(memory: Callable[[list[tuple[int, int]], int, str], int]) -> None:
    """Bytes of weights, gradients and two moments on the fullest process.

    memory: called as memory(shapes, processes, what is divided).

    Book: 25_many_machines.html#exercise-2-will-it-fit
    """
    cases = [
        (1, "optimizer", 8896, "four numbers of 4 bytes for each parameter"),
        (3, "nothing", 8896, "where nothing is divided each has everything"),
        (2, "optimizer", 7936, "moments of 404 and 32 numbers lie on the fuller one"),
        (3, "optimizer", 7680, "the owner of the largest has moments of 404 numbers"),
        (2, "model", 4480, "51 of 101 rows: the fullest has the larger half"),
        (3, "model", 3328, "34 of 101 rows, 3 of 8, 2 of 4"),
    ]
    for n, divided, wanted, why in cases:
        found = memory([(101, 4), (8, 4), (4, 30)], n, divided)
        assert found == wanted, f"{divided} on {n}: {found}, not {wanted}: {why}"


def check_lost_time(
    lost: Callable[[int, float, float, float], tuple[float, float]],
) -> None:
    """The best time between checkpoints, and the share that is lost with it.

    lost: called as lost(gpus, years, cost, restart).

    Book: 25_many_machines.html#exercise-3-how-much-time-is-lost
    """
    for gpus, years, cost, restart in ((1, 1, 10, 60), (16_384, 5.8, 30, 600)):
        mean = years * 365 * 86_400 / gpus
        best = math.sqrt(2 * cost * mean)
        found, part = lost(gpus, years, cost, restart)
        assert gpus == 1 or not math.isclose(found, best * math.sqrt(gpus)), (
            "more GPUs fail more often: divide the time between failures by the GPUs"
        )
        assert math.isclose(found, best, rel_tol=1e-6), (
            f"{found:.1f} seconds, not {best:.1f} (a year has 365 days here)"
        )
        checkpoints, work, restarts = cost / best, best / (2 * mean), restart / mean
        assert not math.isclose(part, checkpoints + work), "the restart is lost, too"
        share = checkpoints + work + restarts
        assert math.isclose(part, share, rel_tol=1e-6), (
            f"a share of {part:.4g}, not {share:.4g}"
        )
