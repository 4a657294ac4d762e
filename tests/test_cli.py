"""The command line: a user's mistakes get a sentence, and the rest works end to end."""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from glassgpt import (
    GPT,
    GPTConfig,
    ModernConfig,
    TokenData,
    TrainConfig,
    cli,
    load,
    modern,
    training,
)
from glassgpt.checkpoints import save
from glassgpt.cli import HELP, main, make_parser, size_advice
from glassgpt.tokens import BPETokenizer, CharTokenizer

SCRIPT = Path(sys.executable).with_name("glassgpt")
PNG = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\xff\xfe\x00"
WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "an", "old", "dog"]
# A model and a run that take a second.
TINY = ["--layers", "1", "--heads", "2", "--width", "16", "--context", "16"]
TINY += ["--steps", "6", "--warmup", "1", "--batch-size", "4", "--evaluate-every", "3"]
TINY += ["--evaluation-batches", "2", "--checkpoint-every", "3", "--compile", "off"]
TINY += ["--precision", "float32", "--device", "cpu"]


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
        if path.is_file()
    }


def run_main(words):
    """The exit code of `main`, also where the parser leaves by itself."""
    try:
        return main([str(word) for word in words])
    except SystemExit as leaving:
        return leaving.code


def run_script(*words, **options):
    """The installed script in a process of its own."""
    words = [str(word) for word in (SCRIPT, *words)]
    return subprocess.run(words, capture_output=True, text=True, **options)


def damage(folder, name, change):
    path = folder / name
    path.write_bytes(change(path.read_bytes()))


def widen(content):
    """The same config.json for a model of another width, in both sets of keys."""
    config = json.loads(content)
    config["n_embd"] = config["glassgpt"]["width"] = 32
    return json.dumps(config).encode()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a text, and a finished run on it in `run`. Tests only read it."""
    folder = tmp_path_factory.mktemp("made")
    text = write_text(folder / "my.txt")
    start = ["train", "--data", text, "--tokenizer", "char", "--out", folder / "run"]
    assert run_main([*start, *TINY]) == 0
    return folder


@pytest.fixture(scope="module")
def stage(made, tmp_path_factory):
    """Where mistakes are made: wrong files, damaged models. None may change it."""
    folder = tmp_path_factory.mktemp("stage")
    shutil.copy(made / "my.txt", folder)
    shutil.copytree(made / "run", folder / "run")
    (folder / "empty.txt").write_text("")
    (folder / "short.txt").write_text("To be, or not to be\n")
    (folder / "picture.png").write_bytes(PNG)
    (folder / "notes").mkdir()
    (folder / "notes" / "mine.txt").write_text("mine\n")
    for name in ("cut", "other", "scrambled", "lost", "broken-run", "dataless"):
        shutil.copytree(made / "run", folder / name)
    damage(folder / "cut", "model.safetensors", lambda content: content[:1000])
    damage(folder / "other", "config.json", widen)
    damage(folder / "scrambled", "tokenizer.json", lambda content: content[:100])
    (folder / "lost" / "model.safetensors").unlink()
    damage(folder / "broken-run", "run.json", lambda content: content[:50])
    content = (folder / "run" / "run.json").read_text()
    assert '"data": "data"' in content
    gone = content.replace('"data": "data"', '"data": "nowhere"')
    (folder / "dataless" / "run.json").write_text(gone)
    return folder


NEW = ["--tokenizer", "char", "--out", "new", *TINY]
MY = ["train", "--data", "my.txt", *NEW]
WRITE = ["generate", "run", "--prompt", "the", "--tokens", "3"]

# What was typed, and words of the sentence that answers.
MISTAKES = {
    "no command": ([], "command"),
    "unknown command": (["trian"], "trian"),
    "empty text": (["train", "--data", "empty.txt", *NEW], "empty.txt has no text"),
    "missing text": (["train", "--data", "missing.txt", *NEW], "missing.txt"),
    "short text": (["train", "--data", "short.txt", *NEW], "too short for a context"),
    "picture": (["train", "--data", "picture.png", *NEW], "picture.png is not UTF-8"),
    "picture, bpe": ([*MY, "--data", "picture.png", "--tokenizer", "bpe"], "not UTF-8"),
    "uneven heads": ([*MY, "--width", "15"], "width 15"),
    "no layers": ([*MY, "--layers", "0"], "layers"),
    "no steps": ([*MY, "--steps", "0"], "steps"),
    "far too wide": ([*MY, "--width", "1000000000"], "does not fit into memory"),
    "small vocabulary": ([*MY, "--tokenizer", "bpe", "--vocab-size", "5"], "too small"),
    "number in letters": ([*MY, "--steps", "many"], "many"),
    "unknown size": ([*MY, "--size", "huge"], "huge"),
    "unknown option": ([*MY, "--learning-pace", "1"], "--learning-pace"),
    "unknown device": ([*MY, "--device", "abacus"], "abacus"),
    "diverging": ([*MY, "--learning-rate", "1e30"], "lower the learning rate"),
    "missing tokenizer": ([*MY, "--tokenizer", "none.json"], "none.json"),
    "no tokenizer": ([*MY, "--tokenizer", "my.txt"], "my.txt"),
    "below a file": ([*MY, "--out", "my.txt/new"], "Not a directory"),
    "into a file": ([*MY, "--out", "my.txt"], "my.txt is a file"),
    "among other files": ([*MY, "--out", "notes"], "notes is not empty, mine.txt"),
    "no name of a text": ([*MY, "--data", ""], "an empty name is neither"),
    "a size of characters": ([*MY, "--vocab-size", "300"], "--tokenizer bpe only"),
    "tokens below a file": (
        ["tokenize", "--data", "my.txt", "--tokenizer", "char", "--out", "my.txt/new"],
        "Not a directory",
    ),
    "tokens of nothing": (
        ["tokenize", "--data", "empty.txt", "--out", "new"],
        "no text",
    ),
    "tokens over a folder": (
        ["tokenize", "--data", "my.txt", "--tokenizer", "char", "--out", "run"],
        "exists already",
    ),
    "no workers": (
        ["tokenize", "--data", "my.txt", "--out", "new", "--workers", "0"],
        "workers",
    ),
    "a run without --resume": ([*MY, "--out", "run"], "add --resume"),
    "resume with steps": (
        ["train", "--resume", "--out", "run", "--steps", "9"],
        "steps",
    ),
    "resume with a size": (
        ["train", "--resume", "--out", "run", "--size", "xl"],
        "size",
    ),
    "resume with a text": (
        ["train", "--resume", "--out", "run", "--data", "short.txt"],
        "leave out --data",
    ),
    "resume nothing": (["train", "--resume", "--out", "new"], "no run to resume"),
    "resume a damaged run": (["train", "--resume", "--out", "broken-run"], "damaged"),
    "resume without data": (["train", "--resume", "--out", "dataless"], "nowhere"),
    "temperature 0": ([*WRITE, "--temperature", "0"], "temperature"),
    "negative temperature": ([*WRITE, "--temperature", "-1"], "temperature"),
    "temperature NaN": ([*WRITE, "--temperature", "nan"], "temperature"),
    "top-k 0": ([*WRITE, "--top-k", "0"], "top_k"),
    "top-p 0": ([*WRITE, "--top-p", "0"], "top_p"),
    "negative length": ([*WRITE, "--tokens", "-5"], "--tokens: '-5' is no whole"),
    "negative seed": ([*WRITE, "--seed", "-1"], "--seed: '-1' is no whole number"),
    "empty prompt": ([*WRITE, "--prompt", ""], "at least one token"),
    "unknown character": ([*WRITE, "--prompt", "\u6f22"], "not in the vocabulary"),
    "unknown weights": ([*WRITE, "--weights", "int3"], "int3"),
    "no model": (["generate", "missing"], "missing"),
    "half a model": (["generate", "lost"], "model.safetensors is missing"),
    "cut short": (["generate", "cut"], "damaged"),
    "another size": (["generate", "other"], "does not fit its config.json"),
    "damaged tokenizer": (["generate", "scrambled"], "tokenizer.json is damaged"),
    "a file as model": (["generate", "my.txt"], "my.txt"),
}

# These fail in training, and leave the run that was started.
LEAVE_A_RUN = ("diverging",)


def sentence_in(errors):
    """The one line that says what is wrong; the parser prints its usage before it."""
    lines = errors.strip().splitlines()
    assert sum(line.startswith("glassgpt") for line in lines) == 1, errors
    assert lines[-1].startswith("glassgpt"), errors
    return lines[-1]


@pytest.mark.filterwarnings("ignore:the text has too few pairs")
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_a_sentence(stage, monkeypatch, capsys, mistake):
    words, expected = MISTAKES[mistake]
    monkeypatch.chdir(stage)
    shutil.rmtree("new", ignore_errors=True)  # of a mistake that failed its test
    before = hashes(stage)
    assert run_main(words) == 2
    errors = capsys.readouterr().err
    assert "Traceback" not in errors
    assert expected in sentence_in(errors)
    if mistake in LEAVE_A_RUN:
        shutil.rmtree(stage / "new")
    assert hashes(stage) == before
    assert not (stage / "new").exists()


@pytest.mark.parametrize("mistake", ["picture", "cut short", "unknown option"])
def test_a_mistake_in_the_shell(stage, mistake):
    words, expected = MISTAKES[mistake]
    before = hashes(stage)
    done = run_script(*words, cwd=stage)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert expected in sentence_in(done.stderr)
    assert hashes(stage) == before


@pytest.mark.filterwarnings("ignore:the text has too few pairs")
@pytest.mark.parametrize("tokenizer", ["char", "bpe"])
def test_train_writes_a_model(made, tmp_path, tokenizer, capsys):
    out = tmp_path / "run"
    words = ["train", "--data", made / "my.txt", "--tokenizer", tokenizer, "--out", out]
    words += ["--vocab-size", "280"] if tokenizer == "bpe" else []
    assert run_main([*words, *TINY]) == 0
    printed = capsys.readouterr().out
    assert "step 3: validation loss" in printed
    assert "step 6: validation loss" in printed
    records = [json.loads(line) for line in (out / "metrics.jsonl").open()]
    assert [record["step"] for record in records] == [3, 6]
    model, its_tokenizer = load(out)
    assert model.config.vocab_size == its_tokenizer.vocab_size
    assert its_tokenizer.decode(its_tokenizer.encode("the cat")) == "the cat"


def test_generate_repeats_with_a_seed(made, capsys):
    words = ["generate", made / "run", "--prompt", "the cat", "--tokens", "30"]
    written = []
    for seed in (1, 1, 2):
        assert run_main([*words, "--seed", seed]) == 0
        written.append(capsys.readouterr().out)
    assert written[0] == written[1] != written[2]
    assert written[0].startswith("the cat")
    assert len(written[0]) == len("the cat") + 30 + len("\n")


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "float16", "int8"])
def test_generate_with_lighter_weights(made, capsys, weights):
    words = ["generate", made / "run", "--prompt", "the", "--tokens", "20"]
    assert run_main([*words, "--weights", weights, "--seed", "1"]) == 0
    assert len(capsys.readouterr().out) == len("the") + 20 + len("\n")


def test_tokenize_then_train_on_the_tokens(made, tmp_path, capsys):
    words = ["tokenize", "--data", made / "my.txt", "--tokenizer", "char"]
    assert run_main([*words, "--out", tmp_path / "tokens"]) == 0
    before = hashes(tmp_path / "tokens")
    assert (
        run_main(
            [
                "train",
                "--data",
                tmp_path / "tokens",
                *NEW[2:],
                "--out",
                tmp_path / "run",
            ]
        )
        == 0
    )
    assert hashes(tmp_path / "tokens") == before
    ours = TokenData.open(tmp_path / "tokens")
    assert ours.fingerprint == TokenData.open(made / "run" / "data").fingerprint
    mine, theirs = load(tmp_path / "run")[0], load(made / "run")[0]
    for name, parameter in mine.named_parameters():
        assert torch.equal(parameter, theirs.get_parameter(name)), name


def test_resume_says_where_it_goes_on(made, tmp_path, capsys):
    shutil.copytree(made / "run", tmp_path / "run")
    assert run_main(["train", "--resume", "--out", tmp_path / "run"]) == 0
    printed = capsys.readouterr().out
    assert "going on from checkpoint-00000006" in printed
    assert "all 6 steps are done" in printed
    for checkpoint in (tmp_path / "run").glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    assert run_main(["train", "--resume", "--out", tmp_path / "run"]) == 0
    assert "from the start: there is no checkpoint yet" in capsys.readouterr().out


def test_a_run_can_be_moved(made, tmp_path):
    shutil.copytree(made / "run", tmp_path / "first")
    (tmp_path / "first").rename(tmp_path / "second")
    shutil.rmtree(tmp_path / "second" / "checkpoint-00000006")
    assert run_main(["train", "--resume", "--out", tmp_path / "second"]) == 0


def test_resume_takes_the_values_that_the_run_has(made, tmp_path):
    shutil.copytree(made / "run", tmp_path / "run")
    words = ["train", "--resume", "--out", tmp_path / "run", "--seed", "0", *TINY]
    assert run_main(words) == 0


def test_a_saved_model_is_never_trained_over(made, tmp_path, capsys):
    kept = tmp_path / "kept"
    kept.mkdir()
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        shutil.copy(made / "run" / name, kept)
    before = hashes(kept)
    words = ["train", "--data", made / "my.txt", "--tokenizer", "char", *TINY]
    assert run_main([*words, "--out", kept]) == 2
    assert "is not empty, config.json is in it" in capsys.readouterr().err
    assert run_main(["train", "--out", kept, "--resume"]) == 2
    assert hashes(kept) == before


def test_tokens_are_never_trained_over(made, tmp_path, capsys):
    shutil.copytree(made / "run" / "data", tmp_path / "tokens")
    before = hashes(tmp_path / "tokens")
    words = ["train", "--data", made / "my.txt", "--tokenizer", "char", *TINY]
    assert run_main([*words, "--out", tmp_path / "tokens"]) == 2
    assert "is not empty, header.json is in it" in capsys.readouterr().err
    assert hashes(tmp_path / "tokens") == before


def test_the_folder_of_a_run_is_named_after_its_text(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["train", "--data", made / "my.txt", "--tokenizer", "char", *TINY]
    assert run_main(words) == 0
    assert (tmp_path / "runs" / "my" / "run.json").exists()


def test_the_folder_of_a_resumed_run_is_found_by_its_text(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.txt").write_bytes((made / "my.txt").read_bytes())
    words = ["train", "--data", "my.txt"]
    assert run_main([*words, "--tokenizer", "char", *TINY]) == 0
    assert run_main([*words, "--resume"]) == 0
    (tmp_path / "texts").mkdir()
    monkeypatch.chdir(tmp_path / "texts")
    shutil.copy("../my.txt", ".")
    assert run_main(["train", "--data", ".", "--tokenizer", "char", *TINY]) == 0
    assert Path("runs/texts/run.json").exists()


def test_an_empty_name_is_no_folder(made, capsys):
    assert run_main(["train", "--data", made / "my.txt", "--out", "", *TINY]) == 2
    assert "--out is empty" in capsys.readouterr().err


def test_tokens_that_were_moved_are_given_again(made, tmp_path, capsys):
    tokens, out = tmp_path / "tokens", tmp_path / "run"
    shutil.copytree(made / "run" / "data", tokens)
    assert run_main(["train", "--data", tokens, "--out", out, *TINY]) == 0
    tokens.rename(tmp_path / "moved")
    shutil.rmtree(out / "checkpoint-00000006")
    assert run_main(["train", "--out", out, "--resume"]) == 2
    assert "the folder they are in now with --data" in capsys.readouterr().err
    words = ["train", "--out", out, "--resume", "--data"]
    assert run_main([*words, tmp_path / "moved"]) == 0
    assert (out / "checkpoint-00000006").exists()
    (tmp_path / "less.txt").write_text((made / "my.txt").read_text()[:9000])
    other = [
        "tokenize",
        "--data",
        tmp_path / "less.txt",
        "--tokenizer",
        "char",
    ]
    assert run_main([*other, "--out", tmp_path / "other"]) == 0
    capsys.readouterr()
    assert run_main([*words, tmp_path / "other"]) == 2
    assert "can't be resumed" in capsys.readouterr().err


def test_a_second_run_never_removes_the_first(made, tmp_path, monkeypatch, capsys):
    """The second begins while the first learns its tokenizer."""
    words = ["train", "--data", made / "my.txt", "--tokenizer", "char", *TINY]
    words += ["--out", tmp_path / "run"]
    inner, seen = cli.make_tokenizer, []

    def slow(*arguments):
        if not seen:
            seen.append(run_main(words))
        return inner(*arguments)

    monkeypatch.setattr(cli, "make_tokenizer", slow)
    assert run_main(words) == 0
    assert seen == [2]
    assert "another command is filling" in capsys.readouterr().err
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_a_run_that_began_meanwhile_is_seen(made, tmp_path, monkeypatch, capsys):
    """Another command begins, and is done with beginning, between look and lock."""
    out, plan = tmp_path / "run", cli._plan

    def meanwhile(*arguments):
        out.mkdir(exist_ok=True)
        (out / "run.json").write_text("{}")
        return plan(*arguments)

    monkeypatch.setattr(cli, "_plan", meanwhile)
    words = ["train", "--data", made / "my.txt", "--tokenizer", "char", *TINY]
    assert run_main([*words, "--out", out]) == 2
    assert "holds a run that has no checkpoint yet" in capsys.readouterr().err
    assert (out / "run.json").read_text() == "{}"


def test_ending_a_start_leaves_nothing(made, tmp_path):
    code = """
        import os, signal
        from glassgpt import cli
        def ended(*arguments):
            os.kill(os.getpid(), signal.SIGTERM)
        cli.make_tokenizer = ended
        cli.main(["train", "--data", "my.txt", "--out", "run"])
    """
    (tmp_path / "my.txt").write_bytes((made / "my.txt").read_bytes())
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=tmp_path, check=False
    )
    assert done.returncode == 128 + signal.SIGTERM
    assert [path.name for path in tmp_path.iterdir()] == ["my.txt"]


def test_a_program_that_calls_main_keeps_its_handlers(capsys):
    before = signal.getsignal(signal.SIGTERM)
    assert run_main(["generate", "no-model"]) == 2
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_missing_extra_is_told_before_any_work(made, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "find_spec", lambda name: None)
    words = ["train", "--data", made / "my.txt", "--out", tmp_path / "run", *TINY]
    assert run_main([*words, "--tensorboard"]) == 2
    assert "pip install 'glassgpt[tensorboard]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_what_is_hardly_meant_is_said(made, tmp_path, capsys):
    (tmp_path / "texts").mkdir()
    write_text(tmp_path / "texts" / "a.txt", 20)
    write_text(tmp_path / "texts" / "b.txt", 300)
    words = ["train", "--data", tmp_path / "texts", "--tokenizer", "char", *TINY]
    words += ["--out", tmp_path / "run", "--warmup", "9"]
    assert run_main(words) == 0
    printed = capsys.readouterr().out
    assert "more is held out than trained on" in printed
    assert "only rises: warmup 9 steps" in printed


def test_a_file_called_header_is_a_text_like_others(made, tmp_path):
    (tmp_path / "texts").mkdir()
    write_text(tmp_path / "texts" / "a.txt")
    write_text(tmp_path / "texts" / "header.json")
    words = ["train", "--data", tmp_path / "texts", "--tokenizer", "char", *TINY]
    assert run_main([*words, "--out", tmp_path / "run"]) == 0


def test_a_terminal_without_the_characters(made):
    words = ["generate", made / "run", "--tokens", "3", "--prompt", "the cat"]
    done = run_script(*words, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0, done.stderr
    model = GPT(GPTConfig(257, context=8, layers=1, heads=1, width=8))
    save(made / "bytes", model, BPETokenizer.train("", 257))
    words = ["generate", made / "bytes", "--tokens", "3", "--prompt", "日"]
    done = run_script(*words, env={**os.environ, "PYTHONIOENCODING": "cp1252"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("?")


def test_a_finished_run_whose_model_was_taken_away(made, tmp_path, capsys):
    shutil.copytree(made / "run", tmp_path / "run")
    (tmp_path / "run" / "model.safetensors").unlink()
    assert run_main(["train", "--resume", "--out", tmp_path / "run"]) == 0
    assert run_main(["generate", tmp_path / "run", "--tokens", "3"]) == 0


def test_a_tokenizer_beside_tokens_is_refused(made, capsys):
    words = ["train", "--data", made / "run" / "data", "--tokenizer", "char"]
    assert run_main([*words, "--out", made / "never"]) == 2
    assert "leave out --tokenizer" in capsys.readouterr().err
    assert not (made / "never").exists()


def test_refused_settings_leave_nothing_on_the_screen(made, capsys):
    words = ["generate", made / "run", "--prompt", "the", "--temperature", "0"]
    assert run_main(words) == 2
    assert capsys.readouterr().out == ""


def test_without_a_prompt_characters_begin_with_what_they_know(tmp_path, capsys):
    tokenizer = CharTokenizer("xyz")
    model = GPT(GPTConfig(3, context=4, layers=1, heads=1, width=4))
    save(tmp_path / "model", model, tokenizer)
    assert run_main(["generate", tmp_path / "model", "--tokens", "5"]) == 0
    assert len(capsys.readouterr().out) == 1 + 5 + 1


def test_output_that_nobody_reads_any_more_is_no_mistake(made):
    command = [SCRIPT, "generate", made / "run", "--tokens", "3000"]
    with subprocess.Popen(
        [str(word) for word in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_a_warning_is_a_sentence_too(made, tmp_path):
    words = ["tokenize", "--data", made / "my.txt", "--out", tmp_path / "tokens"]
    done = run_script(*words, "--vocab-size", "5000", cwd=tmp_path)
    assert done.returncode == 0
    warned = [line for line in done.stderr.splitlines() if "too few pairs" in line]
    assert len(warned) == 1
    assert warned[0].startswith("glassgpt: ")
    assert ".py" not in done.stderr


def test_as_a_module(made):
    command = [sys.executable, "-m", "glassgpt", "generate", made / "missing"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "missing" in sentence_in(done.stderr)


def test_only_sizes_are_taken_for_sizes():
    with pytest.raises(MemoryError, match="--size"), size_advice():
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
    with pytest.raises(torch.AcceleratorError), size_advice():
        raise torch.AcceleratorError("CUDA error: no kernel image is available")


def test_version(capsys):
    with pytest.raises(SystemExit) as left:
        main(["--version"])
    assert left.value.code == 0
    assert capsys.readouterr().out.strip() == version("glassgpt")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_resume_after_ctrl_c_reaches_the_end(made, tmp_path, number):
    """Interrupted in the middle, resumed: the same model as without a break."""
    long = [*TINY, "--steps", "200", "--evaluate-every", "20"]
    long += ["--checkpoint-every", "200"]
    words = ["train", "--data", made / "my.txt", "--tokenizer", "char", *long]
    assert run_main([*words, "--out", tmp_path / "whole"]) == 0
    command = [str(word) for word in (SCRIPT, *words, "--out", tmp_path / "run")]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        for line in process.stdout:
            if line.startswith("step 20:"):
                break
        process.send_signal(number)
        rest = process.stdout.read()
    assert process.returncode == 130
    assert "--resume" in rest
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    assert 20 <= int(checkpoint.name.split("-")[1]) < 200
    done = run_script("train", "--out", tmp_path / "run", "--resume")
    assert done.returncode == 0, done.stderr
    assert "step 200: validation loss" in done.stdout
    assert "glassgpt generate" in done.stdout
    ours, theirs = load(tmp_path / "run")[0], load(tmp_path / "whole")[0]
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, theirs.get_parameter(name)), name


def option_names():
    """The fields of both configurations."""
    return {f.name for kind in (ModernConfig, TrainConfig) for f in fields(kind)}


@pytest.mark.parametrize("command", ["train", "generate", "tokenize"])
def test_help_lists_every_option(command, capsys):
    assert run_main([command, "--help"]) == 0
    shown = capsys.readouterr().out.split()
    expected = {
        "train": ["data", "tokenizer", "vocab-size", "out", "resume", "size", "recipe"]
        + ["device", "tensorboard"]
        + sorted(option_names()),
        "generate": ["prompt", "tokens", "temperature", "top-k", "top-p", "seed"]
        + ["weights", "device"],
        "tokenize": ["data", "tokenizer", "vocab-size", "out", "workers"],
    }[command]
    for name in expected:
        option = "--" + name.replace("_", "-")
        assert {option, option + ","} & set(shown), f"{option} is not in the help"


def test_help_explains_every_option():
    (commands,) = (
        action
        for action in make_parser()._actions
        if isinstance(action, argparse._SubParsersAction)
    )
    for part in commands.choices.values():
        assert [action.dest for action in part._actions if not action.help] == []
    assert HELP.keys() == option_names() - {"vocab_size"}


@pytest.mark.parametrize("choices", [modern._CHOICES, training._CHOICES])
def test_help_names_every_choice(choices):
    for name, values in choices.items():
        words = HELP[name].replace(",", "").split()
        assert all(value in words for value in values if isinstance(value, str)), name


def test_tensorboard_gets_every_record(made, tmp_path):
    events = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    out = tmp_path / "run"
    words = ["train", "--data", made / "my.txt", *NEW[:2], *TINY, "--out", out]
    assert run_main([*words, "--tensorboard"]) == 0
    (path,) = out.glob("events.out.tfevents.*")
    seen = events.EventAccumulator(str(path))
    seen.Reload()
    assert [event.step for event in seen.Scalars("validation_loss")] == [3, 6]


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
