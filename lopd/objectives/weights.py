"""Which tokens of a response are trained on, and how much each counts."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lopd.objectives.sampled import Batch, Objective
from lopd.scoring import TokenScores

REDUCTIONS = ("sample_mean", "token_mean", "token_sum")


def token_weights(trained: Sequence[int], reduction: str) -> np.ndarray:
    """The weight that each trained token of each response of one global batch carries, float32 [N].

    `sample_mean` (the released code's): mean over a response's tokens, then over responses.
    `token_mean`: mean over all tokens. `token_sum` (the paper's): sum over tokens, mean over
    responses. A response without a trained token does not count.

    Args:
      trained: how many tokens of each response are trained on.
    """
    counts = np.asarray(trained, np.float64)
    responses, tokens = max(np.count_nonzero(counts), 1), max(counts.sum(), 1)
    weights = {
        "sample_mean": 1 / (responses * np.maximum(counts, 1)),
        "token_mean": np.full(len(counts), 1 / tokens),
        "token_sum": np.full(len(counts), 1 / responses),
    }[reduction]
    return weights.astype(np.float32)


def _share(count: np.float32 | jax.Array, fraction: float) -> np.float32 | jax.Array:
    """⌈fraction · count⌉ in float32: one rounded product, so that NumPy and XLA agree."""
    return -(-(count * np.float32(fraction)) // 1)


@dataclasses.dataclass(frozen=True)
class TokenSelection:
    """Which tokens of each response are trained on; by default all.

    What is known of a response before packing decides `mask`. The entropy of π_θ is known only in
    the step: there `highest_entropy` drops tokens from the mask, but how many it leaves of each
    response is known here, and so the weights are those of the tokens that are left.
    """

    position_fraction: float = 1.0
    """Only the first so much of each response (arXiv 2606.22600)."""
    entropy_fraction: float = 1.0
    """Of these, only the so much with the highest entropy (arXiv 2604.14084)."""
    masked_ids: tuple[int, ...] = ()
    """Token ids that are never trained on."""

    def mask(self, response_tokens: np.ndarray) -> np.ndarray:
        """What may be trained on of a response, bool [R]."""
        keep = np.ones(len(response_tokens), bool)
        for token in self.masked_ids:
            keep &= response_tokens != token
        if self.position_fraction < 1:
            keep[int(_share(np.float32(len(keep)), self.position_fraction)) :] = False
        return keep

    def count(self, response_tokens: np.ndarray) -> int:
        """How many tokens of a response are trained on."""
        candidates = np.count_nonzero(self.mask(response_tokens))
        return int(_share(np.float32(candidates), self.entropy_fraction))


ALL_TOKENS = TokenSelection()


def highest_entropy(entropy: jax.Array, batch: Batch, fraction: float) -> jax.Array:
    """Of each response's weighted tokens the ⌈fraction · n⌉ with the highest entropy, bool [B, T].

    A response lies whole in one row, so the choice does not depend on packing; of equal entropies
    the earlier token goes first.
    """
    shape = entropy.shape
    column = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    nowhere = jnp.iinfo(jnp.int32).max
    segment = jnp.where(batch["mask"] & (batch["weights"] > 0), batch["segment_ids"], nowhere)
    segment, _, order = jax.lax.sort((segment, -entropy, column), dimension=1, num_keys=3)
    # In the sorted row each response is one run, its highest entropy first.
    edge = segment[:, 1:] != segment[:, :-1]
    starts = jnp.pad(edge, ((0, 0), (1, 0)), constant_values=True)
    ends = jnp.pad(edge, ((0, 0), (0, 1)), constant_values=True)
    first = jax.lax.cummax(jnp.where(starts, column, 0), axis=1)
    last = jax.lax.cummin(jnp.where(ends, column, shape[1]), axis=1, reverse=True)
    count = (last - first + 1).astype(jnp.float32)
    chosen = column - first < _share(count, fraction)
    row = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    return jnp.zeros(shape, bool).at[row, order].set(chosen & (segment != nowhere))


def train_highest_entropy(objective: Objective, fraction: float) -> Objective:
    """Leaves the loss only on the tokens of highest entropy under π_θ (arXiv 2604.14084)."""

    def selected(scores: TokenScores, batch: Batch):
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

    def weighted(scores: TokenScores, batch: Batch):
        loss, diagnostics = objective(scores, batch)
        ratio = jnp.exp(jax.lax.stop_gradient(scores.logprobs) - batch["ref_logprobs"])
        return jnp.minimum(ratio, cap) * loss, diagnostics

    return weighted
