# Written by tools/tangle.py from book/05_softmax.ipynb: change it there.
"""Softmax: scores become probabilities, and surprise at the target becomes a loss."""

import math

import torch
from torch import Tensor


def _below_peak(x: Tensor, dim: int) -> Tensor:
    """Scores minus the largest of their slice (one row along dim), in 32+ bits."""
    scores = x.to(torch.promote_types(x.dtype, torch.float32))
    peak = scores.detach().amax(dim, keepdim=True)
    return scores - peak.clamp(min=torch.finfo(x.dtype).min)


def softmax(x: Tensor, dim: int = -1, temperature: float = 1.0) -> Tensor:
    """Turn scores into probabilities: along `dim` they are >= 0 and sum to 1.

    x: scores of any shape, finite or -inf; the result has the same shape and dtype.
    A score of -inf gets probability 0. A slice, one row along `dim`, gets zeros when
    all of it is -inf, and nan when it holds nan or +inf.
    temperature: divides the scores. Near 0 the largest score takes all; the larger
    the temperature, the more equal the probabilities.
    Raises ValueError when the temperature isn't positive and finite, and TypeError
    when x holds integers. Source: Bridle (1990).

    Book: 05_softmax.html#the-function
    """
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, not {temperature}")
    below = _below_peak(x, dim)
    # A temperature beyond these would be rounded to 0 or infinity, and 0 / 0 is nan.
    limits = torch.finfo(below.dtype)
    powers = (below / min(max(temperature, limits.tiny), limits.max)).exp()
    # The peak adds 1 to the sum, so the clamp only acts where every score is -inf.
    return (powers / powers.sum(dim, keepdim=True).clamp(min=0.5)).to(x.dtype)


def log_softmax(x: Tensor, dim: int = -1) -> Tensor:
    """The natural logarithm of softmax(x, dim), exact where softmax rounds to 0.

    x: scores of any shape, finite or -inf; the result has the same shape and dtype.
    A score of -inf gets -inf; nan or +inf make their slice nan.
    Raises TypeError when x holds integers. Source: Blanchard et al. (2021).

    Book: 05_softmax.html#logarithms-of-probabilities
    """
    below = _below_peak(x, dim)
    log_sum_exp = below.exp().sum(dim, keepdim=True).clamp(min=0.5).log()
    return (below - log_sum_exp).to(x.dtype)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean surprise at the targets, in nats: a scalar.

    logits: (..., V) scores; targets: (...) int64 ids from 0 to V - 1, or -100
    where a position doesn't count. If none counts, the mean is nan.
    Raises what PyTorch does for shapes that don't fit and ids outside the vocabulary:
    IndexError or RuntimeError. Surprise and its mean: Shannon (1948).

    Book: 05_softmax.html#the-equation
    """
    counted = targets != -100
    log_probabilities = log_softmax(logits[counted])  # (N, V)
    return -log_probabilities.gather(-1, targets[counted].unsqueeze(-1)).mean()
