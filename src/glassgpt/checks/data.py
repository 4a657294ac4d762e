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

    Book: 11_data.html#the-leak
    """
    for count in (20, 5, 25):
        lines = [[f"Play {k}, line {i}\n" for i in range(20)] for k in range(count)]
        plays = [Document(f"play {k}", "".join(text)) for k, text in enumerate(lines)]
        _check_parts(split, plays)
    same = [Document("notes.jsonl", f"line {i}\n") for i in range(20)]
    parts = list(split(same))
    assert sorted(d.text for _, d in parts) == sorted(d.text for d in same), (
        "of documents with one name, like the lines of a .jsonl file, some are lost"
    )
    assert len({side for side, _ in parts}) == 2, (
        "documents with one name are all on one side: choose by number, not by name"
    )


def _check_parts(split: Callable, plays: Sequence[Document]) -> None:
    """Every play comes back whole, on one side, and neither side is empty."""
    parts = list(split(plays))
    assert parts == list(split(plays)), (
        "a second call splits differently: choose by number, not by chance"
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
    assert len(parts) == len(plays), (
        f"{len(plays)} documents became {len(parts)}: some are copies, or new"
    )
    for side, names in sides.items():
        assert names, f"of {len(plays)} documents there is none for {side}"
    held_out = len(sides["validation"])
    assert held_out < len(plays) / 2, f"{held_out} of {len(plays)} are held out"


def _text(length: int) -> np.ndarray:
    """Ids that tell their places: 40,000 plus the square of each."""
    return (np.arange(length) ** 2 + 40_000).astype(np.uint16)


def _draw(
    random_batch: Callable, ids: np.ndarray, seed: int, size: int = 64, context: int = 4
) -> tuple[Tensor, Tensor]:
    """One batch of crops, with shapes and types compared."""
    given = ids.copy()
    try:
        batch = random_batch(given, size, context, seed)
    except (IndexError, RuntimeError, ValueError) as error:
        signs = ("larger", "out of bounds", "out of range", "equal size", "same shape")
        signs += ("inhomogeneous", "expected sequence", "match exactly")
        if not any(sign in str(error) for sign in signs):
            raise
        differ = "larger" in str(error)
        why = "Must they all differ?" if differ else "Do they run past the end?"
        raise AssertionError(
            f"crops of {context} from {len(ids)} ids: {error}. {why}"
        ) from error
    assert (given == ids).all(), "the ids themselves were changed"
    assert len(batch) == 2, "return two tensors, the inputs and the targets"
    for name, part in zip(("inputs", "targets"), batch, strict=True):
        assert isinstance(part, Tensor), f"{name} are no tensor but {type(part)}"
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
    assert known.any(dim=1).all(), (
        f"a row begins with {int(inputs[~known.any(dim=1), 0][0])}, which is no id of "
        f"the text, where they go from {int(text.min())} to {int(text.max())}"
    )
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


def _tied(starts: Tensor, sign: int) -> bool:
    """Whether two rows have one difference (-1) or sum (1) in all batches."""
    both = (starts[:, :, None] + sign * starts[:, None]) % 8  # (batches, B, B)
    return bool((both == both[0]).all(dim=0).fill_diagonal_(False).any())


def _check_chance(starts: Tensor) -> None:
    """Whether the starts of each batch (batches, B), of 8, look drawn one by one."""
    gaps = starts.diff(dim=1) % 8
    faults = [
        ((gaps == gaps[:, :1]).all(), "lie at equal distances"),
        ((starts.diff(dim=1) >= 0).all(), "come in the order of the text"),
        ((starts[:, ::2] == starts[:, 1::2]).all(), "come in pairs"),
        (
            all(row[:8].unique().numel() == 8 for row in starts),
            "come once each before one comes again",
        ),
        (_tied(starts, -1) or _tied(starts, 1), "follow from one another"),
        ((starts == starts[0]).all(dim=0).any(), "don't all change with the seed"),
    ]
    for found, fault in faults:
        assert not found, f"the crops of a batch {fault}: draw each start by itself"


def _check_reach(random_batch: Callable) -> None:
    """Batches come from all of a long text."""
    ids = (np.arange(200_000) // 4).astype(np.uint16)
    assert _draw(random_batch, ids, 0)[0].max() > 40_000, (
        "of 200,000 ids only the first ones come: are places kept in 16 bits?"
    )


def check_batches(
    random_batch: Callable[[np.ndarray, int, int, int], tuple[Tensor, Tensor]],
) -> None:
    """Targets are the inputs moved on by one, every crop can come, the seed decides.

    random_batch: called as random_batch(ids, batch_size, context, seed) with ids (N,)
    uint16, returns inputs and targets, each (B, T) int64.

    Book: 11_data.html#a-batch-by-hand
    """
    ids = _text(12)  # 8 crops of 4
    batches = [_draw(random_batch, ids, 97 * seed) for seed in range(20)]
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
    off = ((counts - 160) ** 2).sum() / 160  # chi-square
    even = 105 < counts.min() <= counts.max() < 220 and off < 40
    assert even, (
        f"not equally likely: of 1,280 draws start {int(counts.argmax())} has "
        f"{int(counts.max())}, start {int(counts.argmin())} has {int(counts.min())}"
    )
    _check_chance(starts.view(20, 64))
    assert off > 0, "every start comes exactly 160 times: draw each start by itself"
    others = {seed: _draw(random_batch, ids, seed) for seed in (1, 20, 256, 1000)}
    others |= {97 * turn: batches[turn] for turn in range(1, 20)}
    for seed, batch in others.items():
        assert not torch.equal(first, batch[0]), (
            f"seeds 0 and {seed} give the same batch: every seed is its own"
        )
    text = _text(30)
    _starts(text, *_draw(random_batch, text, 0, size=5, context=7))
    twice = (_starts(text, *_draw(random_batch, text, seed, 20)) for seed in range(2))
    assert any(starts.unique().numel() < 20 for starts in twice), (
        "in batches of 20 from 26 crops none comes twice: draw each start by itself"
    )
    _check_reach(random_batch)


def check_nats_per_character(
    nats_per_character: Callable[[float, int, int], float],
) -> None:
    """The loss of the whole text, shared out among its characters.

    Book: 11_data.html#exercise-1-one-scale-for-all
    """
    for loss, tokens, characters in ((3.0, 100, 250), (2.0, 300, 400), (2.7, 197, 451)):
        result = nats_per_character(loss, tokens, characters)
        assert abs(result - loss * characters / tokens) > 1e-9, (
            "multiplied by characters per token: longer tokens must cost less each"
        )
        assert abs(result - loss * tokens / characters) < 1e-5, (
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


def _check_no_kin(orders: Sequence[list[int]]) -> None:
    """No epoch is another one turned round or moved on."""
    turned = [
        way[place:] + way[:place]
        for way in (orders[0], orders[0][::-1])
        for place in range(len(way))
    ]
    for order in orders[1:]:
        assert order == orders[0] or order not in turned, (
            "an epoch is the first one, moved on or reversed: draw a new order"
        )


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
    numbers = [*range(24), 64, 100, 128, 1000]
    orders = [
        _epoch(epoch_batch, 50, 3, 0, range(4 * epoch, 4 * epoch + 4))
        for epoch in numbers
    ]
    for order in orders:
        assert len(set(order)) == 12, "in an epoch of 4 batches some crop came twice"
    assert orders[0] != sorted(orders[0]), "the crops come in the order of the text"
    assert orders[0] != orders[1], "every epoch has the same order: seed it by epoch"
    batches = {frozenset(order[i : i + 3]) for order in orders for i in (0, 3, 6, 9)}
    assert len(batches) > 4, (
        "a batch has the same crops in every epoch: put all crops into a new order"
    )
    _check_no_kin(orders)
    for epoch, order in enumerate(orders):
        assert order not in orders[:epoch], (
            f"epoch {numbers[epoch]} repeats an earlier order"
        )
    for half in (slice(6), slice(6, 12)):
        met = {start for order in orders for start in order[half]}
        assert len(met) == 12, (
            f"in {len(orders)} epochs some crops came in the same half each time: put "
            "all crops into a new order"
        )
    assert late == orders[1][3:6], "step 5 differs when it is asked for first"
    _check_left_out(epoch_batch)
    for epoch in (0, 3):
        steps = range(4 * epoch, 4 * epoch + 4)
        seeds = (1, 2, 256, 1000)
        others = [_epoch(epoch_batch, 50, 3, seed, steps) for seed in seeds]
        assert others[0] != orders[epoch], f"in epoch {epoch} the seed is ignored"
        for seed, other in zip(seeds, others, strict=True):
            assert other not in orders, (
                f"epoch {epoch} of seed {seed} is epoch "
                f"{numbers[orders.index(other)]} of seed 0: use (seed, epoch)"
            )
        assert len(set(map(tuple, others))) == 4, (
            f"two of the seeds 1, 2, 256 and 1000 give the same epoch {epoch}"
        )
    _check_reach(lambda *arguments: epoch_batch(*arguments, 0))
