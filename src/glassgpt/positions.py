# Written by tools/tangle.py from book/04_positions.ipynb: change it there.
"""Positions: a vector for each place in a text, added to the vector of its token."""

import torch
from torch import Tensor


def sinusoidal_positions(context: int, width: int) -> Tensor:
    """Make one vector for each position, to be added to the token at that position.

    Returns (context, width) in float32: sines in the even columns, cosines in the odd
    ones, from fast to slow. Raises ValueError unless width is even.
    Source: Vaswani et al. (2017), section 3.5.

    Book: 04_positions.html#the-equation
    """
    if width % 2:
        raise ValueError(f"width is {width}, but columns come in pairs: make it even")
    speeds = 10000.0 ** (-torch.arange(0, width, 2) / width)
    angles = torch.arange(context)[:, None] * speeds
    # (T, C/2, 2) flattens to sine, cosine, sine, cosine ...
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)
