"""`precompute`: π_ref samples, teacher and π_ref score, once. No teacher exists after this job."""

import numpy as np

from lopd.artefact import Artefact
from lopd.cache.schema import SCORED_FIELDS
from lopd.context import Context
from lopd.errors import UserError
from lopd.sampling.engine import Request, Response
from lopd.scoring import score_responses
from lopd.stages import common


def settings(ctx: Context) -> dict:
    """What the cache depends on."""
    return common.stage_settings(ctx, "precompute", "task", "prompt_length", "dtype")


def inputs(ctx: Context) -> dict:
    """The teacher that scores and the student that samples.

    Raises:
      UserError: if another teacher wrote the SFT data (teacher consistency, arXiv 2604.13010,
        section 3), unless the settings allow it.
    """
    teacher = ctx.input("teacher").outputs["fingerprint"]
    sft = ctx.input("sft")
    wrote = sft.outputs["teacher"]
    if wrote != teacher and not ctx.config.precompute.allow_inconsistent_teacher:
        raise UserError(
            f"teacher {teacher} would score, but teacher {wrote} wrote the SFT data of "
            f"{sft.path}: use that teacher, or set precompute.allow_inconsistent_teacher=True "
            "for an ablation"
        )
    return {"teacher": teacher, "sft": sft.outputs["fingerprint"]}


def prompts(ctx: Context) -> list[Request]:
    """One request per OPD prompt and sample."""
    recipe = ctx.config.precompute
    problems = ctx.task.problems("opd", recipe.prompts, ctx.seed("opd problems"))
    return common.make_requests(ctx, problems, recipe.samples)[1]


def run(ctx: Context, artefact: Artefact) -> dict:
    """Samples and scores shard by shard.

    The outputs report how far the sampler's log-probabilities (decoding with a cache) are from
    the scorer's (the training forward) on the same tokens and weights.
    """
    identities = inputs(ctx)
    ref_params = ctx.load_params("sft", "student")
    teacher_params = ctx.load_params("teacher", "teacher")

    def score(which: str, params, records: list[dict]) -> list[np.ndarray]:
        return score_responses(
            ctx.model(which),
            params,
            records,
            mesh=ctx.mesh,
            row_length=ctx.config.precompute.row_length,
            rows_per_micro=ctx.config.runtime.rows_per_micro,
        )

    gap = artefact.manifest.setdefault("sampler_scorer_gap", {"sum": 0.0, "max": 0.0})

    def to_records(responses: list[Response]) -> list[dict]:
        records = [common.response_record(r) for r in responses]
        teacher_logprobs = score("teacher", teacher_params, records)
        ref_logprobs = score("student", ref_params, records)
        for response, record, teacher, ref in zip(
            responses, records, teacher_logprobs, ref_logprobs, strict=True
        ):
            record |= {"teacher_logprobs": teacher, "ref_logprobs": ref}
            difference = np.abs(response.logprobs - ref)
            gap["sum"] += float(difference.sum())
            gap["max"] = max(gap["max"], float(difference.max()))
        return records

    totals = common.write_responses(
        ctx,
        artefact,
        SCORED_FIELDS,
        prompts(ctx),
        common.sampler(ctx, "student", ref_params, ctx.config.precompute, "precompute sampling"),
        to_records,
    )
    return {
        **totals,
        **identities,
        "sampler_scorer_gap": {"mean": gap["sum"] / totals["tokens"], "max": gap["max"]},
    }
