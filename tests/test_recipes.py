"""The recipes in configs/: settings that can be, public data, and the overlay for a trial."""

import io
import json
import runpy

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from absl import logging
from helpers import hub_server
from helpers.byte_tokenizer import IM_END, save_tokenizer
from helpers.commands import REPOSITORY, environment, module, refused
from helpers.models import random_params
from helpers.small_checkpoint import save_small_qwen3
from helpers.tiny_run import use_one_device

from lopd import pipeline
from lopd.checkpoints import hugging_face
from lopd.config import read_settings
from lopd.config.checks import check_settings
from lopd.config.settings import Settings
from lopd.config.values import changed
from lopd.data.hub import parse
from lopd.data.sources import split_column_map
from lopd.errors import UserError
from lopd.models.decoder_config import DecoderConfig
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


def test_long_training_prompts_are_left_out_and_counted_if_the_settings_say_so(monkeypatch):
    with pytest.raises(UserError, match="prompt 1 has 3 tokens, more than prompt_length=2"):
        _ = prompts(prompt_length=2).sft
    left = prompts(prompt_length=2, task__long_prompts="leave_out")
    said = []
    monkeypatch.setattr(logging, "warning", lambda text, *values: said.append(text % values))
    assert [problem.problem_id for problem in left.sft.problems] == [0, 2]
    assert any("2 of 4 prompts left out: more than 2 tokens" in line for line in said)
    np.testing.assert_equal(left.sft.tokens[1], [7, 7])


def test_a_test_set_stays_whole():
    with pytest.raises(UserError, match="prompt 1 has 3 tokens"):
        _ = prompts(prompt_length=2, task__long_prompts="leave_out").tests
    none = prompts(prompt_length=1, task__long_prompts="leave_out")
    assert [problem.problem_id for problem in none.sft.problems] == [0]


# The command as written


def files_of(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def gsm8k(first: int, count: int) -> bytes:
    rows = [
        {"question": f"Tom has {i} pens and buys {i + 1}. How many?", "answer": f"#### {2 * i + 1}"}
        for i in range(first, first + count)
    ]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def public_data() -> dict[str, dict[str, list[dict]]]:
    """Data sets that the recipes name, a few rows of each as their cards and readers show them."""
    questions = [f"What is {i} + {i}?" for i in range(100)]
    wrapped = (
        "Solve the following math problem step by step. The last line of your response should be "
        "of the form Answer: $Answer (without quotes) where $Answer is the answer to the problem."
        '\n\n{}\n\nRemember to put your answer on its own line after "Answer:".'
    )
    thoughts = [
        {"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": "<think>"}]}
        for q in questions
    ]
    dapo = [
        {
            "prompt": [{"role": "user", "content": wrapped.format(q)}],
            "reward_model": {"ground_truth": "4", "style": "rule"},
        }
        for q in questions
    ]
    test = [{"id": "0", "problem": q, "answer": "4"} for q in questions[:20]]
    return {
        "open-thoughts/OpenThoughts3-1.2M": {"data/train-00000-of-00001.parquet": thoughts},
        "BytedTsinghua-SIA/DAPO-Math-17k": {"data/dapo-math-17k.parquet": dapo},
        "HuggingFaceH4/aime_2024": {"data/train-00000-of-00001.parquet": test},
        "HuggingFaceH4/MATH-500": {"test.jsonl": test},
        "math-ai/aime25": {"test.jsonl": test},
        "MathArena/hmmt_feb_2025": {"data/train-00000-of-00001.parquet": test},
    }


def as_file(name: str, rows: list[dict]) -> bytes:
    if name.endswith(".jsonl"):
        return "".join(json.dumps(row) + "\n" for row in rows).encode()
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue()


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "qwen3_0_6b"])
def test_a_trial_passes_every_check_before_work(name, tmp_path, monkeypatch):
    settings, begun = recipe(name, "small"), []
    use_one_device(monkeypatch)
    monkeypatch.setattr(pipeline, "_run_stages", lambda one, ordered: begun.append(one))
    monkeypatch.setattr(pipeline, "_print_summary", lambda *_: None)
    shape = DecoderConfig(320, 16, 16, 1, 2, 1, 8, max_position_embeddings=32_768)
    with hub_server.serve() as hub:
        hub_server.use(monkeypatch, hub, tmp_path / "cache")
        for checkpoint in (settings.teacher.checkpoint, settings.student.checkpoint):
            folder = tmp_path / checkpoint.split("/")[1]
            save_tokenizer(folder)
            hugging_face.save_checkpoint(folder, shape, random_params(shape, 0), end_id=IM_END)
            hub.add(checkpoint, files_of(folder), kind="models")
        for data, files in public_data().items():
            hub.add(data, {file: as_file(file, rows) for file, rows in files.items()})
        pipeline.run(settings, str(tmp_path / "run"))
    (one,) = begun
    assert len(one.prompts.opd.problems) == 64 and len(one.prompts.heldout.problems) == 16
    assert one.prompts.sft.problems[0].prompt.startswith("Question: What is ")


@pytest.fixture
def hub(tmp_path):
    """A Hub with small random checkpoints under the recipe's names, and a small GSM8K."""
    with hub_server.serve() as hub:
        for seed, (name, size) in enumerate({"Qwen3-4B": 32, "Qwen3-0.6B-Base": 16}.items()):
            folder = tmp_path / name
            save_small_qwen3(folder, seed, size, vocab_size=320, eos_token_id=IM_END)
            save_tokenizer(folder)
            hub.add(f"Qwen/{name}", files_of(folder), kind="models")
        files = {"main/train.jsonl": gsm8k(0, 7_400), "main/test.jsonl": gsm8k(8_000, 20)}
        hub.add("openai/gsm8k", files | {"socratic/train.jsonl": gsm8k(0, 10)})
        yield hub


@pytest.mark.slow
def test_the_smallest_recipe_runs_as_written(hub, tmp_path):
    command = [f"--config={REPOSITORY / 'configs/qwen3_0_6b.py'}:small"]
    variables = environment(hub_server.environment(hub, tmp_path / "home"))
    variables["PYTHONPATH"] = str(REPOSITORY)

    def run(*more, **environment):
        return module(
            "lopd.main", *command, *more, environment=variables | environment, cwd=tmp_path
        )

    dry = run("--dry-run")
    assert dry.returncode == 0, dry.stdout + dry.stderr
    assert "teacher Qwen/Qwen3-4B" in dry.stdout and not hub.downloads()
    done = run()
    assert done.returncode == 0, done.stderr
    workdir = tmp_path / "runs" / "qwen3_0_6b-small"
    assert (workdir / "export" / "model.safetensors").exists()
    results = json.loads((workdir / "eval" / "summary.json").read_text())["models"]
    assert {"teacher", "base", "sft", "opd"} == {*results}
    assert all("gsm8k/greedy" in found for found in results.values())
    commit = json.loads((workdir / "revisions.json").read_text())["hf:openai/gsm8k/main/train"]
    for stage in ("sft_data", "precompute"):
        assert commit in (workdir / stage / "manifest.json").read_text()

    hub.add("openai/gsm8k", {"main/train.jsonl": gsm8k(1, 7_000)})  # the branch moves on
    hub.requests.clear()
    again = run(HF_HUB_OFFLINE="1")
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("complete, skipped") >= 6 and not hub.requests
