# Written by tools/tangle.py from book/08_mlp.ipynb: change it there.
"""The MLP: where each word, by itself, is thought over."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def gelu(x: Tensor) -> Tensor:
    """The Gaussian error linear unit in GPT-2's tanh form, on every number of x.

    Returns the shape and dtype of x. Source: Hendrycks and Gimpel (2016).

    Book: 08_mlp.html#gelu-a-rounder-bend
    """
    root = math.sqrt(2 / math.pi)
    return x * torch.sigmoid(2 * root * x * (1 + 0.044715 * x * x))


def squared_relu(x: Tensor) -> Tensor:
    """max(x, 0) squared, on every number of x.

    Returns the shape and dtype of x. Source: So et al. (2021).

    Book: 08_mlp.html#squared-relu
    """
    positive = F.relu(x)
    return positive * positive  # autocast on a GPU would take `square` to 32 bits


class MLP(nn.Module):
    """Two linear layers with an activation between: (B, T, C) in and out.

    The hidden width is four times C. activation: "gelu" or "squared_relu".
    Raises ValueError for another activation, and for vectors of another width.
    Source: Vaswani et al. (2017), section 3.3, with the activation of GPT-2.

    Book: 08_mlp.html#the-module
    """

    def __init__(self, width: int, activation: str = "gelu", bias: bool = True):
        super().__init__()
        if width < 1:
            raise ValueError(f"width must be positive, not {width}")
        if activation not in ("gelu", "squared_relu"):
            raise ValueError(
                f"activation {activation!r} is neither gelu nor squared_relu"
            )
        self.activation = activation
        self.expand = nn.Linear(width, 4 * width, bias=bias)
        self.projection = nn.Linear(4 * width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        width = self.expand.in_features
        if x.shape[-1] != width:
            raise ValueError(f"x must be (B, T, {width}), not {tuple(x.shape)}")
        hidden = self.expand(x)  # (B, T, 4 C)
        if self.activation == "gelu":
            compiling = torch.compiler.is_compiling()
            hidden = gelu(hidden) if compiling else F.gelu(hidden, approximate="tanh")
        else:
            hidden = squared_relu(hidden)
        return self.projection(hidden)
