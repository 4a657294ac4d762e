# Written by tools/tangle.py from book/23_runs_that_survive.ipynb: change it there.


"""Checks of files, models and runs that have to survive; they name the mistake."""

import builtins
import errno
import io
import json
import math
import os
import pickle
import signal
import sys
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread
from typing import Any
from unittest.mock import Mock, patch

import torch
from torch import nn

from glassgpt.data import SPLITS, TokenData, write_tokens
from glassgpt.gpt import GPT, GPTConfig
from glassgpt.modern import MuonConfig
from glassgpt.plan import Machine, Plan
from glassgpt.tokens import CharTokenizer
from glassgpt.training import TrainConfig, Trainer

_NEW = bytes(range(256)) * 800  # no text, and too long for `_small_files`


def _watched_write(
    write: Callable[[Path, bytes], Any], path: Path, content: bytes
) -> list[Any]:
    """The calls of a write that matter, in order: what was flushed or renamed."""
    calls: list[Any] = []

    def seen(place: Any) -> tuple[int, int]:
        """Which file or folder it is, and its size."""
        there = path.exists() and path.read_bytes() == b"old"
        assert there or any(isinstance(call, str) for call in calls), (
            "the old content was gone before the new one was complete"
        )
        return os.stat(place).st_ino, os.stat(place).st_size

    def flush(number: int) -> None:
        calls.append(seen(number))
        fsync(number)

    def renaming(function: Callable) -> Callable:
        def call(source: Any, *arguments: Any, **options: Any) -> None:
            assert Path(source) != path, (
                "for a moment the name belongs to no file: rename over the old one"
            )
            assert seen(source) in calls, (
                "renamed before all of it was flushed by os.fsync: after a power cut "
                "the file can be empty"
            )
            assert os.path.samefile(Path(source).parent, path.parent), (
                "the other name is in another folder: no rename leads to another disk"
            )
            calls.append(Path(source).name)
            function(source, *arguments, **options)

        return call

    fsync = os.fsync
    with (
        patch.object(os, "fsync", flush),
        patch.object(os, "replace", renaming(os.replace)),
        patch.object(os, "rename", renaming(os.rename)),
    ):
        write(path, content)
    return calls


@contextmanager
def _small_files() -> Iterator[None]:
    """No file grows beyond 100 kB, as if the disk were full then; not on Windows."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def check_whole_file(write: Callable[[Path, bytes], Any]) -> None:
    """A file is written under another name, flushed, and renamed: all or nothing.

    write: called as write(path, content) with bytes.

    Book: 23_runs_that_survive.html#write-flush-rename
    """
    full = OSError(errno.ENOSPC, "No space left on device")
    with TemporaryDirectory() as place:
        partial = []
        for name, new in (("note.json", b"{}"), ("note.txt", _NEW)):
            path = Path(place, name)
            path.write_bytes(b"old")
            calls = _watched_write(write, path, new)
            found = path.read_bytes()
            assert found == new, "the new content does not stand in the file"
            names = [call for call in calls if isinstance(call, str)]
            assert names, "written in place: a kill in the middle leaves half a file"
            flushed = [call[0] for call in calls[calls.index(names[-1]) + 1 :]]
            partial += names
            assert os.name != "posix" or os.stat(place).st_ino in flushed, (
                "the folder was not flushed: after a power cut the old name can be back"
            )
        assert len({*partial}) > 1, "two files of a folder share one other name"
        for name in partial:
            Path(place, name).write_bytes(b"half of it")
        path.write_bytes(b"old")
        with suppress(FileExistsError):
            write(path, _NEW)
        assert path.read_bytes() == _NEW, (
            "what a kill left under the other name is in the way of the next write"
        )
        for name in (*partial, "note.json"):
            Path(place, name).unlink(missing_ok=True)
        path.unlink()
        write(path, _NEW)  # where no file was
        assert path.read_bytes() == _NEW, "a file that is new is not written"
        disks: list[Any] = [_small_files()] if find_spec("resource") else []
        for names in (["fsync"], ["replace", "rename"]):
            fails = dict.fromkeys(names, Mock(side_effect=full))
            disks.append(patch.multiple(os, **fails))
        for full_disk in disks:
            path.write_bytes(b"old")
            try:
                with full_disk:
                    write(path, _NEW)
            except OSError:
                pass
            else:
                raise AssertionError("a full disk was not reported")
            assert path.read_bytes() == b"old", "a full disk cost the old content"
            left = os.listdir(place)
            assert left == ["note.txt"], f"a full disk left something behind: {left}"


def check_round_trip(pair: tuple[Callable[..., Any], Callable[..., Any]]) -> None:
    """What is saved and loaded is the same function, bit for bit, and draws nothing.

    pair: called as save(directory, model, tokenizer) and load(directory).

    Book: 23_runs_that_survive.html#a-model-on-disk
    """
    save, load = pair
    tokenizer = CharTokenizer("abcde")
    ids = torch.tensor([[0, 1, 2, 3, 4, 0, 2, 4]])
    for tied in (True, False):
        with torch.random.fork_rng([]), TemporaryDirectory() as place:
            torch.manual_seed(0)
            config = GPTConfig(5, 8, 1, heads=2, width=4, dropout=0.1, tied=tied)
            model = GPT(config).eval()
            for parameter in model.parameters():
                nn.init.normal_(parameter)
            wanted = model(ids)
            before = torch.get_rng_state()
            save(place, model.train(), tokenizer)
            on = all(part.training for part in model.modules())
            assert on, "saving switched dropout off: a run that saves goes on"
            learns = all(parameter.requires_grad for parameter in model.parameters())
            assert learns, "saving froze the model: a run that saves goes on"
            model.eval()
            again, same_tokenizer = load(place)
            assert torch.equal(torch.get_rng_state(), before), (
                "random numbers were drawn or seeded: neither saving nor loading may"
            )
            learns = all(parameter.requires_grad for parameter in again.parameters())
            assert learns, "the model that was loaded can't learn: it is frozen"
            assert not again.training, "dropout is on: call eval()"
            assert again.config == config, f"{again.config} in place of {config}"
            assert (again.head.weight is again.tokens.weight) == tied, (
                "table and head have to share one tensor, or not, as before"
            )
            gap = (again(ids) - wanted).abs().max()
            assert gap < 0.1, "another function: a matrix was not transposed back?"
            assert gap == 0, f"logits differ by {gap:.1g}: something was rounded"
            assert torch.equal(model(ids), wanted), "saving changed the model"
            assert same_tokenizer.encode("edcba") == [4, 3, 2, 1, 0], "other tokens"


def check_stop(stop_signals: Callable[[], Any]) -> None:
    """The first signal is noted, the second acts; what is ignored stays ignored.

    stop_signals: called without arguments, a context that gives a list of numbers.

    Book: 23_runs_that_survive.html#leaving-politely
    """
    acted: list[int] = []
    numbers = [signal.SIGINT, signal.SIGTERM]
    numbers += [signal.SIGHUP] if hasattr(signal, "SIGHUP") else []
    outside = {n: signal.signal(n, lambda n, frame: acted.append(n)) for n in numbers}
    try:
        handlers = [signal.getsignal(n) for n in numbers]
        for number, second in product(numbers, numbers):
            name, other = (signal.Signals(n).name for n in (number, second))
            with stop_signals() as caught:
                signal.raise_signal(number)
                assert acted == [], f"{name} acted at once: note it only"
                assert list(caught) == [number], f"{name} was not noted by its number"
                signal.raise_signal(second)
                assert acted == [second], (
                    f"{name}, then {other}: the second has to act as before"
                )
            acted.clear()
        for error in (None, ZeroDivisionError):
            with suppress(ZeroDivisionError), stop_signals():
                if error:
                    raise error
            assert handlers == [signal.getsignal(n) for n in numbers], (
                "the handlers of before are not back" + " after an error" * bool(error)
            )
        for number in numbers:
            handler = signal.signal(number, signal.SIG_IGN)
            free = next(n for n in numbers if n != number)
            with stop_signals() as caught:
                signal.raise_signal(number)
                assert not caught, (
                    "an ignored signal, as SIGHUP is under nohup, stopped the run"
                )
                signal.raise_signal(free)
            name, noted = (signal.Signals(n).name for n in (number, free))
            assert list(caught) == [free], (
                f"where {name} is ignored, {noted} has to be noted all the same"
            )
            signal.signal(number, handler)
        refused: list[ValueError] = []

        def in_a_thread() -> None:
            try:
                with stop_signals():
                    pass
            except ValueError as error:
                refused.append(error)

        thread = Thread(target=in_a_thread)
        thread.start()
        thread.join()
        assert not refused, f"in a thread: {refused[0]}; there, set no handlers"
    finally:
        for number, handler in outside.items():
            signal.signal(number, handler)


class _PowerCut(Exception):
    """Ends a run after an evaluation."""


def _after_cuts(
    pair: tuple[Callable, Callable],
    ids: list[int],
    dropout: float,
    muon: bool,
    cuts: tuple[int, ...] = (),
) -> tuple[torch.Tensor, list[dict[str, float]], list[int], list[list[int]]]:
    """Of a run that is cut off and resumed, and resumed once more when it is done:
    weights, records, steps in metrics.jsonl, steps of each life.
    """
    start, resume = pair
    data, tokenizer = TokenData.of(ids, ids, vocab_size=5), CharTokenizer("abcde")
    model = GPTConfig(5, context=4, layers=1, heads=1, width=8, dropout=dropout)
    training = (MuonConfig if muon else TrainConfig)(
        steps=8, warmup=2, batch_size=2, evaluate_every=2, evaluation_crops=2
    )
    plan = Plan(model, training, Machine(), math.nan)
    lives: list[list[int]] = []
    ends, take_step = iter((*cuts, 0)), Trainer.take_step

    def counted(trainer: Trainer) -> None:
        lives[-1].append(trainer.step)
        take_step(trainer)

    def live(function: Callable, *arguments: Any, **options: Any) -> Any:
        lives.append([])
        end = next(ends, 0)

        def power_cut(record: dict[str, float]) -> None:
            if record["step"] == end:
                raise _PowerCut

        with suppress(_PowerCut), patch.object(Trainer, "take_step", counted):
            options |= {"on_record": power_cut, "progress": False}
            return function(*arguments, **options)

    with TemporaryDirectory() as place, torch.random.fork_rng([]):
        home, quiet = Path(place, "run"), {"say": lambda line: None}
        run = live(start, home, plan, data, tokenizer, checkpoint_every=3)
        for _ in cuts:
            torch.manual_seed(9)
            run = live(resume, home, **quiet)
        live(resume, home, home / "data", **quiet)  # nothing is left to do
        lines = (home / "metrics.jsonl").read_text().splitlines()
        written = [json.loads(line)["step"] for line in lines]
        other = [([*ids[:-1], (ids[-1] + 1) % 5], len(ids))]
        write_tokens(Path(place, "other"), dict.fromkeys(SPLITS, other), tokenizer)
        with suppress(ValueError):
            live(resume, home, Path(place, "other"), **quiet)
            raise AssertionError("one other token was not noticed: compare the data")
    weights = nn.utils.parameters_to_vector(run.trainer.model.parameters()).detach()
    return weights, run.trainer.records, written, lives


def check_resume(pair: tuple[Callable[..., Any], Callable[..., Any]]) -> None:
    """A run that was cut off and resumed ends with the same weights, bit for bit.

    pair: called like `start_run` and `resume_run`.

    Book: 23_runs_that_survive.html#killed-and-resumed
    """
    one_crop, text = list(range(5)), [n * n % 5 for n in range(60)]
    state = "the optimizer's moments or the schedule were not restored"
    cases = [
        (one_crop, 0.0, False, state),
        (one_crop, 0.0, True, state),
        (text, 0.0, False, "the batches after resuming are others: count its steps"),
        (text, 0.5, False, "dropout after resuming is another: seed it by the step"),
    ]
    for *case, mistake in cases:
        resumed, found, written, lives = _after_cuts(pair, *case, cuts=(4, 8))
        again = lives[1]
        assert again[:1] == [3], f"after the cut it took steps {again}, not 3 to 7"
        assert lives[2][:1] == [6], "the resumed run wrote no checkpoint at step 6"
        assert not lives[3], "a run that was done trained again: save at its end, too"
        whole, records, *_ = _after_cuts(pair, *case)
        gap = (whole - resumed).abs().max()
        assert gap < 1, "the weights of the checkpoint were not restored"
        steps, due = ([line["step"] for line in lines] for lines in (found, records))
        assert steps == due, f"the resumed run recorded steps {steps}, not {due}"
        assert written == due, f"metrics.jsonl has steps {written}, not {due}"
        assert torch.equal(whole, resumed), mistake
        losses, due = ([r["train_loss"] for r in lines] for lines in (found, records))
        assert losses == due, "the losses since the last record were forgotten"


def check_interval(interval: Callable[[float, float], float]) -> None:
    """Checkpoints come as often as makes their cost and the lost work least.

    interval: called as interval(cost, mean_time), all in seconds.

    Book: 23_runs_that_survive.html#exercise-1-how-often
    """
    cases = ((2.0, 86_400.0), (30.0, 3_600.0), (0.5, 10_000.0), (300.0, 3_600.0))
    for cost, mean_time in cases:
        found = interval(cost, mean_time)
        assert found is not None, "nothing came back"
        due = math.sqrt(2 * cost * mean_time)

        def lost(seconds: float, cost: float = cost, mean: float = mean_time) -> float:
            return cost / seconds + seconds / (2 * mean)

        assert not math.isclose(found, due / math.sqrt(2), rel_tol=1e-6), (
            "half an interval is lost on average, not a whole one"
        )
        assert math.isclose(found, due, rel_tol=0.01), (
            f"every {found:.4g} s loses {lost(found):.2%} of the time, "
            f"every {due:.4g} s {lost(due):.2%}"
        )


class Walk:
    """A process with four kinds of state: place, momentum, dice and a deck of cards.

    Book: 23_runs_that_survive.html#exercise-2-everything-that-a-step-changes
    """

    def __init__(self, seed: int):
        self.place, self.momentum, self.deck = 0.0, 0.0, []
        self.dice = torch.Generator().manual_seed(seed)

    def step(self) -> None:
        """Take a card from the deck, which is shuffled when it is empty, and move."""
        if not self.deck:
            self.deck = torch.randperm(5, generator=self.dice).tolist()
        noise = torch.rand((), generator=self.dice).item()
        self.momentum = 0.9 * self.momentum + self.deck.pop() - 2 + noise
        self.place += self.momentum


def check_state(pair: tuple[Callable[[Any], Any], Callable[[Any, Any], Any]]) -> None:
    """A walk that was put away and taken out again goes on as if nothing had been.

    pair: called as state_of(walk), which may return any object, and as
    go_back(walk, state) with another walk, more than once with one state.

    Book: 23_runs_that_survive.html#exercise-2-everything-that-a-step-changes
    """
    state_of, go_back = pair
    for steps in (0, 3, 5, 7):
        whole, other = Walk(seed=1), Walk(seed=2)
        other.step()
        for _ in range(steps):
            whole.step()
        names = ("place", "momentum", "deck")
        due = [getattr(whole, name) for name in names]
        due[2], dice = list(due[2]), whole.dice.get_state()
        state = state_of(whole)
        state_of(Walk(seed=3))  # another's state must not take its place
        after = [getattr(whole, name) for name in names]
        assert after == due, "putting the walk away changed it: only look"
        same = torch.equal(whole.dice.get_state(), dice)
        assert same, "putting the walk away moved its dice: only look"
        for _ in range(6):
            whole.step()  # what was put away must not change with it
        for time in ("first", "second"):  # the state must not change either
            go_back(other, state)
            for name, value in zip(names, due, strict=True):
                found = getattr(other, name)
                assert found == value, (
                    f"after {steps} steps, taken out for the {time} time: {name} is "
                    f"{found}, not {value}"
                )
            assert torch.equal(other.dice.get_state(), dice), (
                "the dice were not put back: their next draws differ"
            )
            for _ in range(6):
                other.step()
            assert other.place == whole.place, "it went another way"


def check_names(names_in: Callable[[bytes], set[str]]) -> None:
    """Everything that a pickle would look up is found, and nothing of it is run.

    names_in: of the bytes of a pickle, as a set of texts like "os mkdir".

    Book: 23_runs_that_survive.html#exercise-3-what-a-pickle-asks-for
    """

    class Bomb:
        def __reduce__(self) -> tuple:
            return builtins.exec, ("import glassgpt; glassgpt.bomb = True",)

    class Armed:
        fired = False

        def __init__(self, *arguments: Any):
            Armed.fired = True

    class Outside(pickle.Pickler):
        def persistent_id(self, value: Any) -> str | None:
            return "0" if value is Outside else None

    import glassgpt

    plain = [1, "os mkdir", 2.5]
    several = [OrderedDict(a=1), deque([1]), Counter("a")]
    for protocol in (0, 2, 3, 4, 5):
        found = names_in(pickle.dumps(Bomb(), protocol))
        run = vars(glassgpt).pop("bomb", False)
        assert not run, "the pickle was run: look up nothing that it names"
        assert isinstance(found, (set, frozenset)), f"{found} is no set"
        assert any(name.endswith(" exec") for name in found), (
            f"protocol {protocol}: 'MODULE exec' is not among {found}"
        )
        found = names_in(pickle.dumps(plain, protocol))
        assert found == set(), (
            f"protocol {protocol}: plain values name nothing: {found}"
        )
        box = io.BytesIO()
        Outside(box, protocol).dump([Outside, *several])
        try:
            found = names_in(box.getvalue())
        except pickle.UnpicklingError as error:
            raise AssertionError(
                "a pickle of torch.save can't be read: it refers to tensors outside, "
                "for which persistent_load may return anything"
            ) from error
        wanted = {f"collections {kind.__name__}" for kind in map(type, several)}
        assert found == wanted, f"protocol {protocol}: {found} in place of {wanted}"
    found = names_in(b"\x80\x04\x8c\x02os\x8c\x06system\x8c\x01x0\x93.")
    assert found == {"os system"}, f"{found} in place of os system: read as pickle does"
    with patch.object(builtins, "open") as opened:
        names_in(b"c__builtin__\nopen\n(S'new.txt'\nS'w'\ntR.")
    assert not opened.called, "what is named was called: hand out something harmless"
    with patch.object(glassgpt, "Armed", Armed, create=True):
        names_in(b"cglassgpt\nArmed\n(tR.")
    assert not Armed.fired, "a class that is named was called: it can do harm, too"
    found = names_in(b"(S'x'\nios\nsystem\n.")
    assert found == {"os system"}, f"{found}: the opcode INST looks a name up, too"
    finder = Mock(**{"find_spec.return_value": None})  # asked at every import
    finders = patch.object(sys, "meta_path", [finder, *sys.meta_path])
    with finders, suppress(ImportError):
        names_in(b"cbomb\nfuse\n.")
        names_in(b"c__builtin__\n__import__\n(S'bomb'\ntR.")
    assert all(call.args[0] != "bomb" for call in finder.find_spec.call_args_list), (
        "a module that is named was imported, which runs its code: only note the name"
    )
