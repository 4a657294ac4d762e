"""Answers to the checks of chapter 12."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from glassgpt.checks.training import (
    check_accumulation,
    check_adamw,
    check_clipping,
    check_evaluate,
    check_schedule,
    check_state_dict,
)
from glassgpt.training import Trainer, evaluate, rate_at, token_loss


def torch_adamw(w, gradients, rate, beta1, beta2, decay):
    w = w.clone().requires_grad_()
    optimizer = torch.optim.AdamW([w], rate, (beta1, beta2), weight_decay=decay)
    for gradient in gradients:
        w.grad = gradient.clone()
        optimizer.step()
    return w.detach()


def forgetful_adamw(w, gradients, *others):
    for gradient in gradients:
        w = torch_adamw(w, [gradient], *others)
    return w


def nanogpt_rate(step, config):
    """Its warm-up is one step longer."""
    if step < config.warmup:
        return (step + 1) / (config.warmup + 1)
    return rate_at(step, config)


def rate_with(**changes):
    return lambda step, config: rate_at(step, replace(config, **changes))


def counted_first(model, parts):
    count = sum((targets != -100).sum() for _, targets in parts)
    for x, targets in parts:
        loss = F.cross_entropy(model(x), targets, reduction="sum") / count
        (gradient,) = torch.autograd.grad(loss, model.weight)
        before = model.weight.grad
        model.weight.grad = gradient if before is None else before + gradient


def by_rows(model, parts):
    rows = sum(len(x) for x, _ in parts)
    for x, targets in parts:
        (F.cross_entropy(model(x), targets) * len(x) / rows).backward()


def all_at_once(model, parts):
    x, targets = (torch.cat(columns) for columns in zip(*parts, strict=True))
    F.cross_entropy(model(x), targets).backward()


def judge(model, tokens, crops, size):
    mode, losses = model.training, []
    model.eval()
    for batch in tokens.fixed_batches(crops, model.config.context, size):
        losses += [token_loss(model)(*batch).item()] * len(batch[0])
    model.train(mode)
    return sum(losses) / len(losses)


def torch_clip(gradients, longest):
    parameters = [nn.Parameter(gradient) for gradient in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    nn.utils.clip_grad_norm_(parameters, longest)
    return [parameter.grad for parameter in parameters]


def always_scaled(gradients, longest):
    norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
    return [gradient * longest / norm for gradient in gradients]


class WithoutWeights(Trainer):
    def load_state_dict(self, state):
        own = {name: p.clone() for name, p in self.model.named_parameters()}
        super().load_state_dict({**state, "model": own})


RIGHT = {
    check_adamw: [torch_adamw],
    check_schedule: [rate_at, nanogpt_rate],
    check_accumulation: [counted_first],
    check_evaluate: [evaluate],
    check_state_dict: [Trainer],
    check_clipping: [torch_clip],
}
WRONG = {
    check_adamw: [(forgetful_adamw, "later steps are wrong")],
    check_schedule: [
        (rate_with(final_rate=0.5), "final rate 0.1: at step"),
        (rate_with(schedule="linear"), "cosine, warm-up 10"),
        (lambda step, config: rate_at(step, config) / 2, "highest rate is 0.50, not 1"),
    ],
    check_accumulation: [
        (by_rows, "divide by the targets of all parts"),
        (all_at_once, "more rows at once"),
    ],
    check_evaluate: [
        (judge, "after an error"),
        (lambda *given: 2 * evaluate(*given), "the mean surprise"),
    ],
    check_state_dict: [
        (WithoutWeights, "weights, moments or the schedule"),
    ],
    check_clipping: [(always_scaled, "a norm of 5.02 becomes 6.00")],
}
