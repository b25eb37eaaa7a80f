"""`teacher` (tiny runs only): trains a teacher on worked answers.

Where no teacher can be downloaded, this stands in for one. Real runs set `teacher.checkpoint`.
"""

from collections.abc import Sequence

import numpy as np

from lopd.artefacts.artefact import Artefact
from lopd.config.catalogue import TEACHER
from lopd.data.tokenizers import Tokenizer
from lopd.errors import UserError
from lopd.objectives.sampled import cross_entropy
from lopd.stages import training
from lopd.stages.identity import stage_settings, task_settings
from lopd.stages.run import Run
from lopd.stages.stage import Stage
from lopd.stages.weights import base_params
from lopd.tasks import Problem, Task


class WorkedAnswers:
    """Random access to worked answers as training records."""

    def __init__(self, problems: Sequence[Problem], task: Task, tokenizer: Tokenizer):
        self._problems, self._task, self._tokenizer = problems, task, tokenizer

    def __len__(self) -> int:
        return len(self._problems)

    def __getitem__(self, index: int) -> dict:
        problem = self._problems[index]
        response = [*self._tokenizer.encode(problem.response), self._tokenizer.end_id]
        return {
            "prompt_id": problem.problem_id,
            "sample_id": 0,
            "prompt_tokens": np.asarray(self._task.encode(problem, self._tokenizer), np.int32),
            "response_tokens": np.asarray(response, np.int32),
        }


def _worked_answers(run: Run) -> WorkedAnswers:
    recipe = run.settings.teacher
    seed = run.seed("teacher problems")
    problems = run.task.worked_answers(recipe.problems, seed, recipe.swapped)
    if problems is None:
        raise UserError(
            f"the stage teacher trains on worked answers, which task.name={run.task.name!r} has "
            "not: name a teacher in teacher.checkpoint"
        )
    return WorkedAnswers(problems, run.task, run.tokenizer)


def settings(run: Run) -> dict:
    """The settings that the trained teacher depends on."""
    return stage_settings(run, "teacher", "dtype") | task_settings(run)


def inputs(run: Run) -> dict:
    """Nothing."""
    del run
    return {}


def train(run: Run, artefact: Artefact) -> dict:
    """Trains it from scratch."""
    recipe = run.settings.teacher
    batches = training.make_batches(run, _worked_answers(run), recipe, "teacher")
    objective, params = cross_entropy(recipe.label_smoothing), base_params(run, TEACHER)
    trained = training.train_into(run, artefact, TEACHER, params, batches, objective, recipe)
    return trained.outputs


stage = Stage(settings, inputs, train, read_prompts=_worked_answers)
