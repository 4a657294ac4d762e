# Written by tools/tangle.py from book/03_embeddings.ipynb: change it there.


"""What most checks of numbers have in common: an attempt equals a reference."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor


def close(found: Tensor, wanted: Tensor, within: float = 0.0) -> bool:
    """Whether two tensors of one shape agree, up to rounding in `wanted`'s dtype.

    Book: 03_embeddings.html#the-check
    """
    within = max(within, 5000 * torch.finfo(wanted.dtype).eps)
    return found.shape == wanted.shape and torch.allclose(
        found.to(wanted.dtype), wanted, rtol=within, atol=within
    )


def expect_same(
    attempt: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    *inputs: Tensor,
    mistakes: Mapping[str, Callable[..., Tensor]] | None = None,
    parameters: Mapping[str, Tensor] | None = None,
    gradients: bool = True,
    hint: str = "",
) -> None:
    """An attempt returns what a reference does, and leaves its inputs as they were.

    mistakes: known wrong versions, by the sentence that names each. parameters: what
    else learns, by name. gradients: whether those of the parameters and of all inputs
    of floats are compared, too. hint: a sentence for when no mistake is recognized.

    Book: 03_embeddings.html#the-check
    """
    given = [x.clone() for x in inputs]
    found, wanted = attempt(*inputs), reference(*given)
    for x, before in zip(inputs, given, strict=True):
        assert torch.equal(x, before), (
            "what was given has changed in place: work on a copy, x = x * y, not x *= y"
        )
    kind = "None" if found is None else f"a {type(found).__name__}"
    assert isinstance(found, Tensor), f"it returns {kind}, not a tensor"
    if not close(found, wanted):
        for mistake, wrong in (mistakes or {}).items():
            assert not close(found, wrong(*given), within=1e-6), mistake
    advice = f". {hint}" if hint else ""
    assert found.shape == wanted.shape, (
        f"the shape is {tuple(found.shape)}, not {tuple(wanted.shape)}{advice}"
    )
    assert found.dtype == wanted.dtype, f"{wanted.dtype} became {found.dtype}"
    if not close(found, wanted):
        worst = (found - wanted).abs().nan_to_num(torch.inf).argmax()
        ours, right = found.flatten()[worst], wanted.flatten()[worst]
        raise AssertionError(f"{ours:.6g} where {right:.6g} is wanted{advice}")
    if gradients:
        _expect_gradients(attempt, reference, given, parameters or {})


@torch.enable_grad()
def _expect_gradients(
    attempt: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    inputs: list[Tensor],
    parameters: Mapping[str, Tensor],
) -> None:
    """The sum of squares of the result has the gradients of the reference."""
    learning = dict(parameters)
    for number, x in enumerate(inputs):
        if x.is_floating_point():
            name = "the input" if len(inputs) == 1 else f"input {number + 1}"
            learning[name] = x.requires_grad_()
    if not learning:
        return
    for name, tensor in learning.items():
        assert tensor.requires_grad, f"no gradient reaches {name}: it is frozen"
    # Copies, for a tensor that learns can't be changed in place.
    total = attempt(*(x.clone() for x in inputs)).square().sum()
    cut = "was a part detached?"
    assert total.requires_grad, f"no gradient flows back: {cut}"
    found = torch.autograd.grad(total, list(learning.values()), allow_unused=True)
    total = reference(*inputs).square().sum()
    wanted = torch.autograd.grad(total, list(learning.values()), allow_unused=True)
    for name, ours, right in zip(learning, found, wanted, strict=True):
        if right is None:
            assert name not in parameters, f"{name} is not used: leave it out"
            continue
        assert ours is not None, f"no gradient reaches {name}: {cut}"
        size = right.abs().max().item()
        assert torch.allclose(ours, right, rtol=1e-3, atol=1e-3 * size), (
            f"the gradient of {name} is wrong: {cut}"
        )
