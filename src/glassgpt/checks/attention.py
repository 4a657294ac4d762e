# Written by tools/tangle.py from book/06_attention.ipynb: change it there.


"""Checks of masks and of attention that name the mistake they find."""

import gc
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor


def check_causal_mask(causal_mask: Callable[[int], Tensor]) -> None:
    """Row t may look at positions 0 to t, and True means that it may.

    Book: 06_attention.html#is-it-right
    """
    mask = causal_mask(3)
    assert mask.dtype == torch.bool, f"the mask must be bool, not {mask.dtype}"
    assert mask.shape == (3, 3), f"for 3 words the shape is {tuple(mask.shape)}"
    wanted = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 1, 1]]).bool()
    mistakes = [
        (wanted.mT, "row 0 may look at position 2: the mask is transposed"),
        (~wanted, "True marks the future: True must mean 'may look'"),
        (wanted.tril(-1), "row 1 may not look at position 1: a word sees itself"),
    ]
    for table, mistake in mistakes:
        assert not torch.equal(mask, table), mistake
    assert torch.equal(mask, wanted), f"for 3 words: {mask.int().tolist()}"
    assert causal_mask(1).tolist() == [[True]], "a single word must see itself"
    many, wanted = causal_mask(12), torch.ones(12, 12).tril().bool()
    assert torch.equal(many, wanted), "right for 3 words, wrong for 12"


def _check_scale(weights: Tensor, scores: Tensor, width: int) -> None:
    """The weights are powers of the scores divided by the root of the width."""
    logs = weights.log()
    logs = logs - logs.mean(-1, keepdim=True)
    scores = scores - scores.mean(-1, keepdim=True)
    divisor = ((scores * scores).sum() / (scores * logs).sum()).item()
    assert torch.allclose(logs * divisor, scores, atol=1e-3), (
        "the weights are not the softmax of the scores along the keys"
    )
    hints = {1: "not divided at all", width: "divided by the width itself"}
    hint = hints.get(round(divisor, 3), f"divided by {divisor:.3g}")
    assert abs(divisor / width**0.5 - 1) < 1e-3, (
        f"the scores are {hint}: divide by {width**0.5:.3g}, the square root of the"
        f" width {width}"
    )


def _check_hidden(weights: Tensor, mask: Tensor) -> None:
    """Hidden positions get weight 0, and the others share 1, if there are any."""
    seen = mask.any(-1)
    assert (weights[:, :, seen] * mask[seen]).sum() > 0, (
        "a position with True gets no weight: True means 'may look'"
    )
    assert (weights[..., ~mask] == 0).all(), "a hidden position has a weight above 0"
    total = weights[:, :, seen].sum(-1)
    assert torch.allclose(total, torch.ones_like(total)), (
        f"the weights of a row sum to {total.min():.3f}: mask before the softmax"
    )


def check_attention(attention: Callable[..., tuple[Tensor, Tensor]]) -> None:
    """Weights are the softmax of scaled scores; the context mixes the values.

    Book: 06_attention.html#is-it-right
    """
    random = torch.Generator().manual_seed(0)
    shapes = [(2, 1, 3, 8), (2, 4, 5, 8), (2, 4, 5, 6)]
    q, k, v = (
        torch.randn(shape, generator=random, dtype=torch.float64) for shape in shapes
    )
    mask = torch.tensor([[1, 0, 1, 0, 0], [0, 0, 0, 0, 1], [1, 1, 0, 1, 1]]).bool()
    given = [part.clone() for part in (q, k, v, mask)]
    both = attention(q, k, v)
    assert isinstance(both, tuple), "return a tuple: the context and the weights"
    context, weights = both
    changed = "what was given has changed: work on a copy"
    assert all(map(torch.equal, (q, k, v), given)), changed
    assert weights.shape == (2, 4, 3, 5), f"weights have shape {tuple(weights.shape)}"
    sums = weights.sum(-2)
    assert not torch.allclose(sums, torch.ones_like(sums)), (
        "softmax over the wrong axis: it runs over the keys, the last one"
    )
    _check_scale(weights, q @ k.mT, width=8)
    assert context.shape[-1] == 6, "as wide as the keys: mix the values, not the keys"
    assert context.dtype == q.dtype, f"of {q.dtype} it makes {context.dtype}"
    assert torch.allclose(context, weights @ v), "the context is weights @ values"
    q, k, v = (part.requires_grad_() for part in (q, k, v))
    masked, hidden = attention(q, k, v, mask)
    assert not torch.allclose(hidden, weights), "the mask was ignored"
    _check_hidden(hidden.detach(), mask)
    seen = mask.any(-1)
    shares = (weights * mask)[:, :, seen]
    shares = shares / shares.sum(-1, keepdim=True)
    assert torch.allclose(hidden[:, :, seen], shares), (
        "with a mask the positions that are seen must share as without one: the scale"
        " is the same"
    )
    assert torch.allclose(masked, hidden @ v), "other weights than those of the mixture"
    full = F.scaled_dot_product_attention(q.expand(2, 4, 3, 8), k, v, mask)
    gaps = torch.autograd.grad((masked - full).sum(), (q, k, v))
    for name, gap in zip(("queries", "keys", "values"), gaps, strict=True):
        assert gap.isfinite().all(), "the context is fine, but its gradient is nan"
        right = gap.abs().max() < 1e-5
        assert right, f"the {name} get a wrong gradient: don't detach them, or a part"
    assert all(map(torch.equal, (q, k, v, mask), given)), changed
    _check_large(attention, 1000 * q.detach(), k, v, mask[2:])
    narrow = q.detach()[..., :3], k[..., :3]
    _check_scale(attention(*narrow, v)[1], narrow[0] @ narrow[1].mT, width=3)
    padding = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]]).bool()[:, None, None]
    _, hidden = attention(q, k, v, padding)
    assert hidden.shape == weights.shape, "a mask (B, 1, 1, S) must broadcast"
    assert (hidden[~padding.expand_as(hidden)] == 0).all(), (
        "a mask (B, 1, 1, S) hides other keys in each text of the batch"
    )
    single, advice = "on a single text, queries (T, D)", "name only the last two axes"
    try:
        alone, _ = attention(q.detach()[0, 0], k[0, 0], v[0, 0])
    except (RuntimeError, ValueError, IndexError) as error:
        raise AssertionError(f"fails {single}: {advice} ({error})") from error
    equal = alone.shape == (3, 6) and torch.allclose(alone, context[0, 0])
    assert equal, f"wrong {single}: {advice}"


def _check_large(
    attention: Callable[..., tuple[Tensor, Tensor]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
) -> None:
    """Equal to PyTorch's attention, however large the scores."""
    context, _ = attention(q, k, v, mask)
    full = q.expand(2, 4, 3, 8)
    wanted = F.scaled_dot_product_attention(full, k, v, attn_mask=mask.expand(3, 5))
    assert torch.allclose(context, wanted, atol=1e-2), (
        "wrong with scores near 1000: subtract each row's peak in the softmax, and mask"
        " before it"
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
        scores = queries @ keys.T / math.sqrt(queries.shape[-1])
        hidden = ~torch.ones(size, size).tril().bool()
        weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
        assert weights.isfinite().all(), (
            "a score is infinite or no number: make the scores smaller"
        )
        before = weights.diagonal(-1)  # of row t the weight on t - 1
        row = int(before.argmin()) + 1
        most, weight = int(weights[row].argmax()), before[row - 1].item()
        assert most != row, f"row {row} looks at itself: ask for the key before"
        assert most == row - 1, f"row {row} looks at position {most}, not {row - 1}"
        assert weight > 0.99, (
            f"row {row} of {size} looks at position {row - 1} with weight "
            f"{weight:.3f} only: make the scores larger"
        )


@contextmanager
def _without_collection() -> Iterator[None]:
    """Nothing old leaves the memory meanwhile, so that what is new can be counted."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _numbers_alive() -> int:
    """How many numbers are in tensors that somebody still holds."""
    return sum(t.numel() for t in gc.get_objects() if type(t) is Tensor)


def _vanishing(keys: Tensor, values: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of chunks; when the next one is asked for, the last is gone."""
    pairs = list(zip(keys.split(2), values.split(2), strict=True))
    yield from _vanish(*pairs[:5])
    kept = _numbers_alive()
    yield from _vanish(*pairs[5:])
    grown = _numbers_alive() - kept
    assert grown < keys.numel() / 8, (
        f"between chunk 5 and the last, {grown} numbers more are kept: keep a peak, a"
        " total and a mixture for each row, and nothing of the chunks"
    )


def _vanish(*pairs: tuple[Tensor, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    for keys, values in pairs:
        chunk = keys.clone(), values.clone()
        yield chunk
        for part in chunk:
            part.fill_(math.nan)


@_without_collection()
def check_streaming_attention(
    streaming: Callable[[Tensor, Iterator[tuple[Tensor, Tensor]]], Tensor],
) -> None:
    """Keys and values that come in chunks, each seen once, give the same context.

    Book: 06_attention.html#exercise-4-attention-without-the-table
    """
    random = torch.Generator().manual_seed(0)
    shapes = [(3, 5), (60, 5), (60, 2)]
    q, k, v = (torch.randn(shape, generator=random) for shape in shapes)
    own = "subtract each row's own peak so far, and keep no chunk for later"
    low = "start with the peak -inf, for all scores of a row may be low"
    cases = [(q, k, own), (1000 * q, k, own), (1000 * q.abs(), -k.abs(), low)]
    for queries, keys, advice in cases:
        given = queries.clone()
        found = streaming(queries, _vanishing(keys, v)).to(q.dtype)
        assert torch.equal(queries, given), "the queries have changed: work on a copy"
        assert found.isfinite().all(), f"nan: {advice}"
        last = F.scaled_dot_product_attention(queries, keys[-2:], v[-2:])
        assert not torch.allclose(found, last), "only the last chunk counts"
        plain = F.scaled_dot_product_attention(queries, keys, v, scale=1)
        undivided = queries is q and torch.allclose(found, plain, atol=1e-4)
        assert not undivided, "the scores were not divided by the root of the width"
        wanted = F.scaled_dot_product_attention(queries, keys, v)
        assert torch.allclose(found, wanted, atol=1e-3), (
            "the context is wrong: when a row's peak grows, multiply its total and its"
            " mixture by exp(old peak - new peak), and divide once, at the end"
        )
