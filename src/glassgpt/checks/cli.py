# Written by tools/tangle.py from book/a3_command_line.ipynb: change it there.
"""The check of the command line."""

import contextlib
import io
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch


def call(main: Callable[[list[str]], int], words: list[str]) -> tuple[int, str, str]:
    """Run a command line; return its exit code and its two outputs.

    Book: a3_command_line.html#exercise-2-a-command-that-keeps-the-rules
    """
    result, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(result):
        try:
            code = main(words)
        except SystemExit as leaving:
            code = leaving.code if isinstance(leaving.code, int) else 1
    return code, result.getvalue(), errors.getvalue()


def check_count(main: Callable[[list[str]], int]) -> None:
    """A program that counts characters, and answers mistakes with exit code 2.

    Book: a3_command_line.html#exercise-2-a-command-that-keeps-the-rules
    """
    with tempfile.TemporaryDirectory() as name, contextlib.chdir(name):
        Path("right.txt").write_text("größe\n\n", "utf-8")
        Path("bytes.txt").write_bytes(b"word\xff")
        code, result, _ = call(main, ["right.txt"])
        assert code == 0, f"`count right.txt` left with exit code {code}, not 0"
        assert result.strip() == "7", f"`count right.txt` printed {result!r}, not 7"
        for line in ("", ".", "missing.txt", "bytes.txt", "right.txt right.txt"):
            try:
                code, result, errors = call(main, line.split())
            except (OSError, ValueError, IndexError) as error:
                name = type(error).__name__
                raise AssertionError(f"`count {line}` ended in {name}") from error
            assert code == 2, f"`count {line}` left with exit code {code}, not 2"
            assert not result, f"`count {line}` printed {result!r} as a result"
            assert " " in errors.strip(), f"`count {line}` did not say what is wrong"
            assert "Traceback" not in errors, f"`count {line}` printed a traceback"
        fault = KeyError("ours")
        with (
            patch("builtins.open", side_effect=fault) as one,
            patch("io.open", side_effect=fault) as two,
        ):
            hidden = True
            try:
                call(main, ["right.txt"])
            except KeyError:
                hidden = False
        used = one.called or two.called
        assert not (used and hidden), "a fault, a KeyError inside, was hidden"
