"""Answers to the checks of chapter 22."""

import torch

from glassgpt.checks.clinic import (
    check_diagnose,
    check_future,
    check_healthy,
    check_repair,
)
from glassgpt.clinic import (
    FAULTS,
    NOTHING_FOUND,
    Patient,
    changed_future,
    cut_future,
    diagnose,
    difference,
    doctors_rows,
    look,
    operate,
)


def another_sentence(patient):
    found = diagnose(patient)
    return "nothing that I know" if found == NOTHING_FOUND else found


def one_letter(patient):
    """The last of 31 letters, seen alone with what stands before it."""
    rows = doctors_rows()
    found = 0.0
    for end in (5, 9, 30):
        beginning = look(patient.model, rows[:, :end])
        whole = look(patient.model, rows)[:, :end]
        found = max(found, difference(beginning, whole))
    return found


def never_ill(patient):
    return NOTHING_FOUND


def promises(patient):
    found = diagnose(patient)
    return "healthy" if found == NOTHING_FOUND else found


def all_leak(patient):
    found = diagnose(patient)
    return "no_mask" if found == "view_both" else found


def treats_everybody(patient):
    found = diagnose(patient)
    return "frozen_block" if found == NOTHING_FOUND else found


def above(patient):
    look(patient.model, doctors_rows())
    weights = patient.model.blocks[0].attention.weights
    return weights.triu(diagonal=1).sum(dim=-1).mean().item()


def with_dropout(patient):
    rows = doctors_rows()
    with torch.no_grad():
        return difference(patient.model(rows[:, :20]), patient.model(rows)[:, :20])


def weigh(patient, scores, mask):
    least = torch.finfo(scores.dtype).min
    return torch.softmax(torch.where(mask, scores, least), dim=-1)


def repaired(patient):
    return operate(patient, "weigh", weigh)


def still_masked_late(patient):
    return operate(patient, "weigh", lambda patient, s, mask: s.softmax(-1) * mask)


def twice(patient):
    return operate(operate(patient, "clip", 1.0), "weigh", weigh)


def taken(patient):
    return operate(patient, "weigh", Patient.weigh)


RIGHT = {
    check_diagnose: [diagnose, another_sentence],
    check_future: [cut_future, one_letter],
    check_healthy: [Patient(12), Patient(12, weigh=weigh)],
    check_repair: [repaired],
}
WRONG = {
    check_diagnose: [
        (never_ill, "a patient with shifted_twice is sent home"),
        (promises, "no examination can promise health"),
        (all_leak, "view_both is taken for no_mask"),
        (treats_everybody, "a healthy patient is treated for frozen_block"),
    ],
    check_future: [
        (above, "mask_after_softmax passes"),
        (changed_future, "only how many there are"),
        (with_dropout, "is dropout on"),
        (lambda patient: 0.5, "a healthy patient gets 0.5"),
        (
            lambda patient: max(cut_future(patient), patient.peak > 0.1),
            "rate_x100 doesn't look ahead",
        ),
    ],
    check_healthy: [
        (Patient(12, **FAULTS["no_mask"]), "cut_future"),
        (Patient(12, **FAULTS["clip_1e-3"]), "nearly nothing is left"),
        (Patient(12, **FAULTS["dropout_on"]), "dropout is on"),
    ],
    check_repair: [
        (lambda patient: patient, "never operated on"),
        (lambda patient: "weigh", "it returns a str, not a Patient"),
        (twice, "2 operations: one is enough"),
        (taken, "weigh is taken from a healthy patient"),
        (still_masked_late, "the model looks ahead"),
    ],
}
