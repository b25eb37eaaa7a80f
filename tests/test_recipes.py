"""The recipes in configs/: settings that can be, public data, and the overlay for a trial."""

import logging
import runpy

import numpy as np
import pytest
from helpers.commands import REPOSITORY, environment, module, refused

from lopd.config import read_settings
from lopd.config.checks import check_settings
from lopd.config.settings import Settings
from lopd.config.values import changed
from lopd.data.hub import parse
from lopd.data.sources import split_column_map
from lopd.errors import UserError
from lopd.rollouts.requests import Prompts
from lopd.tasks import Problem

RECIPES = sorted(path.stem for path in (REPOSITORY / "configs").glob("qwen3_*.py"))


def recipe(name: str, overlay: str = "") -> Settings:
    get_config = runpy.run_path(str(REPOSITORY / "configs" / f"{name}.py"))["get_config"]
    return read_settings(get_config(overlay))


@pytest.mark.parametrize("overlay", ["", "small"])
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_needs_nothing_else(name, overlay):
    settings = recipe(name, overlay)
    check_settings(settings, settings.stages)
    task = settings.task
    for sources in (task.sft_prompts, task.opd_prompts, task.problems):
        for source in sources.split(","):
            parse(split_column_map(source)[0])
    assert settings.teacher.checkpoint and settings.student.checkpoint


@pytest.mark.parametrize("name", RECIPES)
def test_a_trial_changes_how_much_and_not_what(name):
    whole, small = recipe(name), recipe(name, "small")
    assert small.sft_data.prompts < whole.sft_data.prompts
    for same in ("task", "teacher", "student", "mesh", "prompt_length", "dtype", "stages"):
        assert getattr(small, same) == getattr(whole, same)
    assert small.sft.row_length == whole.sft.row_length  # so it needs the memory of the whole


def test_an_overlay_that_is_not_there_is_one_line():
    command = [f"--config={REPOSITORY / 'configs/qwen3_0_6b.py'}:tiny"]
    refused(
        module("lopd.main", *command, environment=environment()),
        "no overlay 'tiny'; there is small",
    )


# Long prompts


class Words:
    """A task whose prompts have as many tokens as words."""

    def problems(self, split, count, seed):
        return [
            Problem(i, ({"role": "user", "content": "a " * words},))
            for i, words in enumerate([1, 3, 2, 5])
        ]

    def tests(self, split, count, seed):
        return {"test": self.problems(split, count, seed)}

    def encode(self, problem, tokenizer):
        return [7] * len(problem.prompt.split())


def prompts(**changes) -> Prompts:
    settings = changed(Settings(), {k.replace("__", "."): v for k, v in changes.items()})
    return Prompts(Words(), None, settings, lambda purpose: 0)


def test_long_training_prompts_are_left_out_and_counted_if_the_settings_say_so(caplog):
    with pytest.raises(UserError, match="prompt 1 has 3 tokens, more than prompt_length=2"):
        _ = prompts(prompt_length=2).sft
    left = prompts(prompt_length=2, task__long_prompts="leave_out")
    with caplog.at_level(logging.WARNING):
        assert [problem.problem_id for problem in left.sft.problems] == [0, 2]
    assert "2 of 4 prompts left out: more than 2 tokens" in caplog.text
    np.testing.assert_equal(left.sft.tokens[1], [7, 7])


def test_a_test_set_stays_whole():
    with pytest.raises(UserError, match="prompt 1 has 3 tokens"):
        _ = prompts(prompt_length=2, task__long_prompts="leave_out").tests
    none = prompts(prompt_length=1, task__long_prompts="leave_out")
    assert [problem.problem_id for problem in none.sft.problems] == [0]
