"""Commands that are killed at a rename, or between it and the flush after it, and go on.

LOPD_KILLS is how often each is killed, at random renames; by default two of them are killed once.
"""

import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys

import pytest
from helpers.commands import REPOSITORY, environment
from helpers.tiny_run import SETTINGS, run, save_models, use_one_device

KILLS = int(os.environ.get("LOPD_KILLS", "0"))
BY_DEFAULT = ("refresh", "merge")
TESTS = pathlib.Path(__file__).parent
SMALL = SETTINGS | {
    "precompute.prompts": 24,
    "heldout.prompts": 8,
    "sft_data.prompts": 16,
    "eval.prompts": 4,
    "eval.samples": 1,
    "runtime.checkpoint_every": 2,
    "runtime.drift_every": 2,
    **{f"{stage}.steps": 5 for stage in ("opd", "control")},
    **{f"{stage}.batch_size": 8 for stage in ("opd", "control")},
    **{f"{stage}.warmup_steps": 1 for stage in ("opd", "control")},
}
STAGES = {
    "sft_data": {},
    "control": {},
    "eval": {"eval.models": "('teacher','sft','opd')"},
    "export": {},
    "refresh": {"opd.refresh_every": 2},
    "online": {},
}
"""Stages that are run alone, and the settings that they need besides; refresh is one of opd."""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Untrained models, workers' parts, and all that the stages above read."""
    folder = tmp_path_factory.mktemp("base")
    changes = {key.replace(".", "__"): value for key, value in SMALL.items()}
    with pytest.MonkeyPatch.context() as patch:
        use_one_device(patch)
        save_models(folder / "models")
        run(
            folder / "models",
            folder / "w",
            *("sft_data", "precompute", "heldout", "opd"),
            **changes,
        )
        for i in range(2):
            run(folder / "models", folder / "parts", "precompute", worker=(i, 2), **changes)
    return folder


def command(base, workdir, what: str) -> list[str]:
    """A module and its arguments."""
    if what == "merge":
        parts = [str(base / "parts" / f"precompute-{i}-of-2") for i in range(2)]
        return ["lopd.cache", "merge", str(workdir / "merged"), *parts]
    if what == "study":
        study = TESTS / "helpers" / "small_study.py"
        arms = ["--arms=lightning", "--seeds=1"]
        return ["lopd.study", f"--config={study}", f"--workdir={workdir}", *arms]
    stage = "opd" if what == "refresh" else what
    models = {f"{which}.checkpoint": base / "models" / which for which in ("teacher", "sft")}
    settings = SMALL | models | STAGES[what]
    return [
        *("lopd.main", f"--config={REPOSITORY / 'configs' / 'tiny.py'}"),
        *(f"--workdir={workdir}", f"--stages={stage}"),
        *(f"--config.{key}={value}" for key, value in settings.items()),
    ]


def killed(arguments, when: str, number: int, count: pathlib.Path) -> subprocess.CompletedProcess:
    helper = [sys.executable, str(TESTS / "helpers" / "killed.py"), when, str(number), str(count)]
    paths = os.pathsep.join([str(REPOSITORY), str(TESTS)])
    return subprocess.run(
        [*helper, *arguments],
        env=environment({"PYTHONPATH": paths}),
        capture_output=True,
        text=True,
    )


def begin(base, workdir, what: str) -> None:
    """What the command finds."""
    if what not in ("merge", "study"):
        shutil.copytree(base / "w", workdir)
        if what in ("refresh", "sft_data"):
            shutil.rmtree(workdir / {"refresh": "opd"}.get(what, what))


def outcome(workdir: pathlib.Path) -> dict:
    """All artefacts below, but for times and for names that Orbax makes up."""
    found = {}
    for path in sorted(workdir.rglob("manifest.json")):
        manifest = json.loads(path.read_text())
        assert manifest["complete"], path
        del manifest["seconds"], manifest["checksum"]
        costs = [manifest["outputs"], *manifest.get("shards", [])]
        for cost in (c for entry in costs for c in entry.get("costs", {}).values()):
            del cost["seconds"]
        for shard in manifest.get("shards", []):
            del shard["sha256"]
        manifest["files"] = sorted({f["name"].split("/")[0] for f in manifest.get("files", [])})
        rows = path.parent / "metrics.jsonl"
        manifest["rows"] = len(rows.read_text().splitlines()) if rows.exists() else None
        found[str(path.relative_to(workdir))] = manifest
    return found


@pytest.mark.slow
@pytest.mark.parametrize("what", [*STAGES, "merge", "study"])
def test_killed_at_a_rename_it_goes_on(base, tmp_path, what):
    if not KILLS and what not in BY_DEFAULT:
        pytest.skip("by hand, with LOPD_KILLS")
    begin(base, tmp_path / "whole", what)
    count, rng = tmp_path / "count", random.Random(what)
    done = killed(command(base, tmp_path / "whole", what), "never", 0, count)
    assert done.returncode == 0, done.stderr
    expected, renames = outcome(tmp_path / "whole"), int(count.read_text())
    numbers = rng.sample(range(1, renames + 1), min(KILLS or 1, renames))
    for i, number in enumerate(numbers):
        workdir, when = tmp_path / str(number), ("after", "before")[i % 2]
        begin(base, workdir, what)
        arguments = command(base, workdir, what)
        done = killed(arguments, when, number, count)
        assert done.returncode == -signal.SIGKILL, done.stderr
        if not (what == "merge" and when == "after" and number == renames):  # then it is finished
            done = killed(arguments, "never", 0, count)
            assert done.returncode == 0, (when, number, done.stderr)
        assert outcome(workdir) == expected, (when, number)
        left = [*workdir.rglob("*.tmp"), *workdir.rglob("*orbax-checkpoint-tmp*")]
        assert not left, (when, number, left)
    print(f"{what}: {renames} renames, killed at {numbers}")
