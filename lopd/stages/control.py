"""`control`: more SFT steps from π_ref on the same data (see `lopd.stages.sft`)."""

from lopd.artefacts.artefact import Artefact
from lopd.stages import common, sft
from lopd.stages.run import Context


def settings(ctx: Context) -> dict:
    """What the control depends on."""
    shared = common.stage_settings(ctx, "control") | common.model_settings(ctx, "student")
    return shared | sft.router_settings(ctx)


def inputs(ctx: Context) -> dict:
    """π_ref and its data."""
    return {**sft.inputs(ctx), "sft": ctx.input("sft").outputs["fingerprint"]}


def run(ctx: Context, artefact: Artefact) -> dict:
    """Trains on from π_ref."""
    return sft.fine_tune(ctx, artefact, ctx.load_params("sft", "student"), ctx.config.control)
