"""The training loop: feeds the step, keeps one step in flight, logs, saves and stops cleanly."""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from lopd.artefacts.artefact import Artefact
from lopd.artefacts.fingerprint import params_fingerprint
from lopd.checkpoints import orbax
from lopd.config.settings import MetricsSettings, RuntimeSettings, TrainingRecipe
from lopd.data.batches import put_batch
from lopd.data.layout import Batch, Layout
from lopd.machine import processes, shutdown
from lopd.models import decoder
from lopd.models.low_rank import adapter_weights
from lopd.objectives.sampled import Objective
from lopd.training import failure
from lopd.training.drift import Drift
from lopd.training.log import InFlight, NotFinite, Profile, StepLog
from lopd.training.metrics_files import Rows, check_rows
from lopd.training.state import TrainState, abstract_state, create_state, make_optimizer
from lopd.training.step import make_train_step
from lopd.training.trees import merged


class Batches(Protocol):
    """Where a step's batch comes from: `lopd.data.batches.StepBatches`, or fresh rollouts."""

    layout: Layout
    """Of each batch, for this process's rows."""
    reads_params: bool
    """Whether a batch depends on the parameters that the step starts from. If not, it is prepared
    while earlier steps run."""

    def reader(
        self, start: int, stop: int, put: Callable[[Batch], Batch]
    ) -> Callable[[int, decoder.Params], tuple[Batch, dict[str, float]]]:
        """To be called with each of the steps start … stop − 1, from 0, and the parameters before.

        It gives this process's part of the batch, after `put`, and columns for the step's row. It
        may be stopped.
        """

    def records(self, step: int) -> list[dict]:
        """The records of a step that was read, whoever trains on them."""


class Rounds(Protocol):
    """A training whose batches change on the way (`lopd.stages.refresh`)."""

    def due(self, step: int, heldout: dict | None) -> bool:
        """Whether a round begins after this step; `heldout` is what its drift look found."""

    def open(self, step: int, params: decoder.Params) -> tuple[Batches, Drift | None]:
        """The batches and the drift panel after `step` steps. May take long, and be stopped.

        What `params` of that step are needed for happens once, when its round begins.
        """


def _resume(
    manager: ocp.CheckpointManager,
    artefact: Artefact,
    trainable: decoder.Params,
    optimizer: Any,
    mesh: Mesh,
    steps: int,
    runtime: RuntimeSettings,
    identity: dict,
) -> tuple[TrainState, dict[str, Rows]]:
    """The state to go on from, the newest good checkpoint's or a fresh one, and its rows."""
    abstract = abstract_state(optimizer, trainable, mesh)
    orbax.check_room(
        artefact.path / "checkpoints",
        abstract,
        abstract.params,
        steps=steps,
        checkpoint_every=runtime.checkpoint_every,
        keep_checkpoints=runtime.keep_checkpoints,
        keep_every=runtime.keep_every or 0,
    )
    check = functools.partial(check_rows, artefact.path)
    found = orbax.restore_newest(manager, abstract, identity, check)
    if found is None:
        return create_state(optimizer, trainable, mesh), {}
    state, rows = found
    # What was saved when a step was not finite still says so, which would hold back every update.
    finite = jax.jit(lambda: jnp.ones((), bool), out_shardings=abstract.finite.sharding)()
    return state.replace(finite=finite), rows


def _identity(artefact: Artefact, frozen: decoder.Params) -> dict:
    """What a checkpoint was made with; of parameters that it does not hold, the fingerprint."""
    made = {"settings": artefact.manifest.settings, "inputs": artefact.manifest.inputs}
    return {**made, "frozen": params_fingerprint(frozen)} if frozen else made


def train(
    artefact: Artefact,
    model: decoder.DecoderConfig,
    trainable: decoder.Params,
    batches: Batches,
    objective: Objective,
    recipe: TrainingRecipe,
    *,
    frozen: decoder.Params | None = None,
    mesh: Mesh,
    runtime: RuntimeSettings,
    metrics: MetricsSettings,
    drift: Drift | None = None,
    rounds: Rounds | None = None,
    router_coefficient: float = 0.0,
) -> decoder.Params:
    """Trains for `recipe.steps` steps and returns the trained tree.

    Continues from the newest good checkpoint under the artefact, if there is one: batch n is a
    function of n (and of the parameters before it), so the result is that of an uninterrupted run.
    Where batches do not read the parameters, step n is dispatched before
    the metrics of step n − 1 are read, so the device does not wait for the host.

    Args:
      artefact: where checkpoints, metrics.jsonl, drift.jsonl and the rest go; its name is shown.
      model: the model's shape.
      trainable: the parameters to train, each with its sharding on the mesh: where a fresh run
        starts. Moments, gradients and checkpoints are of these, and lie as these do. The arrays
        are donated to the first step.
      batches: where each step's batch comes from.
      objective: the per-token loss.
      recipe: steps, learning rate and so on.
      frozen: the model's other parameters, which stay as they are and are in no checkpoint; None or
        empty: there are none. A run goes on from a checkpoint with the same ones only.
      mesh: the devices.
      runtime, metrics: the sections of the settings.
      drift: the drift panel, for OPD.
      rounds: instead of `batches` and `drift` for all steps, those of one round after another; the
        state is saved before a round begins.
      router_coefficient: weight of a mixture of experts' load-balancing loss.

    Raises:
      UserError: at the first step whose loss or gradient is not finite, naming the records.
      Stopped: after SIGTERM or SIGINT, with the state saved.
      OSError: if a checkpoint could not be written; those before it are whole.
    """
    optimizer, frozen = make_optimizer(recipe), frozen or {}
    step_fn = make_train_step(
        model, optimizer, objective, trainable, mesh, runtime.remat, router_coefficient
    )
    directory, keep = artefact.path / "checkpoints", runtime.keep_checkpoints
    with (
        orbax.full_disk_is_an_os_error(),
        orbax.open_manager(directory, keep, runtime.keep_every or 0) as manager,
    ):
        identity = _identity(artefact, frozen)
        state, rows = _resume(
            manager, artefact, trainable, optimizer, mesh, recipe.steps, runtime, identity
        )
        start = int(state.step)
        log = StepLog(
            artefact,
            model,
            recipe,
            metrics,
            mesh,
            start,
            drift is not None,
            rows,
            adapter_weights(trainable) or None,
        )
        loop = _Loop(
            artefact,
            manager,
            log,
            step_fn,
            mesh,
            runtime,
            batches,
            drift,
            rounds,
            state,
            frozen,
            identity,
        )
        try:
            loop.run_rounds(start, recipe.steps)
            failure.forget_overcome(artefact, recipe.steps)
        except NotFinite as error:
            loop.save_now()
            step, row = error.args
            records, layout = loop.batches.records(step - 1), loop.batches.layout
            params = loop.state.params, frozen
            failure.stop_with_records(
                artefact, model, objective, params, layout, records, step, row, mesh=mesh
            )
        finally:
            log.close()
    return loop.state.params


@dataclasses.dataclass
class _Loop:
    """The parts that a run works with, and the state that it changes."""

    artefact: Artefact
    manager: ocp.CheckpointManager
    log: StepLog
    step_fn: Any
    mesh: Mesh
    runtime: RuntimeSettings
    batches: Batches
    drift: Drift | None
    rounds: Rounds | None
    state: TrainState
    frozen: decoder.Params
    identity: dict

    def __post_init__(self):
        self.stop = processes.StopVote()
        self.profile = Profile(self.artefact, self.runtime.profile_steps)

    @property
    def params(self) -> decoder.Params:
        """All parameters of the model, as they are now."""
        return merged(self.state.params, self.frozen)

    def run_rounds(self, start: int, last: int) -> None:
        """Steps start + 1 … last, with the batches of each round.

        Raises:
          Stopped: after a signal, with the state saved.
        """
        while True:
            if self.rounds is not None:
                self.batches, self.drift = self.rounds.open(start, self.params)
            if self._run(start, last):
                self.save_now()
                raise shutdown.Stopped
            before, start = start, int(self.state.step)
            if start == last:
                return
            if start == before:
                raise RuntimeError(f"no update was made after step {start}")
            self.save_now()

    def _run(self, start: int, last: int) -> bool:
        """Steps start + 1 … last, or until a round is due; true if it was asked to stop."""
        size = self.batches.layout.rows_per_micro
        put = functools.partial(put_batch, mesh=self.mesh, rows_per_micro=size)
        next_batch, in_flight, stopped = self.batches.reader(start, last, put), None, False
        self.log.start_clock()
        for step in range(start + 1, last + 1):
            if stopped := self.stop.agreed():
                break
            if in_flight is not None and self.batches.reads_params:
                self.log.read(in_flight)  # it is waited for anyway
                in_flight = None
            clock = time.perf_counter()
            try:
                batch, columns = next_batch(step - 1, self.params)
            except shutdown.Stopped:  # while it sampled
                stopped = True
                break
            waited = time.perf_counter() - clock
            self.profile.before(step)
            look = None
            if self.drift and (step % self.drift.every == 0 or step in (self.drift.first, last)):
                look = self.drift.look(self.params, batch)
            self.state, metrics = self.step_fn(self.state, self.frozen, batch)
            self.profile.after(step, metrics)
            if in_flight is not None:
                self.log.read(in_flight)
            in_flight = InFlight(step, metrics, look, waited, columns)
            if self.rounds is not None and step < last:
                heldout = None
                if look is not None:
                    heldout = self.log.read(in_flight)["heldout"]
                    in_flight = None
                if self.rounds.due(step, heldout):
                    break
            if step < last and step % self.runtime.checkpoint_every == 0:
                if in_flight is not None:
                    self.log.read(in_flight)
                in_flight = None
                self._save(step)
        if in_flight is not None:
            self.log.read(in_flight)
        return stopped

    def _save(self, step: int) -> None:
        self.log.sync()
        orbax.save_state(self.manager, step, self.state, self.identity, self.log.rows)
        failure.forget_overcome(self.artefact, step)

    def save_now(self) -> None:
        """Saves the state, unless that step is saved, and waits until it is on disk."""
        step = int(self.state.step)
        self.manager.wait_until_finished()
        if step not in self.manager.all_steps():
            self._save(step)
        self.manager.wait_until_finished()
        self.manager.check_for_errors()
