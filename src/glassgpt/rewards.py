# Written by tools/tangle.py from book/21_reasoning.ipynb: change it there.
"""Learning from rewards: draws, advantages, policy gradients and preferences."""

import copy
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from glassgpt.generation import generate
from glassgpt.gpt import GPT
from glassgpt.training import (
    TrainConfig,
    check_choices,
    count_targets,
    in_mode,
    make_optimizers,
    rate_at,
)

END, ASK, EQUALS = 0, 6, 7  # ids of words; the id of a cup is its number
SWAPS = [(x, y) for x in range(1, 6) for y in range(x + 1, 6)]  # two of five cups
WORDS = ["end", "1", "2", "3", "4", "5", "?", "=", *(f"{x}{y}" for x, y in SWAPS)]


def spell(ids: Iterable[int]) -> str:
    """Ids of the shell game as words.

    Book: 21_reasoning.html#the-game-as-a-language
    """
    return " ".join(WORDS[word] for word in ids)


def follow(ball: int, swaps: Iterable[tuple[int, int]]) -> list[int]:
    """The cup that the ball is under after each swap of two cups.

    Book: 21_reasoning.html#the-game-as-a-language
    """
    places = []
    for x, y in swaps:
        if ball == x:
            ball = y
        elif ball == y:
            ball = x
        places.append(ball)
    return places


def shell_game(rng: random.Random, length: int) -> tuple[list[int], list[int]]:
    """A question of `length` swaps, and the ball's place after each of them.

    The question is the ids of the ball's first cup, the swaps and `?`. Raises
    ValueError unless there is a swap.

    Book: 21_reasoning.html#the-game-as-a-language
    """
    if length < 1:
        raise ValueError(f"a game has 1 swap or more, not {length}")
    ball = rng.randint(1, 5)
    swaps = rng.choices(SWAPS, k=length)
    words = [WORDS.index(f"{x}{y}") for x, y in swaps]
    return [ball, *words, ASK], follow(ball, swaps)


def reply_batch(
    prompts: Sequence[Sequence[int]], replies: Sequence[Sequence[int]]
) -> tuple[Tensor, Tensor]:
    """Ids and targets (B, T) of B replies to prompts, padded on the right.

    Targets are the replies' tokens, the end token too; -100 stands where the next
    token is the prompt's or there is none. Raises ValueError for an empty prompt or
    reply.

    Book: 21_reasoning.html#only-the-reply-is-learned
    """
    if min(map(len, [*prompts, *replies]), default=0) == 0:
        raise ValueError("each prompt and each reply needs a token, the end at least")
    texts = [[*p, *r] for p, r in zip(prompts, replies, strict=True)]
    T = max(len(text) for text in texts) - 1
    ids = torch.zeros(len(texts), T, dtype=torch.long)
    targets = torch.full((len(texts), T), -100)
    for row, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        given, end = len(prompt), len(text) - 1
        ids[row, :end] = torch.tensor(text[:-1])
        targets[row, given - 1 : end] = torch.tensor(text[given:])
    return ids, targets


def reply_log_probabilities(
    model: GPT, ids: Tensor, targets: Tensor, temperature: float = 1.0
) -> Tensor:
    """The log-probability (B, T) of each target, in nats; 0 where there is none.

    temperature: that of the draws, or the tokens had other probabilities then. Dropout
    is off, as it was when they were drawn.

    Book: 21_reasoning.html#only-the-reply-is-learned
    """
    with in_mode(model, training=False):
        logits = model(ids) / temperature  # (B, T, V)
    return -F.cross_entropy(logits.mT, targets, reduction="none")


def answer_of(reply: Sequence[int]) -> int | None:
    """The cup that a reply names at its end, or None where it doesn't end so.

    Book: 21_reasoning.html#at-once-and-with-steps
    """
    if len(reply) >= 3 and reply[-3] == EQUALS and reply[-1] == END:
        return reply[-2]
    return None


def right(reply: Sequence[int], places: Sequence[int]) -> float:
    """1 for a reply that answers once, rightly, and ends; else 0.

    Book: 21_reasoning.html#at-once-and-with-steps
    """
    once = list(reply).count(EQUALS) == 1
    return float(once and answer_of(reply) == places[-1])


def sound(reply: Sequence[int], places: Sequence[int]) -> float:
    """1 for a reply that names every place of the ball and the answer; else 0.

    Book: 21_reasoning.html#at-once-and-with-steps
    """
    return float(list(reply) == [*places, EQUALS, places[-1], END])


def draw_replies(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    longest: int,
    end: int,
    temperature: float = 1.0,
    seed: int | None = None,
) -> list[list[int]]:
    """One reply to each prompt, with its end token where it was drawn.

    A reply that reaches `longest` tokens is cut, and has none. Raises ValueError for
    what `generate` refuses.

    Book: 21_reasoning.html#at-once-and-with-steps
    """
    rows = generate(model, prompts, longest, [end], temperature=temperature, seed=seed)
    replies = [row[len(p) :] for p, row in zip(prompts, rows, strict=True)]
    return [[*r, end] if len(r) < longest else r for r in replies]


def group_advantages(rewards: Tensor, normalize: bool = False) -> Tensor:
    """Rewards (Q, G), each less the mean reward of its question's G replies.

    normalize: divide by the standard deviation of the G, as GRPO does. Raises
    ValueError for another shape, or fewer than two replies to a question.
    Source: Shao et al. (2024).

    Book: 21_reasoning.html#the-group
    """
    if rewards.dim() != 2 or rewards.shape[1] < 2:
        shape = tuple(rewards.shape)
        raise ValueError(f"rewards are (questions, 2 or more replies), not {shape}")
    advantages = rewards - rewards.mean(dim=1, keepdim=True)
    if normalize:
        advantages = advantages / (rewards.std(dim=1, keepdim=True) + 1e-4)
    return advantages


def policy_loss(
    log_p: Tensor,
    old_log_p: Tensor,
    advantages: Tensor,
    weights: Tensor,
    clip: float = 0.2,
) -> Tensor:
    """The loss whose descent makes replies with high advantages likelier.

    log_p: (B, T) log-probabilities of the drawn tokens in the model that learns;
    old_log_p: in the model that drew them. advantages: (B,), else ValueError.
    weights: (B, T), of `token_weights`. Source: Schulman et al. (2017), equation 7.

    Book: 21_reasoning.html#learn-twice-from-one-draw
    """
    if advantages.shape != log_p.shape[:1]:
        raise ValueError("advantages are one number for each reply, of shape (B,)")
    advantages = advantages[:, None]
    ratio = (log_p - old_log_p).exp()
    clipped = ratio.clamp(1 - clip, 1 + clip)
    gain = torch.minimum(ratio * advantages, clipped * advantages)
    return -(weights * gain).sum()


Average = Literal["sum", "reply", "batch"]


def token_weights(targets: Tensor, average: Average = "sum") -> Tensor:
    """How much each target (B, T) counts in the loss of B replies.

    sum: each token 1 / B. reply: a reply's tokens together 1 / B, as in GRPO (Shao et
    al., 2024). batch: each the same, all together 1 (Yu et al., 2025).
    Raises ValueError for another word.

    Book: 21_reasoning.html#learn-twice-from-one-draw
    """
    if average not in get_args(Average):
        raise ValueError(f"average must be sum, reply or batch, not {average!r}")
    counts = (targets != -100).float()
    if average == "reply":
        return counts / counts.sum(dim=1, keepdim=True).clamp(min=1) / len(targets)
    if average == "batch":
        return counts / counts.sum().clamp(min=1)
    return counts / len(targets)


def kl_estimate(log_p: Tensor, start_log_p: Tensor) -> Tensor:
    """For drawn tokens, an estimate of the KL divergence from the start.

    log_p, start_log_p: log-probabilities of the tokens in the model that drew them and
    in the one it started as. Never negative; the mean over draws is the
    divergence KL(p, start) in nats. As a loss over fixed draws it has the gradient of
    the other divergence, KL(start, p).
    Source: Shao et al. (2024), equation 4.

    Book: 21_reasoning.html#how-far-from-the-start
    """
    gap = start_log_p - log_p
    return torch.expm1(gap) - gap


@dataclass(frozen=True)
class RewardConfig:
    """What decides a run of `reinforce`. Raises ValueError for impossible values.

    Book: 21_reasoning.html#the-update
    """

    steps: int = 120
    questions: int = 32  # in each step
    group: int = 8  # replies to each question
    longest: int = 16  # tokens of a reply
    temperature: float = 1.0
    learning_rate: float = 4e-4  # after the warm-up; it falls on a line to a tenth
    warmup: int = 10
    updates: int = 1  # made from the same replies
    clip: float = 0.2
    kl: float = 0.0  # the weight of the distance from the start
    average: Average = "sum"
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.questions, self.longest, self.updates, self.group - 1) < 1:
            raise ValueError("questions, longest and updates are 1 or more, group 2")
        if min(self.temperature, self.clip) <= 0 or self.kl < 0:
            raise ValueError("temperature and clip are above 0, kl is 0 or more")
        check_choices(self)


def learn_from_draws(
    model: GPT,
    optimizer: torch.optim.Optimizer,
    ids: Tensor,
    targets: Tensor,
    advantages: Tensor,
    config: RewardConfig,
    start: GPT | None = None,
) -> tuple[float, float]:
    """Update the model from a batch of replies; return the first loss and the entropy.

    ids, targets: (B, T) of `reply_batch`; advantages: (B,). start: the model that
    config.kl holds it to. The entropy is that of a token before the updates, in nats,
    estimated from the drawn ones.

    Book: 21_reasoning.html#the-update
    """
    weights = token_weights(targets, config.average)
    batch = (ids, targets, config.temperature)
    with torch.no_grad():
        old_log_p = reply_log_probabilities(model, *batch)
        if start is not None:
            start_log_p = reply_log_probabilities(start, *batch)
    losses = []
    for _ in range(config.updates):
        log_p = reply_log_probabilities(model, *batch)
        loss = policy_loss(log_p, old_log_p, advantages, weights, config.clip)
        if start is not None:
            loss = loss + config.kl * (weights * kl_estimate(log_p, start_log_p)).sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses[0], -old_log_p.sum().item() / count_targets(targets)


Problem = tuple[list[int], Any]  # a prompt, and what its reward has to know
Reward = Callable[[list[int], Any], float]  # of a reply and what has to be known


def reinforce(
    model: GPT,
    ask: Callable[[random.Random], Problem],
    reward: Reward,
    end: int,
    config: RewardConfig,
    compare: Callable[[Tensor], Tensor] = group_advantages,
    measures: Mapping[str, Reward] | None = None,
    after_step: Callable[[int], None] | None = None,
) -> list[dict[str, float]]:
    """Let a model answer, reward it, and make likelier what was rewarded.

    ask: makes a problem. reward: of a reply. end: the id that ends a reply. compare:
    from rewards (Q, G) to advantages. measures: further numbers of a reply, by name.
    after_step: called with the steps made so far. Returns for each step the means of
    reward, measures and length, the loss, the entropy of a token, and the share of
    idle groups. Raises ValueError for a reward that isn't finite.

    Book: 21_reasoning.html#the-update
    """
    rng = random.Random(config.seed)
    device = next(model.parameters()).device
    start = copy.deepcopy(model) if config.kl else None
    plan = TrainConfig(
        steps=config.steps,
        learning_rate=config.learning_rate,
        warmup=config.warmup,
        schedule="linear",
        weight_decay=0.0,
        beta2=0.95,
    )
    (optimizer,) = make_optimizers(model, plan)
    history = []
    for step in range(config.steps):
        asked = [ask(rng) for _ in range(config.questions)]
        problems = [problem for problem in asked for _ in range(config.group)]
        prompts = [prompt for prompt, _ in problems]
        seed = config.seed * 1_000_003 + step
        replies = draw_replies(
            model, prompts, config.longest, end, config.temperature, seed
        )
        pairs = [(r, facts) for r, (_, facts) in zip(replies, problems, strict=True)]
        rewards = torch.tensor([float(reward(*pair)) for pair in pairs])
        if not rewards.isfinite().all():
            raise ValueError(f"a reward of step {step + 1} is not a finite number")
        rewards = rewards.view(config.questions, config.group)
        advantages = compare(rewards).flatten().to(device)
        ids, targets = (rows.to(device) for rows in reply_batch(prompts, replies))
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * rate_at(step, plan)
        loss, entropy = learn_from_draws(
            model, optimizer, ids, targets, advantages, config, start
        )
        row = {
            "reward": rewards.mean().item(),
            "length": count_targets(targets) / len(replies),
            "loss": loss,
            "entropy": entropy,
            "idle": (rewards == rewards[:, :1]).all(dim=1).float().mean().item(),
        }
        for name, measure in (measures or {}).items():
            row[name] = sum(measure(*pair) for pair in pairs) / len(pairs)
        history.append(row)
        if after_step is not None:
            after_step(step + 1)
    return history


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that k of n replies, c of them right, hold a right one.

    Raises ValueError for impossible counts. Source: Chen et al. (2021).

    Book: 21_reasoning.html#did-it-learn-or-only-sharpen
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@k wants 0 <= c <= n and 1 <= k <= n, not {n, c, k}")
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def dpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    chosen_start: Tensor,
    rejected_start: Tensor,
    beta: float = 0.1,
) -> Tensor:
    """The loss of preferring the chosen replies to the rejected ones.

    chosen, rejected: (B,) log-probabilities of whole replies in the model that learns;
    chosen_start, rejected_start: in the model that it started as. beta: how near it is
    held to the start. Raises ValueError where the four differ in shape.
    Source: Rafailov et al. (2023), equation 7.

    Book: 21_reasoning.html#preferences-dpo
    """
    shapes = {t.shape for t in (chosen, rejected, chosen_start, rejected_start)}
    if len(shapes) > 1 or chosen.dim() != 1:
        raise ValueError("the four log-probabilities must have the same shape, (B,)")
    gains = (chosen - chosen_start) - (rejected - rejected_start)
    return -F.logsigmoid(beta * gains).mean()
