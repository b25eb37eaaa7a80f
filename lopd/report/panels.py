"""Which curves a page shows, and how they are made from the rows of a run."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from lopd.config.objectives import LOSSES
from lopd.report.plots import SERIES, Plot, Series, line_plot
from lopd.report.reading import Run


@dataclasses.dataclass(frozen=True)
class Panel:
    """One plot of scalars over steps.

    `metrics` are (label, name in metrics.jsonl, name of its standard deviation or ""). Held-out
    values have the same names in drift.jsonl, and NAME_ci95 where there is an interval.
    """

    title: str
    """Above the plot."""
    y_label: str
    """Of the axis, in words."""
    metrics: tuple[tuple[str, str, str], ...]
    unit: str = ""
    """Of the values, in the read-out."""
    scale: float = 1.0  # 100 for what is shown in %
    log: bool | None = False
    """A logarithmic axis; None: if the values span much."""
    zero: bool = False
    """Draw a line at 0."""
    from_zero: bool = False
    """Begin the axis at 0."""
    rare: bool = False  # not worth a word when it is missing


def _one(title: str, y_label: str, name: str, **how) -> Panel:
    return Panel(title, y_label, (("", name, ""),), **how)


_SHARE = {"unit": "%", "scale": 100.0}
_THROUGHPUT = _one(
    "Throughput", "tokens per second", "tokens_per_second", unit="tokens/s", from_zero=True
)
_LEARNING_RATE = _one("Learning rate", "per step", "learning_rate")

_DEVICE = Panel(
    "Use of the device", "%",
    (("of peak FLOP/s", "utilisation", ""), ("of the time waiting for data", "data_wait", "")),
    **_SHARE, from_zero=True,
)  # fmt: skip
_ROUTER = _one("Router loss", "load balancing, as weighted in the loss", "router_loss", rare=True)
_RUNNING = (_LEARNING_RATE, _THROUGHPUT, _DEVICE, _ROUTER)

_ADVANTAGE = (
    _one("Loss", "", "loss", log=None),  # what it is depends on the objective: `_with_loss_name`
    Panel(
        "Advantage", "log π_T − log π_θ within ±τ, nats, mean ± sd",
        (("", "advantage", "advantage_sd"),), unit="nats", zero=True,
    ),
    Panel(
        "Large advantages", "% of tokens",
        (("|A| > 1 nat", "advantage_over_1_nat", ""), ("clipped, |A| > τ", "clipped", "")),
        **_SHARE,
    ),
)  # fmt: skip
_ENTROPY = _one("Entropy", "nats per token", "entropy", unit="nats", log=None)
_GRADIENT = _one("Gradient norm", "before clipping", "grad_norm", log=None)
_RESPONSES = (
    _one("Response length", "tokens", "response_length", unit="tokens"),
    Panel(
        "Failure signs", "% of responses",
        (("cut at the cap", "truncated", ""), ("repetition", "repetition", "")), **_SHARE,
    ),
)  # fmt: skip

OPD = (
    *_ADVANTAGE,
    Panel(
        "Divergence estimates", "nats per token",
        (("KL(π_θ‖π_T)", "kl_teacher", ""), ("KL(π_ref‖π_θ)", "kl_ref", "")), unit="nats",
        log=True,
    ),
    _ENTROPY,
    _GRADIENT,
    Panel(
        "Importance weight of tokens", "π_θ / π_ref, mean ± sd",
        (("", "importance_weight", "importance_weight_sd"),),
    ),
    _one("Importance weight of responses", "mean of π_θ / π_ref, 95 % intervals",
         "sequence_weight"),
    _one("Effective sample size", "% of responses", "ess_fraction", **_SHARE),
    _one("χ² of π_θ from π_ref", "χ² over responses", "chi2", log=True),
    *_RESPONSES,
)  # fmt: skip
"""The panels of `opd`."""

# The responses are π_θ's own: what OPD shows against π_ref would be against the sampler here.
ONLINE = (
    *_ADVANTAGE,
    _one("Divergence estimate", "KL(π_θ‖π_T), nats per token", "kl_teacher", unit="nats", log=True),
    _ENTROPY,
    _GRADIENT,
    *_RESPONSES,
)

FINE_TUNING = (
    _one("Loss", "cross-entropy, nats per token", "loss", unit="nats", log=None),
    _ENTROPY,
    _GRADIENT,
)
"""The panels of stages that minimise cross-entropy."""


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def column(rows: Sequence[dict], name: str, scale: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of the rows that have a number of that name."""
    found = [(row["step"], row[name]) for row in rows if _is_number(row.get(name))]
    steps, values = zip(*found, strict=True) if found else ((), ())
    return np.asarray(steps, float), np.asarray(values, float) * scale


def _training(run: Run, stage: str, panel: Panel, name: str, sd: str) -> Series | None:
    rows = run.stages[stage].metrics
    x, y = column(rows, name, panel.scale)
    if not len(x):
        return None
    spread = column(rows, sd, panel.scale)[1]
    return Series("", x, y, band=(y - spread, y + spread) if len(spread) == len(y) else None)


def _held_out(run: Run, panel: Panel, name: str) -> Series | None:
    rows = [{**row["heldout"], "step": row["step"]} for row in run.drift if row.get("heldout")]
    x, y = column(rows, name, panel.scale)
    if not len(x):
        return None
    intervals = [row[f"{name}_ci95"] for row in rows if f"{name}_ci95" in row]
    band = np.transpose(intervals) * panel.scale if len(intervals) == len(y) else None
    return Series("", x, y, kind="points", band=None if band is None else (band[0], band[1]))


def _series(
    run: Run, stage: str, panel: Panel, metric: tuple[str, str, str], label: str, colour: int
) -> list[Series]:
    """The training curve of one metric, and its values on held-out responses."""
    _, name, sd = metric
    training = _training(run, stage, panel, name, sd)
    held_out = _held_out(run, panel, name) if stage == "opd" else None
    found = []
    if training:
        found.append(dataclasses.replace(training, label=label, colour=colour))
    if held_out:
        label = f"{label}, held out" if label else "held out"
        found.append(dataclasses.replace(held_out, label=label, colour=colour))
    return found


def _panel_plot(
    runs: Sequence[Run], stage: str, panel: Panel, metrics: Sequence[tuple[str, str, str]], key: str
) -> Plot | None:
    """One plot: of some metrics of one run, or of one metric of several; None without values."""
    series: list[Series] = []
    for number, run in enumerate(runs):
        for place, metric in enumerate(metrics):
            label = run.label if len(runs) > 1 else metric[0]
            colour = number if len(runs) > 1 else place
            series += _series(run, stage, panel, metric, label, colour % SERIES + 1)
    if not series:
        return None
    same = len(series) == 2 and np.array_equal(series[0].y, series[1].y)
    if same and len(runs) == 1:  # one would hide the other
        series = [dataclasses.replace(series[0], label=f"{series[0].label} = {series[1].label}")]
    title = panel.title
    if len(runs) > 1 and metrics[0][0]:
        title += f": {metrics[0][0]}"
    return line_plot(
        key, title, "step", panel.y_label, series,
        unit=panel.unit, log=panel.log, zero=panel.zero, from_zero=panel.from_zero,
    )  # fmt: skip


def _with_loss_name(panel: Panel, runs: Sequence[Run], stage: str) -> Panel:
    """The panel of the loss says which loss it is: that of each objective there is."""
    if panel.y_label:
        return panel
    objectives = dict.fromkeys(
        str(run.stages[stage].section("opd").get("objective")) for run in runs
    )
    known = [LOSSES[name] for name in objectives if name in LOSSES]
    label = " or ".join(dict.fromkeys(f"{loss.title}, {loss.unit}" for loss in known))
    return dataclasses.replace(panel, y_label=label or "loss")


def stage_panels(runs: Sequence[Run], stage: str) -> list[Panel]:
    """What is shown of a training stage's model, each panel with its labels."""
    chosen = {"opd": OPD, "online": ONLINE}.get(stage, FINE_TUNING)
    return [_with_loss_name(panel, runs, stage) for panel in chosen]


def stage_plots(
    runs: Sequence[Run], stage: str, running: bool = False
) -> tuple[list[Plot], list[str]]:
    """The plots of a training stage, and the titles of those that nothing was recorded for.

    They show what the training makes of its model, or how it is `running`: its speed and rate.
    With several runs, each metric has a plot of its own and each run a colour.
    """
    plots, missing = [], []
    chosen = _RUNNING if running else stage_panels(runs, stage)
    key = f"{stage}-r" if running else stage
    for number, panel in enumerate(chosen):
        groups = [panel.metrics] if len(runs) == 1 else [(metric,) for metric in panel.metrics]
        drawn = [
            _panel_plot(runs, stage, panel, group, f"{key}{number}-{i}")
            for i, group in enumerate(groups)
        ]
        found = [plot for plot in drawn if plot]
        plots += found
        if not found and not panel.rare:
            missing.append(panel.title[0].lower() + panel.title[1:])
    return plots, missing


BINS = 20
"""Of the position in a response, as in drift.jsonl."""


def rollout_advantages(rollouts: Sequence[dict], student: str) -> list[np.ndarray]:
    """log π_T − log π per token of each response, for "ref_logprobs" or "student_logprobs"."""
    return [np.asarray(r["teacher_logprobs"]) - np.asarray(r[student]) for r in rollouts]


def _by_position(advantages: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Mean advantage in each of BINS equal parts of a response, and how many tokens that is."""
    places = np.concatenate([np.arange(len(a)) * BINS // len(a) for a in advantages])
    counts = np.bincount(places, minlength=BINS)
    totals = np.bincount(places, np.concatenate(advantages), minlength=BINS)
    return np.where(counts > 0, totals / np.maximum(counts, 1), np.nan), counts


def _histogram(advantages: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Counts of tokens in bins of a quarter nat from −4 to 4, the ends holding all beyond."""
    edges = np.linspace(-4, 4, 33)
    return edges, np.histogram(np.clip(np.concatenate(advantages), -4, 4), edges)[0]


def _of_rollouts(run: Run) -> list[tuple[str, dict]]:
    """(label, {"edges", "counts", "by_position"}) before and after training."""
    if not run.rollouts:
        return []
    found = []
    for label, student in (("before", "ref_logprobs"), ("after", "student_logprobs")):
        advantages = rollout_advantages(run.rollouts, student)
        edges, counts = _histogram(advantages)
        by_position = {"advantage": _by_position(advantages)[0]}
        data = {"edges": edges, "counts": counts, "by_position": by_position}
        found.append((label, data))
    return found


_ALONG = {
    "kl_teacher": ("KL(π_θ‖π_T)", True),
    "kl_ref": ("KL(π_ref‖π_θ)", True),
    "entropy": ("Entropy", False),
}
"""What drift.jsonl has by position beside the advantage, and whether it spans much."""


def _of_drift(run: Run) -> list[tuple[str, dict]]:
    """The same of the first, a middle and the last row of drift.jsonl, with the curves of _ALONG.

    Runs of earlier versions have none of those.
    """
    rows = [row for row in run.drift if row.get("advantage_histogram")]
    found = []
    for i in dict.fromkeys((0, len(rows) // 2, len(rows) - 1)) if rows else ():
        counts = np.asarray(rows[i]["position_counts"])
        by_position = {
            name: np.where(counts > 0, rows[i][f"{name}_by_position"], np.nan)
            for name in ("advantage", *_ALONG)
            if f"{name}_by_position" in rows[i]
        }
        data = {**rows[i]["advantage_histogram"], "by_position": by_position}
        found.append((f"step {rows[i]['step']:,}", data))
    return found


_Snapshots = Sequence[tuple[str, int, dict]]
"""(label, colour, data of `_of_rollouts` or `_of_drift`)."""


def _histogram_plot(key: str, snapshots: _Snapshots, title: str, unit: str) -> Plot:
    series = []
    for label, colour, data in snapshots:
        edges, counts = np.asarray(data["edges"], float), np.asarray(data["counts"], float)
        used = np.flatnonzero(counts)
        if len(used):  # nothing is drawn of the empty ends
            edges, counts = edges[used[0] : used[-1] + 2], counts[used[0] : used[-1] + 1]
        middle, share = (edges[1:] + edges[:-1]) / 2, 100 * counts / max(1, counts.sum())
        series.append(Series(label, middle, share, colour, "bins", edges=edges))
    return line_plot(key, title, unit, "% of tokens", series, unit="%", log=True)


def _position_plot(
    key: str, snapshots: _Snapshots, name: str, title: str, y_label: str, **how
) -> Plot | None:
    series = []
    for label, colour, data in snapshots:
        if name in data["by_position"]:
            means = np.asarray(data["by_position"][name], float)
            middle = (np.arange(len(means)) + 0.5) * 100 / len(means)
            series.append(Series(label, middle, means, colour, "line"))
    where = "position in the response, %"
    return line_plot(key, title, where, y_label, series, unit="nats", **how) if series else None


def advantage_plots(runs: Sequence[Run]) -> list[Plot]:
    """By position and as a histogram: the advantage on the rollouts, and on batches of the
    training, and there what else is known by position.

    With several runs, only where each ended up: more lines would hide it.
    """
    plots = []
    for key, source, suffix, unit in (
        ("rollouts", _of_rollouts, "", "log π_T − log π_θ, nats"),
        ("drift", _of_drift, ", batches of training", "A within ±τ, nats"),
    ):
        if len(runs) == 1:
            shown = [(label, i + 1, data) for i, (label, data) in enumerate(source(runs[0]))]
        else:
            shown = [
                (f"{run.label}, {label}", i % SERIES + 1, data)
                for i, run in enumerate(runs)
                for label, data in source(run)[-1:]
            ]
        if not shown:
            continue
        title = f"Along a response{suffix}"
        plots += [
            _position_plot(f"position-{key}", shown, "advantage", title, f"mean {unit}", zero=True),
            _histogram_plot(f"histogram-{key}", shown, f"Histogram{suffix}", unit),
        ]
        for name, (what, log) in _ALONG.items():
            title, y_label = f"{what} along a response", "mean, nats per token"
            plots.append(_position_plot(f"{name}-{key}", shown, name, title, y_label, log=log))
    return [plot for plot in plots if plot]


def heaviest_tokens(run: Run, count: int = 8) -> list[dict]:
    """The tokens with the largest sums of |advantage| over the rollouts, before training.

    Each: the token, its occurrences, its mean |A| before and after, and its share of Σ|A| before.
    """
    totals: dict[str, np.ndarray] = {}
    for rollout, before, after in zip(
        run.rollouts,
        rollout_advantages(run.rollouts, "ref_logprobs"),
        rollout_advantages(run.rollouts, "student_logprobs"),
        strict=True,
    ):
        for token, b, a in zip(rollout["tokens"], np.abs(before), np.abs(after), strict=True):
            totals[token] = totals.get(token, np.zeros(3)) + np.array([1, b, a])
    whole = sum(t[1] for t in totals.values()) or 1.0
    heaviest = sorted(totals.items(), key=lambda item: -item[1][1])[:count]
    return [
        {"token": token, "count": int(n), "before": b / n, "after": a / n, "share": b / whole}
        for token, (n, b, a) in heaviest
    ]
