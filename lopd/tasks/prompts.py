"""A task whose prompts are in files or datasets, and whose grader is handed in.

What a source may be, and its columns, is in `lopd.data.sources`. The answer column becomes each
problem's reference, the response column its response.
"""

from collections.abc import Callable, Iterator
from typing import Any

from lopd.config.settings import TaskSettings
from lopd.data.sources import Example, fill_prompt, final_answer, load_examples, source_name
from lopd.data.tokenizers import Tokenizer
from lopd.errors import UserError
from lopd.tasks import Problem, Verdict


def _to_problem(problem_id: int, example: Example, template: str) -> Problem:
    last = example.messages[-1]
    asked = {**last, "content": fill_prompt(template, last["content"])}
    messages = (*example.messages[:-1], asked)
    answer = None if example.answer is None else final_answer(example.answer)
    return Problem(problem_id, messages, answer, example.response)


def load_tests(source: str, template: str) -> list[Problem]:
    """The problems of a source (see `lopd.data.sources`), in its order, each with its answer.

    Raises:
      UserError: if the source cannot be read, or a problem has no answer.
    """
    problems = []
    for i, example in enumerate(load_examples(source)):
        if example.answer is None:
            text = example.messages[-1]["content"]
            raise UserError(f"{source}: problem {i} ({text[:40]!r}…) has no answer to grade by")
        problems.append(_to_problem(i, example, template))
    return problems


class PromptTask:
    """Problems of files or datasets: `task.sft_prompts`, `opd_prompts` and `problems`.

    `task.problems` may name several sources, separated by commas.

    Args:
      name: of the task.
      settings: where the prompts are, and what is put around them.
      grade: (reference, response) → verdict.
    """

    def __init__(self, name: str, settings: TaskSettings, grade: Callable[[Any, str], Verdict]):
        self.name = name
        self._settings = settings
        self._grade = grade

    def _source(self, key: str) -> str:
        source = getattr(self._settings, key)
        if not source:
            raise UserError(
                f"task.{key} is not set: a JSONL or Parquet file, hf:OWNER/NAME, or a TFDS name"
            )
        return source

    def problems(self, split: str, count: int | None, seed: int) -> Iterator[Problem]:
        """The prompts of a source: `count` drawn with the seed, or all, in order.

        Raises:
          UserError: if the source is not set or cannot be read.
        """
        examples = load_examples(self._source(f"{split}_prompts"), count=count, seed=seed)
        for i, example in enumerate(examples):
            yield _to_problem(i, example, self._settings.prompt)

    def tests(self, split: str, count: int | None, seed: int) -> dict[str, list[Problem]]:
        """The first `count` problems of every source, or all, by the name of its file.

        Raises:
          UserError: if a source is not set or cannot be read, or two have the same name.
        """
        del split, seed
        tests = {}
        for source in self._source("problems").split(","):
            name = source_name(source)
            if name in tests:
                raise UserError(f"task.problems={self._settings.problems}: two are called {name}")
            tests[name] = load_tests(source, self._settings.prompt)[:count]
        return tests

    def worked_answers(self, count: int | None, seed: int, swapped: float) -> None:
        """None: what came with the prompts is what SFT learns from, not a teacher."""
        del count, seed, swapped

    def encode(self, problem: Problem, tokenizer: Tokenizer) -> list[int]:
        """The prompt in the checkpoint's chat template."""
        return tokenizer.render(problem.messages, thinking=self._settings.thinking)

    def grade(self, problem: Problem, response: str) -> Verdict:
        """The grader's verdict on a response."""
        return self._grade(problem.reference, response)

    def answer_text(self, problem: Problem) -> str:
        """The answer as its source has it."""
        return problem.reference or ""
