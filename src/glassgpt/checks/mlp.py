# Written by tools/tangle.py from book/08_mlp.ipynb: change it there.


"""Checks of activations, the MLP and hand-made gradients that name the mistake."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glassgpt.checks.expect import expect_same


def _tanh_gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def check_gelu(gelu: Callable[[Tensor], Tensor]) -> None:
    """GELU in GPT-2's tanh form, on every number by itself.

    Book: 08_mlp.html#gelu-relu-without-the-corner
    """
    mistakes = {
        "this is the exact form; GPT-2 uses the one with tanh": F.gelu,
        "this is ReLU: it has a corner at 0": F.relu,
        "twice too large: multiply by one half": lambda x: 2 * _tanh_gelu(x),
    }
    hint = "Look at sqrt(2 / pi) and 0.044715 x^3, and treat each number by itself"
    x = torch.linspace(-6, 7, 27, dtype=torch.float64)
    expect_same(gelu, _tanh_gelu, x, mistakes=mistakes, hint=hint)
    expect_same(gelu, _tanh_gelu, x[10:16].view(2, 3).float(), hint=hint)
    expect_same(gelu, _tanh_gelu, 100 * x, hint="Does e^u overflow?")


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
        module = module_class(4)
    x = 3 * torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    width = module.expand(x).shape[-1]
    assert width == 16, f"the hidden width for C = 4 is {width}, not 4 C = 16"
    assert module.expand.weight.std(0).min() > 0, (
        "all neurons start alike and stay so: draw their weights at random"
    )

    def through(activation: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: module.projection(activation(module.expand(x)))

    mistakes = {
        "there is no activation: the two layers are a single one": through(lambda x: x),
        "the exact GELU was used; GPT-2 uses the tanh form": through(F.gelu),
        "no activation after the projection": (
            lambda x: _tanh_gelu(through(_tanh_gelu)(x))
        ),
    }
    module.double()
    for training in (True, False):
        expect_same(
            module.train(training),
            through(_tanh_gelu),
            x.double(),
            mistakes=mistakes,
            parameters=dict(module.named_parameters()),
            hint="It is expand, GELU, projection, in training and after eval(), and"
            " each position alone",
        )


def check_one_not_both(make: Callable[[], tuple[Tensor, Tensor, Tensor]]) -> None:
    """Hand-set weights: 1 when exactly one of two facts holds, else 0.

    Book: 08_mlp.html#exercise-1-one-but-not-both
    """
    expand, bias, project = (torch.as_tensor(part).float() for part in make())
    N = expand.shape[-1]
    for name, part, wanted in (
        ("first matrix", expand, (2, N)),
        ("bias", bias, (N,)),
        ("last weights", project, (N,)),
    ):
        shape = tuple(part.shape)
        assert shape == wanted, f"the shape of the {name} is {shape}, not {wanted}"
    for facts, wanted, case in (
        ([0.0, 0.0], 0, "neither fact holds"),
        ([1.0, 0.0], 1, "only the first fact holds"),
        ([0.0, 1.0], 1, "only the second fact holds"),
        ([1.0, 1.0], 0, "both facts hold"),
    ):
        output = (F.relu(torch.tensor(facts) @ expand + bias) @ project).item()
        hint = "let a neuron that fires only for both together subtract as much"
        assert abs(output - wanted) < 1e-3, (
            f"{case}, and the output is {output:g}, not {wanted}"
            + (f": {hint}" if case.startswith("both") else "")
        )


def check_shared_weight(gradients: Callable[..., tuple]) -> None:
    """A weight used twice: its gradient is the sum over both uses.

    gradients: called as gradients(x, w, b) with three numbers, for h = ReLU(w x + b),
    the scores (w h, h) and the cross-entropy with target 0. Returns the gradients of
    x, w and b.

    Book: 08_mlp.html#exercise-2-a-weight-in-two-places
    """
    for start in ((2.0, 0.75, 0.5), (-1.0, 2.0, 3.0), (1.0, -2.0, 0.5), (-1, -2, 0.5)):
        values = torch.tensor(start, dtype=torch.float64).requires_grad_()
        x, w, b = values
        h = F.relu(w * x + b)
        scores = torch.stack([w * h, h])
        F.cross_entropy(scores, torch.tensor(0)).backward()
        to_score = scores.detach().softmax(0) - torch.tensor([1.0, 0.0])
        first_use = (to_score[0] * h).item()  # of w, in the score w h
        found = torch.tensor([float(number) for number in gradients(*start)]).double()
        assert len(found) == 3, f"{len(found)} gradients, not 3: of x, w and b"
        where = "at x = {:g}, w = {:g}, b = {:g} the gradient of".format(*start)
        mistakes = [
            (1, first_use, "only its use in the score w h was counted"),
            (1, values.grad[1] - first_use, "only its use in w x + b was counted"),
            (2, to_score[0] * w, "h feeds both scores, and the second is missing"),
            (2, to_score[1], "h feeds both scores, and the first is missing"),
        ]
        # From the end to the beginning, for a mistake spreads that way.
        for place in (2, 1, 0):
            name, ours, wanted = "xwb"[place], found[place], values.grad[place]
            if abs(ours - wanted) < 1e-5:
                continue
            assert h > 0, f"{where} {name} is {ours:g}, but ReLU is flat there"
            for of, value, mistake in mistakes:
                same = of == place and abs(ours - value) < 1e-5
                assert not same, f"{where} {name}: {mistake}"
            raise AssertionError(f"{where} {name} is {wanted:.4f}, not {ours:.4f}")
