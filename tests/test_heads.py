"""Heads and multi-head attention: parity with PyTorch, properties, wrong versions."""

import math
from copy import deepcopy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from glassgpt.attention import attention, causal_mask
from glassgpt.checks import heads as checks
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


def contributions(module, x, attend=fused_attention):
    parts = module.qkv(x).chunk(3, dim=-1)
    context = attend(*(split_heads(part, module.heads) for part in parts))
    weights = module.projection.weight.chunk(module.heads, dim=-1)
    pieces = zip(context.unbind(1), weights, strict=True)
    return torch.stack([piece @ weight.mT for piece, weight in pieces], dim=1)


def grouped(q, k, v):
    return fused_attention(*spread(q, k, v))


def test_package_passes_its_checks():
    for split in (split_heads, split_into_place):
        checks.check_split_heads(split)
    for attend in (one_by_one, all_at_once, fused_attention):
        checks.check_causal_attention(attend)
    checks.check_fused_attention(fused_attention)
    checks.check_multi_head(MultiHeadAttention)
    checks.check_multi_head(partial(MultiHeadAttention, dropout=0.0))
    for attend in (
        one_by_one,
        all_at_once,
        partial(F.scaled_dot_product_attention, is_causal=True),
    ):
        checks.check_multi_head(module_of(attend=attend))
    checks.check_grouped_attention(grouped)
    checks.check_contributions(contributions)


def test_checks_leave_the_random_state_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    checks.check_multi_head(MultiHeadAttention)
    checks.check_contributions(contributions)
    assert torch.equal(torch.get_rng_state(), before)


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


@pytest.mark.parametrize("heads", [1, 2, 3, 4, 6, 12, 24])
@pytest.mark.parametrize("T", [1, 2, 10, 257])
def test_equals_torch_multihead_attention(heads, T):
    ours = make(24, heads)
    theirs = nn.MultiheadAttention(24, heads, batch_first=True).double()
    theirs.in_proj_weight, theirs.in_proj_bias = ours.qkv.weight, ours.qkv.bias
    theirs.out_proj = ours.projection
    x = random_tensor(2, T, 24)
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


# Wrong versions. Each check must notice, and say which mistake it was.


def reshape_split(x, heads):
    B, T, C = x.shape
    return x.reshape(B, heads, T, C // heads)


def dealt_split(x, heads):
    B, T, C = x.shape
    return x.reshape(B, T, C // heads, heads).permute(0, 3, 1, 2)


def reshape_merge(x):
    return x.reshape(x.shape[0], x.shape[2], -1)


def scaled(factor):
    return lambda q, k, v, mask=None: fused_attention(factor * q, k, v, mask)


def turned_mask(q, k, v, mask=None):
    return fused_attention(q, k, v, None if mask is None else ~mask)


def turned_some(q, k, v, mask=None):
    return fused_attention(q, k, v, mask if mask is None or mask.all() else ~mask)


def ignored_mask(q, k, v, mask=None):
    every = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool)
    return fused_attention(q, k, v, None if mask is None else every)


def first_corner(q, k, v, mask=None):
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None
    )


def also_causal(q, k, v, mask=None):
    if mask is not None and q.shape[-2] == k.shape[-2]:
        mask = mask & causal_mask(q.shape[-2])
    return fused_attention(q, k, v, mask)


def first_rows(q, k, v, mask=None):
    """The single query is the last, but several are the first positions."""
    if mask is None and 1 < q.shape[-2] < k.shape[-2]:
        mask = causal_mask(k.shape[-2])[: q.shape[-2]]
    return fused_attention(q, k, v, mask)


def any_keys(q, k, v, mask=None):
    if mask is None and q.shape[-2] != k.shape[-2]:
        return F.scaled_dot_product_attention(q, k, v)
    return fused_attention(q, k, v, mask)


def module_of(split=split_heads, merge=merge_heads, attend=fused_attention, **changes):
    order, project = changes.get("order", (0, 1, 2)), changes.get("project", True)

    class Made(MultiHeadAttention):
        def forward(self, x):
            parts = self.qkv(x).chunk(3, dim=-1)
            merged = merge(attend(*(split(parts[i], self.heads) for i in order)))
            return self.projection(merged) if project else merged

    return Made


def looking_ahead(q, k, v):
    """PyTorch's True means hidden elsewhere; here it means: may look."""
    return attention(q, k, v, ~causal_mask(q.shape[-2]))[0]


def unswapped(x, heads):
    B, T, C = x.shape
    return x.reshape(B, T, heads, C // heads)


def unswapped_merge(x):
    return x.flatten(2)


def wrong_root(q, k, v):
    return fused_attention(q / math.sqrt(q.shape[1]), k, v)


def two_always(q, k, v):
    """The root of a width of four, written in."""
    return fused_attention(q * math.sqrt(q.shape[-1]) / 2, k, v)


def zero_is_hidden(q, k, v, mask=None):
    """A score of 0 is taken for a masked one."""
    T, S = q.shape[-2], k.shape[-2]
    mask = causal_mask(S)[S - T :] if mask is None else mask
    scores = q @ k.mT / math.sqrt(q.shape[-1]) * mask
    return scores.masked_fill(scores == 0, float("-inf")).softmax(-1) @ v


def weights_detached(q, k, v):
    _, weights = attention(q, k, v, causal_mask(q.shape[-2]))
    return weights.detach() @ v


def queries_detached(q, k, v):
    return all_at_once(q.detach(), k, v)


class MaskedInTraining(MultiHeadAttention):
    def forward(self, x):
        T = x.shape[1]
        return super().forward(x, None if self.training else torch.ones(T, T) > 0)


class DropsInUse(MultiHeadAttention):
    def forward(self, x):
        self.attend = all_at_once if self.training else self.drop
        parts = self.qkv(x).chunk(3, dim=-1)
        contexts = self.attend(*(split_heads(part, self.heads) for part in parts))
        return self.projection(merge_heads(contexts))

    def drop(self, q, k, v):
        return F.dropout(all_at_once(q, k, v), 0.5)


class Ending(MultiHeadAttention):
    """The layers below never learn."""

    def forward(self, x):
        return super().forward(x.detach())


class Unlearning(MultiHeadAttention):
    def forward(self, x):
        return super().forward(x).detach()


class Frozen(MultiHeadAttention):
    def __init__(self, width, heads):
        super().__init__(width, heads)
        self.qkv.bias.requires_grad_(False)


def first_or_last(q, k, v):
    """The first key for half of the heads, the last one for the others."""
    half = q.shape[1] // 2
    return fused_attention(q, *(t[:, [0] * half + [-1] * half] for t in (k, v)))


def five_words(q, k, v):
    """The mask of five words, written in."""
    mask = torch.zeros(q.shape[-2], q.shape[-2], dtype=torch.bool)
    mask[:, :] = causal_mask(5)[-len(mask) :, : len(mask)]
    return attention(q, k, v, mask)[0]


class AddingX(MultiHeadAttention):
    def forward(self, x, mask=None, cache=None):
        return x + super().forward(x, mask, cache)


class Wasteful(MultiHeadAttention):
    def __init__(self, width, heads):
        super().__init__(width, heads)
        self.unused = nn.Linear(width, heads)


class Narrow(MultiHeadAttention):
    def __init__(self, width, heads):
        super().__init__(width, 1)


def repeated(q, k, v):
    return fused_attention(q, k.repeat(1, 3, 1, 1), v.repeat(1, 3, 1, 1))


def spread(q, k, v):
    each = q.shape[1] // k.shape[1]
    return q, k.repeat_interleave(each, 1), v.repeat_interleave(each, 1)


def by_count_of_keys(q, k, v):
    G = k.shape[1]
    return fused_attention(q, k.repeat_interleave(G, 1), v.repeat_interleave(G, 1))


def always_three(q, k, v):
    return all_at_once(q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1))


def split_by_texts(x, heads):  # right only where D = H
    return torch.stack(
        [x[..., i * heads : (i + 1) * heads] for i in range(heads)], dim=1
    )


def split_into_32_bits(x, heads):
    B, T, C = x.shape
    out = torch.zeros(B, heads, T, C // heads)
    out[:] = split_heads(x, heads)
    return out


def split_by_lists(x, heads):
    return torch.tensor(split_heads(x, heads).tolist(), dtype=x.dtype)


def split_into_place(x, heads):  # right
    B, T, C = x.shape
    out = torch.zeros(B, heads, T, C // heads, dtype=x.dtype)
    for h, part in enumerate(x.chunk(heads, dim=-1)):
        out[:, h] = part
    return out


def two_halves(x, heads):
    return split_heads(x, 2)


def rows_taken(module, x):
    parts = module.qkv(x).chunk(3, dim=-1)
    context = fused_attention(*(split_heads(part, module.heads) for part in parts))
    return context @ module.projection.weight.unflatten(0, (module.heads, -1))


def always_four_heads(module, x):
    module = deepcopy(module)
    module.heads = 4
    return contributions(module, x)


def last_under_the_second(module, x):
    first, second, third, last = contributions(module, x).unbind(1)
    return torch.stack([first, second + last, third, 0 * last], 1)


WRONG = [
    ("check_split_heads", reshape_split, "holds column 3 of position 0: view(B, H"),
    ("check_split_heads", dealt_split, "head 0 of position 0 holds column 2, not 1"),
    ("check_split_heads", split_by_texts, "shape (4, 2, 5, 2)"),
    ("check_split_heads", two_halves, "shape (4, 2, 5, 3) for 3 heads"),
    ("check_split_heads", lambda x, h: split_heads(x.flip(0), h), "of text 3"),
    ("check_split_heads", lambda x, h: split_heads(x, h)[:, :1], "shape (4, 1, 5, 3)"),
    ("check_split_heads", split_into_32_bits, "dtype changed to torch.float32"),
    ("check_split_heads", split_by_lists, "no gradient reaches x"),
    ("check_causal_attention", F.scaled_dot_product_attention, "mask is missing"),
    ("check_causal_attention", two_always, "differs from the plain attention"),
    ("check_causal_attention", zero_is_hidden, "differs from the plain attention"),
    ("check_causal_attention", weights_detached, "the gradient of queries is wrong"),
    ("check_causal_attention", queries_detached, "the gradient of queries is wrong"),
    (
        "check_causal_attention",
        lambda q, k, v: attention(q, k, v, causal_mask(5).T)[0],
        "the mask is transposed",
    ),
    ("check_causal_attention", scaled(2.0), "not divided by the root of D"),
    ("check_causal_attention", wrong_root, "divided by the root of C: take"),
    ("check_causal_attention", scaled(1.1), "differs from the plain attention"),
    ("check_causal_attention", lambda *qkv: attention(*qkv)[0][:1], "shape changed"),
    ("check_fused_attention", scaled(2.0), "not divided by the root of D"),
    ("check_fused_attention", also_causal, "a mask replaces the causal one"),
    ("check_fused_attention", turned_mask, "a mask replaces the causal one"),
    ("check_fused_attention", turned_some, "inverted: True"),
    ("check_fused_attention", ignored_mask, "the mask is ignored"),
    ("check_fused_attention", first_corner, "a single query is the last position"),
    ("check_fused_attention", any_keys, "5 keys: the mask is missing"),
    ("check_fused_attention", first_rows, "are the last positions, not the first"),
    ("check_fused_attention", zero_is_hidden, "differs from the plain attention"),
    ("check_multi_head", module_of(split=reshape_split), "split: view(B, H, T, D)"),
    ("check_multi_head", module_of(attend=looking_ahead), "the mask is inverted"),
    (
        "check_multi_head",
        module_of(unswapped, unswapped_merge, F.scaled_dot_product_attention),
        "heads look at heads",
    ),
    ("check_multi_head", module_of(merge=reshape_merge), "merge: swap T and H back"),
    (
        "check_multi_head",
        module_of(split=reshape_split, merge=reshape_merge),
        "still wrong: split, merge",
    ),
    (
        "check_multi_head",
        module_of(order=(2, 1, 0), merge=reshape_merge),
        "still wrong: order, merge",
    ),
    (
        "check_multi_head",
        module_of(split=reshape_split, attend=F.scaled_dot_product_attention),
        "still wrong: split, mask",
    ),
    (
        "check_multi_head",
        module_of(reshape_split, reshape_merge, order=(2, 1, 0)),
        "still wrong: order, split, merge",
    ),
    (
        "check_multi_head",
        module_of(
            reshape_split,
            reshape_merge,
            F.scaled_dot_product_attention,
            order=(2, 1, 0),
        ),
        "still wrong: order, split, mask, merge",
    ),
    ("check_multi_head", module_of(order=(0, 2, 1)), "keys and values are exchanged"),
    ("check_multi_head", AddingX, "return only what is to be added"),
    ("check_multi_head", module_of(attend=wrong_root), "the root of C, not of D"),
    (
        "check_multi_head",
        module_of(attend=lambda q, *kv: fused_attention(q * q.shape[-1] ** 0.5, *kv)),
        "not divided by the root of D",
    ),
    (
        "check_multi_head",
        module_of(
            attend=lambda *qkv: attention(*qkv, causal_mask(len(qkv[0][0, 0])).T)[0]
        ),
        "the mask is transposed",
    ),
    ("check_multi_head", module_of(attend=five_words), "the mask is missing"),
    ("check_causal_attention", five_words, "the mask is missing"),
    (
        "check_multi_head",
        module_of(attend=F.scaled_dot_product_attention),
        "the mask is missing",
    ),
    ("check_multi_head", module_of(order=(1, 0, 2)), "queries and keys are exchanged"),
    ("check_multi_head", module_of(order=(2, 1, 0)), "the first third of qkv"),
    ("check_multi_head", module_of(project=False), "the projection is missing"),
    ("check_multi_head", module_of(attend=scaled(1.1)), "differ from one after"),
    ("check_multi_head", Narrow, "3 heads differ from one after"),
    ("check_multi_head", module_of(attend=zero_is_hidden), "4 heads differ from one"),
    ("check_multi_head", module_of(attend=weights_detached), "the gradient of x"),
    ("check_multi_head", module_of(attend=queries_detached), "the gradient of x"),
    ("check_multi_head", Ending, "the gradient of x is wrong: was a part detached?"),
    ("check_multi_head", Unlearning, "the gradient of x is wrong"),
    ("check_multi_head", Frozen, "the gradient of qkv.bias is wrong"),
    ("check_multi_head", MaskedInTraining, "after eval() the result is another"),
    ("check_multi_head", DropsInUse, "after eval() the result is another"),
    ("check_multi_head", Wasteful, "parameters, not 4 C^2 + 4 C"),
    ("check_grouped_attention", all_at_once, "6 queries, 2 keys"),
    ("check_grouped_attention", by_count_of_keys, "6 queries, 2 keys"),
    ("check_grouped_attention", always_three, "6 queries, 1 keys"),
    ("check_grouped_attention", fused_attention, "shared 2 keys: bring them to 6"),
    (
        "check_grouped_attention",
        lambda q, *kv: fused_attention(q, *(t.repeat_interleave(3, 1) for t in kv)),
        "shared 3 keys: bring them to 6",
    ),
    ("check_grouped_attention", first_or_last, "heads with repeated keys"),
    ("check_grouped_attention", repeated, "heads 0 and 2 share a key"),
    (
        "check_grouped_attention",
        lambda *qkv: attention(*spread(*qkv), causal_mask(5)),
        "return the contexts only",
    ),
    (
        "check_grouped_attention",
        lambda *qkv: attention(*spread(*qkv))[0],
        "the mask is missing",
    ),
    (
        "check_grouped_attention",
        lambda q, k, v: fused_attention(*spread(1.1 * q, k, v)),
        "differs from heads with repeated keys",
    ),
    (
        "check_grouped_attention",
        lambda q, k, v: fused_attention(q[:, :2], k, v),
        "(2, 2, 5, 3)",
    ),
]


@pytest.mark.parametrize(("check", "wrong", "message"), WRONG)
def test_check_names_the_mistake(check, wrong, message):
    with pytest.raises(AssertionError) as caught:
        getattr(checks, check)(wrong)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda m, x: contributions(m, x) + m.projection.bias, "each head added"),
        (rows_taken, "rows of weight were taken: it is (out, in)"),
        (
            lambda m, x: contributions(m, x, F.scaled_dot_product_attention),
            "the mask is missing",
        ),
        (lambda m, x: contributions(m, x, zero_is_hidden), "don't sum to the output"),
        (lambda m, x: contributions(m, 2 * x), "don't sum to the output"),
        (lambda m, x: contributions(m, x).flip(1), "and yet it adds something"),
        (lambda m, x: contributions(m, x)[:, :1], "(B, H, T, C)"),
        (lambda m, x: contributions(m, x)[:, [0, 2, 1, 3]], "head 1 was cut off"),
        (last_under_the_second, "head 1 was cut off"),
        (always_four_heads, "right with 4 heads, wrong with 3"),
    ],
)
def test_wrong_contributions_are_named(wrong, message):
    with pytest.raises(AssertionError) as caught:
        checks.check_contributions(wrong)
    assert message in str(caught.value)


def test_contributions_of_three_heads_only_are_refused():
    def cut_in_three(module, x):
        parts = module.qkv(x).chunk(3, dim=-1)
        contexts = fused_attention(*(split_heads(part, module.heads) for part in parts))
        weights = module.projection.weight.chunk(3, dim=-1)
        pieces = zip(contexts.unbind(1), weights, strict=False)
        return torch.stack([piece @ weight.mT for piece, weight in pieces], dim=1)

    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        checks.check_contributions(cut_in_three)
