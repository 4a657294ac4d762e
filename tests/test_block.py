"""Normalization and the block: parity, properties, and checks that name mistakes."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from glassgpt.block import Block, layer_norm
from glassgpt.checks import block as checks
from glassgpt.heads import MultiHeadAttention
from glassgpt.mlp import MLP

shapes = st.lists(st.integers(1, 5), min_size=1, max_size=4)
seeds = st.integers(0, 2**31)


def random(shape, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64)


def random_block(*args, seed=0, **values):
    block = Block(*args, **values).double().eval()
    for number, parameter in enumerate(block.parameters()):
        parameter.data = random(parameter.shape, seed + number, 0.3)
    return block


def test_package_passes_its_checks():
    checks.check_layer_norm(layer_norm)
    checks.check_block(Block)


@given(shapes, seeds, st.sampled_from([1e-2, 1.0, 1e3]))
def test_layer_norm_equals_torch_with_its_gradients(shape, seed, scale):
    x = random(shape, seed, scale).requires_grad_()
    weight = random(shape[-1:], seed + 1).requires_grad_()
    bias = random(shape[-1:], seed + 2).requires_grad_()
    ours = layer_norm(x, weight, bias)
    theirs = F.layer_norm(x, weight.shape, weight, bias)
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)
    upstream = random(shape, seed + 3)
    a = torch.autograd.grad(ours, (x, weight, bias), upstream)
    b = torch.autograd.grad(theirs, (x, weight, bias), upstream)
    # Entries of a vector that is nearly constant are divided by sqrt(eps).
    torch.testing.assert_close(a, b, atol=1e-8, rtol=1e-8)


def test_zero_projections_make_the_block_the_identity():
    block = random_block(8, 2)
    for part in (block.attention, block.mlp):
        nn.init.zeros_(part.projection.weight)
        nn.init.zeros_(part.projection.bias)
    x = random((2, 5, 8))
    assert torch.equal(block(x), x)


def test_block_is_two_lines():
    block, x = random_block(8, 2), random((2, 5, 8))
    middle = x + block.attention(layer_norm(x, *block.attention_norm.parameters()))
    wanted = middle + block.mlp(layer_norm(middle, *block.mlp_norm.parameters()))
    torch.testing.assert_close(block(x), wanted, atol=1e-12, rtol=0)


def test_block_hands_a_mask_to_attention():
    block, x = random_block(8, 2), random((2, 5, 8))
    alone = torch.eye(5, dtype=torch.bool)
    one_by_one = torch.cat([block(x[:, t : t + 1]) for t in range(5)], dim=1)
    torch.testing.assert_close(block(x, mask=alone), one_by_one)


class OnePositionCache:
    """Hands attention the keys and values of one earlier position."""

    def __init__(self):
        self.keys = self.values = None

    def append(self, keys, values):
        if self.keys is not None:
            keys = torch.cat((self.keys, keys), dim=2)
            values = torch.cat((self.values, values), dim=2)
        self.keys, self.values = keys, values
        return keys, values


def test_block_hands_a_cache_to_attention():
    block, x, cache = random_block(8, 2), random((2, 5, 8)), OnePositionCache()
    steps = [block(x[:, t : t + 1], cache=cache) for t in range(5)]
    torch.testing.assert_close(torch.cat(steps, dim=1), block(x))


def test_dropout_acts_in_training_only_and_on_what_is_added():
    block, x = random_block(8, 2, dropout=0.5), random((2, 5, 8))
    assert torch.equal(block(x), block(x))
    block.train()
    torch.manual_seed(0)
    assert not torch.equal(block(x), block(x))
    for part in (block.attention, block.mlp):
        nn.init.zeros_(part.projection.weight)
        nn.init.zeros_(part.projection.bias)
    assert torch.equal(block(x), x)


def test_dropout_of_everything_leaves_the_stream():
    block, x = random_block(8, 2, dropout=1.0).train(), random((2, 5, 8))
    assert torch.equal(block(x), x)
    assert block.attention.dropout == 1.0


# Wrong versions. Each check must notice, and say which mistake it was.


def divided_by(divisor, mean=True, dim=-1):
    def norm(x, weight, bias):
        centered = x - x.mean(dim, keepdim=True) if mean else x
        return centered / divisor(x) * weight + bias

    return norm


def spread(x, eps=1e-5, dim=-1, correction=0):
    return (x.var(dim, correction=correction, keepdim=True) + eps).sqrt()


def in_place_norm(x, weight, bias):
    x -= x.mean(-1, keepdim=True)
    return x / spread(x) * weight + bias


def mean_of_squares(x, weight, bias):
    mean = x.mean(-1, keepdim=True)
    variance = x.square().mean(-1, keepdim=True) - mean.square()
    return (x - mean) / (variance + 1e-5).sqrt() * weight + bias


def constant_mean(x, weight, bias):
    centered = x - x.mean(-1, keepdim=True).detach()
    return centered / spread(x).detach() * weight + bias


def in_lists(x, weight, bias):
    rows = []
    for row in x.flatten(0, -2).tolist():
        mean = sum(row) / len(row)
        variance = sum((number - mean) ** 2 for number in row) / len(row)
        rows.append([(number - mean) / (variance + 1e-5) ** 0.5 for number in row])
    return torch.tensor(rows, dtype=x.dtype).view(x.shape) * weight + bias


def four_columns(x, weight, bias):
    centered = x - total(x) / 4
    return centered / (total(centered.square()) / 4 + 1e-5).sqrt() * weight + bias


def whole(x, weight, bias):
    return (x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt() * weight + bias


class Replacing(Block):
    def forward(self, x):
        return self.mlp(self.mlp_norm(self.attention(self.attention_norm(x))))


class Doubling(Block):
    def forward(self, x):
        return x + super().forward(x)


class PostNorm(Block):
    def forward(self, x):
        x = self.attention_norm(x + self.attention(x))
        return self.mlp_norm(x + self.mlp(x))


class NormInStream(Block):
    def forward(self, x):
        x = self.attention_norm(x)
        x = x + self.attention(x)
        return x + self.mlp(self.mlp_norm(x))


class Shifted(Block):
    def forward(self, x):
        return super().forward(x) + 0.1


class Parallel(Block):
    def forward(self, x):
        return x + self.attention(self.attention_norm(x)) + self.mlp(self.mlp_norm(x))


class BareAttention(Block):
    def forward(self, x):
        x = x + self.attention(x)
        return x + self.mlp(self.mlp_norm(x))


class BareMLP(Block):
    def forward(self, x):
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(x)


class MLPFirst(Block):
    def forward(self, x):
        x = x + self.mlp(self.mlp_norm(x))
        return x + self.attention(self.attention_norm(x))


class ReadsDoubled(Block):
    def forward(self, x):
        added = self.attention(self.attention_norm(x))
        return x + added + self.mlp(self.mlp_norm(x + 2 * added))


class SeesAll(Block):
    def forward(self, x):
        return super().forward(x, mask=torch.ones(5, 5, dtype=torch.bool))


class OneNorm(Block):
    def forward(self, x):
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.attention_norm(x))


class InPlace(Block):
    def forward(self, x):
        x += self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class DroppingTheStream(Block):
    def forward(self, x):
        x = self.dropout(x + self.attention(self.attention_norm(x)))
        return self.dropout(x + self.mlp(self.mlp_norm(x)))


class DroppingOnce(Block):
    def forward(self, x):
        x = x + self.dropout(self.attention(self.attention_norm(x)))
        return x + self.mlp(self.mlp_norm(x))


class Subtracting(Block):
    def forward(self, x):
        x = x - self.attention(self.attention_norm(x))
        return x - self.mlp(self.mlp_norm(x))


class Twice(Block):
    def forward(self, x):
        x = x + self.attention(self.attention_norm(self.attention_norm(x)))
        return x + 2 * self.mlp(self.mlp_norm(x))


class AlwaysDropping(Block):
    def forward(self, x):
        x = x + F.dropout(self.attention(self.attention_norm(x)), self.dropout.p)
        return x + F.dropout(self.mlp(self.mlp_norm(x)), self.dropout.p)


class NeverDropping(Block):
    def __init__(self, width, heads, dropout=0.0):
        super().__init__(width, heads)


class KeepingWeights(Block):
    """Attention's weights never drop."""

    def __init__(self, width, heads, dropout=0.0):
        super().__init__(width, heads, dropout)
        self.attention.dropout = 0.0


class WithoutMask(Block):
    def forward(self, x, mask=None, cache=None):
        return super().forward(x, None, cache)


class WithoutCache(Block):
    def forward(self, x, mask=None, cache=None):
        return super().forward(x, mask)


class Exchanged(Block):
    def forward(self, x, mask=None, cache=None):
        return super().forward(x, cache, mask)


class SharedNorm(Block):
    """One norm, read through twice."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.mlp_norm = self.attention_norm


def normed(**values):
    """A block with other norms."""

    class Normed(Block):
        def __init__(self, width, *more):
            super().__init__(width, *more)
            self.attention_norm = nn.LayerNorm(width, **values)
            self.mlp_norm = nn.LayerNorm(width, **values)

    return Normed


class RMSNorms(Block):
    def __init__(self, width, *more):
        super().__init__(width, *more)
        self.attention_norm, self.mlp_norm = nn.RMSNorm(width), nn.RMSNorm(width)


class Narrow(Block):
    """The hidden layer of the MLP is no wider than the stream."""

    def __init__(self, width, *more):
        super().__init__(width, *more)
        self.mlp.expand = nn.Linear(width, width)
        self.mlp.projection = nn.Linear(width, width)


class UnmaskedInTraining(Block):
    def forward(self, x, mask=None, cache=None):
        if self.training and mask is None:
            mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool)
        return super().forward(x, mask, cache)


class Detached(Block):
    def forward(self, x, mask=None, cache=None):
        return super().forward(x.detach(), mask, cache)


class DetachedRead(Block):
    def forward(self, x, mask=None, cache=None):
        x = x + self.dropout(self.attention(self.attention_norm(x), mask, cache))
        return x + self.dropout(self.mlp(self.mlp_norm(x.detach())))


class DroppingReadByAttention(Block):
    def forward(self, x, mask=None, cache=None):
        read = self.dropout(self.attention_norm(x))
        x = x + self.dropout(self.attention(read, mask, cache))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class DroppingReadByMLP(Block):
    def forward(self, x, mask=None, cache=None):
        x = x + self.dropout(self.attention(self.attention_norm(x), mask, cache))
        return x + self.dropout(self.mlp(self.dropout(self.mlp_norm(x))))


class DroppingTheSum(Block):
    def forward(self, x, mask=None, cache=None):
        added = self.attention(self.attention_norm(x), mask, cache)
        return x + self.dropout(added + self.mlp(self.mlp_norm(x + added)))


class Flat(Block):
    def forward(self, x):
        return super().forward(x).flatten(0, 1)


def added(in_place=False, streams=False, replace=False, normed=False):
    def additions(x, parts, norm):
        found = []
        for part in parts:
            new = part(norm(x))
            if normed:
                x = norm(x)
            if in_place:
                x += new
            else:
                x = new if replace else x + new
            found.append(x if streams else new)
        return found

    return additions


def test_right_additions_pass():
    checks.check_additions(added())
    checks.check_additions(lambda *given: tuple(added()(*given)))


def average(x):
    return x.mean(-1, keepdim=True)


def total(x):
    return x.sum(-1, keepdim=True)


def layer_norm_gradient(x, u, mean=average, product=average, divide=True, correction=0):
    deviation = x.std(-1, correction=correction, keepdim=True)
    normal = (x - average(x)) / deviation
    result = u - mean(u) - product(u * normal) * normal
    return result / deviation if divide else result


def in_place_gradient(x, u):
    normal, deviation = x - average(x), x.std(-1, correction=0, keepdim=True)
    normal /= deviation
    along = average(u * normal) * normal
    u -= average(u)
    u -= along
    return u / deviation


def with_centered(x, u):
    """x - m where n belongs."""
    centered = x - average(x)
    along = average(u * centered) * centered
    return (u - average(u) - along) / x.std(-1, correction=0, keepdim=True)


def with_x(x, u):
    """The mean of u times x where u times n belongs."""
    deviation = x.std(-1, correction=0, keepdim=True)
    normal = (x - average(x)) / deviation
    return (u - average(u) - average(u * x) * normal) / deviation


def by_four(x, u):
    """Right for four columns only."""
    centered = x - total(x) / 4
    deviation = (total(centered.square()) / 4).sqrt()
    normal = centered / deviation
    return (u - total(u) / 4 - total(u * normal) / 4 * normal) / deviation


def by_differences(x, u, step=1e-5):
    """Each entry moved up and down a little, as in chapter 8."""
    result = torch.zeros_like(x)
    for place in range(x.numel()):
        moved = torch.zeros(x.numel(), dtype=x.dtype)
        moved[place] = step
        moved = moved.view(x.shape)
        up, down = (
            F.layer_norm(x + sign * moved, x.shape[-1:], eps=0.0) for sign in (1, -1)
        )
        result.view(-1)[place] = (u * (up - down)).sum() / (2 * step)
    return result


def test_a_right_block_passes_however_it_starts():
    for seed in range(30):
        torch.manual_seed(seed)
        checks.check_block(Block)


class AttentionThatDrops(MultiHeadAttention):
    def __init__(self, width, heads, dropout=0.0):
        super().__init__(width, heads, dropout)
        self.last = nn.Dropout(dropout)

    def forward(self, x, mask=None, cache=None):
        return self.last(super().forward(x, mask, cache))


class MLPThatDrops(MLP):
    def __init__(self, width, dropout):
        super().__init__(width)
        self.last = nn.Dropout(dropout)

    def forward(self, x):
        return self.last(super().forward(x))


class NanoBlock(Block):
    """As in nanoGPT: dropout stands at the end of each part, not in the block."""

    def __init__(self, width, heads, dropout=0.0):
        super().__init__(width, heads, dropout)
        self.attention = AttentionThatDrops(width, heads, dropout)
        self.mlp = MLPThatDrops(width, dropout)
        self.dropout = nn.Identity()


def test_dropout_may_stand_in_the_parts():
    checks.check_block(NanoBlock)


@pytest.mark.parametrize(
    "right",
    [
        layer_norm_gradient,
        by_differences,
        in_place_gradient,
        lambda x, u: layer_norm_gradient(x.float(), u.float()),
    ],
)
def test_right_gradients_pass(right):
    checks.check_layer_norm_gradient(right)


def nothing(x):
    return 0


def share(x):
    """The sum over k, forgotten."""
    return x / x.shape[-1]


def with_epsilon(x, u):
    x = x.requires_grad_()
    return torch.autograd.grad(F.layer_norm(x, x.shape[-1:]), x, u)[0]


WRONG = [
    ("check_layer_norm", divided_by(lambda x: spread(x, correction=1)), "by C - 1"),
    (
        "check_layer_norm",
        divided_by(lambda x: x.std(-1, correction=0, keepdim=True) + 1e-5),
        "outside the root",
    ),
    ("check_layer_norm", divided_by(lambda x: spread(x, eps=0)), "eps is missing"),
    ("check_layer_norm", divided_by(lambda x: spread(x) ** 2), "take its root"),
    ("check_layer_norm", divided_by(lambda x: 1), "spread was not divided out"),
    (
        "check_layer_norm",
        divided_by(lambda x: (x.square().mean(-1, keepdim=True) + 1e-5).sqrt(), False),
        "mean was not subtracted",
    ),
    ("check_layer_norm", divided_by(spread, mean=False), "mean was not subtracted"),
    ("check_layer_norm", whole, "one mean for everything"),
    (
        "check_layer_norm",
        divided_by(lambda x: spread(x, dim=-2), dim=-2),
        "normalized along the words",
    ),
    ("check_layer_norm", lambda x, w, b: layer_norm(x, w, 0), "bias was ignored"),
    ("check_layer_norm", lambda x, w, b: layer_norm(x, 1, b), "weight was ignored"),
    ("check_layer_norm", lambda x, w, b: w * layer_norm(x, 1, b), "multiply first"),
    (
        "check_layer_norm",
        lambda x, w, b: layer_norm(x.float(), w, b).double(),
        "differs from torch",
    ),
    ("check_layer_norm", lambda x, w, b: layer_norm(x, w, b)[0], "shape changed"),
    ("check_layer_norm", in_place_norm, "caller's x was changed"),
    ("check_layer_norm", mean_of_squares, "subtract before you square"),
    ("check_layer_norm", four_columns, "divide by C"),
    ("check_layer_norm", constant_mean, "x gets another gradient"),
    ("check_layer_norm", in_lists, "x gets another gradient"),
    (
        "check_layer_norm",
        lambda x, w, b: layer_norm(x.double(), w, b),
        "float32 became torch.float64",
    ),
    ("check_block", Replacing, "add what they return to it"),
    ("check_block", Doubling, "x was added twice"),
    ("check_block", PostNorm, "the stream itself is normalized"),
    ("check_block", NormInStream, "the stream itself is normalized"),
    ("check_block", Shifted, "must hand x on unchanged"),
    ("check_block", Parallel, "doesn't see what attention added"),
    ("check_block", BareAttention, "attention adds more when"),
    ("check_block", BareMLP, "the MLP adds more when"),
    ("check_block", MLPFirst, "the MLP comes before attention"),
    ("check_block", ReadsDoubled, "then the MLP, added"),
    ("check_block", SeesAll, "the mask lets the future through"),
    ("check_block", OneNorm, "never used: mlp_norm.weight"),
    ("check_block", Flat, "became"),
    ("check_block", InPlace, "caller's x was changed"),
    ("check_block", DroppingTheStream, "dropout must act on what each part adds"),
    ("check_block", DroppingOnce, "dropout must act on what each part adds"),
    ("check_block", Subtracting, "the MLP, added: each once"),
    ("check_block", Twice, "the MLP, added: each once"),
    ("check_block", AlwaysDropping, "dropout acts after eval(), too"),
    ("check_block", NeverDropping, "dropout must act on what each part adds"),
    ("check_block", KeepingWeights, "hand dropout to attention, too"),
    ("check_block", WithoutMask, "attention must get the mask"),
    ("check_block", WithoutCache, "attention must get the cache"),
    ("check_block", Exchanged, "attention must get the mask as its mask"),
    ("check_block", lambda width, heads, *more: Block(width, 1, *more), "all heads"),
    ("check_block", SharedNorm, "shared or not as in Block: mlp_norm.bias, mlp_norm.w"),
    ("check_block", RMSNorms, "not as in Block: attention_norm.bias, mlp_norm.bias"),
    ("check_block", normed(elementwise_affine=False), "not as in Block: attention_n"),
    ("check_block", normed(eps=1e-12), "Block gives other numbers"),
    ("check_block", Narrow, "not as in Block: mlp.expand.bias, mlp.expand.weight"),
    ("check_block", UnmaskedInTraining, "Block gives other numbers"),
    ("check_block", Detached, "x gets another gradient"),
    ("check_block", DetachedRead, "x gets another gradient"),
    ("check_block", DroppingReadByAttention, "attention reads other vectors"),
    ("check_block", DroppingReadByMLP, "mlp reads other vectors"),
    ("check_block", DroppingTheSum, "mlp reads other vectors"),
    ("check_additions", lambda *given: sum(added()(*given)), "one tensor came back"),
    ("check_additions", added(in_place=True), "caller's x was changed"),
    ("check_additions", lambda *given: [given[0], *added()(*given)], "4 tensors for 3"),
    ("check_additions", added(streams=True), "streams after each part"),
    (
        "check_additions",
        lambda x, parts, norm: [part(norm(x)) for part in parts],
        "every part read the start",
    ),
    (
        "check_additions",
        lambda x, parts, norm: added()(x, parts, lambda x: x),
        "must read the norm",
    ),
    ("check_additions", added(replace=True), "the stream was replaced"),
    ("check_additions", added(normed=True), "the stream itself was normalized"),
    (
        "check_additions",
        lambda *given: torch.stack(added()(*given)).cumsum(0),
        "give each part's own",
    ),
    (
        "check_additions",
        lambda *given: [2 * part for part in added()(*given)],
        "part after part",
    ),
    (
        "check_post_norm",
        lambda x, attention, mlp, a, b: (y := x + attention(a(x))) + mlp(b(y)),
        "this is pre-norm",
    ),
    (
        "check_post_norm",
        lambda x, attention, mlp, a, b: b(mlp(a(attention(x)))),
        "nothing is added",
    ),
    (
        "check_post_norm",
        lambda x, attention, mlp, a, b: (y := x + a(attention(x))) + b(mlp(y)),
        "only what a part returns",
    ),
    (
        "check_post_norm",
        lambda x, attention, mlp, a, b: a(x + attention(x)),
        "the MLP is missing",
    ),
    (
        "check_post_norm",
        lambda x, attention, mlp, a, b: (y := a(x + attention(x))) + mlp(y),
        "norm_2 is missing",
    ),
    (
        "check_post_norm",
        lambda x, attention, mlp, a, b: a((y := b(x + attention(x))) + mlp(y)),
        "norm_1 and norm_2 are exchanged",
    ),
    (
        "check_post_norm",
        lambda x, attention, mlp, a, b: a((y := a(x + attention(x))) + mlp(y)),
        "norm_1 stands in both lines",
    ),
    (
        "check_post_norm",
        lambda x, attention, mlp, a, b: b((y := x + attention(x)) + mlp(y)),
        "norm_1 is missing",
    ),
    (
        "check_post_norm",
        lambda x, attention, mlp, a, b: b(a(x + attention(x)) + mlp(x)),
        "the MLP read x",
    ),
    (
        "check_post_norm",
        lambda x, attention, mlp, a, b: b(x + mlp(a(x + attention(x)))),
        "the second addition starts from x",
    ),
    (
        "check_post_norm",
        lambda x, attention, mlp, a, b: b(mlp(a(x + attention(x)))),
        "the second addition is missing",
    ),
    (
        "check_post_norm",
        lambda x, attention, mlp, a, b: b((y := a(x.add_(attention(x)))) + mlp(y)),
        "caller's x was changed",
    ),
    (
        "check_post_norm",
        lambda x, attention, mlp, a, b: b(2 * a(x + attention(x))),
        "take norm_1(x + attention(x))",
    ),
    (
        "check_layer_norm_gradient",
        lambda x, u: layer_norm_gradient(x, u, mean=nothing, product=nothing),
        "the mean and the variance depend on x too",
    ),
    (
        "check_layer_norm_gradient",
        lambda x, u: layer_norm_gradient(x, u, product=nothing),
        "the variance depends on x too",
    ),
    (
        "check_layer_norm_gradient",
        lambda x, u: layer_norm_gradient(x, u, mean=nothing),
        "the mean depends on x too",
    ),
    (
        "check_layer_norm_gradient",
        lambda x, u: layer_norm_gradient(x, u, product=lambda a: -average(a)),
        "the path through v is subtracted, not added",
    ),
    ("check_layer_norm_gradient", with_centered, "n, not x - m"),
    ("check_layer_norm_gradient", by_four, "differs from autograd"),
    ("check_layer_norm_gradient", with_x, "not of u times x"),
    (
        "check_layer_norm_gradient",
        lambda x, u: layer_norm_gradient(x, u, divide=False),
        "divide by the spread",
    ),
    (
        "check_layer_norm_gradient",
        lambda x, u: -layer_norm_gradient(x, u),
        "differs from autograd",
    ),
    (
        "check_layer_norm_gradient",
        lambda x, u: layer_norm_gradient(x, u, mean=total),
        "the mean of u, not its sum",
    ),
    (
        "check_layer_norm_gradient",
        lambda x, u: layer_norm_gradient(x, u, product=total),
        "the mean of u times n, not its sum",
    ),
    (
        "check_layer_norm_gradient",
        lambda x, u: layer_norm_gradient(x, u, mean=total, product=total),
        "not sums",
    ),
    (
        "check_layer_norm_gradient",
        lambda x, u: layer_norm_gradient(x, u, correction=1),
        "taken with C - 1",
    ),
    (
        "check_layer_norm_gradient",
        lambda x, u: layer_norm_gradient(x, u, mean=torch.mean),
        "one mean for all rows",
    ),
    (
        "check_layer_norm_gradient",
        lambda x, u: layer_norm_gradient(x, u, product=torch.mean),
        "one mean of u times n",
    ),
    (
        "check_layer_norm_gradient",
        lambda x, u: layer_norm_gradient(x, u, mean=share),
        "m moves every n_k",
    ),
    (
        "check_layer_norm_gradient",
        lambda x, u: layer_norm_gradient(x, u, product=share),
        "v moves every n_k",
    ),
    (
        "check_layer_norm_gradient",
        lambda x, u: layer_norm_gradient(x, u, mean=share, product=share),
        "m and v move every n_k",
    ),
    (
        "check_layer_norm_gradient",
        lambda x, u: layer_norm_gradient(x, u, product=lambda a: average(a) / 2),
        "a mean of squares: the 2 is missing",
    ),
    (
        "check_layer_norm_gradient",
        lambda x, u: layer_norm_gradient(x, u, product=lambda a: 2 * average(a)),
        "n_k / (2 v): the 2 is missing",
    ),
    ("check_layer_norm_gradient", with_epsilon, "eps is 0 in this exercise"),
]


@pytest.mark.parametrize(("check", "wrong", "message"), WRONG)
def test_check_names_the_mistake(check, wrong, message):
    with pytest.raises(AssertionError) as caught:
        getattr(checks, check)(wrong)
    assert message in str(caught.value)


def test_dropout_is_off_unless_asked_for():
    block = Block(8, 2)
    assert block.dropout.p == block.attention.dropout == 0.0
