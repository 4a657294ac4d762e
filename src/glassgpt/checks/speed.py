# Written by tools/tangle.py from book/21_speed.ipynb: change it there.
"""Checks of light layers, and of the exercises on speed, that name the mistake."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from glassgpt.checks.generation import _small_gpt
from glassgpt.gpt import GPT


def check_round_rows(round_rows: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
    """Every number comes back within half its own row's scale; the largest is 127.

    Book: 21_speed.html#rounding-rows
    """
    x = torch.tensor([[0.3, -1.27, 0.014, 0.88], [30.0, 127.0, 1.4, -88.6], [0.0] * 4])
    given = x.clone()
    whole, scale = round_rows(given)
    assert torch.equal(given, x), "the numbers given were changed: return new ones"
    assert whole.dtype == torch.int8, f"the numbers are stored as {whole.dtype}"
    assert scale.numel() == 3, f"{scale.numel()} scales for 3 rows: one for each"
    scale = scale.reshape(3, 1)
    fine = (scale > 0) & scale.isfinite()
    assert fine.all(), "every scale must be above 0, that of a row of zeros too"
    back = whole.float() * scale
    assert whole[:2].abs().amax(1).tolist() == [127, 127], (
        f"the largest of each row becomes {whole[:2].abs().amax(1).tolist()}, not 127: "
        "has each row its own scale?"
    )
    assert ((back - x).abs() <= 0.501 * scale).all(), (
        "a number is off by more than half its scale: round to the nearest"
    )
    due = x[:2].abs().amax(1, keepdim=True) / 127
    assert torch.allclose(scale[:2], due, rtol=2e-3, atol=0), (
        f"scales {scale[:2, 0].tolist()}, not the largest of each row over 127"
    )


@torch.no_grad()
def _check_layer(light: Any, linear: torch.nn.Linear, weights: str) -> None:
    """One layer with light weights against the one that it came from."""
    for part in (*light.parameters(), *light.buffers()):
        heavy = part.numel() >= linear.weight.numel() and part.itemsize > 2
        assert not heavy, f"a matrix is still in {part.dtype}: rounded, but not lighter"
    zeros, ones = torch.zeros(1, linear.in_features), torch.eye(linear.in_features)
    found = (light(ones) - light(zeros)).T  # (out, in): the weights that it uses
    weight = linear.weight
    if weights != "int8":
        wanted = weight.to(getattr(torch, weights)).float()
        gap = (found - wanted).abs() / weight.abs().amax(dim=1, keepdim=True)
        assert gap.max() < 1e-4, f"the weights are not the nearest numbers in {weights}"
        return
    off = (found - weight).abs()
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    assert off.max() > 0.01 * scale.max(), "nothing was rounded to int8"
    assert (off <= 0.51 * scale).all(), (
        "a weight is off by more than half its row's scale: has each row its own, "
        "does it reach 127, is it rounded to the nearest?"
    )


@torch.no_grad()
def check_light(lighten: Callable[[GPT, str], Any]) -> None:
    """Lighter weights change a model's logits little, and the model not at all.

    lighten: called as lighten(model, weights); each linear layer of what it returns is
    called with vectors.

    Book: 21_speed.html#which-is-fastest-here
    """
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    model = _small_gpt().float()
    model.blocks[0].mlp.expand.weight[0] *= 1000
    before = model(ids)
    for weights in ("bfloat16", "float16", "int8"):
        light = lighten(model, weights)
        assert torch.equal(model(ids), before), "the model itself was changed"
        for name, layer in model.named_modules():
            if isinstance(layer, torch.nn.Linear):
                _check_layer(light.get_submodule(name), layer, weights)
    model = _small_gpt().float()
    before = model(ids)
    for weights, most in (("bfloat16", 0.1), ("float16", 0.01), ("int8", 0.3)):
        changes = lighten(model, weights)(ids).log_softmax(-1)
        gap = (changes - before.log_softmax(-1)).abs().mean().item()
        assert gap < most, f"{weights} changes log-probabilities by {gap:.3f}"
    try:
        lighten(model, "int3")
    except ValueError:
        return
    raise AssertionError("unknown weights were accepted: raise a ValueError")


def check_accept(accept: Callable[[list[int], list[int]], list[int]]) -> None:
    """A draft is kept up to its first wrong token, where the model's own follows.

    Book: 21_speed.html#exercise-1-what-is-kept-of-a-draft
    """
    for guess, own, wanted, why in (
        ([], [7], [7], "without a draft the model's own token is written"),
        ([5, 6], [6, 1, 4], [6], "in place of a wrong token stands the model's own"),
        ([5, 6], [5, 6, 8], [5, 6, 8], "the token after a right draft is known, too"),
        ([5, 6, 7], [5, 9, 7, 8], [5, 9], "what follows a wrong token is dropped"),
    ):
        lists = [*guess], [*own]
        found = [*accept(*lists)]
        assert lists == (guess, own), "a list that was given was changed"
        case = f"of the draft {guess} beside {own}, {found} was kept, not {wanted}"
        assert found == wanted, f"{case}: {why}"


def check_groups(groups: Callable[[Tensor, int], tuple[Tensor, Tensor]]) -> None:
    """Whole numbers from -7 to 7, with a scale for each group of a row.

    Book: 21_speed.html#exercise-2-scales-for-groups
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
