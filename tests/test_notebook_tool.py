"""The notebook tool: a round trip keeps ids, a second run gives the same bytes."""

import nbformat
import notebook as tool
import pytest

TEXT = """# %% [markdown]
# # Title

# %% id="first" tags=["remove-cell"]
#| default_exp x
if False:
    %pip install -q nothing

# %%
object()

# %%
object()

# %%
print("same")
"""


@pytest.fixture
def chapter(tmp_path):
    path = tmp_path / "chapter.ipynb"
    nbformat.write(tool.from_text(TEXT), path)
    return path


def test_every_cell_gets_an_id_of_its_own(chapter):
    ids = [cell.id for cell in nbformat.read(chapter, 4).cells]
    assert ids[1] == "first"
    assert len(set(ids)) == len(ids) == 5


def test_round_trip_keeps_ids_tags_and_sources(chapter):
    before = nbformat.read(chapter, 4).cells
    after = tool.from_text(tool.to_text(chapter)).cells
    assert [cell.id for cell in after] == [cell.id for cell in before]
    assert [cell.source for cell in after] == [cell.source for cell in before]
    assert after[1].metadata.tags == ["remove-cell"]


def test_magics_stay_magics(chapter):
    assert "\n    %pip install" in nbformat.read(chapter, 4).cells[1].source


def test_second_run_gives_the_same_bytes(chapter):
    tool.run(chapter)
    once = chapter.read_bytes()
    assert b"same" in once
    assert b"0x000000000000" in once
    tool.run(chapter)
    assert chapter.read_bytes() == once


def test_no_widget_is_stored_beside_its_still(tmp_path):
    path = tmp_path / "live.ipynb"
    made = (
        "import ipywidgets\n\nclass Live(ipywidgets.IntSlider):\n"
        "    def _repr_html_(self):\n        return '<p>'\n\nLive()"
    )
    nbformat.write(tool.from_text(f"# %%\n{made}\n"), path)
    tool.run(path)
    notebook = nbformat.read(path, 4)
    [output] = notebook.cells[0].outputs
    assert set(output.data) == {"text/html", "text/plain"}
    assert "widgets" not in notebook.metadata


def test_a_failing_cell_leaves_the_file_alone_and_says_so(tmp_path, capsys):
    path = tmp_path / "broken.ipynb"
    nbformat.write(tool.from_text("# %%\n1 / 0\n"), path)
    before = path.read_bytes()
    assert tool.main(["run", str(path)]) == 1
    assert "ZeroDivisionError" in capsys.readouterr().err
    assert path.read_bytes() == before
