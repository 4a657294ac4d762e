# Written by tools/tangle.py from book/a1_figures.ipynb: change it there.
"""Figures: pictures that follow light and dark, and that move without a kernel."""

import hashlib
import html
import importlib.util
import inspect
import io
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

PALETTE = {
    "query": "#2a66f0",
    "key": "#e07512",
    "value": "#00a590",
    "context": "#a050b4",
    "highlight": "#d2142d",
    "muted": "#6c6c6c",
    "B": "#98930f",
    "T": "#e83e8c",
    "C": "#0a8fc8",
    "H": "#7f3ff2",
    "V": "#34790f",
}


_INCHES = 5 / 6  # of matplotlib, for one sixth of the text column
_STYLE = {
    "axes.facecolor": "none",
    "axes.linewidth": 0.6,
    "axes.prop_cycle": matplotlib.cycler(color=list(PALETTE.values())),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
}


def figure(
    width: float = 6, height: float = 3, rows: int = 1, columns: int = 1
) -> tuple[Figure, Any]:
    """Make an empty figure in the book's style.

    `width` and `height` are in sixths of the text column. Returns the figure and its
    axes: one, or an array of them as from `Figure.subplots`. What is drawn in black
    takes the color of the page's text.

    Book: a1_figures.html#a-figure
    """
    with matplotlib.rc_context(_STYLE):
        fig = Figure((width * _INCHES, height * _INCHES), layout="constrained")
        return fig, fig.subplots(rows, columns)


_UNTRUSTED = (
    "<template>Jupyter does not draw this figure: it does not trust the notebook yet. "
    "Run the cell, or choose Trust Notebook in the command palette (menu View)."
    "</template>"
)


@dataclass(frozen=True, repr=False)
class Picture:
    """HTML with alternative text, as the last line of a cell shows it.

    `alt` says in words what it shows. `frames` are the pictures behind a slider.

    Book: a1_figures.html#from-figure-to-page
    """

    content: str
    alt: str
    frames: tuple[Any, ...] = ()

    def __repr__(self) -> str:
        return self.alt

    def _repr_html_(self) -> str:
        return self.content


def _tidy_tag(match: re.Match) -> str:
    tag = re.sub(r"\s+", " ", match[0]).replace(' "', '"').replace("xlink:href", "href")
    if tag.startswith("<image"):  # its matrix needs all its digits
        return tag.replace("base64, ", "base64,")
    number = r"-?\d+\.\d+"
    tag = re.sub(number, lambda m: str(round(float(m[0]), 2)).removesuffix(".0"), tag)
    tag = tag.replace("#000000", "currentColor")
    tag = re.sub(r' transform="rotate\(-?0 [^"]*"', "", tag)
    return re.sub(r"'[^;\"]*", "system-ui,sans-serif", tag)


def _tidy(svg: str, salt: str) -> str:
    unseen = r"^.*?<svg[^>]*>|</svg>\s*$|<!--.*?-->|<metadata>.*?</metadata>"
    svg = re.sub(rf"(?s){unseen}|<style.*?</style>", "", svg)
    svg = re.sub(r">\s+<", "><", re.sub(r"<[^>]+>", _tidy_tag, svg.strip()))
    svg = re.sub(r'<path [^>]*style="fill: none"/>|<defs></defs>', "", svg)
    used = sorted(set(re.findall(r'(?:href="|url\()#([\w.-]+)', svg)))
    svg = re.sub(r' id="([^"]*)"', lambda m: m[0] if m[1] in used else "", svg)
    while "<g></g>" in svg:
        svg = svg.replace("<g></g>", "")
    prefix = "g" + hashlib.sha256((salt + svg).encode()).hexdigest()[:8]
    for number, name in enumerate(used):
        reference = rf'(id="|#){name}(?=["\)])'
        svg = re.sub(reference, rf"\g<1>{prefix}-{number}", svg)
    return svg


def show(drawn: Figure | str, alt: str, salt: str = "") -> Picture:
    """Turn a figure, or HTML, into a picture for the last line of a cell.

    `alt` says in words what the picture shows. `salt` makes equal figures differ in the
    names of their parts. Raises ValueError when `alt` is empty.

    Book: a1_figures.html#from-figure-to-page
    """
    if not alt.strip():
        raise ValueError("a picture needs alternative text: say in words what it shows")
    if isinstance(drawn, str):
        return _described(drawn, alt, role="img")
    file = io.StringIO()
    # With a fixed salt and no date, the same code gives the same text.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "glassgpt"}):
        drawn.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    width, height = (round(72 * inches, 2) for inches in drawn.get_size_inches())
    page = (
        f'{_UNTRUSTED}<div class="glass-figure"'
        ' style="overflow-x:auto;break-inside:avoid;font-size:0">'
        '<svg xmlns="http://www.w3.org/2000/svg" role="img"'
        f' aria-label="{html.escape(alt)}" viewBox="0 0 {width:g} {height:g}"'
        ' style="display:block;margin:0 auto;height:auto;width:100%;'
        f"min-width:{0.9 * width:.0f}px;max-width:{1.4 * width:.0f}px;"
        'fill:currentColor;stroke-linejoin:round">'
        f"{_tidy(file.getvalue(), salt)}</svg></div>"
    )
    return Picture(page, alt)


def heatmap(
    ax: Any,
    matrix: Any,
    rows: Sequence | None = None,
    columns: Sequence | None = None,
    color: str = "query",
    digits: int = 2,
    title: str | None = None,
    limit: float | None = None,
) -> None:
    """Draw a matrix as a grid of colored cells with their numbers.

    `matrix` (rows, columns) is a tensor or what numpy makes an array of; bool and
    infinite entries are welcome. `rows` and `columns` are the labels. `color` is a name
    in PALETTE or any color of matplotlib; `limit` is the number that gets the full
    color (default: the largest magnitude). Name the axes of `ax` before, so that the
    numbers are fitted to what is left. Raises ValueError if the matrix does not have
    two axes or holds NaN.

    Book: a1_figures.html#the-picture-of-a-matrix
    """
    numbers = _as_array(matrix, 2)
    _set_up_grid(ax, numbers.shape, rows, columns)
    if title:
        ax.set_title(title, fontsize=11)
    shades = _shades(numbers, color, limit)
    if numbers.size > 256:  # too many to print
        ax.imshow(shades, interpolation="none")
        return
    for row, column in np.ndindex(numbers.shape):
        shade = shades[row, column]
        edge = (*shade[:3], 0.3)  # so that the place of a zero shows
        corner = (column - 0.47, row - 0.47)
        ax.add_patch(Rectangle(corner, 0.94, 0.94, fc=shade, ec=edge, lw=0.6))
    _print_numbers(ax, numbers, digits)


def _as_array(values: Any, axes: int) -> np.ndarray:
    if hasattr(values, "detach"):
        values = values.detach().cpu().double().numpy()
    array = np.asarray(values, dtype=float)
    if array.ndim != axes or np.isnan(array).any():
        raise ValueError(f"a picture of numbers needs {axes} axes, no NaN: got {array}")
    return array


def _shades(numbers: np.ndarray, color: str, limit: float | None) -> np.ndarray:
    finite = np.where(np.isfinite(numbers), numbers, 0)
    shades = np.empty((*numbers.shape, 4))
    shades[..., :3] = matplotlib.colors.to_rgb(PALETTE.get(color, color))
    shades[finite < 0, :3] = matplotlib.colors.to_rgb(PALETTE["highlight"])
    full = limit or np.abs(finite).max() or 1
    shades[..., 3] = 0.5 * np.minimum(np.abs(finite) / full, 1)
    return shades


def _cell_width(ax: Any, shape: tuple) -> float:
    """Return the width of a cell in points, as far as the axes are laid out."""
    box = ax.get_window_extent()
    return min(box.width / shape[1], box.height / shape[0]) * 72 / ax.figure.dpi


def _set_up_grid(
    ax: Any, shape: tuple, rows: Sequence | None, columns: Sequence | None
) -> None:
    height, width = shape
    cell = _cell_width(ax, shape)
    ax.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5), aspect="equal")
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
    ax.xaxis.set_label_position("top")
    above, beside = (list(labels or []) for labels in (columns, rows))
    longest = max((len(str(label)) for label in above), default=0)
    each = max(1, int(np.ceil((12 if longest > 3 else 6 * longest + 4) / cell)))
    ax.set_xticks(range(0, width if above else 0, each), above[::each])
    if 6 * longest > cell * each:
        ax.tick_params(axis="x", labelrotation=40)
        for label in ax.get_xticklabels():
            label.set(ha="left", va="bottom", rotation_mode="anchor")
    each = max(1, int(np.ceil(12 / cell)))
    ax.set_yticks(range(0, height if beside else 0, each), beside[::each])


def _print_numbers(ax: Any, numbers: np.ndarray, digits: int) -> None:
    texts = [_number(value, digits) for value in numbers.flat]
    ax.figure.draw_without_rendering()
    longest = max(map(len, texts))
    size = min(9.5, _cell_width(ax, numbers.shape) / (0.72 * longest))
    if size < 6:
        return
    for (row, column), text in zip(np.ndindex(numbers.shape), texts, strict=True):
        ax.text(column, row, text, ha="center", va="center_baseline", size=size)


def _number(value: float, digits: int) -> str:
    text = f"{value:z.{digits}f}"  # z: no sign where it rounds to zero
    return text.replace("-", "−").replace("inf", "∞")


def bars(
    ax: Any,
    labels: Sequence,
    values: Any,
    color: str = "value",
    digits: int = 2,
    limit: float | None = None,
) -> None:
    """Draw one horizontal bar for each label, with its number at the end.

    `values` (labels,) are not negative. `color` is a name in PALETTE or any color of
    matplotlib; `limit` is the number whose bar fills the axes (default: the largest).
    Raises ValueError if a value is NaN or the labels do not fit.

    Book: a1_figures.html#bars
    """
    numbers = _as_array(values, 1)
    ax.barh(range(len(numbers)), numbers, 0.7, color=PALETTE.get(color, color))
    for row, number in enumerate(numbers):
        text, place = _number(number, digits), {"textcoords": "offset points"}
        ax.annotate(text, (number, row), (4, 0), va="center_baseline", **place)
    end = 1.2 * (limit or numbers.max())
    ax.set(xlim=(0, end), ylim=(len(numbers) - 0.5, -0.5), xticks=[])
    ax.set_yticks(range(len(numbers)), labels)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)


def _described(content: str, alt: str, role: str) -> Picture:
    opened = f'{_UNTRUSTED}<div role="{role}" aria-label="{html.escape(alt)}">'
    return Picture(f"{opened}{content}</div>", alt)


_TOKEN_STYLE = """<style>
.glass-tokens{font:.95em/1.9 ui-monospace,Menlo,Consolas,monospace;max-width:34rem;
margin:.5rem auto}
.glass-tokens i{font-style:normal;white-space:pre-wrap;padding:.15em .1em;margin:0 1px;
border-radius:3px;box-decoration-break:clone;background:#e83e8c26}
.glass-tokens i:nth-of-type(even){background:#e83e8c52}
.glass-tokens i.glass-new{outline:2px solid #d2142d}
.glass-guesses{display:grid;grid-template-columns:5.5em 1fr 8.6em;
gap:2px 8px;max-width:34rem;margin:.5rem auto;font-size:.9em;line-height:1.35}
.glass-guesses code{white-space:pre;text-align:right;background:none;color:inherit;
padding:0;font-size:1em}
.glass-guesses b{background:#8f8f8f;min-width:1px;border-radius:2px;align-self:stretch}
.glass-guesses .glass-new{background:#d2142d}
.glass-guesses span{font-variant-numeric:tabular-nums;white-space:nowrap}
</style>"""


def _shown(piece: str) -> str:
    return html.escape(piece.replace("\n", "\u21b5"))


def token_boxes(
    pieces: Sequence[str], new: bool = False, colors: Sequence[str] | None = None
) -> str:
    """The HTML of a text whose tokens stand in boxes; `new` marks the last one.

    `colors` are names in PALETTE, one for each token.

    Book: a1_figures.html#pictures-made-of-text
    """
    boxes = []
    for place, piece in enumerate(pieces):
        marked = ' class="glass-new"' if new and place == len(pieces) - 1 else ""
        if colors:
            marked += f' style="background:{PALETTE[colors[place]]}40"'
        line_breaks = "<br>" * piece.count("\n")
        boxes.append(f"<i{marked}>{_shown(piece)}</i>{line_breaks}")
    return f'{_TOKEN_STYLE}<div class="glass-tokens">{"".join(boxes)}</div>'


def guess_bars(
    candidates: Sequence[tuple[str, float]],
    chosen: tuple[str, float] | None = None,
    limit: float = 1,
) -> str:
    """The HTML of a bar for each (token, probability); `chosen` is marked.

    `limit` is the probability that gets a full bar.

    Book: a1_figures.html#pictures-made-of-text
    """
    rows, listed = [], [tuple(candidate) for candidate in candidates]
    if chosen and chosen not in listed:
        listed.append(chosen)
    for piece, p in listed:
        is_it = (piece, p) == chosen
        marked = ' class="glass-new"' if is_it else ""
        number = f"{p:.1%}" + (" \u25c4 chosen" if is_it else "")
        bar = f'<b{marked} style="width:{100 * p / limit:.1f}%"></b>'
        rows.append(f"<code>{_shown(piece)}</code>{bar}<span>{number}</span>")
    return f'{_TOKEN_STYLE}<div class="glass-guesses">{"".join(rows)}</div>'


_MOVE = """const box = this.closest('.glass-moving');
const frames = box.querySelectorAll('.glass-frame');
frames.forEach((frame, number) => { frame.hidden = number != this.value; });
const value = frames[this.value].dataset.value;
box.querySelector('output').textContent = value;
this.setAttribute('aria-valuetext', value);"""


_SPEAK = """const box = this.closest('.glass-moving');
const picture = box.querySelector('.glass-frame:not([hidden]) [role=img]');
const words = picture.getAttribute('aria-label');
box.querySelector('.glass-spoken').textContent = words;"""


_STILL_STYLE = """@media print,(scripting:none){
.glass-moving label,.glass-moving button,.glass-moving .glass-frame{display:none}
.glass-moving .glass-start,.glass-moving .glass-still{display:block!important}
.glass-still{text-align:center}}"""


_PLAY = """const slider = this.closest('.glass-moving').querySelector('input');
const stop = () => { clearInterval(this.timer); this.timer = null;
this.textContent = 'Play'; };
if (this.timer) { stop(); return; }
if (slider.value == slider.max) slider.value = -1;
const next = () => { slider.value = +slider.value + 1;
slider.dispatchEvent(new Event('input'));
if (slider.value == slider.max) stop(); };
this.textContent = 'Pause';
this.timer = setInterval(next, SECONDS * 1000);"""


_MOVING_STYLE = """<style>
.glass-moving label{display:flex;flex-wrap:wrap;gap:.25rem .75rem;align-items:center;
justify-content:center;min-height:2.75rem}
.glass-moving input{width:16rem;max-width:100%;height:2rem;cursor:pointer}
.glass-moving input:focus-visible{outline:2px solid currentColor;outline-offset:2px}
.glass-moving output{min-width:3em;font-variant-numeric:tabular-nums}
.glass-moving [hidden],.glass-still{display:none}
.glass-spoken{position:absolute;width:1px;height:1px;overflow:hidden;
clip-path:inset(50%)}
.glass-moving button{display:block;margin:0 auto;padding:.3rem 1rem;cursor:pointer;
color:inherit;background:none;border:1px solid;border-radius:4px;font:inherit}
"""


def _name(value: Any) -> str:
    return html.escape(f"{value:g}" if isinstance(value, float) else str(value))


def _control(label: str, value: Any, start: int, last: int, play: float) -> str:
    label, value = _name(label), _name(value)
    press = html.escape(_PLAY.replace("SECONDS", f"{play:g}"))
    button = f'<button type="button" onclick="{press}">Play</button>' if play else ""
    return (
        f'<label><span>{label}</span><input type="range" min="0" max="{last}" step="1"'
        ' data-lm-suppress-shortcuts="true"'
        f' value="{start}" autocomplete="off" aria-label="{label}"'
        f' aria-valuetext="{value}" oninput="{html.escape(_MOVE)}"'
        f' onchange="{html.escape(_SPEAK)}"><output aria-live="off">{value}</output>'
        f'</label>{button}<p class="glass-still">{label}: {value}</p>'
        '<span class="glass-spoken" aria-live="polite"></span>'
    )


def slider(
    draw: Callable[[Any], Any],
    values: Sequence,
    label: str,
    alt: Callable[[Any], str],
    start: int = 0,
    play: float = 0,
) -> Picture:
    """Draw a figure for each value ahead, and show them behind a slider.

    `draw(value)` returns a figure or HTML that `alt(value)` is to describe, `label`
    names the slider, and `start` is the index of the frame shown first, and in print.
    With `play`, a button moves the slider every so many seconds.

    Book: a1_figures.html#a-figure-that-moves
    """
    values, frames, body = list(values), [], ""
    for number, value in enumerate(values):
        picture = show(draw(value), alt(value), salt=f"{label} {number}")
        kind, hidden = (" glass-start", "") if number == start else ("", " hidden")
        given = f'data-value="{_name(value)}"{hidden}'
        body += f'<div class="glass-frame{kind}" {given}>{picture.content}</div>'
        frames.append(picture)
    for once in (_TOKEN_STYLE, _UNTRUSTED):  # is enough for all frames
        if once in body:
            body = once + body.replace(once, "")
    group = f'<div class="glass-moving" role="group" aria-label="{_name(label)}">'
    control = _control(label, values[start], start, len(frames) - 1, play)
    page = f"{_MOVING_STYLE}{_STILL_STYLE}\n</style>{group}{body}{control}</div>"
    told = f"{frames[start].alt} ({len(frames)} frames by {label})"
    return Picture(page, told, tuple(frames))


@dataclass(frozen=True, repr=False)
class Live(Picture):
    """A picture with controls that draw it again where a kernel runs; `live` makes it.

    `panel` is the widget that shows in its place.

    Book: a1_figures.html#where-a-kernel-runs
    """

    panel: Any = None

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict:
        view = {"version_major": 2, "version_minor": 0, "model_id": self.panel.model_id}
        return {"application/vnd.jupyter.widget-view+json": view}


def live(
    draw: Callable[..., Any],
    alt: Callable[..., str],
    still: Picture | None = None,
    **controls: Any,
) -> Picture:
    """Draw a figure that has controls where a kernel runs, and stands still elsewhere.

    `draw` returns a figure or HTML, and `alt`, with the same arguments, says in words
    what it shows. Each argument has a default, which the still shows, and gets a
    control: a text a line to type, and a number the slider that `controls` describes
    for it, (low, high) or (low, high, step). Without ipywidgets the still is all.
    Another `still` may be given, such as a moving figure.

    Book: a1_figures.html#where-a-kernel-runs
    """

    def shown(**values: Any) -> Picture:
        return show(draw(**values), alt(**values), salt="live")

    start = {name: p.default for name, p in inspect.signature(draw).parameters.items()}
    drawn = shown(**start)
    still = still or drawn
    if importlib.util.find_spec("ipywidgets") is None:
        return still
    import ipywidgets

    picture = ipywidgets.HTML(drawn._repr_html_())
    inputs = {}

    def redraw(_change: Any) -> None:
        try:
            drawn = shown(**{name: control.value for name, control in inputs.items()})
            picture.value = drawn._repr_html_()
        except Exception as error:
            picture.value = html.escape(f"{type(error).__name__}: {error}")

    make = ipywidgets.interactive.widget_from_abbrev
    for name, default in start.items():
        control = inputs[name] = make(controls.get(name, default), default)
        control.description = name
        control.style.description_width = "initial"
        control.layout = {"width": "30em", "max_width": "100%"}
        control.observe(redraw, "value")
    panel = ipywidgets.VBox([*inputs.values(), picture])
    return Live(still.content, still.alt, still.frames, panel)


def live_model(
    show: str, prompt: str, temperature: float = 0.8, still: Picture | None = None
) -> Picture:
    """The shipped model, alive in the published page; elsewhere a still stands for it.

    show: the panels, such as "tokens next" (appendix A4 has them all). prompt: the text
    at the start. still: a picture; by default the prompt and its likeliest next tokens.

    Book: a1_figures.html#a-model-that-runs-in-the-page
    """
    still = still or _next_tokens(prompt, temperature)
    given = f'prompt="{html.escape(prompt)}" temperature="{temperature:g}"'
    inside = still.content.replace(_UNTRUSTED, "")
    element = f'<glass-gpt show="{show}" {given}>{inside}</glass-gpt>'
    return _described(element, still.alt, role="group")


def _next_tokens(prompt: str, temperature: float) -> Picture:
    import torch

    from glassgpt.checkpoints import load

    model, tokenizer = load("shakespeare")
    ids = tokenizer.encode(prompt)
    with torch.no_grad():
        p = (model(torch.tensor([ids]))[0, -1] / temperature).softmax(-1)
    best = [(tokenizer.decode([n]), p[n].item()) for n in p.topk(8).indices]
    boxes = token_boxes([tokenizer.decode([n]) for n in ids])
    told = ", ".join(f"{text!r} {share:.0%}" for text, share in best)
    alt = f"The tokens of {prompt!r}. The likeliest next ones: {told}."
    return show(boxes + guess_bars(best, limit=best[0][1]), alt)


_BAND = "#8f8f8f"  # the gray of healthy runs
_PEN = {"color": [PALETTE[name] for name in ("query", "key", "value")]}
_PEN |= {"ls": ["-", "--", ":"]}  # so that nobody has to tell the colors apart


def _curves(
    ax: Any, title: str, x: Sequence, curves: dict[str, Sequence], band: Sequence
) -> None:
    """Draw curves over the range of healthy ones; `band` is (points, 2)."""
    low, high = np.array(band, float).T
    ax.set_prop_cycle(**_PEN)
    ax.fill_between(x, low, high, color=_BAND, alpha=0.35, lw=0)
    for label, values in curves.items():
        ax.plot(x, np.array(values, float), label=label, lw=1.3)
    ax.set_title(title, fontsize=10)
    ax.tick_params(labelsize=8)
    ax.locator_params(nbins=4)
    ax.legend(frameon=False, fontsize=8)


def patient_chart(
    chart: dict[str, Any],
    band: dict[str, Any],
    lines: dict[str, float],
    name: str = "one patient",
) -> Picture:
    """The chart of a patient of the clinic, as a still: six panels.

    chart: its recorded curves, as `glassgpt.clinic.chart` returns them. band: the
    ranges of healthy runs, (low, high) for each point. lines: losses to compare with.

    Book: a1_figures.html#the-chart
    """
    fig, axes = figure(9, 5.6, 2, 3)
    loss, norm, sure, place, attention, text = axes.flat
    steps, judged = chart["steps"], chart["held out steps"]
    both = {"training": chart["training"]}
    _curves(loss, "loss", steps, both, band["training"])
    loss.plot(judged, np.array(chart["held out"], float), label="held out", lw=1.3)
    loss.legend(frameon=False, fontsize=8)
    loss.set(ylim=(0, _highest(chart["held out"])), xlabel="step", ylabel="nats")
    for label, height in lines.items():
        loss.axhline(height, color=PALETTE["muted"], lw=0.6, ls=":")
        loss.text(steps[-1], height, label, fontsize=7, ha="right", va="bottom")
    norms = {name: chart["norm"][name] for name in ("all", "blocks", "table")}
    _curves(norm, "norm of the gradient", steps, norms, band["norm"])
    norm.set(yscale="log", ylim=_decades(chart["norm"]), xlabel="step")
    norm.minorticks_off()
    both = {"entropy": chart["entropy"], "spread of logits": chart["spread"]}
    _curves(sure, "entropy and spread", steps, both, band["entropy"])
    sure.set(ylim=(0, None), xlabel="step")
    positions = range(1, len(chart["positions"]) + 1)
    held_out = {"held out": chart["positions"]}
    _curves(place, "loss by position", positions, held_out, band["positions"])
    place.set(ylim=(0, _highest(chart["positions"])), xlabel="position", ylabel="nats")
    heatmap(attention, chart["map"], limit=60)
    attention.set_title("attention, first block", fontsize=10)
    attention.set(xlabel="keys", ylabel="queries")
    attention.spines[:].set(visible=True, color=_BAND)
    _write(text, chart["text"])
    return show(fig, _told_chart(chart, name), salt=name)


def _highest(losses: Sequence) -> float:
    """The top of a panel of losses: the loss of guessing, or a little over them."""
    return max(4.6, 1.05 * max(value for value in losses if value is not None))


def _decades(norms: dict[str, Sequence]) -> tuple[float, float]:
    """The range of a panel of norms: from 0.1 to 10, or wider."""
    known = [norm for curve in norms.values() for norm in curve if norm]
    return min([0.1, *known]), max([10, *known])


def _write(ax: Any, text: str) -> None:
    ax.set_title("text", fontsize=10)
    ax.axis("off")
    lines = [
        part[start : start + 28]
        for part in text.split("\n")
        for start in range(0, max(len(part), 1), 28)
    ]
    for number, line in enumerate(lines[:11]):
        height = 0.95 - 0.09 * number
        ax.text(0, height, line, fontsize=8, parse_math=False, family="monospace")


def _ends(name: str, values: Sequence) -> str:
    """The first and the last number of a curve, in words."""
    known = [value for value in values if value is not None]
    return f"{name} from {known[0]:.2f} to {known[-1]:.2f}" if known else f"no {name}"


def _told_chart(chart: dict[str, Any], name: str) -> str:
    told = [
        _ends("training loss", chart["training"]),
        _ends("held-out loss", chart["held out"]),
        _ends("norm of the gradient", chart["norm"]["all"]),
        _ends("entropy of predictions", chart["entropy"]),
        _ends("loss by position", chart["positions"]),
    ]
    return f"The chart of {name}: {'; '.join(told)}; an attention map; a text."


def fnv1a(text: str) -> str:
    """The hash FNV-1a of a text, 32 bits as eight hexadecimal digits.

    Book: a1_figures.html#the-answer
    """
    value = 0x811C9DC5
    for byte in text.encode():
        value = (value ^ byte) * 0x01000193 % 2**32
    return f"{value:08x}"


_WARD_STYLE = """<style>
.glass-ward{font:.92rem/1.45 system-ui,sans-serif;max-width:52rem;margin:.5rem auto}
.glass-ward p{margin:.35rem 0}
.glass-ward .title{font-weight:600}
.glass-ward .paid{font-weight:400;margin-left:.6rem}
.glass-ward .field{display:flex;flex-wrap:wrap;gap:.4rem .6rem;align-items:center}
.glass-ward select,.glass-ward button{font:inherit;color:inherit;background:none;
border:1px solid #8f8f8f;border-radius:4px;padding:.3rem .6rem;min-height:2.2rem;
max-width:100%}
.glass-ward option,.glass-ward optgroup{color:#1f2933;background:#fff}
.glass-ward button{cursor:pointer}
.glass-ward button:hover{border-color:currentColor}
.glass-ward :is(select,button):focus-visible{outline:2px solid currentColor;
outline-offset:2px}
.glass-ward .chart{display:grid;grid-template-columns:repeat(3,minmax(0,1fr));
gap:.6rem 12px;min-height:24rem}
.glass-ward .chart .title,.glass-ward .keys{margin:0;font-size:.85rem;line-height:1.3}
.glass-ward .keys{min-height:1.3em;font-size:.76rem}
.glass-ward .keys span::before{content:"";display:inline-block;width:1.3em;
vertical-align:.25em;margin-right:.3em;border-top:2px solid #2a66f0}
.glass-ward .keys span{margin-right:.8em;white-space:nowrap}
.glass-ward .keys .two::before{border-top:2px dashed #e07512}
.glass-ward .keys .three::before{border-top:2px dotted #00a590}
.glass-ward .chart svg{display:block;max-width:100%;fill:currentColor;font-size:11px}
.glass-ward .curve{fill:none;stroke:#2a66f0;stroke-width:1.6;stroke-linejoin:round}
.glass-ward .curve.two{stroke:#e07512;stroke-dasharray:5 2}
.glass-ward .curve.three{stroke:#00a590;stroke-dasharray:1.5 1.5}
.glass-ward .band{fill:#8f8f8f;fill-opacity:.35}
.glass-ward .axis,.glass-ward .line{fill:none;stroke:#8f8f8f;stroke-width:.8}
.glass-ward .line{stroke-dasharray:1 3}
.glass-ward canvas{width:150px;max-width:100%;aspect-ratio:1;border:1px solid #8f8f8f;
image-rendering:pixelated}
.glass-ward .words{white-space:pre-wrap;overflow-wrap:anywhere;
max-height:11rem;overflow-y:auto;font:.78rem/1.35 ui-monospace,Menlo,Consolas,monospace}
.glass-ward ul{list-style:none;margin:0;padding:0;display:grid;gap:.35rem 12px;
grid-template-columns:repeat(auto-fill,minmax(min(100%,21rem),1fr))}
.glass-ward li{margin:0}
.glass-ward li button{display:flex;justify-content:space-between;gap:.6rem;width:100%;
text-align:left;align-items:center}
.glass-ward small{white-space:nowrap;font-size:.85em}
.glass-ward li p{margin:.15rem .6rem .3rem;border-left:3px solid #8f8f8f;
padding-left:.5rem}
.glass-ward .said:not(:empty){border-left:3px solid #8f8f8f;padding:.3rem .7rem}
.glass-ward .said[data-state=right]{border-color:#00a590}
.glass-ward .said[data-state=wrong]{border-color:#d2142d}
.glass-ward [hidden],.glass-ward .paper{display:none}
.glass-ward.alive .still{display:none}
.glass-ward .glass-spoken{position:absolute;width:1px;height:1px;overflow:hidden;
clip-path:inset(50%)}
.glass-ward table{border-collapse:collapse;font-size:.85em;margin:.6rem 0}
.glass-ward :is(th,td){padding:.1rem .45rem;text-align:right;
border-bottom:1px solid #8f8f8f66}
.glass-ward :is(th,td):first-child{text-align:left}
@media(max-width:600px){.glass-ward .chart{grid-template-columns:1fr 1fr}
.glass-ward .chart>:is(:first-child,:last-child){grid-column:1/-1}}
@media print{.glass-ward .room,.glass-ward details{display:none}
.glass-ward .still,.glass-ward .paper{display:block!important}
.glass-ward table.paper{display:table!important}}
</style>"""


def _shorter(value: Any) -> Any:
    """The numbers of a chart with three digits; lists and dicts of them, too."""
    if isinstance(value, dict):
        return {name: _shorter(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_shorter(part) for part in value]
    return float(f"{value:.3g}") if isinstance(value, float) else value


def _rounded(value: Any, digits: int) -> Any:
    """A number or a range as it is printed; None stays."""
    if isinstance(value, list):
        return [_rounded(part, digits) for part in value]
    return value if value is None else round(value, digits) + 0.0  # no -0.0


def _ward_data(record: dict[str, Any]) -> dict[str, Any]:
    digits = {each["name"]: each["digits"] for each in record["examinations"]}

    def in_order(found: dict[str, Any]) -> list[Any]:
        return [_rounded(found.get(name), count) for name, count in digits.items()]

    examinations = [
        each | {"healthy": _rounded(each["healthy"], each["digits"])}
        for each in record["examinations"]
    ]
    expected = {
        fault["name"]: in_order(record["expected"].get(fault["name"], {}))
        for fault in record["faults"]
    }
    patients = []
    for each in record["patients"]:
        chart = _shorter(each["chart"])
        weights = np.array(each["chart"]["map"]).flatten()
        chart["map"] = "".join(f"{weight:02d}" for weight in weights)
        patient = {name: each[name] for name in ("number", "answer", "price")}
        patients.append(
            patient | {"chart": chart, "results": in_order(each["results"])}
        )
    return {
        "lines": _shorter(record["lines"]),
        "band": _shorter(record["band"]),
        "examinations": examinations,
        "faults": record["faults"],
        "expected": expected,
        "patients": patients,
    }


def _plain(value: float | None, digits: int) -> str:
    return "\u2013" if value is None else _number(value, digits)


def _range(ends: Sequence, digits: int) -> str:
    low, high = (_plain(end, digits) for end in ends)
    if ends[0] is None:
        return f"at most {high}"
    if ends[1] is None:
        return f"at least {low}"
    return low if low == high else f"{low} to {high}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        filled = "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)
        return f"<tr>{filled}</tr>"

    body = "".join(row(cells, "td") for cells in rows)
    return f"<table{kind}><thead>{row(head, 'th')}</thead><tbody>{body}</tbody></table>"


def _ends_table(patients: Sequence[dict]) -> str:
    rows = []
    for each in patients:
        chart = each["chart"]
        curves = (chart["training"], chart["held out"], chart["positions"])
        ends = [_plain(curve[-1], 2) for curve in curves]
        rows.append([str(each["number"]), *ends, str(each["price"])])
    head = ["patient", "training", "held out", "last position", "price, in order"]
    return _table(head, rows)


def _is_healthy(patient: dict[str, Any]) -> bool:
    return fnv1a(f"{patient['number']}:healthy") == patient["answer"]


def _printed(record: dict[str, Any], numbers: Sequence[int]) -> list[dict[str, Any]]:
    """The healthy patient with the least held-out loss, and three others."""
    patients = record["patients"]
    healthy = [each for each in patients if _is_healthy(each)]
    healthy.sort(key=lambda each: each["chart"]["held out"][-1])
    others = [each for each in patients if not _is_healthy(each)][:3]
    if numbers:
        others = [each for each in patients if each["number"] in numbers]
    return healthy[:1] + others


def _ward_still(record: dict, data: dict, numbers: Sequence[int]) -> str:
    charts, names, printed = "", [], _printed(record, numbers)
    for each in printed:
        healthy = _is_healthy(each)
        name = "a healthy patient" if healthy else f"patient {each['number']}"
        names.append(name)
        picture = patient_chart(each["chart"], record["band"], record["lines"], name)
        charts += f'<p class="title">{name.capitalize()}</p>{picture.content}'
    rows, folds = [], ""
    shown = [each["number"] for each in printed]
    for place, each in enumerate(data["examinations"]):
        title, price, digits = each["title"], str(each["price"]), each["digits"]
        number = {
            patient["number"]: _plain(patient["results"][place], digits)
            for patient in data["patients"]
        }
        healthy = _range(each["healthy"], digits)
        rows.append([title, price, healthy, *(number[n] for n in shown)])
        listed = ", ".join(f"{n}: <b>{found}</b>" for n, found in number.items())
        folds += (
            f"<details><summary>{html.escape(title)} Price {price}</summary>"
            f"<p>Healthy: {healthy}. Patient {listed}.</p></details>"
        )
    table = _table(["examination", "price", "healthy", *names], rows, ' class="paper"')
    titles = ", ".join(html.escape(fault["title"]) for fault in data["faults"])
    folds += f"<details><summary>The names</summary><p>{titles}.</p></details>"
    return (
        charts.replace(_UNTRUSTED, "") + _ends_table(data["patients"]) + table + folds
    )


def ward(record: dict[str, Any], printed: Sequence[int] = ()) -> Picture:
    """The ward of the clinic: charts, examinations with prices, and names to choose.

    record: as in glassgpt/records/clinic.json. printed: the numbers of the patients
    that stand on paper beside a healthy one; by default the first three with a fault.

    Book: a1_figures.html#the-ward
    """
    data = _ward_data(record)
    stored = json.dumps(data, separators=(",", ":"), ensure_ascii=False)
    stored = stored.replace("<", "\\u003c")
    script = (files("glassgpt") / "page" / "ward.js").read_text("utf-8")
    start = "document.querySelectorAll('.glass-ward:not(.alive)').forEach(startWard);"
    count = len(data["patients"])
    alt = (
        f"A ward of {count} patients with {len(data['examinations'])} examinations: "
        "choose a patient, look at its chart, open examinations, and name the fault."
    )
    content = (
        f'{_WARD_STYLE}<div class="glass-ward">'
        f'<script type="application/json">{stored}</script>'
        f'<div class="still">{_ward_still(record, data, printed)}</div></div>'
        f"<script>(() => {{\n{script}{start}\n}})();</script>"
    )
    return _described(content, alt, role="group")


# The page and the label of every chapter that the map shows.
_STOPS = {
    "01_introduction": "the whole",
    "02_tokens": "tokens",
    "03_embeddings": "embeddings",
    "04_positions": "positions",
    "05_softmax": "softmax",
    "06_attention": "attention",
    "07_multi_head_attention": "heads",
    "08_mlp": "MLP",
    "09_block": "block",
    "10_gpt": "GPT",
    "11_data": "data",
    "12_training": "training",
    "13_generation": "generation",
    "14_after_gpt2": "after GPT-2",
    "15_full_gpt": "on a GPU",
    "16_scaling_laws": "scaling",
    "17_chat": "chat",
    "18_real_models": "real models",
    "19_looking_inside": "inside",
    "20_evaluation": "scores",
    "21_reasoning": "reasoning",
    "22_clinic": "clinic",
    "23_runs_that_survive": "runs",
    "24_speed": "speed",
    "25_many_machines": "machines",
    "a3_command_line": "commands",
    "a4_publishing": "publishing",
}


_MAP_STYLE = """<style>
.glass-map{font:11.5px/1.25 system-ui,sans-serif}
.glass-map div{display:flex;flex-wrap:wrap;align-items:center;justify-content:center;
gap:14px 1px;padding-top:10px}
.glass-map div+div{padding-top:14px}
.glass-map span.glass-block{display:inline-flex;flex-wrap:wrap;align-items:center;
justify-content:center;gap:14px 2px;border:1px dashed;border-radius:6px;
padding:13px 3px 3px}
.glass-map .glass-stop{position:relative;text-align:center;border:1px solid #8f8f8f;
border-radius:4px;padding:2px 3px;color:inherit;text-decoration:none;
white-space:nowrap;min-width:24px}
.glass-map a.glass-stop:hover{text-decoration:underline}
.glass-map .glass-stop b{display:block}
.glass-map .glass-here{border:2px solid #d2142d;background:#d2142d26}
.glass-map .glass-here small{position:absolute;left:50%;bottom:100%;font-size:10px;
transform:translateX(-50%);line-height:13px}
</style>"""


def book_map(here: int | str) -> Picture:
    """The way of a text through the model, chapter by chapter; `here` is marked.

    here: the number of a chapter, or the name of an appendix, such as "A3".

    Book: a1_figures.html#the-map-of-the-book
    """
    stop = {}
    for page, label in _STOPS.items():
        name = page[:2].lstrip("0").upper()
        text = f"<b>{name}</b>{label}"
        stop[name] = f'<a class="glass-stop" href="{page}.ipynb">{text}</a>'
        if name == str(here):
            kind = "appendix" if name[0] == "A" else "chapter"
            place = f"{kind} {name}, {label}"
            marked = 'class="glass-stop glass-here" aria-current="page"'
            stop[name] = f"<span {marked}>{text}<small>you are here</small></span>"
    arrow = '<span aria-hidden="true">\u2192</span>'
    attention = stop["5"] + stop["6"] + stop["7"]
    inside = f"{attention}{arrow}{stop['8']}{stop['9']}"
    block = f'<span class="glass-block">{inside}<span>\u00d7 L</span></span>'
    embedded = f"{stop['3']}+{stop['4']}"
    way = ["text", stop["2"], embedded, block, stop["10"], stop["13"]]
    back = "gradients flow back (8) <span>|</span>"
    learning = f"{stop['11']}{arrow}{stop['12']}{arrow}{back}"
    rest = "".join(list(stop.values())[13:])  # chapter 14 and what follows
    below = f"{stop['1']}<span>|</span>learning: {learning}{rest}"
    content = f"<div>{arrow.join(way)}</div><div>{below}</div>"
    alt = (
        "Map of the book: text becomes tokens, embeddings with positions, passes "
        "through the blocks to a probability for every token, and a choice. "
        f"You are in {place}."
    )
    content = f'{_MAP_STYLE}<div class="glass-map">{content}</div>'
    return _described(content, alt, role="navigation")
