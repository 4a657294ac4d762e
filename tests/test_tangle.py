"""The tangler: markers, imports, links in docstrings, and what --check finds."""

import json

import pytest
import tangle

HEAD = '#| export\n"""Scores."""\n\nimport math'
FUNCTION = '#| export\ndef double(x):\n    """Twice x."""\n    return 2 * x'


def write_chapter(book, *cells, name="05_scores"):
    """Write a notebook; a cell that starts with `# ` and a capital is Markdown."""
    book.mkdir(exist_ok=True)
    made = []
    for text in cells:
        kind = "markdown" if text.startswith(("# ", "## ")) else "code"
        made.append({"cell_type": kind, "source": text.splitlines(keepends=True)})
    path = book / f"{name}.ipynb"
    path.write_text(json.dumps({"cells": made}), "utf-8")
    return path


@pytest.fixture
def run(tmp_path):
    """Call the tangler on a temporary book and package."""

    def call(*arguments):
        places = ["--book", tmp_path / "book", "--package", tmp_path / "package"]
        return tangle.main([*arguments, *map(str, places)])

    return call


@pytest.fixture
def chapter(tmp_path, run):
    """A small chapter that has been tangled; the path of its module."""
    cells = ("# Scores", "#| default_exp scores", HEAD, "## The function", FUNCTION)
    write_chapter(tmp_path / "book", *cells)
    assert run() == 0
    return tmp_path / "package" / "scores.py"


def test_module_reads_as_if_written_by_hand(chapter):
    assert chapter.read_text("utf-8") == (
        "# Written by tools/tangle.py from book/05_scores.ipynb: change it there.\n"
        '"""Scores."""\n\nimport math\n\n\n'
        'def double(x):\n    """Twice x.\n\n'
        '    Book: 05_scores.html#the-function\n    """\n    return 2 * x\n'
    )


def test_later_imports_move_to_the_top(tmp_path, run):
    cells = ["#| default_exp scores", HEAD, FUNCTION, "#| export\nimport re"]
    write_chapter(tmp_path / "book", *cells)
    run()
    text = (tmp_path / "package" / "scores.py").read_text("utf-8")
    assert text.index("import re") < text.index("def double")


def test_a_marker_may_name_another_module(tmp_path, run):
    other = FUNCTION.replace("export", "export checks.scores")
    write_chapter(tmp_path / "book", "#| default_exp scores", HEAD, other)
    run()
    assert "double" in (tmp_path / "package" / "checks" / "scores.py").read_text()
    assert "double" not in (tmp_path / "package" / "scores.py").read_text()


def test_cells_without_a_marker_stay_in_the_book(tmp_path, run):
    write_chapter(tmp_path / "book", "#| default_exp scores", HEAD, "secret = 1")
    run()
    assert "secret" not in (tmp_path / "package" / "scores.py").read_text()


@pytest.mark.parametrize(
    ("heading", "anchor"),
    [
        ("## The function", "the-function"),
        ("## `softmax`, and its $\\tau$", "softmax-and-its-tau"),
        ("## Exercise 1: Some words", "exercise-1-some-words"),
        ("## 3 heads", "heads"),
    ],
)
def test_links_name_the_anchor_of_the_section(tmp_path, run, heading, anchor):
    write_chapter(tmp_path / "book", "#| default_exp scores", heading, FUNCTION)
    run()
    text = (tmp_path / "package" / "scores.py").read_text("utf-8")
    assert f"Book: 05_scores.html#{anchor}\n" in text


def test_check_passes_on_what_was_just_written(chapter, run):
    assert run("--check") == 0


def test_check_finds_an_edited_module(chapter, run, capsys):
    chapter.write_text(chapter.read_text("utf-8").replace("2 * x", "3 * x"), "utf-8")
    assert run("--check") == 1
    assert "-    return 3 * x" in capsys.readouterr().out


def test_check_finds_a_missing_module(chapter, run, capsys):
    chapter.unlink()
    assert run("--check") == 1
    assert "scores.py differs from the chapters" in capsys.readouterr().out
    assert not chapter.exists(), "--check must not write"


def test_check_finds_an_extra_module(chapter, run, capsys):
    (chapter.parent / "extra.py").write_text("x = 1\n", "utf-8")
    assert run("--check") == 1
    assert "no chapter exports" in capsys.readouterr().out


def test_an_empty_init_needs_no_chapter_but_a_line_in_it_does(chapter, run):
    init = chapter.parent / "__init__.py"
    init.touch()
    assert run("--check") == 0
    init.write_text("x = 1\n", "utf-8")
    assert run("--check") == 1


def test_export_before_default_exp_is_an_error(tmp_path, run, capsys):
    write_chapter(tmp_path / "book", FUNCTION)
    assert run() == 2
    assert "before any `#| default_exp NAME`" in capsys.readouterr().err


def test_exported_magic_is_an_error_that_names_the_notebook(tmp_path, run, capsys):
    write_chapter(tmp_path / "book", "#| default_exp a", "#| export\n%time x = 1")
    assert run() == 2
    error = capsys.readouterr().err
    assert "05_scores.ipynb" in error
    assert "not plain Python" in error
