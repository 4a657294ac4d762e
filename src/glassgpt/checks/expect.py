# Written by tools/tangle.py from book/05_softmax.ipynb: change it there.


"""What most checks of numbers have in common: an attempt equals a reference."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor


def close(found: Tensor, wanted: Tensor) -> bool:
    """Whether two tensors of one shape agree, up to rounding in `wanted`'s dtype.

    Book: 05_softmax.html#the-check
    """
    within = 5000 * torch.finfo(wanted.dtype).eps
    return torch.allclose(found.to(wanted.dtype), wanted, rtol=within, atol=within)


def expect_same(
    attempt: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    *inputs: Tensor,
    mistakes: Mapping[str, Callable[..., Tensor]] | None = None,
    parameters: Mapping[str, Tensor] | None = None,
    hint: str = "",
) -> None:
    """An attempt returns what a reference does, with its gradients; inputs stay.

    inputs: tensors; gradients are compared for those of floats. mistakes: known wrong
    versions, by the sentence that names each. parameters: what else learns, by name.
    hint: what to look at where all else is wrong.

    Book: 05_softmax.html#the-check
    """
    given = [x.clone() for x in inputs]
    found, wanted = attempt(*inputs), reference(*given)
    assert all(map(torch.equal, inputs, given)), (
        "what was given has changed in place: work on a copy, x = x * y, not x *= y"
    )
    kind = type(found).__name__
    assert isinstance(found, Tensor), f"a tensor is wanted, not {kind}"
    shapes = f"{tuple(found.shape)}, not {tuple(wanted.shape)}"
    assert found.shape == wanted.shape, f"the shape is {shapes}"
    assert found.dtype == wanted.dtype, f"{wanted.dtype} became {found.dtype}"
    for mistake, wrong in (mistakes or {}).items():
        other = wrong(*given).to(wanted.dtype)
        same = other.shape == wanted.shape and torch.allclose(found, other, atol=1e-6)
        assert not same or close(other, wanted), mistake
    gap = (found - wanted).abs().nan_to_num(torch.inf)
    if gap.numel() > 0 and not close(found, wanted):
        place = gap.argmax()
        a, b = found.flatten()[place], wanted.flatten()[place]
        raise AssertionError(f"{a:.6g} where {b:.6g} is wanted: {hint}")
    if wanted.requires_grad or any(x.is_floating_point() for x in inputs):
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
    tensors = []
    for number, x in enumerate(inputs):
        x = x.detach().clone()
        if x.is_floating_point():
            name = "the input" if len(inputs) == 1 else f"input {number + 1}"
            learning[name] = x.requires_grad_()
        tensors.append(x)
    wanted = torch.autograd.grad(
        reference(*tensors).square().sum(), list(learning.values()), allow_unused=True
    )
    # A copy of each tensor: one that learns can't be changed in place.
    total = attempt(*(x.clone() for x in tensors)).square().sum()
    cut = "is a part detached, or under no_grad?"
    assert total.requires_grad, f"no gradient flows back: {cut}"
    for name, tensor in parameters.items():
        assert tensor.requires_grad, f"no gradient reaches {name}: it is frozen"
    found = torch.autograd.grad(total, list(learning.values()), allow_unused=True)
    for name, ours, theirs in zip(learning, found, wanted, strict=True):
        if theirs is None:
            continue
        assert ours is not None, f"no gradient reaches {name}: {cut}"
        largest = theirs.abs().max().item()
        right = torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3 * largest)
        assert right, f"the gradient of {name} is wrong: {cut}"
