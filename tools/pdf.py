"""Print the built page as one book: `make pdf` writes `_build/glassgpt.pdf`.

The articles of all chapters become one page, which Chromium prints with tags, outline and
alternative texts. It prints twice: the first time shows on which page each heading lands, and
then the contents get their numbers.

On paper there is nothing to unfold. Hints stand open, solutions and answers move to the end of
their chapter. The whole program is printed; of the checks their names and lengths, since the page
has them. Folded code that draws a figure is left out.
"""

import copy
import html
import io
import json
import tempfile
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urljoin

import pikepdf
import yaml
from bs4 import BeautifulSoup
from playwright.sync_api import sync_playwright

from browser import FLAGS, find_browser

ROOT = Path(__file__).resolve().parent.parent
STYLE = ROOT / "tools" / "pdf.css"
# Of packages, so that the book looks the same wherever it is printed.
FONTS = {
    ("Book Serif", 400, "normal"): ("font_source_serif_pro", "SourceSerifPro-Regular"),
    ("Book Serif", 400, "italic"): ("font_source_serif_pro", "SourceSerifPro-It"),
    ("Book Serif", 700, "normal"): ("font_source_serif_pro", "SourceSerifPro-Semibold"),
    ("Book Serif", 700, "italic"): ("font_source_serif_pro", "SourceSerifPro-SemiboldIt"),
    ("Book Sans", 400, "normal"): ("font_source_sans_pro", "SourceSansPro-Regular"),
    ("Book Sans", 700, "normal"): ("font_source_sans_pro", "SourceSansPro-Semibold"),
}
HEADINGS = """() => [...document.querySelectorAll("h1, h2, h3, h4, h5, h6")].map(
  heading => heading.innerText.replace(/\\s+/g, " ").trim())"""
NUMBER_LINKS = """places => document.querySelectorAll("a.page").forEach(link => {
  link.querySelector(".where").textContent = places[decodeURIComponent(link.hash.slice(1))];
})"""


def read_toc(path):
    """[(caption of the part, [name of a page, ...]), ...] in the order of the book."""
    toc = yaml.safe_load(path.read_text("utf-8"))
    parts = [(p["caption"], [Path(c["file"]).name for c in p["chapters"]]) for p in toc["parts"]]
    return [("", [Path(toc["root"]).name]), *parts]


def parse(text):
    return BeautifulSoup(text, "html.parser")


def page_link(target, words):
    """A link that shows its page number; `words` are HTML."""
    return f'<a class="page" href="#{target}"><span>{words}</span> <span class="where"></span></a>'


def keep_still(moving):
    """Leave the frame that is seen first and, where it is the first of all, the last one too."""
    frames = moving.select(".glass-frame")
    start = next(number for number, frame in enumerate(frames) if "glass-start" in frame["class"])
    label = moving.input["aria-label"]
    for number, frame in enumerate(frames):
        if number == start or (start == 0 and number == len(frames) - 1):
            frame["class"] = "glass-frame glass-start"
            words = html.escape(f"{label}: {frame['data-value']}")
            frame.append(parse(f'<p class="glass-still">{words}</p>'))
        else:
            frame.decompose()
    for part in moving.select("label, button, label ~ .glass-still, .glass-spoken"):
        part.decompose()


def unfold(article, name):
    """Print the program and the hints, move solutions and answers to the end.

    Of a folded check its name and length are printed; other folded code, which draws, is left out.
    """
    solutions = {}
    for folded in article("details"):
        code = "hide" in folded.get("class", [])
        cell = folded.find_parent("div", class_="cell")
        if code and "tag_hide-cell" not in cell["class"]:
            if "tag_check" in cell["class"]:
                shown = folded.summary.select_one(".collapsed").get_text(strip=True)
                label = shown.removeprefix("Show: ")
                folded.replace_with(parse(f'<p class="enters">{label}, on the page</p>'))
            elif "tag_export" in cell["class"]:
                folded.summary.decompose()
                folded.name, folded.attrs = "div", {}
            else:
                folded.decompose()
                if not cell.select_one("div.cell_output"):
                    cell.decompose()
        elif code or folded.summary.get_text(strip=True) == "Answers":
            section = folded.find_parent("section")
            solutions.setdefault(section["id"], (section, []))[1].append(folded)
            folded.summary.decompose()
            folded.name, folded.attrs = "div", {}
            words = "Solution on page" if code else "Answers on page"
            link = page_link(f"{name}-solutions", words)
            folded.replace_with(parse(f'<p class="solved">{link}</p>'))
        else:
            folded["open"] = ""
    if solutions:
        end = parse(f'<section id="{name}-solutions"><h2>Solutions</h2></section>')
        for section, found in solutions.values():
            heading = copy.copy(section.find(["h1", "h2", "h3"]))
            heading.name = "h3"
            end.section.append(heading)
            end.section.extend(found)
        article.append(end)


def read_chapter(site, name, names, address):
    """The article of a page, fit to stand beside the others: ids and links name the page."""
    page = parse((site / "book" / f"{name}.html").read_text("utf-8"))
    article = page.select_one("article.bd-article")
    for part in article.select("script, a.headerlink"):
        part.decompose()
    for moving in article.select(".glass-moving"):
        keep_still(moving)
    for part in article.find_all(id=True):
        # Those of a picture are made from its content, and its parts refer to them.
        if not part.find_parent("svg"):
            part["id"] = f"{name}-{part['id']}"
    for link in article.find_all("a", href=True):
        place, _, anchor = link["href"].partition("#")
        target = place.removesuffix(".html") if place else name
        if target in names:
            link["href"] = f"#{target}-{anchor}" if anchor else f"#{target}"
        else:
            link["href"] = urljoin(f"{address}book/", link["href"])
    for formula in article.select("math"):
        # A picture, with its TeX for those who listen.
        formula["role"], formula["aria-label"] = "img", formula["data-latex"]
    unfold(article, name)
    article.name, article.attrs = "section", {"id": name, "style": f"page: c{name}"}
    return article


def contents(parts, chapters):
    """The table of contents, whose links wait for their numbers."""
    lines = []
    for caption, names in parts:
        lines.append(f"<p>{html.escape(caption)}</p><ul>" if caption else "<ul>")
        for name in names:
            title = chapters[name].h1.decode_contents()
            lines.append(f"<li>{page_link(name, title)}<ul>")
            for heading in chapters[name].find_all("h2"):
                link = page_link(heading.parent["id"], heading.decode_contents())
                lines.append(f"<li>{link}</li>")
            lines.append("</ul></li>")
        lines.append("</ul>")
    return "\n".join(lines)


def font_faces():
    """The rules that name the files of the fonts."""
    rules = []
    for (family, weight, style), (package, name) in FONTS.items():
        file = Path(find_spec(package).origin).parent / "files" / f"{name}.ttf"
        rules.append(
            f"@font-face {{ font-family: '{family}'; font-weight: {weight}; font-style: {style};"
            f" src: url('{file.as_uri()}'); }}"
        )
    return "\n".join(rules)


def assemble(site, toc):
    """The HTML of the whole book, to lie in the folder `book` of the site."""
    config = yaml.safe_load((ROOT / "_config.yml").read_text("utf-8"))
    address = config["html"]["baseurl"]
    parts = read_toc(toc)
    names = [name for _, names in parts for name in names]
    chapters = {name: read_chapter(site, name, names, address) for name in names}
    chapters[names[0]].h1.string = "About this book"
    headers = "\n".join(
        f"@page c{name} {{ @top-center {{ content: {json.dumps(chapter.h1.get_text())}; }} }}"
        for name, chapter in chapters.items()
    )
    page = parse((site / "book" / f"{names[0]}.html").read_text("utf-8"))
    head = "".join(map(str, page.select("head > link[rel=stylesheet]")))
    body = "".join(map(str, chapters.values()))
    return f"""<!DOCTYPE html>
<html lang="en" data-theme="light" data-mode="light"><head><meta charset="utf-8">
<title>{config["title"]}</title>{head}
<style>{font_faces()}
{STYLE.read_text("utf-8")}
{headers}</style></head>
<body><main class="bd-content"><div class="bd-article">
<header>
<img src="../_static/favicon.svg" alt="">
<p class="title">{config["title"]}</p>
<p>A language model you can see through</p>
<p class="source">{config["author"]}<br><a href="{address}">{address}</a><br>
Code under the MIT license, text and figures under CC BY 4.0</p>
<p class="source">In print, a figure that moves stands still, hints stand open, solutions
are at the end of each chapter, and the code that is folded on the page is left out.</p>
</header>
<nav aria-label="Contents"><h1>Contents</h1><div>{contents(parts, chapters)}</div></nav>
{body}
</div></main></body></html>"""


def walk(item):
    """Every entry of an outline, in the order of the book."""
    while item is not None:
        yield item
        yield from walk(item.get("/First"))
        item = item.get("/Next")


def page_numbers(pdf):
    """{id: number of its page} of every place in the PDF that a link leads to."""
    numbers = {page.objgen: number for number, page in enumerate(pdf.pages, 1)}
    return {name[1:]: numbers[place[0].objgen] for name, place in pdf.Root.Dests.items()}


def print_book(site, toc, target, browser):
    """Print the chapters of a table of contents, from the built site."""
    options = {"outline": True, "tagged": True, "print_background": True}
    with tempfile.NamedTemporaryFile("w", dir=site / "book", suffix=".html") as file:
        file.write(assemble(site, toc))
        file.flush()
        page = browser.new_page(color_scheme="light")
        page.set_default_timeout(0)
        page.goto(Path(file.name).as_uri())
        page.evaluate("document.fonts.ready.then(() => {})")
        headings = page.evaluate(HEADINGS)
        first = pikepdf.open(io.BytesIO(page.pdf(prefer_css_page_size=True, **options)))
        page.evaluate(NUMBER_LINKS, page_numbers(first))
        pdf = pikepdf.open(io.BytesIO(page.pdf(prefer_css_page_size=True, **options)))
        page.close()
    assert page_numbers(pdf) == page_numbers(first), "the numbers moved the pages"
    # Where a heading breaks into lines, Chromium forgets the space.
    for entry, heading in zip(walk(pdf.Root.Outlines.First), headings, strict=True):
        entry.Title = heading
        if "/Count" in entry:
            entry.Count = -abs(entry.Count)  # folded
    pdf.docinfo["/Author"] = yaml.safe_load((ROOT / "_config.yml").read_text("utf-8"))["author"]
    pdf.save(target, object_stream_mode=pikepdf.ObjectStreamMode.generate)
    return pdf


def main():
    if find_browser() is None:
        raise SystemExit("pdf: install Chromium or Chrome, or name one: GLASSGPT_BROWSER=PATH")
    with sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=find_browser(), args=FLAGS)
        target = ROOT / "_build" / "glassgpt.pdf"
        print_book(ROOT / "_build" / "html", ROOT / "_toc.yml", target, chromium)
    print(f"The book is printed: {target.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
