"""Divergences between student and teacher on the teacher's K most likely tokens and a tail bucket.

Both distributions are seen as K + 1 outcomes: the teacher's top-K tokens, and all others together.
On these each divergence is a true one: never negative, zero in value and gradient where student
and teacher agree, and with K = V that of the whole vocabulary. (A sum over the top-K alone is not:
the student's probabilities then sum to less than 1, and the gradient of Σ p log p/q keeps a term
Σ ∇p that should have vanished.)
"""

import jax
import jax.numpy as jnp

from lopd.data.layout import MicroBatch
from lopd.models.token_scores import TokenScores
from lopd.objectives.sampled import Loss

EMPTY_TAIL = 1e-6
"""A tail of less probability counts as this much and has no gradient: float32 cannot tell it from
the rounding of a sum that is 1. So a student that is surer than this of the top-K is not drawn back
by a teacher that is not, as it would be by the divergence over the whole vocabulary."""


def with_tail(logprobs: jax.Array) -> jax.Array:
    """[..., K] log-probabilities of distinct tokens with the tail's log(1 − Σ p), [..., K + 1]."""
    total = jax.nn.logsumexp(logprobs, axis=-1, keepdims=True)
    tail = jnp.log(-jnp.expm1(jnp.minimum(total, -EMPTY_TAIL)))
    return jnp.concatenate([logprobs, tail], axis=-1)


def _kl(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def forward_kl(teacher: jax.Array, student: jax.Array) -> jax.Array:
    """KL(π_T‖π_θ) = Σ π_T (log π_T − log π_θ), of log-probabilities [..., outcomes].

    The usual loss of distillation (arXiv 1503.02531), and the one that stale rollouts harm least
    (arXiv 2606.24143): no term weighs by the student.
    """
    return _kl(teacher, student)


def reverse_kl(teacher: jax.Array, student: jax.Array) -> jax.Array:
    """KL(π_θ‖π_T) = Σ π_θ (log π_θ − log π_T), of log-probabilities [..., outcomes].

    What the sampled-token update of OPD estimates (arXiv 2306.08543, equation 1).
    """
    return _kl(student, teacher)


def jensen_shannon(teacher: jax.Array, student: jax.Array) -> jax.Array:
    """½ KL(π_T‖m) + ½ KL(π_θ‖m) with m = ½(π_T + π_θ), of log-probabilities [..., outcomes].

    The generalised divergence of arXiv 2306.13649, section 2, at β = ½; at most log 2.
    """
    middle = jnp.logaddexp(teacher, student) - jnp.log(2.0)
    return 0.5 * (_kl(teacher, middle) + _kl(student, middle))


DIVERGENCES = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jensen_shannon": jensen_shannon,
}
"""By their name in `opd.objective`."""


def top_k_divergence(name: str) -> Loss:
    """A divergence at every response token, whatever token was sampled there.

    The batch carries `teacher_topk_ids` and `teacher_topk_logprobs` [B, T, K], the scores the
    student's `logprobs_at` these ids.
    """

    def loss(scores: TokenScores, batch: MicroBatch) -> jax.Array:
        teacher = with_tail(batch.fields["teacher_topk_logprobs"])
        return DIVERGENCES[name](teacher, with_tail(scores.logprobs_at))

    return loss
