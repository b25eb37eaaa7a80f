"""The jitted programs of a run, lowered for the shapes of their arguments, ready to be compiled.

Nothing here holds an array: a program can be lowered for devices that do not exist.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.stages import Lowered

from lopd.config.settings import LoraSettings, TrainingRecipe
from lopd.data.layout import Layout, abstract_batch
from lopd.data.packing import TokenField
from lopd.machine import devices
from lopd.machine.sharding import on_mesh
from lopd.models import decoder
from lopd.models.kv_cache import CACHE_SPEC
from lopd.models.low_rank import abstract_adapters_on, adapted
from lopd.models.shardings import param_shardings
from lopd.objectives.sampled import Objective
from lopd.rollouts.scoring import score_rows
from lopd.sampling import decode
from lopd.sampling.draw import Truncation
from lopd.sampling.placement import sampling_mesh
from lopd.sampling.shapes import PROMPTS_PER_CALL, group_shape, prompts_at_once, row_shards
from lopd.training.state import abstract_state, make_optimizer
from lopd.training.step import make_train_step
from lopd.training.trees import trainable_and_frozen

INT_FIELDS = ("tokens", "targets", "positions", "segment_ids")
"""Integer arrays of every training batch."""
OPD_FIELDS = ("teacher_logprobs", "ref_logprobs")
"""Float arrays of a batch of OPD besides."""


def _arrays(names, shape, dtype, sharding) -> dict:
    return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for name in names}


def _params(
    model: decoder.DecoderConfig, mesh: Mesh, dtype: str, lora: LoraSettings | None = None
) -> decoder.Params:
    """Stacked parameters in one type, in their sharding, with float32 adapters if there are any."""
    params = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, dtype, sharding=sharding),
        decoder.abstract_params(model),
        param_shardings(model, mesh),
    )
    return adapted(params, abstract_adapters_on(model, lora, mesh)) if lora else params


def train_step(
    model: decoder.DecoderConfig,
    recipe: TrainingRecipe,
    objective: Objective,
    mesh: Mesh,
    token_fields: Sequence[str | TokenField] = OPD_FIELDS,
    lora: LoraSettings | None = None,
    *,
    micro_batches: int,
    rows: int,
    row_length: int,
    remat: str = "full",
) -> Lowered:
    """The optimizer step over `micro_batches` of `rows` packed rows, of all weights or adapters."""
    optimizer, dtype = make_optimizer(recipe), model.dtype if lora else "float32"
    trainable, frozen = trainable_and_frozen(_params(model, mesh, dtype, lora))
    layout = Layout(row_length, rows, recipe.reduction, tuple(token_fields))
    batch = abstract_batch(layout, micro_batches, mesh)
    step = make_train_step(model, optimizer, objective, trainable, mesh, remat)
    return step.lower(abstract_state(optimizer, trainable, mesh), frozen, batch)


def scoring(
    model: decoder.DecoderConfig,
    mesh: Mesh,
    lora: LoraSettings | None = None,
    *,
    rows: int,
    row_length: int,
    dtype: str,
) -> Lowered:
    """The forward pass that scores `rows` packed rows; all but adapters are held in `dtype`."""
    sharding = devices.rows_sharding(mesh)
    batch = _arrays(INT_FIELDS, (rows, row_length), jnp.int32, sharding)
    return score_rows.lower(model, mesh, 0, _params(model, mesh, dtype, lora), batch)


def _sampling_arguments(model, mesh: Mesh, slots: int, capacity: int) -> tuple:
    """Weights, one dict per layer, and the state of all rows, as the sampler lays them out."""
    params = _params(model, mesh, model.dtype)

    def layer(x):
        spec = PartitionSpec(*x.sharding.spec[1:])
        return jax.ShapeDtypeStruct(x.shape[1:], x.dtype, sharding=NamedSharding(mesh, spec))

    params["layers"] = (jax.tree.map(layer, params["layers"]),) * model.num_hidden_layers
    with on_mesh(mesh):
        rows, cache_rows = group_shape(model, slots, capacity, mesh)
    state = jax.eval_shape(lambda: decode.empty_state(model, rows, cache_rows, capacity))
    return params, jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape,
            x.dtype,
            sharding=NamedSharding(mesh, CACHE_SPEC if x.ndim == 4 else PartitionSpec()),
        ),
        state,
    )


def prefill(
    model: decoder.DecoderConfig, mesh: Mesh, *, slots: int, capacity: int, length: int
) -> Lowered:
    """Reading a call's worth of prompts of `length` tokens into rows."""
    mesh = sampling_mesh(model, mesh)
    whole = devices.replicated(mesh)
    at_once = prompts_at_once(length, row_shards(mesh), mesh.devices.flat[0].platform)
    size = max(PROMPTS_PER_CALL, at_once)

    def array(dtype, *shape: int):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=whole)

    ints, ids = array(jnp.int32, size), array(jnp.uint32, size)
    tokens = array(jnp.int32, size, length)
    prompts = decode.Prompts(array(jnp.int32), tokens, ints, ints, ids, ids)
    arguments = _sampling_arguments(model, mesh, slots, capacity)
    with on_mesh(mesh):
        return decode.prefill.lower(model, at_once, *arguments, prompts)


def decoding(
    model: decoder.DecoderConfig,
    mesh: Mesh,
    *,
    slots: int,
    capacity: int,
    steps: int,
    truncation: Truncation,
) -> Lowered:
    """Decoding `steps` tokens in all slots."""
    mesh = sampling_mesh(model, mesh)
    whole = devices.replicated(mesh)
    scalar = lambda dtype: jax.ShapeDtypeStruct((), dtype, sharding=whole)  # noqa: E731
    end_ids = jax.ShapeDtypeStruct((2,), jnp.int32, sharding=whole)
    arguments = (*_sampling_arguments(model, mesh, slots, capacity), scalar(jnp.uint32))
    arguments += (scalar(jnp.float32), end_ids, scalar(jnp.int32))
    with on_mesh(mesh):
        return decode.decode.lower(model, steps, truncation, *arguments)
