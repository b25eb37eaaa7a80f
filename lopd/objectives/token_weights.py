"""Token weights that only the step can know: the tokens of highest entropy, importance weights."""

import jax
import jax.numpy as jnp

from lopd.data.layout import MicroBatch
from lopd.data.selection import share
from lopd.models.token_scores import TokenScores
from lopd.objectives.sampled import Objective


def highest_entropy(entropy: jax.Array, batch: MicroBatch, fraction: float) -> jax.Array:
    """Of each response's weighted tokens the ⌈fraction · n⌉ with the highest entropy, bool [B, T].

    A response lies whole in one row, so the choice does not depend on packing; of equal entropies
    the earlier token goes first.
    """
    shape = entropy.shape
    column = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    nowhere = jnp.iinfo(jnp.int32).max
    segment = jnp.where(batch.mask & (batch.weights > 0), batch.segment_ids, nowhere)
    segment, _, order = jax.lax.sort((segment, -entropy, column), dimension=1, num_keys=3)
    # In the sorted row each response is one run, its highest entropy first.
    edge = segment[:, 1:] != segment[:, :-1]
    starts = jnp.pad(edge, ((0, 0), (1, 0)), constant_values=True)
    ends = jnp.pad(edge, ((0, 0), (0, 1)), constant_values=True)
    first = jax.lax.cummax(jnp.where(starts, column, 0), axis=1)
    last = jax.lax.cummin(jnp.where(ends, column, shape[1]), axis=1, reverse=True)
    count = (last - first + 1).astype(jnp.float32)
    chosen = column - first < share(count, fraction)
    row = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    return jnp.zeros(shape, bool).at[row, order].set(chosen & (segment != nowhere))


def train_highest_entropy(objective: Objective, fraction: float) -> Objective:
    """Leaves the loss only on the tokens of highest entropy under π_θ (arXiv 2604.14084)."""

    def selected(scores: TokenScores, batch: MicroBatch):
        loss, diagnostics = objective(scores, batch)
        entropy = jax.lax.stop_gradient(scores.entropy)
        return jnp.where(highest_entropy(entropy, batch, fraction), loss, 0.0), diagnostics

    return selected


def truncated_importance(objective: Objective, cap: float) -> Objective:
    """Weighs each token's loss by min(π_θ(a_t|s_t) / π_ref(a_t|s_t), cap), without gradient.

    It corrects for drift away from π_ref, both at temperature 1: with an infinite cap and tokens
    drawn from π_ref itself, the gradient at a token is in expectation that of a token drawn from
    π_θ; the cap bounds its variance (truncated importance sampling, Ionides 2008, doi
    10.1198/106186008X320456). Prefixes stay those of π_ref, and what another sampling temperature
    or a truncation changed stays as it is, as it does without weights.
    """

    def weighted(scores: TokenScores, batch: MicroBatch):
        loss, diagnostics = objective(scores, batch)
        ratio = jnp.exp(jax.lax.stop_gradient(scores.logprobs) - batch.fields["ref_logprobs"])
        return jnp.minimum(ratio, cap) * loss, diagnostics

    return weighted
