# Written by tools/tangle.py from book/11_data.ipynb: change it there.
"""Checks of splits and batches that name the mistake they find."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from glassgpt.data import Document


def check_split(
    split: Callable[[Sequence[Document]], list[tuple[str, Document]]],
) -> None:
    """Whole documents are held out: none is cut, lost or on both sides.

    split: called with documents in memory, returns ("train" or "validation", document).

    Book: 11_data.html#the-split
    """
    lines = [[f"Play {play}, line {i}\n" for i in range(20)] for play in range(20)]
    plays = [Document(f"play {i}", "".join(text)) for i, text in enumerate(lines)]
    parts = split(plays)
    assert parts == split(plays), (
        "a second call splits differently: choose by name or number, not by chance"
    )
    sides = {"train": set(), "validation": set()}
    for side, document in parts:
        assert side in sides, f"{side!r} is neither 'train' nor 'validation'"
        sides[side].add(document.name)
    for name in sorted(sides["train"] & sides["validation"]):
        raise AssertionError(
            f"{name} is on both sides: hold out whole documents, not random lines"
        )
    for play in plays:
        texts = [document.text for _, document in parts if document.name == play.name]
        assert texts, f"{play.name} is on neither side"
        assert texts == [play.text], f"{play.name} is not whole, or occurs twice"
    for side, names in sides.items():
        assert names, f"there is no document for {side}"


def _text(length: int) -> np.ndarray:
    """Ids that tell their places: 100 plus the square of each."""
    return (np.arange(length) ** 2 + 100).astype(np.uint16)


def _draw(
    random_batch: Callable, ids: np.ndarray, seed: int, size: int = 64, context: int = 4
) -> tuple[Tensor, Tensor]:
    """One batch of crops, with shapes and types compared."""
    given = ids.copy()
    try:
        batch = random_batch(given, size, context, seed)
    except NotImplementedError:
        raise
    except (IndexError, RuntimeError, ValueError) as error:
        if "broadcast" in str(error):
            raise
        raise AssertionError(
            f"crops of {context} from {len(ids)} ids: {error}. "
            "Do they run past the end?"
        ) from error
    assert (given == ids).all(), "the ids themselves were changed"
    assert len(batch) == 2, "return two tensors, the inputs and the targets"
    for name, part in zip(("inputs", "targets"), batch, strict=True):
        found, due = tuple(part.shape), (size, context)
        assert found == due, f"{name} have shape {found}, not (B, T) = {due}"
        assert part.dtype == torch.int64, f"{name} are {part.dtype}, not torch.int64"
    return batch


def _starts(ids: np.ndarray, inputs: Tensor, targets: Tensor) -> Tensor:
    """Where the rows begin (B,), after comparing inputs and targets with the text."""
    assert not torch.equal(targets, inputs), (
        "the targets equal the inputs: move them on by one"
    )
    assert not torch.equal(targets, inputs + 1), (
        "one was added to every id: a target is the next id of the text"
    )
    text = torch.tensor(ids.tolist())
    known = text == inputs[:, :1]  # (B, N)
    assert known.any(dim=1).all(), "a row begins with an id that is not in the text"
    starts = known.int().argmax(dim=1)
    places = starts[:, None] + torch.arange(inputs.shape[1])  # (B, T)
    run = text[places.clamp(max=len(text) - 1)]
    assert torch.equal(inputs, run), "a row of inputs is not a run of the text"
    assert not torch.equal(targets, text[places - 1]), (
        "the targets come before the inputs: moved by one the wrong way"
    )
    assert places.max() + 1 < len(text), "a row has no next id for its last target"
    assert torch.equal(targets, text[places + 1]), (
        "the targets are not the inputs moved on by one"
    )
    return starts


def check_batches(
    random_batch: Callable[[np.ndarray, int, int, int], tuple[Tensor, Tensor]],
) -> None:
    """Targets are the inputs moved on by one, every crop can come, the seed decides.

    random_batch: called as random_batch(ids, batch_size, context, seed) with ids (N,)
    uint16, returns inputs and targets, each (B, T) int64.

    Book: 11_data.html#the-check-of-a-batch
    """
    ids = _text(12)  # 8 crops of 4
    batches = [_draw(random_batch, ids, seed) for seed in range(20)]
    starts = torch.cat([_starts(ids, *batch) for batch in batches])
    first = batches[0][0]
    assert torch.equal(first, _draw(random_batch, ids, 0)[0]), (
        "the same seed gave another batch: a run could not resume"
    )
    assert not torch.equal(first, batches[1][0]), "the seed is ignored"
    counts = torch.bincount(starts, minlength=8)
    missing = (counts == 0).nonzero().flatten().tolist()
    assert missing != [7], (
        "the last crop never comes: N ids have N - T crops, off by one at the end"
    )
    assert not missing, f"crops that start at {missing} never come"
    assert 105 < counts.min() <= counts.max() < 220, (  # 160 each, give or take 12
        f"not equally likely: of 1,280 draws start {int(counts.argmax())} has "
        f"{int(counts.max())}, start {int(counts.argmin())} has {int(counts.min())}"
    )
    gaps = starts.view(20, 64).diff(dim=1) % 8
    assert (gaps != gaps[:, :1]).any(), (
        "the crops of a batch lie at equal distances: draw each start by itself"
    )
    _starts(_text(30), *_draw(random_batch, _text(30), 0, size=5, context=7))


def check_nats_per_character(
    nats_per_character: Callable[[float, int, int], float],
) -> None:
    """The loss of the whole text, shared out among its characters.

    Book: 11_data.html#exercise-1-one-scale-for-all
    """
    for loss, tokens, characters in ((3.0, 100, 250), (2.0, 300, 400)):
        result = nats_per_character(loss, tokens, characters)
        assert abs(result - loss * characters / tokens) > 1e-9, (
            "multiplied by characters per token: longer tokens must cost less each"
        )
        assert abs(result - loss * tokens / characters) < 1e-9, (
            f"{tokens} tokens of {loss} nats make {characters} characters: "
            f"they don't cost {result:.3f} nats each"
        )


def _epoch(
    epoch_batch: Callable, length: int, size: int, seed: int, steps: Sequence[int]
) -> list[int]:
    """Where the crops of 4 begin that come in these steps."""
    ids, starts = _text(length), []
    for step in steps:
        batch = _draw(
            lambda *arguments, step=step: epoch_batch(*arguments, step),
            ids,
            seed,
            size,
        )
        starts += _starts(ids, *batch).tolist()
    assert not any(start % 4 for start in starts), (
        "a crop begins at no multiple of the context: cut the text from its first id on"
    )
    return starts


def _check_left_out(epoch_batch: Callable) -> None:
    """Of 12 crops in batches of 5, two are left out, now these and now those."""
    epochs = []
    for epoch in range(4):
        steps = (2 * epoch, 2 * epoch + 1)
        found = frozenset(_epoch(epoch_batch, 50, 5, 0, steps))
        assert len(found) == 10, (
            "two batches of 5 have a crop twice: drop the crops that are left over, "
            "and begin the next epoch with a new order"
        )
        epochs.append(found)
    assert len(set(epochs)) > 1, "the same crops are left out in every epoch"


def check_epochs(
    epoch_batch: Callable[[np.ndarray, int, int, int, int], tuple[Tensor, Tensor]],
) -> None:
    """Every crop comes once an epoch, each epoch in its own order.

    epoch_batch: called as epoch_batch(ids, batch_size, context, seed, step).

    Book: 11_data.html#exercise-3-everything-once-then-again
    """
    late = _epoch(epoch_batch, 50, 3, 0, [5])  # asked for before all others
    for length, crops in ((49, 12), (48, 11)):  # the last target is an id, too
        found = _epoch(epoch_batch, length, 1, 0, range(crops))
        assert len(set(found)) == crops, (
            f"{length} ids make {crops} crops of 4 with their targets, and in {crops} "
            f"steps came only {len(set(found))}: permute, don't draw"
        )
    orders = [
        _epoch(epoch_batch, 50, 3, 0, range(4 * epoch, 4 * epoch + 4))
        for epoch in range(3)
    ]
    for order in orders:
        assert len(set(order)) == 12, "in an epoch of 4 batches some crop came twice"
    assert orders[0] != sorted(orders[0]), "the crops come in the order of the text"
    assert orders[0] != orders[1], "every epoch has the same order: seed it by epoch"
    assert len({frozenset(order[:3]) for order in orders}) > 1, (
        "a batch has the same crops in every epoch: put all crops into a new order"
    )
    assert late == orders[1][3:6], "step 5 differs when it is asked for first"
    _check_left_out(epoch_batch)
    other = _epoch(epoch_batch, 50, 3, 1, range(4))
    assert other != orders[0], "the seed is ignored"
    assert other != orders[1], (
        "seed 1 begins with the second epoch of seed 0: use (seed, epoch)"
    )
