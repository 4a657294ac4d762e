# Written by tools/tangle.py from book/21_speed.ipynb: change it there.
"""Checks of light layers that name the mistake."""

from collections.abc import Callable
from typing import Any

import torch

from glassgpt.checks.generation import _small_gpt
from glassgpt.gpt import GPT


def _check_layer(light: Any, linear: torch.nn.Linear, weights: str) -> None:
    """One layer with light weights against the one that it came from."""
    if weights != "int8":
        dtype = getattr(torch, weights)
        assert light.weight.dtype == dtype, f"{weights} was not stored"
        rounded = torch.equal(light.weight, linear.weight.to(dtype))
        assert rounded, f"the weights are not the nearest numbers in {weights}"
        return
    assert light.weight.dtype == torch.int8, f"{weights} was not stored"
    assert light.scale.unique().numel() > 1, "one scale for all rows: give each its own"
    assert (light.weight.abs().amax(dim=1) == 127).all(), (
        "int8 goes to 127: the largest of each row should be there"
    )
    scale = light.scale.float()[:, None]
    off = (light.weight * scale - linear.weight).abs()
    assert (off <= 0.501 * scale).all(), (
        "a weight is off by more than half a scale: round to the nearest"
    )


@torch.no_grad()
def check_light(lighten: Callable[[GPT, str], Any]) -> None:
    """Lighter weights change a model's logits little, and the model not at all.

    lighten: called as lighten(model, weights); each linear layer of what it returns has
    a weight (out, in), and for int8 a scale (out,).

    Book: 21_speed.html#speed-how-fast-can-it-write
    """
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    model = _small_gpt().float()
    model.blocks[0].mlp.expand.weight[0] *= 1000
    for weights in ("bfloat16", "float16", "int8"):
        light = lighten(model, weights)
        for name, layer in model.named_modules():
            if isinstance(layer, torch.nn.Linear):
                _check_layer(light.get_submodule(name), layer, weights)
    model = _small_gpt().float()
    before = model(ids)
    for weights, most in (("bfloat16", 0.1), ("float16", 0.01), ("int8", 0.3)):
        changes = lighten(model, weights)(ids).log_softmax(-1)
        gap = (changes - before.log_softmax(-1)).abs().mean().item()
        assert gap < most, f"{weights} changes log-probabilities by {gap:.3f}"
        assert torch.equal(model(ids), before), "the model itself was changed"
    try:
        lighten(model, "int3")
    except ValueError:
        return
    raise AssertionError("unknown weights were accepted: raise a ValueError")
