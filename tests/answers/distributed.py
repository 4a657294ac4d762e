"""Answers to the checks of chapter 25."""

import math

import numpy as np
import torch

from glassgpt.checks.distributed import (
    check_gradient,
    check_lost_time,
    check_memory,
    check_parallel,
    check_ring,
    check_stream,
)
from glassgpt.data import Tokens
from glassgpt.distributed import DDPTrainer, ParallelTrainer, StreamedTokens
from glassgpt.training import count_targets


def ring_to_the_right(vectors, last_adds=False):
    n, held = len(vectors), [list(vector) for vector in vectors]
    yield held
    for step in range(2 * n - 2):
        after = [list(vector) for vector in held]
        for rank in range(n):
            chunk, left = (rank + step) % n, (rank - 1) % n
            adds = held[left][chunk] if step < n - 1 or last_adds else 0
            after[left][chunk] = held[rank][chunk] + adds
        held = after
        yield held


def ring_that_always_adds(vectors):
    return ring_to_the_right(vectors, last_adds=True)


def all_at_once(vectors):
    whole = [sum(column) for column in zip(*vectors, strict=True)]
    yield vectors
    for _ in range(2 * len(vectors) - 2):
        yield [list(whole) for _ in vectors]


class WeighsByRows(ParallelTrainer):
    def parts(self, batch):
        whole = count_targets(batch[1]) / len(batch[1])
        for part in super().parts(batch):
            self.factor = len(part[1]) * whole / max(count_targets(part[1]), 1)
            yield part

    def backward(self, loss):
        super().backward(loss * self.factor)


class ForgetsMoments(DDPTrainer):
    def load_state_dict(self, state):
        super().load_state_dict(state)
        for optimizer in self.optimizers:
            optimizer.state.clear()


class CountsForItself(StreamedTokens):
    calls = 0

    def random_batch(self, batch_size, context, seed):
        self.calls += 1
        super().random_batch(batch_size, context, seed)
        return Tokens(self.ids).random_batch(batch_size, context, self.calls)


class NextIsTheSame(StreamedTokens):
    def random_batch(self, batch_size, context, seed):
        inputs, _ = super().random_batch(batch_size, context, seed)
        return inputs, inputs


class OneSequence(StreamedTokens):
    def random_batch(self, batch_size, context, seed):
        batch = super().random_batch(batch_size, context, seed)
        return tuple(rows[:1].expand(batch_size, -1) for rows in batch)


def by_numpy(gradients, targets):
    pairs = [(g, n) for g, n in zip(gradients, targets, strict=True) if n]
    return np.average([g.numpy() for g, _ in pairs], 0, [n for _, n in pairs])


def mean_of_means(gradients, targets):
    return sum(gradients) / len(gradients)


def starts_with_the_first(gradients, targets):
    total = gradients[0] * targets[0]
    for gradient, number in zip(gradients[1:], targets[1:], strict=True):
        total = total + gradient * number if number else total
    return total / sum(targets)


def hides_nan(gradients, targets):
    pairs = zip(gradients, targets, strict=True)
    return sum(g.nan_to_num() * n for g, n in pairs) / sum(targets)


def bytes_of(matrices, n, divided, rounds=math.ceil):
    sizes = sorted((rows * columns for rows, columns in matrices), reverse=True)
    if divided == "model":
        return 16 * sum(rounds(rows / n) * columns for rows, columns in matrices)
    moments = sum(sizes[::n]) if divided == "optimizer" else sum(sizes)
    return 8 * sum(sizes) + 8 * moments


def rounded_down(matrices, n, divided):
    return bytes_of(matrices, n, divided, math.floor)


def lost(gpus, years, cost, restart):
    mean = years * 365 * 86_400 / gpus
    best = math.sqrt(2 * cost * mean)
    return best, cost / best + best / (2 * mean) + restart / mean


def of_one_gpu(gpus, *rest):
    return lost(1, *rest)


def without_restart(gpus, years, cost, restart):
    return lost(gpus, years, cost, 0)


RIGHT = {
    check_ring: [ring_to_the_right],
    check_stream: [StreamedTokens],
    check_gradient: [by_numpy, lambda *given: torch.from_numpy(by_numpy(*given))],
    check_memory: [bytes_of],
    check_lost_time: [lost],
}
WRONG = {
    check_ring: [
        (ring_that_always_adds, "process 0 does not hold the sum"),
        (all_at_once, "chunks arrived in one step"),
    ],
    check_parallel: [
        (WeighsByRows, "with masked targets"),
        (ForgetsMoments, "saved and loaded"),
    ],
    check_stream: [
        (CountsForItself, "begun at step 17"),
        (NextIsTheSame, "targets are the next tokens"),
        (OneSequence, "most sequences come more than once"),
    ],
    check_gradient: [
        (mean_of_means, "a mean of means"),
        (starts_with_the_first, "with [0, 4] targets, 0 times nan"),
        (hides_nan, "nan of a process with targets"),
    ],
    check_memory: [(rounded_down, "model on 2: 4416, not 4480")],
    check_lost_time: [
        (of_one_gpu, "more GPUs fail more often"),
        (without_restart, "the restart is lost, too"),
    ],
}
