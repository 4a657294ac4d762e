# Written by tools/tangle.py from book/16_scaling_laws.ipynb: change it there.


"""Checks of a scaling law and of what follows from it; they name the mistake."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from glassgpt.laws import Law


def check_law(fit: Callable[..., Any]) -> None:
    """A law without noise is found again, at a hundred times the tokens, too.

    fit: called as fit(N, D, losses); what it returns is called as law(N, D).

    Book: 16_scaling_laws.html#the-law
    """
    N, D = (x.ravel() for x in np.meshgrid(np.geomspace(1e4, 1e6, 6), [1e5, 1e6, 1e7]))
    for E, a, b in ((1.5, 0.34, 0.28), (0.5, 0.8, 0.4), (1.5, 0.2, 0.15)):
        law = Law(E, 1e5**a, a, 1e6**b, b)
        found = fit(N, D, law(N, D))
        off = np.abs(found(N, D) - law(N, D)).max()
        assert off < 0.01, (
            f"exponents {a} and {b}: off by {off:.2f} on the runs it was fitted to;"
            " part of a loss stays, E"
        )
        told, true = found(1e8, 1e9), law(1e8, 1e9)
        assert abs(told - true) < 0.02, (
            f"exponents {a} and {b}: {told:.2f} where it was not fitted, not {true:.2f}"
        )
    noisy = law(N, D) + 0.02 * np.resize([1, 1, -1, 1, -1], len(N))
    errors = fit(N, D, noisy)(N, D) - noisy
    assert abs(errors.sum()) < 1e-3, "errors of least squares add up to 0: use all runs"


def check_tokens_needed(needed: Callable[[Law, float, float], float]) -> None:
    """The tokens with which a size comes to a loss; infinitely many if it never does.

    needed: called as needed(law, N, loss).

    Book: 16_scaling_laws.html#exercise-1-tokens-in-place-of-parameters
    """
    law = Law(1.7, 400.0, 0.34, 410.0, 0.28)
    for N, D in ((1e8, 1e9), (1e11, 1e12), (1e8, 1e24)):
        loss = law(N, D)
        found = needed(law, N, loss)
        any_size = (law.B / (loss - law.E)) ** (1 / law.beta)
        assert abs(found / any_size - 1) > 1e-6, "take off A / N^alpha, too"
        assert abs(found / D - 1) < 1e-6, f"{found:.4g} tokens, not {D:.4g}"
    law = Law(1.0, 4.0, 0.5, 1.0, 0.5)
    for loss in (1.9, 2.0):  # without rounding 1 + 4 / sqrt(16) is 2
        found = needed(law, 16.0, loss)
        assert found == math.inf, (
            f"16 parameters never come to {loss}: return math.inf, not {found}"
        )


def check_optimum(optimum: Callable[[Law, float], tuple[float, float]]) -> None:
    """The size and the tokens with the lowest loss at a budget C = 6 N D.

    optimum: called as optimum(law, C).

    Book: 16_scaling_laws.html#exercise-2-the-best-size-for-a-budget
    """
    law = Law(1.7, 400.0, 0.34, 410.0, 0.28)
    for C in (1e12, 1e21):
        N, D = optimum(law, C)
        assert abs(6 * N * D / C - 1) < 1e-6, (
            f"6 N D is {6 * N * D:.3g}, not the budget of {C:.0e}"
        )
        assert abs(D / N - 20) > 1e-6, "20 tokens a parameter is another law's best"
        slope = law.alpha * law.A * N**-law.alpha / (law.beta * law.B * D**-law.beta)
        side = "larger" if slope > 1 else "smaller"
        assert abs(slope - 1) < 1e-6, f"a {side} model has a lower loss"
