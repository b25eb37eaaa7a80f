"""From a working directory to plain data. Whatever is missing or damaged becomes a note."""

import dataclasses
import json
from typing import Any

from etils import epath

from lopd.artefacts.artefact import Artefact
from lopd.artefacts.manifest import Manifest
from lopd.config.catalogue import CATALOGUE, STAGES, stage_info
from lopd.errors import UserError
from lopd.machine.storage import absolute

TRAINING = tuple(info.name for info in CATALOGUE if info.trains)
"""Stages that leave a metrics.jsonl."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of a run: its state and manifest.

    The state is "complete", "unfinished", "failed", "damaged" or "absent". `metrics` are the rows
    of metrics.jsonl of a training stage; `failure` is its failure.json, if it has not gone past the
    step that stopped it.
    """

    name: str
    """As in `lopd.config.catalogue`."""
    state: str = "absent"
    manifest: Manifest | None = None
    metrics: list[dict] = dataclasses.field(default_factory=list)
    failure: dict[str, Any] | None = None

    @property
    def outputs(self) -> dict[str, Any]:
        """What the manifest records of a finished stage; empty before."""
        return self.manifest.outputs if self.manifest else {}

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that it was made with; empty before."""
        return self.manifest.settings if self.manifest else {}

    @property
    def inputs(self) -> dict[str, Any]:
        """The fingerprints of what it has read; empty before."""
        return self.manifest.inputs if self.manifest else {}

    @property
    def seconds(self) -> float:
        """Wall time that it has taken so far."""
        return self.manifest.seconds if self.manifest else 0.0

    @property
    def steps(self) -> int | None:
        """Training steps that were asked for."""
        section = stage_info(self.name).settings_section
        return self.settings.get(section, {}).get("steps")


@dataclasses.dataclass(frozen=True)
class Run:
    """All that a page shows of one working directory.

    Attributes:
      label: a short name that differs between the runs of a page.
      path: the directory.
      stages: by name, in the order they run, absent ones included.
      settings: by dotted name, over all stages that are there.
      results: eval's accuracies by model and "task/mode"; empty if there are none.
      split: which prompts those are of.
      drift: rows of opd/drift.jsonl.
      rollouts: rows of opd/rollouts.jsonl.
      responses: each model's graded first response to every evaluation problem.
      notes: what could not be read, for people.
    """

    label: str
    path: str
    stages: dict[str, Stage]
    settings: dict[str, Any]
    results: dict[str, dict]
    split: str
    drift: list[dict]
    rollouts: list[dict]
    responses: dict[str, list[dict]]
    notes: list[str]


def flatten(tree: dict, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}."""
    flat = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat


def _read_lines(path: epath.Path, notes: list[str]) -> list[dict]:
    """The rows of a JSON-lines file; a line that is none (the last of a killed run) is noted."""
    rows, bad = [], 0
    # Not splitlines(): JSON leaves U+2028 and others as they are inside its strings.
    text = path.read_bytes().decode(errors="replace") if path.exists() else ""
    for line in filter(str.strip, text.split("\n")):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            bad += 1
    if bad:
        name = f"{path.parent.name}/{path.name}"
        notes.append(f"{name}: {bad} unreadable line{'s' if bad > 1 else ''} left out")
    return rows


def _read_stage(folder: epath.Path, name: str, notes: list[str]) -> Stage:
    try:
        artefact = Artefact(folder)
    except UserError as error:
        notes.append(str(error))
        return Stage(name, "damaged")
    if artefact.manifest is None:
        return Stage(name)
    metrics = _read_lines(folder / "metrics.jsonl", notes) if name in TRAINING else []
    metrics = [row for row in metrics if "step" in row]
    failure = _read_failure(folder / "failure.json", notes)
    if failure and metrics and metrics[-1]["step"] >= failure["step"]:
        failure = None
    state = "complete" if artefact.complete else "failed" if failure else "unfinished"
    return Stage(name, state, artefact.manifest, metrics, failure)


def _read_failure(path: epath.Path, notes: list[str]) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text())
    except ValueError:
        notes.append(f"{path.parent.name}/{path.name} cannot be read")
        return None


def _read_results(folder: epath.Path, stage: Stage, notes: list[str]) -> tuple[dict, str]:
    """The accuracies in summary.json, or those that an unfinished evaluation has so far."""
    split = stage.settings.get("eval", {}).get("split", "")
    path = folder / "summary.json"
    if path.exists():
        try:
            summary = json.loads(path.read_text())
            return summary["models"], summary.get("split", split)
        except (ValueError, KeyError):
            notes.append("eval/summary.json cannot be read; delete it and run eval again")
    return stage.manifest.results if stage.manifest else {}, split


def read_run(workdir: epath.PathLike, label: str) -> Run:
    """Reads a working directory.

    Raises:
      UserError: if it does not exist, or no stage has begun in it.
    """
    path = absolute(workdir)
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; give the --workdir of a run")
    notes: list[str] = []
    stages = {name: _read_stage(path / name, name, notes) for name in STAGES}
    if all(stage.state == "absent" for stage in stages.values()):
        raise UserError(f"{path}: no stage of a run is in it; give the --workdir of a run")
    settings: dict[str, Any] = {}
    for name, stage in stages.items():
        own = stage.settings
        settings |= flatten(own, f"{name}." if "checkpoint" in own else "")  # an adopted one
    results, split = _read_results(path / "eval", stages["eval"], notes)
    responses = {}
    for model in results:
        rows = _read_lines(path / "eval" / f"responses_{model}.jsonl", notes)
        responses[model] = [row for row in rows if not row.get("sample")]
    return Run(
        label=label,
        path=str(path),
        stages=stages,
        settings=settings,
        results=results,
        split=split,
        drift=_read_lines(path / "opd" / "drift.jsonl", notes),
        rollouts=_read_lines(path / "opd" / "rollouts.jsonl", notes),
        responses={model: rows for model, rows in responses.items() if rows},
        notes=notes,
    )


def _labels(paths: list[epath.Path]) -> list[str]:
    """The shortest endings of the paths that tell them apart."""
    for parts in range(1, max(len(path.parts) for path in paths) + 1):
        labels = ["/".join(path.parts[-parts:]) for path in paths]
        if len({*labels}) == len(labels):
            return labels
    raise UserError("the same folder is given twice: " + ", ".join(map(str, paths)))


def read_runs(workdirs: list[epath.PathLike]) -> list[Run]:
    """Reads several working directories and gives each a label of its own."""
    paths = [absolute(workdir) for workdir in workdirs]
    return [read_run(p, label) for p, label in zip(paths, _labels(paths), strict=True)]
