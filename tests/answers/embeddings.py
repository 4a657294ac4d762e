"""Answers to the checks of chapter 3."""

import torch
import torch.nn.functional as F
from torch import nn

from glassgpt.checks import embeddings as checks
from glassgpt.embeddings import Embedding, cosine_similarity


def dot_product(a, b, dim=-1):
    return (a * b).sum(dim)


def formula(a, b, dim=-1):
    return dot_product(a, b, dim) / (a.norm(dim=dim) * b.norm(dim=dim))


def normalized_first(a, b, dim=-1):
    return dot_product(F.normalize(a, dim=dim), F.normalize(b, dim=dim), dim)


def in_place(a, b, dim=-1):
    cosine = cosine_similarity(a, b, dim)
    a /= a.norm(dim=dim, keepdim=True)
    return cosine


class Plain(Embedding):
    def forward(self, ids):
        return self.weight[ids]


class OneHot(Embedding):
    def forward(self, ids):
        return F.one_hot(ids, len(self.weight)).to(self.weight.dtype) @ self.weight


class Flat(Embedding):
    def forward(self, ids):
        return super().forward(ids.flatten())


class Detached(Embedding):
    def forward(self, ids):
        return super().forward(ids).detach()


class Padded(Embedding):
    def forward(self, ids):
        return F.embedding(ids, self.weight, padding_idx=0)


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


def by_columns(a, b):
    return sum(a[:, k : k + 1] * b[k] for k in range(len(b)))


def by_cosine(table, wanted):
    return cosine_similarity(table, wanted)


def by_dot_product(table, wanted):
    return table @ wanted


def by_distance(table, wanted):
    return -(table - wanted).norm(dim=-1)


def nearest(measure, signs=(-1, 1, 1), leave_out=True):
    """The first row in a measure, for the sum of a, b and c with these signs."""

    def analogy(a, b, c, table):
        wanted = sum(s * table[i] for s, i in zip(signs, (a, b, c), strict=True))
        scores = measure(table, wanted)
        if leave_out:
            scores[[a, b, c]] = -torch.inf
        return scores.argmax()

    return analogy


def zeroing_inputs(a, b, c, table):
    wanted = table[b] - table[a] + table[c]
    table[[a, b, c]] = 0
    return nearest(lambda table, _: by_cosine(table, wanted))(a, b, c, table)


def by_loop(ids, upstream, rows):
    grad = upstream.new_zeros(rows, upstream.shape[1])
    for row, id in zip(upstream, ids.tolist(), strict=True):
        grad[id] += row
    return grad


def lossy(ids, upstream, rows):
    grad = torch.zeros(rows, upstream.shape[1])
    grad[ids] += upstream
    return grad


RIGHT = {
    checks.check_cosine_similarity: [cosine_similarity, F.cosine_similarity],
    checks.check_embedding: [Embedding, Plain, OneHot],
    checks.check_matrix_product: [
        torch.matmul,
        by_columns,
        lambda a, b: torch.tensor(a.numpy() @ b.numpy()),
        lambda a, b: torch.einsum("nk,km->nm", a, b),
    ],
    checks.check_lookup: [
        lambda table, ids: F.embedding(ids, table),
        lambda table, ids: torch.eye(len(table))[ids] @ table,
    ],
    checks.check_analogy: [
        nearest(by_cosine),
        lambda a, b, c, table: nearest(by_cosine)(a, b, c, table.double()).item(),
    ],
    checks.check_embedding_gradient: [
        by_loop,
        lambda ids, g, rows: torch.eye(rows)[ids].T @ g,
    ],
}

WRONG = {
    checks.check_cosine_similarity: [
        (dot_product, "the dot product"),
        (lambda a, b, dim=-1: dot_product(a, b, dim) / a.norm(), "one vector only"),
        (lambda a, b, dim=-1: formula(a, b) / a.norm() / b.norm(), "take their roots"),
        (formula, "a zero vector gives nan"),
        (lambda a, b, dim=-1: -cosine_similarity(a, b, dim), "-0.96 where 0.96"),
        (lambda a, b, dim=-1: abs(cosine_similarity(a, b, dim)), "is wanted"),
        (lambda a, b, dim=-1: cosine_similarity(a, b), "use dim everywhere"),
        (normalized_first, "broadcast first"),
        (in_place, "changed in place"),
        (lambda a, b, dim=-1: None, "returns None"),
    ],
    checks.check_embedding: [
        (NoParameter, "nn.Parameter"),
        (lambda rows, width: Embedding(width, rows), "(rows, width)"),
        (Flat, "the shape is (4, 3), not (2, 2, 3)"),
        (Detached, "no gradient flows back"),
        (Padded, "the gradient of weight is wrong"),
        (nn.Embedding, "deviation"),
        (starting(lambda *shape: 1 + 0.02 * torch.randn(shape)), "around 1, not 0"),
        (
            starting(lambda R, C: 0.02 * torch.randn(C).expand(R, C)),
            "all rows start alike",
        ),
    ],
    checks.check_matrix_product: [
        (lambda a, b: (a @ b).T, "transposed"),
        (lambda a, b: a[:, 1:] @ b[1:], "k = 0"),
        (lambda a, b: a[:, :2] @ b[:2], "the largest k"),
        (lambda a, b: (a @ b)[:, :3], "the shape is (2, 3), not (2, 4)"),
        (lambda a, b: a @ b.flip(1), "a row of a times a column of b"),
        (lambda a, b: (a @ b).squeeze(), "not (1, 1)"),
        (lambda a, b: (a @ b).tolist(), "a list, not a tensor"),
    ],
    checks.check_lookup: [
        (lambda table, ids: table[ids.flatten()], "the shape is (2, 3), not (1, 2, 3)"),
        (lambda table, ids: table[ids] * 0, "The ids are [2, 0, 2]"),
    ],
    checks.check_analogy: [
        (lambda a, b, c, table: b, "one of the inputs"),
        (nearest(by_cosine, leave_out=False), "one of the inputs"),
        (nearest(by_distance), "by distance"),
        (nearest(by_dot_product), "dot product"),
        (nearest(by_cosine, signs=(-1, 1, -1)), "is not most like"),
        (nearest(by_cosine, signs=(1, 1, 1)), "is not most like"),
        (nearest(by_cosine, signs=(0, 0, 1)), "is not most like"),
        (zeroing_inputs, "the table was changed"),
    ],
    checks.check_embedding_gradient: [
        (lossy, "keeps one of them"),
        (lambda ids, g, rows: g, "the shape is (3, 2), not (4, 2)"),
        (lambda ids, g, rows: torch.ones(rows, g.shape[1]), "receive 0"),
        (lambda ids, g, rows: by_loop(ids, g, rows).abs(), "where -5.5 is wanted"),
    ],
}
