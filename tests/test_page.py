"""The built page, read in a browser: nothing from the network, nothing broken."""

import functools
import html
import http.server
import json
import re
import threading
import unicodedata
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

import address
import axe_playwright_python
import literate
import names
import pytest
import yaml
from fontTools.ttLib import TTFont
from PIL import Image

ROOT = Path(__file__).parent.parent
CONFIG = yaml.safe_load((ROOT / "_config.yml").read_text("utf-8"))
REDIRECTS = {
    f"{old}.html": f"book/{new}"
    for old, new in CONFIG["sphinx"]["config"]["redirects"].items()
} | {"index.html": "book/intro.html"}
# Parsed before playwright runs: between its greenlets `ast` fails now and then.
NAMES = names.public_names()
# The page is served from here, as on the web: the path of its address.
BASE = urlsplit(CONFIG["html"]["baseurl"]).path
AXE = Path(axe_playwright_python.__file__).with_name("axe.min.js").read_text("utf-8")
# What axe finds serious or critical: the rule and the first elements that break it.
AXE_RUN = """async (options) => {
  options = {...options, preload: false, resultTypes: ["violations"]};
  const found = await axe.run(options);
  return found.violations
    .filter(rule => ["serious", "critical"].includes(rule.impact))
    .map(rule => [rule.id, ...rule.nodes.slice(0, 3).map(node => node.html)]);
}"""
EVERY_RULE = {"rules": {"label-content-name-mismatch": {"enabled": True}}}
COLORS = ["color-contrast", "link-in-text-block"]
OF_COLORS = {"runOnly": COLORS}
BUT_COLORS = {"rules": EVERY_RULE["rules"] | {r: {"enabled": False} for r in COLORS}}
SMALL = "book/16_scaling_laws.html"
# Text has a few colors on a few grounds, thousands of times: axe sees three of each, on
# the first pages that have them. It doesn't judge a single character.
THREE_OF_EACH = """(seen) => {
  const grounds = new Map([[undefined, ""]]);
  const ground = element => {
    if (!grounds.has(element)) {
      const {backgroundColor, backgroundImage, opacity} = getComputedStyle(element);
      const own = [backgroundColor, backgroundImage, opacity].join(" ");
      const below = ground(element.parentElement ?? element.getRootNode().host);
      grounds.set(element, own === "rgba(0, 0, 0, 0) none 1" ? below : below + own);
    }
    return grounds.get(element);
  };
  const live = [...document.querySelectorAll("glass-gpt")].map(x => x.shadowRoot);
  for (const root of [document, ...live.filter(Boolean)])
    for (const element of root.querySelectorAll("*")) {
      const words = [...element.childNodes].some(node => node.data?.trim().length > 1);
      const said = words || element.matches("input, textarea, select");
      if (!said || !element.checkVisibility()) continue;
      const {color, fontSize, fontWeight} = getComputedStyle(element);
      const large = parseFloat(fontSize) >= (fontWeight >= 700 ? 18.66 : 24);
      const link = element.matches("p a");
      const shade = [color, large, link, ground(element)].join(" ");
      seen[shade] = (seen[shade] ?? 0) + 1;
      if (seen[shade] <= 3) element.dataset.shade = "";
    }
  return seen;
}"""
ONLY_THESE = """() => {
  const kept = ":is([data-shade], glass-gpt)";
  document.querySelectorAll(`body :not(${kept}, ${kept} *, :has(${kept}))`)
    .forEach(element => element.style.setProperty("display", "none", "important"));
  axe.configure({rules: [{id: "color-contrast", selector: "[data-shade]"},
    {id: "link-in-text-block", selector: "a[data-shade]"}]});
  const live = [...document.querySelectorAll("glass-gpt")].map(x => x.shadowRoot);
  return [document, ...live].some(root => root?.querySelector("[data-shade]"));
}"""
# What axe need not walk through: words of code; then the inside of drawings, formulas
# and plain text, and buttons that are all alike.
WORDS = """() => {
  const seen = new Set();
  document.querySelectorAll("pre span[class]").forEach(word => {
    if (seen.has(word.className)) word.replaceWith(...word.childNodes);
    else if (word.textContent.length > 1) seen.add(word.className);
  });
}"""
PRUNE = """() => {
  const kept = "a, button, img, input, svg, [data-shade], [id], [lang], [role], "
    + "[tabindex], [aria-label], [aria-hidden]";
  document.querySelectorAll("svg[role=img], math").forEach(x => x.replaceChildren());
  document.querySelectorAll(`article :is(p, li, td):not(:has(${kept}))`)
    .forEach(text => text.textContent = text.textContent);
  [...document.querySelectorAll("button.copybtn:not([data-shade])")]
    .filter(button => button.checkVisibility()).slice(1)
    .forEach(button => button.remove());
}"""
# page.js has asked every box whether it scrolls.
ASKED = "!document.querySelector('pre:not([tabindex])')"
UNREACHABLE = """[...document.querySelectorAll("pre")]
  .filter(box => box.tabIndex < 0)
  .filter(({ scrollWidth, clientWidth, scrollHeight, clientHeight }) =>
    scrollWidth > clientWidth || scrollHeight > clientHeight).length"""
# Boxes that paper would cut.
CUT = """() => [...document.querySelectorAll("article pre, article .math")]
  .filter(box => box.checkVisibility() && box.scrollWidth > box.clientWidth + 1)
  .map(box => box.outerHTML.slice(0, 160))"""
THEME = "name => [name, undefined].includes(document.documentElement.dataset.theme)"
PRINTED = """() => document.documentElement.dataset.theme !== "dark"
  && !document.querySelector("article details:not(.hide, [open])")"""
MARKERS = re.compile(r"^#\| ?(export|default_exp)|^# ?@title", re.MULTILINE)
# Runs in the page and returns what a reader would stumble over.
LOOK = """() => {
  const named = element => (element.getAttribute("alt") || "").trim()
    || element.getAttribute("aria-label") || element.getAttribute("aria-labelledby")
    || element.querySelector(":scope > title");
  const article = document.querySelector("article.bd-article") || document.body;
  const text = article.cloneNode(true);
  text.querySelectorAll("pre, code, script, style").forEach(part => part.remove());
  return {
    lang: document.documentElement.lang,
    title: document.title,
    ids: [...document.querySelectorAll("[id]")].map(element => element.id),
    links: [...document.querySelectorAll("a[href]")].map(a => a.href),
    mute: [...article.querySelectorAll("img, svg[role=img]")]
      .filter(picture => !picture.closest("[aria-hidden=true]") && !named(picture))
      .map(picture => picture.outerHTML.slice(0, 200)),
    code: [...article.querySelectorAll("pre")].map(pre => pre.textContent).join("\\n"),
    prose: text.textContent,
    formulas: article.querySelectorAll("math").length,
    graded: /\\bgrade\\(/.test(article.textContent),
  };
}"""
# Focuses a slider, and returns the key that moves it; the live model has its own test.
FOCUS = """index => {
  const sliders = document.querySelectorAll("article input[type=range]");
  const one = [...sliders].filter(x => !x.closest("glass-gpt"))[index];
  if (!one) return "";
  let figure = one;
  while (!figure.querySelector("[role=img]")) figure = figure.parentElement;
  window.shown = () => [...figure.querySelectorAll("[role=img]")]
    .filter(part => part.checkVisibility()).map(part => part.outerHTML).join("");
  window.before = shown();
  one.focus();
  return one.value === one.max ? "ArrowLeft" : "ArrowRight";
}"""
MOVED = "window.before !== '' && window.before !== shown()"
# The elements that make the page wider than the screen.
WIDE = """() => document.documentElement.scrollWidth <= innerWidth ? [] :
  [...document.querySelectorAll("article *")]
    .filter(element => element.getBoundingClientRect().right > innerWidth + 1)
    .slice(0, 5).map(element => element.outerHTML.slice(0, 160))"""


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    """Serves files without a word; what two pages share is fetched once."""

    def log_message(self, *arguments):
        pass

    def end_headers(self):
        self.send_header("Cache-Control", "max-age=3600")
        super().end_headers()

    def translate_path(self, path):
        return super().translate_path(path.removeprefix(BASE))


@pytest.fixture(scope="module")
def server(site):
    """The address of a local server of the built page."""
    handler = functools.partial(QuietHandler, directory=site)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{served.server_port}{BASE}"
        served.shutdown()


def report(page, server, trouble):
    """Let what goes wrong on a page be told to a function."""

    def asked(request):
        if not request.url.startswith((server, "data:", "blob:")):
            trouble(f"request to {request.url}")

    def answered(response):
        if response.status >= 400:
            trouble(f"{response.status}: {response.url}")

    def said(message):
        if message.type == "error":
            trouble(f"console: {message.text}")

    page.on("request", asked)
    page.on("response", answered)
    page.on("console", said)
    page.on("pageerror", lambda error: trouble(f"page error: {error}"))


def move_sliders(page):
    """For each slider whether a key press changes its picture; no kernel answers."""
    moved = []
    while key := page.evaluate(FOCUS, len(moved)):
        page.keyboard.press(key)
        moved.append(page.evaluate(MOVED))
    return moved


def change_theme(page, theme):
    """Let the system ask for light or dark, and wait until the page follows."""
    page.emulate_media(media="screen", color_scheme=theme)
    page.wait_for_function(THEME, arg=theme)


def visit(page, address, shades):
    """Open an address on a phone, on paper and in both colors: what was seen.

    shades: how often each color of text was met on its ground, which is added to.
    """
    page.set_viewport_size({"width": 360, "height": 800})
    page.emulate_media(media="screen", color_scheme="light")
    page.goto(address)
    page.add_style_tag(
        content="* { transition: none !important }"
        "div.cell { content-visibility: visible !important }"
    )
    seen = page.evaluate(LOOK) | {"wide": page.evaluate(WIDE)}
    page.wait_for_function(ASKED)
    seen["moved"] = move_sliders(page)
    page.wait_for_function(f"{UNREACHABLE} === 0")
    page.evaluate(WORDS)
    for theme in ("light", "dark"):
        change_theme(page, theme)
        shades |= page.evaluate(THREE_OF_EACH, shades)
    page.evaluate(PRUNE)
    page.evaluate(AXE)
    seen["barred"] = page.evaluate(AXE_RUN, BUT_COLORS)
    # The width of the text on a sheet of A4.
    page.set_viewport_size({"width": 672, "height": 1000})
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    seen |= {"cut": page.evaluate(CUT), "printed": page.evaluate(PRINTED)}
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    if page.evaluate(ONLY_THESE):
        for theme in ("light", "dark"):
            change_theme(page, theme)
            seen["barred"] += page.evaluate(AXE_RUN, OF_COLORS)
    page.wait_for_load_state("networkidle")
    return seen


@pytest.fixture(scope="module")
def pages(site, server, browser):
    """{path: what was seen} for every page of the site."""
    found = sorted(site.rglob("*.html"))
    paths = [p.relative_to(site).as_posix() for p in found if "_static" not in p.parts]
    paths = [path for path in paths if path not in REDIRECTS]
    page, trouble, seen, shades = browser.new_page(), [], {}, {}
    report(page, server, trouble.append)
    for path in paths:
        seen[path] = visit(page, server + path, shades) | {"trouble": trouble[:]}
        trouble.clear()
    page.close()
    return seen


def collect(pages, key):
    """The pages on which a list of troubles isn't empty."""
    return {path: seen[key] for path, seen in pages.items() if seen[key]}


def test_every_chapter_has_a_page(pages):
    chapters = [*(ROOT / "book").glob("*.ipynb"), *(ROOT / "book").glob("*.md")]
    assert {f"book/{chapter.stem}.html" for chapter in chapters} <= set(pages)


def test_old_addresses_lead_to_the_new_ones(site, server, browser):
    page = browser.new_page()
    for old, new in REDIRECTS.items():
        page.goto(server + old)
        page.wait_for_url(server + new)
        assert (site / new).is_file()
    page.close()


def test_nothing_is_asked_of_the_network_and_nothing_fails(pages):
    assert collect(pages, "trouble") == {}


def test_nobody_is_barred(pages):
    """axe has no serious or critical complaint on a phone, in light or dark."""
    assert collect(pages, "barred") == {}


def test_nobody_is_barred_at_a_desk(server, browser):
    """What it shows beside the text is the same on all pages."""
    page = browser.new_page(color_scheme="dark")
    page.goto(server + SMALL)
    page.wait_for_function(ASKED)
    page.evaluate(PRUNE)
    page.evaluate(AXE)
    assert page.evaluate(AXE_RUN, EVERY_RULE) == []
    page.close()


def test_what_is_out_of_view_can_be_found_by_a_screen_reader(server, browser):
    page = browser.new_page()
    page.goto(server + SMALL)
    page.wait_for_function(ASKED)
    asking = page.context.new_cdp_session(page)
    nodes = asking.send("Accessibility.getFullAXTree")["nodes"]
    roles = [node["role"]["value"] for node in nodes if not node["ignored"]]
    assert roles.count("slider") == page.locator("article input[type=range]").count()
    page.close()


def test_every_picture_has_alternative_text(pages):
    assert collect(pages, "mute") == {}


def test_no_page_is_wider_than_a_phone(pages):
    assert collect(pages, "wide") == {}


def test_paper_is_light_and_cuts_nothing(pages):
    assert collect(pages, "cut") == {}
    assert all(seen["printed"] for seen in pages.values())


def test_the_page_for_lost_readers_works_at_any_depth(pages, site, server, browser):
    page = browser.new_page()
    lost = server + "book/gone/away.html"
    page.route(lost, lambda route: route.fulfill(path=site / "404.html"))
    page.goto(lost)
    assert page.evaluate("getComputedStyle(document.body).display") == "flex"
    page.get_by_role("link", name="the cover").click()
    page.wait_for_url(server + "book/intro.html")
    page.close()


@pytest.mark.parametrize("name", ["softmax", "TrainConfig"])
def test_a_search_finds_a_function_fits_a_phone_and_quotes_no_drawing(
    name, server, browser
):
    place = {entry.name: entry.place for entry in NAMES}[name]
    page = browser.new_page(viewport={"width": 390, "height": 844})
    page.goto(f"{server}search.html?q={name}")
    page.locator("#search-results li p").first.wait_for()
    links = page.locator("#search-results li a").all()[:3]
    assert f"book/{place}" in [link.get_attribute("href") for link in links]
    assert not page.evaluate(WIDE)
    assert "embeddings+" not in page.locator("#search-results").inner_text()
    page.close()


def test_contents_open_on_a_phone_and_lead_away(server, browser):
    page = browser.new_page(viewport={"width": 390, "height": 844})
    page.goto(server + "book/06_attention.html")
    opened = page.locator("dialog[open]")
    page.locator(".bd-header-article .primary-toggle").click()
    opened.get_by_text("13. Generation").wait_for()
    page.keyboard.press("Escape")
    opened.wait_for(state="detached")
    page.locator(".bd-header-article .secondary-toggle").click()
    opened.get_by_role("link", name="The mask", exact=True).click()
    opened.wait_for(state="detached")
    assert page.url.endswith("#the-mask")
    page.close()


def test_exercises_lead_to_a_kernel(pages):
    graded = {path for path, seen in pages.items() if seen["graded"]}
    assert graded
    for path in graded:
        assert "The checks grade your answer where Python runs" in pages[path]["prose"]


def test_a_shared_link_shows_the_card(site):
    card = site / "_static" / "card.png"
    assert card.stat().st_size < 100_000
    assert Image.open(card).size == (1200, 630)
    head = (site / "book" / "06_attention.html").read_text("utf-8")
    address = CONFIG["html"]["baseurl"] + "_static/card.png"
    assert f'<meta property="og:image" content="{address}" />' in head
    assert '<meta name="twitter:card" content="summary_large_image" />' in head


def test_every_page_names_its_language_and_title(pages):
    assert {seen["lang"] for seen in pages.values()} == {"en"}
    assert all(seen["title"].strip() for seen in pages.values())


def test_no_id_stands_twice_on_a_page(pages):
    twice = {
        path: {name for name in seen["ids"] if seen["ids"].count(name) > 1}
        for path, seen in pages.items()
    }
    # The theme itself repeats the ids of its search field, once for each screen width.
    own = {"search-input"}
    assert {path: found - own for path, found in twice.items() if found - own} == {}


def test_formulas_are_typeset(pages):
    assert any(seen["formulas"] for seen in pages.values())
    for path, seen in pages.items():
        assert r"\(" not in seen["prose"], path
        assert "$$" not in seen["prose"], path


def test_markers_are_hidden_and_labels_shown(pages):
    for path, seen in pages.items():
        assert not MARKERS.search(seen["code"]), path
    label = re.compile(r"enters\s+glassgpt\.")
    labeled = {path for path, seen in pages.items() if label.search(seen["prose"])}
    places = {entry.place.split("#")[0] for entry in NAMES}
    assert {f"book/{page}" for page in places if page} <= labeled


def leads_somewhere(link, site, pages):
    """Whether a link within the site names a file, and a place on it."""
    target, anchor = urldefrag(link.split("?")[0])
    target, anchor = unquote(target) or "index.html", unquote(anchor)
    if anchor and target in pages:
        return anchor in pages[target]["ids"]
    return (site / target).is_file()


def test_internal_links_lead_somewhere(pages, site, server):
    broken = []
    for path, seen in pages.items():
        own = {x.removeprefix(server) for x in seen["links"] if x.startswith(server)}
        wrong = sorted(link for link in own if not leads_somewhere(link, site, pages))
        broken += [f"{path}: {link}" for link in wrong]
    assert broken == []


def test_every_docstring_names_a_section_that_exists(pages):
    assert NAMES
    for entry in NAMES:
        page, anchor = urldefrag(entry.place)
        assert f"book/{page}" in pages, f"{entry.module}.{entry.name}: {entry.place!r}"
        assert anchor in pages[f"book/{page}"]["ids"], f"{entry.name}: {entry.place}"


def test_buttons_lead_to_the_chapter_and_its_source(pages):
    repository, _ = address.current(ROOT)
    colab = "https://colab.research.google.com/github"
    for notebook in (ROOT / "book").glob("*.ipynb"):
        seen = pages[f"book/{notebook.stem}.html"]
        place = f"book/{notebook.name}"
        owner = repository.removeprefix("https://github.com/")
        assert f"{colab}/{owner}/blob/colab/{place}" in seen["links"]
        source = f"{repository}/blob/main/{place}"
        assert any(link.startswith(source) for link in seen["links"]), notebook.name
    assert not [x for x in pages["book/intro.html"]["links"] if "intro.ipynb" in x]


def test_a_chapter_says_what_it_takes_to_run(pages):
    costs = json.loads(literate.COSTS.read_text("utf-8"))
    for name, cost in costs["chapters"].items():
        told = literate.running_cost(**cost, cores=costs["cores"])
        words = f"to solve the exercises. {told}"
        assert words in pages[f"book/{name}.html"]["prose"], name


def test_the_cover_writes_by_itself_and_not_where_motion_is_unwanted(server, browser):
    for motion, moves in (("no-preference", True), ("reduce", False)):
        page = browser.new_page(reduced_motion=motion)
        page.goto(server + "book/intro.html")
        page.locator("glass-gpt .live:not([hidden])").wait_for()
        count = "document.querySelector('glass-gpt').ids.length"
        before = page.evaluate(count)
        if moves:
            page.wait_for_function(f"{count} > {before + 1}")
            page.get_by_role("button", name="Stop").click()
        after = page.evaluate(count)
        page.wait_for_timeout(1000)
        assert page.evaluate(count) == (after if moves else before)
        prompt = page.get_by_role("textbox", name="Prompt")
        prompt.press("/")  # and not the search's
        assert "/" in prompt.input_value()
        page.close()


def test_what_scrolls_after_a_resize_can_be_focused(server, browser):
    page = browser.new_page(viewport={"width": 1280, "height": 800})
    page.goto(server + SMALL)
    page.wait_for_function(ASKED)
    page.set_viewport_size({"width": 390, "height": 800})
    assert page.evaluate(UNREACHABLE) > 0  # for a moment
    page.wait_for_function(f"{UNREACHABLE} === 0")
    page.close()


def test_without_javascript_the_cover_shows_a_still(server, browser):
    page = browser.new_page(java_script_enabled=False)
    page.goto(server + "book/intro.html")
    assert page.locator(".glass-start").inner_text().startswith("ROMEO")
    page.close()


def test_sliders_move_their_figure_by_keyboard(pages):
    moved = {path: seen["moved"] for path, seen in pages.items() if seen["moved"]}
    assert len(moved) > 20
    assert {path: each for path, each in moved.items() if not all(each)} == {}


def test_the_font_of_formulas_has_every_sign_that_they_show(site):
    """A browser draws the root of <msqrt> by itself; no text has the sign."""
    pages = "".join(page.read_text("utf-8") for page in site.rglob("*.html"))
    formulas = re.findall("<math.*?</math>", pages, re.DOTALL)
    shown = "".join(re.sub("<.*?>", "", formula) for formula in formulas)
    assert "<msqrt>" in "".join(formulas)
    font = TTFont(site / "_static" / "math.woff2").getBestCmap()
    signs = set(html.unescape(shown) + "\u221a")
    missing = [sign for sign in signs if ord(sign) not in font]
    # What is drawn by the page's own fonts, or isn't drawn at all.
    unseen = ("Cf", "Zs")
    drawn = [x for x in missing if unicodedata.category(x) not in unseen]
    assert [x for x in drawn if not x.isascii()] == []
