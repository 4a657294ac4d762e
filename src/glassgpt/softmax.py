# Written by tools/tangle.py from book/05_softmax.ipynb: change it there.
"""Softmax: scores become probabilities, and surprise at the target becomes a loss."""

import math

import torch
from torch import Tensor


def _below_peak(x: Tensor, dim: int) -> Tensor:
    """Scores minus the largest of their slice, in 32 bits or more."""
    if not x.is_floating_point():
        raise ValueError(f"scores must be floating-point numbers, not {x.dtype}")
    scores = x.to(torch.promote_types(x.dtype, torch.float32))
    # Any constant may be subtracted, so no gradient needs to flow through this one.
    peak = scores.detach().amax(dim, keepdim=True)
    return scores - peak.clamp(min=torch.finfo(scores.dtype).min)


def softmax(x: Tensor, dim: int = -1, temperature: float = 1.0) -> Tensor:
    """Turn scores into probabilities: along `dim` they are >= 0 and sum to 1.

    x: scores of any shape, finite or -inf; the result has the same shape and dtype.
    A score of -inf gets probability 0, and a slice of nothing but -inf gets zeros.
    A slice with nan or +inf gets nan: looking for them would make a GPU wait.
    temperature: divides the scores. Near 0 the largest score takes all; the larger
    the temperature, the more equal the probabilities.
    Raises ValueError when the temperature isn't positive and finite, or when x holds
    integers. Source: Bridle (1990).

    Book: 05_softmax.html#the-function
    """
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, not {temperature}")
    below = _below_peak(x, dim)
    # A temperature too small for the dtype would round to 0, and 0 / 0 is nan.
    powers = (below / max(temperature, torch.finfo(below.dtype).tiny)).exp()
    # The peak adds 1, so the clamp only acts where every score is -inf. Not min=1: at
    # the limit itself newer versions of PyTorch let no gradient through.
    return (powers / powers.sum(dim, keepdim=True).clamp(min=0.5)).to(x.dtype)


def log_softmax(x: Tensor, dim: int = -1) -> Tensor:
    """The natural logarithm of softmax(x, dim), exact where softmax rounds to 0.

    x: scores of any shape, finite or -inf; the result has the same shape and dtype.
    A score of -inf gets -inf; nan or +inf make their slice nan.
    Raises ValueError when x holds integers. Source: Blanchard et al. (2021).

    Book: 05_softmax.html#logarithms-of-probabilities
    """
    below = _below_peak(x, dim)
    log_sum_exp = below.exp().sum(dim, keepdim=True).clamp(min=0.5).log()
    return (below - log_sum_exp).to(x.dtype)


def _check_targets(logits: Tensor, targets: Tensor, counted: Tensor) -> None:
    """Raise ValueError for targets of a wrong shape, dtype or (if cheap) range."""
    if targets.shape != logits.shape[:-1]:
        raise ValueError(
            f"targets must have the shape of logits without its last axis: "
            f"{tuple(targets.shape)} does not fit {tuple(logits.shape)}"
        )
    if targets.dtype != torch.int64:
        raise ValueError(f"targets must be int64 token ids, not {targets.dtype}")
    if targets.device.type != "cpu" or torch.compiler.is_compiling():
        return
    ids, vocabulary = targets[counted], logits.shape[-1]
    if not len(ids):
        raise ValueError("every target is ignored: there is nothing to average")
    if ids.min() < 0 or ids.max() >= vocabulary:
        raise ValueError(f"targets must lie between 0 and {vocabulary - 1}")


def cross_entropy(logits: Tensor, targets: Tensor, ignore_index: int = -100) -> Tensor:
    """The mean surprise at the targets, in nats.

    logits: (..., V) scores; targets: (...) int64 ids below V, or ignore_index where
    a position doesn't count. Returns a scalar, float32 or float64.
    Raises ValueError for a wrong shape or dtype and, on the CPU outside of
    torch.compile, for ids out of range or when nothing counts. Elsewhere these make
    the result nan, since looking at the ids would make a GPU wait.

    Book: 05_softmax.html#cross-entropy-how-surprised-was-the-model
    """
    counted = targets != ignore_index
    _check_targets(logits, targets, counted)
    valid = (targets >= 0) & (targets < logits.shape[-1])
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    log_probabilities = log_softmax(logits)
    ids = targets.where(valid, 0).unsqueeze(-1)  # (..., 1)
    surprise = -log_probabilities.gather(-1, ids).squeeze(-1)  # (...)
    surprise = surprise.where(valid, math.nan).where(counted, 0)
    return surprise.sum() / counted.sum()
