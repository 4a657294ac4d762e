# Written by tools/tangle.py from book/21_speed.ipynb: change it there.


"""Speed: lighter weights, and memory that is not given back."""

import copy
import ctypes
import math
import platform
from collections.abc import Sequence
from functools import cache, partial
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from glassgpt.gpt import GPT

FORMATS = ("float32", "bfloat16", "float16", "int8")


def round_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Each row of x (N, C) as whole numbers from -127 to 127, and its scale (N, 1).

    Source: Dettmers et al. (2022).

    Book: 21_speed.html#speed-how-fast-can-it-write
    """
    largest = torch.linalg.vector_norm(x, torch.inf, dim=1, keepdim=True)
    scale = largest / 127 + 1e-30  # a row of zeros divides by more than 0
    return (x / scale).round_().to(torch.int8), scale


def int8_product(rows: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Rows (N, in) times int8 weights (out, in) whose rows have these scales (out,).

    Book: 21_speed.html#speed-how-fast-can-it-write
    """
    if not rows.is_cpu:  # a GPU's product of whole numbers wants many rows
        return F.linear(rows, weight.to(rows.dtype)) * scale
    whole, own_scale = round_rows(rows)
    return torch._int_mm(whole, weight.t()) * (own_scale * scale)


def narrow_product(rows: Tensor, weight: Tensor) -> Tensor:
    """Rows (N, in) times a weight (out, in) of 16 bits.

    Book: 21_speed.html#speed-how-fast-can-it-write
    """
    if rows.is_cpu and weight.dtype == torch.float16 and len(rows) > 1:
        weight = weight.float()  # the CPU's kernel for float16 is made for one row
    return F.linear(rows.to(weight.dtype), weight)


def _refuse(*_: Any) -> None:
    raise ValueError("a lightened model can't be saved: save the one it comes from")


class LightLinear(nn.Module):
    """A linear layer with lighter weights, for generation: (..., in) to (..., out).

    weights: "bfloat16", "float16", or "int8", which also rounds each vector that comes
    in to 8 bits. Its `state_dict` raises ValueError: save the model it comes from.
    Source of the scales: Dettmers et al. (2022).

    Book: 21_speed.html#speed-how-fast-can-it-write
    """

    def __init__(self, linear: nn.Linear, weights: str):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight, scale = linear.weight.detach(), None
        if weights == "int8":  # in pieces, so that no large copy is made on the way
            pieces = [round_rows(part.float()) for part in weight.split(4096)]
            weight, scale = (torch.cat(parts) for parts in zip(*pieces, strict=True))
            scale = scale[:, 0]
        self.register_buffer("weight", weight.to(getattr(torch, weights)))
        self.register_buffer("scale", scale)
        bias = None if linear.bias is None else linear.bias.detach()
        self.register_buffer("bias", bias)
        self.register_state_dict_pre_hook(_refuse)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features)
        if self.scale is None:
            y = narrow_product(rows, self.weight)
        else:
            y = int8_product(rows.float(), self.weight, self.scale)
        y = y if self.bias is None else self.bias + y
        return y.to(x.dtype).view(*x.shape[:-1], self.out_features)


@torch.inference_mode()
def fastest_weights(layers: Sequence[nn.Linear]) -> str:
    """Which of FORMATS takes one vector through these layers fastest, as measured.

    On anything but a CPU "float16", unmeasured.

    Book: 21_speed.html#speed-how-fast-can-it-write
    """
    if not layers[0].weight.is_cpu:
        return "float16"
    inputs = [layer.weight[:1].clone() for layer in layers]  # any vector will do
    ways: dict[str, list[Any]] = {
        name: [LightLinear(layer, name) for layer in layers] for name in FORMATS[1:]
    }
    ways["float32"] = list(layers)
    seconds = dict.fromkeys(FORMATS, math.inf)
    for _ in range(7):  # in turn, so that a slow moment hits all of them
        for name, way in ways.items():
            start = perf_counter()
            for layer, x in zip(way, inputs, strict=True):
                layer(x)
            seconds[name] = min(seconds[name], perf_counter() - start)
    return min(FORMATS, key=seconds.__getitem__)


def lighten(model: GPT, weights: str | None = None) -> GPT:
    """A model for generation, with lighter weights in its linear layers.

    weights: one of FORMATS; without it, the fastest here for the model's first block.
    Tables, norms and biases it shares with the model that it comes from, which is the
    one to train and to save. Raises ValueError for other weights, and for a model that
    is light already.

    Book: 21_speed.html#speed-how-fast-can-it-write
    """
    linear = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    if not linear:
        raise ValueError("this model is light already: lighten the one it comes from")
    if weights is None:
        weights = fastest_weights(linear[:4])
    if weights not in FORMATS:
        raise ValueError(f"weights must be {', '.join(FORMATS)}, not {weights!r}")
    # deepcopy takes what `memo` has for an object instead of copying it.
    memo: dict[int, Any] = {id(part): part for part in model.parameters()}
    if weights != "float32":
        memo |= {id(layer): LightLinear(layer, weights) for layer in linear}
    return copy.deepcopy(model, memo).eval()


def keep_freed_memory() -> bool:
    """Stop glibc from giving memory back after every step; True where that is possible.

    Call it before the first tensor. A training step frees its activations and asks for
    the same again: without this, the system clears every page of them each time. After
    the first step what is free goes back once, for the start has left much behind.

    Book: 21_speed.html#memory-that-isn-t-given-back
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    trim_threshold, mmap_max = -1, -4  # names of the options in malloc.h
    if not (libc.mallopt(mmap_max, 0) and libc.mallopt(trim_threshold, -1)):
        return False
    # Once: what building and compiling the model left behind is not needed again.
    trim = cache(partial(libc.malloc_trim, 0))
    register_optimizer_step_post_hook(lambda *_: trim())
    return True
