"""The scaling law: what it finds and refuses, and the runs that the page shows."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glassgpt.laws import Law, fit_law
from glassgpt.modern import ModernConfig
from glassgpt.plan import count

ROOT = Path(__file__).parent.parent
N, D = (x.ravel() for x in np.meshgrid(np.geomspace(1e4, 1e6, 6), [1e5, 1e6, 1e7]))

exponents = st.floats(0.2, 1.0)


@settings(max_examples=5)
@given(st.floats(0.5, 3), st.floats(0.2, 2), exponents, st.floats(0.2, 2), exponents)
def test_a_law_without_noise_is_found(E, a, alpha, b, beta):
    law = Law(E, a * 1e5**alpha, alpha, b * 1e6**beta, beta)
    found = fit_law(N, D, law(N, D))
    assert np.abs(found(N, D) - law(N, D)).max() < 2e-3
    assert abs(found(1e7, 1e8) - law(1e7, 1e8)) < 0.05


@pytest.mark.parametrize("exponents", [(2.0, 0.5), (0.34, 1.7), (1.6, 1.6)])
def test_exponents_that_were_not_searched_are_refused(exponents):
    alpha, beta = exponents
    law = Law(1.5, 1e5**alpha, alpha, 1e6**beta, beta)
    with pytest.raises(ValueError, match="exponents from 0.02 to 1.5"):
        fit_law(N, D, law(N, D))


def test_runs_of_no_law_are_refused():
    law = Law(1.5, 1e5**0.3, 0.3, 1e6**0.3, 0.3)
    with pytest.raises(ValueError, match="fits these runs best"):
        fit_law(N, D, 5 - law(N, D))  # larger models are worse
    with pytest.raises(ValueError, match="Singular"):
        fit_law(np.full_like(N, 1e5), D, law(1e5, D))  # all sizes are equal


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
        sizes = np.geomspace(1e3, 1e12, 200_001)
        best.append(sizes[law(sizes, C / 6 / sizes).argmin()])
    assert abs(np.log(best[1] / best[0]) / np.log(100) - law.growth) < 1e-3


def recorded(name):
    return json.loads((ROOT / "book" / "runs" / f"{name}.json").read_text("utf-8"))


def test_the_page_has_the_recorded_runs(names_in):
    record, shown = recorded("scaling"), names_in("16_scaling_laws.ipynb", "law-runs")
    runs, others = {}, {}
    for run in record["runs"]:
        size = run["layers"], run["width"], run["steps"]
        runs.setdefault(run["budget"], []).append((*size, run["loss"]))
        shape = (record["context"], run["layers"], run["heads"], run["width"])
        config = ModernConfig(record["vocab_size"], *shape)
        assert count(config) == (run["parameters"], run["flops_per_token"])
    assert shown["RUNS"] == runs
    for run in record["other_seeds"]["runs"]:
        size = run["layers"], run["width"], run["steps"]
        others.setdefault(size, []).append(run["loss"])
    assert shown["MORE_SEEDS"] == others


def test_the_page_has_the_measured_losses():
    measured = recorded("prediction")["measured"]
    page = (ROOT / "book" / "16_scaling_laws.ipynb").read_text("utf-8")
    for name, key in (("HELD_OUT", "validation_loss"), ("TRAINING", "train_loss")):
        assert f"{name} = {measured[key]}" in page


def test_the_prediction_follows_from_the_runs():
    foretold, record = recorded("prediction"), recorded("scaling")
    few = [r for r in record["runs"] if r["budget"] < 1e13 and r["steps"] >= 60]
    points = [np.array([r[k] for r in few]) for k in ("parameters", "tokens", "loss")]
    told = fit_law(*points)(foretold["parameters"], foretold["tokens"])
    assert abs(told - foretold["validation_loss"]) < 1e-3
    low, high = foretold["from_5_to_95_percent"]
    assert low < foretold["validation_loss"] < high
    assert foretold["fingerprint"] == record["fingerprint"]
