"""What must be the same on every mesh, and in any number of processes.

As a program, `python mesh_measurements.py OUTPUT DATA,FSDP,TENSOR` joins the processes that the
environment names, measures on their devices together, and the first process writes OUTPUT.npz.
"""

import dataclasses
import functools
import sys

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from helpers.models import TIED, random_records
from lopd.data.batches import micro_batches
from lopd.data.layout import Batch, Layout
from lopd.machine import devices, processes
from lopd.machine.sharding import on_mesh
from lopd.models import decoder
from lopd.models.shardings import param_shardings
from lopd.objectives.sampled import lightning_opd
from lopd.rollouts.scoring import score_responses
from lopd.training.step import batch_gradients

FIELDS = ("teacher_logprobs", "ref_logprobs")
DENSE = dataclasses.replace(  # divides over every mesh of the tests
    TIED, vocab_size=40, num_hidden_layers=2, num_attention_heads=4, head_dim=8
)
MOE = dataclasses.replace(
    DENSE,
    tie_word_embeddings=False,
    num_experts=8,
    num_experts_per_tok=3,
    moe_intermediate_size=24,
    norm_topk_prob=True,
)
CONFIGS = {"dense": DENSE, "moe": MOE}
ROW_LENGTH = 44  # unlike any size of the models, so that it tells activations in a compiled module


def mesh_of(data: int, fsdp: int, tensor: int) -> Mesh:
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    return devices.make_mesh(sizes, jax.devices()[: data * fsdp * tensor])


def records() -> list[dict]:
    lengths = np.random.default_rng(0).integers(2, 20, (8, 2)).tolist()
    return random_records(DENSE, lengths, **dict.fromkeys(FIELDS))


def batch(packed: bool, rows_per_micro: int) -> Batch:
    """The same eight responses, packed into few rows or one in each row."""
    layout = Layout(ROW_LENGTH, rows_per_micro, "sample_mean", FIELDS)
    if packed:
        return micro_batches(records(), layout)
    singles = [micro_batches([r], layout) for r in records()]
    rows = jax.tree.map(lambda *xs: np.concatenate(xs), *(s.micro(0) for s in singles))
    rows = jax.tree.map(lambda x: x[::rows_per_micro], rows)  # the one row of each that is used
    numbers = 1 + np.arange(len(singles), dtype=np.int32)[:, None]
    rows = rows.replace(
        weights=rows.weights / len(singles),  # each was a whole batch
        segment_ids=rows.segment_ids * numbers,
    )
    rows = jax.tree.map(lambda x: x.reshape(-1, rows_per_micro, x.shape[-1]), rows)
    return Batch(**vars(rows), num_micro=np.int32(len(rows.tokens)))


@functools.cache
def host_params(kind: str) -> decoder.Params:
    """Random parameters, norm scales around one; drawn by NumPy because nothing compiles then."""
    rng = np.random.default_rng(3)

    def draw(path, leaf):
        around = 1.0 if "norm" in jax.tree_util.keystr(path) else 0.0
        return (around + 0.2 * rng.standard_normal(leaf.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, decoder.abstract_params(CONFIGS[kind]))


def _params(kind: str, mesh: Mesh) -> decoder.Params:
    return jax.device_put(host_params(kind), param_shardings(CONFIGS[kind], mesh))


def _on_host(tree, prefix: str) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        prefix + jax.tree_util.keystr(path): multihost_utils.process_allgather(x, tiled=True)
        for path, x in leaves
    }


@functools.cache
def gradient_program(kind: str, mesh: Mesh, rows_per_micro: int = 8) -> jax.stages.Compiled:
    """The compiled gradient of one global batch, as the training step takes it."""
    config = CONFIGS[kind]
    whole = devices.replicated(mesh)

    def program(params, batch):
        with on_mesh(mesh):
            return batch_gradients(config, lightning_opd(1.0), params, batch)

    shardings = param_shardings(config, mesh)
    arguments = (_params(kind, mesh), _on_mesh(mesh, batch(True, rows_per_micro)))
    lowered = jax.jit(program, out_shardings=(shardings, whole)).lower(*arguments)
    # Compiles in a third of the time; the partitioner's passes are the same.
    return lowered.compile({"xla_backend_optimization_level": 0})


def _on_mesh(mesh: Mesh, arrays: Batch) -> Batch:
    rows, whole = devices.rows_sharding(mesh, leading=1), devices.replicated(mesh)
    return jax.tree.map(lambda x: jax.device_put(x, rows if np.ndim(x) else whole), arrays)


def gradients(kind: str, mesh: Mesh, packed: bool = True, rows_per_micro: int = 8) -> dict:
    """Loss, its diagnostics, and the gradient of every parameter, as arrays by name."""
    program = gradient_program(kind, mesh, rows_per_micro)
    grads, metrics = program(_params(kind, mesh), _on_mesh(mesh, batch(packed, rows_per_micro)))
    return _on_host(grads, "gradient") | _on_host(metrics, "metric")


def logprobs(kind: str, mesh: Mesh) -> dict:
    """The log-probability of every response token."""
    scored = score_responses(
        CONFIGS[kind],
        _params(kind, mesh),
        records(),
        mesh=mesh,
        row_length=ROW_LENGTH,
        rows_per_micro=8,
    )
    return {"logprobs": np.concatenate(scored)}


def main(output: str, shape: str) -> None:
    processes.initialize(timeout=120)
    mesh = mesh_of(*map(int, shape.split(",")))
    found = {"processes": np.int32(jax.process_count())}
    for kind in CONFIGS:
        measured = gradients(kind, mesh)
        if kind == "moe":  # the larger model's stands for both
            measured |= logprobs(kind, mesh)
        found |= {f"{kind} {name}": value for name, value in measured.items()}
    if processes.is_main():
        np.savez(output, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
