"""The mixture of experts: its router loss, its padding, and its sharding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers.models import MOE, inputs, logprobs_of, random_params, transformers_model
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from lopd.checkpoints import hugging_face
from lopd.data.batches import micro_batches
from lopd.data.layout import Layout
from lopd.machine import devices
from lopd.models import decoder, moe
from lopd.models.shardings import check_divisible, param_shardings
from lopd.models.token_scores import token_scores
from lopd.objectives.sampled import cross_entropy
from lopd.training.step import batch_gradients

forward_with_router_loss = jax.jit(
    decoder.forward_with_router_loss, static_argnums=0, static_argnames="remat"
)


@pytest.fixture(scope="session")
def params():
    return random_params(MOE, seed=3)


@pytest.fixture(scope="session")
def reference(params, tmp_path_factory):
    """The same model in Transformers."""
    path = tmp_path_factory.mktemp("moe_reference")
    hugging_face.save_checkpoint(path, MOE, params, end_id=1)
    return transformers_model(path)


def padded_batch(batch=4, length=24):
    """Right-padded rows, each one sequence."""
    tokens, positions, _ = inputs(MOE, batch, length, seed=4)
    lengths = np.linspace(5, length, batch).astype(int)
    return tokens, positions, (np.arange(length) < lengths[:, None]).astype(np.int32)


def test_padded_rows_and_router_loss_equal_transformers(params, reference):
    tokens, positions, segments = padded_batch()
    hidden, loss = forward_with_router_loss(MOE, params, tokens, positions, segments)
    mask = torch.tensor(segments).long()
    with torch.no_grad():
        out = reference(
            torch.tensor(np.asarray(tokens)), attention_mask=mask, output_router_logits=True
        )
    expected = load_balancing_loss_func(
        out.router_logits, MOE.num_experts, MOE.num_experts_per_tok, mask
    )
    np.testing.assert_allclose(loss, expected.item(), rtol=1e-5)
    scores = token_scores(hidden[:, :-1], params["lm_head"], tokens[:, 1:])
    real = segments[:, 1:] > 0
    np.testing.assert_allclose(
        np.asarray(scores.logprobs)[real], logprobs_of(out.logits, tokens)[real], atol=1e-5
    )


def test_gradients_equal_transformers(params, reference):
    """Cross-entropy plus router loss, through routing, experts and the router itself."""
    tokens, positions, segments = inputs(MOE, 2, 20, seed=6)

    @jax.jit
    @jax.grad
    def gradient(params):
        hidden, router_loss = decoder.forward_with_router_loss(
            MOE, params, tokens, positions, segments, remat="full"
        )
        scores = token_scores(hidden[:, :-1], params["lm_head"], tokens[:, 1:])
        return 0.5 * router_loss - scores.logprobs.mean()

    ours = gradient(params)["layers"]["mlp"]
    ids = torch.tensor(np.asarray(tokens)).long()
    reference.zero_grad()
    out = reference(ids, labels=ids, output_router_logits=True)
    scale = 0.5 - reference.router_aux_loss_coef
    (out.loss + scale * out.aux_loss).backward()
    for i, layer in enumerate(reference.model.layers):
        gate_up = layer.mlp.experts.gate_up_proj.grad.numpy()
        gate, up = np.split(gate_up.transpose(0, 2, 1), 2, axis=-1)
        expected = {
            "router": layer.mlp.gate.weight.grad.numpy().T,
            "gate": gate,
            "up": up,
            "down": layer.mlp.experts.down_proj.grad.numpy().transpose(0, 2, 1),
        }
        for name, theirs in expected.items():
            error = np.abs(np.asarray(ours[name][i]) - theirs).max()
            assert error <= 1e-4 * np.abs(theirs).max(), name


def test_even_load_has_loss_of_experts_per_token():
    """The scale of the loss: J when every expert is as likely and as often chosen."""
    load = moe.RouterLoad(
        assignments_E=jnp.full((2, 4), 6.0),
        probabilities_E=jnp.full((2, 4), 3.0),
        tokens=jnp.full(2, 12.0),
    )
    np.testing.assert_allclose(moe.load_balancing_loss(load), 2.0, rtol=1e-6)


def test_weights_are_renormalised_only_when_asked():
    logits = jax.random.normal(jax.random.key(0), (50, 8))
    raw, normalised = (moe.route(logits, 3, n) for n in (False, True))
    np.testing.assert_array_equal(raw.experts, normalised.experts)
    np.testing.assert_allclose(normalised.weights.sum(-1), 1.0, rtol=1e-6)
    assert (raw.weights.sum(-1) < 1).all()


def test_no_token_is_dropped_when_all_choose_the_same_experts(params):
    """A router that sends every token to experts 0 to 2: as those three experts as a dense sum."""
    layer = jax.tree.map(lambda x: x[0], params["layers"]["mlp"])
    x = jax.random.normal(jax.random.key(1), (2, 15, MOE.hidden_size))
    logits = jnp.tile(jnp.array([3.0, 2.0, 1.0, *[-9.0] * 5]), (2, 15, 1))
    routing = moe.route(logits, 3, True)
    found = moe.experts_mlp(x, routing, layer["gate"], layer["up"], layer["down"])
    weights = jax.nn.softmax(logits[0, 0, :3])
    expected = sum(
        w * (jax.nn.silu(x @ layer["gate"][e]) * (x @ layer["up"][e])) @ layer["down"][e]
        for e, w in enumerate(weights)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_experts_are_sharded_over_fsdp_and_tensor():
    mesh = devices.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    check_divisible(MOE, mesh, "moe")
    specs = jax.tree.map(lambda s: s.spec, param_shardings(MOE, mesh))["layers"]["mlp"]
    assert specs["up"] == jax.sharding.PartitionSpec(None, None, "fsdp", "tensor")
    assert specs["down"] == jax.sharding.PartitionSpec(None, None, "tensor", "fsdp")


def test_sft_loss_with_router_equals_transformers(params, reference):
    """One micro-batch of SFT: router loss, and gradients of routers and experts."""
    rng = np.random.default_rng(0)
    records = [
        {
            "prompt_tokens": rng.integers(3, MOE.vocab_size, 4).astype(np.int32),
            "response_tokens": rng.integers(3, MOE.vocab_size, n).astype(np.int32),
        }
        for n in (18, 15, 11, 20)
    ]
    batch = micro_batches(records, Layout(24, 4, "token_mean"))
    coefficient = 0.3
    grads, metrics = jax.jit(
        lambda params, batch: batch_gradients(
            MOE, cross_entropy(), params, batch, router_coefficient=coefficient
        )
    )(params, batch)

    micro = jax.tree.map(torch.tensor, batch.micro(0))
    mask = (micro.segment_ids > 0).long()
    reference.zero_grad()
    out = reference(micro.tokens.long(), attention_mask=mask, output_router_logits=True)
    aux = load_balancing_loss_func(
        out.router_logits, MOE.num_experts, MOE.num_experts_per_tok, mask
    )
    logprobs = out.logits.log_softmax(-1).gather(-1, micro.targets.long()[..., None])[..., 0]
    loss = -(logprobs * micro.weights).sum()
    (loss + coefficient * aux).backward()
    np.testing.assert_allclose(metrics["loss"], loss.item(), rtol=1e-5)
    np.testing.assert_allclose(metrics["router_loss"], coefficient * aux.item(), rtol=1e-5)
    for i, layer in enumerate(reference.model.layers):
        np.testing.assert_allclose(
            grads["layers"]["mlp"]["router"][i], layer.mlp.gate.weight.grad.numpy().T, atol=1e-5
        )
