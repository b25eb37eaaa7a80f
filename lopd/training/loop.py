"""The training loop: feeds the step, keeps one step in flight, logs and saves."""

import math
import time

import grain
import jax
import ml_collections
from jax.sharding import Mesh

from lopd import parallel, shutdown
from lopd.artefact import Artefact
from lopd.errors import UserError
from lopd.models import qwen3
from lopd.objectives import Objective
from lopd.progress import MetricsFile, bar
from lopd.training import checkpoints
from lopd.training.state import abstract_state, create_state, make_optimizer
from lopd.training.step import make_train_step


def _put(batch: dict, mesh: Mesh) -> dict:
    """Moves a host batch to the devices, rows split over the mesh."""
    rows, whole = parallel.rows_sharding(mesh, leading=1), parallel.replicated(mesh)
    return {
        name: jax.device_put(x, whole if name == "num_micro" else rows) for name, x in batch.items()
    }


def train(
    artefact: Artefact,
    model: qwen3.Qwen3Config,
    initial_params: qwen3.Params,
    batches: grain.MapDataset,
    objective: Objective,
    recipe: ml_collections.ConfigDict,
    *,
    mesh: Mesh,
    checkpoint_every: int,
    label: str,
    remat: str = "full",
) -> qwen3.Params:
    """Trains for `recipe.steps` steps and returns the parameters.

    Continues from the newest checkpoint under the artefact, if there is one: batch n is a
    function of n, so the result is that of an uninterrupted run. Step n is dispatched before
    the metrics of step n − 1 are read, so the device does not wait for the host.

    Args:
      artefact: where checkpoints and metrics.jsonl go.
      model: the model's shape.
      initial_params: where a fresh run starts.
      batches: item n is the batch of step n.
      objective: the per-token loss.
      recipe: steps, learning rate and so on (`lopd.config.training_recipe`).
      mesh: the devices.
      checkpoint_every: steps between checkpoints.
      label: name on the progress bar.
      remat: what the backward pass keeps, a key of `qwen3.REMAT_POLICIES`.

    Raises:
      UserError: at the first step whose loss or gradient is not finite.
    """
    optimizer = make_optimizer(recipe)
    step_fn = make_train_step(model, optimizer, objective, mesh, remat)
    with checkpoints.open_manager(artefact.path / "checkpoints", checkpoint_every) as manager:
        start = manager.latest_step() or 0
        if start:
            state = checkpoints.restore_state(
                manager, start, abstract_state(model, optimizer, mesh)
            )
        else:
            state = create_state(model, optimizer, initial_params, mesh)
        metrics_file = MetricsFile(artefact.path / "metrics.jsonl", resume_step=start)
        progress = bar(total=recipe.steps, initial=start, label=label, unit="steps")
        clock = time.perf_counter()

        def report(step: int, metrics: dict) -> None:
            nonlocal clock
            row = {name: float(x) for name, x in jax.device_get(metrics).items()}
            if not (math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])):
                raise UserError(
                    f"{label}: step {step} has loss {row['loss']} and gradient norm "
                    f"{row['grad_norm']}; lower the learning rate, or look at its batch"
                )
            now = time.perf_counter()
            row["tokens_per_second"] = row["tokens"] / (now - clock)
            clock = now
            metrics_file.write({"step": step, **row})
            progress.set_postfix(loss=f"{row['loss']:.4f}", refresh=False)
            progress.update()

        reads = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
        in_flight = None
        for step, batch in enumerate(
            batches.slice(slice(start, recipe.steps)).to_iter_dataset(reads), start=start + 1
        ):
            shutdown.check()
            state, metrics = step_fn(state, _put(batch, mesh))
            if in_flight is not None:
                report(*in_flight)
            in_flight = (step, metrics)
            if step < recipe.steps and manager.should_save(step):
                report(*in_flight)
                in_flight = None
                checkpoints.save_state(manager, step, state)
        if in_flight is not None:
            report(*in_flight)
        progress.close()
        metrics_file.close()
    return state.params
