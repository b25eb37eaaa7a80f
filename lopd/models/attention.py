"""One attention function and the mask that goes with packed rows.

This is the plain XLA path: right everywhere, quadratic memory, and the reference that faster
kernels are compared with.
"""

import jax
import jax.numpy as jnp


def causal_segment_mask(segment_ids_BT: jax.Array) -> jax.Array:
    """Boolean [B, T, T]: query t may see key s if s <= t and both are in the same segment.

    Padding (id 0) sees only padding, so that no row of the softmax is empty.
    """
    T = segment_ids_BT.shape[1]
    causal = jnp.tril(jnp.ones((T, T), bool))
    return causal & (segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :])


def attend(
    q_BTHN: jax.Array, k_BSKN: jax.Array, v_BSKN: jax.Array, mask_BTS: jax.Array
) -> jax.Array:
    """Grouped-query attention [B, T, H, N]; scores and softmax in float32.

    Query head h reads key/value head h // (H / K). Masked scores get the most negative finite
    float, never -inf: a fully masked row then stays finite.
    """
    B, T, H, N = q_BTHN.shape
    K = k_BSKN.shape[2]
    q = q_BTHN.reshape(B, T, K, H // K, N)
    scores = jnp.einsum("btkgn,bskn->bkgts", q, k_BSKN, preferred_element_type=jnp.float32)
    scores = jnp.where(mask_BTS[:, None, None], scores * N**-0.5, jnp.finfo(jnp.float32).min)
    probabilities = jax.nn.softmax(scores, axis=-1).astype(v_BSKN.dtype)
    out = jnp.einsum("bkgts,bskn->btkgn", probabilities, v_BSKN)
    return out.reshape(B, T, H, N)
