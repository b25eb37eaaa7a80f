"""Takes a Hugging Face checkpoint as the result of a stage that trains a model.

Nothing is copied: the artefact records where the weights are and their fingerprint, and every
later reading is compared with it.
"""

import dataclasses

from lopd.artefacts.artefact import Artefact
from lopd.config.catalogue import STUDENT, stage_info
from lopd.stages.identity import declared_teacher
from lopd.stages.run import Run
from lopd.stages.stage import Stage
from lopd.stages.weights import describe, read_checkpoint, resident_dtype


def adoption(name: str) -> Stage:
    """The stage that stands in for the stage `name`, whose origin is `Adopted`."""
    which = stage_info(name).trains

    def settings(run: Run) -> dict:
        """Which checkpoint, and as what shape."""
        model = dataclasses.asdict(run.model(which))
        found = {"checkpoint": run.origin(name).checkpoint, "model": model}
        if which == STUDENT and run.lora:
            found["weights"] = resident_dtype(run, STUDENT)
        return found

    def inputs(run: Run) -> dict:
        """For a student, the teacher that is declared to have written its data."""
        return {"teacher": declared_teacher(run)} if which == STUDENT else {}

    def adopt(run: Run, artefact: Artefact) -> dict:
        """Reads the weights once, for their fingerprint."""
        del artefact
        folder = run.origin(name).folder
        return {
            **describe(run, which, read_checkpoint(run, folder, which)),
            "source": str(folder),
            **inputs(run),
        }

    return Stage(settings, inputs, adopt)
