"""Answers to the checks of chapter 23."""

import io
import math
import os
import pickle
import signal
from contextlib import contextmanager

from glassgpt.atomic import flush, write_file
from glassgpt.checkpoints import load, save
from glassgpt.checks.runs import (
    check_interval,
    check_names,
    check_resume,
    check_round_trip,
    check_state,
    check_stop,
    check_whole_file,
)
from glassgpt.runs import resume_run, start_run, stop_signals


def by_rename(path, content):
    partial = path.with_name(path.name + "~")
    try:
        partial.write_bytes(content)
        flush(partial)
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)
    flush(path.parent)


def without_the_folder(path, content):
    partial = path.with_name(path.name + "~")
    partial.write_bytes(content)
    flush(partial)
    os.replace(partial, path)


def start_only(path, content):
    write_file(path, content[:3])


def leaves_its_partial_file(path, content):
    partial = path.with_name(path.name + "~")
    partial.write_bytes(content)
    flush(partial)
    os.replace(partial, path)
    flush(path.parent)


def load_to_train(directory):
    model, tokenizer = load(directory)
    return model.train(), tokenizer


def noting(puts_back_at_first, puts_back_at_end, spares_ignored):
    """A `stop_signals` that may be wrong."""

    @contextmanager
    def stop():
        caught, before = [], {}

        def put_back():
            for number, handler in before.items():
                signal.signal(number, handler)

        def note(number, frame):
            caught.append(number)
            if puts_back_at_first:
                put_back()

        for number in (signal.SIGINT, signal.SIGTERM):
            handler = signal.getsignal(number)
            if handler != signal.SIG_IGN or not spares_ignored:
                before[number] = handler
                signal.signal(number, note)
        try:
            yield caught
        finally:
            if puts_back_at_end:
                put_back()

    return stop


def resume_all_over(directory, **options):
    """Trains on when the run is done, and forgets where it was."""
    record = {"step": 0}
    options["on_record"](record)
    return resume_run(directory, **{**options, "checkpoint_every": 10**6})


def state_of(walk):
    return walk.place, walk.momentum, list(walk.deck), walk.dice.get_state()


def go_back(walk, state):
    walk.place, walk.momentum, deck, dice = state
    walk.deck = list(deck)
    walk.dice.set_state(dice)


def shares_the_deck(walk, state):
    walk.place, walk.momentum, walk.deck, dice = state
    walk.dice.set_state(dice)


def forgets_the_dice(walk, state):
    walk.place, walk.momentum, deck, _ = state
    walk.deck = list(deck)


def state_after_a_step(walk):
    walk.step()
    return state_of(walk)


class Anything:
    def __init__(self, *arguments):
        pass

    def __call__(self, *arguments):
        return self

    __setitem__ = __setstate__ = append = extend = __call__


def names_in(content):
    names = set()

    class Reader(pickle.Unpickler):
        def find_class(self, module, name):
            names.add(f"{module} {name}")
            return Anything

    Reader(io.BytesIO(content)).load()
    return names


RIGHT = {
    check_whole_file: [write_file, by_rename],
    check_round_trip: [(save, load)],
    check_stop: [stop_signals, noting(True, True, True)],
    check_resume: [(start_run, resume_run)],
    check_interval: [lambda cost, mean_time: math.sqrt(2 * cost * mean_time)],
    check_state: [(state_of, go_back)],
    check_names: [names_in],
}
WRONG = {
    check_whole_file: [
        (without_the_folder, "the folder was not flushed"),
        (start_only, "the new content does not stand"),
        (leaves_its_partial_file, "a full disk left something behind"),
    ],
    check_round_trip: [((save, load_to_train), "dropout is on")],
    check_stop: [
        (noting(False, True, True), "the second has to act as before"),
        (noting(True, False, True), "is not back after an error"),
        (noting(True, True, False), "an ignored signal"),
    ],
    check_resume: [
        ((start_run, resume_all_over), "not at 0 and the checkpoints 3 and 6")
    ],
    check_interval: [(lambda cost, mean_time: mean_time / 2, "not every")],
    check_state: [
        ((state_of, shares_the_deck), "for the second time: deck is"),
        ((state_of, forgets_the_dice), "it went another way"),
        ((state_after_a_step, go_back), "putting the walk away changed it"),
    ],
    check_names: [
        (lambda content: set(), "'MODULE exec' is not among"),
        (lambda content: {"x exec", "x OrderedDict"}, "plain values name nothing"),
    ],
}
