# Written by tools/tangle.py from book/03_embeddings.ipynb: change it there.
"""Embeddings: a row of numbers for each token, and how alike two rows are."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _unit(x: Tensor, dim: int) -> Tensor:
    """Vectors scaled to length 1 along `dim`; zero vectors stay zero."""
    # The result doesn't depend on this divisor, so no gradient flows through it.
    largest = x.detach().abs().amax(dim, keepdim=True)
    x = x / torch.where(largest > 0, largest, 1)
    length = torch.linalg.vector_norm(x, dim=dim, keepdim=True)
    return x / torch.where(length > 0, length, 1)


def cosine_similarity(a: Tensor, b: Tensor, dim: int = -1) -> Tensor:
    """Compute the cosine of the angle between vectors, from -1 to 1.

    a, b: tensors whose shapes broadcast; the vectors lie along `dim`, counted in the
    broadcast shape. That axis is missing from the result. 1 means the same direction,
    0 a right angle, -1 the opposite direction. A zero vector is like nothing: it gives
    0. Vectors of any finite length neither overflow nor underflow.
    Raises ValueError when the shapes don't fit.

    Book: 03_embeddings.html#the-function
    """
    try:
        a, b = torch.broadcast_tensors(a, b)
    except RuntimeError:
        raise ValueError(
            f"shapes {tuple(a.shape)} and {tuple(b.shape)} don't broadcast: "
            "each axis must be equal in both, or 1 in one of them"
        ) from None
    return (_unit(a, dim) * _unit(b, dim)).sum(dim).clamp(-1, 1)


def nearest_neighbors(vector: Tensor, table: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Find the k rows of a table that are most like a vector.

    vector: (C,); table: (V, C). Returns the cosine similarities, falling, and the ids
    of their rows, both (k,). Raises ValueError for shapes that don't fit or an
    impossible k.

    Book: 03_embeddings.html#nearest-neighbors
    """
    if vector.dim() != 1 or table.dim() != 2 or len(vector) != table.shape[1]:
        raise ValueError(
            f"need a vector (C,) and a table (V, C), got {tuple(vector.shape)} "
            f"and {tuple(table.shape)}"
        )
    if not 1 <= k <= len(table):
        raise ValueError(f"k={k} neighbors of a table with {len(table)} rows")
    similarities, ids = cosine_similarity(table, vector).topk(k)
    return similarities, ids


def validate_ids(ids: Tensor, rows: int) -> None:
    """Refuse ids that a table with this many rows doesn't have.

    ids: int64 or int32, any shape. On a GPU this waits for the GPU to finish, so call
    it once at a model's door and not in every layer.
    Raises TypeError for other kinds of ids, and ValueError that names an id out of
    range.

    Book: 03_embeddings.html#the-layer
    """
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int64, torch.int32):
        kind = getattr(ids, "dtype", type(ids).__name__)
        raise TypeError(f"ids must be a tensor of int64 or int32, not {kind}")
    if ids.numel() == 0:
        return
    lowest, highest = (int(id) for id in ids.aminmax())
    if lowest < 0 or highest >= rows:
        wrong = lowest if lowest < 0 else highest
        raise ValueError(
            f"id {wrong} is out of range: {rows} rows have the ids 0 to {rows - 1}"
        )


class Embedding(nn.Module):
    """A trainable table of vectors: ids (...) in, rows (..., width) out.

    `weight` (rows, width) starts normal with standard deviation 0.02, as in GPT-2.
    On the CPU, outside of compiled code, ids are validated: TypeError unless int64 or
    int32, ValueError for an id out of range. On a GPU call `validate_ids` first.
    Raises ValueError when rows or width isn't positive.
    Source: the start of `wte` in `model.py` of OpenAI's gpt-2.

    Book: 03_embeddings.html#the-layer
    """

    def __init__(self, rows: int, width: int):
        super().__init__()
        if rows < 1 or width < 1:
            raise ValueError(f"a table of {rows} x {width}: both must be at least 1")
        self.weight = nn.Parameter(torch.empty(rows, width))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        if not torch.compiler.is_compiling() and ids.device.type == "cpu":
            validate_ids(ids, len(self.weight))
        return F.embedding(ids, self.weight)
