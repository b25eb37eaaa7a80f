"""Column addition with the working shown: a task small models get wrong in honest ways.

A problem asks for the sum of two numbers of equal length. A worked answer adds column by column
from the right, carries in the open, and then reads the digits back from the left::

    What is 357+846?
    7+6=13, 5+4+1=10, 3+8+1=12, so 1203.

A slip in one column, a forgotten carry or a misread digit spoils the result, and each of those is
one token that a teacher can point at. A column may be written the other way round, with the carry
first: 1+4+5=10. Teachers of equal skill may differ in how often they do so.
"""

import dataclasses
import re
from collections.abc import Iterator

import numpy as np

from lopd.data.tokenizers import Tokenizer
from lopd.errors import UserError
from lopd.tasks import Problem, Verdict

# Disjoint regions of the space of problems, as fractions. `dev` is for tuning settings,
# `test` for reported figures.
SPLITS = {
    "teacher": (0.0, 0.5),
    "sft": (0.5, 0.6),
    "opd": (0.6, 0.9),
    "dev": (0.9, 0.95),
    "test": (0.95, 1.0),
}
_SPLIT_SEED = 20260413  # fixed for ever: a problem never changes its split

_ANSWER = re.compile(r"so (\d+)\.$")


def _worked_solution(left: int, right: int, swapped: np.ndarray) -> str:
    """The answer to left + right; `swapped` says of each column, from the right, if 1 is first."""
    columns, carry = [], 0
    for place, swap in enumerate(swapped):
        a, b = left // 10**place % 10, right // 10**place % 10
        total = a + b + carry
        terms = [a, b, 1] if carry else [a, b]
        columns.append(f"{'+'.join(map(str, terms[::-1] if swap else terms))}={total}")
        carry = total // 10
    return f"{', '.join(columns)}, so {left + right}."


class Addition:
    """Sums of two `digits`-digit numbers (leading digits are not zero)."""

    name = "addition"
    """As `task.name` has it."""

    def __init__(self, digits: int):
        if not 1 <= digits <= 4:
            raise UserError(f"task.digits={digits}: must be 1 to 4")
        self.digits = digits
        self._low = 10 ** (digits - 1)
        self._count = 9 * self._low
        self._permutation = np.random.default_rng(_SPLIT_SEED).permutation(self._count**2)

    def problem(self, problem_id: int, swapped: float = 0.0) -> Problem:
        """The problem with this number, 0 <= problem_id < (9 · 10^(digits−1))².

        Its reference is the sum in decimal digits, its response the worked answer. `swapped` is the
        share of columns that this writes the other way round; which ones is drawn by its number.
        """
        swap = np.random.default_rng([_SPLIT_SEED, problem_id]).random(self.digits) < swapped
        left, right = (int(x) + self._low for x in divmod(problem_id, self._count))
        return Problem(
            problem_id,
            messages=({"role": "user", "content": f"What is {left}+{right}?\n"},),
            reference=str(left + right),
            response=_worked_solution(left, right, swap),
        )

    def split_ids(self, split: str, count: int | None, seed: int) -> np.ndarray:
        """`count` distinct problem numbers of a split, or all of them, in the order of a seed.

        Splits are disjoint whatever the seed.

        Raises:
          UserError: if the split holds fewer problems than asked for.
        """
        low, high = (int(x * len(self._permutation)) for x in SPLITS[split])
        if count is not None and not 0 < count <= high - low:
            raise UserError(
                f"task addition: {count} problems asked from split '{split}', which holds "
                f"{high - low}: ask for fewer, or raise task.digits (now {self.digits})"
            )
        chosen = np.random.default_rng([seed, low]).permutation(high - low)[:count]
        return self._permutation[low + chosen]

    def problems(self, split: str, count: int | None, seed: int) -> Iterator[Problem]:
        """The problems of `split_ids`, in its order."""
        return (self.problem(int(i)) for i in self.split_ids(split, count, seed))

    def tests(self, split: str, count: int | None, seed: int) -> dict[str, list[Problem]]:
        """One set, named as the task."""
        return {self.name: list(self.problems(split, count, seed))}

    def worked_answers(self, count: int | None, seed: int, swapped: float) -> "WorkedAnswers":
        """Problems of the split "teacher" with their worked answers."""
        return WorkedAnswers(self, self.split_ids("teacher", count, seed), swapped)

    def encode(self, problem: Problem, tokenizer: Tokenizer) -> list[int]:
        """The prompt as it stands."""
        return tokenizer.encode(problem.prompt)

    def grade(self, problem: Problem, response: str) -> Verdict:
        """Whether a response ends in the right result. Exact: no partial credit."""
        match = _ANSWER.search(response.strip())
        answer = match.group(1) if match else None
        return Verdict(answer == problem.reference, answer)

    def answer_text(self, problem: Problem) -> str:
        """The sum."""
        return problem.reference


@dataclasses.dataclass(frozen=True)
class WorkedAnswers:
    """Problems by their place in `ids`, each made when it is read."""

    task: Addition
    """Makes the problems."""
    ids: np.ndarray
    """Problem numbers."""
    swapped: float
    """As `Addition.problem` takes it."""

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Problem:
        return self.task.problem(int(self.ids[index]), self.swapped)
