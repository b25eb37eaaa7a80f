"""What the stages with scored rollouts share: `precompute`, `heldout`, refreshed caches, `online`.

Their settings and inputs, the requests they make, and the job that samples and scores.
"""

import dataclasses
import functools
from collections.abc import Iterable, Sequence

import numpy as np

from lopd.artefacts.artefact import Artefact
from lopd.cache.reader import Records
from lopd.config.catalogue import STUDENT, TEACHER
from lopd.config.settings import SamplingSettings
from lopd.errors import UserError
from lopd.models import decoder
from lopd.rollouts.passes import Job, SamplerPlan, Scorer, sample_and_score
from lopd.rollouts.requests import requests_of
from lopd.sampling.engine import Request
from lopd.stages.identity import sampling_settings, stage_settings, task_settings
from lopd.stages.origins import Given
from lopd.stages.run import Run
from lopd.stages.weights import load_params, resident_dtype

# Identity


def cache_settings(run: Run) -> dict:
    """The settings that the cache depends on."""
    shared = {}
    if run.settings.precompute.prompts is None:  # all but the held-out ones
        shared = {"heldout_prompts": run.settings.heldout.prompts}
    own = stage_settings(run, "precompute", "prompt_length", "dtype")
    return own | task_settings(run, "opd_prompts") | sampling_settings(run) | shared


def heldout_settings(run: Run) -> dict:
    """The settings that the held-out rollouts depend on."""
    own = stage_settings(run, "heldout", "prompt_length", "dtype")
    own |= task_settings(run, "opd_prompts") | sampling_settings(run)
    trained = run.settings.precompute
    return own | {"precompute_prompts": trained.prompts, "teacher_top_k": trained.teacher_top_k}


def scoring_inputs(run: Run) -> dict:
    """The teacher that scores and the student that samples.

    Raises:
      UserError: if another teacher wrote the SFT data (teacher consistency, arXiv 2604.13010,
        section 3), unless the settings allow it.
    """
    teacher = run.input("teacher").outputs["fingerprint"]
    sft = run.input("sft")
    wrote = sft.outputs["teacher"]
    if wrote != teacher and not run.settings.precompute.allow_inconsistent_teacher:
        raise UserError(
            f"teacher {teacher} would score, but teacher {wrote} wrote the SFT data of "
            f"{sft.path}: use that teacher, or set precompute.allow_inconsistent_teacher=True "
            "for an ablation"
        )
    return {"teacher": teacher, "sft": sft.outputs["fingerprint"]}


def inputs_beside_cache(run: Run) -> dict:
    """`scoring_inputs` of a stage that samples besides, and a given cache: its prompts count."""
    found = scoring_inputs(run)
    if isinstance(run.origin("precompute"), Given):
        found["precompute"] = run.input("precompute").outputs["fingerprint"]
    return found


# Requests


def training_requests(run: Run) -> list[Request]:
    """What the cache answers, in its order: of the cache that was given, or of this run's."""
    if isinstance(run.origin("precompute"), Given):
        return requests_of(Records(run.input("precompute")))
    return run.prompts.opd.requests(run.settings.precompute.samples)


def heldout_requests(run: Run) -> list[Request]:
    """One request per held-out prompt and sample; one whose tokens are trained on is left out."""

    def keys(requests: Iterable[Request]) -> list[bytes]:
        return [np.asarray(r.prompt_tokens, np.int32).tobytes() for r in requests]

    trained = {*keys(training_requests(run))}
    requests = run.prompts.heldout.requests(run.settings.heldout.samples)
    return [r for r, key in zip(requests, keys(requests), strict=True) if key not in trained]


# The job


def sampler_plan(run: Run, which: str, section: SamplingSettings, purpose: str) -> SamplerPlan:
    """How a model of the run answers prompts by a section of the settings."""
    return SamplerPlan(
        model=run.model(which),
        section=section,
        seed=run.seed(purpose),
        end_ids=run.end_ids,
        prompt_length=run.settings.prompt_length,
        runtime=run.settings.runtime,
        mesh=run.mesh,
    )


def scorer(run: Run, which: str, row_length: int) -> Scorer:
    """The teacher or π_ref as it scores in rows of that length."""
    top_k = run.settings.precompute.teacher_top_k if which == TEACHER else None
    stage = "teacher" if which == TEACHER else "sft"
    return Scorer(
        name=which,
        model=run.model(which),
        load=functools.partial(load_params, run, stage),
        dtype=resident_dtype(run, which),
        mesh=run.mesh,
        row_length=row_length,
        rows_per_micro=run.settings.runtime.rows_per_micro,
        top_k=top_k or 0,
        lora=run.lora if which == STUDENT else None,
    )


@dataclasses.dataclass(frozen=True)
class Policy:
    """Who samples: the student with these weights instead of π_ref, and which draw it is."""

    params: decoder.Params
    draw: str


def make_scored(
    run: Run,
    artefact: Artefact,
    section: str,
    requests: Sequence[Request],
    policy: Policy | None = None,
) -> dict:
    """Samples every request by the settings of `section`, scores the responses; gives outputs.

    π_ref samples, or another `policy`, as the student that is being trained.
    """
    settings = getattr(run.settings, section)
    purpose = f"{section} sampling{policy.draw if policy else ''}"
    student = scorer(run, STUDENT, settings.row_length)
    if policy:
        student = dataclasses.replace(student, load=lambda: policy.params)
    job = Job(
        student=student,
        teacher=scorer(run, TEACHER, settings.row_length),
        sampler=sampler_plan(run, STUDENT, settings, purpose),
        records_per_shard=run.settings.runtime.records_per_shard,
        worker=run.worker,
        training=policy is not None,
    )
    return {
        **sample_and_score(job, artefact, requests),
        **{name: artefact.manifest.inputs[name] for name in ("teacher", "sft")},
        "sft_teacher": run.input("sft").outputs["teacher"],
        "tokenizer": run.tokenizer_source,
    }
