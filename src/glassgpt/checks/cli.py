# Written by tools/tangle.py from book/23_command_line.ipynb: change it there.
"""Checks of the command line."""

import contextlib
import io
import tempfile
from collections.abc import Callable
from pathlib import Path


def call(main: Callable[[list[str]], int], words: list[str]) -> tuple[int, str]:
    """Run a command line; return its exit code and what it printed as an error.

    Book: 23_command_line.html#the-check
    """
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        try:
            number = main(words)
        except SystemExit as leaving:
            number = leaving.code if isinstance(leaving.code, int) else 1
        except Exception as error:
            name = type(error).__name__
            raise AssertionError(
                f"`glassgpt {words[0]}` ended in a traceback: {name}"
            ) from error
    return number, errors.getvalue()


def check_mistakes(main: Callable[[list[str]], int]) -> None:
    """Mistakes end in exit code 2 and a sentence, and write nothing.

    Book: 23_command_line.html#the-check
    """
    with tempfile.TemporaryDirectory() as name, contextlib.chdir(name):
        folder = Path(name)
        (folder / "empty.txt").write_text("")
        (folder / "short.txt").write_text("To be, or not to be\n")
        (folder / "picture.png").write_bytes(b"\x89PNG\r\n\xff\xfe\x00")
        out = ["--out", str(folder / "new")]
        mistakes = [
            ["train", "--data", str(folder / "missing.txt"), *out],
            ["train", "--data", str(folder / "empty.txt"), *out],
            ["train", "--data", str(folder / "short.txt"), "--tokenizer", "char", *out],
            ["train", "--data", str(folder / "picture.png"), *out],
            ["train", "--data", str(folder / "short.txt"), "--heads", "7", *out],
            ["train", "--size", "huge", *out],
            ["resume", str(folder / "missing")],
            ["generate", str(folder / "missing")],
            ["tokenize", "--data", str(folder / "empty.txt"), *out],
        ]
        before = sorted(folder.rglob("*"))
        for words in mistakes:
            number, errors = call(main, words)
            said = "`glassgpt " + " ".join(words).replace(name, "...") + "`"
            assert number == 2, f"{said} left with exit code {number}, not 2"
            assert "Traceback" not in errors, f"{said} printed a traceback"
            assert len(errors.strip()) > 20, f"{said} did not say what was wrong"
            left = sorted({*folder.rglob("*")} - {*before})
            assert not left, f"{said} left {left[0].name} behind"
        (folder / "long.txt").write_text("To be, or not to be\n" * 100)
        right = ["tokenize", "--data", "long.txt", "--tokenizer", "char", *out]
        assert call(main, right)[0] == 0, "a line without a mistake was refused"
