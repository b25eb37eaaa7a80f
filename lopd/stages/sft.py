"""`sft` and `control`: token cross-entropy on the teacher's answers.

`sft` makes π_ref from the base student. `control` goes on from π_ref on the same data for as many
steps as OPD takes, to show how much of OPD's gain is mere further training.
"""

import ml_collections

from lopd.artefact import Artefact
from lopd.cache.reader import Records
from lopd.context import Context
from lopd.data.batches import step_batches
from lopd.models.qwen3 import Params
from lopd.objectives import cross_entropy
from lopd.stages import common


def settings(ctx: Context) -> dict:
    """What π_ref depends on."""
    return common.stage_settings(ctx, "sft") | common.model_settings(ctx, "student")


def inputs(ctx: Context) -> dict:
    """The data, and who wrote it."""
    outputs = ctx.input("sft_data").outputs
    return {"sft_data": outputs["fingerprint"], "teacher": outputs["teacher"]}


def fine_tune(
    ctx: Context, artefact: Artefact, params: Params, recipe: ml_collections.ConfigDict
) -> dict:
    """SFT from `params`; `teacher` in the outputs says whose answers it learnt from."""
    data = ctx.input("sft_data")
    batches = step_batches(
        Records(data),
        seed=ctx.seed(f"{artefact.path.name} order"),
        batch_size=recipe.batch_size,
        row_length=recipe.row_length,
        rows_per_micro=ctx.config.runtime.rows_per_micro,
        reduction=recipe.reduction,
    )
    outputs = common.train_into(ctx, artefact, "student", params, batches, cross_entropy(), recipe)
    return {**outputs, "teacher": data.outputs["teacher"]}


def run(ctx: Context, artefact: Artefact) -> dict:
    """Trains π_ref."""
    return fine_tune(ctx, artefact, common.base_params(ctx, "student"), ctx.config.sft)
