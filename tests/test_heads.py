"""Heads and multi-head attention: parity with PyTorch, properties, bad input."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from glassgpt.attention import attention, causal_mask
from glassgpt.checks import heads as checks
from glassgpt.checks.attention import check_causal
from glassgpt.heads import (
    MultiHeadAttention,
    fused_attention,
    merge_heads,
    short_attention,
    split_heads,
)
from glassgpt.positions import apply_rotary, rotary_tables

seeds = st.integers(0, 2**31)
few = st.integers(1, 4)


def random_tensor(*shape, seed=0, dtype=torch.float64):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=random, dtype=dtype)


def make(width=8, heads=2, seed=0, **options):
    torch.manual_seed(seed)
    return MultiHeadAttention(width, heads, **options).double()


def test_package_passes_its_checks():
    checks.check_split_heads(split_heads)
    checks.check_merge_heads(merge_heads)
    checks.check_causal_attention(short_attention)
    checks.check_causal_attention(fused_attention)
    checks.check_fused_attention(fused_attention)
    checks.check_multi_head(MultiHeadAttention)
    checks.check_rotary_heads(MultiHeadAttention)


def test_checks_leave_the_random_state_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    checks.check_multi_head(MultiHeadAttention)
    checks.check_rotary_heads(MultiHeadAttention)
    assert torch.equal(torch.get_rng_state(), before)


@given(few, few, few, few, seeds)
@settings(deadline=None)
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


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: split_heads(torch.zeros(1, 2, 4), 3), "width 4 can't be split into 3"),
        (lambda: split_heads(torch.zeros(1, 2, 4), 0), "into 0 heads"),
        (lambda: split_heads(torch.zeros(2, 4), 2), r"axes \(B, T, C\).*\(2, 4\)"),
        (lambda: merge_heads(torch.zeros(2, 2, 4)), r"axes \(B, H, T, C / H\)"),
        (lambda: MultiHeadAttention(6, 4), "width 6 is not divisible by 4 heads"),
        (lambda: MultiHeadAttention(4, 0), "width 4 is not divisible by 0 heads"),
        (lambda: MultiHeadAttention(0, 1), "width 0"),
        (lambda: MultiHeadAttention(4, 2, dropout=1.0), "dropout must lie in"),
        (lambda: MultiHeadAttention(4, 2, dropout=math.nan), "dropout must lie in"),
        (lambda: make()(random_tensor(1, 3, 4)), r"x must be \(B, T, 8\)"),
        (lambda: make()(random_tensor(3, 8)), r"axes \(B, T, C\)"),
    ],
)
def test_bad_sizes_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@given(few, few, st.integers(1, 9), few, seeds)
@settings(deadline=None)
def test_both_kernels_equal_the_plain_version(B, H, T, size, seed):
    q, k, v = (random_tensor(B, H, T, size, seed=seed + i) for i in range(3))
    wanted, _ = attention(q, k, v, causal_mask(T))
    for attend in (short_attention, fused_attention):
        torch.testing.assert_close(attend(q, k, v), wanted, atol=1e-12, rtol=0)


@pytest.mark.parametrize("attend", [short_attention, fused_attention])
def test_gradients_equal_the_plain_version(attend):
    inputs = [random_tensor(2, 3, 7, 4, seed=s).requires_grad_() for s in range(3)]
    upstream = random_tensor(2, 3, 7, 4, seed=9)
    found = torch.autograd.grad((attend(*inputs) * upstream).sum(), inputs)
    plain = attention(*inputs, causal_mask(7))[0]
    wanted = torch.autograd.grad((plain * upstream).sum(), inputs)
    torch.testing.assert_close(found, wanted, atol=1e-12, rtol=0)


@given(few, st.integers(1, 5), st.integers(1, 5), seeds)
@settings(deadline=None)
def test_a_mask_alone_decides(H, T, S, seed):
    q = random_tensor(2, H, T, 4, seed=seed)
    k, v = (random_tensor(2, H, S, 4, seed=seed + i) for i in (1, 2))
    mask = random_tensor(2, 1, T, S, seed=seed + 3) > 0
    wanted, _ = attention(q, k, v, mask)
    # A row that may look nowhere included: zeros, never NaN.
    found = fused_attention(q, k, v, mask)
    torch.testing.assert_close(found, wanted, atol=1e-12, rtol=0)


def test_a_single_query_sees_all_keys():
    q, k, v = random_tensor(1, 2, 1, 4), *random_tensor(2, 1, 2, 5, 4, seed=1)
    wanted, _ = attention(q, k, v)
    torch.testing.assert_close(fused_attention(q, k, v), wanted)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (None, "2 queries against 5 keys need a mask"),
        (torch.zeros(2, 5), "mask must be bool"),
        (torch.ones(2, 5, dtype=torch.int64), "mask must be bool"),
    ],
)
def test_fused_attention_refuses(mask, message):
    q, k = random_tensor(1, 2, 2, 4), random_tensor(1, 2, 5, 4)
    with pytest.raises(ValueError, match=message):
        fused_attention(q, k, k, mask)


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
@pytest.mark.parametrize("options", [{}, {"normalize_qk": True}, {"bias": False}])
@pytest.mark.parametrize("training", [True, False])
def test_causal(heads, options, training):
    torch.manual_seed(0)
    check_causal(MultiHeadAttention(4, heads, **options).train(training))


def test_causal_beyond_the_short_contexts():
    module, x = make(), random_tensor(1, 300, 8)
    other = x.clone()
    other[:, 290:] = 0
    moved = (module(x) - module(other)).abs().amax(-1)[0]
    assert moved[:290].max() < 1e-12
    assert moved[290:].min() > 0


@pytest.mark.parametrize("bias", [True, False])
def test_parameters_do_not_depend_on_the_number_of_heads(bias):
    for heads in (1, 3, 12):
        module = MultiHeadAttention(12, heads, bias=bias)
        count = sum(parameter.numel() for parameter in module.parameters())
        assert count == 4 * 12**2 + 4 * 12 * bias


def test_normalized_queries_and_keys_have_no_size():
    module, x = make(bias=False, normalize_qk=True), random_tensor(1, 5, 8)
    before = module(x)
    with torch.no_grad():
        module.qkv.weight[:16] *= 100
    # Not exactly, for rms_norm adds a tiny number inside its root.
    torch.testing.assert_close(module(x), before, atol=1e-9, rtol=0)


def test_rotary_turns_each_head_alike():
    module, x = make(), random_tensor(2, 5, 8)
    tables = rotary_tables(5, 4)
    queries, keys, values = module.qkv(x).split(8, dim=-1)
    contexts = []
    for columns in (slice(0, 4), slice(4, 8)):
        q, k = (apply_rotary(part[..., columns], *tables) for part in (queries, keys))
        contexts.append(attention(q, k, values[..., columns], causal_mask(5))[0])
    wanted = module.projection(torch.cat(contexts, -1))
    torch.testing.assert_close(module(x, tables), wanted, atol=1e-12, rtol=0)


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


@pytest.mark.parametrize("start", [1, 4])
def test_a_cache_gives_the_same_vectors(start):
    module, x, cache = make(normalize_qk=True).eval(), random_tensor(2, 9, 8), None
    cos, sin = rotary_tables(9, 4)
    wanted, cache = module(x, (cos, sin)), ListCache()
    found = [module(x[:, :start], (cos[:start], sin[:start]), cache=cache)]
    for t in range(start, 9):
        rotary = (cos[t : t + 1], sin[t : t + 1])
        found.append(module(x[:, t : t + 1], rotary, cache=cache))
    torch.testing.assert_close(torch.cat(found, 1), wanted, atol=1e-12, rtol=0)


def test_dropout_acts_in_training_only():
    module, x = make(dropout=0.5), random_tensor(1, 6, 8)
    plain = make()
    assert not torch.allclose(module(x), plain(x))
    torch.testing.assert_close(module.eval()(x), plain(x))


def test_compiles_whole_for_any_length():
    module = make()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for T in (5, 300, 310, 257, 256, 1):
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


def careless_split(x, heads):
    B, T, C = x.shape
    return x.view(B, T, heads, C // heads).transpose(1, 2)


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


def any_mask(q, k, v, mask=None):
    mask = mask if mask is None or mask.dtype == torch.bool else mask > 0
    return fused_attention(q, k, v, mask)


def any_keys(q, k, v, mask=None):
    if mask is None and q.shape[-2] != k.shape[-2]:
        return F.scaled_dot_product_attention(q, k, v)
    return fused_attention(q, k, v, mask)


def module_of(split=split_heads, merge=merge_heads, attend=fused_attention, **changes):
    order, project = changes.get("order", (0, 1, 2)), changes.get("project", True)

    class Made(MultiHeadAttention):
        def forward(self, x, rotary=None):
            parts = self.qkv(x).chunk(3, dim=-1)
            heads = [split(parts[i], self.heads) for i in order]
            if rotary is not None:
                turned = changes.get("turned", (0, 1))
                for i in turned:
                    heads[i] = apply_rotary(heads[i], *rotary)
            merged = merge(attend(*heads))
            return self.projection(merged) if project else merged

    return Made


def wrong_root(q, k, v):
    return fused_attention(q / math.sqrt(q.shape[1]), k, v)


class Lenient(MultiHeadAttention):
    def __init__(self, width, heads):
        super().__init__(width, heads if width % heads == 0 else 1)


class Wasteful(MultiHeadAttention):
    def __init__(self, width, heads):
        super().__init__(width, heads)
        self.unused = nn.Linear(width, heads)


def repeated(q, k, v):
    return short_attention(q, k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1))


def spread(q, k, v):
    return q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)


WRONG = [
    ("check_split_heads", reshape_split, "holds column 2 of position 0: view(B, H"),
    ("check_split_heads", dealt_split, "head 0 of position 0 holds column 2, not 1"),
    ("check_split_heads", careless_split, "width 4 in 3 heads: no ValueError"),
    ("check_split_heads", lambda x, h: split_heads(x.flip(0), h), "of text 1"),
    ("check_split_heads", lambda x, h: split_heads(x, h)[:, :1], "shape (2, 1, 3, 2)"),
    ("check_merge_heads", reshape_merge, "rows mix positions"),
    ("check_merge_heads", lambda x: merge_heads(x.flip(1)), "not side by side"),
    ("check_merge_heads", lambda x: x.flatten(1), "shape (2, 12)"),
    ("check_causal_attention", F.scaled_dot_product_attention, "mask is missing"),
    (
        "check_causal_attention",
        lambda q, k, v: attention(q, k, v, causal_mask(5).T)[0],
        "upside down",
    ),
    ("check_causal_attention", scaled(2.0), "not divided by the root of C / H"),
    ("check_causal_attention", wrong_root, "divided by the root of C: take"),
    ("check_causal_attention", scaled(1.1), "differs from the plain attention"),
    ("check_causal_attention", lambda *qkv: attention(*qkv)[0][:1], "shape changed"),
    ("check_fused_attention", scaled(2.0), "not divided by the root of C / H"),
    ("check_fused_attention", also_causal, "must see the future too"),
    ("check_fused_attention", turned_mask, "must see the future too"),
    ("check_fused_attention", turned_some, "the mask is turned round"),
    ("check_fused_attention", ignored_mask, "the mask is ignored"),
    ("check_fused_attention", first_corner, "a single query is the last position"),
    ("check_fused_attention", any_keys, "2 queries, 5 keys and no mask"),
    ("check_fused_attention", any_mask, "a mask that isn't bool"),
    ("check_multi_head", module_of(split=reshape_split), "split: view(B, H, T, C / H)"),
    ("check_multi_head", module_of(merge=reshape_merge), "merge: swap T and H back"),
    ("check_multi_head", module_of(attend=wrong_root), "the root of C, not of C / H"),
    (
        "check_multi_head",
        module_of(attend=F.scaled_dot_product_attention),
        "the mask is missing",
    ),
    ("check_multi_head", module_of(order=(1, 0, 2)), "queries and keys are exchanged"),
    ("check_multi_head", module_of(order=(2, 1, 0)), "the first third of qkv"),
    ("check_multi_head", module_of(project=False), "the projection is missing"),
    ("check_multi_head", module_of(attend=scaled(1.1)), "differ from one after"),
    ("check_multi_head", Wasteful, "parameters, not 4 C^2 + 4 C"),
    ("check_multi_head", Lenient, "width 4, 3 heads: no ValueError"),
    ("check_rotary_heads", module_of(turned=(0, 1, 2)), "and not the values"),
    ("check_rotary_heads", module_of(turned=(0,)), "turn queries and keys, both"),
    ("check_rotary_heads", module_of(turned=()), "the rotary tables were ignored"),
    ("check_grouped_attention", repeated, "heads 0 and 2 share a key"),
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
        lambda q, k, v: short_attention(q[:, :2], k, v),
        "the shape is (2, 2, 5, 3)",
    ),
]


@pytest.mark.parametrize(("check", "wrong", "message"), WRONG)
def test_check_names_the_mistake(check, wrong, message):
    with pytest.raises(AssertionError) as caught:
        getattr(checks, check)(wrong)
    assert message in str(caught.value)


def contributions(module, x):
    parts = module.qkv(x).chunk(3, dim=-1)
    context = short_attention(*(split_heads(part, module.heads) for part in parts))
    weights = module.projection.weight.chunk(module.heads, dim=-1)
    pieces = zip(context.unbind(1), weights, strict=True)
    return torch.stack([piece @ weight.T for piece, weight in pieces], dim=1)


def test_contributions_are_checked():
    checks.check_contributions(contributions, MultiHeadAttention)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda m, x: contributions(m, x) + m.projection.bias, "each head added"),
        (lambda m, x: contributions(m, 2 * x), "don't sum to the output"),
        (lambda m, x: contributions(m, x).flip(1), "and yet it adds something"),
        (lambda m, x: contributions(m, x)[:, :1], "(B, H, T, C)"),
    ],
)
def test_wrong_contributions_are_named(wrong, message):
    with pytest.raises(AssertionError) as caught:
        checks.check_contributions(wrong, MultiHeadAttention)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("dtype", "T", "short"),
    [
        (torch.bfloat16, 256, True),
        (torch.bfloat16, 257, False),
        (torch.float32, 8, False),
        (torch.float64, 8, True),
    ],
)
def test_which_kernel_a_cpu_takes(monkeypatch, dtype, T, short):
    taken = []
    monkeypatch.setattr(
        "glassgpt.heads.short_attention",
        lambda q, k, v: taken.append(q.dtype) or fused_attention(q, k, v),
    )
    MultiHeadAttention(8, 2).to(dtype)(torch.zeros(1, T, 8, dtype=dtype))
    assert bool(taken) == short
