# Written by tools/tangle.py from book/23_runs_that_survive.ipynb: change it there.
"""Runs that survive: one run in a folder, which ends with the same bits."""

import json
import math
import re
import shutil
import signal
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from glassgpt.atomic import atomic_write, flush, write_file, write_json
from glassgpt.checkpoints import load, reraise_as, save_tensors, write_model
from glassgpt.data import SPLITS, TokenData, Tokens, write_tokens
from glassgpt.gpt import GPT
from glassgpt.modern import MuonConfig
from glassgpt.plan import Machine, Plan, meta_model, pick_device, pick_precision
from glassgpt.tokens import Tokenizer
from glassgpt.training import TrainConfig, Trainer, check_fit, train


@dataclass(frozen=True)
class Saving:
    """When to save, and how much to keep. Raises ValueError for less than 1.

    Book: 23_runs_that_survive.html#a-checkpoint
    """

    checkpoint_every: int = 250  # steps from one checkpoint to the next
    keep: int = 2  # how many checkpoints stay

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be at least 1, not {value!r}")


@dataclass
class Run:
    """A run in a folder. stopped_by: the signal that ended it early, or 0.

    Book: 23_runs_that_survive.html#a-checkpoint
    """

    directory: Path
    trainer: Trainer
    tokenizer: Tokenizer
    plan: Plan
    saving: Saving
    stopped_by: int = 0


def checkpoints_in(directory: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first.

    Book: 23_runs_that_survive.html#a-checkpoint
    """
    return sorted(directory.glob(f"checkpoint-{8 * '[0-9]'}/"))


def _drop(directory: Path, checkpoints: list[Path]) -> None:
    """Delete these and what a kill left; names go first: what has one is whole."""
    for path in checkpoints:
        path.rename(path.with_suffix(".partial"))
    flush(directory)
    for leftover in directory.glob("*.partial"):
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()


def rank_here() -> int:
    """The number of this process among those that train together; alone it is 0.

    Book: 23_runs_that_survive.html#a-checkpoint
    """
    return dist.get_rank() if dist.is_initialized() else 0


def largest_of_all(number: int) -> int:
    """The largest number of all ranks, each of which must call; alone one's own.

    Book: 23_runs_that_survive.html#a-checkpoint
    """
    if not dist.is_initialized():
        return number
    largest = torch.tensor(number)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


def write_checkpoint(run: Run) -> None:
    """Write everything that a step changes, then drop all but the last `keep`.

    A checkpoint is a folder that `load` reads, too. Raises OSError where the disk is
    full; the checkpoints before stay as they were.

    Book: 23_runs_that_survive.html#a-checkpoint
    """
    state, model = run.trainer.state_dict(), run.trainer.whole_model()
    if rank_here() > 0:
        return
    del state["model"]  # it has a file of its own
    final = run.directory / f"checkpoint-{run.trainer.step:08d}"
    # Only step 0 can be there already, of a start that was killed.
    _drop(run.directory, [final] if final.exists() else [])
    with atomic_write(final) as partial:
        write_model(partial, model, run.tokenizer)
        for number, optimizer in enumerate(state.pop("optimizers")):
            saved = optimizer["state"].items()
            moments = {f"{p}.{k}": v for p, own in saved for k, v in own.items()}
            save_tensors(partial / f"optimizer-{number}.safetensors", moments)
        write_json(partial / "trainer.json", state)
    _drop(run.directory, checkpoints_in(run.directory)[: -run.saving.keep])


def read_checkpoint(path: Path) -> tuple[GPT, Tokenizer, dict[str, Any]]:
    """The model, the tokenizer, and the rest of what a step changes.

    A forged file runs no code and takes no memory. Raises ValueError where a file is
    damaged or missing, and OSError where the disk can't be read.

    Book: 23_runs_that_survive.html#a-file-that-attacks
    """
    with reraise_as(f"{path} can't be used"):
        model, tokenizer = load(path)
        state = json.loads((path / "trainer.json").read_text("utf-8"))
        state["optimizers"] = []
        for file in sorted(path.glob("optimizer-*.safetensors")):
            saved: dict[int, Any] = defaultdict(dict)
            for key, value in load_file(file).items():
                parameter, name = key.split(".")
                saved[int(parameter)][name] = value.clone()  # out of the file
            state["optimizers"].append({"state": saved})
    return model, tokenizer, state


def restore(trainer: Trainer, state: dict[str, Any], path: Path) -> None:
    """Bring a trainer, which has the model of a checkpoint, to its moment.

    Raises ValueError where the rest of the state is not that of this model.

    Book: 23_runs_that_survive.html#a-file-that-attacks
    """
    with reraise_as(f"{path} can't be used"):
        pairs = zip(trainer.optimizers, state["optimizers"], strict=True)
        for optimizer, saved in pairs:
            ours = [p.shape for g in optimizer.param_groups for p in g["params"]]
            for number, moments in saved["state"].items():
                for name, moment in moments.items():
                    shape = () if name == "step" else ours[number]
                    if moment.shape != shape:
                        raise ValueError(f"{name} of parameter {number} is not {shape}")
        model = dict(trainer.model.named_parameters())
        trainer.load_state_dict({**state, "model": model})


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Note the first Ctrl-C, SIGTERM or SIGHUP in a list; the second interrupts.

    A signal that is ignored, as SIGHUP is under nohup, stays ignored.

    Book: 23_runs_that_survive.html#leaving-politely
    """
    caught: list[int] = []
    before: dict[int, Any] = {}

    def put_back() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, frame: Any) -> None:
        put_back()
        caught.append(number)

    if threading.current_thread() is threading.main_thread():  # no other may
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            if number and signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.getsignal(number)
                signal.signal(number, note)
    try:
        yield caught
    finally:
        put_back()


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold a folder for one process, however that ends.

    Raises FileExistsError where another one has it.

    Book: 23_runs_that_survive.html#one-run-in-a-folder
    """
    from filelock import FileLock, Timeout  # here: `import glassgpt` stays quick

    directory.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(directory / ".lock", timeout=0):
            yield
    except Timeout:
        raise FileExistsError(f"another process is training in {directory}") from None


Settings = TypeVar("Settings", TrainConfig, Machine, Saving)


def _changed(settings: Settings, **values: Any) -> Settings:
    """The same settings but for those values that are not None."""
    given = {name: value for name, value in values.items() if value is not None}
    return replace(settings, **given)


def _machine_here(
    before: Machine, device: str | None, precision: str | None
) -> Machine:
    """The machine to go on with, also where the device of before does not exist.

    Raises ValueError for a device that was asked for and does not exist.
    """
    try:
        chosen = pick_device(device or before.device)
    except ValueError:
        if device:
            raise
        chosen = pick_device()
    if precision is None and not before.device.startswith(chosen.type):
        precision = pick_precision(chosen)
    return _changed(before, device=str(chosen), precision=precision)


def _write_run(run: Run, data: TokenData) -> None:
    """Write run.json, which makes a folder a run."""
    place = data.directory.resolve()
    own = place == run.directory.resolve() / "data"  # its own moves with it
    content = asdict(run.plan) | {"saving": asdict(run.saving)}
    content |= {"data": "data" if own else str(place), "fingerprint": data.fingerprint}
    write_json(run.directory / "run.json", content)


@dataclass
class _RunFile:
    """What run.json says."""

    training: TrainConfig
    machine: Machine
    saving: Saving
    data: Path
    fingerprint: str


def _read_run(directory: Path) -> _RunFile:
    """The content of run.json. Raises ValueError for a damaged one."""
    path = directory / "run.json"
    with reraise_as(f"{path} is damaged, start a new run"):
        content = json.loads(path.read_text("utf-8"))
        has_muon = "matrix_learning_rate" in content["training"]
        return _RunFile(
            training=(MuonConfig if has_muon else TrainConfig)(**content["training"]),
            machine=Machine(**content["machine"]),
            saving=Saving(**content["saving"]),
            data=directory / content["data"],
            fingerprint=content["fingerprint"],
        )


def _find_tokens(place: Path, fingerprint: str) -> TokenData:
    """The tokens of a run. Raises ValueError for others, by their fingerprint."""
    if not place.exists():
        raise FileNotFoundError(
            f"{place}, the tokens of this run, is gone: say where it is now as data"
        )
    data = TokenData.open(place)
    if data.fingerprint != fingerprint:
        raise ValueError(f"{place} holds other tokens than those of this run")
    return data


OnRecord = Callable[[dict[str, float]], None]
MakeTrainer = Callable[[Plan, TokenData, GPT | None], Trainer]


def _write_best(run: Run) -> None:
    """Write the model of this moment as that of the run; every rank must call."""
    model = run.trainer.whole_model()
    if rank_here() == 0:
        write_model(run.directory, model, run.tokenizer)


def _write_record(run: Run, on_record: OnRecord | None) -> None:
    """Write all records, and the model, if its last record is the best."""
    records = run.trainer.records
    if rank_here() == 0:
        lines = [json.dumps(record) + "\n" for record in records]
        write_file(run.directory / "metrics.jsonl", "".join(lines).encode())
    *earlier, last = [record["validation_loss"] for record in records]
    best_before = min(earlier, default=math.inf)
    if largest_of_all(1 if last < best_before else 0) > 0:
        _write_best(run)
    if on_record and rank_here() == 0:
        on_record(records[-1])


def _go_on(run: Run, on_record: OnRecord | None, progress: bool) -> Run:
    """Train in a folder that is ours until the end or a signal."""
    end = run.plan.training.steps

    try:
        with stop_signals() as caught:

            def after_step(trainer: Trainer) -> bool:
                step = trainer.step
                if trainer.records and trainer.records[-1]["step"] == step:
                    _write_record(run, on_record)
                caught_here = caught[0] if caught else 0
                caught_anywhere = largest_of_all(caught_here)
                if step < end:
                    run.stopped_by = caught_anywhere
                stops = run.stopped_by > 0
                if stops or step == end or step % run.saving.checkpoint_every == 0:
                    write_checkpoint(run)
                return stops

            train(run.trainer, after_step, progress and rank_here() == 0)
    except FloatingPointError as error:
        raise FloatingPointError(
            f"{error}, and resume the run in {run.directory}"
        ) from error
    if not run.trainer.records:  # stopped early
        _write_best(run)
    return run


def refuse_occupied(directory: Path) -> None:
    """Raise FileExistsError for a folder with anything in it but tokens.

    What a start leaves that was killed before its run.json is none of it.

    Book: 23_runs_that_survive.html#one-run-in-a-folder
    """
    if (directory / "run.json").exists():
        raise FileExistsError(
            f"{directory} holds a run: resume it, or name another folder"
        )
    for name in sorted(path.name for path in directory.glob("[!.]*")):
        if not re.fullmatch(r"data|checkpoint-00000000|.*\.partial", name):
            raise FileExistsError(
                f"{directory} is not empty, {name} is in it: choose another folder"
            )


def _on_disk(data: TokenData, folder: Path, tokenizer: Tokenizer) -> TokenData:
    """Data in files, which are written now if there are none."""
    if data.directory:
        return data
    parts = {split: getattr(data, split) for split in SPLITS}
    if any(type(part) is not Tokens for part in parts.values()):
        raise TypeError("a run keeps its tokens: train on a stream with a Trainer")
    if not folder.exists():  # else a start was killed after it
        splits = {split: [(part.ids, part.characters)] for split, part in parts.items()}
        return write_tokens(folder, splits, tokenizer)
    found = TokenData.open(folder)
    if any(not np.array_equal(getattr(found, k).ids, v.ids) for k, v in parts.items()):
        raise FileExistsError(f"{folder} holds other tokens: choose another folder")
    return found


def start_run(
    directory: str | Path,
    plan: Plan,
    data: TokenData,
    tokenizer: Tokenizer,
    model: GPT | None = None,
    checkpoint_every: int = Saving.checkpoint_every,
    keep: int = Saving.keep,
    on_record: OnRecord | None = None,
    progress: bool = True,
    make_trainer: MakeTrainer = Plan.trainer,
) -> Run:
    """Train by a plan in a new folder, which `resume_run` and `load` can read.

    model: one to go on from instead of a new one. keep: how many checkpoints stay.
    on_record: called with each evaluation. make_trainer: that of many processes
    (chapter 25). The folder has the best model, run.json, metrics.jsonl and the
    checkpoints. Ctrl-C, SIGTERM or SIGHUP finishes the step, writes a checkpoint and
    returns. Raises FileExistsError for a folder in use or not empty, TypeError or
    ValueError for what doesn't fit together, FloatingPointError, and OSError where the
    disk is full.

    Book: 23_runs_that_survive.html#one-run-in-a-folder
    """
    directory, saving = Path(directory), Saving(checkpoint_every, keep)
    refuse_occupied(directory)
    check_fit(meta_model(plan.model), data)  # takes no memory
    if tokenizer.vocab_size != data.vocab_size:
        raise ValueError(
            f"the data has {data.vocab_size} token ids and the tokenizer "
            f"{tokenizer.vocab_size}: it is not the one that made them"
        )
    if model is not None and model.config != plan.model:
        raise ValueError(f"the model has {model.config}, the plan {plan.model}")
    run = Run(directory, make_trainer(plan, data, model), tokenizer, plan, saving)
    with locked(directory) if rank_here() == 0 else nullcontext():
        if rank_here() == 0:
            refuse_occupied(directory)  # again, now that it is ours
            data = _on_disk(data, directory / "data", tokenizer)
        write_checkpoint(run)
        if rank_here() == 0:
            _write_run(run, data)  # now there is a run
        return _go_on(run, on_record, progress)


def _read_newest(
    directory: Path,
) -> tuple[Path, tuple[GPT, Tokenizer, dict[str, Any]], list[Path]]:
    """The newest checkpoint that can be read, what is in it, and those passed over.

    Raises FileNotFoundError where there is none, OSError where the disk can't be read.
    """
    damaged: list[Path] = []
    for checkpoint in reversed(checkpoints_in(directory)):
        try:
            return checkpoint, read_checkpoint(checkpoint), damaged
        except ValueError:
            damaged.append(checkpoint)
    raise FileNotFoundError(
        f"{directory} has no checkpoint that can be read: start a new run"
    )


def _set_aside(checkpoint: Path) -> None:
    """Give a damaged checkpoint another name; its files stay as they are."""
    aside = checkpoint.with_suffix(".damaged")
    while aside.exists():  # an earlier one of the same step
        aside = aside.with_name(f"{aside.name}.damaged")
    checkpoint.rename(aside)


def resume_run(
    directory: str | Path,
    data: str | Path | None = None,
    on_record: OnRecord | None = None,
    progress: bool = True,
    say: Callable[[str], None] = print,
    make_trainer: MakeTrainer = Plan.trainer,
    *,
    steps: int | None = None,
    learning_rate: float | None = None,
    matrix_learning_rate: float | None = None,
    accumulate: int | None = None,
    evaluate_every: int | None = None,
    checkpoint_every: int | None = None,
    keep: int | None = None,
    device: str | None = None,
    precision: str | None = None,
    compile: str | None = None,
    recompute: bool | None = None,
) -> Run:
    """Go on with the run in a folder; its bits are those of a run never stopped.

    data: where its tokens are now, if they moved. say: called with a line that says
    what is different. steps, to extend the run, and all after it: None for as before.
    A checkpoint that can't be read is passed over: the one before leads to the same
    bits, if no setting has changed since. Raises FileNotFoundError where there is no
    run, or no checkpoint that can be read, ValueError for a damaged run.json, other
    tokens or an impossible change, and what `start_run` raises.

    Book: 23_runs_that_survive.html#one-run-in-a-folder
    """
    directory = Path(directory)
    if not (directory / "run.json").exists():
        raise FileNotFoundError(f"{directory} holds no run: run.json is missing")
    with locked(directory) if rank_here() == 0 else nullcontext():
        before = _read_run(directory)
        training = _changed(
            before.training,
            steps=steps,
            learning_rate=learning_rate,
            accumulate=accumulate,
            evaluate_every=evaluate_every,
        )
        if matrix_learning_rate is not None:
            if not isinstance(training, MuonConfig):
                raise ValueError("a run with AdamW has no matrix_learning_rate")
            training = replace(training, matrix_learning_rate=matrix_learning_rate)
        machine = _machine_here(before.machine, device, precision)
        machine = _changed(machine, compile=compile, recompute=recompute)
        saving = _changed(before.saving, checkpoint_every=checkpoint_every, keep=keep)
        tokens = _find_tokens(Path(data or before.data), before.fingerprint)
        checkpoint, contents, damaged = _read_newest(directory)
        model, tokenizer, state = contents
        plan = Plan(model.config, training, machine)
        trainer = make_trainer(plan, tokens, model)
        restore(trainer, state, checkpoint)
        if trainer.step > training.steps:
            raise ValueError(
                f"steps can't be {training.steps}: {trainer.step} are done"
            )
        if largest_of_all(trainer.step) > trainer.step:
            raise ValueError(f"another rank has a newer checkpoint of {directory}")
        run = Run(directory, trainer, tokenizer, plan, saving)
        if rank_here() == 0:  # by now every rank has read
            for path in damaged:
                _set_aside(path)
            _write_run(run, tokens)
            notes = [f"going on from {checkpoint.name}"]
            if trainer.step == training.steps:
                notes.append("all steps are done: more of them go on")
            notes += [f"{path.name} can't be read" for path in damaged]
            old = asdict(before.training) | asdict(before.machine)
            old |= asdict(before.saving)
            new = asdict(training) | asdict(machine) | asdict(saving)
            for name, value in new.items():
                if value != old[name]:
                    notes.append(f"{name} {value} (was {old[name]})")
            say("; ".join(notes))
        return _go_on(run, on_record, progress)
