"""What the page says of accuracies: tables, interval plots, differences."""

from collections.abc import Sequence

from lopd.config.catalogue import BASE, CATALOGUE, STUDENT, TEACHER
from lopd.report.plots import SERIES, Plot, interval_plot
from lopd.report.reading import Run
from lopd.report.texts import signed

_TRAINED = {info.name: info.title for info in CATALOGUE if info.trains == STUDENT}
_TEACHERS = {info.name: info.title for info in CATALOGUE if info.trains == TEACHER}
TITLES = {BASE: "Base", **_TRAINED, **_TEACHERS}
"""Models in the order of the tables, as they are called there."""


def models(runs: Sequence[Run]) -> list[str]:
    """The models that were evaluated, those with a title first."""
    found = dict.fromkeys(model for run in runs for model in run.results)
    return [m for m in TITLES if m in found] + [m for m in found if m not in TITLES]


def title(model: str) -> str:
    """What a model is called on the page."""
    return TITLES.get(model, model)


def tasks(runs: Sequence[Run]) -> list[str]:
    """Every "test set/mode" of the runs."""
    return list(dict.fromkeys(t for run in runs for found in run.results.values() for t in found))


def task_title(task: str) -> str:
    """ "addition/greedy" as "addition, greedy"."""
    return task.replace("/", ", ")


def difference(run: Run, task: str, other: str) -> str:
    """OPD's accuracy minus another model's, in points; "" if one is missing."""
    try:
        opd, base = (run.results[model][task]["accuracy"] for model in ("opd", other))
    except KeyError:
        return ""
    return signed(100 * (opd - base), 1)


def tables(runs: Sequence[Run]) -> list[dict]:
    """For each task, a row for each run: results by model, and OPD's differences."""
    return [
        {
            "task": task_title(task),
            "rows": [
                {
                    "label": run.label,
                    "colour": i % SERIES + 1,
                    "cells": {m: found[task] for m, found in run.results.items() if task in found},
                    "over_sft": difference(run, task, "sft"),
                    "over_control": difference(run, task, "control"),
                }
                for i, run in enumerate(runs)
            ],
        }
        for task in tasks(runs)
    ]


def _intervals(key: str, name: str, rows: list[str], lines: Sequence[tuple[str, Run, str]]) -> Plot:
    """One plot, a colour for each (label, run, task)."""
    series = []
    for i, (label, run, task) in enumerate(lines):
        found = {m: run.results[m][task] for m in rows if task in run.results.get(m, {})}
        points = {title(m): (r["accuracy"], *r["ci95"]) for m, r in found.items()}
        series.append({"label": label, "colour": i % SERIES + 1, "points": points})
    return interval_plot(key, name, [title(m) for m in rows], series)


def plots(runs: Sequence[Run]) -> list[Plot]:
    """All tasks of one run in one plot; of several runs, one plot for each task."""
    rows, found = models(runs), tasks(runs)
    if not found:
        return []
    if len(runs) == 1:
        lines = [(task_title(task), runs[0], task) for task in found]
        return [_intervals("accuracy", "With 95 % intervals", rows, lines)]
    return [
        _intervals(f"accuracy{i}", task_title(task), rows, [(run.label, run, task) for run in runs])
        for i, task in enumerate(found)
    ]


def control_note(runs: Sequence[Run]) -> str:
    """What the control model is, with steps where one run is shown."""
    if not any("control" in run.results for run in runs):
        return ""
    steps, opd = (runs[0].stages[name].steps for name in ("control", "opd"))
    if len(runs) > 1 or not steps or not opd:
        return "The control went on with SFT instead of OPD."
    return f"The control went on with SFT for {steps:,} steps, where OPD took {opd:,}."


def details(runs: Sequence[Run]) -> list[dict]:
    """Everything else that was recorded, a row a (run, model, task)."""
    rows = []
    for run in runs:
        for model in [m for m in models(runs) if m in run.results]:
            for task, result in run.results[model].items():
                more = []
                for name, value in result.items():
                    if isinstance(value, dict):  # avg@k, pass@k, majority@k
                        low, high = (f"{100 * v:.1f}" for v in value["ci95"])
                        more.append(f"{name} {100 * value['value']:.1f} [{low}, {high}]")
                row = {"run": run.label, "model": title(model), "task": task_title(task)}
                rows.append({**row, "result": result, "more": more})
    return rows
