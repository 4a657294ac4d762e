# Written by tools/tangle.py from book/a4_publishing.ipynb: change it there.
"""Checks of a GPT in a page that name the mistake they find."""

from collections.abc import Callable
from typing import Any

import torch

from glassgpt.gpt import GPT, GPTConfig
from glassgpt.publish import as_text, page_model
from glassgpt.tokens import BPETokenizer


def _random_model(vocab_size: int, tied: bool) -> GPT:
    """Its matrices are what int8 and a scale for each row can hold."""
    generator = torch.Generator().manual_seed(5)
    sizes = {"context": 12, "layers": 3, "heads": 3, "width": 27, "tied": tied}
    model = GPT(GPTConfig(vocab_size, **sizes))
    for name, parameter in model.named_parameters():
        x = torch.empty_like(parameter).normal_(0, 0.3, generator=generator)
        if name == "blocks.1.attention.qkv.bias":
            x[: 2 * 27] += 16  # scores of 800: e^800 is infinite
        if name in ("tokens.weight", "positions.weight"):
            x *= 0.02  # so small that a norm's 1e-5 counts
        if x.dim() == 2:
            scale = x.abs().amax(1, keepdim=True) / 127
            x = (x / scale).round() * scale
        parameter.data = x
    return model


@torch.random.fork_rng(devices=[])
def check_page_logits(logits: Callable[[dict[str, Any], list[int]], Any]) -> None:
    """A page's logits after each token are those of the package, to 1e-4.

    Book: a4_publishing.html#the-same-numbers
    """
    tokenizer, generator = BPETokenizer([(0, 1)]), torch.Generator().manual_seed(6)
    ids = torch.randint(len(tokenizer), (1, 11), generator=generator)
    for tied in (True, False):
        for kind in ("float32", "int8"):
            model = _random_model(len(tokenizer), tied)
            stored = page_model(model, tokenizer, kind)
            wanted = model.double()(ids)[0]
            found = torch.tensor(logits(stored, ids[0].tolist()))
            off = (found - wanted).abs().max()
            head = "a tied" if tied else "its own"
            assert off < 1e-4, f"{kind}, {head} head: a logit is off by {off:.1g}"


@torch.random.fork_rng(devices=[])
def check_size(size: Callable[[int, int, int, int], int]) -> None:
    """Characters of a page's weights: one byte a number, scales, four for three.

    Book: a4_publishing.html#exercise-1-how-large-is-the-page
    """
    for layers, width, vocabulary, context in ((1, 10, 257, 8), (4, 144, 2048, 256)):
        model = GPT(GPTConfig(vocabulary, context, layers, 2, width))
        parts = [as_text(parameter) for parameter in model.parameters()]
        wanted = sum(len(text) for part in parts for text in part.values())
        scales = sum(len(part.get("scales", "")) for part in parts)
        vectors = sum(len(part.get("float32", "")) for part in parts)
        found = size(layers, width, vocabulary, context)
        assert found != wanted - scales, "each row of a matrix has a scale"
        assert found != wanted - vectors, "biases and norms take room, too"
        assert found == wanted, f"{wanted:,} characters, not {found:,}"


def check_page_min_p(
    min_p: Callable[[list[dict[str, Any]], float], list[dict[str, Any]]],
) -> None:
    """Chapter 13's min-p, on a page's candidates; what stays sums to 1 again.

    Book: a4_publishing.html#exercise-2-another-filter-in-javascript
    """
    shares = {4: 0.5, 1: 0.25, 2: 0.125, 3: 0.0625, 0: 0.0625}  # the likeliest first
    for share, ids in ((0.25, [4, 1, 2]), (0.9, [4]), (0.1, [4, 1, 2, 3, 0])):
        given = [{"id": id, "probability": p} for id, p in shares.items()]
        before = [dict(one) for one in given]
        found = min_p(given, share)
        assert given == before, "the list given was changed: return another one"
        order = [one["id"] for one in found]
        assert order == ids, f"with a share of {share}, {order} stay, not {ids}"
        left = sum(shares[id] for id in ids)
        for one in found:
            p, wanted = one["probability"], shares[one["id"]] / left
            assert p is not None, "no number: does `reduce` begin with 0?"  # NaN
            assert abs(p - wanted) < 1e-6, f"{p:.3f}, not {wanted:.3f}: divide by a sum"


def check_kept(kept: Callable[[list[int], list[int], int], int]) -> None:
    """What two windows have in common at their beginning stays.

    Book: a4_publishing.html#exercise-3-what-stays-in-the-cache
    """
    for old, new, context, wanted, reason in (
        ([1, 2, 3], [1, 2, 3, 4], 8, 3, "one more token"),
        ([1, 2, 3], [1, 2, 3], 8, 3, "the same text again"),
        ([1, 2, 3, 4], [1, 2], 8, 2, "the text is cut"),
        ([1, 2, 3, 4], [1, 9, 3, 4], 8, 1, "a new token changes all later keys"),
        ([5, 6, 7, 8], [5, 6, 7, 8, 9], 4, 0, "the window has moved on"),
        ([5, 6, 7, 8, 9], [5, 6, 7, 8], 4, 0, "the window has moved back"),
        ([5, 6, 7, 8, 9], [5, 6, 7, 8, 9, 3], 4, 3, "both windows begin with 7, 8, 9"),
    ):
        found = kept(old[:], new[:], context)
        assert found == wanted, f"{reason}: {wanted} stay, not {found}"
