"""From hidden states to the log-probabilities of given tokens, without a [B, T, V] array.

Logits are made a chunk of positions at a time. The backward pass makes them again from the saved
log-sum-exp, so that neither pass ever holds more than one chunk.
"""

import functools
from collections.abc import Mapping, Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import Mesh

from lopd.data.packing import pack, pad_rows
from lopd.models import qwen3
from lopd.models.sharding import on_mesh
from lopd.parallel import rows_sharding

CHUNK_TOKENS = 2048
"""Positions per chunk over all rows; with V = 152k one chunk of float32 logits is 1.2 GiB."""


@flax.struct.dataclass
class TokenScores:
    """What a model says of a token, each float32 [B, T], at temperature 1."""

    logprobs: jax.Array
    """log π(token | prefix)."""
    logsumexp: jax.Array
    """Log-sum-exp of the logits over all V rows of the head."""
    entropy: jax.Array
    """Entropy of π(· | prefix) in nats; carries no gradient."""
    mean_logprob: jax.Array
    """Mean of log π over the vocabulary, as label smoothing needs it."""


def _chunk_length(batch: int, length: int) -> int:
    """The largest divisor of `length` that keeps batch × divisor within CHUNK_TOKENS."""
    limit = max(1, CHUNK_TOKENS // batch)
    return max(d for d in range(1, min(length, limit) + 1) if length % d == 0)


def _chunked(array: jax.Array, chunk: int) -> jax.Array:
    """[B, T, ...] to [T / chunk, B, chunk, ...]."""
    B, T = array.shape[:2]
    return jnp.moveaxis(array.reshape(B, T // chunk, chunk, *array.shape[2:]), 1, 0)


def _unchunked(array: jax.Array) -> jax.Array:
    """The inverse of `_chunked`."""
    array = jnp.moveaxis(array, 0, 1)
    return array.reshape(array.shape[0], -1, *array.shape[3:])


def _logits(hidden: jax.Array, head: jax.Array) -> jax.Array:
    """Float32 logits [..., V]; operands stay in their own type."""
    return jnp.einsum("...d,vd->...v", hidden, head, preferred_element_type=jnp.float32)


def score_logits(logits: jax.Array, targets: jax.Array) -> TokenScores:
    """Scores of `targets` [...] under float32 `logits` [..., V]."""
    logsumexp = jax.nn.logsumexp(logits, axis=-1)
    target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    logprobs = logits - logsumexp[..., None]
    return TokenScores(
        logprobs=target_logits - logsumexp,
        logsumexp=logsumexp,
        entropy=-jnp.sum(jnp.exp(logprobs) * logprobs, axis=-1),
        mean_logprob=jnp.mean(logits, axis=-1) - logsumexp,
    )


@jax.custom_vjp
def _scores(hidden_BTD: jax.Array, head_VD: jax.Array, targets_BT: jax.Array) -> TokenScores:
    chunk = _chunk_length(*targets_BT.shape)

    def score(inputs):
        hidden, targets = inputs
        return score_logits(_logits(hidden, head_VD), targets)

    chunks = (_chunked(hidden_BTD, chunk), _chunked(targets_BT, chunk))
    return jax.tree.map(_unchunked, jax.lax.map(score, chunks))


def _scores_forward(hidden_BTD, head_VD, targets_BT):
    scores = _scores(hidden_BTD, head_VD, targets_BT)
    return scores, (hidden_BTD, head_VD, targets_BT, scores.logsumexp)


def _scores_backward(saved, cotangent: TokenScores):
    hidden_BTD, head_VD, targets_BT, logsumexp_BT = saved
    V = head_VD.shape[0]
    chunk = _chunk_length(*targets_BT.shape)

    def backward(d_head, inputs):
        hidden, targets, logsumexp, d_logprob, d_logsumexp, d_mean = inputs
        probabilities = jnp.exp(_logits(hidden, head_VD) - logsumexp[..., None])
        # logprob = z_target − lse, mean_logprob = mean(z) − lse, and d lse / dz = softmax(z).
        d_logits = (d_logsumexp - d_logprob - d_mean)[..., None] * probabilities
        d_logits += d_mean[..., None] / V
        d_logits += d_logprob[..., None] * jax.nn.one_hot(targets, V, dtype=jnp.float32)
        d_logits = d_logits.astype(hidden.dtype)
        d_hidden = jnp.einsum("bcv,vd->bcd", d_logits, head_VD)
        d_head += jnp.einsum("bcv,bcd->vd", d_logits, hidden, preferred_element_type=jnp.float32)
        return d_head, d_hidden

    chunks = jax.tree.map(
        functools.partial(_chunked, chunk=chunk),
        (
            hidden_BTD,
            targets_BT,
            logsumexp_BT,
            cotangent.logprobs,
            cotangent.logsumexp,
            cotangent.mean_logprob,
        ),
    )
    d_head, d_hidden = jax.lax.scan(backward, jnp.zeros(head_VD.shape, jnp.float32), chunks)
    return _unchunked(d_hidden), d_head.astype(head_VD.dtype), None


_scores.defvjp(_scores_forward, _scores_backward)


def token_scores(hidden_BTD: jax.Array, head_VD: jax.Array, targets_BT: jax.Array) -> TokenScores:
    """Scores of `targets` given the final hidden states, at temperature 1.

    Normalises over every row of the head, padding rows included, as the sampler does.

    Args:
      hidden_BTD: normalised hidden states, in the compute type.
      head_VD: output matrix; cast to the type of `hidden`.
      targets_BT: int32, the token that follows each position.

    Returns:
      Float32 scores [B, T]. Gradients flow to `hidden` and `head` through everything but the
      entropy; the backward pass keeps only the log-sum-exp and accumulates the head's gradient
      in float32.
    """
    with jax.named_scope("token_scores"):
        return _scores(hidden_BTD, head_VD.astype(hidden_BTD.dtype), targets_BT)


@functools.partial(jax.jit, static_argnums=0)
def _score_rows(config: qwen3.Qwen3Config, params: qwen3.Params, rows: dict) -> jax.Array:
    hidden, _ = qwen3.forward(
        config, params, rows["tokens"], rows["positions"], rows["segment_ids"]
    )
    return token_scores(hidden, qwen3.output_head(params), rows["targets"]).logprobs


def score_responses(
    config: qwen3.Qwen3Config,
    params: qwen3.Params,
    records: Sequence[Mapping],
    *,
    mesh: Mesh,
    row_length: int,
    rows_per_micro: int,
) -> list[np.ndarray]:
    """log π(a_t | s_t) of every response token of every record, at temperature 1.

    One packed forward pass, the same one that training runs.

    Args:
      config: the model's shape.
      params: its (stacked) parameters.
      records: each with `prompt_tokens` and `response_tokens`.
      mesh: the devices; rows are split over them.
      row_length: positions per packed row.
      rows_per_micro: rows per forward pass.

    Returns:
      One float32 array [R_i] per record, in order.
    """
    arrays, spans = pack(records, row_length)
    del arrays["mask"]
    arrays = pad_rows(arrays, -(-len(arrays["tokens"]) // rows_per_micro) * rows_per_micro)
    sharding = rows_sharding(mesh)
    scored = []
    for start in range(0, len(arrays["tokens"]), rows_per_micro):
        rows = {name: a[start : start + rows_per_micro] for name, a in arrays.items()}
        with on_mesh(mesh):
            scored.append(_score_rows(config, params, jax.device_put(rows, sharding)))
    logprobs = np.concatenate([process_allgather(s, tiled=True) for s in scored])
    return [span.read(logprobs) for span in spans]
