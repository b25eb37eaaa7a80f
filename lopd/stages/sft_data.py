"""`sft_data`: the answers that SFT learns from, by the teacher or as they came with the prompts."""

from collections.abc import Iterator, Sequence

import numpy as np

from lopd.artefacts.artefact import Artefact
from lopd.cache import totals
from lopd.cache.fields import RESPONSE_FIELDS
from lopd.cache.writer import Made
from lopd.config.catalogue import TEACHER
from lopd.errors import UserError
from lopd.machine import processes
from lopd.rollouts import stream
from lopd.rollouts.requests import PromptSet
from lopd.sampling.engine import Request, Response
from lopd.stages.identity import (
    declared_teacher,
    sampling_settings,
    stage_settings,
    task_settings,
)
from lopd.stages.run import Run
from lopd.stages.scored import sampler_plan
from lopd.stages.stage import Stage
from lopd.stages.weights import load_params


def _given(run: Run) -> bool:
    """Whether the responses are those of `task.sft_prompts`, so that no teacher is needed."""
    return run.settings.sft_data.responses == "given"


def settings(run: Run) -> dict:
    """The settings that the data depends on."""
    own = stage_settings(run, "sft_data", "prompt_length", "dtype")
    return own | task_settings(run, "sft_prompts") | sampling_settings(run)


def inputs(run: Run) -> dict:
    """The teacher that writes it, or is declared to have written it."""
    if _given(run):
        return {"teacher": declared_teacher(run)}
    return {"teacher": run.input("teacher").outputs["fingerprint"]}


def prompts(run: Run) -> PromptSet:
    """The SFT prompts.

    Raises:
      UserError: if responses are to come with them, and one has none, or one that ends within.
    """
    found, ends = run.prompts.sft, [run.tokenizer.tokens[i] for i in run.end_ids]
    for problem in found.problems if _given(run) else ():
        if not problem.response:
            raise UserError(
                f"{run.settings.task.sft_prompts or 'the task ' + run.task.name}: prompt "
                f"{problem.problem_id} ({problem.prompt[:40]!r}…) has no response to learn from"
            )
        for end in ends:
            if end in problem.response:
                raise UserError(
                    f"{run.settings.task.sft_prompts}: the response to prompt "
                    f"{problem.problem_id} ({problem.prompt[:40]!r}…) holds the end token {end!r}: "
                    "leave it out, it is put behind each response"
                )
    return found


def _given_responses(run: Run, requests: Sequence[Request]) -> Iterator[Response]:
    """The responses that the problems came with, as if sampled; one over the cap is cut there."""
    by_id = {problem.problem_id: problem for problem in run.prompts.sft.problems}
    cap = run.settings.sft_data.response_length
    stop = processes.StopVote()
    for index, request in enumerate(requests):
        if index % 256 == 0:
            stop.check()
        response = by_id[request.prompt_id].response
        tokens = [*run.tokenizer.encode(response), run.tokenizer.end_id]
        finished, tokens = len(tokens) <= cap, np.asarray(tokens[:cap], np.int32)
        unknown = np.zeros(0, np.float32)
        yield Response(index, request, tokens, unknown, unknown, finished)


def make(run: Run, artefact: Artefact) -> dict:
    """Samples and stores; `teacher` in the outputs says who wrote the data."""
    section = run.settings.sft_data
    requests = prompts(run).requests(section.samples)
    plan = stream.make_plan(artefact, requests, run.settings.runtime.records_per_shard, run.worker)
    fields = dict(RESPONSE_FIELDS)
    if _given(run):
        del fields["behaviour_logprobs"]

    def answer(wanted: Sequence[Request]) -> Iterator[Response]:
        if _given(run):
            return _given_responses(run, wanted)
        params = load_params(run, "teacher")
        plan = sampler_plan(run, TEACHER, section, "sft_data sampling")
        return plan.make(params, responses=len(requests))(wanted)

    def store(responses: list[Response]) -> stream.Finish:
        records = [stream.response_record(r) for r in responses]
        records = [{name: record[name] for name in fields} for record in records]
        return lambda: Made(records, totals.of_responses(records), {})

    if plan.missing:
        stream.write_responses(artefact, plan, fields, answer, store)
    return {**stream.finish(artefact), **inputs(run), "tokenizer": run.tokenizer_source}


stage = Stage(settings, inputs, make, read_prompts=prompts)
