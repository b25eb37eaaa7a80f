"""`sft_data`: the teacher answers the SFT prompts."""

from lopd.artefact import Artefact
from lopd.cache.schema import RESPONSE_FIELDS
from lopd.context import Context
from lopd.stages import common


def settings(ctx: Context) -> dict:
    """What the data depends on."""
    return common.stage_settings(ctx, "sft_data", "task", "prompt_length", "response_length")


def inputs(ctx: Context) -> dict:
    """The teacher that writes it."""
    return {"teacher": ctx.input("teacher").outputs["fingerprint"]}


def run(ctx: Context, artefact: Artefact) -> dict:
    """Samples and stores; `teacher` in the outputs says who wrote the data."""
    recipe = ctx.config.sft_data
    problems = list(ctx.task.problems("sft", recipe.prompts, ctx.seed("sft problems")))
    prompts = common.encode_prompts(ctx, problems)
    params = ctx.load_params("teacher", "teacher")
    totals = common.write_responses(
        ctx,
        artefact,
        RESPONSE_FIELDS,
        common.requests(problems, prompts, recipe.samples),
        common.sampler(ctx, "teacher", params, recipe.temperature, "sft_data sampling"),
        lambda responses: [common.response_record(r) for r in responses],
    )
    return {**totals, "teacher": inputs(ctx)["teacher"]}
