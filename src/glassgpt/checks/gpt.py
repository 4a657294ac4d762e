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
from torch.func import functional_call

from glassgpt.checks.expect import expect_same
from glassgpt.gpt import GPT, GPTConfig, by_hand


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
    made = config(**small)
    for name, value in small.items():
        found = getattr(made, name)
        assert found == value, f"{name}={value} became {found}"
    impossible = [
        ("vocab_size", 0, "vocab_size is a whole number from 1 up, not 0"),
        ("layers", 2.5, "layers is a whole number from 1 up, not 2.5"),
        ("width", 9, "a width of 9 doesn't split into 2 heads"),
        ("dropout", 1.0, "with dropout 1 nothing would be left"),
    ]
    for name, value, why in impossible:
        message = _raises_value_error(why, config, **{**small, name: value})
        assert name in message, f"the error for {name} doesn't name it: {message}"
    with suppress(AttributeError):
        made.width = 16
    assert made.width == 8, "a configuration can be changed: make it frozen"


def _random_weights(model: nn.Module) -> nn.Module:
    """The same model with large random weights, in float64, as it is when it writes."""
    random = torch.Generator().manual_seed(0)
    for parameter in model.double().parameters():
        nn.init.normal_(parameter, 0.0, 0.3, generator=random)
    return model.eval()


def _empty(config: GPTConfig) -> GPT:
    """GPT without numbers in it, to count them or to compute with those of another."""
    with torch.device("meta"):
        return GPT(config)


def _check_start(model: nn.Module, config: GPTConfig) -> None:
    """The head is tied, and the untrained loss that of knowing nothing."""
    count = sum(parameter.numel() for parameter in model.parameters())
    wanted = _empty(config).parameter_count()
    table = config.vocab_size * config.width
    assert count != wanted + table, "the head has a table of its own: tie it"
    assert count == wanted, f"{count} parameters, not {wanted}"
    ids = torch.arange(2 * config.context).view(2, -1) % config.vocab_size
    logits, targets = model(ids), ids.flip(1)
    wanted = (*ids.shape, config.vocab_size)
    shape = tuple(logits.shape)
    assert shape == wanted, f"the shape is {shape}, not (B, T, V) = {wanted}"
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten()).item()
    nothing = math.log(config.vocab_size)
    assert abs(loss - nothing) < 0.1, (
        f"the untrained loss is {loss:.2f}, but knowing nothing costs"
        f" ln {config.vocab_size} = {nothing:.2f}: start with smaller weights"
    )
    due = 0.02 / math.sqrt(2 * config.layers)
    for name, weight in model.named_parameters():
        if name.endswith("projection.weight"):
            found = weight.std().item()
            assert abs(found / due - 1) < 0.1, (
                f"{name} starts with a standard deviation of {found:.4f}, not"
                f" {due:.4f}: divide by the root of the number of additions"
            )


def _check_same(model: nn.Module, config: GPTConfig, ids: Tensor) -> None:
    """The logits and gradients are those of GPT with the model's weights."""
    ours, weights = _empty(config).eval(), dict(model.named_parameters())
    for name, _ in ours.named_parameters():
        assert name in weights, f"nothing in the model is called {name}"

    def run(ids: Tensor, positions: bool = True, norm: bool = True) -> Tensor:
        x = model.tokens(ids)
        if positions:
            x = x + model.positions(torch.arange(ids.shape[1]))
        for block in model.blocks:
            x = block(x)
        return model.head(model.norm(x) if norm else x)

    def after_adding(ids: Tensor) -> Tensor:
        x = model.tokens(ids) + model.positions(torch.arange(ids.shape[1]))
        for block in model.blocks:
            x = block.attention_norm(x + block.attention(x))
            x = block.mlp_norm(x + block.mlp(x))
        return model.head(model.norm(x))

    expect_same(
        model,
        lambda ids: functional_call(ours, weights, (ids,)),
        ids,
        mistakes={
            "the positions are missing": lambda ids: run(ids, positions=False),
            "the last norm, before the head, is missing": (
                lambda ids: run(ids, norm=False)
            ),
            "the blocks normalize after adding: normalize what each part reads": (
                after_adding
            ),
        },
        parameters=weights,
        hint=(
            f"with {config.heads} heads and tied={config.tied} the same weights give"
            " other logits in GPT: look at the heads, the GELU, the norms"
        ),
    )


def check_gpt(gpt: Callable[[GPTConfig], nn.Module]) -> None:
    """A GPT-2: its parts in order, causal, tied, a fair start, bad ids refused.

    gpt: called as gpt(config). The model has the parts tokens, positions, blocks, norm
    and head, each block those of `Block`.

    Book: 10_gpt.html#the-checks
    """
    small = GPTConfig(vocab_size=11, context=6, layers=2, heads=2, width=8)
    larger = GPTConfig(vocab_size=500, context=64, layers=3, heads=4, width=64)
    free = replace(small, heads=4, tied=False)
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(11, (2, 6), generator=random)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        _check_start(gpt(larger).eval(), larger)
        model, untied = _random_weights(gpt(small)), _random_weights(gpt(free))
        dropping = gpt(replace(small, dropout=1 - 1e-9)).double()
        dropped = dropping.train()(ids)
    other = ids.clone()
    other[:, -1] = (ids[:, -1] + 1) % 11
    for training in (True, False):
        moved = model.train(training)(other) - model(ids)
        assert moved[:, :-1].abs().max() < 1e-6, (
            "the last token changes what earlier positions say: the future leaks"
        )
    _check_same(model, small, ids)
    _check_same(model, small, ids[:1, :1])
    assert untied.head.weight is not untied.tokens.weight, "tied=False was ignored"
    _check_same(untied, free, ids)
    nothing = dropping.head(dropping.norm.bias).expand_as(dropped)
    assert torch.allclose(dropped, nothing), (
        "dropout must act on tokens + positions and on what each part of a block adds"
    )
    assert not torch.allclose(dropping.eval()(ids), dropped), (
        "dropout acts after eval(), too: it belongs to training"
    )
    wrong = [
        (torch.tensor([[0, 11]]), "id 11 is not in a vocabulary of 11"),
        (torch.tensor([[0, -1]]), "id -1 would count from the end"),
        (torch.zeros(1, 7, dtype=torch.int64), "7 tokens exceed a context of 6"),
    ]
    for bad, why in wrong:
        _raises_value_error(why, model, bad)


def check_parameter_count(count: Callable[[int, int, int, int], int]) -> None:
    """The number of parameters of a GPT-2, from V, T, L and C.

    count: called as count(V, T, L, C).

    Book: 10_gpt.html#exercise-1-count-with-a-pencil
    """
    V, T, L, C = 50, 16, 3, 10
    wanted = _empty(GPTConfig(V, T, L, 2, C)).parameter_count()
    found = count(V, T, L, C)
    mistakes = {
        V * C: "the tied table was counted twice",
        -T * C: "the table of positions is missing",
        -13 * C * L - 2 * C: "biases and norms are missing",
    }
    mistake = mistakes.get(found - wanted, f"off by {found - wanted:,}")
    assert found == wanted, f"{found:,} instead of {wanted:,}: {mistake}"
    assert count(50_257, 1024, 12, 768) == 124_439_808, "GPT-2 has 124,439,808"


@torch.no_grad()
def check_early_logits(early: Callable[[GPT, Tensor, int], Tensor]) -> None:
    """The head reads the stream after the first blocks, through the last norm.

    early: called as early(model, ids, layers).

    Book: 10_gpt.html#exercise-1-count-with-a-pencil
    """
    with torch.random.fork_rng(devices=[]):
        model = _random_weights(GPT(GPTConfig(11, 6, 3, 2, 8, tied=False)))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ids = torch.tensor([[3, 1, 4, 1], [5, 9, 2, 6]])

    def stream(ids: Tensor, layers: int) -> Tensor:
        x = model.tokens(ids) + model.positions(torch.arange(ids.shape[1]))
        for block in model.blocks[:layers]:
            x = block(x)
        return x

    def logits(ids: Tensor, layers: int) -> Tensor:
        return model.head(model.norm(stream(ids, layers)))

    for layers in range(4):
        expect_same(
            lambda ids, layers=layers: early(model, ids, layers),
            lambda ids, layers=layers: logits(ids, layers),
            ids,
            mistakes={
                f"with {layers} layers all three blocks still took part": (
                    lambda ids: logits(ids, 3)
                ),
                "the last norm is missing": (
                    lambda ids, layers=layers: model.head(stream(ids, layers))
                ),
                f"one block too many: the first {layers} are blocks[:{layers}]": (
                    lambda ids, layers=layers: logits(ids, layers + 1)
                ),
            },
            hint=f"after {layers} blocks the logits are head(norm(stream)): were the"
            " positions added, and the blocks taken in order?",
        )
        after = model.state_dict()
        same = all(torch.equal(after[name], before[name]) for name in before)
        assert same, "the weights of the model changed: leave it as it is"
        assert not model.training, "the model's mode changed: leave it as it is"


def check_own_parts(parts: Callable[[], tuple[Callable[..., Any], ...]]) -> None:
    """A GPT of your own attention, GELU and layer norm gives GPT's logits, and learns.

    parts: returns the three functions, called as `by_hand` calls them.

    Book: 10_gpt.html#exercise-1-count-with-a-pencil
    """
    with torch.random.fork_rng(devices=[]):
        model = _random_weights(GPT(GPTConfig(11, 6, 2, 2, 8)))
    weights = dict(model.named_parameters())
    attention, gelu, layer_norm = parts()
    made = {
        "attention": by_hand(model, attention=attention),
        "GELU": by_hand(model, gelu=gelu),
        "layer norm": by_hand(model, layer_norm=layer_norm),
    }
    for name, own in made.items():
        expect_same(
            lambda ids, own=own: functional_call(own, weights, (ids,)),
            model,
            torch.tensor([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]]),
            parameters=weights,
            hint=f"with your {name} the model gives other logits",
        )


def check_budget(choose: Callable[[float], GPTConfig]) -> None:
    """A configuration whose training takes between half of a budget and all of it.

    choose: called as choose(budget), in floating-point operations.

    Book: 10_gpt.html#exercise-1-count-with-a-pencil
    """
    for budget in (1e13, 2e13, 3e13, 1e15, 1e17):
        config = choose(budget)
        assert isinstance(config, GPTConfig), "return a GPTConfig"
        assert config.vocab_size == 500, f"vocab_size is {config.vocab_size}, not 500"
        assert config.context == 128, f"context is {config.context}, not 128"
        head_width = config.width // config.heads
        assert head_width == 32, f"heads have width {head_width}, not 32"
        assert config.layers <= 48, f"{config.layers} layers: at most 48 are wanted"
        model = _empty(config)
        share = 20 * model.parameter_count() * model.flops_per_token() / budget
        assert share <= 1, f"{share:.2%} of the budget {budget:.0e} would be spent"
        assert share >= 0.5, (
            f"{share:.2%} of the budget {budget:.0e} is used: at least 50% are wanted"
        )
