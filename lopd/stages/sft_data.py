"""`sft_data`: the teacher answers the SFT prompts."""

from lopd.artefact import Artefact
from lopd.cache import totals
from lopd.cache.schema import RESPONSE_FIELDS
from lopd.context import Context
from lopd.sampling.engine import Request, Response
from lopd.stages import common, rollouts


def settings(ctx: Context) -> dict:
    """What the data depends on."""
    own = common.stage_settings(ctx, "sft_data", "task", "prompt_length", "dtype")
    return {**own, "template": ctx.tokenizer.template_fingerprint}


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
    plan = rollouts.make_plan(ctx, artefact, prompts(ctx))

    def store(responses: list[Response]) -> rollouts.Finish:
        records = [rollouts.response_record(r) for r in responses]
        return lambda: (records, totals.of_responses(records))

    if plan.missing:
        params = ctx.load_params("teacher", "teacher")
        sample = common.sampler(ctx, "teacher", params, ctx.config.sft_data, "sft_data sampling")
        rollouts.write_responses(artefact, plan, RESPONSE_FIELDS, sample, store)
    return {
        **rollouts.finish(ctx, artefact),
        **inputs(ctx),
        "tokenizer": ctx.tokenizer_source,
    }
