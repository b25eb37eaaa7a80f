"""Means over seeds, their intervals, and the tables that show them. Pure functions.

Values here are shares of 1; tables show percent and points.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from scipy.special import stdtrit

from lopd.study.design import Section

MODES = ("greedy", "sampled")
"""Ways of sampling that are compared."""
KINDS = ("sampling", "scoring", "training")
"""Of costs, after `lopd.artefacts.accounting`."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its 95 % interval, which one seed alone does not have (NaN)."""

    mean: float
    low: float
    """Of the interval."""
    high: float
    """Of the interval."""
    n: int
    """Seeds."""

    def text(self, signed: bool = False) -> str:
        """In percent or points, as in "79.6 [77.0, 82.0]"."""
        form = "+.1f" if signed else ".1f"
        mean, low, high = (f"{100 * x:{form}}".replace("-", "−") for x in
                           (self.mean, self.low, self.high))  # fmt: skip
        return f"{mean} [{low}, {high}]" if self.n > 1 else mean


def estimate(values: Sequence[float]) -> Estimate:
    """Mean ± t(n − 1; 0.975) · s / √n: the interval of the mean over draws of seeds."""
    values = np.asarray(values, np.float64)
    n, mean = len(values), float(values.mean())
    if n < 2:
        return Estimate(mean, math.nan, math.nan, n)
    half = float(stdtrit(n - 1, 0.975)) * float(values.std(ddof=1)) / math.sqrt(n)
    return Estimate(mean, mean - half, mean + half, n)


def paired(first: dict[int, float], second: dict[int, float]) -> Estimate | None:
    """The mean difference first − second over the seeds that both have; None without any."""
    seeds = sorted(first.keys() & second.keys())
    return estimate([first[seed] - second[seed] for seed in seeds]) if seeds else None


class Results:
    """Looks accuracies up in the list that `lopd.study.results.collect` makes."""

    def __init__(self, runs: Sequence[dict]):
        self.runs = runs

    def of(self, arm: str) -> list[dict]:
        """The runs of an arm."""
        return [run for run in self.runs if run["arm"] == arm]

    def accuracies(self, arm: str, mode: str) -> dict[int, float]:
        """By seed, the accuracy of an arm, over all test sets alike."""
        found = {}
        for run in self.of(arm):
            tests = [x["accuracy"] for name, x in run["accuracy"].items() if name.endswith(mode)]
            found[run["seed"]] = sum(tests) / len(tests)
        return found

    def accuracy(self, arm: str, mode: str) -> Estimate | None:
        """The accuracy of an arm over its seeds, its interval cut to [0, 1]; None without any."""
        if not (values := self.accuracies(arm, mode)):
            return None
        found = estimate(list(values.values()))
        return dataclasses.replace(found, low=max(found.low, 0.0), high=min(found.high, 1.0))

    def difference(self, pair: tuple[str, str], mode: str) -> Estimate | None:
        """The paired difference of two arms."""
        first, second = (self.accuracies(arm, mode) for arm in pair)
        return paired(first, second)

    def mean(self, arm: str, *keys: str) -> float | None:
        """The mean over seeds of a number that lies under these keys in every run's result."""
        values = []
        for run in self.of(arm):
            for key in keys:
                run = run.get(key) if isinstance(run, dict) else None
            if run is not None:
                values.append(run)
        return float(np.mean(values)) if values else None

    def cost(self, arm: str, kind: str, unit: str) -> float | None:
        """The mean over seeds of what an arm spends after SFT on "sampling", "scoring" or
        "training", in "seconds" or "flops"; None if nothing was counted.
        """
        values = [
            sum(costs.get(kind, {}).get(unit, 0.0) for costs in run["costs"].values())
            for run in self.of(arm)
            if run["costs"]
        ]
        return float(np.mean(values)) if values else None


def _number(value: float | None, form: str) -> str:
    return "—" if value is None else f"{value:{form}}"


def accuracy_table(section: Section, results: Results) -> list[list[str]]:
    """A header, and a row for each arm of the section that has results."""
    table = [["arm", "greedy", "sampled", "w on trained", "w held-out", "ESS held-out", "seeds"]]
    for arm in section.arms:
        estimates = [results.accuracy(arm, mode) for mode in MODES]
        if estimates[0]:
            drift = [
                _number(results.mean(arm, *keys), ".3f")
                for keys in (
                    ("final", "importance_weight"),
                    ("heldout", "importance_weight"),
                    ("heldout", "ess_fraction"),
                )
            ]
            cells = [x.text() for x in estimates]
            table.append([arm, *cells, *drift, str(estimates[0].n)])
    return table


def difference_table(section: Section, results: Results) -> list[list[str]]:
    """A header, and a row for each pair of the section that has results."""
    table = [["difference, points", "greedy", "sampled", "seeds"]]
    for pair in section.pairs:
        estimates = [results.difference(pair, mode) for mode in MODES]
        if estimates[0]:
            cells = [x.text(signed=True) for x in estimates]
            table.append([" − ".join(pair), *cells, str(estimates[0].n)])
    return table


def cost_table(section: Section, results: Results) -> list[list[str]]:
    """A header, and a row for each arm of a "cost" section whose costs were counted."""
    table = [["arm", *(f"{kind}, {unit}" for unit in ("s", "TFLOPs") for kind in KINDS)]]
    for arm in section.arms if section.figure == "cost" else ():
        if results.cost(arm, KINDS[0], "seconds") is not None:
            seconds = [f"{results.cost(arm, kind, 'seconds'):.1f}" for kind in KINDS]
            flops = [f"{results.cost(arm, kind, 'flops') / 1e12:.2f}" for kind in KINDS]
            table.append([arm, *seconds, *flops])
    return table


def tables(section: Section, results: Results) -> list[list[list[str]]]:
    """The tables of a section that have rows."""
    found = [make(section, results) for make in (accuracy_table, difference_table, cost_table)]
    return [table for table in found if len(table) > 1]


def markdown(table: Sequence[Sequence[str]]) -> str:
    """A table as Markdown."""
    lines = ["| " + " | ".join(row) + " |" for row in table]
    return "\n".join([lines[0], "|" + "---|" * len(table[0]), *lines[1:]])
