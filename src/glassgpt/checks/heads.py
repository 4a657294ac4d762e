# Written by tools/tangle.py from book/07_multi_head_attention.ipynb: change it there.


"""Checks of heads and of multi-head attention that name the mistake they find."""

import math
from collections.abc import Callable
from copy import deepcopy
from itertools import combinations, product
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glassgpt.attention import attention, causal_mask
from glassgpt.heads import MultiHeadAttention


def check_split_heads(split_heads: Callable[[Tensor, int], Tensor]) -> None:
    """Head h holds its own columns of every position.

    split_heads: called as split_heads(x, heads), (B, T, C) to (B, H, T, D).

    Book: 07_multi_head_attention.html#split-and-merge
    """
    b, t, c = torch.arange(4), torch.arange(5), torch.arange(6)
    x = 1000 * b[:, None, None] + 100 * t[:, None] + c  # every number names its place
    x = x.double().requires_grad_()
    for heads in (2, 3):
        split, D = split_heads(x, heads), 6 // heads
        shape, wanted = tuple(split.shape), (4, heads, 5, D)
        assert shape == wanted, f"shape {shape} for {heads} heads, not {wanted}"
        assert split.dtype == x.dtype, f"the dtype changed to {split.dtype}"
        assert split.requires_grad, "no gradient reaches x: move its own numbers"
        split = split.long()
        for b, c, t in product(range(4), range(6), range(5)):
            found, head = int(split[b, c // D, t, c % D]), c // D
            place = f"head {head} of position {t} holds column {found % 100}"
            text, position = found // 1000, found // 100 % 10
            assert text == b, f"text {b} holds a number of text {text}"
            assert position == t, (
                f"{place} of position {position}: view(B, H, T, D) mixes"
                " positions; view as (B, T, H, D), then swap T and H"
            )
            assert found % 100 == c, f"{place}, not {c}: cut the width in pieces"


def _random(*shapes: tuple[int, ...]) -> list[Tensor]:
    """Normal numbers in 64 bits, the same ones every time."""
    random = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=random, dtype=torch.float64) for s in shapes]


def _compare_gradients(
    found: Tensor, wanted: Tensor, learning: dict[str, Tensor]
) -> None:
    """The same gradients reach every tensor from the one result as from the other."""
    gradients = []
    for result in (found, wanted):
        for tensor in learning.values():
            tensor.grad = None
        if result.requires_grad:
            result.sum().backward(retain_graph=True)
        gradients.append([tensor.grad for tensor in learning.values()])
    for name, ours, due in zip(learning, *gradients, strict=True):
        right = ours is not None and torch.allclose(ours, due)
        assert right, f"the gradient of {name} is wrong: was a part detached?"


def check_causal_attention(attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    """Causal attention of each head, equal to the plain one, one head after the other.

    attend: maps queries, keys and values (B, H, T, D) to contexts of that shape.

    Book: 07_multi_head_attention.html#two-ways-one-result
    """
    for T, D in ((5, 4), (3, 2)):
        q, k, v = _random(*3 * [(2, 3, T, D)])
        q[:, :, 1] = 0  # scores of 0 are no mask
        learning = {"queries": q, "keys": k, "values": v}
        for tensor in learning.values():
            tensor.requires_grad_()
        mask = causal_mask(T)
        one_by_one = zip(q.unbind(1), k.unbind(1), v.unbind(1), strict=True)
        wanted = torch.stack([attention(*head, mask)[0] for head in one_by_one], 1)
        found = attend(q, k, v)
        mistakes = {
            "the mask is missing: every word sees the future": (q, k, v),
            "the mask is transposed: words see the future": (q, k, v, mask.mT),
            "scores were not divided by the root of D": (D**0.5 * q, k, v, mask),
            "scores were divided by the root of C: take the head's width, D = C / H": (
                (q / math.sqrt(3), k, v, mask)
            ),
        }
        assert found.shape == wanted.shape, f"the shape changed to {tuple(found.shape)}"
        for mistake, inputs in mistakes.items():
            assert not torch.allclose(found, attention(*inputs)[0]), mistake
        gap = (found - wanted).abs().max().item()
        assert gap < 1e-12, f"differs from the plain attention by {gap:.1e}"
        _compare_gradients(found, wanted, learning)


def check_fused_attention(fused_attention: Callable[..., Tensor]) -> None:
    """Causal without a mask, the queries last; a mask replaces the causal one.

    Book: 07_multi_head_attention.html#two-ways-one-result
    """
    check_causal_attention(fused_attention)
    q, k, v = _random(*3 * [(2, 3, 5, 4)])
    last, some = q[:, :, -1:], q[:, :, -2:]
    cases = [
        (
            (q, torch.ones(5, 5) > 0),
            "a mask replaces the causal one: if it allows all, words see the future",
        ),
        ((last, None), "a single query is the last position: it sees all the keys"),
    ]
    for (queries, mask), mistake in cases:
        found = fused_attention(queries, k, v, mask)
        assert torch.allclose(found, attention(queries, k, v)[0]), mistake
    mask = torch.tensor([True, False, True, True, False]).expand(2, 1, 2, 5)
    found = fused_attention(some, k, v, mask)
    inverted, _ = attention(some, k, v, ~mask)
    assert not torch.allclose(found, inverted), "inverted: True must mean 'may look'"
    wanted, _ = attention(some, k, v, mask)
    assert torch.allclose(found, wanted), "the mask is ignored"
    found = fused_attention(some, k, v)
    open_, _ = attention(some, k, v)
    assert not torch.allclose(found, open_), "2 queries, 5 keys: the mask is missing"
    wanted, _ = attention(q, k, v, causal_mask(5))
    assert torch.allclose(found, wanted[:, :, -2:]), (
        "2 queries, 5 keys: the queries are the last positions, not the first"
    )


def _by_columns(x: Tensor, heads: int) -> list[Tensor]:
    """The columns of each head: H tensors (B, T, D)."""
    return list(x.split(x.shape[-1] // heads, dim=-1))


def _one_by_one(
    module: nn.Module,
    x: Tensor,
    heads: int,
    split: Callable[[Tensor, int], list[Tensor]] = _by_columns,
    merge: Callable[[list[Tensor]], Tensor] = lambda pieces: torch.cat(pieces, -1),
    order: tuple[int, int, int] = (0, 1, 2),
    shrink: float = 1.0,
    may_look: Callable[[int], Tensor | None] = causal_mask,
) -> Tensor:
    """One head after the other, with the module's weights, before the projection."""
    parts = module.qkv(x).chunk(3, dim=-1)
    pieces = zip(*(split(parts[i], heads) for i in order), strict=True)
    mask = may_look(x.shape[1])
    return merge([attention(q / shrink, k, v, mask)[0] for q, k, v in pieces])


def _known_mistakes(module: nn.Module, x: Tensor, heads: int) -> dict[str, Tensor]:
    """What the usual mistakes would give, before the projection."""

    def by_view(part: Tensor, heads: int) -> list[Tensor]:
        B, T, C = part.shape
        return list(part.reshape(B, heads, T, C // heads).unbind(1))

    def by_position(part: Tensor, heads: int) -> list[Tensor]:
        B, T, C = part.shape
        return list(part.reshape(B, T, heads, C // heads).unbind(1))

    def by_reshape(pieces: list[Tensor]) -> Tensor:
        return torch.stack(pieces, 1).reshape(x.shape)

    steps = {
        "order": {"order": (2, 1, 0)},
        "split": {"split": by_view},
        "mask": {"may_look": lambda T: None},
        "merge": {"merge": by_reshape},
    }
    mistakes = {
        "the mask is missing": steps["mask"],
        "the mask is transposed: words see the future": {
            "may_look": lambda T: causal_mask(T).mT
        },
        "the mask is inverted: True means 'may look'": {
            "may_look": lambda T: ~causal_mask(T)
        },
        "split: T and H were not swapped, so heads look at heads": {
            "split": by_position,
            "merge": by_reshape,
            "may_look": lambda T: None,
        },
        "split: view(B, H, T, D) mixes positions, swap T and H": steps["split"],
        "merge: swap T and H back before the reshape": steps["merge"],
        "scores were divided by the root of C, not of D = C / H": {
            "shrink": math.sqrt(heads)
        },
        "scores were not divided by the root of D": {
            "shrink": math.sqrt(heads / x.shape[-1])
        },
        "queries and keys are exchanged": {"order": (1, 0, 2)},
        "keys and values are exchanged": {"order": (0, 2, 1)},
        "the first third of qkv are queries, the last values": steps["order"],
    }
    # Several at once, each set of two to four, so that mending one is noticed.
    for size in (2, 3, 4):
        for names in combinations(steps, size):
            changes = {key: v for name in names for key, v in steps[name].items()}
            mistakes[f"still wrong: {', '.join(names)}"] = changes
    return {
        name: _one_by_one(module, x, heads, **change)
        for name, change in mistakes.items()
    }


def check_multi_head(module_class: Callable[[int, int], nn.Module]) -> None:
    """All heads at once equal one head after the other, and no head sees the future.

    module_class(width, heads) makes a module (B, T, C) to (B, T, C) with two linear
    layers: `qkv` (queries, keys, values, in this order) and `projection`.

    Book: 07_multi_head_attention.html#the-module
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        modules = {heads: module_class(12, heads).double() for heads in (3, 1, 4)}
    for part in (modules[4].qkv.weight, modules[4].qkv.bias):
        part.data[:3] = 0  # queries of 0 in the first head: scores of 0 are no mask
    texts = _random((2, 5, 12), (2, 3, 12))
    for (heads, module), x in product(modules.items(), texts):
        learning = {"x": x.requires_grad_(), **dict(module.named_parameters())}
        found, merged = module.train()(x), _one_by_one(module, x, heads)
        assert found.shape == x.shape, f"the shape changed to {tuple(found.shape)}"
        assert not torch.allclose(found, merged), "the projection is missing"
        for mistake, wrong in _known_mistakes(module, x, heads).items():
            # With a single head, several mistakes change nothing.
            if not torch.allclose(wrong, merged):
                same = torch.allclose(found, module.projection(wrong), equal_nan=True)
                assert not same, mistake
        assert not torch.allclose(found, x + module.projection(merged)), (
            "x was added: return only what is to be added"
        )
        gap = (found - module.projection(merged)).abs().max().item()
        assert gap < 1e-12, (
            f"{heads} heads differ from one after the other by {gap:.1e}"
        )
        count = sum(p.numel() for p in module.parameters())
        assert count == 4 * 12**2 + 4 * 12, f"{count} parameters, not 4 C^2 + 4 C"
        _compare_gradients(found, module.projection(merged), learning)
        same = torch.allclose(module.eval()(x), found)
        assert same, "after eval() the result is another"


_kernel = F.scaled_dot_product_attention


def _sharing_refused(
    query: Tensor, key: Tensor, *args: Any, enable_gqa: bool = False, **options: Any
) -> Tensor:
    contexts = _kernel(query, key, *args, enable_gqa=enable_gqa, **options)
    H, G = query.shape[-3], key.shape[-3]
    assert not enable_gqa, f"PyTorch shared {G} keys: bring them to {H} heads yourself"
    return contexts


def check_grouped_attention(
    grouped: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> None:
    """Neighboring heads share a key and a value; each has its own query.

    Book: 07_multi_head_attention.html#exercise-3-fewer-key-heads-than-query-heads
    """
    mask = causal_mask(5)
    for G in (2, 1, 3):
        q, k, v = _random((2, 6, 5, 3), (2, G, 5, 3), (2, G, 5, 3))
        try:
            with patch.object(F, "scaled_dot_product_attention", _sharing_refused):
                found = grouped(q, k, v)
        except RuntimeError as error:  # of PyTorch; an empty stub is no mistake
            if isinstance(error, NotImplementedError):
                raise
            message = f"6 queries, {G} keys: each is for {6 // G} heads. PyTorch says:"
            raise AssertionError(f"{message} {error}") from error
        tensor = isinstance(found, Tensor)
        assert tensor, "return the contexts only: attention(...)[0]"
        shape = tuple(found.shape)
        assert shape == q.shape, f"the shape is {shape}: one context per query"
        groups = [h * G // 6 for h in range(6)]
        wanted, _ = attention(q, k[:, groups], v[:, groups], mask)
        unmasked, _ = attention(q, k[:, groups], v[:, groups])
        dealt = [h % G for h in range(6)]
        mixed, _ = attention(q, k[:, dealt], v[:, dealt], mask)
        assert G == 1 or not torch.allclose(found, mixed), (
            "heads 0 and 2 share a key: neighbors must, so take repeat_interleave"
        )
        assert not torch.allclose(found, unmasked), "the mask is missing"
        gap = (found - wanted).abs().max().item()
        assert gap < 1e-12, f"differs from heads with repeated keys by {gap:.1e}"


def _contributions(
    module: nn.Module, x: Tensor, dim: int = -1, causal: bool = True
) -> Tensor:
    """What each head adds, its part of the projection cut from the axis `dim`."""
    parts = module.qkv(x).chunk(3, dim=-1)
    thirds = [_by_columns(part, module.heads) for part in parts]
    mask = causal_mask(x.shape[1]) if causal else None
    pieces = [attention(*qkv, mask)[0] for qkv in zip(*thirds, strict=True)]
    cuts = module.projection.weight.chunk(module.heads, dim)
    cuts = [cut.mT for cut in cuts] if dim == -1 else cuts
    return torch.stack([z @ cut for z, cut in zip(pieces, cuts, strict=True)], 1)


def check_contributions(contributions: Callable[[nn.Module, Tensor], Tensor]) -> None:
    """What the heads add, summed up and with the bias, is the output of the module.

    contributions: called with a MultiHeadAttention and x (B, T, C); (B, H, T, C).

    Book: 07_multi_head_attention.html#exercise-4-who-said-what
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module, other = (MultiHeadAttention(12, heads).double() for heads in (4, 3))
    for part in (module.qkv.weight, module.qkv.bias):
        part.data[:3] = 0  # the first head's queries: scores of 0 are no mask
    (x,) = _random((2, 5, 12))
    parts, wanted = contributions(module, x), module(x)
    assert parts.shape == (2, 4, 5, 12), f"shape {tuple(parts.shape)}: (B, H, T, C)"
    mistakes = {
        "rows of weight were taken: it is (out, in), a head is read by its columns": (
            _contributions(module, x, dim=0)
        ),
        "the mask is missing": _contributions(module, x, causal=False),
    }
    for mistake, wrong in mistakes.items():
        assert not torch.allclose(parts, wrong), mistake
    bias, total = module.projection.bias, parts.sum(1)
    assert not torch.allclose(total, wanted + 3 * bias), "each head added the bias"
    assert torch.allclose(total + bias, wanted), "the parts don't sum to the output"
    for head in range(4):
        cut, kept = deepcopy(module), [h for h in range(4) if h != head]
        cut.projection.weight.data[:, 3 * head : 3 * head + 3] = 0  # its columns
        without = contributions(cut, x)
        message = f"head {head} was cut off from the projection, and yet"
        assert (without[:, head] == 0).all(), f"{message} it adds something"
        others = torch.allclose(without[:, kept], parts[:, kept])
        assert others, f"{message} another head changed"
    total = contributions(other, x).sum(1) + other.projection.bias
    assert torch.allclose(total, other(x)), "right with 4 heads, wrong with 3"
