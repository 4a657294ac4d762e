# Written by tools/tangle.py from book/19_looking_inside.ipynb: change it there.


"""Checks of traces, ledgers, attribution and ablation that name the mistake."""

import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from glassgpt.gpt import GPT, GPTConfig
from glassgpt.heads import split_heads
from glassgpt.inspection import See, ledger, trace
from glassgpt.modern import LLAMA_CHOICES, ModernConfig, build

_SIZES: dict[str, Any] = {
    "vocab_size": 11,
    "context": 12,
    "layers": 2,
    "heads": 4,
    "width": 16,
}


def _models() -> Iterator[tuple[Any, Tensor]]:
    """Models with random numbers everywhere, biases and norms too, and ids (2, T)."""
    sizes = _SIZES | {"layers": 12, "heads": 8}  # so that 1 and 11 can be mistaken
    llama = ModernConfig(**sizes, key_value_heads=4, **LLAMA_CHOICES)
    for config in (GPTConfig(**_SIZES), llama, ModernConfig(**_SIZES)):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = build(replace(config, dropout=0.2)).double()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.3 * torch.randn_like(parameter))
            yield model, torch.randint(11, (2, 7 if config.layers == 2 else 5))


def _near(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() < 1e-12)


def check_trace(trace: Callable[..., dict[str, Tensor]]) -> None:
    """Every name is its equation, and the model is left as it was.

    trace: called as trace(model, ids) and trace(model, ids, edit).

    Book: 19_looking_inside.html#the-function
    """
    for model, ids in _models():
        attends = [block.attention.attend for block in model.blocks]
        with torch.no_grad():
            wanted = model.eval()(ids)
        model.train().norm.eval()
        modes = [part.training for part in model.modules()]
        seen = trace(model, ids)
        off = (seen["logits"] - wanted).abs().max()
        assert off < 1e-12, f"the logits are off by {off:.0e}: is dropout switched off?"
        _check_plain(seen)
        _check_equations(model, seen)
        _check_edit(trace, model, ids, seen)
        _check_left(model, modes, attends, "")
        with suppress(ZeroDivisionError):
            trace(model, ids, lambda name, value: value if name != "1.mlp" else 1 / 0)
        _check_left(model, modes, attends, " when an edit raises an error")


def _check_plain(found: dict[str, Tensor]) -> None:
    graphs = any(value.requires_grad for value in found.values())
    assert not graphs, "no gradients: use `torch.no_grad`, and detach parameters' views"


def _check_left(model: Any, modes: list[bool], attends: list[Any], when: str) -> None:
    now = [part.training for part in model.modules()]
    assert now == modes, f"restore the mode{when}"
    kept = [block.attention.attend for block in model.blocks]
    assert kept == attends, f"give the attention its own `attend` back{when}"
    hooks = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert not hooks, f"hooks are left in the model{when}"
    slopes = [torch.is_grad_enabled(), *(p.requires_grad for p in model.parameters())]
    assert all(slopes), f"gradients are left off{when}"


def _check_equations(model: Any, seen: dict[str, Tensor]) -> None:
    x = seen["embedding"]
    for layer, block in enumerate(model.blocks):
        at = {
            name.partition(".")[2]: v
            for name, v in seen.items()
            if name.startswith(f"{layer}.")
        }
        with torch.no_grad():
            q, k, v = at["queries"], at["keys"], at["values"]
            k, v = (p.repeat_interleave(q.shape[1] // p.shape[1], 1) for p in (k, v))
            scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(
                ~torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril(), -math.inf
            )
            together = at["contexts"].transpose(1, 2).flatten(2)
            equations = {
                "attention_norm": block.attention_norm(x),
                "weights": scores.softmax(-1),
                "contexts": at["weights"] @ v,
                "attention": block.attention.projection(together),
                "mlp_norm": block.mlp_norm(x + at["attention"]),
                "hidden": block.mlp.activation(block.mlp.expand(at["mlp_norm"])),
                "mlp": block.mlp.projection(at["hidden"]),
                "stream": x + at["attention"] + at["mlp"],
            }
            if type(model) is GPT:  # without rotary positions
                thirds = block.attention.qkv(at["attention_norm"]).chunk(3, dim=-1)
                names = ("queries", "keys", "values")
                parts = (split_heads(part, block.attention.heads) for part in thirds)
                equations = dict(zip(names, parts, strict=True)) | equations
        for name, value in equations.items():
            assert _near(at[name], value), (
                f"{layer}.{name} is not what its equation says"
            )
        x = at["stream"]
    assert _near(seen["final"], model.norm(x).detach()), (
        "`final` is the norm of the stream"
    )


def _check_edit(
    trace: Callable[..., dict[str, Tensor]],
    model: Any,
    ids: Tensor,
    plain: dict[str, Tensor],
) -> None:
    for place in plain:
        if place[0].isdigit() and not place.startswith("1."):
            continue  # one layer stands for all

        def flatten(name: str, value: Tensor, place: str = place) -> Tensor:
            return torch.zeros_like(value) if name == place else value

        seen = trace(model, ids, flatten)
        changed = not _near(seen["logits"], plain["logits"])
        assert changed, f"what an edit returns for {place} must go on"
        assert not seen[place].any(), "the trace holds what the edit returned"


def check_ledger(ledger: Callable[..., dict[str, Tensor]]) -> None:
    """Embedding, heads, biases and MLPs add up to the final stream.

    ledger: called as ledger(model, trace).

    Book: 19_looking_inside.html#the-ledger-balances
    """
    for model, ids in _models():
        seen = trace(model, ids)
        parts = ledger(model, seen)
        for layer, block in enumerate(model.blocks):
            projection = block.attention.projection
            for head in range(model.config.heads):
                alone = torch.zeros_like(seen[f"{layer}.contexts"])
                alone[:, head] = seen[f"{layer}.contexts"][:, head]
                wrote = alone.transpose(1, 2).flatten(2) @ projection.weight.T
                assert _near(parts[f"{layer}.head.{head}"], wrote), (
                    f"head {head} of layer {layer} does not get its own columns"
                )
            assert _near(parts[f"{layer}.mlp"], seen[f"{layer}.mlp"]), (
                f"{layer}.mlp is not what the MLP wrote"
            )
            if projection.bias is not None:
                name = f"{layer}.bias"
                assert name in parts, "the biases of attention's last layer are missing"
                bias = projection.bias.expand_as(seen["embedding"])
                assert _near(parts[name], bias), f"{name} is not layer {layer}'s own"
        assert _near(parts["embedding"], seen["embedding"]), (
            "the embedding is not what entered block 0"
        )
        off = (sum(parts.values()) - seen[f"{layer}.stream"]).abs().max()
        assert off < 1e-12, f"the ledger is off by {off:.0e}: it has too much"
        _check_plain(parts)


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
        norm, stream = model.norm, seen[f"{model.config.layers - 1}.stream"]
        layer_norm = isinstance(norm, torch.nn.LayerNorm)
        power = stream.var(-1, correction=0) if layer_norm else stream.square().mean(-1)
        weight = 1 if norm.weight is None else norm.weight
        toward = direction * weight / (power + norm.eps).sqrt()[..., None]
        for name, part in parts.items():
            centered = part - part.mean(-1, keepdim=True) if layer_norm else part
            left_in, wanted = ((p * toward).sum(-1) for p in (part, centered))
            right = _close(shares[name], wanted)
            assert right or not _close(shares[name], left_in), (
                "a LayerNorm subtracts the mean of each part"
            )
            assert right, (
                f"the share of {name} is not its own, by the scale of the whole stream"
            )
        off = (sum(shares.values()) - seen["final"] @ direction).abs().max()
        assert off < 1e-10, f"the shares are off by {off:.0e}: the norm's bias?"
        _check_plain(shares)


def _close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() < 1e-10)


def check_without(without: Callable[..., See]) -> None:
    """The heads named hand over their mean, the others what they did.

    without: called as without(heads, usual).

    Book: 19_looking_inside.html#proof-by-removal
    """
    for model, ids in _models():
        usual, seen = trace(model, ids.flip(1)[:1, 1:]), trace(model, ids)
        edit = without([(0, 1), (1, 0), (1, 3)], usual)
        for name, heads in (("0.contexts", [1]), ("1.contexts", [0, 3])):
            before = seen[name].clone()
            after, means = edit(name, seen[name]), usual[name].mean((0, 2))
            assert torch.equal(seen[name], before), (
                "clone before you write: the trace changed"
            )
            for head in range(model.config.heads):
                wanted = (
                    means[head].expand_as(after[:, head])
                    if head in heads
                    else before[:, head]
                )
                words = (
                    "its mean over texts and positions"
                    if head in heads
                    else "what it had"
                )
                assert _near(after[:, head], wanted), (
                    f"{name}: head {head} must have {words}"
                )
        for name in seen.keys() - {"0.contexts", "1.contexts"}:  # 11 is not 1
            assert torch.equal(edit(name, seen[name]), seen[name]), f"{name} must stay"


def check_previous_scores(previous_scores: Callable[..., Tensor]) -> None:
    """The mean weight of each head on the token before, (L, H).

    previous_scores: called as previous_scores(trace).

    Book: 19_looking_inside.html#exercise-1-the-token-before
    """
    for model, ids in _models():
        seen = trace(model, ids)
        found, layers = previous_scores(seen), model.config.layers
        assert isinstance(found, Tensor), (
            f"return a tensor, not a {type(found).__name__}"
        )
        (_, heads, T, _), last = seen["0.weights"].shape, ids.shape[1] - 1
        assert found.shape == (layers, heads), (
            f"one number for each head: {(layers, heads)}, not {tuple(found.shape)}"
        )
        wanted, own = torch.zeros(2, layers, heads).double()
        for layer in range(layers):
            weights = seen[f"{layer}.weights"]
            own[layer] = weights.diagonal(0, -2, -1).mean((0, 2))
            for t in range(1, T):
                wanted[layer] += weights[:, :, t, t - 1].mean(0) / last
        assert not _near(found, wanted * last / T), (
            "the first token has none before it: leave it out"
        )
        assert (found - own).abs().max() > 1e-6, "these are weights on the token itself"
        assert (found - wanted).abs().max() < 1e-6, (
            "take the mean of w[t, t - 1] over all texts and positions, layers in order"
        )


def check_patch(patch: Callable[..., See]) -> None:
    """One head, at the last position only, hands over what it did in a clean run.

    patch: called as patch(clean, layer, head), returns an edit.

    Book: 19_looking_inside.html#exercise-1-the-token-before
    """
    for model, ids in _models():
        texts = ids.flip(1)[:, model.config.layers // 12 :]  # also shorter ones
        clean, seen = trace(model, ids), trace(model, texts)
        for layer, head in ((1, 2), (0, 3)):  # 11 is not 1
            edit, place = patch(clean, layer, head), f"{layer}.contexts"
            assert callable(edit), "return a function of a name and an activation"
            before, kept = seen[place].clone(), clean[place].clone()
            after = edit(place, seen[place])
            assert torch.equal(clean[place], kept), "`clean` must stay as it was"
            assert after is not None, "an edit returns the activation, changed or not"
            assert torch.equal(seen[place], before), (
                "clone before you write: the trace changed"
            )
            wanted, whole = before.clone(), before.clone()
            wanted[:, head, -1] = clean[place][:, head, -1]
            whole[:, head] = clean[place][:, head, -whole.shape[2] :]
            assert not torch.equal(after, whole), "patch the last position alone"
            assert not torch.equal(after, before), "nothing was put in"
            assert torch.equal(after, wanted), "another head or position was changed"
            for name in seen.keys() - {place}:
                same = edit(name, seen[name])
                assert same is not None, f"{name} must go on as it is"
                assert torch.equal(same, seen[name]), f"{name} must stay"


def check_sources(sources: Callable[..., Tensor]) -> None:
    """What a head wrote, token by token that it came from: (B, T, S, C).

    sources: called as sources(model, trace, layer, head).

    Book: 19_looking_inside.html#exercise-1-the-token-before
    """
    for model, ids in _models():
        seen = trace(model, ids)
        parts = ledger(model, seen)
        (B, T), heads = ids.shape, model.config.heads
        for layer, head in ((layer, head) for layer in (0, 1) for head in range(heads)):
            found, name = sources(model, seen, layer, head), f"{layer}.head.{head}"
            assert found.shape == (B, T, T, 16), (
                f"(B, T, S, C), not {tuple(found.shape)}"
            )
            off = (found.sum(2) - parts[name]).abs().max()
            assert off < 1e-10, f"the sources of {name} do not add up to what it wrote"
            future = found[:, 2, 3:].abs().max()
            assert future == 0, "token 2 took something from later tokens"
            weights, values = seen[f"{layer}.weights"], seen[f"{layer}.values"]
            value = values[:, head * values.shape[1] // heads]
            columns = model.blocks[layer].attention.projection.weight.chunk(heads, 1)
            terms = weights[:, head, ..., None] * (value @ columns[head].T)[:, None]
            assert (found - terms).abs().max() < 1e-10, (
                "what comes from token s is w[t, s] times s's own value through W_O"
            )
            _check_plain({name: found})
