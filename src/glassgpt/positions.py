# Written by tools/tangle.py from book/04_positions.ipynb: change it there.
"""Positions: one vector for each place, added to the word that stands there."""

import torch
from torch import Tensor


def sinusoidal_positions(context: int, width: int) -> Tensor:
    """Make one vector for each position, to be added to the word at that position.

    Returns (context, width) in float32: sines in the even columns, cosines in the odd
    ones, from fast to slow. width: even, since columns come in pairs.
    Source: Vaswani et al. (2017), section 3.5.

    Book: 04_positions.html#sinusoidal-positions
    """
    exponents = torch.arange(0, width, 2, dtype=torch.float64) / width
    angles = torch.arange(context, dtype=torch.float64)[:, None] * 10000.0**-exponents
    # (T, C/2, 2) flattens to sine, cosine, sine, cosine ...
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1).float()
