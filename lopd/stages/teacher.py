"""`teacher` (tiny runs only): trains a teacher on ground-truth worked answers.

Where no teacher can be downloaded, this stands in for one. Real runs set `teacher.checkpoint`.
"""

import numpy as np

from lopd.artefacts.artefact import Artefact
from lopd.objectives.sampled import cross_entropy
from lopd.stages.common import base_params, make_batches, stage_settings, train_into
from lopd.stages.run import Context


class WorkedAnswers:
    """Random access to the task's worked answers as training records."""

    def __init__(self, ctx: Context, split: str, count: int):
        self._task, self._tokenizer = ctx.task, ctx.tokenizer
        self._swapped = ctx.config.teacher.swapped
        self._ids = self._task.split_ids(split, count, ctx.seed(f"{split} problems"))

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> dict:
        problem = self._task.problem(int(self._ids[index]), self._swapped)
        response = [*self._tokenizer.encode(problem.solution), self._tokenizer.end_id]
        return {
            "prompt_id": problem.problem_id,
            "sample_id": 0,
            "prompt_tokens": np.asarray(self._tokenizer.encode(problem.prompt), np.int32),
            "response_tokens": np.asarray(response, np.int32),
        }


def settings(ctx: Context) -> dict:
    """What the trained teacher depends on."""
    return stage_settings(ctx, "teacher", "task", "dtype")


def inputs(ctx: Context) -> dict:
    """Nothing."""
    return {}


def run(ctx: Context, artefact: Artefact) -> dict:
    """Trains it from scratch."""
    recipe = ctx.config.teacher
    answers = WorkedAnswers(ctx, "teacher", recipe.problems)
    batches = make_batches(ctx, answers, recipe, "teacher")
    objective = cross_entropy(recipe.label_smoothing)
    params = base_params(ctx, "teacher")
    return train_into(ctx, artefact, "teacher", params, batches, objective, recipe)
