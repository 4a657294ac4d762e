"""Training: the loop and its seams."""

import io
import math
import threading
import time
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR

from glassgpt.data import TokenData
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


def gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


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
    + [("beta1", 1.0), ("beta2", 1)],
)
def test_impossible_settings_are_refused(setting, value):
    with pytest.raises(ValueError, match=setting):
        TrainConfig(**{setting: value})


def test_possible_settings_pass_and_those_of_later_chapters_are_validated():
    TrainConfig(weight_decay=0, final_rate=0, warmup=0, beta1=0, beta2=0.0)
    TrainConfig(learning_rate=1, batch_size=5, accumulate=5, final_rate=1)

    @dataclass(frozen=True)
    class More(TrainConfig):
        other_rate: float = 0.02

    with pytest.raises(ValueError, match="other_rate"):
        More(other_rate=-1.0)


@given(st.integers(1, 99), st.integers(0, 99), st.floats(0, 1), st.booleans())
@settings(max_examples=20)
def test_rates_warm_up_and_then_fall_as_those_of_pytorch(falling, warmup, end, cosine):
    config = TrainConfig(
        steps=warmup + falling,
        warmup=warmup,
        final_rate=end,
        schedule="cosine" if cosine else "linear",
    )
    for step in range(warmup):
        assert rate_at(step, config) == (step + 1) / warmup
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    if cosine:
        scheduler = CosineAnnealingLR(optimizer, falling, end)
    else:
        scheduler = LinearLR(optimizer, 1.0, end, falling)
    for step in range(warmup, config.steps):
        wanted = optimizer.param_groups[0]["lr"]
        assert rate_at(step, config) == pytest.approx(wanted, abs=1e-6)
        optimizer.step()
        scheduler.step()


def test_a_stable_rate_falls_over_the_last_fifth():
    config = TrainConfig(steps=110, warmup=10, schedule="stable", final_rate=0.2)
    rates = [rate_at(step, config) for step in (9, 50, 90, 100, 109)]
    assert rates == pytest.approx([1.0, 1.0, 1.0, 0.6, 0.24])


# A step.


def test_every_parameter_is_trained_once_and_matrices_decay():
    model = gpt()
    made = make_optimizers(model, TrainConfig(weight_decay=0.3))
    groups = [group for optimizer in made for group in optimizer.param_groups]
    decay = [(id(p), g["weight_decay"]) for g in groups for p in g["params"]]
    wanted = [(id(p), 0.3 if p.dim() > 1 else 0.0) for p in model.parameters()]
    assert sorted(decay) == sorted(wanted)


def batch_of(step):
    return DATA.train.random_batch(CONFIG.batch_size, SHAPE.context, (0, step))


def test_steps_are_those_of_a_plain_loop_with_the_rate_scheduled():
    config = replace(CONFIG, clip=0.1, beta1=0.5, beta2=0.8)
    made, other = trainer(gpt(PLAIN), config), gpt(PLAIN)
    groups = [
        {"params": [p for p in other.parameters() if p.dim() > 1]},
        {"params": [p for p in other.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, 0, (0.5, 0.8), weight_decay=0.1, fused=True)
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
def test_parts_change_neither_the_gradient_nor_the_losses(batch, parts):
    gradients, losses = [], []
    for accumulate in (1, parts):
        model, sizes = gpt(PLAIN), []

        def loss(ids, targets, model=model, sizes=sizes):
            sizes.append(len(ids))
            return token_loss(model)(ids, targets)

        config = replace(CONFIG, batch_size=batch, accumulate=accumulate, clip=1e9)
        made = trainer(model, config, loss=loss)
        made.take_step()
        gradients.append(gradient(model))
        losses.append((made.read_losses(), made.evaluate()["validation_loss"]))
        assert max(sizes) == math.ceil(batch / accumulate)
    assert torch.allclose(*gradients, atol=1e-6)
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


def test_the_loss_is_the_mean_over_the_targets_that_count():
    model, (ids, targets) = gpt(PLAIN), batch_of(0)
    targets = targets.masked_fill(ids < 4, -100)
    wanted = F.cross_entropy(model(ids).flatten(0, 1), targets.flatten())
    torch.testing.assert_close(token_loss(model)(ids, targets), wanted)
    assert token_loss(model)(ids, torch.full_like(targets, -100)) == 0


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


def test_seed_and_step_decide_what_is_drawn():
    first = run(after_step=lambda made: torch.rand(3).sum() < 0)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    assert torch.equal(weights(first), weights(run()))
    assert torch.equal(torch.get_rng_state(), before)  # the caller's own
    other = run(config=replace(CONFIG, seed=1))
    assert not torch.equal(weights(first), weights(other))


def test_each_step_drops_other_numbers():
    model, drawn = gpt(), []

    def loss(ids, targets):
        drawn.append(torch.rand(()).item())
        return token_loss(model)(ids, targets)

    made = trainer(model, loss=loss)
    for _ in range(5):
        made.take_step()
    assert len(set(drawn)) == 5


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
    longer = trainer(config=replace(CONFIG, steps=16, learning_rate=1e-3))
    longer.load_state_dict(through_a_file(run().state_dict()))
    train(longer, progress=False)
    assert [record["step"] for record in longer.records] == [4, 8, 12, 16]
    rate = 1e-3 * rate_at(15, longer.config)
    assert longer.records[-1]["learning_rate"] == rate
    assert longer.optimizers[0].param_groups[0]["lr"] == rate


# A fair evaluation.


def test_evaluation_is_the_same_for_every_batch_size():
    model = gpt().train()
    first = evaluate(model, DATA.validation, 10, 10)
    assert first == evaluate(model, DATA.validation, 10, 10)
    for size in (1, 3, 7, 500):
        assert evaluate(model, DATA.validation, 10, size) == pytest.approx(first)
    many = evaluate(model, DATA.validation, 5000, 32)  # as many as don't overlap
    assert many == evaluate(model, DATA.validation, 11, 32)


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


def test_training_drops_and_evaluations_do_not():
    model, dropped = gpt().eval(), {"training": [], "evaluation": []}

    def loss(ids, targets):
        first, again = (token_loss(model)(ids, targets) for _ in range(2))
        kind = "training" if torch.is_grad_enabled() else "evaluation"
        dropped[kind].append(first.item() != again.item())
        return first

    def look(made):
        made.model.eval()  # it says nothing about the next step

    run(model, after_step=look, loss=loss)
    assert all(dropped["training"])
    assert dropped["evaluation"]
    assert not any(dropped["evaluation"])
    assert not model.training  # as it came


# Records.


def test_a_loss_falls_and_the_records_are_honest():
    config = replace(CONFIG, steps=30, evaluate_every=12, learning_rate=0.01)
    began = time.perf_counter()
    records = run(config=config).records
    taken = time.perf_counter() - began
    assert [record["step"] for record in records] == [12, 24, 30]
    losses = [record["validation_loss"] for record in records]
    assert losses[-1] < losses[0] < math.log(11) + 0.1
    assert records[0]["learning_rate"] == 0.01 * rate_at(11, config)
    before = 0.0
    for record, steps in zip(records, (12, 12, 6), strict=True):
        seconds = record["seconds"] - before
        assert seconds > 0
        tokens = steps * config.batch_size * SHAPE.context
        assert record["tokens_per_second"] == pytest.approx(tokens / seconds)
        before = record["seconds"]
    assert before < taken


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
    assert set(made.evaluate()) == {"step", "validation_loss", "seconds"}
    assert math.isnan(made.read_losses())
    made.take_step()
    loss = made.read_losses()
    assert "train_loss" in made.evaluate()
    assert made.read_losses() == loss  # of the last step, also after an evaluation
    assert "train_loss" not in made.evaluate()
    assert [record["step"] for record in made.records] == [0, 1, 1]


# The seams.


def test_optimizers_and_loss_come_from_outside():
    model, other = gpt(PLAIN), gpt(PLAIN)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)

    def twice(ids, targets):
        return 2 * token_loss(model)(ids, targets)

    made = trainer(model, optimizers=[optimizer], loss=twice)
    made.take_step()
    loss = 2 * token_loss(other)(*batch_of(0))
    loss.backward()
    torch.nn.utils.clip_grad_norm_(other.parameters(), CONFIG.clip)
    wanted = weights(other) - 0.5 * rate_at(0, CONFIG) * gradient(other)
    assert torch.allclose(weights(made), wanted)
    assert made.read_losses() == pytest.approx(loss.item())
    judged = 2 * evaluate(model, DATA.validation, CONFIG.evaluation_crops)
    record = made.evaluate()
    assert record["validation_loss"] == pytest.approx(judged)
    assert record["learning_rate"] == 0.5 * rate_at(0, CONFIG)


def test_after_step_sees_every_step_and_can_end_the_run():
    seen = []

    def look(made):
        seen.append((made.step, len(made.records)))
        return made.step == 9

    made = run(after_step=look)
    assert seen == [(step, step // 4) for step in range(1, 10)]
    train(made, progress=False)
    assert [record["step"] for record in made.records] == [4, 8, 12]
    train(made, progress=False)
    assert made.step == 12


def test_progress_is_shown_when_asked_for(capsys):
    short = replace(CONFIG, steps=1)
    train(trainer(config=short), progress=False)
    assert capsys.readouterr() == ("", "")
    train(trainer(config=short))
    assert "1/1" in capsys.readouterr().err


# Losses that are no numbers.


def test_a_gradient_that_is_no_number_stops_the_run():
    model, calls = gpt(), []

    def loss(ids, targets):
        value = token_loss(model)(ids, targets)
        calls.append(torch.is_grad_enabled())
        if sum(calls) < 7:
            return value
        # The same loss; its gradient by the head is infinity times zero.
        return value + (model.head.weight.sum() * 0).sqrt()

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

    with pytest.raises(FloatingPointError, match="validation loss at step 4"):
        run(model, loss=loss)


# What doesn't belong together.


@pytest.mark.parametrize(
    ("model", "data", "error", "message"),
    [
        (gpt(), TokenData.of(IDS, IDS, 12), ValueError, "12 token ids"),
        (gpt().requires_grad_(False), DATA, ValueError, "without weights"),
        (gpt(), TokenData.of(IDS, IDS[:5], 11), ValueError, "context"),
        (gpt(), "my-tokens", TypeError, "take what `tokenize` returns"),
    ],
)
def test_what_does_not_fit_is_refused(model, data, error, message):
    with pytest.raises(error, match=message):
        trainer(model, data=data)
