"""The MLP and its activations: parity with PyTorch, gradients, bad input."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from glassgpt.checks import mlp as checks
from glassgpt.heads import MultiHeadAttention
from glassgpt.mlp import MLP, gelu, squared_relu

numbers = st.floats(-1e3, 1e3)


def random_tensor(*shape, seed=0, dtype=torch.float64):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=random, dtype=dtype)


def make(width=4, activation="gelu", **options):
    torch.manual_seed(0)
    return MLP(width, activation, **options).double()


def test_package_passes_its_checks():
    checks.check_gelu(gelu)
    checks.check_mlp(MLP)
    for activation in ("gelu", "squared_relu"):
        checks.check_each_alone(make(activation=activation).float())
        checks.check_each_alone(make(7, activation).float(), width=7)


def test_checks_leave_the_random_state_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    checks.check_mlp(MLP)
    assert torch.equal(torch.get_rng_state(), before)


@given(st.lists(numbers, min_size=1, max_size=5))
@settings(deadline=None)
def test_gelu_equals_torch(values):
    x = torch.tensor(values, dtype=torch.float64)
    wanted = F.gelu(x, approximate="tanh")
    torch.testing.assert_close(gelu(x), wanted, atol=1e-12, rtol=1e-12)


@given(numbers)
@settings(deadline=None)
def test_gelu_by_the_equation(z):
    inner = math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)
    wanted = z / 2 * (1 + math.tanh(inner))
    found = gelu(torch.tensor(z, dtype=torch.float64)).item()
    assert found == pytest.approx(wanted, rel=1e-12, abs=1e-12)


@given(numbers)
@settings(deadline=None)
def test_squared_relu_by_the_equation(z):
    found = squared_relu(torch.tensor(z, dtype=torch.float64)).item()
    assert found == max(z, 0) * max(z, 0)  # `**` may round otherwise


@pytest.mark.parametrize("function", [gelu, squared_relu])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_activations_keep_shape_and_dtype(function, dtype):
    x = random_tensor(2, 3).to(dtype)
    before = x.clone()
    found = function(x)
    assert found.dtype == dtype
    assert found.shape == x.shape
    assert torch.equal(x, before)


@pytest.mark.parametrize("function", [gelu, squared_relu])
def test_gradients_of_activations(function):
    assert torch.autograd.gradcheck(function, random_tensor(10).requires_grad_())


@pytest.mark.parametrize("activation", ["gelu", "squared_relu"])
@pytest.mark.parametrize("bias", [True, False])
def test_equals_torch_sequential(activation, bias):
    module = make(6, activation, bias=bias)
    bend = nn.GELU("tanh") if activation == "gelu" else squared_relu
    x = random_tensor(2, 3, 6)
    wanted = module.projection(bend(module.expand(x)))
    torch.testing.assert_close(module(x), wanted, atol=1e-14, rtol=0)
    count = sum(parameter.numel() for parameter in module.parameters())
    assert count == 8 * 6**2 + 5 * 6 * bias


@pytest.mark.parametrize("activation", ["gelu", "squared_relu"])
def test_gradients_of_the_module(activation):
    module, x = make(3, activation), random_tensor(2, 3).requires_grad_()
    assert torch.autograd.gradcheck(module, x)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MLP(4, "relu"), "'relu' is neither gelu nor squared_relu"),
        (lambda: MLP(0), "width must be positive, not 0"),
        (lambda: make()(random_tensor(1, 2, 5)), r"x must be \(B, T, 4\)"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("activation", ["gelu", "squared_relu"])
def test_compiles_whole(activation):
    module, x = make(activation=activation), random_tensor(2, 3, 4)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), module(x))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("activation", ["gelu", "squared_relu"])
def test_same_on_a_gpu(activation):
    module, x = make(activation=activation), random_tensor(2, 3, 4)
    wanted = module(x)
    found = module.cuda()(x.cuda()).cpu()
    torch.testing.assert_close(found, wanted, atol=1e-12, rtol=0)


# Answers to the exercises, so that their checks pass something.


def one_not_both():
    expand = torch.ones(2, 2)
    return expand, torch.tensor([0.0, -1.0]), torch.tensor([1.0, -2.0])


def slope(z):
    return 2 * F.relu(z)


def backward(x, W_1, b_1, W_2, d_outputs, slope=slope):
    before = x @ W_1 + b_1
    d_before = d_outputs @ W_2.T * slope(before)
    first = (d_before @ W_1.T, x.T @ d_before, d_before.sum(0))
    return *first, squared_relu(before).T @ d_outputs, d_outputs.sum(0)


def test_right_answers_pass():
    checks.check_squared_relu_slope(slope)
    checks.check_one_not_both(one_not_both)
    checks.check_mlp_backward(backward)


# Wrong versions. Each check must notice, and say which mistake it was.


def module_of(bend, after=lambda y: y):
    class Made(MLP):
        def forward(self, x):
            return after(self.projection(bend(self.expand(x))))

    return Made


class Wasteful(MLP):
    def __init__(self, width):
        super().__init__(width)
        self.unused = nn.Linear(width, width)


class Mixing(MLP):
    """Right for the large case of the check, wrong for small widths."""

    def forward(self, x):
        mean = x.mean(1, keepdim=True) if x.shape[-1] == 4 else 0
        return super().forward(x + mean)


class Stacked(MLP):
    def forward(self, x):
        return super().forward(x)[0]


def mixing(x):
    return x.cumsum(1)


def weights(expand, bias, project):
    return lambda: tuple(map(torch.tensor, (expand, bias, project)))


def changed(place, change):
    def wrong(*args):
        gradients = list(backward(*args))
        gradients[place] = change(gradients[place])
        return tuple(gradients)

    return wrong


WRONG = [
    ("check_gelu", F.gelu, "exact form"),
    ("check_gelu", lambda x: x * torch.sigmoid(1.702 * x), "sigmoid form"),
    ("check_gelu", F.silu, "SiLU"),
    ("check_gelu", F.relu, "ReLU: it has a corner"),
    ("check_gelu", lambda x: x, "nothing is bent"),
    ("check_gelu", lambda x: 2 * gelu(x), "multiply by one half"),
    ("check_gelu", lambda x: gelu(x) + 1e-6, "look at sqrt(2 / pi)"),
    ("check_gelu", lambda x: gelu(x)[:3], "the shape changed to (3,)"),
    ("check_each_alone", mixing, "position 0 changed row 1: positions are mixed"),
    ("check_each_alone", lambda x: x.flip(1), "row 0 does not depend on its own word"),
    ("check_each_alone", torch.ones_like, "row 0 does not depend on its own word"),
    ("check_each_alone", MultiHeadAttention(4, 2), "positions are mixed"),
    ("check_mlp", module_of(lambda hidden: hidden), "there is no activation"),
    ("check_mlp", module_of(F.gelu), "the exact GELU"),
    ("check_mlp", module_of(F.relu), "ReLU was used"),
    ("check_mlp", module_of(gelu, after=gelu), "must not be bent again"),
    ("check_mlp", module_of(F.silu), "differs from expand, GELU, projection"),
    ("check_mlp", Wasteful, "parameters, not 8 C^2 + 5 C"),
    ("check_mlp", Mixing, "positions are mixed"),
    ("check_mlp", Stacked, "the shape changed to (5, 6)"),
    ("check_squared_relu_slope", lambda z: 2 * z, "the parabola is cut off"),
    ("check_squared_relu_slope", F.relu, "half of the slope"),
    ("check_squared_relu_slope", lambda z: (z > 0).float(), "the slope of ReLU"),
    ("check_squared_relu_slope", squared_relu, "the function itself"),
    ("check_squared_relu_slope", lambda z: 3 * F.relu(z), "at [-2.0, -0.5"),
    ("check_one_not_both", weights([[1.0], [1.0]], [0.0], [1.0]), "both facts hold"),
    ("check_one_not_both", weights([[1.0], [1.0]], [1.0], [1.0]), "neither fact holds"),
    ("check_one_not_both", weights([[0.0], [1.0]], [0.0], [1.0]), "only the first"),
    ("check_one_not_both", weights([[1.0], [0.0]], [0.0], [1.0]), "only the second"),
    (
        "check_one_not_both",
        weights([[1.0], [1.0]], [0.0], [[1.0]]),
        "shape (4, 1), not (4,)",
    ),
    (
        "check_mlp_backward",
        lambda *args: backward(*args, slope=torch.ones_like),
        "by b_1: multiply by the slope of the bend",
    ),
    (
        "check_mlp_backward",
        lambda *args: backward(*args, slope=F.relu),
        "by b_1 differs from autograd",
    ),
    ("check_mlp_backward", changed(4, lambda g: g / 5), "by b_2: sum over the positi"),
    ("check_mlp_backward", changed(3, lambda g: g.T), "(3, 12), but W_2 has (12, 3)"),
    ("check_mlp_backward", changed(0, lambda g: -g), "by x differs from autograd"),
    ("check_mlp_backward", lambda *args: backward(*args)[:4], "4 gradients, not 5"),
]


@pytest.mark.parametrize(("check", "wrong", "message"), WRONG)
def test_check_names_the_mistake(check, wrong, message):
    with pytest.raises(AssertionError) as caught:
        getattr(checks, check)(wrong)
    assert message in str(caught.value)
