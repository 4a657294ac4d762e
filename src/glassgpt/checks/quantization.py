# Written by tools/tangle.py from book/24_speed.ipynb: change it there.
"""Checks of light layers, and of the exercises on speed, that name the mistake."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from glassgpt.checks.generation import _small_gpt
from glassgpt.gpt import GPT


def check_round_rows(round_rows: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
    """Every number comes back within half its own row's scale; the largest is 127.

    Book: 24_speed.html#rounding-rows
    """
    x = torch.tensor([[0.3, -1.27, 0.0164, 0.88], [30.0, 127.0, 1.6, -88.4], [0.0] * 4])
    x = torch.cat([x[:2], x[:1] / 1000, x[2:]])
    given = x.clone()
    whole, scale = round_rows(given)
    assert torch.equal(given, x), "the numbers given were changed: return new ones"
    assert whole.dtype == torch.int8, f"the numbers are stored as {whole.dtype}"
    assert scale.numel() == 4, f"{scale.numel()} scales for 4 rows: one for each"
    scale = scale.reshape(4, 1).float()
    fine = (scale > 0) & scale.isfinite()
    assert fine.all(), "every scale must be above 0, that of a row of zeros too"
    back = whole.float() * scale
    assert ((back - x).abs() <= 0.501 * scale).all(), (
        "a number is off by more than half its scale: round to the nearest"
    )
    most = whole[:3].abs().amax(1).tolist()
    assert most == [127] * 3, (
        f"the largest of each row becomes {most}, not 127: has each row its own scale?"
    )
    due = x[:3].abs().amax(1, keepdim=True) / 127
    assert torch.allclose(scale[:3], due, rtol=2e-3, atol=0), (
        f"scales {scale[:3, 0].tolist()}, not the largest of each row over 127"
    )


@torch.no_grad()
def _check_layer(light: Any, linear: torch.nn.Linear, weights: str) -> None:
    """One layer with light weights against the one that it came from."""
    eye, weight = torch.eye(linear.in_features), linear.weight
    bias = torch.zeros(len(weight)) if linear.bias is None else linear.bias
    found = light(torch.zeros_like(eye))
    assert torch.allclose(found, bias, rtol=0.01, atol=0.01), "the bias is not added"
    used = (light(eye) - bias).T  # (out, in): the weights that it uses
    largest = weight.abs().amax(dim=1, keepdim=True)
    if weights != "int8":
        gap = (used - weight.to(getattr(torch, weights)).float()).abs() / largest
        assert gap.max() < 1e-4, f"the weights are not the nearest numbers in {weights}"
    else:
        off, scale = (used - weight).abs(), largest / 127
        assert off.max() > 0.01 * scale.max(), "nothing was rounded to int8"
        assert (off <= 0.51 * scale).all(), (
            "a weight is off by more than half its row's scale: has each row its own, "
            "does it reach 127, is it rounded to the nearest?"
        )
        # Of each vector one number is 127 steps of its scale, and the next one 0.9.
        next_one = used.T.roll(1, 0)
        sizes = 2.0 ** (torch.arange(len(eye)) % 8)[:, None]
        found = light(sizes * (127 * eye + 0.9 * eye.roll(1, 0))) - bias
        off = (found / sizes - 127 * used.T - 0.9 * next_one).abs()
        assert (off <= 0.5 * next_one.abs() + 1e-3 * largest.T).all(), (
            "a vector that comes in is rounded too roughly: has each its own scale, "
            "does it reach 127, is it rounded to the nearest?"
        )


def _check_size(light: Any, linear: torch.nn.Linear) -> None:
    """No tensor as large as the matrix, in 32 bits: not in what functions keep, too."""
    held = [*light.parameters(), *light.buffers(), *vars(light).values()]
    for part in vars(light).values():
        cells = getattr(part, "__closure__", None) or ()
        held += [cell.cell_contents for cell in cells]
        held += getattr(part, "__defaults__", None) or ()
    for part in held:
        if isinstance(part, Tensor) and part.numel() >= linear.weight.numel():
            assert part.itemsize <= 2, (
                f"a matrix is still in {part.dtype}: rounded, but not lighter"
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
    model.blocks[0].mlp.expand.weight[0] *= 1000
    linear = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, torch.nn.Linear)
    }
    for layer in linear.values():
        if layer.bias is not None:
            layer.bias.copy_(torch.linspace(-1, 1, len(layer.bias)))
    before = model(ids)
    for weights in ("bfloat16", "float16", "int8"):
        light = quantize(model, weights)
        assert torch.equal(model(ids), before), "the model itself was changed"
        same = all(part.training for part in model.modules())
        same = same and all(part.requires_grad for part in model.parameters())
        assert same, "the model itself was changed: put into eval mode, or frozen"
        for name, layer in linear.items():
            _check_layer(light.get_submodule(name), layer, weights)
        for name, layer in linear.items():
            _check_size(light.get_submodule(name), layer)
        ready = not any(part.training for part in light.modules())
        assert ready, "what comes back is in training mode: call eval()"
    model = _small_gpt().float()
    before = model(ids)
    for weights, most in (("bfloat16", 0.1), ("float16", 0.01), ("int8", 0.3)):
        changes = quantize(model, weights)(ids).log_softmax(-1)
        gap = (changes - before.log_softmax(-1)).abs().mean().item()
        assert gap < most, f"{weights} changes log-probabilities by {gap:.3f}"
    try:
        quantize(model, "int3")
    except ValueError:
        return
    raise AssertionError("unknown weights were accepted: raise a ValueError")


def check_accept(accept: Callable[[list[int], list[int]], list[int]]) -> None:
    """A draft is kept up to its first wrong token, where the model's own follows.

    Book: 24_speed.html#exercise-1-what-is-kept-of-a-draft
    """
    for guess, own, wanted, why in (
        ([], [7], [7], "without a draft the model's own token is written"),
        ([5, 6], [6, 5, 4], [6], "in place of a wrong token stands the model's own"),
        ([5, 6], [5, 6, 8], [5, 6, 8], "the token after a right draft is known, too"),
        ([4], [4, 4], [4, 4], "the token after a right draft is known, too"),
        ([5, 6, 7], [5, 9, 7, 8], [5, 9], "what follows a wrong token is dropped"),
        ([0], [3, 0], [3], "what follows a wrong token is dropped"),
        ([0, 5, 5], [0, 5, 9, 1], [0, 5, 9], "the draft's last token was wrong"),
    ):
        lists = [*guess], [*own]
        found = [*accept(*lists)]
        assert lists == (guess, own), "a list that was given was changed"
        case = f"of the draft {guess} beside {own}, {found} was kept, not {wanted}"
        assert found == wanted, f"{case}: {why}"


def check_groups(groups: Callable[[Tensor, int], tuple[Tensor, Tensor]]) -> None:
    """Whole numbers from -7 to 7, with a scale for each group of a row.

    Book: 24_speed.html#exercise-2-scales-for-groups
    """
    x = torch.tensor([[0.7, -0.2, 70.0, 10.0, 6.0, 1.0], [0.0] * 3 + [-3.5, 1.4, 0.6]])
    x = torch.cat([x, x[:1] / 1000])
    for size in (2, 3):
        given = x.clone()
        whole, scale = groups(given, size)
        assert torch.equal(given, x), "the numbers given were changed: return new ones"
        fine = (scale > 0) & scale.isfinite()
        assert fine.all(), "every scale must be above 0, that of a group of zeros too"
        assert whole.shape == x.shape, f"the numbers have shape {tuple(whole.shape)}"
        found, due = tuple(scale.shape), (3, 6 // size)
        assert found == due, f"groups of {size}: scales of shape {found}, not {due}"
        assert whole.dtype == torch.int8, f"the numbers are stored as {whole.dtype}"
        assert whole.abs().max() <= 7, "four bits go to 7"
        largest = x.view(3, -1, size).abs().amax(2) + 1e-9
        wanted = (x / largest.repeat_interleave(size, 1) * 7).round().to(torch.int8)
        of_row = (x / x.abs().amax(1, True) * 7).round().to(torch.int8)
        assert not torch.equal(whole, of_row), "a row has one scale"
        assert torch.equal(whole, wanted), (
            f"groups of {size}: {whole.tolist()} were stored, not {wanted.tolist()}"
        )
        due = largest[largest > 1e-6] / 7
        off = (scale[largest > 1e-6] - due).abs() > 0.005 * due
        assert not off.any(), "a scale is the largest number of its group, over 7"
