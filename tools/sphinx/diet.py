"""After the build: one style sheet, with the rules and the characters that the pages use."""

import importlib.util
import re
from pathlib import Path

import tinycss2
from fontTools import subset

THEME = ["basic.css", "styles/pydata-sphinx-theme.css"]
ICONS = "vendor/fontawesome/webfonts"
ASKS = re.compile(
    r'"complete"===document\.readyState\?(\w)\(\):window\.addEventListener\("load",\1\)'
)
# Drawn though no text has them: the root sign, and for the variable x U+1D465, and so on.
DRAWN = {0x221A, 0x210E, *range(0x1D434, 0x1D468), *range(0x1D6FC, 0x1D716)}


def put_on_diet(app, error):
    """Write styles/site.css and the fonts of a site that was just built."""
    if error or app.builder.name != "html":
        return
    static, pages = Path(app.outdir, "_static"), Path(app.outdir).rglob("*.html")
    pages = [page.read_text("utf-8") for page in pages]
    sheets = sorted(app.builder._css_files, key=lambda sheet: sheet.priority)
    names = [str(sheet.filename).removeprefix("_static/") for sheet in sheets]
    css = join_styles([static / name for name in THEME + names], used_words(static, pages))
    (static / "styles" / "site.css").write_text(css, "utf-8")
    icons = {ord(sign) for sign in css if "\ue000" <= sign <= "\uf8ff"}
    for font in (static / ICONS).glob("*.woff2"):
        cut_font(font, font, icons)
    # The theme lays out the whole page to ask what scrolls; page.js asks in small steps.
    theme = static / "scripts" / "pydata-sphinx-theme.js"
    theme.write_text(ASKS.sub("0", theme.read_text("utf-8")), "utf-8")
    formulas = re.findall("<math.*?</math>", "".join(pages), re.DOTALL)
    package = Path(importlib.util.find_spec("ziamath").origin).parent
    font = package / "fonts" / "STIXTwoMath-Regular.ttf"
    cut_font(font, static / "math.woff2", DRAWN | set(map(ord, "".join(formulas))))


def used_words(static, pages):
    """The classes that pages have or scripts may give."""
    classes = " ".join(re.findall('class="([^"]*)"', "".join(pages)))
    scripts = [*static.glob("*.js"), *static.glob("scripts/*.js")]
    texts = [x.read_text("utf-8") for x in scripts if x.stem != "fontawesome"]
    return {*classes.split(), *re.findall(r"[\w-]+", " ".join(texts))}


def join_styles(sheets, words):
    """The text of style sheets without the rules for classes not among these words."""
    rules = []
    for sheet in sheets:
        rules += tinycss2.parse_stylesheet(sheet.read_text("utf-8"), True, True)
    return "".join(filter(None, (needed(rule, words) for rule in rules)))


def needed(rule, words):
    """The text of a rule with the selectors that can match; empty if none can."""
    if rule.type == "qualified-rule":
        selectors = [[]]
        for token in rule.prelude:
            selectors.append([]) if token == "," else selectors[-1].append(token)
        kept = [x for x in selectors if classes_of(x) <= words]
        head = ",".join(tinycss2.serialize(selector).strip() for selector in kept)
        return head and f"{head}{{{tinycss2.serialize(rule.content).strip()}}}\n"
    if rule.type == "at-rule" and rule.lower_at_keyword in ("media", "supports"):
        parts = tinycss2.parse_rule_list(rule.content, True, True)
        inner = "".join(filter(None, (needed(part, words) for part in parts)))
        head = f"@{rule.at_keyword}{tinycss2.serialize(rule.prelude)}"
        return inner and f"{head}{{{inner}}}\n"
    return rule.serialize()


def classes_of(selector):
    """The names of classes in a selector, but for those within `:not()` and the like."""
    pairs = zip(selector, selector[1:], strict=False)
    return {name.value for dot, name in pairs if dot == "." and name.type == "ident"}


def cut_font(source, target, characters):
    """Write a font with these characters only, license and all."""
    options = subset.Options(flavor="woff2", name_IDs=["*"], hinting=False)
    options.layout_features = []
    font = subset.load_font(source, options)
    cutter = subset.Subsetter(options)
    cutter.populate(unicodes=characters)
    cutter.subset(font)
    subset.save_font(font, target, options)
