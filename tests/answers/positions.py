"""Answers to the checks of chapter 4."""

import math

import torch
import torch.nn.functional as F

from glassgpt.checks import positions as checks
from glassgpt.positions import sinusoidal_positions


def sinusoids(unit=1.0, first=0, base=10000.0, step=2, dtype=torch.float64):
    def positions(context, width):
        speeds = base ** -(step * torch.arange(width // 2) / width)
        angles = torch.arange(first, context + first).to(dtype)[:, None] * speeds * unit
        return torch.stack((angles.sin(), angles.cos()), -1).flatten(1)

    return positions


def side_by_side(context, width):
    table = sinusoidal_positions(context, width)
    return torch.cat((table[:, 0::2], table[:, 1::2]), dim=1)


def each_column(context, width):
    """A speed for each column, not for each hand."""
    angles = torch.arange(context)[:, None] * 10000.0 ** (-torch.arange(width) / width)
    return torch.stack((angles[:, 0::2].sin(), angles[:, 1::2].cos()), -1).flatten(1)


def embed(ids, tokens, positions, start):
    return tokens[ids] + positions[torch.arange(start, start + ids.shape[1])]


def as_nanogpt(ids, tokens, positions, start):
    places = torch.arange(start, start + ids.shape[1])
    assert places[-1] < len(positions), "too far"
    return F.embedding(ids, tokens) + F.embedding(places, positions)


def row_by_row(ids, tokens, positions, start):
    """A loop whose += writes into the table of tokens."""
    result = torch.empty(*ids.shape, tokens.shape[1])
    for b, text in enumerate(ids):
        for t, i in enumerate(text):
            row = tokens[i]
            row += positions[start + t]
            result[b, t] = row
    return result


def shift(sign=1.0, dtype=torch.float32):
    def matrix(distance, width):
        blocks = []
        for i in range(0, width, 2):
            angle = distance * 10000 ** (-i / width)
            sine, cosine = sign * math.sin(angle), math.cos(angle)
            blocks.append(torch.tensor([[cosine, -sine], [sine, cosine]], dtype=dtype))
        return torch.block_diag(*blocks)

    return matrix


def fitted(distance, width):
    table = sinusoidal_positions(528, width).double()
    t = torch.arange(8, 520)
    return torch.linalg.lstsq(table[t], table[t + distance]).solution


def one_speed(distance, width):
    sine, cosine = math.sin(distance), math.cos(distance)
    return torch.block_diag(*[torch.tensor([[cosine, -sine], [sine, cosine]])] * 4)[
        :width, :width
    ]


RIGHT = {
    checks.check_sinusoidal_positions: [
        sinusoidal_positions,
        sinusoids(),
        sinusoids(dtype=torch.float32),
    ],
    checks.check_add_positions: [embed, as_nanogpt],
    checks.check_shift_matrix: [shift(), shift(dtype=torch.float64), fitted],
}

WRONG = {
    checks.check_sinusoidal_positions: [
        (sinusoids(math.pi / 180), "degrees"),
        (sinusoids(first=1), "count from 0"),
        (side_by_side, "side by side"),
        (sinusoids(2.0), "Hand i turns by"),
        (sinusoids(base=100.0), "Hand i turns by"),
        (sinusoids(step=1), "Hand i turns by"),
        (each_column, "its sine and its cosine"),
        (lambda t, c: sinusoidal_positions(t, c).T, "the shape is"),
        (lambda t, c: sinusoidal_positions(4000, 6)[:t, :c], "is wanted"),
    ],
    checks.check_add_positions: [
        (lambda i, x, p, s: x[i] + p[s : s + 3], "accepted"),
        (lambda i, x, p, s: x[i] + p[: i.shape[1]], "start is ignored"),
        (lambda i, x, p, s: x[i] + p[i], "stands at position 0"),
        (lambda i, x, p, s: embed(i, x, p, s)[0], "the shape is (3, 2)"),
        (lambda i, x, p, s: embed(i, x, p, s).tolist(), "a list, not a tensor"),
        (lambda i, x, p, s: embed(i, x, p.detach(), s), "no gradient reaches input 3"),
        (row_by_row, "changed in place"),
    ],
    checks.check_shift_matrix: [
        (shift(sign=-1.0), "the wrong way"),
        (lambda distance, width: shift()(1, width), "distance is ignored"),
        (one_speed, "each turns at its own speed"),
        (lambda distance, width: 0 * shift()(distance, width), "is not position 21"),
        (lambda distance, width: shift()(distance, 8), "not (4, 4)"),
    ],
}
