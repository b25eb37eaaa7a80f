"""The command line in real processes, on runs of seconds."""

import os
import pathlib
import subprocess
import sys

REPOSITORY = pathlib.Path(__file__).parents[2]


# A run of seconds: too short to learn anything, long enough to do everything.
SMALL = {
    "teacher.problems": 400,
    "teacher.steps": 6,
    "teacher.warmup_steps": 1,
    "sft_data.prompts": 40,
    "sft.steps": 6,
    "sft.warmup_steps": 1,
    "precompute.prompts": 96,
    "heldout.prompts": 16,
    "opd.steps": 6,
    "opd.warmup_steps": 1,
    "control.steps": 6,
    "control.warmup_steps": 1,
    "eval.prompts": 16,
    "runtime.checkpoint_every": 2,
    "runtime.slots": 16,
    "runtime.records_per_shard": 16,
}


BATCHES = {f"{stage}.batch_size": 16 for stage in ("teacher", "sft", "opd", "control")}


def command(workdir, stages="", config="configs/tiny.py", **settings) -> list[str]:
    settings = SMALL | BATCHES | {k.replace("__", "."): v for k, v in settings.items()}
    return [
        *(sys.executable, "-m", "lopd.main"),
        *(f"--config={REPOSITORY / config}", f"--workdir={workdir}"),
        *([f"--stages={stages}"] if stages else []),
        *(f"--config.{key}={value}" for key, value in settings.items()),
    ]


def environment(more=()) -> dict[str, str]:
    inherited = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    return inherited | {"JAX_PLATFORMS": "cpu"} | dict(more)


def run(*args, more_environment=(), **settings) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(*args, **settings),
        capture_output=True,
        text=True,
        env=environment(more_environment),
    )


def module(name: str, *arguments: str, environment: dict, cwd=None) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", name, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd)


def refused(done: subprocess.CompletedProcess, *parts: str) -> None:
    """One line, exit code 2, and what it must name."""
    assert done.returncode == 2, (done.stdout, done.stderr)
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("lopd: error: "), done.stderr
    for part in parts:
        assert part in lines[0]
