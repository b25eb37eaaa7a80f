"""Attention of one new token per row to the keys and values that the row holds so far.

Keys are read in chunks, with a running softmax (arXiv 1805.02867): one compiled program for every
length. On TPU each row is read up to its own length, elsewhere up to the longest row of a block
and no further. A chunk past a row's own length changes nothing of its result, not even the last
bit, so that a row does not depend on how long its neighbours are. (A cache cut to the longest row
before an ordinary softmax would: its sums are then taken in another order.)

Shape letters: B rows, C capacity, K key/value heads, G query heads of each, N head dim.
"""

import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention

from lopd.machine.sharding import current_platform

CHUNK = 128
"""Positions read at a time. 128 was the fastest of 64 to 512 on CPU, with blocks of rows."""

_BLOCK_BYTES = 2**20
"""On CPU, of one chunk of a block's keys, so that it stays in a cache: fastest of 256 KiB to 2 MiB
for rows of 16 to 576 positions."""

_PAGES = 4
"""On TPU, chunks that are read in one piece: 128 KiB of a head's keys in bfloat16."""

_MASKED = -1e30


def block_rows(kv_heads: int, capacity: int, head_dim: int, itemsize: int) -> int | None:
    """How many rows are read together; None: all, as on accelerators.

    A row's bits depend on it, so whoever wants them always alike keeps whole blocks of rows.
    """
    if current_platform() != "cpu":
        return None
    row = kv_heads * min(CHUNK, capacity) * head_dim * itemsize
    return min(64, 1 << max(0, (_BLOCK_BYTES // row).bit_length() - 1))


def _keys_lie_transposed() -> bool:
    """Whether a chunk of keys is stored as [N, chunk] in the place of [chunk, N]: on CPU, where the
    product with the queries then takes a third of the time."""
    return current_platform() == "cpu"


def store_keys(k_BKTN: jax.Array, capacity: int) -> jax.Array:
    """Keys as a cache of `capacity` holds them, from its start: [B, K, T or more, N].

    More is whole chunks; `capacity` is at most CHUNK or a multiple of it.
    """
    if not _keys_lie_transposed():
        return k_BKTN
    B, K, T, N = k_BKTN.shape
    chunk = min(CHUNK, capacity)
    k_BKTN = jnp.pad(k_BKTN, ((0, 0), (0, 0), (0, -T % chunk), (0, 0)))
    chunks = k_BKTN.reshape(B, K, -1, chunk, N).swapaxes(3, 4)
    return chunks.reshape(k_BKTN.shape)


def write_keys(
    cache_BKCN: jax.Array, new_BKN: jax.Array, positions_B: jax.Array, active_B: jax.Array
) -> jax.Array:
    """The keys that `store_keys` stored, with each active row's new one at its position."""
    if not _keys_lie_transposed():
        return write_values(cache_BKCN, new_BKN, positions_B, active_B)
    B, K, C, N = cache_BKCN.shape
    chunk = min(CHUNK, C)
    chunks = cache_BKCN.reshape(B * K * C // chunk, N, chunk)
    index_BK = jnp.arange(B * K).reshape(B, K) * (C // chunk) + positions_B[:, None] // chunk
    index_BK = jnp.where(active_B[:, None], index_BK, len(chunks))
    column = jnp.repeat(positions_B % chunk, K)
    vectors = new_BKN.reshape(B * K, N).astype(cache_BKCN.dtype)
    chunks = chunks.at[index_BK.reshape(-1), :, column].set(vectors, mode="drop")
    return chunks.reshape(cache_BKCN.shape)


def write_values(
    cache_BKCN: jax.Array, new_BKN: jax.Array, positions_B: jax.Array, active_B: jax.Array
) -> jax.Array:
    """The cache with each active row's new vectors at its position."""
    B, K, C, N = cache_BKCN.shape
    # One index per vector: with (row, position) as indices and heads between them, XLA for TPU
    # copies the whole cache into another layout and back.
    index_BK = (jnp.arange(B * K).reshape(B, K)) * C + positions_B[:, None]
    index_BK = jnp.where(active_B[:, None], index_BK, B * K * C)
    vectors = new_BKN.reshape(B * K, N).astype(cache_BKCN.dtype)
    flat = cache_BKCN.reshape(B * K * C, N)
    return flat.at[index_BK.reshape(-1)].set(vectors, mode="drop").reshape(cache_BKCN.shape)


def attend_filled(
    q_BHN: jax.Array, k_BKCN: jax.Array, v_BKCN: jax.Array, lengths_B: jax.Array
) -> jax.Array:
    """Grouped-query attention [B, H, N] of each row's query to its first `lengths` positions.

    Args:
      q_BHN: queries; head h reads key/value head h // (H / K).
      k_BKCN: keys from `store_keys`; C is at most CHUNK or a multiple of it.
      v_BKCN: values.
      lengths_B: int32, at least 1.
    """
    B, H, N = q_BHN.shape
    K, C = k_BKCN.shape[1:3]
    q_BKGN = q_BHN.reshape(B, K, H // K, N)
    # The kernel takes the keys to bfloat16, and reads whole lanes.
    fits_pages = k_BKCN.dtype == jnp.bfloat16 and N % 128 == 0 and C % CHUNK == 0
    if current_platform() == "tpu" and fits_pages:
        return attend_pages(q_BKGN, k_BKCN, v_BKCN, lengths_B).reshape(B, H, N)
    chunk = min(CHUNK, C)
    rows = math.gcd(B, block_rows(K, C, N, k_BKCN.dtype.itemsize) or B)
    if rows == B:
        out = _attend_block(q_BKGN, k_BKCN, v_BKCN, lengths_B, None, chunk)
    else:
        # A block reads up to its longest row, so rows of like length share one.
        order = jnp.argsort(lengths_B)
        blocks = (q_BKGN[order], lengths_B[order], order)

        def attend_rows(i, out):
            q, lengths, own = (jax.lax.dynamic_slice_in_dim(x, i * rows, rows) for x in blocks)
            block = _attend_block(q, k_BKCN, v_BKCN, lengths, own, chunk)
            return jax.lax.dynamic_update_slice_in_dim(out, block, i * rows, 0)

        out = jax.lax.fori_loop(0, B // rows, attend_rows, jnp.zeros_like(q_BKGN))
        out = out[jnp.argsort(order)]
    return out.reshape(B, H, N)


def attend_pages(
    q_BKGN: jax.Array, k_BKCN: jax.Array, v_BKCN: jax.Array, lengths_B: jax.Array
) -> jax.Array:
    """`attend_filled` by JAX's paged attention for TPU, [B, K, G, N]: every head of every row is a
    sequence of its own there, and its pages are the chunks of the cache, where they lie."""
    B, K, G, N = q_BKGN.shape
    pages = k_BKCN.shape[2] // CHUNK
    # Past the last page the last one stands, masked by the length like all past it.
    page = jnp.minimum(jnp.arange(-(-pages // _PAGES) * _PAGES), pages - 1)
    out = paged_attention(
        q_BKGN.reshape(B * K, G, N).astype(jnp.float32) * N**-0.5,
        k_BKCN.reshape(1, B * K * pages, CHUNK, N),
        v_BKCN.reshape(1, B * K * pages, CHUNK, N),
        jnp.repeat(lengths_B, K),
        jnp.arange(B * K)[:, None] * pages + page,
        pages_per_compute_block=_PAGES,
    )
    return out.reshape(B, K, G, N).astype(q_BKGN.dtype)


def _attend_block(q, k_BKCN, v_BKCN, lengths, own, chunk):
    """As many rows as `q` [rows, K, G, N] has: those in `own` of the cache; None: all, in order."""
    rows, K, G, N = q.shape

    def read(array, start):
        if own is None:
            return jax.lax.dynamic_slice_in_dim(array, start, chunk, axis=2)
        read_row = lambda row: jax.lax.dynamic_slice(  # noqa: E731
            array, (row, 0, start, 0), (1, K, chunk, N)
        )
        return jax.vmap(read_row)(own)[:, 0]

    def attend_chunk(i, carry):
        peak, total, out = carry
        start = i * chunk
        keys = read(k_BKCN, start)
        if _keys_lie_transposed():
            keys = keys.reshape(rows, K, N, chunk).swapaxes(2, 3)
        scores = jnp.einsum("bkgn,bksn->bkgs", q, keys, preferred_element_type=jnp.float32)
        filled = start + jnp.arange(chunk) < lengths[:, None, None, None]
        scores = jnp.where(filled, scores * N**-0.5, _MASKED)
        new_peak = jnp.maximum(peak, scores.max(axis=-1))
        weights, decay = jnp.exp(scores - new_peak[..., None]), jnp.exp(peak - new_peak)
        added = jnp.einsum(
            "bkgs,bksn->bkgn",
            weights.astype(v_BKCN.dtype),
            read(v_BKCN, start),
            preferred_element_type=jnp.float32,
        )
        return new_peak, total * decay + weights.sum(axis=-1), out * decay[..., None] + added

    zeros = jnp.zeros((rows, K, G), jnp.float32)
    carry = (zeros + _MASKED, zeros, jnp.zeros((rows, K, G, N), jnp.float32))
    chunks = (jnp.max(lengths) + chunk - 1) // chunk
    _, total, out = jax.lax.fori_loop(0, chunks, attend_chunk, carry)
    return (out / total[..., None]).astype(q.dtype)
