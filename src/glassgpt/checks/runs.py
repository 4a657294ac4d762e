# Written by tools/tangle.py from book/23_runs_that_survive.ipynb: change it there.


"""Checks of files, models and runs that have to survive; they name the mistake."""

import builtins
import errno
import math
import os
import pickle
import signal
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from glassgpt.data import TokenData
from glassgpt.gpt import GPT, GPTConfig
from glassgpt.modern import MuonConfig
from glassgpt.plan import Machine, Plan
from glassgpt.tokens import CharTokenizer
from glassgpt.training import Trainer


def check_whole_file(write: Callable[[Path, bytes], Any]) -> None:
    """A file is written under another name, flushed, and renamed: all or nothing.

    write: called as write(path, content) with bytes.

    Book: 23_runs_that_survive.html#write-flush-rename
    """
    new = bytes(range(256)) * 800
    flushed: list[tuple[int, int]] = []  # which file or folder, and its size then
    renamed: list[str] = []
    fsync, replace = os.fsync, os.replace

    def note_flush(number: int) -> None:
        about = os.fstat(number)
        flushed.append((about.st_ino, about.st_size))
        fsync(number)

    def note_rename(source: Any, target: Any) -> None:
        about = os.stat(source)
        assert path.read_bytes() == b"old", "the old content was gone too early"
        assert (about.st_ino, about.st_size) in flushed, (
            "renamed before all of it was flushed by os.fsync: after a power cut "
            "the file can be empty"
        )
        renamed.append(str(source))
        flushed.clear()
        replace(source, target)

    with TemporaryDirectory() as place:
        path = Path(place, "note.txt")
        path.write_bytes(b"old")
        noting = {"fsync": note_flush, "replace": note_rename, "rename": note_rename}
        with patch.multiple(os, **noting):
            write(path, new)
        assert path.read_bytes() == new, "the new content does not stand in the file"
        assert renamed, "written in place: a kill in the middle leaves half a file"
        folders = [number for number, _ in flushed]
        assert os.stat(place).st_ino in folders or os.name != "posix", (
            "the folder was not flushed: after a power cut the old name can be back"
        )
        path.write_bytes(b"old")
        full = OSError(errno.ENOSPC, "No space left on device")
        with suppress(OSError), patch.object(os, "fsync", side_effect=full):
            write(path, new)
        assert path.read_bytes() == b"old", "a full disk cost the old content"
        left = os.listdir(place)
        assert left == ["note.txt"], f"a full disk left something behind: {left}"


def check_round_trip(pair: tuple[Callable[..., Any], Callable[..., Any]]) -> None:
    """What is saved and loaded is the same function, bit for bit, and draws nothing.

    pair: called as save(directory, model, tokenizer) and load(directory).

    Book: 23_runs_that_survive.html#a-model-on-disk
    """
    save, load = pair
    ids = torch.tensor([[0, 1, 2, 3, 4, 0, 2, 4]])
    for tied in (True, False):
        with torch.random.fork_rng([]), TemporaryDirectory() as place:
            torch.manual_seed(0)
            config = GPTConfig(5, 8, 1, heads=2, width=4, dropout=0.1, tied=tied)
            model = GPT(config).eval()
            for parameter in model.parameters():
                nn.init.normal_(parameter)
            wanted, before = model(ids), torch.get_rng_state()
            save(place, model.train(), CharTokenizer("abcde"))
            again, tokenizer = load(place)
            assert torch.equal(torch.get_rng_state(), before), (
                "random numbers were drawn or seeded: neither saving nor loading may"
            )
            assert not again.training, "dropout is on: call eval()"
            assert (again.head.weight is again.tokens.weight) == tied, (
                "table and head have to share one tensor, or not, as before"
            )
            gap = (again(ids) - wanted).abs().max()
            assert gap == 0, f"logits differ by {gap:.1g}: something was rounded"
            assert tokenizer.encode("edcba") == [4, 3, 2, 1, 0], "other tokens"


def check_stop(stop_signals: Callable[[], Any]) -> None:
    """The first signal is noted, the second acts; what is ignored stays ignored.

    stop_signals: called without arguments, a context that gives a list of numbers.

    Book: 23_runs_that_survive.html#leaving-politely
    """
    acted: list[int] = []
    names = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    usual = {number: signal.getsignal(number) for number in numbers}

    def handler(number: int, frame: Any) -> None:
        acted.append(number)

    try:
        signal.signal(signal.SIGTERM, handler)
        with stop_signals() as caught:
            signal.raise_signal(signal.SIGTERM)
            assert acted == [], "SIGTERM acted at once: note it only"
            assert list(caught) == [signal.SIGTERM], "it was not noted by its number"
            signal.raise_signal(signal.SIGTERM)
            assert acted == [signal.SIGTERM], "the second has to act as before"
        with suppress(ZeroDivisionError), stop_signals():
            raise ZeroDivisionError
        assert signal.getsignal(signal.SIGTERM) is handler, (
            "the handler of before is not back after an error"
        )
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        with stop_signals() as caught:
            signal.raise_signal(signal.SIGTERM)
        assert not caught, (
            "an ignored signal, as SIGHUP is under nohup, stopped the run"
        )
    finally:  # also those that a wrong stop_signals has kept: Ctrl-C is one
        for number, before in usual.items():
            signal.signal(number, before)


class _PowerCut(Exception):
    """Ends a run after an evaluation."""


def _run_with_cuts(
    pair: tuple[Callable, Callable], plan: Plan, cuts: list[int]
) -> tuple[Any, list[int]]:
    """A run that is cut off after these steps and resumed, at last to its end.

    Returned: the run, and the first step of each life.
    """
    start, resume = pair
    ids = [number * number % 5 for number in range(60)]
    data, tokenizer = TokenData.of(ids, ids, vocab_size=5), CharTokenizer("abcde")
    begins: list[int] = []
    with TemporaryDirectory() as place, torch.random.fork_rng([]):
        home = Path(place, "run")
        for end in [*cuts, None]:
            steps: list[int] = []

            def cut(record: dict[str, float], end: int | None = end) -> None:
                if record["step"] == end:
                    raise _PowerCut

            def noted(trainer: Trainer, steps: list = steps, take=Trainer.take_step):
                steps.append(trainer.step)
                take(trainer)

            options: dict[str, Any] = {"on_record": cut, "progress": False}
            torch.manual_seed(len(begins))
            with suppress(_PowerCut), patch.object(Trainer, "take_step", noted):
                if begins:
                    run = resume(home, say=lambda line: None, **options)
                else:
                    options["checkpoint_every"] = 3
                    run = start(home, plan, data, tokenizer, **options)
            begins += steps[:1]
    return run, begins


def check_resume(pair: tuple[Callable[..., Any], Callable[..., Any]]) -> None:
    """A run that was cut off and resumed ends with the same weights, bit for bit.

    pair: called like `start_run` and `resume_run`.

    Book: 23_runs_that_survive.html#killed-and-resumed
    """
    model = GPTConfig(5, context=4, layers=1, heads=1, width=8, dropout=0.5)
    training = MuonConfig(
        steps=8, warmup=2, batch_size=2, evaluate_every=2, evaluation_crops=2
    )
    plan = Plan(model, training, Machine())
    whole, _ = _run_with_cuts(pair, plan, [])
    resumed, begins = _run_with_cuts(pair, plan, [4, 8])
    assert begins == [0, 3, 6], (
        f"its lives begin at steps {begins}, not at 0 and the checkpoints 3 and 6"
    )
    weights = [run.trainer.model.state_dict().values() for run in (whole, resumed)]
    assert all(map(torch.equal, *weights)), (
        "other weights: moments, schedule, batches and dropout have to go on, too"
    )
    losses, found = (
        [record.get("train_loss") for record in run.trainer.records]
        for run in (whole, resumed)
    )
    assert found == losses, "the losses since the last record were forgotten"


def check_interval(interval: Callable[[float, float], float]) -> None:
    """Checkpoints come as often as makes their cost and the lost work least.

    interval: called as interval(cost, mean_time), all in seconds.

    Book: 23_runs_that_survive.html#exercise-1-how-often
    """
    for cost, mean_time in ((2.0, 86_400.0), (0.5, 10_000.0), (300.0, 3_600.0)):
        found, wanted = interval(cost, mean_time), math.sqrt(2 * cost * mean_time)
        assert not math.isclose(found, math.sqrt(cost * mean_time), rel_tol=1e-6), (
            "half an interval is lost on average, not a whole one"
        )
        assert math.isclose(found, wanted, rel_tol=0.01), (
            f"every {found:.4g} s for a cost of {cost:g} and a mean time of "
            f"{mean_time:g}, not every {wanted:.4g} s"
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
        walk, other, untouched = Walk(seed=1), Walk(seed=2), Walk(seed=1)
        for one in (walk, untouched):
            for _ in range(steps):
                one.step()
        before = {"place": walk.place, "momentum": walk.momentum, "deck": [*walk.deck]}
        state = state_of(walk)
        for one in (walk, untouched):
            for _ in range(6):
                one.step()  # what was put away must not change with it
        wanted = untouched.place
        assert walk.place == wanted, "putting the walk away changed it: only look"
        for time in ("first", "second"):  # the state must not change either
            go_back(other, state)
            for name, value in before.items():
                found = getattr(other, name)
                assert found == value, (
                    f"after {steps} steps, taken out for the {time} time: {name} is "
                    f"{found}, not {value}"
                )
            for _ in range(6):
                other.step()
            assert other.place == wanted, "it went another way: and the dice?"


class _Bomb:
    def __reduce__(self) -> tuple:
        return builtins.exec, ("import os; os.environ['GLASSGPT_BOMB'] = '1'",)


def check_names(names_in: Callable[[bytes], set[str]]) -> None:
    """Everything that a pickle would look up is found, and nothing of it is run.

    names_in: of the bytes of a pickle, as a set of texts like "os mkdir".

    Book: 23_runs_that_survive.html#exercise-3-what-a-pickle-asks-for
    """
    for protocol in (0, 2, 3, 4, 5):
        found = names_in(pickle.dumps([_Bomb(), OrderedDict(a=1)], protocol))
        run = os.environ.pop("GLASSGPT_BOMB", None)
        assert not run, "the pickle was run: look up nothing that it names"
        for name in ("exec", "OrderedDict"):
            assert any(one.endswith(f" {name}") for one in found), (
                f"protocol {protocol}: 'MODULE {name}' is not among {found}"
            )
        found = names_in(pickle.dumps([1, "os mkdir", 2.5], protocol))
        assert found == set(), f"protocol {protocol}: plain values name nothing"
