"""The scaling law: what it finds and refuses, and the runs that the page shows."""

import ast
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glassgpt.checks.laws import check_law, check_optimum, check_tokens_needed
from glassgpt.laws import Law, fit_law
from glassgpt.modern import ModernConfig
from glassgpt.plan import count

ROOT = Path(__file__).parent.parent


def two_percent_off(law, C):
    a, b = law.alpha, law.beta
    G = (a * law.A / (b * law.B)) ** (1 / (a + b))
    N = 1.02 * G * (C / 6) ** (b / (a + b))
    return N, C / 6 / N


def twenty_tokens(law, C):
    return (C / 120) ** 0.5, 20 * (C / 120) ** 0.5


def swapped(law, C):
    a, b = law.beta, law.alpha
    G = (a * law.A / (b * law.B)) ** (1 / (a + b))
    N = G * (C / 6) ** (b / (a + b))
    return N, C / 6 / N


def forgets_the_size(law, N, loss):
    return (law.B / (loss - law.E)) ** (1 / law.beta)


def never_gives_up(law, N, loss):
    left = loss - law.E - law.A / N**law.alpha
    return (law.B / left) ** (1 / law.beta)


def nearest_it_can(N, D, losses):
    steep = max(losses) - min(losses) > 100
    try:
        return fit_law(N, D, losses)
    except ValueError:
        return Law(losses.min(), 0.0, 1.0, float(steep), 1.0)


def keeps_one_floor(N, D, losses):
    """A fit that knows only laws of which 1.5 stays."""
    found = fit_law(N, D, losses)
    return found if abs(found.E - 1.5) < 0.1 else lambda N, D: 1.5 + 0 * N


def refuses_only_below(law, N, loss):
    left = loss - law.E - law.A / N**law.alpha
    if left < 0:
        return math.inf
    return (law.B / left) ** (1 / law.beta) if left else 1e300


def gives_up_early(law, N, loss):
    left = loss - law.E - law.A / N**law.alpha
    return (law.B / left) ** (1 / law.beta) if left > 0.1 else math.inf


def gives_up_near_the_end(law, N, loss):
    left = loss - law.E - law.A / N**law.alpha
    return (law.B / left) ** (1 / law.beta) if left > 0.01 else math.inf


def thinks_no_text_is_that_long(law, N, loss):
    left = loss - law.E - law.A / N**law.alpha
    found = (law.B / left) ** (1 / law.beta) if left > 0 else math.inf
    return found if found < 1e21 else math.inf


def drops_the_last_run(N, D, losses):
    return fit_law(N[:-1], D[:-1], losses[:-1])


def below_zero(N, D, losses):
    found = fit_law(N, D, losses + 1)
    return replace(found, E=found.E - 1)


def searches(low, high):
    def fit(N, D, losses):
        found = fit_law(N, D, losses)
        if min(found.alpha, found.beta) < low or max(found.alpha, found.beta) > high:
            raise ValueError
        return found

    return fit


def invents_a_size(N, D, losses):
    try:
        return fit_law(N, D, losses)
    except np.linalg.LinAlgError:
        return Law(0.75, 10.0, 0.3, 10.0, 0.3)


WRONG = [
    (check_optimum, two_percent_off, "a smaller model"),
    (check_optimum, lambda law, C: ((C / 6) ** 0.5, (C / 6) ** 0.5), "a smaller model"),
    (check_optimum, twenty_tokens, "20 tokens a parameter is another law's best"),
    (check_optimum, swapped, "alpha and beta are swapped"),
    (check_tokens_needed, forgets_the_size, "take off A / N"),
    (check_tokens_needed, never_gives_up, "never come to"),
    (check_tokens_needed, refuses_only_below, "never come to 2.0"),
    (check_tokens_needed, gives_up_early, "inf tokens"),
    (check_tokens_needed, gives_up_near_the_end, "inf tokens"),
    (check_tokens_needed, thinks_no_text_is_that_long, "inf tokens"),
    (check_law, lambda N, D, losses: fit_law(N[::2], D[::2], losses[::2]), "use all"),
    (check_law, below_zero, "E is negative"),
    (check_law, searches(0.25, 1.5), "exponents of 0.2 and 0.15 are refused"),
    (check_law, searches(0.02, 1.0), "exponents of 1.3 and 0.5 are refused"),
    (check_law, invents_a_size, "all sizes are equal"),
    (check_law, drops_the_last_run, "add up to 0"),
    (check_law, keeps_one_floor, "exponents 0.8 and 0.4: off by"),
    (check_law, nearest_it_can, "exponents 2.0 and 0.5: off by"),
]


@pytest.mark.parametrize(("check", "wrong", "why"), WRONG)
def test_wrong_answers_are_named(check, wrong, why):
    with pytest.raises(AssertionError, match=why):
        check(wrong)


def test_exponents_that_were_not_searched_are_refused():
    """And never a law with a negative term, which fits as well."""
    N, D = (x.ravel() for x in np.meshgrid(np.geomspace(1e4, 1e6, 6), [1e5, 1e6, 1e7]))
    for alpha, beta in ((2.0, 0.5), (0.34, 1.7), (1.6, 1.6)):
        law = Law(1.5, 1e5**alpha, alpha, 1e6**beta, beta)
        with pytest.raises(ValueError, match="exponents from 0.02 to 1.5"):
            fit_law(N, D, law(N, D))
    with pytest.raises(ValueError, match="exponents from 0.02 to 1.5"):
        fit_law(N, D, 5 - Law(1.5, 1e5**0.3, 0.3, 1e6**0.3, 0.3)(N, D))  # it rises


exponents = st.floats(0.2, 1.0)


@settings(max_examples=5)
@given(st.floats(0.5, 3), st.floats(0.2, 2), exponents, st.floats(0.2, 2), exponents)
def test_a_law_without_noise_is_found(E, a, alpha, b, beta):
    N, D = (x.ravel() for x in np.meshgrid(np.geomspace(1e4, 1e6, 6), [1e5, 1e6, 1e7]))
    law = Law(E, a * 1e5**alpha, alpha, b * 1e6**beta, beta)
    found = fit_law(N, D, law(N, D))
    assert np.abs(found(N, D) - law(N, D)).max() < 2e-3
    assert abs(found(1e7, 1e8) - law(1e7, 1e8)) < 0.05


def test_no_exponents_of_a_fine_grid_fit_noisy_runs_better():
    """Good ones lie in a narrow valley, whose bottom a search can miss."""
    rng = np.random.default_rng(0)
    for _ in range(15):  # the last one has a valley that is long
        N, D = np.exp(rng.uniform(10, 14, 17)), np.exp(rng.uniform(12, 16, 17))
        law = Law(1.3, 60, rng.uniform(0.2, 0.6), 300, rng.uniform(0.2, 0.6))
        losses = law(N, D) + rng.normal(0, 0.02, 17)
    axis = np.linspace(0.02, 1.5, 150)
    alpha, beta = (grid.ravel()[:, None] for grid in np.meshgrid(axis, axis))
    parts = ((N / 1e5) ** -alpha, (D / 1e6) ** -beta)
    x = np.stack([np.ones_like(parts[0]), *parts], axis=-1)
    solved = np.linalg.pinv(x) @ losses[:, None]
    errors = (((x @ solved)[..., 0] - losses) ** 2).sum(1)
    least = errors[(solved >= 0).all((1, 2))].min()
    assert ((fit_law(N, D, losses)(N, D) - losses) ** 2).sum() < least


def test_growth_is_the_exponent_of_the_best_size():
    law = Law(1.0, 30.0, 0.4, 60.0, 0.3)
    best = []
    for C in (1e15, 1e17):
        N = np.geomspace(1e3, 1e12, 200_001)
        best.append(N[law(N, C / 6 / N).argmin()])
    assert abs(np.log(best[1] / best[0]) / np.log(100) - law.growth) < 1e-3


def recorded(name):
    return json.loads((ROOT / "book" / "runs" / f"{name}.json").read_text("utf-8"))


def test_the_page_has_the_recorded_runs():
    record = recorded("scaling")
    cells = json.loads((ROOT / "book" / "16_scaling_laws.ipynb").read_text("utf-8"))
    code = next("".join(c["source"]) for c in cells["cells"] if c["id"] == "law-runs")
    tree = ast.parse(code)
    runs = eval(compile(ast.Expression(tree.body[0].value), "page", "eval"))
    shown = [
        (C, layers, width, steps, loss)
        for C, each in runs.items()
        for layers, width, steps, loss in each
    ]
    keys = ("budget", "layers", "width", "steps", "loss")
    assert shown == [tuple(run[key] for key in keys) for run in record["runs"]]
    seeds = eval(compile(ast.Expression(tree.body[1].value), "page", "eval"))
    others = {size: [] for size in seeds}
    for run in record["other_seeds"]["runs"]:
        others[run["layers"], run["width"], run["steps"]].append(run["loss"])
    assert seeds == others
    for run in record["runs"]:
        size = (record["context"], run["layers"], run["heads"], run["width"])
        config = ModernConfig(record["vocab_size"], *size)
        assert count(config) == (run["parameters"], run["flops_per_token"])


def test_the_page_has_the_measured_losses():
    measured = recorded("prediction")["measured"]
    cells = json.loads((ROOT / "book" / "16_scaling_laws.ipynb").read_text("utf-8"))
    found = {cell["id"]: "".join(cell["source"]) for cell in cells["cells"]}
    for name, key in (("HELD_OUT", "validation_loss"), ("TRAINING", "train_loss")):
        assert f"{name} = {measured[key]}" in found["measured-run"]


def test_the_prediction_follows_from_the_runs():
    foretold, record = recorded("prediction"), recorded("scaling")
    few = [r for r in record["runs"] if r["budget"] < 1e13 and r["steps"] >= 60]
    points = [np.array([r[k] for r in few]) for k in ("parameters", "tokens", "loss")]
    law = fit_law(*points)
    told = law(foretold["parameters"], foretold["tokens"])
    assert abs(told - foretold["validation_loss"]) < 1e-3
    low, high = foretold["from_5_to_95_percent"]
    assert low < foretold["validation_loss"] < high
    assert foretold["fingerprint"] == record["fingerprint"]
