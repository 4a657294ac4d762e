# Written by tools/tangle.py from book/24_speed.ipynb: change it there.
"""Checks of light layers, and of the exercises on speed, that name the mistake."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glassgpt.checks.expect import expect_same
from glassgpt.checks.generation import _small_gpt
from glassgpt.gpt import GPT


def _in_groups(
    x: Tensor, size: int, most: int, rounding: Callable[[Tensor], Tensor] = torch.round
) -> tuple[Tensor, Tensor]:
    """Whole numbers up to `most` for groups of a row, as floats, and their scales."""
    groups = x.reshape(-1, size)
    scale = groups.abs().amax(dim=1, keepdim=True) / most + 1e-30
    return rounding(groups / scale).view_as(x), scale


def _check_groups(
    round_groups: Callable[[Tensor], tuple[Tensor, Tensor]], size: int, most: int
) -> None:
    """The nearest whole numbers, and a scale above 0 for each group of `size`."""
    x = torch.tensor(
        [[0.3, -1.27, 0.0164, 0.884, 0.517, -0.1], [70.8, 30, 9, 1, -127, 6]]
    )
    x = torch.cat((x, x[:1] / 1000, torch.zeros(1, 6)))
    whole, scale = round_groups(x.clone())
    assert whole.dtype == torch.int8, f"the numbers are stored as {whole.dtype}"
    count = x.numel() // size
    assert scale.numel() == count, (
        f"{scale.numel()} scales for {count} groups of {size} numbers: one for each"
    )
    cut, of_all = (
        lambda x: _in_groups(x, size, most, torch.trunc)[0],
        lambda x: _in_groups(x, 6 if size < 6 else x.numel(), most)[0],
    )
    expect_same(
        lambda x: round_groups(x)[0].float(),
        lambda x: _in_groups(x, size, most)[0],
        x,
        mistakes={
            "the numbers are cut off: round to the nearest": cut,
            "several groups share one scale": of_all,
        },
        gradients=False,
        hint=f"The largest of each {size} numbers becomes {most}",
    )
    found, wanted = scale.flatten().double(), _in_groups(x, size, most)[1].flatten()
    assert ((found > 0) & found.isfinite()).all(), (
        "every scale must be above 0, that of a group of zeros too"
    )
    known = wanted > 1e-9
    assert torch.allclose(found[known], wanted[known].double(), rtol=0.002, atol=0), (
        f"a scale is the largest of its {size} numbers, over {most}"
    )


def check_round_rows(round_rows: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
    """Every number comes back within half its own row's scale; the largest is 127.

    Book: 24_speed.html#rounding-rows
    """
    _check_groups(round_rows, size=6, most=127)


def _check_layer(light: nn.Module, linear: nn.Linear, weights: str) -> None:
    """One layer with light weights against the one that it came from."""
    weight, eye = linear.weight, torch.eye(linear.in_features)
    if weights == "int8":
        whole, scale = _in_groups(weight, linear.in_features, 127)
        nearest = whole * scale
    else:
        nearest = weight.to(getattr(torch, weights)).float()
    layer = partial(F.linear, weight=nearest, bias=linear.bias)
    without = partial(F.linear, weight=nearest)
    expect_same(
        light,
        layer,
        eye,
        mistakes={"the bias is not added": without} if linear.bias is not None else {},
        gradients=False,
        hint=f"The weights are not the nearest numbers in {weights}",
    )
    if weights == "int8":
        sizes = 2.0 ** -(torch.arange(linear.in_features) % 5 + 7)[:, None]
        whole = (31 * torch.arange(linear.in_features**2).view_as(eye) % 255) - 127
        x = sizes * whole.masked_fill(eye > 0, 127)
        advice = "A vector that comes in is rounded with its own scale, up to 127"
        expect_same(light, layer, x, gradients=False, hint=advice)
    for tensor in (*light.parameters(), *light.buffers()):
        assert tensor.dim() < 2 or tensor.itemsize <= 2, (
            f"a matrix is still in {tensor.dtype}: rounded, but not lighter"
        )


@torch.no_grad()
def check_light(quantize: Callable[[GPT, str], Any]) -> None:
    """Lighter weights change a model's logits little, and the model not at all.

    quantize: called as quantize(model, weights); each linear layer of what it
    returns is called with vectors.

    Book: 24_speed.html#which-is-fastest-here
    """
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    model = _small_gpt().float().train()  # nothing is dropped: dropout is 0
    for layer in model.modules():
        if isinstance(layer, nn.Linear) and layer.bias is not None:
            layer.bias.copy_(torch.linspace(-1, 1, len(layer.bias)))
    before = model(ids)
    for weights, most in (("bfloat16", 0.1), ("float16", 0.01), ("int8", 0.3)):
        light = quantize(model, weights)
        assert torch.equal(model(ids), before), "the model itself was changed"
        assert model.training, "the model itself was changed: put into eval mode"
        learns = all(parameter.requires_grad for parameter in model.parameters())
        assert learns, "the model itself was changed: it is frozen"
        for name, layer in model.named_modules():
            if isinstance(layer, nn.Linear):
                _check_layer(light.get_submodule(name), layer, weights)
        assert not light.training, "what comes back is in training mode: call eval()"
        gap = (light(ids).log_softmax(-1) - before.log_softmax(-1)).abs().mean()
        assert gap < most, f"{weights} changes log-probabilities by {gap:.3f}"


def check_accept(accept: Callable[[list[int], list[int]], list[int]]) -> None:
    """A draft is kept up to its first wrong token, where the model's own follows.

    Book: 24_speed.html#exercise-1-what-is-kept-of-a-draft
    """
    for guess, own, wanted, why in (
        ([], [7], [7], "without a draft the model's own token is written"),
        ([5, 6], [6, 5, 4], [6], "in place of a wrong token stands the model's own"),
        ([4, 4], [4, 4, 8], [4, 4, 8], "the token after a right draft is known, too"),
        ([0, 6, 7], [3, 6, 7, 8], [3], "what follows a wrong token is dropped"),
        ([0, 5, 5], [0, 5, 9, 1], [0, 5, 9], "the draft's last token was wrong"),
    ):
        found = list(accept(guess.copy(), own.copy()))
        assert found == wanted, (
            f"of the draft {guess} beside {own}, {found} was kept, not {wanted}: {why}"
        )


def check_groups(groups: Callable[[Tensor, int], tuple[Tensor, Tensor]]) -> None:
    """Whole numbers from -7 to 7, with a scale for each group of a row.

    Book: 24_speed.html#exercise-2-scales-for-groups
    """
    for size in (2, 3):
        _check_groups(lambda x, size=size: groups(x, size), size, most=7)
