"""π_ref samples, teacher and π_ref score: together where both fit, else in turns.

Everything here is handed in as values: `Job` holds who samples and scores, and by which shapes.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh

from lopd.artefacts import accounting
from lopd.artefacts.artefact import Artefact
from lopd.artefacts.manifest import Costs
from lopd.cache import reader, totals, writer
from lopd.cache.codec import shard_name
from lopd.cache.fields import REF_SCORED_FIELDS, SCORED_FIELDS, top_k_fields
from lopd.config.settings import LoraSettings, RuntimeSettings, SamplingSettings
from lopd.machine import devices, processes
from lopd.machine.progress import bar
from lopd.models import decoder, inference, memory
from lopd.models.low_rank import abstract_adapters_on
from lopd.models.shardings import abstract_params_on, param_shardings
from lopd.models.token_scores import TokenScores
from lopd.rollouts import stream
from lopd.rollouts.scoring import dispatch_records
from lopd.sampling.draw import Truncation
from lopd.sampling.engine import Request, Response, Sampler, Sampling
from lopd.sampling.placement import sampling_mesh, slots_that_fit

SAMPLED = "sampled"
"""Under the artefact, while models take turns: what π_ref has sampled, still without the teacher's
scores."""

GAP_BOUND = {"float32": ("max", 1e-4), "bfloat16": ("mean", 0.05)}
"""By compute type, the most that |sampler − scorer| of π_ref's log-probabilities should be, in
nats. Of bfloat16 only the mean says something: single tokens differ by its 8 bits of mantissa."""


# One model that samples, one that scores


@dataclasses.dataclass(frozen=True)
class SamplerPlan:
    """How a model answers prompts, but for its weights."""

    model: decoder.DecoderConfig
    section: SamplingSettings
    """Prompts, samples, temperature, truncation and cap."""
    seed: int
    """Of every draw, with prompt, sample and position."""
    end_ids: tuple[int, ...]
    """Tokens that end a response."""
    prompt_length: int
    """Most tokens of a prompt."""
    runtime: RuntimeSettings
    mesh: Mesh

    def make(
        self, params: decoder.Params, *, responses: int | None = None, reserved: int = 0
    ) -> Sampler:
        """What answers requests (in order of finishing), and counts what it does.

        There are no more slots than `responses`, the most that a whole job asks for: the same
        number in a continued run. They leave `reserved` bytes per device to what else comes while
        they are held. While it samples it raises `Stopped` a decode call or two after a signal to
        any process.
        """
        section, mesh = self.section, sampling_mesh(self.model, self.mesh)
        sampling = Sampling(
            temperature=section.temperature,
            max_response=section.response_length,
            seed=self.seed,
            end_ids=self.end_ids,
            truncation=Truncation(section.top_k or 0, section.top_p, section.min_p),
        )
        shardings = param_shardings(self.model, mesh)
        decode_params = inference.inference_params(self.model, params, shardings)
        capacity = self.prompt_length + section.response_length
        jax.block_until_ready(decode_params)  # what making them took is free again
        return Sampler(
            self.model,
            decode_params,
            sampling,
            slots=slots_that_fit(
                self.model, capacity, mesh, self.runtime.slots or 0, responses, reserved
            ),
            capacity=capacity,
            decode_steps=self.runtime.decode_steps,
            mesh=mesh,
            check=processes.StopVote().check,
        )


Dispatch = Callable[[Sequence[Mapping]], Callable[[], list[TokenScores]]]
"""From records to what gives their scores by one model, when called."""


@dataclasses.dataclass(frozen=True)
class Scorer:
    """A model that scores, but for its weights, and how its rows are packed."""

    name: str
    """The teacher or the student, for messages and costs."""
    model: decoder.DecoderConfig
    load: Callable[[], decoder.Params]
    """Reads its weights."""
    dtype: str
    """The type that its weights are held in."""
    mesh: Mesh
    row_length: int
    """Positions of a packed row."""
    rows_per_micro: int
    """Packed rows in one pass."""
    top_k: int = 0
    """How many of the most likely tokens it reports besides."""
    lora: LoraSettings | None = None
    """Its adapters, if it is trained by them."""

    def dispatcher(self, params: decoder.Params) -> Dispatch:
        """See `Dispatch`."""

        def dispatch(records: Sequence[Mapping]) -> Callable[[], list[TokenScores]]:
            return dispatch_records(
                self.model,
                params,
                records,
                mesh=self.mesh,
                row_length=self.row_length,
                rows_per_micro=self.rows_per_micro,
                top_k=self.top_k,
            )

        return dispatch

    def scratch_bytes(self) -> int:
        """Bytes per device that scoring a shard takes beside the weights, by formula."""
        return int(
            memory.scoring_scratch(
                self.model,
                dict(self.mesh.shape),
                rows=self.rows_per_micro,
                row_length=self.row_length,
                weight_bytes=np.dtype(self.dtype).itemsize,
            )
        )

    def weight_bytes(self, dtype: str | None = None) -> int:
        """Bytes per device that its weights take, as they are held or merged in another type."""
        tree = abstract_params_on(self.model, self.mesh, dtype or self.dtype)
        adapters = self._adapters() if dtype is None else {}
        return memory.bytes_per_device((tree, adapters))

    def moment_bytes(self) -> int:
        """Bytes per device that an optimizer's two moments of what is trained take."""
        trained = self._adapters() or abstract_params_on(self.model, self.mesh)
        return 2 * memory.bytes_per_device(trained)

    def _adapters(self) -> decoder.Params:
        return abstract_adapters_on(self.model, self.lora, self.mesh) if self.lora else {}


def add_teacher_scores(records: Sequence[dict], by_teacher: Sequence[TokenScores]) -> None:
    """Puts the teacher's scores into the records."""
    for record, scores in zip(records, by_teacher, strict=True):
        record["teacher_logprobs"] = scores.logprobs
        if scores.topk_ids is not None:
            record["teacher_topk_ids"] = scores.topk_ids
            record["teacher_topk_logprobs"] = scores.topk_logprobs


def resident_bytes(student: Scorer, teacher: Scorer, optimizer: bool = False) -> int:
    """Bytes per device that student and teacher take together while the student samples.

    The student is there as it is trained, for the scoring pass that must equal training's, and in
    its compute type for decoding if that is another, or if adapters are merged for it. With
    `optimizer`, the two moments of what is trained are there too.
    """
    compute = student.model.dtype
    same = compute == "float32" and not student.lora
    decoding = 0 if same else student.weight_bytes(compute)
    moments = student.moment_bytes() if optimizer else 0
    return student.weight_bytes() + moments + decoding + teacher.weight_bytes()


# The job


@dataclasses.dataclass(frozen=True)
class Job:
    """Sampling by the student and scoring by both, into one artefact."""

    student: Scorer
    teacher: Scorer
    """Scores besides."""
    sampler: SamplerPlan
    records_per_shard: int
    """Responses that are written together."""
    worker: tuple[int, int] | None = None
    """(i, N): makes part i of N only."""
    training: bool = False
    """Whether the student is being trained meanwhile, so that its moments are there too."""

    @property
    def fields(self) -> dict:
        """The fields of a record that both have scored."""
        return SCORED_FIELDS | top_k_fields(self.teacher.top_k)


class _GapWarning:
    """Says once, as soon as it shows, that sampler and scorer disagree by more than they should."""

    def __init__(self, dtype: str):
        self._kind, self._bound = GAP_BOUND.get(dtype, GAP_BOUND["bfloat16"])
        self._dtype, self._said = dtype, False

    def check(self, counted: dict) -> None:
        """Compares a shard's totals with the bound."""
        found = totals.report(counted)["sampler_scorer_gap"][self._kind]
        if found > self._bound and not self._said:
            self._said = True
            logging.warning(
                "sampler and scorer differ by %.2g nats (%s over a shard) in their log-probs of "
                "the same tokens and weights; in %s it should be at most %g: decoding and the "
                "training forward disagree, the cache is not to be trusted",
                *(found, self._kind, self._dtype, self._bound),
            )


class _Spent:
    """Tells what a pass has cost, shard by shard.

    The device goes from sampling to scoring and back without a pause. What passes from a shard's
    hand-over until its scores are there counts as scoring, all else as sampling.
    """

    def __init__(self):
        self._last = time.perf_counter()

    def on_shard(
        self,
        records: Sequence[dict],
        scorers: Sequence[Scorer],
        began: float,
        sampled_by: decoder.DecoderConfig | None = None,
    ) -> Costs:
        """The costs of a shard whose scoring `began` then and has just ended."""
        began, now = max(began, self._last), time.perf_counter()
        models = [scorer.model for scorer in scorers]
        costs = {"scoring": accounting.forward(models, records, now - began)}
        if sampled_by:
            costs["sampling"] = accounting.forward([sampled_by], records, began - self._last)
        self._last = now
        return costs


def _scored(
    records: list[dict], counted: dict, by_teacher: Sequence[TokenScores]
) -> tuple[list[dict], dict]:
    """Records and totals with the teacher's scores."""
    add_teacher_scores(records, by_teacher)
    return records, counted | totals.of_scores(records)


def _sampling_pass(
    job: Job, artefact: Artefact, plan: stream.Plan, teacher_params: decoder.Params | None
) -> None:
    """π_ref samples and scores, the teacher scores too if it is there, shard by shard."""
    ref_params = job.student.load()
    by_ref = job.student.dispatcher(ref_params)
    by_teacher = teacher_params and job.teacher.dispatcher(teacher_params)
    gap_warning, spent = _GapWarning(job.student.model.dtype), _Spent()
    scorers = (job.student, job.teacher) if teacher_params else (job.student,)

    def score(responses: list[Response]) -> stream.Finish:
        records = [stream.response_record(r) for r in responses]
        began = time.perf_counter()
        ref, teacher = by_ref(records), by_teacher and by_teacher(records)

        def finish() -> tuple[list[dict], dict]:
            ref_logprobs = [scores.logprobs for scores in ref()]
            for record, logprobs in zip(records, ref_logprobs, strict=True):
                record["ref_logprobs"] = logprobs
            counted = totals.of_responses(records)
            counted |= totals.of_gaps([r.logprobs for r in responses], ref_logprobs)
            gap_warning.check(counted)
            finished = _scored(records, counted, teacher()) if teacher else (records, counted)
            costs = spent.on_shard(records, scorers, began, sampled_by=job.student.model)
            return writer.Made(*finished, costs)

        return finish

    reserved = max(scorer.scratch_bytes() for scorer in scorers)
    sample = job.sampler.make(ref_params, responses=len(plan.requests), reserved=reserved)
    fields = job.fields if teacher_params else REF_SCORED_FIELDS
    stream.write_responses(artefact, plan, fields, sample, score, sample.stats)


def _teacher_pass(job: Job, artefact: Artefact, plan: stream.Plan, sampled: Artefact) -> None:
    """The teacher scores the shards that π_ref has sampled."""
    dispatch = job.teacher.dispatcher(job.teacher.load())
    before = {shard["name"]: shard for shard in sampled.manifest.shards}
    spent = _Spent()

    def score(name: str) -> stream.Finish:
        records, began = reader.read_shard(sampled, name), time.perf_counter()
        scores = dispatch(records)

        def finish() -> tuple[list[dict], dict]:
            finished = _scored(records, before[name]["totals"], scores())
            costs = [before[name]["costs"], spent.on_shard(records, (job.teacher,), began)]
            return writer.Made(*finished, accounting.total(costs))

        return finish

    with writer.ShardWriter(artefact, job.fields, plan.count) as shards:
        for index in bar(plan.missing, total=len(plan.missing), label="teacher", unit="shards"):
            processes.check_stop()
            shards.put(index, score(shard_name(index, plan.count)))


def _fits_together(job: Job) -> bool:
    """Whether student and teacher may be resident together, by plan.

    A third of the memory is left to what sampling and scoring need besides weights.
    """
    limit = devices.device_memory(job.student.mesh)
    needed = resident_bytes(job.student, job.teacher, optimizer=job.training)
    if needed * 3 <= limit * 2:
        return True
    print(
        f"student and teacher would take {needed / 2**30:.1f} GiB of {limit / 2**30:.1f} GiB per "
        "device: they take turns, first all sampling, then the teacher's scores",
        flush=True,
    )
    return False


def sample_and_score(job: Job, artefact: Artefact, requests: Sequence[Request]) -> dict:
    """Samples every request, scores the responses and returns the artefact's outputs.

    The outputs report how far the sampler's log-probabilities (decoding with a cache) are from
    the scorer's (the training forward) on the same tokens and weights, and how consistent the
    teacher looks; and what all of it has cost.
    """

    def planned(place: Artefact) -> stream.Plan:
        return stream.make_plan(place, requests, job.records_per_shard, job.worker)

    plan, sampled = planned(artefact), Artefact(artefact.path / SAMPLED)
    if plan.missing and sampled.manifest is None and _fits_together(job):
        _sampling_pass(job, artefact, plan, job.teacher.load())
    elif plan.missing:
        sampled.begin(SAMPLED, artefact.manifest.settings, artefact.manifest.inputs)
        todo = set(planned(sampled).missing) & {*plan.missing}
        first = dataclasses.replace(plan, missing=sorted(todo))
        if first.missing:
            _sampling_pass(job, sampled, first, None)
            processes.barrier(f"{sampled.path} written")
            sampled.reload()
        _teacher_pass(job, artefact, plan, sampled)
    if processes.is_main() and sampled.path.exists():
        sampled.path.rmtree()
    return stream.finish(artefact)
