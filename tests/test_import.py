"""Importing the package is light: what is slow to import waits until it is used."""

import subprocess
import sys

import pytest

HEAVY = ["matplotlib", "IPython", "transformers", "tokenizers", "torch._dynamo"]


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
