"""What tests share: the built page, and a loud word when no browser was found."""

import gc
import json
import os
import signal
import subprocess
import sys
from functools import partialmethod
from pathlib import Path

import pytest
from browser import FLAGS, find_browser
from hypothesis import settings
from xdist.scheduler import LoadFileScheduling

if os.name == "nt":  # the texts that tests write have the same bytes everywhere
    Path.write_text = partialmethod(Path.write_text, newline="\n")
# Programs started in the background, or under nohup, hand ignored signals on to theirs.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

settings.register_profile("no clock", deadline=None)
settings.load_profile("no clock")
if sys.platform == "linux":  # elsewhere a fork may break what is loaded
    from forked_kernels import fork_kernels

    fork_kernels()
ROOT = Path(__file__).parent.parent


def build_page(target):
    """Build the book as `make book` does, into another folder; warnings are errors."""
    subprocess.run([sys.executable, ROOT / "tools" / "vendor.py"], cwd=ROOT, check=True)
    book = [Path(sys.executable).with_name("jupyter-book"), "build", ".", "-q", "--all"]
    strict = ["-W", "-n", "--keep-going", "--path-output", str(target)]
    done = subprocess.run(book + strict, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return Path(target) / "_build" / "html"


@pytest.fixture(scope="session")
def chromium():
    """The path of a Chromium; where there is none, what needs one is left out."""
    path = find_browser()
    if path is None and os.environ.get("GLASSGPT_REQUIRE_BROWSER") != "1":
        pytest.skip("no Chromium or Chrome was found")
    assert path, "GLASSGPT_REQUIRE_BROWSER=1, but no Chromium or Chrome was found"
    return path


@pytest.fixture(scope="module")
def browser(chromium):
    """A headless Chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=chromium, args=FLAGS)
        yield started
        started.close()


@pytest.fixture(scope="session")
def site(chromium, tmp_path_factory):
    """The built page. One worker builds it, and has all tests that ask for it."""
    return build_page(tmp_path_factory.mktemp("site"))


class WholeFiles(LoadFileScheduling):
    """One worker runs a whole file, and the one that has the page prints it, too."""

    def _split_scope(self, nodeid):
        return super()._split_scope(nodeid).replace("test_pdf", "test_page")


def pytest_xdist_make_scheduler(config, log):
    return WholeFiles(config, log)


def pytest_collection_modifyitems(items):
    """The page takes longest: one worker begins with it, the other has the rest."""
    items.sort(key=lambda item: "test_page" not in item.nodeid)


def pytest_collection_finish():
    """What is imported by now stays: nobody who counts objects meets it again."""
    gc.collect()
    gc.freeze()


def pytest_terminal_summary(terminalreporter):
    """Say at the end, where it is seen, that the page was not tested in a browser."""
    if find_browser() is None:
        terminalreporter.section("PAGE NOT TESTED IN A BROWSER", red=True, bold=True)
        terminalreporter.line(
            "No Chromium or Chrome was found, so the tests of the page and of the PDF "
            "were left out. Install one, or set GLASSGPT_BROWSER to its path."
        )


@pytest.fixture
def names_in():
    """What the code of a cell names, by the file of its chapter and its id."""

    def names(chapter, wanted, **names):
        cells = json.loads((ROOT / "book" / chapter).read_text("utf-8"))["cells"]
        (cell,) = (cell for cell in cells if cell["id"] == wanted)
        exec("".join(cell["source"]), names)
        return names

    return names
