"""Verifiable tasks: problems, worked-out answers where there are any, and exact graders."""

from collections.abc import Iterator
from typing import Protocol

import ml_collections

from lopd.data.tokenizers import Tokenizer
from lopd.errors import UserError
from lopd.tasks.metrics import Verdict


class Problem(Protocol):
    """What every task's problems have."""

    problem_id: int
    """Below 2^32; with the sample number it determines the random key."""


class Task(Protocol):
    """What the stages ask of a task."""

    name: str

    def problems(self, split: str, count: int, seed: int) -> Iterator[Problem]:
        """`count` problems to train on, of the split "sft" or "opd", drawn with a seed."""

    def tests(self, split: str, count: int, seed: int) -> dict[str, list[Problem]]:
        """Named sets of at most `count` problems to evaluate on, of the split "dev" or "test"."""

    def encode(self, problem: Problem, tokenizer: Tokenizer) -> list[int]:
        """The prompt's token ids."""

    def grade(self, problem: Problem, response: str) -> Verdict:
        """Whether a response that ended by itself is right."""


def make_task(settings: ml_collections.ConfigDict) -> Task:
    """The task that the settings name.

    Raises:
      UserError: for an unknown name.
    """
    # Imported here: each brings its own requirements.
    if settings.name == "addition":
        from lopd.tasks.addition import Addition

        return Addition(settings.digits)
    if settings.name == "math":
        from lopd.tasks.prompts import Math

        return Math(settings)
    raise UserError(f"task.name={settings.name!r} must be 'addition' or 'math'")
