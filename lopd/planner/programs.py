"""The jitted programs of a run with the shapes of their arguments, ready to be compiled.

Nothing here holds an array: a program can be lowered for devices that do not exist.
"""

import functools

import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lopd import parallel
from lopd.models import qwen3
from lopd.models.sharding import ROW_AXES
from lopd.objectives import Objective
from lopd.sampling import decode
from lopd.scoring import score_rows
from lopd.training.state import abstract_state, make_optimizer
from lopd.training.step import make_train_step

INT_FIELDS = ("tokens", "targets", "positions", "segment_ids")
FLOAT_FIELDS = ("weights", "teacher_logprobs", "ref_logprobs")


def _arrays(names, shape, dtype, sharding) -> dict:
    return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for name in names}


def _params(model: qwen3.Qwen3Config, mesh: Mesh, dtype: str) -> qwen3.Params:
    """Stacked parameters in one type, in their sharding."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, dtype, sharding=sharding),
        qwen3.abstract_params(model),
        parallel.param_shardings(model, mesh),
    )


def train_step(
    model: qwen3.Qwen3Config,
    recipe: ml_collections.ConfigDict,
    objective: Objective,
    mesh: Mesh,
    *,
    micro_batches: int,
    rows: int,
    row_length: int,
    remat: str = "full",
) -> tuple:
    """The optimizer step over `micro_batches` of `rows` packed rows, and its arguments."""
    optimizer = make_optimizer(recipe)
    shape, sharding = (micro_batches, rows, row_length), parallel.rows_sharding(mesh, leading=1)
    batch = {
        **_arrays(INT_FIELDS, shape, jnp.int32, sharding),
        **_arrays(("mask",), shape, jnp.bool_, sharding),
        **_arrays(FLOAT_FIELDS, shape, jnp.float32, sharding),
        **_arrays(("num_micro",), (), jnp.int32, parallel.replicated(mesh)),
    }
    step = make_train_step(model, optimizer, objective, mesh, remat)
    return step, (abstract_state(model, optimizer, mesh), batch)


def scoring(
    model: qwen3.Qwen3Config, mesh: Mesh, *, rows: int, row_length: int, dtype: str
) -> tuple:
    """The forward pass that scores `rows` packed rows, by weights held in `dtype`."""
    sharding = parallel.rows_sharding(mesh)
    batch = _arrays(INT_FIELDS, (rows, row_length), jnp.int32, sharding)
    return jax.jit(functools.partial(score_rows, model, mesh, 0)), (
        _params(model, mesh, dtype),
        batch,
    )


def _decode_arguments(model, mesh, slots: int, capacity: int) -> tuple:
    """Weights, one dict per layer, and the state of all slots."""
    params = _params(model, mesh, model.dtype)

    def layer(x):
        spec = PartitionSpec(*x.sharding.spec[1:])
        return jax.ShapeDtypeStruct(x.shape[1:], x.dtype, sharding=NamedSharding(mesh, spec))

    params["layers"] = (jax.tree.map(layer, params["layers"]),) * model.num_hidden_layers
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    cache = PartitionSpec(ROW_AXES if slots % rows == 0 else None, None, "tensor")
    state = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape,
            x.dtype,
            sharding=NamedSharding(mesh, cache if x.ndim == 4 else PartitionSpec()),
        ),
        jax.eval_shape(lambda: decode.empty_state(model, slots, capacity)),
    )
    return params, state


def prefill(
    model: qwen3.Qwen3Config, mesh: Mesh, *, slots: int, capacity: int, batch: int, length: int
) -> tuple:
    """Reading `batch` prompts of `length` tokens into slots."""
    whole = parallel.replicated(mesh)
    int32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=whole)  # noqa: E731
    ids = jax.ShapeDtypeStruct((batch,), jnp.uint32, sharding=whole)
    arguments = _decode_arguments(model, mesh, slots, capacity)
    return decode.prefill, (model, *arguments, int32(batch, length), *(int32(batch),) * 2, ids, ids)


def decoding(
    model: qwen3.Qwen3Config, mesh: Mesh, *, slots: int, capacity: int, steps: int, top_p: float
) -> tuple:
    """Decoding `steps` tokens in all slots."""
    whole = parallel.replicated(mesh)
    scalar = lambda dtype: jax.ShapeDtypeStruct((), dtype, sharding=whole)  # noqa: E731
    end_ids = jax.ShapeDtypeStruct((2,), jnp.int32, sharding=whole)
    arguments = (*_decode_arguments(model, mesh, slots, capacity), scalar(jnp.uint32))
    arguments += (scalar(jnp.float32), end_ids, scalar(jnp.int32))
    return decode.decode, (model, steps, top_p, *arguments)
