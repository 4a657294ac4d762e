"""Runs: what survives a kill, a full disk, a forged file, and a change of machine."""

import errno
import json
import math
import os
import pickle
import shutil
import signal
import struct
import subprocess
import sys
import textwrap
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock, patch

import numpy as np
import pytest
import safetensors.torch
import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file

from glassgpt import checkpoints, runs
from glassgpt.checkpoints import load, save
from glassgpt.data import TokenData, write_tokens
from glassgpt.distributed import StreamedTokens
from glassgpt.gpt import GPT, GPTConfig
from glassgpt.modern import ModernConfig, MuonConfig
from glassgpt.plan import Machine, Plan
from glassgpt.runs import (
    checkpoints_in,
    locked,
    read_checkpoint,
    refuse_occupied,
    resume_run,
    start_run,
)
from glassgpt.tokens import CharTokenizer
from glassgpt.training import TrainConfig

ROOT = Path(__file__).parent.parent
MODEL = GPTConfig(11, context=8, layers=1, heads=2, width=16, dropout=0.1)
TRAINING = TrainConfig(
    steps=12, batch_size=4, warmup=3, evaluate_every=4, evaluation_crops=8
)
PLAN = Plan(MODEL, TRAINING, Machine())
IDS = [n * n % 11 for n in range(400)]
DATA = TokenData.of(IDS[:300], IDS[300:], 11)
TOKENIZER = CharTokenizer("abcdefghijk")


def plan(model=MODEL, machine=None, **values):
    return Plan(model, replace(TRAINING, **values), machine or Machine())


def start(directory, plan=PLAN, data=DATA, **options):
    options = {"checkpoint_every": 5, "progress": False} | options
    return start_run(directory, plan, data, TOKENIZER, **options)


def resume(directory, **options):
    return resume_run(directory, progress=False, **{"say": lambda line: None} | options)


def weights(run):
    parameters = run.trainer.model.parameters()
    return torch.nn.utils.parameters_to_vector(parameters).detach()


def untimed(run):
    timed = {"seconds", "tokens_per_second"}
    return [{k: r[k] for k in r.keys() - timed} for r in run.trainer.records]


class PowerCut(Exception):
    pass


def cut_at(step):
    def on_record(record):
        if record["step"] == step:
            raise PowerCut

    return on_record


def cut(directory, step, plan=PLAN, **options):
    with pytest.raises(PowerCut):
        start(directory, plan, on_record=cut_at(step), **options)


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch):
    """Nobody pulls the plug here: the flush itself need not be waited for."""
    monkeypatch.setattr(os, "fsync", lambda number: None)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that was never stopped."""
    return start(tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture
def run(tmp_path, whole):
    """The folder of a copy of it."""
    return Path(shutil.copytree(whole.directory, tmp_path / "run"))


# The same bits.


MUON = MuonConfig(**vars(TRAINING) | {"matrix_learning_rate": 0.02})


MODERN = ModernConfig(11, 8, 1, 2, 16, dropout=0.1)


@pytest.mark.parametrize(
    ("model", "training", "precision"),
    [
        (MODEL, TRAINING, "float32"),
        (MODEL, MUON, "float16"),
        (MODERN, MUON, "bfloat16"),
        (MODERN, TRAINING, "float16"),
    ],
)
def test_resuming_is_exact(tmp_path, model, training, precision):
    training = replace(training, accumulate=2)
    one = Plan(model, training, Machine(precision=precision))
    whole = start(tmp_path / "whole", one)
    cut(tmp_path / "cut", 8, one)
    resumed = resume(tmp_path / "cut")
    assert torch.equal(weights(whole), weights(resumed))
    assert untimed(whole) == untimed(resumed)
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        files = [tmp_path / run / name for run in ("whole", "cut")]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_a_finished_run_resumes_to_itself(run):
    first = load(checkpoints_in(run)[-1])[0]
    again = resume(run)
    assert all(map(torch.equal, first.parameters(), again.trainer.model.parameters()))
    assert (again.directory, again.trainer.step, again.stopped_by) == (run, 12, 0)


def test_a_checkpoint_is_a_model_and_metrics_are_written(run):
    model, tokenizer = load(checkpoints_in(run)[-1])
    assert tokenizer.vocab_size == 11
    assert not model.training
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [4, 8, 12]


def test_the_folder_holds_the_best_model(tmp_path):
    evaluate = runs.Trainer.evaluate

    def best_at_8(trainer):
        record = evaluate(trainer)
        record["validation_loss"] = abs(trainer.step - 8)
        return record

    with patch.object(runs.Trainer, "evaluate", best_at_8):
        start(tmp_path, checkpoint_every=4, keep=4)
    at_8, best = tmp_path / "checkpoint-00000008", tmp_path / "model.safetensors"
    assert best.read_bytes() == (at_8 / best.name).read_bytes()


def test_a_start_writes_a_checkpoint_before_the_first_step(tmp_path):
    def stop(trainer):
        raise PowerCut

    with patch.object(runs.Trainer, "take_step", stop), pytest.raises(PowerCut):
        start(tmp_path)
    assert [path.name for path in checkpoints_in(tmp_path)] == ["checkpoint-00000000"]
    resumed = resume(tmp_path)
    shutil.rmtree(tmp_path)
    assert torch.equal(weights(resumed), weights(start(tmp_path)))


def test_a_given_model_is_trained_on(tmp_path):
    torch.manual_seed(5)
    model = GPT(MODEL)
    before = model.tokens.weight.detach().clone()
    cut(tmp_path / "cut", 4, model=model, checkpoint_every=100)
    (first,) = checkpoints_in(tmp_path / "cut")
    assert torch.equal(load(first)[0].tokens.weight, before)
    resumed = resume(tmp_path / "cut")
    torch.manual_seed(5)
    whole = start(tmp_path / "whole", model=GPT(MODEL))
    assert torch.equal(weights(whole), weights(resumed))
    with pytest.raises(ValueError, match=r"the model has .*width=32"):
        start(tmp_path / "other", model=GPT(replace(MODEL, width=32)))


# Kills.


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork and SIGKILL")
def test_kills_at_random_moments_lose_nothing():
    """Three of each kind; the script's own thirty stand in benchmarks/README.md."""
    command = [sys.executable, ROOT / "benchmarks/kills.py", "3"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.endswith("all ended with the same bits\n"), done.stderr


SIGNALED = textwrap.dedent(
    """
    from test_runs import *

    torch.set_num_threads(1)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "ignored"):
        usual = signal.SIG_IGN if name == "ignored" else signal.default_int_handler
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, usual)
        steps = 200 if name == "ignored" else 10**9
        run = start(
            Path(sys.argv[1], name),
            plan(steps=steps, evaluate_every=50),
            checkpoint_every=10**9,
            on_record=lambda record: print(record["step"], flush=True),
        )
        print("end", run.trainer.step, int(run.stopped_by), flush=True)
    """
)


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals")
def test_a_signal_saves_and_leaves_cleanly(tmp_path):
    """And one that is ignored stays ignored, as SIGHUP is under nohup."""
    command = [sys.executable, "-c", SIGNALED, str(tmp_path)]
    how = {"stdout": subprocess.PIPE, "text": True, "cwd": Path(__file__).parent}
    with subprocess.Popen(command, **how) as process:
        for name in ("SIGINT", "SIGTERM", "SIGHUP", "ignored"):
            number = getattr(signal, name, signal.SIGHUP)
            assert process.stdout.readline() == "50\n"
            process.send_signal(number)
            while not (line := process.stdout.readline()).startswith("end"):
                assert line
            step, stopped_by = map(int, line.split()[1:])
            wanted = (200, 0) if name == "ignored" else (step, number)
            assert (step, stopped_by) == wanted
            last = checkpoints_in(tmp_path / name)[-1]
            assert last.name == f"checkpoint-{step:08d}"
    assert process.returncode == 0


@pytest.fixture
def handler():
    """Where tests run in the background, the shell may have them ignore Ctrl-C."""
    outside = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield signal.default_int_handler
    signal.signal(signal.SIGINT, outside)


def test_a_second_ctrl_c_interrupts_and_the_handler_comes_back(tmp_path, handler):
    def twice(record):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        start(tmp_path, on_record=twice)
    assert signal.getsignal(signal.SIGINT) is handler


def test_ctrl_c_in_an_evaluation_saves_that_step(tmp_path, handler, whole):
    def once(record):
        if record["step"] == 4:
            signal.raise_signal(signal.SIGINT)

    half = start(tmp_path / "half", checkpoint_every=1000, on_record=once)
    assert (half.trainer.step, half.stopped_by) == (4, signal.SIGINT)
    assert torch.equal(weights(whole), weights(resume(tmp_path / "half")))


def test_a_signal_in_the_last_step_stops_nothing(tmp_path, handler):
    def at_the_end(record):
        if record["step"] == 12:
            signal.raise_signal(signal.SIGINT)

    assert start(tmp_path, on_record=at_the_end).stopped_by == 0


def test_a_thread_can_train(tmp_path):
    from threading import Thread

    thread = Thread(target=start, args=(tmp_path,))
    thread.start()
    thread.join()
    assert checkpoints_in(tmp_path)[-1].name == "checkpoint-00000012"


# One run in a folder.


def test_a_run_is_not_overwritten(run):
    with pytest.raises(FileExistsError, match="holds a run: resume it"):
        start(run)


@pytest.mark.parametrize("name", ["notes", "checkpoint-00000005"])
def test_other_things_are_not_overwritten(tmp_path, name):
    (tmp_path / name).write_bytes(b"precious")
    with pytest.raises(FileExistsError, match=f"not empty, {name} is in it"):
        start(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]  # not even a lock
    assert (tmp_path / name).read_bytes() == b"precious"


def test_what_is_no_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileExistsError, match="File exists"):
        start(tmp_path / "file")
    with pytest.raises(FileNotFoundError, match="run.json is missing"):
        resume(tmp_path / "file")


def test_where_no_run_is_nothing_is_made(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no run"):
        resume(tmp_path / "nowhere")
    assert os.listdir(tmp_path) == []


def test_two_runs_in_one_directory(tmp_path):
    def second(record):
        with pytest.raises(FileExistsError, match="another process is training in"):
            resume(tmp_path)
        with pytest.raises(FileExistsError, match="training in"), locked(tmp_path):
            pass
        refused.append(record["step"])

    refused = []
    start(tmp_path, on_record=second)
    assert refused == [4, 8, 12]
    with FileLock(tmp_path / ".lock", timeout=0):
        pass  # free again


def test_a_read_only_folder(tmp_path):
    if os.name == "nt" or os.geteuid() == 0:
        pytest.skip("everything can be written here")
    tmp_path.chmod(0o500)
    with pytest.raises(OSError, match="Permission denied"):
        start(tmp_path / "run")
    tmp_path.chmod(0o700)


@pytest.mark.parametrize("call", ["mkdir", "open"])
def test_a_place_that_cannot_be_written(tmp_path, call):
    """What a read-only folder does, for those who may write everywhere."""
    denied = PermissionError(errno.EACCES, "Permission denied", str(tmp_path))
    with patch.object(os, call, side_effect=denied), pytest.raises(PermissionError):
        start(tmp_path / "run")


# Tokens.


def write_tokens_of(folder, data=DATA):
    parts = {"train": data.train, "validation": data.validation}
    splits = {name: [(part.ids, part.characters)] for name, part in parts.items()}
    return write_tokens(folder, splits, TOKENIZER)


def test_data_in_memory_is_written_into_the_run(run):
    content = json.loads((run / "run.json").read_text())
    assert content["data"] == "data"
    found = TokenData.open(run / "data")
    assert found.train.ids.tolist() == IDS[:300]
    assert found.fingerprint == content["fingerprint"]


def test_a_run_moves_with_its_data(tmp_path, whole):
    cut(tmp_path / "cut", 8)
    (tmp_path / "cut").rename(tmp_path / "moved")
    assert torch.equal(weights(whole), weights(resume(tmp_path / "moved")))


def test_a_run_that_names_no_betas_resumes_with_those_that_it_had(tmp_path, whole):
    cut(tmp_path / "cut", 8)
    file = tmp_path / "cut" / "run.json"
    content = json.loads(file.read_text())
    del content["training"]["beta1"], content["training"]["beta2"]
    file.write_text(json.dumps(content))
    assert torch.equal(weights(whole), weights(resume(tmp_path / "cut")))


@pytest.mark.parametrize("own", [True, False])
def test_tokens_that_moved_are_found_where_they_are(tmp_path, own, whole):
    place = tmp_path / "cut" / "data" if own else tmp_path / "tokens"
    cut(tmp_path / "cut", 8, data=write_tokens_of(place))
    place.rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match="say where it is now as data"):
        resume(tmp_path / "cut")
    resumed = resume(tmp_path / "cut", data=tmp_path / "moved")
    assert torch.equal(weights(whole), weights(resumed))
    resume(tmp_path / "cut")  # it has learned where they are


def test_other_tokens_are_refused(tmp_path, run):
    other = TokenData.of([*IDS[:299], 3], IDS[300:], 11)
    write_tokens_of(tmp_path / "other", other)
    with pytest.raises(ValueError, match="holds other tokens"):
        resume(run, data=tmp_path / "other")


def test_a_stream_is_refused(tmp_path):
    """A run would keep the shard that it holds, and go on from that alone."""
    stream = StreamedTokens(range(4), lambda shard: np.arange(100) % 11, steps_each=2)
    with pytest.raises(TypeError, match="train on a stream with a Trainer"):
        start(tmp_path / "run", data=replace(DATA, train=stream))
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_tokenizer_of_other_tokens_is_refused(tmp_path):
    with pytest.raises(ValueError, match="11 token ids and the tokenizer 3"):
        start_run(tmp_path / "run", PLAN, DATA, CharTokenizer("abc"))
    assert not (tmp_path / "run").exists()


def test_a_start_killed_before_its_run_json_begins_anew(tmp_path, whole):
    with (
        patch.object(runs, "_write_run", side_effect=PowerCut),
        pytest.raises(PowerCut),
    ):
        start(tmp_path / "run", plan(seed=1))
    with pytest.raises(FileNotFoundError, match="holds no run"):
        resume(tmp_path / "run")
    assert torch.equal(weights(whole), weights(start(tmp_path / "run")))


def test_tokens_that_are_there_are_not_replaced(tmp_path):
    write_tokens_of(tmp_path / "data", TokenData.of(IDS[:200], IDS[200:], 11))
    before = (tmp_path / "data" / "train.bin").read_bytes()
    with pytest.raises(FileExistsError, match="holds other tokens"):
        start(tmp_path)
    assert (tmp_path / "data" / "train.bin").read_bytes() == before


# What may change.


def test_a_finished_run_is_extended(run):
    lines = []
    longer = resume(run, steps=20, say=lines.append)
    assert longer.trainer.step == 20
    assert lines == ["going on from checkpoint-00000012; steps 20 (was 12)"]
    assert json.loads((run / "run.json").read_text())["training"]["steps"] == 20
    resume(run, say=lines.append)
    assert lines[1:] == ["going on from checkpoint-00000020"]
    with pytest.raises(ValueError, match="steps can't be 15: 20 are done"):
        resume(run, steps=15)
    assert json.loads((run / "run.json").read_text())["training"]["steps"] == 20


def test_extending_a_constant_rate_is_exact(tmp_path):
    """Where the schedule does not depend on the steps, nor do the bits."""
    constant = {"schedule": "linear", "final_rate": 1.0}
    whole = start(tmp_path / "whole", plan(steps=16, **constant))
    start(tmp_path / "short", plan(**constant))
    longer = resume(tmp_path / "short", steps=16)
    assert torch.equal(weights(whole), weights(longer))


@pytest.mark.parametrize(
    ("name", "value"),
    [("batch_size", 8), ("seed", 1), ("width", 32), ("matrix_learning_rate", 0.1)],
)
def test_nothing_else_may_change(run, name, value):
    before = (run / "run.json").read_bytes()
    with pytest.raises((TypeError, ValueError), match=name):
        resume(run, **{name: value})
    assert (run / "run.json").read_bytes() == before


@pytest.mark.parametrize(
    ("name", "value"),
    [("steps", 0), ("keep", 0), ("precision", "int8"), ("device", "abacus")],
)
def test_impossible_changes_are_refused(run, name, value):
    before = (run / "run.json").read_bytes()
    with pytest.raises(ValueError, match=name):
        resume(run, **{name: value})
    assert (run / "run.json").read_bytes() == before


@pytest.mark.parametrize("wrong", [0, 2.5, "2", None])
def test_saving_is_checked_before_anything_is_written(tmp_path, wrong):
    for name in ("keep", "checkpoint_every"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1"):
            start(tmp_path / "run", **{name: wrong})
    assert not (tmp_path / "run").exists()


def test_a_run_that_is_stopped_before_an_evaluation_leaves_a_model(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(runs, "stop_signals", lambda: nullcontext([15]))
    stopped = start(tmp_path / "run")
    assert (stopped.stopped_by, stopped.trainer.step) == (15, 1)
    model, _ = load(tmp_path / "run")
    found = torch.nn.utils.parameters_to_vector(model.parameters())
    assert torch.equal(found, weights(stopped))


def test_another_split_and_precision(tmp_path, whole):
    cut(tmp_path / "cut", 8)
    lines, changes = [], {"accumulate": 2, "precision": "bfloat16", "keep": 1}
    resumed = resume(tmp_path / "cut", say=lines.append, **changes)
    assert lines == [
        "going on from checkpoint-00000005; accumulate 2 (was 1); "
        "precision bfloat16 (was float32); keep 1 (was 2)"
    ]
    assert torch.allclose(weights(whole), weights(resumed), atol=0.05)
    assert len(checkpoints_in(tmp_path / "cut")) == 1


def test_float16_begins_with_a_fresh_scale_and_leaves_it_behind(tmp_path):
    cut(tmp_path, 8, plan(steps=40))
    with pytest.raises(PowerCut):
        resume(tmp_path, precision="float16", on_record=cut_at(24))
    assert resume(tmp_path, precision="float32").trainer.step == 40


def test_a_run_of_another_machine(tmp_path, whole):
    """Recorded on a GPU, resumed where there is none."""
    cut(tmp_path / "cut", 8)
    content = json.loads((tmp_path / "cut" / "run.json").read_text())
    content["machine"] |= {"device": "cuda", "precision": "bfloat16"}
    (tmp_path / "cut" / "run.json").write_text(json.dumps(content))
    lines = []
    with (
        patch.object(runs, "pick_device", only_a_cpu),
        patch.object(runs, "pick_precision", lambda device: "float32"),
    ):
        with pytest.raises(ValueError, match="no cuda here"):
            resume(tmp_path / "cut", device="cuda")
        resumed = resume(tmp_path / "cut", say=lines.append)
    assert lines == [
        "going on from checkpoint-00000005; device cpu (was cuda); "
        "precision float32 (was bfloat16)"
    ]
    assert torch.equal(weights(whole), weights(resumed))


def only_a_cpu(name=None):
    if name not in (None, "cpu"):
        raise ValueError(f"no {name} here")
    return torch.device("cpu")


# Damage, and files that attack.


PARTS = ["model.safetensors", "config.json", "optimizer-0.safetensors", "trainer.json"]


def shorten(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("damage", [shorten, Path.unlink, lambda p: p.write_bytes(b"")])
def test_a_checkpoint_that_cannot_be_read_is_passed_over(run, whole, name, damage):
    before, last = checkpoints_in(run)
    if (name, damage) == ("optimizer-0.safetensors", Path.unlink):
        pytest.skip("what the state lacks is noticed when it is restored")
    damage(last / name)
    files = {p.name: p.read_bytes() for p in last.iterdir()}
    with pytest.raises(ValueError, match=last.name):
        read_checkpoint(last)
    said = []
    assert torch.equal(weights(whole), weights(resume(run, say=said.append)))
    assert said == [f"going on from {before.name}; {last.name} can't be read"]
    assert checkpoints_in(run) == [before, last]
    read_checkpoint(last)  # written anew
    aside = last.with_suffix(".damaged")
    assert {p.name: p.read_bytes() for p in aside.iterdir()} == files


def test_an_optimizer_that_is_missing_is_noticed(run):
    (checkpoints_in(run)[-1] / "optimizer-0.safetensors").unlink()
    with pytest.raises(ValueError, match=r"checkpoint-00000012 can't be used"):
        resume(run)


def test_nothing_damaged_is_deleted(run):
    """Not even where one step is damaged twice, and one checkpoint is kept."""
    for _ in range(2):
        shorten(checkpoints_in(run)[-1] / "trainer.json")
        resume(run)
    resume(run, steps=20, keep=1)
    assert sorted(path.name for path in run.glob("checkpoint-*")) == [
        "checkpoint-00000012.damaged",
        "checkpoint-00000012.damaged.damaged",
        "checkpoint-00000020",
    ]


def test_where_no_checkpoint_can_be_read_nothing_changes(run):
    for path in checkpoints_in(run):
        shorten(path / "trainer.json")
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    with pytest.raises(FileNotFoundError, match="no checkpoint that can be read"):
        resume(run)
    assert before == {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    for path in checkpoints_in(run):
        shutil.rmtree(path)
    with pytest.raises(FileNotFoundError, match="no checkpoint that can be read"):
        resume(run)


def test_a_damaged_checkpoint_is_none_of_those_to_keep(run, monkeypatch):
    """Else a stop between the two would leave it alone."""
    before, last = checkpoints_in(run)
    (last / "trainer.json").write_bytes(b"")
    monkeypatch.setattr(runs, "stop_signals", lambda: nullcontext([15]))
    stopped = resume(run, keep=1)
    (left,) = checkpoints_in(run)
    assert before < left < last
    assert read_checkpoint(left)[2]["step"] == stopped.trainer.step


@pytest.mark.parametrize("error", [MemoryError, PermissionError, OSError])
def test_a_failure_of_the_machine_is_not_blamed_on_a_checkpoint(
    run, error, monkeypatch
):
    before = sorted(run.rglob("*"))
    monkeypatch.setattr(checkpoints, "load_file", Mock(side_effect=error("no")))
    with pytest.raises(error, match="no"):
        resume(run)
    assert sorted(run.rglob("*")) == before


def test_a_file_that_is_no_part_of_a_checkpoint_is_not_opened(run):
    for path in (run, checkpoints_in(run)[-1]):
        (path / ".DS_Store").write_bytes(b"a Mac was here")
        (path / "notes").mkdir()
    assert resume(run).trainer.step == 12


def test_only_the_names_of_checkpoints_are_checkpoints(run):
    three = checkpoints_in(run)
    others = ["checkpoint-best", "checkpoint-00000001.bak", "checkpoint-1"]
    for name in others:
        shutil.copytree(three[0], run / name)
    (run / "checkpoint-00000001-notes.txt").write_text("mine")
    assert checkpoints_in(run) == three
    resume(run, steps=20, keep=1)
    assert [path.name for path in checkpoints_in(run)] == ["checkpoint-00000020"]
    assert all((run / name).is_dir() for name in others)


def forge(path, name, content):
    if not isinstance(content, bytes):
        content = json.dumps(content).encode()
    (path / name).write_bytes(content)


class Bomb:
    def __reduce__(self):
        return os.mkdir, (os.environ["BOMB"],)


def tensors(facts, body=bytes(64), size=None):
    """A safetensors file, whatever it says about itself."""
    text = json.dumps(facts).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + body


def tensor(shape, offsets=(0, 64), name="0.exp_avg"):
    facts = {"dtype": "F32", "shape": shape, "data_offsets": offsets}
    return tensors({name: facts})


GIGA = 1 << 30
MOMENTS, STATE = "optimizer-0.safetensors", "trainer.json"
ATTACKS = {
    "a bare pickle": (MOMENTS, lambda: pickle.dumps(Bomb())),
    "a long header": (MOMENTS, lambda: tensors({}, size=2 * GIGA)),
    "a trillion numbers": (MOMENTS, lambda: tensor([GIGA, 1024])),
    "a trillion in no bytes": (MOMENTS, lambda: tensor([GIGA, 1024], (0, 0))),
    "a trillion in 4 TB": (MOMENTS, lambda: tensor([GIGA, 1024], (0, GIGA << 12))),
    "too few moments": (MOMENTS, lambda: tensor([16])),
    "moments of no parameter": (MOMENTS, lambda: tensor([16], name="99.exp_avg")),
    "a name that is none": (MOMENTS, lambda: tensor([16], name="exp_avg")),
    "a number too many": (MOMENTS, lambda: tensor([16], name="0.0.exp_avg")),
    "no text": (STATE, lambda: b"\xff\xfe"),
    "a deep state": (STATE, lambda: b"[" * 1_000_000),
    "a long number": (STATE, lambda: b'{"step": ' + b"9" * 100_000 + b"}"),
    "a list": (STATE, lambda: []),
    "another step": (STATE, lambda: {"step": 7}),
    "a step in words": (STATE, lambda: {"step": "twelve"}),
}


def test_moments_of_other_shapes_are_refused(run):
    path = checkpoints_in(run)[-1]
    moments = load_file(path / MOMENTS) | {"0.exp_avg": torch.ones(3)}
    forge(path, MOMENTS, safetensors.torch.save(moments))
    with pytest.raises(ValueError, match="exp_avg of parameter 0 is not"):
        resume(run)


def highest_memory():
    """The most that this process has had since the last call, in MB; Linux tells."""
    if sys.platform != "linux":
        return 0
    status = Path("/proc/self/status").read_text()
    Path("/proc/self/clear_refs").write_text("5")
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_forged_file_is_refused(run, attack, monkeypatch):
    """It runs no code and takes no memory."""
    monkeypatch.setenv("BOMB", str(run / "bomb"))
    name, content = ATTACKS[attack]
    forge(checkpoints_in(run)[-1], name, content())
    highest_memory()
    before = highest_memory()
    shutil.rmtree(checkpoints_in(run)[0])
    with pytest.raises(
        (ValueError, FileNotFoundError), match="can't be used|no checkpoint that can"
    ):
        resume(run)
    assert not (run / "bomb").exists()
    assert highest_memory() - before < 50


@pytest.mark.parametrize(
    "text",
    [b"", b"[]", b"{}", b"[" * 100_000, b"\xff\xfe\xfa"],
)
def test_a_strange_run_json_is_refused(run, text):
    (run / "run.json").write_bytes(text)
    with pytest.raises(ValueError, match=r"run\.json is damaged, start a new run"):
        resume(run)


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("training", "steps", "12"),
        ("training", "learning_rate", None),
        ("saving", "keep", 0),
        ("machine", "precision", []),
    ],
)
def test_a_forged_run_json_is_refused(run, part, name, value):
    content = json.loads((run / "run.json").read_text())
    content[part][name] = value
    (run / "run.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=name):
        resume(run)


def test_a_model_is_not_saved_into_a_run_or_a_checkpoint(run):
    files = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for place in (run, checkpoints_in(run)[-1], run / "data"):
        with pytest.raises(FileExistsError, match="use another folder"):
            save(place, GPT(MODEL), TOKENIZER)
    assert files == {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}


# Disks that fail, and numbers that are none.

FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("which", [0, 3, 7, 12, 18])
def test_a_full_disk_leaves_the_checkpoints_before(tmp_path, call, which, whole):
    real, calls = getattr(os, call), []

    def fail(*arguments):
        if (
            checkpoints_in(tmp_path / "run")[-1:]
            and (tmp_path / "run/run.json").exists()
        ):
            calls.append(arguments)
        if len(calls) > which:
            raise FULL
        return real(*arguments)

    with patch.object(os, call, fail), pytest.raises(OSError, match="No space"):
        start(tmp_path / "run")
    left = list((tmp_path / "run").glob("*.partial"))
    assert call == "fsync" or left == []  # a name that may be back keeps its files
    for path in checkpoints_in(tmp_path / "run"):
        read_checkpoint(path)
    (tmp_path / "run" / "metrics.jsonl.0a.partial").write_text("killed in it")
    assert torch.equal(weights(whole), weights(resume(tmp_path / "run")))
    assert list((tmp_path / "run").glob("*.partial")) == []


def test_a_full_disk_in_safetensors_is_an_oserror(tmp_path):
    error = SafetensorError("I/O error: No space left on device (os error 28)")
    with (
        patch.object(checkpoints, "save_file", side_effect=error),
        pytest.raises(OSError, match="could not be written"),
    ):
        start(tmp_path / "run")
    assert not (tmp_path / "run" / "run.json").exists()
    assert start(tmp_path / "run").trainer.step == 12


@pytest.mark.parametrize(
    "spoil",
    [lambda loss, model: loss * math.nan, lambda loss, model: nan_grad(loss, model)],
)
def test_a_loss_that_is_no_number_is_not_saved(tmp_path, spoil, whole):
    take, makers = runs.Trainer.take_step, []

    def spoiled(trainer):
        if trainer.step == 6:
            right = trainer.loss
            trainer.loss = lambda *batch: spoil(right(*batch), trainer.model)
            makers.append(right)
        take(trainer)
        if makers:
            trainer.loss = makers.pop()

    with (
        patch.object(runs.Trainer, "take_step", spoiled),
        pytest.raises(FloatingPointError, match="at step 7 is not finite") as told,
    ):
        start(tmp_path / "run", checkpoint_every=1)
    advice = f"resume the run in {tmp_path / 'run'} with a lower learning_rate"
    assert str(told.value).endswith(advice)
    last = checkpoints_in(tmp_path / "run")[-1]
    assert last.name == "checkpoint-00000006"
    assert all(p.isfinite().all() for p in load(last)[0].parameters())
    assert torch.equal(weights(whole), weights(resume(tmp_path / "run")))


def nan_grad(loss, model):
    """The same loss; its gradient by the head is infinity times zero."""
    return loss + (model.head.weight.sum() * 0).sqrt()


def test_what_a_killed_start_leaves_is_no_obstacle(tmp_path):
    for name in ("data.0a.partial", "run.json.0b.partial", ".lock"):
        (tmp_path / name).write_text("")
    (tmp_path / "checkpoint-00000000").mkdir()
    refuse_occupied(tmp_path)
