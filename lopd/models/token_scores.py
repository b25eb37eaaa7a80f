"""From hidden states to the log-probabilities of given tokens, without a [B, T, V] array.

Logits are made a chunk of positions at a time. The backward pass makes them again from the saved
log-sum-exp, so that neither pass ever holds more than one chunk.

On a mesh the vocabulary is split over the devices that share rows' weights (`fsdp`, `tensor`):
each device multiplies the hidden states of all their rows by its own part of the head, and only
maxima, sums and hidden states are exchanged. No device holds the head, or its gradient, whole.

Shape letters as in `lopd.models.decoder`; C is the length of a chunk, k of top-k.
"""

import dataclasses
import functools
import math

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, PartitionSpec

from lopd.machine.sharding import ROW_AXES, current_mesh, current_platform

CHUNK_BYTES = 640 * 2**20
"""Most that one chunk of float32 logits may take on a device: 1,100 tokens of Qwen3's 152k."""


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
    topk_ids: jax.Array | None = None
    """int32 [B, T, k], the most likely tokens, best first, when asked for."""
    topk_logprobs: jax.Array | None = None
    """float32 [B, T, k], their log π; carries no gradient."""
    logprobs_at: jax.Array | None = None
    """float32 [B, T, K], log π of given tokens, when asked for."""


@dataclasses.dataclass(frozen=True)
class _Split:
    """How the vocabulary and the rows lie on the mesh; the empty split is one device.

    Rows come in split over `ROW_AXES`. Those of the axes that also split the vocabulary are
    gathered; over the remaining axes devices keep to their own rows, and add up the head's
    gradient at the end.
    """

    vocab: tuple[str, ...] = ()
    shards: int = 1
    gather: tuple[str, ...] = ()
    gathered: int = 1
    reduce: tuple[str, ...] = ()

    def total(self, x: jax.Array) -> jax.Array:
        """The sum over the shards of the vocabulary."""
        return jax.lax.psum(x, self.vocab) if self.vocab else x

    def largest(self, x: jax.Array) -> jax.Array:
        """The maximum over the shards of the vocabulary."""
        return jax.lax.pmax(x, self.vocab) if self.vocab else x

    def first_id(self, local_size: int) -> jax.Array | int:
        """The token id that this device's part of the head begins with."""
        return jax.lax.axis_index(self.vocab) * local_size if self.vocab else 0

    def collect(self, x: jax.Array) -> jax.Array:
        """The rows of all devices that share the vocabulary."""
        return jax.lax.all_gather(x, self.gather, tiled=True) if self.gather else x

    def own(self, x: jax.Array) -> jax.Array:
        """This device's rows of what is equal on all of them; the inverse of `collect`."""
        if not self.gather:
            return x
        rows = x.shape[0] // self.gathered
        return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(self.gather) * rows, rows)


def _vocab_split(mesh: AbstractMesh, vocab_size: int) -> _Split:
    """The vocabulary over as many of the weights' axes as divide it."""
    size = lambda axes: math.prod(mesh.shape[axis] for axis in axes)  # noqa: E731
    for axes in (("fsdp", "tensor"), ("tensor",), ()):
        if vocab_size % size(axes) == 0:
            break
    gather = tuple(axis for axis in ROW_AXES if axis in axes)
    reduce = tuple(axis for axis in ROW_AXES if axis not in axes)
    return _Split(axes, size(axes), gather, size(gather), reduce)


def _chunk_length(split: _Split, rows_shape: tuple[int, int], head_VD: jax.Array) -> int:
    """The largest divisor of T whose logits, [gathered rows, divisor, V], fit CHUNK_BYTES."""
    rows, length = rows_shape
    limit = max(1, CHUNK_BYTES // (4 * rows * split.gathered * head_VD.shape[0]))
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


def score_logits(
    logits: jax.Array,
    targets: jax.Array,
    at_ids: jax.Array | None = None,
    top_k: int = 0,
    split: _Split = _Split(),
) -> TokenScores:
    """Scores of `targets` [...] under float32 `logits` [..., V].

    Args:
      logits: all of them, or a device's part of the vocabulary, as `split` says.
      targets: token ids of the whole vocabulary.
      at_ids: other token ids [..., K] to score too.
      top_k: how many of the most likely tokens to report too.
      split: how the vocabulary lies on the mesh.
    """
    size = logits.shape[-1]
    first = split.first_id(size)
    largest = split.largest(jnp.max(logits, axis=-1))
    sums = split.total(jnp.sum(jnp.exp(logits - largest[..., None]), axis=-1))
    logsumexp = largest + jnp.log(sums)

    def at(ids):
        local = ids - first
        here = (local >= 0) & (local < size)
        picked = jnp.take_along_axis(logits, jnp.where(here, local, 0), axis=-1)
        return split.total(jnp.where(here, picked, 0.0)) - logsumexp[..., None]

    logprobs = logits - logsumexp[..., None]
    ids, values = None, None
    if top_k:
        values, ids = _top_k(logits, first, top_k, split)
        values -= logsumexp[..., None]
    return TokenScores(
        logprobs=at(targets[..., None])[..., 0],
        logsumexp=logsumexp,
        entropy=-split.total(jnp.sum(jnp.exp(logprobs) * logprobs, axis=-1)),
        mean_logprob=split.total(jnp.sum(logprobs, axis=-1)) / (size * split.shards),
        topk_ids=ids,
        topk_logprobs=values,
        logprobs_at=None if at_ids is None else at(at_ids),
    )


def _top_k(logits, first, top_k: int, split: _Split) -> tuple[jax.Array, jax.Array]:
    """Values and ids [..., k] of the largest logits of the whole vocabulary."""
    values, ids = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))
    ids += first
    if split.vocab:
        candidates, candidate_ids = (
            jax.lax.all_gather(x, split.vocab, axis=x.ndim - 1, tiled=True) for x in (values, ids)
        )
        values, best = jax.lax.top_k(candidates, top_k)
        ids = jnp.take_along_axis(candidate_ids, best, axis=-1)
    return values, ids.astype(jnp.int32)


def _forward_shard(top_k: int, split: _Split, hidden_BTD, head_VD, tokens) -> TokenScores:
    """Scores of this device's rows, by its part of the head and everybody else's."""
    chunk = _chunk_length(split, hidden_BTD.shape[:2], head_VD)

    def score(inputs):
        hidden, targets, at_ids = jax.tree.map(split.collect, inputs)
        scores = score_logits(_logits(hidden, head_VD), targets, at_ids, top_k, split)
        return jax.tree.map(split.own, scores)

    chunks = jax.tree.map(lambda x: _chunked(x, chunk), (hidden_BTD, *tokens))
    return jax.tree.map(_unchunked, jax.lax.map(score, chunks))


def _backward_shard(split: _Split, hidden_BTD, head_VD, tokens) -> tuple[jax.Array, jax.Array]:
    """Gradients of this device's rows, and of its part of the head, in float32."""
    V = head_VD.shape[0]
    chunk = _chunk_length(split, hidden_BTD.shape[:2], head_VD)

    def backward(d_head, inputs):
        inputs = jax.tree.map(split.collect, inputs)
        hidden, targets, at_ids, logsumexp, d_logprob, d_logsumexp, d_mean, d_at = inputs
        probabilities = jnp.exp(_logits(hidden, head_VD) - logsumexp[..., None])
        # logprob = z_target − lse, mean_logprob = mean(z) − lse, and d lse / dz = softmax(z).
        shared = d_logsumexp - d_logprob - d_mean
        if d_at is not None:
            shared -= jnp.sum(d_at, axis=-1)
        d_logits = shared[..., None] * probabilities
        d_logits += d_mean[..., None] / (V * split.shards)
        is_target = (targets - split.first_id(V))[..., None] == jnp.arange(V)
        d_logits += jnp.where(is_target, d_logprob[..., None], 0.0)
        if d_at is not None:
            local = at_ids - split.first_id(V)
            # An id of another device goes out of bounds, where it is dropped; below 0 it would
            # count from the end.
            local = jnp.where(local < 0, V, local)
            b, c, _ = jnp.indices(local.shape, sparse=True)
            d_logits = d_logits.at[b, c, local].add(d_at, mode="drop")
        d_logits = d_logits.astype(hidden.dtype)
        d_logits, hidden = d_logits.reshape(-1, V), hidden.reshape(-1, hidden.shape[-1])
        if current_platform() == "cpu":
            d_logits = jax.lax.optimization_barrier(d_logits)  # see projection.project
        d_hidden = (d_logits @ head_VD).reshape(*targets.shape, -1)
        if split.gather:
            d_hidden = jax.lax.psum_scatter(d_hidden, split.gather, tiled=True)
        others = tuple(axis for axis in split.vocab if axis not in split.gather)
        d_hidden = jax.lax.psum(d_hidden, others) if others else d_hidden
        d_head += jnp.einsum("nv,nd->vd", d_logits, hidden, preferred_element_type=jnp.float32)
        return d_head, d_hidden

    chunks = jax.tree.map(lambda x: _chunked(x, chunk), (hidden_BTD, *tokens))
    d_head, d_hidden = jax.lax.scan(backward, jnp.zeros(head_VD.shape, jnp.float32), chunks)
    if split.reduce:
        d_head = jax.lax.psum(d_head, split.reduce)
    return _unchunked(d_hidden), d_head


def _on_shards(function, vocab_size: int, *, gives_head_gradient: bool):
    """`function(split, hidden, head, tokens)`, run by each device of the mesh on its share.

    `tokens` is a tuple of arrays [B, T, ...] (or None), split by rows like `hidden` and all
    results but the head's gradient.
    """
    mesh = current_mesh()
    if mesh is None:
        return functools.partial(function, _Split())
    split = _vocab_split(mesh, vocab_size)
    rows, head = PartitionSpec(ROW_AXES), PartitionSpec(split.vocab)
    return jax.shard_map(
        functools.partial(function, split),
        in_specs=(rows, head, rows),
        out_specs=(rows, head) if gives_head_gradient else rows,
        check_vma=False,  # what is equal on which devices cannot be seen through the scan
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _scores(hidden_BTD, head_VD, targets_BT, at_ids_BTK, top_k: int) -> TokenScores:
    forward = functools.partial(_forward_shard, top_k)
    forward = _on_shards(forward, head_VD.shape[0], gives_head_gradient=False)
    return forward(hidden_BTD, head_VD, (targets_BT, at_ids_BTK))


def _scores_forward(hidden_BTD, head_VD, targets_BT, at_ids_BTK, top_k):
    scores = _scores(hidden_BTD, head_VD, targets_BT, at_ids_BTK, top_k)
    return scores, (hidden_BTD, head_VD, targets_BT, at_ids_BTK, scores.logsumexp)


def _scores_backward(top_k, saved, cotangent: TokenScores):
    del top_k
    hidden_BTD, head_VD, *tokens = saved
    tokens += [cotangent.logprobs, cotangent.logsumexp, cotangent.mean_logprob]
    tokens.append(cotangent.logprobs_at)
    backward = _on_shards(_backward_shard, head_VD.shape[0], gives_head_gradient=True)
    d_hidden, d_head = backward(hidden_BTD, head_VD, tuple(tokens))
    return d_hidden, d_head.astype(head_VD.dtype), None, None


_scores.defvjp(_scores_forward, _scores_backward)


def token_scores(
    hidden_BTD: jax.Array,
    head_VD: jax.Array,
    targets_BT: jax.Array,
    *,
    at_ids_BTK: jax.Array | None = None,
    top_k: int = 0,
) -> TokenScores:
    """Scores of `targets` given the final hidden states, at temperature 1.

    Normalises over every row of the head, padding rows included, as the sampler does.

    Args:
      hidden_BTD: normalised hidden states, in the compute type.
      head_VD: output matrix; cast to the type of `hidden`.
      targets_BT: int32, the token that follows each position.
      at_ids_BTK: int32, other tokens to score at each position, from the same pass.
      top_k: how many of the most likely tokens to report besides, from the same pass.

    Returns:
      Float32 scores [B, T]. Gradients flow to `hidden` and `head` through everything but the
      entropy and the top-k; the backward pass keeps only the log-sum-exp and accumulates the
      head's gradient in float32.
    """
    with jax.named_scope("scores"):
        head_VD = head_VD.astype(hidden_BTD.dtype)
        return _scores(hidden_BTD, head_VD, targets_BT, at_ids_BTK, top_k)
