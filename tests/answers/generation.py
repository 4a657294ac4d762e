"""Answers to the checks of chapter 13."""

import math
from dataclasses import replace

import torch

from glassgpt.checks import generation as checks
from glassgpt.generation import (
    KeyValueCache,
    generate,
    sample,
    stream,
    stream_text,
    window_start,
)


def ignores_temperature(logits, sampling, generator):
    return sample(logits, replace(sampling, temperature=1.0), generator)


class NoOffset(KeyValueCache):
    def append(self, keys, values):
        self.length = getattr(self, "kept", 0)
        everything = super().append(keys, values)
        self.kept, self.length = self.length, 0
        return everything


class OnlyTheNew(KeyValueCache):
    def append(self, keys, values):
        self.length += keys.shape[2]
        return keys, values


class ValuesReversed(KeyValueCache):
    def append(self, keys, values):
        keys, values = super().append(keys, values)
        return keys, values.flip(2)


def single(prompts):
    return isinstance(prompts[0], int)


def cuts_characters(model, tokenizer, prompt, count, top_k, stop=(), **_):
    for (token,) in stream(model, [tokenizer.encode(prompt)], count, top_k=top_k):
        yield tokenizer.decode([token])


def shows_the_stop(model, tokenizer, prompt, count, top_k, stop=(), **_):
    yield from stream_text(model, tokenizer, prompt, count, top_k=top_k)


def beams_at_first_only(model, ids, length, beams):
    first = checks.likeliest_texts(model, ids, 1, beams)
    return max(
        checks.likeliest_texts(model, text, length - 1, 1)[0] for _, text in first
    )[1]


def min_p_of_batch(logits, share):
    p = logits.softmax(-1)
    return logits.masked_fill(p < share * p.max(), -math.inf)


def min_p_without_ties(logits, share):
    p = logits.softmax(-1)
    return logits.masked_fill(p <= share * p.amax(-1, keepdim=True), -math.inf)


def rows_of_the_first(logits, sampling, generator):
    return sample(logits[:1].expand_as(logits), sampling, generator)


def without_generator(logits, sampling, generator):
    return sample(logits, sampling)


def seeded_anew(logits, sampling, generator):
    return sample(logits, sampling, torch.Generator().manual_seed(0))


def sorted_by_length(model, prompts, count, top_k):
    if single(prompts):
        return generate(model, prompts, count, top_k=top_k)
    return generate(model, sorted(prompts, key=len)[::-1], count, top_k=top_k)


def one_window_for_all(model, prompts, count, top_k):
    if single(prompts):
        return generate(model, prompts, count, top_k=top_k)
    rows = [list(prompt) for prompt in prompts]
    for _ in range(count):
        start = window_start(max(map(len, rows)), model.config.context)
        longest = max(map(len, rows))
        windows = [row[max(0, len(row) - longest + start) :] for row in rows]
        new = [generate(model, row, 1, top_k=top_k)[-1] for row in windows]
        for row, token in zip(rows, new, strict=True):
            row.append(token)
    return rows


def ends_with_the_first(model, prompts, count, top_k, stop=()):
    rows = generate(model, prompts, count, top_k=top_k, stop=stop)
    if single(prompts):
        return rows
    sizes = [len(prompt) for prompt in prompts]
    new = min(len(row) - size for row, size in zip(rows, sizes, strict=True))
    return [row[: size + new] for row, size in zip(rows, sizes, strict=True)]


def leaves_dropout_on(model, prompts, count, top_k, stop=()):
    if not model.training:
        return generate(model, prompts, count, top_k=top_k, stop=stop)
    return [checks._greedy(model, prompt, count) for prompt in prompts]


def moves_too_early(model, ids, count, top_k):
    ids = list(ids)
    for _ in range(count):
        start = window_start(len(ids) + 1, 8)
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids[start:]]))[0, -1].argmax()))
    return ids


def all_at_the_end(model, tokenizer, prompt, count, **options):
    yield from list(stream_text(model, tokenizer, prompt, count, **options))


class TakesTooMuch(KeyValueCache):
    def __init__(self, context):
        super().__init__(context + 2)


class Growing:
    """A cache that grows with torch.cat."""

    def __init__(self, context):
        self.context, self.length, self.kept = context, 0, None

    def append(self, *new):
        if self.length + new[0].shape[2] > self.context:
            raise ValueError("the cache is full")
        if self.kept is not None:
            new = [torch.cat(pair, 2) for pair in zip(self.kept, new, strict=True)]
        self.kept, self.length = new, new[0].shape[2]
        return new


def min_p(logits, share):
    distance = logits - logits.amax(-1, keepdim=True)
    return logits.masked_fill(distance < math.log(share), -math.inf)


def likeliest(model, ids, length, beams):
    return checks.likeliest_texts(model, ids, length, beams)[0][1]


RIGHT = {
    checks.check_sample: [sample],
    checks.check_cache: [KeyValueCache, Growing],
    checks.check_generate: [generate],
    checks.check_stream_text: [stream_text],
    checks.check_min_p: [
        min_p,
        lambda x, share: min_p(x.log_softmax(-1), share),
    ],
    checks.check_beam_search: [likeliest],
}

WRONG = {
    checks.check_sample: [
        (ignores_temperature, "divide the logits"),
        (rows_of_the_first, "every row has its own logits"),
        (without_generator, "draw from the generator"),
        (seeded_anew, "two draws in a row are the same"),
    ],
    checks.check_cache: [
        (NoOffset, "wrong position"),
        (OnlyTheNew, "without a cache"),
        (ValuesReversed, "without a cache"),
        (TakesTooMuch, "a cache of 8 that holds 4 took 5 more"),
    ],
    checks.check_generate: [
        (sorted_by_length, "come back in its place"),
        (one_window_for_all, "is its window its own"),
        (ends_with_the_first, "leave the others alone"),
        (leaves_dropout_on, "is dropout off"),
        (moves_too_early, "positions and window"),
    ],
    checks.check_stream_text: [
        (all_at_the_end, "yield each as it comes"),
        (cuts_characters, "cut in two"),
        (shows_the_stop, "stop token"),
    ],
    checks.check_min_p: [
        (min_p_of_batch, "each row has its own"),
        (min_p_without_ties, "Mind ties"),
        (
            lambda x, share: x.masked_fill(x.softmax(-1) < share, -math.inf),
            "share times the largest probability",
        ),
    ],
    checks.check_beam_search: [
        (beams_at_first_only, "extend every text that was kept"),
        (
            lambda model, ids, n, beams: generate(model, ids, n, top_k=1),
            "3 beams from",
        ),
    ],
}
