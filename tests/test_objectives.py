"""The objective: the identity it rests on, and its independence of how a batch is laid out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_records

from lopd.data.batches import micro_batches
from lopd.objectives import cross_entropy, huber, lightning_opd, token_weights
from lopd.scoring import score_logits
from lopd.training.step import batch_gradients

LENGTHS = [(3, 9), (1, 4), (6, 20), (2, 1), (5, 13), (4, 8), (2, 30), (3, 3)]
FIELDS = ("teacher_logprobs", "ref_logprobs")


def scores_of(logits, targets):
    return score_logits(jnp.asarray(logits), jnp.asarray(targets))


@pytest.mark.parametrize("tau", [0.3, 1.0, 10.0])
def test_huber_gradient_is_the_clipped_policy_gradient(tau):
    """∇ huber_τ(log π_T − log π_θ) = −A ∇log π_θ, A = stop_grad(clip(·, −τ, τ)), to 1e-6."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(5, 7, 11)).astype(np.float32) * 2
    targets = rng.integers(0, 11, (5, 7))
    teacher = rng.uniform(-20, 0, (5, 7)).astype(np.float32)
    batch = {"teacher_logprobs": jnp.asarray(teacher), "ref_logprobs": jnp.zeros((5, 7))}

    def loss(logits):
        return lightning_opd(tau)(scores_of(logits, targets), batch)[0].sum()

    def policy_gradient(logits):
        logprobs = scores_of(logits, targets).logprobs
        advantage = jax.lax.stop_gradient(jnp.clip(teacher - logprobs, -tau, tau))
        return -(advantage * logprobs).sum()

    ours, theirs = jax.grad(loss)(logits), jax.grad(policy_gradient)(logits)
    assert (np.abs(teacher - scores_of(logits, targets).logprobs) > tau).any()  # clip is active
    np.testing.assert_allclose(ours, theirs, atol=1e-6, rtol=1e-6)
    # And against float64 NumPy, from the formula of the softmax's gradient.
    z = logits.astype(np.float64)
    probabilities = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    chosen = np.eye(11)[targets]
    logprobs = np.log((probabilities * chosen).sum(-1))
    advantage = np.clip(teacher - logprobs, -tau, tau)
    expected = -advantage[..., None] * (chosen - probabilities)
    np.testing.assert_allclose(ours, expected, atol=2e-6, rtol=1e-5)


def test_huber_values():
    np.testing.assert_allclose(huber(jnp.array([-3.0, -0.5, 0, 2]), 1.0), [2.5, 0.125, 0, 1.5])


def test_label_smoothing_is_the_mixture_cross_entropy():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(4, 9)).astype(np.float32)
    targets = rng.integers(0, 9, 4)
    loss, _ = cross_entropy(0.1)(scores_of(logits, targets), {})
    z = logits.astype(np.float64)
    logp = z - np.log(np.exp(z).sum(-1, keepdims=True))
    mixture = 0.9 * np.eye(9)[targets] + 0.1 / 9
    np.testing.assert_allclose(loss, -(mixture * logp).sum(-1), rtol=1e-5)


def test_token_weights():
    lengths = [2, 6]
    np.testing.assert_allclose(token_weights(lengths, "sample_mean"), [1 / 4, 1 / 12])
    np.testing.assert_allclose(token_weights(lengths, "token_mean"), [1 / 8, 1 / 8])
    np.testing.assert_allclose(token_weights(lengths, "token_sum"), [1 / 2, 1 / 2])


def gradients(config, params, records, **layout):
    batch = micro_batches(records, token_fields=FIELDS, **layout)
    step = jax.jit(lambda params, batch: batch_gradients(config, lightning_opd(1.0), params, batch))
    return step(params, batch)


@pytest.mark.parametrize("reduction", ["sample_mean", "token_mean", "token_sum"])
def test_loss_does_not_depend_on_packing_or_micro_batches(config, params, reduction):
    records = random_records(config, LENGTHS, **dict.fromkeys(FIELDS))
    alone = dict(row_length=40, rows_per_micro=1)  # long rows of one or two
    layouts = [dict(row_length=128, rows_per_micro=1), dict(row_length=64, rows_per_micro=4),
               dict(row_length=40, rows_per_micro=8)]  # fmt: skip
    grads, metrics = gradients(config, params, records, reduction=reduction, **alone)
    assert metrics["tokens"] == sum(r for _, r in LENGTHS)
    for layout in layouts:
        other_grads, other = gradients(config, params, records, reduction=reduction, **layout)
        for name in metrics:
            np.testing.assert_allclose(metrics[name], other[name], rtol=2e-5, atol=1e-6)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5), grads, other_grads
        )


def test_loss_equals_float64_by_hand(config, params, one_device_mesh):
    """The reduced loss of a packed batch, from unpacked log-probabilities in NumPy."""
    from lopd.scoring import score_responses

    records = random_records(config, LENGTHS, **dict.fromkeys(FIELDS))
    _, metrics = gradients(
        config, params, records, reduction="sample_mean", row_length=64, rows_per_micro=2
    )
    logprobs = score_responses(
        config, params, records, mesh=one_device_mesh, row_length=64, rows_per_micro=1
    )
    losses = []
    for record, student in zip(records, logprobs, strict=True):
        d = record["teacher_logprobs"].astype(np.float64) - student
        a = np.abs(d)
        losses.append(np.where(a <= 1, d**2 / 2, a - 0.5).mean())
    np.testing.assert_allclose(metrics["loss"], np.mean(losses), rtol=1e-5)
