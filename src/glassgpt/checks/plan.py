# Written by tools/tangle.py from book/15_full_gpt.ipynb: change it there.


"""Checks of number formats, plans and costs that name the mistake they find."""

from collections.abc import Callable
from dataclasses import replace

from glassgpt.gpt import GPTConfig
from glassgpt.plan import Machine, Plan
from glassgpt.training import TrainConfig


def check_fit_memory(fit: Callable[[Plan, int, set[str]], Plan]) -> None:
    """A batch is split until it fits; a step learns from as many crops as before.

    fit: called as fit(plan, memory in bytes, names of what was given).

    Book: 15_full_gpt.html#a-vocabulary-that-suits-the-units
    """
    model = GPTConfig(1000, context=512, layers=4, heads=4, width=128)
    plan = Plan(model, TrainConfig(batch_size=64), Machine())
    split = replace(plan, training=replace(plan.training, accumulate=8))
    again = replace(plan, machine=Machine(recompute=True))
    tight = replace(again, training=replace(plan.training, accumulate=64))
    found = fit(plan, plan.memory, set())
    assert found == plan, "a plan that fits must stay as it is"
    found = fit(plan, split.memory, set())
    crops = found.training.batch_size
    assert crops == 64, f"a step learns from {crops} crops, not 64: split it into parts"
    assert not found.machine.recompute, "recompute only where one crop doesn't fit"
    assert found == split, "only accumulate may change, and 8 parts suffice"
    found = fit(plan, tight.memory, set())
    assert found == tight, "one crop would fit if its blocks were computed again"
    found = fit(plan, again.memory, {"accumulate"})
    assert found == again, "accumulate was given, so only the rest may change"
    try:
        fit(plan, 1000, set())
    except ValueError:
        return
    raise AssertionError("what can't fit must be refused with ValueError")


def check_step_memory(memory: Callable[[int, int, int, int, int], float]) -> None:
    """Bytes of weights, gradients, moments and activations in mixed precision.

    memory: called as memory(N, tokens, C, layers, V).

    Book: 15_full_gpt.html#a-vocabulary-that-suits-the-units
    """
    for case in ((1_000_000, 4096, 128, 4, 500), (9_000, 64, 16, 3, 7_000)):
        N, tokens, C, layers, V = case
        fixed, blocks, logits = 18 * N, 36 * C * layers * tokens, 12 * V * tokens
        wanted, found = fixed + blocks + logits, float(memory(*case))
        in_float32 = 16 * N + 64 * C * layers * tokens + logits
        assert found != in_float32, "that is all in float32: 16 N, 64 C"
        assert found != wanted - 4 * N, "the gradients are missing: 4 bytes a parameter"
        one_block = wanted - blocks + blocks // layers
        assert found != one_block, "one block is not all of them"
        off = f"{found:,.0f} bytes for {case}, not {wanted:,}"
        assert abs(found / wanted - 1) < 1e-6, off


def check_scale(update: Callable[[float, int, bool], tuple[float, int]]) -> None:
    """The scale halves at an infinite gradient and doubles after 2,000 good steps.

    update: called as update(scale, streak, finite), returns scale and streak.

    Book: 15_full_gpt.html#a-vocabulary-that-suits-the-units
    """
    halved, streak = update(1024.0, 1999, False)
    assert halved == 512, f"an infinite gradient halves 1024 to 512, not {halved:.0f}"
    assert streak == 0, "an infinite gradient ends the streak"
    scale, streak = 1024.0, 0
    for step in range(1, 4001):
        scale, streak = update(scale, streak, True)
        wanted = 1024 * 2 ** (step // 2000)
        assert scale == wanted, (
            f"after {step} good steps the scale is {scale:.0f}, not {wanted}:"
            " double at the 2,000th good step, and count anew"
        )


def check_rounding(to_bfloat16: Callable[[float], float]) -> None:
    """Numbers round to the nearest bfloat16, ties to the even one.

    Book: 15_full_gpt.html#a-vocabulary-that-suits-the-units
    """
    cases = [
        (257.5, 258.0, "between 256 and 512 the spacing is 2, so round to the nearest"),
        (257.0, 256.0, "a tie between 256 and 258: the last bit of 256 is 0"),
        (257.00001, 258.0, "it lies just above the tie, so round only once"),
        (259.0, 260.0, "a tie between 258 and 260: the last bit of 260 is 0"),
        (3.999, 4.0, "rounding may reach the next power of two"),
    ]
    for k in range(20):  # between powers of two
        spacing = 2.0 ** (k - 7)
        why = f"between 2^{k} and 2^{k + 1} the spacing is {spacing}"
        for x in (1.02 * 2**k, 1.37 * 2**k):
            cases.append((x, round(x / spacing) * spacing, why))
    for x, wanted, why in cases:
        found = to_bfloat16(x)
        assert found == wanted, f"{x} became {found}, not {wanted}: {why}"
