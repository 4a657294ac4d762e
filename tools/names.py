"""List every public name that the chapters export, with the place that explains it.

    python tools/names.py      print the list: name, module, page#section

The list is read from the modules of src/glassgpt, whose docstrings end in a line
`Book: page#section` (tools/tangle.py writes it). The index of names in the book's appendix is
made from it at every build, so it can't drift.
"""

import ast
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

PACKAGE = Path(__file__).resolve().parent.parent / "src" / "glassgpt"
BOOK = re.compile(r"^Book: (\S+)$", re.MULTILINE)


class Name(NamedTuple):
    """A public function or class at the top of a module."""

    name: str
    module: str
    place: str  # page.html#section; empty without a docstring
    summary: str  # first line of the docstring


def module_name(path, package=PACKAGE):
    """src/glassgpt/checks/softmax.py becomes glassgpt.checks.softmax."""
    parts = path.relative_to(package.parent).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


@cache
def public_names(package=PACKAGE):
    """Every public function and class at the top of a module, sorted by name."""
    found = []
    for path in package.rglob("*.py"):
        for node in ast.parse(path.read_text("utf-8")).body:
            if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name[0] == "_":
                continue
            doc = ast.get_docstring(node) or ""
            place = BOOK.search(doc)
            summary = doc.split("\n\n")[0].replace("\n", " ")
            found.append(
                Name(
                    node.name,
                    module_name(path, package),
                    place[1] if place else "",
                    summary,
                )
            )
    return sorted(found, key=lambda name: (name.name.lower(), name.module))


if __name__ == "__main__":
    for entry in public_names():
        print(f"{entry.name:32} {entry.module:32} {entry.place}")
