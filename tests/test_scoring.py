"""Token log-probabilities against float64 and against a model whose answers are known."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import TIED, random_records

from lopd import scoring
from lopd.models import qwen3


def float64_scores(hidden, head, targets):
    """Log-prob, log-sum-exp, entropy and mean log-prob in float64 NumPy."""
    logits = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64).T
    shift = logits.max(-1, keepdims=True)
    lse = shift[..., 0] + np.log(np.exp(logits - shift).sum(-1))
    logp = logits - lse[..., None]
    picked = np.take_along_axis(logp, np.asarray(targets)[..., None], -1)[..., 0]
    return picked, lse, -(np.exp(logp) * logp).sum(-1), logp.mean(-1)


def problem(batch=3, length=10, width=8, vocab=23, seed=0):
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(batch, length, width)).astype(np.float32)
    head = rng.normal(size=(vocab, width)).astype(np.float32) * 3
    return hidden, head, rng.integers(0, vocab, (batch, length))


@pytest.mark.parametrize("chunk_tokens", [1, 6, 2048])
def test_scores_equal_float64(monkeypatch, chunk_tokens):
    monkeypatch.setattr(scoring, "CHUNK_TOKENS", chunk_tokens)
    hidden, head, targets = problem()
    scores = scoring.token_scores(*map(jnp.asarray, (hidden, head, targets)))
    logprobs, lse, entropy, mean = float64_scores(hidden, head, targets)
    np.testing.assert_allclose(scores.logprobs, logprobs, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(scores.logsumexp, lse, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(scores.entropy, entropy, atol=1e-5, rtol=1e-4)
    np.testing.assert_allclose(scores.mean_logprob, mean, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("chunk_tokens", [6, 2048])
def test_gradients_equal_float64_autodiff(monkeypatch, chunk_tokens):
    """The hand-written backward pass against PyTorch's autodiff in float64."""
    monkeypatch.setattr(scoring, "CHUNK_TOKENS", chunk_tokens)
    hidden, head, targets = problem()
    weights = np.random.default_rng(1).normal(size=(3, *targets.shape))

    def ours(hidden, head):
        s = scoring.token_scores(hidden, head, jnp.asarray(targets))
        parts = (s.logprobs, s.logsumexp, s.mean_logprob)
        return sum(
            jnp.sum(jnp.asarray(w, jnp.float32) * x) for w, x in zip(weights, parts, strict=True)
        )

    h = torch.tensor(hidden, dtype=torch.float64, requires_grad=True)
    w = torch.tensor(head, dtype=torch.float64, requires_grad=True)
    logits = h @ w.T
    lse = logits.logsumexp(-1)
    logp = torch.log_softmax(logits, -1)
    picked = logp.gather(-1, torch.tensor(targets)[..., None])[..., 0]
    parts = (picked, lse, logp.mean(-1))
    sum((torch.tensor(c) * x).sum() for c, x in zip(weights, parts, strict=True)).backward()
    d_hidden, d_head = jax.grad(ours, argnums=(0, 1))(jnp.asarray(hidden), jnp.asarray(head))
    np.testing.assert_allclose(d_hidden, h.grad.numpy(), atol=2e-5, rtol=1e-4)
    np.testing.assert_allclose(d_head, w.grad.numpy(), atol=2e-5, rtol=1e-4)


def test_no_array_of_rows_by_length_by_vocabulary():
    """The compiled gradient holds logits of one chunk at most."""
    batch, length, vocab = 4, 1024, 3001
    hidden, head = jnp.zeros((batch, length, 8)), jnp.zeros((vocab, 8))
    targets = jnp.zeros((batch, length), jnp.int32)
    loss = jax.grad(lambda h, w: scoring.token_scores(h, w, targets).logprobs.sum(), argnums=(0, 1))
    text = jax.jit(loss).lower(hidden, head).compile().as_text()
    assert f"{batch},{scoring.CHUNK_TOKENS // batch},{vocab}" in text  # the chunk, in its shape
    assert f"{batch},{length},{vocab}" not in text
    assert f"{batch * length},{vocab}" not in text


def bigram_model():
    """A Qwen3 whose next-token distribution is a known function of the current token alone."""
    config = dataclasses.replace(TIED, tie_word_embeddings=False)
    params = qwen3.init_params(config, jax.random.key(3))
    layers = params["layers"]
    layers["attention"]["o"] = jnp.zeros_like(layers["attention"]["o"])
    layers["mlp"]["down"] = jnp.zeros_like(layers["mlp"]["down"])
    embed = np.asarray(params["embed"], np.float64)
    normed = embed / np.sqrt((embed**2).mean(-1, keepdims=True) + config.rms_norm_eps)
    logits = normed @ np.asarray(params["lm_head"], np.float64).T
    table = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return config, params, table


@pytest.mark.parametrize("row_length", [16, 33, 64])
def test_off_by_one_would_show(one_device_mesh, row_length):
    """Ragged responses, packed: token t gets log p(x_t | x_{t−1}) of the known table."""
    config, params, table = bigram_model()
    lengths = [(1, 1), (3, 9), (9, 1), (2, 14), (5, 5), (1, 7), (4, 12)]
    records = random_records(config, lengths)
    scores = scoring.score_responses(
        config, params, records, mesh=one_device_mesh, row_length=row_length, rows_per_micro=2
    )
    for record, found in zip(records, scores, strict=True):
        sequence = np.concatenate([record["prompt_tokens"], record["response_tokens"]])
        first = len(record["prompt_tokens"])
        expected = table[sequence[first - 1 : -1], sequence[first:]]
        np.testing.assert_allclose(found, expected, atol=1e-5)
