# Written by tools/tangle.py from book/07_multi_head_attention.ipynb: change it there.


"""Checks of heads and of multi-head attention that name the mistake they find."""

import math
from collections.abc import Callable
from functools import partial
from itertools import combinations

import torch
from torch import Tensor, nn

from glassgpt.attention import attention, causal_mask
from glassgpt.checks.expect import expect_same
from glassgpt.heads import MultiHeadAttention, merge_heads


def _random(*shape: int) -> Tensor:
    """Normal numbers in 64 bits, the same ones every time."""
    random = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=random, dtype=torch.float64)


def _split(x: Tensor, heads: int) -> Tensor:
    return torch.stack(x.chunk(heads, dim=-1), dim=1)


def _split_by_view(x: Tensor, heads: int) -> Tensor:
    B, T, C = x.shape
    return x.reshape(B, heads, T, C // heads)


def _split_by_dealing(x: Tensor, heads: int) -> Tensor:
    return torch.stack([x[..., head::heads] for head in range(heads)], dim=1)


def check_split_heads(split_heads: Callable[[Tensor, int], Tensor]) -> None:
    """Head h holds its own columns of every position.

    split_heads: called as split_heads(x, heads), (B, T, C) to (B, H, T, D).

    Book: 07_multi_head_attention.html#split-and-merge
    """
    mistakes = {
        "view(B, H, T, D) mixes positions; view as (B, T, H, D), then swap T and H": (
            _split_by_view
        ),
        "the columns are dealt to the heads in turn: cut the width in pieces": (
            _split_by_dealing
        ),
    }
    for heads in (2, 3):
        expect_same(
            lambda x, heads=heads: split_heads(x, heads),
            partial(_split, heads=heads),
            _random(4, 5, 6),
            mistakes={
                mistake: partial(wrong, heads=heads)
                for mistake, wrong in mistakes.items()
            },
            hint=f"Of {heads} heads, head h has the columns from h D on",
        )


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The plain attention of each head; the queries are the last positions."""
    mask = causal_mask(k.shape[-2])[-q.shape[-2] :]
    return attention(q, k, v, mask)[0]


def check_causal_attention(attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    """Causal attention of each head, equal to the plain one.

    attend: maps queries, keys and values (B, H, T, D) to contexts of that shape.

    Book: 07_multi_head_attention.html#two-ways-one-result
    """
    mistakes = {
        "the mask is missing: every word sees the future": (
            lambda q, k, v: attention(q, k, v)[0]
        ),
        "scores were not divided by the root of D": (
            lambda q, k, v: _causal(q * math.sqrt(q.shape[-1]), k, v)
        ),
        "scores were divided by the root of C: take the head's width, D = C / H": (
            lambda q, k, v: _causal(q / math.sqrt(q.shape[1]), k, v)
        ),
    }
    for T, D in ((5, 4), (3, 2)):
        q, k, v = _random(3, 2, 3, T, D)
        hint = "The plain attention of each head, with a causal mask, has this"
        expect_same(attend, _causal, q, k, v, mistakes=mistakes, hint=hint)


def check_fused_attention(fused_attention: Callable[..., Tensor]) -> None:
    """Causal without a mask, the queries last; a mask replaces the causal one.

    Book: 07_multi_head_attention.html#two-ways-one-result
    """
    check_causal_attention(fused_attention)
    q, k, v = _random(3, 2, 3, 5, 4)
    for T, hint in (
        (1, "A single query is the last position: it sees all the keys"),
        (2, "2 queries, 5 keys: the queries are the last positions, not the first"),
    ):
        last = q[:, :, -T:]
        expect_same(fused_attention, _causal, last, k, v, gradients=False, hint=hint)
    padding = torch.tensor([True, False, True, True, False]).expand(2, 1, 5, 5)
    for mask in (padding, torch.ones(5, 5).bool()):
        expect_same(
            fused_attention,
            lambda *inputs: attention(*inputs)[0],
            q,
            k,
            v,
            mask,
            mistakes={
                "the mask is inverted: True must mean 'may look'": (
                    lambda q, k, v, mask: attention(q, k, v, ~mask)[0]
                ),
                "the mask is ignored": lambda q, k, v, mask: _causal(q, k, v),
            },
            gradients=False,
            hint="A mask replaces the causal one: some words see the future",
        )


_STEPS = {
    "order": "the first third of qkv are queries, the last values",
    "split": "split: view(B, H, T, D) mixes positions, swap T and H",
    "mask": "the mask is missing",
    "root": "scores were divided by the root of C, not of D = C / H",
    "merge": "merge: swap T and H back before the reshape",
}


def _by_steps(
    x: Tensor, module: nn.Module, heads: int, wrong: tuple[str, ...] = ()
) -> Tensor:
    """Multi-head attention with the module's weights; some steps may be wrong."""
    q, k, v = module.qkv(x).chunk(3, dim=-1)
    if "order" in wrong:
        q, v = v, q
    split = _split_by_view if "split" in wrong else _split
    q, k, v = split(q, heads), split(k, heads), split(v, heads)
    if "root" in wrong:
        q = q / math.sqrt(heads)
    mask = None if "mask" in wrong else causal_mask(x.shape[1])
    context, _ = attention(q, k, v, mask)
    merged = context.reshape(x.shape) if "merge" in wrong else merge_heads(context)
    return module.projection(merged)


def check_multi_head(module_class: Callable[[int, int], nn.Module]) -> None:
    """All heads at once equal the plain attention of each, and none sees the future.

    module_class(width, heads) makes a module (B, T, C) to (B, T, C) with two linear
    layers: `qkv` (queries, keys, values, in this order) and `projection`.

    Book: 07_multi_head_attention.html#the-module
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        modules = {heads: module_class(12, heads).double() for heads in (3, 1, 2)}
    # Any steps may be wrong at once, and mending one is noticed.
    sets = [names for size in range(1, 6) for names in combinations(_STEPS, size)]
    for heads, module in modules.items():
        mistakes = {
            "; ".join(_STEPS[name] for name in names): partial(
                _by_steps, module=module, heads=heads, wrong=names
            )
            for names in sets
        }
        for training, T in ((True, 5), (False, 3)):
            expect_same(
                module.train(training),
                partial(_by_steps, module=module, heads=heads),
                _random(2, T, 12),
                mistakes=mistakes,
                parameters=dict(module.named_parameters()),
                hint=f"The plain attention of {heads} heads, then the projection, has"
                " this, in training and after eval()",
            )


def check_grouped_attention(
    grouped: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> None:
    """Neighboring heads share a key and a value; each has its own query.

    Book: 07_multi_head_attention.html#exercise-3-fewer-key-heads-than-query-heads
    """
    for G in (2, 1, 3):
        neighbors = [head * G // 6 for head in range(6)]
        dealt = [head % G for head in range(6)]
        expect_same(
            grouped,
            lambda q, k, v, at=neighbors: _causal(q, k[:, at], v[:, at]),
            _random(2, 6, 5, 3),
            _random(2, G, 5, 3),
            _random(2, G, 5, 3) ** 3,
            mistakes={
                "heads 0 and 2 share a key: neighbors must, by repeat_interleave": (
                    lambda q, k, v, at=dealt: _causal(q, k[:, at], v[:, at])
                ),
                "the mask is missing": (
                    lambda q, k, v, at=neighbors: attention(q, k[:, at], v[:, at])[0]
                ),
            },
            hint=f"6 queries, {G} keys: each key is for {6 // G} neighboring heads",
        )


def check_contributions(contributions: Callable[[nn.Module, Tensor], Tensor]) -> None:
    """What the heads add, summed up and with the bias, is the output of the module.

    contributions: called with a MultiHeadAttention and x (B, T, C); (B, H, T, C).

    Book: 07_multi_head_attention.html#exercise-4-who-said-what
    """

    def contexts(x: Tensor, module: nn.Module) -> Tensor:
        parts = module.qkv(x).chunk(3, dim=-1)
        return _causal(*(_split(part, module.heads) for part in parts))

    def reference(x: Tensor, module: nn.Module) -> Tensor:
        cuts = module.projection.weight.unflatten(1, (module.heads, -1))
        return torch.einsum("bhtd,chd->bhtc", contexts(x, module), cuts)

    def by_rows(x: Tensor, module: nn.Module) -> Tensor:
        cuts = module.projection.weight.unflatten(0, (module.heads, -1))
        return torch.einsum("bhtd,hdc->bhtc", contexts(x, module), cuts)

    mistakes = {
        "rows of weight were taken: it is (out, in), a head is read by its columns": (
            by_rows
        ),
        "each head added the bias": (
            lambda x, module: reference(x, module) + module.projection.bias
        ),
    }
    for heads in (4, 3):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module = MultiHeadAttention(12, heads).double()
        expect_same(
            partial(contributions, module),
            partial(reference, module=module),
            _random(2, 5, 12),
            mistakes={
                mistake: partial(wrong, module=module)
                for mistake, wrong in mistakes.items()
            },
            gradients=False,
            hint=f"Each of {heads} heads has its own contexts and its own columns of"
            " the weight",
        )
