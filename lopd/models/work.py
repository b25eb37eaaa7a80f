"""The cost of one call of a program by formula: what is computed, moved and held.

Units: FLOPs of all chips together, bytes of one chip.
"""

import dataclasses

from lopd.models.decoder_config import DecoderConfig
from lopd.models.flops import forward_flops, training_flops
from lopd.models.memory import model_size, scoring_scratch, training_bytes


@dataclasses.dataclass(frozen=True)
class Work:
    """FLOPs of all chips together for one call of a program; bytes moved and held by one chip."""

    flops: float
    """Of all chips."""
    bytes_per_chip: float
    """Read and written by one chip."""
    peak_bytes: float
    """Held by one chip, at most."""


def training_work(
    model: DecoderConfig,
    mesh: dict[str, int],
    *,
    rows: int,
    row_length: int,
    used_rows: int,
    context: float,
    micro_batches: int,
    remat: str,
    adapter_weights: int | None = None,
) -> Work:
    """One optimizer step over `used_rows`, of all weights or of so many adapters' alone."""
    size, shards = model_size(model), mesh["fsdp"] * mesh["tensor"]
    used_micro = -(-used_rows // rows)
    trained = size.total if adapter_weights is None else adapter_weights
    update = 28 * trained / shards  # read weights, moments and gradients; write all but those
    passes = used_micro * 3 * size.total / mesh["tensor"] * model.compute_dtype.itemsize
    shape = dict(rows=rows, row_length=row_length, micro_batches=micro_batches, remat=remat)
    shape |= dict(adapter_weights=adapter_weights)
    tokens = used_rows * row_length
    return Work(
        flops=training_flops(model, tokens, 2 * tokens * context, adapter_weights),
        bytes_per_chip=update + passes,
        peak_bytes=training_bytes(model, mesh, **shape),
    )


def scoring_work(
    model: DecoderConfig,
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
