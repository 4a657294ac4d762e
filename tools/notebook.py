"""Edit a chapter as text, and run it so that a second run gives the same bytes.

    python tools/notebook.py text book/06_attention.ipynb > chapter.py     # as `# %%` cells
    python tools/notebook.py build chapter.py book/06_attention.ipynb      # and back
    python tools/notebook.py run book/06_attention.ipynb ...               # execute in place

`text` writes jupytext's percent format and keeps the ids of the cells. `build` gives an id to cells
that have none, folds the checks, and keeps no outputs, so `run` follows it. `run` removes what
differs between runs: times, addresses in memory, random model ids. A live figure leaves its still.
"""

import argparse
import hashlib
import json
import os
import re
import sys
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

METADATA = {
    "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
    "language_info": {"name": "python", "pygments_lexer": "ipython3"},
}
WIDGET = "application/vnd.jupyter.widget-view+json"
CHECK = re.compile(r"#\|\s*export\s+checks")


def fold(cell):
    """Fold the code of a cell on the page, on Colab and in Jupyter."""
    tags = set(cell.metadata.get("tags", []))
    cell.metadata["tags"] = sorted(tags | {"hide-input"})
    cell.metadata["cellView"] = "form"
    cell.metadata.setdefault("jupyter", {})["source_hidden"] = True


def to_text(path):
    """The notebook as percent-format text; a cell's id stands in its `# %%` line."""
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        cell.metadata["id"] = cell.id
    notebook.metadata["jupytext"] = {"notebook_metadata_filter": "-all"}
    return jupytext.writes(notebook, fmt="py:percent")


def from_text(text):
    """A notebook without outputs from percent-format text."""
    notebook = jupytext.reads(text, fmt="py:percent")
    taken = set()
    for cell in notebook.cells:
        if CHECK.match(cell.source):
            fold(cell)
        made = "c" + hashlib.sha256(cell.source.encode()).hexdigest()[:8]
        name = unique = cell.metadata.pop("id", made)
        while unique in taken:
            unique = f"{name}-{len(taken)}"
        taken.add(unique)
        cell.id = unique
        # jupytext's own bookkeeping; it would change with the cell that follows.
        cell.metadata.pop("lines_to_next_cell", None)
    notebook.metadata = dict(METADATA)
    notebook.nbformat_minor = 5
    return notebook


def run(path):
    """Execute a notebook in place. Raises CellExecutionError and leaves the file as it was."""
    notebook = nbformat.read(path, as_version=4)
    notebook.metadata = dict(METADATA)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    place = {"metadata": {"path": str(path.parent)}}
    NotebookClient(
        notebook,
        timeout=900,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,  # where a print is cut differs between runs
        resources=place,
    ).execute()
    # Neither the state of widgets nor their views: a page would fetch their script.
    notebook.metadata = dict(METADATA)
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            output.get("data", {}).pop(WIDGET, None)
    # Addresses keep twelve digits, so that the comparing test's rule for them still applies.
    text = re.sub(r"at 0x[0-9a-f]+", "at 0x000000000000", json.dumps(notebook))
    ids = {}
    text = re.sub(r"\b[0-9a-f]{32}\b", lambda m: ids.setdefault(m[0], f"{len(ids):032x}"), text)
    notebook = nbformat.reads(text, as_version=4)
    nbformat.validate(notebook)
    nbformat.write(notebook, path)


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=["text", "build", "run"])
    parser.add_argument("paths", nargs="+", type=Path)
    options = parser.parse_args(arguments)
    if options.action == "text":
        for path in options.paths:
            print(to_text(path), end="")
        return 0
    if options.action == "build":
        text, path = options.paths
        nbformat.write(from_text(text.read_text("utf-8")), path)
        return 0
    os.environ["PYDEVD_DISABLE_FILE_VALIDATION"] = "1"
    for path in options.paths:
        print(f"running {path}", flush=True)
        try:
            run(path)
        except CellExecutionError as error:
            print(f"{path} stopped:\n{error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
