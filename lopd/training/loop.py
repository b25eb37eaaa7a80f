"""The training loop: feeds the step, keeps one step in flight, logs, saves and stops cleanly."""

import contextlib
import dataclasses
import functools
import math
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from lopd.artefacts.artefact import Artefact
from lopd.checkpoints import orbax
from lopd.data.batches import Arrays, put_batch
from lopd.hardware import peak_flops
from lopd.machine import processes, shutdown
from lopd.machine.progress import bar
from lopd.machine.storage import Growing
from lopd.models import decoder
from lopd.models.flops import training_flops
from lopd.objectives.sampled import Batch, Objective
from lopd.training import failure
from lopd.training.drift import Drift, panel_row, scalars
from lopd.training.metrics_files import MetricsFile, metrics_writers
from lopd.training.state import (
    TrainState,
    abstract_state,
    create_state,
    learning_rate_schedule,
    make_optimizer,
)
from lopd.training.step import make_train_step


class Batches(Protocol):
    """Where a step's batch comes from: `lopd.data.batches.StepBatches`, or fresh rollouts."""

    layout: dict
    """Keyword arguments of `micro_batches`."""
    reads_params: bool
    """Whether a batch depends on the parameters that the step starts from. If not, it is prepared
    while earlier steps run."""

    def reader(
        self, start: int, stop: int, put: Callable[[Arrays], Batch]
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


class _NotFinite(Exception):
    """A step's loss or gradient norm is not finite: (step, row)."""


@dataclasses.dataclass
class _InFlight:
    """A step that was dispatched and has not been read."""

    step: int
    metrics: dict[str, jax.Array]
    drift: Any
    """What `Drift.look` dispatched at this step, or None."""
    waited: float
    """Seconds that the loop waited for its batch."""
    columns: dict[str, float]
    """What the source of the batch adds to the step's row."""


class _Log:
    """Rows of metrics.jsonl and drift.jsonl, and the live line."""

    def __init__(
        self,
        artefact: Artefact,
        model: decoder.DecoderConfig,
        recipe: ml_collections.ConfigDict,
        metrics: ml_collections.ConfigDict,
        mesh: Mesh,
        start: int,
        drift: bool,
    ):
        settings = artefact.manifest["settings"]
        self._writers = metrics_writers(artefact.path, start, metrics, settings)
        self._drift = None
        if drift and processes.is_main():
            self._drift = MetricsFile(artefact.path / "drift.jsonl", start)
        self._bar = bar(total=recipe.steps, initial=start, label=artefact.path.name, unit="steps")
        self._model, self._peak = model, peak_flops(list(mesh.devices.flat))
        counts = jnp.arange(recipe.steps)
        self._rates = np.asarray(jax.vmap(learning_rate_schedule(recipe))(counts) + 0.0 * counts)
        self.start_clock()

    @property
    def _all(self) -> list:
        return [*self._writers, *([self._drift] if self._drift else [])]

    def start_clock(self) -> None:
        """Steps take time from now on."""
        self._clock = time.perf_counter()

    def read(self, item: _InFlight) -> dict | None:
        """Waits for a step, writes its rows and returns that of drift.jsonl, if it has one.

        Raises:
          _NotFinite: instead of writing, if its loss or gradient is not finite.
        """
        metrics, drift = jax.device_get((item.metrics, item.drift))
        row = scalars(metrics)
        if not (math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])):
            raise _NotFinite(item.step, row)
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        positions = (float(metrics[name]) for name in ("positions", "positions_squared"))
        row["flops"] = training_flops(self._model, *positions)
        row["seconds"] = seconds
        row["learning_rate"] = float(self._rates[item.step - 1])
        row["tokens_per_second"] = row["tokens"] / seconds
        row["data_wait"] = item.waited / seconds
        shown = {"loss": f"{row['loss']:.4f}", "tok/s": f"{row['tokens_per_second']:.0f}"}
        if self._peak:
            row["utilisation"] = row["flops"] / seconds / self._peak
            shown["util"] = f"{row['utilisation']:.0%}"
        else:
            shown["FLOP/s"] = self._bar.format_sizeof(row["flops"] / seconds)
        for writer in self._writers:
            writer.write({"step": item.step, **row, **item.columns})
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update()
        if drift is None:
            return None
        panel = panel_row(item.step, *drift)
        if self._drift is not None:
            # A file of its own; the other writers tell the two rows apart by the names in them.
            for writer in [self._drift, *self._writers[1:]]:
                writer.write(panel)
        return panel

    def sync(self) -> None:
        """Makes the rows so far last, as going on from a later checkpoint writes none of them."""
        for writer in self._all:
            writer.sync()

    def close(self) -> None:
        """Closes the files and the live line, all of them; what prevents it does not take the place
        of an error, or of a stop, that passes through."""
        passing = sys.exc_info()[0]
        try:
            with contextlib.ExitStack() as closing:
                for part in (*self._all, self._bar):
                    closing.callback(part.close)
        except Exception as error:
            if passing is None:
                raise
            print(f"lopd: warning: metrics are not closed ({error})", file=sys.stderr)


class _Profile:
    """A jax.profiler trace of steps first … last, under the artefact; (0, 0) for none."""

    def __init__(self, artefact: Artefact, steps: tuple[int, int]):
        self._growing = Growing(artefact.path / "profile")
        self._first, self._last = steps
        self._on = False

    def before(self, step: int) -> None:
        """Starts it when its first step is about to be dispatched."""
        if step == self._first:
            jax.profiler.start_trace(str(self._growing.local))
            self._on = True

    def after(self, step: int, result: Any) -> None:
        """Ends it once its last step, whose `result` this is, has run."""
        if self._on and step == self._last:
            jax.block_until_ready(result)
            jax.profiler.stop_trace()
            self._growing.sync()
            self._on = False


def _resume(
    manager: ocp.CheckpointManager,
    artefact: Artefact,
    model: decoder.DecoderConfig,
    initial_params: decoder.Params,
    optimizer: Any,
    mesh: Mesh,
    steps: int,
    runtime: ml_collections.ConfigDict,
) -> tuple[int, TrainState]:
    """The step and state to go on from: the newest good checkpoint's, or a fresh one."""
    abstract = abstract_state(model, optimizer, mesh)
    orbax.check_room(
        artefact.path / "checkpoints",
        abstract,
        abstract.params,
        steps=steps,
        checkpoint_every=runtime.checkpoint_every,
        keep_checkpoints=runtime.keep_checkpoints,
        keep_every=runtime.keep_every,
    )
    start, state = orbax.restore_newest(manager, abstract, _identity(artefact))
    if state is None:
        return start, create_state(model, optimizer, initial_params, mesh)
    # What was saved when a step was not finite still says so, which would hold back every update.
    finite = jax.jit(lambda: jnp.ones((), bool), out_shardings=abstract.finite.sharding)()
    return start, state.replace(finite=finite)


def _identity(artefact: Artefact) -> dict:
    return {key: artefact.manifest[key] for key in ("settings", "inputs")}


def train(
    artefact: Artefact,
    model: decoder.DecoderConfig,
    initial_params: decoder.Params,
    batches: Batches,
    objective: Objective,
    recipe: ml_collections.ConfigDict,
    *,
    mesh: Mesh,
    runtime: ml_collections.ConfigDict,
    metrics: ml_collections.ConfigDict,
    drift: Drift | None = None,
    rounds: Rounds | None = None,
    router_coefficient: float = 0.0,
) -> decoder.Params:
    """Trains for `recipe.steps` steps and returns the parameters.

    Continues from the newest good checkpoint under the artefact, if there is one: batch n is a
    function of n (and of the parameters before it), so the result is that of an uninterrupted run.
    Where batches do not read the parameters, step n is dispatched before
    the metrics of step n − 1 are read, so the device does not wait for the host.

    Args:
      artefact: where checkpoints, metrics.jsonl, drift.jsonl and the rest go; its name is shown.
      model: the model's shape.
      initial_params: where a fresh run starts.
      batches: where each step's batch comes from.
      objective: the per-token loss.
      recipe: steps, learning rate and so on (`lopd.config.settings.TrainingRecipe`).
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
    optimizer = make_optimizer(recipe)
    step_fn = make_train_step(model, optimizer, objective, mesh, runtime.remat, router_coefficient)
    directory, keep = artefact.path / "checkpoints", runtime.keep_checkpoints
    with (
        orbax.full_disk_is_an_os_error(),
        orbax.open_manager(directory, keep, runtime.keep_every) as manager,
    ):
        start, state = _resume(
            manager, artefact, model, initial_params, optimizer, mesh, recipe.steps, runtime
        )
        log = _Log(artefact, model, recipe, metrics, mesh, start, drift is not None)
        loop = _Loop(artefact, manager, log, step_fn, mesh, runtime, batches, drift, rounds, state)
        try:
            loop.run_rounds(start, recipe.steps)
            failure.forget_overcome(artefact, recipe.steps)
        except _NotFinite as error:
            loop.save_now()
            step, row = error.args
            records, layout = loop.batches.records(step - 1), loop.batches.layout
            failure.stop_with_records(
                artefact, model, objective, loop.state.params, layout, records, step, row, mesh=mesh
            )
        finally:
            log.close()
    return loop.state.params


@dataclasses.dataclass
class _Loop:
    """What a run works with, and the state that it changes."""

    artefact: Artefact
    manager: ocp.CheckpointManager
    log: _Log
    step_fn: Any
    mesh: Mesh
    runtime: ml_collections.ConfigDict
    batches: Batches
    drift: Drift | None
    rounds: Rounds | None
    state: TrainState

    def __post_init__(self):
        self.stop = processes.StopVote()
        self.profile = _Profile(self.artefact, self.runtime.profile_steps)

    def run_rounds(self, start: int, last: int) -> None:
        """Steps start + 1 … last, with the batches of each round.

        Raises:
          Stopped: after a signal, with the state saved.
        """
        while True:
            if self.rounds is not None:
                self.batches, self.drift = self.rounds.open(start, self.state.params)
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
        put = functools.partial(
            put_batch, mesh=self.mesh, rows_per_micro=self.runtime.rows_per_micro
        )
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
                batch, columns = next_batch(step - 1, self.state.params)
            except shutdown.Stopped:  # while it sampled
                stopped = True
                break
            waited = time.perf_counter() - clock
            self.profile.before(step)
            look = None
            if self.drift and (step % self.drift.every == 0 or step in (self.drift.first, last)):
                look = self.drift.look(self.state.params, batch)
            self.state, metrics = self.step_fn(self.state, batch)
            self.profile.after(step, metrics)
            if in_flight is not None:
                self.log.read(in_flight)
            in_flight = _InFlight(step, metrics, look, waited, columns)
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
        orbax.save_state(self.manager, step, self.state, _identity(self.artefact))
        failure.forget_overcome(self.artefact, step)

    def save_now(self) -> None:
        """Saves the state, unless that step is saved, and waits until it is on disk."""
        step = int(self.state.step)
        self.manager.wait_until_finished()
        if step not in self.manager.all_steps():
            self._save(step)
        self.manager.wait_until_finished()
        self.manager.check_for_errors()
