"""Verifiable tasks: problems, worked answers where there are any, and exact graders.

To add a task: a module with its problems or its grader, and its line in `make_task`. Prompts from
files come with `lopd.tasks.prompts.PromptTask`, so that a task may be a grader alone; answers that
are to be run need `lopd.tasks.sandbox`.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from lopd.config.settings import TaskSettings
from lopd.data.sources import Messages
from lopd.data.tokenizers import Tokenizer
from lopd.errors import UserError


@dataclasses.dataclass(frozen=True)
class Problem:
    """One problem, of any task."""

    problem_id: int
    """Below 2^32; with the sample number it determines the random key."""
    messages: Messages
    """The turns before the assistant's."""
    reference: Any = None
    """For its task's grader, which alone reads this, to compare with."""
    response: str | None = None
    """A worked answer, or the response that came with the prompt."""

    @property
    def prompt(self) -> str:
        """The text of the last turn."""
        return self.messages[-1]["content"]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Whether an answer is right."""

    correct: bool
    """False too if there is no verdict."""
    label: str | None
    """Equal answers share it; None: there is no answer."""
    ungraded: bool = False
    """The grader came to no end, so that `correct` is False for want of a verdict."""


class Task(Protocol):
    """The calls that stages make of a task."""

    name: str
    """As `task.name` has it."""

    def problems(self, split: str, count: int | None, seed: int) -> Iterable[Problem]:
        """Problems to train on, of the split "sft" or "opd": `count` drawn with a seed, or all."""

    def tests(self, split: str, count: int | None, seed: int) -> dict[str, list[Problem]]:
        """Named sets to evaluate on, of the split "dev" or "test", each of at most `count`."""

    def worked_answers(
        self, count: int | None, seed: int, swapped: float
    ) -> Sequence[Problem] | None:
        """Problems with a right answer as their response, made when they are read.

        They train a teacher from scratch, and no other split shares a problem with them. None for a
        task that knows no worked answers.

        Args:
          count: how many are drawn with the seed; None: all.
          seed: of the draw.
          swapped: share of an answer's steps that are written the other way round, for teachers
            that differ in style.
        """

    def encode(self, problem: Problem, tokenizer: Tokenizer) -> list[int]:
        """The prompt's token ids."""

    def grade(self, problem: Problem, response: str) -> Verdict:
        """Whether a response that ended by itself is right.

        Before any work it is called with an empty one for each problem.

        Raises:
          UserError: whatever the response, if the problem's reference cannot be compared with.
        """

    def answer_text(self, problem: Problem) -> str:
        """The reference as people read it; empty if there is none."""


def make_task(settings: TaskSettings) -> Task:
    """The task that the settings name.

    Raises:
      UserError: for an unknown name.
    """
    # Imported here: each brings its own requirements.
    if settings.name == "addition":
        from lopd.tasks.addition import Addition

        return Addition(settings.digits)
    if settings.name == "math":
        from lopd.tasks.math_grader import MathGrader
        from lopd.tasks.prompts import PromptTask

        return PromptTask("math", settings, MathGrader().grade)
    raise UserError(f"task.name={settings.name!r} must be 'addition' or 'math'")
