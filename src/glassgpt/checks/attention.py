# Written by tools/tangle.py from book/06_attention.ipynb: change it there.


"""Checks of masks and of attention that name the mistake they find."""

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from glassgpt.checks.expect import expect_same


def check_causal_mask(causal_mask: Callable[[int], Tensor]) -> None:
    """Row t may look at positions 0 to t, and True means that it may.

    Book: 06_attention.html#is-it-right
    """
    for size in (3, 1, 12):
        mask = causal_mask(size)
        assert mask.dtype == torch.bool, f"the mask must be bool, not {mask.dtype}"
        wanted = torch.ones(size, size).tril().bool()
        mistakes = {
            "row 0 may look at position 2: the mask is transposed": wanted.mT,
            "True marks the future: True must mean 'may look'": ~wanted,
            "row 1 may not look at position 1: a word sees itself": wanted.tril(-1),
        }
        for mistake, table in mistakes.items():
            assert size == 1 or not torch.equal(mask, table), mistake
        assert torch.equal(mask, wanted), f"for {size} words: {mask.int().tolist()}"


def _weights(
    q: Tensor, k: Tensor, mask: Tensor | None = None, divisor: float | None = None
) -> Tensor:
    """The softmax of the scores, divided by the root of the width if not told."""
    scores = q @ k.mT / (divisor or math.sqrt(q.shape[-1]))
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return scores.softmax(-1)


def check_attention(attention: Callable[..., tuple[Tensor, Tensor]]) -> None:
    """Weights are the softmax of scaled scores; the context mixes the values.

    attention: called as attention(queries, keys, values) or with a mask as the fourth;
    returns the context and the weights.

    Book: 06_attention.html#is-it-right
    """
    random = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, 4, *shape, generator=random, dtype=torch.float64)
        for shape in ((3, 8), (5, 8), (5, 6))
    )
    mask = torch.tensor([[1, 0, 1, 0, 0], [0, 0, 0, 0, 1], [1, 1, 0, 1, 1]]).bool()
    both = attention(q, k, v)
    assert isinstance(both, tuple), "return a tuple: the context and the weights"
    mistakes = {
        "the scores are not divided at all: divide by the square root of the width": (
            lambda q, k: _weights(q, k, divisor=1)
        ),
        "the scores are divided by the width itself: take its square root": (
            lambda q, k: _weights(q, k, divisor=8)
        ),
        "softmax over the wrong axis: it runs over the keys, the last one": (
            lambda q, k: (q @ k.mT / math.sqrt(8)).softmax(-2)
        ),
    }
    expect_same(
        lambda q, k: attention(q, k, v)[1],
        _weights,
        q,
        k,
        mistakes=mistakes,
        hint="These are weights: the softmax of the scores, divided by the square root"
        " of the width 8",
    )
    mistakes = {
        "the mask was ignored": lambda q, k: _weights(q, k),
        "the mask is inverted: True means 'may look'": (
            lambda q, k: _weights(q, k, ~mask)
        ),
        "the weights of a row don't sum to 1: mask before the softmax": (
            lambda q, k: _weights(q, k) * mask
        ),
    }
    expect_same(
        lambda q, k: attention(q, k, v, mask)[1],
        lambda q, k: _weights(q, k, mask),
        q,
        k,
        mistakes=mistakes,
        hint="These are weights with a mask: hidden scores are -inf, and the scale is"
        " the same",
    )
    _check_context(attention, q, k, v, mask)


def _check_context(
    attention: Callable[..., tuple[Tensor, Tensor]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
) -> None:
    """The context is PyTorch's, with its gradients, large scores and other shapes."""
    padding = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]]).bool()[:, None, None]
    large = "Scores are near 1000: subtract each row's peak in the softmax, and mask"
    for inputs, may_look, hint in (
        ((q, k, v), mask, "The context is weights @ values"),
        ((1000 * q, k, v), mask, large + " before it"),
        ((q, k, v), padding, "A mask (B, 1, 1, S) hides other keys in each text"),
        ((q[0, 0], k[0, 0], v[0, 0]), None, "On a single text, queries are (T, D)"),
    ):
        expect_same(
            lambda q, k, v, mask=may_look: attention(q, k, v, mask)[0],
            lambda q, k, v, mask=may_look: F.scaled_dot_product_attention(
                q, k, v, mask
            ),
            *inputs,
            mistakes={
                "as wide as the keys: mix the values, not the keys": (
                    lambda q, k, v, mask=may_look: _weights(q, k, mask) @ k
                )
            },
            gradients=inputs[0] is q,
            hint=hint,
        )


def check_causal(mix: Callable[[Tensor], Tensor], width: int = 4) -> None:
    """A changed word changes its own and later rows, and no earlier one.

    mix: maps vectors (1, T, C) to vectors (1, T, ...), for C = width and T = 5.

    Book: 06_attention.html#is-it-right
    """
    random = torch.Generator().manual_seed(0)
    # Scaled so that the scores stay small in wide models, and nobody sees only itself.
    x = torch.randn(1, 5, width, generator=random) / width**0.25
    given = x.clone()
    before = mix(x)
    assert torch.equal(x, given), "the vectors given were changed: work on a copy"
    for changed in range(5):
        other = given.clone()
        other[:, changed] = torch.randn(width, generator=random) / width**0.25
        moved = (mix(other) - before).abs().amax(-1)[0]  # (T,)
        rounding = 1e-5 * moved.max()  # relative: a small leak counts
        for row in range(5):
            if row < changed:
                assert moved[row] <= rounding, (
                    f"row {row} looks at position {changed}: the mask lets the future"
                    " through"
                )
            else:
                assert moved[row] > 0, (
                    f"row {row} does not see position {changed}: the past is hidden"
                )


def check_permutation_equivariant(mix: Callable[[Tensor], Tensor]) -> None:
    """Shuffled words get the same vectors as before, shuffled alike.

    mix: maps vectors (1, T, C) to vectors (1, T, ...), for C = 4 and T = 5.

    Book: 06_attention.html#is-it-right
    """
    x = torch.randn(1, 5, 4, generator=torch.Generator().manual_seed(0))
    order = torch.tensor([3, 0, 4, 1, 2])
    before = mix(x)
    moved = (mix(x[:, order]) - before[:, order]).abs().amax(-1)[0]  # (T,)
    row = int(moved.argmax())
    assert moved[row] < 1e-5 * max(1.0, before.detach().abs().max().item()), (
        f"the word moved from position {order[row]} to {row} got another vector:"
        " something here knows the order"
    )


def check_previous_word(make: Callable[[int], tuple[Tensor, Tensor]]) -> None:
    """With the causal mask, each row looks at the position before it.

    Book: 06_attention.html#exercise-3-ask-for-the-word-before
    """
    for size in (6, 300, 2048):
        queries, keys = make(size)
        shapes = len(queries), len(keys)
        assert shapes == (size, size), f"{shapes} queries and keys, not {size} of each"
        weights = _weights(queries, keys, torch.ones(size, size).tril().bool())
        before = weights.diagonal(-1)  # of row t the weight on t - 1
        row = int(before.argmin()) + 1
        most, weight = int(weights[row].argmax()), before[row - 1].item()
        assert most != row, f"row {row} looks at itself: ask for the key before"
        assert most == row - 1, f"row {row} looks at position {most}, not {row - 1}"
        assert weight > 0.99, (
            f"row {row} of {size} looks at position {row - 1} with weight "
            f"{weight:.3f} only: make the scores larger"
        )


def _vanishing(keys: Tensor, values: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of chunks; when the next one is asked for, the last is gone."""
    for pair in zip(keys.split(2), values.split(2), strict=True):
        chunk = pair[0].clone(), pair[1].clone()
        yield chunk
        for part in chunk:
            part.fill_(math.nan)


def check_streaming_attention(
    streaming: Callable[[Tensor, Iterator[tuple[Tensor, Tensor]]], Tensor],
) -> None:
    """Keys and values that come in chunks, each seen once, give the same context.

    Book: 06_attention.html#exercise-4-attention-without-the-table
    """
    random = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(shape, generator=random) for shape in ((3, 5), (12, 5), (12, 2))
    )
    mistakes = {
        "the scores were not divided by the root of the width": (
            lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=1)
        ),
        "only the last chunk counts": (
            lambda q, k, v: F.scaled_dot_product_attention(q, k[-2:], v[-2:])
        ),
    }
    grown = (
        "When a row's peak grows, multiply its total and its mixture by"
        " exp(old peak - new peak), and divide once, at the end. Keep no chunk"
        " for later"
    )
    own = "Subtract each row's own peak so far, and keep no chunk for later"
    low = "Start with the peak -inf, for all scores of a row may be low"
    for queries, keys, hint in (
        (q, k, grown),
        (100 * q, k, own),
        (1000 * q.abs(), -k.abs(), low),
    ):
        expect_same(
            lambda q, k, v: streaming(q, _vanishing(k, v)).to(q.dtype),
            F.scaled_dot_product_attention,
            queries,
            keys,
            v,
            mistakes=mistakes,
            gradients=False,
            hint=hint,
        )
