"""Runs: what survives a kill, a full disk, a forged file, and a change of machine."""

import json
import math
import os
import pickle
import shutil
import signal
import struct
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread
from unittest.mock import Mock, patch

import numpy as np
import pytest
import safetensors.torch
import torch
from failing import FULL, Killed, failing_from
from filelock import FileLock
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file

from glassgpt import checkpoints, runs
from glassgpt.checkpoints import load
from glassgpt.data import TokenData, write_tokens
from glassgpt.distributed import StreamedTokens
from glassgpt.gpt import GPT, GPTConfig
from glassgpt.modern import ModernConfig, MuonConfig
from glassgpt.plan import Machine, Plan
from glassgpt.runs import (
    checkpoints_in,
    locked,
    read_checkpoint,
    resume_run,
    start_run,
)
from glassgpt.tokens import CharTokenizer
from glassgpt.training import TrainConfig

MODEL = GPTConfig(11, context=8, layers=1, heads=2, width=16, dropout=0.1)
TRAINING = TrainConfig(
    steps=12, batch_size=4, warmup=3, evaluate_every=4, evaluation_crops=8
)
MODERN = ModernConfig(11, 8, 1, 2, 16, dropout=0.1)
MUON = MuonConfig(**vars(TRAINING) | {"matrix_learning_rate": 0.02})
PLAN = Plan(MODEL, TRAINING, Machine())
IDS = [n * n % 11 for n in range(400)]
DATA = TokenData.of(IDS[:300], IDS[300:], 11)
TOKENIZER = CharTokenizer("abcdefghijk")


def plan(**values):
    return replace(PLAN, training=replace(TRAINING, **values))


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


def files_in(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class PowerCut(Exception):
    pass


def cut(directory, step, plan=PLAN, **options):
    """A run that ends without a word after the evaluation of a step."""

    def on_record(record):
        if record["step"] == step:
            raise PowerCut

    with pytest.raises(PowerCut):
        start(directory, plan, on_record=on_record, **options)


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
    first, tokenizer = load(checkpoints_in(run)[-1])
    assert tokenizer.vocab_size == 11
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [4, 8, 12]
    again = resume(run)
    assert all(map(torch.equal, first.parameters(), again.trainer.model.parameters()))
    assert (again.directory, again.trainer.step, again.stopped_by) == (run, 12, 0)


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


def test_a_given_model_is_trained_on(tmp_path):
    def given():
        torch.manual_seed(5)
        return GPT(MODEL)

    cut(tmp_path / "cut", 4, model=given(), checkpoint_every=100)
    (first,) = checkpoints_in(tmp_path / "cut")
    assert torch.equal(load(first)[0].tokens.weight, given().tokens.weight)
    whole = start(tmp_path / "whole", model=given())
    assert torch.equal(weights(whole), weights(resume(tmp_path / "cut")))


# Kills, full disks and signals.


@settings(max_examples=12)
@given(st.integers(1, 210), st.booleans())  # a whole run makes 209
@example(1, True)
@example(202, False)
def test_a_failure_at_any_file_operation_loses_nothing(whole, number, killed):
    """Killed, or with a full disk: what bears a name is whole, and the run goes on."""
    with TemporaryDirectory() as place:
        home = Path(place, "run")
        with failing_from(number, Killed() if killed else FULL):
            start(home)
        for checkpoint in checkpoints_in(home):
            read_checkpoint(checkpoint)
        again = resume(home) if (home / "run.json").exists() else start(home)
        assert torch.equal(weights(whole), weights(again))
        assert untimed(whole) == untimed(again)


def test_a_full_disk_in_safetensors_is_an_oserror(tmp_path):
    error = SafetensorError("I/O error: No space left on device (os error 28)")
    with (
        patch.object(checkpoints, "save_file", side_effect=error),
        pytest.raises(OSError, match="could not be written"),
    ):
        start(tmp_path)
    assert not (tmp_path / "run.json").exists()


SIGNALS = [
    getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGHUP") if n in dir(signal)
]


@pytest.fixture
def handlers():
    """Where tests run in the background, the shell may have them ignore Ctrl-C."""
    handler = signal.default_int_handler
    outside = {number: signal.signal(number, handler) for number in SIGNALS}
    yield handler
    for number, before in outside.items():
        signal.signal(number, before)


def signaled(number, step, times=1):
    """An `on_record` in which signals arrive at the evaluation of a step."""

    def on_record(record):
        if record["step"] == step:
            for _ in range(times):
                signal.raise_signal(number)

    return {"on_record": on_record, "checkpoint_every": 1000}


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_saves_and_leaves(tmp_path, handlers, whole, number):
    half = start(tmp_path, **signaled(number, 4))
    assert (half.trainer.step, half.stopped_by) == (4, number)
    assert signal.getsignal(number) is handlers
    assert torch.equal(weights(whole), weights(resume(tmp_path)))


def test_a_second_signal_interrupts(tmp_path, handlers):
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path, **signaled(signal.SIGINT, 4, times=2))
    assert signal.getsignal(signal.SIGINT) is handlers


@pytest.mark.parametrize(("step", "ignored"), [(4, True), (12, False)])
def test_a_signal_that_stops_nothing(tmp_path, handlers, step, ignored):
    """One that is ignored, as SIGHUP is under nohup, and one in the last step."""
    if ignored:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    run = start(tmp_path, **signaled(signal.SIGTERM, step))
    assert (run.trainer.step, run.stopped_by) == (12, 0)


def test_a_run_that_is_stopped_before_an_evaluation_leaves_a_model(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(runs, "stop_signals", lambda: nullcontext([15]))
    stopped = start(tmp_path)
    assert (stopped.stopped_by, stopped.trainer.step) == (15, 1)
    found = torch.nn.utils.parameters_to_vector(load(tmp_path)[0].parameters())
    assert torch.equal(found, weights(stopped))


def test_a_thread_can_train(tmp_path):
    thread = Thread(target=start, args=(tmp_path,))
    thread.start()
    thread.join()
    assert checkpoints_in(tmp_path)[-1].name == "checkpoint-00000012"


# One run in a folder.


@pytest.mark.parametrize("name", ["run.json", "notes", "checkpoint-00000005"])
def test_nothing_is_overwritten(tmp_path, name):
    (tmp_path / name).write_bytes(b"precious")
    with pytest.raises(FileExistsError, match="resume it|not empty, .* is in it"):
        start(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]  # not even a lock
    assert (tmp_path / name).read_bytes() == b"precious"


def test_where_no_run_is_nothing_is_made(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no run"):
        resume(tmp_path / "nowhere")
    assert os.listdir(tmp_path) == []


def test_two_runs_in_one_directory(tmp_path):
    refused = []

    def second(record):
        with pytest.raises(FileExistsError, match="another process is training in"):
            resume(tmp_path)
        with pytest.raises(FileExistsError, match="training in"), locked(tmp_path):
            pass
        refused.append(record["step"])

    start(tmp_path, on_record=second)
    assert refused == [4, 8, 12]
    with FileLock(tmp_path / ".lock", timeout=0):
        pass  # free again


# Tokens.


def write_tokens_of(folder, data=DATA):
    parts = {"train": data.train, "validation": data.validation}
    splits = {name: [(part.ids, part.characters)] for name, part in parts.items()}
    return write_tokens(folder, splits, TOKENIZER)


def test_a_run_that_names_no_betas_resumes_with_those_that_it_had(tmp_path, whole):
    cut(tmp_path, 8)
    content = json.loads((tmp_path / "run.json").read_text())
    del content["training"]["beta1"], content["training"]["beta2"]
    (tmp_path / "run.json").write_text(json.dumps(content))
    assert torch.equal(weights(whole), weights(resume(tmp_path)))


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


OTHER = TokenData.of([*IDS[:299], 3], IDS[300:], 11)


def test_other_tokens_are_neither_used_nor_replaced(tmp_path, run):
    write_tokens_of(tmp_path / "other" / "data", OTHER)
    with pytest.raises(ValueError, match="holds other tokens"):
        resume(run, data=tmp_path / "other" / "data")
    before = files_in(tmp_path / "other" / "data")
    with pytest.raises(FileExistsError, match="holds other tokens"):
        start(tmp_path / "other")
    assert files_in(tmp_path / "other" / "data") == before


STREAM = StreamedTokens(range(4), lambda shard: np.arange(100) % 11, steps_each=2)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"data": replace(DATA, train=STREAM)}, "train on a stream with a Trainer"),
        ({"data": TokenData.of(IDS, IDS, 12)}, "vocabulary|token ids"),
        ({"model": GPT(replace(MODEL, width=32))}, "the model has .*width=32"),
        ({"keep": 0}, "keep must be at least 1"),
        ({"checkpoint_every": 2.5}, "checkpoint_every must be at least 1"),
    ],
)
def test_what_does_not_fit_is_refused_before_there_is_a_run(tmp_path, given, message):
    with pytest.raises((TypeError, ValueError), match=message):
        start(tmp_path / "run", **given)
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_tokenizer_of_other_tokens_is_refused(tmp_path):
    with pytest.raises(ValueError, match="11 token ids and the tokenizer 3"):
        start_run(tmp_path, PLAN, DATA, CharTokenizer("abc"))


# What may change.


def test_a_finished_run_is_extended(run):
    lines = []
    longer = resume(run, steps=20, say=lines.append)
    assert longer.trainer.step == 20
    assert "checkpoint-00000012; steps 20 (was 12)" in lines[0]
    resume(run, say=lines.append)
    assert lines[1].endswith("00000020; all steps are done: more of them go on")
    with pytest.raises(ValueError, match="steps can't be 15: 20 are done"):
        resume(run, steps=15)


def test_extending_a_constant_rate_is_exact(tmp_path):
    """Where the schedule does not depend on the steps, nor do the bits."""
    constant = {"schedule": "linear", "final_rate": 1.0}
    whole = start(tmp_path / "whole", plan(steps=16, **constant))
    start(tmp_path / "short", plan(**constant))
    longer = resume(tmp_path / "short", steps=16)
    assert torch.equal(weights(whole), weights(longer))


@pytest.mark.parametrize(
    ("name", "value"),
    [("batch_size", 8), ("seed", 1), ("width", 32), ("matrix_learning_rate", 0.1)]
    + [("steps", 0), ("keep", 0), ("precision", "int8"), ("device", "abacus")],
)
def test_what_may_not_change_stays(run, name, value):
    before = (run / "run.json").read_bytes()
    with pytest.raises((TypeError, ValueError), match=name):
        resume(run, **{name: value})
    assert (run / "run.json").read_bytes() == before


def test_the_rate_of_matrices_may_change_with_muon(tmp_path):
    cut(tmp_path, 8, Plan(MODEL, MUON, Machine()))
    changed = resume(tmp_path, learning_rate=0.003, matrix_learning_rate=0.01)
    training = changed.plan.training
    assert (training.learning_rate, training.matrix_learning_rate) == (0.003, 0.01)


def test_another_split_and_precision(tmp_path, whole):
    cut(tmp_path, 8)
    lines, changes = [], {"accumulate": 2, "precision": "bfloat16", "keep": 1}
    resumed = resume(tmp_path, say=lines.append, **changes)
    for change in ("accumulate 2 (was 1)", "precision bfloat16", "keep 1 (was 2)"):
        assert change in lines[0]
    assert torch.allclose(weights(whole), weights(resumed), atol=0.05)
    assert len(checkpoints_in(tmp_path)) == 1


def test_float16_begins_with_a_fresh_scale_and_leaves_it_behind(tmp_path):
    cut(tmp_path, 8, plan(steps=40))
    half = resume(tmp_path, precision="float16", **signaled(signal.SIGTERM, 24))
    assert half.trainer.step == 24
    assert resume(tmp_path, precision="float32").trainer.step == 40


def only_a_cpu(name=None):
    if name not in (None, "cpu"):
        raise ValueError(f"no {name} here")
    return torch.device("cpu")


def test_a_run_of_another_machine(tmp_path, whole):
    """Recorded on a GPU, resumed where there is none."""
    cut(tmp_path, 8)
    content = json.loads((tmp_path / "run.json").read_text())
    content["machine"] |= {"device": "cuda", "precision": "bfloat16"}
    (tmp_path / "run.json").write_text(json.dumps(content))
    lines = []
    with (
        patch.object(runs, "pick_device", only_a_cpu),
        patch.object(runs, "pick_precision", lambda device: "float32"),
    ):
        with pytest.raises(ValueError, match="no cuda here"):
            resume(tmp_path, device="cuda")
        resumed = resume(tmp_path, say=lines.append)
    assert "device cpu (was cuda); precision float32 (was bfloat16)" in lines[0]
    assert torch.equal(weights(whole), weights(resumed))


# Damage, and files that attack.


MOMENTS, STATE = "optimizer-0.safetensors", "trainer.json"


def shorten(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("model.safetensors", shorten),
        ("config.json", Path.unlink),
        (MOMENTS, shorten),
        (STATE, Path.unlink),
    ],
)
def test_a_checkpoint_that_cannot_be_read_is_passed_over(run, whole, name, damage):
    before, last = checkpoints_in(run)
    damage(last / name)
    files, said = {path.name: data for path, data in files_in(last).items()}, []
    assert torch.equal(weights(whole), weights(resume(run, say=said.append)))
    assert said == [f"going on from {before.name}; {last.name} can't be read"]
    read_checkpoint(last)  # written anew
    aside = last.with_suffix(".damaged")
    assert {path.name: data for path, data in files_in(aside).items()} == files


def test_what_an_optimizer_lacks_is_noticed(run):
    moments = checkpoints_in(run)[-1] / MOMENTS
    safetensors.torch.save_file(
        load_file(moments) | {"0.exp_avg": torch.ones(3)}, moments
    )
    with pytest.raises(ValueError, match="exp_avg of parameter 0 is not"):
        resume(run)
    moments.unlink()
    with pytest.raises(ValueError, match=r"checkpoint-00000012 can't be used"):
        resume(run)


def test_nothing_damaged_is_deleted(run):
    """Not even where one step is damaged twice, and one checkpoint is kept."""
    for _ in range(2):
        shorten(checkpoints_in(run)[-1] / STATE)
        resume(run)
    resume(run, steps=20, keep=1)
    assert sorted(path.name for path in run.glob("checkpoint-*")) == [
        "checkpoint-00000012.damaged",
        "checkpoint-00000012.damaged.damaged",
        "checkpoint-00000020",
    ]


def test_where_no_checkpoint_can_be_read_nothing_changes(run):
    for path in checkpoints_in(run):
        shorten(path / STATE)
    before = files_in(run)
    with pytest.raises(FileNotFoundError, match="no checkpoint that can be read"):
        resume(run)
    assert files_in(run) == before


def test_a_damaged_checkpoint_is_none_of_those_to_keep(run, monkeypatch):
    """Else a stop between the two would leave it alone."""
    before, last = checkpoints_in(run)
    (last / STATE).write_bytes(b"")
    monkeypatch.setattr(runs, "stop_signals", lambda: nullcontext([15]))
    stopped = resume(run, keep=1)
    (left,) = checkpoints_in(run)
    assert before < left < last
    assert read_checkpoint(left)[2]["step"] == stopped.trainer.step


@pytest.mark.parametrize("error", [MemoryError, PermissionError])
def test_a_failure_of_the_machine_is_not_blamed_on_a_checkpoint(
    run, error, monkeypatch
):
    before = files_in(run)
    monkeypatch.setattr(checkpoints, "load_file", Mock(side_effect=error("no")))
    with pytest.raises(error, match="no"):
        resume(run)
    assert files_in(run) == before


def test_only_the_names_of_checkpoints_are_checkpoints(run):
    before = checkpoints_in(run)
    others = ["checkpoint-best", "checkpoint-00000001.bak"]
    for name in others:
        shutil.copytree(before[0], run / name)
    (before[-1] / ".DS_Store").write_bytes(b"a Mac was here")
    (run / "metrics.jsonl.0a.partial").write_bytes(b"a kill left it")
    assert checkpoints_in(run) == before
    resume(run, steps=20, keep=1)
    assert [path.name for path in checkpoints_in(run)] == ["checkpoint-00000020"]
    assert all((run / name).is_dir() for name in others)
    assert list(run.glob("*.partial")) == []


class Bomb:
    def __reduce__(self):
        return os.mkdir, (os.environ["BOMB"],)


def tensor(shape, offsets, name="0.exp_avg"):
    """A safetensors file of 64 bytes, whatever it says about itself."""
    facts = {"dtype": "F32", "shape": shape, "data_offsets": offsets}
    text = json.dumps({name: facts}).encode()
    return struct.pack("<Q", len(text)) + text + bytes(64)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (MOMENTS, lambda: pickle.dumps(Bomb())),
        (MOMENTS, lambda: struct.pack("<Q", 1 << 31) + b"{}"),
        (MOMENTS, lambda: tensor([1 << 30, 1024], [0, 1 << 42])),
        (MOMENTS, lambda: tensor([16], [0, 64], name="99.exp_avg")),
        (MOMENTS, lambda: tensor([16], [0, 64], name="exp_avg")),
        (STATE, lambda: b"[" * 1_000_000),
        (STATE, lambda: b"[]"),
        (STATE, lambda: b'{"step": "twelve"}'),
    ],
)
def test_a_forged_file_is_refused(run, name, content, monkeypatch):
    """And runs no code."""
    monkeypatch.setenv("BOMB", str(run / "bomb"))
    first, last = checkpoints_in(run)
    (last / name).write_bytes(content())
    shutil.rmtree(first)
    with pytest.raises((ValueError, FileNotFoundError), match="can't be used|no check"):
        resume(run)
    assert not (run / "bomb").exists()


@pytest.mark.parametrize("text", [b"", b"[]", b"{}", b"[" * 100_000, b"\xff\xfe\xfa"])
def test_a_strange_run_json_is_refused(run, text):
    (run / "run.json").write_bytes(text)
    with pytest.raises(ValueError, match=r"run\.json is damaged, start a new run"):
        resume(run)


def nan_loss(loss, model):
    return loss * math.nan


def nan_gradient(loss, model):
    """The same loss; its gradient by the head is infinity times zero."""
    return loss + (model.head.weight.sum() * 0).sqrt()


@pytest.mark.parametrize("spoil", [nan_loss, nan_gradient])
def test_a_loss_that_is_no_number_is_not_saved(tmp_path, spoil, whole):
    take_step = runs.Trainer.take_step

    def spoiled(trainer):
        right = trainer.loss
        if trainer.step == 6:
            trainer.loss = lambda *batch: spoil(right(*batch), trainer.model)
        take_step(trainer)
        trainer.loss = right

    with (
        patch.object(runs.Trainer, "take_step", spoiled),
        pytest.raises(
            FloatingPointError, match="at step 7 .* lower the learning rate, and resume"
        ),
    ):
        start(tmp_path, checkpoint_every=1)
    last = checkpoints_in(tmp_path)[-1]
    assert last.name == "checkpoint-00000006"
    assert all(p.isfinite().all() for p in load(last)[0].parameters())
    assert torch.equal(weights(whole), weights(resume(tmp_path)))
