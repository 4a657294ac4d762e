"""The book's own Sphinx extension: what is around the chapters, and who can read it.

* Formulas become MathML when the book is built; the browser draws them.
* Scripts that the book doesn't use are left out, and the others wait for the text.
* What stands in drawings is not searched: the map of the book has words of every chapter.
* 404.html answers for addresses that don't exist.
"""

import html
import re
import shutil
from pathlib import Path
from urllib.parse import urlsplit

import diet
from docutils import nodes
from math_core import LatexError, LatexToMathML
from sphinx.util import logging

from sphinx import search

LOGGER = logging.getLogger(__name__)
TO_MATHML = LatexToMathML(fancy_error=False)
UNUSED = re.compile("thebe|toggle(button|Hint|Open)|design-tabs")
LOST = """<h1>This page does not exist</h1>
<p>Its address may have changed. Start from <a href="book/intro.html">the cover</a>, or
<a href="search.html">search the book</a>.</p>"""


def mathml(node, display):
    """The formula of a node; a warning where its LaTeX can't be read."""
    latex = node.astext()
    try:
        formula = TO_MATHML.convert_with_local_state(latex, displaystyle=display)
        return formula.replace("<math", f'<math data-latex="{html.escape(latex)}"', 1)
    except LatexError as error:
        LOGGER.warning("formula %s: %s", latex, error, location=node)
        return ""


def write_inline(writer, node):
    writer.body.append(mathml(node, False))
    raise nodes.SkipNode


def write_block(writer, node):
    # The theme's script makes boxes of this class focusable where they scroll.
    box = writer.starttag(node, "div", CLASS="math pst-scrollable-table-container")
    writer.body.append(f"{box}{mathml(node, True)}</div>\n")
    raise nodes.SkipNode


class Words(search.WordCollector):
    """The words of a page that can be searched."""

    def dispatch_visit(self, node):
        if isinstance(node, nodes.raw) and "glass-" in node.astext():
            raise nodes.SkipNode
        super().dispatch_visit(node)


def quantize(app, pagename, templatename, context, doctree):
    """Leave out the scripts that the book doesn't use, and what the style sheet has."""
    context["script_files"] = [
        script
        for script in context["script_files"]
        if not UNUSED.search(f"{script.filename} {script.attributes.get('body')}")
    ]
    context["css_files"] = []


# The list of references has links among its items, whose role is out of use; and a summary is
# called what it shows.
MISLEADING = re.compile(' role="(list|doc-biblioentry)"| aria-label="Toggle hidden content"')
# The map of the book leads to notebooks where it is read in Jupyter, to pages here.
TO_NOTEBOOK = re.compile(r'(class="glass-stop" href="\w+)\.ipynb"')


def mend_body(app, pagename, templatename, context, doctree):
    """Leave out attributes that mislead a screen reader; let the map lead to pages."""
    body = MISLEADING.sub("", context.get("body", ""))
    context["body"] = TO_NOTEBOOK.sub(r'\1.html"', body)


def describe(app, pagename, templatename, context, doctree):
    """The description of a chapter, shown where it is shared, starts after its title."""
    title = re.escape(re.sub("<.*?>", "", context.get("title", "")))
    numbered = re.compile(rf"(Chapter|Appendix) \w+ {title}: ")
    context["metatags"] = numbered.sub("", context.get("metatags", ""))


def add_404(app):
    yield "404", {"title": "Not found", "body": LOST}, "page.html"


def root_404(app, pagename, templatename, context, doctree):
    """The page is shown at any depth: its links start from the root of the site."""
    if pagename == "404":
        base = urlsplit(app.config.html_baseurl).path
        context["metatags"] = f'<base href="{base}">{context.get("metatags", "")}'


def give_icon(app, error):
    """What a browser asks for where a page names no icon, as the redirect at the root."""
    favicon = Path(app.srcdir, "book", "_static", "favicon.svg")
    shutil.copy(favicon, Path(app.outdir, "favicon.ico"))


def setup(app):
    app.add_html_math_renderer("mathml", (write_inline, None), (write_block, None))
    search.WordCollector = Words
    app.connect("html-collect-pages", add_404)
    for change in (quantize, mend_body, describe, root_404):
        app.connect("html-page-context", change, priority=900)
    app.connect("build-finished", give_icon)
    # After the theme has written the colors of the code.
    app.connect("build-finished", diet.put_on_diet, priority=900)
    return {"version": "1", "parallel_read_safe": True}
