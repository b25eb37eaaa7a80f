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
from lopd.config.catalogue import STUDENT, TEACHER
from lopd.data.batches import micro_batches, step_indices
from lopd.data.layout import Batch
from lopd.errors import UserError
from lopd.machine import devices
from lopd.models import decoder, inference
from lopd.models.shardings import param_shardings
from lopd.rollouts import stream
from lopd.rollouts.passes import add_teacher_scores, resident_bytes
from lopd.sampling.engine import Request
from lopd.stages import identity, panel, scored, training
from lopd.stages.objective import batch_contents, make_objective
from lopd.stages.run import Run
from lopd.stages.stage import Stage
from lopd.stages.weights import load_params, to_train


def settings(run: Run) -> dict:
    """The settings that the trained student depends on."""
    own = identity.stage_settings(run, "opd")["opd"]
    own = {key: value for key, value in own.items() if not key.startswith("refresh_")}
    return scored.cache_settings(run) | {"opd": own} | identity.model_settings(run, STUDENT)


def requests(run: Run) -> list[Request]:
    """The requests that the cache answers, in its order, as far as `opd` trains on them."""
    return scored.training_requests(run)[: run.settings.opd.records]


def _contents(run: Run) -> dict:
    stored = run.settings.precompute.teacher_top_k or 0
    return batch_contents(run.settings.opd, run.tokenizer, stored, "what online OPD scores")


class OnlineBatches:
    """Batches of fresh rollouts from the parameters that a step starts from."""

    reads_params = True
    """A batch is sampled from the parameters that its step starts from."""

    def __init__(self, run: Run, params: decoder.Params):
        recipe, model = run.settings.opd, run.model(STUDENT)
        self._run = run
        self._requests = requests(run)
        order = training.batch_order(run, recipe, "opd")
        self._indices = step_indices(len(self._requests), **order)
        self.layout = training.batch_rows(run, recipe, **_contents(run))
        row_length = run.settings.precompute.row_length
        student, teacher = (scored.scorer(run, who, row_length) for who in (STUDENT, TEACHER))
        self._score = teacher.dispatcher(teacher.load())
        moments = student.moment_bytes()
        plan = scored.sampler_plan(run, STUDENT, run.settings.precompute, "online sampling")
        sampler = plan.make(params, responses=recipe.batch_size, reserved=moments)
        # Its weights are those of the first step only; each step puts its own in their place.
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
        run = self._run
        jax.block_until_ready(params)  # the step before is not sampling
        began = time.perf_counter()
        seed = run.seed(f"online sampling, step {step + 1}")
        sample = dataclasses.replace(
            self._sampler,
            params=self._to_decode(params),
            sampling=dataclasses.replace(self._sampler.sampling, seed=seed),
        )
        responses = sorted(sample(self.requests(step)), key=lambda r: r.index)
        sampled = time.perf_counter()
        records = [{**stream.response_record(r), "ref_logprobs": r.logprobs} for r in responses]
        add_teacher_scores(records, self._score(records)())
        ended = time.perf_counter()
        student, teacher = run.model(STUDENT), run.model(TEACHER)
        return records, {
            "sampling": accounting.forward([student], records, sampled - began),
            "scoring": accounting.forward([teacher], records, ended - sampled),
        }

    def reader(self, start: int, stop: int, put: Callable[[Batch], Any]):
        """See `lopd.training.loop.Batches`."""
        del start, stop

        def read(step: int, params: decoder.Params) -> tuple[Any, dict[str, float]]:
            records, costs = self.rollouts(step, params)
            self._read = step, records
            return put(micro_batches(records, self.layout)), accounting.as_columns(costs)

        return read

    def records(self, step: int) -> list[dict]:
        """The records of the step that was read last."""
        assert step == self._read[0], (step, self._read[0])
        return self._read[1]


def check(run: Run, stages: tuple[str, ...]) -> None:
    """Refuses what the objective cannot find in what online OPD scores.

    Raises:
      UserError: if the objective needs more of the teacher's top-K, or a masked token is unknown.
    """
    del stages
    _contents(run)


def _check_room(run: Run) -> None:
    """Student, optimizer and teacher are all there all the time."""
    row_length = run.settings.precompute.row_length
    student, teacher = (scored.scorer(run, who, row_length) for who in (STUDENT, TEACHER))
    needed = resident_bytes(student, teacher, optimizer=True)
    limit = devices.device_memory(run.mesh)
    if needed > limit:
        raise UserError(
            f"online OPD would take {needed / 2**30:.1f} GiB per device for student, optimizer and "
            f"teacher, and there are {limit / 2**30:.1f} GiB: use more devices (mesh.fsdp), or opd"
        )


def train(run: Run, artefact: Artefact) -> dict:
    """OPD on fresh rollouts."""
    _check_room(run)
    params, recipe = to_train(run, load_params(run, "sft")), run.settings.opd
    batches, objective = OnlineBatches(run, params), make_objective(recipe)
    drift = panel.make_panel(run, batches.layout, objective)
    trained = training.train_into(
        run, artefact, STUDENT, params, batches, objective, recipe, drift=drift
    )
    return trained.outputs


stage = Stage(settings, scored.inputs_beside_cache, train, check=check, read_prompts=requests)
