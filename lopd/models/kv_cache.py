"""The key/value cache: an argument and a result of the forward pass, never hidden state.

Traced for a mesh, rows lie over data and fsdp and key/value heads over tensor; every device writes
and reads its own rows and heads, and nothing is communicated.

Shape letters: B rows, C capacity, K key/value heads, H query heads, N head dim, R prompts, T their
length.
"""

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lopd.machine.sharding import ROWS, current_mesh, spec
from lopd.models.decode_attention import (
    CHUNK,
    attend_filled,
    store_keys,
    write_keys,
    write_values,
)

CACHE_SPEC = spec("rows", "kv_heads")
"""Where the [B, K, C, N] arrays of a layer lie."""


def _per_device(function: Callable, in_specs, out_specs) -> Callable:
    """`function` on each device's own part, or on the whole where no mesh is traced for."""
    if current_mesh() is None:
        return function
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _own_rows(rows: jax.Array, count: int) -> jax.Array:
    """Global row numbers as this device's; `count` stands for rows of other devices."""
    if mesh := current_mesh():
        first = jax.lax.axis_index("data") * mesh.shape["fsdp"] + jax.lax.axis_index("fsdp")
        rows = rows - first * count
    return jnp.where((rows >= 0) & (rows < count), rows, count)


@flax.struct.dataclass
class LayerCache:
    """One layer's keys (as `store_keys` lays them) and values, each [B, K, C, N]."""

    k: jax.Array
    v: jax.Array
    """Values."""

    def insert(self, k_RTKN: jax.Array, v_RTKN: jax.Array, rows: jax.Array) -> "LayerCache":
        """Puts prompts' keys and values at the start of the given rows; rows >= B are dropped."""

        def put(k, v, k_new, v_new, rows):
            k_new, v_new = (x.swapaxes(1, 2).astype(k.dtype) for x in (k_new, v_new))
            k_new, rows = store_keys(k_new, k.shape[2]), _own_rows(rows, len(k))
            return tuple(
                cache.at[rows, :, : new.shape[2]].set(new, mode="drop")
                for cache, new in ((k, k_new), (v, v_new))
            )

        new = PartitionSpec(None, None, "tensor")
        specs = (CACHE_SPEC, CACHE_SPEC, new, new, PartitionSpec())
        put = _per_device(put, specs, (CACHE_SPEC, CACHE_SPEC))
        return LayerCache(*put(self.k, self.v, k_RTKN, v_RTKN, rows))

    def extend(
        self,
        q_BHN: jax.Array,
        k_BKN: jax.Array,
        v_BKN: jax.Array,
        positions: jax.Array,
        active: jax.Array,
    ) -> tuple[jax.Array, "LayerCache"]:
        """Stores each active row's new key and value and attends to all it holds: [B, H, N].

        The queries may have more rows than the cache, on every device alike: those that the cache
        has come first, the others are idle. What comes out of idle rows means nothing.
        """

        def step(q, k_new, v_new, positions, active, k, v):
            count, padding = len(k), len(q) - len(k)
            q, k_new, v_new, positions, active = (
                x[:count] for x in (q, k_new, v_new, positions, active)
            )
            k = write_keys(k, k_new, positions, active)
            v = write_values(v, v_new, positions, active)
            out = attend_filled(q, k, v, jnp.where(active, positions + 1, 1))
            return jnp.pad(out, ((0, padding), (0, 0), (0, 0))), k, v

        step = _per_device(
            step,
            (CACHE_SPEC, CACHE_SPEC, CACHE_SPEC, ROWS, ROWS, CACHE_SPEC, CACHE_SPEC),
            (CACHE_SPEC, CACHE_SPEC, CACHE_SPEC),
        )
        out, k, v = step(q_BHN, k_BKN, v_BKN, positions, active, self.k, self.v)
        return out, LayerCache(k, v)


@flax.struct.dataclass
class KVCache:
    """The caches of all layers. What lies beyond a row's current position is never read."""

    layers: tuple[LayerCache, ...]

    def insert(self, prefix: list[tuple[jax.Array, jax.Array]], rows: jax.Array) -> "KVCache":
        """Puts the keys and values of `decoder.prefill` into the given rows, layer by layer."""
        pairs = zip(self.layers, prefix, strict=True)
        return KVCache(tuple(layer.insert(*new, rows) for layer, new in pairs))


def rounded_capacity(capacity: int) -> int:
    """The positions that rows of at least `capacity` have: whole chunks of decode attention."""
    return capacity if capacity <= CHUNK else -(-capacity // CHUNK) * CHUNK


def empty_cache(config, batch: int, capacity: int) -> KVCache:
    """Zeros for `batch` rows of `capacity` positions or more, in the model's compute type."""
    capacity = rounded_capacity(capacity)
    shape = (batch, config.num_key_value_heads, capacity, config.head_dim)
    zeros = lambda: jnp.zeros(shape, config.compute_dtype)  # noqa: E731
    return KVCache(tuple(LayerCache(zeros(), zeros()) for _ in range(config.num_hidden_layers)))
