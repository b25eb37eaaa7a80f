"""`sft` and `control`: token cross-entropy on the teacher's answers.

`sft` makes π_ref from the base student. `control` goes on from π_ref on the same data for as many
steps as OPD takes, to show how much of OPD's gain is mere further training.
"""

import ml_collections

from lopd.artefacts.artefact import Artefact
from lopd.cache.reader import Records
from lopd.models.decoder import Params
from lopd.objectives.sampled import cross_entropy
from lopd.stages import common
from lopd.stages.run import Context


def router_coefficient(ctx: Context) -> float:
    """Weight of the router's load-balancing loss: 0 but for a mixture of experts in SFT."""
    model = ctx.model("student")
    wanted = model.num_experts and ctx.config.sft.router_loss
    return model.router_aux_loss_coef if wanted else 0.0


def router_settings(ctx: Context) -> dict:
    """The load-balancing loss is of a micro-batch, so its size is part of the result."""
    if not router_coefficient(ctx):
        return {}
    return {"rows_per_micro": ctx.config.runtime.rows_per_micro}


def settings(ctx: Context) -> dict:
    """What π_ref depends on."""
    shared = common.stage_settings(ctx, "sft") | common.model_settings(ctx, "student")
    return shared | router_settings(ctx)


def inputs(ctx: Context) -> dict:
    """The data, and who wrote it."""
    outputs = ctx.input("sft_data").outputs
    return {"sft_data": outputs["fingerprint"], "teacher": outputs["teacher"]}


def fine_tune(
    ctx: Context, artefact: Artefact, params: Params, recipe: ml_collections.ConfigDict
) -> dict:
    """SFT from `params`; `teacher` in the outputs says whose answers it learnt from."""
    data = ctx.input("sft_data")
    batches = common.make_batches(ctx, Records(data), recipe, artefact.manifest["stage"])
    outputs = common.train_into(
        ctx,
        artefact,
        "student",
        params,
        batches,
        cross_entropy(),
        recipe,
        router_coefficient=router_coefficient(ctx),
    )
    return {**outputs, "teacher": data.outputs["teacher"]}


def run(ctx: Context, artefact: Artefact) -> dict:
    """Trains π_ref."""
    return fine_tune(ctx, artefact, common.base_params(ctx, "student"), ctx.config.sft)
