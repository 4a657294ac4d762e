"""Answers to the checks of chapter 11."""

import random

import numpy as np
import torch

from glassgpt.checks import data as checks
from glassgpt.data import Document, Tokens, split_documents


def first_are_held_out(documents):
    count = len(documents) // 5
    sides = ["validation"] * count + ["train"] * (len(documents) - count)
    return list(zip(sides, documents, strict=True))


def by_lines(documents):
    parts = []
    for each in documents:
        lines = each.text.splitlines(keepends=True)
        parts.append(("train", Document(each.name, "".join(lines[::2]))))
        parts.append(("validation", Document(each.name, "".join(lines[1::2]))))
    return parts


def held_out_by_name(documents):
    names = {each.name for side, each in split_documents(documents) if side != "train"}
    return [("validation" if d.name in names else "train", d) for d in documents]


def one_of_each_name(documents):
    parts = split_documents(documents)
    return list({each.name: (side, each) for side, each in parts}.values())


def by_chance(documents):
    parts = split_documents(documents)
    return random.SystemRandom().sample(parts, len(parts))


def rows_from(ids, context, starts):
    rows = ids[np.asarray(starts).reshape(-1, 1) + np.arange(context + 1)]
    rows = torch.tensor(rows.astype(np.int64))
    return rows[:, :-1], rows[:, 1:]


def random_batch(ids, batch_size, context, seed):
    return Tokens(ids).random_batch(batch_size, context, seed)


def of_all(change):
    """The right batch, with something done to it."""
    return lambda *arguments: change(*random_batch(*arguments))


def started(starts_of):
    """A random_batch whose starts are made of (generator, crops, B)."""

    def batch(ids, size, context, seed):
        drawn = starts_of(np.random.default_rng(seed), len(ids) - context, size)
        return rows_from(ids, context, drawn)

    return batch


def with_torch(ids, size, context, seed):
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(ids) - context, (size,), generator=generator)
    return rows_from(ids, context, drawn)


def epochs(order_of):
    """Epochs of crops in the order that `order_of(crops, seed, epoch, B)` gives."""

    def batch(ids, size, context, seed, step):
        count = (len(ids) - 1) // context
        epoch, part = divmod(step, count // size)
        chosen = order_of(count, seed, epoch, size)[part * size : (part + 1) * size]
        return rows_from(ids, context, np.asarray(chosen) * context)

    return batch


def order(count, *seed):
    return np.random.default_rng(seed).permutation(count)


def leftovers_carried_over(ids, size, context, seed, step):
    count = (len(ids) - 1) // context
    places = [divmod(place, count) for place in range(step * size, (step + 1) * size)]
    chosen = [order(count, seed, epoch)[place] for epoch, place in places]
    return rows_from(ids, context, np.array(chosen) * context)


def drawn(ids, size, context, seed, step):
    crops = (len(ids) - 1) // context
    starts = np.random.default_rng((seed, step)).integers(crops, size=size)
    return rows_from(ids, context, starts * context)


RIGHT = {
    checks.check_split: [split_documents, first_are_held_out],
    checks.check_batches: [random_batch, with_torch],
    checks.check_nats_per_character: [lambda loss, tokens, n: loss * tokens / n],
    checks.check_epochs: [epochs(lambda n, seed, epoch, size: order(n, seed, epoch))],
}
WRONG = {
    checks.check_split: [
        (by_lines, "hold out whole documents, not random lines"),
        (one_of_each_name, "5 documents became 1"),
        (lambda ds: split_documents(ds) * 2, "5 documents became 10"),
        (held_out_by_name, "the sides are ['validation']"),
        (by_chance, "splits differently"),
        (lambda ds: [(s, d) for s, d in zip("ab", ds, strict=False)], "became 2"),
    ],
    checks.check_batches: [
        (of_all(lambda x, y: (x, x)), "move them on by one"),
        (of_all(lambda x, y: (y, x)), "not the inputs moved on"),
        (of_all(lambda x, y: (x.flip(1), y.flip(1))), "not a run of the text"),
        (of_all(lambda x, y: (x.int(), y)), "inputs are torch.int32"),
        (of_all(lambda x, y: (x, y[:, :3])), "targets have shape (5, 3)"),
        (
            lambda ids, *more: random_batch(ids.astype(np.int16), *more),
            "not in the text",
        ),
        (
            lambda ids, b, t, seed: random_batch(ids, b, t, 0),
            "the seed is ignored",
        ),
        (lambda ids, b, t, seed: random_batch(ids, b, t, None), "could not resume"),
        (started(lambda r, n, b: r.integers(n - 1, size=b)), "at [7] never come"),
        (started(lambda r, n, b: np.resize(r.permutation(n), b)), "by itself"),
        (started(lambda r, n, b: (r.integers(n) + np.arange(b)) % n), "by itself"),
        (started(lambda r, n, b: r.integers(20, size=b) % n), "not equally likely"),
    ],
    checks.check_nats_per_character: [
        (lambda loss, tokens, n: loss * n / tokens, "longer tokens"),
        (lambda loss, tokens, n: loss, "don't cost 3.000 nats each"),
    ],
    checks.check_epochs: [
        (drawn, "permute, don't draw"),
        (leftovers_carried_over, "drop the crops that are left over"),
        (epochs(lambda n, *_: range(n)), "in the order of the text"),
        (epochs(lambda n, seed, epoch, size: order(n, seed)), "same order"),
        (epochs(lambda n, seed, epoch, size: order(n, 0, epoch)), "seed is ignored"),
        (epochs(lambda n, seed, epoch, size: order(n, seed + epoch)), "(seed, epoch)"),
        (
            epochs(lambda n, seed, epoch, b: order(n // b * b, seed, epoch)),
            "put all crops into a new order",
        ),
    ],
}
