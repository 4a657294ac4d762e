# Written by tools/tangle.py from book/20_runs_that_survive.ipynb: change it there.
"""Runs that survive: one run in a folder, which goes on to the same bits."""

import hashlib
import json
import math
import pickletools
import re
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
import torch

from glassgpt.checkpoints import (
    all_or_nothing,
    flush,
    load,
    make_folder,
    write_file,
    write_json,
    write_model,
)
from glassgpt.data import SPLITS, TokenData, write_tokens
from glassgpt.device import Machine, Plan, on_paper, pick_device, pick_precision
from glassgpt.gpt import GPT, GPTConfig
from glassgpt.modern import ModernConfig, MuonConfig
from glassgpt.tokens import Tokenizer
from glassgpt.training import TrainConfig, Trainer, check_fit, train


@dataclass
class Run:
    """A run in a folder. stopped_by: the signal that ended it early, or 0.

    Book: 20_runs_that_survive.html#a-checkpoint
    """

    directory: Path
    trainer: Trainer
    tokenizer: Tokenizer
    settings: dict[str, Any]
    stopped_by: int = 0


def checkpoints_in(directory: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first.

    Book: 20_runs_that_survive.html#a-checkpoint
    """
    folders = directory.glob("checkpoint-*/")
    found = [p for p in folders if re.fullmatch(r"checkpoint-\d{8,}", p.name)]
    return sorted(found, key=lambda path: int(path.name[11:]))


def _hashes(folder: Path) -> dict[str, str]:
    """The SHA-256 of the files in a folder, by name."""
    hashes = {}
    for path in sorted(p for p in folder.iterdir() if p.is_file()):
        with open(path, "rb") as file:
            hashes[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes


def _drop(directory: Path, checkpoints: list[Path]) -> None:
    """Delete these and what a kill left; names go first: what has one is whole."""
    for path in checkpoints:
        path.rename(path.with_suffix(".partial"))
    flush(directory)
    for leftover in directory.glob("checkpoint-*.partial"):
        shutil.rmtree(leftover)


def write_checkpoint(run: Run) -> None:
    """Write everything that a step changes, then drop all but the last `keep`.

    A checkpoint is a folder that `load` reads, too. Raises OSError where the disk is
    full; the checkpoints before stay as they were.

    Book: 20_runs_that_survive.html#a-checkpoint
    """
    final = run.directory / f"checkpoint-{run.trainer.step:08d}"
    # Only step 0 can be there already, of a start that was killed.
    _drop(run.directory, [final] if final.exists() else [])
    state = run.trainer.state_dict()
    del state["model"]  # it has a file of its own
    with all_or_nothing(final) as partial:
        write_model(partial, run.trainer.model, run.tokenizer)
        with all_or_nothing(partial / "trainer.pt") as file:
            torch.save(state, file)
        write_json(partial / "hashes.json", _hashes(partial))
    _drop(run.directory, checkpoints_in(run.directory)[: -run.settings["keep"]])


# All that the pickle in a checkpoint may name: tensors of 32-bit numbers.
_NAMES = {"torch._utils _rebuild_tensor_v2", "torch FloatStorage"}
_NAMES |= {"collections OrderedDict"}


def _check_archive(path: Path) -> None:
    """Raise ValueError where a file could take more memory than it has bytes."""
    with ZipFile(path) as archive:
        entries = archive.infolist()
        (pickle,) = (e.filename for e in entries if e.filename.endswith("data.pkl"))
        if sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise ValueError(f"{path.name} unpacks to more than it is")
        if min(entry.header_offset for entry in entries) > 0:
            raise ValueError(f"{path.name} has something before its first entry")
        for code, name, _ in pickletools.genops(archive.read(pickle)):
            if "GLOBAL" in code.name and name not in _NAMES:
                raise ValueError(f"{path.name} asks for {name or code.name}")


@contextmanager
def _damaged(path: Path) -> Iterator[None]:
    """Turn any error into a ValueError that says how to go on without a checkpoint."""
    try:
        yield
    except Exception as error:  # a forged file can raise anything
        others = [p.name for p in checkpoints_in(path.parent) if p != path][-1:]
        advice = f"delete it to go on from {others[0]}" if others else "start anew"
        raise ValueError(f"{path} is damaged ({error}): {advice}") from error


def read_checkpoint(path: Path) -> tuple[GPT, Tokenizer, dict[str, Any]]:
    """The model, the tokenizer, and the rest of what a step changes.

    A forged file runs no code and takes no memory. Raises ValueError for a damaged one.

    Book: 20_runs_that_survive.html#a-file-that-attacks
    """
    needed = {"config.json", "model.safetensors", "tokenizer.json", "trainer.pt"}
    with _damaged(path):
        due = json.loads((path / "hashes.json").read_text("utf-8"))
        if not needed <= due.keys() or not due.items() <= _hashes(path).items():
            raise ValueError("its files don't match their hashes")
        _check_archive(path / "trainer.pt")
        model, tokenizer = load(path)
        options = {"map_location": "cpu", "mmap": True, "weights_only": True}
        state = torch.load(path / "trainer.pt", **options)
        if not isinstance(state, dict):
            raise ValueError(f"trainer.pt holds a {type(state).__name__}")
    return model, tokenizer, state


_LISTS = ("optimizers", "records", "recent")
_MOMENTS = {"AdamW": ("step", "exp_avg", "exp_avg_sq"), "Muon": ("momentum_buffer",)}


def restore(trainer: Trainer, state: dict[str, Any], path: Path) -> None:
    """Bring a trainer, which has the model of a checkpoint, to its moment.

    Raises ValueError where the rest of the state is not that of this model.

    Book: 20_runs_that_survive.html#a-file-that-attacks
    """
    with _damaged(path):
        if not all(type(state[name]) is list for name in _LISTS):
            raise ValueError("its parts are no lists")  # a tensor could be endless
        pairs = zip(trainer.optimizers, state["optimizers"], strict=True)
        for optimizer, saved in pairs:
            ours = [p.shape for g in optimizer.param_groups for p in g["params"]]
            names = _MOMENTS[type(optimizer).__name__]
            for number, moments in saved["state"].items():
                due = {name: () if name == "step" else ours[number] for name in names}
                if {name: value.shape for name, value in moments.items()} != due:
                    raise ValueError(f"parameter {number} has moments of other shapes")
                for name, value in moments.items():
                    moments[name] = value.detach().clone()  # out of the file
        scaler = state.get("scaler", {}).values()
        numbers = [state["seconds"], *state["recent"], *scaler]
        numbers += [value for record in state["records"] for value in record.values()]
        if not all(isinstance(number, int | float) for number in numbers):
            raise ValueError("its records are no numbers")
        if path.name != f"checkpoint-{state['step']:08d}":
            raise ValueError(f"it is of step {state['step']}")
        state["model"] = dict(trainer.model.named_parameters())
        trainer.load_state_dict(state)


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Note the first Ctrl-C, SIGTERM or SIGHUP in a list; the second interrupts.

    A signal that is ignored, as SIGHUP is under nohup, stays ignored.

    Book: 20_runs_that_survive.html#leaving-politely
    """
    caught: list[int] = []
    before: dict[int, Any] = {}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def on_signal(number: int, frame: Any) -> None:
        restore()
        caught.append(number)

    if threading.current_thread() is threading.main_thread():  # no other may
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            if number and signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, on_signal)
    try:
        yield caught
    finally:
        restore()


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold a folder for one process, however that ends.

    Raises FileExistsError where another one has it.

    Book: 20_runs_that_survive.html#one-run-in-a-folder
    """
    from filelock import FileLock, Timeout  # here: most programs never lock anything

    make_folder(directory)
    lock = FileLock(directory / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise FileExistsError(f"another process is training in {directory}") from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def memory_advice() -> Iterator[None]:
    """Turn an allocator's failure into a MemoryError that says what to lower.

    Book: 20_runs_that_survive.html#one-run-in-a-folder
    """
    try:
        yield
    except RuntimeError as error:
        signs = "allocate memory|out of memory|ALLOC_FAILED|Invalid buffer"
        if not re.search(signs, str(error)):
            raise
        advice = "raise accumulate, or lower the model's context, width or layers"
        raise MemoryError(f"training does not fit into memory: {advice}") from error


# What may be another than before when a run goes on.
_SAVING = ("checkpoint_every", "keep")
CHANGEABLE = {"steps", "learning_rate", "matrix_learning_rate", "accumulate"}
CHANGEABLE |= {"evaluate_every", *_SAVING, *(field.name for field in fields(Machine))}


def check_saving(checkpoint_every: int = 250, keep: int = 2) -> None:
    """Raise ValueError unless both are whole numbers above 0.

    Book: 20_runs_that_survive.html#one-run-in-a-folder
    """
    for name, value in zip(_SAVING, (checkpoint_every, keep), strict=True):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be at least 1, not {value!r}")


def _parts(settings: dict[str, Any]) -> tuple[TrainConfig, Machine]:
    """The two dataclasses in a run's settings. Raises ValueError."""
    check_saving(*(settings[name] for name in _SAVING))
    kinds = MuonConfig if "matrix_learning_rate" in settings else TrainConfig, Machine
    parts = [kind(**{f.name: settings[f.name] for f in fields(kind)}) for kind in kinds]
    return parts[0], parts[1]


def _changed(settings: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Other settings, also where the device of before does not exist here.

    Raises ValueError for a change of what must stay.
    """
    if kept := sorted(set(changes) - (CHANGEABLE & set(settings))):
        raise ValueError(f"a resumed run keeps its {', '.join(kept)}")
    device = pick_device(changes.get("device"))
    if "device" not in changes:
        with suppress(ValueError):
            device = pick_device(settings["device"])
    now = {**settings, "device": str(device)}
    if device.type != torch.device(settings["device"]).type:
        now["precision"] = pick_precision(device)
    return {**now, **changes, "device": str(device)}


def _read_run(directory: Path) -> tuple[GPTConfig, dict[str, Any], Path, str]:
    """What `_write_run` wrote. Raises ValueError where run.json is damaged."""
    path = directory / "run.json"
    try:
        content = json.loads(path.read_text("utf-8"))
        kind = ModernConfig if "positions" in content["model"] else GPTConfig
        model, place = kind(**content["model"]), Path(content["data"])
        settings = content["training"] | content["machine"] | content["saving"]
        _parts(settings)  # it and the next raise where something is wrong
        torch.device(settings["device"])
        return model, settings, place, content["fingerprint"]
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}): start a new run") from None


def _write_run(run: Run, data: TokenData) -> None:
    """Write run.json, which makes a folder a run."""
    training, machine = _parts(run.settings)
    saving = {name: run.settings[name] for name in _SAVING}
    content = {"model": asdict(run.trainer.model.config), "training": asdict(training)}
    content |= {"machine": asdict(machine), "saving": saving}
    place, own = data.directory.resolve(), run.directory.resolve() / "data"
    path = "data" if place == own else str(place)  # its own move with it
    content |= {"data": path, "fingerprint": data.fingerprint}
    write_json(run.directory / "run.json", content)


def _find_tokens(place: Path, fingerprint: str) -> TokenData:
    """The tokens of a run, read whole once. Raises ValueError for others."""
    if not place.exists():
        what = f"{place}, the tokens of this run, is gone"
        raise FileNotFoundError(f"{what}: say where it is now: data=... or --data")
    data = TokenData.open(place)
    if data.fingerprint != fingerprint:
        raise ValueError(f"{place} holds other tokens than those of this run")
    data.verify()
    return data


OnRecord = Callable[[dict[str, float]], None]
MakeTrainer = Callable[[Plan, TokenData, GPT | None], Trainer]


def _go_on(run: Run, on_record: OnRecord | None, progress: bool) -> Run:
    """Train in a folder that is ours until the end or a signal."""
    directory, end = run.directory, run.trainer.config.steps

    def after_step(trainer: Trainer) -> bool:
        records, step = trainer.records, trainer.step
        if records and records[-1]["step"] == step:
            lines = "".join(json.dumps(record) + "\n" for record in records)
            write_file(directory / "metrics.jsonl", lines.encode())
            losses = [record["validation_loss"] for record in records]
            if all(losses[-1] < other for other in losses[:-1]):
                write_model(directory, trainer.model, run.tokenizer)
            if on_record:
                on_record(records[-1])
        if caught or step == end or step % run.settings["checkpoint_every"] == 0:
            write_checkpoint(run)
        if caught and step < end:
            run.stopped_by = caught[0]
        return run.stopped_by > 0

    try:
        with stop_signals() as caught, memory_advice():
            train(run.trainer, after_step, progress)
    except FloatingPointError as error:
        how = f"glassgpt resume {directory} --learning-rate ..."
        how = f"go on with a lower rate: {how}, or resume_run(..., learning_rate=...)"
        raise FloatingPointError(f"{error}; {how}") from error
    if not (directory / "model.safetensors").exists():
        write_model(directory, run.trainer.model, run.tokenizer)
    return run


def refuse_occupied(directory: Path) -> None:
    """Raise FileExistsError for a folder with anything in it but tokens.

    What a start leaves that was killed before its run.json is none of it.

    Book: 20_runs_that_survive.html#one-run-in-a-folder
    """
    if (directory / "run.json").exists():
        raise FileExistsError(f"{directory} holds a run: resume it, or choose another")
    for name in sorted(path.name for path in directory.glob("[!.]*")):
        if not re.fullmatch(r"data|checkpoint-00000000|.*\.partial(\.lock)?", name):
            what = f"{directory} is not empty, {name} is in it"
            raise FileExistsError(f"{what}: choose another folder")


def _on_disk(data: TokenData, folder: Path, tokenizer: Tokenizer) -> TokenData:
    """Data in files, which are written now if there are none."""
    if data.directory:
        return data
    parts = {split: getattr(data, split) for split in SPLITS}
    if not folder.exists():  # else a start was killed after it
        splits = {split: [(part.ids, part.characters)] for split, part in parts.items()}
        write_tokens(folder, splits, tokenizer)
    found = TokenData.open(folder)
    for split, part in parts.items():
        if not np.array_equal(getattr(found, split).ids, part.ids):
            raise FileExistsError(f"{folder} holds other tokens: choose another folder")
    return found


def start_run(
    directory: str | Path,
    plan: Plan,
    data: TokenData,
    tokenizer: Tokenizer,
    model: GPT | None = None,
    checkpoint_every: int = 250,
    keep: int = 2,
    on_record: OnRecord | None = None,
    progress: bool = True,
    make_trainer: MakeTrainer = Plan.trainer,
) -> Run:
    """Train by a plan in a new folder, which `resume_run` and `load` can read.

    model: one to go on from instead of a new one. keep: how many checkpoints stay.
    on_record: called with each evaluation. make_trainer: that of many processes
    (chapter 22). The folder has the best model, run.json, metrics.jsonl and the
    checkpoints. Ctrl-C, SIGTERM or SIGHUP finishes the step, writes a checkpoint and
    returns. Raises FileExistsError for a folder in use or not empty, TypeError or
    ValueError for what doesn't fit together, FloatingPointError, MemoryError, and
    OSError where the disk is full.

    Book: 20_runs_that_survive.html#one-run-in-a-folder
    """
    directory = Path(directory)
    refuse_occupied(directory)
    check_saving(checkpoint_every, keep)
    if not isinstance(plan, Plan):
        raise TypeError("plan must be a Plan: take what `make_plan` returns")
    if not isinstance(tokenizer, Tokenizer):
        raise TypeError("a run needs the tokenizer that made its data")
    check_fit(on_paper(plan.model), data, plan.training)  # takes no memory
    if tokenizer.vocab_size != data.vocab_size:
        sizes = f"{data.vocab_size} token ids and the tokenizer {tokenizer.vocab_size}"
        raise ValueError(f"the data has {sizes}: it is not the one that made them")
    if model is not None and model.config != plan.model:
        raise ValueError(f"the model has {model.config}, the plan {plan.model}")
    with memory_advice():
        trainer = make_trainer(plan, data, model)
    settings = {**asdict(plan.training), **asdict(plan.machine)}
    settings |= {"checkpoint_every": checkpoint_every, "keep": keep}
    with locked(directory):
        refuse_occupied(directory)  # again, now that it is ours
        data = _on_disk(data, directory / "data", tokenizer)
        run = Run(directory, trainer, tokenizer, settings)
        write_checkpoint(run)
        _write_run(run, data)  # now there is a run
        return _go_on(run, on_record, progress)


def resume_run(
    directory: str | Path,
    data: str | Path | None = None,
    on_record: OnRecord | None = None,
    progress: bool = True,
    say: Callable[[str], None] = print,
    make_trainer: MakeTrainer = Plan.trainer,
    **changes: Any,
) -> Run:
    """Go on with the run in a folder, to the same bits as if it had never stopped.

    data: where its tokens are now, if they moved. changes: `steps`, to extend it, or
    other values of `CHANGEABLE`. say: called with a line that says what is different.
    Raises FileNotFoundError where there is no run, ValueError for a damaged one, other
    tokens or a change of what must stay, and what `start_run` raises.

    Book: 20_runs_that_survive.html#one-run-in-a-folder
    """
    directory = Path(directory)
    if not (directory / "run.json").exists():
        raise FileNotFoundError(f"{directory} holds no run: run.json is missing")
    with locked(directory):
        config, before, place, fingerprint = _read_run(directory)
        now = _changed(before, changes)
        plan = Plan(config, *_parts(now), math.nan)
        tokens = _find_tokens(Path(data) if data else directory / place, fingerprint)
        if not (found := checkpoints_in(directory)):
            raise FileNotFoundError(f"{directory} has lost its checkpoints: start anew")
        model, tokenizer, state = read_checkpoint(found[-1])
        if model.config != config:
            raise ValueError(f"run.json describes another model than {found[-1]}")
        with memory_advice():
            trainer = make_trainer(plan, tokens, model)
        restore(trainer, state, found[-1])
        if (done := trainer.step) > (steps := plan.training.steps):
            raise ValueError(f"steps can't be {steps}: {done} are done")
        run = Run(directory, trainer, tokenizer, now)
        _write_run(run, tokens)
        notes = [f"{k} {v} (was {before[k]})" for k, v in now.items() if v != before[k]]
        say("; ".join([f"going on from {found[-1].name}", *notes]))
        return _go_on(run, on_record, progress)
