"""Qwen3, dense and mixture of experts: configuration, parameters and forward pass.

Parameters are a plain nested dict whose `layers` are stacked on axis 0, so that training scans
over them. The Linen modules only describe one layer: they are used through `init` and `apply`.
Architecture: Qwen3 technical report (arXiv 2505.09388) and the published `config.json` files.

Shape letters: B batch, T query length, S key length, D hidden, H query heads, K key/value heads,
G = H / K, N head dim, F intermediate size, E experts, V vocabulary.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta

from lopd.errors import UserError
from lopd.machine.sharding import constrain
from lopd.models import moe
from lopd.models.attention import SAVED_NAME, attend
from lopd.models.kv_cache import KVCache
from lopd.models.projection import OutputFirst, project

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Shape and numerics of a Qwen3 model, with the field names of Hugging Face's `config.json`.

    `num_experts` of 0 is a dense model; otherwise every layer is a mixture of experts, and
    `intermediate_size` goes unused. `dtype` is the compute type; parameters are held in float32
    unless a caller casts them.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = True
    max_position_embeddings: int = 40960
    initializer_range: float = 0.02
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = False
    router_aux_loss_coef: float = 0.001
    dtype: str = "float32"

    def __post_init__(self):
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"model: num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise UserError(f"model: head_dim={self.head_dim} must be even (rotary embedding)")
        if self.num_experts and not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise UserError(
                f"model: num_experts_per_tok={self.num_experts_per_tok} must lie between 1 and "
                f"num_experts={self.num_experts}"
            )
        if self.num_experts and self.moe_intermediate_size < 1:
            raise UserError("model: a mixture of experts needs moe_intermediate_size")

    @property
    def compute_dtype(self) -> jnp.dtype:
        """The type of activations and matmul operands."""
        return jnp.dtype(self.dtype)


def _kernel(module: nn.Module, name: str, shape: tuple[int, ...], axes: tuple[str, ...]):
    """A float32 master weight with logical axis names, cast to the compute type.

    Or what `lopd.models.inference` made of it.
    """
    if isinstance(stored := module.get_variable("params", name), OutputFirst):
        return stored
    init = nn.with_logical_partitioning(
        nn.initializers.normal(module.config.initializer_range), axes
    )
    return module.param(name, init, shape, jnp.float32).astype(module.config.compute_dtype)


def _rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """Root-mean-square normalisation over the last axis, in float32 and rounded once."""
    x32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (x32 * inverse * scale.astype(jnp.float32)).astype(x.dtype)


def _scale(module: nn.Module, name: str, size: int, axis: str) -> jax.Array:
    init = nn.with_logical_partitioning(nn.initializers.ones_init(), (axis,))
    return module.param(name, init, (size,), jnp.float32)


def _rotate(x_BTHN: jax.Array, cos_BTN: jax.Array, sin_BTN: jax.Array) -> jax.Array:
    """Rotary position embedding, halves convention (arXiv 2104.09864)."""
    first, second = jnp.split(x_BTHN.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos_BTN[:, :, None], sin_BTN[:, :, None]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BTHN.dtype)


def rotary_tables(config: DecoderConfig, positions_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines [B, T, N/2] in float32 for absolute positions."""
    exponent = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim
    angles = positions_BT.astype(jnp.float32)[..., None] / config.rope_theta**exponent
    return jnp.cos(angles), jnp.sin(angles)


class Attention(nn.Module):
    """Grouped-query attention with per-head RMSNorm on queries and keys before RoPE."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x_BTD, rotary, segment_ids_BT, layer_cache, row_states):
        c = self.config
        D, H, K, N = c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim
        q = project(x_BTD, _kernel(self, "q", (D, H, N), ("embed", "heads", "head_dim")))
        k = project(x_BTD, _kernel(self, "k", (D, K, N), ("embed", "kv_heads", "head_dim")))
        v = project(x_BTD, _kernel(self, "v", (D, K, N), ("embed", "kv_heads", "head_dim")))
        q = _rms_norm(q, _scale(self, "q_norm", N, "head_dim"), c.rms_norm_eps)
        k = _rms_norm(k, _scale(self, "k_norm", N, "head_dim"), c.rms_norm_eps)
        q, k = _rotate(q, *rotary), _rotate(k, *rotary)
        if layer_cache is None:
            out, kv = attend(q, k, v, segment_ids_BT), (k, v)
        else:
            out, kv = layer_cache.extend(q[:, 0], k[:, 0], v[:, 0], *row_states)
            out = out[:, None]
        kernel = _kernel(self, "o", (H, N, D), ("heads", "head_dim", "embed"))
        return project(out, kernel, 2), kv


class MLP(nn.Module):
    """SwiGLU feed-forward layer (arXiv 2002.05202)."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x_BTD):
        D, F = self.config.hidden_size, self.config.intermediate_size
        gate = project(x_BTD, _kernel(self, "gate", (D, F), ("embed", "mlp")))
        up = project(x_BTD, _kernel(self, "up", (D, F), ("embed", "mlp")))
        return project(nn.silu(gate) * up, _kernel(self, "down", (F, D), ("mlp", "embed")))


class MoE(nn.Module):
    """A router and E SwiGLU experts in place of the MLP; also returns the router's load."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x_BTD, counted_BT):
        c = self.config
        D, E, F = c.hidden_size, c.num_experts, c.moe_intermediate_size
        router = _kernel(self, "router", (D, E), ("embed", "expert"))
        logits = jnp.einsum("btd,de->bte", x_BTD, router, preferred_element_type=jnp.float32)
        routing = moe.route(logits, c.num_experts_per_tok, c.norm_topk_prob)
        out = moe.experts_mlp(
            x_BTD,
            routing,
            _kernel(self, "gate", (E, D, F), ("expert", "embed", "mlp")),
            _kernel(self, "up", (E, D, F), ("expert", "embed", "mlp")),
            _kernel(self, "down", (E, F, D), ("expert", "mlp", "embed")),
        )
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
            normed = _rms_norm(
                x_BTD, _scale(self, "input_norm", c.hidden_size, "norm"), c.rms_norm_eps
            )
            out, kv = Attention(c, name="attention")(
                normed, rotary, segment_ids_BT, layer_cache, row_states
            )
            x_BTD = x_BTD + out
        with jax.named_scope("mlp"):
            normed = _rms_norm(
                x_BTD, _scale(self, "post_attention_norm", c.hidden_size, "norm"), c.rms_norm_eps
            )
            if c.num_experts:
                out, load = MoE(c, name="mlp")(normed, segment_ids_BT > 0)
            else:
                out, load = MLP(c, name="mlp")(normed), None
            return x_BTD + out, kv, load


def _boxed_init(config: DecoderConfig, key: jax.Array) -> Params:
    """Initial parameters in Flax's metadata boxes, which carry the logical axis names."""
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
    layers = meta.map_axis_meta(lambda box: box.add_axis(0, {nn.PARTITION_NAME: "layers"}), layers)
    normal = nn.initializers.normal(config.initializer_range)
    shape = (config.vocab_size, config.hidden_size)
    params = {
        "embed": nn.with_logical_partitioning(normal, ("vocab", "embed"))(embed_key, shape),
        "layers": layers,
        "final_norm": nn.with_logical_partitioning(nn.initializers.ones_init(), ("norm",))(
            None, (config.hidden_size,)
        ),
    }
    if not config.tie_word_embeddings:
        params["lm_head"] = nn.with_logical_partitioning(normal, ("vocab", "embed"))(
            head_key, shape
        )
    return params


def init_params(config: DecoderConfig, key: jax.Array) -> Params:
    """Random float32 parameters: normal(0, initializer_range) matrices and unit norm scales."""
    return nn.unbox(_boxed_init(config, key))


def abstract_params(config: DecoderConfig) -> Params:
    """Shapes and types of the parameters, without computing them."""
    return nn.unbox(jax.eval_shape(lambda: _boxed_init(config, jax.random.key(0))))


def logical_axes(config: DecoderConfig) -> Params:
    """The logical axis names of every parameter, as a tree of PartitionSpec."""
    boxed = jax.eval_shape(lambda: _boxed_init(config, jax.random.key(0)))
    return nn.get_partition_spec(boxed)


def output_head(params: Params) -> jax.Array:
    """The [V, D] matrix that turns final hidden states into logits (tied or not)."""
    return params.get("lm_head", params["embed"])


def compute_params(config: DecoderConfig, params: Params) -> Params:
    """Stacked parameters with the layers' matrices in the compute type; norm scales stay as is."""
    cast = lambda x: x.astype(config.compute_dtype) if x.ndim > 2 else x  # noqa: E731
    return {**params, "layers": jax.tree.map(cast, params["layers"])}


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
