"""Masks and attention: parity, properties, and checks that name mistakes."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from glassgpt.attention import attention, causal_mask
from glassgpt.checks import attention as checks

sizes = st.integers(1, 6)


def random_tensor(*shape, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64)


def causal(x):
    return attention(x, x, x, causal_mask(x.shape[-2]))[0]


def test_package_passes_its_checks():
    checks.check_causal_mask(causal_mask)
    checks.check_attention(attention)
    checks.check_causal(causal)
    checks.check_causal(causal, width=7)
    checks.check_no_nan(attention)
    checks.check_permutation_equivariant(lambda x: attention(x, x, x)[0])


@given(
    leading=st.lists(st.integers(1, 3), max_size=2),
    queries=sizes,
    keys=sizes,
    width=sizes,
    values=sizes,
    masked=st.booleans(),
    seed=st.integers(0, 2**31),
)
@settings(deadline=None)
def test_equals_torch_on_random_shapes(
    leading, queries, keys, width, values, masked, seed
):
    q = random_tensor(*leading, queries, width, seed=seed, scale=3)
    k = random_tensor(*leading, keys, width, seed=seed + 1, scale=3)
    v = random_tensor(*leading, keys, values, seed=seed + 2)
    mask = random_tensor(queries, keys, seed=seed + 3) > 0 if masked else None
    context, weights = attention(q, k, v, mask)
    wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(context, wanted, atol=1e-12, rtol=0)
    sums = weights.sum(-1)
    allowed = torch.ones(queries).bool() if mask is None else mask.any(-1)
    torch.testing.assert_close(sums, allowed.double().expand_as(sums))


def test_gradients_equal_torch():
    inputs = [random_tensor(2, 5, 4, seed=s).requires_grad_() for s in range(3)]
    mask = causal_mask(5)
    upstream = random_tensor(2, 5, 4, seed=9)
    ours = torch.autograd.grad((attention(*inputs, mask)[0] * upstream).sum(), inputs)
    theirs = F.scaled_dot_product_attention(*inputs, attn_mask=mask)
    theirs = torch.autograd.grad((theirs * upstream).sum(), inputs)
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)


@given(st.integers(0, 8))
def test_causal_mask_compares_positions(size):
    mask = causal_mask(size)
    assert mask.dtype == torch.bool
    assert mask.tolist() == [[s <= t for s in range(size)] for t in range(size)]


def test_leading_axes_of_inputs_and_mask_broadcast():
    q, k = random_tensor(2, 1, 3, 4), random_tensor(5, 3, 4, seed=1)
    v = random_tensor(3, 2, seed=2)
    mask = random_tensor(2, 1, 1, 3, seed=3) > 0
    context, weights = attention(q, k, v, mask)
    assert (context.shape, weights.shape) == ((2, 5, 3, 2), (2, 5, 3, 3))
    one = attention(q[1, 0], k[4], v, mask[1, 0])[0]
    torch.testing.assert_close(context[1, 4], one)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_its_dtype_and_does_not_overflow(dtype):
    x = torch.full((3, 64), 64.0, dtype=dtype)  # a dot product of 262,144
    context, weights = attention(x, x, x)
    assert context.dtype == weights.dtype == dtype
    assert context.isfinite().all()


@pytest.mark.parametrize("x", [1e30, -1e30])
def test_huge_inputs_with_hidden_rows_give_no_nan(x):
    text = torch.tensor([[x], [1.0], [-x]], dtype=torch.float64)
    mask = causal_mask(3)
    mask[1] = False
    context, weights = attention(text, text, text, mask)
    assert context.isfinite().all()
    assert weights[1].tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("shapes", "mask", "message"),
    [
        ([(3, 4), (3, 5), (3, 4)], None, "must have the same width"),
        ([(3, 4), (3, 4), (2, 4)], None, "each key needs one value"),
        ([(4,), (3, 4), (3, 4)], None, r"need the axes \(..., T, C\)"),
        ([(2, 3, 4), (3, 3, 4), (3, 4)], None, "before the last two must broadcast"),
        ([(3, 4)] * 3, torch.zeros(3, 3), "must be bool .*, not torch.float32"),
        ([(3, 4)] * 3, torch.ones(3, 2).bool(), r"mask \(3, 2\) must broadcast"),
        ([(3, 4)] * 3, torch.ones(2, 3, 3).bool(), r"to the scores \(3, 3\)"),
    ],
)
def test_bad_input_is_refused(shapes, mask, message):
    with pytest.raises(ValueError, match=message):
        attention(*(torch.zeros(shape) for shape in shapes), mask)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_it_equals_the_cpu():
    x = random_tensor(2, 5, 4)
    mask = causal_mask(5, device="cuda")
    context, _ = attention(x.cuda(), x.cuda(), x.cuda(), mask)
    torch.testing.assert_close(context.cpu(), attention(x, x, x, mask.cpu())[0])


# Wrong versions. Each check must notice, and say which mistake it was.


def square(size):
    return torch.ones(size, size, dtype=torch.bool)


def variant(
    divide=math.sqrt, axis=-1, use=lambda mask: mask, hide=-math.inf, repair=None
):
    """An attention with parts exchanged."""

    def attend(queries, keys, values, mask=None):
        scores = queries @ keys.transpose(-2, -1) / divide(queries.shape[-1])
        if mask is not None and use(mask) is not None:
            scores = scores + torch.where(use(mask), 0.0, hide)
        weights = scores.softmax(axis)
        weights = weights if repair is None else repair(weights)
        return weights @ values, weights

    return attend


def mask_after(queries, keys, values, mask=None):
    _, weights = attention(queries, keys, values)
    weights = weights if mask is None else weights * mask
    return weights @ values, weights


def keys_mixed(queries, keys, values, mask=None):
    return attention(queries, keys, keys, mask)


def other_context(queries, keys, values, mask=None):
    context, weights = attention(queries, keys, values, mask)
    return context / 2, weights


def rounded(queries, keys, values, mask=None):
    context, weights = attention(queries.float(), keys.float(), values.float(), mask)
    return context.double(), weights.double()


def nan_to_average(queries, keys, values, mask):
    context, weights = attention(queries, keys, values, mask)
    return context + ~mask.any(-1, keepdim=True), weights


def masked(mask):
    return lambda x: attention(x, x, x, mask)[0]


def streamed(combine):
    def streaming(queries, pairs):
        return combine([attention(queries, *pair)[0] for pair in pairs])

    return streaming


def overflowing(queries, pairs):
    keys, values = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    powers = (queries @ keys.T / 2).exp()
    return powers @ values / powers.sum(-1, keepdim=True)


def previous(size, shift=1, scale=100.0):
    return scale * torch.eye(size).roll(shift, dims=0), torch.eye(size)


def plain_softmax(queries, keys, values, mask=None):
    """Softmax without subtracting the peak."""
    scores = queries @ keys.transpose(-2, -1) / math.sqrt(queries.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
    return weights @ values, weights


def masked_afterwards(queries, keys, values, mask=None):
    """On paper the same: hide after the softmax, and divide by the new sum."""
    _, weights = attention(queries, keys, values)
    if mask is not None:
        weights = weights * mask
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-20)
    return weights @ values, weights


def other_weights(queries, keys, values, mask=None):
    context, weights = attention(queries, keys, values, mask)
    return context, weights if mask is None else (4 * weights).softmax(-1) * mask


def in_place(queries, keys, values, mask=None):
    queries /= math.sqrt(queries.shape[-1])
    return attention(queries * math.sqrt(queries.shape[-1]), keys, values, mask)


def kept_for_later(queries, pairs):
    keys, values = zip(*pairs, strict=True)
    return attention(queries, torch.cat(keys), torch.cat(values))[0]


WRONG = [
    ("check_attention", plain_softmax, "subtract each row's peak"),
    ("check_attention", masked_afterwards, "mask before the softmax"),
    ("check_attention", other_weights, "weights"),
    ("check_attention", in_place, "work on a copy"),
    (
        "check_window_mask",
        lambda size, window: causal_mask(size).triu(-(window // 2)),
        "count them",
    ),
    (
        "check_previous_word",
        lambda size: (20 * torch.eye(size).roll(1, dims=0), torch.eye(size)),
        "row 299 of 300",
    ),
    ("check_previous_word", lambda size: previous(6, 1), "not 300 of each"),
    ("check_streaming_attention", kept_for_later, "keep no chunk for later"),
    (
        "check_streaming_attention",
        lambda queries, pairs: torch.zeros(3, 2, dtype=torch.float32),
        "makes torch.float32",
    ),
    ("check_causal_mask", lambda size: square(size).triu(), "upside down"),
    ("check_causal_mask", lambda size: square(size).triu(1), "True marks the future"),
    ("check_causal_mask", lambda size: square(size).tril(-1), "a word sees itself"),
    ("check_causal_mask", square, "for 3 words: [[1, 1, 1]"),
    ("check_causal_mask", lambda size: square(size).float(), "must be bool"),
    ("check_attention", variant(divide=lambda width: 1), "not divided by the root"),
    ("check_attention", variant(divide=lambda width: width), "its square root"),
    ("check_attention", variant(divide=lambda width: width / 3), "weights of tower"),
    ("check_attention", variant(axis=-2), "wrong axis"),
    ("check_attention", variant(use=lambda mask: None), "mask was ignored"),
    ("check_attention", variant(use=lambda mask: ~mask), "True means 'may look'"),
    ("check_attention", variant(hide=-1.0), "a hidden position has a weight"),
    ("check_attention", mask_after, "mask before the softmax, not after"),
    ("check_attention", keys_mixed, "keys were mixed, not values"),
    ("check_attention", other_context, "context is weights @ values"),
    ("check_attention", rounded, "differs from PyTorch's attention"),
    ("check_causal", masked(None), "row 0 looks at position 1"),
    (
        "check_causal",
        lambda x: masked(square(5).tril())(x.mul_(0.5)),
        "work on a copy",
    ),
    ("check_causal", masked(square(5).tril(1)), "row 0 looks at position 1"),
    ("check_causal", masked(square(5).triu()), "row 1 does not see position 0"),
    ("check_causal", masked(square(5).tril(-1)), "row 0 does not see position 0"),
    (
        "check_causal",
        lambda x: mask_after(x, x, x, causal_mask(5))[0],
        "row 0 looks at position 1: the mask lets the future through",
    ),
    ("check_no_nan", variant(), "gets nan"),
    ("check_no_nan", variant(hide=-1e9), "not a large number"),
    ("check_no_nan", variant(repair=lambda w: w.nan_to_num(0)), "gradient is nan"),
    ("check_no_nan", nan_to_average, "must get zeros"),
    ("check_permutation_equivariant", causal, "something here knows the order"),
    (
        "check_permutation_equivariant",
        lambda x: x + torch.arange(5.0)[:, None],
        "from position 3 to 0",
    ),
    (
        "check_window_mask",
        lambda size, window: square(size).tril().triu(-window),
        "one position too many",
    ),
    (
        "check_window_mask",
        lambda size, window: square(size).triu(1 - window),
        "future is not hidden",
    ),
    (
        "check_window_mask",
        lambda size, window: square(size).tril(-1).triu(-window),
        "may not look at itself",
    ),
    ("check_window_mask", lambda size, window: causal_mask(size), "window 2 sees"),
    (
        "check_window_mask",
        lambda size, window: square(size).tril().triu(-1),
        "wider than the text",
    ),
    ("check_window_mask", lambda size, window: square(size).int(), "must be bool"),
    ("check_previous_word", lambda size: previous(size, 0), "looks at itself"),
    ("check_previous_word", lambda size: previous(size, 2), "not at"),
    ("check_previous_word", lambda size: previous(size, 1, 2.0), "scores larger"),
    ("check_streaming_attention", streamed(lambda c: c[-1]), "only the last chunk"),
    (
        "check_streaming_attention",
        streamed(lambda c: torch.stack(c).mean(0)),
        "divide once, at the end",
    ),
    ("check_streaming_attention", overflowing, "own peak so far"),
]


@pytest.mark.parametrize("width", [4, 128, 384, 768, 1024])
def test_causal_check_takes_attention_of_any_width(width):
    checks.check_causal(lambda x: attention(x, x, x, causal_mask(5))[0], width)
    with pytest.raises(AssertionError, match="row 0 looks at position 1"):
        checks.check_causal(lambda x: attention(x, x, x)[0], width)


def test_no_keys_are_refused():
    x = torch.ones(2, 4)
    with pytest.raises(ValueError, match="no key to look at"):
        attention(x, x[:0], x[:0])


@pytest.mark.parametrize(("check", "wrong", "message"), WRONG)
def test_check_names_the_mistake(check, wrong, message):
    with pytest.raises(AssertionError) as caught:
        getattr(checks, check)(wrong)
    assert message in str(caught.value)
