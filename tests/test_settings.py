"""Settings: their types and domains, and what the command line makes of them."""

import dataclasses
import re
import subprocess
import sys

import pytest
from absl.testing import flagsaver
from helpers.commands import REPOSITORY, environment, module, refused

from lopd import cli
from lopd.config import base_config, read_settings
from lopd.config.checks import check_settings
from lopd.config.settings import Settings
from lopd.config.values import changed, from_values
from lopd.data.selection import REDUCTIONS
from lopd.errors import UserError
from lopd.models.decoder import REMAT_POLICIES


def test_defaults_survive_the_way_through_a_config_dict():
    assert read_settings(base_config()) == Settings()
    assert from_values(Settings, dataclasses.asdict(Settings())) == Settings()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("opd.tau", "one", "opd.tau='one' must be of type float"),
        ("opd.tau", float("nan"), "opd.tau=nan must be positive"),
        ("opd.tau", True, "opd.tau=True must be of type float"),
        ("opd.steps", True, "opd.steps=True must be of type int"),
        ("opd.steps", 2.5, "opd.steps=2.5 must be of type int"),
        ("opd.steps", None, "opd.steps=None: it must be set"),
        ("opd.records", 0, "opd.records=0 must be positive, or None"),
        ("opd", None, "opd=None must be a section"),
        ("runtime.profile_steps", ("a", "b"), "profile_steps=('a', 'b') must be of type"),
        ("runtime.profile_steps", (1.5, 2.5), "profile_steps=(1.5, 2.5) must be of type"),
        ("runtime.profile_steps", (3, 2), "profile_steps=(3, 2) must be the first and last"),
        ("eval.models", (), "eval.models=() must name a model, or None"),
        ("opd.masked_tokens", (1.5,), "opd.masked_tokens=(1.5,) must be of type"),
        ("sft.b1", 1.0, "sft.b1=1.0 must lie in [0, 1)"),
        ("dtype", "float16", "dtype='float16' must be one of float32, bfloat16, or None"),
        ("opd.steps", 2**40, "opd.steps=1099511627776 must be below 2147483648"),
        ("task.problems", "a,,b", "task.problems='a,,b' must have a name on each side of every"),
        ("opd.tua", 1, "there is no setting opd.tua"),
        ("opd.tau.x", 1, "there is no setting opd.tau.x"),
    ],
)
def test_what_no_setting_may_be_is_one_line(key, value, message):
    with pytest.raises(UserError, match=re.escape(message)):
        changed(Settings(), {key: value})


def test_values_come_as_the_types_they_are_meant_to_be():
    found = changed(
        Settings(),
        {
            "opd.tau": 3,
            "opd.masked_tokens": ["</s>", 5],
            "runtime.profile_steps": [2, 4],
            "sft.checkpoint": "",
        },
    )
    assert found.opd.tau == 3.0 and isinstance(found.opd.tau, float)
    assert found.opd.masked_tokens == ("</s>", 5) and found.runtime.profile_steps == (2, 4)
    assert found.sft.checkpoint is None


def test_paths_may_start_at_home_and_an_empty_one_is_none(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    given = {"teacher.checkpoint": "~/t", "sft.teacher": "~/t", "task.problems": "~/a.jsonl,~/b"}
    found = changed(Settings(), given | {"tokenizer": " ", "opd.cache": "~/c", "seed": 2**40})
    assert found.teacher.checkpoint == found.sft.teacher == "/home/somebody/t"
    assert found.task.problems == "/home/somebody/a.jsonl,/home/somebody/b"
    assert found.opd.cache == "/home/somebody/c" and found.tokenizer is None
    assert changed(found, {}) == found and found.seed == 2**40


def test_given_responses_need_their_source():
    settings = changed(Settings(), {"sft_data.responses": "given", "sft.teacher": "somebody"})
    with pytest.raises(UserError, match=r"task\.sft_prompts, which is not set"):
        check_settings(settings, ("sft_data",))


def test_names_in_the_settings_are_those_of_the_code():
    for section, name, names in (
        ("runtime", "remat", REMAT_POLICIES),
        ("opd", "reduction", REDUCTIONS),
    ):
        fields = {field.name: field for field in dataclasses.fields(getattr(Settings(), section))}
        domain = fields[name].metadata["domain"]
        assert all(not domain.complaint(value) for value in names)
        assert domain.text.count(",") == len(names) - 1


SHOW = """
from absl import app
from lopd import cli
app.run(lambda argv: print(cli.settings().opd.records), flags_parser=cli.parse_flags)
"""


@pytest.mark.parametrize(
    ("arguments", "records"),
    [
        (["--config.opd.records=5"], "5"),
        (["--config.opd.records=5", "--config.opd.records=None"], "None"),
        (["--config.opd.records=None", "--config.opd.records=5"], "5"),
    ],
)
def test_the_last_word_of_a_setting_counts(arguments, records):
    command = [sys.executable, "-c", SHOW, "--config", str(REPOSITORY / "configs/tiny.py")]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True)
    assert done.stdout.strip() == records, done.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--config", "README.md"], "--config=README.md: not Python"),
        (["--config", "none.py"], "--config=none.py does not exist"),
        (["--config.opd.tau=None"], "--config=FILE is needed"),
        (["--config=configs/tiny.py", "--workdir="], "--workdir is empty"),
        (
            ["--config=configs/tiny.py", "--workdir=w", "--config.sft=None"],
            "sft=None must be a section",
        ),
    ],
)
def test_mistakes_of_the_command_line_are_one_line(monkeypatch, arguments, says):
    monkeypatch.chdir(REPOSITORY)
    refused(module("lopd.main", *arguments, environment=environment()), says)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("import nothing_there\ndef get_config(): pass", "line 1: ModuleNotFoundError"),
        ("def get_config():\n  raise ValueError('no')", "line 2: ValueError: no"),
        ("def get_config():\n  return get_config()", "line 2: RecursionError"),
        ("def get_config():\n  exit(3)", "line 2: SystemExit: 3"),
        ("def get_config(): pass", "get_config() gives NoneType"),
        ("def get_config(): return {}", "get_config() gives dict"),
        ("get_config = 3", "'int' object is not callable"),
        ("# get_config", "has no attribute 'get_config'"),
        ("def get_config(which): pass", "missing 1 required positional argument"),
    ],
)
def test_a_settings_file_that_fails_is_one_line(tmp_path, monkeypatch, capfd, text, says):
    path = tmp_path / "settings.py"
    path.write_text(text)
    monkeypatch.delitem(sys.modules, "config_config", raising=False)  # ml_collections' of before
    with flagsaver.flagsaver(), pytest.raises(SystemExit) as ended:
        cli.parse_flags(["lopd.main", f"--config={path}"])
    lines = capfd.readouterr().err.splitlines()
    assert ended.value.code == 2 and len(lines) == 1, lines
    assert lines[0].startswith(f"lopd: error: --config={path}") and says in lines[0]


def test_the_home_directory_in_flags(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "settings.py").write_text(
        "from lopd import config\ndef get_config(): return config.base_config()"
    )
    with flagsaver.flagsaver():
        cli.parse_flags(["lopd.main", "--config=~/settings.py", "--workdir=~/run"])
        assert cli.settings() == Settings() and cli.WORKDIR.value == str(tmp_path / "run")


def test_no_plugin_for_a_platform_is_one_line(tmp_path):
    arguments = [f"--config={REPOSITORY / 'configs/tiny.py'}", f"--workdir={tmp_path}"]
    for platform in ("cuda", "quantum"):
        there = environment({"JAX_PLATFORMS": platform})
        refused(module("lopd.main", *arguments, environment=there), "JAX finds no devices")


@pytest.mark.parametrize(
    ("config", "workdir"),
    [
        ("configs/tiny.py", "runs/tiny"),
        ("/home/me/my.recipe.py", "runs/my.recipe"),
        ("configs/tiny.py:small", "runs/tiny-small"),
    ],
)
def test_a_run_has_a_directory_of_its_own_without_being_told(config, workdir):
    assert cli.default_workdir(config) == workdir


def test_artefacts_go_to_runs_and_the_name_of_the_settings_file(tmp_path):
    command = [f"--config={REPOSITORY / 'configs/tiny.py'}", "--stages=sft"]
    done = module("lopd.main", *command, environment=environment(), cwd=tmp_path)
    refused(done, f"{tmp_path}/runs/tiny/sft_data holds no manifest")
