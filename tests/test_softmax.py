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
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1),
    st.floats(min_value=0, exclude_min=True, allow_infinity=False),
)
def test_softmax_is_finite_for_any_finite_scores_and_temperature(scores, temperature):
    probabilities = softmax(torch.tensor(scores), temperature=temperature)
    assert probabilities.isfinite().all()
    assert (probabilities >= 0).all()
    assert probabilities.sum().item() == pytest.approx(1, abs=1e-5)


def test_one_score_alone_has_no_gradient(monkeypatch):
    """Nor may it get one where a clamp lets none through at its own limit (2.15)."""

    def strict(x, min):
        return torch.where(x > min, x, torch.full_like(x, min))

    monkeypatch.setattr(torch.Tensor, "clamp", strict)
    for function in (softmax, log_softmax):
        x = torch.tensor([2.0], requires_grad=True)
        assert torch.autograd.grad(function(x).sum(), x)[0] == 0


@given(shapes, seeds)
def test_gradients_equal_torch(shape, seed):
    x = random_scores(shape, seed).requires_grad_()
    weights = random_scores(shape, seed + 1)
    for ours, theirs in ((softmax, torch.softmax), (log_softmax, torch.log_softmax)):
        (a,) = torch.autograd.grad((ours(x, -1) * weights).sum(), x)
        (b,) = torch.autograd.grad((theirs(x, -1) * weights).sum(), x)
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


def test_minus_infinity_gets_nothing_and_its_gradient_is_finite():
    x = torch.tensor([[0.0, -math.inf], [-math.inf, -math.inf]], requires_grad=True)
    probabilities = softmax(x)
    assert probabilities.tolist() == [[1, 0], [0, 0]]
    probabilities[:, 0].sum().backward()
    assert x.grad.isfinite().all()
    assert log_softmax(x).tolist() == [[0, -math.inf], [-math.inf, -math.inf]]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_plus_infinity_spoil_their_own_row_only(bad):
    x = torch.tensor([[0.0, bad], [0.0, 0.0]])
    for result in (softmax(x), log_softmax(x).exp()):
        assert result[0].isnan().all()
        assert result[1].tolist() == pytest.approx([0.5, 0.5])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_only_at_the_end(dtype):
    x = random_scores((4, 5000), 0, scale=2.0).to(dtype)
    exact = softmax(x.double())
    assert softmax(x).dtype == log_softmax(x).dtype == dtype
    assert torch.equal(softmax(x), softmax(x.float()).to(dtype))
    # Half a unit in the last place of the largest probability.
    error = (softmax(x).double() - exact).abs().max()
    assert error <= torch.finfo(dtype).eps * exact.max()


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf, -math.inf])
def test_softmax_refuses_impossible_temperatures(temperature):
    with pytest.raises(ValueError, match="temperature must be positive and finite"):
        softmax(torch.zeros(2), temperature=temperature)


@pytest.mark.parametrize("function", [softmax, log_softmax])
def test_integers_are_refused(function):
    with pytest.raises(TypeError, match="requires a floating point"):
        function(torch.tensor([1, 2]))


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


def in_double(x, dim=-1, temperature=1.0):
    if not temperature > 0:
        raise ValueError("no such temperature")
    return (x.double() / temperature).softmax(dim)


def with_log_sum_exp(x, dim=-1, temperature=1.0):
    if not temperature > 0:
        raise ValueError("no such temperature")
    x = x / temperature
    return (x - x.logsumexp(dim, keepdim=True)).exp()


@pytest.mark.parametrize(
    ("check", "right"),
    [
        ("check_softmax", in_double),
        ("check_softmax", with_log_sum_exp),
        ("check_log_softmax", lambda x, dim=-1: x.double().log_softmax(dim)),
        ("check_log_softmax", lambda x, dim=-1: x - x.logsumexp(dim, keepdim=True)),
        ("check_cross_entropy", lambda x, y: flat(x, y)),
        ("check_cross_entropy", lambda x, y: flat(x.double(), y)),
        (
            "check_masked_softmax",
            lambda x, m: x.double().where(m, -math.inf).softmax(-1),
        ),
        (
            "check_cross_entropy_gradient",
            lambda x, y: (x.double().softmax(-1) - torch.eye(4)[y]) / len(y),
        ),
        ("check_one_pass", lambda parts: one_pass(part.double() for part in parts)),
        ("check_one_pass", lambda parts: score_by_score(parts)),
    ],
)
def test_right_answers_pass_in_other_precisions(check, right):
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


def divided_in_place(x, dim=-1, temperature=1.0):
    if temperature != 1:
        x /= temperature
    return softmax(x, dim)


def lenient(x, dim=-1, temperature=1.0):
    return normalized((shifted(x, dim) / (temperature or 1.0)).exp(), dim)


def mean_of_summands(logits, targets):
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="sum")


def flat(logits, targets, **options):
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), **options)


def half_detached(x, dim=-1, temperature=1.0):
    powers = (shifted(x, dim) / temperature).exp()
    if temperature <= 0 or math.isnan(temperature):
        raise ValueError("no such temperature")
    return powers / powers.sum(dim, keepdim=True).detach()


def mean_of_means(logits, targets):
    texts = [flat(*text) for text in zip(logits, targets, strict=True)]
    return torch.stack(texts).mean()


def _picked(table, targets):
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


def asserting(x, dim=-1, temperature=1.0):
    """Its guard is gone under `python -O`."""
    assert temperature > 0
    return softmax(x, dim, temperature)


def from_zero(chunks):
    return score_by_score((chunk.tolist() for chunk in chunks), peak=0.0)


def score_by_score(chunks, peak=-math.inf):
    total = 0.0
    for chunk in chunks:
        for score in chunk:
            higher = max(score, peak)
            total = total * math.exp(peak - higher) + math.exp(score - higher)
            peak = higher
    return peak + math.log(total)


def without_peak(chunks):
    scores = torch.cat([chunk.clone() for chunk in chunks])
    return scores.logsumexp(0) - scores.max()


def growing(chunks):
    scores = torch.empty(0)
    for chunk in chunks:
        scores = torch.cat([scores, chunk])
    return scores.logsumexp(0)


def last_chunk(chunks):
    for chunk in chunks:
        result = chunk.logsumexp(0)
    return result


WRONG = [
    ("check_softmax", lambda x, dim=-1: normalized(x, dim), "not positive"),
    (
        "check_softmax",
        lambda x, dim=-1: normalized(shifted(x, dim).exp(), 0),
        "wrong axis",
    ),
    (
        "check_softmax",
        lambda x, dim=-1: x.exp() / x.exp().sum(dim),
        "keepdim=True",
    ),
    (
        "check_softmax",
        lambda x, dim=-1: shifted(x, dim).exp() / shifted(x, dim).exp().sum(dim),
        "keepdim=True",
    ),
    ("check_softmax", lambda x, dim=-1: x.exp() / x.exp().sum(), "whole table"),
    ("check_softmax", lambda x, dim=-1: x.exp(), "row 0 sums to 11.107"),
    ("check_softmax", asserting, "must raise ValueError"),
    ("check_one_pass", from_zero, "math domain error: start with the peak -inf"),
    (
        "check_cross_entropy_gradient",
        lambda x, y: (softmax(x) - F.one_hot(y, 4)) / x.shape[1],
        "divided by V: divide by T",
    ),
    (
        "check_cross_entropy_gradient",
        lambda x, y: (softmax(x) - F.one_hot(y, 4)) / x.numel(),
        "divided by T and by V",
    ),
    (
        "check_softmax",
        lambda x, dim=-1: normalized(x.exp()),
        "dim=0 was ignored",
    ),
    (
        "check_softmax",
        lambda x, dim=-1: normalized(x.exp2(), dim),
        "is the base e",
    ),
    ("check_softmax", in_place, "changed in place"),
    ("check_softmax", lambda x, dim=-1: x.softmax(dim)[0], "shape changed"),
    (
        "check_softmax",
        lambda x, dim=-1: normalized(x.exp(), dim),
        "forgot to subtract the maximum",
    ),
    (
        "check_softmax",
        lambda x, dim=-1: normalized((x - x.abs().amax(dim, keepdim=True)).exp(), dim),
        "whatever its sign",
    ),
    ("check_softmax", shares_of_all, "each row's own"),
    (
        "check_softmax",
        lambda x, dim=-1: softmax(x.clamp(-50, 50), dim),
        "adding a constant",
    ),
    (
        "check_softmax",
        lambda x, dim=-1: softmax(x.maximum(x.amax(dim, keepdim=True) - 30), dim),
        "-inf must get 0",
    ),
    (
        "check_softmax",
        lambda x, dim=-1, temperature=1.0: softmax(x * temperature, dim),
        "multiplied instead of divided",
    ),
    (
        "check_softmax",
        lambda x, dim=-1, temperature=1.0: softmax(x, dim),
        "was ignored",
    ),
    (
        "check_softmax",
        lambda x, dim=-1, temperature=1.0: softmax(x, dim) / temperature,
        "must divide the scores before exp",
    ),
    (
        "check_softmax",
        lambda x, dim=-1, temperature=1.0: softmax(x.detach(), dim, temperature),
        "no gradient reaches the scores",
    ),
    ("check_softmax", half_detached, "was a part detached"),
    ("check_softmax", divided_in_place, "changed in place"),
    (
        "check_softmax",
        lambda x, dim=-1, temperature=1.0: softmax(x, dim, max(temperature, 0.5)),
        "must divide the scores before exp",
    ),
    (
        "check_softmax",
        lambda x, dim=-1, temperature=1.0: softmax(x.float(), dim, temperature),
        "another dtype",
    ),
    ("check_softmax", lenient, "temperature=0.0 must raise ValueError"),
    (
        "check_softmax",
        lambda x, dim=-1, temperature=1.0: softmax(x, -1 if dim else 0, temperature),
        "differs from torch.softmax",
    ),
    (
        "check_log_softmax",
        lambda x, dim=-1: x.softmax(dim).log(),
        "instead of taking the log of softmax",
    ),
    (
        "check_log_softmax",
        lambda x, dim=-1: x.softmax(dim).clamp(min=1e-9).log(),
        "is -20.72, not -200",
    ),
    (
        "check_log_softmax",
        lambda x, dim=-1: x - x.exp().sum(dim, keepdim=True).log(),
        "forgot to subtract the maximum",
    ),
    ("check_log_softmax", lambda x, dim=-1: x.log_softmax(0), "wrong axis"),
    ("check_log_softmax", lambda x, dim=-1: -x.log_softmax(dim), "is the sign right"),
    (
        "check_log_softmax",
        lambda x, dim=-1: x.log_softmax(-1),
        "differs from torch.log_softmax",
    ),
    (
        "check_log_softmax",
        lambda x, dim=-1: log_of_shares(x - x.max(), dim),
        "each row's own maximum",
    ),
    (
        "check_log_softmax",
        lambda x, dim=-1: log_of_shares(x - x.amax(dim, keepdim=True).abs(), dim),
        "whatever its sign",
    ),
    (
        "check_log_softmax",
        lambda x, dim=-1: log_of_shares(x.sub_(x.amax(dim, keepdim=True)), dim),
        "changed in place",
    ),
    (
        "check_log_softmax",
        lambda x, dim=-1: log_softmax(x.detach(), dim),
        "no gradient reaches the scores",
    ),
    (
        "check_cross_entropy",
        lambda logits, targets: flat(logits.softmax(-1), targets),
        "softmax was applied twice",
    ),
    (
        "check_cross_entropy",
        lambda logits, targets: -flat(logits, targets),
        "the sign is wrong",
    ),
    ("check_cross_entropy", mean_of_summands, "take the mean"),
    ("check_cross_entropy", mean_of_means, "a mean of the texts' means"),
    (
        "check_cross_entropy",
        lambda logits, targets: flat(logits.detach(), targets),
        "no gradient reaches the scores",
    ),
    (
        "check_cross_entropy",
        lambda logits, targets: flat(logits, targets) / math.log(2),
        "these are bits",
    ),
    (
        "check_cross_entropy",
        lambda logits, targets: (
            flat(logits, targets) * (targets != -100).float().mean()
        ),
        "still count in the mean",
    ),
    (
        "check_cross_entropy",
        lambda logits, targets: flat(logits, targets.clamp(min=0)),
        "-100 must be ignored",
    ),
    (
        "check_cross_entropy",
        lambda logits, targets: -_picked(logits.softmax(-1).log(), targets).mean(),
        "large logits give inf",
    ),
    (
        "check_cross_entropy",
        lambda x, y: -(_picked(x.softmax(-1), y) + 1e-8).log().mean(),
        "large logits give 1",
    ),
    (
        "check_cross_entropy",
        lambda x, y: -(_picked(x.softmax(-1), y) + 1e-12).log().mean(),
        "large logits give 2",
    ),
    (
        "check_masked_softmax",
        lambda x, allowed: x.masked_fill(~allowed, -math.inf).softmax(1),
        "needs dim=-1",
    ),
    (
        "check_masked_softmax",
        lambda x, allowed: x.softmax(-1) * allowed,
        "before the softmax, not after",
    ),
    (
        "check_masked_softmax",
        lambda x, allowed: x.masked_fill(allowed, -math.inf).softmax(-1),
        "invert the mask",
    ),
    (
        "check_masked_softmax",
        lambda x, allowed: (x * allowed).softmax(-1),
        "probability above 0",
    ),
    (
        "check_masked_softmax",
        lambda x, allowed: (x * allowed).softmax(-1) * allowed,
        "sum to",
    ),
    (
        "check_masked_softmax",
        lambda x, allowed: normalized((x / 2).softmax(-1) * allowed),
        "still took part",
    ),
    (
        "check_masked_softmax",
        lambda x, allowed: normalized(x.softmax(-1) * allowed),
        "a forbidden score of 1000",
    ),
    (
        "check_masked_softmax",
        lambda x, allowed: normalized(x.exp() * allowed),
        "a forbidden score of 1000",
    ),
    (
        "check_masked_softmax",
        lambda x, allowed: (x - (~allowed) * math.inf).softmax(-1),
        "use masked_fill",
    ),
    (
        "check_masked_softmax",
        lambda x, allowed: normalized(torch.where(allowed, x.exp(), 0.0)),
        "an allowed score of 1000",
    ),
    (
        "check_masked_softmax",
        lambda x, allowed: shares_of_all(x.masked_fill(~allowed, -math.inf)),
        "each row's own maximum",
    ),
    (
        "check_masked_softmax",
        lambda x, allowed: x.masked_fill_(~allowed, -math.inf).softmax(-1),
        "changed in place",
    ),
    (
        "check_cross_entropy_gradient",
        lambda logits, targets: F.one_hot(targets, 4) - softmax(logits),
        "the sign is wrong, and",
    ),
    (
        "check_cross_entropy_gradient",
        lambda logits, targets: softmax(logits) - F.one_hot(targets, 4),
        "divide by the number of positions",
    ),
    (
        "check_cross_entropy_gradient",
        lambda logits, targets: (F.one_hot(targets, 4) - softmax(logits)) / 6,
        "one-hot - p",
    ),
    (
        "check_cross_entropy_gradient",
        lambda logits, targets: softmax(logits) / 6,
        "subtract 1 there",
    ),
    (
        "check_cross_entropy_gradient",
        lambda logits, targets: softmax(logits),
        "then divide by T",
    ),
    (
        "check_cross_entropy_gradient",
        lambda logits, targets: (
            (softmax(logits) - F.one_hot(targets.unique(), 4).sum(0)) / 6
        ),
        "one a row",
    ),
    (
        "check_cross_entropy_gradient",
        lambda logits, targets: (softmax(logits) - F.one_hot(targets, 4)).mean(0),
        "the shape is (4,)",
    ),
    (
        "check_cross_entropy_gradient",
        lambda x, y: (softmax(x.mul_(0.5) * 2) - F.one_hot(y, 4)) / len(y),
        "the logits were changed",
    ),
    (
        "check_cross_entropy_gradient",
        lambda logits, targets: torch.zeros_like(logits),
        "differs from PyTorch's",
    ),
    (
        "check_cross_entropy_gradient",
        lambda x, y: (softmax(x) - F.one_hot(y, 4)) / (x.shape[1] - 1),
        "differs from PyTorch's",
    ),
    (
        "check_cross_entropy_gradient",
        lambda x, y: softmax(x.T).T / len(y) - F.one_hot(y, 4) / len(y),
        "differs from PyTorch's",
    ),
    ("check_one_pass", last_chunk, "only the last chunk counts"),
    ("check_one_pass", lambda parts: one_pass(parts, inverse=True), "other way round"),
    ("check_one_pass", lambda parts: one_pass(parts, moving=False), "the new peak"),
    ("check_one_pass", lambda parts: one_pass(parts, peak=0.0), "peak -inf"),
    ("check_one_pass", without_peak, "the peak is missing"),
    (
        "check_one_pass",
        lambda parts: torch.cat(list(parts)).logsumexp(0),
        "numbers more are kept",
    ),
    ("check_one_pass", growing, "numbers more are kept"),
    (
        "check_masked_softmax",
        lambda x, m: x.masked_fill(~m, -200.0).softmax(-1),
        "the forbidden one gets 1.000: set it to -inf",
    ),
    (
        "check_masked_softmax",
        lambda x, m: x.masked_fill(~m, -1e9).softmax(-1),
        "the forbidden one gets 1.000: set it to -inf",
    ),
    (
        "check_masked_softmax",
        lambda x, m: (x + ~m * -1e4).softmax(-1),
        "the forbidden one gets 1.000: set it to -inf",
    ),
    (
        "check_cross_entropy_gradient",
        lambda x, y: (normalized(x.exp()) - torch.eye(4)[y]) / 6,
        "logits near 1000 give nan",
    ),
    (
        "check_softmax",
        lambda x, dim=-1: normalized(shifted(x, dim).clamp(min=-20).exp(), dim),
        "must get 0, not 2.1e-09",
    ),
    (
        "check_one_pass",
        lambda chunks: torch.cat(list(chunks)).exp().sum().log(),
        "subtract the peak",
    ),
    (
        "check_one_pass",
        lambda chunks: torch.cat(list(chunks)).logsumexp(0) + 0.1,
        "when the peak grows",
    ),
]


@pytest.mark.parametrize(("check", "wrong", "message"), WRONG)
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


def test_cross_entropy_takes_rows_without_a_batch():
    def three_axes(logits, targets):
        B, T, V = logits.shape
        return F.cross_entropy(logits.view(B * T, V), targets.flatten())

    with pytest.raises(ValueError, match="unpack"):
        checks.check_cross_entropy(three_axes)


@pytest.mark.parametrize("temperature", [1e-300, 1e-46, 1e39, 1e300])
def test_temperatures_beyond_32_bits_make_no_nan(temperature):
    found = softmax(torch.tensor([0.0, -math.inf, 1.0]), temperature=temperature)
    wanted = [0, 0, 1] if temperature < 1 else [0.5, 0, 0.5]
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float32))
