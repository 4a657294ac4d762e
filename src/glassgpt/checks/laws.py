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
    laws = [(1.5, 1.0, 0.34, 0.28), (0.5, 0.5, 0.8, 0.4), (2.5, 2.0, 0.3, 0.9)]
    laws += [(1.5, 1.0, 0.2, 0.15), (0.5, 1.0, 1.3, 0.5), (-0.01, 1.0, 0.3, 0.25)]
    laws += [(1.5, 1.0, 2.0, 0.5), (1.5, 1.0, 0.34, 1.7), (1.0, 1.0, 0.0, 1.0)]
    for E, times, a, b in laws:
        law = Law(E, times * 1e5**a, a, 1e6**b / times, b)
        sizes = N if a else np.full_like(N, 1e5)
        try:
            found = fit(sizes, D, law(sizes, D))
        except ValueError:
            assert not a or max(a, b) > 1.5, f"exponents of {a} and {b} are refused"
            continue
        assert a, "all sizes are equal: refuse, since no law of the size can be told"
        assert found(1e30, 1e30) >= 0, "E is negative: large models get a loss below 0"
        off = np.abs(found(N, D) - law(N, D)).max()
        assert off < 0.01, (
            f"exponents {a} and {b}: off by {off:.2f} on the runs it was fitted to;"
            " part of a loss stays, E"
        )
        told, true = found(1e8, 1e9), law(1e8, 1e9)
        assert abs(told - true) < 0.02, (
            f"exponents {a} and {b}: {told:.2f} where it was not fitted, not {true:.2f}"
        )
    law = Law(1.5, 1e5**0.34, 0.34, 1e6**0.28, 0.28)
    noisy = law(N, D) + 0.02 * np.resize([1, 1, -1, 1, -1], len(N))
    misses = [each(N, D) - noisy for each in (fit(N, D, noisy), law)]
    found, true = (np.square(miss).sum() for miss in misses)
    assert found <= true, (
        "with noise, the law that the runs came from fits them better: use all of them"
    )
    assert abs(misses[0].sum()) < 1e-3, "errors of least squares add up to 0: use all"


def check_tokens_needed(needed: Callable[[Law, float, float], float]) -> None:
    """The tokens with which a size comes to a loss; infinitely many if it never does.

    needed: called as needed(law, N, loss).

    Book: 16_scaling_laws.html#exercise-1-tokens-in-place-of-parameters
    """
    law = Law(1.7, 400.0, 0.34, 410.0, 0.28)
    for N, D in ((1e8, 1e9), (1e9, 1e12), (1e11, 1e12), (1e8, 1e16), (1e8, 1e24)):
        loss = law(N, D)
        found = needed(law, N, loss)
        any_size = (law.B / (loss - law.E)) ** (1 / law.beta)
        assert abs(found / any_size - 1) > 1e-6, "take off A / N^alpha, too"
        assert abs(found / D - 1) < 1e-6, f"{found:.4g} tokens, not {D:.4g}"
    law = Law(1.0, 4.0, 0.5, 1.0, 0.5)
    for loss in (1.9, 2.0):  # without rounding 1 + 4 / sqrt(16) is 2
        try:
            found = needed(law, 16.0, loss)
        except ZeroDivisionError:
            found = "a division by zero"
        assert found == math.inf, (
            f"16 parameters never come to {loss}: return math.inf, not {found}"
        )


def check_optimum(optimum: Callable[[Law, float], tuple[float, float]]) -> None:
    """The size and the tokens with the lowest loss at a budget C = 6 N D.

    optimum: called as optimum(law, C).

    Book: 16_scaling_laws.html#exercise-2-the-best-size-for-a-budget
    """
    for law in (Law(1.7, 400.0, 0.34, 410.0, 0.28), Law(1.0, 50.0, 0.5, 20.0, 0.5)):
        for C in (1e12, 1e21):
            N, D = optimum(law, C)
            assert abs(6 * N * D / C - 1) < 1e-6, (
                f"6 N D is {6 * N * D:.3g}, not the budget of {C:.0e}"
            )
            assert abs(D / N - 20) > 1e-6, "20 tokens a parameter is another law's best"
            a, b, ratio = law.alpha, law.beta, law.A / law.B
            swapped = (b / a * ratio) ** (1 / (a + b)) * (C / 6) ** (a / (a + b))
            assert a == b or abs(N / swapped - 1) > 1e-6, "alpha and beta are swapped"
            slope = a * law.A * N**-a / (b * law.B * D**-b)
            side = "larger" if slope > 1 else "smaller"
            assert abs(slope - 1) < 1e-6, f"a {side} model has a lower loss"
