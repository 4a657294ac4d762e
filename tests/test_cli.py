"""The command line: a user's mistakes get a sentence, and the rest works end to end."""

import argparse
import contextlib
import filecmp
import hashlib
import inspect
import io
import json
import linecache
import math
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import traceback
from dataclasses import fields
from pathlib import Path
from unittest.mock import patch

import address
import nbformat
import pytest
import torch

import glassgpt
from glassgpt import GPT, GPTConfig, TokenData, cli, generate, load, render
from glassgpt.checkpoints import save
from glassgpt.checks.cli import check_mistakes
from glassgpt.cli import comments, main
from glassgpt.device import SIZES
from glassgpt.tokens import BPETokenizer, CharTokenizer

SCRIPT = Path(sys.executable).with_name("glassgpt")
PNG = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\xff\xfe\x00"
WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "an", "old", "dog"]
# A model and a run that take a second.
TINY = """--layers 1 --heads 2 --width 16 --context 16 --steps 6 --warmup 1
--batch-size 4 --evaluate-every 3 --evaluation-crops 8 --checkpoint-every 3
--compile off --precision float32 --device cpu"""
TINY = TINY.split()


def write_text(path, lines=300):
    """A text of short sentences, the same every time."""
    draw = random.Random(0)
    text = "".join(" ".join(draw.choices(WORDS, k=8)) + ".\n" for _ in range(lines))
    path.write_text(text, "utf-8")
    return path


def hashes(folder):
    """The SHA-256 of every file below a folder, to see that none changed."""
    return {
        path.relative_to(folder): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def glass(*words):
    """The exit code of `main`, also where the parser leaves by itself."""
    try:
        return main([str(word) for word in words])
    except SystemExit as leaving:
        return leaving.code


def script(*words, **options):
    """The installed script in a process of its own."""
    words = [str(word) for word in (SCRIPT, *words)]
    return subprocess.run(words, capture_output=True, text=True, **options)


def weights(folder):
    return {name: p.detach() for name, p in load(folder)[0].named_parameters()}


def equal(one, two):
    return all(torch.equal(value, two[name]) for name, value in one.items())


def edit(path, change):
    path.write_bytes(change(path.read_bytes()))


def put(*keys, value):
    """A change of one value in a JSON file."""

    def change(content):
        data = inner = json.loads(content)
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = value
        return json.dumps(data).encode()

    return change


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a text, and a finished run on it in `run`. Tests only read it."""
    folder = tmp_path_factory.mktemp("made")
    text = write_text(folder / "my.txt")
    new = ("--tokenizer", "char", "--out", folder / "run")
    assert glass("train", "--data", text, *new, *TINY) == 0
    return folder


@pytest.fixture
def run(made, tmp_path):
    """A copy of the finished run, to change."""
    return shutil.copytree(made / "run", tmp_path / "run")


@pytest.fixture(scope="module")
def stage(made, tmp_path_factory):
    """Where mistakes are made: wrong files, damaged models. None may change it."""
    folder = tmp_path_factory.mktemp("stage")
    shutil.copy(made / "my.txt", folder)
    (folder / "empty.txt").write_text("")
    (folder / "short.txt").write_text("To be, or not to be\n")
    (folder / "one.txt").write_text("a")
    (folder / "picture.png").write_bytes(PNG)
    (folder / "notes").mkdir()
    (folder / "notes" / "mine.txt").write_text("mine\n")
    (folder / "dangling").symlink_to("nowhere")
    for name in ("run", "cut", "other", "scrambled", "lost"):
        shutil.copytree(made / "run", folder / name)
    for name in ("broken-run", "deep-run", "wide-run", "dataless", "edited"):
        shutil.copytree(made / "run", folder / name)
    shutil.copytree(made / "run" / "data", folder / "tokens")
    edit(folder / "cut" / "model.safetensors", lambda content: content[:1000])
    edit(folder / "other" / "config.json", put("n_embd", value=32))
    edit(folder / "scrambled" / "tokenizer.json", lambda content: content[:100])
    (folder / "lost" / "model.safetensors").unlink()
    edit(folder / "broken-run" / "run.json", lambda content: content[:50])
    edit(folder / "deep-run" / "run.json", lambda content: b"[" * 100_000)
    edit(folder / "wide-run" / "run.json", put("model", "width", value=10**12))
    edit(folder / "dataless" / "run.json", put("data", value="nowhere"))
    edit(folder / "edited" / "run.json", put("fingerprint", value="another"))
    return folder


NEW = ["--tokenizer", "char", "--out", "new", *TINY]
MY = ["train", "--data", "my.txt", *NEW]
FROM = ["train", "--data", "my.txt", "--init-from", "run", "--out", "new"]
WRITE = ["generate", "run", "--prompt", "the", "--tokens", "3"]

# What was typed, and words of the sentence that answers.
MISTAKES = {
    "empty text": (["train", "--data", "empty.txt", *NEW], "empty.txt has no text"),
    "missing text": (["train", "--data", "missing.txt", *NEW], "missing.txt"),
    "no text": (["train", "--data", "--out", "new"], "--data names nothing"),
    "short text": (["train", "--data", "short.txt", *NEW], "allow no crops of 16"),
    "picture": (
        ["train", "--data", "picture.png", *NEW],
        "picture.png, from byte 0 on",
    ),
    "picture, bpe": ([*MY, "--data", "picture.png", "--tokenizer", "bpe"], "as text"),
    "no name of a text": ([*MY, "--data", ""], "an empty name is neither"),
    "uneven heads": ([*MY, "--width", "15"], "width 15"),
    "no layers": ([*MY, "--layers", "0"], "layers"),
    "far too many layers": ([*MY, "--layers", "100000000"], "lower width, layers"),
    "far too wide": ([*MY, "--width", "100000000"], "lower width, layers"),
    "no steps": ([*MY, "--steps", "0"], "glassgpt: --steps must be"),
    "no batch": ([*MY, "--batch-size", "0"], "glassgpt: --batch-size must be"),
    "twenty digits": ([*MY, "--steps", "9" * 20], "steps"),
    "no part of it": ([*MY, "--clip", "nan"], "clip"),
    "unknown device": ([*MY, "--device", "abacus"], "abacus"),
    "unknown precision": ([*MY, "--precision", "float3"], "float3"),
    "modern, not GPT-2's": ([*MY, "--norm", "batch"], "norm is rms or layer"),
    "diverging": ([*MY, "--learning-rate", "1e9"], "resume new --learning-rate"),
    "small vocabulary": ([*MY, "--tokenizer", "bpe", "--vocab-size", "5"], "too small"),
    "no vocabulary": (
        [*MY, "--tokenizer", "bpe", "--vocab-size", "0"],
        "--vocab-size must be at least 1, not 0",
    ),
    "no characters": ([*MY, "--vocab-size", "0"], "--vocab-size must be at least 1"),
    "a size of characters": ([*MY, "--vocab-size", "300"], "--tokenizer bpe"),
    "missing tokenizer": (
        [*MY, "--tokenizer", "nonsense"],
        "--tokenizer nonsense is neither bpe, char, gpt2 nor a tokenizer.json",
    ),
    "no tokenizer": ([*MY, "--tokenizer", "my.txt"], "my.txt"),
    "tokens with a tokenizer": ([*MY, "--data", "tokens"], "leave out --tokenizer"),
    "tokens and a text": (
        ["train", "--data", "tokens", "my.txt", "--out", "new", *TINY],
        "tokens is tokenized: give it alone as --data",
    ),
    "a text and tokens": (
        ["tokenize", "--data", "my.txt", "tokens", "--out", "new"],
        "tokens is tokenized: give it alone as --data",
    ),
    "tokens, a long context": (
        ["train", "--data", "tokens", "--out", "new", *TINY, "--context", "100000"],
        "allow no crops of 100000",
    ),
    "no checkpoints": (
        [*MY, "--checkpoint-every", "0"],
        "--checkpoint-every must be at least 1",
    ),
    "none that stay": ([*MY, "--keep", "0"], "glassgpt: --keep must be at least 1"),
    "below a file": ([*MY, "--out", "my.txt/new"], "Not a directory"),
    "into a file": ([*MY, "--out", "my.txt"], "my.txt is no folder"),
    "into tokens": ([*MY, "--out", "tokens"], "tokens is not empty"),
    "among other files": ([*MY, "--out", "notes"], "notes is not empty, mine.txt"),
    "into a link to nothing": ([*MY, "--out", "dangling"], "dangling is no folder"),
    "into a run": ([*MY, "--out", "run"], "holds a run"),
    "with another width": (
        [*MY, "--out", "run", "--resume", "--width", "8"],
        "--width",
    ),
    "with a size": ([*MY, "--out", "run", "--resume", "--size", "xl"], "--size"),
    "with another text": (
        [*MY, "--out", "run", "--resume", "--data", "short.txt"],
        "--data",
    ),
    "from a model with a width": ([*FROM, "--width", "8"], "leave out --width"),
    "from a model with dropout": ([*FROM, "--dropout", "0.1"], "leave out --dropout"),
    "from a model with a tokenizer": ([*FROM, "--tokenizer", "bpe"], "--tokenizer"),
    "from no model": ([*FROM, "--init-from", "notes"], "config.json is missing"),
    "from a model, other tokens": (
        ["train", "--data", "tokens", "--init-from", "shakespeare", "--out", "new"],
        "another tokenizer",
    ),
    "tokens of tokens": (["tokenize", "--data", "tokens", "--out", "new"], "already"),
    "tokens of nothing": (["tokenize", "--data", "empty.txt", "--out", "new"], "text"),
    "tokens over a folder": (["tokenize", "--out", "run"], "exists already"),
    "tokens below a file": (
        ["tokenize", "--data", "my.txt", "--tokenizer", "char", "--out", "my.txt/new"],
        "my.txt",
    ),
    "resume nothing": (["resume", "new"], "new holds no run"),
    "resume no run": (["resume", "notes"], "notes holds no run"),
    "resume a damaged run": (["resume", "broken-run"], "damaged"),
    "resume a deep run": (["resume", "deep-run"], "damaged"),
    "resume a wide run": (["resume", "wide-run"], "wide-run"),
    "resume without data": (["resume", "dataless"], "where it is now"),
    "resume with other tokens": (["resume", "edited"], "other tokens"),
    "temperature 0": ([*WRITE, "--temperature", "0"], "temperature"),
    "temperature NaN": ([*WRITE, "--temperature", "nan"], "temperature"),
    "top-k 0": ([*WRITE, "--top-k", "0"], "--top-k"),
    "top-p 0": ([*WRITE, "--top-p", "0"], "top_p"),
    "negative length": ([*WRITE, "--tokens", "-5"], "--tokens at least 0"),
    "no samples": ([*WRITE, "--samples", "0"], "--samples must be at least 1"),
    "answers of nothing": (["chat", "run", "--tokens", "0"], "--tokens must be at"),
    "negative seed": ([*WRITE, "--seed", "-1"], "seed"),
    "empty prompt": ([*WRITE, "--prompt", ""], "at least one token"),
    "unknown character": ([*WRITE, "--prompt", "\u6f22"], "not in the vocabulary"),
    "half a character": ([*WRITE, "--prompt", "\udce9"], "not UTF-8"),
    "missing model": (["generate", "missing"], "missing holds no model"),
    "half a model": (["generate", "lost"], "model.safetensors is missing"),
    "cut short": (["generate", "cut"], "damaged"),
    "another size": (["generate", "other"], "config.json"),
    "damaged tokenizer": (["generate", "scrambled"], "tokenizer.json is damaged"),
    "a file as model": (["generate", "my.txt"], "my.txt"),
    "evaluate a picture": (["evaluate", "run", "picture.png"], "as text"),
    "evaluate too little": (["evaluate", "run", "one.txt"], "text of one token"),
}


# What was typed wrong, and words of the sentence that answers.
WRONG_WORDS = {
    "misspelled command": (["trian"], "trian. Do you mean train? See glassgpt --help"),
    "misspelled, with options": (
        ["tain", "--data", "x"],
        "tain. Do you mean train? See",
    ),
    "unknown choice": ([*MY, "--optimizer", "adam"], "Expected one of ("),
    "no command": (["xyz"], "There are train, resume, generate, chat"),
    "unknown option": ([*MY, "--learning-pace", "1"], "Do you mean --learning-rate"),
    "unknown option of another": ([*WRITE, "--topk", "5"], "Do you mean --top-k"),
    "unknown option of none": (["--versoin"], "Unrecognized options: --versoin"),
    "unknown size": ([*MY, "--size", "huge"], "'huge' for argument '--size'"),
    "unknown weights": ([*WRITE, "--weights", "int3"], "int3"),
    "a text without --data": (
        ["train", "my.txt", "--steps", "3"],
        "my.txt. Do you mean --data my.txt? See glassgpt train --help",
    ),
    "texts without --data": (
        ["tokenize", "my.txt", "two words"],
        "Do you mean --data my.txt 'two words'? See glassgpt tokenize --help",
    ),
    "number in letters": ([*MY, "--steps", "many"], "See glassgpt train --help"),
    "number after an equals sign": ([*MY, "--steps=many"], "'many'"),
    "no number": ([*MY, "--steps"], "Missing value for argument '--steps'"),
    "five thousand digits": ([*MY, "--steps", "9" * 5000], "--steps"),
    "no model": (["generate"], "MODEL"),
    "evaluate nothing": (["evaluate", "run"], "TEXT"),
    "resume with a width": (
        ["resume", "run", "--width", "9"],
        "options: --width, 9. See glassgpt resume --help",
    ),
    "resume with no tied": (["resume", "run", "--no-tied"], "--no-tied"),
}


def sentence_in(errors):
    """The one line that says what is wrong."""
    assert errors.startswith("glassgpt: "), errors
    assert errors.count("\n") == 1, errors
    return errors


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_a_sentence(stage, monkeypatch, capsys, mistake):
    words, expected = MISTAKES[mistake]
    monkeypatch.chdir(stage)
    shutil.rmtree("new", ignore_errors=True)  # of a mistake that failed its test
    before = hashes(stage)
    assert glass(*words) == 2
    assert expected in sentence_in(capsys.readouterr().err)
    if mistake == "diverging":  # fails in training, and leaves the run that began
        shutil.rmtree(stage / "new")
    assert hashes(stage) == before
    assert not (stage / "new").exists()


@pytest.mark.parametrize("mistake", WRONG_WORDS)
def test_wrong_words_get_a_sentence(stage, monkeypatch, capsys, mistake):
    words, expected = WRONG_WORDS[mistake]
    monkeypatch.chdir(stage)
    monkeypatch.setenv("COLUMNS", "200")
    before = hashes(stage)
    assert glass(*words) == 2
    shown = capsys.readouterr()
    assert expected in sentence_in(shown.err)
    assert "--help" in shown.err
    assert "'None'" not in shown.err  # what isn't given can't be typed
    assert shown.out == ""
    assert hashes(stage) == before


@pytest.mark.parametrize("place", [0, 1], ids=["at --out", "where it was called"])
def test_what_a_mistake_leaves_is_caught(place):
    def leaving(words):
        code = main(words)
        if code and "--out" in words:
            (Path(words[-1]) if place == 0 else Path("left")).mkdir()
        return code

    with pytest.raises(AssertionError, match=r"left (new|left) behind"):
        check_mistakes(leaving)


def refuses_everything(words):
    print("glassgpt: not today, try again", file=sys.stderr)
    return 2


def does_nothing(words):
    try:
        code = main(words)
    finally:
        shutil.rmtree("new", ignore_errors=True)
    return code


def refuses_what_is_right(words):
    return main(words) or refuses_everything(words)


def hides_faults(words):
    try:
        return main(words)
    except Exception as error:
        print(f"glassgpt: something went wrong: {error}", file=sys.stderr)
        return 2


def chatters(words):
    code = main(words)
    if code == 2:
        print("\n".join(map(str, range(40))), file=sys.stderr)
    return code


def echoes(words):
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        code = main(words)
    if code == 2:
        print("glassgpt:", *words, file=sys.stderr)
    return code


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (chatters, "more than a sentence"),
        (echoes, "did not say what was wrong"),
        (refuses_everything, "names no missing.txt"),
        (refuses_what_is_right, "without a mistake was refused"),
        (does_nothing, "wrote no tokens"),
        (hides_faults, "was hidden"),
    ],
)
def test_a_wrong_command_is_caught(wrong, said):
    with pytest.raises(AssertionError, match=said):
        check_mistakes(wrong)


@pytest.mark.parametrize("option", ["--keep", "--checkpoint-every"])
def test_saving_is_checked_before_the_text_is_read(stage, monkeypatch, capsys, option):
    monkeypatch.chdir(stage)
    monkeypatch.setattr(cli.Train, "ready_tokenizer", None)  # would be called next
    assert glass(*MY, option, "0") == 2
    assert "must be at least 1" in sentence_in(capsys.readouterr().err)


@pytest.mark.parametrize("mistake", ["picture", "cut short"])
def test_a_mistake_in_the_shell(stage, mistake):
    words, expected = MISTAKES[mistake]
    done = script(*words, cwd=stage)
    assert done.returncode == 2
    assert expected in sentence_in(done.stderr)


FAULTS = {
    "a ValueError that no sentence was written for": "int('many')",
    "one that a library raised": "__import__('torch').ones(2).numpy().reshape(3)",
    "another kind": "{}['key']",
    "a module that is missing": "import nowhere.to_be_found",
}


def in_a_file(monkeypatch, line, folder=Path(glassgpt.__file__).parent):
    """A method with one line, as if it stood in a file of the package or elsewhere."""
    name, lines = str(folder / "made_up.py"), ["def made_up(self):\n", f"    {line}\n"]
    monkeypatch.setitem(linecache.cache, name, (1, None, lines, name))
    space = {}
    exec(compile("".join(lines), name, "exec"), space)
    return space["made_up"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_ours_keeps_its_traceback(monkeypatch, fault):
    faulty = in_a_file(monkeypatch, FAULTS[fault])
    monkeypatch.setattr(cli.Generate, "run", faulty)
    with pytest.raises((ValueError, KeyError, ModuleNotFoundError)):
        main(["generate", "shakespeare"])


def test_what_the_package_refuses_is_a_mistake(monkeypatch, capsys):
    line = "raise ValueError('no such thing')"
    monkeypatch.setattr(cli.Generate, "run", in_a_file(monkeypatch, line))
    assert main(["generate", "shakespeare"]) == 2
    assert sentence_in(capsys.readouterr().err) == "glassgpt: no such thing\n"
    other = in_a_file(monkeypatch, line, Path("elsewhere"))
    monkeypatch.setattr(cli.Generate, "run", other)
    with pytest.raises(ValueError, match="no such thing"):
        main(["generate", "shakespeare"])


@pytest.mark.parametrize("tokenizer", ["char", "bpe"])
def test_train_writes_a_model(made, tmp_path, tokenizer, capsys):
    words = ["--tokenizer", tokenizer, "--out", tmp_path / "run", *TINY]
    words += ["--vocab-size", "280"] if tokenizer == "bpe" else []
    assert glass("train", "--data", made / "my.txt", *words) == 0
    printed = capsys.readouterr().out
    for step in (3, 6):
        (line,) = (x for x in printed.splitlines() if x.startswith(f"step {step}:"))
        for said in ("training loss", "validation loss", "nats a char", "tokens/s"):
            assert said in line
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    assert [record["step"] for record in records] == [3, 6]
    model, its_tokenizer = load(tmp_path / "run")
    assert model.config.vocab_size == its_tokenizer.vocab_size
    assert its_tokenizer.decode(its_tokenizer.encode("the cat")) == "the cat"


def test_the_folder_of_a_run_is_named_after_its_text(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["train", "--data", made / "my.txt", "--tokenizer", "char", *TINY]
    assert glass(*words) == 0
    assert (tmp_path / "runs" / "my" / "run.json").exists()


def test_the_folder_of_a_pattern(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(made / "my.txt", tmp_path)
    assert glass("train", "--data", "*.txt", "--tokenizer", "char", *TINY) == 0
    assert (tmp_path / "runs" / "run" / "run.json").exists()


def test_tokenize_then_train_on_the_tokens(made, tmp_path):
    text, tokens = made / "my.txt", tmp_path / "tokens"
    words = ["--data", text, "--tokenizer", "char", "--out", tokens]
    assert glass("tokenize", *words) == 0
    before = hashes(tokens)
    out = tmp_path / "run"
    assert glass("train", "--data", tokens, "--out", out, *TINY) == 0
    assert hashes(tokens) == before
    ours, theirs = TokenData.open(tokens), TokenData.open(made / "run" / "data")
    assert ours.fingerprint == theirs.fingerprint
    assert equal(weights(out), weights(made / "run"))
    tokens.rename(tmp_path / "moved")
    assert glass("resume", out, "--steps", "9") == 2
    assert glass("resume", out, "--steps", "9", "--data", tmp_path / "moved") == 0
    assert glass("resume", out) == 0  # it remembers the new place


def test_data_of_a_run_that_was_moved_out_of_it(run, tmp_path, capsys):
    (run / "data").rename(tmp_path / "elsewhere")
    assert glass("resume", run, "--steps", "9") == 2
    assert "where it is now" in capsys.readouterr().err
    assert glass("resume", run, "--steps", "9", "--data", tmp_path / "elsewhere") == 0


def test_several_texts_and_what_is_skipped(made, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "b.txt", "c.txt"):
        write_text(tmp_path / name)
    (tmp_path / "d.txt").write_bytes(PNG)
    lines = [json.dumps({"text": "the cat sat.\n" * 20}) + "\n" for _ in range(3)]
    (tmp_path / "e.jsonl").write_text("".join(lines))
    words = ["train", "--tokenizer", "char", *TINY, "--data", "*.txt", "e.jsonl"]
    assert glass(*words, "--out", "run") == 2
    assert not Path("run").exists()
    capsys.readouterr()
    assert glass(*words, "--out", "run", "--skip") == 0
    assert sentence_in(capsys.readouterr().err).count("d.txt") == 1


def test_a_folder_called_shakespeare_is_that_folder(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shakespeare").mkdir()
    write_text(tmp_path / "shakespeare" / "mine.txt")
    assert glass("train", "--tokenizer", "char", *TINY, "--out", "run") == 0
    assert load("run")[0].config.vocab_size < 30
    shutil.rmtree("shakespeare")
    Path("run").rename("shakespeare")
    assert load("shakespeare")[0].config.layers == 1


def test_resume_goes_on_extends_and_changes(run, made, tmp_path, capsys):
    assert glass("resume", run) == 0
    assert "going on from checkpoint-00000006" in capsys.readouterr().out
    assert equal(weights(run), weights(made / "run"))
    changes = ["--evaluate-every", "2", "--accumulate", "2", "--learning-rate", "0.001"]
    assert glass("resume", run, "--steps", "8", *changes, "--keep", "1") == 0
    printed = capsys.readouterr().out
    for said in ("steps 8 (was 6)", "accumulate 2 (was 1)", "step 8:"):
        assert said in printed
    assert len([*run.glob("checkpoint-*")]) == 1


def test_one_line_begins_and_goes_on(made, tmp_path, capsys):
    line = ["train", "--data", made / "my.txt", "--tokenizer", "char", *TINY]
    line += ["--no-tied", "--out", tmp_path / "run", "--resume"]
    assert glass(*line) == 0
    assert glass(*line) == 0
    assert "going on from checkpoint-00000006" in capsys.readouterr().out
    line[line.index("--no-tied")] = "--tied"
    assert glass(*line) == 2
    assert "--tied" in capsys.readouterr().err
    line.remove("--tied")
    line[line.index("--steps") + 1] = "9"
    assert glass(*line) == 0
    assert "steps 9 (was 6)" in capsys.readouterr().out


def test_a_run_that_no_line_began_is_resumed_by_its_folder(run, capsys):
    line = ["train", "--tokenizer", "char", *TINY, "--out", run, "--resume"]
    for content in (b"[1", b"7", b"[" * 100_000):
        (run / ".command.json").write_bytes(content)
        assert glass(*line) == 2
        said = sentence_in(capsys.readouterr().err)
        assert f"does not say what began it: use `glassgpt resume {run}`" in said
    (run / ".command.json").unlink()
    assert glass(*line) == 2
    said = sentence_in(capsys.readouterr().err)
    assert f"does not say what began it: use `glassgpt resume {run}`" in said


def test_the_tokenizer_of_a_run(made, tmp_path):
    words = ["--data", made / "my.txt", "--tokenizer", made / "run"]
    assert glass("tokenize", *words, "--out", tmp_path / "tokens") == 0
    assert filecmp.cmp(made / "run/tokenizer.json", tmp_path / "tokens/tokenizer.json")


@pytest.mark.parametrize("more", [[], ["--resume"]])
@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit(143)])
def test_a_start_that_is_stopped_leaves_nothing(
    made, tmp_path, monkeypatch, stop, more
):
    line = ["train", "--data", made / "my.txt", "--tokenizer", "char", *TINY]
    line += ["--out", tmp_path / "run", *more]

    def stopped(*_, **__):
        raise stop

    with monkeypatch.context() as patch:
        patch.setattr(glassgpt, "start_run", stopped)
        assert glass(*line) in (130, 143)
        assert not (tmp_path / "run").exists()
    assert glass(*line) == 0


def test_one_line_begins_again_after_a_kill_before_the_run(made, tmp_path, monkeypatch):
    line = ["train", "--data", made / "my.txt", "--tokenizer", "char", *TINY]
    line += ["--out", tmp_path / "run", "--resume"]
    assert glass(*line) == 0
    before = weights(tmp_path / "run")
    for path in (tmp_path / "run").iterdir():
        if path.name not in ("data", ".command.json"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert glass(*line[:-1]) == 2  # without --resume nothing is taken over
    assert glass(*line, "--dropout", "0.1") == 2  # nor by another line
    monkeypatch.setattr(glassgpt, "tokenize", None)  # not again
    assert glass(*line) == 0
    assert equal(weights(tmp_path / "run"), before)


def test_fine_tuning_begins_with_the_other_model(made, run, tmp_path, capsys):
    words = ["train", "--data", made / "my.txt", "--init-from", run]
    words += ["--steps", "3", "--batch-size", "4", "--device", "cpu"]
    assert glass(*words, "--out", tmp_path / "tuned") == 0
    first = tmp_path / "tuned" / "checkpoint-00000000"
    assert equal(weights(first), weights(run))
    assert not equal(weights(tmp_path / "tuned"), weights(run))
    assert load(tmp_path / "tuned")[0].config == load(run)[0].config
    assert "adamw" in capsys.readouterr().out


def test_evaluate_gives_the_loss_of_every_token(made, tmp_path, capsys):
    model, tokenizer = load(made / "run")
    for length in (2, 16, 17, 18, 1000):  # the context is 16
        text = (made / "my.txt").read_text("utf-8")[:length]
        (tmp_path / "part.txt").write_text(text)
        assert glass("evaluate", made / "run", tmp_path / "part.txt") == 0
        printed = capsys.readouterr().out.split()
        (ids,) = torch.tensor([tokenizer.encode(text)])
        parts = zip(ids[:-1].split(16), ids[1:].split(16), strict=True)
        with torch.no_grad():
            each = [
                model(x[None])[0].log_softmax(1)[range(len(y)), y] for x, y in parts
            ]
        total = -torch.cat(each).double().sum().item()
        loss = total / (length - 1)
        assert float(printed[1]) == pytest.approx(loss, abs=1e-4)
        assert float(printed[5]) == pytest.approx(total / length, abs=1e-4)
        assert float(printed[10][:-1]) == pytest.approx(math.exp(loss), rel=1e-3)


def test_generate_repeats_with_a_seed(made, capsys):
    words = ["generate", made / "run", "--prompt", "the cat", "--tokens", "30"]
    written = []
    for seed in (1, 1, 2):
        assert glass(*words, "--seed", seed) == 0
        written.append(capsys.readouterr().out)
    assert written[0] == written[1] != written[2]
    assert written[0].startswith("the cat")
    assert len(written[0]) == len("the cat") + 30 + len("\n")
    assert glass(*words, "--seed", "1", "--samples", "2") == 0
    assert capsys.readouterr().out == "---\n".join([written[0], written[2]])


@pytest.mark.parametrize("weights", ["auto", "bfloat16", "float16", "int8"])
def test_generate_with_lighter_weights(made, capsys, weights):
    words = ["generate", made / "run", "--prompt", "the", "--tokens", "20"]
    assert glass(*words, "--weights", weights, "--seed", "1") == 0
    assert len(capsys.readouterr().out) == len("the") + 20 + len("\n")


def test_a_prompt_from_a_pipe(made, monkeypatch, capsys):
    words = ["generate", made / "run", "--tokens", "2", "--prompt", "-"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"the old\ndog")))
    assert glass(*words) == 0
    assert capsys.readouterr().out.startswith("the old\ndog")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff")))
    assert glass(*words) == 2
    assert "not UTF-8" in sentence_in(capsys.readouterr().err)


def test_without_a_prompt_characters_begin_with_what_they_know(tmp_path, capsys):
    model = GPT(GPTConfig(3, context=4, layers=1, heads=1, width=4))
    save(tmp_path / "model", model, CharTokenizer("xyz"))
    assert glass("generate", tmp_path / "model", "--tokens", "5") == 0
    assert len(capsys.readouterr().out) == 1 + 5 + 1


def test_terminals_of_other_encodings(made, tmp_path):
    model = GPT(GPTConfig(257, context=8, layers=1, heads=1, width=8))
    save(tmp_path / "bytes", model, BPETokenizer.train("", 257))
    words = ["generate", tmp_path / "bytes", "--tokens", "3", "--prompt", "日"]
    ascii_only = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    for changed in ({"PYTHONIOENCODING": "cp1252"}, ascii_only):
        done = script(*words, env={**os.environ, **changed})
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("?")


def test_refused_settings_leave_nothing_on_the_screen(made, capsys):
    assert glass("generate", made / "run", "--temperature", "0") == 2
    assert capsys.readouterr().out == ""


def test_warnings_are_sentences_even_where_they_are_errors(made, tmp_path):
    words = ["tokenize", "--data", made / "my.txt", "--out", tmp_path / "tokens"]
    strict = {**os.environ, "PYTHONWARNINGS": "error::UserWarning"}
    done = script(*words, "--vocab-size", "5000", env=strict)
    assert done.returncode == 0
    assert "too few pairs" in sentence_in(done.stderr)


def test_the_vocabulary_of_gpt2_is_missing(made, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("glassgpt.tokens.find_spec", lambda name: None)
    words = ["train", "--data", made / "my.txt", "--tokenizer", "gpt2"]
    assert glass(*words, "--out", tmp_path / "run") == 2
    assert "pip install 'glassgpt[gpt2]'" in sentence_in(capsys.readouterr().err)


def test_a_missing_extra_is_told_before_any_work(made, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "find_spec", lambda name: None)
    words = ["train", "--data", made / "my.txt", "--out", tmp_path / "run", *TINY]
    assert glass(*words, "--tensorboard") == 2
    assert "pip install 'glassgpt[tensorboard]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_tensorboard_gets_every_record(made, tmp_path):
    name = "tensorboard.backend.event_processing.event_accumulator"
    events = pytest.importorskip(name)
    words = ["--tokenizer", "char", *TINY, "--out", tmp_path / "run", "--tensorboard"]
    assert glass("train", "--data", made / "my.txt", *words) == 0
    seen = []
    for path in sorted((tmp_path / "run").glob("events.out.tfevents.*")):
        board = events.EventAccumulator(str(path))
        board.Reload()
        seen += [event.step for event in board.Scalars("validation_loss")]
    assert sorted(seen) == [3, 6]


def test_a_second_run_never_removes_the_first(made, tmp_path, monkeypatch, capsys):
    """The second begins and ends while the first reads."""
    words = ["train", "--data", made / "my.txt", "--tokenizer", "char", *TINY]
    words += ["--out", tmp_path / "run"]
    inner, codes = glassgpt.data.read_documents, []

    def slow(*sources, **options):
        monkeypatch.setattr(cli, "read_documents", inner)
        codes.append(glass(*words))
        return inner(*sources, **options)

    monkeypatch.setattr(cli, "read_documents", slow)
    assert glass(*words) == 2
    assert codes == [0]
    assert load(tmp_path / "run")
    assert glass("resume", tmp_path / "run") == 0
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_a_start_never_removes_the_tokens_of_another(made, tmp_path, monkeypatch):
    """The other has encoded, and its run.json is yet to come."""
    inner, data = cli.read_documents, tmp_path / "run" / "data"

    def slow(*sources, **options):
        shutil.copytree(made / "run" / "data", data)
        return inner(*sources, **options)

    monkeypatch.setattr(cli, "read_documents", slow)
    words = ["train", "--data", made / "my.txt", "--tokenizer", "char", *TINY]
    assert glass(*words, "--out", tmp_path / "run") == 2
    assert hashes(data) == hashes(made / "run" / "data")


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals")
def test_ending_a_start_leaves_nothing(made, tmp_path):
    code = """
        import os, signal, sys
        from glassgpt import cli
        def ended(*arguments, **options):
            os.kill(os.getpid(), signal.SIGTERM)
        cli.read_documents = ended
        sys.argv[1:] = ["train", "--data", "my.txt", "--out", "run"]
        sys.exit(cli.main())
    """
    (tmp_path / "my.txt").write_bytes((made / "my.txt").read_bytes())
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, cwd=tmp_path, check=False)
    assert done.returncode == 128 + signal.SIGTERM
    assert [path.name for path in tmp_path.iterdir()] == ["my.txt"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals")
@pytest.mark.parametrize("command", [[SCRIPT], [sys.executable, "-m", "glassgpt"]])
@pytest.mark.parametrize("library", ["torch", "tyro"])
def test_ctrl_c_while_the_libraries_load_is_quiet(tmp_path, command, library):
    (tmp_path / library).mkdir()
    code = "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nNone\n"
    (tmp_path / library / "__init__.py").write_text(code)
    places = [str(tmp_path), str(Path(glassgpt.__file__).parents[1])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(places)}
    done = subprocess.run([*command, "--version"], env=env, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"")
    other = [sys.executable, "-c", "import glassgpt.cli"]
    done = subprocess.run(other, env=env, capture_output=True)
    assert b"KeyboardInterrupt" in done.stderr  # a program of others keeps it


def test_a_program_that_calls_main_keeps_its_handlers():
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    assert glass("generate", "no-model") == 2
    assert [signal.getsignal(number) for number in numbers] == before


@pytest.mark.skipif(sys.platform == "win32", reason="pipes break otherwise")
def test_output_that_nobody_reads_any_more_is_no_mistake(made):
    command = [str(SCRIPT), "generate", str(made / "run"), "--tokens", "3000"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as process:
        process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_and_resumed_it_reaches_the_same_weights(made, tmp_path, number):
    words = ["train", "--data", made / "my.txt", "--tokenizer", "char", *TINY]
    words += ["--steps", "200", "--evaluate-every", "20", "--checkpoint-every", "200"]
    assert glass(*words, "--out", tmp_path / "whole") == 0
    command = [str(word) for word in (SCRIPT, *words, "--out", tmp_path / "run")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, **pipes) as process:
        for line in process.stdout:
            if line.startswith("step 20:"):
                break
        process.send_signal(number)
        rest = process.stdout.read()
    assert process.returncode == 128 + number
    assert "glassgpt resume" in rest
    checkpoint = max((tmp_path / "run").glob("checkpoint-*"))
    assert 20 <= int(checkpoint.name.split("-")[1]) < 200
    assert glass("resume", tmp_path / "run") == 0
    assert equal(weights(tmp_path / "run"), weights(tmp_path / "whole"))


COMMANDS = {kind.__name__.lower(): kind for kind in cli.COMMANDS}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_every_option_with_its_words(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    assert glass(command, "--help") == 0
    shown = capsys.readouterr().out
    names = [f.name for f in fields(COMMANDS[command])]
    settings = {"settings", "changes", "sampling"} & {*names}
    about = comments(COMMANDS[command])
    for name in {*names} - settings:
        assert name.replace("_", "-") in shown.lower()
        assert about[name] in shown, name
    if command == "train":
        for kind in cli.KINDS:
            for field in {f.name for f in fields(kind)} - {"vocab_size"}:
                assert f"--{field.replace('_', '-')}" in shown
                assert comments(kind)[field] in shown, field
        sizes = comments(cli.Choices)["size"]
        for layers, heads, width in [*SIZES.values()][:2]:
            assert f"{layers}/{heads}/{width}" in sizes
        assert f"({cli.suited()['steps']} here)" in shown
        usual = inspect.signature(glassgpt.start_run).parameters
        for name in ("checkpoint_every", "keep"):
            assert cli.suited()[name] == usual[name].default
        assert "how many checkpoints stay (2 here)" in shown


def test_without_words_the_help_is_shown(capsys):
    assert glass() == 0
    shown = capsys.readouterr().out
    assert all(command in shown for command in COMMANDS)
    assert address.current(ROOT)[1] in shown
    for example in re.findall(r"(?m)^  glassgpt (.+)$", shown):
        assert cli.parse(example.split())


def test_the_help_of_chat_names_what_can_be_typed_in_it(capsys):
    assert glass("chat", "--help") == 0
    shown = capsys.readouterr().out
    assert "/system TEXT" in shown
    assert "/reset" in shown


def test_help_names_no_none(capsys):
    assert glass("train", "--help") == 0
    shown = capsys.readouterr().out
    assert not re.search(r"None|True|False", shown)
    assert "(on here)" in shown


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion(shell, capsys):
    assert not glass("--tyro-print-completion", shell)
    assert "--learning-rate" in capsys.readouterr().out


def test_version(capsys):
    assert glass("--version") == 0
    assert capsys.readouterr().out == f"{glassgpt.__version__}\n"


def test_as_a_module(made):
    command = [sys.executable, "-m", "glassgpt", "generate", made / "missing"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "missing" in sentence_in(done.stderr)


def test_transformers_reads_a_run(made):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(made / "run")
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(made / "run")
    ours, our_tokenizer = load(made / "run")
    ids = our_tokenizer.encode("the old dog")
    assert their_tokenizer.encode("the old dog") == ids
    assert their_tokenizer.model_max_length == ours.config.context
    with torch.no_grad():
        expected = ours(torch.tensor([ids]))
        torch.testing.assert_close(theirs(torch.tensor([ids])).logits, expected)


ROOT = Path(__file__).parent.parent


def blocks(language, name="README.md"):
    """The blocks of code in a Markdown file of the root."""
    text = (ROOT / name).read_text("utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_the_commands_of_the_readme_are_commands():
    lines = [x for x in "".join(blocks("bash")).splitlines() if x[:9] == "glassgpt "]
    assert len(lines) >= 5
    for line in lines:
        assert cli.parse(shlex.split(line, comments=True)[1:]), line


def test_the_programs_of_the_readme_run(made, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copy(made / "my.txt", tmp_path)
    first, second, third = blocks("python")
    exec(first, {})
    assert capsys.readouterr().out.startswith("ROMEO:")
    sizes = "steps=3, layers=1, width=16, context=16, batch_size=4"
    exec(second.replace("1024", "270").replace("steps=500", sizes), {})
    assert "'validation_loss'" in capsys.readouterr().out
    assert glass("generate", "runs/python", "--tokens", "3") == 0
    exec(third.replace("steps=100", "steps=40"), {})
    model, tokenizer = load("assistant")
    ids, _ = render([{"role": "user", "content": "Who are you?"}], tokenizer, True)
    answer = generate(model, ids, 9, [tokenizer.special_tokens["<|end|>"]], top_k=1)
    assert tokenizer.decode(answer[len(ids) :]) == "A small GPT."


def count(words):
    """The solution of exercise 2; the wrong ones below break one rule each."""
    if len(words) != 1:
        print("count: give it one FILE", file=sys.stderr)
        return 2
    print(len(Path(words[0]).read_text("utf-8")))
    return 0


def count_well(words):
    try:
        return count(words)
    except (OSError, ValueError) as error:
        print(f"count: {error}", file=sys.stderr)
        return 2


def count_with_a_traceback(words):
    try:
        return count(words)
    except (OSError, ValueError):
        traceback.print_exc()
        return 2


def count_and_hide(words):
    try:
        return count(words)
    except BaseException:
        print("something went wrong", file=sys.stderr)
        return 2


def count_and_hide_well(words):
    try:
        return count(words)
    except BaseException:
        print(f"count: {words[0]} is wrong", file=sys.stderr)
        return 2


def count_nothing(words):
    if words == ["four.txt"]:
        print(4)
        return 0
    print(f"count: what is {words}", file=sys.stderr)
    return 2


def count_by_argparse(words):
    parser = argparse.ArgumentParser(prog="count")
    parser.add_argument("file")
    try:
        with open(parser.parse_args(words).file, encoding="utf-8") as text:
            print(len(text.read()))
    except (OSError, UnicodeDecodeError) as error:
        parser.error(str(error))


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (count_with_a_traceback, "no sentence, but"),
        (count_and_hide, "names no missing.txt"),
        (count_and_hide_well, "was hidden"),
        (count_nothing, "seven.txt` left with exit code 2"),
        (count_well, None),
        (lambda words: count_by_argparse(words) or 0, None),
    ],
)
def test_the_check_of_exercise_2(tmp_path, answer, said):
    cells = nbformat.read(ROOT / "book/23_command_line.ipynb", 4).cells
    (source,) = (c.source for c in cells if c.id == "exercise-main-check")
    space = {"folder": tmp_path, "io": io, "contextlib": contextlib, "patch": patch}
    exec(source.partition("grade(")[0], space)
    with contextlib.chdir(tmp_path):
        if said is None:
            return space["check_count_main"](answer)
        with pytest.raises(AssertionError, match=said):
            space["check_count_main"](answer)


def test_what_agents_are_told_is_true(capsys):
    (program,), (said,) = blocks("python", "AGENTS.md"), blocks("text", "AGENTS.md")
    exec(program, {})
    assert capsys.readouterr().out == said
    text = (ROOT / "AGENTS.md").read_text("utf-8")
    name, place = re.search(r"`help\(glassgpt\.(\w+)\)` ends in `(.+?)`", text).groups()
    assert getattr(glassgpt, name).__doc__.rstrip().endswith(place)


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "AGENTS.md"])
def test_files_and_targets_that_are_named_are_there(name):
    text = (ROOT / name).read_text("utf-8")
    text = re.sub(rf"{address.current(ROOT)[0]}/(blob|raw)/main/", "", text)
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for target in re.findall(r"(?m)(?:^|`|=1 )make ([a-z]+)", text):
        assert f"\n{target}:" in makefile, target
    for path in re.findall(r"(?<![\w/])(?:book|src|tests|tools)/[\w/.]*\w", text):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"\]\(([\w./-]+)\)", text):
        assert (ROOT / path).exists(), path


def test_a_program_with_strict_types(tmp_path):
    """What `mypy --strict` knows of the names that a user's program takes."""
    api = pytest.importorskip("mypy.api")
    types = {
        "glassgpt.load('shakespeare')": "tuple[gpt.GPT, tokens.Tokenizer]",
        "tokenizer.encode('a')": "list[int]",
        "tokenizer.decode([0])": "str",
        "tokenizer.vocab_size": "int",
        "tokenizer.special_tokens": "dict[str, int]",
        "[*glassgpt.stream_text(model, tokenizer, 'a', 3)]": "list[str]",
        "glassgpt.tokenize('a', tokenizer, 'b')": "data.TokenData",
        "glassgpt.make_plan(9).training": "training.TrainConfig",
        "glassgpt.start_run": "runs.Run",
        "glassgpt.__version__": "str",
    }
    lines = ["import glassgpt", "model, tokenizer = glassgpt.load('shakespeare')"]
    lines += [f"reveal_type({code})" for code in types]
    (tmp_path / "user.py").write_text("\n".join(lines) + "\n")
    words = ["--strict", "--follow-imports=silent", "--python-executable"]
    found = api.run([*words, sys.executable, str(tmp_path / "user.py")])[0]
    told = re.findall(r'Revealed type is "(.*)"', found.replace("glassgpt.", ""))
    assert "error" not in found
    for code, due, seen in zip(types, types.values(), told, strict=True):
        assert seen.endswith(due), code


@pytest.mark.skipif(os.name == "nt", reason="closes streams as a shell does")
@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-"])
def test_a_closed_stream_is_no_fault(closed, tmp_path):
    line = f"{sys.executable} -m glassgpt generate shakespeare --tokens 2 {closed}"
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True)
    assert "Traceback" not in done.stderr
    assert done.returncode == 0


@pytest.mark.parametrize("words", [["help"], ["help", "train"]])
def test_help_is_a_word_too(words, capsys):
    assert main(words) == 0
    assert "--help" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("train --steps many", "--steps takes a whole number, not 'many'"),
        ("train --seed 1.5", "--seed takes a whole number, not '1.5'"),
        ("train --learning-rate x", "--learning-rate takes a number, not 'x'"),
        ("generate shakespeare --top-k 2.5", "--top-k takes a whole number, not '2.5'"),
    ],
)
def test_what_is_no_number_is_said_plainly(words, said, capsys):
    assert main(words.split()) == 2
    assert f"glassgpt: {said}. See" in capsys.readouterr().err
