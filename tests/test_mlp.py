"""The MLP and its activation: parity with PyTorch and transformers, and gradients."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from glassgpt.checks import mlp as checks
from glassgpt.heads import MultiHeadAttention
from glassgpt.mlp import MLP, gelu

numbers = st.floats(-1e3, 1e3)


def random_tensor(*shape, seed=0, dtype=torch.float64):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=random, dtype=dtype)


def make(width=4):
    torch.manual_seed(0)
    return MLP(width).double()


def test_package_passes_its_checks():
    checks.check_gelu(gelu)
    checks.check_mlp(MLP)
    checks.check_each_alone(make().float())


def test_checks_leave_the_random_state_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    checks.check_mlp(MLP)
    assert torch.equal(torch.get_rng_state(), before)


@given(st.lists(numbers, min_size=1, max_size=5))
def test_gelu_equals_torch(values):
    x = torch.tensor(values, dtype=torch.float64)
    wanted = F.gelu(x, approximate="tanh")
    torch.testing.assert_close(gelu(x), wanted, atol=1e-12, rtol=1e-12)


@given(numbers)
def test_gelu_by_the_equation(z):
    inner = math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)
    wanted = z / 2 * (1 + math.tanh(inner))
    found = gelu(torch.tensor(z, dtype=torch.float64)).item()
    assert found == pytest.approx(wanted, rel=1e-12, abs=1e-12)


def test_equals_the_mlp_of_gpt2_in_transformers():
    gpt2 = pytest.importorskip("transformers.models.gpt2.modeling_gpt2")
    config = gpt2.GPT2Config(n_embd=6, activation_function="gelu_new", resid_pdrop=0.0)
    theirs, ours = gpt2.GPT2MLP(24, config).double(), make(6)
    with torch.no_grad():
        for ours_part, theirs_part in (
            (ours.expand, theirs.c_fc),
            (ours.projection, theirs.c_proj),
        ):
            theirs_part.weight.copy_(ours_part.weight.T)
            theirs_part.bias.copy_(ours_part.bias)
    x = 3 * random_tensor(2, 3, 6)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-12, rtol=0)
    by_hand = ours.projection(gelu(ours.expand(x)))
    torch.testing.assert_close(by_hand, theirs(x), atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_gelu_keeps_shape_and_dtype(dtype):
    x = random_tensor(2, 3).to(dtype)
    before = x.clone()
    found = gelu(x)
    assert found.dtype == dtype
    assert found.shape == x.shape
    assert torch.equal(x, before)


def test_gradients():
    assert torch.autograd.gradcheck(gelu, random_tensor(10).requires_grad_())
    module, x = make(3), random_tensor(2, 3).requires_grad_()
    names, values = zip(*module.named_parameters(), strict=True)

    def run(x, *values):
        changed = dict(zip(names, values, strict=True))
        return torch.func.functional_call(module, changed, x)

    assert torch.autograd.gradcheck(run, (x, *values))


def test_equals_torch_sequential():
    module, x = make(6), random_tensor(2, 3, 6)
    theirs = nn.Sequential(module.expand, nn.GELU("tanh"), module.projection)
    torch.testing.assert_close(module(x), theirs(x), atol=1e-14, rtol=0)
    assert [*module.state_dict()] == [
        "expand.weight",
        "expand.bias",
        "projection.weight",
        "projection.bias",
    ]


def test_compiles_whole():
    module, x = make(), random_tensor(2, 3, 4)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), module(x))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_same_on_a_gpu():
    module, x = make(), random_tensor(2, 3, 4)
    wanted = module(x)
    found = module.cuda()(x.cuda()).cpu()
    torch.testing.assert_close(found, wanted, atol=1e-12, rtol=0)


# Right answers to the exercises, in more than one way.


def one_not_both():
    expand = torch.ones(2, 2)
    return expand, torch.tensor([0.0, -1.0]), torch.tensor([1.0, -2.0])


def either_way():
    expand = torch.tensor([[1, -1], [-1, 1]])
    return expand, torch.tensor([0, 0]), torch.tensor([1, 1])


def as_lists():
    return [[1, 0, 1], [0, 1, 1]], [0, 0, -1], [1, 1, -2]


def shared(x, w, b, first_score=1.0, second_score=1.0, first=1.0, second=1.0, open=0.0):
    """The gradients; factors of 0 forget a path."""
    h = max(w * x + b, 0.0)
    p = 1 / (1 + math.exp(h - w * h))
    d_h = first_score * (p - 1) * w + second_score * (1 - p)
    d_u = d_h if h > 0 else open * d_h
    return d_u * w, second * (p - 1) * h + first * d_u * x, d_u


def shared_by_autograd(x, w, b):
    values = [torch.tensor(value, requires_grad=True) for value in (x, w, b)]
    x, w, b = values
    h = (w * x + b).relu()
    loss = torch.logsumexp(torch.stack([w * h, h]), 0) - w * h
    return list(torch.autograd.grad(loss, values))


def loopy(x):
    """Attention-free, in loops and in place: still each position alone."""
    out = torch.empty_like(x)
    for t in range(x.shape[1]):
        out[:, t] = x[:, t] ** 2 + x[:, t]
    return out


def test_right_answers_pass():
    checks.check_gelu(lambda x: 0.5 * x * (1 + torch.tanh(gelu_inner(x))))
    for activation in (gelu, by_sigmoid, nn.GELU("tanh")):
        checks.check_gelu(activation)
        checks.check_mlp(module_of(activation))
    checks.check_each_alone(loopy)
    for answer in (one_not_both, either_way, as_lists):
        checks.check_one_not_both(answer)
    for answer in (shared, shared_by_autograd):
        checks.check_shared_weight(answer)


def gelu_inner(x):
    return math.sqrt(2 / math.pi) * (x + 0.044715 * x.pow(3))


# Wrong versions. Each check must notice, and say which mistake it was.


def module_of(activation, after=lambda y: y):
    class Made(MLP):
        def forward(self, x):
            return after(self.projection(activation(self.expand(x))))

    return Made


class Wasteful(MLP):
    def __init__(self, width):
        super().__init__(width)
        self.unused = nn.Linear(width, width)


class OneWidth(MLP):
    """Four times 6, whatever the width."""

    def __init__(self, width):
        super().__init__(width)
        self.expand, self.projection = nn.Linear(width, 24), nn.Linear(24, width)


class Alike(MLP):
    def __init__(self, width):
        super().__init__(width)
        for parameter in self.parameters():
            nn.init.constant_(parameter, 0.1)


class OneRow(MLP):
    """All neurons start with the same random weights, and stay alike."""

    def __init__(self, width):
        super().__init__(width)
        with torch.no_grad():
            self.expand.weight.copy_(self.expand.weight[:1].expand(4 * width, width))
            self.expand.bias.zero_()
            self.projection.weight.fill_(0.1)


class Mixing(MLP):
    """Right for the large case of the check, wrong for small widths."""

    def forward(self, x):
        mean = x.mean(1, keepdim=True) if x.shape[-1] == 4 else 0
        return super().forward(x + mean)


class HalfLearning(MLP):
    """The first layer never learns."""

    def forward(self, x):
        with torch.no_grad():
            hidden = self.activation(self.expand(x))
        return self.projection(hidden)


class Unlearning(MLP):
    def forward(self, x):
        return super().forward(x).detach()


class Ending(MLP):
    """The layers below never learn."""

    def forward(self, x):
        return super().forward(x.detach())


class Frozen(MLP):
    def __init__(self, width):
        super().__init__(width)
        self.expand.bias.requires_grad_(False)


class HalfGated(MLP):
    """The values are right, but the gradient passes one factor of GELU only."""

    def forward(self, x):
        return self.projection(half_gated(self.expand(x)))


class OtherInUse(MLP):
    def forward(self, x):
        activation = self.activation if self.training else F.relu
        return self.projection(activation(self.expand(x)))


class Stacked(MLP):
    def forward(self, x):
        return super().forward(x)[0]


def mixing(x):
    return x.cumsum(1)


def weights(expand, bias, project):
    return lambda: tuple(map(torch.tensor, (expand, bias, project)))


def without(**factors):
    return lambda x, w, b: shared(x, w, b, **factors)


def through_relu(x, w, b):
    """The gradient of h times h, not times the derivative."""
    h = max(w * x + b, 0.0)
    d_w, d_u = shared(x, w, b)[1:]
    return d_u * h * w, d_w + d_u * (h - 1) * x, d_u * h


def in_place_gelu(x):
    x *= 0.5 * (1 + torch.tanh(gelu_inner(x)))
    return x


def by_exponentials(x):
    """The hyperbolic tangent as the page defines it: inf / inf for large numbers."""
    up, down = torch.exp(gelu_inner(x)), torch.exp(-gelu_inner(x))
    return 0.5 * x * (1 + (up - down) / (up + down))


def by_sigmoid(x):  # right
    return x * torch.sigmoid(2 * gelu_inner(x))


def coming_back_in_32_bits(x):
    return gelu(x.float() if x.dtype == torch.bfloat16 else x)


def half_gated(x):
    return x * (0.5 * (1 + torch.tanh(gelu_inner(x)))).detach()


def exchanged_factor(x, w, b):
    """w multiplies the gradient of the other score."""
    h = max(w * x + b, 0.0)
    p = 1 / (1 + math.exp(h - w * h))
    d_u = (p - 1) + (1 - p) * w if h > 0 else 0.0
    return d_u * w, (p - 1) * h + d_u * x, d_u


def own_factor(place):
    """In w x, one of the two gets its own value in place of the other's."""

    def wrong(x, w, b):
        d_x, d_w, d_u = shared(x, w, b)
        return (d_u * x, d_w, d_u) if place == "x" else (d_x, d_w + d_u * (w - x), d_u)

    return wrong


def first_probability(x, w, b):
    """Both scores get the probability of the first."""
    h = max(w * x + b, 0.0)
    p = 1 / (1 + math.exp(h - w * h))
    d_u = (p - 1) * w + p if h > 0 else 0.0
    return d_u * w, (p - 1) * h + d_u * x, d_u


def multiplied(x, w, b):
    """The paths through both scores, multiplied."""
    h = max(w * x + b, 0.0)
    p = 1 / (1 + math.exp(h - w * h))
    d_u = (p - 1) * w * (1 - p)
    return d_u * w, (p - 1) * h + d_u * x, d_u


def clipped_scores(x, w, b):
    """ReLU on the scores, too."""
    values = torch.tensor([x, w, b], dtype=torch.float64).requires_grad_()
    x, w, b = values
    h = (w * x + b).relu()
    scores = torch.stack([w * h, h]).relu()
    return torch.autograd.grad(torch.logsumexp(scores, 0) - scores[0], values)[0]


def gate_of_w(x, w, b):
    """The gradient passes where w is above 0, not where w x + b is."""
    d_u = shared(x, w, b)[2] if w > 0 else 0.0
    return d_u * w, shared(x, w, b, first=0.0)[1] + d_u * x, d_u


def absolute(x, w, b):
    """The gradient of h takes w without its sign."""
    h = max(w * x + b, 0.0)
    p = 1 / (1 + math.exp(h - w * h))
    d_u = (p - 1) * abs(w) + (1 - p) if h > 0 else 0.0
    return d_u * w, (p - 1) * h + d_u * x, d_u


WRONG = [
    ("check_gelu", F.gelu, "exact form"),
    ("check_gelu", lambda x: x * torch.sigmoid(1.702 * x), "sigmoid form"),
    ("check_gelu", F.silu, "SiLU"),
    ("check_gelu", F.relu, "ReLU: it has a corner"),
    ("check_gelu", lambda x: x, "there is no activation"),
    ("check_gelu", in_place_gelu, "the caller's x was changed"),
    ("check_gelu", lambda x: 2 * gelu(x), "multiply by one half"),
    ("check_gelu", lambda x: gelu(x) + 1e-6, "look at sqrt(2 / pi)"),
    ("check_gelu", lambda x: gelu(x)[:3], "the shape changed to (3,)"),
    ("check_gelu", lambda x: gelu(x.float()), "the dtype changed to torch.float32"),
    ("check_gelu", lambda x: gelu(x.double()), "torch.float32 became torch.float64"),
    ("check_gelu", lambda x: gelu(x.flatten()), "(2, 3) became (6,)"),
    ("check_gelu", lambda x: gelu(x - x.mean()), "treat each by itself"),
    ("check_gelu", lambda x: gelu(x) * x.abs().max() / 6, "treat each by itself"),
    ("check_gelu", by_exponentials, "is [nan, nan], not -0 and 40: does e^u overflow?"),
    ("check_gelu", lambda x: gelu(x.clamp(-6, 6)), "6.0], not -0 and 40"),
    ("check_gelu", coming_back_in_32_bits, "torch.bfloat16 became torch.float32"),
    ("check_gelu", lambda x: gelu(x).detach(), "no gradient reaches x"),
    ("check_gelu", half_gated, "the gradient is wrong: was a part detached?"),
    ("check_each_alone", mixing, "position 0 changed row 1: positions are mixed"),
    ("check_each_alone", lambda x: x.flip(1), "row 0 does not depend on its own word"),
    ("check_each_alone", torch.ones_like, "row 0 does not depend on its own word"),
    ("check_each_alone", MultiHeadAttention(4, 2), "positions are mixed"),
    ("check_each_alone", lambda x: x + x.mean(0), "another moved: texts are mixed"),
    ("check_mlp", module_of(by_exponentials), "projection by nan"),
    ("check_mlp", module_of(lambda hidden: hidden), "there is no activation"),
    ("check_mlp", module_of(F.gelu), "the exact GELU"),
    ("check_mlp", OneWidth, "parameters, not 8 C^2"),
    ("check_mlp", module_of(F.relu), "ReLU was used"),
    ("check_mlp", module_of(gelu, after=gelu), "no activation after the projection"),
    ("check_mlp", module_of(F.silu), "differs from expand, GELU, projection"),
    ("check_mlp", Wasteful, "parameters, not 8 C^2 + 5 C"),
    ("check_mlp", Alike, "all neurons start alike"),
    ("check_mlp", OneRow, "all neurons start alike"),
    ("check_mlp", Mixing, "positions are mixed"),
    ("check_mlp", HalfLearning, "no gradient reaches x"),
    ("check_mlp", Unlearning, "no gradient reaches x"),
    ("check_mlp", Ending, "no gradient reaches x"),
    ("check_mlp", Frozen, "no gradient reaches expand.bias"),
    ("check_mlp", HalfGated, "the gradient of x is wrong"),
    ("check_mlp", OtherInUse, "after eval() the result is another"),
    ("check_mlp", Stacked, "the shape changed to (5, 6)"),
    ("check_one_not_both", weights([[1.0], [1.0]], [0.0], [1.0]), "both facts hold"),
    (
        "check_one_not_both",
        weights([[1.0, 1.0], [1.0, 1.0]], [0.0, -1.5], [1.0, -2.0]),
        "let a neuron that fires only for both together subtract as much",
    ),
    ("check_one_not_both", weights([[1.0], [1.0]], [1.0], [1.0]), "neither fact holds"),
    ("check_one_not_both", weights([[0.0], [1.0]], [0.0], [1.0]), "only the first"),
    ("check_one_not_both", weights([[1.0], [0.0]], [0.0], [1.0]), "only the second"),
    (
        "check_one_not_both",
        weights([[1.0, 1.0], [1.0, 1.0], [0.0, 0.0]], [0.0, -1.0], [1.0, -2.0]),
        "the first matrix has shape (3, 2), not (2, N)",
    ),
    ("check_one_not_both", weights([1.0, 1.0], [0.0], [1.0]), "shape (2,), not (2, N)"),
    (
        "check_one_not_both",
        weights([[1.0], [1.0]], [0.0], [[1.0]]),
        "for N = 1 the bias and the last weights have the shapes (1,) and (1, 1)",
    ),
    (
        "check_one_not_both",
        weights([[1.0] * 3, [1.0] * 3], [0.0, -1.0], [1.0, -2.0, 0.0]),
        "shapes (2,) and (3,), not (3,)",
    ),
    ("check_shared_weight", without(first=0), "w: only its use in the score w h"),
    ("check_shared_weight", without(second=0), "w: only its use in w x + b"),
    (
        "check_shared_weight",
        without(second_score=0),
        "b: h feeds both scores, and the",
    ),
    (
        "check_shared_weight",
        without(first_score=0),
        "and the first is missing",
    ),
    ("check_shared_weight", without(open=1), "but ReLU is flat there"),
    ("check_shared_weight", clipped_scores, "b: no ReLU on the scores"),
    ("check_shared_weight", gate_of_w, "b: ReLU lets the gradient through"),
    ("check_shared_weight", absolute, "the gradient of b is"),
    ("check_shared_weight", through_relu, "b: multiply by the derivative of ReLU"),
    ("check_shared_weight", exchanged_factor, "b: the sign is wrong, or w multiplies"),
    ("check_shared_weight", multiplied, "b: over two paths, add"),
    ("check_shared_weight", own_factor("x"), "x: w x gives to x times w, not times x"),
    ("check_shared_weight", own_factor("w"), "w: w x gives to w times x, not times w"),
    ("check_shared_weight", first_probability, "each score gets its own probability"),
    (
        "check_shared_weight",
        lambda *at: [shared(*at)[place] for place in (1, 0, 2)],
        "in the order x, w, b",
    ),
    ("check_shared_weight", lambda *at: shared(*at)[:2], "2 gradients, not 3"),
    (
        "check_shared_weight",
        lambda *at: tuple(-number for number in shared(*at)),
        "b: the sign is wrong",
    ),
    (
        "check_shared_weight",
        lambda x, w, b: (shared(x, w, b)[2], *shared(x, w, b)[1:]),
        "the gradient of x is",
    ),
]


@pytest.mark.parametrize(("check", "wrong", "message"), WRONG)
def test_check_names_the_mistake(check, wrong, message):
    with pytest.raises(AssertionError) as caught:
        getattr(checks, check)(wrong)
    assert message in str(caught.value)
