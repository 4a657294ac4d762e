# Written by tools/tangle.py from book/12_training.ipynb: change it there.
"""Checks of optimizers, schedules, evaluation and resuming that name the mistake."""

import copy
from collections.abc import Callable
from contextlib import suppress

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glassgpt.checks.expect import close
from glassgpt.data import TokenData
from glassgpt.gpt import GPT, GPTConfig
from glassgpt.training import TrainConfig, Trainer
from glassgpt.training import rate_at as book_rate_at


def check_adamw(adamw: Callable[..., Tensor]) -> None:
    """AdamW's steps are those of torch.optim.AdamW.

    adamw: called as adamw(w, gradients, rate, beta1, beta2, decay), returns the new w.

    Book: 12_training.html#adamw
    """
    start = torch.tensor([0.5, -2.0, 0.0], dtype=torch.float64)
    gradient = torch.tensor([1.0, -0.1, 10.0], dtype=torch.float64)
    gradients = [k * gradient for k in (1, 3, -1, 2)]
    for count, decay, mistake in (
        (1, 0.0, "the first step is wrong: are the means divided by 1 - beta^t?"),
        (4, 0.0, "later steps are wrong: are the means kept, and does t grow?"),
        (4, 0.5, "decay must shrink the weight itself, not be added to the gradient"),
    ):
        w = start.clone().requires_grad_()
        optimizer = torch.optim.AdamW([w], 0.1, (0.8, 0.95), weight_decay=decay)
        for gradient in gradients[:count]:
            w.grad = gradient
            optimizer.step()
        found = adamw(start, gradients[:count], 0.1, 0.8, 0.95, decay)
        assert close(found, w.detach()), mistake


def check_schedule(rate_at: Callable[[int, TrainConfig], float]) -> None:
    """The rate warms up to 1 without a wasted step, then falls to its final share.

    Book: 12_training.html#the-schedule
    """
    for schedule in ("cosine", "linear", "stable"):
        for warmup, final_rate in ((10, 0.1), (40, 0.3), (0, 0.0)):
            config = TrainConfig(
                steps=100, warmup=warmup, schedule=schedule, final_rate=final_rate
            )
            rates = [rate_at(step, config) for step in range(config.steps)]
            assert rates[0] > 0, "the first step has rate 0: it is wasted"
            highest = max(rates)
            assert abs(highest - 1) < 1e-9, (
                f"{schedule}: the highest rate is {highest:.2f}, not 1"
            )
            for step, found in enumerate(rates):
                wanted = book_rate_at(step, config)
                # A step earlier or later is no mistake.
                within = 0.1 if step < warmup else 0.06
                assert abs(found - wanted) < within, (
                    f"{schedule}, warm-up {warmup}, final rate {final_rate}: at step "
                    f"{step} the rate is {found:.2f}, not {wanted:.2f}"
                )


def _gradient(step: Callable[[nn.Module, list], None], parts: list) -> Tensor:
    """What `step` leaves in the gradient of a small linear model."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = nn.Linear(3, 4, bias=False).double()
    most = max(len(x) for x, _ in parts)

    def count_rows(_: nn.Module, inputs: tuple[Tensor]) -> None:
        assert len(inputs[0]) <= most, "the model got more rows at once than a part has"

    model.register_forward_pre_hook(count_rows)
    step(model, parts)
    assert model.weight.grad is not None, "no gradient is left: call backward"
    return model.weight.grad


def _mean_of_means(model: nn.Module, parts: list) -> None:
    for x, targets in parts:
        (F.cross_entropy(model(x), targets) / len(parts)).backward()


def check_accumulation(accumulate: Callable[[nn.Module, list], None]) -> None:
    """The gradients of the parts add up to that of one big batch.

    accumulate: called as accumulate(model, parts), with parts a list of (x, targets),
    leaves the gradient of the mean cross-entropy in `.grad`. Targets of -100 don't
    count, and a part may have no other.

    Book: 12_training.html#accumulation
    """
    random = torch.Generator().manual_seed(0)
    x = torch.randn(8, 3, generator=random, dtype=torch.float64)
    every = torch.randint(4, (8,), generator=random)
    some = every.where(torch.arange(8) < 5, -100)  # the last three don't count
    for targets, sizes in ((every, 2), (every, [5, 1, 2]), (some, [4, 1, 3])):
        parts = list(zip(x.split(sizes), targets.split(sizes), strict=True))
        found = _gradient(accumulate, parts)
        if close(found, _gradient(_mean_of_means, [(x, targets)])):
            continue
        means = _gradient(_mean_of_means, parts)
        last = _gradient(_mean_of_means, parts[-1:]) / len(parts)
        assert not close(found, len(parts) * means), (
            "the gradient of a sum: divide each part's loss by their number"
        )
        assert not close(found, last), (
            "only the last part counts: don't zero the gradients between parts"
        )
        assert not close(found, means), (
            "this is the mean of the parts' means: a target in a small part weighs more"
        )
        raise AssertionError(
            "not the gradient of one big batch: divide by the targets of all parts"
        )


def check_evaluate(evaluate: Callable[..., float]) -> None:
    """A model is judged on the same crops each time, whatever the batch size.

    evaluate: called as evaluate(model, tokens, crops, batch_size), returns the mean
    cross-entropy of a token, with dropout off.

    Book: 12_training.html#a-fair-evaluation
    """
    ids = [n * n % 7 for n in range(90)]
    tokens = TokenData.of(ids, ids, vocab_size=7).validation
    unknown = TokenData.of([8] * 90, [8] * 90, vocab_size=9).validation
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = GPT(GPTConfig(7, context=4, layers=1, heads=1, width=8, dropout=0.5))
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.5)
        found = [evaluate(model.train(), tokens, 7, size) for size in (8, 8, 1, 3)]
    assert model.training, "the model was in training mode before and is not now"
    assert found[0] == found[1], (
        "judged twice, the same model gets two losses: is dropout off, and are the "
        "crops the same?"
    )
    (batch,) = tokens.fixed_batches(7, 4, 8)
    logits = model.eval()(batch[0])
    wanted = F.cross_entropy(logits.flatten(0, 1), batch[1].flatten()).item()
    assert abs(found[0] - wanted) < 1e-4, (
        f"the mean surprise at the fixed crops is {wanted:.3f}, not {found[0]:.3f}"
    )
    assert abs(found[2] - wanted) < 1e-4, (
        "another batch size judges other crops: it must say how many at once, no more"
    )
    assert abs(found[3] - wanted) < 1e-4, (
        "the smaller last batch weighs as much as a full one: weigh by crops"
    )
    evaluate(model, tokens, 7, 8)
    assert not model.training, "training mode was switched on"
    with suppress(ValueError):
        evaluate(model.train(), unknown, 7, 8)
    assert model.training, "after an error the model stays in another mode"


def _run(
    kind: Callable[..., Trainer], ids: list[int], dropout: float, cut: int
) -> tuple[Tensor, list[dict[str, float]]]:
    """Weights and records of eight steps; at `cut` another trainer goes on."""
    data = TokenData.of(ids, ids, vocab_size=5)
    shape = GPTConfig(5, context=4, layers=1, heads=1, width=8, dropout=dropout)
    config = TrainConfig(steps=8, batch_size=2, warmup=2, evaluation_crops=2)
    torch.manual_seed(0)
    trainer = kind(GPT(shape), data, config)
    for step in range(8):
        if step == cut:
            state = copy.deepcopy(trainer.state_dict())
            trainer = kind(GPT(shape), data, config)  # other weights
            trainer.load_state_dict(state)
        trainer.take_step()
        if step in (2, 7):
            trainer.evaluate()
    weights = nn.utils.parameters_to_vector(trainer.model.parameters())
    return weights.detach(), trainer.records


def check_state_dict(trainer: Callable[..., Trainer]) -> None:
    """A run that goes on from its state ends with the same weights, bit for bit.

    trainer: called as `Trainer` is, with model, data and config.

    Book: 12_training.html#the-loop
    """
    one_crop, text = list(range(5)), [n * n % 5 for n in range(60)]
    for ids, dropout, mistake in (
        (one_crop, 0.0, "weights, moments or the schedule were not restored"),
        (text, 0.5, "the batches or the random numbers after resuming are others"),
    ):
        with torch.random.fork_rng([]):
            whole, records = _run(trainer, ids, dropout, cut=-1)
            resumed, found = _run(trainer, ids, dropout, cut=5)
        last = found[-1]["step"]
        assert last == 8, f"after eight steps the trainer has counted {last}"
        assert torch.equal(whole, resumed), mistake
        losses = [[r["train_loss"] for r in lines] for lines in (records, found)]
        assert losses[0] == losses[1], "losses since the last record were forgotten"


def check_clipping(clip: Callable[[list[Tensor], float], list[Tensor]]) -> None:
    """A long gradient is shortened as a whole; a short one stays as it is.

    Book: 12_training.html#exercise-1-clip-without-turning
    """

    def flat(parts: list[Tensor]) -> Tensor:
        return torch.cat([part.flatten() for part in parts])

    long = [torch.tensor([[3.0, 0.0], [0.0, 0.5]]), torch.tensor([4.0])]
    zeros = [torch.zeros(2)]
    for limit, parts in ((1.0, long), (2.0, long), (6.0, long), (1.0, zeros)):
        given, norms = flat(parts), [part.norm() for part in parts]
        found = flat(clip([part.clone() for part in parts], limit))
        wanted = given * (limit / given.norm()).clamp(max=1)
        if close(found, wanted):
            continue
        each = [part * limit / norm for part, norm in zip(parts, norms, strict=True)]
        assert not close(found, flat(each)), (
            "each tensor was shortened by itself: the gradient is all of them together"
        )
        assert not close(found, given * limit / sum(norms)), (
            "divided by the sum of the norms: take one root of the sum of all squares"
        )
        assert not close(found, given.clamp(-limit, limit)), (
            "each number was cut off at the limit: that turns the gradient"
        )
        raise AssertionError(
            f"with a limit of {limit}, a norm of {given.norm():.2f} becomes "
            f"{found.norm():.2f}, not {wanted.norm():.2f}, or the direction changes"
        )
