"""From a working directory to plain data. Whatever is missing or damaged becomes a note."""

import dataclasses
from typing import Any

from etils import epath

from lopd.artefacts.artefact import MANIFEST, Artefact, damage
from lopd.artefacts.manifest import Manifest
from lopd.config.catalogue import CATALOGUE, STAGES, stage_info
from lopd.errors import UserError
from lopd.machine.storage import absolute, reason
from lopd.report import rows

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

    def section(self, name: str) -> dict[str, Any]:
        """A section of its settings; empty if it has none of that name."""
        found = self.settings.get(name)
        return found if isinstance(found, dict) else {}

    @property
    def steps(self) -> int | None:
        """Training steps that were asked for."""
        found = self.section(stage_info(self.name).settings_section).get("steps")
        return found if isinstance(found, int) else None


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


def _read_stage(folder: epath.Path, name: str, notes: list[str]) -> Stage:
    path = folder / MANIFEST
    try:
        artefact = Artefact(folder)
    except UserError as error:
        notes.append(str(error))
        return Stage(name, "damaged")
    except (OSError, RecursionError) as error:
        notes.append(f"{path} cannot be read ({reason(error)})")
        return Stage(name, "damaged")
    if artefact.manifest is None:
        return Stage(name)
    odd = rows.Oddities(path)
    manifest = dataclasses.replace(
        artefact.manifest,
        outputs=rows.clean_outputs(artefact.manifest.outputs, odd),
        results=rows.clean_results(artefact.manifest.results, "results", odd),
        seconds=odd.checked(rows.amount, artefact.manifest.seconds, "seconds") or 0.0,
    )
    notes.extend(odd.notes)
    if artefact.complete:
        notes.extend(_damaged_rows(artefact))
    metrics = _read_steps(folder / "metrics.jsonl", rows.METRICS, notes)
    if name not in TRAINING:
        metrics = []
    elif metrics and (missing := rows.missing_steps(metrics)):
        notes.append(f"{name}/metrics.jsonl has no rows of steps {missing}")
    elif not metrics and artefact.complete and not manifest.outputs.get("source"):
        notes.append(f"{name}/metrics.jsonl is missing or empty: no curves of {name}")
    failure = _read_failure(folder / "failure.json", notes)
    if failure and metrics and metrics[-1]["step"] >= failure["step"]:
        failure = None
    state = "complete" if artefact.complete else "failed" if failure else "unfinished"
    return Stage(name, state, manifest, metrics, failure)


def _damaged_rows(artefact: Artefact) -> list[str]:
    """Notes on files that the page shows and that are not as its stage has left them."""
    return [
        f"{artefact.path.name}/{entry['name']} {what}; running the stage again makes it again"
        for entry in artefact.manifest.files
        if entry["name"].endswith((".jsonl", "summary.json"))
        and (what := damage(artefact.path / entry["name"], entry))
    ]


def _read_steps(path: epath.Path, rule: rows.Rule, notes: list[str]) -> list[dict]:
    """The rows of a file with one for each step, or for some."""
    odd = rows.Oddities(path)
    found = rows.rising(rows.read_lines(odd, rule), odd)
    notes.extend(odd.notes)
    return found


def _read_rows(path: epath.Path, rule: rows.Rule, notes: list[str]) -> list[dict]:
    odd = rows.Oddities(path)
    found = rows.read_lines(odd, rule)
    notes.extend(odd.notes)
    return found


def _read_failure(path: epath.Path, notes: list[str]) -> dict[str, Any] | None:
    odd = rows.Oddities(path)
    found = rows.read_whole(odd, rows.FAILURE)
    notes.extend(odd.notes)
    return found


def _read_results(folder: epath.Path, stage: Stage, notes: list[str]) -> tuple[dict, str]:
    """The accuracies in summary.json, and those of the manifest where it lacks them."""
    path = folder / "summary.json"
    odd = rows.Oddities(path)
    summary = rows.read_whole(odd, rows.mapping) or {}
    found = rows.clean_results(summary.get("models", {}), "models", odd)
    for model, tasks in (stage.manifest.results if stage.manifest else {}).items():
        found[model] = tasks | found.get(model, {})
    if stage.state == "complete" and not summary and not odd.notes:
        notes.append("eval/summary.json is missing or empty")
    if odd.notes:
        notes.extend(f"{note}; eval/{MANIFEST} is shown instead" for note in odd.notes)
    split = summary.get("split", stage.section("eval").get("split", ""))
    return found, split if isinstance(split, str) else ""


def _read_responses(folder: epath.Path, model: str, notes: list[str]) -> list[dict]:
    """The graded responses of a model to every problem, the first to each."""
    odd = rows.Oddities(folder / f"responses_{model}.jsonl")
    found: dict[tuple, dict] = {}
    for row in rows.read_lines(odd, rows.RESPONSE):
        key = tuple(row.get(name, 0) for name in ("test", "mode", "problem", "sample"))
        if key in found:
            odd.found.append("a second {}/{} response {}.{}".format(*key))
        found.setdefault(key, row)
    notes.extend(odd.notes)
    return [row for row in found.values() if not row.get("sample")]


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
    responses = {model: _read_responses(path / "eval", model, notes) for model in results}
    return Run(
        label=label,
        path=str(path),
        stages=stages,
        settings=settings,
        results=results,
        split=split,
        drift=_read_steps(path / "opd" / "drift.jsonl", rows.DRIFT, notes),
        rollouts=_read_rows(path / "opd" / "rollouts.jsonl", rows.ROLLOUT, notes),
        responses={model: found for model, found in responses.items() if found},
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
