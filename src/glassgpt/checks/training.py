# Written by tools/tangle.py from book/12_training.ipynb: change it there.
"""Checks of optimizers, schedules, accumulation and resuming that name the mistake."""

from collections.abc import Callable
from dataclasses import replace
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glassgpt.data import TokenData
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
        raise AssertionError(
            "divided by 0: warmup may be 0, or all of the steps"
        ) from None
    assert abs(first - 1) < 1e-9, "without warm-up the first rate must be 1"
    assert 0.9 < last <= 1 + 1e-9, "a run may be all warm-up"
    long = TrainConfig(steps=100, warmup=20, final_rate=0.3)
    quarter, half = (rate_at(step, long) for step in (4, 9))
    assert abs(half - 0.5) < 0.04, (
        f"in the middle of a warm-up of 20 steps the rate is {half:.2f}, not 0.5"
    )
    assert abs(quarter - 0.25) < 0.04, (
        f"after a quarter of the warm-up the rate is {quarter:.2f}, not 0.25"
    )
    for schedule in ("cosine", "linear", "stable"):
        end = rate_at(99, replace(long, schedule=schedule))
        assert 0.3 - 1e-9 <= end < 0.36, (
            f"{schedule}: final_rate is 0.3, and the last rate {end:.2f}"
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


def _smallest(
    orthogonalize: Callable, left: Tensor, right: Tensor, rounds: int
) -> float:
    """What becomes of a singular value that is a hundredth of the largest."""
    values = torch.tensor([1.0] + [0.01] * (left.shape[1] - 1))
    values /= values.norm()
    found = orthogonalize((left @ values.diag() @ right.T)[None], rounds, torch.float32)
    return float((left.T @ found[0] @ right).diagonal()[-1])


def check_orthogonalize(
    orthogonalize: Callable[[Tensor, int, torch.dtype], Tensor],
) -> None:
    """An iteration brings each matrix's singular values near 1; directions stay.

    Book: 12_training.html#singular-values-without-computing-them
    """
    torch.manual_seed(0)
    sides = []
    for rows, columns in ((4, 8), (8, 4), (6, 6)):
        count = min(rows, columns)
        left = torch.linalg.qr(torch.randn(rows, count))[0]
        right = torch.linalg.qr(torch.randn(columns, count))[0]
        sides.append((left, right))
        x = left @ torch.linspace(0.2, 1, count).diag() @ right.T
        pair = orthogonalize(torch.stack([1000 * x, 0.001 * x]), 5, torch.float32)
        assert pair.shape == (2, rows, columns), f"the shape became {pair.shape}"
        for name, found in zip(("large", "small"), pair, strict=True):
            inner = left.T @ found @ right
            values, rest = inner.diagonal(), inner - inner.diagonal().diag()
            turned = rest.abs().max() > 0.005 * values.abs().max()
            assert not turned, "the directions of a matrix changed"
            assert ((values > 0.5) & (values < 1.4)).all(), (
                f"the singular values of a {name} matrix are now {values.min():.2g} to "
                f"{values.max():.2g}: was each matrix divided by its own norm?"
            )
    zeros = orthogonalize(torch.zeros(1, 3, 3), 5, torch.float32)
    assert not zeros.any(), "a gradient of zero should move nothing"
    for pair in sides:
        one, five = (_smallest(orthogonalize, *pair, rounds) for rounds in (1, 5))
        assert one < 0.1 < 0.5 < five, (
            f"one round makes {one:.2g} of a value of 0.01, five make {five:.2g}: it "
            "should be near 1 after five, not after one"
        )
    narrow = orthogonalize(torch.ones(1, 3, 3), 5, torch.bfloat16).dtype
    assert narrow == torch.bfloat16, f"asked for bfloat16, it returned {narrow}"


def _gradient(step: Callable[[nn.Module, list], None], parts: list) -> Tensor:
    """What `step` leaves in the gradient of a small linear model."""
    torch.manual_seed(0)
    model = nn.Linear(3, 4, bias=False).double()
    before, most = model.weight.detach().clone(), max(x.numel() for x, _ in parts)

    def count_rows(_: nn.Module, inputs: tuple[Tensor]) -> None:
        rows = inputs[0].numel() // 3
        assert rows <= most // 3, "the model got more rows at once than a part has"

    model.register_forward_pre_hook(count_rows)
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
    leaves the gradient of the mean cross-entropy in `.grad`.

    Book: 12_training.html#accumulation
    """
    random = torch.Generator().manual_seed(0)
    x = torch.randn(8, 3, generator=random, dtype=torch.float64)
    y = torch.randint(4, (8,), generator=random)

    def whole(model: nn.Module, parts: list) -> None:
        F.cross_entropy(model(parts[0][0]), parts[0][1]).backward()

    wanted, last = _gradient(whole, [(x, y)]), _gradient(whole, [(x[6:], y[6:])])
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


class _PowerCut(Exception):
    """Ends a run after an evaluation."""


def _weights_after(
    train: Callable[..., Any], ids: list[int], dropout: float, optimizer: str, cut: int
) -> tuple[Tensor, list[dict[str, float]]]:
    """The final weights and the records of a run that is cut off and resumed."""
    data = TokenData.of(ids, ids, vocab_size=5)
    shape = GPTConfig(5, context=4, layers=1, heads=1, width=8, dropout=dropout)
    settings = {
        "optimizer": optimizer,
        "warmup": 2,
        "batch_size": 2,
        "evaluation_batches": 1,
    }
    config = TrainConfig(steps=8, evaluate_every=2, checkpoint_every=3, **settings)

    def power_cut(record: dict[str, float]) -> None:
        if record["step"] == cut:
            raise _PowerCut

    with TemporaryDirectory() as place, torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = GPT(shape)
        try:
            run = train(model, data, config, place, on_record=power_cut, progress=False)
        except _PowerCut:
            for parameter in model.parameters():
                nn.init.constant_(parameter, 9.0)
            run = train(model, data, config, place, resume=True, progress=False)
    weights = nn.utils.parameters_to_vector(model.parameters()).detach()
    return weights, run.records


def check_resume(train: Callable[..., Any]) -> None:
    """A run that was cut off and resumed ends with the same weights, bit for bit.

    train: called like `glassgpt.train`, with on_record, progress and resume.

    Book: 12_training.html#cut-off-and-resumed
    """
    one_crop, text = list(range(5)), [n * n % 5 for n in range(60)]
    state = "the optimizer's moments or the schedule were not restored"
    cases = [
        (one_crop, 0.0, "adamw", state),
        (one_crop, 0.0, "muon", state),
        (text, 0.0, "adamw", "the batches after resuming are others: count its steps"),
        (text, 0.5, "adamw", "the state of the random numbers was not restored"),
    ]
    for *case, mistake in cases:
        whole, records = _weights_after(train, *case, cut=0)
        resumed, found = _weights_after(train, *case, cut=4)
        gap = (whole - resumed).abs().max()
        assert gap < 1, "the weights of the checkpoint were not restored"
        steps, due = ([line["step"] for line in lines] for lines in (found, records))
        assert steps == due, f"the resumed run recorded steps {steps}, not {due}"
        assert torch.equal(whole, resumed), mistake
        losses, due = ([r["train_loss"] for r in lines] for lines in (found, records))
        assert losses == due, "the losses since the last record were forgotten"


def check_clipping(clip: Callable[[list[Tensor], float], list[Tensor]]) -> None:
    """A long gradient is shortened as a whole; a short one stays as it is.

    Book: 12_training.html#exercise-2-clip-without-turning
    """

    def flat(parts: list[Tensor]) -> Tensor:
        return torch.cat([part.flatten().double() for part in parts])

    long = [torch.tensor([[3.0, 0.0], [0.0, 0.5]]), torch.tensor([4.0])]
    given = [part.clone() for part in long]
    parts = clip(given, 1.0)
    found, length = flat(parts), flat(long).norm()
    assert torch.equal(flat(given), flat(long)), "the gradients given were changed"
    assert not torch.allclose(found, flat([part / part.norm() for part in long])), (
        "each tensor was shortened by itself: the gradient is all of them together"
    )
    assert not torch.allclose(found, flat(long).clamp(-1, 1)), (
        "each number was cut off at the limit: that turns the gradient"
    )
    assert abs(found.norm() - 1) < 1e-4, f"its length is {found.norm():.3f}, not 1"
    assert torch.allclose(found, flat(long) / length, atol=1e-5), (
        "its direction changed, or the order of the tensors"
    )
    assert [part.shape for part in parts] == [part.shape for part in long], (
        "return as many tensors as were given, each in its shape"
    )
    short = [torch.tensor([0.1]), torch.tensor([0.2])]
    assert torch.allclose(flat(clip(short, 1.0)), flat(short)), (
        "a short gradient was made longer"
    )
    found = flat(clip(long, 2.0)).norm()
    assert abs(found - 2) < 1e-4, f"with a limit of 2 its length is {found:.3f}"
    zero = flat(clip([torch.zeros(2)], 1.0))
    assert not zero.any(), "a gradient of zeros did not stay zero"
    try:  # on the device meta there are shapes, but no numbers to ask for
        clip([part.to("meta") for part in long], 1.0)
    except (RuntimeError, NotImplementedError):
        raise AssertionError(
            "Python asked for a number, by .item(), float() or an if, or a tensor was "
            "made on another device: use the tensors given"
        ) from None


def check_uneven_accumulation(accumulate: Callable[[nn.Module, list], None]) -> None:
    """Every target counts the same, however the targets fall into parts.

    Book: 12_training.html#exercise-3-parts-of-different-sizes
    """
    check_accumulation(accumulate)
    random = torch.Generator().manual_seed(1)
    x = torch.randn(6, 3, generator=random, dtype=torch.float64)
    y = torch.tensor([1, 3, 0, 2, -100, -100])

    def mean_of_means(model: nn.Module, parts: list) -> None:
        for x, y in parts:
            (F.cross_entropy(model(x), y) / len(parts)).backward()

    wanted = _gradient(mean_of_means, [(x, y)])
    for sizes in ([3, 1, 2], [1, 5]):
        parts = list(zip(x.split(sizes), y.split(sizes), strict=True))
        found = _gradient(accumulate, parts)
        assert not found.isnan().any(), "a part without targets made nan: 0 / 0"
        assert not torch.allclose(found, _gradient(mean_of_means, parts)), (
            "this is the mean of the parts' means: a target in a small part weighs more"
        )
        assert torch.allclose(found, wanted), (
            "not the gradient of one big batch: divide by the targets that count"
        )
