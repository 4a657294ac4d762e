# Written by tools/tangle.py from book/11_data.ipynb: change it there.


"""Checks of splits and batches that name the mistake they find."""

from collections.abc import Callable, Sequence
from itertools import product

import numpy as np
import torch
from torch import Tensor

from glassgpt.data import Document


def check_split(
    split: Callable[[Sequence[Document]], list[tuple[str, Document]]],
) -> None:
    """Whole documents are held out: none is cut, lost or on both sides.

    split: called with documents in memory, returns ("train" or "validation", document).

    Book: 11_data.html#the-leak
    """
    for count in (5, 20, 25):
        plays = [Document(f"play {k}", f"line of {k}\n" * 20) for k in range(count)]
        lines = [Document("notes.jsonl", f"line {k}\n") for k in range(count)]
        for documents in (plays, lines):
            parts = list(split(documents))
            for _, found in parts:
                assert found in documents, (
                    f"{found.name} is not whole: hold out whole documents, "
                    "not random lines"
                )
            texts = sorted(found.text for _, found in parts)
            assert texts == sorted(document.text for document in documents), (
                f"{count} documents became {len(parts)}: each has to come once, also "
                "where all have one name, like the lines of a .jsonl file"
            )
            assert parts == list(split(documents)), (
                "a second call splits differently: choose by number, not by chance"
            )
            sides = sorted({side for side, _ in parts})
            assert sides == ["train", "validation"], (
                f"the sides are {sides}, not 'train' and 'validation'"
            )
            held_out = [side for side, _ in parts].count("validation")
            assert held_out < count / 2, f"{held_out} of {count} are held out"


def _text(length: int) -> np.ndarray:
    """Ids that tell their places: 40,000 plus the square of each."""
    return (np.arange(length) ** 2 + 40_000).astype(np.uint16)


def _starts(
    batch: tuple[Tensor, Tensor], ids: np.ndarray, size: int, context: int
) -> list[int]:
    """Where the rows of a batch begin, after comparing all of it with the text."""
    inputs, targets = batch
    for name, part in (("inputs", inputs), ("targets", targets)):
        assert part.dtype == torch.int64, f"{name} are {part.dtype}, not torch.int64"
        assert part.shape == (size, context), (
            f"{name} have shape {tuple(part.shape)}, not (B, T) = {(size, context)}"
        )
    text = torch.tensor(ids.tolist())
    assert torch.isin(inputs, text).all(), (
        "the inputs have ids that are not in the text"
    )
    starts = torch.searchsorted(text, inputs[:, 0].contiguous())
    places = starts[:, None] + torch.arange(context + 1)  # (B, T + 1)
    rows = text[places.clamp(max=len(text) - 1)]
    assert torch.equal(inputs, rows[:, :-1]), "a row of inputs is not a run of the text"
    assert not torch.equal(targets, inputs), (
        "the targets equal the inputs: move them on by one"
    )
    assert torch.equal(targets, rows[:, 1:]), (
        "the targets are not the inputs moved on by one"
    )
    return starts.tolist()


def check_batches(
    random_batch: Callable[[np.ndarray, int, int, int], tuple[Tensor, Tensor]],
) -> None:
    """Targets are the inputs moved on by one, every crop can come, the seed decides.

    random_batch: called as random_batch(ids, batch_size, context, seed) with ids (N,)
    uint16, returns inputs and targets, each (B, T) int64.

    Book: 11_data.html#a-batch-by-hand
    """
    _starts(random_batch(_text(30), 5, 7, 0), _text(30), 5, 7)
    ids = _text(12)  # 8 crops of 4
    drawn = [_starts(random_batch(ids, 8, 4, seed), ids, 8, 4) for seed in range(160)]
    assert drawn[0] == _starts(random_batch(ids, 8, 4, 0), ids, 8, 4), (
        "the same seed gave another batch: a run could not resume"
    )
    assert len(set(map(tuple, drawn))) > 1, "the seed is ignored"
    counts = np.bincount(np.concatenate(drawn), minlength=8)
    assert counts.all(), (
        f"the crops at {np.flatnonzero(counts == 0)} never come: N ids have N - T crops"
    )
    off = ((counts - 160) ** 2).sum() / 160  # chi-square
    assert off > 0, "all starts come equally often: draw each start by itself"
    assert off < 40, f"not equally likely: the 8 crops came {counts} times"


def check_nats_per_character(
    nats_per_character: Callable[[float, int, int], float],
) -> None:
    """The loss of the whole text, shared out among its characters.

    Book: 11_data.html#exercise-1-one-scale-for-all
    """
    for loss, tokens, characters in ((3.0, 100, 250), (2.7, 197, 451)):
        found = nats_per_character(loss, tokens, characters)
        assert abs(found - loss * characters / tokens) > 1e-9, (
            "multiplied by characters per token: longer tokens must cost less each"
        )
        assert abs(found - loss * tokens / characters) < 1e-5, (
            f"{tokens} tokens of {loss} nats make {characters} characters: "
            f"they don't cost {found:.3f} nats each"
        )


def _epoch(
    epoch_batch: Callable, ids: np.ndarray, seed: int, epoch: int
) -> tuple[int, ...]:
    """Where the ten crops of 4 begin that the two batches of 5 of an epoch have."""
    starts = []
    for step in (2 * epoch, 2 * epoch + 1):
        starts += _starts(epoch_batch(ids, 5, 4, seed, step), ids, 5, 4)
    return tuple(starts)


def check_epochs(
    epoch_batch: Callable[[np.ndarray, int, int, int, int], tuple[Tensor, Tensor]],
) -> None:
    """Every crop comes once an epoch, each epoch in its own order.

    epoch_batch: called as epoch_batch(ids, batch_size, context, seed, step).

    Book: 11_data.html#exercise-3-everything-once-then-again
    """
    for length, crops in ((48, 11), (49, 12)):  # the last target is an id, too
        ids = _text(length)
        orders = {}
        for seed, epoch in product(range(2), range(16)):
            orders[seed, epoch] = _epoch(epoch_batch, ids, seed, epoch)
        for starts in orders.values():
            assert not any(start % 4 for start in starts), (
                "a crop begins at no multiple of the context: cut the text from its "
                "first id on"
            )
            assert len(set(starts)) == 10, (
                "an epoch has a crop twice: permute, don't draw, and drop the crops "
                "that are left over"
            )
        first = orders[0, 0]
        assert list(first) != sorted(first), "the crops come in the order of the text"
        assert first != orders[0, 1], "every epoch has the same order: seed it by epoch"
        assert first != orders[1, 0], "the seed is ignored"
        assert len(set(orders.values())) == len(orders), (
            "two epochs, or two seeds, have one order: use (seed, epoch)"
        )
        met = set().union(*orders.values())
        assert len(met) == crops, (
            f"{length} ids make {crops} crops of 4 with their targets, and only "
            f"{len(met)} of them ever come: put all crops into a new order"
        )
        assert orders[0, 3] == _epoch(epoch_batch, ids, 0, 3), (
            "a batch depends on what came before it"
        )
