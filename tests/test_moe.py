"""The mixture of experts: its router loss, its padding, and its sharding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import random_params
from test_model import MOE, inputs, logprobs_of, transformers_model
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from lopd import parallel
from lopd.models import hf, moe, qwen3
from lopd.scoring import token_scores

forward_with_router_loss = jax.jit(
    qwen3.forward_with_router_loss, static_argnums=0, static_argnames="remat"
)


@pytest.fixture(scope="session")
def params():
    return random_params(MOE, seed=3)


@pytest.fixture(scope="session")
def reference(params, tmp_path_factory):
    """The same model in Transformers."""
    path = tmp_path_factory.mktemp("moe_reference")
    hf.save_checkpoint(path, MOE, params, end_id=1)
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
        hidden, router_loss = qwen3.forward_with_router_loss(
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
    np.testing.assert_array_equal(raw.experts_NJ, normalised.experts_NJ)
    np.testing.assert_allclose(normalised.weights_NJ.sum(-1), 1.0, rtol=1e-6)
    assert (raw.weights_NJ.sum(-1) < 1).all()


def test_no_token_is_dropped_when_all_choose_the_same_experts(params):
    """A router that sends every token to experts 0 to 2: as those three experts as a dense sum."""
    layer = jax.tree.map(lambda x: x[0], params["layers"]["mlp"])
    x = jax.random.normal(jax.random.key(1), (30, MOE.hidden_size))
    logits = jnp.tile(jnp.array([3.0, 2.0, 1.0, *[-9.0] * 5]), (30, 1))
    routing = moe.route(logits, 3, True)
    found = moe.experts_mlp(x, routing, layer["gate"], layer["up"], layer["down"])
    weights = jax.nn.softmax(logits[0, :3])
    expected = sum(
        w * (jax.nn.silu(x @ layer["gate"][e]) * (x @ layer["up"][e])) @ layer["down"][e]
        for e, w in enumerate(weights)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@functools.cache
def loss_and_gradient(shape):
    """Loss and gradient of packed rows on a mesh of fake devices."""
    sizes = dict(zip(parallel.AXES, shape, strict=True))
    mesh = parallel.make_mesh(sizes, jax.devices()[: int(np.prod(shape))])
    tokens, positions, segments = inputs(MOE, 8, 20, seed=7)
    positions = np.where(np.arange(20) < 13, positions, positions - 13)
    segments = np.where(np.arange(20) < 13, 1, 2) * np.asarray(segments)
    segments[:, 18:] = 0

    def loss(params, tokens, positions, segments):
        hidden, router_loss = qwen3.forward_with_router_loss(
            MOE, params, tokens, positions, segments, remat="full"
        )
        targets = jnp.roll(tokens, -1, axis=1)
        logprobs = token_scores(hidden, params["lm_head"], targets).logprobs
        return -jnp.mean(logprobs, where=segments > 0) + 0.1 * router_loss

    shardings = parallel.param_shardings(MOE, mesh)
    rows = parallel.rows_sharding(mesh)
    step = jax.jit(jax.value_and_grad(loss), out_shardings=(parallel.replicated(mesh), shardings))
    return jax.device_get(
        step(
            jax.device_put(random_params(MOE, seed=3), shardings),
            *jax.device_put((tokens, positions, segments), rows),
        )
    )


@pytest.mark.parametrize("shape", [(2, 1, 1), (1, 4, 1), (1, 2, 2), (2, 2, 2)])
def test_same_loss_and_gradients_on_every_mesh(shape):
    loss, gradients = loss_and_gradient((1, 1, 1))
    other_loss, other_gradients = loss_and_gradient(shape)
    np.testing.assert_allclose(other_loss, loss, rtol=1e-5)
    for (path, one), other in zip(
        jax.tree_util.tree_leaves_with_path(gradients),
        jax.tree.leaves(other_gradients),
        strict=True,
    ):
        name = jax.tree_util.keystr(path)
        assert np.abs(one - other).max() <= 1e-5 * np.abs(one).max(), name


def test_experts_are_sharded_over_fsdp_and_tensor():
    mesh = parallel.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    parallel.check_divisible(MOE, mesh, "moe")
    specs = jax.tree.map(lambda s: s.spec, parallel.param_shardings(MOE, mesh))["layers"]["mlp"]
    assert specs["up"] == jax.sharding.PartitionSpec(None, None, "fsdp", "tensor")
    assert specs["down"] == jax.sharding.PartitionSpec(None, None, "tensor", "fsdp")
