"""The tiny run without its training: an untrained teacher and π_ref, and stages that use them.

As `python tests/helpers/tiny_run.py WORKDIR MODELS STAGE BEFORE NAME=VALUE...` it runs one stage on
one device and is killed at a rename.
"""

import ast
import dataclasses
import fnmatch
import os
import pathlib
import runpy
import signal
import subprocess
import sys

import jax
import pytest
from ml_collections import ConfigDict

from helpers.commands import REPOSITORY
from helpers.models import random_params
from lopd import pipeline
from lopd.artefacts.artefact import Artefact
from lopd.artefacts.fingerprint import params_fingerprint
from lopd.checkpoints import orbax
from lopd.config.config_dict import read_settings
from lopd.config.settings import Settings
from lopd.config.values import changed
from lopd.machine import devices
from lopd.machine.storage import absolute
from lopd.models.shardings import param_shardings
from lopd.stages.run import Run
from lopd.stages.stage import load_stage
from lopd.stages.weights import PARAMS

SETTINGS = {
    "precompute.prompts": 40,
    "heldout.prompts": 12,
    "runtime.slots": 8,
    "runtime.records_per_shard": 8,
}


def use_one_device(patch) -> None:
    """Runs that this process starts use one device of those there are."""
    make, first = devices.make_mesh, jax.devices()[:1]
    patch.setattr(devices, "make_mesh", lambda sizes, devices=None: make(sizes, devices or first))


def tiny_config() -> ConfigDict:
    """The tiny config as its file makes it."""
    return runpy.run_path(str(REPOSITORY / "configs" / "tiny.py"))["get_config"]()


def tiny_settings(**changes) -> Settings:
    """The tiny config with SETTINGS and changes, named with __ for each dot."""
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    return changed(read_settings(tiny_config()), SETTINGS | changes)


def open_run(workdir, settings: Settings) -> Run:
    """A run with its devices, as the pipeline makes it."""
    return Run(settings, absolute(workdir), devices.make_mesh(settings.mesh.sizes))


def save_models(folder: pathlib.Path, first_seed: int = 0, **changes) -> None:
    """A teacher and a π_ref, as their stages would have left them: untrained weights."""
    opened = open_run(folder, tiny_settings(**changes))
    teacher = None
    for seed, (stage, which) in enumerate([("teacher", "teacher"), ("sft", "student")], first_seed):
        params = random_params(opened.model(which), seed)
        params = jax.device_put(params, param_shardings(opened.model(which), opened.mesh))
        artefact = Artefact(folder / stage)
        artefact.begin(stage, load_stage(stage).settings(opened), {})
        orbax.save_params(artefact.path / PARAMS, params)
        fingerprint = params_fingerprint(params)
        teacher = teacher or fingerprint
        outputs = {"model": dataclasses.asdict(opened.model(which)), "fingerprint": fingerprint}
        artefact.finish(outputs | {"teacher": teacher})


def run(models, workdir, *stages, worker=None, **changes) -> Artefact:
    """The stages in this process; returns the artefact of the last."""
    given = {"teacher__checkpoint": f"{models}/teacher", "sft__checkpoint": f"{models}/sft"}
    pipeline.run(tiny_settings(**given | changes), str(workdir), stages, worker)
    part = "-{}-of-{}".format(*worker) if worker else ""
    return Artefact(pathlib.Path(workdir) / f"{stages[-1]}{part}")


def interrupt(workdir, models, stage: str, before: str, **changes) -> None:
    """Runs a stage in a process of its own, killed where it puts a file in place whose path below
    `workdir` matches `before`: SIGKILL instead of that rename."""
    arguments = [f"{name}={value!r}" for name, value in changes.items()]
    done = subprocess.run(
        [sys.executable, __file__, str(workdir), str(models), stage, before, *arguments],
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr


def main(workdir: str, models: str, stage: str, before: str, *changes: str) -> None:
    """One stage, until the rename that `interrupt` names."""

    def on_event(event: str, arguments: tuple) -> None:
        if event == "os.rename" and fnmatch.fnmatch(str(arguments[1]), f"{workdir}/{before}"):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(on_event)
    settings = dict(change.split("=") for change in changes)
    use_one_device(pytest.MonkeyPatch())
    run(models, workdir, stage, **{k: ast.literal_eval(v) for k, v in settings.items()})


if __name__ == "__main__":
    main(*sys.argv[1:])
