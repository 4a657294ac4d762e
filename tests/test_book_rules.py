"""The rules of the book, for every chapter: its package, its cells, its exercises."""

import ast
import functools
import io
import json
import re
import tokenize
from collections import Counter
from pathlib import Path

import address
import literate
import notebook
import pybtex.database
import tangle
import yaml

ROOT = Path(__file__).parent.parent
BOOK = ROOT / "book"
CHAPTERS = sorted(BOOK.glob("*.ipynb"))
MAGIC = re.compile(r"^([ \t]*)[%!].*$", re.MULTILINE)
# Addresses that name a standard and are never fetched.
NAMESPACE = re.compile(r"https?://(www\.w3\.org|purl\.org|creativecommons\.org)/\S*")
FETCHING = re.compile(
    r"""(src|href)\s*=\s*["']?https?://|url\(['"]?https?://|@import"""
)
SOLUTION = re.compile(r"# ?@title Solution")
TITLE = re.compile(r"# ?@title \S")
CALLS = {"grade", "catch"}


@functools.cache
def load(path):
    return json.loads(path.read_text("utf-8"))


def source(cell):
    return "".join(cell["source"])


def code_cells(path):
    return [cell for cell in load(path)["cells"] if cell["cell_type"] == "code"]


def tags(cell):
    return set(cell["metadata"].get("tags", []))


def python(cell):
    """A cell's Python: magics become `pass`, and a cell of JavaScript is one."""
    code = source(cell)
    return "pass" if code.startswith("%%") else MAGIC.sub(r"\1pass", code)


def parse(cell):
    """The syntax tree of a cell's Python."""
    return ast.parse(python(cell))


def names_in(node):
    """Every name and attribute that stands in a piece of code."""
    for part in ast.walk(node):
        if isinstance(part, ast.Name):
            yield part.id
        elif isinstance(part, ast.Attribute):
            yield part.attr


def is_check(node):
    """Whether a statement checks something: an assert, or a call of a check."""
    if isinstance(node, ast.Assert):
        return True
    if not isinstance(node, ast.Call):
        return False
    called = node.func.attr if isinstance(node.func, ast.Attribute) else ""
    called = node.func.id if isinstance(node.func, ast.Name) else called
    return called in CALLS or called.startswith("check") or called == "raises"


def checks(cell):
    """Whether a cell asserts, checks, grades or catches something when it runs."""
    return any(is_check(node) for node in ast.walk(parse(cell)))


def definitions(code):
    """The public functions and classes at the top of a piece of code."""
    kinds = (ast.FunctionDef, ast.ClassDef)
    found = [node for node in ast.parse(code).body if isinstance(node, kinds)]
    return [node.name for node in found if not node.name.startswith("_")]


def imported(code):
    """The modules of this package that a piece of code imports, wherever it does."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def each_chapter(rule):
    """One test of the whole book; a failure names the notebook."""

    def test():
        for path in CHAPTERS:
            try:
                rule(path)
            except AssertionError as error:
                raise AssertionError(f"{path.name}: {error}") from error

    test.__name__, test.__doc__ = rule.__name__, rule.__doc__
    return test


def test_there_are_chapters():
    assert CHAPTERS


def test_the_contents_list_every_chapter():
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text("utf-8"))
    listed = [
        Path(entry["file"]).name for part in toc["parts"] for entry in part["chapters"]
    ]
    stems = {path.stem for path in CHAPTERS}
    assert stems - set(listed) == set(), "missing in _toc.yml"
    assert [name for name in listed if name in stems] == sorted(stems)


def test_every_line_of_every_module_comes_from_a_chapter():
    """Rule 1.1, and no line is left without a notebook."""
    modules = tangle.tangle(BOOK)
    package = ROOT / "src" / "glassgpt"
    for path, text in tangle.scripts(BOOK).items():
        assert (package / path).read_text("utf-8") == text, f"{path}: run `make tangle`"
    lines = {
        line.strip()
        for path in CHAPTERS
        for cell in code_cells(path)
        for line in source(cell).splitlines()
    }
    for path in package.rglob("*.py"):
        text = path.read_text("utf-8")
        name = ".".join(path.relative_to(package).with_suffix("").parts)
        assert text == modules.get(name, ""), f"{path}: run `make tangle`"
        for line in map(str.strip, text.splitlines()):
            made = line in ("", '"""')
            made = made or line.startswith(("# Written by", "Book: "))
            # The closing quotes of a docstring move to a line of their own.
            assert made or {line, line + '"""'} & lines, f"{path}: {line}"


def test_modules_import_only_from_earlier_chapters():
    """Rule 1.2. A module lives where it is first exported; appendices are free, and
    how a file is written: the reader of chapter 2 need not know before chapter 23."""
    first = {}
    for number, path in enumerate(CHAPTERS):
        for name, _, _ in tangle.exported_cells(path):
            first.setdefault(f"glassgpt.{name}", (path.stem[0] != "a", number))
    for number, path in enumerate(CHAPTERS):
        for name, code, _ in tangle.exported_cells(path):
            for other in imported(code):
                if name.endswith("__init__") or other not in first:
                    continue
                if other == "glassgpt.atomic":
                    continue
                numbered, home = first[other]
                later = numbered and home > number
                assert not later, f"{path.stem}: glassgpt.{name} imports {other}"


@each_chapter
def test_exported_names_have_a_docstring(path):
    for module, code, _ in tangle.exported_cells(path):
        for node in ast.parse(code).body:
            public = (
                isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name[0] != "_"
            )
            assert not public or ast.get_docstring(node), (
                f"glassgpt.{module}.{node.name}"
            )


@each_chapter
def test_prose_stands_before_every_exported_cell(path):
    """Imports and constants count as part of the cell that follows them."""
    cells = load(path)["cells"]
    for before, cell in zip(cells, cells[1:], strict=False):
        mark = cell["cell_type"] == "code" and tangle.MARK.match(source(cell))
        script = cell["cell_type"] == "code" and tangle.SCRIPT.match(source(cell))
        if script and before["cell_type"] == "code":
            assert tangle.SCRIPT.match(source(before)), f"cell {cell['id']}"
        check = mark and (mark[2] or "").startswith("checks")
        if mark and mark[1] == "export" and not check and before["cell_type"] == "code":
            joined = tangle.MARK.match(source(before))
            small = joined and not definitions(source(before)[joined.end() :])
            assert small, f"cell {cell['id']}"


@each_chapter
def test_the_notebook_is_stored_executed_from_the_top(path):
    counts = [
        cell["execution_count"] for cell in code_cells(path) if source(cell).strip()
    ]
    assert counts == list(range(1, len(counts) + 1))
    # A page with widgets, or with their state, fetches their script from the network.
    assert "widgets" not in load(path)["metadata"]
    kinds = {
        kind
        for cell in code_cells(path)
        for output in cell["outputs"]
        for kind in output.get("data", {})
    }
    assert notebook.WIDGET not in kinds


@each_chapter
def test_ids_are_unique_and_readable(path):
    ids = Counter(cell.get("id") for cell in load(path)["cells"])
    assert None not in ids
    assert [name for name, count in ids.items() if count > 1] == []
    # What editors make up changes when a cell is written anew.
    assert [
        name for name in ids if re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4,12})*", name)
    ] == []


def is_grade(node):
    """Whether a statement is a call of `grade`."""
    call = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    return call and getattr(node.value.func, "id", "") == "grade"


@each_chapter
def test_no_line_of_code_ends_in_a_semicolon(path):
    for cell in code_cells(path):
        source = python(cell)
        if ast.parse(source).body and is_grade(ast.parse(source).body[-1]):
            source = source.rstrip().removesuffix(";")  # it hides the value
        readable = io.StringIO(source)
        tokens = list(tokenize.generate_tokens(readable.readline))
        ends = (tokenize.NEWLINE, tokenize.NL, tokenize.COMMENT, tokenize.ENDMARKER)
        for token, following in zip(tokens, tokens[1:], strict=False):
            assert token.string != ";" or following.type not in ends, (
                f"cell {cell['id']}"
            )


@each_chapter
def test_every_figure_is_shown(path):
    """What isn't the last expression of its cell draws nothing."""
    drawing = re.compile(r"^(show|slider|live|live_model)\(", re.MULTILINE)
    blank = [
        cell["id"]
        for cell in load(path)["cells"]
        if cell["cell_type"] == "code" and drawing.search(source(cell))
        if not any("data" in output for output in cell["outputs"])
    ]
    assert blank == []


@each_chapter
def test_no_drawing_paints_a_white_ground(path):
    """In the dark the text on it is white, too: a legend needs frameon=False."""
    white = [
        cell["id"]
        for cell in load(path)["cells"]
        for output in cell.get("outputs", [])
        if "fill: #ffffff" in "".join(output.get("data", {}).get("text/html", []))
    ]
    assert white == []


@each_chapter
def test_paragraphs_are_short(path):
    cells = [cell for cell in load(path)["cells"] if cell["cell_type"] == "markdown"]
    words = {cell["id"]: len(literate.cite(source(cell)).split()) for cell in cells}
    assert {name: count for name, count in words.items() if count > 120} == {}


@functools.cache
def citations():
    """{key: how it is cited} of every work in the list of references."""
    literate.give_back_codecs()

    def text(work):
        people = work.persons["author"]
        names = [
            " ".join(map(str, person.rich_prelast_names + person.rich_last_names))
            for person in people
        ]
        several = len(names) > 2 or "others" in names
        authors = f"{names[0]} et al." if several else " and ".join(names)
        return f"{authors}, {work.fields.get('year', 'n.d.')}"

    entries = pybtex.database.parse_file(BOOK / "references.bib").entries
    return {key: text(work) for key, work in entries.items()}


@each_chapter
def test_citations_are_text_that_agrees_with_the_references(path):
    """Jupyter shows their links, and literate.py makes citations of them."""
    _, page = address.current(ROOT)
    link = re.compile(rf"\[([^][]+)\]\({page}book/references\.html#([\w-]+)\)")
    for cell in load(path)["cells"]:
        if cell["cell_type"] != "markdown":
            continue
        text = source(cell)
        found = link.findall(text)
        assert len(found) == text.count("references.html"), f"cell {cell['id']}"
        for said, key in found:
            assert said == citations()[key], f"cell {cell['id']}: {key}"
        assert literate.cite(text).count("references.html") == 0, f"cell {cell['id']}"


@each_chapter
def test_no_markup_that_only_the_page_understands(path):
    """Roles, directives, fences of colons and labels stand raw in Jupyter."""
    raw = re.compile(r"\{[a-z:]+\}`|^```+\{|^:::|^\([\w-]+\)=$", re.MULTILINE)
    for cell in load(path)["cells"]:
        if cell["cell_type"] == "markdown":
            assert not raw.search(source(cell)), f"cell {cell['id']}"


@each_chapter
def test_links_to_sections_name_them_as_jupyter_does(path):
    """The page's names are made of them by literate.py; its own test follows them."""
    text = "\n".join(source(c) for c in load(path)["cells"] if "outputs" not in c)
    sections = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    named = {section.replace(" ", "-") for section in sections}
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= named


@each_chapter
def test_checks_are_folded(path):
    """On the page: their sentence and their catch are read."""
    graded = [cell for cells in exercises(path).values() for cell in cells]
    for cell in code_cells(path):
        mark = tangle.MARK.match(source(cell))
        check = mark and mark[1] == "export" and (mark[2] or "").startswith("checks")
        if check or (cell in graded and re.search(r"^def check_", source(cell), re.M)):
            assert "hide-input" in tags(cell), f"cell {cell['id']}"


@each_chapter
def test_what_the_page_hides_is_folded_everywhere(path):
    """On Colab as a form with a title, and in Jupyter."""
    hidden = {"hide-input", "hide-cell", "remove-input", "remove-cell"}
    for cell in code_cells(path):
        if tags(cell) & hidden:
            folded, text = cell["metadata"], source(cell)
            assert folded.get("cellView") == "form", f"{cell['id']}: open on Colab"
            assert folded["jupyter"]["source_hidden"], f"{cell['id']}: open in Jupyter"
            marks = (tangle.MARK, tangle.SCRIPT, TITLE)
            named = any(mark.match(text) for mark in marks)
            assert named, f"{cell['id']}: without a title"


@each_chapter
def test_folded_scripts_are_told_apart(path):
    """On the page each is labeled by what it defines."""
    folded = [source(cell) for cell in code_cells(path) if "hide-input" in tags(cell)]
    scripts = [text for text in folded if tangle.SCRIPT.match(text)]
    assert len({*map(literate.script_name, scripts)}) == len(scripts)


@each_chapter
def test_the_notebook_is_smaller_than_half_a_megabyte(path):
    assert path.stat().st_size < 500_000


@each_chapter
def test_the_setup_cell_is_the_same_everywhere(path):
    def setup(chapter):
        cell = code_cells(chapter)[0]
        assert cell["id"] == "setup"
        assert tags(cell) == {"remove-cell"}
        first, rest = source(cell).split("\n", 1)
        assert re.fullmatch(r"#\| default_exp [\w.]+", first)
        return rest

    assert setup(path) == setup(CHAPTERS[0])
    assert "    %pip install" in setup(path)


def exercises(path):
    """{heading: the cells of that exercise, up to the next heading}."""
    found, current = {}, None
    for cell in load(path)["cells"]:
        text = source(cell)
        if cell["cell_type"] == "markdown" and re.search(r"^##", text, re.MULTILINE):
            title = re.search(r"^### (Exercise \d+.*)$", text, re.MULTILINE)
            current = found.setdefault(title[1], []) if title else None
        if current is not None:
            current.append(cell)
    return found


@each_chapter
def test_a_chapter_has_exercises(path):
    titles = [title.split(":")[0] for title in exercises(path)]
    assert titles == [f"Exercise {number}" for number in range(1, len(titles) + 1)]
    assert len(titles) >= (2 if path.stem[0] != "a" else 0)


@each_chapter
def test_every_exercise_is_graded_and_has_a_hint_and_a_solution(path):
    for title, cells in exercises(path).items():
        code = [cell for cell in cells if cell["cell_type"] == "code"]
        stubs = [cell for cell in code if "raise NotImplementedError" in source(cell)]
        assert stubs, f"{title}: a stub"
        names = definitions(source(stubs[0]))
        attempt = re.compile(rf"grade\(.*\b({'|'.join(names)})\b", re.DOTALL)
        graded = [cell for cell in code if attempt.search(source(cell))]
        assert graded, f"{title}: a grading cell"
        hints = [c for c in cells if "<summary>Hint</summary>" in source(c)]
        assert hints, f"{title}: a hint"
        solutions = [cell for cell in code if SOLUTION.match(source(cell))]
        assert solutions, f"{title}: a solution"
        for cell in solutions:
            assert "hide-cell" in tags(cell), f"{title}: open on the page"
            assert checks(cell), f"{title}: the solution isn't graded"


@each_chapter
def test_untouched_exercises_and_solutions_print_what_they_should(path):
    for cell in code_cells(path):
        outputs = [out for out in cell["outputs"] if out["output_type"] == "stream"]
        printed = "".join("".join(output["text"]) for output in outputs)
        if SOLUTION.match(source(cell)):
            assert "Correct: " in printed, f"cell {cell['id']}"
            assert "Not yet" not in printed, f"cell {cell['id']}"
        elif re.search(r"^grade\(\w+, my_", source(cell), re.MULTILINE):
            assert "Still to do: " in printed, f"cell {cell['id']}"


@each_chapter
def test_what_is_not_compared_is_asserted(path):
    """A tag without an assertion is a hole."""
    cells = code_cells(path)
    for number, cell in enumerate(cells):
        assert "nbval-skip" not in tags(cell), f"cell {cell['id']}"
        if "nbval-ignore-output" in tags(cell) or "NBVAL_IGNORE_OUTPUT" in source(cell):
            near = cells[number : number + 4]
            assert any(map(checks, near)), f"cell {cell['id']}"


@each_chapter
def test_outputs_ask_nothing_of_the_network(path):
    for cell in code_cells(path):
        for output in cell["outputs"]:
            for kind, data in output.get("data", {}).items():
                text = NAMESPACE.sub(
                    "", "".join(data) if isinstance(data, list) else str(data)
                )
                assert not FETCHING.search(text), f"cell {cell['id']}, {kind}"


@each_chapter
def test_no_cell_stored_an_error(path):
    for cell in code_cells(path):
        if "raises-exception" not in tags(cell):
            kinds = [output["output_type"] for output in cell["outputs"]]
            assert "error" not in kinds, f"cell {cell['id']}"


# Words that also have an everyday meaning, in which they may stand anywhere.
EVERYDAY = {"attention", "bias", "block", "context", "head", "key", "query", "value"}
EVERYDAY |= {"loss", "norm", "targets", "temperature", "token", "overflow"}
# What the reader brings from school, and what one page names before it defines it.
EVERYDAY |= {"chain rule", "rotary positions", "checkpoint", "Muon", "shape", "entropy"}


def glossary():
    """{term: the number of the chapter that defines it}."""
    text = (BOOK / "a2_notation.md").read_text("utf-8")
    entry = re.compile(r"^(\S.*)\n  .*Defined in \[chapter (\d+)\]", re.MULTILINE)
    return {term: int(chapter) for term, chapter in entry.findall(text)}


def prose(cell):
    """The text of a Markdown cell without headings, code, formulas and links."""
    text = re.sub(r"```.*?```|\$\$.*?\$\$", "", source(cell), flags=re.DOTALL)
    text = re.sub(r"`[^`]*`|\$[^$]*\$|\[[^\]]*\]\([^)]*\)", "", text)
    return re.sub(r"^#+ .*$", "", text, flags=re.MULTILINE)


@functools.cache
def paragraphs():
    """(chapter, cell, its prose) in the book's order."""
    found = []
    for path in CHAPTERS:
        if path.stem[0] == "a":
            continue
        cells = [c for c in load(path)["cells"] if c["cell_type"] == "markdown"]
        for number, cell in enumerate(cells[1:], 1):  # the first says what is coming
            found.append((int(path.stem[:2]), number, prose(cell)))
    return found


def places(pattern):
    """(chapter, cell) wherever a pattern occurs in the prose, in the book's order."""
    for chapter, number, text in paragraphs():
        if pattern.search(text):
            yield chapter, number


def test_glossary_terms_are_defined_before_they_are_used():
    assert len(glossary()) > 50
    for term, home in glossary().items():
        word = re.escape(term).replace(r"\ ", r"\s+").replace(r"\-", "[- ]")
        defined = list(places(re.compile(rf"\*{word}(e?s)?\*", re.IGNORECASE)))
        chapters = {chapter for chapter, _ in defined}
        assert home in chapters, f"{term} isn't in italics in chapter {home}"
        if term in EVERYDAY:
            continue
        used = next(places(re.compile(rf"\b{word}(e?s)?\b", re.IGNORECASE)))
        assert used == defined[0], f"{term}: chapter {used[0]}, cell {used[1]}, before"
        assert used[0] == home, f"{term} is defined in chapter {used[0]}"
