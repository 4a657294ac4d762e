"""Answers to the checks of the appendix on publishing."""

from math import ceil

from glassgpt.checks.publish import check_kept, check_page_min_p, check_size
from glassgpt.generation import window_start


def size(layers, width, vocabulary, context, scales=4, vectors=4):
    """Characters of the weights; scales, vectors: bytes of each number."""

    def base64(numbers, size):
        return 4 * ceil(numbers * size / 3)

    blocks = layers * [(3 * width, width), (width, width)]
    blocks += layers * [(4 * width, width), (width, 4 * width)]
    tables = [(vocabulary, width), (context, width)]
    total = sum(base64(r * c, 1) + base64(r, scales) for r, c in blocks + tables)
    total += sum(base64(rows, vectors) for rows, _ in blocks)
    return total + (4 * layers + 2) * base64(width, vectors)


def min_p(choices, share):
    least = share * choices[0]["probability"]
    kept = [one for one in choices if one["probability"] >= least]
    total = sum(one["probability"] for one in kept)
    return [{**one, "probability": one["probability"] / total} for one in kept]


def of_one(choices, share):
    """Compared with the share itself."""
    return min_p(choices, share / choices[0]["probability"])


def in_place(choices, share):
    choices[:] = min_p(choices, share)
    return choices


def of_nan(choices, share):
    return [{**one, "probability": None} for one in min_p(choices, share)]


def kept(old, new, context):
    old, new = (ids[window_start(len(ids), context) :] for ids in (old, new))
    pairs = zip(old, new, strict=False)
    changed = [place for place, (a, b) in enumerate(pairs) if a != b]
    return min([*changed, len(old), len(new)])


RIGHT = {check_size: [size], check_page_min_p: [min_p], check_kept: [kept]}
WRONG = {
    check_size: [
        (lambda *sizes: size(*sizes, scales=0), "each row of a matrix has a scale"),
        (lambda *sizes: size(*sizes, vectors=0), "biases and norms take room"),
        (lambda *sizes: size(*sizes) * 3 // 4, "characters, not"),
    ],
    check_page_min_p: [
        (of_one, "[4, 1] stay, not [4, 1, 2]"),
        (in_place, "the list given was changed"),
        (of_nan, "does `reduce` begin with 0?"),
    ],
    check_kept: [
        (lambda old, new, context: kept(old, new, 1000), "the window has moved on"),
        (lambda old, new, context: 0, "one more token: 3 stay, not 0"),
    ],
}
