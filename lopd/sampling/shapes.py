"""The shapes of sampling's programs: rows, prompts of a call, buckets of prompt lengths."""

import jax.numpy as jnp
from jax.sharding import Mesh

from lopd.models import decoder
from lopd.models.decode_attention import block_rows

EXACT_ROWS = 64
"""Rows per device of every float32 program, whatever the number of slots.

A matrix product's bits depend on how many rows it has, not on what is in the other rows. So float32
multiplies 64 rows at a time and a device: with idle ones among them, most of which take no memory,
if there are fewer slots, and in turns if there are more. 64 rows reach 76 to 87 % of a CPU's
arithmetic peak in a layer's products.
"""


PROMPTS_PER_CALL = 64
"""Prompts that one call of prefill reads at most."""


def prompt_bucket(length: int, capacity: int) -> int:
    """The power of two at or above a prompt length, so that few shapes are compiled."""
    # It may pass a capacity that is not a power of two.
    return min(max(8, 1 << (length - 1).bit_length()), capacity)


def row_shards(mesh: Mesh | None) -> int:
    """Into how many parts rows are split."""
    return mesh.shape["data"] * mesh.shape["fsdp"] if mesh else 1


def group_shape(
    config: decoder.DecoderConfig, slots: int, capacity: int, mesh: Mesh | None
) -> tuple[int, int]:
    """Rows of one decode program for at most `slots` slots, and those of them that have a cache.

    To be called where the program is. See `EXACT_ROWS` for float32; else one row per slot.
    """
    shards = row_shards(mesh)
    used = -(-slots // shards)
    if config.compute_dtype != jnp.float32:
        return used * shards, used * shards
    used = min(used, EXACT_ROWS)
    # Attention's bits depend on its blocks, so those are whole.
    block = block_rows(config.num_key_value_heads, capacity, config.head_dim, 4) or EXACT_ROWS
    cached = min(EXACT_ROWS, -(-used // block) * block)
    return EXACT_ROWS * shards, cached * shards


def prompts_at_once(bucket: int, shards: int, platform: str) -> int:
    """Prompts per forward pass of a prefill: enough tokens to keep the arithmetic busy."""
    tokens = 64 if platform == "cpu" else 512
    return max(1, tokens // bucket) * shards
