"""Token log-probabilities against float64 and against a model whose answers are known."""

import contextlib
import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers.models import TIED, bigram_model, random_records

from lopd.config import training_recipe
from lopd.machine import devices
from lopd.machine.sharding import on_mesh
from lopd.models import token_scores
from lopd.objectives.sampled import lightning_opd
from lopd.plan import programs
from lopd.rollouts.scoring import score_responses


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


def other_ids(targets, vocab, k=5):
    """k distinct ids at each position; one of them is now and then the target."""
    rng = np.random.default_rng(2)
    return rng.permuted(np.broadcast_to(np.arange(vocab), (*targets.shape, vocab)), axis=-1)[
        ..., :k
    ].astype(np.int32)


def set_chunk(monkeypatch, tokens, vocab=23):
    """Lets so many tokens over all rows share a chunk."""
    monkeypatch.setattr(token_scores, "CHUNK_BYTES", 4 * vocab * tokens)


@pytest.mark.parametrize("chunk_tokens", [1, 6, 2048])
def test_scores_equal_float64(monkeypatch, chunk_tokens):
    set_chunk(monkeypatch, chunk_tokens)
    hidden, head, targets = problem()
    ids = other_ids(targets, 23)
    scores = token_scores.token_scores(*map(jnp.asarray, (hidden, head, targets)), at_ids_BTK=ids)
    logprobs, lse, entropy, mean = float64_scores(hidden, head, targets)
    for i in range(ids.shape[-1]):
        expected = float64_scores(hidden, head, ids[..., i])[0]
        np.testing.assert_allclose(scores.logprobs_at[..., i], expected, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(scores.logprobs, logprobs, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(scores.logsumexp, lse, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(scores.entropy, entropy, atol=1e-5, rtol=1e-4)
    np.testing.assert_allclose(scores.mean_logprob, mean, atol=1e-5, rtol=1e-5)


def check_gradients_equal_float64(mesh=None, at_ids=True, **shape):
    """The hand-written backward pass against PyTorch's autodiff in float64."""
    hidden, head, targets = problem(**shape)
    weights = np.random.default_rng(1).normal(size=(3, *targets.shape))
    ids = other_ids(targets, len(head)) if at_ids else None
    at_weights = np.random.default_rng(4).normal(size=(*targets.shape, 5))

    def ours(hidden, head):
        with on_mesh(mesh) if mesh else contextlib.nullcontext():
            s = token_scores.token_scores(hidden, head, jnp.asarray(targets), at_ids_BTK=ids)
        parts = list(zip(weights, (s.logprobs, s.logsumexp, s.mean_logprob), strict=True))
        parts += [(at_weights, s.logprobs_at)] if at_ids else []
        return sum(jnp.sum(jnp.asarray(w, jnp.float32) * x) for w, x in parts)

    h = torch.tensor(hidden, dtype=torch.float64, requires_grad=True)
    w = torch.tensor(head, dtype=torch.float64, requires_grad=True)
    logits = h @ w.T
    lse = logits.logsumexp(-1)
    logp = torch.log_softmax(logits, -1)
    picked = logp.gather(-1, torch.tensor(targets)[..., None])[..., 0]
    parts = list(zip(weights, (picked, lse, logp.mean(-1)), strict=True))
    parts += [(at_weights, logp.gather(-1, torch.tensor(ids, dtype=torch.int64)))] if at_ids else []
    expected = sum((torch.tensor(c) * x).sum() for c, x in parts)
    expected.backward()
    place = lambda x: jax.device_put(x, devices.replicated(mesh)) if mesh else jnp.asarray(x)  # noqa: E731
    gradients = jax.jit(jax.value_and_grad(ours, argnums=(0, 1)))
    value, (d_hidden, d_head) = gradients(place(hidden), place(head))
    np.testing.assert_allclose(value, expected.item(), rtol=1e-5)
    np.testing.assert_allclose(d_hidden, h.grad.numpy(), atol=2e-5, rtol=1e-4)
    np.testing.assert_allclose(d_head, w.grad.numpy(), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("chunk_tokens", "at_ids"), [(6, True), (2048, False)])
def test_gradients_equal_float64_autodiff(monkeypatch, chunk_tokens, at_ids):
    set_chunk(monkeypatch, chunk_tokens)
    check_gradients_equal_float64(at_ids=at_ids)


def mesh_of(data, fsdp, tensor):
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    return devices.make_mesh(sizes, jax.devices()[: data * fsdp * tensor])


@pytest.mark.parametrize(
    ("mesh", "vocab"),
    [((1, 4, 1), 24), ((2, 2, 2), 24), ((2, 2, 1), 23), ((1, 2, 2), 22)],
    ids=["fsdp", "all", "indivisible", "partly divisible"],
)
def test_vocab_sharded_gradients_equal_float64_autodiff(monkeypatch, mesh, vocab):
    set_chunk(monkeypatch, tokens=4)
    check_gradients_equal_float64(mesh_of(*mesh), batch=8, length=6, vocab=vocab)


@pytest.mark.parametrize("mesh", [None, (2, 2, 2)], ids=["one device", "sharded"])
def test_top_k_equals_a_full_sort(monkeypatch, mesh):
    """Values, ids and order, from the same pass; the ids are those of the whole vocabulary."""
    set_chunk(monkeypatch, tokens=4)
    hidden, head, targets = problem(batch=8, length=6, vocab=24)
    mesh = mesh_of(*mesh) if mesh else mesh_of(1, 1, 1)

    @jax.jit
    def score(*args):
        with on_mesh(mesh):
            return token_scores.token_scores(*args, top_k=7)

    scores = score(*jax.device_put((hidden, head, targets), devices.replicated(mesh)))
    logits = hidden.astype(np.float64) @ head.T.astype(np.float64)
    ids = np.argsort(-logits, axis=-1)[..., :7]
    _, lse, entropy, _ = float64_scores(hidden, head, targets)
    logprobs = np.take_along_axis(logits, ids, -1) - lse[..., None]
    np.testing.assert_array_equal(scores.topk_ids, ids)
    np.testing.assert_allclose(scores.topk_logprobs, logprobs, atol=1e-5)
    np.testing.assert_allclose(scores.entropy, entropy, atol=1e-5)


def array_sizes(compiled) -> set[int]:
    """Elements of every array in a compiled module."""
    shapes = re.findall(r"\w\d+\[([\d,]+)\]", compiled.as_text())
    return {math.prod(int(d) for d in shape.split(",")) for shape in shapes}


@pytest.mark.parametrize("mesh", [(1, 1, 1), (1, 4, 1)], ids=["one device", "sharded"])
def test_compiled_step_has_no_array_of_rows_by_length_by_vocabulary(monkeypatch, mesh):
    """The whole OPD step: nothing in it is larger than a chunk, which is far from all logits of
    one device; and on a mesh no device holds the whole head."""
    rows, length, vocab = 4, 512, 30_000
    monkeypatch.setattr(token_scores, "CHUNK_BYTES", 4 * 128 * vocab)
    config = dataclasses.replace(
        TIED,
        vocab_size=vocab,
        num_hidden_layers=1,
        hidden_size=32,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    mesh = mesh_of(*mesh)
    lowered = programs.train_step(
        config,
        training_recipe(),
        lightning_opd(1.0),
        mesh,
        micro_batches=2,
        rows=rows,
        row_length=length,
    )
    sizes = array_sizes(lowered.compile())
    assert 128 * vocab // 2 <= max(sizes) <= 128 * vocab  # the chunk is there, and is the largest
    assert 128 * vocab < rows * length * vocab // mesh.size
    if mesh.size > 1:
        assert vocab * config.hidden_size not in sizes


@pytest.mark.parametrize("row_length", [16, 33, 64])
def test_off_by_one_would_show(one_device_mesh, row_length):
    """Ragged responses, packed: token t gets log p(x_t | x_{t−1}) of the known table."""
    config, params, table = bigram_model()
    lengths = [(1, 1), (3, 9), (9, 1), (2, 14), (5, 5), (1, 7), (4, 12)]
    records = random_records(config, lengths)
    scores = score_responses(
        config, params, records, mesh=one_device_mesh, row_length=row_length, rows_per_micro=2
    )
    for record, found in zip(records, scores, strict=True):
        sequence = np.concatenate([record["prompt_tokens"], record["response_tokens"]])
        first = len(record["prompt_tokens"])
        expected = table[sequence[first - 1 : -1], sequence[first:]]
        np.testing.assert_allclose(found, expected, atol=1e-5)
