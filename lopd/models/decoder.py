"""Decoders of the Qwen and Llama families, dense and mixture of experts: the forward pass.

Parameters are a plain nested dict (`lopd.models.parameters`) whose `layers` are stacked on axis 0,
so that training scans over them. The Linen modules only describe one layer: they are used through
`init` and `apply`. Architecture: Qwen3 technical report (arXiv 2505.09388) and the published
`config.json` files; what sets other families apart are flags of `DecoderConfig`.

Shape letters: B batch, T query length, S key length, D hidden, H query heads, K key/value heads,
G = H / K, N head dim, F intermediate size, E experts, V vocabulary.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from lopd.machine.sharding import constrain
from lopd.models import moe
from lopd.models.attention import SAVED_NAME, attend
from lopd.models.decoder_config import DecoderConfig
from lopd.models.kv_cache import KVCache
from lopd.models.parameters import Parameter, Params, parameter_table
from lopd.models.parameters import abstract_params as abstract_params
from lopd.models.parameters import logical_axes as logical_axes
from lopd.models.projection import StoredWeight, project
from lopd.models.rotary import rotary_tables, rotate


def _parameter(module: nn.Module, name: str) -> jax.Array:
    """A leaf of a layer as the table has it, in float32 unless a caller cast it."""
    row = parameter_table(module.config)["layers"]
    for part in (*module.path, name):
        row = row[part]
    return module.param(name, row.initializer(module.config), row.shape, jnp.float32)


def _kernel(module: nn.Module, name: str) -> jax.Array | StoredWeight:
    """A matrix in the compute type, or what is stored in its place."""
    if isinstance(stored := module.get_variable("params", name), StoredWeight):
        return stored
    return _parameter(module, name).astype(module.config.compute_dtype)


def _rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """Root-mean-square normalisation over the last axis, in float32 and rounded once."""
    x32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (x32 * inverse * scale.astype(jnp.float32)).astype(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention; biases, then RMSNorm on queries and keys, come before RoPE."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x_BTD, rotary, segment_ids_BT, layer_cache, row_states):
        c = self.config
        q, k, v = (project(x_BTD, _kernel(self, name)) for name in ("q", "k", "v"))
        if c.attention_bias:
            biases = (_parameter(self, name) for name in ("q_bias", "k_bias", "v_bias"))
            q, k, v = (x + b.astype(x.dtype) for x, b in zip((q, k, v), biases, strict=True))
        if c.qk_norm:
            q = _rms_norm(q, _parameter(self, "q_norm"), c.rms_norm_eps)
            k = _rms_norm(k, _parameter(self, "k_norm"), c.rms_norm_eps)
        q, k = rotate(q, *rotary), rotate(k, *rotary)
        if layer_cache is None:
            out, kv = attend(q, k, v, segment_ids_BT), (k, v)
        else:
            out, kv = layer_cache.extend(q[:, 0], k[:, 0], v[:, 0], *row_states)
            out = out[:, None]
        return project(out, _kernel(self, "o"), 2), kv


class MLP(nn.Module):
    """SwiGLU feed-forward layer (arXiv 2002.05202)."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x_BTD):
        gate = project(x_BTD, _kernel(self, "gate"))
        up = project(x_BTD, _kernel(self, "up"))
        return project(nn.silu(gate) * up, _kernel(self, "down"))


class MoE(nn.Module):
    """A router and E SwiGLU experts in place of the MLP; also returns the router's load."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x_BTD, counted_BT):
        c = self.config
        logits = jnp.einsum(
            "btd,de->bte", x_BTD, _kernel(self, "router"), preferred_element_type=jnp.float32
        )
        routing = moe.route(logits, c.num_experts_per_tok, c.norm_topk_prob)
        matrices = (_kernel(self, name) for name in ("gate", "up", "down"))
        out = moe.experts_mlp(x_BTD, routing, *matrices)
        return out, moe.router_load(routing, counted_BT)


class Block(nn.Module):
    """One pre-norm transformer layer: output, keys and values, and router load (None when dense).

    With a cache, x is one token per row, `row_states` their (positions, active), and the cache
    comes back extended in place of the keys and values.
    """

    config: DecoderConfig

    @nn.compact
    def __call__(self, x_BTD, rotary, segment_ids_BT, layer_cache=None, row_states=None):
        c = self.config
        with jax.named_scope("attention"):
            normed = _rms_norm(x_BTD, _parameter(self, "input_norm"), c.rms_norm_eps)
            out, kv = Attention(c, name="attention")(
                normed, rotary, segment_ids_BT, layer_cache, row_states
            )
            x_BTD = x_BTD + out
        with jax.named_scope("mlp"):
            normed = _rms_norm(x_BTD, _parameter(self, "post_attention_norm"), c.rms_norm_eps)
            if c.num_experts:
                out, load = MoE(c, name="mlp")(normed, segment_ids_BT > 0)
            else:
                out, load = MLP(c, name="mlp")(normed), None
            return x_BTD + out, kv, load


def init_params(config: DecoderConfig, key: jax.Array) -> Params:
    """Random float32 parameters: normal(0, initializer_range) matrices, unit norm scales, no bias.

    A layer's are drawn by `Block.init`, so the key of each follows from Flax's names and order.
    """
    embed_key, head_key, layers_key = jax.random.split(key, 3)
    positions = jnp.zeros((1, 1), jnp.int32)
    inputs = (
        jnp.zeros((1, 1, config.hidden_size), config.compute_dtype),
        rotary_tables(config, positions),
        positions,
    )
    layers = jax.vmap(lambda k: Block(config).init(k, *inputs)["params"])(
        jax.random.split(layers_key, config.num_hidden_layers)
    )
    keys = {"embed": embed_key, "final_norm": key, "lm_head": head_key}
    outside = {
        name: row.initializer(config)(keys[name], row.shape)
        for name, row in parameter_table(config).items()
        if name != "layers"
    }
    return {**outside, "layers": layers}


def output_head(params: Params) -> jax.Array:
    """The [V, D] matrix that turns final hidden states into logits (tied or not)."""
    return params.get("lm_head", params["embed"])


def compute_params(config: DecoderConfig, params: Params) -> Params:
    """Stacked parameters with the layers' matrices (adapters too) and biases in the compute
    type."""

    def cast(row: Parameter, x: jax.Array | StoredWeight) -> jax.Array | StoredWeight:
        cast_one = lambda x: x.astype(config.compute_dtype)  # noqa: E731
        return x if row.kind == "norm" else jax.tree.map(cast_one, x)

    return {
        **params,
        "layers": jax.tree.map(cast, parameter_table(config)["layers"], params["layers"]),
    }


def _embed(config: DecoderConfig, params: Params, tokens: jax.Array) -> jax.Array:
    with jax.named_scope("embed"):
        # Each device looks its columns up for the rows of its whole fsdp group and exchanges the
        # results; otherwise the table itself is gathered, and every row on every device. The cast
        # comes after the look-up, so that the table's gradient is made in its own type.
        columns = params["embed"][constrain(tokens, "group_rows")].astype(config.compute_dtype)
        return _activations(constrain(columns, "group_rows", None, "embed"))


def _activations(x_BTD: jax.Array) -> jax.Array:
    """Hidden states lie by rows; left alone, the partitioner splits D as the weights are."""
    return constrain(x_BTD, "rows", "length", "hidden")


REMAT_POLICIES = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "attention": jax.checkpoint_policies.save_only_these_names(SAVED_NAME),
    "full": jax.checkpoint_policies.nothing_saveable,
}
"""What the backward pass keeps of a layer, from most memory to least: all of it; the results of
multiplications by weights; its input and attention's result; its input only."""


def _scan_layers(config, params, tokens, positions, segment_ids, remat):
    """Final hidden states of packed rows, and every layer's router load (None when dense)."""
    rotary = rotary_tables(config, positions)
    block = Block(config)

    def layer(x, layer_params):
        x, _, load = block.apply({"params": layer_params}, x, rotary, segment_ids)
        return _activations(x), load

    policy = REMAT_POLICIES[remat]
    if policy is not None:
        # Inside a scan nothing can be merged across layers, so CSE need not be prevented.
        layer = jax.checkpoint(layer, policy=policy, prevent_cse=False)
    x, loads = jax.lax.scan(layer, _embed(config, params, tokens), params["layers"])
    return _rms_norm(x, params["final_norm"], config.rms_norm_eps), loads


def forward(
    config: DecoderConfig,
    params: Params,
    tokens: jax.Array,
    positions: jax.Array,
    segment_ids: jax.Array,
    kv_cache: KVCache | None = None,
    *,
    remat: str = "none",
) -> tuple[jax.Array, KVCache | None]:
    """Final (normalised) hidden states of every token.

    Args:
      config: the model's shape.
      params: stacked parameters, or those of `inference.inference_params` when a cache is given.
      tokens: int32 [B, T]; with a cache, T is 1.
      positions: int32 [B, T], the position of each token within its own sequence.
      segment_ids: int32 [B, T]. Without a cache, tokens attend only within equal ids, so several
        sequences may share a row; 0 marks padding. With a cache, a row is one sequence, and
        rows with id 0 are idle: they neither write nor mean anything.
      kv_cache: keys and values of earlier positions; new ones are written at `positions`.
      remat: what the backward pass keeps, a key of `REMAT_POLICIES`.

    Returns:
      Hidden states [B, T, D] in the compute type, and the updated cache (None without one).
    """
    if kv_cache is None:
        return _scan_layers(config, params, tokens, positions, segment_ids, remat)[0], None
    x = _embed(config, params, tokens)
    rotary = rotary_tables(config, positions)
    row_states = positions[:, 0], segment_ids[:, 0] > 0
    caches = []
    for layer_params, layer_cache in zip(params["layers"], kv_cache.layers, strict=True):
        x, layer_cache, _ = Block(config).apply(
            {"params": layer_params}, x, rotary, segment_ids, layer_cache, row_states
        )
        caches.append(layer_cache)
    hidden = _rms_norm(x, params["final_norm"], config.rms_norm_eps)
    return hidden, KVCache(tuple(caches))


def prefill(
    config: DecoderConfig, params: Params, tokens: jax.Array, segment_ids: jax.Array
) -> list[tuple[jax.Array, jax.Array]]:
    """Keys and values [B, T, K, N] of every layer, of one sequence per row.

    Args:
      config: the model's shape.
      params: of `inference.inference_params`.
      tokens: int32 [B, T].
      segment_ids: int32 [B, T], 1 and then 0 where the row is padded.
    """
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    rotary = rotary_tables(config, positions)
    x = _embed(config, params, tokens)
    prefix = []
    for layer_params in params["layers"]:
        x, kv, _ = Block(config).apply({"params": layer_params}, x, rotary, segment_ids)
        prefix.append(kv)
    return prefix


def forward_with_router_loss(
    config: DecoderConfig,
    params: Params,
    tokens: jax.Array,
    positions: jax.Array,
    segment_ids: jax.Array,
    *,
    remat: str = "none",
) -> tuple[jax.Array, jax.Array]:
    """`forward` without a cache, and the router's load-balancing loss over the same tokens.

    Padding does not count. The loss is not scaled by `router_aux_loss_coef`; it is a product of
    means, so it depends on which rows share a call, as Transformers' does.

    Returns:
      Hidden states [B, T, D], and `moe.load_balancing_loss` of all layers (0 when dense).
    """
    hidden, loads = _scan_layers(config, params, tokens, positions, segment_ids, remat)
    if loads is None:
        return hidden, jnp.zeros((), jnp.float32)
    return hidden, moe.load_balancing_loss(loads)
