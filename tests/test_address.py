"""The repository's address: one place, one command, and no other address anywhere."""

import re
import shutil
import subprocess
from pathlib import Path

import address
import nbformat
import pytest
import yaml

ROOT = Path(__file__).parent.parent

NEW = "https://github.com/you/yours"
# Anybody's copy of this book: the name it was born with, or the one it has now.
NAMES = f"(?:glassgpt|{Path(address.current(ROOT)[0]).name})"
OWN = re.compile(rf"github\.com/[\w-]+/{NAMES}\b|[\w-]+\.github\.io/{NAMES}\b")


def tracked():
    """The files that are or will be committed, without this test and its tool."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True)
    for name in sorted(set(done.stdout.splitlines())):
        path = ROOT / name
        if path.name not in ("test_address.py", "address.py") and path.is_file():
            yield path


def addresses(path):
    """The addresses of this book that stand in a file, whoever's they are."""
    text = path.read_text("utf-8", errors="replace")
    return {found[0] for found in OWN.finditer(text)}


def test_no_other_address_stands_anywhere():
    repository, page = address.current(ROOT)
    allowed = (repository + "/", page)
    for path in tracked():
        for found in addresses(path):
            assert any(found in own for own in allowed), f"{found} in {path}"


def test_the_two_addresses_belong_together():
    repository, page = address.current(ROOT)
    assert address.page_address(repository) == page


@pytest.fixture
def copy(tmp_path):
    """A copy of every file that may hold an address."""
    for path in address.carriers(ROOT):
        target = tmp_path / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    return tmp_path


def test_one_command_changes_it_everywhere(copy, capsys):
    old_repository, old_page = address.current(copy)
    owner_and_name = old_repository.removeprefix("https://github.com/")
    old_colab = f"colab.research.google.com/github/{owner_and_name}"
    assert any(old_colab in path.read_text("utf-8") for path in copy.glob("*.md"))
    assert address.main([NEW], copy) == 0
    said = capsys.readouterr().out
    for name in ("_config.yml", "pyproject.toml", "README.md"):
        assert f"{name}: " in said
    for path in copy.rglob("*.*"):
        text = path.read_text("utf-8") if path.is_file() else ""
        assert old_repository not in text, path
        assert old_page not in text, path
        assert old_colab not in text, path
    config = yaml.safe_load((copy / "_config.yml").read_text("utf-8"))
    assert config["repository"]["url"] == NEW
    assert config["html"]["baseurl"] == "https://you.github.io/yours/"


def test_only_the_setup_cell_and_citations_of_a_notebook_change(copy):
    address.main([NEW], copy)
    for path in (copy / "book").glob("*.ipynb"):
        before = nbformat.read(ROOT / "book" / path.name, 4).cells
        after = nbformat.read(path, 4).cells
        changed = [old for old, new in zip(before, after, strict=True) if old != new]
        others = [cell for cell in changed if "/references.html#" not in cell.source]
        # A published page has a link to the book, and so has the command's help.
        links = ("export-publish", "export-main")
        names = [cell.id for cell in others if cell.id not in links]
        assert names == ["setup"], path.name


def test_there_and_back_gives_the_same_bytes(copy):
    old, _ = address.current(copy)
    before = {path: path.read_bytes() for path in address.carriers(copy)}
    address.main([NEW], copy)
    assert {path: path.read_bytes() for path in address.carriers(copy)} != before
    address.main([old], copy)
    assert {path: path.read_bytes() for path in address.carriers(copy)} == before


def test_a_longer_name_is_another_repository(copy):
    old, _ = address.current(copy)
    readme = copy / "README.md"
    readme.write_text(f"{old}-fork and {old}.", "utf-8")
    address.main([NEW], copy)
    assert readme.read_text("utf-8") == f"{old}-fork and {NEW}."


@pytest.mark.parametrize("bad", ["yours", "https://example.org/a/b", f"{NEW}/tree/x"])
def test_a_bad_address_is_refused(copy, bad, capsys):
    before = (copy / "_config.yml").read_bytes()
    assert address.main([bad], copy) == 2
    assert "is not of the form" in capsys.readouterr().err
    assert (copy / "_config.yml").read_bytes() == before
