# Written by tools/tangle.py from book/03_embeddings.ipynb: change it there.
"""Embeddings: a row of numbers for each token, and how alike two rows are."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def cosine_similarity(a: Tensor, b: Tensor, dim: int = -1) -> Tensor:
    """Compute the cosine of the angle between vectors, from -1 to 1.

    a, b: tensors whose shapes broadcast; the vectors lie along `dim`, counted in the
    broadcast shape. That axis is missing from the result. 1 means the same direction,
    0 a right angle, -1 the opposite direction. A zero vector resembles no vector: it
    gives 0. In float32, norms may lie between 1e-12 and 1e19.

    Book: 03_embeddings.html#the-function
    """
    a, b = torch.broadcast_tensors(a, b)
    a, b = F.normalize(a, dim=dim), F.normalize(b, dim=dim)  # norm 1; zeros stay zero
    return (a * b).sum(dim).clamp(-1, 1)


def nearest_neighbors(vector: Tensor, table: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Find the k rows of a table that are most like a vector.

    vector: (C,); table: (V, C). Returns the cosine similarities, falling, and the ids
    of their rows, both (k,).

    Book: 03_embeddings.html#nearest-neighbors
    """
    return cosine_similarity(table, vector).topk(k)


class Embedding(nn.Module):
    """A trainable table of vectors: ids (...) in, rows (..., width) out.

    `weight` (rows, width) starts normal with standard deviation 0.02, as in GPT-2.
    Source: the start of `wte` in `model.py` of OpenAI's gpt-2.

    Book: 03_embeddings.html#the-layer
    """

    def __init__(self, rows: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, width))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)
