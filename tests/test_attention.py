"""Masks and attention: parity, properties, and checks that name mistakes."""

import gc
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from glassgpt.attention import attention, causal_mask
from glassgpt.checks import attention as checks
from glassgpt.softmax import softmax

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
def test_equals_torch_on_random_shapes(
    leading, queries, keys, width, values, masked, seed
):
    q = random_tensor(*leading, queries, width, seed=seed, scale=3)
    k = random_tensor(*leading, keys, width, seed=seed + 1, scale=3)
    v = random_tensor(*leading, keys, values, seed=seed + 2)
    mask = random_tensor(queries, keys, seed=seed + 3) > 0 if masked else None
    if mask is not None:
        mask[:, 0] = True  # somewhere to look
    context, weights = attention(q, k, v, mask)
    wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(context, wanted, atol=1e-12, rtol=0)
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))


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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_result_keeps_its_dtype(dtype):
    x = random_tensor(3, 8).to(dtype)
    context, weights = attention(x, x, x, causal_mask(3))
    assert context.dtype == weights.dtype == dtype
    assert context.isfinite().all()


@pytest.mark.parametrize("x", [1e30, -1e30])
def test_huge_inputs_give_no_nan(x):
    text = torch.tensor([[x], [1.0], [-x]], dtype=torch.float64)
    context, weights = attention(text, text, text, causal_mask(3))
    assert context.isfinite().all()
    assert weights.sum(-1).tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("shapes", "mask"),
    [
        ([(3, 4), (3, 5), (3, 4)], None),
        ([(3, 4), (3, 4), (2, 4)], None),
        ([(2, 3, 4), (3, 3, 4), (3, 4)], None),
        ([(3, 4), (0, 4), (0, 4)], None),
        ([(3, 4)] * 3, torch.ones(3, 2).bool()),
        # Other programs mean other things by a mask of numbers: never guess.
        ([(3, 4)] * 3, torch.zeros(3, 3)),
        ([(3, 4)] * 3, torch.ones(3, 3).long()),
    ],
)
def test_bad_input_is_refused(shapes, mask):
    with pytest.raises((RuntimeError, TypeError, IndexError)):
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


def four_axes(queries, keys, values, mask=None):
    scores = torch.einsum("bhtc,bhsc->bhts", queries, keys) / keys.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    weights = softmax(scores)
    return weights @ values, weights


def one_more_axis(queries, keys, values, mask=None):
    context, weights = attention(queries, keys, values, mask)
    return context if context.dim() == 4 else context[None], weights


def masked_from_the_left(queries, keys, values, mask=None):
    return attention(queries, keys, values, None if mask is None else mask[None, None])


def mask_of_the_first_text(queries, keys, values, mask=None):
    first = mask[:1] if mask is not None and mask.dim() == 4 else mask
    return attention(queries, keys, values, first)


def mask_after(queries, keys, values, mask=None):
    _, weights = attention(queries, keys, values)
    weights = weights if mask is None else weights * mask
    return weights @ values, weights


def filled_with_zero(queries, keys, values, mask=None):
    scores = queries @ keys.mT / math.sqrt(queries.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, 0.0)
    weights = scores.softmax(-1)
    return weights @ values, weights


def keys_mixed(queries, keys, values, mask=None):
    return attention(queries, keys, keys, mask)


def unscaled_with_mask(queries, keys, values, mask=None):
    return attention(queries * (1 if mask is None else 8**0.5), keys, values, mask)


def other_context(queries, keys, values, mask=None):
    context, weights = attention(queries, keys, values, mask)
    return context / 2, weights


def sum_detached(queries, keys, values, mask=None):
    scores = queries @ keys.mT / math.sqrt(queries.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    peak = scores.amax(-1, keepdim=True).clamp(min=-1e9)
    powers = (scores - peak).exp()
    weights = powers / powers.sum(-1, keepdim=True).clamp(min=0.5).detach()
    return weights @ values, weights


def mixed_types(queries, keys, values, mask=None):
    context, weights = attention(queries, keys, values, mask)
    return context.float(), weights


def masked(mask):
    return lambda x: attention(x, x, x, mask)[0]


def averaged(queries, pairs):
    contexts = 0.0
    for pair in pairs:
        contexts = contexts + attention(queries, *pair)[0]
    return contexts / 30


def last_only(queries, pairs):
    for pair in pairs:
        context, _ = attention(queries, *pair)
    return context


def copied(queries, pairs):
    copies = [(keys.clone(), values.clone()) for keys, values in pairs]
    return kept_for_later(queries, copies)


def scaling_in_place(queries, pairs):
    queries /= math.sqrt(queries.shape[-1])
    return streaming(queries, pairs, root=1.0)


def streaming(
    queries, pairs, root=None, dtype=None, rescale=True, peaks=True, start=-math.inf
):
    """A right version with parts that can be left out."""
    root = root or math.sqrt(queries.shape[-1])
    total = torch.zeros(len(queries), 1, dtype=dtype or queries.dtype)
    mixture = torch.zeros(len(queries), 1, dtype=dtype or queries.dtype)
    peak = torch.full((len(queries), 1), start)
    for keys, values in pairs:
        scores = queries @ keys.T / root
        higher = torch.maximum(peak, scores.amax(-1, keepdim=True))
        higher = higher if peaks else torch.zeros_like(peak)
        shrink = (peak - higher).exp() if rescale and peaks else 1.0
        powers = (scores - higher).exp()
        total = total * shrink + powers.sum(-1, keepdim=True)
        mixture = mixture * shrink + (powers @ values).to(mixture.dtype)
        peak = higher
    return mixture / total


def in_place_streaming(queries, pairs):
    total, mixture = torch.zeros(len(queries), 1), torch.zeros(len(queries), 2)
    peak = torch.full((len(queries), 1), -1e30)
    for keys, values in pairs:
        scores = queries @ keys.T / math.sqrt(queries.shape[-1])
        higher = torch.maximum(peak, scores.amax(-1, keepdim=True))
        powers = (scores - higher).exp()
        for kept, new in ((total, powers.sum(-1, True)), (mixture, powers @ values)):
            kept *= (peak - higher).exp()
            kept += new
        peak.copy_(higher)
    return mixture.div_(total)


def previous(size, shift=1, scale=100.0):
    return scale * torch.eye(size).roll(shift, dims=0), torch.eye(size)


def previous_by_angle(size):
    """Another way: positions on a circle, turned by one step."""
    angles = torch.arange(size + 1, dtype=torch.float64) * (2 * math.pi / (size + 1))
    circle = torch.stack([angles.cos(), angles.sin()], -1)
    return 1e9 * circle.roll(1, 0)[:size], circle[:size]


def plain_softmax(queries, keys, values, mask=None):
    """Softmax without subtracting the peak."""
    scores = queries @ keys.transpose(-2, -1) / math.sqrt(queries.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    weights = scores.exp() / scores.exp().sum(-1, keepdim=True).clamp(min=1e-20)
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


def float32_softmax(queries, keys, values, mask=None):
    scores = queries @ keys.mT / math.sqrt(queries.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(mask.logical_not(), -math.inf)
    weights = scores.float().softmax(-1).nan_to_num(0).to(values.dtype)
    return weights @ values, weights


def divided_first(queries, keys, values, mask=None):
    scores = (queries * queries.shape[-1] ** -0.5) @ keys.transpose(-1, -2)
    if mask is not None:
        hidden = torch.where(mask, 0.0, -math.inf).to(scores.dtype)
        seen = mask.any(-1, keepdim=True)
        scores = scores + torch.where(seen, hidden, 0.0)
        weights = scores.softmax(-1) * seen
    else:
        weights = scores.softmax(-1)
    return torch.matmul(weights, values), weights


def einsum(queries, keys, values, mask=None):
    scores = torch.einsum("...tc,...sc->...ts", queries, keys)
    scores = scores / keys.shape[-1] ** 0.5
    if mask is not None:
        scores = torch.where(mask, scores, -math.inf)
    peak = scores.amax(-1, keepdim=True).clamp(min=-1e300)
    powers = (scores - peak).exp()
    weights = powers / powers.sum(-1, keepdim=True).clamp(min=1e-9)
    return torch.einsum("...ts,...sd->...td", weights, values), weights


def loop(queries, keys, values, mask=None):
    mask = torch.ones(1, 1).bool() if mask is None else mask
    rows = queries.split(1, dim=-2)
    masks = mask.repeat_interleave(len(rows) // mask.shape[-2], dim=-2).split(1, dim=-2)
    rows = [attention(row, keys, values, m) for row, m in zip(rows, masks, strict=True)]
    context, weights = (torch.cat(parts, -2) for parts in zip(*rows, strict=True))
    return context, weights


RIGHT = [
    ("check_attention", attention),
    ("check_attention", float32_softmax),
    ("check_attention", divided_first),
    ("check_attention", einsum),
    ("check_attention", loop),
    ("check_causal_mask", lambda n: torch.arange(n)[:, None] >= torch.arange(n)),
    ("check_causal_mask", lambda n: torch.ones(n, n).tril() > 0),
    ("check_causal_mask", lambda n: ~torch.ones(n, n).triu(1).bool()),
    ("check_previous_word", lambda n: previous(n, scale=30 * math.sqrt(n))),
    ("check_previous_word", lambda n: previous(n, scale=1e6)),
    ("check_previous_word", lambda n: [part.double() for part in previous(n, 1, 1e5)]),
    ("check_previous_word", lambda n: tuple(c[:, :n] for c in previous(n, 1, 1e4))),
    ("check_previous_word", previous_by_angle),
    ("check_streaming_attention", streaming),
    ("check_streaming_attention", lambda q, p: streaming(q, p, dtype=torch.float64)),
    ("check_streaming_attention", lambda q, p: streaming(q.double(), doubled(p))),
    ("check_streaming_attention", in_place_streaming),
    ("check_permutation_equivariant", lambda x: x),
    ("check_permutation_equivariant", lambda x: x - x.mean(1, keepdim=True)),
    ("check_permutation_equivariant", lambda x: attention(x, 2 * x, x)[0]),
    ("check_causal", causal),
    ("check_causal", lambda x: x.cumsum(1)),
    ("check_causal", lambda x: x + causal(x)),
]


def doubled(pairs):
    return ((keys.double(), values.double()) for keys, values in pairs)


@pytest.mark.parametrize(("check", "right"), RIGHT)
def test_check_lets_right_versions_pass(check, right):
    getattr(checks, check)(right)


WRONG = [
    ("check_attention", plain_softmax, "subtract each row's peak"),
    ("check_attention", masked_afterwards, "mask before it"),
    ("check_attention", other_weights, "weights"),
    ("check_attention", in_place, "work on a copy"),
    ("check_attention", variant(divide=lambda width: 1), "not divided at all"),
    ("check_attention", variant(divide=lambda width: width), "by the width itself"),
    ("check_attention", variant(divide=lambda width: width / 3), "divided by 2.67"),
    ("check_attention", variant(divide=lambda width: 5**0.5), "divided by 2.24"),
    (
        "check_attention",
        lambda q, k, v, mask=None: attention(q * (q.shape[-1] / 8) ** 0.5, k, v, mask),
        "the square root of the width 3",
    ),
    ("check_attention", four_axes, "fails on a single text, queries (T, D)"),
    ("check_attention", one_more_axis, "wrong on a single text, queries (T, D)"),
    ("check_attention", masked_from_the_left, "must broadcast"),
    ("check_attention", mask_of_the_first_text, "in each text of the batch"),
    ("check_attention", variant(axis=-2), "wrong axis"),
    ("check_attention", variant(use=lambda mask: None), "mask was ignored"),
    ("check_attention", variant(use=lambda mask: ~mask), "True means 'may look'"),
    ("check_attention", variant(hide=-1.0), "a hidden position"),
    ("check_attention", filled_with_zero, "a hidden position"),
    ("check_attention", mask_after, "mask before the softmax"),
    (
        "check_attention",
        variant(repair=lambda w: w.nan_to_num(0).detach()),
        "the queries get a wrong gradient",
    ),
    (
        "check_attention",
        lambda q, k, v, mask=None: attention(q, k.detach(), v, mask),
        "the keys get a wrong gradient",
    ),
    (
        "check_attention",
        lambda q, k, v, mask=None: attention(q, k, v.detach(), mask),
        "the values get a wrong gradient",
    ),
    ("check_attention", sum_detached, "the queries get a wrong gradient"),
    (
        "check_attention",
        lambda *given: tuple(part.detach() for part in attention(*given)),
        "the queries get a wrong gradient",
    ),
    ("check_attention", keys_mixed, "mix the values, not the keys"),
    ("check_attention", other_context, "context is weights @ values"),
    ("check_attention", mixed_types, "it makes torch.float32"),
    ("check_attention", lambda q, k, v, mask=None: (v, v), "weights have shape"),
    ("check_attention", lambda *given: attention(*given)[0], "return a tuple"),
    ("check_attention", unscaled_with_mask, "the scale is the same"),
    ("check_causal_mask", lambda size: square(size).triu(), "is transposed"),
    ("check_causal_mask", lambda size: square(size).triu(1), "True marks the future"),
    ("check_causal_mask", lambda size: square(size).tril(-1), "a word sees itself"),
    ("check_causal_mask", square, "for 3 words: [[1, 1, 1]"),
    ("check_causal_mask", lambda size: square(size).float(), "must be bool"),
    ("check_causal_mask", lambda size: square(size).tril().triu(-4), "wrong for 12"),
    ("check_causal", masked(None), "row 0 looks at position 1"),
    (
        "check_causal",
        lambda x: masked(square(5).tril())(x.mul_(0.5)),
        "work on a copy",
    ),
    ("check_causal", lambda x: 1e-7 * masked(None)(x), "row 0 looks at position 1"),
    ("check_causal", lambda x: torch.zeros_like(x), "does not see position 0"),
    ("check_causal", masked(square(5).tril(1)), "row 0 looks at position 1"),
    ("check_causal", masked(square(5).triu()), "row 1 does not see position 0"),
    ("check_causal", masked(square(5).tril(-1)), "row 0 does not see position 0"),
    (
        "check_causal",
        lambda x: mask_after(x, x, x, causal_mask(5))[0],
        "row 0 looks at position 1: the mask lets the future through",
    ),
    ("check_permutation_equivariant", causal, "something here knows the order"),
    (
        "check_permutation_equivariant",
        lambda x: x + torch.arange(5.0)[:, None],
        "from position 3 to 0",
    ),
    ("check_permutation_equivariant", lambda x: x.cumsum(1), "knows the order"),
    ("check_previous_word", lambda size: previous(size, scale=20.0), "row 299 of 300"),
    ("check_previous_word", lambda size: previous(size, scale=200.0), "of 2048"),
    ("check_previous_word", lambda size: previous(6, 1), "not 300 of each"),
    ("check_previous_word", lambda size: previous(size, 0), "looks at itself"),
    ("check_previous_word", lambda size: previous(size, 2), "looks at position"),
    ("check_previous_word", lambda size: previous(size, 1, 2.0), "scores larger"),
    (
        "check_previous_word",
        lambda size: (previous(size)[0] * math.nan, previous(size)[1]),
        "no number",
    ),
    ("check_streaming_attention", kept_for_later, "numbers more are kept"),
    ("check_streaming_attention", scaling_in_place, "the queries have changed"),
    ("check_streaming_attention", copied, "numbers more are kept"),
    ("check_streaming_attention", last_only, "only the last chunk"),
    ("check_streaming_attention", averaged, "divide once, at the end"),
    (
        "check_streaming_attention",
        lambda q, pairs: streaming(q, pairs, root=1.0),
        "not divided by the root",
    ),
    *[
        (
            "check_streaming_attention",
            lambda q, pairs, root=root: streaming(q, pairs, root=root),
            "the context is wrong",
        )
        for root in (2, 5)
    ],
    (
        "check_streaming_attention",
        lambda q, pairs: streaming(q, pairs, rescale=False),
        "when a row's peak grows",
    ),
    (
        "check_streaming_attention",
        lambda q, pairs: streaming(q, pairs, peaks=False),
        "own peak so far",
    ),
    (
        "check_streaming_attention",
        lambda q, pairs: streaming(q, pairs, start=0.0),
        "start with the peak -inf",
    ),
]


@pytest.mark.parametrize("width", [4, 128, 384, 768, 1024])
def test_causal_check_takes_attention_of_any_width(width):
    checks.check_causal(lambda x: attention(x, x, x, causal_mask(5))[0], width)
    with pytest.raises(AssertionError, match="row 0 looks at position 1"):
        checks.check_causal(lambda x: attention(x, x, x)[0], width)


@pytest.mark.parametrize(("check", "wrong", "message"), WRONG)
def test_check_names_the_mistake(check, wrong, message):
    with pytest.raises(AssertionError) as caught:
        getattr(checks, check)(wrong)
    assert message in str(caught.value)


def test_what_is_kept_is_counted_whatever_garbage_there_is():
    def with_garbage(queries, pairs):
        kept = []
        for i, pair in enumerate(pairs):
            kept.append(pair)
            if i == 4:
                loop = [torch.zeros(1000)]
                loop.append(loop)
                del loop
            many = [[] for _ in range(10**4 * (i > 4))]  # starts a collection
            assert many or i < 5
        return kept_for_later(queries, kept)

    with pytest.raises(AssertionError, match="numbers more are kept"):
        checks.check_streaming_attention(with_garbage)
    assert gc.isenabled()
