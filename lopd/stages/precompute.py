"""`precompute`: π_ref samples, teacher and π_ref score, once. No teacher exists after this job.

`heldout` (lopd.stages.heldout) is the same on other prompts.
"""

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
import numpy as np
from absl import logging

from lopd.artefacts import accounting
from lopd.artefacts.artefact import Artefact
from lopd.cache import reader, totals, writer
from lopd.cache.codec import shard_name
from lopd.cache.fields import REF_SCORED_FIELDS, SCORED_FIELDS, top_k_fields
from lopd.errors import UserError
from lopd.machine import devices, processes
from lopd.machine.progress import bar
from lopd.models import decoder
from lopd.models.memory import scoring_scratch
from lopd.models.shardings import param_shardings
from lopd.models.token_scores import TokenScores
from lopd.rollouts import stream
from lopd.rollouts.scoring import dispatch_records
from lopd.sampling.engine import Request, Response
from lopd.stages import common
from lopd.stages.run import Context
from lopd.tasks import Problem

SAMPLED = "sampled"
"""Under the artefact, while models take turns: what π_ref has sampled, still without the teacher's
scores."""

GAP_BOUND = {"float32": ("max", 1e-4), "bfloat16": ("mean", 0.05)}
"""By compute type, the most that |sampler − scorer| of π_ref's log-probabilities should be, in
nats. Of bfloat16 only the mean says something: single tokens differ by its 8 bits of mantissa."""


def settings(ctx: Context) -> dict:
    """What the cache depends on."""
    shared = {}
    if not ctx.config.precompute.prompts:  # all but the held-out ones
        shared = {"heldout_prompts": ctx.config.heldout.prompts}
    own = common.stage_settings(ctx, "precompute", "task", "prompt_length", "dtype")
    return own | shared


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


def inputs_beside_cache(ctx: Context) -> dict:
    """`inputs` of a stage that samples besides, and a cache that was given: its prompts count."""
    found = inputs(ctx)
    if ctx.given("precompute"):
        found["precompute"] = ctx.input("precompute").outputs["fingerprint"]
    return found


def opd_problems(ctx: Context) -> tuple[list[Problem], list[Problem]]:
    """The OPD prompts to train on, and those held out: disjoint, drawn with the run's seed.

    Held-out ones come after the training ones in the order of the draw, so that they can be added
    to a finished cache; where training takes all prompts (`precompute.prompts=0`), they are drawn
    from those first.
    """
    train, held = ctx.config.precompute.prompts, ctx.config.heldout.prompts
    draw = ctx.seed("opd problems")
    if train:
        problems = list(ctx.task.problems("opd", train + held, draw))
        return problems[:train], problems[train:]
    problems = list(ctx.task.problems("opd", 0, draw))
    order = np.random.default_rng(ctx.seed("heldout problems")).permutation(len(problems))
    if held >= len(problems):
        raise UserError(
            f"heldout.prompts={held} would take all {len(problems)} OPD prompts: lower it"
        )
    chosen = set(order[:held].tolist())
    split: tuple[list, list] = ([], [])
    for i, problem in enumerate(problems):
        split[i in chosen].append(problem)
    return split


def prompts(ctx: Context) -> list[Request]:
    """One request per OPD prompt and sample."""
    return common.make_requests(ctx, opd_problems(ctx)[0], ctx.config.precompute.samples)[1]


def requests_of(records: Iterable[Mapping]) -> list[Request]:
    """What the responses of a cache were answers to."""
    return [
        Request(int(r["prompt_id"]), int(r["sample_id"]), r["prompt_tokens"].tolist())
        for r in records
    ]


def run(ctx: Context, artefact: Artefact) -> dict:
    """Samples and scores; see `sample_and_score`."""
    return sample_and_score(ctx, artefact, "precompute", prompts(ctx))


def dispatcher(ctx: Context, which: str, params: decoder.Params, section: str) -> Callable:
    """A function from records to what gives their scores by one model, when called."""
    top_k = ctx.config.precompute.teacher_top_k if which == "teacher" else 0

    def dispatch(records: Sequence[dict]) -> Callable[[], list[TokenScores]]:
        return dispatch_records(
            ctx.model(which),
            params,
            records,
            mesh=ctx.mesh,
            row_length=ctx.config[section].row_length,
            rows_per_micro=ctx.config.runtime.rows_per_micro,
            top_k=top_k,
        )

    return dispatch


def _fields(ctx: Context) -> dict:
    return SCORED_FIELDS | top_k_fields(ctx.config.precompute.teacher_top_k)


class _GapWarning:
    """Says once, as soon as it shows, that sampler and scorer disagree by more than they should."""

    def __init__(self, dtype: str):
        self._kind, self._bound = GAP_BOUND.get(dtype, GAP_BOUND["bfloat16"])
        self._dtype, self._said = dtype, False

    def look(self, counted: dict) -> None:
        """Looks at a shard's totals."""
        found = totals.report(counted)["sampler_scorer_gap"][self._kind]
        if found > self._bound and not self._said:
            self._said = True
            logging.warning(
                "sampler and scorer differ by %.2g nats (%s over a shard) in their log-probs of "
                "the same tokens and weights; in %s it should be at most %g: decoding and the "
                "training forward disagree, the cache is not to be trusted",
                *(found, self._kind, self._dtype, self._bound),
            )


@dataclasses.dataclass(frozen=True)
class Student:
    """Who samples: π_ref, or the student with these weights; and which draw of theirs it is."""

    params: decoder.Params | None = None
    draw: str = ""


class _Spent:
    """Adds what a pass has cost to its artefact's manifest, under "costs", with every shard.

    The device goes from sampling to scoring and back without a pause. What passes from a shard's
    hand-over until its scores are there counts as scoring, all else as sampling.
    """

    def __init__(self, ctx: Context, artefact: Artefact):
        self._ctx, self._artefact, self._last = ctx, artefact, time.perf_counter()

    def on_shard(
        self, records: Sequence[dict], scorers: Sequence[str], began: float, sampled: bool
    ) -> None:
        """Counts a shard whose scoring `began` then and has just ended."""
        began, now = max(began, self._last), time.perf_counter()
        models = [self._ctx.model(which) for which in scorers]
        costs = {"scoring": accounting.forward(models, records, now - began)}
        if sampled:
            model = self._ctx.model("student")
            costs["sampling"] = accounting.forward([model], records, began - self._last)
        self._last = now
        manifest = self._artefact.manifest
        manifest["costs"] = accounting.total([manifest.get("costs", {}), costs])


def _sampling_pass(
    ctx: Context,
    artefact: Artefact,
    section: str,
    plan: stream.Plan,
    teacher_params: decoder.Params | None,
    student: Student,
) -> None:
    """π_ref samples and scores, the teacher scores too if it is there, shard by shard."""
    ref_params = student.params or ctx.load_params("sft", "student")
    by_ref = dispatcher(ctx, "student", ref_params, section)
    by_teacher = teacher_params and dispatcher(ctx, "teacher", teacher_params, section)
    gap_warning, spent = _GapWarning(ctx.model("student").dtype), _Spent(ctx, artefact)
    scorers = ("student", "teacher") if teacher_params else ("student",)

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
            gap_warning.look(counted)
            if teacher:
                records_and_totals = _scored(records, counted, teacher())
            else:
                records_and_totals = records, counted
            spent.on_shard(records, scorers, began, sampled=True)
            return records_and_totals

        return finish

    purpose = f"{section} sampling{student.draw}"
    sample = common.sampler(
        ctx,
        "student",
        ref_params,
        ctx.config[section],
        purpose,
        responses=len(plan.requests),
        reserved=max(_scoring_bytes(ctx, which, section) for which in scorers),
    )
    fields = _fields(ctx) if teacher_params else REF_SCORED_FIELDS
    stream.write_responses(artefact, plan, fields, sample, score, sample.stats)


def _scored(
    records: list[dict], counted: dict, by_teacher: Sequence[TokenScores]
) -> tuple[list[dict], dict]:
    """Records and totals with the teacher's scores."""
    add_teacher_scores(records, by_teacher)
    return records, counted | totals.of_scores(records)


def add_teacher_scores(records: Sequence[dict], by_teacher: Sequence[TokenScores]) -> None:
    """Puts the teacher's scores into the records."""
    for record, scores in zip(records, by_teacher, strict=True):
        record["teacher_logprobs"] = scores.logprobs
        if scores.topk_ids is not None:
            record["teacher_topk_ids"] = scores.topk_ids
            record["teacher_topk_logprobs"] = scores.topk_logprobs


def _teacher_pass(
    ctx: Context, artefact: Artefact, section: str, plan: stream.Plan, sampled: Artefact
) -> None:
    """The teacher scores the shards that π_ref has sampled."""
    dispatch = dispatcher(ctx, "teacher", ctx.load_params("teacher", "teacher"), section)
    counted = {shard["name"]: shard["totals"] for shard in sampled.manifest["shards"]}
    spent = _Spent(ctx, artefact)

    def score(name: str) -> stream.Finish:
        records, began = reader.read_shard(sampled, name), time.perf_counter()
        scores = dispatch(records)

        def finish() -> tuple[list[dict], dict]:
            records_and_totals = _scored(records, counted[name], scores())
            spent.on_shard(records, ("teacher",), began, sampled=False)
            return records_and_totals

        return finish

    with writer.ShardWriter(artefact, _fields(ctx), plan.count) as shards:
        for index in bar(plan.missing, total=len(plan.missing), label="teacher", unit="shards"):
            processes.check_stop()
            shards.put(index, score(shard_name(index, plan.count)))


def _resident_dtypes(ctx: Context) -> dict[str, str]:
    """The types that the weights which score are held in (`Context.load_params`)."""
    teacher = ctx.model("teacher").dtype if ctx.external("teacher") else "float32"
    return {"student": "float32", "teacher": teacher}


def _scoring_bytes(ctx: Context, which: str, section: str) -> int:
    """Bytes per device that scoring a shard takes, by formula, while the sampler goes on."""
    return int(
        scoring_scratch(
            ctx.model(which),
            dict(ctx.mesh.shape),
            rows=ctx.config.runtime.rows_per_micro,
            row_length=ctx.config[section].row_length,
            weight_bytes=np.dtype(_resident_dtypes(ctx)[which]).itemsize,
        )
    )


def resident_bytes(ctx: Context, optimizer: bool = False) -> int:
    """Bytes per device that student and teacher take together while π_ref samples.

    The student is there in float32, for the scoring pass that must equal training's, and in its
    compute type for decoding if that is another; the teacher as `Context.load_params` gives it.
    With `optimizer`, the student's two moments are there too.
    """

    def size(which: str, dtype: str) -> int:
        model = ctx.model(which)
        shapes = decoder.abstract_params(model)
        parts = jax.tree.map(
            lambda leaf, sharding: int(np.prod(sharding.shard_shape(leaf.shape))),
            shapes,
            param_shardings(model, ctx.mesh),
        )
        return sum(jax.tree.leaves(parts)) * np.dtype(dtype).itemsize

    student = ctx.model("student").dtype
    decoding = 0 if student == "float32" else size("student", student)
    dtypes = _resident_dtypes(ctx)
    held = (3 if optimizer else 1) * size("student", dtypes["student"])
    return held + decoding + size("teacher", dtypes["teacher"])


def _fits_together(ctx: Context, student: Student) -> bool:
    """Whether student and teacher may be resident together, by plan.

    A third of the memory is left to what sampling and scoring need besides weights.
    """
    limit = devices.device_memory(ctx.mesh)
    needed = resident_bytes(ctx, optimizer=student.params is not None)
    if needed * 3 <= limit * 2:
        return True
    print(
        f"student and teacher would take {needed / 2**30:.1f} GiB of {limit / 2**30:.1f} GiB per "
        "device: they take turns, first all sampling, then the teacher's scores",
        flush=True,
    )
    return False


def sample_and_score(
    ctx: Context,
    artefact: Artefact,
    section: str,
    requests: Sequence[Request],
    student: Student = Student(),
) -> dict:
    """Samples every request from π_ref by the settings of `section`, and scores the responses.

    π_ref is the fine-tuned student, or another `student`, as one that is being trained.

    The outputs report how far the sampler's log-probabilities (decoding with a cache) are from
    the scorer's (the training forward) on the same tokens and weights, and how consistent the
    teacher looks.
    """
    plan = stream.make_plan(ctx, artefact, requests)
    sampled = Artefact(artefact.path / SAMPLED)
    if plan.missing and sampled.manifest is None and _fits_together(ctx, student):
        teacher = ctx.load_params("teacher", "teacher")
        _sampling_pass(ctx, artefact, section, plan, teacher, student)
    elif plan.missing:
        sampled.begin(SAMPLED, artefact.manifest["settings"], artefact.manifest["inputs"])
        todo = set(stream.make_plan(ctx, sampled, requests).missing) & {*plan.missing}
        first = dataclasses.replace(plan, missing=sorted(todo))
        if first.missing:
            _sampling_pass(ctx, sampled, section, first, None, student)
            processes.barrier(f"{sampled.path} written")
            sampled.reload()
        _teacher_pass(ctx, artefact, section, plan, sampled)
    costs = [a.manifest.get("costs", {}) for a in (artefact, sampled) if a.manifest]
    if processes.is_main() and sampled.path.exists():
        sampled.path.rmtree()
    outputs = stream.finish(ctx, artefact)
    artefact.manifest.pop("costs", None)
    return {
        **outputs,
        **{name: artefact.manifest["inputs"][name] for name in ("teacher", "sft")},
        "sft_teacher": ctx.input("sft").outputs["teacher"],
        "tokenizer": ctx.tokenizer_source,
        "costs": accounting.total(costs),
    }
