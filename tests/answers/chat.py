"""Answers to the checks of chapter 17."""

import torch

from glassgpt.chat import chat_loss, pack, render
from glassgpt.checks.chat import (
    check_answers_only,
    check_apart,
    check_no_forgery,
    check_pack,
    check_prefix_stable,
    check_weighing,
)
from glassgpt.training import Trainer, count_targets


def in_bits(talk, tokenizer, reply=False):
    ids, mask = render(talk, tokenizer, reply)
    return ids, [1 if learn else 0 for learn in mask]


def changed_mask(change):
    """A rendering whose mask is another."""

    def wrong(talk, tokenizer, reply=False):
        ids, mask = render(talk, tokenizer, reply)
        return ids, change(mask)

    return wrong


def stripped(talk, tokenizer, reply=False):
    talk = [{**turn, "content": turn["content"].strip()} for turn in talk]
    return render(talk, tokenizer, reply)


def never_asking(talk, tokenizer, reply=False):
    return render(talk, tokenizer)


def any_role(talk, tokenizer, reply=False):
    talk = [{**t, "role": t["role"].replace("tool", "user")} for t in talk]
    return render(talk, tokenizer, reply)


def a_row_each(talks, context, separator):
    rows = [pack([talk], context, separator) for talk in talks]
    return tuple(map(torch.cat, zip(*rows, strict=True)))


def reversed_rows(talks, context, separator):
    inputs, targets = pack(talks, context, separator)
    return inputs.flip(1), targets.flip(1)


def summed(model, separator):
    loss = chat_loss(model, separator)
    return lambda ids, targets: loss(ids, targets) * count_targets(targets)


def late(model, separator):
    loss = chat_loss(model, separator)
    return lambda ids, targets: loss(ids, targets.roll(1, dims=1))


class Summing(Trainer):
    """It doesn't divide by the targets of the batch."""

    def backward(self, loss):
        super().backward(loss * self.config.batch_size)


RIGHT = {
    check_answers_only: [render, in_bits],
    check_prefix_stable: [render, in_bits],
    check_no_forgery: [render],
    check_pack: [pack],
    check_apart: [chat_loss],
    check_weighing: [Trainer],
}
WRONG = {
    check_answers_only: [
        (changed_mask(lambda mask: [True] * len(mask)), "no part of an answer"),
        (changed_mask(lambda mask: mask[:-1]), "flags for"),
    ],
    check_prefix_stable: [
        (never_asking, "reply=True adds"),
        (changed_mask(lambda mask: [*mask[:-1], True]), "learned changes later"),
    ],
    check_no_forgery: [
        (stripped, "was changed"),
        (any_role, "must be refused"),
    ],
    check_pack: [
        (lambda talks, context, end: pack(talks, context - 1, end), "the shape is"),
        (a_row_each, "half of them would do"),
        (reversed_rows, "something else than its talk"),
    ],
    check_apart: [
        (summed, "packed, the loss is another than alone"),
        (late, "That is the loss of"),
    ],
    check_weighing: [(Summing, "the weights are")],
}
