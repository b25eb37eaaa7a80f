"""Puts the page together: what each section shows, as plain values, for the template."""

import json
from collections.abc import Sequence
from typing import Any

import jinja2
import numpy as np
from etils import epath
from markupsafe import Markup

from lopd.config.catalogue import DEFAULT_STAGES, stage_info
from lopd.report import accuracy, browse, notices, panels
from lopd.report.plots import SERIES
from lopd.report.reading import TRAINING, Run, Stage
from lopd.report.texts import duration, flops, math, number, setting, signed

_HERE = epath.resource_path("lopd") / "report"


def _leaves(stage: Stage) -> list[str]:
    """What a stage has made so far, in a few words."""
    parts = []
    if stage.manifest is None:
        return parts
    if stage.name in TRAINING and stage.metrics:
        done = stage.metrics[-1]["step"]
        parts.append(
            f"{done:,} steps" if done == stage.steps else f"step {done:,} of {stage.steps or 0:,}"
        )
        tokens = _trained(stage)
        if tokens:
            parts.append(f"{number(tokens)} tokens")
    rounds = [str(entry["start"]) for entry in stage.manifest.rounds]
    if rounds:
        parts.append(f"cache refreshed after step {', '.join(rounds)}")
    totals = stage.outputs
    if totals.get("responses") and {"tokens", "finished"} <= totals.keys():
        parts.append(f"{number(totals['responses'])} responses")
        parts.append(f"{number(totals['tokens'])} tokens")
        parts.append(f"{100 * totals['finished'] / totals['responses']:.1f} % finished")
    if stage.outputs.get("source"):
        parts.append(f"from {stage.outputs['source']}")
    if stage.name == "eval" and stage.manifest.results:
        parts.append(f"{len(stage.manifest.results)} models")
    gap = stage.outputs.get("sampler_scorer_gap")
    if gap:
        parts.append(f"sampler and scorer differ by {gap['max']:.1g} nats at most")
    consistency = stage.outputs.get("teacher_consistency")
    if consistency:
        mean = signed(consistency["mean_log_ratio"], 3)
        parts.append(f"teacher consistency: mean log(π_T/π_ref) {mean} nats")
    for kind, cost in sorted(stage.outputs.get("costs", {}).items()):
        parts.append(f"{kind}: {flops(cost['flops'])} in {duration(cost['seconds'])}")
    return [part.replace(" ", "\u00a0", 2) for part in parts]


def _reads(run: Run, stage: Stage) -> list[dict]:
    """The inputs of a stage, and whether this run's artefact of that name is what was read."""
    found = []
    for name, fingerprint in stage.inputs.items():
        here = run.stages[name].outputs.get("fingerprint") if name in run.stages else None
        state = "elsewhere" if here is None else "same" if here == fingerprint else "changed"
        found.append({"name": name, "fingerprint": fingerprint, "state": state})
    return found


def _shown(runs: Sequence[Run]) -> list[str]:
    """The stages that some run has or that the method needs; the online baseline is for few."""
    return [
        name
        for name in runs[0].stages
        if name in DEFAULT_STAGES or any(run.stages[name].state != "absent" for run in runs)
    ]


def _stage_cards(run: Run, shown: Sequence[str]) -> list[dict]:
    total = sum(stage.seconds for stage in run.stages.values())
    cards = []
    for stage in (run.stages[name] for name in shown):
        seconds = stage.seconds
        cards.append(
            {
                "name": stage.name,
                "does": stage_info(stage.name).does,
                "state": stage.state,
                "leaves": _leaves(stage),
                "reads": _reads(run, stage),
                "time": duration(seconds) if seconds else "",
                "share": 100 * seconds / total if total else 0,
                "rate": _rate(stage, seconds),
                "fingerprint": stage.outputs.get("fingerprint", ""),
            }
        )
    return cards


def _trained(stage: Stage) -> float:
    """Response tokens of all steps that have left a row."""
    return sum(row.get("tokens") or 0 for row in stage.metrics)


def _rate(stage: Stage, seconds: float) -> str:
    """Tokens trained or sampled per second of the stage, start-up included."""
    tokens = stage.outputs.get("tokens") or _trained(stage)
    return f"{number(float(f'{tokens / seconds:.3g}'))} tokens/s" if tokens and seconds else ""


def _about(run: Run) -> str:
    """Task, seed and models in a few words."""
    parts = [f"{run.settings['task.name']}"] if "task.name" in run.settings else []
    for who, stage in (("teacher", "teacher"), ("student", "sft")):
        outputs = run.stages[stage].outputs
        shape = outputs.get("model", {})
        if outputs.get("source"):
            parts.append(f"{who} {outputs['source'].rstrip('/').rpartition('/')[2]}")
        elif shape:
            parts.append(f"{who} {shape['num_hidden_layers']} layers × {shape['hidden_size']}")
    if "seed" in run.settings:
        parts.append(f"seed {run.settings['seed']}")
    return " · ".join(parts)


def _headline(run: Run) -> list[dict]:
    """The few figures that say how a run went."""
    found = []
    tasks = accuracy.tasks([run])
    if tasks and tasks[0] in run.results.get("opd", {}):
        task, result = tasks[0], run.results["opd"][tasks[0]]
        low, high = (f"{100 * v:.1f}" for v in result["ci95"])
        found.append(
            {"label": f"OPD accuracy, {accuracy.task_title(task)}",
             "value": f"{100 * result['accuracy']:.1f}", "unit": "%",
             "detail": f"95 % interval {low} to {high}"}
        )  # fmt: skip
        gain, control = (accuracy.difference(run, task, other) for other in ("sft", "control"))
        if gain:
            found.append(
                {"label": "Gain over SFT", "value": gain, "unit": "points",
                 "detail": f"{control} over the control" if control else ""}
            )  # fmt: skip
    if run.rollouts:
        before, after = (
            float(np.abs(np.concatenate(panels.rollout_advantages(run.rollouts, name))).mean())
            for name in ("ref_logprobs", "student_logprobs")
        )
        found.append(
            {"label": "Mean |log π_T − log π_θ|", "value": f"{before:#.2g} → {after:#.2g}",
             "unit": "nats", "detail": f"on {len(run.rollouts)} cached responses"}
        )  # fmt: skip
    there = [stage for stage in run.stages.values() if stage.state != "absent"]
    done = f"{sum(stage.state == 'complete' for stage in there)} of {len(there)}"
    seconds = sum(stage.seconds for stage in there)
    found.append(
        {"label": "Time of all stages", "value": duration(seconds), "unit": "",
         "detail": f"{done} stages complete"}
        if seconds
        else {"label": "Stages complete", "value": done, "unit": "", "detail": ""}
    )  # fmt: skip
    return found


def _failures(run: Run) -> list[dict]:
    """What stopped a training, and which records, from its failure.json."""
    found = []
    for stage in run.stages.values():
        if stage.failure:
            bad = [record for record in stage.failure["records"] if not record["finite"]]
            ids = [f"{r['prompt_id']}/{r['sample_id']}" for r in bad if "prompt_id" in r]
            found.append({**stage.failure, "stage": stage.name, "alone": len(bad), "ids": ids})
    return found


def _notices(run: Run) -> list[str]:
    """What makes the figures less than they seem."""
    found = []
    for stage in run.stages.values():
        found += notices.of_stage(stage.name, stage.outputs, stage.metrics)
    return found + notices.of_results(run.results)


def _notes(run: Run) -> list[str]:
    """What is unfinished, absent or unreadable."""
    notes = list(run.notes)
    unfinished = [s.name for s in run.stages.values() if s.state in ("unfinished", "failed")]
    absent = [name for name in _shown([run]) if run.stages[name].state == "absent"]
    if unfinished:
        notes.append(
            f"Not finished: {', '.join(unfinished)}. The command that began the run continues it."
        )
    if absent:
        notes.append(f"Not in this folder: {', '.join(absent)}.")
    if run.stages["opd"].state == "complete" and not run.rollouts:
        notes.append("opd/rollouts.jsonl is missing or empty: no rollouts to browse.")
    return notes


def _setting_groups(run: Run) -> list[tuple[str, list[tuple[str, str]]]]:
    groups: dict[str, list[tuple[str, str]]] = {"run": []}
    for name, value in run.settings.items():
        group, _, rest = name.rpartition(".")
        groups.setdefault(group or "run", []).append((rest or name, setting(value)))
    return [(group, sorted(rows)) for group, rows in groups.items() if rows]


def _setting_differences(runs: Sequence[Run]) -> list[dict]:
    names = dict.fromkeys(name for run in runs for name in run.settings)
    rows = []
    for name in names:
        values = [run.settings.get(name, "—") for run in runs]
        if any(value != values[0] for value in values):
            rows.append({"name": name, "values": [setting(value) for value in values]})
    return rows


def _script_json(data: Any) -> Markup:
    """JSON that may stand inside <script>: no "<" can close it or open a comment."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"), ensure_ascii=False)
    return Markup(text.replace("<", "\\u003c").replace("\u2028", "").replace("\u2029", ""))


def environment(folder: epath.Path) -> jinja2.Environment:
    """Templates in which everything from data is escaped, and nothing may be missing."""
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: (folder / name).read_text()),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "math": math, "title": accuracy.title}
    return environment


def _run(run: Run, colour: int, shown: Sequence[str]) -> dict:
    return {
        "label": run.label,
        "about": _about(run),
        "colour": colour,
        "headline": _headline(run),
        "failures": _failures(run),
        "notices": _notices(run),
        "notes": _notes(run),
        "cards": _stage_cards(run, shown),
        "settings": _setting_groups(run),
    }


def _versions(runs: Sequence[Run]) -> list[str]:
    manifests = [stage.manifest for run in runs for stage in run.stages.values()]
    return sorted({m.code_version for m in manifests if m})


def render(runs: Sequence[Run]) -> str:
    """The page of one run, or the comparison of several, as one HTML document."""
    opd = [panels.stage_plots(runs, "opd", running) for running in (False, True)]
    opd_plots, not_recorded = (a + b for a, b in zip(*opd, strict=True))
    training = []
    for name in (name for name in TRAINING if name != "opd"):
        shown, more = (panels.stage_plots(runs, name, running)[0] for running in (False, True))
        if shown or more:
            training.append(
                {"name": name, "does": stage_info(name).does, "plots": shown, "more": more}
            )
    advantage_plots = panels.advantage_plots(runs)
    models, details = accuracy.models(runs), accuracy.details(runs)
    responses = browse.response_data(runs, models)
    rollouts = browse.rollout_data(runs)
    # In the order of the page, which numbers its plots.
    plots = [*opd_plots, *advantage_plots]
    for stage in training:
        plots += [*stage["plots"], *stage["more"]]
    data = {
        "runs": [run.label for run in runs],
        "rollouts": rollouts,
        "evaluation": responses,
        "titles": {model: accuracy.title(model) for model in models},
        "plots": [plot.hover for plot in plots],
    }
    return (
        environment(_HERE)
        .get_template("page.html.j2")
        .render(
            css=Markup((_HERE / "page.css").read_text()),
            js=Markup((_HERE / "page.js").read_text()),
            runs=[_run(run, i % SERIES + 1, _shown(runs)) for i, run in enumerate(runs)],
            versions=_versions(runs),
            split=runs[0].split,
            control=accuracy.control_note(runs),
            models=models,
            tables=accuracy.tables(runs),
            accuracy_plots=accuracy.plots(runs),
            details=details,
            differences=_setting_differences(runs) if len(runs) > 1 else [],
            opd_plots=opd_plots,
            not_recorded=not_recorded,
            advantage_plots=advantage_plots,
            heaviest=panels.heaviest_tokens(runs[0]) if len(runs) == 1 else [],
            held_out=any(row.get("heldout") for run in runs for row in run.drift),
            training=training,
            rollout_count=(len(rollouts), sum(len(run.rollouts) for run in runs)),
            responses=responses,
            ungraded=any(row["result"].get("ungraded") for row in details),
            data=_script_json(data),
        )
    )
