"""What the paper proves of training on a fixed cache (arXiv 2604.13010, theorems on the gradient's
gap), on a policy so small that every expectation is a sum over all responses."""

import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lopd.models.token_scores import TokenScores
from lopd.objectives.sampled import lightning_opd
from lopd.training.drift import ess_fraction

V, T = 3, 3
RESPONSES = np.array(list(itertools.product(range(V), repeat=T)))
# The state before each token: all tokens before it, numbered in base V behind their count.
STATES = np.array(
    [[sum(V**k for k in range(t)) + int(x[:t] @ V ** np.arange(t)) for t in range(T)]
     for x in RESPONSES]
)  # fmt: skip


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def logprobs(logits):
    """log π(a_t | s_t) of every response, [V^T, T], from logits [states, V]."""
    return jax.nn.log_softmax(logits)[STATES, RESPONSES]


def random_logits(seed, scale=1.0):
    states = sum(V**k for k in range(T))
    return jnp.asarray(np.random.default_rng(seed).normal(0, scale, (states, V)))


def descent(logits, teacher, ref, tau):
    """f(x) = Σ_t A_t ∇ log π_θ(a_t | s_t) of every response [V^T, parameters], by our objective."""
    objective = lightning_opd(tau)

    def loss(logits):
        fields = {"teacher_logprobs": logprobs(teacher), "ref_logprobs": logprobs(ref)}
        batch = types.SimpleNamespace(fields=fields)  # all that the objective reads
        nothing = jnp.zeros(STATES.shape)
        scores = TokenScores(logprobs(logits), nothing, nothing, nothing)
        return objective(scores, batch)[0].sum(axis=1)

    return -np.asarray(jax.jacobian(loss)(logits)).reshape(len(RESPONSES), -1)


def setting(drift, seed=0):
    teacher, ref = random_logits(seed), random_logits(seed + 1)
    student = ref + drift * random_logits(seed + 2)
    p_ref, p = (np.exp(np.asarray(logprobs(x)).sum(axis=1)) for x in (ref, student))
    return teacher, ref, student, p_ref, p


@pytest.mark.parametrize("tau", [0.5, 10.0])
def test_offline_and_online_gradients_are_the_same_at_the_start(tau):
    teacher, ref, student, p_ref, p = setting(drift=0.0)
    f = descent(student, teacher, ref, tau)
    np.testing.assert_allclose(p_ref @ f, p @ f, atol=1e-14)


@pytest.mark.parametrize("drift", [0.05, 0.3, 1.0, 3.0])
@pytest.mark.parametrize("tau", [0.5, 10.0])
@pytest.mark.parametrize("seed", [0, 10, 20])
def test_the_gradients_gap_is_a_covariance_and_is_bounded_by_chi2(drift, tau, seed):
    teacher, ref, student, p_ref, p = setting(drift, seed)
    f = descent(student, teacher, ref, tau)
    weights = p / p_ref
    gap = p @ f - p_ref @ f
    covariance = p_ref @ ((weights - 1)[:, None] * (f - p_ref @ f))
    np.testing.assert_allclose(gap, covariance, atol=1e-12)
    chi2 = p_ref @ (weights - 1) ** 2
    spread = np.sqrt(p_ref @ np.square(f - p_ref @ f).sum(axis=1))
    assert 0 < np.linalg.norm(gap) <= spread * np.sqrt(chi2)


def test_weights_of_fresh_samples_average_to_one_and_their_ess_gives_chi2():
    _, _, _, p_ref, p = setting(drift=0.5)
    drawn = np.random.default_rng(0).choice(len(RESPONSES), 200_000, p=p_ref / p_ref.sum())
    log_weights = np.log(p / p_ref)[drawn]
    chi2 = p_ref @ (p / p_ref - 1) ** 2
    standard_error = np.sqrt(chi2 / len(drawn))
    assert abs(np.exp(log_weights).mean() - 1) < 4 * standard_error
    np.testing.assert_allclose(ess_fraction(log_weights), 1 / (1 + chi2), rtol=0.02)


def test_samples_at_another_temperature_do_not_average_to_one():
    """Why the held-out responses are drawn at T = 1."""
    _, ref, _, p_ref, p = setting(drift=0.5)
    cold = np.exp(np.asarray(logprobs(ref / 0.5)).sum(axis=1))
    assert abs(cold @ (p / p_ref) - 1) > 0.01
