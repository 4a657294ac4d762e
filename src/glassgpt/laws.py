# Written by tools/tangle.py from book/16_scaling_laws.ipynb: change it there.


"""A scaling law: the loss by size and tokens, fitted to small runs."""

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Law:
    """A loss by size and tokens: E + A / N^alpha + B / D^beta.

    Source: Hoffmann et al. (2022), approach 3 (the formula, not their fit).

    Book: 16_scaling_laws.html#the-law
    """

    E: float
    A: float
    alpha: float
    B: float
    beta: float

    def __call__(self, N: Any, D: Any) -> Any:
        return self.E + self.A * N**-self.alpha + self.B * D**-self.beta

    @property
    def growth(self) -> float:
        """The exponent a in N = G C^a, the best size for a budget C = 6 N D."""
        return self.beta / (self.alpha + self.beta)


def fit_law(N: np.ndarray, D: np.ndarray, losses: np.ndarray) -> Law:
    """The law nearest to measured losses, by least squares. N, D, losses: (R,).

    Raises ValueError where the best exponents are not between 0.02 and 1.5, and
    NumPy's LinAlgError, a kind of it, where all sizes or all D are equal.

    Book: 16_scaling_laws.html#the-law
    """
    low, width = np.array([0.02, 0.02]), np.array([1.5, 1.5])
    n, d = (np.exp(np.log(x).mean()).item() for x in (N, D))  # the middle
    for _ in range(14):
        axes = (np.linspace(a, a + w, 13) for a, w in zip(low, width, strict=True))
        alpha, beta = (grid.ravel() for grid in np.meshgrid(*axes))  # (G,)
        parts = ((N / n) ** -alpha[:, None], (D / d) ** -beta[:, None])
        x = np.stack([np.ones_like(parts[0]), *parts], axis=-1)  # (G, R, 3)
        solved = np.linalg.solve(x.mT @ x, x.mT @ losses[:, None])  # (G, 3, 1)
        errors = (((x @ solved)[..., 0] - losses) ** 2).sum(axis=1)  # (G,)
        negative = (solved < 0).any(axis=(1, 2))
        errors[negative] = np.inf
        best = int(errors.argmin())
        a, b = alpha[best].item(), beta[best].item()
        width = width / 2
        low = np.maximum(np.array([a, b]) - width / 2, 0.01)
    E, A, B = solved[best, :, 0].tolist()
    if min(E, A, B) < 0 or min(a, b) < 0.02 or max(a, b) > 1.5:
        raise ValueError("no law with exponents from 0.02 to 1.5 fits these runs best")
    return Law(E, A * n**a, a, B * d**b, b)
