# Written by tools/tangle.py from book/04_positions.ipynb: change it there.
"""Positions: telling each vector where it stands, by adding or by turning."""

import torch
from torch import Tensor


def _angles(context: int, width: int, base: float) -> Tensor:
    """Angle of each hand at each position, (context, width / 2), in 64 bits."""
    if context < 1:
        raise ValueError(f"context is {context}, but there is at least one position")
    if width < 2 or width % 2:
        raise ValueError(f"width is {width}, but columns come in pairs: make it even")
    if not base > 0:
        raise ValueError(f"base is {base}, but the speeds need a positive one")
    exponents = torch.arange(0, width, 2, dtype=torch.float64) / width
    return torch.arange(context, dtype=torch.float64)[:, None] * base**-exponents


def sinusoidal_positions(context: int, width: int) -> Tensor:
    """Make one vector for each position, to be added to the word at that position.

    Returns (context, width) in float32: sines in the even columns, cosines in the odd
    ones, from fast to slow. Raises ValueError unless context is positive and width
    even.
    Source: Vaswani et al. (2017), section 3.5.

    Book: 04_positions.html#sinusoidal-positions
    """
    angles = _angles(context, width, base=10000.0)
    # (T, C/2, 2) flattens to sine, cosine, sine, cosine ...
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1).float()


def rotary_tables(
    context: int, head_width: int, base: float = 10000.0
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the turn of each pair of columns at each position.

    Returns (cos, sin), each (context, head_width / 2) in float32, for `apply_rotary`.
    base: a larger one makes the slow hands slower, for longer contexts.
    Raises ValueError unless context and base are positive and head_width is even.
    Source: Su et al. (2021).

    Book: 04_positions.html#rotary-positions
    """
    angles = _angles(context, head_width, base)
    return angles.cos().float(), angles.sin().float()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair of columns of queries or keys by the angle of its position.

    x: (..., T, D); cos, sin: (T, D / 2), rows of `rotary_tables` for the T positions of
    x, or with further axes that broadcast. Column i is paired with column i + D / 2, as
    in the Llama of `transformers`. Returns the shape and dtype of x. Raises ValueError
    when the shapes don't fit. Source: Su et al. (2021), section 3.4.

    Book: 04_positions.html#rotary-positions
    """
    time, width = x.shape[-2:]
    if width % 2 or not cos.shape[-2:] == sin.shape[-2:] == (time, width // 2):
        raise ValueError(
            f"x (..., T, D) is {tuple(x.shape)}, so cos and sin must end in (T, D / 2),"
            f" with D even; they are {tuple(cos.shape)} and {tuple(sin.shape)}"
        )
    first, second = x.chunk(2, dim=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return torch.cat(turned, dim=-1).to(x.dtype)
