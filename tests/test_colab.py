"""The twin of Colab: what it would overlook if it were wrong."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import address
import colab as tool
import literate
import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output
from pin import pin

ROOT = Path(__file__).parent.parent
CHAPTERS = sorted((ROOT / "book").glob("*.ipynb"))
REPOSITORY, _ = address.current(ROOT)


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_a_pinned_chapter_installs_one_commit_and_is_otherwise_the_same(path):
    text = path.read_text("utf-8")
    before = nbformat.reads(text, 4).cells
    after = nbformat.reads(pin(text, REPOSITORY, "c0ffee"), 4).cells
    changed = [
        (old.id, new.source)
        for old, new in zip(before, after, strict=True)
        if old != new
    ]
    ((cell, source),) = changed
    assert cell == "setup"
    assert f"%pip install -q git+{REPOSITORY}@c0ffee\n" in source


def test_a_chapter_is_pinned_once():
    with pytest.raises(ValueError, match="once, not 0"):
        pin(f"git+{REPOSITORY}@c0ffee", REPOSITORY, "c0ffee")
    with pytest.raises(ValueError, match="once, not 2"):
        pin(2 * f"git+{REPOSITORY} ", REPOSITORY, "c0ffee")


def test_a_package_that_changed_or_went_is_told_and_a_new_one_is_not():
    before = {"numpy": "2.1.3", "future": "1.0.0", "torch": "2.11.0"}
    after = {"numpy": "2.1.3", "future": "0.18.3", "glassgpt": "0.1.0"}
    assert tool.replaced(before, after) == [
        "future 1.0.0 was replaced by 0.18.3",
        "torch 2.11.0 was replaced by None",
    ]


def test_errors_are_told_but_for_those_that_are_shown_on_purpose():
    error = new_output("error", ename="KeyError", evalue="'a'")
    cells = [
        new_code_cell("1", id="fine", outputs=[new_output("stream", text="1")]),
        new_code_cell("2", id="meant", outputs=[error]),
        new_code_cell("3", id="broken", outputs=[error]),
    ]
    cells[1].metadata.tags = ["raises-exception"]
    found = tool.failures(new_notebook(cells=cells))
    assert found == ["cell broken: KeyError: 'a'"]


def test_the_time_begins_after_the_package_is_installed():
    notebook = new_notebook(cells=[new_code_cell(name) for name in "abcd"])
    for minute, cell in enumerate(notebook.cells[:3]):
        begin = f"2026-01-01T00:0{minute}:00.000000Z"
        end = f"2026-01-01T00:0{minute}:0{minute + 5}.500000Z"
        times = {"iopub.execute_input": begin, "shell.execute_reply": end}
        cell.metadata.execution = times
    assert tool.seconds(notebook) == 7.5


def test_the_memory_of_children_and_their_children_is_seen():
    hold = "held = bytearray(100_000_000); print(flush=True); input()"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {hold!r}])"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with (
        tool.MemoryWatch() as watch,
        subprocess.Popen([sys.executable, "-c", code], **pipes) as child,
    ):
        child.stdout.readline()  # it holds them
        for _ in range(3000):
            if watch.peak < 100e6:
                time.sleep(0.01)
        child.communicate(b"\n")
    assert 100e6 < watch.peak < 1e9


def test_nothing_of_ours_reaches_a_chapter(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(tool, "TWIN", tmp_path)
    served, commit = tool.snapshot()
    got = tool.environment(tmp_path / "twin", tmp_path, REPOSITORY, served)
    assert not {"PYTHONPATH", "OMP_NUM_THREADS"} & set(got)
    assert got["PATH"].split(os.pathsep)[0] == str(tmp_path / "twin" / "bin")
    clone = ["git", "clone", "-q", REPOSITORY, "clone"]
    subprocess.run(clone, env=got, cwd=tmp_path, check=True, timeout=60)
    done = subprocess.run(
        ["git", "rev-parse", "HEAD"],
        cwd=tmp_path / "clone",
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == commit
    assert {path.name for path in (tmp_path / "clone").iterdir()} == {
        ".git",
        *tool.PACKAGE,
    }


def test_unknown_chapters_are_refused():
    assert [path.stem[:2] for path in tool.chapters(["13", "05"])] == ["05", "13"]
    assert tool.chapters([]) == CHAPTERS
    with pytest.raises(SystemExit, match="no chapter"):
        tool.chapters(["05", "99"])


def test_what_was_measured_are_chapters_of_today():
    """`python tools/colab.py --record` with its number adds one."""
    record = json.loads(tool.RECORD.read_text("utf-8"))
    assert record["chapters"]
    assert set(record["chapters"]) == {path.stem for path in CHAPTERS}


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (1.2, "about 5 seconds, with 0.5 GB"),
        (41, "about 40 seconds, with 0.5 GB"),
        (89, "about 90 seconds, with 0.5 GB"),
        (100, "about 2 minutes, with 0.5 GB"),
    ],
)
def test_costs_in_words(seconds, words):
    assert words in literate.running_cost(seconds, 0.54, 2)
