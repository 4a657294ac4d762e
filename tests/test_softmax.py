"""Softmax and cross-entropy: parity with PyTorch, and extremes."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from glassgpt.softmax import cross_entropy, log_softmax, softmax

shapes = st.lists(st.integers(1, 5), min_size=1, max_size=4)
seeds = st.integers(0, 2**31)


def random_scores(shape, seed, scale=10.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64)


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
