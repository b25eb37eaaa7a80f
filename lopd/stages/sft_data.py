"""`sft_data`: the answers that SFT learns from, by the teacher or as they came with the prompts."""

from collections.abc import Iterator, Sequence

import numpy as np

from lopd.artefacts.artefact import Artefact
from lopd.cache import totals
from lopd.cache.fields import RESPONSE_FIELDS
from lopd.errors import UserError
from lopd.machine import processes
from lopd.rollouts import stream
from lopd.sampling.engine import Request, Response
from lopd.stages import common
from lopd.stages.run import Context
from lopd.tasks import Problem


def given(ctx: Context) -> bool:
    """Whether the responses are those of `task.sft_prompts`, so that no teacher is needed."""
    return ctx.config.sft_data.responses == "given"


def settings(ctx: Context) -> dict:
    """What the data depends on."""
    return common.stage_settings(ctx, "sft_data", "task", "prompt_length", "dtype")


def inputs(ctx: Context) -> dict:
    """The teacher that writes it, or is declared to have written it."""
    if given(ctx):
        return {"teacher": common.declared_teacher(ctx)}
    return {"teacher": ctx.input("teacher").outputs["fingerprint"]}


def prompts(ctx: Context) -> tuple[list[Problem], list[Request]]:
    """The SFT problems, and a request for each sample of each."""
    recipe = ctx.config.sft_data
    problems = ctx.task.problems("sft", recipe.prompts, ctx.seed("sft problems"))
    return common.make_requests(ctx, problems, recipe.samples)


def _given_responses(
    ctx: Context, problems: Sequence[Problem], requests: Sequence[Request]
) -> Iterator[Response]:
    """The responses that the problems came with, as if sampled; one over the cap is cut there."""
    by_id = {problem.problem_id: problem for problem in problems}
    cap = ctx.config.sft_data.response_length
    stop = processes.StopVote()
    for index, request in enumerate(requests):
        if index % 256 == 0:
            stop.check()
        problem = by_id[request.prompt_id]
        if not problem.response:
            raise UserError(
                f"{ctx.config.task.sft_prompts}: prompt {problem.problem_id} "
                f"({problem.prompt[:40]!r}…) has no response to learn from"
            )
        tokens = [*ctx.tokenizer.encode(problem.response), ctx.tokenizer.end_id]
        finished, tokens = len(tokens) <= cap, np.asarray(tokens[:cap], np.int32)
        unknown = np.zeros(0, np.float32)
        yield Response(index, request, tokens, unknown, unknown, finished)


def run(ctx: Context, artefact: Artefact) -> dict:
    """Samples and stores; `teacher` in the outputs says who wrote the data."""
    problems, requests = prompts(ctx)
    plan = stream.make_plan(ctx, artefact, requests)
    fields = dict(RESPONSE_FIELDS)
    if given(ctx):
        del fields["behaviour_logprobs"]

    def answer(wanted: Sequence[Request]) -> Iterator[Response]:
        if given(ctx):
            return _given_responses(ctx, problems, wanted)
        params = ctx.load_params("teacher", "teacher")
        section, purpose = ctx.config.sft_data, "sft_data sampling"
        sample = common.sampler(ctx, "teacher", params, section, purpose, responses=len(requests))
        return sample(wanted)

    def store(responses: list[Response]) -> stream.Finish:
        records = [stream.response_record(r) for r in responses]
        records = [{name: record[name] for name in fields} for record in records]
        return lambda: (records, totals.of_responses(records))

    if plan.missing:
        stream.write_responses(artefact, plan, fields, answer, store)
    return {
        **stream.finish(ctx, artefact),
        **inputs(ctx),
        "tokenizer": ctx.tokenizer_source,
    }
