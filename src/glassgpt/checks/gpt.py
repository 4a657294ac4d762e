# Written by tools/tangle.py from book/10_gpt.ipynb: change it there.
"""Checks of configurations and whole models that name the mistake they find."""

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glassgpt.gpt import GPT, GPTConfig, by_hand

_IMPOSSIBLE = [
    ({name: size}, f"{name} is a whole number from 1 up, not {size}")
    for name in ("vocab_size", "context", "layers", "heads", "width")
    for size in (0, -1, 2.5, True)
] + [
    ({"width": 10, "heads": 4}, "a width of 10 doesn't split into 4 heads"),
    ({"dropout": 1.0}, "nothing would be left"),
    ({"dropout": math.nan}, "nan is no share"),
    ({"dropout": -0.1}, "a share can't be negative"),
    ({"dropout": "a"}, "a share is a number"),
]


def _raises_value_error(why: str, function: Callable[..., Any], *args, **values) -> str:
    """The message of the ValueError that a call must raise."""
    try:
        function(*args, **values)
    except ValueError as error:
        return str(error)
    except Exception as error:
        kind = type(error).__name__
        raise AssertionError(f"{why}: raise a ValueError, not {kind}") from None
    raise AssertionError(f"{why}, but it was accepted")


def check_config(config: Callable[..., Any]) -> None:
    """Possible models are accepted; impossible ones raise a ValueError that says why.

    config: called with the names of `GPTConfig`.

    Book: 10_gpt.html#the-checks
    """
    small = {"vocab_size": 11, "context": 6, "layers": 2, "heads": 2, "width": 8}
    chosen = {**small, "dropout": 0.1, "tied": False}
    for values in (small, chosen):
        made = config(**values)
        for name, value in values.items():
            found = getattr(made, name, None)
            assert found == value, f"{name}={value} became {found}"
    for change, why in _IMPOSSIBLE:
        message = _raises_value_error(why, config, **{**small, **change})
        assert any(name in message for name in change), (
            f"the error for {change} names none of them: {message}"
        )
    usual = config(vocab_size=11)
    for name, value in vars(GPTConfig(11)).items():
        found = getattr(usual, name)
        assert found == value, f"by default {name} is {found}, not {value}"
    with suppress(AttributeError):
        made.width = 16
    assert made.width == 8, "a configuration can be changed: make it frozen"


def _block_by_hand(block: nn.Module, x: Tensor, wrong: str) -> Tensor:
    if wrong == "post-norm":
        x = block.attention_norm(x + block.attention(x))
        return block.mlp_norm(x + block.mlp(x))
    x = x + block.attention(block.attention_norm(x))
    return x + block.mlp(block.mlp_norm(x))


def _by_hand(model: nn.Module, ids: Tensor, wrong: str = "") -> Tensor:
    """Logits from the parts of a model, put together right or wrong."""
    x = model.tokens(ids)
    if wrong != "positions":
        x = x + model.positions(torch.arange(ids.shape[1]))
    for block in model.blocks[1:] if wrong == "block" else model.blocks:
        x = _block_by_hand(block, x, wrong)
    return model.head(x if wrong == "norm" else model.norm(x))


_MISTAKES = {
    "positions": "the positions are missing",
    "norm": "the last norm, before the head, is missing",
    "block": "the first block is left out",
    "post-norm": "the blocks normalize after adding: normalize what each part reads",
}


def _check_assembly(model: nn.Module, ids: Tensor) -> None:
    found = model(ids)
    shape = (*ids.shape, model.tokens.weight.shape[0])
    assert found.shape == shape, f"logits {tuple(found.shape)}, not (B, T, V) = {shape}"
    for wrong, mistake in _MISTAKES.items():
        assert not torch.allclose(found, _by_hand(model, ids, wrong)), mistake
    _check_causal(model, ids)
    assert torch.allclose(found, _by_hand(model, ids)), (
        "the logits are not head(norm(blocks(tokens + positions)))"
    )


def _check_causal(model: nn.Module, ids: Tensor) -> None:
    """Another token changes its own position and later ones, and none before."""
    before = model(ids)
    for changed in range(ids.shape[1]):
        other = ids.clone()
        other[:, changed] = (ids[:, changed] + 1) % model.tokens.weight.shape[0]
        moved = (model(other) - before).abs().amax(-1).amax(0)  # (T,)
        for position, distance in enumerate(moved.tolist()):
            assert position >= changed or distance < 1e-6, (
                f"position {position} sees position {changed}: the future leaks"
            )
            assert position < changed or distance > 1e-6, (
                f"position {position} doesn't see position {changed}"
            )


def _check_start(model: nn.Module, config: GPTConfig) -> None:
    """The head is tied, and the untrained loss that of knowing nothing."""
    count = sum(parameter.numel() for parameter in model.parameters())
    wanted = GPT(config).parameter_count()
    table = config.vocab_size * config.width
    assert count != wanted + table, "the head has a table of its own: tie it"
    assert count == wanted, f"{count} parameters, not {wanted}"
    random = torch.Generator().manual_seed(0)
    V, T = config.vocab_size, config.context
    ids, targets = torch.randint(V, (2, 4, T), generator=random)
    loss = F.cross_entropy(model(ids).flatten(0, 1), targets.flatten()).item()
    assert abs(loss - math.log(V)) < 0.1, (
        f"the untrained loss is {loss:.2f}, but knowing nothing costs"
        f" ln {V} = {math.log(V):.2f}: start with smaller weights"
    )
    for name, weight in model.named_parameters():
        if weight.dim() == 1:
            due = 0 if name.endswith("bias") else 1
            assert (weight == due).all(), f"{name} must start at {due}"
            continue
        found, due = weight.std().item(), 0.02
        if name.endswith("projection.weight"):
            due = 0.02 / math.sqrt(2 * config.layers)
        elif name.startswith("positions") and found < 0.015:
            due = 0.01  # as in OpenAI's code
        assert abs(found / due - 1) < 0.1, (
            f"{name} starts with a standard deviation of {found:.4f}, not {due:.4f}"
        )


@torch.enable_grad()
def _check_gradients(model: nn.Module, ours: GPT, ids: Tensor) -> None:
    """Every parameter learns what it learns in GPT."""
    cut = "is something detached, or under no_grad?"
    for part in (model, ours):
        logits = part(ids)
        assert logits.requires_grad, f"no gradient flows through the model: {cut}"
        logits.square().mean().backward()
    found = dict(model.named_parameters())
    for name, parameter in ours.named_parameters():
        wanted, grad = parameter.grad, found[name].grad
        grad = torch.zeros_like(wanted) if grad is None else grad
        assert (grad - wanted).abs().max() < 1e-3 * wanted.abs().max(), (
            f"{name} gets another gradient than in GPT: {cut}"
        )


def _check_dropout(model: nn.Module, dropping: nn.Module, ids: Tensor) -> None:
    """dropping: a model of the same sizes that drops nearly everything in training."""
    dropping.load_state_dict(model.state_dict())
    assert torch.allclose(dropping.double().eval()(ids), model(ids)), (
        "dropout acts after eval(), too: it belongs to training"
    )
    found = dropping.train()(ids)
    assert torch.allclose(found, model.head(model.norm.bias).expand_as(found)), (
        "dropout must act on tokens + positions and on what each part of a block adds"
    )
    x = torch.arange(48.0, dtype=torch.float64).sin().view(1, 6, 8)
    for block in dropping.blocks:
        read = block.attention(x)
        assert torch.allclose(read, read[:, :1].expand_as(read)), (
            "dropout must act on the weights of attention, too"
        )


def _check_refusals(model: nn.Module) -> None:
    """What the model can't read raises ValueError. V is 11 and the context 6."""
    wrong = [
        (torch.tensor([[0, 11]]), "id 11 is not in a vocabulary of 11"),
        (torch.tensor([[0, -1]]), "id -1 would count from the end"),
        (torch.zeros(1, 7, dtype=torch.int64), "7 tokens exceed a context of 6"),
        (torch.zeros(3, dtype=torch.int64), "ids (T,) lack the batch"),
        (torch.zeros(1, 3), "floats are no ids"),
        (torch.zeros(1, 3, dtype=torch.int32), "ids have 64 bits, not 32"),
        (torch.zeros(1, 0, dtype=torch.int64), "there must be an id"),
    ]
    for ids, why in wrong:
        _raises_value_error(why, model, ids)


@torch.no_grad()
def check_gpt(gpt: Callable[[GPTConfig], nn.Module]) -> None:
    """A GPT-2: its parts in order, causal, tied, a fair start, bad ids refused.

    gpt: called as gpt(config). The model has the parts tokens, positions, blocks, norm
    and head, each block those of `Block`.

    Book: 10_gpt.html#the-checks
    """
    small = GPTConfig(vocab_size=11, context=6, layers=2, heads=2, width=8)
    larger = GPTConfig(vocab_size=500, context=64, layers=3, heads=2, width=64)
    other = replace(larger, heads=4, tied=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, untrained = gpt(small).double().eval(), gpt(larger).eval()
        dropping, untied = gpt(replace(small, dropout=1 - 1e-9)), gpt(other).eval()
    random = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.normal_(0.0, 0.3, generator=random)
    for shape in ((2, 6), (1, 3), (1, 1)):
        _check_assembly(model, torch.randint(11, shape, generator=random))
    _check_start(untrained, larger)
    assert untied.head.weight is not untied.tokens.weight, "tied=False was ignored"
    _check_start(untied, other)
    _check_refusals(model)
    ids = torch.randint(11, (2, 6), generator=random)
    for part, config in ((model, small), (untied.double(), other)):
        ours = GPT(config).double().eval()
        missing = ours.load_state_dict(part.state_dict(), strict=False).missing_keys
        assert not missing, f"nothing in the model is called {missing[0]}"
        assert torch.allclose(part(ids), ours(ids)), (
            f"with {config.heads} heads and tied={config.tied} the same weights give"
            " other logits in GPT: look at the heads, the GELU, the norms"
        )
        _check_gradients(part, ours, ids)
    _check_causal(model.train(), ids)
    model.eval()
    _check_dropout(model, dropping, ids)


def check_parameter_count(count: Callable[[int, int, int, int], int]) -> None:
    """The number of parameters of a GPT-2, from V, T, L and C.

    count: called as count(V, T, L, C).

    Book: 10_gpt.html#exercise-1-count-with-a-pencil
    """
    V, T, L, C = 50, 16, 3, 10
    wanted = GPT(GPTConfig(V, T, L, 2, C)).parameter_count()
    found = count(V, T, L, C)
    mistakes = {
        V * C: "the tied table was counted twice",
        V: "the head has no bias",
        -T * C: "the table of positions is missing",
        -V * C: "the table of tokens is missing",
        -2 * C: "the last norm is missing",
        -C: "the last norm has a bias too",
        -4 * C * L: "the biases of attention, or the norms of the blocks, are missing",
        -5 * C * L: "the biases of the MLP are missing",
        -2 * C * L: "a block has two norms",
        -2 * C * L - C: "norms have a bias too",
        -3 * C * L: "the biases of qkv are missing",
        -9 * C * L: "the biases of the linear layers are missing",
        -13 * C * L: "biases and norms of the blocks are missing",
        -13 * C * L - 2 * C: "biases and norms are missing",
    }
    mistake = mistakes.get(found - wanted, f"off by {found - wanted:,}")
    assert found == wanted, f"{found:,} instead of {wanted:,}: {mistake}"
    assert count(50_257, 1024, 12, 768) == 124_439_808, "GPT-2 has 124,439,808"


def _condition(model: nn.Module) -> tuple[list, list]:
    """What reading must not change: parts, modes, hooks, numbers, and what learns."""
    parts = [
        (name, part.training, len(vars(part)), len(hooks))
        for name, part in model.named_modules()
        for hooks in (part._forward_hooks, part._forward_pre_hooks)
    ]
    return parts, [(p.requires_grad, p.tolist()) for p in model.parameters()]


@torch.no_grad()
def check_early_logits(early: Callable[[GPT, Tensor, int], Tensor]) -> None:
    """The head reads the stream after the first blocks, through the last norm.

    early: called as early(model, ids, layers).

    Book: 10_gpt.html#exercise-1-count-with-a-pencil
    """
    random = torch.Generator().manual_seed(0)
    model = GPT(GPTConfig(11, 6, 3, 2, 8, tied=False)).double().eval()
    for parameter in model.parameters():
        parameter.normal_(0.0, 0.3, generator=random)
    before = _condition(model)
    for length in (4, 1):
        ids = torch.randint(11, (2, length), generator=random)
        stream = model.tokens(ids) + model.positions(torch.arange(length))
        full, unmoved = model(ids), model.head(model.norm(stream))
        for layers in range(4):
            found = early(model, ids, layers)
            assert _condition(model) == before, (
                "blocks, weights, requires_grad, mode or hooks of the model changed:"
                " leave it as it is"
            )
            wanted = model.head(model.norm(stream))
            shapes = f"{tuple(found.shape)}, not {tuple(wanted.shape)}"
            assert found.shape == wanted.shape, f"logits have shape {shapes}"
            assert not torch.allclose(found, wanted.softmax(-1)), (
                "these are probabilities: return the logits"
            )
            assert not torch.allclose(found, model.head(stream)), (
                "the last norm is missing"
            )
            assert layers == 3 or not torch.allclose(found, full), (
                f"with {layers} layers all three blocks still took part"
            )
            assert layers == 0 or not torch.allclose(found, unmoved), (
                "what the blocks return was thrown away: x = block(x)"
            )
            stream = model.blocks[layers](stream) if layers < 3 else stream
            more = model.head(model.norm(stream))
            assert layers == 3 or not torch.allclose(found, more), (
                f"one block too many: the first {layers} are blocks[:{layers}]"
            )
            assert torch.allclose(found, wanted), (
                f"after {layers} blocks the logits are head(norm(stream)): were the"
                " positions added, the blocks taken in order, and `head` asked?"
            )


def check_own_parts(parts: Callable[[], tuple[Callable[..., Any], ...]]) -> None:
    """A GPT of your own attention, GELU and layer norm gives GPT's logits, and learns.

    parts: returns the three functions, called as `by_hand` calls them.

    Book: 10_gpt.html#exercise-1-count-with-a-pencil
    """
    random = torch.Generator().manual_seed(0)
    model = GPT(GPTConfig(11, 6, 2, 2, 8)).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0.0, 0.3, generator=random)
    ids = torch.randint(11, (2, 6), generator=random)
    attention, gelu, layer_norm = parts()
    made = {
        "attention": by_hand(model, attention=attention),
        "GELU": by_hand(model, gelu=gelu),
        "layer norm": by_hand(model, layer_norm=layer_norm),
    }
    for name, own in made.items():
        gap = (own(ids) - model(ids)).abs().max().item()
        assert gap < 1e-8, f"with your {name} the logits differ by up to {gap:.2g}"
        _check_gradients(own, model, ids)
        model.zero_grad()


def check_budget(choose: Callable[[float], GPTConfig]) -> None:
    """A configuration whose training takes between half of a budget and all of it.

    choose: called as choose(budget), in floating-point operations.

    Book: 10_gpt.html#exercise-1-count-with-a-pencil
    """
    for budget in (1e13, 2e13, 1e15, 1e17, 3e13, 2e14, 4e16):
        config = choose(budget)
        assert isinstance(config, GPTConfig), "return a GPTConfig"
        assert config.vocab_size == 500, f"vocab_size is {config.vocab_size}, not 500"
        assert config.context == 128, f"context is {config.context}, not 128"
        assert config.tied, "a GPT-2 ties its head"
        head_width = config.width // config.heads
        assert head_width == 32, f"heads have width {head_width}, not 32"
        assert config.layers <= 48, f"{config.layers} layers: at most 48 are wanted"
        with torch.device("meta"):
            model = GPT(config)
        share = 20 * model.parameter_count() * model.flops_per_token() / budget
        assert share <= 1, f"{share:.2%} of the budget {budget:.0e} would be spent"
        assert share >= 0.5, (
            f"{share:.2%} of the budget {budget:.0e} is used: at least 50% are wanted"
        )
