"""The command line: a user's mistakes get a sentence, and the rest works end to end."""

import argparse
import contextlib
import filecmp
import hashlib
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
import traceback
import tracemalloc
from dataclasses import dataclass, fields, replace
from pathlib import Path
from shlex import quote
from typing import TypedDict
from unittest.mock import patch

import address
import nbformat
import pytest
import torch
import tyro

import glassgpt
from glassgpt import GPT, GPTConfig, TokenData, TrainConfig, cli, generate, load, render
from glassgpt.checkpoints import save
from glassgpt.checks.cli import check_mistakes
from glassgpt.cli import comments, main
from glassgpt.plan import SIZES
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


@pytest.fixture
def process(monkeypatch):
    """`main` as a process calls it, with words and handlers of its own."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]

    def start(*words):
        died_of = []
        monkeypatch.setattr(sys, "argv", ["glassgpt", *map(str, words)])
        monkeypatch.setattr(os, "kill", lambda _, number: died_of.append(number))
        # As while PyTorch loads: `main` has to put it back.
        signal.signal(signal.SIGINT, lambda *_: pytest.fail("left at once"))
        code = main()
        assert died_of == ([code - 128] if code > 128 and os.name == "posix" else [])
        return code

    yield start
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def weights(folder):
    return {name: p.detach() for name, p in load(folder)[0].named_parameters()}


def equal(one, two):
    return all(torch.equal(value, two[name]) for name, value in one.items())


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
    (folder / "keep").mkdir()
    (folder / "notes").mkdir()
    (folder / "notes" / "mine.txt").write_text("mine\n")
    (folder / "dangling").symlink_to("nowhere")
    for name in ("run", "damaged"):
        shutil.copytree(made / "run", folder / name)
    shutil.copytree(made / "run" / "data", folder / "tokens")
    for name in ("model.safetensors", "run.json"):
        path = folder / "damaged" / name
        path.write_bytes(path.read_bytes()[:50])
    return folder


NEW = ["--tokenizer", "char", "--out", "new", *TINY]
MY = ["train", "--data", "my.txt", *NEW]
FROM = ["train", "--data", "my.txt", "--init-from", "run", "--out", "new"]
WRITE = ["generate", "run", "--prompt", "the", "--tokens", "3"]

# What was typed, and words of the sentence that answers.
MISTAKES = {
    "empty text": (["train", "--data", "empty.txt", *NEW], "empty.txt has no text"),
    "texts twice": ([*MY, "--data", "my.txt"], "name all texts behind one --data"),
    "an empty value": ([*MY, "--init-from", ""], "--init-from has an empty value"),
    "an empty value behind a sign": ([*MY, "--init-from="], "--init-from has an empty"),
    "an empty word": (["generate", "run", ""], "a word has an empty value"),
    "missing text": (["train", "--data", "missing.txt", *NEW], "missing.txt"),
    "a text called as an option": (["train", "--data", "size.txt"], ": size.txt is"),
    "a folder called as an option": (["train", "--data", "keep"], ": keep has no text"),
    "a model called as an option": (["generate", "seed"], ": seed holds no model"),
    "short text": (["train", "--data", "short.txt", *NEW], "allow no crops of 16"),
    "picture": (
        ["train", "--data", "picture.png", *NEW],
        "picture.png, from byte 0 on",
    ),
    "uneven heads": ([*MY, "--width", "15"], "width 15"),
    "far too many layers": ([*MY, "--layers", "100000000"], "lower width, layers"),
    "no steps": ([*MY, "--steps", "0"], "glassgpt: --steps must be"),
    "unknown device": ([*MY, "--device", "abacus"], "abacus"),
    "diverging": (
        [*MY, "--optimizer", "adamw", "--learning-rate", "1e9"],
        "resume the run in new with a lower --learning-rate",
    ),
    "diverging with Muon": (
        [*MY, "--optimizer", "muon", "--matrix-learning-rate", "1e25"],
        "resume the run in new with a lower --learning-rate",
    ),
    "thirty thousand years": (
        [*MY, "--steps", "1000000000000000000"],
        "the run would take over 30,000 years: lower its steps, --batch-size or",
    ),
    "small vocabulary": (
        [*MY, "--tokenizer", "bpe", "--vocab-size", "5"],
        "--vocab-size 5 is",
    ),
    "another optimizer's option": (
        [*MY, "--optimizer", "adamw", "--matrix-learning-rate", "1"],
        "has no --matrix-learning-rate",
    ),
    "all dropped": ([*MY, "--dropout", "1"], "--dropout must lie in [0, 1)"),
    "more parts than rows": (
        [*MY, "--accumulate", "5"],
        "--accumulate can't exceed --batch-size: no",
    ),
    "a size of characters": ([*MY, "--vocab-size", "300"], "--tokenizer bpe"),
    "missing tokenizer": (
        [*MY, "--tokenizer", "nonsense"],
        "--tokenizer is bpe, char, gpt2, a tokenizer.json or a model: nonsense holds",
    ),
    "tokens with a tokenizer": (
        ["train", "--data", "tokens", *NEW],
        "leave out --tokenizer",
    ),
    "tokens and a text": (
        ["train", "--data", "tokens", "my.txt", "--out", "new", *TINY],
        "tokens is tokenized: give it alone as --data",
    ),
    "no checkpoints": (
        [*MY, "--checkpoint-every", "0"],
        "--checkpoint-every must be at least 1",
    ),
    "no UTF-8": (["generate", "shakespeare", "--prompt", "\udcff"], "surrogates not"),
    "below a file": ([*MY, "--out", "my.txt/new"], "Not a directory"),
    "into a file": ([*MY, "--out", "my.txt"], "my.txt is no folder: choose"),
    "into a link to nothing": ([*MY, "--out", "dangling"], "dangling is no folder"),
    "into a run": ([*MY, "--out", "run"], "holds a run"),
    "with another width": (
        [*MY, "--out", "run", "--resume", "--width", "8"],
        "--width",
    ),
    "with another text": (
        [*MY, "--out", "run", "--resume", "--data", "short.txt"],
        "--data",
    ),
    "from a model with a width": ([*FROM, "--width", "8"], "leave out --width"),
    "from a model with a longer context": (
        [*FROM, "--context", "17"],
        "--context must be at most 16",
    ),
    "from no model": ([*FROM, "--init-from", "notes"], "config.json is missing"),
    "from a model, other tokens": (
        ["train", "--data", "tokens", "--init-from", "shakespeare", "--out", "new"],
        "another tokenizer",
    ),
    "tokens of tokens": (["tokenize", "--data", "tokens"], "is tokenized already"),
    "tokens over a folder": (["tokenize", "--out", "run"], "exists already"),
    "resume nothing": (["resume", "new"], "new holds no run"),
    "resume a damaged run": (["resume", "damaged"], "run.json is damaged"),
    "temperature inf": (
        [*WRITE, "--temperature", "inf"],
        "glassgpt: --temperature must be finite",
    ),
    "negative length": ([*WRITE, "--tokens", "-5"], "--tokens at least 0"),
    "no samples": ([*WRITE, "--samples", "0"], "--samples must be at least 1"),
    "answers of nothing": (["chat", "run", "--tokens", "0"], "--tokens must be at"),
    "unknown character": ([*WRITE, "--prompt", "\u6f22"], "not in the vocabulary"),
    "missing model": (["generate", "missing"], "missing holds no model"),
    "damaged model": (["generate", "damaged"], "damaged/model.safetensors"),
    "evaluate too little": (["evaluate", "run", "one.txt"], "text of one token"),
}


# What was typed wrong, and words of the sentence that answers.
WRONG_WORDS = {
    "misspelled command": (["trian"], "trian. Do you mean train? See glassgpt --help"),
    "unknown choice": ([*MY, "--optimizer", "adam"], "one of ('adamw', 'muon')."),
    "no command": (["xyz"], "Do you mean train or resume or generate"),
    "unknown option": ([*MY, "--learning-pace", "1"], "Do you mean --learning-rate"),
    "unknown option of none": (["--versoin"], "Unrecognized options: --versoin"),
    "unknown size": (
        [*MY, "--size", "huge"],
        "one of ('large', 'medium', 'micro', 'mini', 'small', 'xl').",
    ),
    "unknown schedule": (
        [*MY, "--schedule", "step"],
        "one of ('cosine', 'linear', 'stable').",
    ),
    "unknown precision": (["resume", "run", "--precision", "int4"], "'int4'"),
    "unknown weights": ([*WRITE, "--weights", "int3"], "int3"),
    "a text without --data": (
        ["train", "my.txt", "--steps", "3"],
        "my.txt. Do you mean --data my.txt? See glassgpt train --help",
    ),
    "number in letters": (
        [*MY, "--steps", "many"],
        "glassgpt: --steps can't be 'many'",
    ),
    "number after an equals sign": (
        [*MY, "--steps=many"],
        "--steps can't be 'many'. See glassgpt train --help",
    ),
    "no whole number": (
        ["generate", "run", "--top-k", "2.5"],
        "glassgpt: --top-k can't be '2.5'. See glassgpt generate --help",
    ),
    "no number": ([*MY, "--clip", "x"], "--clip can't be 'x'"),
    "five thousand digits": ([*MY, "--steps", "9" * 5000], "--steps"),
    "no model": (["generate"], "MODEL"),
    "resume with a width": (
        ["resume", "run", "--width", "9"],
        "options: --width, 9. See glassgpt resume --help",
    ),
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
    if "diverging" in mistake:  # fails in training, and leaves the run that began
        shutil.rmtree(stage / "new")
    assert hashes(stage) == before
    assert not (stage / "new").exists()


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("mistake", WRONG_WORDS)
def test_wrong_words_get_a_sentence(stage, monkeypatch, capsys, mistake, terminal):
    words, expected = WRONG_WORDS[mistake]
    monkeypatch.chdir(stage)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)  # a box with colors
    before = hashes(stage)
    assert glass(*words) == 2
    shown = capsys.readouterr()
    assert expected in sentence_in(shown.err)
    assert "--help" in shown.err
    assert "Do you mean --help" not in shown.err
    assert shown.err.strip().isprintable()
    assert "'None'" not in shown.err  # what isn't given can't be typed
    assert shown.out == ""
    assert hashes(stage) == before


def leaves_a_folder(words):
    code = main(words)
    if code and "--out" in words:
        Path(words[-1]).mkdir()
    return code


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


def takes_any_raise_for_ours(words):
    def is_mistake(error):
        last = traceback.extract_tb(error.__traceback__)[-1]
        refused = isinstance(error, ValueError) and last.line.startswith("raise ")
        return refused or isinstance(error, OSError)

    with patch.object(cli, "is_mistake", is_mistake):
        return main(words)


def takes_any_error_of_ours(words):
    def is_mistake(error):
        last = traceback.extract_tb(error.__traceback__)[-1]
        ours = Path(glassgpt.__file__).parent in Path(last.filename).parents
        refused = ours and last.line.startswith("raise ")
        return refused or isinstance(error, OSError)

    with patch.object(cli, "is_mistake", is_mistake):
        return main(words)


def hides_while_it_parses(words):
    try:
        cli.parse(words)
    except Exception as error:
        print(f"glassgpt: {error}", file=sys.stderr)
        return 2
    return main(words)


def hides_but_in_tokenize(words):
    return main(words) if words[0] == "tokenize" else catching(main, Exception)(words)


def changes_what_it_reads(words):
    code = main(words)
    if code == 2 and "picture.png" in words:
        Path("picture.png").write_bytes(b"")
    return code


def says_the_same_of_all(words):
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        code = main(words)
    if code == 2:
        said = "glassgpt: something is not right in this text:"
        print(said, *words, file=sys.stderr)
    return code


def ends_well_where_no_command_is(words):
    return main(words) if words[0].title() in vars(cli) else 0


def passes_over_options(words):
    return 0 if "--learning-pace" in words else main(words)


def prints_usage(words):
    code = main(words)
    if code == 2:
        print("usage: glassgpt COMMAND [OPTIONS]")
    return code


def catching(program, *kinds):
    """A program that takes errors of these kinds for mistakes."""

    def wrong(words):
        try:
            return program(words)
        except kinds as error:
            print(f"glassgpt: {error}", file=sys.stderr)
            return 2

    return wrong


def hides_in(command):
    """A broad `except` around one command."""
    broad = catching(main, Exception)
    return lambda words: (broad if words[0] == command else main)(words)


HIDDEN = [RuntimeError, TypeError, AttributeError, IndexError, ZeroDivisionError]
HIDDEN += [AssertionError]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (prints_usage, "printed 'usage: .*' as a result"),
        *((catching(main, k), f"hid a fault in .*, a {k.__name__}") for k in HIDDEN),
        (takes_any_raise_for_ours, "hid a fault in .*, a ValueError"),
        (takes_any_error_of_ours, "hid a fault in .*, a AttributeError"),
        (hides_while_it_parses, "hid a fault in tyro.cli, a KeyError"),
        (hides_but_in_tokenize, "hid a fault in glassgpt.load, a KeyError"),
        (hides_in("train"), "hid a fault in glassgpt.make_plan"),
        (hides_in("resume"), "hid a fault in glassgpt.resume_run"),
        (changes_what_it_reads, "changed picture.png"),
        (says_the_same_of_all, "`glassgpt tain .*`: its sentence names no train"),
        (ends_well_where_no_command_is, "`glassgpt tain .*` left with exit code 0"),
        (passes_over_options, "--learning-pace 1 .*` left with exit code 0"),
        (chatters, "more than a sentence"),
        (echoes, "did not say what was wrong"),
        (refuses_everything, "names no missing.txt"),
        (refuses_what_is_right, "without a mistake was refused"),
        (does_nothing, "wrote no tokens"),
        (leaves_a_folder, "left new behind"),
    ],
)
def test_a_wrong_command_is_caught(wrong, said):
    with pytest.raises(AssertionError, match=said):
        check_mistakes(wrong)


def test_saving_is_checked_before_the_text_is_read(stage, monkeypatch, capsys):
    monkeypatch.chdir(stage)
    monkeypatch.setattr(cli.Train, "ready_tokenizer", None)  # would be called next
    assert glass(*MY, "--keep", "0") == 2
    assert "--keep must be at least 1" in sentence_in(capsys.readouterr().err)


@pytest.mark.parametrize("command", [[SCRIPT], [sys.executable, "-m", "glassgpt"]])
def test_a_mistake_in_the_shell(command):
    done = subprocess.run([*command, "generate", "no"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "no holds no model" in sentence_in(done.stderr)


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


def test_no_memory_is_no_fault_of_ours(monkeypatch, capsys):
    line = "raise RuntimeError('CUDA out of memory. Tried to allocate 20 GiB')"
    monkeypatch.setattr(cli.Generate, "run", in_a_file(monkeypatch, line))
    assert main(["generate", "shakespeare"]) == 2
    wanted = "glassgpt: this does not fit into memory: use a smaller model"
    assert wanted in sentence_in(capsys.readouterr().err)


def test_what_the_package_refuses_is_a_mistake(monkeypatch, capsys):
    line = "raise ValueError('no such thing')"
    monkeypatch.setattr(cli.Generate, "run", in_a_file(monkeypatch, line))
    assert main(["generate", "shakespeare"]) == 2
    assert sentence_in(capsys.readouterr().err) == "glassgpt: no such thing\n"
    other = in_a_file(monkeypatch, line, Path("elsewhere"))
    monkeypatch.setattr(cli.Generate, "run", other)
    with pytest.raises(ValueError, match="no such thing"):
        main(["generate", "shakespeare"])


def test_an_evaluation_is_in_the_log_at_once(tmp_path, monkeypatch):
    with open(tmp_path / "log.txt", "w") as log:
        monkeypatch.setattr(sys, "stdout", log)
        cli.telling(None)["on_record"]({"step": 3, "validation_loss": 1.0})
        said = (tmp_path / "log.txt").read_text()
    assert said == "step 3: validation loss 1.000\n"


def test_train_writes_a_model(made, tmp_path, capsys):
    words = ["--vocab-size", "280", "--out", tmp_path / "run", *TINY]
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


@pytest.mark.parametrize(
    ("data", "name"), [("old/my.txt", "my"), ("*.txt", "run"), (".", "here")]
)
def test_the_folder_of_a_run_is_named_after_its_text(tmp_path, monkeypatch, data, name):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(cli.Train, "start", lambda self, out, asked: out)
    assert cli.parse(["train", "--data", data]).run() == Path("runs", name)


def test_what_is_held_out_teaches_byte_pairs_nothing(tmp_path, monkeypatch):
    whole = write_text(tmp_path / "my.txt").read_text("utf-8")
    monkeypatch.setattr(BPETokenizer, "train", lambda pieces, _: "".join(pieces))
    learned = cli.parse(["train", "--data", str(tmp_path / "my.txt")]).learn_tokenizer()
    assert whole.startswith(learned)
    assert 0.85 < len(learned) / len(whole) < 0.95


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
    (run / ".command.json").unlink()
    assert glass("train", "--tokenizer", "char", *TINY, "--out", run, "--resume") == 2
    assert f"or use `glassgpt resume {run}`" in sentence_in(capsys.readouterr().err)


@pytest.mark.parametrize("text", ["", "[1]", "7"])
def test_what_began_a_run_may_be_damaged(run, capsys, text):
    (run / ".command.json").write_text(text)
    assert glass("train", "--tokenizer", "char", *TINY, "--out", run, "--resume") == 2
    assert "glassgpt resume" in sentence_in(capsys.readouterr().err)


def test_tokens_without_their_tokenizer_are_named(made, tmp_path, capsys):
    shutil.copytree(made / "run" / "data", tmp_path / "tokens")
    (tmp_path / "tokens" / "tokenizer.json").unlink()
    line = ["train", "--data", tmp_path / "tokens", "--out", tmp_path / "new"]
    assert glass(*line) == 2
    assert str(Path("tokens", "tokenizer.json")) in sentence_in(capsys.readouterr().err)


def test_no_network_for_a_tokenizer_is_said(made, capsys):
    assert glass("tokenize", "--data", made / "my.txt", "--tokenizer", "gpt2-xl") == 2
    assert "load it once with a network" in sentence_in(capsys.readouterr().err)


def test_the_tokenizer_of_a_name(made, tmp_path):
    words = ["--data", made / "my.txt", "--tokenizer", "shakespeare"]
    assert glass("tokenize", *words, "--out", tmp_path / "tokens") == 0
    shipped = Path(glassgpt.__file__).parent / "models/shakespeare/tokenizer.json"
    assert filecmp.cmp(shipped, tmp_path / "tokens/tokenizer.json", shallow=False)


def test_tokenizing_characters_holds_no_text(tmp_path, monkeypatch):
    """To hold it would take 4 MB."""
    monkeypatch.setattr("glassgpt.data.PIECE", 1 << 14)
    (tmp_path / "long.txt").write_text("To be, or not to be\n" * 200_000)
    words = ["--data", tmp_path / "long.txt", "--tokenizer", "char"]
    tracemalloc.start()
    assert glass("tokenize", *words, "--out", tmp_path / "tokens") == 0
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2_000_000


@pytest.mark.parametrize("words", [["train", "--data"], ["resume"]])
def test_training_keeps_freed_memory(made, tmp_path, monkeypatch, words):
    called = []
    monkeypatch.setattr(glassgpt, "keep_freed_memory", lambda: called.append(1))
    for name in ("start_run", "resume_run"):
        monkeypatch.setattr(glassgpt, name, lambda *_, **__: called.append(2))
    monkeypatch.setattr(cli, "ended", lambda _: 0)
    more = ["--tokenizer", "char", "--out", tmp_path / "new", *TINY]
    line = [made / "my.txt", *more] if "--data" in words else [made / "run"]
    assert glass(*words, *line) == 0
    assert called == [1, 2]


def test_the_tokenizer_of_a_run(made, tmp_path):
    words = ["--data", made / "my.txt", "--tokenizer", made / "run"]
    assert glass("tokenize", *words, "--out", tmp_path / "tokens") == 0
    assert filecmp.cmp(made / "run/tokenizer.json", tmp_path / "tokens/tokenizer.json")


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("place", ["cli.read_documents", "start_run"])
def test_a_start_that_is_stopped_leaves_nothing(
    made, tmp_path, monkeypatch, process, stop, place
):
    line = ["train", "--data", made / "my.txt", "--tokenizer", "char", *TINY]
    monkeypatch.setattr(f"glassgpt.{place}", lambda *_, **__: signal.raise_signal(stop))
    assert process(*line, "--out", tmp_path / "runs" / "new") == 128 + stop
    assert not [*tmp_path.iterdir()]


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


def test_fine_tuning_may_have_a_dropout_of_its_own(made, run, tmp_path):
    words = ["train", "--data", made / "my.txt", "--init-from", run, "--dropout", "0.5"]
    words += ["--steps", "3", "--batch-size", "4", "--device", "cpu"]
    assert glass(*words, "--out", tmp_path / "tuned") == 0
    assert equal(weights(tmp_path / "tuned" / "checkpoint-00000000"), weights(run))
    model = load(tmp_path / "tuned")[0]
    assert model.config.dropout == model.blocks[0].attention.dropout == 0.5


@pytest.mark.parametrize("recipe", ["gpt2", "modern"])
def test_fine_tuning_may_have_a_shorter_context(made, recipe, tmp_path):
    long, short = tmp_path / "long", tmp_path / "short"
    words = ["train", "--data", made / "my.txt", "--device", "cpu"]
    assert glass(*words, *TINY[:-2], "--recipe", recipe, "--out", long) == 0
    shorter = ["--init-from", long, "--context", "8", "--out", short]
    assert glass(*words, *shorter, "--steps", "2") == 0
    before, after = load(long)[0], load(short / "checkpoint-00000000")[0]
    assert after.config == replace(before.config, context=8)
    ids = torch.arange(8)[None]
    assert equal({"": after(ids)}, {"": before(ids)})


def test_evaluate_gives_the_loss_of_every_token(made, tmp_path, capsys):
    model, tokenizer = load(made / "run")
    for length in (2, 17, 18, 100):  # the context is 16
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


def test_evaluate_reads_no_more_than_its_limit(made, tmp_path, capsys):
    whole = (made / "my.txt").read_text("utf-8")
    (tmp_path / "start.txt").write_text(whole[:50])
    assert glass("evaluate", made / "run", tmp_path / "start.txt") == 0
    start = capsys.readouterr().out
    assert glass("evaluate", made / "run", made / "my.txt", "--limit", "50") == 0
    assert capsys.readouterr().out == start
    assert glass("evaluate", made / "run", made / "my.txt", "--limit", "1") == 2
    assert "--limit must be at least 2" in capsys.readouterr().err


def test_links_in_a_circle_are_a_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "circle").symlink_to("circle")
    assert glass("train", "--data", "circle") == 2
    assert capsys.readouterr().err.startswith("glassgpt: ")
    assert [path.name for path in tmp_path.iterdir()] == ["circle"]


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


@pytest.mark.parametrize("weights", ["auto", "int8"])
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
    assert "'utf-8' codec can't decode" in sentence_in(capsys.readouterr().err)


def test_without_a_prompt_characters_begin_with_what_they_know(tmp_path, capsys):
    model = GPT(GPTConfig(3, context=4, layers=1, heads=1, width=4))
    save(tmp_path / "model", model, CharTokenizer("xyz"))
    assert glass("generate", tmp_path / "model", "--tokens", "5") == 0
    assert len(capsys.readouterr().out) == 1 + 5 + 1


def test_terminals_of_other_encodings(monkeypatch, process):
    """What they can't show is a question mark; what is piped in is UTF-8."""
    out = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding="cp1252"))
    stdin = io.TextIOWrapper(io.BytesIO("日".encode()), encoding="cp1252")
    monkeypatch.setattr(sys, "stdin", stdin)
    words = ["generate", "shakespeare", "--tokens", "1", "--prompt", "-"]
    assert process(*words) == 0
    assert out.getvalue().startswith(b"?")


def test_refused_settings_leave_nothing_on_the_screen(made, capsys):
    assert glass("generate", made / "run", "--temperature", "inf") == 2
    assert capsys.readouterr().out == ""


@pytest.mark.filterwarnings("error::UserWarning")
def test_warnings_are_sentences_even_where_they_are_errors(made, tmp_path, capsys):
    words = ["tokenize", "--data", made / "my.txt", "--out", tmp_path / "tokens"]
    assert glass(*words, "--vocab-size", "5000") == 0
    assert "too few pairs" in sentence_in(capsys.readouterr().err)


def test_the_vocabulary_of_gpt2_is_missing(made, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("glassgpt.tokens.find_spec", lambda name: None)
    words = ["train", "--data", made / "my.txt", "--tokenizer", "gpt2"]
    assert glass(*words, "--out", tmp_path / "run") == 2
    assert "pip install 'glassgpt[gpt2]'" in sentence_in(capsys.readouterr().err)


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


def test_a_program_that_calls_main_keeps_its_handlers():
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    assert glass("generate", "no-model") == 2
    assert [signal.getsignal(number) for number in numbers] == before


@pytest.mark.skipif(sys.platform == "win32", reason="pipes break otherwise")
def test_output_that_nobody_reads_any_more_is_no_mistake(
    made, monkeypatch, capsys, process
):
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert process("generate", made / "run", "--tokens", "3") == 141
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize(
    ("output", "code", "said"),
    [("| true", 141, 0), ("> /dev/full", 2, 1), (">&-", 0, 0)],
    ids=["nobody reads", "a full disk", "closed"],
)
@pytest.mark.parametrize("words", ["--version", "--help"])
def test_output_that_can_not_be_written(words, output, code, said):
    """Known before the end, where Python would say 120 and `Exception ignored`."""
    variables = {**os.environ, "PYTHON": sys.executable}
    variables.pop("PYTHONUNBUFFERED", None)  # with it, nothing would wait in a buffer
    line = f'"$PYTHON" -m glassgpt {words} {output}; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", line], env=variables, capture_output=True)
    assert (done.returncode, len(done.stderr.splitlines())) == (code, said)


@pytest.mark.skipif(sys.platform == "win32", reason="needs a shell")
def test_what_is_said_to_a_closed_standard_error_is_no_result():
    line = f"{quote(sys.executable)} -m glassgpt evaluate no-model no-text 2>&-"
    done = subprocess.run(["bash", "-c", line], capture_output=True)
    assert (done.returncode, done.stdout) == (2, b"")


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals")
def test_an_ignored_ctrl_c_stays_ignored():
    """As of a command with & in a script."""
    start = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN);"
    start += (
        "os.execv(sys.executable, [sys.executable, '-m', 'glassgpt', *sys.argv[1:]])"
    )
    line = ["generate", "shakespeare", "--tokens", "40"]
    words = [sys.executable, "-c", start, *line]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as writer:
        assert len(writer.stdout.read(10)) == 10
        writer.send_signal(signal.SIGINT)
        writer.communicate()
    assert writer.returncode == 0


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals")
def test_ctrl_c_ends_the_loop_of_a_shell():
    """bash goes on after a command that exits with 130, and not after one that died."""
    line = '"$PYTHON" -m glassgpt generate shakespeare --tokens 500'
    loop = f'for i in 1 2; do {line}; echo "it goes on after $?"; done'
    start = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL);"
    start += "os.setsid(); os.execvp('bash', ['bash', '-c', sys.argv[1]])"
    words, variables = [sys.executable, "-c", start, loop], {"PYTHON": sys.executable}
    how = {"env": os.environ | variables, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(words, **how) as shell:
        assert len(shell.stdout.read(20)) == 20  # the first one is writing
        os.killpg(shell.pid, signal.SIGINT)
        assert "it goes on" not in shell.stdout.read()
        assert shell.wait() == -signal.SIGINT


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_and_resumed_it_reaches_the_same_weights(
    made, tmp_path, monkeypatch, capsys, process, number
):
    words = ["train", "--data", made / "my.txt", "--tokenizer", "char", *TINY]
    with monkeypatch.context() as patch:
        patch.setattr(cli.tqdm, "write", lambda line: signal.raise_signal(number))
        assert process(*words, "--out", tmp_path / "run") == 128 + number
    assert "stopped after step 3: glassgpt resume" in capsys.readouterr().out
    assert glass("resume", tmp_path / "run") == 0
    assert equal(weights(tmp_path / "run"), weights(made / "run"))


@pytest.mark.parametrize("option", ["--prompt", "--title", "--system"])
def test_some_texts_may_be_empty(option):
    command = {"--title": "publish", "--system": "chat"}.get(option, "generate")
    for words in ([option, ""], [f"{option}="]):
        made = cli.parse([command, "shakespeare", *words])
        assert getattr(made, option.strip("-")) == ""


@pytest.mark.parametrize("command", [[], ["generate"]])
def test_help_is_a_word_too(command, capsys):
    shown = []
    for words in (["help", *command], [*command, "--help"]):
        assert glass(*words) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1] != ""


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
        assert f"(default: {cli.suited()['steps']})" in shown
        assert "how many checkpoints stay (default: 2)" in shown


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
    assert "(default: 0.01)" in re.sub(r"[\s│]+", " ", shown)  # which may wrap
    assert "Book:" not in shown


def test_help_names_no_none(capsys):
    assert glass("train", "--help") == 0
    shown = capsys.readouterr().out
    assert "None" not in shown
    assert "(default: True)" in shown


def test_completion(tmp_path):
    assert not glass("--tyro-write-completion", "bash", tmp_path / "completion.sh")
    assert "--learning-rate" in (tmp_path / "completion.sh").read_text("utf-8")


def test_version(capsys):
    assert glass("--version") == 0
    assert capsys.readouterr().out == f"{glassgpt.__version__}\n"


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


def check_in(cell):
    """The check of an exercise, which stands in its chapter alone."""
    cells = nbformat.read(ROOT / "book/a3_command_line.ipynb", 4).cells
    (source,) = (c.source for c in cells if c.id == cell)
    return source.partition("grade(")[0]


def given_in(config, words):
    types = {each.name: each.type for each in fields(config)}
    return tyro.cli(TypedDict("Given", types, total=False), args=words)


def change(config, words):
    """A solution of exercise 1; the wrong ones below break one rule each."""
    return replace(config, **given_in(config, words))


def change_by_default(config, words):
    return tyro.cli(type(config), args=words, default=config)


def defaults_for_the_rest(config, words):
    return tyro.cli(type(config), args=words)


def what_differs_from_the_defaults(config, words):
    found, usual = tyro.cli(type(config), args=words), vars(type(config)())
    return replace(config, **{k: v for k, v in vars(found).items() if v != usual[k]})


def what_is_true(config, words):
    found = given_in(config, words)
    return replace(config, **{k: v for k, v in found.items() if v})


def what_is_something(config, words):
    found = given_in(config, words)
    return replace(config, **{k: v for k, v in found.items() if v is not None})


def in_place(config, words):
    vars(config).update(given_in(config, words))
    return config


def as_a_dict(config, words):
    return vars(config) | given_in(config, words)


def of_one_class(config, words):
    return replace(config, **given_in(TrainConfig(), words))


def by_hand(config, words):
    values = {}
    while words:
        name, *words = words
        no, name = name.startswith("--no-"), name.removeprefix("--").removeprefix("no-")
        kind = type(getattr(config, name))
        if kind is bool:
            values[name] = not no
        else:
            values[name] = None if words[0] == "None" else kind(words[0])
            words = words[1:]
    return replace(config, **values)


def into_the_defaults(config, words):
    new = type(config)()
    for name, value in {**vars(config), **given_in(config, words)}.items():
        object.__setattr__(new, name, value)
    return new


def what_is_not_true(config, words):
    found = given_in(config, words)
    return replace(config, **{k: v for k, v in found.items() if v is not True})


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (change, None),
        (change_by_default, None),
        (defaults_for_the_rest, "to is 'Ada', though nobody gave it"),
        (what_differs_from_the_defaults, "to is 'Ben', but 'Ada' was given"),
        (what_is_true, "to is 'Ben', but '' was given"),
        (what_is_something, "weight is 0.5, but None was given"),
        (in_place, "changed the object itself"),
        (as_a_dict, "is no Letter"),
        (of_one_class, "was refused"),
        (by_hand, "no attribute 'batch-size'"),
        (into_the_defaults, "missing .* required"),
        (what_is_not_true, "tied is False, but True was given"),
        (lambda config, words: config, "pages is 3, but 5 was given"),
    ],
)
def test_the_check_of_exercise_1(answer, said):
    space = {name: globals()[name] for name in ("io", "contextlib", "shlex", "replace")}
    space |= {"dataclass": dataclass, "TrainConfig": TrainConfig}
    space |= {"glassgpt": glassgpt}
    exec(check_in("exercise-change-check"), space)
    if said is None:
        return space["check_change"](answer)
    with pytest.raises((AssertionError, AttributeError, TypeError), match=said):
        space["check_change"](answer)


def count(words):
    """The solution of exercise 2; the wrong ones below break one rule each."""
    if len(words) != 1:
        print("count: give it one FILE", file=sys.stderr)
        return 2
    print(len(Path(words[0]).read_text("utf-8")))
    return 0


def count_by_os(words):
    if len(words) != 1:
        return count(words)
    try:
        file = os.open(words[0], os.O_RDONLY)
        print(len(os.read(file, 99).decode("utf-8")))
        os.close(file)
    except Exception as error:
        print(f"count: {error}", file=sys.stderr)
        return 2
    return 0


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


def count_what_exists(words):
    if len(words) != 1 or not Path(words[0]).exists():
        print(f"count: there is no file {words}", file=sys.stderr)
        return 2
    try:
        print(len(Path(words[0]).read_text("utf-8")))
    except UnicodeDecodeError as error:
        print(f"count: {error}", file=sys.stderr)
        return 2
    return 0


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
        (count_what_exists, r"`count \.` ended in (IsADirectory|Permission)Error"),
        (count_nothing, "seven.txt` left with exit code 2"),
        (catching(count, OSError, ValueError), "a ValueError inside, was hidden"),
        (
            catching(count, OSError, UnicodeDecodeError, TypeError, AttributeError),
            "a TypeError inside, was hidden",
        ),
        *(
            (catching(count, OSError, UnicodeDecodeError, k), "a .*, was hidden")
            for k in (IndexError, AssertionError, ArithmeticError)
        ),
        (count_by_os, "a KeyError inside, was hidden"),
        (catching(count, OSError, UnicodeDecodeError), None),
        (lambda words: count_by_argparse(words) or 0, None),
    ],
)
def test_the_check_of_exercise_2(tmp_path, answer, said):
    space = {"folder": tmp_path, "io": io, "contextlib": contextlib, "patch": patch}
    exec(check_in("exercise-main-check"), space)
    with contextlib.chdir(tmp_path):
        if said is None:
            return space["check_count_main"](answer)
        with pytest.raises(AssertionError, match=said):
            space["check_count_main"](answer)


def test_what_agents_are_told_is_true(capsys):
    (program, _), (said,) = blocks("python", "AGENTS.md"), blocks("text", "AGENTS.md")
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


# PyTorch's own types take a minute. Of them a user's program sees these.
TORCH = {
    "torch/__init__.pyi": """
from typing import Any
class Tensor:
    def __iter__(self) -> Any: ...
    def tolist(self) -> list[Any]: ...
def tensor(data: Any) -> Tensor: ...
def __getattr__(name: str) -> Any: ...
""",
    "torch/nn/__init__.pyi": """
from typing import Any, Callable
class Module:
    __call__: Callable[..., Any]
def __getattr__(name: str) -> Any: ...
""",
}

# What `mypy --strict` knows of the names that a user's program takes.
TYPES = {
    "glassgpt.load('shakespeare')": "tuple[gpt.GPT, tokens.Tokenizer]",
    "tokenizer.encode('a')": "list[int]",
    "tokenizer.decode([0])": "str",
    "tokenizer.vocab_size": "int",
    "tokenizer.special_tokens": "dict[str, int]",
    "model(ids)": "torch.Tensor",
    "glassgpt.ModernGPT(glassgpt.ModernConfig(9))(ids, caches=None)": "torch.Tensor",
    "glassgpt.generate(model, [1, 2], 3)": "list[int]",
    "glassgpt.generate(model, (1, 2), 3, [4], top_k=1, seed=None)": "list[int]",
    "glassgpt.generate(model, [[1], [2, 3]], 3, top_p=0.9)": "list[list[int]]",
    "glassgpt.generate(model, [(1, 2)], 3)": "list[typing.Sequence[int]]",
    "glassgpt.generate(model, ids, 3)": "list[Any]",  # one row or several
    "glassgpt.generate(model, ids.tolist(), 3)": "list[Any]",
    "glassgpt.generate(model, [1], 3, **vars(glassgpt.Sampling()))": "list[int]",
    "[*glassgpt.stream_text(model, tokenizer, 'a', 3, temperature=1)]": "list[str]",
    "glassgpt.tokenize('a', tokenizer, 'b')": "data.TokenData",
    "glassgpt.make_plan(9).training": "training.TrainConfig",
    "glassgpt.start_run": "runs.Run",
    "glassgpt.__version__": "str",
}

# And what it refuses, for which reason.
WRONG_TYPES = {
    "glassgpt.generate(model, 'a', 3)": "type-var",
    "tokenizer.decode(glassgpt.generate(model, [[1]], 3))": "list-item",
    "glassgpt.generate(model, [1], 3, topk=1)": "call-arg",
    "glassgpt.stream(model, [[1]], 3, top_k='1')": "arg-type",
    "glassgpt.stream_text(model, tokenizer, 'a', 3, topp=0.5)": "call-arg",
    "glassgpt.stream_answer(model, tokenizer, [], seed='1')": "arg-type",
    "glassgpt.TrainConfig(schedule='step')": "arg-type",
    "glassgpt.MuonConfig(schedule='step')": "arg-type",
    "glassgpt.ModernConfig(9, positions='absolute')": "arg-type",
    "glassgpt.ModernConfig(9, norm='batch')": "arg-type",
    "glassgpt.ModernConfig(9, activation='relu')": "arg-type",
    "glassgpt.plan.Machine(precision='int4')": "arg-type",
    "glassgpt.plan.Machine(compile='yes')": "arg-type",
}


def test_a_program_with_strict_types(tmp_path):
    api = pytest.importorskip("mypy.api")
    lines = [
        "import glassgpt, torch",
        "model, tokenizer = glassgpt.load('shakespeare')",
    ]
    lines += ["ids = torch.tensor([[1]])", *(f"reveal_type({code})" for code in TYPES)]
    # Strict also means: an error to be ignored must be there.
    lines += [f"{code}  # type: ignore[{why}]" for code, why in WRONG_TYPES.items()]
    settings = f"[mypy]\nfollow_imports = skip\nmypy_path = {ROOT / 'src'}\n"
    settings += "[mypy-glassgpt.*]\nfollow_imports = silent\n"
    files = {**TORCH, "user.py": "\n".join([*lines, ""]), "mypy.ini": settings}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    words = ["--strict", "--config-file", "mypy.ini", "user.py"]
    words += ["--python-executable", sys.executable]
    with contextlib.chdir(tmp_path):
        found = api.run(words)[0]
    assert "error" not in found, found
    told = re.findall(
        r'Revealed type is "(.*)"', re.sub(r"glassgpt\.|builtins\.", "", found)
    )
    for code, due, seen in zip(TYPES, TYPES.values(), told, strict=True):
        assert seen.endswith(due), code


def test_a_start_that_ends_at_its_first_word_leaves_nothing(
    made, tmp_path, monkeypatch, process
):
    words = "train", "--data", made / "my.txt", "--tokenizer", "char", *TINY
    full = open("/dev/full", "w", buffering=1)  # noqa: SIM115
    monkeypatch.setattr(sys, "stdout", full)
    assert process(*words, "--out", tmp_path / "run") == 2
    with contextlib.suppress(OSError):
        full.close()
    assert not (tmp_path / "run").exists()
