"""`eval`: greedy and sampled accuracy of every model of the run, with 95 % intervals."""

import json

import numpy as np

from lopd import parallel, shutdown
from lopd.artefact import Artefact, write_atomically
from lopd.context import Context
from lopd.models.qwen3 import Params
from lopd.progress import bar
from lopd.sampling.engine import Request
from lopd.stages import common
from lopd.tasks import Problem, metrics

MODELS = {"teacher": "teacher", "base": "student", "sft": "student", "control": "student",
          "opd": "student"}  # fmt: skip
"""Models that may be there, in the order of the table, and which shape each has."""


def settings(ctx: Context) -> dict:
    """What the figures depend on."""
    settings = common.stage_settings(ctx, "eval", "task", "prompt_length", "dtype")
    return settings | common.model_settings(ctx, "student")


def inputs(ctx: Context) -> dict:
    """The models that are there. A base student is known by its checkpoint, or seed and shape."""
    found = {name: ctx.input(name).outputs["fingerprint"] for name in MODELS if ctx.exists(name)}
    if ctx.config.student.checkpoint or not ctx.external("sft"):
        found["base"] = ctx.config.student.checkpoint or "random weights"
    return {name: found[name] for name in MODELS if name in found}


def prompts(ctx: Context) -> tuple[list[Problem], list[Request]]:
    """The problems of the evaluation split, and a request for each sample of each."""
    recipe = ctx.config.eval
    problems = ctx.task.problems(recipe.split, recipe.prompts, ctx.seed("eval problems"))
    return common.make_requests(ctx, problems, recipe.samples)


def _params(ctx: Context, name: str) -> Params:
    if name == "base":
        return common.base_params(ctx, "student")
    return ctx.load_params(name, MODELS[name])


def _grade(ctx: Context, artefact: Artefact, name: str) -> dict:
    """Accuracies of one model; every response is kept in responses_NAME.jsonl."""
    problems, wanted = prompts(ctx)
    params = _params(ctx, name)
    greedy = [r for r in wanted if r.sample_id == 0]
    modes = {"greedy": (0.0, greedy), "sampled": (ctx.config.eval.temperature, wanted)}
    progress = bar(total=len(greedy) + len(wanted), label=f"eval {name}", unit="responses")
    results, lines = {}, []
    for mode, (temperature, requests) in modes.items():
        sample = common.sampler(
            ctx, MODELS[name], params, ctx.config.eval, "eval sampling", temperature
        )
        shape = (len(problems), len(requests) // len(problems))
        correct, labels = np.zeros(shape, bool), np.full(shape, None, object)
        tokens, finished = 0, 0
        for response in sample(requests):
            shutdown.check()
            place = divmod(response.index, shape[1])
            problem = problems[place[0]]
            text = ctx.tokenizer.decode(response.tokens)
            if response.finished:
                verdict = ctx.task.grade(problem, text)
                correct[place], labels[place] = verdict.correct, verdict.label
            tokens += len(response.tokens)
            finished += response.finished
            lines.append(
                {
                    "mode": mode,
                    "problem": place[0],
                    "sample": place[1],
                    "prompt": problem.prompt,
                    "response": text,
                    "answer": problem.answer,
                    "correct": bool(correct[place]),
                    "finished": response.finished,
                }
            )
            progress.update()
        per_problem = metrics.average(correct)
        results[f"{ctx.task.name}/{mode}"] = {
            "accuracy": float(per_problem.mean()),
            "n": correct.size,
            "ci95": list(metrics.clustered_interval(per_problem)),
            "temperature": temperature,
            "mean_response_tokens": tokens / correct.size,
            "finished": finished / correct.size,
            **(metrics.summarize(correct, labels.tolist()) if shape[1] > 1 else {}),
        }
    progress.close()
    lines.sort(key=lambda line: (line["mode"], line["problem"], line["sample"]))
    text = "".join(json.dumps(line) + "\n" for line in lines)
    if parallel.is_main():
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
    if parallel.is_main():
        write_atomically(artefact.path / "summary.json", json.dumps(summary, indent=2) + "\n")
    return {"models": list(results)}
