"""Word vectors and the embedding layer: parity, extremes, and gradients."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from glassgpt.embeddings import Embedding, cosine_similarity, nearest_neighbors

sizes = st.integers(1, 4)
seeds = st.integers(0, 2**31)


def random(shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@given(st.lists(sizes, min_size=1, max_size=4), seeds, st.data())
def test_cosine_equals_torch_for_broadcast_shapes(shape, seed, data):
    dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    ones = data.draw(st.lists(st.booleans(), min_size=len(shape), max_size=len(shape)))
    other = [1 if one else size for one, size in zip(ones, shape, strict=True)]
    dropped = data.draw(st.integers(0, len(shape) - 1))
    a, b = random(shape, seed), random(other[dropped:], seed + 1)
    torch.testing.assert_close(
        cosine_similarity(a, b, dim), F.cosine_similarity(a, b, dim, eps=0)
    )


@given(
    st.lists(
        st.floats(-1e15, 1e15).map(lambda x: x if abs(x) > 1e-9 else 0.0),
        min_size=1,
        max_size=8,
    )
)
def test_cosine_of_a_vector_with_itself_is_one_or_zero(numbers):
    vector = torch.tensor(numbers)
    expected = 1.0 if vector.any() else 0.0
    assert cosine_similarity(vector, vector).item() == pytest.approx(expected, abs=1e-5)
    assert cosine_similarity(vector, -vector).item() == pytest.approx(
        -expected, abs=1e-5
    )


@pytest.mark.parametrize("size", [0.0, 1e-38, 1e-11, 1e18, 1e38])
def test_cosine_is_never_nan(size):
    x = size * torch.tensor([3.0, 4.0]).clamp(max=3)
    for other in (x, torch.ones(2)):
        assert cosine_similarity(x, other).abs() <= 1


def test_cosine_gradient_equals_torch_and_is_finite_at_zero():
    a, b = (random((5, 3), seed).requires_grad_() for seed in (0, 1))
    weights = random((5,), 2)
    gradients = [
        torch.autograd.grad((function(a, b) * weights).sum(), (a, b))
        for function in (cosine_similarity, F.cosine_similarity)
    ]
    torch.testing.assert_close(*gradients)
    zero = torch.zeros(3, requires_grad=True)
    cosine_similarity(zero, torch.ones(3)).backward()
    assert zero.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_cosine_in_16_bits(dtype):
    x = torch.tensor([30000.0, 30000.0, 0.0], dtype=dtype)
    assert cosine_similarity(x, x).item() == pytest.approx(1, abs=0.01)


def test_nearest_neighbors_agree_with_a_full_sort():
    table, vector = random((50, 6), 0), random((6,), 1)
    expected = F.cosine_similarity(table, vector[None]).sort(descending=True)
    similarities, ids = nearest_neighbors(vector, table, 50)
    assert torch.equal(ids, expected.indices)
    torch.testing.assert_close(similarities, expected.values)


@given(st.integers(1, 6), st.integers(1, 4), seeds, st.data())
def test_embedding_equals_torch_with_its_gradient(rows, width, seed, data):
    ids = data.draw(st.lists(st.integers(0, rows - 1), max_size=8))
    ids, upstream = (
        torch.tensor(ids, dtype=torch.int64),
        random((len(ids), width), seed),
    )
    ours, theirs = Embedding(rows, width).double(), nn.Embedding(rows, width).double()
    theirs.load_state_dict(ours.state_dict())
    for layer in (ours, theirs):
        (layer(ids) * upstream).sum().backward()
    assert torch.equal(ours(ids), theirs(ids))
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)
    assert ours(ids.view(1, -1)).shape == (1, len(ids), width)


def test_embedding_starts_small():
    weight = Embedding(1000, 50).weight
    assert weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert weight.mean().item() == pytest.approx(0, abs=0.001)


def test_embedding_refuses_ids_it_does_not_have():
    for bad in (-1, 5):
        with pytest.raises(IndexError):
            Embedding(5, 2)(torch.tensor([[0, bad], [1, 2]]))


def test_embedding_of_no_ids_is_empty():
    assert Embedding(5, 2)(torch.empty(3, 0, dtype=torch.int64)).shape == (3, 0, 2)


def test_embedding_compiles_as_one_graph():
    layer = Embedding(5, 2)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    ids = torch.tensor([4, 0])
    assert torch.equal(compiled(ids), layer(ids))


def test_rounding_leads_past_no_cosine():
    x = torch.randn(20_000, 7, generator=torch.Generator().manual_seed(0))
    unit = x / x.norm(dim=-1, keepdim=True)
    assert (unit * unit).sum(-1).max() > 1  # what rounding does by itself
    assert cosine_similarity(x, 3 * x).max() <= 1
    assert cosine_similarity(x, -3 * x).min() >= -1
