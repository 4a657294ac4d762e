"""Learning from rewards: a task, replies, advantages, losses and the loop."""

import json
import math
import random
from dataclasses import FrozenInstanceError
from importlib import resources
from itertools import combinations, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glassgpt.generation import log_probabilities
from glassgpt.gpt import GPT, GPTConfig
from glassgpt.rewards import (
    ASK,
    END,
    EQUALS,
    SWAPS,
    WORDS,
    RewardConfig,
    answer_of,
    dpo_loss,
    draw_replies,
    follow,
    group_advantages,
    kl_estimate,
    learn_from_draws,
    pass_at_k,
    policy_loss,
    reinforce,
    reply_batch,
    reply_log_probabilities,
    right,
    shell_game,
    sound,
    spell,
    token_weights,
)


def small_model(dropout=0.0, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = GPTConfig(
            vocab_size=18, context=24, layers=1, heads=2, width=16, dropout=dropout
        )
        return GPT(config)


def weights_of(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


tokens = st.lists(st.integers(0, 17), min_size=1, max_size=8)
pairs = st.lists(st.tuples(tokens, tokens), min_size=1, max_size=5)


def test_the_game_has_eighteen_words_and_a_cup_is_its_number():
    assert len(WORDS) == len(set(WORDS)) == 18
    assert [WORDS[n] for n in (END, 1, 5, ASK, EQUALS)] == ["end", "1", "5", "?", "="]
    assert spell([3, 9, ASK]) == "3 13 ?"


@given(st.integers(1, 5), st.lists(st.sampled_from(SWAPS), max_size=12))
def test_a_ball_follows_as_in_a_row_of_cups(ball, swaps):
    row = [cup == ball for cup in range(1, 6)]
    places = []
    for x, y in swaps:
        row[x - 1], row[y - 1] = row[y - 1], row[x - 1]
        places.append(row.index(True) + 1)
    assert follow(ball, swaps) == places


@given(st.integers(0, 99), st.integers(1, 12))
def test_a_question_says_what_its_places_follow_from(seed, length):
    question, places = shell_game(random.Random(seed), length)
    ball, *words, mark = question
    swaps = [tuple(map(int, WORDS[word])) for word in words]
    assert (mark, len(swaps)) == (ASK, length)
    assert follow(ball, swaps) == places
    assert shell_game(random.Random(seed), length) == (question, places)


def test_every_ball_and_swap_comes_up_and_no_swap_is_refused():
    rng = random.Random(0)
    games = [shell_game(rng, 10)[0] for _ in range(60)]
    assert {game[0] for game in games} == {1, 2, 3, 4, 5}
    assert {word for game in games for word in game[1:-1]} == set(range(8, 18))
    with pytest.raises(ValueError, match="1 swap or more, not 0"):
        shell_game(rng, 0)


@pytest.mark.parametrize(
    ("reply", "answer", "is_right", "is_sound"),
    [
        ([EQUALS, 4, END], 4, 1, 0),
        ([1, 1, 4, EQUALS, 4, END], 4, 1, 1),
        ([1, 2, 4, EQUALS, 4, END], 4, 1, 0),
        ([1, 1, 4, EQUALS, 3, END], 3, 0, 0),
        ([1, 1, 4, EQUALS, 4], None, 0, 0),
        ([EQUALS, 4, EQUALS, 4, END], 4, 0, 0),
        ([1, 1, 4, END], None, 0, 0),
        ([4, END], None, 0, 0),
        ([EQUALS, 4, 4], None, 0, 0),
        ([], None, 0, 0),
    ],
)
def test_a_reply_is_right_by_its_answer_and_sound_by_its_thoughts(
    reply, answer, is_right, is_sound
):
    places = [1, 1, 4]
    assert answer_of(reply) == answer
    assert right(reply, places) == is_right
    assert sound(reply, places) == is_sound


@given(pairs)
def test_targets_are_the_replies_and_nothing_else(examples):
    prompts, replies = zip(*examples, strict=True)
    ids, targets = reply_batch(prompts, replies)
    assert ids.shape == targets.shape
    for row, wanted, prompt, reply in zip(ids, targets, prompts, replies, strict=True):
        text = [*prompt, *reply]
        assert row[: len(text) - 1].tolist() == text[:-1]
        assert wanted[wanted != -100].tolist() == reply
        assert (wanted[: len(prompt) - 1] == -100).all()
    assert ids.shape[1] == max(len(p) + len(r) for p, r in examples) - 1


@pytest.mark.parametrize(
    ("prompts", "replies"), [([], []), ([[]], [[1]]), ([[1]], [[]])]
)
def test_nothing_is_no_prompt_and_no_reply(prompts, replies):
    with pytest.raises(ValueError, match="needs a token"):
        reply_batch(prompts, replies)


def test_each_reply_has_its_own_prompt():
    with pytest.raises(ValueError, match="shorter"):
        reply_batch([[1], [2]], [[3]])


@settings(max_examples=15, deadline=None)
@given(pairs, st.sampled_from([0.5, 1.0, 2.0]))
def test_log_probabilities_are_those_of_each_text_alone(examples, temperature):
    model = small_model(dropout=0.5)
    ids, targets = reply_batch(*zip(*examples, strict=True))
    found = reply_log_probabilities(model, ids, targets, temperature)
    assert model.training, "the model gets its mode back"
    assert (found[targets == -100] == 0).all()
    model.eval()
    for row, wanted, (prompt, reply) in zip(found, targets, examples, strict=True):
        logits = model(torch.tensor([[*prompt, *reply]]))[0] / temperature
        alone = logits.log_softmax(-1)[len(prompt) - 1 : -1]
        alone = alone.gather(1, torch.tensor(reply)[:, None])[:, 0]
        torch.testing.assert_close(row[wanted != -100], alone, rtol=1e-4, atol=1e-5)


def test_log_probabilities_agree_with_those_of_generation():
    model, text = small_model().eval(), [3, 8, ASK, EQUALS, 4, END]
    ids, targets = reply_batch([text[:1]], [text[1:]])
    found = reply_log_probabilities(model, ids, targets)[0]
    torch.testing.assert_close(found, log_probabilities(model, text).float())


def certain(token):
    """A model that nearly always says one token."""
    model = small_model()
    with torch.no_grad():
        model.head.weight.zero_()
        model.norm.weight.zero_()
        model.norm.bias.fill_(1.0)
        model.head.weight[token] = 10.0
    return model


def test_a_drawn_end_is_put_back_and_a_cut_reply_has_none():
    assert draw_replies(certain(END), [[1], [2, 3]], 4, END, seed=0) == [[END], [END]]
    assert draw_replies(certain(5), [[1], [2, 3]], 4, END, seed=0) == [[5] * 4] * 2
    assert draw_replies(certain(END), [[1]], 1, END, seed=0) == [[END]]


def test_the_same_seed_draws_the_same_replies_and_temperature_0_the_likeliest():
    model, prompts = small_model(), [[1, ASK]] * 20
    first = draw_replies(model, prompts, 6, END, seed=1)
    assert first == draw_replies(model, prompts, 6, END, seed=1)
    assert first != draw_replies(model, prompts, 6, END, seed=2)
    greedy = draw_replies(model, prompts, 6, END, temperature=0.0)
    assert len(set(map(tuple, greedy))) == 1
    assert len(set(map(tuple, first))) > 1
    cold = draw_replies(model, prompts, 6, END, temperature=1e-4, seed=3)
    assert cold == greedy


numbers = st.floats(-3, 3).map(lambda x: round(x, 3))
groups = st.integers(2, 6).flatmap(
    lambda G: st.lists(
        st.lists(numbers, min_size=G, max_size=G), min_size=1, max_size=4
    )
)


@given(groups, numbers, st.floats(0.5, 3))
def test_advantages_sum_to_0_and_do_not_see_a_shift(rows, shift, scale):
    rewards = torch.tensor(rows, dtype=torch.float64)
    advantages = group_advantages(rewards)
    assert advantages.sum(dim=1).abs().max() < 1e-9
    torch.testing.assert_close(group_advantages(rewards + shift), advantages)
    torch.testing.assert_close(group_advantages(scale * rewards), scale * advantages)


@given(groups)
def test_each_question_is_compared_with_its_own_replies(rows):
    rewards = torch.tensor(rows, dtype=torch.float64)
    alone = torch.cat([group_advantages(row[None]) for row in rewards])
    torch.testing.assert_close(group_advantages(rewards), alone)


def test_normalized_advantages_have_a_deviation_of_1_and_equal_rewards_none():
    rewards = torch.tensor([[1.0, 0, 0, 0], [5, 1, 1, 1], [2, 2, 2, 2]])
    found = group_advantages(rewards, normalize=True)
    torch.testing.assert_close(found[:2].std(dim=1), torch.ones(2), rtol=0, atol=1e-3)
    assert found[2].tolist() == [0, 0, 0, 0]
    tiny = group_advantages(torch.tensor([[1e-4, 0.0]]), normalize=True)
    assert tiny.abs().max() < 0.5, "noise isn't blown up"


@pytest.mark.parametrize("shape", [(4,), (4, 1), (2, 2, 2)])
def test_rewards_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"2 or more replies\), not"):
        group_advantages(torch.zeros(shape))


lengths = st.lists(st.integers(1, 6), min_size=1, max_size=5)


@given(lengths)
def test_weights_add_up_as_their_name_says(sizes):
    B = len(sizes)
    targets = torch.full((B, 6), -100)
    for row, size in enumerate(sizes):
        targets[row, :size] = 3
    by_sum, by_reply, by_batch = (
        token_weights(targets, average) for average in ("sum", "reply", "batch")
    )
    for weights in (by_sum, by_reply, by_batch):
        assert (weights[targets == -100] == 0).all()
    torch.testing.assert_close(by_sum.sum(1), torch.tensor(sizes) / B)
    torch.testing.assert_close(by_reply.sum(1), torch.full((B,), 1 / B))
    torch.testing.assert_close(by_batch.sum(), torch.tensor(1.0))
    assert by_batch[targets != -100].unique().numel() == 1
    assert torch.equal(token_weights(targets), by_sum)


def test_no_targets_weigh_nothing():
    for average in ("sum", "reply", "batch"):
        assert (token_weights(torch.full((2, 3), -100), average) == 0).all()


def test_the_first_gradient_is_that_of_reinforce():
    """Chapter 21's nine answers: the mean over all of them is the exact gradient."""
    scores = torch.randn(9, generator=torch.Generator().manual_seed(0)).double()
    scores.requires_grad_()
    p, rewards = scores.softmax(0), torch.tensor([0.0, 0, 1, 0, 1, 0, 1, 0, 0]).double()
    (exact,) = torch.autograd.grad((p * rewards).sum(), scores, retain_graph=True)
    log_p = scores.log_softmax(0)[:, None]  # (9, 1): replies of one token
    weights = p.detach()[:, None]
    loss = policy_loss(log_p, log_p.detach(), rewards - 0.7, weights)
    (found,) = torch.autograd.grad(loss, scores)
    torch.testing.assert_close(-found, exact)


@given(
    st.floats(-2, 2),
    st.sampled_from([-1.0, 0.5, 2.0]),
    st.floats(0.05, 0.5).map(lambda x: round(x, 2)),
)
def test_a_ratio_is_followed_until_it_helps_no_more(change, advantage, clip):
    log_p = torch.tensor([[change]], dtype=torch.float64, requires_grad=True)
    inputs = torch.zeros(1, 1).double(), torch.tensor([advantage]).double()
    loss = policy_loss(log_p, *inputs, torch.ones(1, 1).double(), clip)
    (slope,) = torch.autograd.grad(loss, log_p)
    ratio = math.exp(change)
    assert -loss.item() <= ratio * advantage + 1e-12
    far = ratio > 1 + clip + 1e-6 if advantage > 0 else ratio < 1 - clip - 1e-6
    near = ratio < 1 + clip - 1e-6 if advantage > 0 else ratio > 1 - clip + 1e-6
    if far:
        assert slope == 0
    if near:
        assert slope.item() == pytest.approx(-ratio * advantage)


def test_a_ratio_is_clipped_at_a_fifth_unless_told():
    one = torch.ones(1, 1)
    loss = policy_loss(torch.tensor([[1.0]]), 0 * one, torch.tensor([1.0]), one)
    assert loss.item() == pytest.approx(-1.2)


def test_the_loss_of_a_group_is_0_at_the_start_where_replies_weigh_the_same():
    targets = torch.tensor([[1, 1, 1], [1, -100, -100]])
    advantages = group_advantages(torch.tensor([[1.0, 0.0]])).flatten()
    log_p = torch.randn(2, 3) * (targets != -100)
    by_reply = policy_loss(log_p, log_p, advantages, token_weights(targets, "reply"))
    by_sum = policy_loss(log_p, log_p, advantages, token_weights(targets, "sum"))
    assert by_reply.abs() < 1e-6
    assert by_sum.item() == pytest.approx(-0.5)


def test_advantages_of_tokens_are_refused():
    log_p = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="one number for each reply"):
        policy_loss(log_p, log_p, torch.zeros(2, 3), log_p)


@given(st.lists(numbers, min_size=2, max_size=6), st.integers(0, 99))
def test_the_estimate_of_a_divergence_is_never_negative_and_right_on_average(
    scores, seed
):
    p = torch.tensor(scores, dtype=torch.float64).softmax(0)
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(len(p), generator=generator).double().softmax(0)
    found = kl_estimate(p.log(), q.log())
    assert found.min() >= -1e-12
    exact = (p * (p.log() - q.log())).sum()
    torch.testing.assert_close((p * found).sum(), exact)
    assert kl_estimate(p.log(), p.log()).abs().max() == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"group": 1}, "1 or more, group 2"),
        ({"questions": 0}, "1 or more"),
        ({"longest": 0}, "1 or more"),
        ({"updates": 0}, "1 or more"),
        ({"temperature": 0.0}, "above 0"),
        ({"clip": 0.0}, "above 0"),
        ({"kl": -0.1}, "0 or more"),
        ({"average": "mean"}, "average must be one of"),
    ],
)
def test_impossible_runs_are_refused(change, words):
    RewardConfig(questions=1, group=2, longest=1, updates=1, kl=0.0)
    with pytest.raises(ValueError, match=words):
        RewardConfig(**change)


def test_the_defaults_are_those_of_the_recorded_run():
    assert vars(RewardConfig()) == {
        "steps": 120,
        "questions": 32,
        "group": 8,
        "longest": 16,
        "temperature": 1.0,
        "learning_rate": 4e-4,
        "warmup": 10,
        "updates": 1,
        "clip": 0.2,
        "kl": 0.0,
        "average": "sum",
        "seed": 0,
    }
    with pytest.raises(FrozenInstanceError):
        RewardConfig().steps = 3


BATCH = reply_batch([[3, 8, ASK]] * 2, [[1, EQUALS, 1, END], [EQUALS, 2, END]])


def learned(config, advantages=(0.5, -0.5), start=None, model=None, rate=0.5):
    model = model or small_model()
    optimizer = torch.optim.SGD(model.parameters(), rate)
    advantages = torch.tensor(advantages)
    result = learn_from_draws(model, optimizer, *BATCH, advantages, config, start)
    return model, result


def test_what_was_better_becomes_likelier():
    before = reply_log_probabilities(small_model(), *BATCH).sum(1)
    model, (loss, entropy) = learned(RewardConfig(average="reply"))
    after = reply_log_probabilities(model, *BATCH).sum(1)
    assert after[0] > before[0]
    assert after[1] < before[1]
    assert loss == pytest.approx(0, abs=1e-6)
    assert entropy == pytest.approx(-before.sum().item() / 7)


def test_a_gradient_is_cut_to_a_length_of_1():
    model, _ = learned(RewardConfig(), advantages=(500.0, -500.0))
    change = (weights_of(model) - weights_of(small_model())).norm()
    assert change.item() == pytest.approx(0.5, rel=1e-3)


def test_nothing_moves_where_all_replies_earned_the_same():
    model, _ = learned(RewardConfig(updates=3), advantages=(0.0, 0.0))
    assert torch.equal(weights_of(model), weights_of(small_model()))


def test_a_penalty_pulls_back_to_the_start():
    start, far = small_model(), small_model(seed=1)
    config = RewardConfig(kl=1.0)
    model, (loss, _) = learned(config, (0.0, 0.0), start, far, rate=0.05)
    weights = token_weights(BATCH[1])

    def distance(model):
        log_p = reply_log_probabilities(model, *BATCH)
        start_log_p = reply_log_probabilities(start, *BATCH)
        return (weights * kl_estimate(log_p, start_log_p)).sum().item()

    assert loss == pytest.approx(distance(small_model(seed=1)))
    assert distance(model) < loss


def game(rng):
    return shell_game(rng, rng.randint(1, 3))


def says_four(reply, places):
    return 4 in reply


TINY = RewardConfig(
    steps=12, questions=4, group=6, longest=8, learning_rate=2e-2, warmup=2
)


def test_a_model_learns_what_is_rewarded():
    model, seen = small_model(), []
    history = reinforce(
        model, game, says_four, END, TINY,
        measures={"long": lambda reply, places: len(reply)}, after_step=seen.append,
    )  # fmt: skip
    assert seen == list(range(1, 13))
    assert len(history) == 12
    assert history[-1]["reward"] > history[0]["reward"] + 0.3
    for row in history:
        assert row["long"] == pytest.approx(row["length"])
        assert 0 <= row["idle"] <= 1
        assert 1 <= row["length"] <= 8
    assert history[0]["entropy"] == pytest.approx(math.log(18), abs=0.6)
    assert history[-1]["entropy"] < history[0]["entropy"] - 0.1


def test_a_run_is_the_same_again_and_another_with_another_seed():
    config = RewardConfig(steps=2, questions=2, group=2, longest=4, warmup=1)
    runs = []
    for seed in (0, 0, 1):
        model = small_model()
        runs.append(
            reinforce(
                model, game, says_four, END,
                RewardConfig(**{**vars(config), "seed": seed}),
            )
        )  # fmt: skip
    assert runs[0] == runs[1] != runs[2]


def test_a_group_has_the_same_question_and_its_rewards_are_compared():
    asked, compared = [], []

    def ask(rng):
        asked.append(shell_game(rng, 1))
        return asked[-1]

    def compare(rewards):
        compared.append(rewards)
        return group_advantages(rewards)

    config = RewardConfig(steps=1, questions=3, group=4, longest=3)
    reinforce(
        small_model(), ask, lambda reply, places: places[-1], END, config, compare
    )
    wanted = torch.tensor([[places[-1]] * 4 for _, places in asked]).float()
    assert torch.equal(compared[0], wanted)


def test_idle_groups_are_counted_and_teach_nothing():
    model = small_model()
    config = RewardConfig(
        steps=2, questions=3, group=4, longest=3, learning_rate=0.1, warmup=1
    )
    history = reinforce(model, game, lambda reply, places: 0.25, END, config)
    assert [row["idle"] for row in history] == [1, 1]
    assert history[0]["reward"] == pytest.approx(0.25)
    assert torch.equal(weights_of(model), weights_of(small_model())), "no decay"


def test_some_groups_are_idle():
    one = [True] * 4 + [True, False, False, False]
    rewards = iter(one * 2)
    config = RewardConfig(steps=1, questions=2, group=4, longest=3)
    (row,) = reinforce(
        small_model(), game, lambda reply, places: next(rewards), END, config
    )
    assert row["idle"] == 0.5
    assert row["reward"] == 5 / 8


def test_the_rate_warms_up_and_falls_to_a_tenth(monkeypatch):
    rates = []
    plain = torch.optim.AdamW.step

    def step(self, *arguments, **named):
        rates.append({group["lr"] for group in self.param_groups})
        assert {group["betas"] for group in self.param_groups} == {(0.9, 0.95)}
        return plain(self, *arguments, **named)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    config = RewardConfig(
        steps=11, questions=1, group=2, longest=2, learning_rate=0.01, warmup=2
    )
    reinforce(small_model(), game, says_four, END, config)
    found = [rate for (rate,) in rates]
    wanted = [0.005, *(0.01 * (1 - 0.1 * n) for n in range(10))]
    assert found[:2] == [0.005, 0.01]
    assert found[2] == pytest.approx(0.01)
    assert found[-1] == pytest.approx(0.01 * (0.1 + 0.9 / 9))
    assert len(found) == len(wanted)


def test_a_penalty_keeps_a_run_near_its_start():
    free, held = small_model(), small_model()
    reinforce(free, game, says_four, END, TINY)
    reinforce(held, game, says_four, END, RewardConfig(**{**vars(TINY), "kl": 5.0}))
    start = weights_of(small_model())
    ids, targets = BATCH

    def distance(model):
        with torch.no_grad():
            log_p = model.eval()(ids).log_softmax(-1)
            start_log_p = small_model().eval()(ids).log_softmax(-1)
        return (log_p.exp() * (log_p - start_log_p)).sum(-1).mean()

    assert not torch.equal(weights_of(held), start)
    assert distance(held) < distance(free) / 2


@pytest.mark.parametrize("reward", [math.nan, math.inf])
def test_a_reward_that_is_not_finite_is_refused(reward):
    config = RewardConfig(steps=1, questions=1, group=2, longest=2)
    with pytest.raises(ValueError, match="reward of step 1 is not a finite number"):
        reinforce(small_model(), game, lambda reply, places: reward, END, config)


def test_a_prompt_without_room_for_a_reply_is_refused():
    config = RewardConfig(steps=1, questions=1, group=2, longest=20)
    with pytest.raises(ValueError, match="context"):
        reinforce(small_model(), lambda rng: shell_game(rng, 8), right, END, config)


@given(st.integers(1, 7), st.data())
def test_pass_at_k_counts_the_choices(n, data):
    c = data.draw(st.integers(0, n))
    k = data.draw(st.integers(1, n))
    replies = [True] * c + [False] * (n - c)
    choices = list(combinations(replies, k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, choices)) / len(choices))


@given(st.integers(1, 5), st.integers(1, 5), st.floats(0, 1))
def test_pass_at_k_is_right_on_average(n, k, p):
    k = min(n, k)
    mean = 0.0
    for drawn in product((0, 1), repeat=n):
        c = sum(drawn)
        mean += p**c * (1 - p) ** (n - c) * pass_at_k(n, c, k)
    assert mean == pytest.approx(1 - (1 - p) ** k)


@pytest.mark.parametrize("counts", [(4, 5, 1), (4, -1, 1), (4, 2, 5), (4, 2, 0)])
def test_impossible_counts_are_refused(counts):
    with pytest.raises(ValueError, match="pass@k wants"):
        pass_at_k(*counts)


values = st.lists(numbers, min_size=4, max_size=4)


@given(values, st.floats(0.05, 2))
def test_dpo_is_the_cross_entropy_of_a_comparison(numbers, beta):
    chosen, rejected, chosen_start, rejected_start = (
        torch.tensor([x]).double() for x in numbers
    )
    found = dpo_loss(chosen, rejected, chosen_start, rejected_start, beta)
    gap = beta * ((numbers[0] - numbers[2]) - (numbers[1] - numbers[3]))
    assert found.item() == pytest.approx(math.log(1 + math.exp(-gap)))


def test_dpo_starts_at_ln_2_and_takes_the_mean():
    a, b = torch.tensor([-3.0, -5.0]), torch.tensor([-4.0, -2.0])
    assert dpo_loss(a, b, a, b).item() == pytest.approx(math.log(2))
    gains = torch.tensor([1.0, -3.0])
    wanted = -(0.1 * gains).sigmoid().log().mean()
    torch.testing.assert_close(dpo_loss(a + gains, b, a, b), wanted)


def test_dpo_refuses_what_would_be_compared_crosswise():
    column = torch.zeros(3, 1)
    with pytest.raises(ValueError, match="the same shape"):
        dpo_loss(torch.zeros(3), torch.zeros(3), column, column)


def test_the_record_comes_with_the_package():
    path = resources.files("glassgpt").joinpath("records/reasoning.json")
    text = path.read_text("utf-8")
    record = json.loads(text)
    assert len(text) < 500_000
    assert record["command"] == "python benchmarks/reasoning.py --write"
    for part in ("start", "story", "tests", "filter", "careless", "supervised"):
        assert set(record[part]) == {"0", "1", "2"}, part
    question = record["story"]["0"]["question"]
    assert {"0", "20", "60", "120"} <= set(record["story"]["0"]["replies"])
    assert question[-1] == ASK


def test_ids_of_words_say_what_they_mean():
    assert [WORDS[n] for n in (END, ASK, EQUALS)] == ["end", "?", "="]
