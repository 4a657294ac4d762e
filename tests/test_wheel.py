"""The wheel and the sdist: built without a network, and they hold what they should."""

import email
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import tangle
import yaml

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """Both, built from a copy, so that nothing is left in the tree."""
    source = tmp_path_factory.mktemp("source")
    for name in (
        "pyproject.toml",
        "MANIFEST.in",
        "README.md",
        "LICENSE",
        "LICENSE-TEXT",
    ):
        shutil.copy(ROOT / name, source)
    skipped = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("src", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=skipped)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", "dist", "."]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return source / "dist"


def test_wheel_holds_the_tangled_modules_a_model_and_nothing_else(dist):
    (wheel,) = dist.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    held = {name for name in names if ".dist-info/" not in name}
    modules = tangle.tangle(ROOT / "book")
    wanted = {f"glassgpt/{name.replace('.', '/')}.py" for name in modules}
    # A package needs its __init__.py, tangled or empty.
    wanted |= {"glassgpt/__init__.py", "glassgpt/checks/__init__.py"}
    model = {name for name in held if name.startswith("glassgpt/models/shakespeare/")}
    records = {name for name in held if name.startswith("glassgpt/records/")}
    wanted |= {f"glassgpt/{path}" for path in tangle.scripts(ROOT / "book")}
    assert held == wanted | {"glassgpt/py.typed"} | model | records
    assert {Path(name).name for name in records} >= {"capitals.json", "evaluation.json"}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        Path(name).name for name in model
    }


def test_the_index_gets_a_page_whose_links_lead_somewhere(dist):
    """It shows README.md without the repository around it: whole addresses only."""
    (wheel,) = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith("/METADATA")]
        facts = email.message_from_bytes(archive.read(name))
    assert facts["Description-Content-Type"] == "text/markdown"
    page = facts.get_payload()
    assert "](https://" in page
    assert re.findall(r"\]\((?!https://)[^)]*\)", page) == []
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert facts["Version"] == cited["version"]


def test_the_model_takes_at_most_three_megabytes(dist):
    (wheel,) = dist.glob("*.whl")
    parts = zipfile.ZipFile(wheel).infolist()
    assert 0 < sum(p.compress_size for p in parts if "/models/" in p.filename) < 3e6


def test_wheel_carries_licenses_and_the_command(dist):
    (wheel,) = dist.glob("*.whl")
    names = {Path(name).name for name in zipfile.ZipFile(wheel).namelist()}
    assert {"LICENSE", "LICENSE-TEXT", "entry_points.txt"} <= names


def test_sdist_holds_what_builds_the_wheel(dist):
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "src/glassgpt/py.typed"} <= names
    assert not [name for name in names if name.startswith("tests")]
