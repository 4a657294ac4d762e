"""Importing the package is light: what is slow to import waits until it is used."""

import subprocess
import sys

import pytest

import glassgpt

HEAVY = [
    "matplotlib",
    "tyro",
    "IPython",
    "transformers",
    "tokenizers",
    "torch._dynamo",
    "glassgpt.checks",
]


def modules_after(statement):
    """The names in sys.modules after a statement in a fresh interpreter."""
    code = f"import sys\n{statement}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.fixture(scope="module")
def loaded():
    return modules_after("import glassgpt")


@pytest.mark.parametrize("heavy", HEAVY)
def test_import_leaves_out(loaded, heavy):
    assert heavy not in loaded


def test_the_measurement_sees_a_heavy_import():
    assert "matplotlib" in modules_after("import matplotlib")


def test_checks_come_when_they_are_asked_for():
    statement = "import glassgpt\nglassgpt.checks.check_softmax"
    assert "glassgpt.checks.softmax" in modules_after(statement)


def test_a_name_that_does_not_exist_is_named():
    with pytest.raises(AttributeError, match="glassgpt.*has no attribute 'chekcs'"):
        glassgpt.chekcs  # noqa: B018
