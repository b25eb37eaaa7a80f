"""`export`: the trained student as a Hugging Face checkpoint."""

from lopd.artefacts.artefact import Artefact
from lopd.checkpoints import hugging_face
from lopd.machine import processes
from lopd.stages.run import Context


def settings(ctx: Context) -> dict:
    """The tokenizer goes with the weights."""
    return {"tokenizer": ctx.tokenizer.fingerprint}


def inputs(ctx: Context) -> dict:
    """The student that OPD made."""
    return {"opd": ctx.input("opd").outputs["fingerprint"]}


def run(ctx: Context, artefact: Artefact) -> dict:
    """Writes safetensors, config.json, generation_config.json and the tokenizer."""
    params = ctx.load_params("opd", "student")
    hugging_face.save_checkpoint(
        artefact.path, ctx.model("student"), params, end_id=ctx.tokenizer.end_id
    )
    if processes.is_main():
        for name, content in ctx.tokenizer.files.items():
            (artefact.path / name).write_bytes(content)
    return {}
