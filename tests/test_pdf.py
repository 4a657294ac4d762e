"""The printed book: nothing lost on the way from the page to the paper."""

import re

import numpy as np
import pdf
import pikepdf
import pypdfium2
import pytest

# Two chapters are enough: formulas, figures that move, exercises, links to each other.
CHAPTERS = ["05_softmax", "09_block"]
TOC = """format: jb-book
root: book/intro
parts:
- {caption: A part, chapters: [{file: book/05_softmax}, {file: book/09_block}]}
"""
WIDTH, HEIGHT, MARGIN = 595, 842, 22 / 25.4 * 72  # A4, in points
FIGURES = "[role=img]:not(math)"
SCALE = 0.5  # pixels a point


@pytest.fixture(scope="module")
def toc(tmp_path_factory):
    """The table of contents of a book of two chapters."""
    path = tmp_path_factory.mktemp("pdf") / "toc.yml"
    path.write_text(TOC, "utf-8")
    return path


@pytest.fixture(scope="module")
def paper(site, toc, browser):
    """The path of the printed book."""
    target = toc.with_name("book.pdf")
    pdf.print_book(site, toc, target, browser)
    return target


@pytest.fixture(scope="module")
def articles(site):
    """{chapter: its article on the page}, which the tool did not touch."""
    found = {}
    for name in CHAPTERS:
        page = pdf.parse((site / "book" / f"{name}.html").read_text("utf-8"))
        found[name] = page.select_one("article.bd-article")
        for link in found[name].select("a.headerlink"):
            link.decompose()
    return found


def plain(text):
    """Text without what a line break can change."""
    return re.sub(r"\s+", "", text)


def figures(paper):
    """The alternative text of each figure in the tag tree."""
    with pikepdf.open(paper) as book:
        tags = [
            thing for thing in book.objects if isinstance(thing, pikepdf.Dictionary)
        ]
        return [str(tag.get("/Alt", "")) for tag in tags if tag.get("/S") == "/Figure"]


def text_of(paper):
    """The text of each page."""
    book = pypdfium2.PdfDocument(paper)
    return [page.get_textpage().get_text_bounded() for page in book]


def test_the_book_names_its_language_title_and_author(paper):
    with pikepdf.open(paper) as book:
        assert book.Root.Lang == "en"
        assert book.Root.MarkInfo.Marked
        assert book.docinfo["/Title"] == "Glass GPT"
        assert book.docinfo["/Author"] == "The Glass GPT authors"


def test_the_outline_holds_every_heading_below_its_chapter(paper, articles):
    with pikepdf.open(paper) as book, book.open_outline() as outline:
        chapters = {entry.title: entry for entry in outline.root}
        for article in articles.values():
            entry = chapters[article.h1.get_text()]
            sections = [plain(heading.get_text()) for heading in article("h2")]
            assert [plain(x.title) for x in entry.children] == [*sections, "Solutions"]
            for section in entry.children[:-1]:
                place = sections.index(plain(section.title))
                below = [plain(h.get_text()) for h in article("h2")[place].parent("h3")]
                assert [plain(x.title) for x in section.children] == below


def footer(page):
    """What stands below the text of a page."""
    return page.get_textpage().get_text_bounded(0, 0, WIDTH, MARGIN - 5).strip()


def test_the_contents_give_the_page_of_each_heading(paper):
    book = pypdfium2.PdfDocument(paper)
    texts = [plain(text) for text in text_of(paper)]
    contents = book[1]
    assert texts[1].startswith("2Contents")
    with pikepdf.open(paper) as tree:
        boxes = [[float(x) for x in link.Rect] for link in tree.pages[1].Annots]
    assert len(boxes) > 20
    for box in boxes:
        words = contents.get_textpage().get_text_bounded(*box)
        title, number = re.fullmatch(r"(.*?)(\d+)", plain(words)).groups()
        assert title in texts[int(number) - 1], words
        assert footer(book[int(number) - 1]) == number


def test_links_stay_in_the_book_where_they_can(paper, articles):
    with pikepdf.open(paper) as book:
        places = pdf.page_numbers(book)
        links = [[*page.get("/Annots", [])] for page in book.pages]
        outside = [str(x.A.URI) for page in links for x in page if "/A" in x]
        inside = [{str(x.Dest)[1:] for x in page if "/Dest" in x} for page in links]
    assert all(address.startswith("https://") for address in outside)
    assert not [address for address in outside if "book/05_softmax" in address]
    assert set.union(*inside) <= set(places)
    written = {
        a["href"] for a in articles["09_block"].select("a[href^='05_softmax.html']")
    }
    wanted = {link.replace(".html#", "-").removesuffix(".html") for link in written}
    assert wanted
    assert wanted <= set.union(*inside[places["09_block"] - 1 :])


def test_every_picture_and_formula_has_its_words(paper, articles):
    words = {plain(text) for text in figures(paper)}
    assert all(words)
    for article in articles.values():
        moving = article.select(".glass-frame:not(.glass-start) [role=img]")
        pictures = [p for p in article.select("[role=img], img") if p not in moving]
        assert pictures
        for picture in pictures:
            assert plain(picture.get("aria-label") or picture["alt"]) in words
        formulas = [plain(part["data-latex"]) for part in article.select("math")]
        assert formulas
        assert set(formulas) <= words


@pytest.fixture(scope="module")
def marked(site, toc, browser):
    """The book with its figures on bright paper, their number, and the page's width."""
    book = site / "book" / "marked.html"
    book.write_text(pdf.assemble(site, toc), "utf-8")
    page = browser.new_page(viewport={"width": 627, "height": 900})
    page.emulate_media(media="print")
    page.goto(book.as_uri())
    page.evaluate("document.fonts.ready.then(() => {})")
    width = page.evaluate("document.documentElement.scrollWidth")
    page.add_style_tag(content=f"{FIGURES} {{ background: #f0f !important; }}")
    count = page.locator(f"{FIGURES}:visible").count()
    printed = page.pdf(prefer_css_page_size=True, print_background=True)
    page.close()
    book.unlink()
    return printed, count, width


def rows(mask):
    """[(first, last + 1), ...] of the runs of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(int), [0]])))
    return edges.reshape(-1, 2)


def test_no_figure_is_blank(paper, marked):
    printed, count, _ = marked
    found = 0
    for page, bright in zip(
        pypdfium2.PdfDocument(paper), pypdfium2.PdfDocument(printed), strict=True
    ):
        there = bright.render(scale=SCALE, rev_byteorder=True).to_numpy()[..., :3]
        place = (there == (255, 0, 255)).all(-1)
        ink = page.render(scale=SCALE, grayscale=True).to_numpy().squeeze() < 200
        for top, bottom in rows(place.any(1)):
            left, right = np.flatnonzero(place[top:bottom].any(0))[[0, -1]]
            share = ink[top:bottom, left:right].mean()
            assert share > 0.005, f"page {footer(page)}: a blank figure"
            found += 1
    assert found == count > 5


def test_nothing_is_wider_than_the_paper(paper, marked):
    assert marked[2] <= 627, "one thing too wide makes Chromium print all smaller"
    for page in pypdfium2.PdfDocument(paper):
        text = page.get_textpage()
        for number in range(text.count_rects()):
            left, _, right, _ = text.get_rect(number)
            inside = left >= MARGIN - 2 and right <= WIDTH - MARGIN + 2
            assert inside, text.get_text_bounded(*text.get_rect(number))


def test_solutions_stand_at_the_end_and_of_a_check_its_name(paper):
    texts = text_of(paper)
    solution = [n for n, text in enumerate(texts) if "def solution_softmax" in text]
    heading = [n for n, text in enumerate(texts) if "\nSolutions\r" in text]
    assert heading[0] <= solution[0]
    assert len(solution) == 1
    assert any("\nHint\r" in text for text in texts)
    assert not any("def check_softmax" in text or "Show:" in text for text in texts)
    assert any(re.search(r"check_softmax.*, \d+ lines, on the page", t) for t in texts)
