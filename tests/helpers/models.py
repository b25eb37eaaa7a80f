"""Small models and records, and what Transformers says of an exported one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from lopd.machine import devices
from lopd.models import decoder
from lopd.models.token_scores import token_scores

TIED = decoder.DecoderConfig(
    vocab_size=37,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=16,
    initializer_range=0.2,
    max_position_embeddings=512,
)


def random_params(config: decoder.DecoderConfig, seed: int) -> decoder.Params:
    """Parameters whose norm scales are random too, so that a missed one shows."""
    params = decoder.init_params(config, jax.random.key(seed))
    rng = np.random.default_rng(seed)

    def perturb(path, x):
        if "norm" not in jax.tree_util.keystr(path):
            return x
        return jax.numpy.asarray(rng.uniform(0.5, 1.5, x.shape), x.dtype)

    return jax.tree_util.tree_map_with_path(perturb, params)


def random_records(config, lengths, seed=0, **fields) -> list[dict]:
    """Records with (prompt, response) lengths, random ids, and float fields drawn in [−2, 0]."""
    rng = np.random.default_rng(seed)
    records = []
    for prompt, response in lengths:
        record = {
            "prompt_tokens": rng.integers(3, config.vocab_size, prompt).astype(np.int32),
            "response_tokens": rng.integers(3, config.vocab_size, response).astype(np.int32),
        }
        for name in fields:
            record[name] = rng.uniform(-2, 0, response).astype(np.float32)
        records.append(record)
    return records


UNTIED = dataclasses.replace(
    TIED, tie_word_embeddings=False, num_attention_heads=4, num_key_value_heads=1, rope_theta=5e6
)


MOE = dataclasses.replace(
    TIED,
    vocab_size=40,  # divides over the meshes of test_moe.py
    tie_word_embeddings=False,
    num_experts=8,
    num_experts_per_tok=3,
    moe_intermediate_size=24,
    norm_topk_prob=True,
)


forward = jax.jit(decoder.forward, static_argnums=0, static_argnames="remat")


def inputs(config, batch, length, seed=0):
    tokens = np.random.default_rng(seed).integers(0, config.vocab_size, (batch, length))
    positions = np.broadcast_to(np.arange(length), (batch, length))
    return jnp.asarray(tokens, jnp.int32), jnp.asarray(positions), jnp.ones((batch, length), int)


def logprobs_of(logits, tokens):
    """log p of each next token under Transformers' logits [B, T, V], in float32: [B, T - 1]."""
    scores = torch.log_softmax(logits[:, :-1].float(), -1)
    return scores.gather(-1, torch.tensor(np.asarray(tokens))[:, 1:, None].long())[..., 0].numpy()


def our_logprobs(config, params, tokens, positions, segments):
    """Our hidden states [B, T, D], and the log-probabilities of the next tokens [B, T - 1]."""
    hidden, _ = forward(config, params, tokens, positions, segments)
    scores = token_scores(hidden[:, :-1], decoder.output_head(params), tokens[:, 1:])
    return hidden, np.asarray(scores.logprobs)


def transformers_model(path, dtype=torch.float32):
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype)


def bigram_model():
    """A Qwen3 whose next-token distribution is a known function of the current token alone."""
    config = dataclasses.replace(TIED, tie_word_embeddings=False)
    params = decoder.init_params(config, jax.random.key(3))
    layers = params["layers"]
    layers["attention"]["o"] = jnp.zeros_like(layers["attention"]["o"])
    layers["mlp"]["down"] = jnp.zeros_like(layers["mlp"]["down"])
    embed = np.asarray(params["embed"], np.float64)
    normed = embed / np.sqrt((embed**2).mean(-1, keepdims=True) + config.rms_norm_eps)
    logits = normed @ np.asarray(params["lm_head"], np.float64).T
    table = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return config, params, table


def mesh_of(data, fsdp, tensor):
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    return devices.make_mesh(sizes, jax.devices()[: data * fsdp * tensor])


def assert_same(tree, other):
    def same(a, b):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))

    jax.tree.map(same, tree, other)
