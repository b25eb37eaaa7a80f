"""Objectives as pure functions of log-probabilities: per-token losses, weights and diagnostics.

A loss here is per token and unweighted. The reduction lives in the token weights, which are made
from whole responses before packing: the total Σ weight · loss is then independent of packing,
micro-batching and sharding.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lopd.scoring import TokenScores

Batch = dict[str, jax.Array]
Objective = Callable[[TokenScores, Batch], tuple[jax.Array, dict[str, jax.Array]]]
"""(scores, batch) → per-token loss [B, T], per-token diagnostics [B, T] to be averaged.

A diagnostic NAME_squared beside NAME becomes the standard deviation NAME_sd in the metrics.
"""

SEQUENCE_LOG_RATIO = "sequence_log_ratio"
"""The diagnostic log π_θ − log π_ref, which is summed over each response and not averaged."""

REDUCTIONS = ("sample_mean", "token_mean", "token_sum")


def huber(difference: jax.Array, tau: float) -> jax.Array:
    """½d² for |d| ≤ τ, τ(|d| − ½τ) beyond."""
    magnitude = jnp.abs(difference)
    return jnp.where(magnitude <= tau, 0.5 * jnp.square(difference), tau * (magnitude - 0.5 * tau))


def kl_k3(log_ratio: jax.Array) -> jax.Array:
    """Schulman's estimator k3 of KL(q‖p) = E_q[r − 1 − log r] from log r = log p(a) − log q(a).

    Unbiased for a drawn from q, and never negative. On the cache a is drawn from π_ref: `kl_ref`
    (p = π_θ, q = π_ref) is then unbiased for KL(π_ref‖π_θ) when the cache was sampled at T = 1,
    and `kl_teacher` (p = π_T, q = π_θ) estimates KL(π_θ‖π_T) as well as π_θ still resembles π_ref.
    """
    return jnp.expm1(log_ratio) - log_ratio


def lightning_opd(tau: float) -> Objective:
    """Lightning OPD (arXiv 2604.13010, Algorithm 1) as Huber regression.

    The paper updates along A_t ∇log π_θ(a_t|s_t) with
    A_t = clip(log π_T(a_t|s_t) − log π_θ(a_t|s_t), −τ, τ). That is the negative gradient of
    huber_τ(log π_T − log π_θ), so the method has a true scalar loss and needs one forward pass.

    Args:
      tau: advantage clip in nats.
    """

    def objective(scores: TokenScores, batch: Batch):
        difference = batch["teacher_logprobs"] - scores.logprobs
        log_ratio = scores.logprobs - batch["ref_logprobs"]
        advantage, weight = jnp.clip(difference, -tau, tau), jnp.exp(log_ratio)
        diagnostics = {
            "advantage": advantage,
            "advantage_squared": jnp.square(advantage),
            "advantage_over_1_nat": jnp.abs(difference) > 1.0,
            "clipped": jnp.abs(difference) > tau,
            "kl_teacher": kl_k3(difference),
            "kl_ref": kl_k3(log_ratio),
            "entropy": scores.entropy,
            "logprob": scores.logprobs,
            "importance_weight": weight,
            "importance_weight_squared": jnp.square(weight),
            SEQUENCE_LOG_RATIO: log_ratio,
        }
        return huber(difference, tau), diagnostics

    return objective


def cross_entropy(label_smoothing: float = 0.0) -> Objective:
    """Token cross-entropy, for SFT; with smoothing ε towards the uniform distribution.

    (1 − ε) · (−log π(a)) + ε · (−mean_v log π(v)) (arXiv 1512.00567, section 7).
    """

    def objective(scores: TokenScores, batch: Batch):
        del batch
        loss = -(1 - label_smoothing) * scores.logprobs - label_smoothing * scores.mean_logprob
        return loss, {"logprob": scores.logprobs, "entropy": scores.entropy}

    return objective


def token_weights(response_lengths: Sequence[int], reduction: str) -> np.ndarray:
    """The weight that each token of each response of one global batch carries, float32 [N].

    `sample_mean` (the released code's): mean over a response's tokens, then over responses.
    `token_mean`: mean over all tokens. `token_sum` (the paper's): sum over tokens, mean over
    responses.
    """
    lengths = np.asarray(response_lengths, np.float64)
    weights = {
        "sample_mean": 1 / (len(lengths) * lengths),
        "token_mean": np.full(len(lengths), 1 / lengths.sum()),
        "token_sum": np.full(len(lengths), 1 / len(lengths)),
    }[reduction]
    return weights.astype(np.float32)
