"""The book's own Sphinx extension: what a chapter shows of its tangling.

* The lines `#| export`, `#| default_exp` and `#@title` are left out of the page.
* Citations, in a notebook links to the list of references, become citations of MyST, and links
  to sections, named as Jupyter names them, get MyST's names.
* An exported cell gets a label, "enters glassgpt.attention", that links to the module; where it
  is folded, the fold names what is in it and how long it is.
* The title of a chapter gets its number above it.
* The reading time is followed by what the chapter takes to run, as tools/colab.py measured it.
* The button Colab leads to the branch `colab`, whose chapters install the package of the page.
* The search finds every exported name; the exercises say where they are graded.
* The directive `names` makes the index of every exported name.
"""

import ast
import codecs
import importlib.util
import json
import re
import sys
from pathlib import Path

from docutils import nodes
from docutils.parsers.rst import Directive
from pybtex.backends import plaintext
from pybtex.plugin import register_plugin

from sphinx import addnodes

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import names
from reading_time import PLACE
from tangle import MARK, SCRIPT

TITLE = re.compile(r"# ?@title (.+)\n+")
CHAPTER = re.compile(r"book/(0?)(\d+|a\d+)_")
DEFINED = re.compile(r"^(?:const|function|class) (\w+)|^(\w+\.\w+) = ", re.MULTILINE)
ENTERS = "tag_enters-"
SECTION = re.compile(r"\]\(#[^)]+\)")
CITATION = re.compile(r"\[[^][]+\]\(\S+/references\.html#([\w-]+)\)")
CITATIONS = re.compile(rf"\[{CITATION.pattern}(?:, {CITATION.pattern})*\]")
COSTS = Path(__file__).resolve().parents[2] / "book" / "runs" / "colab.json"


def cite(text):
    """Write `[[Author, year](address#key), ...]` as MyST does: {cite}`key,...`."""

    def role(found):
        return "{cite}`" + ",".join(CITATION.findall(found[0])) + "`"

    return CITATIONS.sub(role, text)


def slug(text):
    """`](#Why-this?)`, as Jupyter names a section, becomes `](#why-this)`, as MyST does."""
    return SECTION.sub(lambda found: re.sub(r"[^]()#\w-]", "", found[0].lower()), text)


def script_name(code):
    """What a cell of JavaScript defines: its panels, or the last name, which the others serve."""
    names = DEFINED.findall(code)
    return ", ".join(panel for _, panel in names if panel) or names[-1][0]


def fold_name(code):
    """What a folded cell of Python holds and how long it is: "save, load, 44 lines"."""
    body = ast.parse(code).body
    definitions = (ast.FunctionDef, ast.ClassDef)
    names = [node.name for node in body if isinstance(node, definitions)]
    if not names:
        assigned = [node.targets[0] for node in body if isinstance(node, ast.Assign)]
        names = [target.id for target in assigned if isinstance(target, ast.Name)]
    if not names:
        names = ["imports"]
    names.sort(key=lambda name: name.startswith("_"))  # public names first
    shown = ", ".join(names[:3])
    if len(names) > 3:
        shown += f" and {len(names) - 3} more"
    length = len(code.strip().splitlines())
    return f"{shown}, {length} {'line' if length == 1 else 'lines'}"


def read_notebook(app, docname, source):
    """Take the marker lines out of a notebook; remember in tags what they said."""
    if not str(app.env.doc2path(docname)).endswith(".ipynb"):
        return
    notebook = json.loads(source[0])
    default = None
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            cell["source"] = slug(cite("".join(cell["source"])))
        if cell["cell_type"] != "code":
            continue
        code, metadata = "".join(cell["source"]), cell["metadata"]
        tags, folded = metadata.setdefault("tags", []), None
        if mark := MARK.match(code):
            kind, name = mark.groups()
            cell["source"] = code[mark.end() :]
            if kind == "default_exp":
                default = name
                tags.append("remove-cell")
            else:
                if "hide-input" in tags:
                    folded = fold_name(cell["source"])
                module = name or default
                tags += ["export", f"enters-{module}"]
                if module.startswith("checks"):
                    tags.append("check")
        elif script := SCRIPT.match(code):
            cell["source"] = "%%javascript\n" + code[script.end() :]
            folded = script_name(code) if "hide-input" in tags else None
            tags += ["export", f"enters-{script[1]}"]
        elif title := TITLE.match(code):
            cell["source"] = code[title.end() :]
            folded = title[1]
        if folded:
            metadata["mystnb"] = {
                "code_prompt_show": f"Show: {folded}",
                "code_prompt_hide": f"Hide: {folded}",
            }
    source[0] = json.dumps(notebook)


def running_cost(seconds, gigabytes, cores):
    """What a chapter takes to run, as its page says it."""
    minutes = round(seconds / 60)
    time = f"{minutes} minutes" if minutes > 1 else f"{max(5, 5 * round(seconds / 5))} seconds"
    return f"It runs in about {time}, with {gigabytes:.1f} GB of memory on {cores} CPU cores."


def say_cost(app, docname, source):
    """Write behind the reading time of a chapter what it takes to run."""
    record = json.loads(COSTS.read_text("utf-8"))
    if cost := record["chapters"].get(docname.removeprefix("book/")):
        told = running_cost(**cost, cores=record["cores"])
        source[0] = PLACE.sub(rf"*\1 {told}*", source[0], count=1)


def label_exports(app, doctree, docname):
    """Put a linked label on each exported cell, above what is folded."""
    repository = app.config.html_theme_options["repository_url"]
    branch = app.config.html_theme_options["repository_branch"]
    for cell in list(doctree.findall(nodes.container)):
        marks = [name for name in cell["classes"] if name.startswith(ENTERS)]
        if not marks:
            continue
        cell["classes"].remove(marks[0])
        module = marks[0].removeprefix(ENTERS)
        script = module.endswith(".js")
        path = module if script else f"{module.replace('.', '/')}.py"
        name = f"glassgpt/{module}" if script else f"glassgpt.{module}"
        refuri = f"{repository}/blob/{branch}/src/glassgpt/{path}"
        link = nodes.reference("", name, refuri=refuri)
        cell.insert(0, nodes.paragraph("", "enters ", link, classes=["enters"]))


def number_title(app, doctree):
    """Write "Chapter 5" or "Appendix A1" above the title of a chapter."""
    chapter = CHAPTER.match(app.env.docname)
    title = next(doctree.findall(nodes.title), None)
    if chapter and title is not None:
        number = chapter[2].upper()
        kind = "Appendix" if number.startswith("A") else "Chapter"
        title.insert(0, nodes.inline("", f"{kind} {number} ", classes=["number"]))


def index_names(app, doctree):
    """What a search for an exported name finds first: the section that explains it."""
    page = f"{app.env.docname}.html#"
    for entry in names.public_names():
        place = f"book/{entry.place}"
        if place.startswith(page):
            section = place.removeprefix(page)
            found = ("single", entry.name, section, "main", None)
            doctree += addnodes.index(entries=[found])


def point_to_kernel(app, doctree):
    """Say under the heading of the exercises where their checks can run."""
    if not str(app.env.doc2path(app.env.docname)).endswith(".ipynb"):
        return
    address = app.config.html_theme_options["repository_url"]
    owner = address.removeprefix("https://github.com/")
    notebook = f"{owner}/blob/colab/{app.env.docname}.ipynb"
    colab = f"https://colab.research.google.com/github/{notebook}"
    for title in doctree.findall(nodes.title):
        if title.astext().startswith("Exercises"):
            link = nodes.reference("", "open this chapter on Colab", refuri=colab)
            line = nodes.paragraph("", "The checks grade your answer where Python runs: ")
            line += [link, nodes.Text(", or its notebook in Jupyter.")]
            line["classes"] = ["kernel"]
            title.parent.insert(title.parent.index(title) + 1, line)


class NamesDirective(Directive):
    """The index of every exported name: name, module, place, first line."""

    def run(self):
        return [self.group(title, wanted) for title, wanted in self.groups() if wanted]

    def groups(self):
        every = names.public_names()
        checks = [entry for entry in every if ".checks" in entry.module]
        yield "The package", [entry for entry in every if entry not in checks]
        yield "The checks", checks

    def group(self, title, entries):
        section = nodes.section(ids=[nodes.make_id(f"names-{title}")])
        section += nodes.title("", title)
        listed = nodes.definition_list(classes=["names"])
        for entry in entries:
            listed += self.item(entry)
        section += listed
        return section

    def item(self, entry):
        name = nodes.literal("", entry.name)
        if entry.place:
            name = nodes.reference("", "", name, refuri=entry.place, internal=True)
        module = nodes.inline("", f" in {entry.module}", classes=["module"])
        # Every second piece stood between backticks.
        pieces = enumerate(entry.summary.split("`"))
        words = [nodes.literal("", p) if i % 2 else nodes.Text(p) for i, p in pieces]
        paragraph = nodes.paragraph("", "", *words)
        return nodes.definition_list_item(
            "", nodes.term("", "", name, module), nodes.definition("", paragraph)
        )


def reread_names(app, env, added, changed, removed):
    """The index depends on the modules, which Sphinx doesn't watch."""
    return {"book/a2_notation"} & env.found_docs


def run_model(app, pagename, templatename, context, doctree):
    """A page with a live model loads what runs it (tools/vendor.py)."""
    if "<glass-gpt" in context.get("body", ""):
        app.add_js_file(context["pathto"]("live/glass-gpt.js", 1), loading_method="defer")


def open_pinned(app, pagename, templatename, context, doctree):
    """Let the button Colab open the chapter that installs the package of this page."""
    branch = app.config.html_theme_options["repository_branch"]
    for group in context.get("header_buttons", []):
        for button in group.get("buttons", []):
            if button.get("text") == "Colab":
                button["url"] = button["url"].replace(f"/blob/{branch}/", "/blob/colab/")


def share_address(app, config):
    """The address of the page stands once, in html.baseurl."""
    config.ogp_site_url = config.html_baseurl


def give_back_codecs():
    """Undo what `future_typing`, which the corpus of plays depends on, does to Python.

    It answers for every codec, whatever its name, so the one that reads LaTeX accents in the
    bibliography is never asked.
    """
    if importlib.util.find_spec("future_typing"):
        from future_typing.codec import search_function

        # Python may read the package's .pth file more than once, and registers it each time.
        for _ in range(8):
            codecs.unregister(search_function)


def setup(app):
    give_back_codecs()
    # Each citation asks for it, which would look through all installed packages.
    register_plugin("pybtex.backends", "plaintext", plaintext.Backend, force=True)
    app.add_directive("names", NamesDirective)
    app.connect("config-inited", share_address)
    app.connect("env-get-outdated", reread_names)
    app.connect("source-read", read_notebook)
    app.connect("source-read", say_cost)
    app.connect("doctree-resolved", label_exports)
    app.connect("doctree-read", index_names, priority=100)
    app.connect("doctree-read", point_to_kernel)
    # After Sphinx has collected the titles, so that the number stays out of the contents.
    app.connect("doctree-read", number_title, priority=900)
    app.connect("html-page-context", run_model)
    app.connect("html-page-context", open_pinned, priority=900)
    return {"version": "1", "parallel_read_safe": True}
