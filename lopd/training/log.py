"""Records of a training's steps: rows of metrics, the live line, a profile."""

import contextlib
import dataclasses
import math
import sys
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lopd.artefacts.artefact import Artefact
from lopd.config.settings import MetricsSettings, TrainingRecipe
from lopd.hardware import peak_flops
from lopd.machine import processes
from lopd.machine.progress import bar
from lopd.machine.storage import Growing
from lopd.models import decoder
from lopd.models.flops import training_flops
from lopd.sampling.cut import MANY
from lopd.training.drift import panel_row, scalars
from lopd.training.metrics_files import (
    DRIFT,
    METRICS,
    NO_ROWS,
    MetricsFile,
    Rows,
    metrics_writers,
)
from lopd.training.state import learning_rate_schedule


class NotFinite(Exception):
    """A step's loss or gradient norm is not finite: (step, row)."""


@dataclasses.dataclass
class InFlight:
    """A step that was dispatched and has not been read."""

    step: int
    metrics: dict[str, jax.Array]
    """On the device, not waited for."""
    drift: Any
    """The result of `Drift.look` at this step, still on the device, or None."""
    waited: float
    """Seconds that the loop waited for its batch."""
    columns: dict[str, float]
    """Columns that the source of the batch adds to the step's row."""


class StepLog:
    """Rows of metrics.jsonl and drift.jsonl, and the live line."""

    def __init__(
        self,
        artefact: Artefact,
        model: decoder.DecoderConfig,
        recipe: TrainingRecipe,
        metrics: MetricsSettings,
        mesh: Mesh,
        start: int,
        drift: bool,
        rows: Mapping[str, Rows] = {},
        adapter_weights: int | None = None,
    ):
        settings, kept = artefact.manifest.settings, rows.get(METRICS, NO_ROWS)
        self._writers = metrics_writers(artefact.path, start, metrics, settings, kept)
        self._drift = None
        if drift and processes.is_main():
            self._drift = MetricsFile(artefact.path / DRIFT, rows.get(DRIFT, NO_ROWS))
        self._bar = bar(total=recipe.steps, initial=start, label=artefact.path.name, unit="steps")
        self._model, self._peak = model, peak_flops(list(mesh.devices.flat))
        self._adapter_weights = adapter_weights
        counts = jnp.arange(recipe.steps)
        self._rates = np.asarray(jax.vmap(learning_rate_schedule(recipe))(counts) + 0.0 * counts)
        self.start_clock()

    @property
    def _all(self) -> list:
        return [*self._writers, *([self._drift] if self._drift else [])]

    def start_clock(self) -> None:
        """Steps take time from now on."""
        self._clock = time.perf_counter()

    def read(self, item: InFlight) -> dict | None:
        """Waits for a step, writes its rows and returns that of drift.jsonl, if it has one.

        Raises:
          NotFinite: instead of writing, if its loss or gradient is not finite.
        """
        metrics, drift = jax.device_get((item.metrics, item.drift))
        row = scalars(metrics)
        if not (math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])):
            raise NotFinite(item.step, row)
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        positions = (float(metrics[name]) for name in ("positions", "positions_squared"))
        row["flops"] = training_flops(self._model, *positions, self._adapter_weights)
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
        if (cut := row.get("truncated", 0.0)) > MANY:
            shown["CUT responses"] = f"{cut:.0%}"
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

    @property
    def rows(self) -> dict[str, Rows]:
        """The rows so far of each file, which belong to a checkpoint; of the main process."""
        files = {METRICS: self._writers[:1], DRIFT: [self._drift] if self._drift else []}
        return {name: file.rows for name, found in files.items() for file in found}

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


class Profile:
    """A jax.profiler trace of steps first … last, under the artefact; None for no trace."""

    def __init__(self, artefact: Artefact, steps: tuple[int, int] | None):
        self._growing = Growing(artefact.path / "profile")
        self._first, self._last = steps or (None, None)
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
