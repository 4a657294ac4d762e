# Written by tools/tangle.py from book/10_gpt.ipynb: change it there.
"""Checks of configurations and whole models that name the mistake they find."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glassgpt.gpt import GPT, GPTConfig

_IMPOSSIBLE = [
    ({"vocab_size": 0}, "there must be a token"),
    ({"layers": -1}, "a number of layers can't be negative"),
    ({"layers": 2.5}, "there is no half layer"),
    ({"heads": 0}, "somebody has to look"),
    ({"context": True}, "True is not a length"),
    ({"width": 10, "heads": 4}, "10 columns don't split into 4 heads"),
    ({"dropout": 1.0}, "nothing would be left"),
    ({"dropout": math.nan}, "nan is no share"),
    ({"dropout": -0.1}, "a share can't be negative"),
    ({"positions": "absolute"}, "no such positions"),
    ({"norm": "batch"}, "no such norm"),
    ({"activation": "relu"}, "no such activation"),
    ({"bias": "no"}, "a text is not a yes or no"),
    ({"tied": 1}, "1 is not a yes or no"),
    ({"positions": "sinusoidal", "width": 7, "heads": 1}, "7 columns have no pairs"),
    ({"positions": "rotary", "width": 6}, "heads of 3 columns have no pairs"),
]


def _error(function: Callable[..., Any], *args: Any, **values: Any) -> Exception | None:
    """The exception that a call raises, if any."""
    try:
        function(*args, **values)
    except Exception as error:
        return error
    return None


def check_config(config: Callable[..., Any]) -> None:
    """Possible models are accepted; impossible ones raise a ValueError that says why.

    config: called with the names of `GPTConfig`.

    Book: 10_gpt.html#the-check-of-the-configuration
    """
    small = {"vocab_size": 11, "context": 6, "layers": 2, "heads": 2, "width": 8}
    for name, value in small.items():
        found = getattr(config(**small), name)
        assert found == value, f"{name}={value} became {found}"
    others = {"dropout": 0.1, "positions": "rotary", "norm": "rms", "bias": False}
    others |= {"activation": "squared_relu", "normalize_qk": True, "tied": False}
    chosen = config(**small, **others)
    for name, value in others.items():
        found = getattr(chosen, name, None)
        assert found == value, f"{name}={value} became {found}"
    for change, why in _IMPOSSIBLE:
        error = _error(config, **{**small, **change})
        assert error is not None, f"{change} was accepted, but {why}"
        assert isinstance(error, ValueError), (
            f"{change} raises {type(error).__name__}: raise a ValueError"
        )
        assert any(name in str(error) for name in change), (
            f"the error for {change} names none of them: {error}"
        )


def _by_hand(model: nn.Module, ids: Tensor, omit: str = "") -> Tensor:
    """Logits from the parts of a model, of which one may be left out."""
    x = model.tokens(ids)
    if omit != "positions":
        x = x + model.positions(torch.arange(ids.shape[1]))
    for block in model.blocks[1:] if omit == "block" else model.blocks:
        x = block(x)
    return model.head(x if omit == "norm" else model.norm(x))


def _check_assembly(model: nn.Module, ids: Tensor) -> None:
    """The logits are those of the parts, one after the other."""
    found = model(ids)
    shape = (*ids.shape, model.tokens.weight.shape[0])
    assert found.shape == shape, f"logits {tuple(found.shape)}, not (B, T, V) = {shape}"
    mistakes = {
        "positions": "the positions are missing",
        "norm": "the last norm, before the head, is missing",
        "block": "the first block is left out",
    }
    for part, mistake in mistakes.items():
        assert not torch.allclose(found, _by_hand(model, ids, omit=part)), mistake
    _check_causal(model, ids)
    assert torch.allclose(found, _by_hand(model, ids)), (
        "the logits are head(norm(blocks(tokens + positions)))"
    )


def _check_causal(model: nn.Module, ids: Tensor) -> None:
    """Another token changes its own row and later ones, and none before."""
    before = model(ids)
    for changed in range(ids.shape[1]):
        other = ids.clone()
        other[:, changed] = (ids[:, changed] + 1) % model.tokens.weight.shape[0]
        moved = (model(other) - before).abs().amax(-1).amax(0)  # (T,)
        for row, distance in enumerate(moved.tolist()):
            assert row >= changed or distance < 1e-9, (
                f"row {row} looks at position {changed}: the future leaks"
            )
            assert row < changed or distance > 0, (
                f"row {row} does not see position {changed}: the past is hidden"
            )


def _check_start(model: nn.Module, config: GPTConfig) -> None:
    """The untrained loss is that of knowing nothing, and the head is tied."""
    count = sum(parameter.numel() for parameter in model.parameters())
    table = config.vocab_size * config.width
    wanted = GPT(config).parameter_count()
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
    small = 0.02 / math.sqrt(2 * config.layers)
    for name, weight in model.named_parameters():
        due = small if name.endswith("projection.weight") else 0.02
        found = weight.std().item() if weight.dim() == 2 else due
        assert abs(found / due - 1) < 0.1, (
            f"{name} starts with a spread of {found:.4f}, not {due:.4f}"
        )


def _check_door(model: nn.Module) -> None:
    """What the model can't take raises ValueError. V is 11 and the context 6."""
    wrong = [
        (torch.tensor([[0, 11]]), "id 11 is not in a vocabulary of 11"),
        (torch.tensor([[0, -1]]), "id -1 would count from the end"),
        (torch.zeros(1, 7, dtype=torch.int64), "7 tokens exceed a context of 6"),
        (torch.zeros(3, dtype=torch.int64), "ids (T,) lack the batch"),
        (torch.zeros(1, 3), "floats are no ids"),
    ]
    for ids, why in wrong:
        error = _error(model, ids)
        assert error is not None, f"ids were accepted, but {why}"
        assert isinstance(error, ValueError), (
            f"{why}: raise a ValueError, not {type(error).__name__}"
        )


@torch.no_grad()
def check_gpt(gpt: Callable[[GPTConfig], nn.Module]) -> None:
    """A GPT-2: its parts in order, causal, tied, with a fair start and a door.

    gpt: called as gpt(config). The model has the parts tokens, positions, blocks, norm
    and head.

    Book: 10_gpt.html#the-checks
    """
    small = GPTConfig(vocab_size=11, context=6, layers=2, heads=2, width=8)
    larger = GPTConfig(vocab_size=500, context=64, layers=2, heads=2, width=64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, untrained = gpt(small).double().eval(), gpt(larger).eval()
    random = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.normal_(0.0, 0.3, generator=random)
    for time in (6, 3):
        _check_assembly(model, torch.randint(11, (2, time), generator=random))
    _check_start(untrained, larger)
    _check_door(model)


def check_parameter_count(count: Callable[[int, int, int, int], int]) -> None:
    """The number of parameters of a GPT-2, from V, T, L and C.

    count: called as count(V, T, L, C).

    Book: 10_gpt.html#exercise-1-count-with-a-pencil
    """
    V, T, L, C = 50, 16, 3, 8
    wanted = GPT(GPTConfig(V, T, L, 2, C)).parameter_count()
    found = count(V, T, L, C)
    mistakes = {
        V * C: "the tied table was counted twice",
        -T * C: "the table of positions is missing",
        -V * C: "the table of tokens is missing",
        -2 * C: "the last norm is missing",
        -4 * C * L: "the two norms of each block are missing",
        -9 * C * L: "the biases of the linear layers are missing",
        -13 * C * L: "biases and norms of the blocks are missing",
        -13 * C * L - 2 * C: "biases and norms are missing",
    }
    mistake = mistakes.get(found - wanted, f"off by {found - wanted:,}")
    assert found == wanted, f"{found:,} instead of {wanted:,}: {mistake}"
    assert count(50_257, 1024, 12, 768) == 124_439_808, "GPT-2 has 124,439,808"


@torch.no_grad()
def check_early_logits(early: Callable[[GPT, Tensor, int], Tensor]) -> None:
    """The head reads the stream after the first blocks, through the last norm.

    early: called as early(model, ids, layers).

    Book: 10_gpt.html#exercise-2-what-does-the-model-think-halfway
    """
    random = torch.Generator().manual_seed(0)
    model = GPT(GPTConfig(11, 6, 3, 2, 8)).double().eval()
    for parameter in model.parameters():
        parameter.normal_(0.0, 0.3, generator=random)
    ids = torch.randint(11, (2, 4), generator=random)
    stream = model.tokens(ids) + model.positions(torch.arange(4))
    full = model(ids)
    for layers in range(4):
        found, wanted = early(model, ids, layers), model.head(model.norm(stream))
        assert len(model.blocks) == 3, "the model lost blocks: leave it as it is"
        assert found.shape == wanted.shape, f"logits have shape {tuple(found.shape)}"
        assert not torch.allclose(found, model.head(stream)), "the last norm is missing"
        assert layers == 3 or not torch.allclose(found, full), (
            f"with {layers} layers all three blocks still took part"
        )
        assert torch.allclose(found, wanted), (
            f"after {layers} blocks the logits are head(norm(stream)): were the"
            " positions added, and the blocks taken in order?"
        )
        stream = model.blocks[layers](stream) if layers < 3 else stream


def check_budget(choose: Callable[[float], GPTConfig]) -> None:
    """A configuration whose training takes between half of a budget and all of it.

    choose: called as choose(budget), in floating-point operations.

    Book: 10_gpt.html#exercise-3-a-model-for-a-budget
    """
    for budget in (1e13, 1e15, 1e17, 3e13, 2e14, 4e16):
        config = choose(budget)
        assert config.vocab_size == 500, f"vocab_size is {config.vocab_size}, not 500"
        assert config.context == 128, f"context is {config.context}, not 128"
        assert config.head_width == 32, f"heads have width {config.head_width}, not 32"
        sizes = {"layers": config.layers, "heads": config.heads, "width": config.width}
        modern = GPTConfig.modern(500, context=128, dropout=config.dropout, **sizes)
        assert config == modern, "the other choices are not those of GPTConfig.modern"
        with torch.device("meta"):
            model = GPT(config)
        share = 20 * model.parameter_count() * model.flops_per_token() / budget
        assert share <= 1, f"a budget of {budget:.0e} is overspent {share:.1f} times"
        assert share >= 0.5, f"only {share:.0%} of the budget {budget:.0e} is used"
