# Written by tools/tangle.py from book/20_runs_that_survive.ipynb: change it there.
"""Runs that survive: one run in a folder, which goes on to the same bits."""

import hashlib
import json
import os
import re
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from glassgpt.checkpoints import load, write_file, write_model
from glassgpt.data import TokenData
from glassgpt.device import (
    Machine,
    Plan,
    fit_memory,
    memory_of,
    peak_flops,
    pick_device,
    pick_precision,
)
from glassgpt.gpt import GPT, GPTConfig
from glassgpt.modern import ModernConfig, MuonConfig
from glassgpt.tokens import Tokenizer, load_tokenizer
from glassgpt.training import TrainConfig, Trainer, train


def checkpoints_in(directory: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first.

    Book: 20_runs_that_survive.html#the-module
    """
    named = (p for p in directory.glob("checkpoint-*/"))
    found = [p for p in named if re.fullmatch(r"checkpoint-\d{8,}", p.name)]
    return sorted(found, key=lambda path: (len(path.name), path.name))


def _hashes(folder: Path) -> dict[str, str]:
    """The SHA-256 of the files in a folder, by name."""
    hashes = {}
    for path in sorted(folder.iterdir()):
        if path.name != "hashes.json":
            with open(path, "rb") as file:
                hashes[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes


def write_checkpoint(
    directory: Path, trainer: Trainer, tokenizer: Tokenizer, keep: int
) -> None:
    """Write everything that a step changes, then drop all but the last `keep`.

    A checkpoint is a folder that `load` reads, too. Raises OSError where the disk is
    full; the checkpoints before stay as they were.

    Book: 20_runs_that_survive.html#the-module
    """
    final = directory / f"checkpoint-{trainer.step:08d}"
    partial = final.with_suffix(".partial")
    for leftover in directory.glob("checkpoint-*.partial"):
        shutil.rmtree(leftover)
    state = trainer.state_dict()
    del state["model"]  # it has a file of its own
    try:
        write_model(partial, trainer.model, tokenizer)
        with open(partial / "trainer.pt", "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        hashes = json.dumps(_hashes(partial), indent=1)
        write_file(partial / "hashes.json", hashes.encode())
        if final.exists():  # of a run that went back to an earlier one
            shutil.rmtree(final)
        os.replace(partial, final)
    except (OSError, RuntimeError) as error:  # torch.save raises the second
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(f"{final} could not be written: {error}") from error
    for old in checkpoints_in(directory)[:-keep]:
        shutil.rmtree(old.rename(old.with_suffix(".partial")))


def read_checkpoint(path: Path, trainer: Trainer) -> None:
    """Bring a trainer, whose model `load` has read, to the moment of a checkpoint.

    A forged file runs no code and takes no memory. Raises ValueError for a damaged
    checkpoint, or one of another run.

    Book: 20_runs_that_survive.html#the-module
    """
    try:
        due = json.loads((path / "hashes.json").read_text("utf-8"))
        if due != _hashes(path) or "trainer.pt" not in due:
            raise ValueError("its files don't match their hashes")
        state = torch.load(
            path / "trainer.pt", map_location="cpu", mmap=True, weights_only=True
        )
        for optimizer, saved in zip(
            trainer.optimizers, state["optimizers"], strict=True
        ):
            ours = [p for group in optimizer.param_groups for p in group["params"]]
            for number, moments in saved["state"].items():
                for name, value in moments.items():
                    if value.shape not in ((), ours[number].shape):
                        raise ValueError(f"{name} of {number} has another shape")
                    moments[name] = value.clone()  # out of the file
        state["model"] = dict(trainer.model.named_parameters())
        trainer.load_state_dict(state)
    except Exception as error:  # a forged file can raise anything
        before = [p.name for p in checkpoints_in(path.parent) if p < path][-1:]
        advice = f"delete it to go on from {before[0]}" if before else "start anew"
        raise ValueError(f"{path} is damaged ({error!r}): {advice}") from error


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Note the first Ctrl-C, SIGTERM or SIGHUP in a list; the second interrupts.

    Book: 20_runs_that_survive.html#the-module
    """
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught  # Python lets only the main thread handle signals.
        return
    names = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def on_signal(number: int, frame: Any) -> None:
        restore()
        caught.append(number)

    before = {number: signal.signal(number, on_signal) for number in numbers}
    try:
        yield caught
    finally:
        restore()


@contextmanager
def memory_advice() -> Iterator[None]:
    """Turn an allocator's failure into a MemoryError that says what to lower.

    Book: 20_runs_that_survive.html#the-module
    """
    try:
        yield
    except RuntimeError as error:
        signs = ("allocate memory", "out of memory", "ALLOC_FAILED", "Invalid buffer")
        if not any(sign in str(error) for sign in signs):
            raise
        raise MemoryError(
            "training does not fit into memory: raise accumulate, or lower the "
            "model's context, width or layers"
        ) from error


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold a folder for one process, however that ends.

    Raises FileExistsError where another one has it.

    Book: 20_runs_that_survive.html#the-module
    """
    from filelock import FileLock, Timeout  # here: most programs never lock anything

    directory.mkdir(parents=True, exist_ok=True)
    lock = FileLock(directory / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise FileExistsError(f"another process is training in {directory}") from None
    try:
        yield
    finally:
        lock.release()


@dataclass
class Run:
    """What a run came to. stopped_by: the signal that ended it early, or 0.

    Book: 20_runs_that_survive.html#the-module
    """

    directory: Path
    trainer: Trainer
    stopped_by: int = 0


def _go_on(
    directory: Path,
    trainer: Trainer,
    tokenizer: Tokenizer,
    saving: dict[str, int],
    on_record: Callable[[dict[str, float]], None] | None,
    progress: bool,
) -> Run:
    """Train in a folder that is ours until the end or a signal."""

    def after_step(trainer: Trainer) -> bool:
        records, step = trainer.records, trainer.step
        if records and records[-1]["step"] == step:
            lines = "".join(json.dumps(record) + "\n" for record in records)
            write_file(directory / "metrics.jsonl", lines.encode())
            *earlier, loss = (record["validation_loss"] for record in records)
            if all(loss < other for other in earlier):
                write_model(directory, trainer.model, tokenizer)
            if on_record:
                on_record(records[-1])
        last = step == trainer.config.steps
        if caught or last or step % saving["checkpoint_every"] == 0:
            write_checkpoint(directory, trainer, tokenizer, saving["keep"])
        return bool(caught) and not last

    with stop_signals() as caught, memory_advice():
        train(trainer, after_step, progress)
    if not (directory / "model.safetensors").exists():
        write_model(directory, trainer.model, tokenizer)
    stopped = trainer.step < trainer.config.steps
    return Run(directory, trainer, caught[0] if stopped else 0)


def refuse_occupied(directory: Path) -> None:
    """Raise FileExistsError for a folder with anything in it but tokens.

    Book: 20_runs_that_survive.html#the-module
    """
    if directory.exists() and not directory.is_dir():
        raise FileExistsError(f"{directory} is a file: choose another folder")
    if (directory / "run.json").exists():
        raise FileExistsError(f"{directory} holds a run: resume it, or choose another")
    names = sorted(path.name for path in directory.glob("[!.]*"))
    if names and names != ["data"]:
        raise FileExistsError(
            f"{directory} is not empty, {names[0]} is in it: choose another folder"
        )


def start_run(
    directory: str | Path,
    plan: Plan,
    data: TokenData,
    tokenizer: Tokenizer,
    model: GPT | None = None,
    checkpoint_every: int = 250,
    keep: int = 2,
    on_record: Callable[[dict[str, float]], None] | None = None,
    progress: bool = True,
) -> Run:
    """Train by a plan in a new folder, which `resume_run` and `load` can read.

    model: one to go on from instead of a new one. keep: how many checkpoints stay.
    on_record: called with each evaluation. The folder has the best model, run.json,
    metrics.jsonl and the checkpoints. Ctrl-C, SIGTERM or SIGHUP finishes the step,
    writes a checkpoint and returns. Raises FileExistsError for a folder in use or not
    empty, ValueError for what doesn't fit together, FloatingPointError, MemoryError,
    and OSError where the disk is full.

    Book: 20_runs_that_survive.html#the-module
    """
    directory = Path(directory)
    refuse_occupied(directory)
    if tokenizer.vocab_size != data.vocab_size:
        raise ValueError(
            f"the data has {data.vocab_size} token ids and the tokenizer "
            f"{tokenizer.vocab_size}: it is not the one that made them"
        )
    with memory_advice():
        trainer = plan.trainer(data, model)
    with locked(directory):
        refuse_occupied(directory)  # again, now that it is ours
        place = data.directory or data.save(directory / "data", tokenizer)
        inside = place.resolve() == (directory / "data").resolve()
        saving = {"checkpoint_every": checkpoint_every, "keep": keep}
        content = {
            "model": asdict(plan.model),
            "training": asdict(plan.training),
            "machine": asdict(plan.machine),
            "saving": saving,
            "data": "data" if inside else str(place.resolve()),
            "fingerprint": data.fingerprint,
        }
        tokenizer.save(directory / "tokenizer.json")
        write_file(directory / "run.json", json.dumps(content, indent=1).encode())
        if model is not None:  # what it began with
            write_checkpoint(directory, trainer, tokenizer, keep)
        return _go_on(directory, trainer, tokenizer, saving, on_record, progress)


# What may be another than before when a run goes on.
CHANGEABLE = {"steps", "learning_rate", "matrix_learning_rate", "accumulate"}
CHANGEABLE |= {"evaluate_every", "evaluation_crops", "checkpoint_every", "keep"}
CHANGEABLE |= {field.name for field in fields(Machine)}


def _read_run(
    directory: Path, changes: dict[str, Any], data: str | Path | None
) -> tuple[Plan, dict[str, int], TokenData, list[str]]:
    """The plan, what is saved when, and the tokens of a run; and what has changed.

    Raises FileNotFoundError and ValueError.
    """
    path = directory / "run.json"
    if not path.exists():
        raise FileNotFoundError(f"{directory} holds no run: {path.name} is missing")
    try:
        content = json.loads(path.read_text("utf-8"))
        parts = {
            k: dict(content[k]) for k in ("model", "training", "machine", "saving")
        }
        modern, muon = "norm" in parts["model"], "schedule" in parts["training"]
        muon = "matrix_learning_rate" in parts["training"]
        model = (ModernConfig if modern else GPTConfig)(**parts["model"])
        training = (MuonConfig if muon else TrainConfig)(**parts["training"])
        machine, saving = Machine(**parts["machine"]), parts["saving"]
        place, fingerprint = Path(directory, content["data"]), content["fingerprint"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error!r}): start a new run") from None
    before = {**asdict(training), **asdict(machine), **saving}
    if kept := sorted(set(changes) - (CHANGEABLE & set(before))):
        raise ValueError(f"a resumed run keeps its {', '.join(kept)}")
    try:
        device = pick_device(changes.get("device", machine.device))
    except ValueError:
        if "device" in changes:
            raise
        device = pick_device()  # another machine than the run began on
    if device.type != torch.device(machine.device).type:
        changes = {"precision": pick_precision(device), **changes}
    now = {**before, **changes, "device": str(device)}
    notes = [f"{k} {v} (was {before[k]})" for k, v in now.items() if v != before[k]]

    def take(old: Any) -> Any:
        return replace(old, **{f.name: now[f.name] for f in fields(old)})

    training, machine = take(training), take(machine)
    saving = {name: now[name] for name in saving}
    tokens = Path(data) if data else place
    if not tokens.exists():
        raise FileNotFoundError(
            f"{tokens}, the tokens of this run, is gone: say where it is now (--data)"
        )
    opened = TokenData.open(tokens)
    if opened.fingerprint != fingerprint:
        raise ValueError(f"{tokens} holds other tokens than those of this run")
    opened.verify()
    plan = Plan(model, training, machine, peak_flops(machine))
    if memory := memory_of(device):
        plan = fit_memory(plan, int(0.85 * memory), set(changes))
    content |= {"training": asdict(plan.training), "machine": asdict(plan.machine)}
    content |= {"saving": saving}
    if data:
        content["data"] = str(tokens.resolve())
    write_file(path, json.dumps(content, indent=1).encode())
    return plan, saving, opened, notes


def resume_run(
    directory: str | Path,
    data: str | Path | None = None,
    on_record: Callable[[dict[str, float]], None] | None = None,
    progress: bool = True,
    say: Callable[[str], None] = print,
    **changes: Any,
) -> Run:
    """Go on with the run in a folder, to the same bits as if it had never stopped.

    data: where its tokens are now, if they moved. changes: `steps`, to extend it, or
    other values of `CHANGEABLE`. say: called with a line that says what is different.
    Raises FileNotFoundError where there is no run, ValueError for a damaged one, other
    tokens or a change of what must stay, and what `start_run` raises.

    Book: 20_runs_that_survive.html#the-module
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise FileNotFoundError(f"there is no folder {directory}")
    with locked(directory):
        plan, saving, tokens, notes = _read_run(directory, changes, data)
        last = checkpoints_in(directory)[-1:]
        with memory_advice():
            model = load(last[0])[0] if last else None
            trainer = plan.trainer(tokens, model)
        if last:
            read_checkpoint(last[0], trainer)
        place = last[0].name if last else "the start: there is no checkpoint yet"
        say("; ".join([f"going on from {place}", *notes]))
        tokenizer = load_tokenizer(directory / "tokenizer.json")
        return _go_on(directory, trainer, tokenizer, saving, on_record, progress)
