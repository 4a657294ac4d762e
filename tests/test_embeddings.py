"""Word vectors and the embedding layer: parity, extremes, and gradients."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from glassgpt.checks import embeddings as checks
from glassgpt.checks.grading import catch
from glassgpt.embeddings import Embedding, cosine_similarity, nearest_neighbors

sizes = st.integers(1, 4)
seeds = st.integers(0, 2**31)


def random(shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def test_package_passes_its_checks():
    checks.check_cosine_similarity(cosine_similarity)
    checks.check_matrix_product(torch.matmul)
    checks.check_embedding(Embedding)


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


def test_cosine_stays_within_its_range():
    x = random((200, 3), 0).float()
    for scale in (0.1, 0.3, 7.0):
        assert cosine_similarity(x, x * scale).abs().max() <= 1


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


def test_embedding_equals_torch_with_its_gradient():
    ours, theirs = Embedding(7, 5), nn.Embedding(7, 5)
    theirs.load_state_dict(ours.state_dict())
    ids = torch.tensor([[0, 6, 3], [3, 3, 1]])
    upstream = torch.randn(2, 3, 5)
    for layer in (ours, theirs):
        (layer(ids) * upstream).sum().backward()
    assert torch.equal(ours(ids), theirs(ids))
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)


def by_columns(a, b):
    return sum(a[:, k : k + 1] * b[k] for k in range(len(b)))


@pytest.mark.parametrize(
    "product",
    [
        lambda a, b: torch.einsum("nk,km->nm", a, b),
        lambda a, b: torch.tensor(a.numpy() @ b.numpy()),
        lambda a, b: (a.double() @ b.double()).float(),
        lambda a, b: (a[:, :, None] * b).sum(1),
        by_columns,
    ],
)
def test_right_products_pass(product):
    checks.check_matrix_product(product)


class Truncated(nn.Embedding):
    def __init__(self, rows, width):
        super().__init__(rows, width)
        nn.init.trunc_normal_(self.weight, std=0.02)


class Plain(Embedding):
    def forward(self, ids):
        return self.weight[ids]


class OneHot(Embedding):
    def forward(self, ids):
        return F.one_hot(ids, len(self.weight)).to(self.weight.dtype) @ self.weight


class Selecting(Embedding):
    def forward(self, ids):
        return self.weight.index_select(0, ids.flatten()).view(*ids.shape, -1)


@pytest.mark.parametrize(
    "layer",
    [Truncated, Plain, OneHot, Selecting, lambda r, c: Embedding(r, c).double()],
)
def test_right_layers_pass(layer):
    checks.check_embedding(layer)


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


def dot_product(a, b, dim=-1):
    return (a * b).sum(dim)


def formula(a, b, dim=-1):
    return dot_product(a, b, dim) / (a.norm(dim=dim) * b.norm(dim=dim))


def last_axis(a, b, dim=-1):
    return cosine_similarity(a, b)


def guarding_a(a, b, dim=-1):
    """A zero row of b still gives nan."""
    norms = a.norm(dim=dim), b.norm(dim=dim)
    shares = dot_product(a, b, dim) / (norms[0] * norms[1])
    return torch.where(norms[0] == 0, 0, shares)


def guarding_whole(a, b, dim=-1):
    """Only zeros throughout are noticed, not a zero row beside others."""
    if not a.any() or not b.any():
        return dot_product(a, b, dim)
    return formula(a, b, dim)


def divided_in_place(a, b, dim=-1):
    cosine = cosine_similarity(a, b, dim)
    a /= a.norm(dim=dim, keepdim=True)
    return cosine


class AsManyAsTheHighest(Embedding):
    """One-hot vectors as long as the highest id, not as the table."""

    def forward(self, ids):
        return F.one_hot(ids).float() @ self.weight


def test_one_hot_is_told_how_many_rows_there_are():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        checks.check_embedding(AsManyAsTheHighest)


class OneRowTooFew(Embedding):
    def forward(self, ids):
        return super().forward(ids)[:-1]


class Frozen(Embedding):
    def forward(self, ids):
        return super().forward(ids.clamp(0, 4)).detach().requires_grad_()


def padded(row):
    """A kind of embedding in which one row never receives a gradient."""

    class Padded(Embedding):
        def forward(self, ids):
            return F.embedding(ids, self.weight, padding_idx=row)

    return Padded


class NoParameter(nn.Module):
    def __init__(self, rows, width):
        super().__init__()
        self.weight = torch.zeros(rows, width)


def starting(start):
    """A kind of embedding whose weight begins as start(rows, width)."""

    class Started(Embedding):
        def __init__(self, rows, width):
            super().__init__(rows, width)
            self.weight.data = start(rows, width)

    return Started


def nearest_to(of_b, of_a, of_c):
    """An analogy with these factors, and the three inputs left out."""

    def analogy(a, b, c, table):
        wanted = of_b * table[b] + of_a * table[a] + of_c * table[c]
        likeness = cosine_similarity(wanted, table)
        likeness[[a, b, c]] = -2
        return likeness.argmax()

    return analogy


def measured(measure, rank=None):
    """The row first in this measure without the inputs, or at this rank among all."""

    def analogy(a, b, c, table):
        scores = measure(table, a, b, c)
        if rank is not None:
            return scores.argsort(descending=True)[rank]
        scores[[a, b, c]] = -torch.inf
        return scores.argmax()

    return analogy


def inputs_made_zero(a, b, c, table):
    """Not left out: a cosine of 0 is the largest where all others are negative."""
    likeness = by_cosine(table, a, b, c)
    likeness[[a, b, c]] = 0
    return likeness.argmax()


def by_cosine(table, a, b, c):
    return cosine_similarity(table, table[b] - table[a] + table[c])


def zeroing_inputs(a, b, c, table):
    likeness = by_cosine(table, a, b, c)
    table[[a, b, c]] = 0
    return likeness.masked_fill((table == 0).all(1), -2).argmax()


def by_dot_product(table, a, b, c):
    return table @ (table[b] - table[a] + table[c])


def by_distance(table, a, b, c):
    return -(table - (table[b] - table[a] + table[c])).norm(dim=-1)


def by_difference(table, a, b, c):
    return cosine_similarity(table - table[c], table[b] - table[a])


def by_rows_of_norm_one(table, a, b, c):
    return by_cosine(table / table.norm(dim=-1, keepdim=True), a, b, c)


def summed(ids, upstream, rows):
    """Each row receives the sum over its columns, in all of them."""
    grad = torch.zeros(rows, upstream.shape[1]).index_add(0, ids, upstream)
    return grad.sum(-1, keepdim=True).expand_as(grad)


def at_most_twice(ids, upstream, rows):
    """Adds the last two occurrences of each id."""
    grad = upstream.new_zeros(rows, upstream.shape[1])
    for id in ids.unique():
        grad[id] = upstream[ids == id][-2:].sum(0)
    return grad


def inside_upstream(ids, upstream, rows):
    """Adds up in the first place of each id."""
    grad = upstream.new_zeros(rows, upstream.shape[1])
    for id in ids.unique():
        places = (ids == id).nonzero().flatten()
        upstream[places[0]] = upstream[places].sum(0)
        grad[id] = upstream[places[0]]
    return grad


def by_loop(ids, upstream, rows):
    grad = upstream.new_zeros(rows, upstream.shape[1])
    for row, id in zip(upstream, ids.tolist(), strict=True):
        grad[id] += row
    return grad


@pytest.mark.parametrize(
    ("check", "right"),
    [
        (checks.check_cosine_similarity,
         lambda a, b, dim=-1: F.cosine_similarity(a, b, dim)),
        (checks.check_analogy, measured(by_cosine)),
        (checks.check_analogy, lambda a, b, c, table: nearest_to(1, -1, 1)(
            a, b, c, table.double()).item()),
        (checks.check_embedding_gradient, by_loop),
        (checks.check_embedding_gradient, lambda ids, g, rows: torch.zeros(
            rows, g.shape[1]).index_add(0, ids, g)),
        (checks.check_embedding_gradient, lambda ids, g, rows: torch.eye(
            rows)[ids].T @ g),
    ],
)  # fmt: skip
def test_right_answers_pass(check, right):
    check(right)


@pytest.mark.parametrize(
    ("check", "wrong", "message"),
    [
        (checks.check_cosine_similarity, dot_product, "dot product"),
        (checks.check_cosine_similarity, formula, "zero vector gives nan"),
        (checks.check_cosine_similarity, last_axis, "dim=1"),
        (checks.check_cosine_similarity, lambda a, b, dim=-1: dot_product(
            F.normalize(a, dim=dim), F.normalize(b, dim=dim), dim),
         "after broadcasting"),
        (checks.check_cosine_similarity, lambda a, b, dim=-1: dot_product(a, b, dim) / (
            a.norm(dim=dim) * b.norm(dim=dim) + 1e-8), "with itself"),
        (checks.check_cosine_similarity, lambda a, b, dim=-1: abs(
            cosine_similarity(a, b, dim)), "opposite"),
        (checks.check_cosine_similarity, guarding_a, "zero vector gives nan"),
        (checks.check_cosine_similarity, guarding_whole, "zero vector gives nan"),
        (checks.check_cosine_similarity, lambda a, b, dim=-1: formula(
            a, b, dim).nan_to_num() * b.norm(dim=dim).bool().all(), "beside zeros"),
        (checks.check_cosine_similarity, divided_in_place, "were changed"),
        (checks.check_matrix_product, lambda a, b: (a @ b).T, "transposed"),
        (checks.check_matrix_product, lambda a, b: a[:, 1:] @ b[1:], "k = 0"),
        (checks.check_matrix_product, lambda a, b: (a @ b)[:, :3], "(2, 3), not"),
        (checks.check_matrix_product, lambda a, b: a @ b.flip(1), "column 0 of b"),
        (checks.check_matrix_product, lambda a, b: -a @ b, "entry (0, 0) is -4"),
        (checks.check_matrix_product, lambda a, b: (a @ b).clamp(max=8.5), "wrong: "),
        (checks.check_matrix_product, lambda a, b: a[:2] @ b, "wrong for"),
        (checks.check_matrix_product, lambda a, b: a[:, :3] @ b[:3], "wrong for"),
        (checks.check_matrix_product, lambda a, b: (a.int() @ b.int()).float(),
         "fractions"),
        (checks.check_matrix_product, lambda a, b: torch.stack(
            [(w[:, None] * b).sum(0) for w, _ in zip(a, b, strict=False)]),
         "wrong for (5, 2) times (2, 3)"),
        (checks.check_matrix_product, lambda a, b: torch.stack(
            [a[i] @ b for i in range(min(a.shape))]), "wrong for (5, 2)"),
        (checks.check_matrix_product, lambda a, b: (a @ b).squeeze(0), "gives (1,)"),
        (checks.check_matrix_product, lambda a, b: torch.stack(
            [row @ b for row in a]).squeeze(), "(3, 1) gives ()"),
        (checks.check_embedding, OneRowTooFew, "each id becomes a row"),
        (checks.check_embedding, Frozen, "no gradient"),
        (checks.check_embedding, padded(1), "[1] were looked up"),
        (checks.check_embedding, padded(0), "occurs once gets gradient 0, not 1"),
        (checks.check_embedding, padded(4), "occurs twice gets gradient 0, not 2"),
        (checks.check_embedding, NoParameter, "nn.Parameter"),
        (checks.check_embedding, nn.Embedding, "deviation"),
        (checks.check_embedding, starting(torch.randn), "start with"),
        (checks.check_embedding, starting(
            lambda *shape: 1 + 0.02 * torch.randn(shape)), "around 1, not 0"),
        (checks.check_embedding, starting(
            lambda *shape: 0.02 * torch.randn(shape[0], 1).expand(shape)),
         "all columns start alike"),
        (checks.check_embedding, starting(
            lambda *shape: 0.02 * torch.randn(shape[1]).expand(shape)),
         "all rows start alike"),
        (checks.check_embedding, starting(
            lambda *shape: 0.04 * 3**0.5 * (torch.rand(shape) - 0.5)), "not 68%"),
        (checks.check_embedding, lambda rows, width: Embedding(width, rows),
         "rows, width"),
        (checks.check_lookup, lambda table, ids: table[ids.flatten()], "ids"),
        (checks.check_lookup, lambda table, ids: table[ids] * 0, "wrong rows"),
        (checks.check_lookup, lambda table, ids: torch.eye(4)[ids] @ table, "refused"),
        (
            checks.check_lookup,
            lambda table, ids: torch.eye(4)[ids][..., : len(table)] @ table,
            "a table (5, 2) is refused",
        ),
        (checks.check_lookup, lambda table, ids: table[ids].int(), "wrong rows"),
        (checks.check_analogy, lambda a, b, c, table: b, "inputs"),
        (checks.check_analogy, lambda a, b, c, table: None, "returns None"),
        (checks.check_analogy, zeroing_inputs, "the table was changed"),
        (checks.check_analogy, measured(by_cosine, rank=1), "inputs"),
        (checks.check_analogy, measured(by_cosine, rank=2), "inputs"),
        (checks.check_analogy, measured(by_distance), "by distance"),
        (checks.check_analogy, measured(by_difference), "difference from c"),
        (checks.check_analogy, measured(by_dot_product), "dot product"),
        (checks.check_analogy, measured(by_rows_of_norm_one), "of rows made norm 1"),
        (checks.check_analogy, measured(lambda *each: by_cosine(*each).abs()),
         "opposite way"),
        (checks.check_analogy, lambda a, b, c, table: 3 + by_cosine(
            table, a, b, c)[3:].argmax(), "reverse order"),
        (checks.check_analogy, inputs_made_zero, "inputs"),
        (checks.check_analogy, nearest_to(1, -1, -1), "sign of c"),
        (checks.check_analogy, nearest_to(1, 1, 1), "wrong or missing"),
        (checks.check_analogy, nearest_to(-1, 1, 1), "wrong or missing"),
        (checks.check_analogy, nearest_to(0, 0, 1), "wrong or missing"),
        (checks.check_analogy, nearest_to(1, 0, 1), "wrong or missing"),
        (checks.check_embedding_gradient,
         lambda ids, g, rows: torch.zeros(rows, 2).index_put((ids,), g), "twice"),
        (checks.check_embedding_gradient, lambda ids, g, rows: g, "shape"),
        (checks.check_embedding_gradient,
         lambda ids, g, rows: torch.zeros(rows, 2).index_add(0, ids, g), "3 rows"),
        (checks.check_embedding_gradient, lambda ids, g, rows: by_loop(
            ids[:rows], g[:rows], rows), "3 rows"),
        (checks.check_embedding_gradient, lambda ids, g, rows: torch.zeros(
            rows, g.shape[1]).index_add(0, ids, g).abs(), "negative"),
        (checks.check_embedding_gradient, inside_upstream, "upstream was changed"),
        (checks.check_embedding_gradient, at_most_twice, "three times"),
        (checks.check_embedding_gradient, summed, "got [[5.0, 5.0]"),
        (checks.check_embedding_gradient,
         lambda ids, g, rows: torch.ones(rows, 2), "not looked up"),
        (checks.check_embedding_gradient,
         lambda ids, g, rows: g.tolist(), "a list, not a tensor"),
        (checks.check_matrix_product, lambda a, b: None, "returns None"),
    ],
)  # fmt: skip
def test_checks_name_the_mistake(check, wrong, message, capsys):
    catch(check, wrong)
    assert message in capsys.readouterr().out


def test_rounding_leads_past_no_cosine():
    x = torch.randn(20_000, 7, generator=torch.Generator().manual_seed(0))
    unit = x / x.norm(dim=-1, keepdim=True)
    assert (unit * unit).sum(-1).max() > 1  # what rounding does by itself
    assert cosine_similarity(x, 3 * x).max() <= 1
    assert cosine_similarity(x, -3 * x).min() >= -1
