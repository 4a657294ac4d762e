"""Training: the loop and its seams, and checks that name mistakes."""

import copy
import io
import math
import threading
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from glassgpt import training
from glassgpt.checks import training as checks
from glassgpt.data import TokenData, Tokens
from glassgpt.gpt import GPT, GPTConfig
from glassgpt.training import (
    TrainConfig,
    Trainer,
    evaluate,
    make_optimizers,
    rate_at,
    token_loss,
    train,
)

SHAPE = GPTConfig(11, context=8, layers=1, heads=2, width=16, dropout=0.1)
PLAIN = replace(SHAPE, dropout=0.0)
CONFIG = TrainConfig(
    steps=12, batch_size=4, warmup=3, evaluate_every=4, evaluation_crops=8
)
IDS = [n * n % 11 for n in range(400)]
DATA = TokenData.of(IDS[:300], IDS[300:], 11)


def gpt(shape=SHAPE, seed=0):
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return GPT(shape)


def trainer(model=None, config=CONFIG, data=DATA, **seams):
    return Trainer(model or gpt(), data, config, **seams)


def run(model=None, config=CONFIG, after_step=None, **seams):
    made = trainer(model, config, **seams)
    train(made, after_step, progress=False)
    return made


def weights(made):
    model = getattr(made, "model", made)
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone()


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# The settings.


@pytest.mark.parametrize(
    ("setting", "value"),
    [("steps", 0), ("steps", 1.5), ("steps", True), ("steps", 10**20)]
    + [("seed", -1), ("accumulate", "2"), ("accumulate", 33), ("clip", None)]
    + [("learning_rate", 0.0), ("learning_rate", math.nan), ("clip", math.inf)]
    + [("weight_decay", -0.1), ("final_rate", 1.1), ("schedule", "step")]
    + [("beta1", 1.0), ("beta1", -0.1), ("beta2", 1), ("beta2", math.nan)],
)
def test_impossible_settings_are_refused(setting, value):
    with pytest.raises(ValueError, match=setting):
        TrainConfig(**{setting: value})


def test_possible_settings_pass_and_those_of_later_chapters_are_validated():
    TrainConfig(learning_rate=1, weight_decay=0, final_rate=0, warmup=0, clip=1e9)
    TrainConfig(batch_size=5, accumulate=5, final_rate=1, schedule="stable")
    TrainConfig(beta1=0, beta2=0.0)

    @dataclass(frozen=True)
    class More(TrainConfig):
        other_rate: float = 0.02

    with pytest.raises(ValueError, match="other_rate"):
        More(other_rate=-1.0)


@given(
    st.integers(1, 500),
    st.integers(0, 600),
    st.sampled_from(["cosine", "linear", "stable"]),
    st.floats(0, 1),
)
@settings(max_examples=20)
def test_every_rate_is_a_share(steps, warmup, schedule, final):
    config = TrainConfig(
        steps=steps, warmup=warmup, schedule=schedule, final_rate=final
    )
    rates = [rate_at(step, config) for step in range(steps)]
    assert all(0 < rate <= 1 + 1e-12 for rate in rates)
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)


# A step.


def test_every_parameter_is_trained_once_and_matrices_decay():
    model = gpt()
    made = make_optimizers(model, TrainConfig(weight_decay=0.3))
    groups = [group for optimizer in made for group in optimizer.param_groups]
    trained = [id(p) for group in groups for p in group["params"]]
    assert sorted(trained) == sorted(id(p) for p in model.parameters())
    decaying = {id(p) for g in groups if g["weight_decay"] for p in g["params"]}
    for name, parameter in model.named_parameters():
        assert (id(parameter) in decaying) == (parameter.dim() > 1), name
    assert {g["weight_decay"] for g in groups} == {0.0, 0.3}


def batch_of(step, config=CONFIG):
    seed = (config.seed, step)
    return DATA.train.random_batch(config.batch_size, SHAPE.context, seed)


def test_steps_are_those_of_a_plain_loop_with_the_rate_scheduled():
    config = replace(CONFIG, clip=0.1, beta1=0.5, beta2=0.8)
    made, other = trainer(gpt(PLAIN), config), gpt(PLAIN)
    matrices = [p for p in other.parameters() if p.dim() > 1]
    vectors = [p for p in other.parameters() if p.dim() < 2]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    reference = torch.optim.AdamW(
        groups, betas=(0.5, 0.8), weight_decay=0.1, fused=True
    )
    for step in range(5):
        made.take_step()
        for group in reference.param_groups:
            group["lr"] = config.learning_rate * rate_at(step, config)
        ids, targets = batch_of(step)
        F.cross_entropy(other(ids).flatten(0, 1), targets.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(other.parameters(), 0.1)
        reference.step()
        reference.zero_grad()
    assert torch.equal(weights(made), weights(other))
    assert made.step == 5


@pytest.mark.parametrize(("batch", "parts"), [(12, 12), (7, 3)])
def test_parts_change_neither_the_data_nor_the_gradient(batch, parts):
    rows, gradients = [], []
    for accumulate in (1, parts):
        model, seen = gpt(PLAIN), []

        def loss(ids, targets, model=model, seen=seen):
            seen.append(ids)
            return token_loss(model)(ids, targets)

        config = replace(CONFIG, batch_size=batch, accumulate=accumulate, clip=1e9)
        trainer(model, config, loss=loss).take_step()
        rows.append(torch.cat(seen))
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert len(seen) > 1
    assert torch.equal(*rows)
    assert torch.allclose(*gradients, atol=1e-6)


class HalfAsked(Tokens):
    """Rows that begin with a low id have no targets, as where only answers count."""

    def _crops(self, starts, context):
        ids, targets = super()._crops(starts, context)
        return ids, targets.masked_fill(ids[:, :1] < 4, -100)


def test_a_part_without_targets_changes_nothing():
    data = TokenData(HalfAsked(DATA.train.ids), HalfAsked(DATA.validation.ids), 11)
    losses, gradients, judged = [], [], []
    for parts in (1, 4):
        model = gpt(PLAIN)
        config = replace(CONFIG, accumulate=parts, clip=1e9)
        made = trainer(model, config, data)
        judged.append(made.evaluate()["validation_loss"])
        made.take_step()
        losses.append(made.read_losses())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    _, targets = data.train.random_batch(4, SHAPE.context, (0, 0))
    empty = (targets == -100).all(dim=1)
    assert empty.any()
    assert not empty.all()
    logits = gpt(PLAIN)(DATA.train.random_batch(4, SHAPE.context, (0, 0))[0])
    due = F.cross_entropy(logits.flatten(0, 1), targets.flatten()).item()
    assert losses == pytest.approx([due] * 2)
    assert judged[1] == pytest.approx(judged[0])
    assert torch.allclose(*gradients, atol=1e-6)
    nothing = torch.full((2, SHAPE.context), -100)
    assert token_loss(gpt())(batch_of(0)[0][:2], nothing) == 0


def test_a_gradient_left_by_the_caller_counts_for_nothing():
    made, other = trainer(), trainer()
    token_loss(made.model)(*batch_of(5)).backward()
    made.take_step()
    other.take_step()
    assert torch.equal(weights(made), weights(other))


def test_frozen_parameters_stay():
    model = gpt()
    before = model.tokens.weight.requires_grad_(False).clone()
    made = trainer(model)
    made.take_step()
    assert torch.equal(model.tokens.weight, before)
    trainer(model).load_state_dict(through_a_file(made.state_dict()))


# What decides a run: its seed, and nothing else.


def test_the_callers_random_numbers_stay_as_they_are():
    def untouched(action):
        torch.manual_seed(5)
        before = torch.get_rng_state()
        action()
        return torch.equal(torch.get_rng_state(), before)

    made = trainer()
    assert untouched(made.take_step)
    assert untouched(made.evaluate)
    assert untouched(lambda: train(made, progress=False))


def test_seed_and_step_decide_what_is_drawn():
    first = run(after_step=lambda made: torch.rand(3).sum() < 0)
    torch.manual_seed(99)
    assert torch.equal(weights(first), weights(run()))
    other = run(config=replace(CONFIG, seed=1))
    assert not torch.equal(weights(first), weights(other))
    drawn = []

    def dropping(ids, targets):
        drawn.append(torch.rand(()).item())
        return token_loss(model)(ids, targets)

    model = gpt()
    run(model, replace(CONFIG, evaluate_every=12, evaluation_crops=1), loss=dropping)
    assert len(set(drawn)) == len(drawn)  # each step drops other numbers


def test_threads_that_train_at_once_do_not_disturb_each_other():
    alone = weights(run(gpt(replace(SHAPE, dropout=0.5))))
    models = [gpt(replace(SHAPE, dropout=0.5)) for _ in range(3)]
    threads = [threading.Thread(target=run, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(weights(model), alone) for model in models)


@pytest.mark.parametrize("cut", [4, 6])  # at a record and between two
def test_resuming_is_exact(cut):
    whole, half = run(), trainer()
    train(half, lambda made: made.step == cut, progress=False)
    assert half.step == cut
    state = through_a_file(half.state_dict())
    train(half, progress=False)  # going on changes nothing that was kept
    rest = trainer(gpt(seed=9))
    rest.load_state_dict(state)
    train(rest, progress=False)
    for made in (half, rest):
        assert torch.equal(weights(whole), weights(made))
        for a, b in zip(whole.records, made.records, strict=True):
            for name in ("step", "train_loss", "validation_loss", "learning_rate"):
                assert a[name] == b[name]


def test_a_finished_run_goes_on_when_there_are_more_steps():
    state = copy.deepcopy(run().state_dict())
    longer = trainer(config=replace(CONFIG, steps=16, learning_rate=1e-3))
    longer.load_state_dict(state)
    train(longer, progress=False)
    assert [record["step"] for record in longer.records] == [4, 8, 12, 16]
    assert longer.records[-1]["learning_rate"] < 1e-3
    assert longer.optimizers[0].param_groups[0]["initial_lr"] == 1e-3


# A fair evaluation.


def test_evaluation_is_the_same_for_every_batch_size():
    model = gpt().train()
    first = evaluate(model, DATA.validation, 10, 10)
    assert first == evaluate(model, DATA.validation, 10, 10)
    for size in (1, 3, 7, 500):
        assert evaluate(model, DATA.validation, 10, size) == pytest.approx(first)
    many = evaluate(model, DATA.validation, 5000, 32)  # as many as don't overlap
    assert many == evaluate(model, DATA.validation, 11, 32)


def test_the_split_of_a_batch_does_not_change_what_is_judged():
    losses = []
    for batch, accumulate in ((4, 1), (4, 4), (64, 8), (5, 2)):
        config = replace(CONFIG, batch_size=batch, accumulate=accumulate)
        losses.append(trainer(gpt(), config).evaluate()["validation_loss"])
    assert losses == pytest.approx([losses[0]] * 4)


def test_the_mode_stays_also_after_an_error():
    def failing(ids, targets):
        raise OSError("pulled out")

    model = gpt().eval()
    model.blocks[0].train()  # each part has its own
    for action in (
        lambda: evaluate(model, DATA.validation, 4, loss=failing),
        lambda: train(trainer(model, loss=failing), progress=False),
    ):
        with pytest.raises(OSError, match="pulled out"):
            action()
        assert not model.training
        assert not model.norm.training
        assert model.blocks[0].training
        assert model.blocks[0].mlp.training


def test_a_look_on_the_way_leaves_dropout_on():
    def look(made):
        made.model.eval()

    assert torch.equal(weights(run()), weights(run(after_step=look)))


# Records.


def test_a_loss_falls_and_the_records_are_honest():
    clock = iter(range(100_000))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.time, "perf_counter", lambda: next(clock))
        config = replace(CONFIG, steps=30, evaluate_every=12, learning_rate=0.01)
        made = run(config=config)
    assert [record["step"] for record in made.records] == [12, 24, 30]
    losses = [record["validation_loss"] for record in made.records]
    assert losses[-1] < losses[0] < math.log(11) + 0.1
    # A second for every reading of the clock: two readings of up to ten steps.
    assert [record["seconds"] for record in made.records] == [2, 4, 5]
    speeds = [record["tokens_per_second"] for record in made.records]
    tokens = 4 * 8  # of a step
    assert speeds == [12 * tokens / 2, 12 * tokens / 2, 6 * tokens]
    assert made.records[0]["learning_rate"] == 0.01 * rate_at(11, config)


def test_the_training_loss_is_the_mean_since_the_last_record():
    model, numbers = gpt(), iter(range(1, 99))

    def loss(ids, targets):
        value = token_loss(model)(ids, targets)
        return 0 * value + next(numbers) if torch.is_grad_enabled() else value

    made = run(model, loss=loss)
    assert [record["train_loss"] for record in made.records] == [2.5, 6.5, 10.5]
    assert made.read_losses() == 12


def test_nats_a_character_only_where_characters_are_known():
    data = TokenData.of(IDS[:300], IDS[300:], 11)
    data.validation.characters = 400  # for 100 tokens
    record = trainer(data=data).evaluate()
    quarter = record["validation_loss"] / 4
    assert record["nats_per_character"] == pytest.approx(quarter)
    data.validation.characters = None
    assert "nats_per_character" not in trainer(data=data).evaluate()


def test_a_model_can_be_judged_before_the_first_step_and_twice():
    made = trainer()
    before = made.evaluate()
    assert set(before) <= {"step", "validation_loss", "seconds", "nats_per_character"}
    assert before["step"] == 0
    assert math.isnan(made.read_losses())
    made.take_step()
    loss = made.read_losses()
    assert "train_loss" in made.evaluate()
    assert made.read_losses() == loss  # of the last step, also after an evaluation
    assert "train_loss" not in made.evaluate()
    assert [record["step"] for record in made.records] == [0, 1, 1]


# The seams.


def test_optimizers_and_loss_come_from_outside():
    model = gpt(PLAIN)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)

    def twice(ids, targets):
        return 2 * token_loss(model)(ids, targets)

    made = trainer(model, optimizers=[optimizer], loss=twice)
    other = gpt(PLAIN)
    made.take_step()
    loss = 2 * token_loss(other)(*batch_of(0))
    loss.backward()
    torch.nn.utils.clip_grad_norm_(other.parameters(), CONFIG.clip)
    rate = 0.5 * rate_at(0, CONFIG)
    wanted = torch.cat([(p - rate * p.grad).flatten() for p in other.parameters()])
    assert torch.allclose(weights(made), wanted)
    assert made.read_losses() == pytest.approx(loss.item())
    judged = 2 * evaluate(model, DATA.validation, CONFIG.evaluation_crops)
    assert made.evaluate()["validation_loss"] == pytest.approx(judged)
    assert made.records[-1]["learning_rate"] == rate
    other = trainer(gpt(PLAIN), optimizers=[optimizer, *make_optimizers(model, CONFIG)])
    other.load_state_dict(other.state_dict())
    other.take_step()
    rate = CONFIG.learning_rate * rate_at(0, CONFIG)
    assert other.evaluate()["learning_rate"] == rate  # of the last optimizer
    fresh = trainer(gpt(PLAIN), config=replace(CONFIG, warmup=3))
    fresh.take_step()
    after, state = trainer(gpt(PLAIN), config=fresh.config), fresh.state_dict()
    after.load_state_dict(state)
    rate = fresh.evaluate()["learning_rate"]
    assert after.evaluate()["learning_rate"] == rate < CONFIG.learning_rate
    trainer(model, optimizers=[optimizer])  # its rate is known from before
    assert optimizer.param_groups[0]["initial_lr"] == 0.5


def test_after_step_sees_every_step_and_can_end_the_run():
    steps, records = [], []

    def look(made):
        steps.append(made.step)
        records.append(len(made.records))
        return made.step == 9

    made = run(after_step=look)
    assert steps == list(range(1, 10))
    assert records == [0, 0, 0, 1, 1, 1, 1, 2, 2]
    train(made, progress=False)
    assert made.step == 12
    train(made, progress=False)
    assert [record["step"] for record in made.records] == [4, 8, 12]


def test_progress_is_shown_when_asked_for(capsys):
    short = replace(CONFIG, steps=1)
    train(trainer(config=short), progress=False)
    assert capsys.readouterr() == ("", "")
    train(trainer(config=short))
    assert "1/1" in capsys.readouterr().err


def test_training_drops_and_evaluations_do_not():
    model, dropped = gpt().eval(), {"training": [], "evaluation": []}

    def loss(ids, targets):
        first, again = (token_loss(model)(ids, targets) for _ in range(2))
        kind = "training" if torch.is_grad_enabled() else "evaluation"
        dropped[kind].append(first.item() != again.item())
        return first

    made = run(model, loss=loss)
    assert made.step == len(dropped["training"])
    assert all(dropped["training"])  # also after an evaluation
    assert dropped["evaluation"]
    assert not any(dropped["evaluation"])
    assert not model.training  # as it came


# Losses that are no numbers.


def nan_gradient(value, model):
    """The same loss; its gradient by the head is infinity times zero."""
    return value + (model.head.weight.sum() * 0).sqrt()


def test_a_loss_that_is_no_number_stops_the_run():
    model, calls = gpt(), []

    def loss(ids, targets):
        value = token_loss(model)(ids, targets)
        calls.append(torch.is_grad_enabled())
        return nan_gradient(value, model) if sum(calls) == 7 else value

    made = trainer(model, loss=loss)
    with pytest.raises(FloatingPointError, match="at step 7 is not finite: lower"):
        train(made, progress=False)
    for action in (made.state_dict, made.evaluate, made.read_losses):
        with pytest.raises(FloatingPointError):  # it is never kept
            action()


def test_an_evaluation_that_is_no_number_stops_the_run():
    model = gpt()

    def loss(ids, targets):
        value = token_loss(model)(ids, targets)
        return value if torch.is_grad_enabled() else value * math.inf

    with pytest.raises(
        FloatingPointError, match="validation loss at step 4 is not finite"
    ):
        run(model, loss=loss)


# What doesn't belong together.


def test_what_does_not_fit_is_refused():
    lighter = gpt()
    for part in lighter.blocks.modules():
        if isinstance(part, torch.nn.Linear):
            del part.weight
    cases = [
        (ValueError, "12 token ids, the model only knows 11", None, 12),
        (ValueError, "without weights that can be trained", lighter, 11),
        (
            ValueError,
            "without weights that can be trained",
            gpt().requires_grad_(False),
            11,
        ),
    ]
    for kind, message, model, size in cases:
        with pytest.raises(kind, match=message):
            trainer(model, data=TokenData.of(IDS, IDS, size))
    with pytest.raises(ValueError, match="context"):
        trainer(data=TokenData.of(IDS, IDS[:5], 11))
    with pytest.raises(TypeError, match="take what `tokenize` returns"):
        trainer(data="my-tokens")


# The checks, with right and wrong answers.


def torch_adamw(w, gradients, rate, beta1, beta2, decay, **options):
    w = w.clone().requires_grad_()
    settings = {"lr": rate, "betas": (beta1, beta2), "weight_decay": decay}
    optimizer = torch.optim.AdamW([w], **{**settings, **options})
    for gradient in gradients:
        w.grad = gradient.clone()
        optimizer.step()
    return w.detach()


def right_sum(model, parts):
    count = sum((y != -100).sum() for _, y in parts)
    for x, y in parts:
        (F.cross_entropy(model(x), y, reduction="sum") / count).backward()


def counted_first(model, parts):
    count = 0
    for x, y in parts:
        with torch.no_grad():
            count += (y != -100).sum() * (len(model(x)) > 0)
    for x, y in parts:
        if (y != -100).any():
            loss = F.cross_entropy(model(x), y, reduction="sum") / count
            (gradient,) = torch.autograd.grad(loss, model.weight)
            old = model.weight.grad
            model.weight.grad = gradient if old is None else old + gradient


def by_rows(model, parts):
    count = sum(len(y) for _, y in parts)
    for x, y in parts:
        (F.cross_entropy(model(x), y) * (len(y) / count)).backward()


def scaled(model, parts, factor):
    for x, y in parts:
        (F.cross_entropy(model(x), y) * factor).backward()


def all_at_once(model, parts):
    x, y = (torch.cat(columns) for columns in zip(*parts, strict=True))
    F.cross_entropy(model(x), y).backward()


def all_parts_held(model, parts):
    losses = [F.cross_entropy(model(x), y, reduction="sum") for x, y in parts]
    (sum(losses) / sum((y != -100).sum() for _, y in parts)).backward()


def targets_overwritten(model, parts):
    for _, y in parts:
        y[y == -100] = 0
    right_sum(model, parts)


def weights_moved(model, parts):
    right_sum(model, parts)
    with torch.no_grad():
        model.weight -= 0.1 * model.weight.grad


def clip(gradients, longest):
    norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
    return [gradient * (longest / norm).clamp(max=1) for gradient in gradients]


def clip_where(too_long, gradients, longest):
    """Clip, with a condition of its own."""
    norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
    factor = longest / norm if too_long(norm, longest) else 1.0
    return [gradient * factor for gradient in gradients]


def clip_by_division(gradients, longest):
    norm = math.sqrt(sum((gradient**2).sum().item() for gradient in gradients))
    return [gradient * min(1, longest / norm) for gradient in gradients]


def judge(model, tokens, crops, size, mode=None):
    """An evaluation; mode: the one it leaves behind, by mistake."""
    mode, losses = model.training if mode is None else mode, []
    model.eval()
    try:
        for batch in tokens.fixed_batches(crops, model.config.context, size):
            losses += [token_loss(model)(*batch).item()] * len(batch[0])
    finally:
        model.train(mode)
    return sum(losses) / len(losses)


def judge_unless_it_fails(model, tokens, crops, size):
    mode = model.training
    result = judge(model.eval(), tokens, crops, size)
    model.train(mode)
    return result


def forgetful(forget):
    """A trainer that forgets something when it goes on."""

    class Forgetful(Trainer):
        def load_state_dict(self, state):
            before = [p.detach().clone() for p in self.model.parameters()]
            super().load_state_dict(state)
            forget(self, before)

    return Forgetful


@torch.no_grad()
def weights_of_before(made, before):
    for parameter, old in zip(made.model.parameters(), before, strict=True):
        parameter.copy_(old)


def half_the_rate(made, before):
    for group in made.optimizers[0].param_groups:
        group["lr"] /= 2


class Undecided(Trainer):
    """The global random numbers decide what is dropped."""

    def take_step(self):
        with pytest.MonkeyPatch.context() as patch:
            free = training.contextmanager(lambda *_: iter([None]))
            patch.setattr(training, "random_numbers", free)
            super().take_step()


def test_right_versions_pass():
    checks.check_adamw(torch_adamw)
    checks.check_accumulation(counted_first)
    checks.check_clipping(clip)
    checks.check_evaluate(judge)
    before = torch.get_rng_state()
    checks.check_state_dict(forgetful(lambda made, before: None))
    assert torch.equal(torch.get_rng_state(), before)


def rate_with(**changes):
    return lambda step, config: rate_at(step, replace(config, **changes))


def warming(shape):
    """A schedule whose warm-up has another shape."""

    def rate(step, config):
        warm = step < config.warmup
        return shape(step, config.warmup) if warm else rate_at(step, config)

    return rate


WRONG = {
    checks.check_adamw: [
        (partial(torch_adamw, betas=(0.5, 0.999)), "later steps are wrong"),
        (partial(torch_adamw, betas=(0.0, 0.0), eps=1.0), "the first step is wrong"),
        (partial(torch_adamw, eps=1e-20), "epsilon stands outside"),
        (lambda w, g, *_: torch_adamw(w, g, 0.1, 0.9, 0.999, _[-1]), "are ignored"),
        (lambda w, *rest: w.copy_(torch_adamw(w, *rest)), "were changed"),
    ],
    checks.check_schedule: [
        (warming(lambda step, n: ((step + 1) / n) ** 2), "not 0.25"),
        (lambda step, c: 2 * rate_at(step, c), "exceeds 1"),
        (lambda step, c: rate_at(step, c) / 2, "not at 1"),
        (lambda step, c: 1.0, "doesn't rise during warm-up"),
        (lambda step, c: rate_at(min(step, 50), c), "the last rate is 0.6"),
        (lambda step, c: rate_at(10 if step > 50 else step, c), "rises after"),
        (rate_with(final_rate=0.5), "the last rate is 0.5"),
        (rate_with(final_rate=0.1), "final_rate is 0.3"),
        (rate_with(schedule="linear"), "cosine: on the way down, at step 32"),
        (
            lambda step, c: (
                rate_at(step, replace(c, schedule="linear"))
                if c.schedule == "stable"
                else rate_at(step, c)
            ),
            "stable: on the way down",
        ),
        (
            lambda step, c: rate_at(step, replace(c, final_rate=c.final_rate or 0.1)),
            "final_rate is 0.0",
        ),
        (lambda step, c: 0 * step / c.warmup + rate_at(step, c), "divided by 0"),
    ],
    checks.check_accumulation: [
        (partial(scaled, factor=2), "over all targets"),
        (partial(scaled, factor=1 / 16), "divided twice"),
        (partial(scaled, factor=1 / 3), "not the gradient of one big batch"),
        (lambda model, parts: scaled(model, parts[-1:], 1), "only the last part"),
        (
            lambda model, parts: scaled(model, parts, 1 / len(parts)),
            "mean of the parts' means",
        ),
        (by_rows, "divide by the targets that count"),
        (all_at_once, "more rows at once"),
        (all_parts_held, "two parts are held at once"),
        (targets_overwritten, "parts themselves"),
        (weights_moved, "the weights moved"),
        (lambda model, parts: right_sum(model.eval(), parts), "dropout would be off"),
        (lambda model, parts: None, "no gradient is left"),
    ],
    checks.check_clipping: [
        (lambda g, longest: [9 * x for x in clip([x / 9 for x in g], 1.0)], "its norm"),
        (lambda g, longest: clip([999 * x for x in g], longest), "made longer"),
        (lambda g, longest: clip(g, longest)[::-1], "the order"),
        (lambda g, longest: [x.flatten() for x in clip(g, longest)], "in its shape"),
        (lambda g, longest: clip(g, 1.0), "with a limit of 2 its norm is 1.0"),
        (partial(clip_where, lambda norm, longest: norm > 1), "norm 1.5, limit 2.0"),
        (
            partial(clip_where, lambda norm, longest: norm > max(longest, 1)),
            "becomes 0.750",
        ),
        (clip_by_division, "divided by 0"),
        (lambda g, longest: [old.mul_(0.2) for old in g], "were changed"),
    ],
    checks.check_evaluate: [
        (partial(judge, mode=False), "was in training mode before"),
        (partial(judge, mode=True), "was switched on"),
        (judge_unless_it_fails, "after an error"),
        (lambda *a: judge(*a) * min(a[2], 21) / a[2], "divide by those that came"),
        (lambda *a: judge(*a[:3], 500), "21 crops came at once"),
        (lambda *arguments: 2 * judge(*arguments), "the mean surprise"),
        (lambda *a: (torch.set_grad_enabled(False), judge(*a))[1], "gradients are off"),
        (lambda *a: (torch.manual_seed(3), judge(*a))[1], "random numbers are others"),
        (lambda *a: torch.tensor(judge(*a), requires_grad=True), "return a number"),
    ],
    checks.check_state_dict: [
        (forgetful(weights_of_before), "weights were not restored"),
        (forgetful(half_the_rate), "or the schedule"),
        (
            forgetful(lambda made, _: setattr(made, "seconds", 0.0)),
            "seconds were forgotten",
        ),
        (
            forgetful(
                lambda made, _: setattr(made, "config", replace(made.config, seed=7))
            ),
            "batches after resuming",
        ),
        (Undecided, "the random numbers after resuming are others"),
    ],
}
CASES = [(check, *case) for check, cases in WRONG.items() for case in cases]


@pytest.mark.parametrize(
    ("check", "wrong", "message"), CASES, ids=[f"{c[0].__name__}-{c[2]}" for c in CASES]
)
def test_check_names_the_mistake(check, wrong, message):
    with pytest.raises(AssertionError) as caught:
        check(wrong)
    assert message in str(caught.value)
