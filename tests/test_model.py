"""The model, dense and mixture of experts, against Transformers, and its own invariants."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from helpers.models import (
    MOE,
    TIED,
    UNTIED,
    forward,
    inputs,
    logprobs_of,
    our_logprobs,
    random_params,
    transformers_model,
)

from lopd.checkpoints import hugging_face
from lopd.errors import UserError
from lopd.machine import devices
from lopd.models import decoder, inference, memory
from lopd.models.kv_cache import empty_cache
from lopd.models.shardings import abstract_params_on
from lopd.sampling.engine import Request, Sampling, generate

CONFIGS = {"tied": TIED, "untied": UNTIED, "moe": MOE}


@pytest.fixture(scope="session", params=CONFIGS)
def twin(request, tmp_path_factory):
    """A random model, and the folder that Transformers reads it from.

    Its weights are bfloat16 numbers, so that float32 and bfloat16 runs share them exactly.
    """
    config = CONFIGS[request.param]
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), random_params(config, seed=1))
    params = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    path = tmp_path_factory.mktemp(request.param)
    hugging_face.save_checkpoint(path, config, params, end_id=1)
    return types.SimpleNamespace(config=config, params=params, path=path)


def test_equals_transformers(twin):
    """The exported checkpoint, loaded by Transformers, gives the same states and logits."""
    tokens, positions, segments = inputs(twin.config, 3, 40)
    hidden, logprobs = our_logprobs(twin.config, twin.params, tokens, positions, segments)
    logits = hidden @ decoder.output_head(twin.params).T
    with torch.no_grad():
        out = transformers_model(twin.path)(
            torch.tensor(np.asarray(tokens)), output_hidden_states=True
        )
    for ours, theirs in ((hidden, out.hidden_states[-1]), (logits, out.logits)):
        theirs = theirs.numpy()
        assert np.abs(np.asarray(ours) - theirs).max() <= 1e-5 * np.abs(theirs).max()
    np.testing.assert_allclose(logprobs, logprobs_of(out.logits, tokens), atol=1e-5)


def test_greedy_generation_equals_transformers(twin):
    """64 tokens after ragged prompts, two slots for three requests."""
    rng = np.random.default_rng(5)
    prompts = [rng.integers(0, twin.config.vocab_size, n).astype(np.int32) for n in (3, 11, 6)]
    responses = generate(
        twin.config,
        inference.inference_params(twin.config, twin.params),
        [Request(i, 0, prompt) for i, prompt in enumerate(prompts)],
        Sampling(temperature=0.0, max_response=64, seed=0, end_ids=(-1,)),
        slots=2,
        capacity=80,
        decode_steps=16,
    )
    found = {response.index: response.tokens for response in responses}
    reference = transformers_model(twin.path)
    settings = transformers.GenerationConfig(max_new_tokens=64, do_sample=False, pad_token_id=0)
    reference.generation_config = settings
    for i, prompt in enumerate(prompts):
        ids = torch.tensor(prompt)[None].long()
        expected = reference.generate(ids, attention_mask=torch.ones_like(ids))[0, len(prompt) :]
        assert len(expected) == 64
        np.testing.assert_array_equal(found[i], expected.numpy())


def test_bfloat16_is_no_worse_than_transformers(twin):
    """Mean |Δ log-prob| against Transformers' float32, for our bfloat16 and for theirs."""
    tokens, positions, segments = inputs(twin.config, 8, 65, seed=2)
    ids = torch.tensor(np.asarray(tokens))
    with torch.no_grad():
        exact = logprobs_of(transformers_model(twin.path)(ids).logits, tokens)
        half = logprobs_of(transformers_model(twin.path, torch.bfloat16)(ids).logits, tokens)
    config = dataclasses.replace(twin.config, dtype="bfloat16")
    hidden, ours = our_logprobs(config, twin.params, tokens, positions, segments)
    assert hidden.dtype == jnp.bfloat16
    assert 0 < np.abs(ours - exact).mean() <= np.abs(half - exact).mean()


@pytest.fixture(scope="module", params=["tied", "moe"])
def config(request):
    return CONFIGS[request.param]


@pytest.fixture(scope="module")
def params(config):
    return random_params(config, seed=0)


def test_rejects_heads_that_do_not_group():
    with pytest.raises(UserError, match="num_attention_heads=5 is not a multiple"):
        dataclasses.replace(TIED, num_attention_heads=5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(num_experts_per_tok=9), "num_experts_per_tok=9 must lie between 1 and num_experts=8"),
        (dict(moe_intermediate_size=0), "needs moe_intermediate_size"),
    ],
)
def test_rejects_experts_that_do_not_fit(changes, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(MOE, **changes)


def test_no_token_sees_a_later_one(config, params):
    """Causality by gradients: d hidden[t] / d embedding input[s] is zero for s > t, else not."""
    tokens, positions, segments = inputs(config, 1, 9)

    def at(embed_offset, t):
        # Adding to the embedding rows of distinct tokens is adding to distinct positions.
        moved = {**params, "embed": params["embed"] + embed_offset}
        hidden, _ = forward(config, moved, distinct, positions, segments)
        return hidden[0, t].sum()

    distinct = jnp.arange(9, dtype=jnp.int32)[None]
    del tokens
    gradient_at = jax.jit(jax.grad(at))
    for t in (0, 3, 7):
        gradient = gradient_at(jnp.zeros_like(params["embed"]), t)
        reach = np.abs(np.asarray(gradient[:9])).max(axis=1)
        assert (reach[t + 1 :] == 0).all()
        assert (reach[: t + 1] > 0).all()


@pytest.mark.parametrize(("length", "prefill"), [(12, [5, 1, 8]), (140, [130, 122, 133])])
def test_decoding_with_a_cache_equals_the_plain_forward(config, params, length, prefill):
    """A ragged prefill followed by single steps, with garbage beyond each row's length.

    In one chunk of the cache, and over the border of two.
    """
    batch, prefill = 3, np.array(prefill)
    tokens, positions, segments = inputs(config, batch, length)
    expected, _ = forward(config, params, tokens, positions, segments)
    decode_params = inference.inference_params(config, params)
    cache = jax.tree.map(lambda x: x + 1e3, empty_cache(config, batch, length + 3))
    width = int(prefill.max())
    prefill_segments = (np.arange(width) < prefill[:, None]).astype(np.int32)
    prefix = decoder.prefill(config, decode_params, tokens[:, :width], prefill_segments)
    cache = cache.insert(prefix, np.arange(batch))
    at = prefill.copy()
    rows = np.arange(batch)
    while (at < length).any():
        live = at < length
        column = np.minimum(at, length - 1)
        hidden, cache = forward(
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
    packed, _ = forward(config, params, tokens, positions, segments)
    start = 0
    for n in lengths:
        window = slice(start, start + n)
        alone, _ = forward(
            config, params, tokens[:, window], np.arange(n)[None], np.ones((1, n), int)
        )
        np.testing.assert_allclose(packed[:, window], alone, atol=2e-5)
        start += n
    assert np.isfinite(packed).all()


def test_bytes_per_device_are_what_a_device_holds():
    """By the shardings of shapes, and as the arrays' own parts on the first device say."""
    mesh = devices.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    shapes = abstract_params_on(MOE, mesh, "bfloat16")
    arrays = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding), shapes)
    held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(arrays))
    assert memory.bytes_per_device(shapes) == memory.bytes_per_device(arrays) == held
    whole = memory.tree_bytes(decoder.abstract_params(MOE))
    assert whole == 4 * memory.model_size(MOE).total
    assert memory.bytes_per_device(decoder.abstract_params(MOE)) == whole > 4 * held
