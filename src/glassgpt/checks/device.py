# Written by tools/tangle.py from book/15_full_gpt.ipynb: change it there.
"""Checks of precisions, batches and costs that name the mistake they find."""

from collections.abc import Callable
from dataclasses import replace

from glassgpt.device import memory_needed
from glassgpt.gpt import GPTConfig
from glassgpt.training import TrainConfig


def check_precision(choose: Callable[[tuple[int, int]], str]) -> None:
    """Each GPU gets the precision that its tensor cores compute, if it has any.

    choose: called with a compute capability, such as (7, 5).

    Book: 15_full_gpt.html#which-machine-has-what
    """
    cards = [
        ("B200", (10, 0), "bfloat16"),
        ("H100", (9, 0), "bfloat16"),
        ("L4", (8, 9), "bfloat16"),
        ("RTX 3090", (8, 6), "bfloat16"),
        ("A100", (8, 0), "bfloat16"),
        ("T4", (7, 5), "float16"),
        ("V100", (7, 0), "float16"),
        ("P100", (6, 0), "float32"),
    ]
    for card, capability, wanted in cards:
        found = choose(capability)
        assert not (found == "bfloat16" and wanted != found), (
            f"a {card} {capability} has no units for bfloat16: it would be emulated"
        )
        assert found == wanted, f"a {card} {capability} got {found}, not {wanted}"


def check_fit_batch(
    fit_batch: Callable[[GPTConfig, TrainConfig, float], TrainConfig],
) -> None:
    """A batch is split until it fits; a step sees as many tokens as before.

    Book: 15_full_gpt.html#when-memory-is-short
    """
    model = GPTConfig(1000, context=512, layers=4, heads=4, width=128)
    training = TrainConfig(batch_size=64, accumulate=3, steps=77)
    needed = memory_needed(model, training)
    same = fit_batch(model, training, needed)
    assert same == training, "a batch that fits must stay as it is"
    memory = needed / 5.2
    fitted = fit_batch(model, training, memory)
    size, parts = fitted.batch_size, fitted.accumulate
    assert memory_needed(model, fitted) <= memory, f"batch {size} does not fit"
    assert size * parts == 3 * 64, (
        f"{parts} x {size} crops are not 3 x 64: accumulate what you split off"
    )
    assert size == 8, f"batch {size} does not use the memory: 8 would fit"
    due = replace(training, batch_size=size, accumulate=parts)
    assert fitted == due, "only batch_size and accumulate may change"
    tight = replace(training, batch_size=1, accumulate=3 * 64, recompute=True)
    found = fit_batch(model, training, memory_needed(model, tight))
    assert found == tight, "one crop would fit if its blocks were computed again"
    try:
        fit_batch(model, training, 1000)
    except ValueError:
        return
    raise AssertionError("one crop doesn't fit into 1,000 bytes: raise a ValueError")


def check_days(days: Callable[[float, float, float, float], float]) -> None:
    """The days that training takes on a card of which a share is used.

    days: called as days(N, tokens, peak, utilization).

    Book: 15_full_gpt.html#exercise-1-days-on-a-card
    """
    cases = ((1e9, 2e10, 1e15, 0.25), (3e8, 1e9, 2e14, 0.4))
    for N, tokens, peak, utilization in cases:
        wanted = 6 * N * tokens / (utilization * peak) / 86_400
        found = days(N, tokens, peak, utilization)
        mistakes = [
            (wanted / 3, "2 N is the forward pass: backward costs twice that on top"),
            (wanted * utilization, "the utilization is missing"),
            (wanted * utilization**2, "divide by the utilization: less use, more days"),
            (wanted * 24, "these are hours"),
            (wanted * 86_400, "these are seconds"),
        ]
        for value, mistake in mistakes:
            assert abs(found / value - 1) > 1e-6, mistake
        assert abs(found / wanted - 1) < 1e-6, f"{found:.3f} days, not {wanted:.3f}"


def check_scale(update: Callable[[float, int, bool], tuple[float, int]]) -> None:
    """The scale halves at an infinite gradient and doubles after 2,000 good steps.

    update: called as update(scale, streak, finite), returns scale and streak.

    Book: 15_full_gpt.html#exercise-2-the-scale-of-the-loss
    """
    scale, streak = update(1024.0, 5, True)
    assert scale == 1024, "one good step is no reason to change the scale"
    assert streak == 6, f"five good steps and one more are 6, not {streak}"
    scale, streak = update(1024.0, 5, False)
    assert scale == 512, f"an infinite gradient halves 1024 to 512, not {scale:.0f}"
    assert streak == 0, "an infinite gradient ends the streak"
    halved = tuple(update(4096.0, 1999, False))
    assert halved == (2048, 0), f"infinite at the 2,000th step: {halved}, not (2048, 0)"
    doubled = tuple(update(4096.0, 1999, True))
    assert doubled == (8192, 0), f"the 2,000th good step: {doubled}, not (8192, 0)"
    for one, two in ((65_536.0, True), (1.0, False)):
        found, _ = update(one, 1999, two)
        due = one * 2 if two else one / 2
        assert found == due, f"{one} should become {due}, not {found}: it has no bounds"
    scale, streak = 1024.0, 0
    for step in range(1, 4001):
        scale, streak = update(scale, streak, True)
        wanted = 1024 * 2 ** (step // 2000)
        assert scale == wanted, (
            f"after {step} good steps the scale is {scale:.0f}, not {wanted}:"
            " double at the 2,000th, and count anew"
        )


def check_rounding(to_bfloat16: Callable[[float], float]) -> None:
    """Numbers round to the nearest bfloat16, ties to the even one.

    Book: 15_full_gpt.html#exercise-3-round-to-bfloat16
    """
    cases = [
        (1.0, 1.0, "1 is a bfloat16"),
        (257.5, 258.0, "between 256 and 512 the spacing is 2, so round to the nearest"),
        (1.001, 1.0, "between 1 and 2 the spacing is 1/128"),
        (1.7, 1.703125, "between 1 and 2 the spacing is 1/128"),
        (100.3, 100.5, "between 64 and 128 the spacing is a half"),
        (257.0, 256.0, "a tie between 256 and 258: the last bit of 256 is 0"),
        (259.0, 260.0, "a tie between 258 and 260: the last bit of 260 is 0"),
        (3.999, 4.0, "rounding may reach the next power of two"),
        (1_000_000.0, 999_424.0, "below 2^20 the spacing is 4,096"),
    ]
    for x, wanted, why in cases:
        found = to_bfloat16(x)
        assert found == wanted, f"{x} became {found}, not {wanted}: {why}"
