"""`online`: standard OPD, the baseline. Every step samples from the student as it is, and the
teacher, which stays resident, scores.

It differs from `opd` in where a batch comes from and in nothing else: sampler, scorer, objective
and step are the same, the settings are those of `opd` and `precompute`, and step n reads the same
prompts.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax

from lopd.artefacts import accounting
from lopd.artefacts.artefact import Artefact
from lopd.cache.reader import Records
from lopd.data.batches import Arrays, make_layout, micro_batches, step_indices
from lopd.errors import UserError
from lopd.machine import devices
from lopd.models import decoder, inference
from lopd.models.shardings import param_shardings
from lopd.rollouts import stream
from lopd.sampling.engine import Request
from lopd.stages import common, opd, precompute
from lopd.stages.objective import make_objective
from lopd.stages.run import Context


def settings(ctx: Context) -> dict:
    """What the trained student depends on."""
    own = common.stage_settings(ctx, "opd")["opd"]
    own = {key: value for key, value in own.items() if not key.startswith("refresh_")}
    return precompute.settings(ctx) | {"opd": own} | common.model_settings(ctx, "student")


def inputs(ctx: Context) -> dict:
    """Teacher and student; and the cache whose prompts are read, if one was given."""
    return precompute.inputs_beside_cache(ctx)


def prompts(ctx: Context) -> list[Request]:
    """The requests that the cache answers, in its order."""
    if ctx.given("precompute"):
        requests = precompute.requests_of(Records(ctx.input("precompute")))
    else:
        requests = precompute.prompts(ctx)
    return requests[: ctx.config.opd.records or None]


class OnlineBatches:
    """Batches of fresh rollouts from the parameters that a step starts from."""

    reads_params = True

    def __init__(self, ctx: Context, params: decoder.Params):
        recipe, model = ctx.config.opd, ctx.model("student")
        self._ctx = ctx
        self._requests = prompts(ctx)
        self._indices = step_indices(len(self._requests), **common.batch_order(ctx, recipe, "opd"))
        top_k = ctx.config.precompute.teacher_top_k
        contents = opd.batch_contents(ctx, top_k, "what online OPD scores")
        self.layout = make_layout(**common.batch_rows(ctx, recipe, **contents))
        teacher = ctx.load_params("teacher", "teacher")
        self._score = precompute.dispatcher(ctx, "teacher", teacher, "precompute")
        # Its weights are those of the first step only; each step puts its own in their place.
        moments = precompute.resident_bytes(ctx, optimizer=True) - precompute.resident_bytes(ctx)
        sampler = common.sampler(
            ctx,
            "student",
            params,
            ctx.config.precompute,
            "online sampling",
            responses=recipe.batch_size,
            reserved=moments,
        )
        self._sampler = dataclasses.replace(sampler, params=None)
        self._to_decode = inference.to_inference_params(model, param_shardings(model, sampler.mesh))
        self._read: tuple[int, list[dict]] = (-1, [])

    def requests(self, step: int) -> list[Request]:
        """What is answered in a step, from 0: the prompts of the offline step."""
        return [self._requests[int(i)] for i in self._indices[step]]

    def rollouts(self, step: int, params: decoder.Params) -> tuple[list[dict], accounting.Costs]:
        """The records of a step, as a cache would have them, and what they cost.

        `ref_logprobs` are the sampler's log π_θ. The training pass starts from the same weights, so
        an importance weight away from 1 is the difference between the two.
        """
        ctx, model = self._ctx, self._ctx.model("student")
        jax.block_until_ready(params)  # the step before is not sampling
        began = time.perf_counter()
        seed = ctx.seed(f"online sampling, step {step + 1}")
        sample = dataclasses.replace(
            self._sampler,
            params=self._to_decode(params),
            sampling=dataclasses.replace(self._sampler.sampling, seed=seed),
        )
        responses = sorted(sample(self.requests(step)), key=lambda r: r.index)
        sampled = time.perf_counter()
        records = [{**stream.response_record(r), "ref_logprobs": r.logprobs} for r in responses]
        precompute.add_teacher_scores(records, self._score(records)())
        scored = time.perf_counter()
        return records, {
            "sampling": accounting.forward([model], records, sampled - began),
            "scoring": accounting.forward([ctx.model("teacher")], records, scored - sampled),
        }

    def reader(self, start: int, stop: int, put: Callable[[Arrays], Any]):
        """See `lopd.training.loop.Batches`."""

        def read(step: int, params: decoder.Params) -> tuple[Any, dict[str, float]]:
            records, costs = self.rollouts(step, params)
            self._read = step, records
            return put(micro_batches(records, **self.layout)), accounting.as_columns(costs)

        return read

    def records(self, step: int) -> list[dict]:
        """The records of the step that was read last."""
        assert step == self._read[0], (step, self._read[0])
        return self._read[1]


def _check_room(ctx: Context) -> None:
    """Student, optimizer and teacher are all there all the time."""
    needed = precompute.resident_bytes(ctx, optimizer=True)
    limit = devices.device_memory(ctx.mesh)
    if needed > limit:
        raise UserError(
            f"online OPD would take {needed / 2**30:.1f} GiB per device for student, optimizer and "
            f"teacher, and there are {limit / 2**30:.1f} GiB: use more devices (mesh.fsdp), or opd"
        )


def run(ctx: Context, artefact: Artefact) -> dict:
    """OPD on fresh rollouts."""
    _check_room(ctx)
    params = ctx.load_params("sft", "student")
    batches, objective = OnlineBatches(ctx, params), make_objective(ctx.config.opd)
    drift = opd.make_drift_panel(ctx, batches.layout, objective)
    return common.train_into(
        ctx, artefact, "student", params, batches, objective, ctx.config.opd, drift=drift
    )
