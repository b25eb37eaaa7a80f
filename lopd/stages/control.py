"""`control`: more SFT steps from π_ref on the same data, as many as OPD takes.

It shows how much of OPD's gain is mere further training.
"""

from lopd.artefacts.artefact import Artefact
from lopd.config.catalogue import STUDENT
from lopd.stages import identity, training
from lopd.stages.run import Run
from lopd.stages.stage import Stage
from lopd.stages.weights import load_params, to_train


def settings(run: Run) -> dict:
    """The settings that the control depends on."""
    shared = identity.stage_settings(run, "control") | identity.model_settings(run, STUDENT)
    return shared | training.router_settings(run)


def inputs(run: Run) -> dict:
    """π_ref and its data."""
    return {**training.data_inputs(run), "sft": run.input("sft").outputs["fingerprint"]}


def train(run: Run, artefact: Artefact) -> dict:
    """Trains on from π_ref."""
    params = to_train(run, load_params(run, "sft"))
    return training.fine_tune(run, artefact, params, run.settings.control, "control")


stage = Stage(settings, inputs, train)
