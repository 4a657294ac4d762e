"""Normalization and the block: parity and properties."""

import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from glassgpt.block import Block, layer_norm

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


def test_dropout_is_off_unless_asked_for():
    block = Block(8, 2)
    assert block.dropout.p == block.attention.dropout == 0.0
