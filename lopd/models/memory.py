"""What a program must compute, move and hold, by formula. Units: FLOPs, bytes, seconds."""

import dataclasses

import jax

from lopd.models import decoder
from lopd.models.flops import training_flops
from lopd.models.token_scores import CHUNK_BYTES
from lopd.sampling.engine import PROMPTS_PER_CALL, prompts_at_once
from lopd.sampling.placement import tensor_for_sampling

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Size:
    """Parameters of a model: all, and those in its layers."""

    total: int
    layers: int


def model_size(model: decoder.DecoderConfig) -> Size:
    """Counts parameters."""
    params = decoder.abstract_params(model)
    count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))  # noqa: E731
    layers = count(params["layers"])
    return Size(count(params), layers)


def forward_flops(model: decoder.DecoderConfig, tokens: float, context: float) -> float:
    """Model FLOPs of a forward pass over tokens that attend to `context` others on average."""
    return training_flops(model, tokens, 2 * tokens * context) / 3


@dataclasses.dataclass(frozen=True)
class Work:
    """What one call of a program costs all chips together, and a rough peak of one chip."""

    flops: float
    bytes_per_chip: float
    peak_bytes: float


def _layer_activations(model: decoder.DecoderConfig, tokens: float, remat: str) -> float:
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


def _working_set(model: decoder.DecoderConfig, tokens: float, tensor: int) -> float:
    """Bytes of one layer in progress: its gathered weights and its widest activations."""
    width = model.num_experts_per_tok * model.moe_intermediate_size or model.intermediate_size
    values = 4 * model.hidden_size + 3 * width / tensor
    layer = model_size(model).layers / model.num_hidden_layers
    return model.compute_dtype.itemsize * (tokens * values + 2 * layer / tensor)


def training_work(
    model: decoder.DecoderConfig,
    mesh: dict[str, int],
    *,
    rows: int,
    row_length: int,
    used_rows: int,
    context: float,
    micro_batches: int,
    remat: str,
) -> Work:
    """One optimizer step: three forward passes' worth of FLOPs for `used_rows`."""
    size, shards = model_size(model), mesh["fsdp"] * mesh["tensor"]
    tokens = rows * row_length / (mesh["data"] * mesh["fsdp"])
    used_micro = -(-used_rows // rows)
    kept = model.num_hidden_layers * _layer_activations(model, tokens, remat)
    state = 12 * size.total / shards
    gradient = 4 * size.total / shards
    if model.dtype != "float32":
        state += 2 * size.layers / shards  # XLA casts all layers at once
        if micro_batches == 1:
            gradient -= 2 * size.layers / shards
    update = 28 * size.total / shards  # read weights, moments and gradients; write all but those
    passes = used_micro * 3 * size.total / mesh["tensor"] * model.compute_dtype.itemsize
    logits = CHUNK_BYTES if micro_batches > 1 else 0
    working = _working_set(model, tokens, mesh["tensor"])
    return Work(
        flops=3 * forward_flops(model, used_rows * row_length, context),
        bytes_per_chip=update + passes,
        peak_bytes=state + gradient + kept + logits + working,
    )


def scoring_scratch(
    model: decoder.DecoderConfig,
    mesh: dict[str, int],
    *,
    rows: int,
    row_length: int,
    weight_bytes: int,
) -> float:
    """Bytes of one chip that a scoring pass takes beside the weights, of so many bytes each."""
    tokens = rows * row_length / (mesh["data"] * mesh["fsdp"])
    scratch = min(CHUNK_BYTES, 4 * tokens * model.vocab_size)
    scratch += _working_set(model, tokens, mesh["tensor"])
    if weight_bytes > model.compute_dtype.itemsize:
        shards = mesh["fsdp"] * mesh["tensor"]
        scratch += model.compute_dtype.itemsize * model_size(model).total / shards
    return scratch


def scoring_work(
    model: decoder.DecoderConfig,
    mesh: dict[str, int],
    *,
    rows: int,
    row_length: int,
    context: float,
    weight_bytes: int,
) -> Work:
    """One forward pass over `rows`."""
    size, shards = model_size(model), mesh["fsdp"] * mesh["tensor"]
    shape = dict(rows=rows, row_length=row_length, weight_bytes=weight_bytes)
    return Work(
        flops=forward_flops(model, rows * row_length, context),
        bytes_per_chip=size.total / mesh["tensor"] * model.compute_dtype.itemsize,
        peak_bytes=weight_bytes * size.total / shards + scoring_scratch(model, mesh, **shape),
    )


def _cache_bytes(model: decoder.DecoderConfig, positions: float) -> float:
    values = 2 * model.num_hidden_layers * model.num_key_value_heads * model.head_dim
    return positions * values * model.compute_dtype.itemsize


def sampling_sizes(model: decoder.DecoderConfig, mesh: dict[str, int]) -> dict[str, int]:
    """The mesh sizes that sampling uses on the same chips, as `placement.sampling_mesh`."""
    chips = mesh["data"] * mesh["fsdp"] * mesh["tensor"]
    tensor = tensor_for_sampling(model, mesh["fsdp"] * mesh["tensor"])
    return {"data": chips // tensor, "fsdp": 1, "tensor": tensor}


def prefill_work(
    model: decoder.DecoderConfig, mesh: dict[str, int], *, slots: int, capacity: int, length: int
) -> Work:
    """Reading `PROMPTS_PER_CALL` prompts of `length` tokens."""
    mesh = sampling_sizes(model, mesh)
    weights = model_size(model).total * model.compute_dtype.itemsize / mesh["tensor"]
    at_once = prompts_at_once(length, mesh["data"], "tpu")
    tokens = at_once * length / mesh["data"]
    chips = mesh["data"] * mesh["tensor"]
    held = _cache_bytes(model, slots * capacity) / chips
    held += _cache_bytes(model, tokens) / mesh["tensor"]
    return Work(
        flops=forward_flops(model, PROMPTS_PER_CALL * length, length / 2),
        bytes_per_chip=weights * -(-PROMPTS_PER_CALL // at_once),
        peak_bytes=weights + held + _working_set(model, tokens, mesh["tensor"]),
    )


def decoding_work(
    model: decoder.DecoderConfig, mesh: dict[str, int], *, slots: int, capacity: int, steps: int
) -> Work:
    """`steps` tokens in each slot, its cache half full on average."""
    mesh = sampling_sizes(model, mesh)
    weights = model_size(model).total * model.compute_dtype.itemsize / mesh["tensor"]
    cache = _cache_bytes(model, slots * capacity) / (mesh["data"] * mesh["tensor"])
    logits = 4 * 4 * slots / mesh["data"] * model.vocab_size / mesh["tensor"]
    return Work(
        flops=forward_flops(model, slots * steps, capacity / 2),
        bytes_per_chip=steps * (weights + cache / 2),
        peak_bytes=weights + cache + logits,
    )
