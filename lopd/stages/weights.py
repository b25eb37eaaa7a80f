"""Weights of a run's models: read from artefacts and checkpoints, and checked."""

import dataclasses

import jax
from etils import epath

from lopd.artefacts.artefact import differences
from lopd.artefacts.fingerprint import params_fingerprint
from lopd.checkpoints import hugging_face, orbax
from lopd.config.catalogue import STUDENT, TEACHER, stage_info
from lopd.errors import UserError
from lopd.models import decoder
from lopd.models.shardings import abstract_params_on, check_divisible, param_shardings
from lopd.stages.origins import Adopted
from lopd.stages.run import Run

PARAMS = "params"
"""Name of the directory, under a training stage's artefact, that holds its finished weights."""


def resident_dtype(run: Run, which: str) -> str:
    """The type that a model's weights are held in.

    A teacher that was adopted is frozen: its weights stay in the type that it computes with.
    """
    adopted = which == TEACHER and isinstance(run.origin(TEACHER), Adopted)
    return run.model(which).dtype if adopted else "float32"


def read_checkpoint(run: Run, folder: epath.Path, which: str) -> decoder.Params:
    """The weights of a Hugging Face folder, to be used as the "teacher" or the "student"."""
    dtype = run.model(which).dtype if which == TEACHER else "float32"
    return hugging_face.load_checkpoint(folder, run.mesh, param_dtype=dtype)[1]


def base_params(run: Run, which: str) -> decoder.Params:
    """The weights that training starts from, in their sharding: a base checkpoint's, or random."""
    if which == STUDENT and run.settings.student.checkpoint:
        return read_checkpoint(run, run.base_folder, which)
    model = run.model(which)
    check_divisible(model, run.mesh, f"{which}.model")
    init = jax.jit(
        lambda key: decoder.init_params(model, key),
        out_shardings=param_shardings(model, run.mesh),
    )
    return init(jax.random.key(run.seed(f"{which} weights")))


def student_source(run: Run) -> tuple[str, epath.Path] | None:
    """The checkpoint that the student's weights began as: its name in the settings, its folder.

    None for random weights.
    """
    if isinstance(origin := run.origin("sft"), Adopted):
        return origin.checkpoint, origin.folder
    if run.settings.student.checkpoint:
        return run.settings.student.checkpoint, run.base_folder
    return None


def check_shape(run: Run, stage: str) -> None:
    """Refuses a finished artefact that holds no model, or one of another shape than is set.

    Raises:
      UserError: naming what differs.
    """
    artefact, which = run.input(stage), stage_info(stage).trains
    found, set_to = artefact.outputs.get("model"), dataclasses.asdict(run.model(which))
    if not isinstance(found, dict) or "fingerprint" not in artefact.outputs:
        made = artefact.manifest.stage
        raise UserError(
            f"the {stage} artefact: {artefact.path} holds no model; it is that of {made!r}"
        )
    if found != set_to:
        raise UserError(
            f"{artefact.path} holds a model of another shape than {which}.model "
            f"({'; '.join(differences(found, set_to))})"
        )


def load_params(run: Run, stage: str) -> decoder.Params:
    """The finished weights of a training stage, checked against its manifest.

    Raises:
      UserError: if shape or content differ from what the manifest says.
    """
    artefact, which = run.input(stage), stage_info(stage).trains
    model = run.model(which)
    check_shape(run, stage)
    source = artefact.outputs.get("source")
    if source:
        params = read_checkpoint(run, epath.Path(source), which)
    else:
        source = artefact.path / PARAMS
        params = orbax.load_params(source, abstract_params_on(model, run.mesh))
    found, expected = params_fingerprint(params), artefact.outputs["fingerprint"]
    if found != expected:
        raise UserError(
            f"{source} has fingerprint {found}, the manifest of {artefact.path} says "
            f"{expected}: the weights have changed; delete {artefact.path} and run it again"
        )
    return params
