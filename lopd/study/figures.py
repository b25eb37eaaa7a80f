"""The figures of a study, each drawn twice: a PNG, and an SVG that follows the page's theme."""

import io
from collections.abc import Callable, Sequence

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lopd.report.plots import STAND_INS, STYLE, to_svg
from lopd.study.design import Section
from lopd.study.table import KINDS, Estimate, Results

# The light theme of the page's style sheet.
_LIGHT = {
    "ink": "#1a1f26",
    "muted": "#586270",
    "grid": "#e9ecf0",
    "series-1": "#2456b8",
    "series-2": "#c2570c",
    "series-3": "#14804a",
}
_PLOT, _LETTER, _ROW, _DPI = 380, 6.4, 26, 160
_RIGHT, _TOP, _BOTTOM = 150, 8, 44


def _rows_axes(names: Sequence[str]) -> tuple[Figure, Axes]:
    """A figure of rows with names at the left and room for figures at the right, in points."""
    count, left = len(names), 20 + _LETTER * max(map(len, names))
    width, height = left + _PLOT + _RIGHT, _TOP + _BOTTOM + _ROW * count
    figure = Figure((width / 72, height / 72), dpi=72)
    axes = figure.add_axes((left / width, _BOTTOM / height, _PLOT / width, _ROW * count / height))
    axes.set_ylim(count - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    return figure, axes


def _name_rows(axes: Axes, names: Sequence[str], values: Sequence[str], colours: dict) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", labelcolor=colours["ink"], labelsize=11.5)
    for y, value in enumerate(values):
        axes.annotate(value, (1, y), (10, 0), xycoords=("axes fraction", "data"),
                      textcoords="offset points", va="center", color=colours["ink"])  # fmt: skip


def _interval(axes: Axes, y: int, found: Estimate, seeds: Sequence[float], colour: str) -> None:
    """One row: a dot for each seed, the mean, and its interval if there is one."""
    axes.plot(100 * np.asarray(seeds), np.full(len(seeds), y), "o", color=colour, alpha=0.3,
              markersize=4, markeredgewidth=0)  # fmt: skip
    if found.n > 1:
        axes.plot([100 * found.low, 100 * found.high], [y, y], color=colour, linewidth=2.4,
                  solid_capstyle="round")  # fmt: skip
    axes.plot([100 * found.mean], [y], "o", color=colour, markersize=7)


def _bars(section: Section, results: Results, colours: dict) -> Figure | None:
    """The greedy accuracy of every arm."""
    rows = [(arm, results.accuracy(arm, "greedy")) for arm in section.arms]
    rows = [(arm, found) for arm, found in rows if found]
    if not rows:
        return None
    names = [arm for arm, _ in rows]
    figure, axes = _rows_axes(names)
    for y, (arm, found) in enumerate(rows):
        axes.barh(y, 100 * found.mean, height=0.62, color=colours["series-1"], alpha=0.16)
        seeds = list(results.accuracies(arm, "greedy").values())
        _interval(axes, y, found, seeds, colours["series-1"])
    _name_rows(axes, names, [found.text() for _, found in rows], colours)
    axes.set_xlim(0, 101)
    axes.set_xlabel("greedy accuracy, %: mean and 95 % interval over seeds; a dot a seed",
                    color=colours["muted"])  # fmt: skip
    return figure


def _pairs(section: Section, results: Results, colours: dict) -> Figure | None:
    """The paired differences of greedy accuracy, beside a line at nought."""
    rows = [(pair, results.difference(pair, "greedy")) for pair in section.pairs]
    rows = [(pair, found) for pair, found in rows if found]
    if not rows:
        return None
    same = len({second for (_, second), _ in rows}) == 1
    names = [first if same else f"{first} − {second}" for (first, second), _ in rows]
    figure, axes = _rows_axes(names)
    axes.axvline(0, color=colours["muted"], linewidth=1)
    for y, (pair, found) in enumerate(rows):
        first, second = (results.accuracies(arm, "greedy") for arm in pair)
        seeds = [first[seed] - second[seed] for seed in first.keys() & second.keys()]
        _interval(axes, y, found, seeds, colours["series-1"])
    _name_rows(axes, names, [found.text(signed=True) for _, found in rows], colours)
    axes.margins(x=0.04)
    what = f" minus {rows[0][0][1]}" if same else ""
    axes.set_xlabel(f"greedy accuracy{what}, points: paired, 95 % interval over seeds",
                    color=colours["muted"])  # fmt: skip
    return figure


def _grid(section: Section, results: Results, colours: dict) -> Figure | None:
    """Four arms as a square: rows wrote the SFT data, columns score."""
    found = [results.accuracy(arm, "greedy") for arm in section.arms]
    if len(found) != 4 or None in found:
        return None
    figure = Figure((420 / 72, 250 / 72), dpi=72)
    axes = figure.add_axes((0.24, 0.04, 0.74, 0.78))
    means = np.array([100 * one.mean for one in found]).reshape(2, 2)
    spread = max(np.ptp(means), 1e-9)
    for y in range(2):
        for x in range(2):
            shade = 0.08 + 0.42 * (means[y, x] - means.min()) / spread
            axes.add_patch(matplotlib.patches.Rectangle(
                (x + 0.02, y + 0.02), 0.96, 0.96, color=colours["series-1"], alpha=shade,
                linewidth=0))  # fmt: skip
            mean, _, interval = found[2 * y + x].text().partition(" ")
            axes.text(x + 0.5, y + 0.46, mean, ha="center", va="center", fontsize=20,
                      color=colours["ink"])  # fmt: skip
            axes.text(x + 0.5, y + 0.72, interval, ha="center", va="center",
                      color=colours["ink"])  # fmt: skip
    axes.set(xlim=(0, 2), ylim=(2, 0))
    axes.grid(visible=False)
    axes.spines["bottom"].set_visible(False)
    axes.set_xticks([0.5, 1.5], ["A scores", "B scores"])
    axes.set_yticks([0.5, 1.5], ["A wrote SFT", "B wrote SFT"])
    axes.xaxis.tick_top()
    axes.tick_params(length=0, labelcolor=colours["ink"], labelsize=11.5)
    return figure


def _cost(section: Section, results: Results, colours: dict) -> Figure | None:
    """Seconds of each kind of work, stacked."""
    arms = [arm for arm in section.arms if results.cost(arm, KINDS[0], "seconds") is not None]
    if not arms:
        return None
    figure, axes = _rows_axes(arms)
    totals = []
    for y, arm in enumerate(arms):
        start = 0.0
        for number, kind in enumerate(KINDS, start=1):
            seconds = results.cost(arm, kind, "seconds")
            axes.barh(y, seconds, left=start, height=0.62, color=colours[f"series-{number}"],
                      alpha=0.75, label=kind if y == 0 else None)  # fmt: skip
            start += seconds
        totals.append(f"{start:.1f} s")
    _name_rows(axes, arms, totals, colours)
    axes.set_xlabel("seconds after SFT, mean over seeds", color=colours["muted"], loc="left")
    axes.legend(loc="upper right", bbox_to_anchor=(1, -0.22), ncols=3, frameon=False,
                labelcolor=colours["ink"], borderaxespad=0)  # fmt: skip
    return figure


_DRAW: dict[str, Callable[[Section, Results, dict], Figure | None]] = {
    "bars": _bars,
    "pairs": _pairs,
    "grid": _grid,
    "cost": _cost,
}
"""How each figure that a section may ask for is drawn."""


def _style(colours: dict) -> dict:
    """The report's style in other colours."""
    replaced = {STAND_INS[name]: colour for name, colour in colours.items()}
    return {key: replaced.get(value, value) for key, value in STYLE.items()}


def draw(section: Section, results: Results) -> tuple[bytes, Markup] | None:
    """A section's figure as PNG and as SVG for the page; None while there is nothing to show."""
    with matplotlib.rc_context(_style(_LIGHT)):
        figure = _DRAW[section.figure](section, results, _LIGHT)
        if figure is None:
            return None
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=_DPI, facecolor="white", metadata={"Software": None})
    themed = {name: STAND_INS[name] for name in _LIGHT}
    with matplotlib.rc_context(_style(themed)):
        svg = to_svg(_DRAW[section.figure](section, results, themed), section.name, section.title)
    return png.getvalue(), svg
