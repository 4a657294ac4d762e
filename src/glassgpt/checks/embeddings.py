# Written by tools/tangle.py from book/03_embeddings.ipynb: change it there.


"""Checks of similarities, lookups and embedding layers that name the mistake."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def expect_tensor(got: object) -> None:
    """Say what an attempt returns where a tensor is asked for.

    Book: 03_embeddings.html#the-check
    """
    kind = "None" if got is None else f"a {type(got).__name__}"
    assert isinstance(got, Tensor), f"it returns {kind}, not a tensor"


_COSINE_MISTAKES = {
    48.0: "that is the dot product: divide it by both norms",
    9.6: "it is divided by the norm of a only: divide by b's norm too",
    4.8: "it is divided by the norm of b only: divide by a's norm too",
    0.0192: "it is divided by the squares of the norms: take their roots",
    -0.96: "the sign is wrong",
}


def check_cosine_similarity(similarity: Callable[..., Tensor]) -> None:
    """The cosine of the angle: of directions alone, along any axis, 0 for zeros.

    similarity: called as similarity(a, b) for the last axis and similarity(a, b, dim).

    Book: 03_embeddings.html#the-check
    """
    a, b = torch.tensor([3.0, 4.0]), torch.tensor([8.0, 6.0])
    got = float(similarity(a, b))
    assert (a[1], b[1]) == (4, 6), "the vectors given were changed: work on a copy"
    for wrong, reason in _COSINE_MISTAKES.items():
        assert abs(got - wrong) > 1e-4, f"(3, 4) and (8, 6) give {got:.4g}: {reason}"
    assert abs(got - 0.96) < 1e-5, f"(3, 4) and (8, 6) give {got:.4g}, not 0.96"
    opposite = float(similarity(a, -a))
    assert abs(opposite + 1) < 1e-5, f"opposite vectors give {opposite:.3f}, not -1"
    rows = torch.stack([a, 0 * a])
    for one, zero in (similarity(rows, a).tolist(), similarity(a, rows).tolist()):
        assert zero == 0, f"a zero vector gives {zero}, not 0: don't divide by its norm"
        assert abs(one - 1) < 1e-5, f"a row beside zeros gives {one}, not 1"
    short = torch.tensor([1e-5, 0.0])
    got = float(similarity(short, short))
    assert abs(got - 1) < 1e-5, f"(1e-5, 0) with itself gives {got:.3g}, not 1"
    _check_axes(similarity)


def _check_axes(similarity: Callable[..., Tensor]) -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(2, 1, 3, generator=generator, dtype=torch.float64)
    b = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    for dim, name in ((-1, "the last axis"), (1, "dim=1")):
        wanted, got = F.cosine_similarity(a, b, dim=dim), similarity(a, b, dim)
        assert got.shape == wanted.shape, (
            f"shapes (2, 1, 3) and (4, 3) along {name} give {tuple(got.shape)}, "
            f"not {tuple(wanted.shape)}: broadcast, then sum over dim"
        )
        right = torch.allclose(got, wanted)
        assert right, f"wrong along {name}: use dim everywhere, after broadcasting"


def check_embedding(embedding: Callable[[int, int], nn.Module]) -> None:
    """Looks up its rows, trains those alone, and starts small.

    embedding: called as embedding(rows, width); the layer has a parameter `weight`.

    Book: 03_embeddings.html#the-check-of-the-layer
    """
    layer = embedding(5, 3)
    _check_rows(layer)
    _check_gradient(layer)
    weight = embedding(1000, 50).weight
    spread, mean = weight.std().item(), weight.mean().item()
    for dim, alike in ((0, "all rows"), (1, "all columns")):
        varied = weight.std(dim).mean() > spread / 2
        assert varied, f"{alike} start alike: draw each number by itself"
    started = abs(spread - 0.02) < 0.001
    assert started, f"the rows start with standard deviation {spread:.3f}, not 0.02"
    assert abs(mean) < 0.001, f"the rows start around {mean:.3g}, not 0"
    near = (weight.abs() < 0.02).double().mean().item()
    assert abs(near - 0.68) < 0.02, (
        f"{near:.0%} of the numbers are within 0.02 of 0, not 68%: start with normal_"
    )


def _check_rows(layer: nn.Module) -> None:
    weight = getattr(layer, "weight", None)
    assert isinstance(weight, nn.Parameter), (
        "weight is no nn.Parameter: training would never find it"
    )
    assert weight.shape == (5, 3), (
        f"weight of Embedding(5, 3) has shape {tuple(weight.shape)}, not (rows, width)"
    )
    for ids in torch.tensor([[[0, 4], [4, 2]], [[0, 2], [1, 2]]]):
        found = layer(ids)
        assert found.shape == (2, 2, 3), (
            f"ids (2, 2) give {tuple(found.shape)}: each id becomes a row of 3 numbers"
        )
        same = torch.equal(found, weight[ids])
        assert same, "the vectors are not the rows of the ids"


def _check_gradient(layer: nn.Module) -> None:
    layer.weight.grad = None
    out = layer(torch.tensor([4, 0, 4])).sum()
    if out.requires_grad:
        out.backward()
    assert layer.weight.grad is not None, "no gradient reaches weight: it can't learn"
    got = layer.weight.grad[:, 0].tolist()
    assert got[1:4] == [0, 0, 0], "rows that no id asked for receive a gradient"
    assert got[0] == 1, f"an id that occurs once gets gradient {got[0]:g}, not 1"
    assert got[4] == 2, (
        f"an id that occurs twice gets gradient {got[4]:g}, not 2: its gradients add up"
    )
    layer.weight.grad = None
    layer(torch.arange(5)).sum().backward()
    never = (layer.weight.grad == 0).any(1).nonzero().flatten().tolist()
    assert not never, f"rows {never} were looked up and receive no gradient"


def check_matrix_product(product: Callable[[Tensor, Tensor], Tensor]) -> None:
    """The matrix product: each entry is a row of a times a column of b.

    product: called as product(a, b) with a (N, K) and b (K, M).

    Book: 03_embeddings.html#exercise-1-the-product-by-mixing-rows
    """
    a = torch.tensor([[2.0, 1.0, 0.0], [1.0, 0.0, 2.0]])
    rows = [[1.0, -1.0, 0.0, 4.0], [2.0, 0.0, 1.0, 0.0], [0.0, 3.0, 5.0, 1.0]]
    b = torch.tensor(rows)
    got = product(a, b)
    expect_tensor(got)
    assert got.shape != (4, 2), "the result is transposed: its rows belong to a"
    assert got.shape == (2, 4), (
        f"(2, 3) times (3, 4) gives {tuple(got.shape)}, not (2, 4): "
        "the inner lengths disappear"
    )
    for k in range(3):
        lost = torch.allclose(got, a @ b - a[:, k : k + 1] * b[k])
        assert not lost, f"the terms with k = {k} are missing from every sum"
    for i, j in ((0, 0), (1, 1), (1, 3)):
        wanted = (a[i] * b[:, j]).sum().item()
        assert abs(got[i, j] - wanted) < 1e-5, (
            f"entry ({i}, {j}) is {got[i, j]:g}, not {wanted:g}: "
            f"row {i} of a times column {j} of b"
        )
    assert torch.allclose(got, a @ b), f"the product is wrong: {got.tolist()}"
    shape = tuple(product(a[:1], b[:, :1]).shape)
    assert shape == (1, 1), f"(1, 3) times (3, 1) gives {shape}, not (1, 1)"
    generator = torch.Generator().manual_seed(0)
    for n, k in ((4, 5), (5, 2)):
        a, b = (torch.randn(size, generator=generator) for size in ((n, k), (k, 3)))
        got = product(a, b)
        right = got.shape == (n, 3) and torch.allclose(got, a @ b, atol=1e-5)
        what = f"({n}, {k}) times ({k}, 3), with fractions and negative numbers"
        assert right, f"wrong for {what}"


def check_lookup(lookup: Callable[[Tensor, Tensor], Tensor]) -> None:
    """A lookup written as a product of one-hot vectors with the table.

    lookup: called as lookup(table, ids) with table (V, C) and ids of any shape.

    Book: 03_embeddings.html#exercise-2-look-up-by-multiplying
    """
    table = torch.arange(12.0).view(4, 3)
    other = torch.tensor([[-0.5, 2.5], [1.5, -3.0]])
    many = [(table, ids) for ids in ([2, 0, 2], [[1, 3]], 3)]
    longer = torch.arange(10.0).view(5, 2)
    for table, ids in [*many, (other, [1, 0]), (longer, [4, 0])]:
        ids = torch.tensor(ids)
        try:
            got, wanted = lookup(table, ids), table[ids]
        except NotImplementedError:
            raise
        except (IndexError, RuntimeError) as error:
            size = tuple(table.shape)
            raise AssertionError(f"a table {size} is refused: {error}") from None
        expect_tensor(got)
        assert got.shape == wanted.shape, (
            f"ids {tuple(ids.shape)} give {tuple(got.shape)}, not {tuple(wanted.shape)}"
        )
        assert torch.equal(got, wanted), f"ids {ids.tolist()} give the wrong rows"


def check_analogy(analogy: Callable[[int, int, int, Tensor], int]) -> None:
    """The row most like b - a + c, with a, b and c themselves left out.

    Book: 03_embeddings.html#exercise-3-analogies-without-the-inputs
    """
    rows = [[1.0, 0.0], [1.0, 1.0], [5.0, 0.2], [4.0, 2.0], [-5.0, 9.0], [2.5, -0.15]]
    _check_analogy(
        analogy,
        torch.tensor(rows),
        {
            4: "it is the answer where the sign of c is wrong: take b - a + c",
            5: "it is the answer where a or b is wrong or missing: take b - a + c",
        },
    )
    rows = [[1.0, 7, 2], [3, 6, 0], [2, 3, 4], [3, -3, 9], [-2, 9, 9], [0, -3, 0]]
    rows.append([-4, -2, -2])
    _check_analogy(
        analogy,
        torch.tensor(rows),
        {
            4: "it is the answer of dot products, of rows made norm 1 before the "
            "arithmetic, or without c: compare cosines with b - a + c",
            5: "it is the nearest to b - a + c by distance, or its difference from c "
            "is like b - a: compare cosines with b - a + c",
            6: "it points the opposite way: a cosine of -1 is the least alike",
        },
    )
    rows = [[1.0, 0.0], [1.0, 1.0], [0.0, 1.0], [-1.0, -0.2], [-1.0, -5.0]]
    _check_analogy(analogy, torch.tensor(rows), {})


def _check_analogy(
    analogy: Callable[[int, int, int, Tensor], int],
    table: Tensor,
    wrong: dict[int, str],
) -> None:
    kept = table.clone()
    found = analogy(0, 1, 2, table)
    assert torch.equal(table, kept), "the table was changed: work on a copy"
    try:
        got = int(found)
    except (TypeError, ValueError, RuntimeError):
        raise AssertionError(f"it returns {found}, not the id of a row") from None
    assert got not in (0, 1, 2), f"row {got} is one of the inputs: leave out all three"
    assert got not in wrong, f"row {got} came out, but {wrong[got]}"
    assert got == 3, f"row {got} is not most like b - a + c"
    end = len(table) - 1
    got = end - int(analogy(end, end - 1, end - 2, table.flip(0)))
    assert got == 3, "with its rows in reverse order the same table gives another row"


def check_embedding_gradient(
    gradient: Callable[[Tensor, Tensor, int], Tensor],
) -> None:
    """The gradient of a table: what its looked-up rows receive, added up.

    gradient: called as gradient(ids, upstream, rows); ids (T,), upstream (T, C).

    Book: 03_embeddings.html#exercise-4-the-gradient-of-a-lookup
    """
    ids, upstream = torch.tensor([2, 0, 2]), torch.tensor([[1.0, 2], [5, 0], [10, 3]])
    got = gradient(ids, upstream, 4)
    expect_tensor(got)
    assert got.shape == (4, 2), f"the gradient has shape {tuple(got.shape)}, not (4, 2)"
    assert not got[[1, 3]].any(), "a row that was not looked up receives a gradient"
    row = got[2].tolist()
    assert row not in ([1, 2], [10, 3]), (
        f"row 2 was looked up twice, with [1, 2] and [10, 3], but got only {row}: "
        "assigning with grad[ids] += keeps one of them"
    )
    assert got.tolist() == [[5, 0], [0, 0], [11, 5], [0, 0]], f"got {got.tolist()}"
    assert upstream.tolist() == [[1, 2], [5, 0], [10, 3]], "upstream was changed"
    ids = torch.tensor([2, 1, 2, 2])
    upstream = torch.tensor([[-0.5], [1.5], [-2.0], [-3.0]])
    what = "3 rows of width 1, one looked up three times, with negative numbers"
    try:
        got = gradient(ids, upstream, 3)
    except RuntimeError as error:
        raise AssertionError(f"wrong for {what}: {error}") from None
    wanted = torch.tensor([[0], [1.5], [-5.5]])
    right = got.shape == (3, 1) and torch.allclose(got, wanted)
    assert right, f"wrong for {what}"
