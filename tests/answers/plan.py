"""Answers to the checks of number formats, plans and costs."""

import math
from dataclasses import replace
from fractions import Fraction

import torch

from glassgpt.checks.plan import (
    check_fit_memory,
    check_rounding,
    check_scale,
    check_step_memory,
)
from glassgpt.plan import fit_memory


def smaller_batch(plan, memory, given):
    while plan.memory > memory:
        half = replace(plan.training, batch_size=plan.training.batch_size // 2)
        plan = replace(plan, training=half)
    return plan


def recomputing_first(plan, memory, given):
    if plan.memory > memory:
        plan = replace(plan, machine=replace(plan.machine, recompute=True))
    return fit_memory(plan, memory, given)


def minding_nothing(plan, memory, given):
    return fit_memory(plan, memory, set())


def bytes_of_a_step(N, tokens, C, layers, V):
    return 18 * N + tokens * (36 * C * layers + 12 * V)


def bytes_as_a_fraction(*case):
    return Fraction(bytes_of_a_step(*case))


def all_in_float32(N, tokens, C, layers, V):
    return 16 * N + tokens * (64 * C * layers + 12 * V)


def without_gradients(N, tokens, C, layers, V):
    return bytes_of_a_step(N, tokens, C, layers, V) - 4 * N


def one_block(N, tokens, C, layers, V):
    return bytes_of_a_step(N, tokens, C, 1, V)


def scale_after(scale, streak, finite):
    if not finite:
        return scale / 2, 0
    if streak == 1999:
        return 2 * scale, 0
    return scale, streak + 1


def never_halved(scale, streak, finite):
    return scale_after(scale, streak, True)


def endless_streak(scale, streak, finite):
    scale, _ = scale_after(scale, streak, finite)
    return scale, streak + 1 if finite else 0


def rounded(x):
    spacing = 2.0 ** (math.frexp(x)[1] - 8)
    return round(x / spacing) * spacing


def rounded_twice(x):
    return torch.tensor(x).bfloat16().item()


def truncated(x):
    spacing = 2.0 ** (math.frexp(x)[1] - 8)
    return math.floor(x / spacing) * spacing


RIGHT = {
    check_fit_memory: [fit_memory],
    check_step_memory: [bytes_of_a_step, bytes_as_a_fraction],
    check_scale: [scale_after],
    check_rounding: [rounded],
}
WRONG = {
    check_fit_memory: [
        (smaller_batch, "split it into parts"),
        (recomputing_first, "recompute only"),
        (minding_nothing, "only the rest may change"),
    ],
    check_step_memory: [
        (all_in_float32, "all in float32"),
        (without_gradients, "gradients are missing"),
        (one_block, "one block is not all"),
    ],
    check_scale: [
        (never_halved, "halves 1024 to 512"),
        (endless_streak, "2,000th good step"),
    ],
    check_rounding: [
        (rounded_twice, "only once"),
        (truncated, "the spacing is 2"),
    ],
}
