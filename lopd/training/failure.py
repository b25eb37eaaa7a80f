"""The report of a loss or gradient that is not finite: which records did it."""

import json
import math

import jax
import optax
from jax.sharding import Mesh

from lopd.artefacts.artefact import Artefact
from lopd.data.batches import micro_batches, put_batch
from lopd.data.layout import Layout
from lopd.errors import UserError
from lopd.machine import processes
from lopd.machine.sharding import on_mesh
from lopd.machine.storage import write_atomically
from lopd.models import decoder
from lopd.objectives.sampled import Objective
from lopd.training.step import batch_gradients

FAILURE = "failure.json"
"""The file's name."""
_NAMED = 5
"""Most records that the message names; failure.json has all."""


def _record_id(record: dict) -> dict:
    return {key: int(record[key]) for key in ("prompt_id", "sample_id") if key in record}


def _alone(
    model: decoder.DecoderConfig,
    objective: Objective,
    params: tuple[decoder.Params, decoder.Params],
    layout: Layout,
    records: list[dict],
    mesh: Mesh,
) -> list[tuple[float, float]]:
    """Loss and gradient norm of each record by itself, as a batch of one."""

    @jax.jit
    def look(trainable, frozen, batch):
        with on_mesh(mesh):
            grads, metrics = batch_gradients(model, objective, trainable, batch, frozen=frozen)
        return metrics["loss"], optax.tree.norm(grads)

    found = []
    for record in records:
        batch = put_batch(micro_batches([record], layout), mesh, layout.rows_per_micro)
        found.append(tuple(float(x) for x in jax.device_get(look(*params, batch))))
    return found


def forget_overcome(artefact: Artefact, step: int) -> None:
    """Deletes failure.json once the training it stopped has done that step."""
    path = artefact.path / FAILURE
    if processes.is_main() and path.exists() and json.loads(path.read_text())["step"] <= step:
        path.unlink()


def stop_with_records(
    artefact: Artefact,
    model: decoder.DecoderConfig,
    objective: Objective,
    params: tuple[decoder.Params, decoder.Params],
    layout: Layout,
    records: list[dict],
    step: int,
    row: dict,
    *,
    mesh: Mesh,
) -> None:
    """Writes failure.json and stops. Costs one small pass per record of the batch.

    Args:
      artefact: where the report goes.
      model, objective: as the step's.
      params: trainable and frozen ones, those that the failed step started from.
      layout: of its batch.
      records: those of the step.
      step: the failed step, from 1.
      row: its `loss` and `grad_norm`.
      mesh: the devices.

    Raises:
      UserError: always, naming the step and the records.
    """
    entries = [
        {**_record_id(record), "loss": str(loss), "grad_norm": str(norm),
         "finite": math.isfinite(loss) and math.isfinite(norm)}
        for record, (loss, norm) in zip(
            records, _alone(model, objective, params, layout, records, mesh), strict=True
        )
    ]  # fmt: skip
    bad = [entry for entry in entries if not entry["finite"]]
    if processes.is_main():
        report = {"step": step, "loss": str(row["loss"]), "grad_norm": str(row["grad_norm"])}
        text = json.dumps({**report, "records": entries}, indent=2)
        write_atomically(artefact.path / FAILURE, text + "\n")
    names = ["/".join(str(entry[k]) for k in _record_id(entry)) for entry in bad[:_NAMED]]
    who = f"{len(bad)} of its {len(records)} records do it alone"
    if any(names):
        who += f", prompt_id/sample_id {', '.join(names)}{' …' if len(bad) > _NAMED else ''}"
    raise UserError(
        f"{artefact.path.name}: step {step} has loss {row['loss']} and gradient norm "
        f"{row['grad_norm']} ({who}; all in {artefact.path / FAILURE}). The state before it "
        f"is checkpoint {step - 1}, from which the same command goes on once the cause is gone; to "
        f"change the learning rate or the records, use another --workdir, or delete {artefact.path}"
    )
