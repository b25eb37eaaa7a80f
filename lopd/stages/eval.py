"""`eval`: greedy and sampled accuracy of every model of the run, with 95 % intervals."""

import json
from collections.abc import Iterable

import numpy as np

from lopd.artefacts.artefact import Artefact
from lopd.machine import processes
from lopd.machine.progress import bar, counted
from lopd.machine.storage import write_atomically
from lopd.models.decoder import Params
from lopd.sampling.engine import Request, Response
from lopd.stages import common
from lopd.stages.run import Context
from lopd.tasks import Problem, metrics

MODELS = {"teacher": "teacher", "base": "student", "sft": "student", "control": "student",
          "opd": "student", "online": "student"}  # fmt: skip
"""Models that may be there, in the order of the table, and which shape each has."""


def settings(ctx: Context) -> dict:
    """What the figures depend on."""
    settings = common.stage_settings(ctx, "eval", "task", "prompt_length", "dtype")
    return settings | common.model_settings(ctx, "student")


def inputs(ctx: Context) -> dict:
    """The models to evaluate. A base student is known by its checkpoint, or seed and shape."""
    chosen = ctx.config.eval.models
    found = {
        name: ctx.input(name).outputs["fingerprint"]
        for name in MODELS
        if name != "base" and (name in chosen or (not chosen and ctx.exists(name)))
    }
    base_is_known = ctx.config.student.checkpoint or not ctx.external("sft")
    if "base" in chosen or (not chosen and base_is_known):
        found["base"] = ctx.config.student.checkpoint or "random weights"
    return {name: found[name] for name in MODELS if name in found}


def prompts(ctx: Context) -> dict[str, tuple[list[Problem], list[Request]]]:
    """For each test set: its problems, and a request for each sample of each."""
    recipe = ctx.config.eval
    tests = ctx.task.tests(recipe.split, recipe.prompts, ctx.seed("eval problems"))
    return {
        name: common.make_requests(ctx, problems, recipe.samples)
        for name, problems in tests.items()
    }


def _params(ctx: Context, name: str) -> Params:
    if name == "base":
        return common.base_params(ctx, "student")
    return ctx.load_params(name, MODELS[name])


def _grade_one(
    ctx: Context, problems: list[Problem], responses: Iterable[Response], samples: int
) -> tuple[dict, list[dict]]:
    """Accuracy over the responses to one test set, and a line for each of them."""
    correct = np.zeros((len(problems), samples), bool)
    labels = np.full(correct.shape, None, object)
    tokens, finished, lines = 0, 0, []
    for response in responses:
        place = divmod(response.index, samples)
        problem, text = problems[place[0]], ctx.tokenizer.decode(response.tokens)
        if response.finished:
            verdict = ctx.task.grade(problem, text)
            correct[place], labels[place] = verdict.correct, verdict.label
        tokens += len(response.tokens)
        finished += response.finished
        lines.append(
            {
                "problem": place[0],
                "sample": place[1],
                "prompt": problem.prompt,
                "response": text,
                "answer": problem.answer,
                "correct": bool(correct[place]),
                "finished": response.finished,
            }
        )
    per_problem = metrics.average(correct)
    result = {
        "accuracy": float(per_problem.mean()),
        "n": correct.size,
        "ci95": list(metrics.clustered_interval(per_problem)),
        "mean_response_tokens": tokens / correct.size,
        "finished": finished / correct.size,
        **(metrics.summarize(correct, labels.tolist()) if samples > 1 else {}),
    }
    return result, sorted(lines, key=lambda line: (line["problem"], line["sample"]))


def _grade(ctx: Context, artefact: Artefact, name: str) -> dict:
    """Accuracies of one model; every response is kept in responses_NAME.jsonl."""
    tests, params = prompts(ctx), _params(ctx, name)
    total = sum(len(problems) + len(wanted) for problems, wanted in tests.values())
    results, lines = {}, []
    modes = {"greedy": (0.0, 1), "sampled": (ctx.config.eval.temperature, ctx.config.eval.samples)}
    with bar(total=total, label=f"eval {name}", unit="responses") as progress:
        for mode, (temperature, samples) in modes.items():
            sample = common.sampler(
                ctx,
                MODELS[name],
                params,
                ctx.config.eval,
                "eval sampling",
                temperature,
                responses=samples * max(len(problems) for problems, _ in tests.values()),
            )
            for test, (problems, wanted) in tests.items():
                responses = sample([r for r in wanted if r.sample_id < samples])
                result, graded = _grade_one(ctx, problems, counted(responses, progress), samples)
                results[f"{test}/{mode}"] = {**result, "temperature": temperature}
                lines += [{"test": test, "mode": mode, **line} for line in graded]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    if processes.is_main():
        write_atomically(artefact.path / f"responses_{name}.jsonl", text)
    return results


def run(ctx: Context, artefact: Artefact) -> dict:
    """Evaluates each model, remembering those an interrupted run has finished."""
    results = artefact.manifest.setdefault("results", {})
    for name in inputs(ctx):
        if name not in results:
            results[name] = _grade(ctx, artefact, name)
            artefact.save()
    summary = {"split": ctx.config.eval.split, "seed": ctx.config.seed, "models": results}
    if processes.is_main():
        write_atomically(artefact.path / "summary.json", json.dumps(summary, indent=2) + "\n")
    return {"models": list(results)}
