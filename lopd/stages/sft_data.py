"""`sft_data`: the teacher answers the SFT prompts."""

from lopd.artefact import Artefact
from lopd.cache.schema import RESPONSE_FIELDS
from lopd.context import Context
from lopd.sampling.engine import Request
from lopd.stages import common


def settings(ctx: Context) -> dict:
    """What the data depends on."""
    return common.stage_settings(ctx, "sft_data", "task", "prompt_length", "dtype")


def inputs(ctx: Context) -> dict:
    """The teacher that writes it."""
    return {"teacher": ctx.input("teacher").outputs["fingerprint"]}


def prompts(ctx: Context) -> list[Request]:
    """One request per SFT prompt and sample."""
    recipe = ctx.config.sft_data
    problems = ctx.task.problems("sft", recipe.prompts, ctx.seed("sft problems"))
    return common.make_requests(ctx, problems, recipe.samples)[1]


def run(ctx: Context, artefact: Artefact) -> dict:
    """Samples and stores; `teacher` in the outputs says who wrote the data."""
    params = ctx.load_params("teacher", "teacher")
    totals = common.write_responses(
        ctx,
        artefact,
        RESPONSE_FIELDS,
        prompts(ctx),
        common.sampler(ctx, "teacher", params, ctx.config.sft_data, "sft_data sampling"),
        lambda responses: [common.response_record(r) for r in responses],
    )
    return {**totals, "teacher": inputs(ctx)["teacher"]}
