"""Heads and multi-head attention: parity with PyTorch, and properties."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from glassgpt.attention import attention, causal_mask
from glassgpt.checks.attention import check_causal, check_permutation_equivariant
from glassgpt.heads import (
    MultiHeadAttention,
    fused_attention,
    merge_heads,
    split_heads,
)

seeds = st.integers(0, 2**31)
few = st.integers(1, 4)


def random_tensor(*shape, seed=0, dtype=torch.float64):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=random, dtype=dtype)


def make(width=8, heads=2, seed=0, **options):
    torch.manual_seed(seed)
    return MultiHeadAttention(width, heads, **options).double()


def one_by_one(q, k, v):
    """The plain attention, one head after the other."""
    mask = causal_mask(q.shape[-2])
    heads = zip(q.unbind(1), k.unbind(1), v.unbind(1), strict=True)
    return torch.stack([attention(*head, mask)[0] for head in heads], dim=1)


def all_at_once(q, k, v):
    return attention(q, k, v, causal_mask(q.shape[-2]))[0]


def grouped(q, k, v):
    each = q.shape[1] // k.shape[1]
    return fused_attention(q, *(t.repeat_interleave(each, dim=1) for t in (k, v)))


@given(few, few, few, few, seeds)
def test_split_and_merge_are_inverse(B, T, H, size, seed):
    x = random_tensor(B, T, H * size, seed=seed)
    heads = split_heads(x, H)
    assert heads.shape == (B, H, T, size)
    assert torch.equal(merge_heads(heads), x)
    for h in range(H):
        assert torch.equal(heads[:, h], x[..., h * size : (h + 1) * size])


def test_split_takes_memory_that_is_not_contiguous():
    x = random_tensor(2, 3, 12)[..., ::3].transpose(0, 1)
    assert not x.is_contiguous()
    assert torch.equal(merge_heads(split_heads(x, 2)), x)


@given(few, few, st.integers(1, 9), few, seeds)
def test_loop_product_and_kernel_are_equal(B, H, T, size, seed):
    q, k, v = (random_tensor(B, H, T, size, seed=seed + i) for i in range(3))
    wanted = one_by_one(q, k, v)
    for attend in (all_at_once, fused_attention):
        torch.testing.assert_close(attend(q, k, v), wanted, atol=1e-12, rtol=0)


def test_gradients_equal_the_plain_version():
    inputs = [random_tensor(2, 3, 7, 4, seed=s).requires_grad_() for s in range(3)]
    upstream = random_tensor(2, 3, 7, 4, seed=9)
    found = torch.autograd.grad((fused_attention(*inputs) * upstream).sum(), inputs)
    wanted = torch.autograd.grad((all_at_once(*inputs) * upstream).sum(), inputs)
    torch.testing.assert_close(found, wanted, atol=1e-12, rtol=0)


@given(few, st.integers(1, 5), st.integers(1, 5), seeds)
def test_a_mask_alone_decides(H, T, S, seed):
    q = random_tensor(2, H, T, 4, seed=seed)
    k, v = (random_tensor(2, H, S, 4, seed=seed + i) for i in (1, 2))
    mask = random_tensor(2, 1, T, S, seed=seed + 3) > 0
    mask[..., 0] = True  # somewhere to look
    wanted, _ = attention(q, k, v, mask)
    found = fused_attention(q, k, v, mask)
    torch.testing.assert_close(found, wanted, atol=1e-12, rtol=0)


@given(few, st.integers(1, 6), st.integers(0, 6), seeds)
def test_without_a_mask_queries_are_the_last_positions(H, T, earlier, seed):
    """A single query, too, and as many queries as keys."""
    S = T + earlier
    q, k, v = (random_tensor(2, H, S, 4, seed=seed + i) for i in range(3))
    wanted = all_at_once(q, k, v)[:, :, S - T :]
    found = fused_attention(q[:, :, S - T :], k, v)
    torch.testing.assert_close(found, wanted, atol=1e-12, rtol=0)


@pytest.mark.parametrize("G", [1, 2, 6])
def test_the_kernel_lets_heads_share_keys(G):
    q, k, v = (torch.randn(2, heads, 5, 3) for heads in (6, G, G))
    torch.testing.assert_close(fused_attention(q, k, v), grouped(q, k, v))


@given(st.sampled_from([1, 2, 3, 4, 6, 12, 24]), st.integers(1, 20), seeds)
def test_equals_torch_multihead_attention(heads, T, seed):
    ours = make(24, heads, seed)
    theirs = nn.MultiheadAttention(24, heads, batch_first=True).double()
    theirs.in_proj_weight, theirs.in_proj_bias = ours.qkv.weight, ours.qkv.bias
    theirs.out_proj = ours.projection
    x = random_tensor(2, T, 24, seed=seed)
    wanted, _ = theirs(x, x, x, attn_mask=~causal_mask(T))
    torch.testing.assert_close(ours(x), wanted, atol=1e-12, rtol=0)


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("training", [True, False])
def test_causal(heads, training):
    torch.manual_seed(0)
    check_causal(MultiHeadAttention(4, heads).train(training))


def test_without_a_causal_mask_it_knows_no_order():
    torch.manual_seed(0)
    module = MultiHeadAttention(4, 2)
    everyone = torch.ones(5, 5, dtype=torch.bool)
    check_permutation_equivariant(lambda x: module(x, mask=everyone))
    with pytest.raises(AssertionError, match="something here knows the order"):
        check_permutation_equivariant(module)


def test_causal_in_a_long_context():
    module, x = make(), random_tensor(1, 300, 8)
    other = x.clone()
    other[:, 290:] = 0
    moved = (module(x) - module(other)).abs().amax(-1)[0]
    assert moved[:290].max() < 1e-12
    assert moved[290:].min() > 0


def test_refuses_a_width_that_heads_do_not_divide():
    with pytest.raises(ValueError, match="width 8 is no multiple of 3 heads"):
        MultiHeadAttention(8, 3)


def test_a_mask_reaches_every_head():
    module, x = make(), random_tensor(2, 5, 8)
    mask = causal_mask(5).clone()
    mask[4, 1] = False
    parts = (split_heads(part, 2) for part in module.qkv(x).chunk(3, -1))
    wanted = module.projection(merge_heads(attention(*parts, mask)[0]))
    torch.testing.assert_close(module(x, mask), wanted, atol=1e-12, rtol=0)


class ListCache:
    """Keys and values so far, the plainest way."""

    def __init__(self):
        self.keys = self.values = None

    def append(self, keys, values):
        if self.keys is not None:
            keys = torch.cat([self.keys, keys], dim=-2)
            values = torch.cat([self.values, values], dim=-2)
        self.keys, self.values = keys, values
        return keys, values


@pytest.mark.parametrize("sizes", [[1] * 9, [4, 1, 1, 1, 1, 1], [2, 3, 4]])
def test_a_cache_gives_the_same_vectors(sizes):
    module, x, cache = make().eval(), random_tensor(2, 9, 8), ListCache()
    found = [module(part, cache=cache) for part in x.split(sizes, dim=1)]
    torch.testing.assert_close(torch.cat(found, 1), module(x), atol=1e-12, rtol=0)


def test_dropout_acts_in_training_only():
    module, x = make(dropout=0.5), random_tensor(1, 6, 8)
    plain = make()
    assert not torch.allclose(module(x), plain(x))
    torch.testing.assert_close(module.eval()(x), plain(x))


def test_compiles_whole_for_any_length():
    module = make()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for T in (5, 300, 1):
        x = random_tensor(2, T, 8)
        torch.testing.assert_close(compiled(x), module(x))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("T", [1, 5, 300])
def test_same_on_a_gpu(T):
    module, x = make(), random_tensor(2, T, 8)
    wanted = module(x)
    found = module.cuda()(x.cuda()).cpu()
    torch.testing.assert_close(found, wanted, atol=1e-9, rtol=0)
