"""A twin of Google Colab, in which every chapter runs as its reader would run it.

    python tools/colab.py                  rehearse every chapter
    python tools/colab.py 05 13            rehearse chapters 5 and 13
    python tools/colab.py --record 05      and note seconds and memory in book/runs/colab.json

The twin has the packages of tools/colab-versions.txt and a stub of `google.colab`. A rehearsal
begins with a fresh copy of it, in an empty folder, with nothing of the repository but the notebook;
the chapter's own first cell installs the package, whose repository is replaced by one with the
package as it is in this checkout. It fails where a cell fails, or where a package of Colab's was
replaced.

What can't be rehearsed: Colab's page itself, its GPU, and the parts of `google.colab`.
"""

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import venv
from datetime import datetime
from importlib.metadata import distribution
from pathlib import Path

import nbformat
import psutil
from jupyter_client import AsyncKernelManager
from nbclient import NotebookClient

import address
from pin import pin

ROOT = Path(__file__).resolve().parent.parent
VERSIONS = ROOT / "tools" / "colab-versions.txt"
RECORD = ROOT / "book" / "runs" / "colab.json"
TWIN = ROOT / "_build" / "colab"
PACKAGE = ["pyproject.toml", "README.md", "LICENSE", "LICENSE-TEXT", "src"]
# Colab's own package, as far as others ask for it.
STUB = """class output:
    enable_custom_widget_manager = disable_custom_widget_manager = staticmethod(lambda: None)
"""
# What a chapter imports, so that Python compiles it once and not in every copy.
WARM = "import torch, transformers, matplotlib.pyplot, IPython, ipykernel, ipywidgets, numpy"


def snapshot():
    """The folder and the commit of a repository that holds the package as it is now."""
    served = TWIN / "package.git"
    shutil.rmtree(served, ignore_errors=True)
    run = ["git", "-c", "user.name=twin", "-c", "user.email=twin@localhost"]
    run += [f"--git-dir={served}", f"--work-tree={ROOT}"]
    for command in (["init", "-q"], ["add", *PACKAGE], ["commit", "-qm", "The package"]):
        subprocess.run([*run, *command], cwd=ROOT, check=True)
    done = subprocess.run([*run, "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
    return served, done.stdout.strip()


def site_packages(folder):
    (found,) = folder.glob("lib/python*/site-packages")
    return found


def build():
    """The folder of the twin: built, or as it was if the list of versions is the same."""
    base, stamp = TWIN / "base", TWIN / "versions.txt"
    torch = distribution("torch")
    versions = VERSIONS.read_text("utf-8") + f"# {platform.python_version()} {torch.version}\n"
    if stamp.exists() and stamp.read_text("utf-8") == versions:
        return base
    shutil.rmtree(TWIN, ignore_errors=True)
    venv.create(base, symlinks=True)
    place = site_packages(base)
    for file in torch.files:
        if ".." not in file.parts:
            (place / file).parent.mkdir(parents=True, exist_ok=True)
            copy(torch.locate_file(file), place / file)
    wanted = TWIN / "wanted.txt"
    wanted.write_text(re.sub("(?m)^torch==.*\n", "", versions), "utf-8")
    pip = [sys.executable, "-m", "pip", "--python", base / "bin" / "python", "install", "-q"]
    subprocess.run([*pip, "--no-deps", "--no-compile", "-r", wanted], check=True)
    (place / "google" / "colab").mkdir(parents=True)
    (place / "google" / "colab" / "__init__.py").write_text(STUB, "utf-8")
    subprocess.run([base / "bin" / "python", "-c", WARM], check=True)
    stamp.write_text(versions, "utf-8")
    return base


def copy(source, target):
    """A second name for a file, or its copy on another disk."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def installed(folder):
    """{package: version}, as pip lists them."""
    pip = [folder / "bin" / "python", "-m", "pip", "list", "--format=json"]
    done = subprocess.run(pip, check=True, capture_output=True, text=True)
    return {entry["name"]: entry["version"] for entry in json.loads(done.stdout)}


def replaced(before, after):
    """What became of packages that were there: a line for each that is another one now."""
    return [
        f"{name} {version} was replaced by {after.get(name)}"
        for name, version in before.items()
        if after.get(name) != version
    ]


def failures(notebook):
    """A line for each cell that ended in an error and is not meant to."""
    found = []
    for cell in notebook.cells:
        if cell.cell_type == "code" and "raises-exception" not in cell.metadata.get("tags", []):
            errors = [out for out in cell.outputs if out.output_type == "error"]
            found += [f"cell {cell.id}: {error.ename}: {error.evalue}" for error in errors]
    return found


def seconds(notebook):
    """How long the cells took to run, after those that make it Colab and install the package."""
    cells = [cell for cell in notebook.cells if "execution" in cell.metadata][2:]
    begin = cells[0].metadata.execution["iopub.execute_input"]
    end = cells[-1].metadata.execution["shell.execute_reply"]
    return (datetime.fromisoformat(end) - datetime.fromisoformat(begin)).total_seconds()


class MemoryWatch(threading.Thread):
    """Notes the largest memory of all processes that this one started, in bytes."""

    def __init__(self):
        super().__init__(daemon=True)
        self.peak, self.done = 0, threading.Event()

    def run(self):
        while not self.done.wait(0.1):
            used = 0
            for process in psutil.Process().children(recursive=True):
                try:
                    used += process.memory_info().rss
                except psutil.NoSuchProcess:
                    continue
            self.peak = max(self.peak, used)

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *error):
        self.done.set()
        self.join()


def environment(folder, empty, repository, served):
    """A reader's environment variables: nothing of ours, and a folder in GitHub's place."""
    ours = {"PYTHONPATH", "VIRTUAL_ENV", "OMP_NUM_THREADS"}
    return {
        **{name: value for name, value in os.environ.items() if name not in ours},
        "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "IPYTHONDIR": str(empty / ".ipython"),
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.file://{served}.insteadOf",
        "GIT_CONFIG_VALUE_0": repository,
    }


def rehearse(path, base, served, commit):
    """Run a chapter in a copy of the twin: (complaints, seconds, bytes)."""
    repository, _ = address.current(ROOT)
    notebook = nbformat.reads(pin(path.read_text("utf-8"), repository, commit), 4)
    # Colab's kernel has imported its own package before the first cell.
    notebook.cells.insert(0, nbformat.v4.new_code_cell("import google.colab"))
    with tempfile.TemporaryDirectory(dir=TWIN) as folder, tempfile.TemporaryDirectory() as empty:
        copied = Path(folder, "twin")
        shutil.copytree(base, copied, symlinks=True, copy_function=copy)
        manager = AsyncKernelManager(kernel_name="python3")
        manager.kernel_spec.argv[0] = str(copied / "bin" / "python")
        client = NotebookClient(
            notebook,
            km=manager,
            timeout=900,
            allow_errors=True,
            resources={"metadata": {"path": empty}},
        )
        with MemoryWatch() as watch:
            client.execute(
                cleanup_kc=True, env=environment(copied, Path(empty), repository, served)
            )
        complaints = failures(notebook) + replaced(installed(base), installed(copied))
    return complaints, seconds(notebook), watch.peak


def record(costs):
    """Note what chapters took, beside those that are noted already."""
    noted = json.loads(RECORD.read_text("utf-8")) if RECORD.exists() else {"chapters": {}}
    cpu = re.findall(r"(?m)^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text("utf-8"))
    noted |= {"processor": cpu[0], "cores": os.cpu_count(), "torch": distribution("torch").version}
    noted["chapters"] = dict(sorted((noted["chapters"] | costs).items()))
    RECORD.write_text(json.dumps(noted, indent=1) + "\n", "utf-8")


def chapters(numbers):
    """The notebooks with these numbers, or all."""
    every = sorted((ROOT / "book").glob("*.ipynb"))
    wanted = [path for path in every if path.stem.split("_")[0] in numbers]
    if len(wanted) != len(set(numbers)):
        raise SystemExit(f"colab: one of {', '.join(numbers)} is no chapter")
    return wanted or every


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("numbers", nargs="*", help="of chapters, such as 05; all without")
    parser.add_argument("--record", action="store_true", help="note seconds and memory")
    options = parser.parse_args(arguments)
    started = time.monotonic()
    base = build()
    served, commit = snapshot()
    print(f"twin ready after {time.monotonic() - started:.0f} s", flush=True)
    wrong = 0
    for path in chapters(options.numbers):
        started = time.monotonic()
        complaints, took, peak = rehearse(path, base, served, commit)
        rest = time.monotonic() - started - took
        told = f"{took:6.1f} s (and {rest:.0f} to begin and end)  {peak / 1e9:5.2f} GB"
        print(f"{path.stem:24}{told}", *complaints, sep="\n    ", flush=True)
        wrong += len(complaints)
        if options.record and not complaints:
            record({path.stem: {"seconds": round(took, 1), "gigabytes": round(peak / 1e9, 2)}})
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
