"""What a stage is to the pipeline; its place in a run is in `lopd.config.catalogue`."""

import dataclasses
import importlib
from collections.abc import Callable, Iterable
from typing import Any

from lopd.artefacts.artefact import Artefact
from lopd.stages.run import Run


def _nothing(*_: Any) -> None:
    """No checks."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """The functions of one stage."""

    settings: Callable[[Run], dict]
    """All settings that its artefact depends on."""
    inputs: Callable[[Run], dict]
    """The fingerprints of what it reads; raises UserError if something is missing or does not
    fit."""
    run: Callable[[Run, Artefact], dict]
    """Does the work, or goes on with it, and returns the artefact's outputs."""
    check: Callable[[Run, tuple[str, ...]], None] = _nothing
    """Given the stages of the run, refuses (UserError) what would fail only after long work."""
    read_prompts: Callable[[Run], Any] = _nothing
    """Reads the prompts that it will ask for, so that a bad source shows before any work."""
    reads: Callable[[Run], Iterable[str]] = lambda run: ()
    """The stages whose artefacts it reads beside those that the catalogue names."""


def load_stage(name: str) -> Stage:
    """The stage of that name: `stage` of the module `lopd.stages.NAME`."""
    return importlib.import_module(f"lopd.stages.{name}").stage
