"""Attention: one function for packed rows, with the kernel that suits the platform.

`attend` is exact on every platform, forward and backward, and its memory grows linearly with the
length of a row. Shape letters as in `lopd.models.decoder`.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as splash,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask as splash_mask,
)
from jax.sharding import PartitionSpec

from lopd.machine.sharding import ROW_AXES, current_mesh, current_platform
from lopd.models import blocked_attention
from lopd.models.blocked_attention import SAVED_NAME

CUDNN_LONGEST = 8192
"""Longest row for cuDNN, whose mask takes 2 · T² bytes a row: 128 MiB at this length."""

_LANES = 128  # of a TPU vector register: splash attention's blocks and head dims are multiples


def causal_segment_mask(segment_ids_BT: jax.Array) -> jax.Array:
    """Boolean [B, T, T]: query t may see key s if s <= t and both are in the same segment.

    Padding (id 0) sees only padding, so that no row of the softmax is empty.
    """
    T = segment_ids_BT.shape[1]
    causal = jnp.tril(jnp.ones((T, T), bool))
    return causal & (segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :])


def masked_attention(
    q_BTHN: jax.Array, k_BSKN: jax.Array, v_BSKN: jax.Array, mask_BTS: jax.Array
) -> jax.Array:
    """Grouped-query attention [B, T, H, N] under any mask; scores and softmax in float32.

    Query head h reads key/value head h // (H / K). Masked scores get the most negative finite
    float, never -inf: a fully masked row then stays finite. Memory is B · H · T · S.
    """
    B, T, H, N = q_BTHN.shape
    K = k_BSKN.shape[2]
    q = q_BTHN.reshape(B, T, K, H // K, N)
    scores = jnp.einsum("btkgn,bskn->bkgts", q, k_BSKN, preferred_element_type=jnp.float32)
    scores = jnp.where(mask_BTS[:, None, None], scores * N**-0.5, jnp.finfo(jnp.float32).min)
    probabilities = jax.nn.softmax(scores, axis=-1).astype(v_BSKN.dtype)
    out = jnp.einsum("bkgts,bskn->btkgn", probabilities, v_BSKN)
    return out.reshape(B, T, H, N)


def xla_attention(q_BTHN, k_BTKN, v_BTKN, segment_ids_BT) -> jax.Array:
    """Packed-row attention in plain XLA, for CPU and as the reference of the kernels."""
    T = q_BTHN.shape[1]
    if T <= blocked_attention.BLOCK:
        mask = causal_segment_mask(segment_ids_BT)
        return checkpoint_name(masked_attention(q_BTHN, k_BTKN, v_BTKN, mask), SAVED_NAME)
    arrays = _pad_length((q_BTHN, k_BTKN, v_BTKN, segment_ids_BT), blocked_attention.BLOCK)
    return blocked_attention.blocked_attention(*arrays)[:, :T]


def _pad_length(arrays, multiple: int) -> tuple[jax.Array, ...]:
    """Arrays [B, T, ...] with zeros (padding, segment 0) after T, up to a multiple."""
    short = -arrays[0].shape[1] % multiple
    return tuple(jnp.pad(x, [(0, 0), (0, short)] + [(0, 0)] * (x.ndim - 2)) for x in arrays)


def splash_attention(
    q_BTHN, k_BTKN, v_BTKN, segment_ids_BT, *, interpret: bool = False
) -> jax.Array:
    """Packed-row attention on TPU: JAX's splash attention kernel, on one device's share.

    Args:
      q_BTHN: queries, not scaled (the kernel does not scale them, this function does).
      k_BTKN: keys.
      v_BTKN: values.
      segment_ids_BT: int32.
      interpret: run the kernel's program on the CPU, for tests.
    """
    T, H, N = q_BTHN.shape[1:]
    q, k, v, segments = _pad_length((q_BTHN, k_BTKN, v_BTKN, segment_ids_BT), _LANES)
    pad_heads = [(0, 0)] * 3 + [(0, -N % _LANES)]
    q, k, v = (jnp.pad(x, pad_heads).swapaxes(1, 2) for x in (q * N**-0.5, k, v))
    length = q.shape[2]
    block = max(b for b in (128, 256, 512) if length % b == 0)
    # Backward in two kernels: the fused one holds dq once per block of keys, T² / block in all.
    kernel = splash.make_splash_mha(
        splash_mask.MultiHeadMask([splash_mask.CausalMask((length, length))] * H),
        block_sizes=splash.BlockSizes(*(block,) * 8),
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=SAVED_NAME,
        interpret=interpret,
    )
    out = jax.vmap(lambda q, k, v, ids: kernel(q, k, v, splash.SegmentIds(ids, ids)))(
        q, k, v, segments
    )
    return out.swapaxes(1, 2)[:, :T, :, :N].astype(q_BTHN.dtype)


def cudnn_attention(
    q_BTHN, k_BTKN, v_BTKN, segment_ids_BT, *, implementation: str = "cudnn"
) -> jax.Array:
    """Packed-row attention on GPU: cuDNN with causality built in and segments as a mask.

    cuDNN's own packed mode is silently wrong for grouped queries in jax <= 0.10.2, so it is not
    used. The mask is [B, 1, T, T], shared by all heads; see `CUDNN_LONGEST`.
    """
    same_segment = segment_ids_BT[:, None, :, None] == segment_ids_BT[:, None, None, :]
    out = jax.nn.dot_product_attention(
        q_BTHN, k_BTKN, v_BTKN, mask=same_segment, is_causal=True, implementation=implementation
    )
    return checkpoint_name(out, SAVED_NAME)


def _choose(platform: str, q_BTHN: jax.Array):
    """The implementation for one device's share of the rows."""
    _, T, _, N = q_BTHN.shape
    if platform == "tpu":
        return splash_attention
    fits_cudnn = q_BTHN.dtype in (jnp.bfloat16, jnp.float16) and N % 8 == 0 and N <= 128
    if platform == "gpu" and fits_cudnn and T % 2 == 0 and T <= CUDNN_LONGEST:
        return cudnn_attention
    return xla_attention


def attend(
    q_BTHN: jax.Array, k_BTKN: jax.Array, v_BTKN: jax.Array, segment_ids_BT: jax.Array
) -> jax.Array:
    """Causal grouped-query attention [B, T, H, N] within segments of packed rows.

    On a mesh each device attends for its own rows and heads, and nothing is communicated.

    Args:
      q_BTHN: queries, not scaled; head h reads key/value head h // (H / K).
      k_BTKN: keys.
      v_BTKN: values.
      segment_ids_BT: int32; a token sees itself and earlier tokens of equal id.
    """
    local = _choose(current_platform(), q_BTHN)
    if current_mesh() is not None:
        heads, rows = PartitionSpec(ROW_AXES, None, "tensor"), PartitionSpec(ROW_AXES)
        # The kernels' results carry no varying-axes type, so it cannot be checked.
        local = jax.shard_map(
            local, in_specs=(heads, heads, heads, rows), out_specs=heads, check_vma=False
        )
    return local(q_BTHN, k_BTKN, v_BTKN, segment_ids_BT)
