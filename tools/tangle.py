"""Write the modules of src/glassgpt from the exported cells of the chapters.

    python tools/tangle.py            write every module
    python tools/tangle.py --check    change nothing; exit 1 and show a diff where they differ

The markers are nbdev's. `#| default_exp NAME` names the module of a chapter, once. A cell whose
first line is `#| export` goes into that module, `#| export other` into another one. Inside a
notebook the order of the cells is kept; cells that hold only a docstring and imports go to the top.
The docstring of every public function and class gets one more line, which names the page and the
section of the book that explain it.

A cell that begins with `%%javascript` and `//| export page/gpt.js` goes into that script of the
package.
"""

import argparse
import ast
import difflib
import json
import re
import sys
import unicodedata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MARK = re.compile(r"#\|\s*(export|default_exp)(?:[ \t]+([\w.]+))?[ \t]*(?:\n+|$)")
SCRIPT = re.compile(r"%%javascript\n//\| export (\S+\.js)\n+")
HEADING = re.compile(r"^#{1,6}\s+(.+?)\s*$", re.MULTILINE)
HEADER = "# Written by tools/tangle.py from {}: change it there.\n"


class TangleError(Exception):
    """A notebook whose exported cells can't become a module."""


def slug(heading):
    """The anchor that Sphinx gives a heading (docutils' make_id)."""
    plain = unicodedata.normalize("NFKD", re.sub(r"[`*$]", "", heading).lower())
    plain = plain.encode("ascii", "ignore").decode()
    return re.sub(r"^[-0-9]+|-+$", "", re.sub(r"[^a-z0-9]+", "-", plain))


def exported_cells(notebook):
    """Yield (module, code, anchor of the section) for each exported cell of a notebook."""
    default, anchor = None, ""
    for cell in json.loads(notebook.read_text("utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            # A `#` inside a fenced block is a comment, not a heading.
            headings = HEADING.findall(re.sub(r"(?ms)^(`{3,}|:{3,}).*?^\1", "", source))
            anchor = slug(headings[-1]) if headings else anchor
        if cell["cell_type"] != "code" or not (mark := MARK.match(source)):
            continue
        kind, name = mark.groups()
        if kind == "default_exp":
            default = name
            continue
        if not (name or default):
            raise TangleError(f"{notebook}: `#| export` before any `#| default_exp NAME`")
        yield name or default, source[mark.end() :].strip("\n"), anchor


def link_docstrings(code, page, anchor):
    """Add `Book: page#section` to the docstring of each public definition in the code."""
    lines = code.split("\n")
    definitions = (ast.FunctionDef, ast.ClassDef)
    nodes = [n for n in ast.parse(code).body if isinstance(n, definitions) and n.name[0] != "_"]
    for node in reversed(nodes):
        doc = node.body[0]
        if not (isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant)):
            continue
        last, indent = doc.end_lineno - 1, " " * doc.col_offset
        text = lines[last].rstrip()[:-3].rstrip()
        lines[last : last + 1] = [
            *([text] if text else []),
            "",
            f"{indent}Book: {page}#{anchor}",
            f'{indent}"""',
        ]
    return "\n".join(lines)


def is_head(code):
    """True for a cell of only a docstring and imports, which goes to the top of its module."""
    body = ast.parse(code).body
    if body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
        body = body[1:]
    return all(isinstance(node, ast.Import | ast.ImportFrom) for node in body)


def render(cells):
    """The text of one module from its (notebook, code, anchor), in the book's order."""
    heads, bodies, homes = [], [], []
    for notebook, code, anchor in cells:
        homes.append(f"book/{notebook.name}")
        if is_head(code):
            heads.append(code)
        else:
            bodies.append(link_docstrings(code, f"{notebook.stem}.html", anchor))
    text = HEADER.format(", ".join(dict.fromkeys(homes))) + "\n".join(heads)
    # One blank line between the imports and a constant, as the formatter has it.
    if bodies and not re.match(r"@|class |def ", bodies[0]):
        text = f"{text}\n\n{bodies.pop(0)}"
    return "\n\n\n".join([text, *bodies]).rstrip("\n") + "\n"


def tangle(book):
    """Return {module name: source} for the notebooks of a folder, in the order of their names."""
    modules = {}
    for notebook in sorted(book.glob("*.ipynb")):
        for name, code, anchor in exported_cells(notebook):
            try:
                ast.parse(code)
            except SyntaxError as error:
                raise TangleError(
                    f"{notebook}: an exported cell is not plain Python: {error}"
                ) from None
            modules.setdefault(name, []).append((notebook, code, anchor))
    return {name: render(cells) for name, cells in modules.items()}


def scripts(book):
    """Return {path: source} for the JavaScript that the notebooks of a folder export."""
    found = {}
    for notebook in sorted(book.glob("*.ipynb")):
        for cell in json.loads(notebook.read_text("utf-8"))["cells"]:
            source = "".join(cell["source"])
            if cell["cell_type"] == "code" and (mark := SCRIPT.match(source)):
                head = [HEADER.format(f"book/{notebook.name}").replace("#", "//")]
                found.setdefault(mark[1], head).append(source[mark.end() :].strip("\n") + "\n")
    return {path: "\n".join(parts) for path, parts in found.items()}


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only compare; exit 1 on a difference")
    parser.add_argument("--book", type=Path, default=ROOT / "book", help="folder of the notebooks")
    parser.add_argument("--package", type=Path, default=ROOT / "src" / "glassgpt")
    options = parser.parse_args(arguments)
    try:
        modules = tangle(options.book)
    except TangleError as error:
        print(f"tangle: {error}", file=sys.stderr)
        return 2
    wanted = {
        options.package / (name.replace(".", "/") + ".py"): text for name, text in modules.items()
    }
    wanted |= {options.package / path: text for path, text in scripts(options.book).items()}
    present = {*options.package.rglob("*.py"), *options.package.rglob("*.js")}
    differences = 0
    for path in sorted(set(wanted) | present):
        old = path.read_text("utf-8") if path in present else ""
        new = wanted.get(path, "")
        # An empty __init__.py makes a folder a package and holds no line to explain.
        if old == new and path in present and (path in wanted or path.name == "__init__.py"):
            continue
        differences += 1
        if path not in wanted:
            # Never deleted here: it may be somebody's work.
            print(f"tangle: no chapter exports {path}; move its code into a chapter or delete it")
        elif options.check:
            diff = difflib.unified_diff(
                old.splitlines(True), new.splitlines(True), str(path), "chapters"
            )
            sys.stdout.writelines(diff)
            print(f"tangle: {path} differs from the chapters; run `make tangle`")
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(new, "utf-8", newline="\n")
            print(f"wrote {path}")
    return 1 if options.check and differences else 0


if __name__ == "__main__":
    sys.exit(main())
