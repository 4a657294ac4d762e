# Written by tools/tangle.py from book/a4_publishing.ipynb: change it there.
"""Checks of a GPT in a page that name the mistake they find."""

import base64
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from glassgpt.checks.generation import check_min_p
from glassgpt.gpt import GPT, GPTConfig
from glassgpt.publish import page_model
from glassgpt.tokens import BPETokenizer


def _random_model(tokenizer: BPETokenizer, tied: bool) -> GPT:
    generator = torch.Generator().manual_seed(5)
    sizes = {"context": 12, "layers": 3, "heads": 3, "width": 27, "tied": tied}
    model = GPT(GPTConfig(len(tokenizer), **sizes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0, 0.3, generator=generator)
            if name == "blocks.1.attention.qkv.bias":
                parameter[: 2 * 27] += 16  # scores of 800: e^800 is infinite
            if name in ("tokens.weight", "positions.weight"):
                parameter.mul_(0.02)  # so small that a norm's 1e-5 counts
    return model


def check_page_logits(logits: Callable[[dict[str, Any], list[int]], Any]) -> None:
    """A page's logits after each token are those of the package, to 1e-4.

    Book: a4_publishing.html#the-same-numbers
    """
    tokenizer, generator = BPETokenizer([(0, 1)]), torch.Generator().manual_seed(6)
    ids = torch.randint(len(tokenizer), (1, 11), generator=generator)
    for tied in (True, False):
        model = _random_model(tokenizer, tied)
        for kind in ("float32", "int8"):
            stored = page_model(model, tokenizer, kind)
            for name, parameter in model.named_parameters():
                if "int8" in (part := stored["weights"][name]):
                    whole, scales = (
                        torch.frombuffer(
                            bytearray(base64.b64decode(part[key])), dtype=t
                        )
                        for key, t in (("int8", torch.int8), ("scales", torch.float32))
                    )
                    parameter.data = whole.view(parameter.shape) * scales[:, None]
            wanted = model.double()(ids)[0].detach()
            found = torch.tensor(logits(stored, ids[0].tolist())).double()
            off = (found - wanted).abs().amax(dim=1)
            said = f"{kind}, {'a tied' if tied else 'its own'} head"
            assert off[0] < 1e-4, f"{said}: a single token is off by {off[0]:.1g}"
            assert off.max() < 1e-4, f"{said}: later tokens are off by {off.max():.1g}"


def check_size(size: Callable[[int, int, int, int], int]) -> None:
    """Characters of a page's weights: one byte a number, scales, four for three.

    Book: a4_publishing.html#exercise-1-how-large-is-the-page
    """
    for layers, width, vocabulary, context in ((1, 10, 257, 8), (4, 144, 2048, 256)):
        heads = 2
        model = GPT(GPTConfig(vocabulary, context, layers, heads, width))
        tokenizer = BPETokenizer([], [f"<{n}>" for n in range(vocabulary - 256)])
        stored = page_model(model, tokenizer)["weights"]
        parts = {name: sum(map(len, part.values())) for name, part in stored.items()}
        wanted, found = sum(parts.values()), size(layers, width, vocabulary, context)
        vectors = sum(n for name, n in parts.items() if "float32" in stored[name])
        norms = sum(n for name, n in parts.items() if "norm" in name)
        without = wanted - vectors, wanted - norms, wanted - (vectors - norms)
        assert found not in without, "biases and norms take room, too"
        scales = sum(len(part.get("scales", "")) for part in stored.values())
        assert found != wanted - scales, "each row of a matrix has a scale"
        positions, norm = parts["positions.weight"], 2 * parts["norm.weight"]
        assert found != wanted - positions, "the positions are left out"
        assert found not in (wanted - norm, wanted - norms + norm), (
            "norms are left out: two in a block, one behind"
        )
        assert found != wanted + parts["tokens.weight"], "a tied head is stored once"
        stored_bytes = sum(
            len(base64.b64decode(text))
            for part in stored.values()
            for text in part.values()
        )
        if wanted != (padded_once := 4 * -(-stored_bytes // 3)):
            assert found != padded_once, "each parameter's base64 is padded by itself"
        assert found != stored_bytes, "these are bytes: base64 writes 4 for each 3"
        assert found == wanted, f"{wanted:,} characters, not {found:,}"


def _candidates(logits: Tensor) -> list[dict[str, Any]]:
    """Ids with their probabilities, the likeliest first, as a page has them."""
    p, ids = logits.double().softmax(-1).sort(descending=True, stable=True)
    pairs = zip(ids.tolist(), p.tolist(), strict=True)
    return [{"id": id, "probability": probability} for id, probability in pairs]


def check_page_min_p(
    min_p: Callable[[list[dict[str, Any]], float], list[dict[str, Any]]],
) -> None:
    """Chapter 13's min-p, on a page's candidates; what stays sums to 1 again.

    Book: a4_publishing.html#exercise-2-another-filter-in-javascript
    """

    def on_logits(logits: Tensor, share: float) -> Tensor:
        rows = logits.reshape(-1, logits.shape[-1])
        left = torch.full_like(rows, -torch.inf)
        for row, kept in zip(rows, left, strict=True):
            ids = [one["id"] for one in min_p(_candidates(row), share)]
            kept[ids] = row[ids]
        return left.view_as(logits)

    check_min_p(on_logits)
    logits = torch.tensor([0.05, 0.30, 0.15, 0.10, 0.40]).log()
    for share, ids in ((0.3, [4, 1, 2]), (0.9, [4]), (0.1, [4, 1, 2, 3, 0])):
        given, wanted = _candidates(logits), _candidates(logits)[: len(ids)]
        found = min_p(given, share)
        assert given == _candidates(logits), (
            "the list given was changed: return another one"
        )
        order = [one["id"] for one in found]
        assert order == ids, f"share={share} returned the ids {order}, not {ids}"
        lost = any(one["probability"] is None for one in found)  # as JSON has NaN
        assert not lost, "a probability is no number: does `reduce` begin with 0?"
        total = sum(one["probability"] for one in found)
        assert abs(total - 1) < 1e-6, f"what stays sums to {total:.2f}, not 1"
        due = sum(one["probability"] for one in wanted)
        for one, other in zip(found, wanted, strict=True):
            off = one["probability"] - other["probability"] / due
            assert abs(off) < 1e-6, "divide all that stay by the same number, their sum"


def check_kept(kept: Callable[[list[int], list[int], int], int]) -> None:
    """What two windows have in common at their beginning stays.

    Book: a4_publishing.html#exercise-3-what-stays-in-the-cache
    """
    found = kept([1, 2, 3], [1, 2, 3, 4], 8)
    assert found == 3, f"one more token: all 3 stay, not {found}"
    found = kept([1, 2, 3], [1, 2, 3], 8)
    assert found == 3, f"the same text again: all 3 stay, not {found}"
    found = kept([1, 2, 3, 4], [1, 2], 8)
    assert found == 2, f"cut short: 2 stay, not {found}"
    found = kept([1, 2, 3, 4], [1, 9, 3, 4], 8)
    assert found != 3, "a changed token changes the keys of all that follow it"
    assert found == 1, f"the second token changed: 1 stays, not {found}"
    found = kept([5, 6, 7, 8], [5, 6, 7, 8, 9], 4)
    assert found != 4, "the window has moved on: its first token is another one"
    assert found == 0, f"after the window has moved nothing stays, not {found}"
    found = kept([1, 1, 1, 1], [1, 1, 1, 1, 1], 4)
    assert found == 3, f"by chance the windows begin alike: 3 stay, not {found}"
    found = kept([5, 6, 7, 8, 9], [5, 6, 7, 8], 4)
    assert found == 0, f"the window has moved back: nothing stays, not {found}"
    old, new = [5, 6, 7, 8, 9], [5, 6, 7, 8, 9, 3]
    found = kept(old, new, 4)
    assert found == 3, f"7, 8, 9 are in both windows, not {found} tokens"
    assert (old, new) == ([5, 6, 7, 8, 9], [5, 6, 7, 8, 9, 3]), (
        "the lists given were changed"
    )
    found = kept([5], [5, 6], 1)
    assert found == 0, f"a context of 1 holds only the last token, not {found} old ones"
