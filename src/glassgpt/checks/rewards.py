# Written by tools/tangle.py from book/21_reasoning.ipynb: change it there.


"""Checks of reply batches, advantages, policy gradients and KL."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from glassgpt.checks.expect import close, expect_same
from glassgpt.gpt import GPT, GPTConfig
from glassgpt.rewards import RewardConfig, policy_loss, token_weights


def check_reply_batch(
    reply_batch: Callable[[Sequence, Sequence], tuple[Tensor, Tensor]],
) -> None:
    """Targets are the tokens of replies with their end, and nothing else.

    reply_batch: called as reply_batch(prompts, replies), returns ids and targets.

    Book: 21_reasoning.html#only-the-reply-is-learned
    """
    prompts, replies = [[3, 8, 6], [1, 9, 10, 11, 6]], [[1, 7, 1, 0], [0]]
    ids, targets = reply_batch(prompts, replies)
    wanted_ids = torch.tensor([[3, 8, 6, 1, 7, 1], [1, 9, 10, 11, 6, 0]])
    wanted = torch.tensor([[-100, -100, 1, 7, 1, 0], [-100] * 4 + [0, -100]])
    assert targets.shape == ids.shape == wanted.shape, (
        f"ids are {tuple(ids.shape)}, targets {tuple(targets.shape)}, not (2, 6): "
        "the longest text has 7 tokens, and its last one is only a target"
    )
    given = torch.arange(6) < torch.tensor([[2], [4]])
    assert (targets[given] == -100).all(), (
        "tokens of the prompt are learned: their targets must be -100"
    )
    assert targets[1, 5] == -100, "padding is learned: its target must be -100"
    ends = torch.stack((targets[0, 5], targets[1, 4]))
    assert (ends == 0).all(), (
        "the end token isn't learned: a model that never learns it never ends"
    )
    assert torch.equal(targets, wanted), f"targets are {targets.tolist()}"
    assert torch.equal(ids[0], wanted_ids[0]), f"ids are {ids.tolist()}"
    assert torch.equal(ids[1, :5], wanted_ids[1, :5]), f"ids are {ids.tolist()}"


def check_group_advantages(group_advantages: Callable[[Tensor], Tensor]) -> None:
    """Each reward less the mean of its own question's replies.

    group_advantages: of rewards (Q, G), not divided by anything.

    Book: 21_reasoning.html#the-group
    """
    rewards = torch.tensor([[1.0, 0, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]]).double()
    mistakes: dict[str, Callable[[Tensor], Tensor]] = {
        "each question has its own mean: this is the mean of the whole batch": (
            lambda r: r - r.mean()
        ),
        "the mean is that of a question's replies, not that of a place in the groups": (
            lambda r: r - r.mean(0)
        ),
        "the rewards were not compared with anything": lambda r: 1.0 * r,
    }
    expect_same(
        group_advantages,
        lambda r: r - r.mean(1, keepdim=True),
        rewards,
        mistakes=mistakes,
        gradients=False,
        hint="Rows are questions",
    )


def _gain(log_p: Tensor, old: Tensor, advantages: Tensor, clip: float) -> Tensor:
    ratio = (log_p - old).exp()
    limited = ratio.clamp(1 - clip, 1 + clip)
    return torch.minimum(ratio * advantages[:, None], limited * advantages[:, None])


def check_policy_loss(policy_loss: Callable[..., Tensor]) -> None:
    """The weighted sum of clipped gains, negated.

    policy_loss: called as policy_loss(log_p, old_log_p, advantages, weights, clip).

    Book: 21_reasoning.html#how-far-from-the-start
    """
    generator = torch.Generator().manual_seed(0)
    old = -torch.rand(4, 6, generator=generator).double() * 3
    log_p = old + 0.6 * torch.randn(4, 6, generator=generator).double()
    advantages = torch.tensor([0.75, -0.25, 1.5, -1.0]).double()
    counts = torch.arange(6) < torch.tensor([[6], [3], [4], [1]])
    weights = counts.double() / 4
    log_p, old = log_p * counts, old * counts  # 0 in the padding

    def plain(log_p: Tensor) -> Tensor:
        return -(weights * (log_p - old).exp() * advantages[:, None]).sum()

    def no_minimum(log_p: Tensor) -> Tensor:
        ratio = (log_p - old).exp().clamp(0.8, 1.2)
        return -(weights * ratio * advantages[:, None]).sum()

    mistakes: dict[str, Callable[[Tensor], Tensor]] = {
        "there is no clip: a ratio may run away": plain,
        "take the smaller of clipped and plain gain: a clip alone stops corrections": (
            no_minimum
        ),
        "padding is rewarded: multiply by the weights": (
            lambda log_p: -_gain(log_p, old, advantages, 0.2).mean()
        ),
    }
    expect_same(
        lambda log_p: policy_loss(log_p, old, advantages, weights, 0.2),
        lambda log_p: -(weights * _gain(log_p, old, advantages, 0.2)).sum(),
        log_p,
        mistakes=mistakes,
        hint="Descent must make replies with high advantages likelier",
    )


def _small_model() -> GPT:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = GPT(GPTConfig(vocab_size=9, context=12, layers=1, heads=2, width=8))
        for parameter in model.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model.double()


def _updated(
    model: GPT,
    batch: tuple[Tensor, Tensor, Tensor],
    config: RewardConfig,
    temperature: float,
    renew: bool,
) -> Tensor:
    """The weights after the updates, with the mistakes that are asked for."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), 2.0)
    ids, targets, advantages = batch
    old: Tensor | None = None
    for _ in range(config.updates):
        logits = model(ids) / temperature
        log_p = -F.cross_entropy(logits.mT, targets, reduction="none")
        if old is None or renew:
            old = log_p.detach()
        weights = token_weights(targets, config.average)
        loss = policy_loss(log_p, old, advantages, weights, config.clip)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def check_learn_from_draws(learn_from_draws: Callable[..., Any]) -> None:
    """Two updates from one draw, at its temperature, are what the equation says.

    learn_from_draws: called as learn_from_draws(model, optimizer, ids, targets,
    advantages, config) with the gradient's norm clipped to 1.

    Book: 21_reasoning.html#the-update
    """
    config = RewardConfig(updates=2, temperature=0.5)
    model = _small_model()
    ids = torch.tensor([[3, 8, 6, 1, 7, 1], [1, 6, 2, 7, 2, 0]])
    targets = torch.tensor([[-100, -100, 1, 7, 1, 0], [-100, 2, 7, 2, 0, -100]])
    batch = (ids, targets, torch.tensor([0.5, -0.5]).double())
    learned = copy.deepcopy(model)
    learn_from_draws(
        learned, torch.optim.SGD(learned.parameters(), 2.0), *batch, config
    )
    found = torch.cat([p.detach().flatten() for p in learned.parameters()])
    renewed = _updated(model, batch, config, temperature=0.5, renew=True)
    assert not close(found, renewed, within=1e-6), (
        "the old log-probabilities come from the new model: every ratio is 1, "
        "and nothing is clipped"
    )
    hot = _updated(model, batch, config, temperature=1.0, renew=False)
    assert not close(found, hot, within=1e-6), (
        "the replies were drawn at temperature 0.5 and scored at temperature 1"
    )
    wanted = _updated(model, batch, config, temperature=0.5, renew=False)
    assert close(found, wanted, within=1e-6), (
        f"a weight is off by {(found - wanted).abs().max():.2g} after two updates"
    )


def check_leave_one_out(advantages: Callable[[Tensor], Tensor]) -> None:
    """Each reward less the mean of the other rewards of its question.

    advantages: of rewards (Q, G).

    Book: 21_reasoning.html#exercise-1-the-others-as-a-baseline
    """
    rewards = torch.tensor([[1.0, 0, 0, 0], [1, 1, 1, 0], [0.5, 2, 0, 1]]).double()
    G = rewards.shape[1]

    def others(r: Tensor) -> Tensor:
        return r - (r.sum(1, keepdim=True) - r) / (G - 1)

    expect_same(
        advantages,
        others,
        rewards,
        mistakes={
            "the mean still holds the reply's own reward": (
                lambda r: r - r.mean(1, keepdim=True)
            ),
            "the mean of the others is their sum divided by G - 1": (
                lambda r: r - (r.sum(1, keepdim=True) - r) / G
            ),
        },
        gradients=False,
        hint="Rows are questions",
    )


def check_exact_kl(exact_kl: Callable[..., Tensor]) -> None:
    """The divergence from the start, summed over the vocabulary, where targets are.

    exact_kl: called as exact_kl(model, start, ids, targets), returns (B, T).

    Book: 21_reasoning.html#exercise-2-the-whole-divergence
    """
    start = _small_model()
    model = copy.deepcopy(start)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 1.2
    ids = torch.tensor([[3, 8, 6, 1, 7, 1], [1, 6, 2, 7, 2, 0]])
    targets = torch.tensor([[-100, -100, 1, 7, 1, 0], [-100, 2, 7, 2, 0, -100]])

    def divergence(p: GPT, q: GPT, counts: Tensor) -> Tensor:
        logs, other = p(ids).log_softmax(-1), q(ids).log_softmax(-1)
        return (logs.exp() * (logs - other)).sum(-1) * counts

    def drawn(ids: Tensor, targets: Tensor) -> Tensor:
        places = targets.clamp(min=0)[..., None]
        logs, other = (m(ids).log_softmax(-1) for m in (model, start))
        return (logs - other).gather(-1, places)[..., 0] * (targets != -100)

    with torch.no_grad():
        expect_same(
            lambda ids, targets: exact_kl(model, start, ids, targets),
            lambda ids, targets: divergence(model, start, targets != -100),
            ids,
            targets,
            mistakes={
                "the mean is over the new model's draws: weigh by its probabilities": (
                    lambda ids, targets: divergence(start, model, targets != -100)
                ),
                "there is no target in the prompt and the padding: 0 there": (
                    lambda ids, targets: divergence(
                        model, start, torch.ones_like(targets)
                    )
                ),
                "sum over the vocabulary, not only the drawn token": drawn,
            },
            gradients=False,
        )
