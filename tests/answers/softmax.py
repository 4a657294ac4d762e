"""Answers to the checks of chapter 5."""

import math

import torch
import torch.nn.functional as F

from glassgpt.checks import softmax as checks
from glassgpt.softmax import cross_entropy, log_softmax, softmax


def with_log_sum_exp(x, dim=-1):
    return (x - x.logsumexp(dim, keepdim=True)).exp()


def shifted(x, dim=-1):
    return x - x.amax(dim, keepdim=True)


def normalized(powers, dim=-1):
    return powers / powers.sum(dim, keepdim=True)


def shares_of_all(x, dim=-1):
    return normalized((x - x.max()).exp(), dim)


def log_of_shares(x, dim=-1):
    return x - x.exp().sum(dim, keepdim=True).log()


def in_place(x, dim=-1):
    x -= x.amax(dim, keepdim=True)
    return normalized(x.exp(), dim)


def half_detached(x, dim=-1):
    powers = shifted(x, dim).exp()
    return powers / powers.sum(dim, keepdim=True).detach()


def flat(logits, targets, **options):
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), **options)


def mean_of_means(logits, targets):
    if logits.dim() == 2:
        return flat(logits, targets)
    texts = [flat(*text) for text in zip(logits, targets, strict=True)]
    return torch.stack(texts).mean()


def picked(table, targets):
    counted = targets != -100
    return table[counted].gather(-1, targets[counted][:, None])


def one_pass(chunks, peak=-math.inf, inverse=False, moving=True):
    peak, total = torch.tensor(peak), torch.tensor(0.0)
    for chunk in chunks:
        higher = peak.maximum(chunk.max())
        scale = (higher - peak if inverse else peak - higher).exp()
        total = total * scale + (chunk - higher).exp().sum()
        peak = higher if moving else peak
    return peak + total.log()


def score_by_score(chunks):
    peak, total = -math.inf, 0.0
    for chunk in chunks:
        for score in chunk.tolist():
            higher = max(score, peak)
            total = total * math.exp(peak - higher) + math.exp(score - higher)
            peak = higher
    return peak + math.log(total)


def without_peak(chunks):
    peak, total = torch.tensor(-math.inf), torch.tensor(0.0)
    for chunk in chunks:
        higher = peak.maximum(chunk.max())
        total = total * (peak - higher).exp() + (chunk - higher).exp().sum()
        peak = higher
    return total.log()


def last_chunk(chunks):
    for chunk in chunks:
        result = chunk.logsumexp(0)
    return result


def pushes(x, y):
    return x.softmax(-1) - F.one_hot(y, 4)


RIGHT = {
    checks.check_softmax: [torch.softmax, F.softmax, softmax, with_log_sum_exp],
    checks.check_log_softmax: [
        torch.log_softmax,
        log_softmax,
        lambda x, dim: x - x.logsumexp(dim, keepdim=True),
    ],
    checks.check_cross_entropy: [flat, cross_entropy],
    checks.check_masked_softmax: [
        lambda x, m: x.masked_fill(~m, -math.inf).softmax(-1),
        lambda x, m: x.where(m, -math.inf).softmax(-1),
    ],
    checks.check_cross_entropy_gradient: [
        lambda x, y: pushes(x, y) / len(y),
        lambda x, y: (x.softmax(-1) - torch.eye(4)[y]) / len(y),
    ],
    checks.check_one_pass: [
        one_pass,
        lambda parts: one_pass(part.double() for part in parts),
        score_by_score,
    ],
}

WRONG = {
    checks.check_softmax: [
        (lambda x, dim: normalized(shifted(x, dim).exp(), 0), "sums of the columns"),
        (lambda x, dim: x.softmax(0), "wrong axis"),
        (lambda x, dim: x.exp() / x.exp().sum(dim), "with keepdim=True"),
        (lambda x, dim: x.exp(), "the sum of their own row"),
        (lambda x, dim: normalized(x, dim), "is wanted"),
        (lambda x, dim: normalized(shifted(x, dim).exp2(), dim), "exp of the scores"),
        (lambda x, dim: x.softmax(dim)[0], "the shape is (3,)"),
        (lambda x, dim: normalized(x.exp(), dim), "forgot to subtract the maximum"),
        (lambda x, dim: normalized((x - x.abs().max()).exp(), dim), "its sign"),
        (shares_of_all, "each row's own"),
        (lambda x, dim: normalized(shifted(x, dim).exp()), "dim=0 is the axis"),
        (in_place, "changed in place"),
        (lambda x, dim: x.detach().softmax(dim), "no gradient flows back"),
        (half_detached, "was a part detached"),
        (lambda x, dim: x.float().softmax(dim).double(), "is wanted"),
        (lambda x, dim: x.softmax(dim).float(), "became torch.float32"),
        (lambda x, dim: x.softmax(dim).tolist(), "a list, not a tensor"),
    ],
    checks.check_log_softmax: [
        (lambda x, dim: x.softmax(dim).log(), "instead of taking the log of softmax"),
        (log_of_shares, "forgot to subtract the maximum"),
        (lambda x, dim: x.log_softmax(0), "Along dim=-1"),
        (lambda x, dim: x.log_softmax(-1), "Along dim=0"),
        (lambda x, dim: -x.log_softmax(dim), "is wanted"),
        (lambda x, dim: log_of_shares(x - x.max(), dim), "its own maximum"),
        (lambda x, dim: x.detach().log_softmax(dim), "no gradient flows back"),
    ],
    checks.check_cross_entropy: [
        (lambda x, y: flat(x.softmax(-1), y), "softmax was applied twice"),
        (lambda x, y: flat(x, y, reduction="sum"), "take the mean"),
        (lambda x, y: flat(x, y) * (y != -100).double().mean(), "still count"),
        (lambda x, y: -flat(x, y), "minus the natural logarithm"),
        (lambda x, y: flat(x, y) / math.log(2), "the natural logarithm"),
        (mean_of_means, "all others count alike"),
        (lambda x, y: flat(x, y.clamp(min=0)), "-100 are ignored"),
        (lambda x, y: flat(x.detach(), y), "no gradient flows back"),
        (lambda x, y: -picked(x.softmax(-1).log(), y).mean(), "logits are large"),
    ],
    checks.check_masked_softmax: [
        (lambda x, m: x.softmax(-1) * m, "before the softmax, not after"),
        (lambda x, m: x.masked_fill(m, -math.inf).softmax(-1), "invert the mask"),
        (lambda x, m: (x * m).softmax(-1), "probability above 0"),
        (lambda x, m: x.masked_fill(~m, -math.inf).softmax(0), "of each row"),
        (lambda x, m: (x - ~m * math.inf).softmax(-1), "with masked_fill"),
        (lambda x, m: normalized(x.softmax(-1) * m), "before anything else"),
        (lambda x, m: normalized(x.exp().where(m, 0.0)), "before anything else"),
        (lambda x, m: x.masked_fill_(~m, -math.inf).softmax(-1), "changed in place"),
    ],
    checks.check_cross_entropy_gradient: [
        (lambda x, y: -pushes(x, y) / 6, "one-hot - p"),
        (pushes, "divide by the number of positions"),
        (lambda x, y: x.softmax(-1) / 6, "subtract 1 there"),
        (lambda x, y: pushes(x, y) / 4, "It is p minus one-hot"),
        (lambda x, y: pushes(x, y).mean(0), "the shape is (4,)"),
        (lambda x, y: pushes(x.mul_(0.5) * 2, y) / 6, "changed in place"),
        (lambda x, y: (normalized(x.exp()) - F.one_hot(y, 4)) / 6, "near 1000"),
    ],
    checks.check_one_pass: [
        (last_chunk, "when the peak grows"),
        (lambda parts: one_pass(parts, inverse=True), "other way round"),
        (lambda parts: one_pass(parts, moving=False), "exp(old peak - new peak)"),
        (lambda parts: one_pass(parts, peak=0.0), "start with the peak -inf"),
        (without_peak, "peak + log of the total"),
        (lambda parts: torch.cat(list(parts)).logsumexp(0), "keep no chunk"),
        (
            lambda parts: sum(part.exp().sum() for part in parts).log(),
            "subtract the peak",
        ),
    ],
}
