"""What is kept of every run of a study: plain numbers, for results.json and all tables."""

import math
import sys
from collections.abc import Sequence

from etils import epath

from lopd.artefacts.artefact import Artefact
from lopd.config.catalogue import stage_info
from lopd.report import rows
from lopd.study.design import Arm, Study, path_to
from lopd.study.run import finished
from lopd.study.store import Store

_LAST_STEPS = 10


def _rows(path: epath.Path, rule: rows.Rule) -> list[dict]:
    """The rows of a file; a warning says which are left out."""
    odd = rows.Oddities(path)
    found = rows.rising(rows.read_lines(odd, rule), odd)
    for note in odd.notes:
        print(f"lopd: warning: {note}", file=sys.stderr)
    return found


def _short(value):
    """Numbers with five digits, which is more than any of them is good for."""
    if isinstance(value, dict):
        return {name: _short(x) for name, x in value.items()}
    if isinstance(value, list):
        return [_short(x) for x in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return value


def _final(metrics: list[dict]) -> dict:
    """The mean of each metric over the last steps."""
    last = metrics[-_LAST_STEPS:]
    numbers = [name for name, x in last[-1].items() if isinstance(x, float)]
    means = {}
    for name in numbers:
        values = [row[name] for row in last if row.get(name) is not None]
        means[name] = sum(values) / len(values) if values else None
    return {"step": last[-1]["step"], **means}


def _training(artefact: Artefact) -> dict:
    """How training ended: metrics of the training responses, and drift on the held-out ones."""
    found = {}
    metrics = _rows(artefact.path / "metrics.jsonl", rows.METRICS)
    drift = _rows(artefact.path / "drift.jsonl", rows.DRIFT)
    if metrics:
        found["final"] = _final(metrics)
    if drift and drift[-1].get("heldout"):
        found["heldout"] = {"step": drift[-1]["step"], **drift[-1]["heldout"]}
    return found


def _costs_of(arm: Arm) -> list[str]:
    """Stages whose costs are those of an arm; what the drift panel reads is not."""
    read = stage_info(arm.student).reads_if_there
    return [name for name in path_to(arm.student) if name not in read]


def run_result(arm: Arm, seed: int, artefacts: dict[str, Artefact]) -> dict:
    """The numbers of one arm with one seed."""
    evaluation = artefacts["eval"].manifest
    tests = evaluation.results[arm.student]
    trained = arm.student in artefacts and arm.student != "teacher"
    result = {
        "arm": arm.name,
        "seed": seed,
        "split": evaluation.settings["eval"]["split"],
        "accuracy": {
            name: {key: test[key] for key in ("accuracy", "n", "finished", "mean_response_tokens")}
            for name, test in tests.items()
        },
        **(_training(artefacts[arm.student]) if trained else {}),
        "seconds": {name: artefact.manifest.seconds for name, artefact in artefacts.items()},
        "costs": {
            name: artefacts[name].outputs["costs"]
            for name in _costs_of(arm)
            if name in artefacts and "costs" in artefacts[name].outputs
        },
        "artefacts": {name: artefact.path.name for name, artefact in artefacts.items()},
    }
    return _short(result)


def collect(study: Study, store: Store, arms: Sequence[Arm], seeds: Sequence[int]) -> list[dict]:
    """The results of every run that is complete."""
    found = []
    for arm in arms:
        for seed in seeds:
            artefacts = finished(study, store, arm, seed)
            if artefacts:
                found.append(run_result(arm, seed, artefacts))
    return found
