# Written by tools/tangle.py from book/07_multi_head_attention.ipynb: change it there.
"""Checks of heads and of multi-head attention that name the mistake they find."""

import math
from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor, nn

from glassgpt.attention import attention, causal_mask
from glassgpt.checks.attention import check_causal


def _refuses(call: Callable[[], object]) -> bool:
    """True when the call raises ValueError."""
    try:
        call()
    except ValueError:
        return True
    except RuntimeError:  # a complaint of PyTorch, far from the cause
        return False
    return False


def _places() -> Tensor:
    """(B, T, C) = (2, 3, 4), where 1000 b + 100 t + c stands at each place."""
    b, t, c = torch.arange(2), torch.arange(3), torch.arange(4)
    return 1000 * b[:, None, None] + 100 * t[:, None] + c


def check_split_heads(split_heads: Callable[[Tensor, int], Tensor]) -> None:
    """Head h holds its own columns of every position, and merging restores them.

    split_heads: called as split_heads(x, heads), (B, T, C) to (B, H, T, C / H).

    Book: 07_multi_head_attention.html#split-and-merge
    """
    x = _places()
    split = split_heads(x, 2)
    assert split.shape == (2, 2, 3, 2), f"shape {tuple(split.shape)}: (B, H, T, C / H)"
    for b, head, t, c in product(range(2), range(2), range(3), range(2)):
        found, wanted = int(split[b, head, t, c]), int(x[b, t, 2 * head + c])
        place = f"head {head} of position {t} holds column {found % 100}"
        assert found // 1000 == b, f"text {b} holds a number of text {found // 1000}"
        assert found // 100 == wanted // 100, (
            f"{place} of position {found // 100 % 10}: view(B, H, T, C / H) mixes"
            " positions; view as (B, T, H, C / H), then swap T and H"
        )
        assert found == wanted, f"{place}, not {wanted % 100}: cut the width in pieces"
    assert torch.equal(torch.cat(split.unbind(1), -1), x), "merging must restore x"
    assert _refuses(lambda: split_heads(x, 3)), "width 4 in 3 heads: no ValueError"


def check_merge_heads(merge_heads: Callable[[Tensor], Tensor]) -> None:
    """Merging puts the pieces of each position side by side, in the order of heads.

    Book: 07_multi_head_attention.html#split-and-merge
    """
    x = _places()
    pieces = torch.stack(x.split(2, dim=-1), dim=1)  # (B, H, T, C / H)
    merged = merge_heads(pieces)
    assert merged.shape == x.shape, f"shape {tuple(merged.shape)}: wanted (B, T, C)"
    assert not torch.equal(merged, pieces.reshape(x.shape)), (
        "rows mix positions: swap T and H back before the reshape"
    )
    assert torch.equal(merged, x), "the heads are not side by side in their order"


def _random(*shapes: tuple[int, ...]) -> list[Tensor]:
    """Normal numbers in 64 bits, the same ones every time."""
    random = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=random, dtype=torch.float64) for s in shapes]


def check_causal_attention(attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    """Causal attention of each head by itself, equal to the plain version.

    attend: maps queries, keys and values (B, H, T, C / H) to contexts of that shape.

    Book: 07_multi_head_attention.html#both-equal-the-oracle
    """
    q, k, v = _random(*3 * [(2, 3, 5, 4)])
    mask = causal_mask(5)
    found, wanted = attend(q, k, v), attention(q, k, v, mask)[0]
    mistakes = [
        (attention(q, k, v), "the mask is missing: every word sees the future"),
        (attention(q, k, v, mask.T), "the mask is upside down: words see the future"),
        (attention(2 * q, k, v, mask), "scores were not divided by the root of C / H"),
        (
            attention(q / math.sqrt(3), k, v, mask),
            "scores were divided by the root of C: take the head's width, C / H",
        ),
    ]
    assert found.shape == wanted.shape, f"the shape changed to {tuple(found.shape)}"
    for (context, _), mistake in mistakes:
        assert not torch.allclose(found, context), mistake
    gap = (found - wanted).abs().max().item()
    assert gap < 1e-12, f"differs from the plain attention by {gap:.1e}"


def check_fused_attention(fused_attention: Callable[..., Tensor]) -> None:
    """Causal without a mask; with one, the mask alone decides which keys count.

    Book: 07_multi_head_attention.html#both-equal-the-oracle
    """
    check_causal_attention(fused_attention)
    q, k, v = _random((2, 3, 5, 4), (2, 3, 5, 4), (2, 3, 5, 4))
    everything = torch.ones(5, 5, dtype=torch.bool)
    found = fused_attention(q, k, v, everything)
    assert torch.allclose(found, attention(q, k, v)[0]), (
        "with a mask that allows everything, words must see the future too"
    )
    mask = torch.tensor([True, False, True, True, False]).expand(2, 1, 2, 5)
    found, wanted = fused_attention(q[:, :, :2], k, v, mask), q[:, :, :2]
    assert not torch.allclose(found, attention(wanted, k, v, ~mask)[0]), (
        "the mask is turned round: True must mean 'may look'"
    )
    assert torch.allclose(found, attention(wanted, k, v, mask)[0]), (
        "the mask is ignored"
    )
    last = fused_attention(q[:, :, :1], k, v)
    assert torch.allclose(last, attention(q[:, :, :1], k, v)[0]), (
        "a single query is the last position: it must see all the keys"
    )
    refused = _refuses(lambda: fused_attention(q[:, :, :2], k, v))
    assert refused, "2 queries, 5 keys and no mask must raise ValueError"
    refused = _refuses(lambda: fused_attention(q, k, v, everything.double()))
    assert refused, "a mask that isn't bool must raise ValueError"


def _by_columns(x: Tensor, heads: int) -> list[Tensor]:
    """The columns of each head: H tensors (B, T, C / H)."""
    return list(x.split(x.shape[-1] // heads, dim=-1))


def _one_by_one(
    module: nn.Module,
    x: Tensor,
    heads: int,
    split: Callable[[Tensor, int], list[Tensor]] = _by_columns,
    merge: Callable[[list[Tensor]], Tensor] = lambda pieces: torch.cat(pieces, -1),
    order: tuple[int, int, int] = (0, 1, 2),
    shrink: float = 1.0,
    causal: bool = True,
) -> Tensor:
    """One head after the other, with the module's weights, before the projection."""
    parts = module.qkv(x).chunk(3, dim=-1)
    pieces = zip(*(split(parts[i], heads) for i in order), strict=True)
    mask = causal_mask(x.shape[1]) if causal else None
    return merge([attention(q / shrink, k, v, mask)[0] for q, k, v in pieces])


def _known_mistakes(module: nn.Module, x: Tensor, heads: int) -> dict[str, Tensor]:
    """What the usual slips would give, before the projection."""

    def by_view(part: Tensor, heads: int) -> list[Tensor]:
        B, T, C = part.shape
        return list(part.reshape(B, heads, T, C // heads).unbind(1))

    def by_reshape(pieces: list[Tensor]) -> Tensor:
        return torch.stack(pieces, 1).reshape(x.shape)

    slips = {
        "the mask is missing": {"causal": False},
        "split: view(B, H, T, C / H) mixes positions, swap T and H": {"split": by_view},
        "merge: swap T and H back before the reshape": {"merge": by_reshape},
        "scores were divided by the root of C, not of C / H": {
            "shrink": math.sqrt(heads)
        },
        "queries and keys are exchanged": {"order": (1, 0, 2)},
        "the first third of qkv are queries, the last values": {"order": (2, 1, 0)},
    }
    return {name: _one_by_one(module, x, heads, **slip) for name, slip in slips.items()}


def check_multi_head(module_class: Callable[[int, int], nn.Module]) -> None:
    """All heads at once equal one head after the other, and no head sees the future.

    module_class(width, heads) makes a module (B, T, C) to (B, T, C) with two linear
    layers: `qkv` (queries, keys, values, in this order) and `projection`.

    Book: 07_multi_head_attention.html#all-heads-at-once-or-one-after-the-other
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        modules = {heads: module_class(12, heads).double() for heads in (1, 3, 4)}
        small = module_class(4, 2)
    (x,) = _random((2, 5, 12))
    for heads, module in modules.items():
        found, merged = module(x), _one_by_one(module, x, heads)
        assert found.shape == x.shape, f"the shape changed to {tuple(found.shape)}"
        assert not torch.allclose(found, merged), "the projection is missing"
        for mistake, wrong in _known_mistakes(module, x, heads).items():
            # With a single head, several slips do nothing.
            if not torch.allclose(wrong, merged):
                assert not torch.allclose(found, module.projection(wrong)), mistake
        gap = (found - module.projection(merged)).abs().max().item()
        assert gap < 1e-12, f"{heads} heads differ from one after the other: {gap:.1e}"
        count = sum(p.numel() for p in module.parameters())
        assert count == 4 * 12**2 + 4 * 12, f"{count} parameters, not 4 C^2 + 4 C"
    check_causal(small)
    assert _refuses(lambda: module_class(4, 3)), "width 4, 3 heads: no ValueError"


def check_grouped_attention(
    grouped: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> None:
    """Neighboring heads share a key and a value; each has its own query.

    Book: 07_multi_head_attention.html#exercise-3-fewer-keys-than-queries
    """
    q, k, v = _random((2, 4, 5, 3), (2, 2, 5, 3), (2, 2, 5, 3))
    found, mask = grouped(q, k, v), causal_mask(5)
    assert found.shape == q.shape, f"the shape is {tuple(found.shape)}: one per query"
    group = [0, 1, 0, 1]
    dealt, _ = attention(q, k[:, group], v[:, group], mask)
    assert not torch.allclose(found, dealt), (
        "heads 0 and 2 share a key: neighbors must, so take repeat_interleave"
    )
    group = [0, 0, 1, 1]
    unmasked, _ = attention(q, k[:, group], v[:, group])
    assert not torch.allclose(found, unmasked), "the mask is missing"
    wanted, _ = attention(q, k[:, group], v[:, group], mask)
    gap = (found - wanted).abs().max().item()
    assert gap < 1e-12, f"differs from heads with repeated keys by {gap:.1e}"


def check_contributions(
    contributions: Callable[[nn.Module, Tensor], Tensor],
    module_class: Callable[[int, int], nn.Module],
) -> None:
    """What the heads add, summed up and with the bias, is the output of the module.

    Book: 07_multi_head_attention.html#exercise-4-who-said-what
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = module_class(6, 3).double()
    (x,) = _random((2, 4, 6))
    parts, wanted = contributions(module, x), module(x)
    assert parts.shape == (2, 3, 4, 6), f"shape {tuple(parts.shape)}: (B, H, T, C)"
    bias, total = module.projection.bias, parts.sum(1)
    assert not torch.allclose(total, wanted + 2 * bias), "each head added the bias"
    assert torch.allclose(total + bias, wanted), "the parts don't sum to the output"
    with torch.no_grad():
        module.projection.weight[:, :2] = 0  # the columns that head 0 is read by
    silent = contributions(module, x)
    message = "head 0 was cut off from the projection,"
    assert (silent[:, 0] == 0).all(), f"{message} and yet it adds something"
    others = torch.equal(silent[:, 1:], parts[:, 1:])
    assert others, f"{message} and yet another head changed"
