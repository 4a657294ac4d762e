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


def _draw(random_batch: Callable, ids: np.ndarray, seed: int) -> tuple[Tensor, Tensor]:
    """One batch of 64 crops of 4 ids, with shapes and types compared."""
    try:
        inputs, targets = random_batch(ids, 64, 4, seed)
    except NotImplementedError:
        raise
    except (IndexError, RuntimeError, ValueError) as error:
        raise AssertionError(
            f"crops of 4 from {len(ids)} ids: {error}. Do they run past the end?"
        ) from error
    for name, part in (("inputs", inputs), ("targets", targets)):
        shape = tuple(part.shape)
        assert shape == (64, 4), f"{name} have shape {shape}, not (B, T) = (64, 4)"
        assert part.dtype == torch.int64, f"{name} are {part.dtype}, not torch.int64"
    return inputs, targets


def _check_shift(inputs: Tensor, targets: Tensor) -> None:
    """Rows of consecutive ids, and the same rows one further."""
    assert not torch.equal(targets, inputs), (
        "the targets equal the inputs: move them on by one"
    )
    assert not torch.equal(targets, inputs - 1), (
        "the targets come before the inputs: moved by one the wrong way"
    )
    runs = inputs[:, :1] + torch.arange(inputs.shape[1])
    assert torch.equal(inputs, runs), "a row of inputs is not a run of the text"
    assert torch.equal(targets, inputs + 1), (
        "the targets are not the inputs moved on by one"
    )


def check_batches(
    random_batch: Callable[[np.ndarray, int, int, int], tuple[Tensor, Tensor]],
) -> None:
    """Targets are the inputs moved on by one, every crop can come, the seed decides.

    random_batch: called as random_batch(ids, batch_size, context, seed) with ids (N,)
    uint16, returns inputs and targets, each (B, T) int64.

    Book: 11_data.html#the-check-of-a-batch
    """
    ids = np.arange(100, 112, dtype=np.uint16)
    batches = [_draw(random_batch, ids, seed) for seed in range(20)]
    for inputs, targets in batches:
        _check_shift(inputs, targets)
    first = batches[0][0]
    assert torch.equal(first, _draw(random_batch, ids, 0)[0]), (
        "the same seed gave another batch: a run could not resume"
    )
    assert not torch.equal(first, batches[1][0]), "the seed is ignored"
    starts = {int(start) - 100 for inputs, _ in batches for start in inputs[:, 0]}
    missing = sorted(set(range(8)) - starts)
    assert missing != [7], (
        "the last crop never comes: N ids have N - T crops, off by one at the end"
    )
    assert not missing, f"crops that start at {missing} never come"


def check_nats_per_character(
    nats_per_character: Callable[[float, int, int], float],
) -> None:
    """The loss of the whole text, shared out among its characters.

    Book: 11_data.html#exercise-1-one-scale-for-all
    """
    result = nats_per_character(3.0, 100, 250)
    assert abs(result - 7.5) > 1e-9, (
        "multiplied by characters per token: longer tokens must cost less a character"
    )
    assert abs(result - 1.2) < 1e-9, (
        f"100 tokens of 3 nats are 300 nats; for 250 characters that is 1.2 each, "
        f"not {result:.3f}"
    )


def check_epochs(
    epoch_batch: Callable[[np.ndarray, int, int, int, int], tuple[Tensor, Tensor]],
) -> None:
    """Every crop comes once an epoch, each epoch in its own order.

    epoch_batch: called as epoch_batch(ids, batch_size, context, seed, step).

    Book: 11_data.html#exercise-3-everything-once-then-again
    """
    ids, orders = np.arange(100, 150, dtype=np.uint16), []  # 12 crops of 4, 4 batches
    for epoch in range(3):
        order = []
        for step in range(4 * epoch, 4 * epoch + 4):
            inputs, targets = epoch_batch(ids, 3, 4, 0, step)
            assert tuple(inputs.shape) == (3, 4), f"step {step} is not of shape (3, 4)"
            _check_shift(inputs, targets)
            order += (inputs[:, 0] - 100).tolist()
        twice = sorted({start for start in order if order.count(start) > 1})
        assert not twice, f"crops {twice} come twice in an epoch: permute, don't draw"
        whole = sorted(order) == list(range(0, 48, 4))
        assert whole, "the crops overlap, or some are missing"
        orders.append(order)
    assert orders[0] != sorted(orders[0]), "the crops come in the order of the text"
    assert orders[0] != orders[1], "every epoch has the same order: seed it by epoch"
    again = epoch_batch(ids, 3, 4, 0, 4)[0][:, 0] - 100
    assert again.tolist() == orders[1][:3], "step 4 differs when asked for again"
    for length, crops in ((49, 12), (48, 11)):  # the last target is an id, too
        last = [epoch_batch(ids[:length], 1, 4, 0, step) for step in range(crops)]
        found = sorted(int(inputs[0, 0]) - 100 for inputs, _ in last)
        assert found == list(range(0, 4 * crops, 4)), (
            f"{length} ids make {crops} crops of 4 with their targets"
        )
    other = epoch_batch(ids, 3, 4, 1, 0)[0][:, 0] - 100
    assert other.tolist() != orders[0][:3], "the seed is ignored"
