# Written by tools/tangle.py from book/19_looking_inside.ipynb: change it there.


"""Checks of traces, ledgers, attribution and ablation that name the mistake."""

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from glassgpt.checks.expect import close, expect_same
from glassgpt.gpt import GPT, GPTConfig
from glassgpt.heads import split_heads
from glassgpt.inspection import See, ledger, trace
from glassgpt.modern import LLAMA_CHOICES, ModernConfig, build


def _models() -> list[tuple[Any, Tensor]]:
    """Models with random numbers everywhere, biases and norms too, and ids (2, 7)."""
    sizes: dict[str, Any] = {"vocab_size": 11, "context": 12, "heads": 4, "width": 16}
    configs = [
        GPTConfig(layers=2, dropout=0.2, **sizes),
        ModernConfig(layers=2, dropout=0.2, **sizes),
        ModernConfig(layers=3, key_value_heads=2, **sizes, **LLAMA_CHOICES),
    ]
    models = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for config in configs:
            model = build(config).double()
            for parameter in model.parameters():
                parameter.data += 0.3 * torch.randn_like(parameter)
            models.append((model, torch.randint(11, (2, 7))))
    return models


def check_trace(trace: Callable[..., dict[str, Tensor]]) -> None:
    """Every name is its equation, and the model is left as it was.

    trace: called as trace(model, ids) and trace(model, ids, edit).

    Book: 19_looking_inside.html#the-function
    """
    for model, ids in _models():
        with torch.no_grad():
            wanted = model.eval()(ids)
        model.train().blocks[1].eval()
        before = _in_training(model, ids)
        seen = trace(model, ids)
        off = (seen["logits"] - wanted).abs().max()
        assert off < 1e-12, f"the logits are off by {off:.0e}: is dropout switched off?"
        with torch.no_grad():
            _check_equations(model, seen)
        _check_edits(trace, model, ids, wanted)
        left = "hooks, dropout or attention of the model are not as they were"
        assert torch.equal(_in_training(model, ids), before), left
        with suppress(ZeroDivisionError):
            trace(model, ids, lambda name, value: value if name != "1.mlp" else 1 / 0)
        after_error = torch.equal(_in_training(model, ids), before)
        assert after_error, f"{left} when an edit raises an error"


def _in_training(model: Any, ids: Tensor) -> Tensor:
    """The logits with dropout, the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        logits: Tensor = model(ids)
    return logits


def _check_equations(model: Any, seen: dict[str, Tensor]) -> None:
    x = seen["embedding"]
    for layer, block in enumerate(model.blocks):
        at = {
            name.removeprefix(f"{layer}."): value
            for name, value in seen.items()
            if name.startswith(f"{layer}.")
        }
        copies = at["queries"].shape[1] // at["keys"].shape[1]
        keys = at["keys"].repeat_interleave(copies, dim=1)
        values = at["values"].repeat_interleave(copies, dim=1)
        scores = at["queries"] @ keys.mT / math.sqrt(keys.shape[-1])
        future = torch.ones_like(scores).triu(1).bool()
        together = at["contexts"].transpose(1, 2).flatten(2)
        equations = {
            "attention_norm": block.attention_norm(x),
            "weights": scores.masked_fill(future, -math.inf).softmax(-1),
            "contexts": at["weights"] @ values,
            "attention": block.attention.projection(together),
            "mlp_norm": block.mlp_norm(x + at["attention"]),
            "hidden": block.mlp.activation(block.mlp.expand(at["mlp_norm"])),
            "mlp": block.mlp.projection(at["hidden"]),
            "stream": x + at["attention"] + at["mlp"],
        }
        if type(model) is GPT:  # without rotary positions
            q, k, v = block.attention.qkv(at["attention_norm"]).chunk(3, dim=-1)
            equations["queries"] = split_heads(q, block.attention.heads)
            equations["keys"] = split_heads(k, block.attention.heads)
            equations["values"] = split_heads(v, block.attention.heads)
        for name, value in equations.items():
            right = close(at[name], value)
            assert right, f"{layer}.{name} is not what its equation says"
        x = at["stream"]
    assert close(seen["final"], model.norm(x)), "`final` is the norm of the stream"


def _check_edits(
    trace: Callable[..., dict[str, Tensor]], model: Any, ids: Tensor, logits: Tensor
) -> None:
    """An edit goes on to the logits, and is not called again after the trace."""
    calls = []
    for place in ("embedding", "1.keys", "1.weights", "1.hidden", "1.mlp", "final"):

        def zero(name: str, value: Tensor, place: str = place) -> Tensor:
            calls.append(name)
            return torch.zeros_like(value) if name == place else value

        seen = trace(model, ids, zero)
        changed = not close(seen["logits"], logits)
        assert changed, f"what an edit returns for {place} must go on"
        assert not seen[place].any(), "the trace holds what the edit returned"
        number = len(calls)
        _in_training(model, ids)
        assert len(calls) == number, "hooks are left in the model"


def check_ledger(ledger: Callable[..., dict[str, Tensor]]) -> None:
    """Embedding, heads, biases and MLPs add up to the final stream.

    ledger: called as ledger(model, trace).

    Book: 19_looking_inside.html#the-ledger-balances
    """
    for model, ids in _models():
        seen = trace(model, ids)
        parts = ledger(model, seen)
        wanted = {"embedding": seen["embedding"]}
        for layer, block in enumerate(model.blocks):
            projection, contexts = block.attention.projection, seen[f"{layer}.contexts"]
            for head in range(contexts.shape[1]):
                alone = torch.zeros_like(contexts)
                alone[:, head] = contexts[:, head]
                wrote = alone.transpose(1, 2).flatten(2) @ projection.weight.T
                wanted[f"{layer}.head.{head}"] = wrote
            if projection.bias is not None:
                wanted[f"{layer}.bias"] = projection.bias.expand_as(seen["embedding"])
            wanted[f"{layer}.mlp"] = seen[f"{layer}.mlp"]
        missing = sorted(wanted.keys() - parts.keys())
        assert not missing, f"the ledger has no {', '.join(missing)}"
        for name, value in wanted.items():
            right = close(parts[name], value)
            assert right, f"{name} is not what it wrote: each head has its own columns"
        more = sorted(parts.keys() - wanted.keys())
        assert not more, f"the ledger has too much: {', '.join(more)}"


def check_attribute(attribute: Callable[..., dict[str, Tensor]]) -> None:
    """The shares of all parts add up to the score.

    attribute: called as attribute(model, parts, direction).

    Book: 19_looking_inside.html#who-writes-the-bracket
    """
    for model, ids in _models():
        seen = trace(model, ids)
        parts = ledger(model, seen)
        direction = (model.head.weight[3] - model.head.weight[5]).detach()
        shares = attribute(model, parts, direction)
        norm, stream = model.norm, seen[f"{len(model.blocks) - 1}.stream"]
        toward = direction if norm.weight is None else direction * norm.weight
        for name, part in parts.items():
            if isinstance(norm, nn.LayerNorm):
                s = (stream.var(-1, correction=0) + norm.eps).sqrt()
                left_in = close(shares[name], part @ toward / s)
                assert not left_in, "a LayerNorm subtracts the mean of each part"
                part = part - part.mean(-1, keepdim=True)
            else:
                s = (stream.square().mean(-1) + norm.eps).sqrt()
            right = close(shares[name], part @ toward / s)
            assert right, f"{name} has a share of its own, by the whole stream's scale"
        off = (sum(shares.values()) - seen["final"] @ direction).abs().max()
        assert off < 1e-10, f"the shares are off by {off:.0e}: the norm's bias?"


def _mean_weights(seen: Mapping[str, Tensor], back: int) -> Tensor:
    """The mean weight on the token so many places back, (L, H)."""
    layers = [weights for name, weights in seen.items() if name.endswith(".weights")]
    return torch.stack(layers).diagonal(-back, -2, -1).mean((1, 3))


def check_previous_scores(previous_scores: Callable[..., Tensor]) -> None:
    """The mean weight of each head on the token before, (L, H).

    previous_scores: called as previous_scores(trace).

    Book: 19_looking_inside.html#exercise-1-the-token-before
    """
    for model, ids in _models():
        seen = trace(model.float(), ids)
        own = "these are weights on the token itself"
        expect_same(
            lambda _, seen=seen: previous_scores(seen),
            lambda _, seen=seen: _mean_weights(seen, back=1),
            ids,
            mistakes={own: lambda _, seen=seen: _mean_weights(seen, back=0)},
            gradients=False,
            hint="take w[t, t - 1] of all texts, from t = 1 on; layers in order",
        )


def _expect_edit(
    edit: See, seen: Mapping[str, Tensor], changed: Mapping[str, Tensor], hint: str
) -> None:
    """An edit puts in what `changed` holds, and leaves everything else as it was."""
    assert callable(edit), "return a function of a name and an activation"
    also = {"11.contexts": seen["1.contexts"]}  # 11 is not 1
    for name, value in {**seen, **also}.items():
        given = value.clone()
        found = edit(name, given)
        returned = isinstance(found, Tensor) and found.shape == value.shape
        assert returned, f"return the activation {name}, changed or not"
        assert torch.equal(given, value), "clone before you write: the trace changed"
        if name in changed:
            assert close(found, changed[name]), f"{name}: {hint}"
        else:
            assert torch.equal(found, value), f"{name} must stay"


def check_patch(patch: Callable[..., See]) -> None:
    """One head, at the last position only, hands over what it did in a clean run.

    patch: called as patch(clean, layer, head), returns an edit.

    Book: 19_looking_inside.html#exercise-1-the-token-before
    """
    for model, ids in _models():
        clean, seen = trace(model, ids), trace(model, ids.flip(1)[:, 1:])
        kept, wanted = clean["1.contexts"].clone(), seen["1.contexts"].clone()
        wanted[:, 2, -1] = kept[:, 2, -1]
        hint = "one head alone changes, at the last position alone"
        _expect_edit(patch(clean, 1, 2), seen, {"1.contexts": wanted}, hint)
        assert torch.equal(clean["1.contexts"], kept), "`clean` must stay as it was"


def check_sources(sources: Callable[..., Tensor]) -> None:
    """What a head wrote, token by token that it came from: (B, T, S, C).

    sources: called as sources(model, trace, layer, head).

    Book: 19_looking_inside.html#exercise-1-the-token-before
    """
    for model, ids in _models():
        seen = trace(model.float().requires_grad_(False), ids)
        weights, values = seen["1.weights"], seen["1.values"]
        columns = model.blocks[1].attention.projection.weight.chunk(4, dim=1)
        wrote = values[:, 2 * values.shape[1] // 4] @ columns[2].T
        terms = weights[:, 2, :, :, None] * wrote[:, None]
        expect_same(
            lambda _, model=model, seen=seen: sources(model, seen, 1, 2),
            lambda _, terms=terms: terms,
            ids,
            gradients=False,
            hint="from token s comes w[t, s] times s's own value through W_O",
        )
