"""The device side of sampling: prefill prompts into rows, decode all rows together.

Everything here is pure and jitted once per shape. The state is donated, so the key/value cache is
updated in place. To run on a mesh, call under `sharding.on_mesh`: rows lie over data
and fsdp, heads over tensor, and what the host reads is on every device.

A row is at most one response being decoded; `lopd.sampling.engine` decides which rows are in use.
"""

import functools

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lopd.machine.sharding import ROWS, current_mesh
from lopd.models import decoder
from lopd.models.kv_cache import CACHE_SPEC, KVCache, empty_cache
from lopd.models.projection import project_to_vocabulary
from lopd.sampling.draw import Drawn, Truncation, draw


@flax.struct.dataclass
class RowState:
    """What the device knows of every row; all arrays but the cache lead with [rows].

    The cache may have fewer rows. On each device its rows are then the first ones; the others stay
    idle and are there to give the arithmetic its shape.
    """

    cache: KVCache
    token: jax.Array  # int32, the last token, which the next step reads
    position: jax.Array  # int32, its position
    generated: jax.Array  # int32, response tokens so far
    active: jax.Array  # bool
    prompt_id: jax.Array  # uint32
    sample_id: jax.Array  # uint32


@flax.struct.dataclass
class Prompts:
    """Prompts to read in one call, all [P, ...]; the first `count` are real."""

    count: jax.Array  # int32 []
    tokens: jax.Array  # int32 [P, T], padded on the right
    length: jax.Array  # int32
    row: jax.Array  # int32, where each goes; any number past the end where there is no prompt
    prompt_id: jax.Array  # uint32
    sample_id: jax.Array  # uint32


@flax.struct.dataclass
class DecodeOutput:
    """What each decode step made, each [steps, rows]."""

    drawn: Drawn
    valid: jax.Array  # bool: the row was active


def _constrain(tree, spec: PartitionSpec):
    """`tree` laid out so on the mesh that is traced for, if there is one."""
    if current_mesh() is None:
        return tree
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, spec), tree)


def _in_place(state: RowState) -> RowState:
    """The state in the layout that it always has, so that its buffers can be donated."""
    cache = _constrain(state.cache, CACHE_SPEC)
    return _constrain(state.replace(cache=None), PartitionSpec()).replace(cache=cache)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def empty_state(
    config: decoder.DecoderConfig, rows: int, cache_rows: int, capacity: int
) -> RowState:
    """All rows idle, the cache's with room for `capacity` tokens of prompt and response each."""
    zeros = lambda dtype: jnp.zeros((rows,), dtype)  # noqa: E731
    return _in_place(
        RowState(
            cache=empty_cache(config, cache_rows, capacity),
            token=zeros(jnp.int32),
            position=zeros(jnp.int32),
            generated=zeros(jnp.int32),
            active=zeros(bool),
            prompt_id=zeros(jnp.uint32),
            sample_id=zeros(jnp.uint32),
        )
    )


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def prefill(
    config: decoder.DecoderConfig,
    at_once: int,
    params: decoder.Params,
    state: RowState,
    prompts: Prompts,
) -> RowState:
    """Reads prompts and puts them into their rows, ready to decode.

    Goes through the prompts `at_once` at a time and stops after the real ones, so that a call
    costs what it holds, and what a prompt becomes does not depend on how many share its call. A
    row is left *at* its last prompt token: the first decode step reads it again and samples from
    its logits, so sampling happens in one place only.
    """

    def read(i, cache):
        part = lambda x: jax.lax.dynamic_slice_in_dim(x, i * at_once, at_once)  # noqa: E731
        tokens, length = part(prompts.tokens), part(prompts.length)
        tokens = _constrain(tokens, ROWS)
        segment_ids = (jnp.arange(tokens.shape[1]) < length[:, None]).astype(jnp.int32)
        prefix = decoder.prefill(config, params, tokens, segment_ids)
        return cache.insert(prefix, part(cache_row))

    mesh = current_mesh()
    shards = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
    per_device, cached = (len(x) // shards for x in (state.token, state.cache.layers[0].k))
    cache_row = prompts.row // per_device * cached + prompts.row % per_device
    calls = (prompts.count + at_once - 1) // at_once
    cache = jax.lax.fori_loop(0, calls, read, state.cache)
    last = jnp.take_along_axis(prompts.tokens, prompts.length[:, None] - 1, axis=1)[:, 0]
    put = lambda array, values: array.at[prompts.row].set(values, mode="drop")  # noqa: E731
    return _in_place(
        RowState(
            cache=cache,
            token=put(state.token, last),
            position=put(state.position, prompts.length - 1),
            generated=put(state.generated, 0),
            active=put(state.active, True),
            prompt_id=put(state.prompt_id, prompts.prompt_id),
            sample_id=put(state.sample_id, prompts.sample_id),
        )
    )


def _keys(seed: jax.Array, state: RowState) -> jax.Array:
    """The random key of each row's next token: of (seed, prompt, sample, place in the response)."""

    def key(*parts):
        return functools.reduce(jax.random.fold_in, parts, jax.random.key(seed))

    return jax.vmap(key)(state.prompt_id, state.sample_id, state.generated)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def decode(
    config: decoder.DecoderConfig,
    steps: int,
    truncation: Truncation,
    params: decoder.Params,
    state: RowState,
    seed: jax.Array,
    temperature: jax.Array,
    end_ids: jax.Array,
    max_response: jax.Array,
) -> tuple[RowState, DecodeOutput, jax.Array]:
    """Decodes every active row by up to `steps` tokens.

    A row stops after any of `end_ids` or `max_response` tokens.

    Returns:
      The state, what was made, and which rows are still active.
    """
    head = decoder.output_head(params)

    def step(state: RowState, _):
        hidden, cache = decoder.forward(
            config,
            params,
            state.token[:, None],
            state.position[:, None],
            state.active[:, None].astype(jnp.int32),
            state.cache,
        )
        with jax.named_scope("draw"):
            logits = project_to_vocabulary(hidden[:, 0], head)
            drawn = draw(logits, _keys(seed, state), temperature, truncation)
        generated = state.generated + state.active
        ends = jnp.isin(drawn.token, end_ids) | (generated >= max_response)
        output = DecodeOutput(drawn=drawn, valid=state.active)
        state = state.replace(
            cache=cache,
            token=jnp.where(state.active, drawn.token, state.token),
            position=state.position + state.active,
            generated=generated,
            active=state.active & ~ends,
        )
        return _in_place(state), output

    state, output = jax.lax.scan(step, state, None, length=steps)
    return state, _constrain(output, PartitionSpec()), _constrain(state.active, PartitionSpec())
