# Written by tools/tangle.py from book/08_mlp.ipynb: change it there.


"""Checks of activations, the MLP and hand-made gradients that name the mistake."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def check_gelu(gelu: Callable[[Tensor], Tensor]) -> None:
    """GELU in GPT-2's tanh form, on every number by itself.

    Book: 08_mlp.html#gelu-relu-without-the-corner
    """
    x = torch.linspace(-6, 6, 25, dtype=torch.float64)
    before, wanted = x.clone(), F.gelu(x, approximate="tanh")
    found = gelu(x)
    assert torch.equal(x, before), "the caller's x was changed: x = x * y, not x *= y"
    assert found.shape == x.shape, f"the shape changed to {tuple(found.shape)}"
    assert found.dtype == x.dtype, f"the dtype changed to {found.dtype}"
    mistakes = [
        (F.gelu(x), "this is the exact form; GPT-2 uses the one with tanh"),
        (x * torch.sigmoid(1.702 * x), "this is the sigmoid form; take tanh"),
        (F.silu(x), "this is SiLU, x times sigmoid(x)"),
        (F.relu(x), "this is ReLU: it has a corner at 0"),
        (x, "x came back as it was: there is no activation"),
        (2 * wanted, "twice too large: multiply by one half"),
    ]
    for values, mistake in mistakes:
        assert not torch.allclose(found, values, atol=1e-12, rtol=0), mistake
    gap = (found - wanted).abs()
    worst = int(gap.argmax())
    assert gap[worst] < 1e-12, (
        f"gelu({x[worst]:.1f}) is {found[worst]:.9f}, not {wanted[worst]:.9f}:"
        " look at sqrt(2 / pi) and at 0.044715 x^3"
    )
    few = x[9:15].view(2, 3).float()
    found, wanted = gelu(few), F.gelu(few, approximate="tanh")
    assert found.shape == few.shape, f"(2, 3) became {tuple(found.shape)}"
    assert found.dtype == few.dtype, f"torch.float32 became {found.dtype}"
    assert torch.allclose(found, wanted, atol=1e-6), (
        "a number's result depends on the other numbers: treat each by itself"
    )
    far = torch.tensor([-40.0, 40.0], dtype=torch.bfloat16)
    found = gelu(far)
    assert found.dtype == far.dtype, f"torch.bfloat16 became {found.dtype}"
    assert torch.allclose(found, F.gelu(far, approximate="tanh")), (
        f"gelu of -40 and 40 is {found.tolist()}, not -0 and 40: does e^u overflow?"
    )
    x.requires_grad_()
    found, wanted = gelu(1 * x), F.gelu(x, approximate="tanh")
    assert found.requires_grad, "no gradient reaches x: don't detach it"
    a, b = (torch.autograd.grad(y.sum(), x)[0] for y in (found, wanted))
    assert torch.allclose(a, b), "the gradient is wrong: was a part detached?"


def check_each_alone(function: Callable[[Tensor], Tensor]) -> None:
    """Each position is treated alone: a changed word changes its own row only.

    function: maps vectors (2, T, C) to vectors (2, T, ...), for T = 5 and C = 4.

    Book: 08_mlp.html#the-checks
    """
    random = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 4, generator=random)
    before = function(x)
    for changed in range(5):
        other = x.clone()
        other[0, changed] = torch.randn(4, generator=random)
        moved, text = (function(other) - before).abs().amax(-1)  # (T,) each
        assert moved[changed] > 0, f"row {changed} does not depend on its own word"
        for row in range(5):
            assert row == changed or moved[row] < 1e-6, (
                f"a change at position {changed} changed row {row}: positions are mixed"
            )
        assert text.max() < 1e-6, "one text changed, another moved: texts are mixed"


def check_mlp(module_class: Callable[[int], nn.Module]) -> None:
    """Expand to 4 C, GELU in its tanh form, project back, each position alone.

    module_class(width) makes a module (B, T, C) to (B, T, C) with two linear layers,
    `expand` and `projection`.

    Book: 08_mlp.html#the-checks
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module, small = module_class(6).double(), module_class(4)
    random = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(2, 5, 6, generator=random, dtype=torch.float64)
    x[1, 4] *= 30  # far numbers, too
    found, hidden = module(x), module.expand(x)
    assert found.shape == x.shape, f"the shape changed to {tuple(found.shape)}"
    assert module.expand.weight.std(0).min() > 0, (
        "all neurons start alike and stay so: draw their weights at random"
    )
    mistakes = [
        (hidden, "there is no activation: the two layers are a single one"),
        (F.gelu(hidden), "the exact GELU was used; GPT-2 uses the tanh form"),
        (F.relu(hidden), "ReLU was used in place of GELU"),
    ]
    for wrong, mistake in mistakes:
        assert not torch.allclose(found, module.projection(wrong)), mistake
    active = F.gelu(hidden, approximate="tanh")
    late = F.gelu(module.projection(active), approximate="tanh")
    assert not torch.allclose(found, late), "no activation after the projection"
    gap = (found - module.projection(active)).abs().max().item()
    assert gap < 1e-12, f"differs from expand, GELU, projection by {gap:.1e}"
    for C, sized in ((6, module), (4, small)):
        count = sum(parameter.numel() for parameter in sized.parameters())
        assert count == 8 * C**2 + 5 * C, f"{count} parameters, not 8 C^2 + 5 C"
    learning = {"x": x.requires_grad_(), **dict(module.named_parameters())}

    def gradients(y: Tensor) -> list[Tensor | None]:
        for tensor in learning.values():
            tensor.grad = None
        if y.requires_grad:
            y.sum().backward()
        return [tensor.grad for tensor in learning.values()]

    active = F.gelu(module.expand(x), approximate="tanh")
    due = gradients(module.projection(active))
    for name, ours, wanted in zip(learning, gradients(module(x)), due, strict=True):
        assert ours is not None, f"no gradient reaches {name}: don't detach a part"
        assert torch.allclose(ours, wanted), f"the gradient of {name} is wrong"
    assert torch.allclose(module.eval()(x), found), "after eval() the result is another"
    check_each_alone(small)


def check_one_not_both(make: Callable[[], tuple[Tensor, Tensor, Tensor]]) -> None:
    """Hand-set weights: 1 when exactly one of two facts holds, else 0.

    Book: 08_mlp.html#exercise-1-one-but-not-both
    """
    expand, bias, project = (torch.as_tensor(part).float() for part in make())
    assert expand.ndim == 2 == len(expand), (
        f"the first matrix has shape {tuple(expand.shape)}, not (2, N)"
    )
    facts = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    assert bias.shape == project.shape == expand.shape[1:], (
        f"for N = {expand.shape[1]} the bias and the last weights have the shapes"
        f" {tuple(bias.shape)} and {tuple(project.shape)}, not ({expand.shape[1]},)"
    )
    found = F.relu(facts @ expand + bias) @ project
    none, second, first, both = (round(value, 3) for value in found.tolist())
    assert none == 0, f"neither fact holds, and the output is {none}, not 0"
    assert first == 1, f"only the first fact holds, and the output is {first}, not 1"
    assert second == 1, f"only the second fact holds, and the output is {second}, not 1"
    assert both == 0, (
        f"both facts hold, and the output is {both}, not 0: let a neuron that fires"
        " only for both together subtract as much"
    )


def check_shared_weight(gradients: Callable[..., tuple]) -> None:
    """A weight used twice: its gradient is the sum over both uses.

    gradients: called as gradients(x, w, b) with three numbers, for h = ReLU(w x + b),
    the scores (w h, h) and the cross-entropy with target 0. Returns the gradients of
    x, w and b.

    Book: 08_mlp.html#exercise-2-a-weight-in-two-places
    """
    starts = ((2.0, 0.75, 0.5), (-1.0, 2.0, 3.0), (1.0, -2.0, 0.5), (-1.0, -2.0, 0.5))
    for start in starts:
        values = torch.tensor(start, dtype=torch.float64).requires_grad_()
        x, w, b = values
        h = F.relu(w * x + b)
        scores, target = torch.stack([w * h, h]), torch.tensor(0)
        losses = F.cross_entropy(scores, target), F.cross_entropy(scores.relu(), target)
        right, clipped = (
            torch.autograd.grad(loss, values, retain_graph=True)[0].tolist()
            for loss in losses
        )
        p = scores.softmax(0).tolist()
        first, second, h, w = p[0] - 1, p[1], h.item(), start[1]
        mistakes = {
            "b": [
                (first * w, "h feeds both scores, and the second is missing"),
                (second, "h feeds both scores, and the first is missing"),
                (
                    (first * w + second) * h,
                    "multiply by the derivative of ReLU, not by ReLU(w x + b)",
                ),
                (
                    0,
                    "ReLU lets the gradient through, w x + b is above 0; and the first"
                    " score is w h, so h gets from it times w",
                ),
                (p[0] * w + second, "the target's score gets p minus 1"),
                (first * w + p[0], "each score gets its own probability"),
                (first * w * second, "over two paths, add"),
                (
                    first + second * w,
                    "the sign is wrong, or w multiplies the other score's gradient",
                ),
            ],
            "w": [
                (first * h, "only its use in the score w h was counted"),
                (right[1] - first * h, "only its use in w x + b was counted"),
                (first * h + right[2] * w, "w x gives to w times x, not times w"),
            ],
            "x": [(right[2] * start[0], "w x gives to x times w, not times x")],
        }
        found = gradients(*start)
        assert len(found) == 3, f"{len(found)} gradients, not 3: of x, w and b"
        found = dict(zip("xwb", map(float, found), strict=True))
        ours, due = torch.tensor([*found.values()]), torch.tensor(right)
        mixed = torch.allclose(ours.sort().values, due.sort().values, atol=1e-5)
        assert not mixed or torch.allclose(ours, due, atol=1e-5), (
            "return the gradients in the order x, w, b"
        )
        # From the end to the beginning, for a mistake spreads that way.
        for name, wanted in zip("bwx", reversed(right), strict=True):
            ours = found[name]
            if abs(ours - wanted) < 1e-5:
                continue
            where = "at x = {:g}, w = {:g}, b = {:g} the gradient of".format(*start)
            assert h > 0, f"{where} {name} is {ours:g}, but ReLU is flat there"
            for value, mistake in [
                *mistakes[name],
                (clipped["xwb".index(name)], "no ReLU on the scores"),
                (-wanted, "the sign is wrong"),
            ]:
                same = abs(ours - value) <= 1e-9
                assert not same, f"{where} {name}: {mistake}"
            raise AssertionError(f"{where} {name} is {wanted:.4f}, not {ours:.4f}")
