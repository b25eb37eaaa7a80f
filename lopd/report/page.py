"""Puts the page together: what each section shows, as plain values, for the template."""

import json
import re
from collections.abc import Sequence
from typing import Any

import jinja2
import numpy as np
from etils import epath
from markupsafe import Markup

from lopd.report import panels
from lopd.report.plots import SERIES, interval_plot
from lopd.report.reading import TRAINING, Run, Stage

_HERE = epath.resource_path("lopd") / "report"

_DOES = {
    "teacher": "writes the SFT answers, scores the rollouts",
    "sft_data": "the teacher answers the SFT prompts",
    "sft": "fine-tunes the base student: π_ref",
    "precompute": "π_ref samples, teacher and π_ref score: the cache",
    "opd": "pulls log π_θ towards log π_T on the cache",
    "control": "goes on with SFT instead of OPD",
    "heldout": "fresh T = 1 responses of π_ref, for the drift panel",
    "eval": "grades every model",
    "export": "the student as a Hugging Face checkpoint",
}
_MODELS = ("base", "sft", "control", "opd", "teacher")
_TITLES = {"base": "Base", "sft": "SFT", "control": "Control", "opd": "OPD", "teacher": "Teacher"}

# How much text the browsers may put into one page, whatever the run's size.
_ROLLOUT_TOKENS = 40_000
_RESPONSE_CHARACTERS = 500_000


def number(value: float) -> str:
    """A count or a rate with three significant digits or more: 1,234 or 1.62 M."""
    if abs(value) >= 1e9:
        return f"{value / 1e9:.2f} G"
    if abs(value) >= 1e6:
        return f"{value / 1e6:.2f} M"
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"


def duration(seconds: float) -> str:
    """47 s, 3 min 31 s, 2 h 05 min."""
    if seconds < 59.5:
        return f"{seconds:.0f} s" if seconds >= 9.5 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def signed(value: float, digits: int) -> str:
    """+1.2 or −1.2, with a true minus."""
    return f"{value:+.{digits}f}".replace("-", "−")


def setting(value: Any) -> str:
    """A setting as people write it."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "not set"}[value]
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() and abs(value) < 1e12 else f"{value:g}"
    return str(value) if value != "" else "—"


def math(text: str) -> Markup:
    """Escaped text in which π_T, π_θ and π_ref have true subscripts."""
    return Markup(re.sub(r"π_(T|θ|ref)", r"π<sub>\1</sub>", str(Markup.escape(text))))


def _leaves(stage: Stage) -> list[str]:
    """What a stage has made so far, in a few words."""
    parts = []
    if stage.name in TRAINING and stage.metrics:
        done = stage.metrics[-1]["step"]
        parts.append(
            f"{done:,} steps" if done == stage.steps else f"step {done:,} of {stage.steps or 0:,}"
        )
        tokens = sum(row.get("tokens", 0) for row in stage.metrics)
        if tokens:
            parts.append(f"{number(tokens)} tokens")
    totals = stage.outputs if "tokens" in stage.outputs else stage.manifest.get("totals")
    if totals and totals.get("responses"):
        parts.append(f"{number(totals['responses'])} responses")
        parts.append(f"{number(totals['tokens'])} tokens")
        parts.append(f"{100 * totals['finished'] / totals['responses']:.1f} % finished")
    if stage.outputs.get("source"):
        parts.append(f"from {stage.outputs['source']}")
    if stage.name == "eval" and stage.manifest.get("results"):
        parts.append(f"{len(stage.manifest['results'])} models")
    gap = stage.outputs.get("sampler_scorer_gap")
    if gap:
        parts.append(f"sampler and scorer differ by {gap['max']:.1g} nats at most")
    return [part.replace(" ", "\u00a0", 2) for part in parts]


def _reads(run: Run, stage: Stage) -> list[dict]:
    """The inputs of a stage, and whether this run's artefact of that name is what was read."""
    found = []
    for name, fingerprint in stage.manifest.get("inputs", {}).items():
        here = run.stages[name].outputs.get("fingerprint") if name in run.stages else None
        state = "elsewhere" if here is None else "same" if here == fingerprint else "changed"
        found.append({"name": name, "fingerprint": fingerprint, "state": state})
    return found


def _stage_cards(run: Run) -> list[dict]:
    total = sum(stage.manifest.get("seconds", 0) for stage in run.stages.values())
    cards = []
    for stage in run.stages.values():
        seconds = stage.manifest.get("seconds", 0)
        cards.append(
            {
                "name": stage.name,
                "does": _DOES.get(stage.name, ""),
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


def _rate(stage: Stage, seconds: float) -> str:
    """Tokens trained or sampled per second of the stage, start-up included."""
    tokens = stage.outputs.get("tokens") or sum(row.get("tokens", 0) for row in stage.metrics)
    return f"{number(float(f'{tokens / seconds:.3g}'))} tokens/s" if tokens and seconds else ""


def _tasks(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(t for run in runs for tasks in run.results.values() for t in tasks))


def _difference(run: Run, task: str, other: str) -> str:
    """OPD's accuracy minus another model's, in points."""
    try:
        values = [run.results[model][task]["accuracy"] for model in ("opd", other)]
    except KeyError:
        return ""
    return signed(100 * (values[0] - values[1]), 1)


def _accuracy(runs: Sequence[Run]) -> dict:
    """A table per task, rows (run, then) model, and the interval plots."""
    tables, plots = [], []
    for task in _tasks(runs):
        rows = []
        for number_, run in enumerate(runs):
            cells = {m: run.results[m][task] for m in _MODELS if task in run.results.get(m, {})}
            rows.append(
                {
                    "label": run.label,
                    "colour": number_ % SERIES + 1,
                    "cells": cells,
                    "over_sft": _difference(run, task, "sft"),
                    "over_control": _difference(run, task, "control"),
                }
            )
        tables.append({"task": task.replace("/", ", "), "rows": rows})
    names = [m for m in _MODELS if any(m in run.results for run in runs)]

    def points(run: Run, task: str) -> dict:
        found = {m: run.results[m][task] for m in names if task in run.results.get(m, {})}
        return {_TITLES[m]: (r["accuracy"], *r["ci95"]) for m, r in found.items()}

    rows = [_TITLES[m] for m in names]
    tasks = _tasks(runs)
    if len(runs) == 1 and tasks:
        series = [
            {"label": task.replace("/", ", "), "colour": i % SERIES + 1,
             "points": points(runs[0], task)}
            for i, task in enumerate(tasks)
        ]  # fmt: skip
        plots.append(interval_plot("accuracy", "With 95 % intervals", rows, series))
    elif tasks:
        for i, task in enumerate(tasks):
            series = [
                {"label": run.label, "colour": n % SERIES + 1, "points": points(run, task)}
                for n, run in enumerate(runs)
            ]
            title = task.replace("/", ", ").capitalize()
            plots.append(interval_plot(f"accuracy{i}", title, rows, series))
    models = [m for m in names if m in _MODELS]
    return {"tables": tables, "plots": plots, "models": models}


def _control(runs: Sequence[Run]) -> str:
    """What the control model is, with steps where one run is shown."""
    if not any("control" in run.results for run in runs):
        return ""
    control, opd = (runs[0].stages[name].steps for name in ("control", "opd"))
    if len(runs) > 1 or not control or not opd:
        return "The control went on with SFT instead of OPD."
    return f"The control went on with SFT for {control:,} steps, where OPD took {opd:,}."


def _evaluation_details(runs: Sequence[Run]) -> list[dict]:
    """Everything else that eval recorded, a row a (run, model, task)."""
    rows = []
    for run in runs:
        for model in [m for m in _MODELS if m in run.results]:
            for task, result in run.results[model].items():
                more = [
                    f"{name} {100 * value['value']:.1f} [{100 * value['ci95'][0]:.1f}, "
                    f"{100 * value['ci95'][1]:.1f}]"
                    for name, value in result.items()
                    if isinstance(value, dict)
                ]
                rows.append(
                    {"run": run.label, "model": _TITLES[model], "task": task.replace("/", ", "),
                     "result": result, "more": more}
                )  # fmt: skip
    return rows


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
    tasks = _tasks([run])
    if tasks and tasks[0] in run.results.get("opd", {}):
        task, result = tasks[0], run.results["opd"][tasks[0]]
        low, high = (f"{100 * v:.1f}" for v in result["ci95"])
        found.append(
            {"label": f"OPD accuracy, {task.replace('/', ', ')}",
             "value": f"{100 * result['accuracy']:.1f}", "unit": "%",
             "detail": f"95 % interval {low} to {high}"}
        )  # fmt: skip
        gain, control = (_difference(run, task, other) for other in ("sft", "control"))
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
             "unit": "nats", "detail": f"before and after on {len(run.rollouts)} cached responses"}
        )  # fmt: skip
    there = [stage for stage in run.stages.values() if stage.state != "absent"]
    done = f"{sum(stage.state == 'complete' for stage in there)} of {len(there)}"
    seconds = sum(stage.manifest.get("seconds", 0) for stage in there)
    found.append(
        {"label": "Time of all stages", "value": duration(seconds), "unit": "",
         "detail": f"{done} stages complete"}
        if seconds
        else {"label": "Stages complete", "value": done, "unit": "", "detail": ""}
    )  # fmt: skip
    return found


def _notes(run: Run) -> list[str]:
    """What is unfinished, absent or unreadable."""
    notes = list(run.notes)
    unfinished = [s.name for s in run.stages.values() if s.state == "unfinished"]
    absent = [s.name for s in run.stages.values() if s.state == "absent"]
    if unfinished:
        notes.append(
            f"Not finished: {', '.join(unfinished)}. The command that began the run continues it."
        )
    if absent:
        notes.append(f"Not in this folder: {', '.join(absent)}.")
    if run.stages["opd"].state == "complete" and not run.rollouts:
        notes.append("opd/rollouts.jsonl is missing: no rollouts to browse.")
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


def _rollout_data(runs: Sequence[Run]) -> list[dict]:
    """The rollouts of every run as the browser reads them, whole ones up to a number of tokens."""
    found = []
    for index, run in enumerate(runs):
        budget = _ROLLOUT_TOKENS // len(runs)
        for rollout in run.rollouts:
            budget -= len(rollout["tokens"])
            if budget < 0 and found and found[-1]["run"] == index:
                break
            found.append(
                {
                    "run": index,
                    "id": f"{rollout['prompt_id']}"
                    + (f".{rollout['sample_id']}" if rollout["sample_id"] else ""),
                    "prompt": rollout["prompt"],
                    "tokens": rollout["tokens"],
                    "finished": rollout["finished"],
                    "teacher": [round(v, 3) for v in rollout["teacher_logprobs"]],
                    "before": [round(v, 3) for v in rollout["ref_logprobs"]],
                    "after": [round(v, 3) for v in rollout["student_logprobs"]],
                }
            )
    return found


def _response_data(runs: Sequence[Run]) -> dict:
    """Evaluation problems with every model's first response, up to a number of characters."""
    problems, modes = [], dict.fromkeys(())
    for index, run in enumerate(runs):
        by_problem: dict[tuple[str, int], dict] = {}
        for model in [m for m in _MODELS if m in run.responses]:
            for row in run.responses[model]:
                modes.setdefault(row["mode"])
                test = row.get("test", "")
                problem = by_problem.setdefault(
                    (test, row["problem"]),
                    {"run": index, "test": test, "prompt": row["prompt"],
                     "answer": row["answer"], "models": {}},
                )  # fmt: skip
                problem["models"].setdefault(model, {})[row["mode"]] = [
                    row["response"], row["correct"], row["finished"]
                ]  # fmt: skip
        budget = _RESPONSE_CHARACTERS // len(runs)
        # The first problems of every test set, so that none is left out.
        for place in sorted(by_problem, key=lambda place: (place[1], place[0])):
            budget -= len(json.dumps(by_problem[place]))
            if budget < 0:
                break
            problems.append(by_problem[place])
    models = [m for m in _MODELS if any(m in problem["models"] for problem in problems)]
    tests = list(dict.fromkeys(problem["test"] for problem in problems))
    return {"problems": problems, "modes": list(modes), "models": models, "tests": tests}


def _script_json(data: Any) -> Markup:
    """JSON that may stand inside <script>: no "<" can close it or open a comment."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"), ensure_ascii=False)
    return Markup(text.replace("<", "\\u003c").replace("\u2028", "").replace("\u2029", ""))


def render(runs: Sequence[Run]) -> str:
    """The page of one run, or the comparison of several, as one HTML document."""
    opd_plots, not_recorded = panels.stage_plots(runs, "opd")
    training = []
    for name in ("teacher", "sft", "control"):
        plots, _ = panels.stage_plots(runs, name)
        if plots:
            shown = {"plots": plots[:3], "more": plots[3:]}
            training.append({"name": name, "does": _DOES[name], **shown})
    advantage = panels.advantage_plots(runs)
    responses = _response_data(runs)
    rollouts = _rollout_data(runs)
    plots = [*opd_plots, *advantage]
    for stage in training:
        plots += [*stage["plots"], *stage["more"]]
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: (_HERE / name).read_text()),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "math": math}
    environment.globals["titles"] = _TITLES
    return environment.get_template("page.html.j2").render(
        css=Markup((_HERE / "page.css").read_text()),
        js=Markup((_HERE / "page.js").read_text()),
        runs=[
            {
                "label": run.label,
                "about": _about(run),
                "colour": i % SERIES + 1,
                "headline": _headline(run),
                "notes": _notes(run),
                "cards": _stage_cards(run),
                "settings": _setting_groups(run),
            }
            for i, run in enumerate(runs)
        ],
        split=runs[0].split,
        control=_control(runs),
        versions=sorted(
            {
                s.manifest["code_version"]
                for r in runs
                for s in r.stages.values()
                if s.manifest.get("code_version")
            }
        ),
        accuracy=_accuracy(runs),
        details=_evaluation_details(runs),
        differences=_setting_differences(runs) if len(runs) > 1 else [],
        opd_plots=opd_plots,
        not_recorded=not_recorded,
        advantage_plots=advantage,
        heaviest=panels.heaviest_tokens(runs[0]) if len(runs) == 1 else [],
        held_out=any(row.get("heldout") for run in runs for row in run.drift),
        training=training,
        rollout_count=(len(rollouts), sum(len(run.rollouts) for run in runs)),
        responses=responses,
        data=_script_json(
            {
                "runs": [run.label for run in runs],
                "rollouts": rollouts,
                "evaluation": responses,
                "titles": _TITLES,
                "plots": [plot.hover for plot in plots],
            }
        ),
    )
