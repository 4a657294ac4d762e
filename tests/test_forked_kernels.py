"""A kernel that is forked is, to a notebook, a new one."""

import os
import sys
from pathlib import Path

import pytest
from nbval.kernel import CURRENT_ENV_KERNEL_NAME, start_new_kernel

if sys.platform != "linux":
    pytest.skip("kernels are forked under Linux alone", allow_module_level=True)

from forked_kernels import ForkedKernel


@pytest.fixture
def kernel(tmp_path):
    manager, client = start_new_kernel(60, CURRENT_ENV_KERNEL_NAME, cwd=str(tmp_path))
    yield manager, client
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def test_it_knows_what_a_new_one_knows(kernel, tmp_path):
    """Nothing of the tests, and of the package what is imported; its folders go."""
    manager, client = kernel
    code = """
import importlib.util, os, pathlib, sys, tempfile
import glassgpt
place = tempfile.TemporaryDirectory(dir=".")
assert importlib.util.find_spec("names") is None
assert not hasattr(glassgpt, "figures")
pathlib.Path("ran").write_text(os.getcwd())
"""
    reply = client.execute_interactive(code, timeout=60)["content"]
    assert reply["status"] == "ok", reply
    assert (tmp_path / "ran").read_text() == str(tmp_path)
    assert isinstance(manager.provisioner.process, ForkedKernel)
    manager.shutdown_kernel()
    assert [path.name for path in tmp_path.iterdir()] == ["ran"]


def test_its_death_is_seen(kernel):
    manager, client = kernel
    client.execute("import os; os._exit(3)")
    manager.provisioner.process.wait()
    assert not manager.is_alive()


def test_one_that_cannot_start_says_so():
    nowhere = Path("nowhere", "at", "all")
    with pytest.raises(RuntimeError, match="ended with 1 at its start"):
        ForkedKernel(["python", "-f", "x"], nowhere, dict(os.environ))
