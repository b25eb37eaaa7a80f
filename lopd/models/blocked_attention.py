"""Packed-row attention in plain XLA, a block of queries at a time, forward and backward.

The backward pass keeps the log-sum-exp of each query's scores and makes the probabilities again
from it (arXiv 2205.14135), so that no [T, T] array exists and each block passes over its scores
twice, where differentiating a softmax would take many passes. On a CPU those passes are most of
the time.

Shape letters: B rows, T queries, S keys, K key/value heads, G query heads of each, N head dim,
Q queries of a block, P blocks of a span.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

BLOCK = 128
"""Query positions per block; 128 was the fastest of 128 to 512 on CPU."""
SAVED_NAME = "attention"
"""Checkpoint name of attention's results, for rematerialisation policies."""

_SPANS = 4


def _spans(length: int) -> list[tuple[int, int]]:
    """(first query, end) of spans that are computed with only the keys before their end."""
    spans = math.gcd(length // BLOCK, _SPANS)
    return [(length * i // spans, length * (i + 1) // spans) for i in range(spans)]


def _cut(x: jax.Array, axis: int, first: int, end: int) -> jax.Array:
    """Positions first … end of `axis` as blocks on a new leading axis: [P, ..., Q, ...]."""
    x = jax.lax.slice_in_dim(x, first, end, axis=axis)
    return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, BLOCK, *x.shape[axis + 1 :]), axis, 0)


def _join(blocks: jax.Array, axis: int) -> jax.Array:
    """The inverse of `_cut`."""
    x = jnp.moveaxis(blocks, 0, axis)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def _rows(x_BKGQ: jax.Array) -> jax.Array:
    """[B, K, G, Q, ...] as [B, K, G · Q, ...]: one matrix per key/value head."""
    B, K, G, Q = x_BKGQ.shape[:4]
    return x_BKGQ.reshape(B, K, G * Q, *x_BKGQ.shape[4:])


def _scores(q_BKGQN, k_BKSN, query_ids_BQ, key_ids_BS, start) -> jax.Array:
    """Masked, scaled scores, float32 [B, K, G, Q, S]."""
    Q, N = q_BKGQN.shape[3:]
    products = jnp.einsum(
        "bkrn,bksn->bkrs", _rows(q_BKGQN), k_BKSN, preferred_element_type=jnp.float32
    ).reshape(*q_BKGQN.shape[:4], -1)
    causal = (start + jnp.arange(Q))[:, None] >= jnp.arange(k_BKSN.shape[2])
    mask_BQS = causal & (query_ids_BQ[:, :, None] == key_ids_BS[:, None, :])
    return jnp.where(mask_BQS[:, None, None], products * N**-0.5, jnp.finfo(jnp.float32).min)


def _forward_block(k, v, key_ids, block) -> tuple[jax.Array, jax.Array]:
    """Result [B, K, G, Q, N] and log-sum-exp [B, K, G, Q] of one block of queries."""
    q, query_ids, start = block
    scores = _scores(q, k, query_ids, key_ids, start)
    largest = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - largest)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    out = jnp.einsum("bkrs,bksn->bkrn", _rows(weights).astype(v.dtype), v).reshape(q.shape)
    return (out / total).astype(q.dtype), (largest + jnp.log(total))[..., 0]


def _backward_block(k, v, key_ids, totals, block) -> tuple[tuple, jax.Array]:
    """Adds a block's part to the gradients of keys and values; returns that of its queries."""
    dk, dv = totals
    q, query_ids, start, out, logsumexp, d_out = block
    scores = _scores(q, k, query_ids, key_ids, start)
    weights = jnp.exp(scores - logsumexp[..., None])
    # Σ_s weight · d weight, as it follows from the result.
    common = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1, keepdims=True)
    d_weights = jnp.einsum(
        "bkrn,bksn->bkrs", _rows(d_out), v, preferred_element_type=jnp.float32
    ).reshape(weights.shape)
    d_scores = _rows((weights * (d_weights - common) * q.shape[-1] ** -0.5).astype(q.dtype))
    accumulate = functools.partial(
        jnp.einsum, "bkrs,bkrn->bksn", preferred_element_type=jnp.float32
    )
    dv += accumulate(_rows(weights).astype(q.dtype), _rows(d_out))
    dk += accumulate(d_scores, _rows(q))
    return (dk, dv), jnp.einsum("bkrs,bksn->bkrn", d_scores, k).reshape(q.shape)


@jax.custom_vjp
def _attention(q_BKGTN, k_BKTN, v_BKTN, ids_BT) -> jax.Array:
    return _attention_forward(q_BKGTN, k_BKTN, v_BKTN, ids_BT)[0]


def _with_starts(x: jax.Array, ids: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`x`, the segment ids and every block's first position, none there before the others.

    Masks follow from the last two alone. Without this, those of all blocks are made ahead of the
    scan over layers, and are a [T, T] array together.
    """
    starts = jnp.arange(0, ids.shape[1], BLOCK)
    return jax.lax.optimization_barrier((x, ids, starts))


def _attention_forward(q, k, v, ids):
    q, ids, all_starts = _with_starts(q, ids)
    results = []
    for first, end in _spans(q.shape[3]):
        starts = all_starts[first // BLOCK : end // BLOCK]
        blocks = (_cut(q, 3, first, end), _cut(ids, 1, first, end), starts)
        block = functools.partial(_forward_block, k[:, :, :end], v[:, :, :end], ids[:, :end])
        results.append([_join(x, 3) for x in jax.lax.map(block, blocks)])
    out, logsumexp = (
        checkpoint_name(jnp.concatenate(parts, axis=3), SAVED_NAME)
        for parts in zip(*results, strict=True)
    )
    return out, (q, k, v, ids, out, logsumexp)


def _attention_backward(saved, d_out):
    q, k, v, ids, out, logsumexp = saved
    d_out, ids, all_starts = _with_starts(d_out, ids)
    totals = [jnp.zeros(x.shape, jnp.float32) for x in (k, v)]
    dq = []
    for first, end in _spans(q.shape[3]):
        starts = all_starts[first // BLOCK : end // BLOCK]
        blocks = (
            *(_cut(q, 3, first, end), _cut(ids, 1, first, end), starts),
            *(_cut(x, 3, first, end) for x in (out, logsumexp, d_out)),
        )
        block = functools.partial(_backward_block, k[:, :, :end], v[:, :, :end], ids[:, :end])
        sums, dq_blocks = jax.lax.scan(block, tuple(x[:, :, :end] for x in totals), blocks)
        totals = [x.at[:, :, :end].set(part) for x, part in zip(totals, sums, strict=True)]
        dq.append(_join(dq_blocks, 3))
    dk, dv = totals
    return jnp.concatenate(dq, axis=3), dk.astype(k.dtype), dv.astype(v.dtype), None


_attention.defvjp(_attention_forward, _attention_backward)


def blocked_attention(
    q_BTHN: jax.Array, k_BTKN: jax.Array, v_BTKN: jax.Array, segment_ids_BT: jax.Array
) -> jax.Array:
    """Causal grouped-query attention [B, T, H, N] within segments; T is a multiple of BLOCK.

    Memory grows linearly with T. Scores and their softmax are float32.
    """
    B, T, H, N = q_BTHN.shape
    K = k_BTKN.shape[2]
    q = jnp.moveaxis(q_BTHN.reshape(B, T, K, H // K, N), 1, 3)
    out = _attention(q, jnp.moveaxis(k_BTKN, 1, 2), jnp.moveaxis(v_BTKN, 1, 2), segment_ids_BT)
    return jnp.moveaxis(out, 3, 1).reshape(B, T, H, N)
