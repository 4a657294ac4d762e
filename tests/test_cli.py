"""The command line: a user's mistakes get a sentence, and the rest works end to end."""

import contextlib
import filecmp
import hashlib
import io
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from shlex import quote
from unittest.mock import Mock

import address
import pytest
import torch

import glassgpt
from glassgpt import GPT, GPTConfig, TokenData, cli, generate, load, render
from glassgpt.checkpoints import save
from glassgpt.cli import main
from glassgpt.modern import ModernConfig, build
from glassgpt.tokens import BPETokenizer, CharTokenizer

SCRIPT = Path(sys.executable).with_name("glassgpt")


PNG = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\xff\xfe\x00"


WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "an", "old", "dog"]


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
    before = signal.getsignal(signal.SIGTERM)

    def start(*words):
        monkeypatch.setattr(sys, "argv", ["glassgpt", *map(str, words)])
        try:
            return main()
        except SystemExit as leaving:
            return leaving.code

    yield start
    signal.signal(signal.SIGTERM, before)


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


# What was typed, and a word of the sentence that answers.
MISTAKES = [
    (["train", "--data", "empty.txt", *NEW], "empty.txt"),
    ([*MY, "--data", "my.txt"], "twice"),
    ([*MY, "--init-from", ""], "--init-from"),
    ([*MY, "--out="], "--out"),
    (["train", "--data", "", *NEW], "--data"),
    (["train", "--data", "missing.txt", *NEW], "missing.txt"),
    (["train", "--data", "short.txt", *NEW], "16"),
    (["train", "--data", "picture.png", *NEW], "picture.png"),
    (["train", "--data", "x" * 2_000_000, *NEW], "x"),
    ([*MY, "--tokenizer", "x" * 2_000_000], "x"),
    ([*MY, "--width", "15"], "width"),
    ([*MY, "--layers", "100000000"], "layers"),
    ([*MY, "--steps", "0"], "steps"),
    ([*MY, "--device", "abacus"], "abacus"),
    ([*MY, "--tokenizer", "bpe", "--vocab-size", "5"], "vocab"),
    ([*MY, "--vocab-size", "300"], "--tokenizer bpe"),
    ([*MY, "--tokenizer", "nonsense"], "nonsense"),
    ([*MY, "--dropout", "1"], "dropout"),
    (["train", "--data", "tokens", *NEW], "--tokenizer"),
    (["train", "--data", "tokens", "my.txt", "--out", "new", *TINY], "alone"),
    ([*MY, "--keep", "0"], "keep"),
    ([*MY, "--out", "my.txt"], "my.txt"),
    ([*MY, "--out", "dangling"], "dangling"),
    ([*MY, "--out", "run"], "run"),
    ([*MY, "--out", "run", "--resume", "--width", "8"], "width"),
    (["train", "--out", "run", "--resume", "--size", "mini"], "heads"),
    ([*MY, "--out", "run", "--resume", "--optimizer", "adamw"], "optimizer"),
    ([*FROM, "--width", "8"], "width"),
    ([*FROM, "--context", "17"], "context"),
    (
        ["train", "--data", "tokens", "--init-from", "shakespeare", "--out", "new"],
        "tok",
    ),
    (["tokenize", "--data", "tokens"], "tokenized"),
    (["tokenize", "--out", "run"], "exists"),
    (["resume", "new"], "new"),
    (["resume", "damaged"], "run.json"),
    ([*WRITE, "--tokens", "-5"], "--tokens"),
    ([*WRITE, "--samples", "0"], "--samples"),
    (["chat", "run", "--tokens", "0"], "--tokens"),
    ([*WRITE, "--prompt", "\u6f22"], "vocabulary"),
    (["generate", "missing"], "missing"),
    (["generate", "damaged"], "damaged"),
    (["evaluate", "run", "one.txt"], "token"),
    (["evaluate", "run"], "--task"),
    (["evaluate", "run", "my.txt", "--task", "sums"], "--task"),
    (["evaluate", "run", "--task", "capitols"], "capitals"),
    (["evaluate", "run", "--task", "sums", "--examples", "9"], "examples"),
    (["evaluate", "run", "--task", "picture.png"], "line"),
    (["evaluate", "run", "--task", "sums", "--limit", "50"], "--limit"),
    (["evaluate", "run", "my.txt", "--examples", "1"], "--examples"),
]


@pytest.mark.parametrize(("words", "named"), MISTAKES)
def test_a_mistake_gets_a_sentence(stage, monkeypatch, capsys, words, named):
    monkeypatch.chdir(stage)
    before = hashes(stage)
    assert glass(*words) == 2
    assert named in sentence_in(capsys.readouterr().err)
    assert hashes(stage) == before
    assert not Path("new").exists()


# What was typed wrong, and a word of the box that answers.
WRONG_WORDS = [
    (["trian"], "trian"),
    ([*MY, "--optimizer", "adam"], "adamw"),
    ([*MY, "--learning-pace", "1"], "--learning-rate"),
    ([*MY, "--size", "huge"], "mini"),
    ([*MY, "--steps", "many"], "--steps"),
    (["generate"], "MODEL"),
    (["resume", "run", "--width", "9"], "--width"),
]


@pytest.mark.parametrize(("words", "named"), WRONG_WORDS)
def test_wrong_words_get_a_box(stage, monkeypatch, capsys, words, named):
    monkeypatch.chdir(stage)
    before = hashes(stage)
    assert glass(*words) == 2
    assert named in capsys.readouterr().err
    assert hashes(stage) == before


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch):
    for fault in (KeyError("ours"), RuntimeError("ours"), TypeError("ours")):
        monkeypatch.setattr("glassgpt.load", Mock(side_effect=fault))
        with pytest.raises(type(fault), match="ours"):
            main(["generate", "shakespeare"])


def test_traceback_shows_where_a_mistake_came_up():
    with pytest.raises(FileNotFoundError):
        main(["generate", "missing", "--traceback"])


def test_one_line_begins_and_goes_on(made, tmp_path, capsys):
    line = ["train", "--data", made / "my.txt", "--tokenizer", "char", *TINY]
    line += ["--out", tmp_path / "run", "--resume"]
    assert glass(*line) == 0
    assert glass(*line) == 0
    assert "going on from checkpoint-00000006" in capsys.readouterr().out
    line[line.index("--steps") + 1] = "9"
    assert glass(*line) == 0
    assert "steps 9 (was 6)" in capsys.readouterr().out


def test_help_of_train_fits_on_two_screens(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    assert glass("train", "--help") == 0
    shown = capsys.readouterr().out
    assert shown.count("\n") <= 100
    assert "None" not in shown
    for option in (*fields(cli.Settings), *fields(cli.Text)):
        assert f"--{option.name.replace('_', '-')}" in shown


def sentence_in(errors):
    """The one line that says what is wrong."""
    assert errors.startswith("glassgpt: "), errors
    assert len(errors) < 1000
    assert errors.count("\n") == 1, errors
    return errors


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


def test_tokens_without_their_tokenizer_are_named(made, tmp_path, capsys):
    shutil.copytree(made / "run" / "data", tmp_path / "tokens")
    (tmp_path / "tokens" / "tokenizer.json").unlink()
    line = ["train", "--data", tmp_path / "tokens", "--out", tmp_path / "new"]
    assert glass(*line) == 2
    assert str(Path("tokens", "tokenizer.json")) in sentence_in(capsys.readouterr().err)


def test_the_tokenizer_of_a_name(made, tmp_path):
    words = ["--data", made / "my.txt", "--tokenizer", "shakespeare"]
    assert glass("tokenize", *words, "--out", tmp_path / "tokens") == 0
    shipped = Path(glassgpt.__file__).parent / "models/shakespeare/tokenizer.json"
    assert filecmp.cmp(shipped, tmp_path / "tokens/tokenizer.json", shallow=False)


def test_the_tokenizer_of_a_run(made, tmp_path):
    words = ["--data", made / "my.txt", "--tokenizer", made / "run"]
    assert glass("tokenize", *words, "--out", tmp_path / "tokens") == 0
    assert filecmp.cmp(made / "run/tokenizer.json", tmp_path / "tokens/tokenizer.json")


def test_the_tokenizer_of_tokens_that_are_there(made, tmp_path):
    words = ["--data", made / "my.txt", "--tokenizer", "char"]
    assert glass("tokenize", *words, "--out", tmp_path / "first") == 0
    words = ["--data", made / "my.txt", "--tokenizer", tmp_path / "first"]
    assert glass("tokenize", *words, "--out", tmp_path / "second") == 0
    assert hashes(tmp_path / "first") == hashes(tmp_path / "second")


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("place", ["cli.read_documents", "start_run"])
def test_a_start_that_is_stopped_leaves_nothing(
    made, tmp_path, monkeypatch, process, stop, place
):
    line = ["train", "--data", made / "my.txt", "--tokenizer", "char", *TINY]
    monkeypatch.setattr(f"glassgpt.{place}", lambda *_, **__: signal.raise_signal(stop))
    assert process(*line, "--out", tmp_path / "runs" / "new") == 128 + stop
    assert not [*tmp_path.iterdir()]


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


def test_publish_refuses_an_architecture_before_it_reads_weights(tmp_path, capsys):
    config = ModernConfig(257, context=8, layers=1, heads=1, width=4)
    save(tmp_path / "modern", build(config), BPETokenizer([]))
    (tmp_path / "modern" / "model.safetensors").unlink()
    assert glass("publish", tmp_path / "modern", "--out", tmp_path / "x.html") == 2
    assert "glassgpt chat" in capsys.readouterr().err
    assert not (tmp_path / "x.html").exists()


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


def test_version(capsys):
    assert glass("--version") == 0
    assert capsys.readouterr().out == f"{glassgpt.__version__}\n"


ROOT = Path(__file__).parent.parent


def blocks(language, name="README.md"):
    """The blocks of code in a Markdown file of the root."""
    text = (ROOT / name).read_text("utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


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
