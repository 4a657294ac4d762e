# Written by tools/tangle.py from book/05_softmax.ipynb: change it there.


"""Checks of softmax, log-softmax and cross-entropy that name the mistake they find."""

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from glassgpt.checks.expect import expect_same

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
    mistakes = {
        "the columns sum to 1, not the rows: normalized over the wrong axis": (
            lambda x: x.softmax(0)
        ),
        "each row is divided by the sums of the columns: sum over dim, too": (
            lambda x: (x - x.amax(-1, keepdim=True)).softmax(0)
        ),
        "a row is divided by the sums of other rows: sum with keepdim=True": (
            lambda x: x.exp() / x.exp().sum(-1)
        ),
    }
    of_rows, right = partial(softmax, dim=-1), partial(torch.softmax, dim=-1)
    # A square table: on another shape some of these mistakes raise an error.
    square = _some_scores(3, 3)
    hint = "Divide exp of the scores by the sum of their own row"
    expect_same(of_rows, right, square, mistakes=mistakes, hint=hint)
    assert of_rows(square + 1000).isfinite().all(), (
        "scores near 1000 give nan: forgot to subtract the maximum before exp"
    )
    hint = "Scores near -1000: subtract the maximum, whatever its sign"
    expect_same(of_rows, right, square - 1000, hint=hint)
    hint = "A low row stands beside a high one: subtract each row's own maximum"
    expect_same(of_rows, right, _HIGH_AND_LOW, hint=hint)
    for dim in (0, 1, 2):
        expect_same(
            partial(softmax, dim=dim),
            partial(torch.softmax, dim=dim),
            _some_scores(2, 3, 4),
            hint=f"dim={dim} is the axis that sums to 1",
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
    for scores in (_some_scores(3, 3), _HIGH_AND_LOW):
        for dim in (0, -1):
            expect_same(
                partial(log_softmax, dim=dim),
                partial(torch.log_softmax, dim=dim),
                scores,
                hint=f"Along dim={dim}, from each row subtract its own maximum, then"
                " the log of its own sum",
            )


def check_cross_entropy(cross_entropy: Callable[..., Tensor]) -> None:
    """Cross-entropy is the mean surprise in nats over the targets that count.

    cross_entropy: called as cross_entropy(logits, targets), (..., V) and (...).

    Book: 05_softmax.html#the-equation
    """

    def reference(logits: Tensor, ids: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, -2), ids.flatten())

    mistakes = {
        "softmax was applied twice: pass logits": (
            lambda x, ids: reference(x.softmax(-1), ids)
        ),
        "this is the sum over the positions: take the mean": (
            lambda x, ids: (ids >= 0).sum() * reference(x, ids)
        ),
        "ignored positions still count in the mean: divide by those that are left": (
            lambda x, ids: reference(x, ids) * (ids >= 0).double().mean()
        ),
    }
    logits = _some_scores(2, 3, 5)
    every = torch.tensor([[0, 1, 2], [3, 4, 0]])
    some = torch.tensor([[-100, -100, 2], [3, 4, 0]])
    hint = "It is the mean of minus the natural logarithm of the targets' probabilities"
    expect_same(cross_entropy, reference, logits, every, mistakes=mistakes, hint=hint)
    hint = "Targets of -100 are ignored, and all others count alike"
    expect_same(cross_entropy, reference, logits, some, mistakes=mistakes, hint=hint)
    hint = "These logits are large: add log-softmax, not the logarithm of softmax"
    expect_same(cross_entropy, reference, 1000 * logits[0], every[0], hint=hint)


def check_masked_softmax(masked_softmax: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Forbidden entries get probability 0, and the allowed ones sum to 1.

    Book: 05_softmax.html#exercises
    """

    def reference(x: Tensor, allowed: Tensor) -> Tensor:
        return x.masked_fill(~allowed, -math.inf).softmax(-1)

    mistakes = {
        "the allowed entries don't sum to 1: forbid before the softmax, not after": (
            lambda x, allowed: x.softmax(-1) * allowed
        ),
        "the allowed entries got 0: invert the mask with ~": (
            lambda x, allowed: reference(x, ~allowed)
        ),
        "a forbidden entry has a probability above 0: its score must be -inf, not 0": (
            lambda x, allowed: (x * allowed).softmax(-1)
        ),
    }
    x = torch.tensor([[0.0, 1.0, 2.0, 2.5], [2.5, 2.0, 1.0, 0.0]])
    large = torch.tensor([[0.0, 1.0, 1000.0, 0.0], [1000.0, 1001.0, 0.0, 1.0]])
    allowed = torch.tensor([[True, True, False, False], [False, True, True, True]])
    for scores in (x, large):
        expect_same(
            masked_softmax,
            reference,
            scores,
            allowed,
            mistakes=mistakes,
            hint="Set forbidden scores to -inf with masked_fill before anything else,"
            " then take the softmax of each row",
        )


def check_cross_entropy_gradient(gradient: Callable[[Tensor, Tensor], Tensor]) -> None:
    """The gradient of the mean cross-entropy is (p - one-hot) / T.

    Book: 05_softmax.html#exercises
    """
    targets = torch.tensor([1, 2, 2, 0, 1, 2])  # the last id, 3, doesn't occur

    def reference(logits: Tensor, targets: Tensor) -> Tensor:
        return (logits.softmax(-1) - F.one_hot(targets, 4)) / 6

    mistakes = {
        "the sign is wrong: this is one-hot - p": lambda x, y: -reference(x, y),
        "the gradient of the sum: divide by the number of positions": (
            lambda x, y: 6 * reference(x, y)
        ),
        "p alone doesn't know the target: subtract 1 there": (
            lambda x, y: x.softmax(-1) / 6
        ),
    }
    for logits in (_some_scores(6, 4), 1000 * _some_scores(6, 4)):
        expect_same(
            gradient,
            reference,
            logits,
            targets,
            mistakes=mistakes,
            gradients=False,
            hint="It is p minus one-hot, divided by the number of positions, also"
            " where logits are near 1000",
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
        given = f"{scores.tolist()} gives"
        found = torch.as_tensor(one_pass(_vanishing(scores)))
        wanted = torch.logsumexp(scores, 0)
        assert not found.isnan(), (
            f"{given} nan: multiply the old sum by exp(old peak - new peak), not the"
            " other way round, and keep no chunk: each is gone when the next one comes"
        )
        assert not found.isposinf(), f"{given} inf: subtract the peak before exp"
        assert abs(found - wanted) < 1e-3, (
            f"{given} {found:.3f}, not {wanted:.3f}: start with the peak -inf; when the"
            " peak grows, multiply the old sum by exp(old peak - new peak); at the end,"
            " return peak + log of the total"
        )
