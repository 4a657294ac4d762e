# Written by tools/tangle.py from book/22_clinic.ipynb: change it there.


"""Checks of examinations, diagnoses and repairs."""

from collections.abc import Callable
from typing import Any

import torch

from glassgpt.clinic import (
    EXAMINATIONS,
    FAULTS,
    NOTHING_FOUND,
    Patient,
    patient,
    records,
)


def check_diagnose(diagnose: Callable[[Patient], str]) -> None:
    """A diagnosis names the fault that is there, and promises no health.

    diagnose: called as diagnose(patient), returns a name or a sentence.

    Book: 22_clinic.html#diagnose
    """
    with torch.random.fork_rng(devices=[]):
        for name in ("shifted_twice", "view_both", "no_mask", "clip_1e-3"):
            found = diagnose(Patient(8, **FAULTS[name]))
            assert found != NOTHING_FOUND, f"a patient with {name} is sent home"
            assert found == name, f"{name} is taken for {found}"
        found = diagnose(Patient(8))
        assert found not in FAULTS or found == "healthy", (
            f"a healthy patient is treated for {found}"
        )
        assert found != "healthy", (
            "no examination can promise health: say that you have none for other faults"
        )


LEAKING = [
    "no_mask", "mask_inverted", "mask_after_softmax", "wrong_axis", "view_split",
    "view_both",
]  # fmt: skip


def check_future(examination: Callable[[Patient], float]) -> None:
    """Above 0.001 for the six patients that look ahead, and for nobody else.

    examination: called as examination(patient), returns a number.

    Book: 22_clinic.html#exercise-1-write-an-examination
    """
    with torch.random.fork_rng(devices=[]):
        for seed in (3, 8, 9):
            found = examination(Patient(seed))
            assert abs(found) < 1e-3, (
                f"a healthy patient gets {found:.2g}: is dropout on, or do you "
                "compare positions that may differ?"
            )
        for name in LEAKING:
            found = examination(Patient(8, **FAULTS[name]))
            kept = "letters behind it change nothing, only how many there are"
            why = f": {kept}" if name == "view_both" else ""
            assert found > 1e-3, f"{name} passes with {found:.2g}{why}"
        for name in FAULTS:
            if name not in LEAKING:
                found = examination(Patient(8, **FAULTS[name]))
                assert abs(found) < 1e-3, f"{name} doesn't look ahead, but gets {found}"


def check_healthy(patient: Patient) -> None:
    """All numbers of a patient are in their healthy ranges.

    Book: 22_clinic.html#exercise-2-repair
    """
    finds = {each["name"]: each["finds"] for each in records()["examinations"]}
    with torch.random.fork_rng(devices=[]):
        for name, examination in EXAMINATIONS.items():
            found, (low, high) = examination.measure(patient), examination.healthy
            assert low <= found <= high, (
                f"{name} is {found:.3g}, healthy is {low:g} to {high:g}: {finds[name]}"
            )


def check_repair(repair: Callable[[Patient], Any], number: int = 7) -> None:
    """One operation with a part of your own makes the patient healthy.

    repair: called as repair(patient), returns what `operate` returns.

    Book: 22_clinic.html#exercise-2-repair
    """
    with torch.random.fork_rng(devices=[]):
        healed = repair(patient(number))
        kind = type(healed).__name__
        assert isinstance(healed, Patient), f"it returns a {kind}, not a Patient"
        count = healed.operations
        assert count, "this patient was never operated on: return operate(...)"
        assert count == 1, f"{count} operations: one is enough"
        taken = [
            name
            for name, part in healed.parts.items()
            if part in vars(Patient).values()
        ]
        assert not taken, f"{taken[0]} is taken from a healthy patient: write your own"
        check_healthy(healed)
        loss = healed.train().judged[-1].mean().item()
        assert loss < 2.4, f"after training its held-out loss is still {loss:.2f}"
