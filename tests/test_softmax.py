"""Softmax and cross-entropy: parity, properties, and checks that name mistakes."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from glassgpt.checks import softmax as checks
from glassgpt.softmax import cross_entropy, log_softmax, softmax

shapes = st.lists(st.integers(1, 5), min_size=1, max_size=4)
seeds = st.integers(0, 2**31)


def random_scores(shape, seed, scale=10.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64)


def test_package_passes_its_checks():
    checks.check_softmax(softmax)
    checks.check_log_softmax(log_softmax)
    checks.check_cross_entropy(cross_entropy)


@given(shapes, seeds, st.data())
def test_softmax_equals_torch_on_every_axis(shape, seed, data):
    dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    temperature = data.draw(st.floats(0.01, 100))
    x = random_scores(shape, seed)
    torch.testing.assert_close(
        softmax(x, dim, temperature), (x / temperature).softmax(dim), atol=1e-12, rtol=0
    )
    torch.testing.assert_close(
        log_softmax(x, dim), x.log_softmax(dim), atol=1e-12, rtol=0
    )


@given(
    st.lists(st.floats(-1e30, 1e30), min_size=1),
    st.floats(1e-30, 1e30),
)
def test_softmax_is_finite_for_any_finite_scores_and_temperature(scores, temperature):
    probabilities = softmax(torch.tensor(scores), temperature=temperature)
    assert probabilities.isfinite().all()
    assert (probabilities >= 0).all()
    assert probabilities.sum().item() == pytest.approx(1, abs=1e-5)


@given(shapes, seeds)
def test_gradients_equal_torch(shape, seed):
    x = random_scores(shape, seed).requires_grad_()
    weights = random_scores(shape, seed + 1)
    for ours, theirs in ((softmax, torch.softmax), (log_softmax, torch.log_softmax)):
        (a,) = torch.autograd.grad((ours(x, -1) * weights).sum(), x)
        (b,) = torch.autograd.grad((theirs(x, -1) * weights).sum(), x)
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


def test_minus_infinity_gets_nothing_and_its_gradient_is_finite():
    x = torch.tensor([0.0, -math.inf, 1.0], requires_grad=True)
    probabilities = softmax(x)
    assert probabilities[1] == 0
    probabilities[0].backward()
    assert x.grad.isfinite().all()
    assert log_softmax(x)[1] == -math.inf


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_plus_infinity_spoil_their_own_row_only(bad):
    x = torch.tensor([[0.0, bad], [0.0, 0.0]])
    for result in (softmax(x), log_softmax(x).exp()):
        assert result[0].isnan().all()
        assert result[1].tolist() == pytest.approx([0.5, 0.5])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_its_dtype(dtype):
    x = random_scores((4, 5000), 0, scale=2.0).to(dtype)
    for ours, theirs in ((softmax, torch.softmax), (log_softmax, torch.log_softmax)):
        found, wanted = ours(x, -1), theirs(x.double(), -1)
        assert found.dtype == dtype
        error = (found.double() - wanted).abs().max()
        assert error <= 4 * torch.finfo(dtype).eps * wanted.abs().max()


@given(st.lists(st.integers(1, 4), max_size=3), st.integers(1, 7), seeds, st.data())
def test_cross_entropy_equals_torch(shape, vocabulary, seed, data):
    logits = random_scores((*shape, vocabulary), seed).requires_grad_()
    some = st.sampled_from([-100, *range(vocabulary)])
    count = math.prod(shape)
    ids = data.draw(st.lists(some, min_size=count, max_size=count).filter(_any_counts))
    targets = torch.tensor(ids, dtype=torch.int64).reshape(shape)
    loss = cross_entropy(logits, targets)
    wanted = F.cross_entropy(logits.reshape(-1, vocabulary), targets.reshape(-1))
    torch.testing.assert_close(loss, wanted, atol=1e-12, rtol=1e-12)
    (a,) = torch.autograd.grad(loss, logits)
    (b,) = torch.autograd.grad(wanted, logits)
    torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def _any_counts(ids):
    return any(i != -100 for i in ids)


def test_an_ignored_position_with_impossible_scores_does_no_harm():
    logits = torch.tensor([[0.0, 0.0], [math.nan, 0.0]], requires_grad=True)
    loss = cross_entropy(logits, torch.tensor([0, -100]))
    assert loss.item() == pytest.approx(math.log(2))


@pytest.mark.parametrize(
    "targets",
    [
        torch.zeros(3, 2, dtype=torch.int64),
        torch.zeros(2, dtype=torch.int64),
        torch.zeros(2, 3),
        torch.full((2, 3), 5),
        torch.full((2, 3), -1),
    ],
    ids=["transposed", "an axis less", "floats", "V", "-1"],
)
def test_cross_entropy_refuses_bad_targets(targets):
    with pytest.raises((IndexError, RuntimeError)):
        cross_entropy(torch.zeros(2, 3, 5), targets)


def test_cross_entropy_of_nothing_is_nan_as_in_torch():
    targets = torch.full((2,), -100)
    assert cross_entropy(torch.zeros(2, 5), targets).isnan()
    assert F.cross_entropy(torch.zeros(2, 5), targets).isnan()


def test_softmax_compiles_whole():
    compiled = torch.compile(softmax, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3)
    torch.testing.assert_close(compiled(x, -1, 0.7), softmax(x, -1, 0.7))


def with_log_sum_exp(x, dim=-1):
    return (x - x.logsumexp(dim, keepdim=True)).exp()


@pytest.mark.parametrize(
    ("check", "right"),
    [
        ("check_softmax", torch.softmax),
        ("check_softmax", F.softmax),
        ("check_softmax", with_log_sum_exp),
        ("check_log_softmax", torch.log_softmax),
        ("check_log_softmax", lambda x, dim: x - x.logsumexp(dim, keepdim=True)),
        ("check_cross_entropy", lambda x, y: flat(x, y)),
        ("check_masked_softmax", lambda x, m: x.where(m, -math.inf).softmax(-1)),
        (
            "check_cross_entropy_gradient",
            lambda x, y: (x.softmax(-1) - torch.eye(4)[y]) / len(y),
        ),
        ("check_one_pass", lambda parts: one_pass(part.double() for part in parts)),
        ("check_one_pass", lambda parts: score_by_score(parts)),
    ],
)
def test_right_answers_pass(check, right):
    getattr(checks, check)(right)


# Wrong versions. Each check must notice, and say which mistake it was.


def shifted(x, dim=-1):
    return x - x.amax(dim, keepdim=True)


def normalized(powers, dim=-1):
    return powers / powers.sum(dim, keepdim=True)


def shares_of_all(x, dim=-1):
    return normalized((x - x.max()).exp(), dim)


def log_of_shares(x, dim=-1):
    return x - x.exp().sum(dim, keepdim=True).log()


def in_place(x, dim=-1):
    x -= x.amax(dim, keepdim=True)
    return normalized(x.exp(), dim)


def half_detached(x, dim=-1):
    powers = shifted(x, dim).exp()
    return powers / powers.sum(dim, keepdim=True).detach()


def flat(logits, targets, **options):
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), **options)


def mean_of_means(logits, targets):
    if logits.dim() == 2:
        return flat(logits, targets)
    texts = [flat(*text) for text in zip(logits, targets, strict=True)]
    return torch.stack(texts).mean()


def picked(table, targets):
    counted = targets != -100
    return table[counted].gather(-1, targets[counted][:, None])


def one_pass(chunks, peak=-math.inf, inverse=False, moving=True):
    peak, total = torch.tensor(peak), torch.tensor(0.0)
    for chunk in chunks:
        higher = peak.maximum(chunk.max())
        scale = (higher - peak if inverse else peak - higher).exp()
        total = total * scale + (chunk - higher).exp().sum()
        peak = higher if moving else peak
    return peak + total.log()


def score_by_score(chunks):
    peak, total = -math.inf, 0.0
    for chunk in chunks:
        for score in chunk.tolist():
            higher = max(score, peak)
            total = total * math.exp(peak - higher) + math.exp(score - higher)
            peak = higher
    return peak + math.log(total)


def without_peak(chunks):
    peak, total = torch.tensor(-math.inf), torch.tensor(0.0)
    for chunk in chunks:
        higher = peak.maximum(chunk.max())
        total = total * (peak - higher).exp() + (chunk - higher).exp().sum()
        peak = higher
    return total.log()


def last_chunk(chunks):
    for chunk in chunks:
        result = chunk.logsumexp(0)
    return result


def pushes(x, y):
    return x.softmax(-1) - F.one_hot(y, 4)


WRONG = {
    "check_softmax": [
        (lambda x, dim: normalized(x, dim), "not positive"),
        (lambda x, dim: normalized(shifted(x, dim).exp(), 0), "wrong axis"),
        (lambda x, dim: x.exp() / x.exp().sum(dim), "with keepdim=True"),
        (lambda x, dim: x.exp() / x.exp().sum(), "by its own sum"),
        (lambda x, dim: x.exp(), "row 0 sums to 11.107"),
        (lambda x, dim: x.softmax(dim)[0], "shape changed"),
        (lambda x, dim: normalized(x.exp(), dim), "forgot to subtract the maximum"),
        (lambda x, dim: normalized((x - x.abs().max()).exp(), dim), "its sign"),
        (shares_of_all, "each row's own"),
        (lambda x, dim: shifted(x, dim).clamp(min=-30).softmax(dim), "must get 0"),
        (lambda x, dim: normalized(shifted(x, dim).exp()), "dim=0 is the axis"),
        (lambda x, dim: normalized(shifted(x, dim).exp2(), dim), "the base is e"),
        (lambda x, dim: x.clamp(-500, 500).softmax(dim), "a low row beside"),
        (in_place, "changed in place"),
        (lambda x, dim: x.detach().softmax(dim), "no gradient flows back"),
        (half_detached, "is a part detached"),
        (lambda x, dim: x.float().softmax(dim), "became torch.float32"),
        (
            lambda x, dim: x.softmax(dim).tolist() if x.dim() > 2 else x.softmax(dim),
            "not list",
        ),
    ],
    "check_log_softmax": [
        (lambda x, dim: x.softmax(dim).log(), "instead of taking the log of softmax"),
        (lambda x, dim: x.softmax(dim).clamp(min=1e-9).log(), "is -20.72, not -200"),
        (log_of_shares, "forgot to subtract the maximum"),
        (lambda x, dim: x.log_softmax(0), "dim=-1"),
        (lambda x, dim: x.log_softmax(-1), "dim=0"),
        (lambda x, dim: -x.log_softmax(dim), "the sign is wrong"),
        (lambda x, dim: log_of_shares(x - x.max(), dim), "its own maximum"),
        (lambda x, dim: x.sub_(x.amax(dim, keepdim=True)).log_softmax(dim), "in place"),
        (lambda x, dim: x.detach().log_softmax(dim), "no gradient flows back"),
    ],
    "check_cross_entropy": [
        (lambda x, y: flat(x.softmax(-1), y), "softmax was applied twice"),
        (lambda x, y: -flat(x, y), "the sign is wrong"),
        (lambda x, y: flat(x, y, reduction="sum"), "take the mean"),
        (mean_of_means, "a mean of the texts' means"),
        (lambda x, y: flat(x.detach(), y), "no gradient flows back"),
        (lambda x, y: flat(x, y) / math.log(2), "these are bits"),
        (lambda x, y: flat(x, y) * (y != -100).double().mean(), "still count"),
        (lambda x, y: flat(x, y.clamp(min=0)), "-100 must be ignored"),
        (lambda x, y: -picked(x.softmax(-1).log(), y).mean(), "logits are large"),
        (lambda x, y: -(picked(x.softmax(-1), y) + 1e-12).log().mean(), "is wanted"),
    ],
    "check_masked_softmax": [
        (lambda x, m: x.masked_fill(~m, -math.inf).softmax(1), "needs dim=-1"),
        (lambda x, m: x.softmax(-1) * m, "before the softmax, not after"),
        (lambda x, m: x.masked_fill(m, -math.inf).softmax(-1), "invert the mask"),
        (lambda x, m: (x * m).softmax(-1), "probability above 0"),
        (lambda x, m: (x - ~m * math.inf).softmax(-1), "use masked_fill"),
        (lambda x, m: normalized(x.softmax(-1) * m), "is -inf before anything else"),
        (lambda x, m: normalized(x.exp().where(m, 0.0)), "is -inf before anything"),
        (lambda x, m: shares_of_all(x.masked_fill(~m, -math.inf)), "is wanted"),
        (lambda x, m: x.masked_fill_(~m, -math.inf).softmax(-1), "changed in place"),
        (lambda x, m: x.masked_fill(~m, -20.0).softmax(-1), "probability above 0"),
    ],
    "check_cross_entropy_gradient": [
        (lambda x, y: -pushes(x, y), "the sign is wrong, and"),
        (lambda x, y: pushes(x, y), "divide by the number of positions"),
        (lambda x, y: -pushes(x, y) / 6, "one-hot - p"),
        (lambda x, y: x.softmax(-1) / 6, "subtract 1 there"),
        (lambda x, y: pushes(x, y) / 4, "divided by V: divide by T"),
        (
            lambda x, y: (x.softmax(-1) - F.one_hot(y.unique(), 4).sum(0)) / 6,
            "one a row",
        ),
        (lambda x, y: pushes(x, y).mean(0), "the shape is (4,)"),
        (lambda x, y: pushes(x.mul_(0.5) * 2, y) / 6, "the logits were changed"),
        (lambda x, y: torch.zeros_like(x), "p minus one-hot"),
        (
            lambda x, y: (normalized(x.exp()) - F.one_hot(y, 4)) / 6,
            "near 1000 give nan",
        ),
    ],
    "check_one_pass": [
        (last_chunk, "when the peak grows"),
        (lambda parts: one_pass(parts, inverse=True), "other way round"),
        (lambda parts: one_pass(parts, moving=False), "the new peak"),
        (lambda parts: one_pass(parts, peak=0.0), "peak -inf"),
        (without_peak, "peak + log of the total"),
        (lambda parts: torch.cat(list(parts)).logsumexp(0), "keep no chunk"),
        (
            lambda parts: sum(part.exp().sum() for part in parts).log(),
            "subtract the peak",
        ),
    ],
}
CASES = [(check, *case) for check, cases in WRONG.items() for case in cases]


@pytest.mark.parametrize(("check", "wrong", "message"), CASES)
def test_check_names_the_mistake(check, wrong, message):
    with pytest.raises(AssertionError) as caught:
        getattr(checks, check)(wrong)
    assert message in str(caught.value)


def test_the_gradient_knows_how_large_the_vocabulary_is():
    """The last id occurs in no target: one_hot has to be told V."""
    with pytest.raises(RuntimeError):
        checks.check_cross_entropy_gradient(
            lambda x, y: (softmax(x) - F.one_hot(y)) / 6
        )


def test_the_check_of_cross_entropy_gives_rows_without_a_batch():
    def three_axes(logits, targets):
        B, T, V = logits.shape
        return F.cross_entropy(logits.view(B * T, V), targets.flatten())

    with pytest.raises(ValueError, match="unpack"):
        checks.check_cross_entropy(three_axes)
