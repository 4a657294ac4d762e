"""Reading times: computed from words and open code, and up to date in every chapter."""

import json

import pytest
import reading_time as tool


def notebook(*cells):
    made = [{"cell_type": "markdown", "source": ["# T\n", "\n", "*READING-TIME*"]}]
    return {"cells": made + [{"metadata": {}, **cell} for cell in cells]}


def text(words):
    return {"cell_type": "markdown", "source": ["word " * words]}


def code(lines, *tags):
    return {"cell_type": "code", "source": ["x\n"] * lines, "metadata": {"tags": tags}}


def test_every_chapter_says_how_long_it_takes(capsys):
    assert tool.main(["--check"]) == 0, capsys.readouterr().out


@pytest.mark.parametrize(
    ("cells", "wanted"),
    [
        ([], 5),
        ([text(85 * 20)], 20),
        ([code(13 * 30)], 30),
        ([text(85 * 10), code(13 * 10)], 20),
        ([text(85 * 10), code(1000, "hide-input"), code(1000, "hide-cell")], 10),
        ([text(85 * 10), {"cell_type": "markdown", "source": ["$$x$$ " * 10]}], 20),
    ],
)
def test_words_lines_and_equations_count_and_what_is_folded_does_not(cells, wanted):
    assert tool.minutes(notebook(*cells)) == wanted


def test_folded_answers_do_not_count():
    answer = "<details><summary>Answers</summary>\n" + "word " * 5000 + "</details>"
    cell = {"cell_type": "markdown", "source": [answer]}
    assert tool.minutes(notebook(text(850), cell)) == 10


def test_the_sentence_is_written_once_and_then_stays(tmp_path, capsys):
    path = tmp_path / "01_x.ipynb"
    path.write_text(json.dumps(notebook(text(85 * 20))), "utf-8")
    book = ["--book", str(tmp_path)]
    assert tool.main([*book, "--check"]) == 1
    assert tool.main(book) == 0
    assert "About 20 minutes to read" in path.read_text("utf-8")
    before = path.read_bytes()
    assert tool.main([*book, "--check"]) == 0
    assert tool.main(book) == 0
    assert path.read_bytes() == before


def test_a_chapter_without_the_line_is_named(tmp_path, capsys):
    (tmp_path / "01_x.ipynb").write_text(json.dumps({"cells": [text(3)]}), "utf-8")
    assert tool.main(["--book", str(tmp_path), "--check"]) == 1
    assert "01_x.ipynb" in capsys.readouterr().out
