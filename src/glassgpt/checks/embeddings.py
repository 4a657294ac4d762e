# Written by tools/tangle.py from book/03_embeddings.ipynb: change it there.
"""Checks of similarities, lookups and embedding layers that name the mistake."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glassgpt.checks.expect import expect_same


def check_cosine_similarity(similarity: Callable[..., Tensor]) -> None:
    """The cosine of the angle: of directions alone, along any axis, 0 for zeros.

    similarity: called as similarity(a, b, dim=...).

    Book: 03_embeddings.html#the-check
    """
    a, b = torch.tensor([3.0, 4.0]), torch.tensor([8.0, 6.0])
    mistakes = {
        "that is the dot product: divide it by both norms": lambda a, b: a @ b,
        "divided by the norm of one vector only": lambda a, b: a @ b / a.norm(),
        "divided by the squares of the norms: take their roots": (
            lambda a, b: a @ b / (a @ a) / (b @ b)
        ),
    }
    of_last = partial(similarity, dim=-1)
    expect_same(of_last, partial(F.cosine_similarity, dim=-1), a, b, mistakes=mistakes)
    zero = of_last(torch.stack([a, 0 * a]), a)[1]
    assert zero == 0, f"a zero vector gives {zero}, not 0: don't divide by its norm"
    random = torch.Generator().manual_seed(0)
    a = torch.randn(2, 1, 3, generator=random, dtype=torch.float64)
    b = torch.randn(4, 3, generator=random, dtype=torch.float64)
    for dim in (-1, 1):
        expect_same(
            partial(similarity, dim=dim),
            partial(F.cosine_similarity, dim=dim),
            a,
            b,
            hint=f"(2, 1, 3) and (4, 3) along dim={dim}: broadcast first, then use dim"
            " everywhere",
        )


def check_embedding(embedding: Callable[[int, int], nn.Module]) -> None:
    """Looks up its rows, trains those alone, and starts small.

    embedding: called as embedding(rows, width); the layer has a parameter `weight`.

    Book: 03_embeddings.html#the-check-of-the-layer
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer, large = embedding(5, 3), embedding(1000, 50)
    weight = layer.weight
    assert isinstance(weight, nn.Parameter), (
        "weight is no nn.Parameter: training would never find it"
    )
    assert weight.shape == (5, 3), (
        f"weight of Embedding(5, 3) has shape {tuple(weight.shape)}, not (rows, width)"
    )
    for ids in torch.tensor([[[0, 4], [4, 2]], [[3, 1], [0, 0]]]):
        expect_same(
            layer,
            lambda ids: weight[ids],
            ids,
            parameters={"weight": weight},
            hint="Each id becomes its row",
        )
    weight = large.weight
    spread, mean = weight.std().item(), weight.mean().item()
    assert weight.std(0).min() > 0, "all rows start alike: draw each number by itself"
    assert abs(spread - 0.02) < 0.001, (
        f"the rows start with standard deviation {spread:.3f}, not 0.02"
    )
    assert abs(mean) < 0.001, f"the rows start around {mean:.3g}, not 0"


def check_matrix_product(product: Callable[[Tensor, Tensor], Tensor]) -> None:
    """The matrix product: each entry is a row of a times a column of b.

    product: called as product(a, b) with a (N, K) and b (K, M).

    Book: 03_embeddings.html#exercise-1-the-product-by-mixing-rows
    """
    mistakes = {
        "the result is transposed: its rows belong to a": lambda a, b: (a @ b).T,
        "the terms with k = 0 are missing from every sum": (
            lambda a, b: a[:, 1:] @ b[1:]
        ),
        "the terms with the largest k are missing from every sum": (
            lambda a, b: a[:, :-1] @ b[:-1]
        ),
    }
    random = torch.Generator().manual_seed(0)
    for N, K, M in ((2, 3, 4), (4, 5, 3), (5, 2, 3), (1, 3, 1)):
        expect_same(
            product,
            torch.matmul,
            torch.randn(N, K, generator=random),
            torch.randn(K, M, generator=random),
            mistakes=mistakes,
            gradients=False,
            hint=f"({N}, {K}) times ({K}, {M}): an entry is a row of a times a column"
            " of b",
        )


def check_lookup(lookup: Callable[[Tensor, Tensor], Tensor]) -> None:
    """A lookup written as a product of one-hot vectors with the table.

    lookup: called as lookup(table, ids) with table (V, C) and ids of any shape.

    Book: 03_embeddings.html#exercise-2-look-up-by-multiplying
    """
    for rows, ids in ((4, [2, 0, 2]), (4, [[1, 3]]), (4, 3), (5, [4, 0])):
        expect_same(
            lookup,
            lambda table, ids: table[ids],
            torch.arange(3.0 * rows).view(rows, 3) - 2.5,
            torch.tensor(ids),
            gradients=False,
            hint=f"The ids are {ids}, in a table of {rows} rows",
        )


def check_analogy(analogy: Callable[[int, int, int, Tensor], int]) -> None:
    """The row most like b - a + c, with a, b and c themselves left out.

    Book: 03_embeddings.html#exercise-3-analogies-without-the-inputs
    """
    near = [[1.0, 0.0], [1.0, 1.0], [5.0, 0.2], [4.0, 2.0], [-5.0, 9.0], [2.5, -0.15]]
    far = [[0.0, -3, 0], [-2, 9, 9], [3, -3, 9], [2, 3, 4], [3, 6, 0], [1, 7, 2]]
    mistakes = {
        0: "it is the nearest by distance: compare cosines with b - a + c",
        1: "it has the largest dot product: compare cosines with b - a + c",
    }
    for rows, (a, b, c), right, wrong in (
        (near, (0, 1, 2), 3, {}),
        (far, (5, 4, 3), 2, mistakes),
    ):
        table = torch.tensor(rows)
        found = int(analogy(a, b, c, table))
        assert torch.equal(table, torch.tensor(rows)), (
            "the table was changed: work on a copy"
        )
        assert found not in (a, b, c), (
            f"row {found} is one of the inputs: leave out all three"
        )
        assert found not in wrong, f"row {found} came out, but {wrong[found]}"
        assert found == right, f"row {found} is not most like b - a + c, row {right} is"


def check_embedding_gradient(
    gradient: Callable[[Tensor, Tensor, int], Tensor],
) -> None:
    """The gradient of a table: what its looked-up rows receive, added up.

    gradient: called as gradient(ids, upstream, rows); ids (T,), upstream (T, C).

    Book: 03_embeddings.html#exercise-4-the-gradient-of-a-lookup
    """

    def reference(ids: Tensor, upstream: Tensor) -> Tensor:
        return torch.zeros(4, upstream.shape[1]).index_add(0, ids, upstream)

    def lossy(ids: Tensor, upstream: Tensor) -> Tensor:
        return torch.zeros(4, upstream.shape[1]).index_put((ids,), upstream)

    mistakes = {
        "a row that was looked up twice got only one of its two: assigning with"
        " grad[ids] += keeps one of them": lossy
    }
    for ids, upstream in (
        ([2, 0, 2], [[1.0, 2], [5, 0], [10, 3]]),
        ([2, 1, 2, 2], [[-0.5], [1.5], [-2.0], [-3.0]]),
    ):
        expect_same(
            lambda ids, upstream: gradient(ids, upstream, 4),
            reference,
            torch.tensor(ids),
            torch.tensor(upstream),
            mistakes=mistakes,
            gradients=False,
            hint=f"The ids are {ids}; rows that are not among them receive 0",
        )
