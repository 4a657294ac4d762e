# Written by tools/tangle.py from book/05_softmax.ipynb: change it there.


"""Checks of softmax, log-softmax and cross-entropy that name the mistake they find."""

import gc
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor


def _close(found: Tensor, wanted: Tensor, within: float = 1e-5) -> bool:
    """Whether two tensors of one shape agree, whatever their dtypes."""
    return torch.allclose(found.double(), wanted.double(), rtol=0, atol=within)


def _check_gradient(
    ours: Callable[[Tensor], Tensor], theirs: Callable[[Tensor], Tensor], x: Tensor
) -> None:
    """Two functions of the scores x have the same gradient."""
    x = x.clone().requires_grad_()
    found, wanted = ours(1 * x), theirs(x)
    assert found.requires_grad, "no gradient reaches the scores: don't detach them"
    (a,), (b,) = (torch.autograd.grad(y.sum(), x) for y in (found, wanted))
    assert _close(a, b, 1e-4), "the gradient is wrong: was a part detached?"


def _what_sums_to_one(x: Tensor, result: Tensor) -> str:
    """Name the mistake in a square table whose rows should sum to 1."""
    if _close(result.sum(0), torch.ones(len(x))):
        return "the columns sum to 1, not the rows: normalized over the wrong axis"
    if _close(result.sum(), torch.ones(())):
        return "the whole table sums to 1, not each row: sum along dim only"
    for powers in (x.exp(), (x - x.amax(-1, keepdim=True)).exp()):
        if _close(result, powers / powers.sum(-1)):
            return "column j was divided by the sum of row j: sum with keepdim=True"
    return f"row 0 sums to {result[0].sum():.3f}, not to 1: divide by the row's sum"


def _check_probabilities(softmax: Callable[..., Tensor]) -> None:
    # A square table: on another shape some of these mistakes raise an error.
    x = torch.tensor([[0.0, 1.0, 2.0], [3.0, -1.0, 0.5], [-2.0, 0.0, 0.5]])
    before = x.clone()
    rows, columns = softmax(x), softmax(x, dim=0)
    assert torch.equal(x, before), "the scores were changed in place: work on a copy"
    assert rows.shape == x.shape, f"the shape changed to {tuple(rows.shape)}"
    low = rows.min().item()
    assert low > 0, f"an entry is {low:.3f}, not positive: take exp of the scores"
    assert _close(rows.sum(-1), torch.ones(3)), _what_sums_to_one(x, rows)
    assert _close(columns.sum(0), torch.ones(3)), "dim=0 was ignored"
    quarter = softmax(torch.tensor([0.0, math.log(3)]))[0].item()
    assert abs(quarter - 0.25) < 1e-5, (
        f"scores 0 and ln 3 must give 0.25 and 0.75, not {quarter:.3f}: is the base e?"
    )


def _check_shifts(softmax: Callable[..., Tensor]) -> None:
    x = torch.tensor([0.0, 1.0, 2.0, 2.5])
    wanted, large, low = softmax(x), softmax(x + 1000), softmax(x - 1000)
    assert large.isfinite().all(), (
        "scores near 1000 give nan: forgot to subtract the maximum before exp"
    )
    assert low.isfinite().all(), (
        "scores near -1000 give nan: subtract the maximum, whatever its sign"
    )
    for shifted in (large, low):
        assert _close(shifted, wanted, 1e-3), (
            "adding a constant to all scores changed the probabilities"
        )
    never = softmax(torch.tensor([0.0, -math.inf]))
    assert never[1] == 0, f"a score of -inf must get 0, not {never[1]:.1e}"
    rows = softmax(torch.tensor([[2000.0, 2001.0], [0.0, 1.0]]))
    assert _close(rows[0], rows[1], 1e-3), (
        "a low row beside a high one is wrong: subtract each row's own maximum"
    )


def _check_temperature(softmax: Callable[..., Tensor]) -> None:
    x = torch.tensor([0.0, 1.0, 2.0, 2.5])
    for temperature in (2.0, 0.1):
        found = softmax(x, temperature=temperature)
        assert x[2] == 2, "the scores were changed in place: work on a copy"
        mistakes = {"multiplied instead of divided": x * temperature, "ignored": x}
        for mistake, scores in mistakes.items():
            same = _close(found, scores.softmax(-1))
            assert not same, f"the temperature was {mistake}"
        assert _close(found, (x / temperature).softmax(-1)), (
            "the temperature must divide the scores before exp"
        )
    for bad in (0.0, -1.0, math.nan):
        try:
            softmax(x, temperature=bad)
        except ValueError:
            continue
        except AssertionError:
            pass  # optimized Python leaves `assert` away
        raise AssertionError(f"temperature={bad} must raise ValueError")


def check_softmax(softmax: Callable[..., Tensor]) -> None:
    """Probabilities along an axis; only differences count; the temperature divides.

    softmax: called as softmax(x), also with dim= or temperature=.

    Book: 05_softmax.html#the-check
    """
    _check_probabilities(softmax)
    _check_shifts(softmax)
    _check_temperature(softmax)
    random = torch.Generator().manual_seed(0)
    x = 5 * torch.randn(2, 3, 4, generator=random, dtype=torch.float64)
    assert softmax(x).dtype == x.dtype, "the result has another dtype than the scores"
    for dim in (0, 1, 2, -1):
        gap = (softmax(x, dim=dim) - x.softmax(dim)).abs().max().item()
        assert gap < 1e-5, f"differs from torch.softmax by {gap:.1e} along dim={dim}"
    _check_gradient(lambda x: softmax(x)[..., 0], lambda x: x.softmax(-1)[..., 0], x)


def check_log_softmax(log_softmax: Callable[..., Tensor]) -> None:
    """Log-softmax is the logarithm of softmax, also where softmax overflows or is 0.

    Book: 05_softmax.html#logarithms-of-probabilities
    """
    large = log_softmax(torch.tensor([1000.0, 1001.0]))
    assert large.isfinite().all(), (
        "scores near 1000 give inf or nan: forgot to subtract the maximum"
    )
    small = log_softmax(torch.tensor([0.0, 2000.0]))[0].item()
    assert abs(abs(small) - 2000) < 1e-2, (
        f"the log of a tiny probability is {small:.4g}, not -2000: subtract the log of"
        " the sum from the scores instead of taking the log of softmax"
    )
    assert log_softmax(torch.tensor([-1000.0, -1001.0])).isfinite().all(), (
        "scores near -1000 give inf: subtract the maximum, whatever its sign"
    )
    random = torch.Generator().manual_seed(0)
    x = 5 * torch.randn(3, 3, generator=random)
    before = x.clone()
    result = log_softmax(x)
    assert torch.equal(x, before), "the scores were changed in place: work on a copy"
    assert (result <= 0).all(), "a log-probability is positive: is the sign right?"
    assert _close(result.exp().sum(-1), torch.ones(3)), _what_sums_to_one(
        x, result.exp()
    )
    high, low = log_softmax(torch.tensor([[1000.0, 1001.0], [0.0, 1.0]]))
    assert _close(low, high, 1e-3), (
        "a low row beside a high one is wrong: subtract each row's own maximum"
    )
    for dim in (0, 1):
        gap = (log_softmax(x, dim=dim) - x.log_softmax(dim)).abs().max().item()
        assert gap < 1e-4, f"differs from torch.log_softmax by {gap:.1e}, dim={dim}"
    _check_gradient(
        lambda x: log_softmax(x)[..., 0], lambda x: x.log_softmax(-1)[..., 0], x
    )


def check_cross_entropy(cross_entropy: Callable[..., Tensor]) -> None:
    """Cross-entropy is the mean surprise in nats over the targets that count.

    Book: 05_softmax.html#the-equation
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
    logits = 5 * torch.randn(2, 3, 5, generator=random)
    rows, ids = logits.flatten(0, 1), targets.flatten()
    loss, wanted = cross_entropy(logits, targets), F.cross_entropy(rows, ids)
    twice = F.cross_entropy(rows.softmax(-1), ids)
    assert not _close(loss, twice, 1e-4), "softmax was applied twice: pass logits"
    assert _close(loss, wanted, 1e-4), f"{loss:.6f} instead of {wanted:.6f}"
    _check_gradient(
        lambda x: cross_entropy(x, targets),
        lambda x: F.cross_entropy(x.flatten(0, 1), targets.flatten()),
        logits,
    )
    ids[:2] = -100
    loss, wanted = cross_entropy(logits, ids.view(2, 3)), F.cross_entropy(rows, ids)
    texts = zip(logits, ids.view(2, 3), strict=True)
    means = torch.stack([F.cross_entropy(*text) for text in texts])
    assert not _close(loss, means.mean(), 1e-4), (
        "a mean of the texts' means: all positions that count have the same weight"
    )
    assert not _close(loss, wanted * 4 / 6, 1e-4), (
        "ignored positions still count in the mean: divide by those that are left"
    )
    assert _close(loss, wanted, 1e-4), "targets of -100 must be ignored"
    loss, wanted = cross_entropy(1000 * rows, ids), F.cross_entropy(1000 * rows, ids)
    assert _close(loss, wanted, 0.1), f"large logits give {loss:.1f}, not {wanted:.1f}"


def check_masked_softmax(masked_softmax: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Forbidden entries get probability 0, and the allowed ones sum to 1.

    Book: 05_softmax.html#exercises
    """
    x = torch.tensor([[0.0, 1.0, 2.0, 2.5], [2.5, 2.0, 1.0, 0.0]])
    allowed = torch.tensor([[True, True, False, False], [True, True, True, True]])
    before = x.clone()
    result = masked_softmax(x, allowed)
    assert torch.equal(x, before), "the scores were changed in place: work on a copy"
    assert not result[0].isnan().any(), (
        "nan: 0 times infinity is no number, use masked_fill"
    )
    assert (result[0, :2] > 0).all(), "an allowed entry got 0: invert the mask with ~"
    assert (result[~allowed] == 0).all(), "a forbidden entry has a probability above 0"
    total = result[0].sum().item()
    assert abs(total - 1) < 1e-5, (
        f"the allowed entries sum to {total:.3f}: forbid before the softmax, not after"
    )
    assert _close(result[0, :2], x[0, :2].softmax(-1)), (
        "a forbidden entry still took part: its score must be -inf, not 0"
    )
    assert _close(result[1], x[1].softmax(-1)), "a row in which all is allowed changed"
    batch = masked_softmax(x[None], allowed[None])[0]
    assert _close(batch, result), "wrong for (B, T, V): the softmax needs dim=-1"
    x = torch.tensor([[0.0, 1.0, 1000.0, 0.0]])
    result = masked_softmax(x, allowed[:1])[0]
    assert _close(result[:2], x[0, :2].softmax(-1)), (
        f"a forbidden score of 1000 makes 0 and 1 into {result[0]:.3f} and"
        f" {result[1]:.3f}: set it to -inf before anything else"
    )
    assert masked_softmax(x, x > 0).isfinite().all(), (
        "an allowed score of 1000 gives nan: subtract the maximum, as softmax does"
    )
    x = torch.tensor([[1000.0, 1001.0, 0.0], [0.0, 1.0, 5.0]])
    high, low = masked_softmax(x, torch.tensor([[True, True, False]] * 2))
    assert _close(low, high, 1e-3), (
        "a low row beside a high one is wrong: subtract each row's own maximum"
    )
    low = torch.tensor([[-1e12, -1e12, 0.0]])
    result = masked_softmax(low, low < 0)[0]
    assert _close(result[:2], torch.tensor([0.5, 0.5])), (
        f"beside two scores of -1e12 the forbidden one gets {result[2]:.3f}: set it to"
        " -inf, not to a number that others may be below"
    )


def check_cross_entropy_gradient(gradient: Callable[[Tensor, Tensor], Tensor]) -> None:
    """The gradient of the mean cross-entropy is (p - one-hot) / T.

    Book: 05_softmax.html#exercises
    """
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 4, generator=random).requires_grad_()
    targets = torch.tensor([1, 2, 2, 0, 1, 2])  # the last id, 3, doesn't occur
    (wanted,) = torch.autograd.grad(F.cross_entropy(logits, targets), logits)
    logits = logits.detach()
    given, p = logits.clone(), torch.softmax(logits, -1)
    result = gradient(logits, targets)
    assert torch.equal(logits, given), "the logits were changed: work on a copy"
    assert result.shape == (6, 4), f"the shape is {tuple(result.shape)}, not (6, 4)"
    every_row = p.clone()
    every_row[:, targets] -= 1
    mistakes = [
        (-wanted, "the sign is wrong: this is one-hot - p"),
        (-6 * wanted, "the sign is wrong, and the sum is not divided by T"),
        (6 * wanted, "the gradient of the sum: divide by the number of positions"),
        (1.5 * wanted, "divided by V: divide by T, the number of positions"),
        (wanted / 4, "divided by T and by V: divide by T only"),
        (p / 6, "p alone doesn't know the target: subtract 1 there"),
        (p, "p alone doesn't know the target: subtract 1 there, then divide by T"),
        (every_row / 6, "1 was subtracted at every target in every row: one a row"),
    ]
    for value, mistake in mistakes:
        assert not _close(result, value), mistake
    gap = (result - wanted).abs().max().item()
    assert gap < 1e-5, f"differs from PyTorch's by {gap:.1e}"
    assert gradient(1000 * logits, targets).isfinite().all(), (
        "logits near 1000 give nan: subtract the maximum, as softmax does"
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


@_without_collection()
def check_one_pass(one_pass: Callable[[Iterable[Tensor]], Tensor]) -> None:
    """The log-sum-exp of scores that come in chunks, each seen once.

    Book: 05_softmax.html#exercises
    """

    def chunks(scores: Tensor) -> Iterator[Tensor]:
        parts = scores.split(2)
        for i, part in enumerate(parts):
            if i == 6:
                kept = _numbers_alive()
            yield part.clone()
        grown = _numbers_alive() - kept if i > 6 else 0
        assert grown < 20, f"{grown} numbers more are kept at the end: keep two"

    x = torch.tensor([0.0, 1.0, 2.0, 2.5, 1000.0, 1001.0])
    for scores in (x[:4], x[:4].flip(0), x, x.flip(0), x[:4] - 2000, x.repeat(9)):
        listed, low = scores.tolist(), scores.max() < 0
        try:
            found = torch.as_tensor(one_pass(chunks(scores)))
        except ValueError as error:
            if not low:
                raise
            advice = "start with the peak -inf, for all scores may be low"
            raise AssertionError(f"{listed}: {error}: {advice}") from error
        wanted = torch.logsumexp(scores, 0)
        assert not found.isnan(), (
            f"{listed} gives nan: multiply the old sum by exp(old peak - new peak), not"
            " the other way round"
        )
        assert not found.isposinf(), f"{listed} gives inf: subtract the peak before exp"
        assert not found.isneginf() or not low, (
            f"{listed} gives -inf: start with the peak -inf, for all scores may be low"
        )
        assert not found.isneginf(), (
            f"{listed} gives -inf: make the new peak the old one after each chunk"
        )
        last = torch.logsumexp(scores[-2:], 0)
        assert abs(found - last) > 1e-3 or abs(last - wanted) < 1e-3, (
            "only the last chunk counts: carry the sum over, and the peak"
        )
        assert scores.max() == 0 or abs(found + scores.max() - wanted) > 1e-3, (
            "the peak is missing: return peak + log of the total"
        )
        assert abs(found - wanted) < 1e-3, (
            f"{listed} gives {found:.3f}, not {wanted:.3f}: when the peak grows,"
            " multiply the old sum by exp(old peak - new peak)"
        )
