"""Looking inside: traces, ledgers, attribution, ablation and lenses."""

import pytest
import torch

from glassgpt.checks import inspection as checks
from glassgpt.gpt import GPTConfig
from glassgpt.heads import fused_attention
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


def test_checks_leave_the_random_state_alone():
    before = torch.get_rng_state()
    checks.check_ledger(ledger)
    assert torch.equal(torch.get_rng_state(), before)


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


def test_an_error_leaves_no_hooks():
    model, ids = make(CONFIGS[0])

    def fail(name, value):
        raise RuntimeError(name)

    with pytest.raises(RuntimeError, match="embedding"):
        trace(model, ids, fail)
    assert all(b.attention.attend is fused_attention for b in model.blocks)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_an_edit_that_returns_nothing_is_refused():
    model, ids = make(CONFIGS[0])
    for last in ("0.mlp", "0.contexts", "logits"):
        with pytest.raises(TypeError, match=last):
            trace(
                model,
                ids,
                lambda name, value, last=last: None if name == last else value,
            )


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


def swapped_biases(model, seen):
    parts = ledger(model, seen)
    if "0.bias" in parts:
        parts["0.bias"], parts["1.bias"] = parts["1.bias"], parts["0.bias"]
    return parts


def edits_all_but(place):
    def wrong(model, ids, edit=None):
        def some(name, value):
            return edit(name, value) if edit and not name.endswith(place) else value

        return trace(model, ids, some)

    return wrong


def stays_on_an_error(model, ids, edit=None):
    try:
        return trace(model, ids, edit)
    except ZeroDivisionError:
        model.norm.register_forward_hook(lambda part, inputs, out: None)
        raise


def scales_the_queries(model, ids, edit=None):
    """Products of queries and keys stay, so the weights do not tell."""
    seen = trace(model, ids, edit)
    seen["0.queries"], seen["0.keys"] = 2 * seen["0.queries"], seen["0.keys"] / 2
    return seen


def with_gradients(model, ids, edit=None):
    seen = trace(model, ids, edit)
    return {name: value.requires_grad_() for name, value in seen.items()}


def trains_afterwards(model, ids, edit=None):
    seen = trace(model, ids, edit)
    model.train()
    return seen


def mode_of_the_root(model, ids, edit=None):
    was = model.training
    try:
        return trace(model.eval(), ids, edit)
    finally:
        model.train(was)


def freezes(model, ids, edit=None):
    return trace(model.requires_grad_(False), ids, edit)


def turns_gradients_off(model, ids, edit=None):
    torch.set_grad_enabled(False)
    return trace(model, ids, edit)


def detaches_the_logits_alone(model, ids, edit=None):
    seen = trace(model, ids, edit)
    return {n: v if n == "logits" else v.requires_grad_() for n, v in seen.items()}


def ledger_with_a_view_of_the_bias(model, seen):
    parts = ledger(model, seen)
    for layer, block in enumerate(model.blocks):
        if (bias := block.attention.projection.bias) is not None:
            with torch.no_grad():  # which a view of a parameter ignores
                parts[f"{layer}.bias"] = bias.expand_as(parts["embedding"])
    return parts


def with_a_graph(tool):
    """The tool of the package, but with gradients."""
    return getattr(tool, "__wrapped__", tool)


def attribute_by_weight(model, parts, direction):
    model.norm.weight * direction  # a TypeError where the norm has no weight
    return attribute(model, parts, direction)


def without_by_the_end_of_the_name(heads, usual):
    edits = {
        f"{layer}.contexts": without([h for h in heads if h[0] == layer], usual)
        for layer, _ in heads
    }

    def edit(name, value):
        for place, one in edits.items():
            if name.endswith(place):
                value = one(place, value)
        return value

    return edit


def without_in_texts_as_long(heads, usual):
    edit = without(heads, usual)

    def as_long(name, value):
        assert value.shape[2:] == usual[name].shape[2:], "another length"
        return edit(name, value)

    return as_long


def patch_by_the_length_of_the_text(clean, layer, head):
    def edit(name, value):
        if name == f"{layer}.contexts":
            value, last = value.clone(), value.shape[2] - 1
            value[:, head, last] = clean[name][:, head, last]
        return value

    return edit


def sources_with_a_graph(model, seen, layer, head):
    weights, values = seen[f"{layer}.weights"], seen[f"{layer}.values"]
    heads = weights.shape[1]
    columns = model.blocks[layer].attention.projection.weight.chunk(heads, dim=1)[head]
    written = values[:, head * values.shape[1] // heads] @ columns.T
    return weights[:, head, :, :, None] * written[:, None]


@pytest.fixture(autouse=True)
def gradients_stay_on():
    yield
    torch.set_grad_enabled(True)


@pytest.mark.parametrize(
    ("check", "wrong", "mistake"),
    [
        (checks.check_trace, trains_afterwards, "restore the mode"),
        (checks.check_trace, mode_of_the_root, "restore the mode"),
        (checks.check_trace, freezes, "gradients are left off"),
        (checks.check_trace, turns_gradients_off, "gradients are left off"),
        (checks.check_trace, detaches_the_logits_alone, "no gradients"),
        (checks.check_ledger, with_a_graph(ledger), "no gradients"),
        (checks.check_ledger, ledger_with_a_view_of_the_bias, "detach parameters'"),
        (checks.check_attribute, with_a_graph(attribute), "no gradients"),
        (checks.check_sources, sources_with_a_graph, "no gradients"),
        (checks.check_without, without_by_the_end_of_the_name, "1[01].contexts must"),
        (checks.check_without, without_in_texts_as_long, "another length"),
        (checks.check_patch, patch_by_the_length_of_the_text, "another head or pos"),
        (checks.check_trace, edits_all_but("weights"), "1.weights must go on"),
        (checks.check_trace, stays_on_an_error, "hooks are left .* raises an error"),
        (checks.check_trace, with_gradients, "no gradients"),
        (checks.check_trace, scales_the_queries, "0.queries is not what its"),
        (checks.check_ledger, swapped_biases, "0.bias is not layer 0's own"),
    ],
)
def test_checks_name_the_mistake(check, wrong, mistake):
    with pytest.raises(AssertionError, match=mistake):
        check(wrong)


def test_an_attribution_that_needs_the_weight_of_the_norm_is_refused():
    with pytest.raises(TypeError, match="NoneType"):
        checks.check_attribute(attribute_by_weight)


def test_exercises_are_graded_in_a_model_of_twelve_layers():
    def patches_eleven_for_one(clean, layer, head):
        def edit(name, value):
            if name.endswith(f"{layer}.contexts"):
                value = value.clone()
                value[:, head, -1] = clean[name][:, head, -1]
            return value

        return edit

    def two_layers(seen):
        both = torch.stack([seen["0.weights"], seen["1.weights"]])
        return both.diagonal(-1, -2, -1).mean(dim=(1, 3))

    with pytest.raises(AssertionError, match="11.contexts must stay"):
        checks.check_patch(patches_eleven_for_one)
    with pytest.raises(AssertionError, match="one number for each head"):
        checks.check_previous_scores(two_layers)


def test_an_exercise_is_refused_for_one_wrong_term():
    def swapped(model, seen, layer, head):
        weights, values = seen[f"{layer}.weights"], seen[f"{layer}.values"]
        shared = weights.shape[1] // values.shape[1]
        columns = model.blocks[layer].attention.projection.weight.detach()
        columns = columns.chunk(weights.shape[1], dim=1)[head]
        written = values[:, head // shared] @ columns.T
        terms = weights[:, head, :, :, None] * written[:, None]
        terms[:, 3, [0, 2]] = terms[:, 3, [2, 0]]
        return terms

    with pytest.raises(AssertionError, match="s's own value"):
        checks.check_sources(swapped)


def test_a_patch_that_writes_into_the_clean_trace_is_told_so():
    def into_clean(clean, layer, head):
        def edit(name, value):
            if name != f"{layer}.contexts":
                return value
            others = [h for h in range(value.shape[1]) if h != head]
            clean[name][:, others] = value[:, others]
            clean[name][:, head, :-1] = value[:, head, :-1]
            return clean[name]

        return edit

    with pytest.raises(AssertionError, match="`clean` must stay"):
        checks.check_patch(into_clean)


def test_a_list_of_tensors_is_told_to_be_a_tensor():
    def lists(seen):
        weights = [w for name, w in seen.items() if name.endswith(".weights")]
        return [w.diagonal(-1, -2, -1).mean((0, 2)) for w in weights]

    with pytest.raises(AssertionError, match="return a tensor, not a list"):
        checks.check_previous_scores(lists)


def test_watch_lets_gradients_through():
    model, ids = make(CONFIGS[2])
    kept = {}
    with watch(model, lambda name, value: kept.setdefault(name, value)):
        logits = model(ids)
    (slope,) = torch.autograd.grad(logits[0, -1, 3], kept["1.stream"])
    assert slope[0].abs().sum() > 0
    assert not slope[1].any()


def test_removing_every_head_leaves_nothing_of_other_positions():
    model, ids = make(CONFIGS[0])
    other = ids.clone()
    other[:, 0] = (other[:, 0] + 1) % 13
    everyone = [(layer, head) for layer in range(3) for head in range(4)]
    edit = without(everyone, trace(model, ids))
    one, two = (trace(model, text, edit)["logits"] for text in (ids, other))
    assert torch.equal(one[:, 1:], two[:, 1:])
    assert not torch.equal(one[:, 0], two[:, 0])


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
