"""What data and metrics cost the training loop, on the tiny OPD run.

    python benchmarks/loop_overhead.py [--steps=150] [--runs=5]

Times the whole loop (data thread, metrics, drift panel apart from its own passes, one step in
flight) against the bare jitted step on batches that already lie on the device, in turns. The
difference is what the loop adds; `data_wait` is the share of it spent waiting for a batch. Also
prints how many batches per second the data thread makes alone.
"""

import argparse
import json
import os
import pathlib
import platform
import tempfile
import time

import jax
import numpy as np

from lopd import parallel
from lopd.artefact import Artefact
from lopd.config import base_config, training_recipe
from lopd.data.batches import put_batch, step_batches
from lopd.models import qwen3
from lopd.objectives import lightning_opd
from lopd.platform import prepare
from lopd.training.loop import train
from lopd.training.state import create_state, make_optimizer
from lopd.training.step import make_train_step

MODEL = qwen3.Qwen3Config(
    vocab_size=21,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=32,
)
"""The student of configs/tiny.py."""


def records(count: int = 12_000) -> list[dict]:
    """Prompts and responses as long as those of three-digit addition."""
    rng = np.random.default_rng(0)
    made = []
    for i in range(count):
        length = int(rng.integers(28, 40))
        logprobs = -rng.exponential(0.3, (2, length)).astype(np.float32)
        made.append(
            {
                "prompt_id": i,
                "sample_id": 0,
                "finished": True,
                "prompt_tokens": rng.integers(3, 21, 11).astype(np.int32),
                "response_tokens": rng.integers(3, 21, length).astype(np.int32),
                "teacher_logprobs": logprobs[0],
                "ref_logprobs": logprobs[1],
            }
        )
    return made


def main() -> None:
    """Prints milliseconds per step of both, and their difference."""
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--steps", type=int, default=150)
    arguments.add_argument("--runs", type=int, default=5)
    options = arguments.parse_args()
    compiled = tempfile.TemporaryDirectory()
    prepare(compiled.name)
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores")
    mesh = parallel.make_mesh({"data": -1, "fsdp": 1, "tensor": 1})
    recipe = training_recipe(steps=options.steps, batch_size=128, learning_rate=1e-3)
    batches = step_batches(
        records(),
        seed=0,
        batch_size=128,
        row_length=128,
        rows_per_micro=8,
        reduction="sample_mean",
        token_fields=("teacher_logprobs", "ref_logprobs"),
    )
    settings = base_config()
    settings.runtime.checkpoint_every = 10**9
    optimizer, objective = make_optimizer(recipe), lightning_opd(1.0)
    step = make_train_step(MODEL, optimizer, objective, mesh)
    ready = [put_batch(batches[n], mesh, 8) for n in range(20)]

    def params():
        return qwen3.init_params(MODEL, jax.random.key(0))

    def bare() -> float:
        state = create_state(MODEL, optimizer, params(), mesh)
        state, metrics = step(state, ready[0])
        jax.block_until_ready(metrics)
        start = time.perf_counter()
        for n in range(options.steps):
            state, metrics = step(state, ready[n % len(ready)])
        jax.block_until_ready((state, metrics))
        return (time.perf_counter() - start) / options.steps

    def loop() -> tuple[float, float]:
        with tempfile.TemporaryDirectory() as folder:
            artefact = Artefact(folder)
            artefact.begin("opd", {}, {})
            train(
                artefact, MODEL, params(), batches, objective, recipe,
                mesh=mesh, runtime=settings.runtime, metrics=settings.metrics,
            )  # fmt: skip
            text = (pathlib.Path(folder) / "metrics.jsonl").read_text()
        rows = [json.loads(line) for line in text.splitlines()][3:]  # after compilation
        seconds = np.array([row["tokens"] / row["tokens_per_second"] for row in rows])
        waits = np.array([row["data_wait"] for row in rows]) * seconds
        return seconds.mean(), waits.sum() / seconds.sum()

    start = time.perf_counter()
    for _ in batches.iterate(0, options.steps):
        pass
    alone = (time.perf_counter() - start) / options.steps
    pairs = [(bare(), *loop()) for _ in range(options.runs)]
    bare_s, loop_s, wait = (np.array(x) for x in zip(*pairs, strict=True))
    added = loop_s / bare_s - 1
    step_s = np.median(bare_s)
    print(f"bare step {step_s * 1e3:.1f} ms, in the loop {np.median(loop_s) * 1e3:.1f} ms")
    print(f"added by the loop: {', '.join(f'{x:+.1%}' for x in added)}")
    print(f"waiting for data: {', '.join(f'{x:.2%}' for x in wait)} of the time")
    print(f"a batch takes {alone * 1e3:.1f} ms to make: {step_s / alone:.1f} × the appetite")


if __name__ == "__main__":
    main()
