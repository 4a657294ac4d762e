# Written by tools/tangle.py from book/06_attention.ipynb: change it there.
"""Checks of masks and of attention that name the mistake they find."""

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor


def check_causal_mask(causal_mask: Callable[[int], Tensor]) -> None:
    """Row t may look at positions 0 to t, and True means that it may.

    Book: 06_attention.html#the-mask
    """
    mask = causal_mask(3)
    assert mask.dtype == torch.bool, f"the mask must be bool, not {mask.dtype}"
    assert mask.shape == (3, 3), f"for 3 words the shape is {tuple(mask.shape)}"
    wanted = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 1, 1]]).bool()
    mistakes = [
        (wanted.T, "row 0 may look at position 2: the mask is upside down"),
        (~wanted, "True marks the future: True must mean 'may look'"),
        (wanted.tril(-1), "row 1 may not look at position 1: a word sees itself"),
    ]
    for table, mistake in mistakes:
        assert not torch.equal(mask, table), mistake
    assert torch.equal(mask, wanted), f"for 3 words: {mask.int().tolist()}"
    assert causal_mask(1).tolist() == [[True]], "a single word must see itself"


def _example() -> Tensor:
    """The words `a miniature Eiffel tower`: columns tall, Paris, small, article."""
    rows = [[0, 0, 0, 1], [1, 0, 2, 0], [1, 2, 0, 0], [2, 1, 0, 0]]
    return torch.tensor(rows, dtype=torch.float64)


def check_attention(attention: Callable[..., tuple[Tensor, Tensor]]) -> None:
    """Weights are the softmax of scaled scores; the context mixes the values.

    Book: 06_attention.html#is-it-right
    """
    x = _example()
    raw, values = x @ x.T, x.flip(-1)
    context, weights = attention(x.clone(), x.clone(), values.clone())
    columns = weights.sum(-2)
    assert not torch.allclose(columns, torch.ones_like(columns)), (
        "softmax over the wrong axis: it runs over the keys"
    )
    mistakes = [
        (raw.softmax(-1), "the scores were not divided by the root of the width"),
        ((raw / 4).softmax(-1), "divided by the width: divide by its square root"),
    ]
    for table, mistake in mistakes:
        assert not torch.allclose(weights, table), mistake
    tower = torch.tensor([0.043, 0.117, 0.317, 0.523], dtype=torch.float64)
    found = [round(weight, 3) for weight in weights[3].tolist()]
    assert torch.allclose(weights[3], tower, atol=5e-4), (
        f"the weights of tower are .043 .117 .317 .523, not {found}"
    )
    assert not torch.allclose(context, weights @ x), "keys were mixed, not values"
    assert torch.allclose(context, weights @ values), "context is weights @ values"
    _check_masked(attention)
    _check_parity(attention)


def _check_masked(attention: Callable[..., tuple[Tensor, Tensor]]) -> None:
    """Hidden words get weight 0, and the others share 1."""
    x, mask = _example(), torch.ones(4, 4).tril().bool()
    given = x.clone(), mask.clone()
    _, weights = attention(x, x, x, mask)
    assert torch.equal(x, given[0]), "the vectors given were changed: work on a copy"
    assert torch.equal(mask, given[1]), "the mask given was changed: work on a copy"
    assert not torch.allclose(weights, attention(x, x, x)[1]), "the mask was ignored"
    assert weights[0, 0] > 0, "row 0 may not look at itself: True means 'may look'"
    assert (weights[~mask] == 0).all(), "a hidden position has a weight above 0"
    total = weights[0].sum().item()
    assert abs(total - 1) < 1e-6, (
        f"the weights of row 0 sum to {total:.3f}: mask before the softmax, not after"
    )


def _check_parity(attention: Callable[..., tuple[Tensor, Tensor]]) -> None:
    """Equal to scaled_dot_product_attention for 3 queries and 5 keys."""
    random = torch.Generator().manual_seed(0)
    shapes = [(2, 1, 3, 8), (2, 4, 5, 8), (2, 4, 5, 6)]
    q, k, v = (
        torch.randn(shape, generator=random, dtype=torch.float64) for shape in shapes
    )
    mask = torch.rand(3, 5, generator=random) < 0.5
    mask[:, 0] = True
    for allowed, scale in ((None, 1), (mask, 1), (None, 1000), (mask, 1000)):
        context, weights = attention(scale * q, k, v, allowed)
        assert weights.shape == (2, 4, 3, 5), f"weights have shape {weights.shape}"
        assert context.dtype == torch.float64, f"of float64 it makes {context.dtype}"
        wanted = F.scaled_dot_product_attention(
            (scale * q).expand(2, 4, 3, 8), k, v, attn_mask=allowed
        )
        gap = (context - wanted).abs().max().item()
        large = ": subtract each row's peak, and mask before the softmax"
        assert gap < 1e-9, (
            f"with scores near {scale} it differs from PyTorch's attention by {gap:.1e}"
            + large * (scale > 1)
        )
        mixed = weights @ v
        assert torch.allclose(mixed, context), "other weights than those of the mixture"


def check_causal(mix: Callable[[Tensor], Tensor], width: int = 4) -> None:
    """A changed word changes its own and later rows, and no earlier one.

    mix: maps vectors (1, T, C) to vectors (1, T, ...), for C = width and T = 5.

    Book: 06_attention.html#is-it-causal
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
        for row in range(5):
            if row < changed:
                assert moved[row] < 1e-6, (
                    f"row {row} looks at position {changed}: the mask lets the future"
                    " through"
                )
            else:
                assert moved[row] > 0, (
                    f"row {row} does not see position {changed}: the past is hidden"
                )


def check_no_nan(attention: Callable[..., tuple[Tensor, Tensor]]) -> None:
    """A row that may look nowhere gives zeros, and no nan in the gradient.

    Book: 06_attention.html#nobody-to-look-at
    """
    x = _example().requires_grad_()
    mask = torch.ones(4, 4).tril().bool()
    mask[2] = False
    context, weights = attention(x, x, x, mask)
    assert not context.isnan().any(), (
        "a word that may look nowhere gets nan: its softmax is 0 / 0"
    )
    assert (weights[2] == 0).all(), (
        "a word that may look nowhere looks at all: hide with -inf, not a large number"
    )
    assert (context[2] == 0).all(), "a word that may look nowhere must get zeros"
    (gradient,) = torch.autograd.grad(context.sum(), x)
    assert gradient.isfinite().all(), "the context is fine, but its gradient is nan"


def check_permutation_equivariant(
    mix: Callable[[Tensor], Tensor], width: int = 4
) -> None:
    """Shuffled words get the same vectors as before, shuffled alike.

    mix: maps vectors (1, T, C) to vectors (1, T, ...), for C = width and T = 5.

    Book: 06_attention.html#it-has-no-order
    """
    random = torch.Generator().manual_seed(0)
    x = torch.randn(1, 5, width, generator=random)
    order = torch.tensor([3, 0, 4, 1, 2])
    before = mix(x)
    moved = (mix(x[:, order]) - before[:, order]).abs().amax(-1)[0]  # (T,)
    row = int(moved.argmax())
    assert moved[row] < 1e-5 * max(1.0, before.detach().abs().max().item()), (
        f"the word moved from position {order[row]} to {row} got another vector:"
        " something here knows the order"
    )


def check_window_mask(window_mask: Callable[[int, int], Tensor]) -> None:
    """Each row may look at itself and at the window - 1 positions before it.

    Book: 06_attention.html#exercise-3-a-sliding-window
    """
    mask = window_mask(5, 2)
    assert mask.dtype == torch.bool, f"the mask must be bool, not {mask.dtype}"
    seen = [row.nonzero().flatten().tolist() for row in mask]
    assert 4 not in seen[3], "row 3 may look at position 4: the future is not hidden"
    assert 4 in seen[4], "row 4 may not look at itself"
    assert seen[4] != [2, 3, 4], "the window holds one position too many: t counts too"
    assert seen == [[0], [0, 1], [1, 2], [2, 3], [3, 4]], f"window 2 sees {seen}"
    assert torch.equal(window_mask(3, 9), torch.ones(3, 3).tril().bool()), (
        "a window wider than the text must give the causal mask"
    )
    wide = window_mask(6, 4)[5].nonzero().flatten().tolist()
    assert wide == [2, 3, 4, 5], f"with a window of 4, row 5 sees {wide}: count them"
    assert window_mask(3, 1).equal(torch.eye(3).bool()), "window 1 is the word itself"


def check_previous_word(make: Callable[[int], tuple[Tensor, Tensor]]) -> None:
    """With the causal mask, each row looks at the position before it.

    Book: 06_attention.html#exercise-4-ask-for-the-word-before
    """
    for size in (6, 300):
        queries, keys = make(size)
        shapes = len(queries), len(keys)
        assert shapes == (size, size), f"{shapes} queries and keys, not {size} of each"
        scores = queries @ keys.T / math.sqrt(queries.shape[-1])
        hidden = ~torch.ones(size, size).tril().bool()
        weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
        assert weights[0, 0] == 1, "row 0 has a score that is no number"
        _check_rows_before(weights)


def _check_rows_before(weights: Tensor) -> None:
    """Each row but the first has nearly all of its weight on the row before."""
    for row in range(len(weights) - 1, 0, -1):
        most, weight = int(weights[row].argmax()), weights[row, row - 1].item()
        assert most != row, f"row {row} looks at itself: it must ask for the key before"
        assert most == row - 1, f"row {row} looks at position {most}, not at {row - 1}"
        assert weight > 0.99, (
            f"row {row} of {len(weights)} looks at position {row - 1} with weight "
            f"{weight:.2f} only: make the scores larger"
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

    Book: 06_attention.html#exercise-5-attention-without-the-table
    """
    random = torch.Generator().manual_seed(0)
    shapes = [(3, 4), (6, 4), (6, 2)]
    q, k, v = (
        torch.randn(shape, generator=random, dtype=torch.float64) for shape in shapes
    )
    for scale in (1, 1000):
        wanted = F.scaled_dot_product_attention(scale * q, k, v)
        found = streaming(scale * q, _vanishing(k, v))
        assert found.dtype == q.dtype, f"of {q.dtype} it makes {found.dtype}"
        assert found.isfinite().all(), (
            "nan: subtract each row's own peak so far, and keep no chunk for later"
        )
        plain = F.scaled_dot_product_attention(scale * q, k, v, scale=1)
        undivided = scale == 1 and torch.allclose(found, plain)  # 1000: all the same
        assert not undivided, "the scores were not divided by the root of the width"
        last = F.scaled_dot_product_attention(scale * q, k[-2:], v[-2:])
        assert not torch.allclose(found, last), "only the last chunk counts"
        assert torch.allclose(found, wanted), (
            "the context is wrong: when a row's peak grows, multiply its total and its"
            " mixture by exp(old peak - new peak), and divide once, at the end"
        )
