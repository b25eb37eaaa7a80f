"""What the identity of an artefact is made of: settings, shapes, and who wrote the SFT data."""

import dataclasses
from typing import Any

from lopd.config.catalogue import STUDENT
from lopd.config.settings import PROMPT_SOURCES
from lopd.stages.run import Run

_PATHS = ("checkpoint", "cache", "teacher")
"""Settings that name artefacts: what those hold is compared by fingerprint instead."""


def _plain(value: Any) -> Any:
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value


def task_settings(run: Run, *sources: str) -> dict:
    """What is learnt, as part of a stage's settings, with the `sources` that the stage reads.

    Data sets at the Hub are named with the commit that is read.
    """
    task = _plain(run.task_settings if sources else run.settings.task)
    return {"task": {k: v for k, v in task.items() if k not in PROMPT_SOURCES or k in sources}}


def stage_settings(run: Run, section: str, *shared: str) -> dict:
    """The settings a stage's result depends on: its section, the named others, and the seed."""
    own = dataclasses.asdict(getattr(run.settings, section))
    return {
        "seed": run.settings.seed,
        "tokenizer": run.tokenizer.fingerprint,
        "chat_template": run.tokenizer.template_fingerprint,
        section: {key: value for key, value in own.items() if key not in _PATHS},
        **{key: _plain(getattr(run.settings, key)) for key in shared},
    }


def sampling_settings(run: Run) -> dict:
    """Where responses end, as part of the settings of a stage that samples."""
    return {"end_ids": list(run.end_ids)}


def model_settings(run: Run, which: str) -> dict:
    """The shape of a model, and of its adapters if it is trained by them, as part of a stage's
    settings."""
    found = {f"{which}_model": dataclasses.asdict(run.model(which))}
    if which == STUDENT and run.lora:
        found["student_lora"] = dataclasses.asdict(run.lora)
    return found


def declared_teacher(run: Run) -> str:
    """Who is declared, in `sft.teacher`, to have written the SFT data.

    The same name as `teacher.checkpoint` stands for that teacher's weights; another name stays a
    name, which equals no fingerprint.
    """
    declared = run.settings.sft.teacher
    if declared and declared == run.settings.teacher.checkpoint:
        return run.input("teacher").outputs["fingerprint"]
    return declared or "not declared"
