"""The identity of weights, wherever and however they are sharded."""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp

from lopd.models.low_rank import Adapter


def _leaf_hash(x: jax.Array) -> jax.Array:
    """Two uint32 sums over position-mixed bit patterns.

    Integer sums are exact in any order, so the result does not depend on the sharding, the
    number of hosts or the platform. bfloat16 weights hash like their float32 copies.
    """
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    index = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    sums = []
    for odd in (0x9E3779B1, 0x85EBCA77):
        mixed = (bits ^ (index * jnp.uint32(odd))) * jnp.uint32(0xC2B2AE3D)
        mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(odd)
        sums.append(jnp.sum(mixed ^ (mixed >> 13), dtype=jnp.uint32))
    return jnp.stack(sums)


@jax.jit
def _tree_hash(params):
    return jax.tree.map(_leaf_hash, params)


def params_fingerprint(params: Any) -> str:
    """16 hex digits that identify a parameter tree: names, shapes and float32 values.

    Adapters count beside the weights that they lie on, with what they are multiplied by, and not
    merged into them: the last bits of that product depend on the machine.
    """
    hashes = jax.device_get(_tree_hash(params))
    digest = hashlib.sha256()
    shapes = jax.tree.leaves(jax.tree.map(lambda x: str(x.shape), params))
    leaves = jax.tree_util.tree_leaves_with_path(hashes)
    for (path, value), shape in zip(leaves, shapes, strict=True):
        digest.update(f"{jax.tree_util.keystr(path)}{shape}{value.tolist()}".encode())
    is_adapter = lambda x: isinstance(x, Adapter)  # noqa: E731
    for path, leaf in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_adapter):
        if is_adapter(leaf):
            digest.update(f"{jax.tree_util.keystr(path)} alpha {leaf.alpha!r}".encode())
    return digest.hexdigest()[:16]
