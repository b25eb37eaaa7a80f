"""Losses of the sampled token's log-probability: the method itself, its controls, and SFT."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from lopd.data.layout import MicroBatch
from lopd.models.token_scores import TokenScores

Loss = Callable[[TokenScores, MicroBatch], jax.Array]
"""(scores, batch) → per-token loss [B, T]."""
Objective = Callable[[TokenScores, MicroBatch], tuple[jax.Array, dict[str, jax.Array]]]
"""(scores, batch) → per-token loss [B, T], per-token diagnostics [B, T] to be averaged.

What it reads of a record beside tokens and mask, it takes from `batch.fields` by name.

A diagnostic NAME_squared beside NAME becomes the standard deviation NAME_sd in the metrics.
"""

SEQUENCE_LOG_RATIO = "sequence_log_ratio"
"""The diagnostic log π_θ − log π_ref, which is summed over each response and not averaged."""


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


def teacher_diagnostics(
    scores: TokenScores, batch: MicroBatch, difference: jax.Array, tau: float
) -> dict[str, jax.Array]:
    """Diagnostics that every objective of OPD reports, whatever it minimises.

    Args:
      difference: [B, T], how far the sampled token's log-probability is from its target, in nats;
        the advantage is this clipped at `tau`.
    """
    log_ratio = scores.logprobs - batch.fields["ref_logprobs"]
    advantage, weight = jnp.clip(difference, -tau, tau), jnp.exp(log_ratio)
    return {
        "advantage": advantage,
        "advantage_squared": jnp.square(advantage),
        "advantage_over_1_nat": jnp.abs(difference) > 1.0,
        "clipped": jnp.abs(difference) > tau,
        "kl_teacher": kl_k3(batch.fields["teacher_logprobs"] - scores.logprobs),
        "kl_ref": kl_k3(log_ratio),
        "entropy": scores.entropy,
        "logprob": scores.logprobs,
        "importance_weight": weight,
        "importance_weight_squared": jnp.square(weight),
        SEQUENCE_LOG_RATIO: log_ratio,
    }


def lightning_opd(
    tau: float, extrapolation: float = 1.0, towards: str = "teacher_logprobs"
) -> Objective:
    """Lightning OPD (arXiv 2604.13010, Algorithm 1) as Huber regression.

    The paper updates along A_t ∇log π_θ(a_t|s_t) with
    A_t = clip(log π_T(a_t|s_t) − log π_θ(a_t|s_t), −τ, τ). That is the negative gradient of
    huber_τ(log π_T − log π_θ), so the method has a true scalar loss and needs one forward pass.

    With λ ≠ 1 the advantage before the clip is A_t + (λ − 1)(log π_T − log π_ref): the target lies
    beyond the teacher, in the direction from π_ref to it (arXiv 2602.12125).

    Args:
      tau: advantage clip in nats.
      extrapolation: λ; 1 is the teacher itself.
      towards: the field of the batch that stands for log π_T: with Lightning OPD 2.0 the
        residualised one (`lopd.objectives.style_baseline`).
    """

    def objective(scores: TokenScores, batch: MicroBatch):
        teacher = batch.fields[towards]
        target = teacher + (extrapolation - 1.0) * (teacher - batch.fields["ref_logprobs"])
        difference = target - scores.logprobs
        return huber(difference, tau), teacher_diagnostics(scores, batch, difference, tau)

    return objective


def with_teacher_diagnostics(loss: Loss, tau: float) -> Objective:
    """A loss with the diagnostics of Lightning OPD, so that runs can be compared."""

    def objective(scores: TokenScores, batch: MicroBatch):
        difference = batch.fields["teacher_logprobs"] - scores.logprobs
        return loss(scores, batch), teacher_diagnostics(scores, batch, difference, tau)

    return objective


def fixed_advantage(advantage: float) -> Loss:
    """−a · log π_θ(a_t|s_t) with one constant a < 0 for the teacher's A_t (arXiv 2608.31046).

    A control that knows nothing of the teacher: what it gains, pushing down whatever was sampled
    gains. It has no minimum, so it is for few steps.
    """
    return lambda scores, batch: -advantage * scores.logprobs


def rollout_cross_entropy(scores: TokenScores, batch: MicroBatch) -> jax.Array:
    """−log π_θ(a_t|s_t): off-policy SFT on the rollouts themselves, a control."""
    del batch
    return -scores.logprobs


def cross_entropy(label_smoothing: float = 0.0) -> Objective:
    """Token cross-entropy, for SFT; with smoothing ε towards the uniform distribution.

    (1 − ε) · (−log π(a)) + ε · (−mean_v log π(v)) (arXiv 1512.00567, section 7).
    """

    def objective(scores: TokenScores, batch: MicroBatch):
        del batch
        loss = -(1 - label_smoothing) * scores.logprobs - label_smoothing * scores.mean_logprob
        return loss, {"logprob": scores.logprobs, "entropy": scores.entropy}

    return objective
