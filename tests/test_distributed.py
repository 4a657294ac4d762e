"""Many processes: the same weights, runs that go on, and streams."""

import io
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from glassgpt import distributed
from glassgpt.checks import distributed as checks
from glassgpt.checks.distributed import (
    _each_case,
    _small_run,
    check_gradient,
    check_lost_time,
    check_memory,
    check_parallel,
    check_ring,
    check_stream,
    train_in,
    train_ways,
)
from glassgpt.cli import main
from glassgpt.data import TokenData, Tokens
from glassgpt.distributed import (
    StreamedTokens,
    first_process_first,
    make_trainer,
    process_group,
    run_processes,
)
from glassgpt.gpt import GPT, GPTConfig
from glassgpt.modern import MuonConfig
from glassgpt.plan import Machine, Plan
from glassgpt.runs import checkpoints_in, read_checkpoint
from glassgpt.training import TrainConfig, Trainer, count_targets

COPIES = ["ParallelTrainer", "DDPTrainer", "ShardedOptimizerTrainer"]
WAYS = [*COPIES, "FSDPTrainer"]
PASSED = ["ParallelTrainer", "FSDPTrainer"]  # by the check: the simplest and the last


def gap(one, two):
    return max((one[name] - two[name]).abs().max().item() for name in one)


def alone(**how):
    return train_ways(["Trainer"], **how)["Trainer"]


def everything(cases):
    return [train_ways(names, **how) for names, how in cases]


UNEVEN = {"rows": 7, "accumulate": 3, "masked": True}
CASES = {  # on three processes the check runs the simplest and the last
    2: [(WAYS, UNEVEN)],
    3: [(COPIES[1:], UNEVEN), (COPIES, {"rows": 6, "muon": True})],
}


def in_turn(calls):
    """What some functions return, one after another, in the same processes."""
    found = []
    for function, *arguments in calls:
        found.append(function(*arguments))
    return found


def with_dropout():
    torch.manual_seed(0)
    model = GPT(GPTConfig(11, 8, layers=1, heads=1, width=8, dropout=0.5))
    data = TokenData.of([1] * 100, [1] * 100, 11)  # all rows are alike
    trainer = distributed.ParallelTrainer(model, data, TrainConfig(batch_size=6))
    losses = []
    usual = trainer.loss

    def loss(*part):
        losses.append(usual(*part).item())
        return usual(*part)

    trainer.loss = loss
    trainer.take_step()
    return losses


def started_apart():
    torch.manual_seed(dist.get_rank())
    model = GPT(GPTConfig(11, 8, layers=1, heads=1, width=8))
    data = TokenData.of(list(range(11)) * 9, list(range(11)), 11)
    distributed.DDPTrainer(model, data, TrainConfig(batch_size=4))
    return {name: value.detach() for name, value in model.named_parameters()}


def loads_moments():
    """Of which parameters each optimizer loads moments, and of which there are some."""
    trainer, given = _small_run(distributed.ShardedOptimizerTrainer), []
    trainer.take_step()
    states = [trainer.state_dict()]
    dist.broadcast_object_list(states, 0)
    for optimizer in trainer.optimizers:
        optimizer.register_load_state_dict_pre_hook(
            lambda _, state: given.append([*state["state"]])
        )
    trainer.load_state_dict(states[0])
    return given, [sorted(saved["state"]) for saved in states[0]["optimizers"]]


class ReadsItsOwnLosses(distributed.ParallelTrainer):
    read_losses = Trainer.read_losses


class DropsTheSame(distributed.ParallelTrainer):
    def parts(self, batch):
        mine = [rows.tensor_split(self.world)[self.rank] for rows in batch]
        number = min(self.config.accumulate, len(batch[0]) // self.world)
        return zip(*(rows.tensor_split(number) for rows in mine), strict=True)


class DropsTheSameInEachStep(distributed.ParallelTrainer):
    def parts(self, batch):
        found = list(super().parts(batch))
        torch.manual_seed(self.rank)
        return iter(found)


class BeginsApart(distributed.ParallelTrainer):
    def __init__(self, *arguments):
        Trainer.__init__(self, *arguments)
        self.rank, self.world = dist.get_rank(), dist.get_world_size()


class WeighsByRows(distributed.ParallelTrainer):
    def parts(self, batch):
        whole = count_targets(batch[1]) / len(batch[1])
        for part in super().parts(batch):
            self.factor = len(part[1]) * whole / count_targets(part[1])
            yield part

    def backward(self, loss):
        super().backward(loss * self.factor)


class SavesItsOwnMoments(distributed.ShardedOptimizerTrainer):
    state_dict = Trainer.state_dict


class SendsOneOptimizers(distributed.ShardedOptimizerTrainer):
    def update(self):
        norm = Trainer.update(self)
        for group in self.optimizers[0].param_groups:
            for parameter in group["params"]:
                dist.broadcast(parameter.detach(), self.owners[parameter])
        return norm


class ForgetsMoments(distributed.DDPTrainer):
    def load_state_dict(self, state):
        super().load_state_dict(state)
        for optimizer in self.optimizers:
            optimizer.state.clear()


class DividesTheEvaluation(distributed.ParallelTrainer):
    def evaluate(self):
        record = super().evaluate()
        record["validation_loss"] /= self.world
        return record


class CountsAtLeastOne(distributed.ParallelTrainer):
    """Divides by a sum of targets to which each process gives one or more."""

    def parts(self, batch):
        shares = batch[1].tensor_split(self.world)
        total = sum(max(count_targets(rows), 1) for rows in shares)
        self.factor = count_targets(batch[1]) / total
        return super().parts(batch)

    def backward(self, loss):
        super().backward(loss * self.factor)


class KeepsTheTablesWhole(distributed.FSDPTrainer):
    """After the forward pass, as PyTorch does it by default with the last group."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.loss.set_reshard_after_forward(False, recurse=False)


# Each with the number of the check's case that names it, not counting the first.
MISTAKES = [
    (ReadsItsOwnLosses, 1, "rank 0 reads a loss of .*: add up"),
    (DropsTheSame, 1, "processes drop the same numbers"),
    (DropsTheSameInEachStep, 1, "each step drops the same"),
    (BeginsApart, 1, "drifted apart, .*: not all begin with"),
    (WeighsByRows, 3, "is off by .*: with masked targets"),
    (SavesItsOwnMoments, 1, "tensors are missing in rank 0's state"),
    (SendsOneOptimizers, 1, "drifted apart, .*: with 2 rows"),
    (ForgetsMoments, 5, "is off by .*: saved and loaded"),
    (DividesTheEvaluation, 1, "rank 0 evaluates to"),
    (CountsAtLeastOne, 6, "is off by .*: with a process that has no targets"),
    (KeepsTheTablesWhole, 7, "is off by .*: evaluated between two steps"),
]


def two_cases(number):
    cases = list(checks._CASES.items())
    return dict([cases[0], cases[number]])


def each_of_two(name, number):
    with patch.object(checks, "_CASES", two_cases(number)):
        return _each_case(__name__, name)


REFUSED = [
    ("optimizer", 1, False, "float32", "a batch of 1 rows is too small"),
    ("model", 4, True, "float32", "takes the optimizer adamw"),
    ("optimizer", 4, False, "float16", "need the precision bfloat16"),
    ("optimiser", 4, False, "float32", "not 'optimiser'"),
]


def refused():
    found = []
    for shard, rows, muon, precision, _ in REFUSED:
        kind = MuonConfig if muon else TrainConfig
        model = GPTConfig(11, 8, layers=1, heads=1, width=8)
        machine = Machine(precision=precision)
        plan = Plan(model, kind(batch_size=rows, steps=3), machine)
        data = TokenData.of(list(range(11)) * 9, list(range(11)), 11)
        try:
            make_trainer(plan, data, shard=shard)
        except ValueError as error:
            found.append(str(error))
    return found


def test_one_process_is_a_trainer_as_before():
    model = GPTConfig(11, 8, layers=1, heads=1, width=8)
    plan = Plan(model, TrainConfig(batch_size=4), Machine())
    data = TokenData.of(list(range(11)) * 9, list(range(11)), 11)
    with process_group() as rank, first_process_first() as first:
        assert rank == first == 0
        assert type(make_trainer(plan, data, shard="model")) is Trainer
        with pytest.raises(ValueError, match="not 'optimiser'"):
            make_trainer(plan, data, shard="optimiser")


def records(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["validation_loss"] for line in lines]


def commanded(place, words, stopped=False):
    """The exit code of a command that all processes get, and what each says.

    stopped: all get SIGTERM, as from `torchrun`, after the third evaluation.
    """
    os.chdir(place)
    pids = [0] * dist.get_world_size()
    dist.all_gather_object(pids, os.getpid())

    def stop():
        while len(records(Path("run"))) < 3:
            time.sleep(0.02)
        for pid in pids:
            os.kill(pid, signal.SIGTERM)

    if stopped and dist.get_rank() == 0:
        threading.Thread(target=stop, daemon=True).start()
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(out):
        return main(words.split()), out.getvalue()


TEXT = "a miniature Eiffel tower beside a tower of paper, and a tower of sand. " * 60
TRAIN = "train --data text.txt --tokenizer char --context 16 --width 32 --layers 1"
TRAIN += " --batch-size 8 --evaluate-every 5 --precision float32 --compile off"
TRAIN += " --device cpu --checkpoint-every 5 --optimizer adamw"
RESUME = "resume run --shard model"

# What follows runs in few processes, since to start one takes seconds.

SHARDS = ["optimizer", "model"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Runs in which two processes were killed at step 10, for each way to divide."""
    if sys.platform == "win32":
        pytest.skip("needs SIGKILL")
    place = tmp_path_factory.mktemp("runs")
    for shard in SHARDS:
        with pytest.raises((ProcessExitedException, ProcessRaisedException)):
            run_processes(2, train_in, str(place / shard), 30, shard, 10)
        steps = [int(path.name[11:]) for path in checkpoints_in(place / shard)]
        assert steps[-1] in (10, 20)  # the kill may come a moment late
    return place


@pytest.fixture(scope="module")
def of_two(folder):
    (folder / "text.txt").write_text(TEXT)
    calls = [(everything, CASES[2]), (refused,)]
    calls += [(train_in, str(folder / f"two-{shard}"), 10, shard) for shard in SHARDS]
    calls += [(commanded, str(folder), TRAIN + " --out run --steps 10")]
    calls += [(commanded, str(folder), TRAIN + " --out none --width 33")]
    found = run_processes(2, in_turn, calls)
    names = ["ways", "refused", *SHARDS, "trained", "mistaken"]
    return dict(zip(names, zip(*found, strict=True), strict=True))


@pytest.fixture(scope="module")
def of_three(folder, of_two):
    calls = [(everything, CASES[3]), (with_dropout,), (started_apart,)]
    calls += [(loads_moments,)]
    calls += [(each_of_two, kind.__name__, number) for kind, number, _ in MISTAKES]
    calls += [(_each_case, "glassgpt.distributed", name) for name in PASSED]
    calls += [(train_in, str(folder / shard), 30, shard) for shard in SHARDS]
    calls += [(commanded, str(folder), f"{RESUME} --steps 100000", True)]
    found = run_processes(3, in_turn, calls)
    names = ["ways", "dropout", "apart", "loads"]
    names += [*(kind.__name__ for kind, *_ in MISTAKES), *PASSED, *SHARDS, "stopped"]
    return dict(zip(names, zip(*found, strict=True), strict=True))


@pytest.mark.parametrize("processes", [2, 3])
def test_all_ways_end_with_the_same_weights(of_two, of_three, processes):
    found = (of_two if processes == 2 else of_three)["ways"]
    for number, (names, how) in enumerate(CASES[processes]):
        wanted = alone(**how)
        for name in names:
            first = found[0][number][name]
            assert gap(wanted["weights"], first["weights"]) < 1e-12, (name, how)
            assert abs(wanted["loss"] - first["loss"]) < 1e-12
            for other in found[1:] if name != "FSDPTrainer" else []:
                assert gap(first["weights"], other[number][name]["weights"]) == 0
            held = [ranks[number][name]["held"] for ranks in found]
            total = sum(w.numel() for w in wanted["weights"].values())
            divided = {"FSDPTrainer": ["weights", "gradients", "moments"]}
            divided["ShardedOptimizerTrainer"] = ["moments"]
            for part, size in (("weights", 1), ("gradients", 1), ("moments", 2)):
                if part == "moments" and how.get("muon"):
                    continue
                sums = sum(each[part] for each in held)
                copies = 1 if part in divided.get(name, []) else processes
                assert sums == copies * size * total, (name, part)


def test_processes_drop_different_numbers(of_three):
    losses = [tuple(each) for each in of_three["dropout"]]
    assert len(set(losses)) == 3


def test_all_begin_with_the_weights_of_rank_0(of_three):
    first, *others = of_three["apart"]
    assert all(gap(first, other) == 0 for other in others)


def test_a_process_loads_no_moments_of_others(of_three):
    _, wanted = of_three["loads"][0]
    for number, places in enumerate(wanted):
        given = (place for mine, _ in of_three["loads"] for place in mine[number])
        assert sorted(given) == places


@pytest.mark.parametrize(("kind", "number", "why"), MISTAKES)
def test_the_check_names_the_mistake(of_three, monkeypatch, kind, number, why):
    monkeypatch.setattr(
        distributed, "run_processes", lambda *_: of_three[kind.__name__]
    )
    monkeypatch.setattr(checks, "_CASES", two_cases(number))
    with pytest.raises(AssertionError, match=why):
        check_parallel(kind)


@pytest.mark.parametrize("name", PASSED)
def test_the_check_passes_the_trainers(of_three, monkeypatch, name):
    monkeypatch.setattr(distributed, "run_processes", lambda *_: of_three[name])
    check_parallel(getattr(distributed, name))


def test_the_check_says_that_a_process_was_missing(monkeypatch):
    def aborts(*_):
        raise ProcessExitedException("SIGABRT", 0, 0, -6)

    monkeypatch.setattr(distributed, "run_processes", aborts)
    with pytest.raises(AssertionError, match="missing from a collective call"):
        check_parallel(Trainer)


def test_the_check_refuses_a_class_of_the_notebook():
    mine = type("Mine", (Trainer,), {"__module__": "__main__"})
    with pytest.raises(AssertionError, match="write it to a file"):
        check_parallel(mine)


@pytest.mark.parametrize("shard", SHARDS)
def test_a_killed_run_goes_on_with_another_number(of_three, tmp_path, shard):
    never = train_in(str(tmp_path), 30, shard)
    for losses in of_three[shard]:
        assert np.allclose(losses, never, atol=1e-4)


@pytest.mark.parametrize("shard", SHARDS)
def test_a_checkpoint_is_that_of_one_process(of_two, folder, tmp_path, shard):
    train_in(str(tmp_path), 10, shard)
    states = []
    for place in (tmp_path, folder / f"two-{shard}"):
        model, _, state = read_checkpoint(checkpoints_in(place)[-1])
        assert model.head.weight is model.tokens.weight
        states.append((dict(model.named_parameters()), state["optimizers"]))
    (weights, optimizers), (other, others) = states
    assert gap(weights, other) < 1e-5
    for one, two in zip(optimizers, others, strict=True):
        assert sorted(one["state"]) == sorted(two["state"])
        for number, moments in one["state"].items():
            for name, value in moments.items():
                assert torch.allclose(value, two["state"][number][name], atol=1e-5)


def test_what_cannot_work_is_refused_before_it_begins(of_two):
    for found in of_two["refused"]:
        for said, (*_, why) in zip(found, REFUSED, strict=True):
            assert why in said


def test_a_mistake_ends_all(of_two, folder):
    for code, said in of_two["mistaken"]:
        assert code == 2
        assert "width 33 is no multiple of" in said
    assert not (folder / "none").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals")
def test_a_command_trains_goes_on_and_stops_politely(of_two, of_three, folder):
    (code, said), *others = of_two["trained"]
    assert (code, said.count("write with it"), *others) == (0, 1, (0, ""))
    (code, said), *others = of_three["stopped"]
    stopped = 128 + signal.SIGTERM
    assert (code, *others) == (stopped, (stopped, ""), (stopped, ""))
    assert "going on from checkpoint-00000010; steps 100000 (was 10)" in said
    losses = records(folder / "run")[:3]
    assert losses == sorted(losses, reverse=True)
    step = int(said.split("stopped after step ")[1].split(":")[0])
    assert checkpoints_in(folder / "run")[-1].name == f"checkpoint-{step:08d}"


def torchrun(place, words):
    """A command of two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "-m", "glassgpt", *words.split()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command,
        cwd=place,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def saved(folder):
    """The bytes of all weights and moments of the last checkpoint."""
    last = checkpoints_in(folder)[-1]
    return last.name, {p.name: p.read_bytes() for p in last.glob("*.safetensors")}


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals")
@pytest.mark.parametrize("shard", ["nothing", "optimizer", "model"])
def test_torchrun_stopped_and_resumed_ends_with_the_same_bits(tmp_path, shard):
    (tmp_path / "text.txt").write_text(TEXT)
    train = f"{TRAIN} --shard {shard} --steps 60 --out"
    whole = torchrun(tmp_path, f"{train} whole")
    said = whole.communicate()[0]
    assert whole.returncode == 0, said
    assert said.count("step 60:") == 1, "rank 0 alone prints"
    stopped = torchrun(tmp_path, f"{train} run")
    while not (tmp_path / "run/metrics.jsonl").exists():
        assert stopped.poll() is None
        time.sleep(0.01)
    stopped.send_signal(signal.SIGTERM)
    said = stopped.communicate()[0]
    name, _ = saved(tmp_path / "run")
    assert f"stopped after step {int(name[-8:])}:" in said
    assert name < "checkpoint-00000060"
    resumed = torchrun(tmp_path, f"resume run --shard {shard}")
    said = resumed.communicate()[0]
    assert resumed.returncode == 0, said
    assert saved(tmp_path / "run") == saved(tmp_path / "whole")


# Streams and rings.


def test_a_run_over_a_stream_goes_on_exactly():
    def fetch(shard):
        return np.random.default_rng(shard).integers(11, size=200).astype(np.uint16)

    def begin():
        torch.manual_seed(0)
        model = GPT(GPTConfig(11, 8, layers=1, heads=1, width=8))
        stream = StreamedTokens(range(4), fetch, steps_each=2)
        held_out = TokenData.of([1] * 20, fetch(9), 11).validation
        data = TokenData(stream, held_out, 11, "a name of the stream")
        config = TrainConfig(steps=20, batch_size=2, warmup=2)
        return Trainer(model, data, config)

    whole, first, second = begin(), begin(), begin()
    for _ in range(12):
        whole.take_step()
    for _ in range(7):
        first.take_step()
    second.load_state_dict(first.state_dict())
    for _ in range(5):
        second.take_step()
    for one, two in zip(
        whole.model.parameters(), second.model.parameters(), strict=True
    ):
        assert torch.equal(one, two)


def test_a_shard_that_is_too_short_is_refused():
    stream = StreamedTokens([0], lambda _: np.arange(5), steps_each=1)
    with pytest.raises(ValueError, match="allow no crops"):
        stream.random_batch(1, 8, (0, 0))


def test_the_checks_pass_what_is_right():
    check_stream(StreamedTokens)

    def ring(vectors):  # the other way round
        n, held = len(vectors), [list(v) for v in vectors]
        yield held
        for step in range(2 * n - 2):
            after = [list(v) for v in held]
            for rank in range(n):
                chunk, left = (rank + step) % n, (rank - 1) % n
                adds = held[left][chunk] if step < n - 1 else 0
                after[left][chunk] = held[rank][chunk] + adds
            held = after
            yield held

    check_ring(ring)

    def in_64_bits(gradients, targets):
        pairs = [(g, n) for g, n in zip(gradients, targets, strict=True) if n]
        return np.average([g.numpy() for g, _ in pairs], 0, [n for _, n in pairs])

    check_gradient(lambda *given: torch.from_numpy(in_64_bits(*given)))
    check_gradient(in_64_bits)


def from_nowhere(vectors):
    n, held = len(vectors), [list(v) for v in vectors]
    whole = [sum(column) for column in zip(*vectors, strict=True)]
    yield held
    for step in range(2 * n - 2):
        held = [[*whole[: step + 1], *v[step + 1 :]] for v in held]
        yield held


class CountsForItself(StreamedTokens):
    calls = 0

    def random_batch(self, batch_size, context, seed):
        self.calls += 1
        super().random_batch(batch_size, context, seed)
        return Tokens(self.ids).random_batch(batch_size, context, self.calls)


def rounded_down(matrices, n, divided):
    sizes = sorted((rows * columns for rows, columns in matrices), reverse=True)
    if divided == "model":
        return 16 * sum(rows // n * columns for rows, columns in matrices)
    moments = sum(sizes[::n]) if divided == "optimizer" else sum(sizes)
    return 8 * sum(sizes) + 8 * moments


def one_card(cards, years, cost, restart):
    mean = years * 365 * 86_400
    best = math.sqrt(2 * cost * mean)
    return best, cost / best + best / (2 * mean) + restart / mean


class NextIsTheSame(StreamedTokens):
    def random_batch(self, batch_size, context, seed):
        inputs, _ = super().random_batch(batch_size, context, seed)
        return inputs, inputs


class SameCrops(StreamedTokens):
    def random_batch(self, batch_size, context, seed):
        super().random_batch(batch_size, context, seed)
        return Tokens(self.ids).random_batch(batch_size, context, 0)


class OnlyTheBeginning(StreamedTokens):
    def random_batch(self, batch_size, context, seed):
        super().random_batch(batch_size, context, seed)
        return Tokens(self.ids[:30]).random_batch(batch_size, context, seed)


class FetchesThenDrops(StreamedTokens):
    def random_batch(self, batch_size, context, seed):
        if (number := self.shard_at(*seed)) != self.number:
            self.number, self.ids = number, self.fetch(self.shards[number])
        return super().random_batch(batch_size, context, seed)


class FetchesByNumber(StreamedTokens):
    def random_batch(self, batch_size, context, seed):
        self.shards = range(len(self.shards))
        return super().random_batch(batch_size, context, seed)


class In16Bits(StreamedTokens):
    def __init__(self, shards, fetch, steps_each):
        super().__init__(shards, lambda name: fetch(name).astype(np.int16), steps_each)


class AsLongAsTheFirst(StreamedTokens):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.first = len(self.ids)

    def starts(self, context):
        return self.first - context


def keeps_the_larger(vectors):
    n, held = len(vectors), [list(v) for v in vectors]
    yield held
    for step in range(2 * n - 2):
        after = [list(v) for v in held]
        for rank in range(n):
            chunk, right = (rank - step) % n, (rank + 1) % n
            mine, came = held[right][chunk], held[rank][chunk]
            after[right][chunk] = mine + came if step < n - 1 else max(mine, came)
        held = after
        yield held


def of_vectors(gradients, targets):
    pairs = [(g, n) for g, n in zip(gradients, targets, strict=True) if n]
    weights = torch.tensor([float(n) for _, n in pairs])
    return (weights[:, None] * torch.stack([g for g, _ in pairs])).sum(0) / sum(targets)


def hides_nan(gradients, targets):
    pairs = zip(gradients, targets, strict=True)
    return sum(g.nan_to_num() * n for g, n in pairs) / sum(targets)


def first_two(gradients, targets):
    pairs = list(zip(gradients, targets, strict=True))[:2]
    return sum(g * n for g, n in pairs if n) / sum(n for _, n in pairs)


def starts_with_the_first(gradients, targets):
    total = gradients[0] * targets[0]
    for gradient, number in zip(gradients[1:], targets[1:], strict=True):
        total = total + gradient * number if number else total
    return total / sum(targets)


def long_years(cards, years, cost, restart):
    mean = years * 365.25 * 86_400 / cards
    best = math.sqrt(2 * cost * mean)
    return best, cost / best + best / (2 * mean) + restart / mean


def in_seconds(cards, years, cost, restart):
    mean = years * 365 * 86_400 / cards
    best = math.sqrt(2 * cost * mean)
    return best, cost * mean / best + best / 2 + restart


class AlwaysTwoSteps(StreamedTokens):
    def __init__(self, shards, fetch, steps_each):
        super().__init__(shards, fetch, 2)


class OneCrop(StreamedTokens):
    def random_batch(self, batch_size, context, seed):
        crops = super().random_batch(batch_size, context, seed)
        return tuple(rows[:1].expand(batch_size, -1) for rows in crops)


class IgnoresTheSeed(StreamedTokens):
    def random_batch(self, batch_size, context, seed):
        super().random_batch(batch_size, context, seed)  # the shard
        return Tokens.random_batch(self, batch_size, context, (0, seed[1]))


WRONG = [
    (check_stream, AlwaysTwoSteps, "steps_each=3"),
    (check_stream, OneCrop, "all rows of a batch"),
    (check_stream, IgnoresTheSeed, "another seed gives the same crops"),
    (check_ring, from_nowhere, "came from nowhere"),
    (check_ring, keeps_the_larger, "does not hold the sum"),
    (check_stream, FetchesByNumber, r"fetch\(\d\): give it an address"),
    (check_stream, In16Bits, "each has to come once"),
    (check_stream, AsLongAsTheFirst, "some of each shard is never seen"),
    (check_gradient, of_vectors, "2 processes"),
    (check_stream, CountsForItself, "begun at step 17"),
    (check_stream, NextIsTheSame, "targets are the next tokens"),
    (check_stream, SameCrops, "two steps got the same crops"),
    (check_stream, OnlyTheBeginning, "some of each shard is never seen"),
    (check_stream, FetchesThenDrops, "held while the next is fetched"),
    (check_gradient, hides_nan, "nan of a process with targets"),
    (check_gradient, first_two, "3 processes"),
    (check_gradient, starts_with_the_first, r"with \[0, 4\] targets, 0 times nan"),
    (check_lost_time, long_years, "a year has 365 days"),
    (check_lost_time, in_seconds, "those are seconds"),
    (check_gradient, lambda gradients, targets: sum(gradients) / 2, "a mean of means"),
    (check_memory, rounded_down, "model on 2: 4416, not 4480"),
    (check_lost_time, one_card, "more cards fail more often"),
]


@pytest.mark.parametrize(("check", "wrong", "why"), WRONG)
def test_wrong_answers_are_named(check, wrong, why):
    with pytest.raises(AssertionError, match=why):
        check(wrong)


def test_a_small_run_has_a_table_that_processes_cannot_divide():
    model = _small_run(Trainer).model
    assert model.head.weight is model.tokens.weight
    assert all(len(model.tokens.weight) % n for n in (2, 3))
