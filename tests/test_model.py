"""The model against Hugging Face Transformers, and its own invariants."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from conftest import TIED, random_params

from lopd.errors import UserError
from lopd.models import hf, qwen3
from lopd.models.kv_cache import empty_cache

UNTIED = dataclasses.replace(
    TIED, tie_word_embeddings=False, num_attention_heads=4, num_key_value_heads=4, rope_theta=5e6
)


def inputs(config, batch, length, seed=0):
    tokens = np.random.default_rng(seed).integers(0, config.vocab_size, (batch, length))
    positions = np.broadcast_to(np.arange(length), (batch, length))
    return jnp.asarray(tokens, jnp.int32), jnp.asarray(positions), jnp.ones((batch, length), int)


@pytest.mark.parametrize("config", [TIED, UNTIED], ids=["tied", "untied"])
def test_equals_transformers(config, tmp_path):
    """The exported checkpoint, loaded by Transformers, gives the same states and logits."""
    params = random_params(config, seed=1)
    hf.save_checkpoint(tmp_path, config, params, end_id=1)
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokens, positions, segments = inputs(config, 3, 40)
    hidden, _ = qwen3.forward(config, params, tokens, positions, segments)
    logits = hidden @ qwen3.output_head(params).T
    with torch.no_grad():
        out = reference(torch.tensor(np.asarray(tokens)), output_hidden_states=True)
    for ours, theirs in ((hidden, out.hidden_states[-1]), (logits, out.logits)):
        theirs = theirs.numpy()
        assert np.abs(np.asarray(ours) - theirs).max() <= 1e-5 * np.abs(theirs).max()


def test_rejects_heads_that_do_not_group():
    with pytest.raises(UserError, match="num_attention_heads=5 is not a multiple"):
        dataclasses.replace(TIED, num_attention_heads=5)


def test_no_token_sees_a_later_one(config, params):
    """Causality by gradients: d hidden[t] / d embedding input[s] is zero for s > t, else not."""
    tokens, positions, segments = inputs(config, 1, 9)

    def at(embed_offset, t):
        # Adding to the embedding rows of distinct tokens is adding to distinct positions.
        moved = {**params, "embed": params["embed"] + embed_offset}
        hidden, _ = qwen3.forward(config, moved, distinct, positions, segments)
        return hidden[0, t].sum()

    distinct = jnp.arange(9, dtype=jnp.int32)[None]
    del tokens
    for t in (0, 3, 7):
        gradient = jax.grad(at)(jnp.zeros_like(params["embed"]), t)
        reach = np.abs(np.asarray(gradient[:9])).max(axis=1)
        assert (reach[t + 1 :] == 0).all()
        assert (reach[: t + 1] > 0).all()


def test_decoding_with_a_cache_equals_the_plain_forward(config, params):
    """A ragged prefill followed by single steps, with garbage beyond each row's length."""
    batch, length, prefill = 3, 12, np.array([5, 1, 8])
    tokens, positions, segments = inputs(config, batch, length)
    expected, _ = qwen3.forward(config, params, tokens, positions, segments)
    decode_params = qwen3.inference_params(config, params)
    cache = jax.tree.map(lambda x: x + 1e3, empty_cache(config, batch, length + 3))
    width = int(prefill.max())
    prefill_segments = (np.arange(width) < prefill[:, None]).astype(np.int32)
    hidden, cache = qwen3.forward(
        config, decode_params, tokens[:, :width], positions[:, :width], prefill_segments, cache
    )
    for row, n in enumerate(prefill):
        np.testing.assert_allclose(hidden[row, :n], expected[row, :n], atol=2e-5)
    at = prefill.copy()
    rows = np.arange(batch)
    while (at < length).any():
        live = at < length
        column = np.minimum(at, length - 1)
        hidden, cache = qwen3.forward(
            config,
            decode_params,
            tokens[rows, column][:, None],
            jnp.asarray(column)[:, None],
            live.astype(np.int32)[:, None],
            cache,
        )
        for row in rows[live]:
            np.testing.assert_allclose(hidden[row, 0], expected[row, at[row]], atol=2e-5)
        at += live


def test_packed_equals_alone(config, params):
    lengths = (7, 11, 4)
    tokens, _, _ = inputs(config, 1, sum(lengths) + 2)
    positions = np.concatenate([np.arange(n) for n in (*lengths, 2)])[None]
    segments = np.repeat([1, 2, 3, 0], [*lengths, 2])[None]
    packed, _ = qwen3.forward(config, params, tokens, positions, segments)
    start = 0
    for n in lengths:
        window = slice(start, start + n)
        alone, _ = qwen3.forward(
            config, params, tokens[:, window], np.arange(n)[None], np.ones((1, n), int)
        )
        np.testing.assert_allclose(packed[:, window], alone, atol=2e-5)
        start += n
    assert np.isfinite(packed).all()


def test_rematerialisation_changes_nothing(config, params):
    batch = inputs(config, 2, 8)

    def loss(params, remat):
        return jnp.square(qwen3.forward(config, params, *batch, remat=remat)[0]).sum()

    plain, recomputed = (jax.grad(loss)(params, remat) for remat in (False, True))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), plain, recomputed
    )


def test_bfloat16_stays_near_float32(config, params):
    batch = inputs(config, 2, 16)
    exact, _ = qwen3.forward(config, params, *batch)
    half, _ = qwen3.forward(dataclasses.replace(config, dtype="bfloat16"), params, *batch)
    assert half.dtype == jnp.bfloat16
    assert np.abs(np.asarray(half, np.float32) - np.asarray(exact)).mean() < 0.02
