"""`sft`: token cross-entropy on the teacher's answers makes π_ref of the base student."""

from lopd.artefacts.artefact import Artefact
from lopd.config.catalogue import STUDENT
from lopd.stages import identity, training
from lopd.stages.run import Run
from lopd.stages.stage import Stage
from lopd.stages.weights import base_params, to_train


def settings(run: Run) -> dict:
    """The settings that π_ref depends on."""
    shared = identity.stage_settings(run, "sft") | identity.model_settings(run, STUDENT)
    return shared | training.router_settings(run)


def train(run: Run, artefact: Artefact) -> dict:
    """Trains π_ref."""
    params = to_train(run, base_params(run, STUDENT))
    return training.fine_tune(run, artefact, params, run.settings.sft, "sft")


stage = Stage(settings, training.data_inputs, train)
