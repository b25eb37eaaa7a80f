"""`eval`: greedy and sampled accuracy of every model of the run, with 95 % intervals."""

import json
import math

from lopd.artefact import Artefact, write_atomically
from lopd.context import Context
from lopd.models.qwen3 import Params
from lopd.progress import bar
from lopd.sampling.engine import Request
from lopd.stages import common
from lopd.tasks.addition import Problem

MODELS = {"teacher": "teacher", "base": "student", "sft": "student", "control": "student",
          "opd": "student"}  # fmt: skip
"""Models that may be there, in the order of the table, and which shape each has."""


def settings(ctx: Context) -> dict:
    """What the figures depend on."""
    return common.stage_settings(ctx, "eval", "task", "student", "prompt_length", "response_length")


def inputs(ctx: Context) -> dict:
    """The models that are there. The base student needs none: seed and shape determine it."""
    return {
        name: "initial" if name == "base" else ctx.input(name).outputs["fingerprint"]
        for name in MODELS
        if name == "base" or ctx.exists(name)
    }


def prompts(ctx: Context) -> tuple[list[Problem], list[Request]]:
    """The problems of the evaluation split, one request each."""
    recipe = ctx.config.eval
    problems = ctx.task.problems(recipe.split, recipe.prompts, ctx.seed("eval problems"))
    return common.make_requests(ctx, problems)


def wilson_interval(successes: int, count: int) -> list[float]:
    """The 95 % Wilson score interval of a proportion of independent trials."""
    z = 1.959964
    center = (successes + z**2 / 2) / (count + z**2)
    spread = z / (count + z**2) * math.sqrt(successes * (count - successes) / count + z**2 / 4)
    return [max(0.0, center - spread), min(1.0, center + spread)]


def _params(ctx: Context, name: str) -> Params:
    if name == "base":
        return common.base_params(ctx, "student")
    return ctx.load_params(name, MODELS[name])


def _grade(ctx: Context, artefact: Artefact, name: str) -> dict:
    """Accuracies of one model; every response is kept in responses_NAME.jsonl."""
    problems, wanted = prompts(ctx)
    params = _params(ctx, name)
    modes = {"greedy": 0.0, "sampled": ctx.config.eval.temperature}
    tasks, lines = {}, []
    progress = bar(total=len(modes) * len(wanted), label=f"eval {name}", unit="responses")
    for mode, temperature in modes.items():
        correct, tokens, finished = 0, 0, 0
        sample = common.sampler(ctx, MODELS[name], params, temperature, "eval sampling")
        for response in sample(wanted):
            progress.update()
            problem = problems[response.index]
            text = ctx.tokenizer.decode(response.tokens)
            right = response.finished and ctx.task.grade(problem, text)
            correct += right
            tokens += len(response.tokens)
            finished += response.finished
            lines.append(
                {
                    "mode": mode,
                    "prompt_id": problem.problem_id,
                    "prompt": problem.prompt,
                    "response": text,
                    "answer": problem.answer,
                    "correct": right,
                    "finished": response.finished,
                }
            )
        tasks[f"{ctx.task.name}/{mode}"] = {
            "accuracy": correct / len(wanted),
            "n": len(wanted),
            "ci95": wilson_interval(correct, len(wanted)),
            "temperature": temperature,
            "mean_response_tokens": tokens / len(wanted),
            "finished": finished / len(wanted),
        }
    progress.close()
    lines.sort(key=lambda line: (line["mode"], line["prompt_id"]))
    text = "".join(json.dumps(line) + "\n" for line in lines)
    write_atomically(artefact.path / f"responses_{name}.jsonl", text)
    return tasks


def run(ctx: Context, artefact: Artefact) -> dict:
    """Evaluates each model, remembering those an interrupted run has finished."""
    results = artefact.manifest.setdefault("results", {})
    for name in inputs(ctx):
        if name not in results:
            results[name] = _grade(ctx, artefact, name)
            artefact.save()
    summary = {"split": ctx.config.eval.split, "seed": ctx.config.seed, "models": results}
    write_atomically(artefact.path / "summary.json", json.dumps(summary, indent=2) + "\n")
    return {"models": list(results)}
