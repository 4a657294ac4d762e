# Written by tools/tangle.py from book/02_tokens.ipynb: change it there.
"""Properties of a good tokenizer, and of the parts it is made of."""

from collections.abc import Callable, Sequence
from os.path import commonprefix
from typing import Any

NASTY_TEXTS = (
    "",
    "It's 1889, and they've built 10000 tons of iron. WE'LL see!",
    "caf\u00e9 cafe\u0301 \u1e9b\u0323 \ufb01n",
    "👨\u200d👩\u200d👧\u200d👦 🗼🏽 🇫🇷",
    "שלום עולם \u202eabc\u202c مرحبا",
    "埃菲尔铁塔エッフェル塔에펠탑",
    "null \0 byte, tab\t, bell \a, escape \x1b[0m",
    "a  b   c    d" + " " * 300 + "e   ",
    "one\r\ntwo\r\n\r\nthree\n\n\n  four\u2028five\u00a0six\u3000seven\x85",
    "\ufeff bom, unassigned \u0378 private \ue000 last \U0010ffff",
    "x" * 500 + "!?" * 200 + "0123456789" * 30,
    "<|endoftext|> <|endof text|>",
)


def _expect_text(found: str, text: str) -> None:
    """A text came back as it was, or the message shows where it did not."""
    at = len(commonprefix([found, text]))
    near = slice(max(at - 10, 0), at + 10)
    assert found == text, (
        f"{text[near]!a} came back as {found[near]!a}: "
        "something is moved, lost, added or changed on the way"
    )


def _expect_words(split: Callable[[str], Sequence[str]], cases: dict) -> None:
    """Nothing is lost, and the texts of these cases are cut into their words."""
    for text in NASTY_TEXTS:
        _expect_text("".join(split(text)), text)
    for text, (words, why) in cases.items():
        found = list(split(text))
        assert found == words, f"{text!r} was cut into {found}: {why}"


def check_split_words(split_words: Callable[[str], Sequence[str]]) -> None:
    """Words are cut as GPT-2 cuts them, and nothing is lost.

    Book: 02_tokens.html#words
    """
    shortened = ["I", "'ve", " it", "'s", " don", "'t", " WE", "'", "LL"]
    cases = {
        "a tower": (["a", " tower"], "a space belongs to the word that follows it"),
        "a  b\n\n c\nd": (
            ["a", " ", " b", "\n\n", " c", "\n", "d"],
            "only the last space moves, and no line end",
        ),
        "I've it's don't WE'LL": (shortened, "'s is a word, but not in capitals"),
        "B2B é! 3½ a_b --": (
            ["B", "2", "B", " é", "!", " 3½", " a", "_", "b", " --"],
            "letters, digits and signs of all scripts don't mix",
        ),
    }
    _expect_words(split_words, cases)


def check_merge_word(merge_word: Callable) -> None:
    """Merges are applied in the order of learning, until none is left.

    Book: 02_tokens.html#the-function
    """
    merges = {(2, 3): 256, (1, 2): 257, (257, 3): 258, (256, 4): 259, (1, 259): 260}
    cases = [
        ([1, 2, 3], merges, [1, 256], "the merge learned first goes first"),
        ([1, 2, 3, 4], merges, [260], "go on until no merge is left"),
        ([1, 2, 3] * 60, merges, [1, 256] * 60, "merge all occurrences"),
        ([1, 1, 1], {(1, 1): 300}, [300, 1], "merge from left to right, to id 300"),
        ([1] * 4, {(1, 1): 300}, [300, 300], "the very next two merge, too"),
        ([], merges, [], "an empty word gives no ids"),
    ]
    for ids, known, wanted, why in cases:
        given = list(ids)
        found = list(merge_word(given, known))
        assert found == wanted, f"{ids[:9]} gave {found[:9]}: {why}"
        assert given == ids, "the list that was given has changed: work on a copy"


def check_tokenizer_round_trip(tokenizer: Any) -> None:
    """Every text comes back from its ids exactly as it was.

    Book: 02_tokens.html#a-tokenizer
    """
    for text in NASTY_TEXTS:
        ids = tokenizer.encode(text)
        outside = [n for n in ids if not 0 <= n < tokenizer.vocab_size]
        assert not outside, f"id {outside[0]} is outside the vocabulary"
        _expect_text(tokenizer.decode(ids), text)


def check_special_tokens(tokenizer: Any) -> None:
    """Special tokens come from the program, not from the text that a stranger typed.

    Book: 02_tokens.html#a-tokenizer
    """
    for name, special in tokenizer.special_tokens.items():
        text = f"{name} a{name}b"
        typed = list(tokenizer.encode(text))
        asked = list(tokenizer.encode(text, allow_special=True))
        assert special not in typed, f"{text!r} has a special token unasked"
        assert asked.count(special) == 2, f"allow_special gave {asked}: not all of them"
        for ids in (typed, asked):
            _expect_text(tokenizer.decode(ids), text)


def check_learn_merges(learn_merges: Callable) -> None:
    """Merges come by falling count, recounted each time, ties by the smallest ids.

    Book: 02_tokens.html#learning-fast
    """
    a, b, c, d = (ord(letter) - 33 for letter in "abcd")
    often = [(33, 32), (33, 256), (220, 257), (32, 32), (257, 259)]  # "B" is 33
    cases = [
        ({"a": 9, "b": 9}, [], "no merge crosses the border of two words"),
        ({"ab": 1, "aab": 1, "bc": 5}, [(b, c)], "a word counts as often as it occurs"),
        ({"ba": 2, "ab": 2, "ca": 2}, [(a, b)], "of equal counts the smallest ids win"),
        ({"abab": 2, "ca": 3}, [(a, b)], "a pair that is twice in a word counts twice"),
        ({"BBAAA": 4, " BBA": 5}, often, "count again after each merge, in all words"),
        ({"ab": 9, "abd": 2, "cd": 2}, [(a, b), (c, d)], "the ids, not the spelling"),
        ({"aaaa": 1}, [(a, a), (256, 256)], "the very next two merge, too"),
    ]
    for counts, wanted, why in cases:
        found = list(learn_merges(counts, max(len(wanted), 1)))
        assert found == wanted, f"{counts} gave {found}, not {wanted}: {why}"


def check_split_numbers(split_numbers: Callable[[str], Sequence[str]]) -> None:
    """split_numbers cuts digits in threes from the right, and loses nothing.

    Book: 02_tokens.html#exercise-3-digits-in-threes
    """
    cases = {
        "18890": (["18", "890"], "count from the right"),
        "1234567890123": (["1", "234", "567", "890", "123"], "go on in threes"),
        "a   12": (["a", "  ", " ", "12"], "before digits one space stands alone"),
        "a 3½ 一 \u0663\u0664\u0665\u0666": (
            ["a", " ", "3½", " 一", " ", "\u0663", "\u0664\u0665\u0666"],
            "½ is a digit (\\p{N}), 一 is a letter (\\p{L}); Arabic has digits, too",
        ),
        "they've  it's -- WE'LL\n\n c": (
            ["they", "'ve", " ", " it", "'s", " --", " WE", "'", "LL", "\n\n", " c"],
            "all else is cut as split_words does",
        ),
    }
    _expect_words(split_numbers, cases)
