# Written by tools/tangle.py from book/05_softmax.ipynb: change it there.
"""Checks of softmax, log-softmax and cross-entropy that name the mistake they find."""

import math
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor


def _what_sums_to_one(x: Tensor, result: Tensor) -> str:
    """Name the mistake in a square table whose rows should sum to 1."""
    one = torch.ones((), dtype=result.dtype)
    if torch.allclose(result.sum(0), one):
        return "the columns sum to 1, not the rows: normalized over the wrong axis"
    if torch.allclose(result.sum(), one):
        return "the whole table sums to 1, not each row: sum along dim only"
    if torch.allclose(result, x.exp() / x.exp().sum(-1)):
        return "column j was divided by the sum of row j: sum with keepdim=True"
    return f"row 0 sums to {result[0].sum():.3f}, not to 1: divide by the row's sum"


def check_probabilities(softmax: Callable[..., Tensor]) -> None:
    """Each slice along the axis is positive and sums to 1.

    softmax: called as softmax(x) for the last axis and softmax(x, dim=0).

    Book: 05_softmax.html#the-checks
    """
    x = torch.tensor([[0.0, 1.0, 2.0], [3.0, -1.0, 0.5], [-2.0, 0.0, 0.5]])
    x = x.double()
    before = x.clone()
    rows, columns = softmax(x), softmax(x, dim=0)
    assert torch.equal(x, before), "the scores were changed in place: work on a copy"
    assert rows.shape == x.shape, f"the shape changed to {tuple(rows.shape)}"
    low = rows.min().item()
    assert low > 0, f"an entry is {low:.3f}, not positive: take exp of the scores"
    one = torch.ones(3, dtype=rows.dtype)
    assert torch.allclose(rows.sum(-1), one), _what_sums_to_one(x, rows)
    assert torch.allclose(columns.sum(0), one), "dim=0 was ignored"
    quarter = softmax(torch.tensor([0.0, math.log(3)]))[0].item()
    assert abs(quarter - 0.25) < 1e-6, (
        f"scores 0 and ln 3 must give 0.25 and 0.75, not {quarter:.3f}: is the base e?"
    )


def check_stable(softmax: Callable[..., Tensor]) -> None:
    """Only differences of scores count, and large scores give finite probabilities.

    Book: 05_softmax.html#the-checks
    """
    x = torch.tensor([0.0, 1.0, 2.0, 2.5])
    wanted, large, low = softmax(x), softmax(x + 1000), softmax(x - 1000)
    assert large.isfinite().all(), (
        "scores near 1000 give nan: forgot to subtract the maximum before exp"
    )
    assert low.isfinite().all(), (
        "scores near -1000 give nan: subtract the maximum, whatever its sign"
    )
    for shifted in (large, low):
        assert torch.allclose(shifted, wanted, atol=1e-6), (
            "adding a constant to all scores changed the probabilities"
        )
    never = softmax(torch.tensor([0.0, -math.inf]))
    assert never[1] == 0, f"a score of -inf must get 0, not {never[1]:.3f}"
    rows = softmax(torch.tensor([[2000.0, 2001.0], [0.0, 1.0]]))
    assert torch.allclose(rows[0], rows[1]), (
        "a low row beside a high one is wrong: subtract each row's own maximum"
    )


def check_temperature(softmax: Callable[..., Tensor]) -> None:
    """The temperature divides the scores; only positive numbers are accepted.

    Book: 05_softmax.html#the-checks
    """
    x = torch.tensor([0.0, 1.0, 2.0, 2.5], dtype=torch.float64)
    warm = softmax(x, temperature=2.0)
    mistakes = {"multiplied instead of divided": x * 2, "ignored": x}
    for mistake, scores in mistakes.items():
        same = torch.allclose(warm, torch.softmax(scores, -1))
        assert not same, f"the temperature was {mistake}"
    assert torch.allclose(warm, torch.softmax(x / 2, -1)), (
        "the temperature must divide the scores before exp"
    )
    hot = softmax(x, temperature=1e6)
    assert torch.allclose(hot, torch.full_like(x, 0.25), atol=1e-4), (
        "at temperature 1e6 the probabilities must be nearly equal"
    )
    for bad in (0.0, -1.0, math.nan):
        try:
            softmax(x, temperature=bad)
        except ValueError:
            continue
        raise AssertionError(f"temperature={bad} must raise ValueError")


def check_softmax(softmax: Callable[..., Tensor]) -> None:
    """Softmax gives probabilities, is stable, has a temperature, equals PyTorch's.

    Book: 05_softmax.html#the-checks
    """
    check_probabilities(softmax)
    check_stable(softmax)
    check_temperature(softmax)
    random = torch.Generator().manual_seed(0)
    x = 5 * torch.randn(2, 3, 4, generator=random, dtype=torch.float64)
    for dim in (0, 1, 2, -1):
        gap = (softmax(x, dim=dim) - torch.softmax(x, dim)).abs().max().item()
        assert gap < 1e-12, f"differs from torch.softmax by {gap:.1e} along dim={dim}"


def check_log_softmax(log_softmax: Callable[..., Tensor]) -> None:
    """Log-softmax is the logarithm of softmax, also where softmax overflows or is 0.

    Book: 05_softmax.html#logarithms-of-probabilities
    """
    large = log_softmax(torch.tensor([1000.0, 1001.0]))
    assert large.isfinite().all(), (
        "scores near 1000 give inf or nan: forgot to subtract the maximum"
    )
    small = log_softmax(torch.tensor([0.0, 200.0]))
    assert small.isfinite().all(), (
        "the log of a tiny probability is -inf: subtract the log of the sum from the"
        " scores instead of taking the log of softmax"
    )
    random = torch.Generator().manual_seed(0)
    x = 5 * torch.randn(3, 3, generator=random, dtype=torch.float64)
    result = log_softmax(x)
    assert (result <= 0).all(), "a log-probability is positive: is the sign right?"
    assert torch.allclose(result.exp().sum(-1), torch.ones(3).double()), (
        _what_sums_to_one(x, result.exp())
    )
    for dim in (0, 1):
        gap = (log_softmax(x, dim=dim) - torch.log_softmax(x, dim)).abs().max().item()
        assert gap < 1e-12, f"differs from torch.log_softmax by {gap:.1e}, dim={dim}"


def _refuses(cross_entropy: Callable[..., Tensor], shape: tuple, target: int) -> bool:
    """True when ValueError is raised for targets of this shape and value; V is 5."""
    try:
        cross_entropy(torch.zeros(2, 3, 5), torch.full(shape, target))
    except ValueError:
        return True
    return False


def check_cross_entropy(cross_entropy: Callable[..., Tensor]) -> None:
    """Cross-entropy is the mean surprise in nats over the targets that count.

    Book: 05_softmax.html#cross-entropy-how-surprised-was-the-model
    """
    uniform, nats = torch.zeros(2, 3, 5), math.log(5)
    targets = torch.tensor([[0, 1, 2], [3, 4, 0]])
    loss = cross_entropy(uniform, targets).item()
    mistakes = {
        -nats: "the sign is wrong: surprise is minus the logarithm",
        6 * nats: "this is the sum over the positions: take the mean",
        math.log2(5): "these are bits: use the natural logarithm",
    }
    for value, mistake in mistakes.items():
        assert abs(loss - value) > 1e-4, mistake
    assert abs(loss - nats) < 1e-4, f"equal scores must give ln 5, not {loss:.3f}"
    random = torch.Generator().manual_seed(0)
    logits = 5 * torch.randn(2, 3, 5, generator=random, dtype=torch.float64)
    wanted = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    loss = cross_entropy(logits, targets)
    twice = F.cross_entropy(logits.softmax(-1).flatten(0, 1), targets.flatten())
    assert not torch.allclose(loss, twice), "softmax was applied twice: pass logits"
    assert (loss - wanted).abs() < 1e-12, f"{loss:.6f} instead of {wanted:.6f}"
    _check_ignored(cross_entropy, logits, targets)
    assert cross_entropy(1000 * logits, targets).isfinite(), "large logits give nan"
    assert _refuses(cross_entropy, (3, 2), 0), "(2, 3, 5) and (3, 2): no ValueError"
    assert _refuses(cross_entropy, (2, 3), 5), "target 5 of 5 words: no ValueError"


def _check_ignored(
    cross_entropy: Callable[..., Tensor], logits: Tensor, targets: Tensor
) -> None:
    """Targets of -100 must leave both the sum and the number of positions."""
    some = targets.clone()
    some[0] = -100
    wanted = F.cross_entropy(logits.flatten(0, 1), some.flatten())
    loss = cross_entropy(logits, some)
    assert not torch.allclose(loss, wanted / 2), (
        "ignored positions still count in the mean: divide by those that are left"
    )
    assert torch.allclose(loss, wanted), "targets of -100 must be ignored"


def check_masked_softmax(masked_softmax: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Forbidden entries get probability 0, and the allowed ones sum to 1.

    Book: 05_softmax.html#exercise-1-some-words-may-not-be-chosen
    """
    x = torch.tensor([[0.0, 1.0, 2.0, 2.5], [2.5, 2.0, 1.0, 0.0]])
    allowed = torch.tensor([[True, True, False, False], [True, True, True, True]])
    result = masked_softmax(x, allowed)
    assert (result[0, :2] > 0).all(), "an allowed entry got 0: turn the mask with ~"
    assert (result[~allowed] == 0).all(), "a forbidden entry has a probability above 0"
    total = result[0].sum().item()
    assert abs(total - 1) < 1e-6, (
        f"the allowed entries sum to {total:.3f}: forbid before the softmax, not after"
    )
    assert torch.allclose(result[0, :2], torch.softmax(x[0, :2], -1)), (
        "a forbidden entry still took part: its score must be -inf, not 0"
    )
    assert torch.allclose(result[1], torch.softmax(x[1], -1)), (
        "a row in which all is allowed changed"
    )


def check_cross_entropy_gradient(gradient: Callable[[Tensor, Tensor], Tensor]) -> None:
    """The gradient of the mean cross-entropy is (p - onehot) / T, as autograd says.

    Book: 05_softmax.html#exercise-3-the-gradient-without-autograd
    """
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, generator=random, dtype=torch.float64)
    logits.requires_grad_()
    targets = torch.tensor([1, 3, 3])
    (wanted,) = torch.autograd.grad(F.cross_entropy(logits, targets), logits)
    logits = logits.detach()
    result, p = gradient(logits.clone(), targets), torch.softmax(logits, -1)
    assert result.shape == (3, 4), f"the shape is {tuple(result.shape)}, not (3, 4)"
    every_row = p.clone()
    every_row[:, targets] -= 1
    mistakes = [
        (-wanted, "the sign is wrong: this is onehot - p"),
        (3 * wanted, "the gradient of the sum: divide by the number of positions"),
        (p / 3, "p alone doesn't know the target: subtract 1 there"),
        (p, "p alone doesn't know the target: subtract 1 there, then divide by T"),
        (every_row / 3, "1 was subtracted at every target in every row: one a row"),
    ]
    for value, mistake in mistakes:
        assert not torch.allclose(result, value), mistake
    gap = (result - wanted).abs().max().item()
    assert gap < 1e-12, f"differs from autograd by {gap:.1e}"


def check_one_pass(one_pass: Callable[[Iterable[Tensor]], Tensor]) -> None:
    """The log-sum-exp of scores that come in chunks, each seen once.

    Book: 05_softmax.html#exercise-4-one-look-at-each-score
    """
    x = torch.tensor([0.0, 1.0, 2.0, 2.5, 1000.0, 1001.0])
    for scores in (x[:4], x[:4].flip(0), x, x.flip(0)):
        found = one_pass(iter(scores.split(2)))
        wanted = torch.logsumexp(scores, 0)
        listed = scores.tolist()
        assert math.isfinite(found), f"{listed} gives {found:.1f}: subtract the peak"
        last = torch.logsumexp(scores[-2:], 0)
        assert abs(found - last) > 1e-4 or abs(last - wanted) < 1e-4, (
            "only the last chunk counts: carry the sum over"
        )
        assert abs(found - wanted) < 1e-4, (
            f"{listed} gives {found:.3f}, not {wanted:.3f}: when the peak grows,"
            " multiply the old sum by exp(old peak - new peak)"
        )
