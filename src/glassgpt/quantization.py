# Written by tools/tangle.py from book/24_speed.ipynb: change it there.


"""Speed: lighter weights, and memory that is not given back."""

import ctypes
import platform
from time import perf_counter

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from glassgpt.gpt import GPT
from glassgpt.plan import meta_model

FORMATS = ("float32", "bfloat16", "float16", "int8")
PACKED = torch.backends.quantized.engine in ("x86", "fbgemm")  # FBGEMM is here


def round_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Each row of x (N, C) as whole numbers from -127 to 127, and its scale (N, 1).

    Source: Dettmers et al. (2022).

    Book: 24_speed.html#rounding-rows
    """
    largest = torch.linalg.vector_norm(x, torch.inf, dim=1, keepdim=True)
    scale = largest / 127 + 1e-30  # a row of zeros divides by more than 0
    return (x / scale).round_().to(torch.int8), scale


def bias_of(linear: nn.Linear) -> Tensor:
    """A copy of a linear layer's bias (out,) in 32 bits, zeros where it has none.

    Book: 24_speed.html#a-light-layer
    """
    if linear.bias is None:
        return linear.weight.new_zeros(linear.out_features, dtype=torch.float32)
    return linear.bias.detach().float().clone()


class QuantizedLinear(nn.Module):
    """A linear layer in int8, for generation: (B, T, in) to (B, T, out).

    It rounds each vector that comes in to 8 bits, too. On anything but a CPU the
    weights go back to 32 bits at each call: that saves memory.
    Source of the scales: Dettmers et al. (2022).

    Book: 24_speed.html#a-light-layer
    """

    whole: Tensor  # (in, out) int8
    scale: Tensor  # (out,), one for each row of the weights
    bias: Tensor  # (out,)

    def __init__(self, linear: nn.Linear):
        super().__init__()
        numbers, scales = [], []
        # In pieces, so that no large copy is made on the way.
        for rows in linear.weight.detach().split(4096):
            whole, scale = round_rows(rows.float())
            numbers.append(whole)
            scales.append(scale[:, 0])
        self.register_buffer("whole", torch.cat(numbers).t())
        self.register_buffer("scale", torch.cat(scales))
        self.register_buffer("bias", bias_of(linear))

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_cpu:  # a GPU's product of whole numbers wants many rows
            y = x.float() @ self.whole.float() * self.scale + self.bias
            return y.to(x.dtype)
        x_whole, x_scale = round_rows(x.float().view(-1, x.shape[-1]))
        sums = torch._int_mm(x_whole, self.whole)  # (N, out) int32
        y = torch.addcmul(self.bias, sums, x_scale * self.scale)
        return y.view(*x.shape[:-1], -1).to(x.dtype)


class HalfLinear(nn.Module):
    """A linear layer with weights of 16 bits: (B, T, in) to (B, T, out).

    Book: 24_speed.html#a-light-layer
    """

    weight: Tensor  # (out, in) in 16 bits
    bias: Tensor  # (out,) in 32 bits

    def __init__(self, linear: nn.Linear, dtype: torch.dtype):
        super().__init__()
        self.register_buffer("weight", linear.weight.detach().to(dtype))
        self.register_buffer("bias", bias_of(linear))

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x.to(self.weight.dtype), self.weight) + self.bias
        return y.to(x.dtype)


class PackedLinear(nn.Module):
    """A linear layer with float16 weights packed by FBGEMM: (B, T, in) to (B, T, out).

    dtype: float16, or bfloat16, to which the weights are rounded first. The packed
    weights stay on the CPU.

    Book: 24_speed.html#a-light-layer
    """

    def __init__(self, linear: nn.Linear, dtype: torch.dtype):
        super().__init__()
        weight = linear.weight.detach()
        if dtype != torch.float16:  # to which packing rounds by itself
            weight = weight.to(dtype)
        self.pack(weight, bias_of(linear))

    def pack(self, weight: Tensor, bias: Tensor) -> None:
        """Keep the weights (out, in) and the bias (out,)."""
        pack = torch.ops.quantized.linear_prepack_fp16
        self.packed = pack(weight.float(), bias)

    def get_extra_state(self) -> tuple[Tensor, Tensor]:
        """What `state_dict` keeps: the weights in float16 and the bias."""
        weight, bias = torch.ops.quantized.linear_unpack_fp16(self.packed)
        return weight.half(), bias

    def set_extra_state(self, state: tuple[Tensor, Tensor]) -> None:
        """What `load_state_dict` does with it."""
        self.pack(*state)

    def forward(self, x: Tensor) -> Tensor:
        product = torch.ops.quantized.linear_dynamic_fp16
        return product(x.float(), self.packed).to(x.dtype)


def quantized_layer(linear: nn.Linear, weights: str) -> nn.Module:
    """A lighter layer in a linear layer's place: (B, T, in) to (B, T, out).

    weights: "int8", "bfloat16" or "float16". It is on the device of `linear`.

    Book: 24_speed.html#a-light-layer
    """
    if weights == "int8":
        return QuantizedLinear(linear)
    dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}[weights]
    if PACKED and linear.weight.is_cpu:
        return PackedLinear(linear, dtype)
    return HalfLinear(linear, dtype)


@torch.inference_mode()
def fastest_weights(linear: nn.Linear) -> str:
    """Which of FORMATS takes one vector through this layer fastest, as measured.

    On anything but a CPU "float16", unmeasured.

    Book: 24_speed.html#which-is-fastest-here
    """
    if not linear.weight.is_cpu:
        return "float16"
    layers: dict[str, nn.Module] = {"float32": linear}
    for name in ("float16", "int8") if PACKED else FORMATS[1:]:
        layers[name] = quantized_layer(linear, name)
    x = linear.weight[:1]  # any vector will do
    seconds = dict.fromkeys(layers, float("inf"))
    for _ in range(10):  # in turn, so that a slow moment hits all of them
        for name, layer in layers.items():
            start = perf_counter()
            layer(x)
            seconds[name] = min(seconds[name], perf_counter() - start)
    return min(seconds, key=seconds.__getitem__)


def quantize(model: GPT, weights: str | None = None) -> GPT:
    """A model for generation, with lighter weights in its linear layers.

    weights: one of FORMATS; without it, what `fastest_weights` finds.
    Tables and norms share memory with the model that it comes from, which is the one to
    train and to save; in float32 all weights do, so it can be saved, too. Raises
    ValueError for other weights, and for a model that is light already.

    Book: 24_speed.html#which-is-fastest-here
    """
    linear = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    if not linear:
        raise ValueError("this model is light already: quantize the one it comes from")
    if weights is None:
        weights = fastest_weights(max(linear, key=lambda layer: layer.weight.numel()))
    if weights not in FORMATS:
        raise ValueError(f"weights must be {', '.join(FORMATS)}, not {weights!r}")
    light = meta_model(model.config)  # has no memory of its own
    light.load_state_dict(model.state_dict(), assign=True)
    if model.config.tied:
        light.head.weight = light.tokens.weight
    for path, layer in list(light.named_modules()):  # which change on the way
        new: nn.Module
        if isinstance(layer, nn.Linear) and weights != "float32":
            new = quantized_layer(layer, weights)
        elif isinstance(layer, nn.Dropout):
            new = nn.Identity()  # nothing is dropped: no call
        else:
            continue
        parent, _, name = path.rpartition(".")
        setattr(light.get_submodule(parent), name, new)
    return light.eval()


def keep_freed_memory() -> bool:
    """Stop glibc from giving memory back after every step; True where that is possible.

    Call it before the first tensor. A training step frees its activations and asks for
    the same again: without this, the system clears every page of them each time. After
    the first step what is free goes back once, for the start has left much behind.

    Book: 24_speed.html#memory-that-isn-t-given-back
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX
    if not (libc.mallopt(mmap_max, 0) and libc.mallopt(trim_threshold, -1)):
        return False
    trimmed = False

    def trim_once(*_: object) -> None:
        nonlocal trimmed
        if not trimmed:
            libc.malloc_trim(0)
            trimmed = True

    register_optimizer_step_post_hook(trim_once)
    return True
