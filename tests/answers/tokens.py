"""Answers to the checks of chapter 2."""

from collections import Counter
from itertools import pairwise

import regex

from glassgpt.checks import tokens as checks
from glassgpt.tokens import (
    BPETokenizer,
    CharTokenizer,
    byte_ids,
    learn_merges,
    merge_pair,
    merge_word,
    split_words,
)

GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
IN_THREES = r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))"


def cut_by(pattern, old="", new=""):
    """Words by a pattern, in which one part is changed."""
    return regex.compile(pattern.replace(old, new)).findall


def step_by_step(text):
    """Numbers in threes, from the words of `split_words`."""
    parts = []
    for word in split_words(text):
        digits = word.removeprefix(" ")
        if not regex.fullmatch(r"\p{N}+", digits):
            parts.append(word)
            continue
        if word != digits:
            parts.append(" ")
        first = len(digits) % 3 or 3
        parts.append(digits[:first])
        parts += [digits[i : i + 3] for i in range(first, len(digits), 3)]
    return parts


def in_the_order_of_learning(ids, merges):
    for pair, new in merges.items():
        ids = merge_pair(ids, pair, new)
    return ids


def leftmost_first(ids, merges):
    for place, pair in enumerate(pairwise(ids)):
        if pair in merges:
            merged = [*ids[:place], merges[pair], *ids[place + 2 :]]
            return leftmost_first(merged, merges)
    return list(ids)


def first_place_only(ids, merges):
    for pair, new in merges.items():
        place = next(
            (n for n, found in enumerate(pairwise(ids)) if found == pair), None
        )
        if place is not None:
            ids = [*ids[:place], new, *ids[place + 2 :]]
    return list(ids)


def numbered_anew(ids, merges):
    return merge_word(ids, {pair: 256 + n for n, pair in enumerate(merges)})


def recounted(counts, number, spelled=False):
    """All pairs are counted again after each merge; ties by the ids or the bytes."""
    words = [(byte_ids(word), times) for word, times in counts.items()]
    merges = []
    while len(merges) < number:
        pairs = Counter()
        for word, times in words:
            for pair in pairwise(word):
                pairs[pair] += times
        if not pairs:
            break
        names = BPETokenizer(merges, ())
        ties = {
            p: [names.decode_bytes([n]) for n in p] if spelled else p for p in pairs
        }
        best = min(pairs, key=lambda pair: (-pairs[pair], ties[pair]))
        new = 256 + len(merges)
        words = [(merge_pair(word, best, new), times) for word, times in words]
        merges.append(best)
    return merges


def counted_once(counts, number):
    pairs = Counter()
    for word, times in counts.items():
        for pair in pairwise(byte_ids(word)):
            pairs[pair] += times
    return sorted(pairs, key=lambda pair: (-pairs[pair], pair))[:number]


class EachTokenAlone(BPETokenizer):
    def decode(self, ids):
        return "".join(super(EachTokenAlone, self).decode([n]) for n in ids)


class WithoutBOM(BPETokenizer):
    def decode(self, ids):
        return self.decode_bytes(ids).decode("utf-8-sig", errors="replace")


class Trusting(BPETokenizer):
    def encode(self, text, allow_special=True):
        return super().encode(text, allow_special)


class Deaf(BPETokenizer):
    def encode(self, text, allow_special=False):
        return super().encode(text)


class Forgetful(BPETokenizer):
    def encode(self, text, allow_special=False):
        ids = super().encode(text, allow_special)
        return [n for n in ids if n >= 256] if allow_special else ids


RIGHT = {
    checks.check_split_words: [split_words, cut_by(GPT2)],
    checks.check_merge_word: [merge_word, in_the_order_of_learning],
    checks.check_tokenizer_round_trip: [
        BPETokenizer([(64, 65)]),
        BPETokenizer.gpt2(),
        CharTokenizer.train(checks.NASTY_TEXTS),
    ],
    checks.check_special_tokens: [BPETokenizer.gpt2(), CharTokenizer("<>a b", ["<a>"])],
    checks.check_learn_merges: [learn_merges, recounted],
    checks.check_split_numbers: [
        step_by_step,
        cut_by(GPT2, r" ?\p{N}+", IN_THREES),
    ],
}
WRONG = {
    checks.check_split_words: [
        (str.split, "lost"),
        (cut_by(r"\s+|\S+"), "belongs to the word"),
        (cut_by(GPT2, r" ?\p{L}", r"\s?\p{L}"), "no line end"),
        (cut_by("(?i)" + GPT2), "not in capitals"),
        (cut_by(GPT2, r" ?\p{N}", r" ?\d"), "of all scripts"),
        (cut_by(GPT2, r"?\p{L}", r"?[\p{L}_]"), "don't mix"),
    ],
    checks.check_merge_word: [
        (leftmost_first, "learned first goes first"),
        (lambda ids, merges: merge_pair(ids, (2, 3), 256), "no merge is left"),
        (first_place_only, "all occurrences"),
        (numbered_anew, "to id 300"),
    ],
    checks.check_tokenizer_round_trip: [
        (EachTokenAlone([]), "lost, added or changed"),
        (WithoutBOM([]), "bom"),
    ],
    checks.check_special_tokens: [
        (Trusting([]), "unasked"),
        (Deaf([]), "not all of them"),
        (Forgetful([]), "came back as"),
    ],
    checks.check_learn_merges: [
        (lambda counts, n: learn_merges(dict.fromkeys(counts, 1), n), "as it occurs"),
        (counted_once, "count again"),
        (lambda counts, n: recounted(counts, n, spelled=True), "not the spelling"),
    ],
    checks.check_split_numbers: [
        (split_words, "18890"),
        (cut_by(GPT2, r" ?\p{N}+", r"\p{N}{1,3}"), "from the right"),
        (cut_by(GPT2, r" ?\p{N}+", IN_THREES.replace(r"\p{N}", r"\d")), "½ is a digit"),
    ],
}
