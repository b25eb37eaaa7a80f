"""What data and metrics cost the training loop, on the tiny OPD run.

    python benchmarks/loop_overhead.py [--steps=60]

Runs the loop and reads from its metrics what a step took and how much of that went into waiting
for a batch; then times, on a step that has run, what the loop does to write its metrics (read
the arrays, a row for metrics.jsonl and TensorBoard, the live line), which the next step's run
hides; and how many batches the data thread makes alone, from a cache on disk, against the step's
appetite.
"""

import argparse
import json
import os
import platform
import tempfile
import time

import jax
import numpy as np
from input_pipeline import make_cache

from lopd.artefacts.artefact import Artefact
from lopd.cache.reader import Records
from lopd.config.settings import Settings, TrainingRecipe
from lopd.data.batches import put_batch, step_batches
from lopd.data.layout import Layout
from lopd.machine import devices
from lopd.machine.setup import prepare
from lopd.models import decoder
from lopd.models.shardings import param_shardings
from lopd.objectives.sampled import lightning_opd
from lopd.training.log import InFlight, StepLog
from lopd.training.loop import train
from lopd.training.state import create_state, make_optimizer
from lopd.training.step import make_train_step

MODEL = decoder.DecoderConfig(
    vocab_size=21,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=32,
)
"""The student of configs/tiny.py."""


def short_records(count: int) -> list[dict]:
    """Prompts and responses as long as those of three-digit addition."""
    rng = np.random.default_rng(0)
    made = []
    for i in range(count):
        length = int(rng.integers(28, 40))
        logprobs = -rng.exponential(0.3, (3, length)).astype(np.float32)
        made.append(
            {
                "prompt_id": i,
                "sample_id": 0,
                "finished": True,
                "prompt_tokens": rng.integers(3, 21, 11).astype(np.int32),
                "response_tokens": rng.integers(3, 21, length).astype(np.int32),
                "teacher_logprobs": logprobs[0],
                "ref_logprobs": logprobs[1],
                "behaviour_logprobs": logprobs[2],
            }
        )
    return made


def main() -> None:
    """Prints the shares."""
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--steps", type=int, default=60)
    options = arguments.parse_args()
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores")
    mesh = devices.make_mesh({"data": -1, "fsdp": 1, "tensor": 1})
    recipe = TrainingRecipe(steps=options.steps, batch_size=128, learning_rate=1e-3)
    folder = tempfile.TemporaryDirectory()
    batches = step_batches(
        Records(make_cache(os.path.join(folder.name, "cache"), short_records(12_000))),
        Layout(128, 8, "sample_mean", ("teacher_logprobs", "ref_logprobs")),
        seed=0,
        batch_size=128,
    )
    start = time.perf_counter()
    for _ in batches.iterate(0, options.steps):
        pass
    alone = (time.perf_counter() - start) / options.steps
    settings, objective = Settings(), lightning_opd(1.0)
    params = random_params(mesh)
    with folder:
        prepare(folder.name)
        artefact = Artefact(os.path.join(folder.name, "opd"))
        artefact.begin("opd", {}, {})
        options_of_train = {"mesh": mesh, "runtime": settings.runtime, "metrics": settings.metrics}
        train(artefact, MODEL, params, batches, objective, recipe, **options_of_train)
        lines = (artefact.path / "metrics.jsonl").read_text().splitlines()
        written = time_of_a_row(artefact, recipe, settings, batches, mesh)
    rows = [json.loads(line) for line in lines][min(5, len(lines) - 1) :]  # after compilation
    seconds = np.array([row["tokens"] / row["tokens_per_second"] for row in rows])
    waits = np.array([row["data_wait"] for row in rows]) * seconds
    step = seconds.mean()
    print(f"a step in the loop takes {step * 1e3:.1f} ms (median {np.median(seconds) * 1e3:.1f})")
    print(f"waiting for a batch: {waits.sum() / seconds.sum():.2%} of the time")
    print(
        f"writing metrics: {written * 1e3:.2f} ms a step, {written / step:.2%}, while the next runs"
    )
    print(f"a batch takes {alone * 1e3:.1f} ms to make: {step / alone:.1f} × the appetite")


def random_params(mesh) -> decoder.Params:
    """Untrained weights in their sharding."""
    make = lambda: decoder.init_params(MODEL, jax.random.key(0))  # noqa: E731
    return jax.jit(make, out_shardings=param_shardings(MODEL, mesh))()


def time_of_a_row(artefact, recipe, settings, batches, mesh) -> float:
    """Seconds that the loop takes to read and write the metrics of a step that has run."""
    optimizer = make_optimizer(recipe)
    params = random_params(mesh)
    step = make_train_step(MODEL, optimizer, lightning_opd(1.0), params, mesh)
    state = create_state(optimizer, params, mesh)
    _, metrics = step(state, {}, put_batch(batches[0], mesh, 8))
    jax.block_until_ready(metrics)
    log = StepLog(artefact, MODEL, recipe, settings.metrics, mesh, 0, False)
    start = time.perf_counter()
    for number in range(recipe.steps):
        log.read(InFlight(number + 1, dict(metrics), None, 0.0, {}))
    seconds = (time.perf_counter() - start) / recipe.steps
    log.close()
    return seconds


if __name__ == "__main__":
    main()
