"""Right and wrong answers to the checks of chapter 19."""

import torch

from glassgpt.checks import inspection as checks
from glassgpt.inspection import attribute, ledger, trace


def restores_the_mode_of_the_root_alone(model, ids, edit=None):
    was = model.training
    seen = trace(model.eval(), ids, edit)
    model.train(was)
    return seen


def drops_edits_of_weights(model, ids, edit=None):
    def some(name, value):
        return edit(name, value) if edit and "weights" not in name else value

    return trace(model, ids, some)


def leaves_a_hook_on_an_error(model, ids, edit=None):
    try:
        return trace(model, ids, edit)
    except ZeroDivisionError:
        model.norm.register_forward_hook(lambda part, inputs, out: 2 * out)
        raise


def scales_the_queries(model, ids, edit=None):
    """Products of queries and keys stay, so the weights do not tell."""
    seen = trace(model, ids, edit)
    seen["0.queries"], seen["0.keys"] = 2 * seen["0.queries"], seen["0.keys"] / 2
    return seen


def swaps_the_biases(model, seen):
    parts = ledger(model, seen)
    if "0.bias" in parts:
        parts["0.bias"], parts["1.bias"] = parts["1.bias"], parts["0.bias"]
    return parts


def adds_the_attention(model, seen):
    return ledger(model, seen) | {"0.attention": seen["0.attention"]}


def forgets_the_norms_bias(model, parts, direction):
    shares = attribute(model, parts, direction)
    shares.pop("norm.bias", None)
    return shares


def previous_by_a_loop(seen):
    rows = []
    for layer in range(sum(name.endswith(".weights") for name in seen)):
        weights = seen[f"{layer}.weights"]
        row = torch.zeros(weights.shape[1])
        for t in range(1, weights.shape[2]):
            row += weights[:, :, t, t - 1].mean(0) / (weights.shape[2] - 1)
        rows.append(row)
    return torch.stack(rows)


def previous_with_the_first_token(seen):
    return previous_by_a_loop(seen) * 6 / 7


def previous_of_two_layers(seen):
    return previous_by_a_loop(seen)[:2]


def previous_as_a_list(seen):
    return list(previous_by_a_loop(seen))


def patch(clean, layer, head, where=slice(-1, None), at="{}.contexts", ends=False):
    """Right as it stands; the wrong ones differ in one thing."""
    place = at.format(layer)

    def edit(name, value):
        if name == place or (ends and name.endswith(place)):
            value = value.clone()
            source = clean[name if name in clean else place]
            value[:, head, where] = source[:, head, -value.shape[2] :][:, where]
        return value

    return edit


def patch_everywhere(clean, layer, head):
    return patch(clean, layer, head, where=slice(None))


def patch_eleven_for_one(clean, layer, head):
    return patch(clean, layer, head, ends=True)


def patch_in_place(clean, layer, head):
    edit = patch(clean, layer, head)
    return lambda name, value: value.copy_(edit(name, value))


def patch_that_returns_nothing_else(clean, layer, head):
    edit = patch(clean, layer, head)
    return lambda name, value: edit(name, value) if "contexts" in name else None


def patch_by_the_length_of_the_text(clean, layer, head):
    def edit(name, value):
        if name == f"{layer}.contexts":
            value, last = value.clone(), value.shape[2] - 1
            value[:, head, last] = clean[name][:, head, last]
        return value

    return edit


def patch_into_the_clean_trace(clean, layer, head):
    def edit(name, value):
        if name != f"{layer}.contexts":
            return value
        kept = value.clone()
        kept[:, head, -1] = clean[name][:, head, -1]
        clean[name][:, :, 1:] = kept
        return kept

    return edit


def sources(model, seen, layer, head):
    weights, values = seen[f"{layer}.weights"], seen[f"{layer}.values"]
    heads = weights.shape[1]
    columns = model.blocks[layer].attention.projection.weight.chunk(heads, dim=1)[head]
    written = values[:, head * values.shape[1] // heads] @ columns.T
    return weights[:, head, :, :, None] * written[:, None]


def sources_with_two_swapped(model, seen, layer, head):
    terms = sources(model, seen, layer, head)
    terms[:, 3, [0, 2]] = terms[:, 3, [2, 0]]
    return terms


RIGHT = {
    checks.check_trace: [trace],
    checks.check_ledger: [ledger],
    checks.check_attribute: [attribute],
    checks.check_previous_scores: [previous_by_a_loop],
    checks.check_patch: [patch],
    checks.check_sources: [sources],
}
WRONG = {
    checks.check_trace: [
        (restores_the_mode_of_the_root_alone, "not as they were"),
        (leaves_a_hook_on_an_error, "when an edit raises an error"),
        (drops_edits_of_weights, "1.weights must go on"),
        (scales_the_queries, "0.queries is not what its equation says"),
    ],
    checks.check_ledger: [
        (swaps_the_biases, "0.bias is not what it wrote"),
        (adds_the_attention, "too much: 0.attention"),
    ],
    checks.check_attribute: [(forgets_the_norms_bias, "the norm's bias?")],
    checks.check_previous_scores: [
        (previous_with_the_first_token, "from t = 1 on"),
        (previous_of_two_layers, "the shape is (2, 4), not (3, 4)"),
        (previous_as_a_list, "it returns a list"),
    ],
    checks.check_patch: [
        (patch_everywhere, "at the last position alone"),
        (patch_eleven_for_one, "11.contexts must stay"),
        (patch_in_place, "clone before you write"),
        (patch_that_returns_nothing_else, "return the activation"),
        (patch_by_the_length_of_the_text, "at the last position alone"),
        (patch_into_the_clean_trace, "`clean` must stay"),
    ],
    checks.check_sources: [(sources_with_two_swapped, "s's own value through W_O")],
}
