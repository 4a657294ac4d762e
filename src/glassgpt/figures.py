# Written by tools/tangle.py from book/a1_figures.ipynb: change it there.
"""Figures: pictures that follow light and dark, and that move without a kernel."""

import hashlib
import html
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle


# Color-blind readers can tell the first five apart, and the five axis letters.
PALETTE = {
    "query": "#3c78f0",
    "key": "#d27800",
    "value": "#00a082",
    "context": "#b45af0",
    "highlight": "#d21e3c",
    "B": "#969600",
    "T": "#e16987",
    "C": "#0096e1",
    "H": "#873cff",
    "V": "#1e783c",
    "muted": "#808080",
}


_INCHES = 5 / 6  # of matplotlib, for one sixth of the text column
_STYLE = {
    "axes.facecolor": "none",
    "axes.grid.axis": "y",
    "axes.linewidth": 0.6,
    "axes.prop_cycle": matplotlib.cycler(color=list(PALETTE.values())),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.facecolor": "none",
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
}


def figure(
    width: float = 6, height: float = 3, rows: int = 1, columns: int = 1
) -> tuple[Figure, Any]:
    """Make an empty figure in the book's style.

    `width` and `height` are in sixths of the text column. Returns the figure and its axes:
    one, or an array of them as from `Figure.subplots`. What is drawn in black takes the color
    of the page's text. Raises ValueError for sizes that are not positive.

    Book: a1_figures.html#a-figure
    """
    if min(width, height, rows, columns) <= 0:
        raise ValueError(
            f"a figure of size {width} x {height} with {rows} x {columns} axes: "
            "all four must be positive"
        )
    with matplotlib.rc_context(_STYLE):
        fig = Figure((width * _INCHES, height * _INCHES), layout="constrained")
        return fig, fig.subplots(rows, columns)


@dataclass(frozen=True, repr=False)
class Picture:
    """A drawing with alternative text, as the last line of a cell shows it.

    `drawing` is the inside of an SVG, `width` and `height` are its size in points, and `alt`
    says in words what it shows.

    Book: a1_figures.html#from-figure-to-page
    """

    drawing: str
    width: float
    height: float
    alt: str

    def __repr__(self) -> str:
        return self.alt

    def _repr_html_(self) -> str:
        size = f"min-width:{0.9 * self.width:.0f}px;max-width:{1.4 * self.width:.0f}px"
        return (
            '<div style="overflow-x:auto;break-inside:avoid">'
            '<svg xmlns="http://www.w3.org/2000/svg" role="img"'
            f' aria-label="{html.escape(self.alt)}"'
            f' viewBox="0 0 {self.width:g} {self.height:g}"'
            f' style="display:block;margin:0 auto;width:100%;height:auto;{size};'
            'fill:currentColor;stroke-linejoin:round;background:none">'
            f"{self.drawing}</svg></div>"
        )


def _font(match: re.Match) -> str:
    generic = re.search(r"(sans-serif|serif|monospace)$", match[0])
    name = generic[1] if generic else "sans-serif"
    return "system-ui,sans-serif" if name == "sans-serif" else name


def _tidy_tag(match: re.Match) -> str:
    tag = re.sub(r"\s+", " ", match[0]).replace(' "', '"').replace("xlink:href", "href")
    if tag.startswith("<image"):  # its matrix needs all its digits
        return tag.replace("base64, ", "base64,")
    tag = re.sub(
        r"-?\d+\.\d+", lambda m: f"{float(m[0]):.2f}".rstrip("0").rstrip("."), tag
    )
    tag = re.sub(r' transform="rotate\(-?0 [^"]*"', "", tag)
    return re.sub(r"'[^;\"]*", _font, tag.replace("#000000", "currentColor"))


def _tidy(svg: str, salt: str) -> str:
    svg = re.sub(r"(?s)^.*?<svg[^>]*>|</svg>\s*$", "", svg)
    svg = re.sub(r"(?s)<!--.*?-->|<metadata>.*?</metadata>|<style.*?</style>", "", svg)
    svg = re.sub(r">\s+<", "><", re.sub(r"<[^>]+>", _tidy_tag, svg.strip()))
    svg = re.sub(r'<path [^>]*style="fill: none"/>|<defs></defs>', "", svg)
    used = set(re.findall(r'(?:href="|url\()#([\w.-]+)', svg))
    for name in re.findall(r' id="([^"]*)"', svg):
        if name not in used:
            svg = svg.replace(f' id="{name}"', "")
    while "<g></g>" in svg:
        svg = svg.replace("<g></g>", "")
    prefix = "g" + hashlib.sha256((salt + svg).encode()).hexdigest()[:8]
    for number, name in enumerate(sorted(used)):
        svg = re.sub(
            rf'(id="|#){re.escape(name)}(?=["\)])', rf"\g<1>{prefix}-{number}", svg
        )
    return svg


def show(fig: Figure, alt: str) -> Picture:
    """Turn a figure into a picture for the last line of a cell.

    `alt` says in words what the picture shows. Raises ValueError when it is empty.

    Book: a1_figures.html#from-figure-to-page
    """
    return _picture(fig, alt, salt="")


def _picture(fig: Figure, alt: str, salt: str) -> Picture:
    if not isinstance(alt, str) or not alt.strip():
        raise ValueError(
            "a picture needs alternative text: say in a sentence or two what it shows"
        )
    file = io.StringIO()
    # With a fixed salt and no date, the same figure gives the same text.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "glassgpt"}):
        fig.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    width, height = 72 * fig.get_size_inches()
    return Picture(_tidy(file.getvalue(), salt), round(width, 2), round(height, 2), alt)


_STRONGEST = 0.5  # opacity of the largest number: text on top stays readable
_MOST_CELLS = 256  # drawn one by one, with a number in each if it fits
_SMALLEST_TEXT = 6.5  # points


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

    `matrix` (rows, columns) is a tensor or what numpy makes an array of; bool and infinite
    entries are welcome. `rows` and `columns` are the labels. `color` is a name in PALETTE or
    any color of matplotlib, `limit` the number that gets the full color (default: the largest
    magnitude). Raises ValueError if the matrix has not two axes, holds NaN, or if the labels
    do not fit it.

    Book: a1_figures.html#the-picture-of-a-matrix
    """
    numbers = _as_matrix(matrix, rows, columns)
    finite = np.where(np.isfinite(numbers), np.abs(numbers), 0)
    limit = limit or finite.max() or 1
    strengths = _STRONGEST * np.clip(finite / limit, 0, 1)
    shades = np.zeros((*numbers.shape, 4))
    shades[..., :3] = matplotlib.colors.to_rgb(PALETTE.get(color, color))
    shades[numbers < 0, :3] = matplotlib.colors.to_rgb(PALETTE["muted"])
    shades[..., 3] = strengths
    cell = _grid(ax, numbers.shape, rows, columns, title)
    if numbers.size > _MOST_CELLS:
        ax.imshow(shades, interpolation="none")
        return
    for (row, column), shade in zip(
        np.ndindex(numbers.shape), shades.reshape(-1, 4), strict=True
    ):
        corner = (column - 0.47, row - 0.47)
        ax.add_patch(
            Rectangle(
                corner,
                0.94,
                0.94,
                facecolor=shade,
                edgecolor=(*shade[:3], 0.35),
                linewidth=0.6,
            )
        )
    _print_numbers(ax, numbers, digits, cell)


def _as_matrix(
    matrix: Any, rows: Sequence | None, columns: Sequence | None
) -> np.ndarray:
    if hasattr(matrix, "detach"):  # a tensor, perhaps with a gradient or on a GPU
        matrix = matrix.detach().cpu().double().numpy()
    numbers = np.asarray(matrix, dtype=float)
    if numbers.ndim != 2 or not numbers.size:
        raise ValueError(
            f"a heatmap needs a matrix with two axes, got shape {numbers.shape}"
        )
    if np.isnan(numbers).any():
        raise ValueError(
            "the matrix holds NaN, which has no color: find out where it comes from"
        )
    for name, labels, size in zip(
        ("rows", "columns"), (rows, columns), numbers.shape, strict=True
    ):
        if labels is not None and len(labels) != size:
            raise ValueError(
                f"{len(labels)} labels for {size} {name}: give one for each"
            )
    return numbers


def _grid(
    ax: Any,
    shape: tuple,
    rows: Sequence | None,
    columns: Sequence | None,
    title: str | None,
) -> float:
    """Set up the axes of a heatmap; returns the width of a cell in points."""
    height, width = shape
    box = ax.get_window_extent()
    cell = min(box.width / width, box.height / height) * 72 / ax.figure.dpi
    ax.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5), aspect="equal")
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
    ax.xaxis.set_label_position("top")
    every = max(1, int(np.ceil(11 / cell)))
    row_labels = [] if rows is None else list(rows)
    column_labels = [] if columns is None else list(columns)
    ax.set_yticks(range(0, len(row_labels), every), row_labels[::every])
    ax.set_xticks(range(0, len(column_labels), every), column_labels[::every])
    if max((len(str(label)) for label in column_labels), default=0) * 6 > cell * every:
        for label in ax.get_xticklabels():
            label.set(rotation=40, ha="left", va="bottom", rotation_mode="anchor")
    if title:
        ax.set_title(title, fontsize=11)
    return cell


def _print_numbers(ax: Any, numbers: np.ndarray, digits: int, cell: float) -> None:
    texts = [_number(value, digits) for value in numbers.flat]
    size = min(10, cell / (0.62 * max(map(len, texts))))
    if size < _SMALLEST_TEXT:
        return
    for (row, column), text in zip(np.ndindex(numbers.shape), texts, strict=True):
        ax.text(column, row, text, ha="center", va="center_baseline", size=size)


def _number(value: float, digits: int) -> str:
    if np.isinf(value):
        return "∞" if value > 0 else "−∞"
    text = f"{value:.{digits}f}"
    return text.lstrip("-") if not float(text) else text.replace("-", "−")


def bars(
    ax: Any,
    labels: Sequence,
    values: Any,
    color: str = "value",
    digits: int = 2,
    limit: float | None = None,
) -> None:
    """Draw one horizontal bar for each label, with its number at the end.

    `values` has one finite number for each label. `color` is a name in PALETTE or any color of
    matplotlib, `limit` the number whose bar fills the axes (default: the largest magnitude).
    Raises ValueError if the values are not finite or the labels do not fit them.

    Book: a1_figures.html#bars
    """
    if hasattr(values, "detach"):
        values = values.detach().cpu().double().numpy()
    numbers = np.asarray(values, dtype=float)
    if numbers.shape != (len(labels),) or not np.isfinite(numbers).all():
        raise ValueError(
            f"bars need one finite number for each of the {len(labels)} labels, got {numbers}"
        )
    limit = limit or np.abs(numbers).max() or 1
    ax.barh(range(len(labels)), numbers, 0.7, color=PALETTE.get(color, color))
    for row, number in enumerate(numbers):
        shift, side = (4, "left") if number >= 0 else (-4, "right")
        ax.annotate(
            _number(number, digits),
            (number, row),
            (shift, 0),
            textcoords="offset points",
            ha=side,
            va="center_baseline",
        )
    ax.set_yticks(range(len(labels)), labels)
    ax.set_xticks([])
    ax.set(
        xlim=(-1.2 * limit * (numbers.min() < 0), 1.2 * limit),
        ylim=(len(labels) - 0.5, -0.5),
    )
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)


_MOVING_STYLE = """<style>
.glass-moving label{display:flex;flex-wrap:wrap;gap:.25rem .75rem;align-items:center;
justify-content:center;min-height:2.75rem}
.glass-moving input{width:16rem;max-width:100%;height:2rem;cursor:pointer}
.glass-moving input:focus-visible{outline:2px solid currentColor;outline-offset:2px}
.glass-moving output{min-width:3em;font-variant-numeric:tabular-nums}
.glass-moving [hidden],.glass-still{display:none}
.glass-spoken{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%)}
@media print,(scripting:none){
.glass-moving label,.glass-moving .glass-frame{display:none}
.glass-moving .glass-start,.glass-moving .glass-still{display:block}
.glass-still{text-align:center}}
</style>"""
_MOVE = """const box = this.closest('.glass-moving');
const frames = box.querySelectorAll('.glass-frame');
frames.forEach((frame, number) => { frame.hidden = number != this.value; });
const value = frames[this.value].dataset.value;
box.querySelector('output').textContent = value;
this.setAttribute('aria-valuetext', value);"""
_SPEAK = """const box = this.closest('.glass-moving');
const picture = box.querySelector('.glass-frame:not([hidden]) svg');
box.querySelector('.glass-spoken').textContent = picture.getAttribute('aria-label');"""


@dataclass(frozen=True, repr=False)
class MovingFigure:
    """Pictures drawn ahead, one for each value of a slider.

    Made by `slider`. As the last line of a cell it shows the frame `start` with a range input
    that works by mouse, touch and keyboard, without a kernel. Print shows the frame `start`.

    Book: a1_figures.html#a-figure-that-moves
    """

    draw: Callable[[Any], Figure]
    values: tuple
    label: str
    alt: Callable[[Any], str]
    start: int
    frames: tuple[Picture, ...]

    def __repr__(self) -> str:
        return (
            f"{self.frames[self.start]!r} ({len(self.frames)} frames, by {self.label})"
        )

    def _repr_html_(self) -> str:
        label, value = (
            html.escape(self.label),
            html.escape(_name(self.values[self.start])),
        )
        return (
            f'{_MOVING_STYLE}<div class="glass-moving" role="group" aria-label="{label}">'
            + "".join(self._frame(number) for number in range(len(self.frames)))
            + f"<label><span>{label}</span>"
            f'<input type="range" min="0" max="{len(self.frames) - 1}" value="{self.start}"'
            f' step="1" autocomplete="off" aria-label="{label}" aria-valuetext="{value}"'
            f' oninput="{html.escape(_MOVE)}" onchange="{html.escape(_SPEAK)}">'
            f'<output aria-live="off">{value}</output></label>'
            f'<p class="glass-still">{label}: {value}</p>'
            '<span class="glass-spoken" aria-live="polite"></span></div>'
        )

    def _frame(self, number: int) -> str:
        value, first = html.escape(_name(self.values[number])), number == self.start
        state = "" if first else " hidden"
        kind = "glass-frame glass-start" if first else "glass-frame"
        picture = self.frames[number]._repr_html_()
        return f'<div class="{kind}" data-value="{value}"{state}>{picture}</div>'

    def live(self) -> Any:
        """Return the figure as a widget that draws for any value between the frames too.

        It needs a running kernel. Raises ImportError without ipywidgets, and ValueError if the
        values are not numbers.
        """
        try:
            import ipywidgets
        except ImportError as error:
            raise ImportError(
                "a live figure needs ipywidgets: pip install 'glassgpt[notebooks]'"
            ) from error
        if not all(isinstance(value, Real) for value in self.values):
            raise ValueError(
                f"only numbers have values in between, and {self.values} are not"
            )
        low, high = min(self.values), max(self.values)
        kind = {
            "min": low,
            "max": high,
            "value": self.values[self.start],
            "description": self.label,
        }
        if all(isinstance(value, Integral) for value in self.values):
            control = ipywidgets.IntSlider(**kind)
        else:
            control = ipywidgets.FloatSlider(step=(high - low) / 100, **kind)
        picture = ipywidgets.HTML()

        def redraw(_change: Any = None) -> None:
            fig, alt = self.draw(control.value), self.alt(control.value)
            picture.value = show(fig, alt)._repr_html_()

        control.observe(redraw, "value")
        redraw()
        return ipywidgets.VBox([control, picture])


def _name(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


_LARGEST = 150_000  # characters of one moving figure: a page may hold several


def slider(
    draw: Callable[[Any], Figure],
    values: Sequence,
    label: str,
    alt: Callable[[Any], str],
    start: int = 0,
) -> MovingFigure:
    """Draw a figure for each value ahead, and show them behind a slider.

    `draw(value)` returns a figure, `alt(value)` says what it shows, `label` names the slider,
    and `start` is the index of the frame shown first. Raises ValueError if there are no values,
    `start` is no index of them, or the frames together are too large for a page.

    Book: a1_figures.html#a-figure-that-moves
    """
    values = tuple(values)
    if not values or start not in range(len(values)):
        raise ValueError(
            f"start={start} is no index of the {len(values)} values of the slider"
        )
    frames = tuple(
        _picture(draw(value), alt(value), salt=f"{label} {number}")
        for number, value in enumerate(values)
    )
    moving = MovingFigure(draw, values, label, alt, start, frames)
    if (size := len(moving._repr_html_())) > _LARGEST:
        raise ValueError(
            f"{len(frames)} frames take {size} characters, more than {_LARGEST}: "
            "draw fewer frames or less in each"
        )
    return moving
