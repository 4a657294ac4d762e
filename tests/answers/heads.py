"""Answers to the checks of chapter 7."""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from glassgpt.attention import attention, causal_mask
from glassgpt.checks import heads as checks
from glassgpt.heads import MultiHeadAttention, fused_attention, merge_heads, split_heads


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


def _causal(q, k, v):
    mask = causal_mask(k.shape[-2])[-q.shape[-2] :]
    return attention(q, k, v, mask)[0]


def by_full_width(q, k, v):
    return fused_attention(q / math.sqrt(q.shape[1]), k, v)


def grouped(q, k, v):
    return fused_attention(*spread(q, k, v))


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


def ignored_mask(q, k, v, mask=None):
    every = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool)
    return fused_attention(q, k, v, None if mask is None else every)


def first_corner(q, k, v, mask=None):
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None
    )


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


def weights_detached(q, k, v):
    _, weights = attention(q, k, v, causal_mask(q.shape[-2]))
    return weights.detach() @ v


def queries_detached(q, k, v):
    return all_at_once(q.detach(), k, v)


class MaskedInTraining(MultiHeadAttention):
    def forward(self, x):
        T = x.shape[1]
        return super().forward(x, None if self.training else torch.ones(T, T) > 0)


class Frozen(MultiHeadAttention):
    def __init__(self, width, heads):
        super().__init__(width, heads)
        self.qkv.bias.requires_grad_(False)


def first_or_last(q, k, v):
    """The first key for half of the heads, the last one for the others."""
    half = q.shape[1] // 2
    return fused_attention(q, *(t[:, [0] * half + [-1] * half] for t in (k, v)))


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


def rows_taken(module, x):
    parts = module.qkv(x).chunk(3, dim=-1)
    context = fused_attention(*(split_heads(part, module.heads) for part in parts))
    return context @ module.projection.weight.unflatten(0, (module.heads, -1))


RIGHT = {
    checks.check_split_heads: [
        split_heads,
        lambda x, H: torch.stack(x.chunk(H, -1), 1),
    ],
    checks.check_causal_attention: [
        one_by_one,
        all_at_once,
        fused_attention,
        partial(F.scaled_dot_product_attention, is_causal=True),
    ],
    checks.check_fused_attention: [fused_attention],
    checks.check_multi_head: [
        MultiHeadAttention,
        partial(MultiHeadAttention, dropout=0.0),
        module_of(attend=one_by_one),
        module_of(attend=partial(F.scaled_dot_product_attention, is_causal=True)),
    ],
    checks.check_grouped_attention: [grouped, fused_attention],
    checks.check_contributions: [contributions],
}

WRONG = {
    checks.check_split_heads: [
        (reshape_split, "view(B, H, T, D) mixes positions"),
        (dealt_split, "dealt to the heads in turn"),
        (lambda x, heads: split_heads(x, 2), "not (4, 3, 5, 2). Of 3 heads"),
        (lambda x, heads: split_heads(x.flip(0), heads), "Of 2 heads"),
        (lambda x, heads: split_heads(x.float(), heads), "became torch.float32"),
        (lambda x, heads: split_heads(x.detach(), heads), "no gradient flows back"),
    ],
    checks.check_causal_attention: [
        (F.scaled_dot_product_attention, "the mask is missing"),
        (scaled(2.0), "not divided by the root of D"),
        (by_full_width, "divided by the root of C: take"),
        (scaled(1.1), "The plain attention of each head"),
        (
            lambda q, k, v: attention(q, k, v, causal_mask(q.shape[-2]).T)[0],
            "The plain attention of each head",
        ),
        (lambda *qkv: all_at_once(*qkv)[:1], "the shape is"),
        (weights_detached, "was a part detached?"),
        (queries_detached, "no gradient reaches input 1"),
    ],
    checks.check_fused_attention: [
        (scaled(2.0), "not divided by the root of D"),
        (turned_mask, "the mask is inverted"),
        (ignored_mask, "A mask replaces the causal one"),
        (lambda q, k, v, mask=None: _causal(q, k, v), "the mask is ignored"),
        (first_corner, "A single query is the last position"),
        (any_keys, "2 queries, 5 keys"),
        (first_rows, "are the last positions, not the first"),
    ],
    checks.check_multi_head: [
        (module_of(order=(2, 1, 0)), "the first third of qkv"),
        (module_of(split=reshape_split), "split: view(B, H, T, D)"),
        (module_of(attend=F.scaled_dot_product_attention), "the mask is missing"),
        (module_of(attend=by_full_width), "the root of C, not of D"),
        (module_of(merge=reshape_merge), "merge: swap T and H back"),
        (
            module_of(split=reshape_split, attend=F.scaled_dot_product_attention),
            "swap T and H; the mask is missing",
        ),
        (
            module_of(
                reshape_split,
                reshape_merge,
                F.scaled_dot_product_attention,
                order=(2, 1, 0),
            ),
            "the last values; split: view(B, H, T, D) mixes positions, swap T and H;"
            " the mask is missing; merge",
        ),
        (module_of(split=dealt_split), "The plain attention of 3 heads"),
        (module_of(order=(0, 2, 1)), "The plain attention of 3 heads"),
        (module_of(project=False), "then the projection"),
        (module_of(attend=scaled(1.1)), "The plain attention of 3 heads"),
        (AddingX, "then the projection"),
        (Narrow, "The plain attention of 3 heads"),
        (module_of(attend=weights_detached), "the gradient of"),
        (Frozen, "no gradient reaches qkv.bias"),
        (MaskedInTraining, "the mask is missing"),
        (Wasteful, "unused.weight is not used"),
    ],
    checks.check_grouped_attention: [
        (repeated, "heads 0 and 2 share a key"),
        (first_or_last, "3 keys: each key is for 2 neighboring heads"),
        (lambda *qkv: attention(*spread(*qkv))[0], "the mask is missing"),
        (lambda *qkv: attention(*spread(*qkv), causal_mask(5)), "a tuple, not a"),
        (lambda q, k, v: grouped(1.1 * q, k, v), "6 queries, 2 keys"),
        (lambda q, k, v: fused_attention(q[:, :2], k, v), "the shape is (2, 2, 5, 3)"),
    ],
    checks.check_contributions: [
        (lambda m, x: contributions(m, x) + m.projection.bias, "added the bias"),
        (rows_taken, "rows of weight were taken: it is (out, in)"),
        (
            lambda m, x: contributions(m, x, F.scaled_dot_product_attention),
            "its own contexts",
        ),
        (lambda m, x: contributions(m, x).flip(1), "its own columns"),
        (lambda m, x: contributions(m, x)[:, :1], "the shape is"),
    ],
}
