"""A chapter in JupyterLab, in a browser: opened, run, moved, its exercise solved."""

import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path

import pytest

BOOK = Path(__file__).parent.parent / "book"
CHAPTER = "05_softmax.ipynb"
NOTEBOOK = "window.jupyterapp.shell.currentWidget.content"
OPENED = (
    f"() => window.jupyterapp?.shell.currentWidget && {NOTEBOOK}.widgets.length > 9"
)
FIND = f"id => {NOTEBOOK}.widgets.findIndex(cell => cell.model.id === id)"
GO = (
    f"index => {{ {NOTEBOOK}.activeCellIndex = index; {NOTEBOOK}.scrollToItem(index) }}"
)
RUN = "command => window.jupyterapp.commands.execute('notebook:' + command)"
OUTPUTS = f"""() => {NOTEBOOK}.model.sharedModel.cells.flatMap(cell =>
  (cell.outputs ?? []).map(output => [cell.getId(), output.output_type]))"""


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """The address of a JupyterLab with a copy of the book, which trusts no notebook."""
    folder = tmp_path_factory.mktemp("lab")
    shutil.copytree(BOOK, folder / "book")
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    token = secrets.token_hex()
    places = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR")
    places = {name: str(folder / name) for name in (*places, "IPYTHONDIR")}
    settings = [f"--port={port}", "--allow-root", "--no-browser"]
    settings += ["--expose-app-in-browser", f"--ServerApp.root_dir={folder / 'book'}"]
    settings += [f"--IdentityProvider.token={token}", "--LabApp.news_url="]
    settings += ["--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    lab = subprocess.Popen(
        [sys.executable, "-m", "jupyterlab", *settings],
        env=os.environ | places,
        stderr=subprocess.PIPE,
        text=True,
    )
    said = []
    assert any(said.append(line) or "is running at" in line for line in lab.stderr), (
        said
    )
    threading.Thread(target=lab.stderr.read, daemon=True).start()
    yield f"http://127.0.0.1:{port}/lab/tree/{CHAPTER}?reset&token={token}"
    lab.terminate()
    lab.wait()


@pytest.fixture(scope="module")
def page(browser, address):
    """The chapter, opened and not run yet; `page.trouble` collects what goes wrong."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(120_000)
    page.trouble = []
    page.on("pageerror", lambda error: page.trouble.append(str(error)))
    page.on(
        "console",
        lambda line: line.type == "error" and page.trouble.append(line.text),
    )
    page.goto(address)
    page.wait_for_function(OPENED)
    return page


@pytest.fixture(scope="module")
def run(page):
    """The chapter after all its cells have run."""
    page.evaluate(f"() => {NOTEBOOK}.parent.sessionContext.ready")
    page.evaluate(RUN, "run-all-cells")
    return page


def go(page, name):
    """Make a cell the active one, and return its place on the screen."""
    page.evaluate(GO, page.evaluate(FIND, name))
    cell = page.locator(".jp-Cell.jp-mod-active")
    cell.scroll_into_view_if_needed()
    return cell


def described(cell):
    """The descriptions of the pictures that can be seen in a cell."""
    pictures = cell.locator(".jp-OutputArea-output [role=img]:visible")
    return [picture.get_attribute("aria-label") for picture in pictures.all()]


def test_before_it_is_run_a_chapter_says_why_its_figures_are_missing(page):
    cell = go(page, "figure-exp")
    assert "choose Trust Notebook" in cell.inner_text()
    assert described(cell) == []


def test_all_cells_run(run):
    outputs = run.evaluate(OUTPUTS)
    assert len(outputs) > 40
    assert [name for name, kind in outputs if kind == "error"] == []
    cell = go(run, "figure-exp")
    assert len(described(cell)) == 1
    assert "Trust Notebook" not in cell.inner_text()


def test_nothing_stands_raw_that_is_meant_for_the_page(run):
    text = run.locator(".jp-Notebook").inner_text()
    assert not re.search(r"\{[a-z:]+\}`|^:::", text, re.MULTILINE)
    cell = go(run, "c1016331a")
    assert "[Ackley et al., 1985]" in cell.inner_text()


def test_keys_move_a_slider_and_not_the_notebook(run):
    cell = go(run, "figure-temperature")
    [before] = described(cell)
    cell.locator("input[type=range]").press("ArrowDown")
    [after] = described(cell)
    assert after != before
    assert run.evaluate(FIND, "figure-temperature") == run.evaluate(
        f"() => {NOTEBOOK}.activeCellIndex"
    )


def test_a_live_control_draws_again(run):
    cell = go(run, "live-scores")
    [before] = described(cell)
    assert before.startswith("86 added to all scores.")
    cell.get_by_role("slider").first.press("ArrowRight")
    cell.get_by_role("img", name="87 added to all scores.").wait_for()


def answer(page, code):
    """Type code into the stub of exercise 1, and return what its grading says."""
    go(page, "exercise-1").locator(".cm-content").click()
    page.keyboard.press("ControlOrMeta+a")
    page.keyboard.insert_text(code)
    page.evaluate(RUN, "run-cell")
    cell = go(page, "exercise-1-grade")
    page.evaluate(RUN, "run-cell")
    return cell.locator(".jp-OutputArea-output").inner_text()


def test_an_exercise_is_failed_and_then_passed(run):
    assert answer(run, "my_masked_softmax = wrong_order").startswith("Not yet: ")
    right = "my_masked_softmax = solution_masked_softmax"
    assert answer(run, right).startswith("Correct: ")


def test_the_browser_reports_no_error(run):
    assert run.trouble == []
