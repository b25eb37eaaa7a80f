"""The prompts of a run as requests: each source is read, split and tokenised once."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from absl import logging

from lopd.config.settings import Settings
from lopd.data.tokenizers import Tokenizer
from lopd.errors import UserError
from lopd.sampling.engine import Request
from lopd.tasks import Problem, Task


@dataclasses.dataclass(frozen=True)
class PromptSet:
    """Problems and the token ids of their prompts, in the same order."""

    problems: Sequence[Problem]
    tokens: Sequence[np.ndarray]
    """int32 each."""

    def requests(self, samples: int = 1) -> list[Request]:
        """A request for each sample of each problem: those of a problem follow one another."""
        return [
            Request(problem.problem_id, sample, tokens)
            for problem, tokens in zip(self.problems, self.tokens, strict=True)
            for sample in range(samples)
        ]


def requests_of(records: Iterable[Mapping]) -> list[Request]:
    """The requests that the responses of a cache answered."""
    return [Request(int(r["prompt_id"]), int(r["sample_id"]), r["prompt_tokens"]) for r in records]


class Prompts:
    """The prompts of one run. Each set is made when it is first asked for, and kept.

    Every property raises UserError if its source cannot be read, holds fewer prompts than asked
    for, or has one that is longer than `prompt_length`. Of those to train on, `task.long_prompts`
    can leave the long ones out.
    """

    def __init__(
        self, task: Task, tokenizer: Tokenizer, settings: Settings, seed: Callable[[str], int]
    ):
        self._task, self._tokenizer, self._settings, self._seed = task, tokenizer, settings, seed

    def _tokenised(self, problems: Iterable[Problem], trained_on: bool = True) -> PromptSet:
        """The problems and their tokens, none longer than may be."""
        problems, limit = list(problems), self._settings.prompt_length
        leave_out = trained_on and self._settings.task.long_prompts == "leave_out"
        kept, encoded = [], []
        for problem in problems:
            tokens = self._task.encode(problem, self._tokenizer)
            if len(tokens) <= limit:
                kept.append(problem)
                encoded.append(np.asarray(tokens, np.int32))
            elif not leave_out:
                raise UserError(
                    f"prompt {problem.problem_id} has {len(tokens)} tokens, more than "
                    f"prompt_length={limit}: raise it"
                )
        if problems and not kept:
            raise UserError(f"every prompt is longer than prompt_length={limit}: raise it")
        if left_out := len(problems) - len(kept):
            logging.warning(
                "%d of %d prompts left out: more than %d tokens", left_out, len(problems), limit
            )
        return PromptSet(kept, encoded)

    def read(self, count: int) -> list[Problem]:
        """The first `count` problems of each set that has been made so far."""
        made = [self.__dict__.get(name) for name in ("sft", "opd", "heldout")]
        made += self.__dict__.get("tests", {}).values()
        return [problem for one in made if one for problem in one.problems[:count]]

    @functools.cached_property
    def sft(self) -> PromptSet:
        """The prompts that the teacher answers for SFT."""
        count = self._settings.sft_data.prompts
        return self._tokenised(self._task.problems("sft", count, self._seed("sft problems")))

    @functools.cached_property
    def _opd_problems(self) -> tuple[list[Problem], list[Problem]]:
        """The OPD problems to train on, and those held out: disjoint, drawn with the run's seed.

        Held-out ones come after the training ones in the order of the draw, so that they can be
        added to a finished cache; where training takes all prompts (`precompute.prompts=None`),
        they are drawn from those first.
        """
        train, held = self._settings.precompute.prompts, self._settings.heldout.prompts
        draw = self._seed("opd problems")
        if train is not None:
            problems = list(self._task.problems("opd", train + held, draw))
            return problems[:train], problems[train:]
        problems = list(self._task.problems("opd", None, draw))
        order = np.random.default_rng(self._seed("heldout problems")).permutation(len(problems))
        if held >= len(problems):
            raise UserError(
                f"heldout.prompts={held} would take all {len(problems)} OPD prompts: lower it"
            )
        chosen = set(order[:held].tolist())
        split: tuple[list, list] = ([], [])
        for i, problem in enumerate(problems):
            split[i in chosen].append(problem)
        return split

    @functools.cached_property
    def opd(self) -> PromptSet:
        """The prompts that OPD trains on."""
        return self._tokenised(self._opd_problems[0])

    @functools.cached_property
    def heldout(self) -> PromptSet:
        """The prompts held out from OPD, those included whose tokens are trained on."""
        return self._tokenised(self._opd_problems[1])

    @functools.cached_property
    def tests(self) -> dict[str, PromptSet]:
        """For each test set its problems."""
        recipe = self._settings.eval
        tests = self._task.tests(recipe.split, recipe.prompts, self._seed("eval problems"))
        return {name: self._tokenised(each, trained_on=False) for name, each in tests.items()}
