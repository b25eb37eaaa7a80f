"""`eval`: greedy and sampled accuracy of every model of the run, with 95 % intervals."""

import dataclasses
import json
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import tqdm

from lopd.artefacts.artefact import Artefact
from lopd.config.catalogue import BASE, CATALOGUE, STUDENT, stage_info
from lopd.errors import UserError
from lopd.machine import processes
from lopd.machine.progress import bar, counted
from lopd.machine.storage import write_atomically
from lopd.models.decoder import Params
from lopd.rollouts.requests import PromptSet
from lopd.sampling.cut import CutCounter
from lopd.sampling.engine import Response
from lopd.stages import identity
from lopd.stages.card import add_accuracies
from lopd.stages.origins import Adopted
from lopd.stages.run import Run
from lopd.stages.scored import sampler_plan
from lopd.stages.stage import Stage
from lopd.stages.weights import base_params, load_params
from lopd.tasks import Problem, metrics


def _shapes() -> dict[str, str]:
    """Models that may be there, in the order of the table, and which shape each has."""
    shapes = {info.name: info.trains for info in CATALOGUE if info.trains}
    teachers = {name: which for name, which in shapes.items() if which != STUDENT}
    return {**teachers, BASE: STUDENT, **shapes}


def settings(run: Run) -> dict:
    """The settings that accuracies depend on."""
    settings = identity.stage_settings(run, "eval", "prompt_length", "dtype")
    settings |= identity.task_settings(run, "problems") | identity.sampling_settings(run)
    return settings | identity.model_settings(run, STUDENT)


def reads(run: Run) -> list[str]:
    """The stages whose models it evaluates: the chosen ones, or those that are there."""
    chosen = run.settings.eval.models
    names = [name for name in _shapes() if name != BASE]
    return [name for name in names if (run.exists(name) if chosen is None else name in chosen)]


def inputs(run: Run) -> dict:
    """The models to evaluate. A base student is known by its checkpoint, or seed and shape."""
    chosen = run.settings.eval.models
    found = {name: run.input(name).outputs["fingerprint"] for name in reads(run)}
    checkpoint = run.base_checkpoint
    base_is_known = checkpoint or not isinstance(run.origin("sft"), Adopted)
    if base_is_known if chosen is None else BASE in chosen:
        found[BASE] = checkpoint or "random weights"
    return {name: found[name] for name in _shapes() if name in found}


def prompts(run: Run) -> dict[str, PromptSet]:
    """For each test set its problems.

    Raises:
      UserError: if a source cannot be read, or its answers cannot be graded on this machine.
    """
    tests = run.prompts.tests
    _check_references(run, tests)
    return tests


def _check_references(run: Run, tests: dict[str, PromptSet]) -> None:
    """Grades no answer to each problem: shows whether the grader works and reads its reference."""
    total = sum(len(test.problems) for test in tests.values())
    with bar(total=total, label="answers", unit="references", delay=2) as progress:
        for name, test in tests.items():
            for number, problem in enumerate(counted(test.problems, progress)):
                try:
                    run.task.grade(problem, "")
                except UserError as error:
                    raise UserError(
                        f"{name}, problem {number} ({problem.prompt[:40]!r}…): {error}"
                    ) from error


def check(run: Run, stages: tuple[str, ...]) -> None:
    """Refuses responses that run past the positions a model was made for.

    Beyond `max_position_embeddings` there are rotary angles that no training has shown the model,
    so accuracies would fall for a reason that has nothing to do with the method.

    Raises:
      UserError: naming the model and what would fit.
    """
    if Artefact(run.home("eval")).complete:
        return
    longest = run.settings.prompt_length + run.settings.eval.response_length
    wanted = run.settings.eval.models
    for name, which in _shapes().items():
        there = name == BASE or name in stages or run.exists(name)
        there = there or isinstance(run.origin(name), Adopted)
        if not (there if wanted is None else name in wanted):
            continue
        limit = run.model(which).max_position_embeddings
        if longest > limit:
            raise UserError(
                f"prompt_length + eval.response_length = {longest} is more than the {which}'s "
                f"max_position_embeddings={limit}: set eval.response_length to "
                f"{limit - run.settings.prompt_length} or less"
            )


def _params(run: Run, name: str) -> Params:
    return base_params(run, STUDENT) if name == BASE else load_params(run, name)


def _grade_one(
    run: Run, problems: Sequence[Problem], responses: Iterable[Response], samples: int
) -> tuple[dict, list[dict]]:
    """Accuracy over the responses to one test set, and a line for each of them."""
    correct, ungraded = np.zeros((2, len(problems), samples), bool)
    labels = np.full(correct.shape, None, object)
    tokens, finished, lines = 0, 0, []
    for response in responses:
        place = divmod(response.index, samples)
        problem, text = problems[place[0]], run.tokenizer.decode(response.tokens)
        if response.finished:
            verdict = run.task.grade(problem, text)
            correct[place], labels[place] = verdict.correct, verdict.label
            ungraded[place] = verdict.ungraded
        tokens += len(response.tokens)
        finished += response.finished
        lines.append(
            {
                "problem": place[0],
                "sample": place[1],
                "prompt": problem.prompt,
                "response": text,
                "answer": run.task.answer_text(problem),
                "correct": bool(correct[place]),
                "ungraded": bool(ungraded[place]),
                "finished": response.finished,
            }
        )
    figures = metrics.summarize(correct, labels.tolist(), ungraded)
    average = figures[f"avg@{samples}"]
    result = {
        "accuracy": average["value"],
        "n": int((~ungraded).sum()),
        "ci95": average["ci95"],
        "mean_response_tokens": tokens / correct.size,
        "finished": finished / correct.size,
        **(figures if samples > 1 else {"ungraded": figures["ungraded"]}),
    }
    return result, sorted(lines, key=lambda line: (line["problem"], line["sample"]))


def _watched(responses: Iterable[Response], progress: tqdm.tqdm) -> Iterator[Response]:
    """The responses to one test set; the bar says when many are cut."""
    counter = CutCounter(progress)
    for response in responses:
        counter.add(response.finished)
        yield response


def _responses(name: str) -> str:
    return f"responses_{name}.jsonl"


def _grade(run: Run, artefact: Artefact, name: str) -> dict:
    """Accuracies of one model; every response is kept in responses_NAME.jsonl."""
    tests, params, recipe = run.prompts.tests, _params(run, name), run.settings.eval
    which = STUDENT if name == BASE else stage_info(name).trains
    greedy = dataclasses.replace(recipe, temperature=0.0, samples=1)
    modes = {"greedy": greedy, "sampled": recipe}
    problems = [len(test.problems) for test in tests.values()]
    results, lines = {}, []
    total = sum(problems) * sum(mode.samples for mode in modes.values())
    with bar(total=total, label=f"eval {name}", unit="responses") as progress:
        for mode, section in modes.items():
            plan = sampler_plan(run, which, section, "eval sampling")
            sample = plan.make(params, responses=section.samples * max(problems))
            for test, asked in tests.items():
                answers = _watched(sample(asked.requests(section.samples)), progress)
                responses = counted(answers, progress)
                result, graded = _grade_one(run, asked.problems, responses, section.samples)
                if not result["n"]:
                    raise UserError(
                        f"the grader gave no verdict on any of {result['ungraded']} answers to "
                        f"{test}: it is killed, or has no memory or time, on this machine"
                    )
                results[f"{test}/{mode}"] = {**result, "temperature": section.temperature}
                lines += [{"test": test, "mode": mode, **line} for line in graded]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    if processes.is_main():
        write_atomically(artefact.path / _responses(name), text)
        artefact.list_file(_responses(name))
    return results


def evaluate(run: Run, artefact: Artefact) -> dict:
    """Evaluates each model, remembering those an interrupted run has finished."""
    results = artefact.manifest.results
    for name in inputs(run):
        if name not in results or not artefact.lists(_responses(name)):
            results[name] = _grade(run, artefact, name)
            artefact.save()
    summary = {"split": run.settings.eval.split, "seed": run.settings.seed, "models": results}
    if processes.is_main():
        write_atomically(artefact.path / "summary.json", json.dumps(summary, indent=2) + "\n")
    if "opd" in results:
        add_accuracies(run)
    return {"models": list(results)}


stage = Stage(settings, inputs, evaluate, check=check, read_prompts=prompts, reads=reads)
