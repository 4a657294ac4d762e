# Written by tools/tangle.py from book/21_speed.ipynb: change it there.


"""Speed: lighter weights, and memory that is not given back."""

import copy
import ctypes
import math
import platform
from collections.abc import Callable, Sequence
from functools import cache, partial
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from glassgpt.gpt import GPT

FORMATS = ("float32", "bfloat16", "float16", "int8")
PACKED = torch.backends.quantized.engine in ("x86", "fbgemm")  # FBGEMM is here


def round_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Each row of x (N, C) as whole numbers from -127 to 127, and its scale (N, 1).

    Source: Dettmers et al. (2022).

    Book: 21_speed.html#rounding-rows
    """
    largest = torch.linalg.vector_norm(x, torch.inf, dim=1, keepdim=True)
    scale = largest / 127 + 1e-30  # a row of zeros divides by more than 0
    return (x / scale).round_().to(torch.int8), scale


Product = Callable[[Tensor], Tensor]  # (..., in) to (..., out)


def int8_product(weight: Tensor, bias: Tensor) -> Product:
    """x times the weights (out, in) in int8, plus the bias (out,).

    On anything but a CPU the weights go back to 32 bits at each call: it saves memory.

    Book: 21_speed.html#a-light-layer
    """
    # In pieces, so that no large copy is made on the way.
    pieces = [round_rows(part.float()) for part in weight.split(4096)]
    whole, scale = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    whole, scale = whole.t(), scale[:, 0]

    def product(x: Tensor) -> Tensor:
        if not x.is_cpu:  # a GPU's product of whole numbers wants many rows
            return x @ whole.float() * scale + bias
        x_whole, x_scale = round_rows(x.view(-1, x.shape[-1]))
        sums = torch._int_mm(x_whole, whole)  # (N, out) int32
        y = torch.addcmul(bias, sums, x_scale * scale)
        return y.view(*x.shape[:-1], -1)

    return product


def half_product(weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Product:
    """x times the weights (out, in) in 16 bits, plus the bias (out,) in 32.

    Book: 21_speed.html#a-light-layer
    """
    if PACKED and weight.is_cpu:
        if dtype != torch.float16:  # to which packing rounds by itself
            weight = weight.to(dtype).float()
        packed = torch.ops.quantized.linear_prepack_fp16(weight.float(), bias)
        return lambda x: torch.ops.quantized.linear_dynamic_fp16(x, packed)
    weight = weight.to(dtype)
    return lambda x: F.linear(x.to(dtype), weight) + bias


class LightLinear(nn.Module):
    """A linear layer with lighter weights, for generation: (B, T, in) to (B, T, out).

    weights: "int8", which also rounds each vector that comes in to 8 bits, "bfloat16"
    or "float16". It stays on the device of `linear`, and its `state_dict` raises
    ValueError: save the model it comes from.
    Source of the scales: Dettmers et al. (2022).

    Book: 21_speed.html#a-light-layer
    """

    def __init__(self, linear: nn.Linear, weights: str):
        super().__init__()
        weight = linear.weight.detach()
        bias = weight.new_zeros(len(weight)) if linear.bias is None else linear.bias
        bias = bias.detach().float()
        if weights == "int8":
            self.product = int8_product(weight, bias)
        else:
            self.product = half_product(weight, bias, getattr(torch, weights))

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x.float()).to(x.dtype)

    def state_dict(self, *_: Any, **__: Any) -> Any:
        raise ValueError("a lightened model can't be saved: save the one it comes from")


@torch.inference_mode()
def fastest_weights(layers: Sequence[nn.Linear]) -> str:
    """Which of FORMATS takes one vector through these layers fastest, as measured.

    Of the first eight, two blocks', four warm the routines up and four are timed.
    Between rounds others are read, so that the cache holds what it does in decoding.
    On anything but a CPU "float16", unmeasured.

    Book: 21_speed.html#which-is-fastest-here
    """
    if not layers[0].weight.is_cpu:
        return "float16"
    first, others = layers[:8], layers[8:24]
    inputs = [layer.weight[:1] for layer in first]  # any vector will do
    middle = len(first) // 2
    ways: dict[str, Sequence[nn.Module]] = {"float32": first}
    for name in ("float16", "int8") if PACKED else FORMATS[1:]:
        ways[name] = [LightLinear(layer, name) for layer in first]
    seconds = dict.fromkeys(ways, math.inf)
    for _ in range(20):  # in turn, so that a slow moment hits all of them
        for layer in others:
            layer.weight.sum()
        for name, way in ways.items():
            for part in (slice(middle), slice(middle, None)):  # the second counts
                start = perf_counter()
                for layer, x in zip(way[part], inputs[part], strict=True):
                    layer(x)
            seconds[name] = min(seconds[name], perf_counter() - start)
    return min(seconds, key=seconds.__getitem__)


def lighten(model: GPT, weights: str | None = None) -> GPT:
    """A model for generation, with lighter weights in its linear layers.

    weights: one of FORMATS; without it, what `fastest_weights` finds.
    Tables, norms and biases it shares with the model that it comes from, which is the
    one to train and to save; in float32 all weights, so it can be saved, too. Raises
    ValueError for other weights, and for a model that is light already.

    Book: 21_speed.html#which-is-fastest-here
    """
    linear = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    if not linear:
        raise ValueError("this model is light already: lighten the one it comes from")
    if weights is None:
        weights = fastest_weights(linear)
    if weights not in FORMATS:
        raise ValueError(f"weights must be {', '.join(FORMATS)}, not {weights!r}")
    memo: dict[int, Any] = {id(part): part for part in model.parameters()}
    if weights != "float32":
        memo |= {id(layer): LightLinear(layer, weights) for layer in linear}
    drops = [part for part in model.modules() if isinstance(part, nn.Dropout)]
    memo |= {id(part): nn.Identity() for part in drops}  # nothing is dropped: no call
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
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX
    if not (libc.mallopt(mmap_max, 0) and libc.mallopt(trim_threshold, -1)):
        return False
    trim = cache(partial(libc.malloc_trim, 0))
    register_optimizer_step_post_hook(lambda *_: trim())
    return True
