# Written by tools/tangle.py from book/15_full_gpt.ipynb: change it there.


"""Checks of number formats, plans and costs that name the mistake they find."""

from collections.abc import Callable
from dataclasses import replace
from math import isfinite

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import grad

from glassgpt.gpt import GPTConfig
from glassgpt.plan import Machine, Plan
from glassgpt.training import TrainConfig


def check_padded_logits(logits_of: Callable[[Tensor, Tensor], Tensor]) -> None:
    """A vocabulary padded to a multiple of 64 changes no loss and no gradient.

    logits_of: called with x (..., C) and the head's weight (V, C).

    Book: 15_full_gpt.html#a-vocabulary-that-suits-the-units
    """
    generator = torch.Generator().manual_seed(0)
    for V, shape in ((50, (6, 8)), (64, (6, 8)), (65, (2, 3, 8))):
        x, table = (torch.randn(s, generator=generator) for s in (shape, (V, 8)))
        both = x, table = [part.double().requires_grad_() for part in (x, table)]
        targets = torch.randint(V, (6,), generator=generator)
        padded = logits_of(x, table)
        *places, width = padded.shape
        assert places == [*shape[:-1]], f"logits {(*padded.shape,)} for x {shape}"
        assert width % 64 == 0, f"{width} logits for {V} tokens: no multiple of 64"
        assert width < V + 64, f"{width} logits for {V} tokens are more than needed"
        plain = x @ table.T
        error = (padded[..., :V] - plain).abs().max()
        assert error < 1e-6, f"the first {V} logits differ by {error:.1e}"
        rest = padded.softmax(dim=-1)[..., V:].sum()
        assert rest == 0, "tokens that don't exist have a probability: -inf, not 0"
        first, second = (
            F.cross_entropy(part.flatten(0, -2), targets) for part in (padded, plain)
        )
        off = (part.abs().max() for part in grad(first - second, both))
        for name, error in zip(("x", "the table"), off, strict=True):
            assert error < 1e-6, f"the gradient of {name} differs by {error:.1e}"


def check_fit_memory(fit: Callable[[Plan, int, set[str]], Plan]) -> None:
    """A batch is split until it fits; a step learns from as many crops as before.

    fit: called as fit(plan, memory in bytes, names of what was given).

    Book: 15_full_gpt.html#a-vocabulary-that-suits-the-units
    """
    model = GPTConfig(1000, context=512, layers=4, heads=4, width=128)
    plan = Plan(model, TrainConfig(batch_size=64), Machine(), 1e9)
    due = replace(plan, training=replace(plan.training, accumulate=8))
    again = replace(plan, machine=Machine(recompute=True))
    for fits in (plan, due, again):
        found = fit(fits, plan.memory, set())
        assert found == fits, "a plan that fits must stay as it is"
    memory = plan.memory // 5
    found = fit(plan, memory, set())
    crops = found.training.batch_size
    assert crops == 64, f"a step learns from {crops} crops, not 64: split it into parts"
    assert found.memory <= memory, f"{found.memory:,} bytes don't fit {memory:,}"
    assert not found.machine.recompute, "recompute only where one crop doesn't fit"
    assert found == due, "only accumulate may change, and 8 parts suffice"
    crop = replace(plan, training=replace(plan.training, accumulate=64))
    odd = replace(plan, training=replace(plan.training, batch_size=48))
    least = replace(odd, training=replace(odd.training, accumulate=48)).memory
    try:
        parts = fit(odd, least, set()).training.accumulate
    except ValueError:
        parts = "too many"
    assert parts == 48, f"a batch of 48 was split into {parts} parts, not 48"
    tight = replace(crop, machine=Machine(recompute=True))
    found = fit(plan, tight.memory, set())
    assert found == tight, "one crop would fit if its blocks were computed again"
    for least, given, wanted in (
        (memory, {"learning_rate"}, due),
        (again.memory, {"accumulate"}, again),
        (tight.memory, {"recompute"}, None),
        (plan.memory - 1, {"accumulate", "recompute"}, None),
        (1000, set(), None),
    ):
        try:
            found = fit(plan, least, given)
        except ValueError:
            found = None
        assert wanted or not found, "what can't fit, or may not change, must be refused"
        assert found == wanted, f"with {given} given, only the rest may change"


def check_step_memory(memory: Callable[[int, int, int, int, int], float]) -> None:
    """Bytes of weights, gradients, moments and activations in mixed precision.

    memory: called as memory(N, tokens, C, layers, V).

    Book: 15_full_gpt.html#a-vocabulary-that-suits-the-units
    """
    for case in ((1_000_000, 4096, 128, 4, 500), (9_000, 64, 16, 3, 7_000)):
        N, tokens, C, layers, V = case
        fixed, blocks, logits = 18 * N, 36 * C * layers * tokens, 12 * V * tokens
        wanted, found = fixed + blocks + logits, float(memory(*case))
        assert isfinite(found), f"{found} is no number of bytes"
        mistakes = [
            (wanted - 2 * N, "mixed precision has a copy of 16 bits of each weight"),
            (wanted - 4 * N, "the gradients are missing: 4 bytes a parameter"),
            (wanted - 8 * N, "AdamW keeps two moments of each gradient"),
            (wanted - logits, "the logits are missing"),
            (wanted - logits * 2 // 3, "a logit is kept three times, 4 bytes each"),
            (wanted + (layers - 1) * logits, "logits come once, not in each layer"),
            (wanted + blocks * 28 // 36, "64 C is kept in float32"),
            (wanted - blocks * 2 // 36, "34 C is with norms in 16 bits and dropout"),
            (wanted - 2 * N + blocks * 28 // 36, "that is all in float32: 16 N, 64 C"),
            (wanted / 1e9, "bytes, not GB"),
            (wanted - blocks + blocks // layers, "one block is not all of them"),
            (fixed + (blocks + logits) // tokens, "that is one token's"),
            (fixed * tokens + blocks + logits, "parameters don't grow with the tokens"),
        ]
        for value, mistake in mistakes:
            assert abs(found / value - 1) > 1e-6, mistake
        off = f"{found:,.0f} bytes for {case}, not {wanted:,}"
        assert abs(found / wanted - 1) < 1e-6, off


def check_scale(update: Callable[[float, int, bool], tuple[float, int]]) -> None:
    """The scale halves at an infinite gradient and doubles after 2,000 good steps.

    update: called as update(scale, streak, finite), returns scale and streak.

    Book: 15_full_gpt.html#a-vocabulary-that-suits-the-units
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
    for one, two in ((2.0**100, True), (2.0**-20, False)):
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

    Book: 15_full_gpt.html#a-vocabulary-that-suits-the-units
    """
    cases = [
        (1.0, 1.0, "1 is a bfloat16"),
        (257.5, 258.0, "between 256 and 512 the spacing is 2, so round to the nearest"),
        (1.001, 1.0, "between 1 and 2 the spacing is 1/128"),
        (1.7, 1.703125, "between 1 and 2 the spacing is 1/128"),
        (100.3, 100.5, "between 64 and 128 the spacing is a half"),
        (257.0, 256.0, "a tie between 256 and 258: the last bit of 256 is 0"),
        (257.00001, 258.0, "it lies just above the tie, so round only once"),
        (259.0, 260.0, "a tie between 258 and 260: the last bit of 260 is 0"),
        (3.999, 4.0, "rounding may reach the next power of two"),
        (1_000_000.0, 999_424.0, "below 2^20 the spacing is 4,096"),
    ]
    for k in range(20):  # between powers of two
        spacing = 2.0 ** (k - 7)
        why = f"between 2^{k} and 2^{k + 1} the spacing is {spacing}"
        for x in (1.02 * 2**k, 1.37 * 2**k):
            cases.append((x, round(x / spacing) * spacing, why))
    for x, wanted, why in cases:
        found = to_bfloat16(x)
        assert found == wanted, f"{x} became {found}, not {wanted}: {why}"
