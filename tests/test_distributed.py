"""Many processes: the same weights, runs that go on, and streams."""

import io
import os
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from glassgpt import distributed
from glassgpt.checks.distributed import (
    _each_case,
    _small_run,
    check_parallel,
    train_in,
    train_ways,
)
from glassgpt.cli import main
from glassgpt.data import TokenData
from glassgpt.distributed import (
    ParallelTrainer,
    StreamedTokens,
    first_process_first,
    make_trainer,
    process_group,
    run_processes,
)
from glassgpt.gpt import GPT, GPTConfig
from glassgpt.modern import MuonConfig
from glassgpt.plan import Machine, Plan
from glassgpt.runs import checkpoints_in
from glassgpt.training import TrainConfig, Trainer

COPIES = ["ParallelTrainer", "DDPTrainer", "ShardedOptimizerTrainer"]
WAYS = [*COPIES, "FSDPTrainer"]
SHARDS = ["optimizer", "model"]
UNEVEN = {"rows": 7, "accumulate": 3, "masked": True}
WITH_MUON = {"rows": 6, "muon": True}
SMALL = GPTConfig(11, 8, layers=1, heads=1, width=8)
DATA = TokenData.of(list(range(11)) * 9, list(range(11)), 11)
PLAN = Plan(SMALL, TrainConfig(batch_size=4, steps=3), Machine())
TEXT = "a miniature Eiffel tower beside a tower of paper, and a tower of sand. " * 60
TRAIN = "train --data text.txt --tokenizer char --context 16 --width 32 --layers 1"
TRAIN += " --batch-size 8 --evaluate-every 5 --precision float32 --compile off"
TRAIN += " --device cpu --checkpoint-every 5 --optimizer adamw --steps 60"


# What several processes do. To start them takes seconds, so each does all in turn.


def losses_with_dropout():
    """The losses of a step in which all rows are alike."""
    data = TokenData.of([1] * 100, [1] * 100, 11)
    model = GPT(replace(SMALL, dropout=0.5))
    trainer = ParallelTrainer(model, data, TrainConfig(batch_size=6))
    losses, usual = [], trainer.loss

    def noted(*part):
        losses.append(usual(*part))
        return losses[-1]

    trainer.loss = noted
    trainer.take_step()
    return [loss.item() for loss in losses]


def moments_after_loading():
    """How many numbers of moments a process has, which owns a part of them."""
    trainer = _small_run(distributed.ShardedOptimizerTrainer)
    trainer.take_step()
    states = [trainer.state_dict()]
    dist.broadcast_object_list(states, 0)
    trainer.load_state_dict(states[0])
    found = [moments for o in trainer.optimizers for moments in o.state.values()]
    return sum(each["exp_avg"].numel() for each in found)


REFUSED = [
    ("optimizer", replace(PLAN.training, batch_size=1), {}, "a batch of 1 rows is too"),
    (
        "model",
        MuonConfig(batch_size=4, steps=3),
        {},
        "takes a run with --optimizer adamw",
    ),
    ("optimizer", PLAN.training, {"precision": "float16"}, "the precision bfloat16"),
    ("optimizer", PLAN.training, {"device": "mps"}, "the device cpu or cuda, not mps"),
]


def refusals():
    found = []
    for shard, training, machine, _ in REFUSED:
        with pytest.raises(ValueError, match=" ") as refused:
            make_trainer(Plan(SMALL, training, Machine(**machine)), DATA, shard=shard)
        found.append(str(refused.value))
    return found


def command(place, words):
    """The exit code of a command that all processes get, and what each says."""
    os.chdir(place)
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(out):
        return main(words.split()), out.getvalue()


def first_lines(place):
    """Which rank wrote a file, and what each reads of it."""
    with first_process_first() as rank:
        if not os.path.exists(f"{place}/once"):
            with open(f"{place}/once", "w") as file:
                file.write(str(rank))
        with open(f"{place}/once") as file:
            return file.read()


def each_of(*calls):
    return [function(*arguments) for function, *arguments in calls]


def ways_of(names, how):
    return train_ways(names, **how)


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
    whole = command, str(folder), f"{TRAIN} --shard model --out whole"
    mistaken = command, str(folder), f"{TRAIN} --out none --width 33"
    ways = ways_of, WAYS, UNEVEN
    calls = [ways, (refusals,), (first_lines, str(folder)), mistaken, whole]
    found = zip(*run_processes(2, each_of, *calls), strict=True)
    return dict(zip(["ways", "refused", "once", "mistaken"], found, strict=False))


@pytest.fixture(scope="module")
def of_three(folder):
    calls = [(ways_of, COPIES, WITH_MUON)]
    calls += [(losses_with_dropout,), (moments_after_loading,)]
    calls += [(_each_case, getattr(distributed, name)) for name in WAYS]
    calls += [(train_in, str(folder / shard), 30, shard) for shard in SHARDS]
    found = zip(*run_processes(3, each_of, *calls), strict=True)
    names = ["ways", "dropout", "moments", *WAYS, *SHARDS]
    return dict(zip(names, found, strict=True))


# The same weights.


def test_one_process_is_a_trainer_as_before():
    with process_group() as rank, first_process_first() as first:
        assert rank == first == 0
        assert type(make_trainer(PLAN, DATA, shard="model")) is Trainer
        with pytest.raises(ValueError, match="not 'optimiser'"):
            make_trainer(PLAN, DATA, shard="optimiser")


@pytest.mark.parametrize("name", WAYS)
def test_three_processes_pass_the_check(of_three, monkeypatch, name):
    monkeypatch.setattr(distributed, "run_processes", lambda *_: of_three[name])
    check_parallel(getattr(distributed, name))


@pytest.mark.parametrize(("number", "how"), [(2, UNEVEN), (3, WITH_MUON)])
def test_all_ways_end_with_the_same_weights(of_two, of_three, number, how):
    wanted = train_ways(["Trainer"], **how)["Trainer"]
    ranks = (of_two if number == 2 else of_three)["ways"]
    for name, first in ranks[0].items():
        torch.testing.assert_close(
            first["weights"], wanted["weights"], atol=1e-12, rtol=0
        )
        assert abs(wanted["loss"] - first["loss"]) < 1e-12
        for other in ranks[1:] if name != "FSDPTrainer" else []:
            torch.testing.assert_close(
                other[name]["weights"], first["weights"], atol=0, rtol=0
            )


def test_a_process_holds_what_it_has_to(of_two):
    """Copies of everything, or one copy for all processes together."""
    ranks = of_two["ways"]
    total = sum(weight.numel() for weight in ranks[0]["DDPTrainer"]["weights"].values())
    for name in WAYS:
        one_copy = {
            "weights": name == "FSDPTrainer",
            "gradients": name == "FSDPTrainer",
            "moments": name in ("FSDPTrainer", "ShardedOptimizerTrainer"),
        }
        for part, size in {"weights": 1, "gradients": 1, "moments": 2}.items():
            held = sum(rank[name]["held"][part] for rank in ranks)
            assert held == size * total * (1 if one_copy[part] else 2), (name, part)


def test_a_process_loads_no_moments_of_others(of_three):
    weights = _small_run(Trainer).model.parameters()
    assert sum(of_three["moments"]) == sum(weight.numel() for weight in weights)


def test_processes_drop_different_numbers(of_three):
    assert len({loss for losses in of_three["dropout"] for loss in losses}) == 3


def test_what_cannot_work_is_refused_before_it_begins(of_two):
    for found in of_two["refused"]:
        for said, (*_, why) in zip(found, REFUSED, strict=True):
            assert why in said


def test_what_one_process_writes_the_others_find(of_two):
    assert of_two["once"] == ("0", "0")


# Runs.


@pytest.mark.parametrize("shard", SHARDS)
def test_a_killed_run_goes_on_with_another_number(of_three, tmp_path, shard):
    never = train_in(str(tmp_path), 30, shard)
    for losses in of_three[shard]:
        assert np.allclose(losses, never, atol=1e-4)


def test_a_mistake_ends_all(of_two, folder):
    for code, said in of_two["mistaken"]:
        assert code == 2
        assert "width 33 is no multiple of" in said
    assert not (folder / "none").exists()


def torchrun(place, words):
    """A command of two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "-m", "glassgpt", *words.split()]
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=place, env=environment, **how)


def saved(folder):
    """The bytes of all weights and moments of the last checkpoint."""
    last = checkpoints_in(folder)[-1]
    return last.name, {p.name: p.read_bytes() for p in last.glob("*.safetensors")}


def test_torchrun_stopped_and_resumed_ends_with_the_same_bits(of_two, folder):
    stopped = torchrun(folder, f"{TRAIN} --shard model --out run")
    while not (folder / "run" / "metrics.jsonl").exists():
        assert stopped.poll() is None
        time.sleep(0.01)
    stopped.send_signal(signal.SIGTERM)
    said = stopped.communicate()[0]
    name, _ = saved(folder / "run")
    assert f"stopped after step {int(name[-8:])}:" in said
    assert name < "checkpoint-00000060"
    resumed = torchrun(folder, "resume run --shard model")
    said = resumed.communicate()[0]
    assert resumed.returncode == 0, said
    assert said.count("step 60:") == 1, "rank 0 alone prints"
    assert saved(folder / "run") == saved(folder / "whole")


# Streams.


def test_a_run_over_a_stream_goes_on_exactly():
    def fetch(shard):
        return np.random.default_rng(shard).integers(11, size=200).astype(np.uint16)

    def begin():
        torch.manual_seed(0)
        stream = StreamedTokens(range(4), fetch, steps_each=2)
        data = TokenData(stream, DATA.validation, 11, "a name of the stream")
        config = TrainConfig(steps=20, batch_size=2, warmup=2)
        return Trainer(GPT(SMALL), data, config)

    whole, first, second = begin(), begin(), begin()
    for _ in range(12):
        whole.take_step()
    for _ in range(7):
        first.take_step()
    second.load_state_dict(first.state_dict())
    for _ in range(5):
        second.take_step()
    assert all(map(torch.equal, whole.model.parameters(), second.model.parameters()))


def test_a_shard_that_is_too_short_is_refused():
    stream = StreamedTokens([0], lambda _: np.arange(5), steps_each=1)
    with pytest.raises(ValueError, match="allow no crops"):
        stream.random_batch(1, 8, (0, 0))
