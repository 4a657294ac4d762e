"""Answers to the checks of chapter 21."""

from dataclasses import replace

import torch

from glassgpt.checks.rewards import (
    check_exact_kl,
    check_group_advantages,
    check_learn_from_draws,
    check_leave_one_out,
    check_policy_loss,
    check_reply_batch,
)
from glassgpt.rewards import (
    END,
    group_advantages,
    kl_estimate,
    learn_from_draws,
    policy_loss,
    reply_batch,
    reply_log_probabilities,
)


def other_padding(prompts, replies):
    """What stands in the padding of the ids is of no importance."""
    ids, targets = reply_batch(prompts, replies)
    lengths = [len(p) + len(r) for p, r in zip(prompts, replies, strict=True)]
    beyond = torch.arange(ids.shape[1]) >= torch.tensor(lengths)[:, None] - 1
    return ids.masked_fill(beyond, 5), targets


def prompt_learned(prompts, replies):
    shorter = [prompt[:1] for prompt in prompts]
    longer = [[*p[1:], *r] for p, r in zip(prompts, replies, strict=True)]
    return reply_batch(shorter, longer)


def padding_learned(prompts, replies):
    ids, targets = reply_batch(prompts, replies)
    ended = (targets == END).cumsum(dim=1) > 0
    return ids, targets.masked_fill(ended, END)


def end_left_out(prompts, replies):
    ids, targets = reply_batch(prompts, replies)
    return ids, targets.masked_fill(targets == END, -100)


def not_shifted(prompts, replies):
    ids, targets = reply_batch(prompts, replies)
    return ids, torch.where(targets == -100, -100, ids)


def one_too_long(prompts, replies):
    ids, targets = reply_batch(prompts, [[*reply, END] for reply in replies])
    return ids, targets


def shuffled_ids(prompts, replies):
    ids, targets = reply_batch(prompts, replies)
    return ids.flip(1), targets


def by_loop(rewards):
    rows = [[r - sum(row) / len(row) for r in row] for row in rewards.tolist()]
    return torch.tensor(rows, dtype=rewards.dtype)


def by_cases(log_p, old_log_p, advantages, weights, clip):
    """The minimum, written as the two cases in which the clip bites."""
    ratio = (log_p - old_log_p).exp()
    good = advantages[:, None] > 0
    limited = torch.where(good, ratio.clamp(max=1 + clip), ratio.clamp(min=1 - clip))
    return -(weights * limited * advantages[:, None]).sum()


def not_clipped(log_p, old_log_p, advantages, weights, clip):
    return -(weights * (log_p - old_log_p).exp() * advantages[:, None]).sum()


def without_minimum(log_p, old_log_p, advantages, weights, clip):
    ratio = (log_p - old_log_p).exp().clamp(1 - clip, 1 + clip)
    return -(weights * ratio * advantages[:, None]).sum()


def padding_rewarded(log_p, old_log_p, advantages, weights, clip):
    same = torch.ones_like(weights) / weights.numel()
    return policy_loss(log_p, old_log_p, advantages, same, clip)


def upwards(*inputs):
    return -policy_loss(*inputs)


def detached(log_p, old_log_p, *others):
    return policy_loss(log_p.detach(), old_log_p, *others) + 0 * log_p.sum()


def old_from_the_new(model, optimizer, ids, targets, advantages, config):
    once = replace(config, updates=1)
    for _ in range(config.updates):
        learn_from_draws(model, optimizer, ids, targets, advantages, once)


def other_temperature(model, optimizer, ids, targets, advantages, config):
    config = replace(config, temperature=1.0)
    learn_from_draws(model, optimizer, ids, targets, advantages, config)


def one_update(model, optimizer, ids, targets, advantages, config):
    config = replace(config, updates=1)
    learn_from_draws(model, optimizer, ids, targets, advantages, config)


def leave_one_out(rewards):
    return group_advantages(rewards) * rewards.shape[1] / (rewards.shape[1] - 1)


def sum_over_all(rewards):
    others = rewards.sum(dim=1, keepdim=True) - rewards
    return rewards - others / rewards.shape[1]


def exact_kl(model, start, ids, targets):
    log_p, start_log_p = (m(ids).log_softmax(dim=-1) for m in (model, start))
    terms = torch.nn.functional.kl_div(
        start_log_p, log_p, reduction="none", log_target=True
    )
    return terms.sum(dim=-1) * (targets != -100)


def the_other_way(model, start, ids, targets):
    return exact_kl(start, model, ids, targets)


def everywhere(model, start, ids, targets):
    return exact_kl(model, start, ids, torch.zeros_like(targets))


def of_drawn(model, start, ids, targets):
    log_p, start_log_p = (
        reply_log_probabilities(m, ids, targets) for m in (model, start)
    )
    return log_p - start_log_p


def estimated(model, start, ids, targets):
    log_p, start_log_p = (
        reply_log_probabilities(m, ids, targets) for m in (model, start)
    )
    return kl_estimate(log_p, start_log_p)


RIGHT = {
    check_reply_batch: [reply_batch, other_padding],
    check_group_advantages: [group_advantages, by_loop],
    check_policy_loss: [policy_loss, by_cases],
    check_learn_from_draws: [learn_from_draws],
    check_leave_one_out: [leave_one_out],
    check_exact_kl: [exact_kl],
}
WRONG = {
    check_reply_batch: [
        (prompt_learned, "tokens of the prompt are learned"),
        (padding_learned, "padding is learned"),
        (end_left_out, "the end token isn't learned"),
        (not_shifted, "the end token isn't learned"),
        (one_too_long, "the longest text has 7 tokens"),
        (shuffled_ids, "ids are"),
    ],
    check_group_advantages: [
        (lambda rewards: rewards - rewards.mean(), "the mean of the whole batch"),
        (lambda rewards: rewards - rewards.mean(0), "that of a place in the groups"),
        (lambda rewards: rewards.clone(), "not compared with anything"),
        (lambda rewards: group_advantages(rewards, True), "Rows are questions"),
    ],
    check_policy_loss: [
        (not_clipped, "there is no clip"),
        (without_minimum, "take the smaller of clipped and plain gain"),
        (padding_rewarded, "padding is rewarded"),
        (upwards, "Descent must make replies"),
        (detached, "the gradient of"),
    ],
    check_learn_from_draws: [
        (old_from_the_new, "come from the new model"),
        (other_temperature, "scored at temperature 1"),
        (one_update, "after two updates"),
    ],
    check_leave_one_out: [
        (group_advantages, "still holds the reply's own reward"),
        (sum_over_all, "divided by G - 1"),
        (lambda rewards: rewards.clone(), "Rows are questions"),
    ],
    check_exact_kl: [
        (the_other_way, "weigh by its probabilities"),
        (everywhere, "0 there"),
        (of_drawn, "not only the drawn token"),
        (estimated, "is wanted"),
    ],
}
