"""Looking inside: traces, ledgers, attribution, ablation and lenses."""

import pytest
import torch

from glassgpt.gpt import GPTConfig, by_hand
from glassgpt.inspection import (
    attribute,
    fit_lens,
    induction_scores,
    ledger,
    logit_lens,
    trace,
    watch,
    without,
)
from glassgpt.modern import LLAMA_CHOICES, ModernConfig, build

SIZES = {"vocab_size": 13, "context": 10, "layers": 3, "heads": 4, "width": 24}
CONFIGS = [
    GPTConfig(**SIZES),
    ModernConfig(**SIZES, zero_projections=False),
    ModernConfig(**SIZES, key_value_heads=2, **LLAMA_CHOICES),
    ModernConfig(**SIZES, norm="layer", bias=True, activation="gelu"),
]


def make(config):
    torch.manual_seed(0)
    model = build(config).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model, torch.randint(13, (2, 8))


def near(found, wanted, error=1e-12):
    torch.testing.assert_close(found, wanted, atol=error, rtol=0)


@pytest.mark.parametrize("config", CONFIGS)
def test_the_ledger_balances_and_shares_add_up(config):
    model, ids = make(config)
    seen = trace(model, ids)
    with torch.no_grad():
        near(seen["logits"], model(ids))
    near(logit_lens(model, seen["2.stream"]), seen["logits"])
    parts = ledger(model, seen)
    near(sum(parts.values()), seen["2.stream"])
    direction = torch.randn(24, dtype=torch.float64)
    shares = attribute(model, parts, direction)
    near(sum(shares.values()), seen["final"] @ direction, error=1e-11)
    found = [*seen.values(), *parts.values(), *shares.values()]
    assert not any(value.requires_grad for value in found)


def test_a_model_by_hand_is_traced_and_keeps_its_own_attention():
    model, ids = make(CONFIGS[0])
    copy = by_hand(model)
    own = [block.attention.attend for block in copy.blocks]
    near(trace(copy, ids)["1.weights"], trace(model, ids)["1.weights"])
    assert [block.attention.attend for block in copy.blocks] == own


def test_after_an_error_the_model_trains_as_before():
    model, ids = make(CONFIGS[0])
    called = []

    def fail(name, value):
        called.append(name)
        raise RuntimeError(name)

    with pytest.raises(RuntimeError, match="embedding"):
        trace(model.train(), ids, fail)
    model(ids).sum().backward()
    assert called == ["embedding"]
    assert model.training
    assert model.tokens.weight.grad.any()


@pytest.mark.parametrize("place", ["0.mlp", "0.contexts", "logits"])
def test_an_edit_that_returns_nothing_is_refused(place):
    model, ids = make(CONFIGS[0])
    with pytest.raises(TypeError, match=place):
        trace(model, ids, lambda name, value: None if name == place else value)


@pytest.mark.parametrize(("head", "kind"), [((3, 0), KeyError), ((1, 4), IndexError)])
def test_a_head_that_the_model_lacks_is_an_error(head, kind):
    model, ids = make(CONFIGS[0])
    with pytest.raises(kind):
        without([head], trace(model, ids))


def test_what_the_tools_cannot_answer_is_refused():
    model, ids = make(CONFIGS[0])
    seen = trace(model, ids)
    parts = {n: p for n, p in ledger(model, seen).items() if "head" in n}
    with pytest.raises(ValueError, match="the whole ledger"):
        attribute(model, parts, torch.randn(24, dtype=torch.float64))
    with pytest.raises(ValueError, match="16 positions fit any lens"):
        fit_lens(seen["0.stream"], seen["2.stream"])


def test_heads_taken_out_have_their_usual_mean_and_the_others_stay():
    model, ids = make(CONFIGS[2])
    usual, seen = trace(model, ids.flip(1)[:1, 1:]), trace(model, ids)
    edit = without([(0, 1), (1, 0), (1, 3)], usual)
    removed = {"0.contexts": [1], "1.contexts": [0, 3]}
    for name, value in [*seen.items(), ("11.contexts", seen["1.contexts"])]:
        before = value.clone()
        after = edit(name, value)
        assert torch.equal(value, before)
        for head in removed.get(name, []):
            mean = usual[name][:, head].mean((0, 1))
            near(after[:, head], mean.expand_as(after[:, head]))
            before[:, head] = after[:, head]
        assert torch.equal(after, before)


def test_removing_every_head_leaves_nothing_of_other_positions():
    model, ids = make(CONFIGS[0])
    other = ids.clone()
    other[:, 0] = (other[:, 0] + 1) % 13
    everyone = [(layer, head) for layer in range(3) for head in range(4)]
    edit = without(everyone, trace(model, ids))
    one, two = (trace(model, text, edit)["logits"] for text in (ids, other))
    assert torch.equal(one[:, 1:], two[:, 1:])
    assert not torch.equal(one[:, 0], two[:, 0])


def test_watch_lets_gradients_through():
    model, ids = make(CONFIGS[2])
    kept = {}
    with watch(model, lambda name, value: kept.setdefault(name, value)):
        logits = model(ids)
    (slope,) = torch.autograd.grad(logits[0, -1, 3], kept["1.stream"])
    assert slope[0].abs().sum() > 0
    assert not slope[1].any()


def test_a_fitted_lens_finds_a_linear_relation():
    torch.manual_seed(0)
    stream = torch.randn(4, 30, 8, dtype=torch.float64)
    matrix, bias = torch.randn(8, 8).double(), torch.randn(8).double()
    lens = fit_lens(stream, stream @ matrix.T + bias)
    other = torch.randn(5, 8, dtype=torch.float64)
    torch.testing.assert_close(lens(other), other @ matrix.T + bias)


def test_induction_scores_of_a_perfect_head():
    weights = torch.zeros(1, 2, 8, 8)
    for t in range(4, 8):
        weights[:, 1, t, t - 3] = 1
    scores = induction_scores({"0.weights": weights, "logits": weights})
    assert scores.tolist() == [[0, 1]]
