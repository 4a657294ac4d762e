# Written by tools/tangle.py from book/02_tokens.ipynb: change it there.
"""Properties of a good tokenizer, and of the parts it is made of."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

NASTY_TEXTS = (
    "",
    " ",
    "a miniature Eiffel tower",
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


def _must_equal(found: str, text: str) -> None:
    """Raises AssertionError, with the first place where they differ."""
    pairs = enumerate(zip(text, found, strict=False))
    at = next((n for n, (a, b) in pairs if a != b), min(len(text), len(found)))
    near = slice(max(at - 10, 0), at + 10)
    assert found == text, (
        f"{text[near]!a} came back as {found[near]!a}: "
        "something is moved, lost, added or changed on the way"
    )


def check_split_words(split_words: Callable[[str], Sequence[str]]) -> None:
    """Words are cut as GPT-2 cuts them, and nothing is lost.

    Book: 02_tokens.html#words
    """
    for text in NASTY_TEXTS:
        _must_equal("".join(split_words(text)), text)
    cases = {
        "a tower": (["a", " tower"], "a space belongs to the word that follows it"),
        "a  b\n\n c": (["a", " ", " b", "\n\n", " c"], "only the last space moves"),
        "it's, '1889'": (["it", "'s", ",", " '", "1889", "'"], "'s is one word"),
        "B2B é!": (["B", "2", "B", " é", "!"], "letters, digits, signs don't mix"),
        "I've I'll I'm": (
            ["I", "'ve", " I", "'ll", " I", "'m"],
            "'ve and 'll are words, too",
        ),
        "I'd\nyou're": (
            ["I", "'d", "\n", "you", "'re"],
            "a space, not a line end, joins a word",
        ),
        "don't --": (["don", "'t", " --"], "signs that follow each other are one word"),
        "WE'LL": (["WE", "'", "LL"], "'LL in capitals is not shortened"),
        " 3½ a_b": ([" 3½", " a", "_", "b"], "digits of all scripts; _ is a sign"),
    }
    for text, (words, why) in cases.items():
        got = list(split_words(text))
        assert got == words, f"{text!r} was cut into {got}: {why}"


def check_merge_word(merge_word: Callable) -> None:
    """Merges are applied in the order of learning, until none is left.

    Book: 02_tokens.html#the-function
    """
    merges = {(2, 3): 256, (1, 2): 257, (257, 3): 258, (256, 4): 259, (1, 259): 260}
    got = list(merge_word(word := [1, 2, 3], merges))
    assert word == [1, 2, 3], "the list that was given has changed: work on a copy"
    assert got != [258], "1 2 merged before 2 3: the merge learned first goes first"
    assert got == [1, 256], f"1 2 3 gave {got}, not [1, 256]"
    got = list(merge_word([1, 2, 3, 4], merges))
    assert got == [260], f"1 2 3 4 gave {got}: go on until no merge is left"
    got = list(merge_word([1, 2, 3, 1, 2, 3], merges))
    assert got == [1, 256] * 2, f"1 2 3 1 2 3 gave {got}: merge all occurrences"
    got = list(merge_word([1, 2, 3] * 60, merges))
    assert got == [1, 256] * 60, "a long word is merged in another way than a short one"
    got = list(merge_word([1, 1, 1], {(1, 1): 300}))
    assert got == [300, 1], f"1 1 1 gave {got}: merge from left to right, to id 300"
    got = list(merge_word([1, 1, 1, 1], {(1, 1): 256}))
    assert got == [256, 256], f"1 1 1 1 gave {got}: the very next two merge, too"
    assert list(merge_word([], merges)) == [], "an empty word gives no ids"


def check_tokenizer_round_trip(
    tokenizer: Any, texts: Iterable[str] = NASTY_TEXTS
) -> None:
    """Every text comes back from its ids exactly as it was.

    Book: 02_tokens.html#a-tokenizer
    """
    for text in texts:
        ids = tokenizer.encode(text)
        outside = [n for n in ids if not 0 <= n < tokenizer.vocab_size]
        assert not outside, f"id {outside[0]} is outside the vocabulary"
        _must_equal(tokenizer.decode(ids), text)


def check_special_tokens(tokenizer: Any) -> None:
    """Special tokens come from the program, not from the text that a stranger typed.

    Book: 02_tokens.html#a-tokenizer
    """
    for name, special in tokenizer.special_tokens.items():
        for text in (name, f"a{name}b{name}"):
            typed = tokenizer.encode(text)
            unasked = f"{name!r} in the text {text!r} became a special token unasked"
            assert special not in typed, unasked
            assert tokenizer.decode(typed) == text, f"the text {text!r} was changed"
        _check_asked(tokenizer, name, special)


def _check_asked(tokenizer: Any, name: str, special: int) -> None:
    asked = list(tokenizer.encode(name + name, allow_special=True))
    assert asked == [special] * 2, f"allow_special gave {asked}, not twice {special}"
    text = f"a {name}\nb"
    both = tokenizer.decode(tokenizer.encode(text, allow_special=True))
    assert both == text, f"{text!r} came back as {both!r}: text beside it is lost"
    assert tokenizer.decode([special]) == name, f"id {special} is not spelled {name!r}"


def check_learn_merges(learn_merges: Callable) -> None:
    """Merges come by falling count, recounted each time, ties by the smallest ids.

    Book: 02_tokens.html#learning-fast
    """
    a, b, c = (ord(letter) - 33 for letter in "abc")
    got = list(learn_merges({"a": 9, "b": 9}, 3))
    assert got == [], f"merged {got} across the border of two words"
    got = list(learn_merges({"ab": 1, "aab": 1, "bc": 5}, 1))
    assert got == [(b, c)], f"merged {got}: a word counts as often as it occurs"
    got = list(learn_merges({"ba": 2, "ab": 2, "ca": 2}, 1))
    assert got == [(a, b)], f"merged {got}: of equal counts the smallest ids win"
    got = list(learn_merges({"abab": 2, "ca": 3}, 1))
    assert got == [(a, b)], f"merged {got}: a pair that is twice in a word counts twice"
    got = list(learn_merges({"aaa": 2, "bc": 3}, 1))
    assert got == [(a, a)], f"merged {got}: aaa has the pair a a twice"
    got = list(learn_merges({"BBAAA": 4, " BBA": 5}, 5))  # ids 33, 32 and 220
    wanted = [(33, 32), (33, 256), (220, 257), (32, 32), (257, 259)]
    assert got == wanted, (
        f"BBAAA four times and ' BBA' five times: merged {got}, not {wanted}: count"
        " again after each merge, in all words"
    )
    got = list(learn_merges({"ab": 9, "abd": 2, "cd": 2}, 2))
    assert got == [(a, b), (c, c + 1)], (
        f"merged {got}: of equal counts the smallest ids win, not the spelling"
    )
    got = list(learn_merges({"ab": 1}, 3))
    assert got == [(a, b)], f"merged {got}: one pair is all there is"
    got = list(learn_merges({"aaaa": 1}, 3))
    assert got == [(a, a), (256, 256)], f"aaaa: merged {got}: one a a ends in the other"


def check_split_numbers(split_numbers: Callable[[str], Sequence[str]]) -> None:
    """split_numbers cuts digits in threes from the right, and loses nothing.

    Book: 02_tokens.html#exercise-3-digits-in-threes
    """
    for text in NASTY_TEXTS:
        _must_equal("".join(split_numbers(text)), text)
    got = list(split_numbers("18890"))
    assert got != ["188", "90"], "18890 was cut from the left: count from the right"
    assert got == ["18", "890"], f"18890 was cut into {got}"
    got = list(split_numbers("1234567"))
    assert got == ["1", "234", "567"], f"1234567 was cut into {got}: go on in threes"
    got = list(split_numbers("a ½"))
    assert got == ["a", " ", "½"], f"'a ½' was cut into {got}: \\p{{N}} has ½, too"
    got = list(split_numbers("a   12"))
    assert got == ["a", "  ", " ", "12"], f"'a   12': {got}, not one space alone"
    got = list(split_numbers(" \u0663\u0664\u0665\u0666"))
    assert got == [" ", "\u0663", "\u0664\u0665\u0666"], f"Arabic digits gave {got}"
    got = list(split_numbers("a 一"))
    assert got == ["a", " 一"], f"'a 一' was cut into {got}: 一 is a letter (\\p{{L}})"
    cases = {
        "a 1889 b": ["a", " ", "1", "889", " b"],
        "it's 123456": ["it", "'s", " ", "123", "456"],
        "3½ 1234567890123": ["3½", " ", "1", "234", "567", "890", "123"],
        "they've WE'LL": ["they", "'ve", " WE", "'", "LL"],
        "we'll  go -- now!": ["we", "'ll", " ", " go", " --", " now", "!"],
        "a \u2014 b\n\n c": ["a", " \u2014", " b", "\n\n", " c"],
    }
    for text, words in cases.items():
        got = list(split_numbers(text))
        assert got == words, f"{text!r} was cut into {got}"
