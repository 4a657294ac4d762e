# Written by tools/tangle.py from book/05_softmax.ipynb: change it there.


"""Checks of softmax, log-softmax and cross-entropy that name the mistake they find."""

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from glassgpt.checks.expect import close, expect_same

# Two rows of the same differences: they have the same probabilities.
_HIGH_AND_LOW = torch.tensor([[2000.0, 2001.0], [0.0, 1.0]])


def _some_scores(*shape: int) -> Tensor:
    random = torch.Generator().manual_seed(0)
    return 5 * torch.randn(shape, generator=random, dtype=torch.float64)


def check_softmax(softmax: Callable[..., Tensor]) -> None:
    """Probabilities along an axis; only the differences of scores count.

    softmax: called as softmax(x, dim=...).

    Book: 05_softmax.html#the-check
    """
    # A square table: on another shape some of these mistakes raise an error.
    x = torch.tensor([[0.0, 1.0, 2.0], [3.0, -1.0, 0.5], [-2.0, 0.0, 0.5]])
    rows = softmax(x.clone(), dim=-1)
    assert rows.shape == x.shape, f"the shape changed to {tuple(rows.shape)}"
    low = rows.min().item()
    assert low > 0, f"an entry is {low:.3f}, not positive: take exp of the scores"
    assert not close(rows.sum(0), torch.ones(3)), (
        "the columns sum to 1, not the rows: normalized over the wrong axis"
    )
    assert close(rows.sum(-1), torch.ones(3)), (
        f"row 0 sums to {rows[0].sum():.3f}, not to 1: divide each row by its own sum,"
        " with keepdim=True"
    )
    assert softmax(x + 1000, dim=-1).isfinite().all(), (
        "scores near 1000 give nan: forgot to subtract the maximum before exp"
    )
    assert softmax(x - 1000, dim=-1).isfinite().all(), (
        "scores near -1000 give nan: subtract the maximum, whatever its sign"
    )
    high, low_row = softmax(_HIGH_AND_LOW.clone(), dim=-1)
    assert torch.allclose(high, low_row, atol=1e-3), (
        "a low row beside a high one is wrong: subtract each row's own maximum"
    )
    never = softmax(torch.tensor([0.0, -math.inf]), dim=-1)
    assert never[1] == 0, f"a score of -inf must get 0, not {never[1]:.1e}"
    for dim in (0, 1, 2, -1):
        for scores in (_some_scores(2, 3, 4), _some_scores(2, 3, 4) + 1000):
            expect_same(
                partial(softmax, dim=dim),
                partial(torch.softmax, dim=dim),
                scores,
                hint=f"dim={dim} is the axis that sums to 1, the base is e, and adding"
                " a constant to all scores changes nothing",
            )


def check_log_softmax(log_softmax: Callable[..., Tensor]) -> None:
    """Log-softmax is the logarithm of softmax, also where softmax overflows or is 0.

    log_softmax: called as log_softmax(x, dim=...).

    Book: 05_softmax.html#logarithms-of-probabilities
    """
    large = log_softmax(torch.tensor([1000.0, 1001.0]), dim=-1)
    assert large.isfinite().all(), (
        "scores near 1000 give inf or nan: forgot to subtract the maximum"
    )
    small = log_softmax(torch.tensor([0.0, 2000.0]), dim=-1)[0].item()
    assert abs(abs(small) - 2000) < 1e-2, (
        f"the log of a tiny probability is {small:.4g}, not -2000: subtract the log of"
        " the sum from the scores instead of taking the log of softmax"
    )
    for scores in (_some_scores(3, 3), _some_scores(3, 3) - 1000, _HIGH_AND_LOW):
        for dim in (0, -1):
            expect_same(
                partial(log_softmax, dim=dim),
                partial(torch.log_softmax, dim=dim),
                scores,
                mistakes={"the sign is wrong": lambda x, dim=dim: -x.log_softmax(dim)},
                hint=f"along dim={dim}, from each row subtract its own maximum, then"
                " the log of its own sum",
            )


def check_cross_entropy(cross_entropy: Callable[..., Tensor]) -> None:
    """Cross-entropy is the mean surprise in nats over the targets that count.

    cross_entropy: called as cross_entropy(logits, targets), (..., V) and (...).

    Book: 05_softmax.html#the-equation
    """
    targets = torch.tensor([[0, 1, 2], [3, 4, 0]])
    some = torch.tensor([[-100, -100, 2], [3, 4, 0]])
    logits = _some_scores(2, 3, 5)

    def reference(logits: Tensor, ids: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, -2), ids.flatten())

    def by_texts(logits: Tensor, ids: Tensor) -> Tensor:
        return (reference(logits[:1], ids[:1]) + reference(logits[1:], ids[1:])) / 2

    mistakes = {
        "the sign is wrong: surprise is minus the logarithm": (
            lambda x, ids: -reference(x, ids)
        ),
        "this is the sum over the positions: take the mean": (
            lambda x, ids: (ids >= 0).sum() * reference(x, ids)
        ),
        "these are bits: use the natural logarithm": (
            lambda x, ids: reference(x, ids) / math.log(2)
        ),
        "softmax was applied twice: pass logits": (
            lambda x, ids: reference(x.softmax(-1), ids)
        ),
        "a mean of the texts' means: all positions that count have the same weight": (
            by_texts
        ),
        "ignored positions still count in the mean: divide by those that are left": (
            lambda x, ids: reference(x, ids) * (ids >= 0).double().mean()
        ),
    }
    expect_same(cross_entropy, reference, logits, targets, mistakes=mistakes)
    hint = "targets of -100 must be ignored"
    expect_same(cross_entropy, reference, logits, some, mistakes=mistakes, hint=hint)
    hint = "these logits are large: add log-softmax, not the logarithm of softmax"
    expect_same(cross_entropy, reference, 1000 * logits[0], targets[0], hint=hint)


def check_masked_softmax(masked_softmax: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Forbidden entries get probability 0, and the allowed ones sum to 1.

    Book: 05_softmax.html#exercises
    """
    x = torch.tensor([[0.0, 1.0, 2.0, 2.5], [2.5, 2.0, 1.0, 0.0]])
    allowed = torch.tensor([[True, True, False, False], [True, True, True, True]])
    result = masked_softmax(x.clone(), allowed)
    assert not result[0].isnan().any(), (
        "nan: 0 times infinity is no number, use masked_fill"
    )
    assert (result[0, :2] > 0).all(), "an allowed entry got 0: invert the mask with ~"
    assert (result[~allowed] == 0).all(), "a forbidden entry has a probability above 0"
    total = result[0].sum().item()
    assert abs(total - 1) < 1e-5, (
        f"the allowed entries sum to {total:.3f}: forbid before the softmax, not after"
    )

    def reference(x: Tensor, allowed: Tensor) -> Tensor:
        return x.masked_fill(~allowed, -math.inf).softmax(-1)

    hint = (
        "a forbidden score is -inf before anything else, and the softmax needs dim=-1"
    )
    large = torch.tensor([[0.0, 1.0, 1000.0, 0.0], [1000.0, 1001.0, 0.0, 1.0]])
    for scores in (x, x[None], large, large - 1000):
        mask = allowed if scores.dim() == 2 else allowed[None]
        expect_same(masked_softmax, reference, scores, mask, hint=hint)


def check_cross_entropy_gradient(gradient: Callable[[Tensor, Tensor], Tensor]) -> None:
    """The gradient of the mean cross-entropy is (p - one-hot) / T.

    Book: 05_softmax.html#exercises
    """
    logits = _some_scores(6, 4)
    targets = torch.tensor([1, 2, 2, 0, 1, 2])  # the last id, 3, doesn't occur

    def reference(logits: Tensor, targets: Tensor) -> Tensor:
        return (logits.softmax(-1) - F.one_hot(targets, 4)) / 6

    mistakes = {
        "the sign is wrong: this is one-hot - p": lambda x, y: -reference(x, y),
        "the sign is wrong, and the sum is not divided by T": (
            lambda x, y: -6 * reference(x, y)
        ),
        "the gradient of the sum: divide by the number of positions": (
            lambda x, y: 6 * reference(x, y)
        ),
        "divided by V: divide by T, the number of positions": (
            lambda x, y: 6 * reference(x, y) / 4
        ),
        "p alone doesn't know the target: subtract 1 there": (
            lambda x, y: x.softmax(-1) / 6
        ),
        "1 was subtracted at every target in every row: one a row": (
            lambda x, y: (x.softmax(-1) - F.one_hot(y.unique(), 4).sum(0)) / 6
        ),
    }
    hint = "p minus one-hot, divided by the number of positions"
    with torch.no_grad():
        given = logits.clone()
        found = gradient(logits, targets)
        assert torch.equal(logits, given), "the logits were changed: work on a copy"
        shape = tuple(found.shape)
        assert found.shape == logits.shape, f"the shape is {shape}, not (6, 4)"
        for mistake, wrong in mistakes.items():
            assert not close(found, wrong(logits, targets)), mistake
        assert close(found, reference(logits, targets)), f"another gradient: {hint}"
        assert gradient(1000 * logits, targets).isfinite().all(), (
            "logits near 1000 give nan: subtract the maximum, as softmax does"
        )


def _vanishing(scores: Tensor) -> Iterator[Tensor]:
    """Chunks of scores; when the next one is asked for, the last is gone."""
    for part in scores.split(2):
        chunk = part.clone()
        yield chunk
        chunk.fill_(math.nan)


def check_one_pass(one_pass: Callable[[Iterable[Tensor]], Tensor]) -> None:
    """The log-sum-exp of scores that come in chunks, each seen once.

    Book: 05_softmax.html#exercises
    """
    x = torch.tensor([0.0, 1.0, 2.0, 2.5, 1000.0, 1001.0])
    for scores in (x[:4], x[:4].flip(0), x, x.flip(0), x[:4] - 2000):
        listed = scores.tolist()
        found = torch.as_tensor(one_pass(_vanishing(scores)))
        wanted = torch.logsumexp(scores, 0)
        assert not found.isnan(), (
            f"{listed} gives nan: multiply the old sum by exp(old peak - new peak), not"
            " the other way round, and keep no chunk for later: each is gone when the"
            " next one comes"
        )
        assert not found.isposinf(), f"{listed} gives inf: subtract the peak before exp"
        assert not found.isneginf(), (
            f"{listed} gives -inf: start with the peak -inf, for all scores may be low,"
            " and make the new peak the old one after each chunk"
        )
        assert abs(found - wanted) < 1e-3, (
            f"{listed} gives {found:.3f}, not {wanted:.3f}: when the peak grows,"
            " multiply the old sum by exp(old peak - new peak); at the end, return"
            " peak + log of the total"
        )
