"""One small training run, in this process or as `python training_run.py PATH OBJECTIVE`.

As a process it ends as `lopd.main` does: exit code 75 after SIGTERM. With LOPD_PROCESSES (a
coordinator's address) and LOPD_PROCESS it is one of two.
"""

import dataclasses
import json
import os
import pathlib
import sys

import grain
import jax
import numpy as np
from jax.experimental import multihost_utils

from helpers.models import TIED, random_params, random_records
from lopd.artefacts.artefact import Artefact
from lopd.artefacts.fingerprint import params_fingerprint
from lopd.config.settings import LoraSettings, MetricsSettings, RuntimeSettings, TrainingRecipe
from lopd.data.batches import StepBatches, step_batches
from lopd.data.layout import Layout
from lopd.machine import devices, shutdown
from lopd.models.low_rank import init_adapters
from lopd.models.shardings import param_shardings
from lopd.objectives.sampled import cross_entropy, lightning_opd
from lopd.training.drift import make_drift
from lopd.training.loop import train

FIELDS = ("teacher_logprobs", "ref_logprobs")
CONFIG = dataclasses.replace(TIED, vocab_size=40)  # divides over every mesh of the tests
LORA = LoraSettings(rank=2)
TIMES = ("seconds", "tokens_per_second", "data_wait")
STEPS, CHECKPOINT_EVERY = 24, 4
LAYOUT = dict(row_length=48, rows_per_micro=8, reduction="sample_mean", token_fields=FIELDS)


def records(count=24, seed=0) -> list[dict]:
    lengths = np.random.default_rng(seed).integers(1, 20, (count, 2)).tolist()
    made = random_records(CONFIG, lengths, seed, **dict.fromkeys(FIELDS))
    return [{**r, "prompt_id": 100 + i, "sample_id": 0} for i, r in enumerate(made)]


@dataclasses.dataclass(frozen=True)
class NotedBatches(StepBatches):
    """Batches that note which records this process has read for each step, by prompt_id."""

    read: dict[int, list[int]] = dataclasses.field(default_factory=dict)

    def __getitem__(self, step):
        found = self.read[step] = []

        class Source:
            def __getitem__(_, index):
                record = self.source[index]
                found.append(record["prompt_id"])
                return record

        return StepBatches.__getitem__(dataclasses.replace(self, source=Source()), step)


def noted(data: StepBatches) -> NotedBatches:
    fields = dataclasses.fields(StepBatches)
    return NotedBatches(**{field.name: getattr(data, field.name) for field in fields})


def batches(mesh=None, source=None, **changes) -> StepBatches:
    """Batches of the toy, by default of one process; `changes` are of the layout."""
    layout = Layout(**{**LAYOUT, **changes})
    layout = layout if mesh is None else layout.on(mesh)
    source = records() if source is None else source
    return step_batches(source, layout, seed=1, batch_size=8)


class Crash(Exception):
    """Stands for the machine going away."""


def crashing(data, step):
    """The batches, up to a step at which the process dies."""

    def indices(n):
        if n >= step:
            raise Crash
        return data.indices[n]

    mapped = grain.MapDataset.source(range(100)).map(indices)
    return dataclasses.replace(data, indices=mapped)


def mesh_of(data, fsdp, tensor):
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    return devices.make_mesh(sizes, jax.devices()[: data * fsdp * tensor])


def run(
    path,
    objective="opd",
    *,
    mesh,
    steps=STEPS,
    data=None,
    params=None,
    frozen=(),
    recipe=(),
    tensorboard=False,
    **runtime,
):
    """Trains, and returns the parameters' fingerprint and the rows without times.

    `frozen` are the names of top-level parameters that are not trained; the fingerprint is that of
    the others.

    The objectives are "opd", "plain" (the same without its drift panel), "adapters" (that, but of
    adapters on frozen parameters) and "sft".
    """
    if jax.process_index() == 0:
        Artefact(path).begin(objective, {}, {})
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("begun")
    artefact = Artefact(path)
    data = batches(mesh) if data is None else data
    loss = cross_entropy() if objective == "sft" else lightning_opd(1.0)
    drift = None
    if objective == "opd":
        heldout = records(8, seed=5)  # as many as a batch, so that one program serves both
        drift = make_drift(CONFIG, loss, mesh, every=7, heldout=heldout, layout=data.layout)
    params = random_params(CONFIG, 0) if params is None else params
    params = jax.device_put(params, param_shardings(CONFIG, mesh))
    trainable = {name: x for name, x in params.items() if name not in frozen}
    if objective == "adapters":
        trainable, frozen = init_adapters(CONFIG, LORA, mesh, jax.random.key(4)), params
    params = train(
        artefact,
        CONFIG,
        trainable,
        data,
        loss,
        TrainingRecipe(**{"steps": steps, "learning_rate": 1e-3, **dict(recipe)}),
        frozen={name: params[name] for name in frozen},
        mesh=mesh,
        runtime=RuntimeSettings(**{"checkpoint_every": CHECKPOINT_EVERY, **runtime}),
        metrics=MetricsSettings(tensorboard=tensorboard),
        drift=drift,
    )
    return params_fingerprint(params), *rows_of(path)


def rows_of(path) -> tuple[list[dict], list[dict]]:
    """metrics.jsonl without its times, and drift.jsonl."""

    def read(name):
        file = pathlib.Path(path) / name
        return [json.loads(x) for x in file.read_text().splitlines()] if file.exists() else []

    rows = [{k: v for k, v in r.items() if k not in TIMES} for r in read("metrics.jsonl")]
    return rows, read("drift.jsonl")


def main(path: str, objective: str) -> None:
    coordinator = os.environ.get("LOPD_PROCESSES")
    if coordinator:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(coordinator, 2, int(os.environ["LOPD_PROCESS"]))
    mesh = mesh_of(jax.device_count(), 1, 1)
    print("ready", flush=True)
    data = noted(batches(mesh))
    try:
        with shutdown.on_signals():
            result = run(path, objective, mesh=mesh, data=data)
    except shutdown.Stopped:
        sys.exit(shutdown.EXIT_STOPPED)
    path = pathlib.Path(path)
    (path / f"read-{jax.process_index()}.json").write_text(json.dumps(data.read))
    if jax.process_index() == 0:
        (path / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
