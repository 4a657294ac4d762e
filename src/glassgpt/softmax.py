# Written by tools/tangle.py from book/05_softmax.ipynb: change it there.
"""Softmax: scores become probabilities, and surprise at the target becomes a loss."""

from torch import Tensor


def softmax(x: Tensor, dim: int = -1, temperature: float = 1.0) -> Tensor:
    """Turn scores into probabilities: along `dim` they are >= 0 and sum to 1.

    x: scores of any shape, finite or -inf; the result has the same shape and dtype.
    A score of -inf gets probability 0. A slice, one row along `dim`, gets nan when
    all of it is -inf, or when it holds nan or +inf.
    temperature: a positive number that divides the scores. Near 0 the largest score
    takes all; the larger the temperature, the more equal the probabilities.
    Source: Bridle (1990).

    Book: 05_softmax.html#the-function
    """
    below = x - x.detach().amax(dim, keepdim=True)  # 0 at the largest score
    powers = (below / temperature).exp()
    return powers / powers.sum(dim, keepdim=True)


def log_softmax(x: Tensor, dim: int = -1) -> Tensor:
    """The natural logarithm of softmax(x, dim), exact where softmax rounds to 0.

    x: scores of any shape, finite or -inf; the result has the same shape and dtype.
    A score of -inf gets -inf. A slice that is all -inf, or holds nan or +inf, gets nan.
    Source: Blanchard et al. (2021).

    Book: 05_softmax.html#logarithms-of-probabilities
    """
    below = x - x.detach().amax(dim, keepdim=True)  # 0 at the largest score
    return below - below.exp().sum(dim, keepdim=True).log()


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
