# Written by tools/tangle.py from book/08_mlp.ipynb: change it there.
"""The MLP: two layers, applied to each position alone."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def gelu(x: Tensor) -> Tensor:
    """The Gaussian error linear unit in GPT-2's tanh form, on every number of x.

    Returns the shape and dtype of x. Source: Hendrycks and Gimpel (2016).

    Book: 08_mlp.html#gelu-relu-without-the-corner
    """
    root = math.sqrt(2 / math.pi)
    return 0.5 * x * (1 + torch.tanh(root * (x + 0.044715 * x**3)))


def pytorch_gelu(x: Tensor) -> Tensor:
    """`gelu` by PyTorch's own kernel: one pass over x (...), the same numbers.

    Book: 08_mlp.html#the-equation
    """
    return F.gelu(x, approximate="tanh")


class MLP(nn.Module):
    """Two linear layers with a GELU between them: (B, T, C) in and out.

    The hidden width is four times C.
    Source: Vaswani et al. (2017), section 3.3, with the activation of GPT-2.

    Book: 08_mlp.html#the-equation
    """

    def __init__(self, width: int):
        super().__init__()
        self.expand = nn.Linear(width, 4 * width)
        self.activation = pytorch_gelu
        self.projection = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.activation(self.expand(x))  # (B, T, 4 C)
        return self.projection(hidden)
