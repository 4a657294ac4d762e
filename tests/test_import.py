"""Importing the package is light: what is slow to import waits until it is used."""

import subprocess
import sys

import pytest

import glassgpt

HEAVY = [
    "matplotlib",
    "tyro",
    "filelock",
    "IPython",
    "transformers",
    "tokenizers",
    "torch._dynamo",
    "glassgpt.checks",
]


PARTS = ("import glassgpt", "import glassgpt.checks.softmax", "import matplotlib")


@pytest.fixture(scope="module")
def loaded():
    """The names in sys.modules of a fresh interpreter, after each of PARTS."""
    lines = ["import sys", *(f"{part}\nprint(*sys.modules)" for part in PARTS)]
    command = [sys.executable, "-c", "\n".join(lines)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = map(str.split, done.stdout.splitlines())
    return dict(zip(PARTS, names, strict=True))


@pytest.mark.parametrize("heavy", HEAVY)
def test_import_leaves_out(loaded, heavy):
    assert heavy not in loaded["import glassgpt"]


def test_the_measurement_sees_a_heavy_import(loaded):
    assert "matplotlib" in loaded["import matplotlib"]


def test_checks_come_when_they_are_asked_for(loaded):
    assert "glassgpt.checks.softmax" in loaded["import glassgpt.checks.softmax"]


def test_a_name_that_does_not_exist_is_named():
    with pytest.raises(AttributeError, match="glassgpt.*has no attribute 'chekcs'"):
        glassgpt.chekcs  # noqa: B018


def test_importing_touches_no_signal_handler():
    code = """
import signal, sys
sys.orig_argv = ["python", "-m glassgpt"]
sys.argv[0] = "glassgpt"
before = [signal.getsignal(number) for number in signal.valid_signals()]
import glassgpt
assert before == [signal.getsignal(number) for number in signal.valid_signals()]
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_dir_lists_the_names_that_a_program_needs():
    shown = dir(glassgpt)
    assert {"GPT", "KeyValueCache", "TokenData", "generate"} <= set(shown)
    assert not {"sys", "Any", "import_module", "tokens", "runs"} & set(shown)
    assert len(shown) < 60
    assert all(hasattr(glassgpt, name) for name in shown)
