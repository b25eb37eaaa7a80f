"""Bytes that weights, caches and programs take: of trees, by their leaves; of programs, by formula.

Formulas take numbers, so that they serve where no device is.
"""

import dataclasses
import math
from typing import Any

import jax

from lopd.models.decoder_config import DecoderConfig
from lopd.models.kv_cache import rounded_capacity
from lopd.models.parameters import abstract_params
from lopd.models.token_scores import CHUNK_BYTES

GIB = 2**30
"""Bytes."""

LOGIT_ARRAYS = 4
"""Float32 [rows, V] arrays alive while a token is drawn: logits, tempered, kept, and one more."""


# Trees


def tree_bytes(tree: Any) -> int:
    """Bytes of all arrays of a tree together, wherever they lie.

    Args:
      tree: of arrays, or of their shapes and types.
    """
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def bytes_per_device(tree: Any) -> int:
    """Bytes that one device holds of the arrays of a tree, each by its sharding.

    Args:
      tree: of arrays, or of shapes and types, with shardings; a leaf without one counts whole.
    """

    def part(x) -> int:
        sharding = getattr(x, "sharding", None)
        shape = sharding.shard_shape(x.shape) if sharding else x.shape
        return math.prod(shape) * x.dtype.itemsize

    return sum(part(x) for x in jax.tree.leaves(tree))


# Models


@dataclasses.dataclass(frozen=True)
class Size:
    """Parameters of a model: all, and those in its layers."""

    total: int
    """With embedding and head."""
    layers: int


def model_size(model: DecoderConfig) -> Size:
    """Counts parameters."""
    params = abstract_params(model)
    count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))  # noqa: E731
    layers = count(params["layers"])
    return Size(count(params), layers)


def cache_bytes(model: DecoderConfig, positions: float) -> float:
    """Bytes of the keys and values of `positions`, over all layers."""
    values = 2 * model.num_hidden_layers * model.num_key_value_heads * model.head_dim
    return positions * values * model.compute_dtype.itemsize


def cache_row_bytes(model: DecoderConfig, capacity: int) -> int:
    """One row of a key/value cache with room for `capacity` positions, over all layers."""
    return cache_bytes(model, rounded_capacity(capacity))


def slot_bytes(model: DecoderConfig, capacity: int, tensor: int) -> int:
    """Bytes of one slot on each device of its `tensor` group while sampling.

    Keys and values are split over `tensor`; the logits' arrays are counted whole.
    """
    return cache_row_bytes(model, capacity) // tensor + LOGIT_ARRAYS * 4 * model.vocab_size


# Programs


def layer_activations(model: DecoderConfig, tokens: float, remat: str) -> float:
    """Bytes that the backward pass keeps per layer, as `decoder.REMAT_POLICIES` says."""
    heads = model.num_attention_heads * model.head_dim
    kv = model.num_key_value_heads * model.head_dim
    width = model.num_experts_per_tok * model.moe_intermediate_size or model.intermediate_size
    values = {
        "full": model.hidden_size,
        "attention": model.hidden_size + heads,
        "dots": 4 * model.hidden_size + 2 * heads + 2 * kv + 2 * width,
        "none": 8 * model.hidden_size + 6 * heads + 4 * kv + 4 * width,
    }[remat]
    return tokens * values * model.compute_dtype.itemsize


def working_set(model: DecoderConfig, tokens: float, tensor: int) -> float:
    """Bytes of one layer in progress: its gathered weights and its widest activations."""
    width = model.num_experts_per_tok * model.moe_intermediate_size or model.intermediate_size
    values = 4 * model.hidden_size + 3 * width / tensor
    layer = model_size(model).layers / model.num_hidden_layers
    return model.compute_dtype.itemsize * (tokens * values + 2 * layer / tensor)


def training_bytes(
    model: DecoderConfig,
    mesh: dict[str, int],
    *,
    rows: int,
    row_length: int,
    micro_batches: int,
    remat: str,
    adapter_weights: int | None = None,
) -> float:
    """A rough peak of one chip during an optimizer step, of all weights or of adapters alone."""
    size, shards = model_size(model), mesh["fsdp"] * mesh["tensor"]
    tokens = rows * row_length / (mesh["data"] * mesh["fsdp"])
    kept = model.num_hidden_layers * layer_activations(model, tokens, remat)
    if adapter_weights is None:
        trained, frozen = size.total / shards, 0
    else:
        # Of A and B one is split over fsdp, the other over tensor.
        trained = adapter_weights / 2 * (1 / mesh["fsdp"] + 1 / mesh["tensor"])
        frozen = model.compute_dtype.itemsize * size.total / shards
    state, gradient = frozen + 12 * trained, 4 * trained
    if model.dtype != "float32" and adapter_weights is None:
        state += 2 * size.layers / shards  # XLA casts all layers at once
        if micro_batches == 1:
            gradient -= 2 * size.layers / shards
    logits = CHUNK_BYTES if micro_batches > 1 else 0
    return state + gradient + kept + logits + working_set(model, tokens, mesh["tensor"])


def scoring_scratch(
    model: DecoderConfig,
    mesh: dict[str, int],
    *,
    rows: int,
    row_length: int,
    weight_bytes: int,
) -> float:
    """Bytes of one chip that a scoring pass takes beside weights of `weight_bytes` each."""
    tokens = rows * row_length / (mesh["data"] * mesh["fsdp"])
    scratch = min(CHUNK_BYTES, 4 * tokens * model.vocab_size)
    scratch += working_set(model, tokens, mesh["tensor"])
    if weight_bytes > model.compute_dtype.itemsize:
        shards = mesh["fsdp"] * mesh["tensor"]
        scratch += model.compute_dtype.itemsize * model_size(model).total / shards
    return scratch
