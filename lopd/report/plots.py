"""Plots as inline SVG by Matplotlib, whose colours are the page's CSS variables.

Beside each SVG goes what a hover read-out needs: the values, and how they map to the drawing.
"""

import dataclasses
import io
import re
import warnings
from collections.abc import Sequence

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

# Matplotlib wants colours, the page wants variables that follow its theme: each variable has a
# stand-in that occurs nowhere else, and is put in its place in the finished SVG.
STAND_INS = {"ink": "#00aa01", "muted": "#00aa02", "grid": "#00aa03"} | {
    f"series-{i}": f"#00bb0{i}" for i in range(1, 7)
}
SERIES = 6
"""How many series colours the style sheet has."""

_WIDTH, _HEIGHT = 360, 220  # CSS pixels at the size that plots are usually shown
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 8, 30, 36
_HOVER_POINTS = 240  # of one series; a plot is not wider than that by much

STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "lopd",  # the same data gives the same bytes
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.edgecolor": STAND_INS["muted"],
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": STAND_INS["grid"],
    "grid.linewidth": 0.8,
    "xtick.color": STAND_INS["muted"],
    "ytick.color": STAND_INS["muted"],
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "lines.linewidth": 1.7,
    "lines.solid_joinstyle": "round",
    "path.simplify_threshold": 0.4,
}
"""Matplotlib's settings of every plot."""


@dataclasses.dataclass(frozen=True)
class Series:
    """One line.

    `kind`: "curve" (faint values under their smoothed line), "line", "points" (dots joined by
    dashes) or "bins" (x is then the middle of each bin between `edges`). `band` holds lows and
    highs: shaded around a curve, bars at points.
    """

    label: str
    """In the legend."""
    x: Sequence[float]
    y: Sequence[float]
    """Values over x; NaN leaves a gap."""
    colour: int = 1
    """Number of a series colour, from 1."""
    kind: str = "curve"
    band: tuple[Sequence[float], Sequence[float]] | None = None
    edges: Sequence[float] | None = None


@dataclasses.dataclass(frozen=True)
class Plot:
    """A finished plot: SVG, the data of its read-out, and a legend of (label, colour, kind)."""

    title: str
    """Above it."""
    svg: Markup
    hover: dict | None
    """Values for the read-out under the pointer; None: no read-out."""
    legend: list[tuple[str, int, str]]


def _windows(values: np.ndarray, half: int) -> np.ndarray:
    """[N, 2 half + 1]: each value with its neighbours, NaN beyond the ends."""
    padded = np.pad(values, half, constant_values=np.nan)
    return np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1)


def smoothed(values: np.ndarray) -> np.ndarray:
    """Running mean of the running median, each over a twenty-fifth of the values.

    The median, as one spike must not look like a bump; the mean, as a median moves in jerks.
    """
    half = len(values) // 50
    if not half:
        return values
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # windows without any value: NaN
        return np.nanmean(_windows(np.nanmedian(_windows(values, half), axis=1), half), axis=1)


def _tick(value: float, _position=None) -> str:
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * (10 if suffix == "k" else 1):
            return f"{value / size:.4g}{suffix}"
    return f"{value:.4g}".replace("e-0", "e-").replace("-", "−")


def _small_tick(value: float, _position=None) -> str:
    """Ticks of an axis below 0.01, which would be wider than the margin."""
    text = f"{value:.1e}" if value else "0"
    return text.replace(".0e", "e").replace("e-0", "e-").replace("-", "−")


def to_svg(figure: Figure, key: str, label: str) -> Markup:
    """The figure as an <svg> element, themed, with ids that no other plot of the page has."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<style.*?</style>", "", text, flags=re.S)
    text = re.sub(r"font: [^;\"]*;? ?|font-family: [^;\"]*;? ?", "", text)
    for name, colour in STAND_INS.items():
        text = text.replace(colour, f"var(--{name})")
    text = re.sub(r'id="|xlink:href="#|url\(#', lambda m: f"{m[0]}{key}-", text)
    text = text.replace("xlink:href", "href")
    # Subscripts, as in the page's text.
    sub = r'π<tspan dy="3" font-size="75%">\1</tspan><tspan dy="-3">&#8203;</tspan>'
    text = re.sub(r"π_(T|θ|ref)", sub, text)
    head = re.search(r'viewBox="[^"]*"', text)[0]
    label = Markup.escape(label)
    text = re.sub(
        r"<svg[^>]*>", lambda _: f'<svg {head} role="img" aria-label="{label}">', text, count=1
    )
    return Markup(re.sub(r"\s*\n\s*", " ", text))


def _draw(axes: Axes, series: Series) -> None:
    colour = STAND_INS[f"series-{series.colour}"]
    x, y = np.asarray(series.x, float), np.asarray(series.y, float)
    if series.band is not None and series.kind == "curve":
        low, high = (smoothed(np.asarray(side, float)) for side in series.band)
        axes.fill_between(x, low, high, color=colour, alpha=0.14, linewidth=0)
    elif series.band is not None:
        axes.vlines(x, *series.band, color=colour, linewidth=1.1)
    if len(x) == 1:
        axes.plot(x, y, color=colour, marker="o", markersize=4)
    elif series.kind == "curve":
        axes.plot(x, y, color=colour, alpha=0.3, linewidth=0.8)
        axes.plot(x, smoothed(y), color=colour)
    elif series.kind == "points":
        axes.plot(x, y, color=colour, linestyle=(0, (3, 2)), linewidth=1.1, marker="o",
                  markersize=4)  # fmt: skip
    elif series.kind == "bins":
        axes.stairs(y, series.edges, color=colour, linewidth=1.7)
        axes.stairs(y, series.edges, color=colour, alpha=0.12, fill=True)
    else:
        axes.plot(x, y, color=colour, marker="o", markersize=3)


def _hover(
    axes: Axes, series: Sequence[Series], title: str, x_label: str, unit: str, log: bool
) -> dict:
    """Values, and the two corners of the axes in data and in SVG units."""
    (x0, x1), (y0, y1) = axes.get_xlim(), axes.get_ylim()
    shown = []
    for one in series:
        every = -(-len(one.x) // _HOVER_POINTS) or 1
        shown.append(
            {
                "label": one.label or title,
                "colour": one.colour,
                "x": [float(f"{v:.5g}") for v in one.x[::every]],
                "y": [float(f"{v:.4g}") if np.isfinite(v) else None for v in one.y[::every]],
            }
        )
    box = [_LEFT, _HEIGHT - _BOTTOM, _WIDTH - _RIGHT, _TOP]
    return {"data": [x0, y0, x1, y1], "box": box, "log": log, "x": x_label, "unit": unit,
            "series": shown}  # fmt: skip


def _finish_axes(axes: Axes, zero: bool, log: bool) -> None:
    """Margins, ticks and grid."""
    steps = [1, 2, 2.5, 5, 10]
    axes.margins(x=0.015, y=0.06)
    axes.grid(axis="x", visible=False)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=steps, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(_tick))
    low, high = axes.get_ylim()
    small = not log and max(-low, high) < 0.01
    axes.yaxis.set_major_locator(LogLocator(numticks=5) if log else MaxNLocator(5, steps=steps))
    axes.yaxis.set_major_formatter(FuncFormatter(_small_tick if small else _tick))
    axes.yaxis.set_minor_locator(NullLocator())
    if zero and low <= 0 <= high:
        axes.axhline(0, color=STAND_INS["muted"], linewidth=0.8)


def line_plot(
    key: str,
    title: str,
    x_label: str,
    y_label: str,
    series: Sequence[Series],
    *,
    unit: str = "",
    log: bool | None = False,
    zero: bool = False,
    from_zero: bool = False,
) -> Plot:
    """Lines over a common x axis.

    Args:
      key: a name that no other plot of the page has.
      title: for the caption and for screen readers.
      x_label: with its unit.
      y_label: with its unit.
      series: what to draw.
      unit: short, behind values of the read-out.
      log: whether the y axis is logarithmic, down to a thousandth of the median; None: if values
        are positive and span much.
      zero: whether to mark y = 0.
      from_zero: whether y starts at 0 and fits the smoothed lines, spikes cut off.
    """
    values = np.concatenate([np.asarray(one.y, float) for one in series])
    values = values[np.isfinite(values)]
    positive = values[values > 0]
    if log is None:
        log = 0 < positive.size == values.size and bool(positive.max() / positive.min() > 100)
    log = log and positive.size > 0
    with matplotlib.rc_context(STYLE):
        figure = Figure((_WIDTH / 72, _HEIGHT / 72), dpi=72)
        axes = figure.add_axes(
            (_LEFT / _WIDTH, _BOTTOM / _HEIGHT, (_WIDTH - _LEFT - _RIGHT) / _WIDTH,
             (_HEIGHT - _TOP - _BOTTOM) / _HEIGHT)
        )  # fmt: skip
        for one in series:
            _draw(axes, one)
        if log:
            axes.set_yscale("log", nonpositive="clip")
            # A divergence begins at rounding errors, which would flatten all that follows.
            lowest = max(positive.min(), 1e-3 * np.median(positive))
            axes.set_ylim(lowest / 1.6, positive.max() * 1.6)
        elif from_zero:
            axes.set_ylim(0, 1.25 * max(np.nanmax(smoothed(np.asarray(s.y))) for s in series))
        _finish_axes(axes, zero, log)
        ink = {"color": STAND_INS["muted"], "fontsize": 11}
        axes.set_xlabel(x_label, loc="right", labelpad=3, **ink)
        figure.text(2 / _WIDTH, 1 - 6 / _HEIGHT, y_label + (", log scale" if log else ""),
                    va="top", **ink)  # fmt: skip
        hover = _hover(axes, series, title, x_label, unit, log)
        svg = to_svg(figure, key, f"{title}: {y_label} over {x_label}")
    # Dots need no entry beside their curve: the page says what dots are.
    curves = [one for one in series if one.kind != "points"] or series
    legend = [(one.label, one.colour, one.kind) for one in curves if one.label]
    return Plot(title, svg, hover, legend)


_INTERVAL_WIDTH, _INTERVAL_LEFT, _GAP = 380, 62, 12


def interval_plot(key: str, title: str, rows: Sequence[str], series: Sequence[dict]) -> Plot:
    """Accuracies with their 95 % intervals, a row a model.

    Args:
      key: a name that no other plot of the page has.
      title: for the caption and for screen readers.
      rows: names, from the top.
      series: each {"label", "colour", "points": {row: (accuracy, low, high)}}, shares of 1.
    """
    width, left = _INTERVAL_WIDTH, _INTERVAL_LEFT
    row_height = 12 + _GAP * len(series)
    height = 44 + len(rows) * row_height
    with matplotlib.rc_context(STYLE):
        figure = Figure((width / 72, height / 72), dpi=72)
        axes = figure.add_axes(
            (left / width, 36 / height, (width - left - 12) / width, (height - 40) / height)
        )
        for number, one in enumerate(series):
            colour = STAND_INS[f"series-{one['colour']}"]
            shift = (number - (len(series) - 1) / 2) * _GAP / row_height
            for y, row in enumerate(rows):
                if row in one["points"]:
                    accuracy, low, high = (100 * v for v in one["points"][row])
                    axes.plot([low, high], [y + shift] * 2, color=colour, linewidth=2.2,
                              solid_capstyle="round")  # fmt: skip
                    axes.plot([accuracy], [y + shift], "o", color=colour, markersize=6)
        axes.set_xlim(-1, 101)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_yticks(range(len(rows)), rows)
        axes.tick_params(axis="y", labelcolor=STAND_INS["ink"], labelsize=11.5)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("accuracy, %", loc="right", labelpad=3, color=STAND_INS["muted"])
        svg = to_svg(figure, key, f"{title}: accuracy in % with 95 % intervals")
    legend = [(one["label"], one["colour"], "points") for one in series]
    return Plot(title, svg, None, legend if len(legend) > 1 else [])
