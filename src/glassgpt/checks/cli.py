# Written by tools/tangle.py from book/a3_command_line.ipynb: change it there.
"""Checks of the command line."""

import contextlib
import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import glassgpt


def call(main: Callable[[list[str]], int], words: list[str]) -> tuple[int, str, str]:
    """Run a command line; return its exit code, its result and what it said of it.

    Book: a3_command_line.html#the-check
    """
    result, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(result):
        try:
            number = main(words)
        except SystemExit as leaving:
            number = leaving.code if isinstance(leaving.code, int) else 1
        except Exception as error:
            name = type(error).__name__
            raise AssertionError(
                f"`glassgpt {words[0]}` ended in a traceback: {name}"
            ) from error
    return number, result.getvalue(), errors.getvalue()


def check_mistakes(main: Callable[[list[str]], int]) -> None:
    """Mistakes end in exit code 2 and a sentence, write nothing; faults come out.

    Book: a3_command_line.html#the-check
    """
    with tempfile.TemporaryDirectory() as name, contextlib.chdir(name):
        folder = Path(name)
        (folder / "empty.txt").write_text("")
        (folder / "short.txt").write_text("To be, or not to be\n")
        (folder / "picture.png").write_bytes(b"\x89PNG\r\n\xff\xfe\x00")
        mistakes = {  # and what its sentence has to name
            "train --data missing.txt --out new": "missing.txt",
            "train --data empty.txt --out new": "empty.txt",
            "train --data short.txt --tokenizer char --out new": "text",
            "train --data picture.png --out new": "picture.png",
            "train --data short.txt --heads 7 --out new": "heads",
            "train --size huge --out new": "huge",
            "resume missing": "missing",
            "generate missing": "missing",
            "tokenize --data empty.txt --out new": "empty.txt",
            "tain --data short.txt": "train",
            "train --learning-pace 1 --out new": "--learning-rate",
        }
        before = {path: path.read_bytes() for path in folder.iterdir()}
        for line, named in mistakes.items():
            number, result, errors = call(main, line.split())
            said, own = f"`glassgpt {line}`", {*errors.split()} - {*line.split()}
            assert number == 2, f"{said} left with exit code {number}, not 2"
            assert "Traceback" not in errors, f"{said} printed a traceback"
            assert len(own) > 2, f"{said} did not say what was wrong"
            assert "\n" not in errors.strip(), f"{said} said more than a sentence"
            assert named in errors.lower(), f"{said}: its sentence names no {named}"
            begun = line.startswith("train")  # its plan stands there already
            assert begun or not result, f"{said} printed {result!r} as a result"
            left = sorted({*folder.rglob("*")} - {*before})
            assert not left, f"{said} left {left[0].name} behind"
            for path, content in before.items():
                same = path.exists() and path.read_bytes() == content
                assert same, f"{said} changed {path.name}"
        (folder / "long.txt").write_text("To be, or not to be\n" * 100)
        right = ["tokenize", "--data", "long.txt", "--tokenizer", "char"]
        right = [*right, "--out", "new"]

        def stumble(*_: object, **__: object) -> None:
            "text".index("T")  # raises a ValueError, and no line of ours refuses

        def unread(*_: object, **__: object) -> None:
            json.loads("")  # a ValueError that another module raises

        def misled(*_: object, **__: object) -> object:
            return glassgpt.nowhere  # a `raise` of ours, and no mistake of the user

        kinds = (KeyError, RuntimeError, TypeError, AttributeError, IndexError)
        kinds += (ZeroDivisionError, AssertionError)
        faults: dict[Any, type] = {kind("ours"): kind for kind in kinds}
        faults |= {stumble: ValueError, unread: ValueError, misled: AttributeError}
        others = {  # broken by a KeyError, and a line that uses it
            "glassgpt.load": ["generate", "run"],
            "tyro.cli": ["generate", "run"],
            "glassgpt.make_plan": ["train", "--data", "long.txt", "--out", "made"],
            "glassgpt.resume_run": ["resume", "run"],
        }
        learning = "glassgpt.tokens.CharTokenizer.train"
        tries = [(fault, kind, learning, right) for fault, kind in faults.items()]
        tries += [(KeyError("ours"), KeyError, *other) for other in others.items()]
        for fault, kind, place, words in tries:
            came = None
            with patch(place, side_effect=fault) as broken:
                try:
                    call(main, words)
                except AssertionError as error:
                    came = error.__cause__
            hid = f"`glassgpt {words[0]}` hid a fault in {place}, a {kind.__name__}"
            unused = words is not right and not broken.called
            assert unused or isinstance(came, kind), hid
        assert call(main, right)[0] == 0, "a line without a mistake was refused"
        assert (folder / "new" / "tokens.json").exists(), "tokenize wrote no tokens"
