"""The key/value cache: an argument and a result of the forward pass, never hidden state."""

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class LayerCache:
    """One layer's keys and values, each [B, capacity, K, N]."""

    k: jax.Array
    v: jax.Array

    def write(self, k_BTKN: jax.Array, v_BTKN: jax.Array, positions_BT: jax.Array) -> "LayerCache":
        """Stores new keys and values at their positions; positions >= capacity are dropped."""
        rows = jnp.arange(positions_BT.shape[0])[:, None]
        return LayerCache(
            self.k.at[rows, positions_BT].set(k_BTKN.astype(self.k.dtype), mode="drop"),
            self.v.at[rows, positions_BT].set(v_BTKN.astype(self.v.dtype), mode="drop"),
        )

    def insert(self, other: "LayerCache", rows: jax.Array) -> "LayerCache":
        """Copies `other`'s rows to the given rows' first positions; rows >= B are dropped."""
        length = other.k.shape[1]
        return LayerCache(
            self.k.at[rows, :length].set(other.k, mode="drop"),
            self.v.at[rows, :length].set(other.v, mode="drop"),
        )


@flax.struct.dataclass
class KVCache:
    """The caches of all layers. What lies beyond a row's current position is never read."""

    layers: tuple[LayerCache, ...]

    @property
    def capacity(self) -> int:
        """Positions that each row can hold."""
        return self.layers[0].k.shape[1]

    def insert(self, other: "KVCache", rows: jax.Array) -> "KVCache":
        """Copies another cache's rows into the given rows, layer by layer."""
        pairs = zip(self.layers, other.layers, strict=True)
        return KVCache(tuple(mine.insert(new, rows) for mine, new in pairs))


def empty_cache(config, batch: int, capacity: int) -> KVCache:
    """Zeros for `batch` rows of `capacity` positions, in the model's compute type."""
    shape = (batch, capacity, config.num_key_value_heads, config.head_dim)
    zeros = lambda: jnp.zeros(shape, config.compute_dtype)  # noqa: E731
    return KVCache(tuple(LayerCache(zeros(), zeros()) for _ in range(config.num_hidden_layers)))
