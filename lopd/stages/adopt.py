"""Takes a Hugging Face checkpoint as the result of the `teacher` or the `sft` stage.

Nothing is copied: the artefact records where the weights are and their fingerprint, and every
later reading is compared with it.
"""

import dataclasses

from lopd.artefacts.artefact import Artefact
from lopd.artefacts.fingerprint import params_fingerprint
from lopd.checkpoints import hugging_face
from lopd.stages.common import declared_teacher
from lopd.stages.run import Context

MODELS = {"teacher": "teacher", "sft": "student"}


def settings(ctx: Context, name: str) -> dict:
    """Which checkpoint, and as what shape."""
    model = dataclasses.asdict(ctx.model(MODELS[name]))
    return {"checkpoint": ctx.external(name), "model": model}


def inputs(ctx: Context, name: str) -> dict:
    """For `sft`, the teacher that is declared to have written its data."""
    return {} if name == "teacher" else {"teacher": declared_teacher(ctx)}


def run(ctx: Context, artefact: Artefact, name: str) -> dict:
    """Reads the weights once, for their fingerprint."""
    source = hugging_face.resolve_checkpoint(ctx.external(name))
    return {
        "model": dataclasses.asdict(ctx.model(MODELS[name])),
        "fingerprint": params_fingerprint(ctx.read_checkpoint(source, MODELS[name])),
        "source": str(source),
        **inputs(ctx, name),
    }
