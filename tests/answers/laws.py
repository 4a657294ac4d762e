"""Answers to the checks of chapter 16."""

import math

import numpy as np

from glassgpt.checks.laws import check_law, check_optimum, check_tokens_needed
from glassgpt.laws import fit_law


def every_second_run(N, D, losses):
    return fit_law(N[::2], D[::2], losses[::2])


def keeps_one_floor(N, D, losses):
    """A fit that knows only laws of which 1.5 stays."""
    found = fit_law(N, D, losses)
    return found if abs(found.E - 1.5) < 0.1 else lambda N, D: 1.5 + 0 * N


def best_where_it_was_fitted(N, D, losses):
    """More tokens than it has seen change nothing."""
    found = fit_law(N, D, losses)
    return lambda N, D: found(N, np.minimum(D, 1e7))


def tokens_needed(law, N, loss):
    left = loss - law.E - law.A / N**law.alpha
    return (law.B / left) ** (1 / law.beta) if left > 0 else math.inf


def forgets_the_size(law, N, loss):
    return (law.B / (loss - law.E)) ** (1 / law.beta)


def never_gives_up(law, N, loss):
    left = loss - law.E - law.A / N**law.alpha
    return (law.B / left) ** (1 / law.beta)


def optimum(law, C):
    a, b = law.alpha, law.beta
    G = (a * law.A / (b * law.B)) ** (1 / (a + b))
    N = G * (C / 6) ** (b / (a + b))
    return N, C / 6 / N


def two_percent_off(law, C):
    N, D = optimum(law, C)
    return 1.02 * N, D / 1.02


def twenty_tokens(law, C):
    return (C / 120) ** 0.5, 20 * (C / 120) ** 0.5


RIGHT = {
    check_law: [fit_law],
    check_tokens_needed: [tokens_needed],
    check_optimum: [optimum],
}
WRONG = {
    check_law: [
        (every_second_run, "use all runs"),
        (keeps_one_floor, "exponents 0.8 and 0.4: off by"),
        (best_where_it_was_fitted, "where it was not fitted"),
    ],
    check_tokens_needed: [
        (forgets_the_size, "take off A / N^alpha"),
        (never_gives_up, "never come to 1.9"),
    ],
    check_optimum: [
        (two_percent_off, "a smaller model"),
        (twenty_tokens, "20 tokens a parameter is another law's best"),
        (lambda law, C: optimum(law, 2 * C), "not the budget of 1e+12"),
    ],
}
