# Written by tools/tangle.py from book/12_training.ipynb: change it there.
"""Checks of optimizers, schedules, evaluation and resuming that name the mistake."""

import copy
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glassgpt.data import TokenData, Tokens
from glassgpt.gpt import GPT, GPTConfig
from glassgpt.training import TrainConfig


def _torch_adamw(
    w: Tensor,
    gradients: list[Tensor],
    decay: float,
    rate: float = 0.1,
    betas: tuple[float, float] = (0.9, 0.999),
) -> Tensor:
    """What PyTorch makes of w."""
    w = w.clone().requires_grad_()
    optimizer = torch.optim.AdamW([w], lr=rate, betas=betas, weight_decay=decay)
    for gradient in gradients:
        w.grad = gradient.clone()
        optimizer.step()
    return w.detach()


def check_adamw(adamw: Callable[..., Tensor]) -> None:
    """AdamW's steps are those of torch.optim.AdamW.

    adamw: called as adamw(w, gradients, rate, beta1, beta2, decay), returns the new w.

    Book: 12_training.html#adamw
    """
    w = torch.tensor([0.5, -2.0, 0.0], dtype=torch.float64)
    gradients = [torch.tensor([1.0, -0.1, 10.0]).double() * k for k in (1, 3, -1, 2)]
    cases = [
        (1, 0.0, "the first step is wrong: are the means divided by 1 - beta^t?"),
        (4, 0.0, "later steps are wrong: are the means kept, and does t grow?"),
        (
            4,
            0.5,
            "decay must shrink the weight itself by rate times decay, before the step, "
            "and not be added to the gradient",
        ),
    ]
    for count, decay, mistake in cases:
        given = w.clone()
        found = adamw(given, gradients[:count], 0.1, 0.9, 0.999, decay).double()
        assert torch.equal(given, w), "the weights given were changed: return new ones"
        wanted = _torch_adamw(w, gradients[:count], decay)
        assert torch.allclose(found, wanted, atol=1e-6), mistake
    found = adamw(w, gradients, 0.02, 0.8, 0.95, 0.1).double()
    wanted = _torch_adamw(w, gradients, 0.1, 0.02, (0.8, 0.95))
    assert torch.allclose(found, wanted, atol=1e-6), "rate or betas are ignored"
    small = [gradient * 1e-8 for gradient in gradients[:1]]
    found = adamw(w, small, 0.1, 0.9, 0.999, 0.0).double()
    assert torch.allclose(found, _torch_adamw(w, small, 0.0), atol=1e-6), (
        "tiny gradients give other steps: epsilon stands outside the root, "
        "and is added after the correction"
    )


def _check_edges(rate_at: Callable[[int, TrainConfig], float]) -> None:
    """No warm-up, nothing but warm-up, and a longer one to a higher end."""
    none, whole = TrainConfig(steps=10, warmup=0), TrainConfig(steps=10, warmup=10)
    try:
        first, last = rate_at(0, none), rate_at(9, whole)
    except ZeroDivisionError:
        mistake = "divided by 0: warmup may be 0, or all of the steps"
        raise AssertionError(mistake) from None
    assert abs(first - 1) < 1e-9, "without warm-up the first rate must be 1"
    assert 0.9 < last <= 1 + 1e-9, "a run may be all warm-up"
    long = TrainConfig(steps=100, warmup=20, final_rate=0.3)
    for step, due in ((4, 0.25), (9, 0.5)):
        found = rate_at(step, long)
        assert abs(found - due) < 0.04, (
            f"after step {step} of a warm-up of 20 the rate is {found:.2f}, not {due}"
        )
    for schedule, share in product(("cosine", "linear", "stable"), (0.3, 0.0)):
        end = rate_at(99, replace(long, schedule=schedule, final_rate=share))
        assert share - 1e-9 <= end < share + 0.07, (
            f"{schedule}: final_rate is {share}, and the last rate {end:.2f}"
        )


def check_schedule(rate_at: Callable[[int, TrainConfig], float]) -> None:
    """The rate warms up to 1 without a wasted step, then falls to its final share.

    Book: 12_training.html#the-schedule
    """
    falls = {
        "cosine": {32: 0.87, 77: 0.23},
        "linear": {32: 0.78, 77: 0.33},
        "stable": {32: 1.0, 77: 1.0, 86: 0.80, 91: 0.55},
    }
    for schedule, fall in falls.items():
        config = TrainConfig(steps=100, warmup=10, schedule=schedule, final_rate=0.1)
        rates = [rate_at(step, config) for step in range(config.steps)]
        assert rates[0] > 0, "the first step has rate 0: it is wasted"
        assert max(rates) <= 1 + 1e-9, f"{schedule}: the rate exceeds 1"
        peak = max(rates[9], rates[10])
        assert abs(peak - 1) < 1e-9, f"{schedule}: warm-up ends at {peak:.2f}, not at 1"
        rises = [a < b for a, b in zip(rates, rates[1:], strict=False)]
        assert all(rises[:8]), f"{schedule}: the rate doesn't rise during warm-up"
        assert not any(rises[10:]), f"{schedule}: the rate rises after warm-up"
        assert 0.1 - 1e-9 <= rates[-1] < 0.16, (
            f"{schedule}: the last rate is {rates[-1]:.2f}, final_rate is 0.1"
        )
        for step, due in fall.items():
            assert abs(rates[step] - due) < 0.02, (
                f"{schedule}: on the way down, at step {step}, the rate is "
                f"{rates[step]:.2f} instead of {due}"
            )
    _check_edges(rate_at)


def _gradient(step: Callable[[nn.Module, list], None], parts: list) -> Tensor:
    """What `step` leaves in the gradient of a small linear model."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = nn.Linear(3, 4, bias=False).double()
    before, most = model.weight.detach().clone(), max(len(x) for x, _ in parts)

    held: list[Tensor] = []  # what the model returned and no backward has reached

    def count_rows(_: nn.Module, inputs: tuple[Tensor]) -> None:
        assert len(inputs[0]) <= most, "the model got more rows at once than a part has"
        assert model.training, "the mode was switched: dropout would be off"
        assert not held, "two parts are held at once: call backward between them"

    def hold(_: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        if output.requires_grad:
            held.append(output)
            output.register_hook(lambda _: held.clear())

    model.register_forward_pre_hook(count_rows)
    model.register_forward_hook(hold)
    given = [(x.clone(), y.clone()) for x, y in parts]
    step(model, given)
    for (x, y), (x_after, y_after) in zip(parts, given, strict=True):
        same = torch.equal(x, x_after) and torch.equal(y, y_after)
        assert same, "the parts themselves were changed"
    assert model.weight.grad is not None, "no gradient is left: call backward"
    assert torch.equal(model.weight, before), "the weights moved: only leave a gradient"
    return model.weight.grad


def check_accumulation(accumulate: Callable[[nn.Module, list], None]) -> None:
    """The gradients of the parts add up to that of one big batch.

    accumulate: called as accumulate(model, parts), with parts a list of (x, targets),
    leaves the gradient of the mean cross-entropy in `.grad`. Targets of -100 don't
    count, and a part may have no other.

    Book: 12_training.html#accumulation
    """
    random = torch.Generator().manual_seed(0)
    x = torch.randn(8, 3, generator=random, dtype=torch.float64)
    y = torch.randint(4, (8,), generator=random)

    def mean_of_means(model: nn.Module, parts: list) -> None:
        for x, y in parts:
            (F.cross_entropy(model(x), y) / len(parts)).backward()

    wanted = _gradient(mean_of_means, [(x, y)])
    last = _gradient(mean_of_means, [(x[6:], y[6:])])
    found = _gradient(accumulate, list(zip(x.split(2), y.split(2), strict=True)))
    mistakes = [
        (4 * wanted, "the gradient of a sum: divide each part's loss by their number"),
        (8 * wanted, "a sum over all targets: divide by their number"),
        (last, "only the last part counts: don't zero the gradients between the parts"),
        (last / 4, "only the last part counts: don't zero the gradients between parts"),
        (wanted / 4, "divided twice by the number of parts"),
    ]
    for value, mistake in mistakes:
        assert not torch.allclose(found, value), mistake
    assert torch.allclose(found, wanted), "not the gradient of one big batch"
    some = y.where(torch.arange(8) < 5, -100)  # the last three don't count
    for targets, sizes in ((y, [5, 1, 2]), (some, [4, 1, 3]), (some, [1, 6, 1])):
        parts = list(zip(x.split(sizes), targets.split(sizes), strict=True))
        found = _gradient(accumulate, parts)
        assert not found.isnan().any(), "a part without targets made nan: 0 / 0"
        assert not torch.allclose(found, _gradient(mean_of_means, parts)), (
            "this is the mean of the parts' means: a target in a small part weighs more"
        )
        assert torch.allclose(found, _gradient(mean_of_means, [(x, targets)])), (
            "not the gradient of one big batch: divide by the targets that count"
        )


def _surprise(model: GPT, tokens: Tokens, crops: int) -> float:
    """The mean over the fixed crops, all of them in one batch."""
    (batch,) = tokens.fixed_batches(crops, 4, 50)
    return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten()).item()


def _check_all_crops(evaluate: Callable, model: GPT, tokens: Tokens) -> None:
    """Of 50 crops asked for there are 21, and they come in batches of 8."""
    rows: list[int] = []
    model.register_forward_pre_hook(lambda _, given: rows.append(len(given[0])))
    found = evaluate(model, tokens, 50, 8)
    most = max(rows, default=0)
    assert most <= 8, f"batch_size is 8, and {most} crops came at once"
    assert abs(found - _surprise(model, tokens, 50)) < 1e-4, (
        "of 50 crops asked for there are only 21: divide by those that came"
    )


def check_evaluate(evaluate: Callable[[GPT, Tokens, int, int], float]) -> None:
    """A model is judged on the same crops each time, whatever the batch size.

    evaluate: called as evaluate(model, tokens, crops, batch_size), returns the mean
    cross-entropy of a token, with dropout off.

    Book: 12_training.html#a-fair-evaluation
    """
    ids = [n * n % 7 for n in range(90)]
    tokens = TokenData.of(ids, ids, vocab_size=7).validation
    with torch.random.fork_rng([]), torch.enable_grad():
        torch.manual_seed(0)
        model = GPT(GPTConfig(7, context=4, layers=1, heads=1, width=8, dropout=0.5))
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.5)
        state = torch.get_rng_state()
        found = [evaluate(model.train(), tokens, 7, size) for size in (8, 8, 1, 3)]
        assert found[0] == found[1], (
            "judged twice, the same model gets two losses: is dropout off, and are the "
            "crops the same?"
        )
        kept = torch.is_grad_enabled() and torch.equal(state, torch.get_rng_state())
        assert kept, "afterwards gradients are off, or the random numbers are others"
        assert isinstance(found[0], float), "return a number: a tensor keeps its graph"
        assert model.training, "the model was in training mode before and is not now"
        evaluate(model.eval(), tokens, 7, 8)
        assert not model.training, "training mode was switched on"
        wanted = _surprise(model, tokens, 7)
    assert abs(found[0] - wanted) < 1e-4, (
        f"the mean surprise at the fixed crops is {wanted:.3f}, not {found[0]:.3f}"
    )
    assert abs(found[2] - wanted) < 1e-4, (
        "another batch size judges other crops: it must say how many at once, no more"
    )
    assert abs(found[3] - wanted) < 1e-4, (
        "the smaller last batch weighs as much as a full one: weigh by crops"
    )
    _check_all_crops(evaluate, model, tokens)
    model.train().norm.forward = None  # an error on the way
    try:
        evaluate(model, tokens, 7, 8)
    except TypeError:
        assert model.training, "after an error the model stays in another mode"


def _run(
    kind: Callable[..., Any], ids: list[int], dropout: float, cut: int
) -> tuple[Tensor, list[dict[str, float]]]:
    """Weights and records of eight steps; at `cut` another trainer goes on."""
    data = TokenData.of(ids, ids, vocab_size=5)
    config = TrainConfig(
        steps=8, batch_size=2, learning_rate=0.01, warmup=2, evaluation_crops=2
    )

    def begin(value: float) -> Any:
        shape = GPTConfig(5, context=4, layers=1, heads=1, width=8, dropout=dropout)
        model = GPT(shape)
        random = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            nn.init.normal_(parameter, value, 0.1, generator=random)
        return kind(model, data, config)

    trainer = begin(0.0)
    for step in range(8):
        if step == cut:
            state = copy.deepcopy(trainer.state_dict())
            trainer = begin(9.0)
            trainer.load_state_dict(copy.deepcopy(state))
            late, early = trainer.evaluate(), trainer.records[0]
            assert late["seconds"] >= early["seconds"], "the seconds were forgotten"
            trainer.load_state_dict(state)
            torch.rand(step)  # the caller may draw what he likes
        trainer.take_step()
        if step in (2, 7):
            trainer.evaluate()
    weights = nn.utils.parameters_to_vector(trainer.model.parameters()).detach()
    return weights, trainer.records


def check_state_dict(trainer: Callable[..., Any]) -> None:
    """A run that goes on from its state ends with the same weights, bit for bit.

    trainer: called as `Trainer` is, with model, data and config.

    Book: 12_training.html#the-loop
    """
    one_crop, text = list(range(5)), [n * n % 5 for n in range(60)]
    state = "the optimizer's moments or the schedule were not restored"
    cases = [
        (one_crop, 0.0, state),
        (text, 0.0, "the batches after resuming are others: count its steps"),
        (text, 0.5, "the random numbers after resuming are others"),
    ]
    for ids, dropout, mistake in cases:
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            whole, records = _run(trainer, ids, dropout, cut=-1)
            resumed, found = _run(trainer, ids, dropout, cut=5)
        gap = (whole - resumed).abs().max()
        assert gap < 1, "the weights were not restored"
        steps, due = ([line["step"] for line in lines] for lines in (found, records))
        assert steps == due, f"the resumed run recorded steps {steps}, not {due}"
        assert torch.equal(whole, resumed), mistake
        losses, due = ([r["train_loss"] for r in lines] for lines in (found, records))
        assert losses == due, "the losses since the last record were forgotten"


def check_clipping(clip: Callable[[list[Tensor], float], list[Tensor]]) -> None:
    """A long gradient is shortened as a whole; a short one stays as it is.

    Book: 12_training.html#exercise-1-clip-without-turning
    """

    def flat(parts: list[Tensor]) -> Tensor:
        return torch.cat([part.flatten().double() for part in parts])

    long = [torch.tensor([[3.0, 0.0], [0.0, 0.5]]), torch.tensor([4.0])]
    given = [part.clone() for part in long]
    parts = clip(given, 1.0)
    found, norm = flat(parts), flat(long).norm()
    assert torch.equal(flat(given), flat(long)), "the gradients given were changed"
    assert not torch.allclose(found, flat([part / part.norm() for part in long])), (
        "each tensor was shortened by itself: the gradient is all of them together"
    )
    norms = sum(part.norm().item() for part in long)
    assert not torch.allclose(found, flat(long) / norms, atol=1e-5), (
        "divided by the sum of the norms: take one root of the sum of all squares"
    )
    assert not torch.allclose(found, flat(long).clamp(-1, 1)), (
        "each number was cut off at the limit: that turns the gradient"
    )
    assert abs(found.norm() - 1) < 1e-4, f"its norm is {found.norm():.3f}, not 1"
    assert torch.allclose(found, flat(long) / norm, atol=1e-5), (
        "its direction changed, or the order of the tensors"
    )
    assert [part.shape for part in parts] == [part.shape for part in long], (
        "return as many tensors as were given, each in its shape"
    )
    found = flat(clip(long, 2.0)).norm()
    assert abs(found - 2) < 1e-4, f"with a limit of 2 its norm is {found:.3f}"
    short = [torch.tensor([1.2]), torch.tensor([0.9])]  # of norm 1.5
    for share, limit in ((0.2, 1.0), (1.0, 2.0)):
        given = [share * part for part in short]
        assert torch.allclose(flat(clip(given, limit)), flat(given)), (
            f"a short gradient was made longer: norm {1.5 * share:.1f}, limit {limit}"
        )
    found = flat(clip([part / 2 for part in short], 0.7)).norm()
    assert abs(found - 0.7) < 1e-4, (
        f"with a limit of 0.7 a norm of 0.75 becomes {found:.3f}: compare the norm"
        " itself with the limit"
    )
    try:
        zero = flat(clip([torch.zeros(2)], 1.0))
    except ZeroDivisionError:
        raise AssertionError("divided by 0: a gradient may be zeros") from None
    assert not zero.any(), "a gradient of zeros did not stay zero"
