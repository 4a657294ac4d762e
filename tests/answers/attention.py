"""Answers to the checks of chapter 6."""

import math

import torch
import torch.nn.functional as F

from glassgpt.attention import attention, causal_mask
from glassgpt.checks import attention as checks


def causal(x):
    return attention(x, x, x, causal_mask(x.shape[-2]))[0]


def by_pytorch(queries, keys, values, mask=None):
    """The kernel gives no weights, but they are the mixture of an identity."""
    rows = torch.eye(keys.shape[-2], dtype=keys.dtype).expand(*keys.shape[:-1], -1)
    weights = F.scaled_dot_product_attention(queries, keys, rows, mask)
    return F.scaled_dot_product_attention(queries, keys, values, mask), weights


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


def sum_detached(queries, keys, values, mask=None):
    scores = queries @ keys.mT / math.sqrt(queries.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    peak = scores.amax(-1, keepdim=True).clamp(min=-1e9)
    powers = (scores - peak).exp()
    weights = powers / powers.sum(-1, keepdim=True).clamp(min=0.5).detach()
    return weights @ values, weights


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


def previous(size, shift=1, scale=100.0):
    return scale * torch.eye(size).roll(shift, dims=0), torch.eye(size)


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


def doubled(pairs):
    return ((keys.double(), values.double()) for keys, values in pairs)


RIGHT = {
    checks.check_attention: [attention, divided_first, einsum, loop, by_pytorch],
    checks.check_causal_mask: [
        causal_mask,
        lambda n: torch.arange(n)[:, None] >= torch.arange(n),
        lambda n: torch.ones(n, n).tril() > 0,
    ],
    checks.check_previous_word: [
        lambda n: previous(n, scale=30 * math.sqrt(n)),
        lambda n: previous(n, scale=1e6),
    ],
    checks.check_streaming_attention: [
        streaming,
        lambda q, p: streaming(q, p, dtype=torch.float64),
        lambda q, p: streaming(q.double(), doubled(p)),
    ],
    checks.check_permutation_equivariant: [
        lambda x: x,
        lambda x: x - x.mean(1, keepdim=True),
        lambda x: attention(x, 2 * x, x)[0],
    ],
    checks.check_causal: [causal, lambda x: x.cumsum(1), lambda x: x + causal(x)],
}

WRONG = {
    checks.check_attention: [
        (variant(divide=lambda width: 1), "not divided at all"),
        (variant(divide=lambda width: width), "by the width itself"),
        (variant(divide=lambda width: width / 3), "the square root of the width 8"),
        (variant(axis=-2), "softmax over the wrong axis"),
        (variant(use=lambda mask: None), "the mask was ignored"),
        (variant(use=lambda mask: ~mask), "the mask is inverted"),
        (variant(hide=-1.0), "hidden scores are -inf"),
        (mask_after, "mask before the softmax"),
        (plain_softmax, "subtract each row's peak"),
        (masked_afterwards, "mask before it"),
        (other_weights, "These are weights with a mask"),
        (keys_mixed, "mix the values, not the keys"),
        (other_context, "The context is weights @ values"),
        (in_place, "work on a copy"),
        (sum_detached, "was a part detached"),
        (lambda q, k, v, m=None: attention(q.detach(), k, v, m), "reaches input 1"),
        (lambda q, k, v, m=None: attention(q, k.detach(), v, m), "reaches input 2"),
        (lambda q, k, v, m=None: attention(q, k, v.detach(), m), "reaches input 3"),
        (lambda q, k, v, m=None: attention(q, k, v, m)[0], "return a tuple"),
        (lambda q, k, v, m=None: (v, v), "the shape is (2, 4, 5, 6)"),
    ],
    checks.check_causal_mask: [
        (lambda size: square(size).triu(), "is transposed"),
        (lambda size: square(size).triu(1), "True marks the future"),
        (lambda size: square(size).tril(-1), "a word sees itself"),
        (square, "for 3 words: [[1, 1, 1]"),
        (lambda size: square(size).tril().float(), "must be bool"),
        (lambda size: square(size).tril().triu(-4), "for 12 words"),
    ],
    checks.check_causal: [
        (masked(None), "row 0 looks at position 1"),
        (lambda x: 1e-7 * masked(None)(x), "row 0 looks at position 1"),
        (lambda x: masked(square(5).tril())(x.mul_(0.5)), "work on a copy"),
        (torch.zeros_like, "does not see position 0"),
        (masked(square(5).tril(1)), "row 0 looks at position 1"),
        (masked(square(5).triu()), "row 1 does not see position 0"),
        (masked(square(5).tril(-1)), "row 0 does not see position 0"),
        (
            lambda x: mask_after(x, x, x, causal_mask(5))[0],
            "row 0 looks at position 1: the mask lets the future through",
        ),
    ],
    checks.check_permutation_equivariant: [
        (causal, "something here knows the order"),
        (lambda x: x + torch.arange(5.0)[:, None], "from position 3 to 0"),
        (lambda x: x.cumsum(1), "knows the order"),
    ],
    checks.check_previous_word: [
        (lambda size: previous(size, scale=20.0), "row 299 of 300"),
        (lambda size: previous(size, scale=200.0), "of 2048"),
        (lambda size: previous(6, 1), "not 300 of each"),
        (lambda size: previous(size, 0), "looks at itself"),
        (lambda size: previous(size, 2), "looks at position"),
        (lambda size: previous(size, 1, 2.0), "scores larger"),
    ],
    checks.check_streaming_attention: [
        (kept_for_later, "Keep no chunk for later"),
        (scaling_in_place, "changed in place"),
        (last_only, "only the last chunk"),
        (averaged, "divide once, at the end"),
        (lambda q, pairs: streaming(q, pairs, root=1.0), "divided by the root"),
        (lambda q, pairs: streaming(q, pairs, root=2), "is wanted"),
        (lambda q, pairs: streaming(q, pairs, rescale=False), "a row's peak grows"),
        (lambda q, pairs: streaming(q, pairs, peaks=False), "own peak so far"),
        (lambda q, pairs: streaming(q, pairs, start=0.0), "Start with the peak -inf"),
    ],
}
