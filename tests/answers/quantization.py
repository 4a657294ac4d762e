"""Answers to the checks of chapter 24."""

import copy

import torch
from torch import nn

from glassgpt.checks import quantization as checks
from glassgpt.quantization import QuantizedLinear, quantize, round_rows


def by_scale(x, rounding=torch.round, least=1e-30):
    scale = (x.abs().amax(1, keepdim=True) / 127).clamp(min=least)
    return rounding(x / scale).to(torch.int8), scale


def in_groups(x, size, added=1e-30):
    groups = x.reshape(-1, size)
    scale = groups.abs().amax(1, keepdim=True) / 7 + added
    return (groups / scale).round().char().view(x.shape), scale.view(len(x), -1)


class WeightsAlone(nn.Module):
    """int8 weights; what comes in is not rounded."""

    def __init__(self, linear, largest=127, rounding=torch.round):
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / largest
        self.register_buffer("whole", rounding(linear.weight / scale).char())
        self.register_buffer("scale", scale[:, 0])
        self.bias = linear.bias

    def forward(self, x):
        y = x @ self.whole.float().T * self.scale
        return y if self.bias is None else y + self.bias


class OneScaleForVectors(QuantizedLinear):
    def forward(self, x):
        step = x.abs().max() / 127
        return (x / step).round() @ self.whole.float() * (step * self.scale) + self.bias


class WithoutBias(QuantizedLinear):
    def forward(self, x):
        return super().forward(x) - self.bias


def rounded_in_32_bits(linear):
    whole, scale = round_rows(linear.weight.detach())
    rounded = copy.deepcopy(linear)
    rounded.weight.data = whole * scale
    return rounded


def with_layer(make):
    """`quantize`, with other layers in int8."""

    def lightened(model, weights):
        light = quantize(model, weights)
        for name, layer in model.named_modules():
            if isinstance(layer, nn.Linear) and weights == "int8":
                light.set_submodule(name, make(layer).eval())
        return light

    return lightened


def in_place(model, weights):
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            layer.weight.data = layer.weight.bfloat16().float()
    return quantize(model, weights)


def right_anywhere(guess, own):
    return own[: 1 + sum(a == b for a, b in zip(guess, own, strict=False))]


def first_places(guess, own):
    right = 0
    while right < len(guess) and guess[right] == own[right]:
        right += 1
    return own[: right + 1]


RIGHT = {
    checks.check_round_rows: [
        round_rows,
        by_scale,
        lambda x: (round_rows(x)[0], round_rows(x)[1].double()),
        lambda x: (round_rows(x)[0], round_rows(x)[1][:, 0]),
    ],
    checks.check_light: [
        quantize,
        with_layer(QuantizedLinear),
        with_layer(WeightsAlone),
    ],
    checks.check_accept: [first_places],
    checks.check_groups: [in_groups],
}

WRONG = {
    checks.check_round_rows: [
        (lambda x: round_rows(x.view(1, -1)), "1 scales for 4 groups"),
        (lambda x: (round_rows(x)[0].float(), round_rows(x)[1]), "stored as"),
        (lambda x: (round_rows(x)[0] // 2, 2 * round_rows(x)[1]), "becomes 127"),
        (lambda x: by_scale(x, torch.trunc), "round to the nearest"),
        (lambda x: by_scale(x, torch.floor), "is wanted"),
        (lambda x: by_scale(x, least=1 / 127), "becomes 127"),
        (lambda x: by_scale(x, least=0.0), "above 0"),
        (lambda x: (round_rows(x)[0], 2 * round_rows(x)[1]), "over 127"),
        (lambda x: round_rows(x.mul_(2)), "changed in place"),
    ],
    checks.check_light: [
        (lambda model, weights: quantize(model, "bfloat16"), "nearest numbers in"),
        (lambda model, weights: quantize(model.eval(), weights), "eval mode"),
        (
            lambda model, weights: quantize(model.requires_grad_(False), weights),
            "frozen",
        ),
        (lambda model, weights: quantize(model, weights).train(), "call eval()"),
        (in_place, "the model itself was changed"),
        (with_layer(lambda layer: WeightsAlone(layer, 15)), "numbers in int8"),
        (
            with_layer(lambda layer: WeightsAlone(layer, 127, torch.trunc)),
            "numbers in int8",
        ),
        (with_layer(copy.deepcopy), "numbers in int8"),
        (with_layer(rounded_in_32_bits), "still in torch.float32"),
        (with_layer(OneScaleForVectors), "with its own scale"),
        (with_layer(WithoutBias), "the bias is not added"),
    ],
    checks.check_accept: [
        (lambda guess, own: own, "in place of a wrong token"),
        (lambda guess, own: own[: len(guess)], "without a draft"),
        (lambda guess, own: first_places(guess, own)[:-1], "without a draft"),
        (lambda guess, own: own[: max(1, len(guess) - 1)], "after a right draft"),
        (right_anywhere, "what follows a wrong token is dropped"),
    ],
    checks.check_groups: [
        (lambda x, size: in_groups(x, x.shape[1] // size), "groups of 2"),
        (
            lambda x, size: (in_groups(x, x.shape[1])[0], in_groups(x, size)[1]),
            "share one scale",
        ),
        (
            lambda x, size: (in_groups(x, size)[0], 2 * in_groups(x, size)[1]),
            "over 7",
        ),
    ],
}
