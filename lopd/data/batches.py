"""Step-indexed training batches: what step n reads is a function of (seed, n) and nothing else."""

from collections.abc import Sequence

import grain
import numpy as np

from lopd.data.packing import Arrays, pack, pad_rows
from lopd.objectives import token_weights


def micro_batches(
    records: Sequence[dict],
    *,
    row_length: int,
    rows_per_micro: int,
    reduction: str,
    token_fields: Sequence[str] = (),
) -> Arrays:
    """One global batch as packed micro-batches [M, rows_per_micro, row_length].

    M is fixed by the number of records (each might need a row of its own), so that every batch
    has one shape; `num_micro` says how many micro-batches hold anything, and the training step
    stops there. `weights` carries the loss reduction over the whole batch.
    """
    weights = token_weights([len(r["response_tokens"]) for r in records], reduction)
    weighted = [{**r, "weights": w} for r, w in zip(records, weights, strict=True)]
    arrays, _ = pack(weighted, row_length, (*token_fields, "weights"))
    used = len(arrays["tokens"])
    most = -(-len(records) // rows_per_micro)
    arrays = {
        name: a.reshape(most, rows_per_micro, row_length)
        for name, a in pad_rows(arrays, most * rows_per_micro).items()
    }
    return {**arrays, "num_micro": np.int32(-(-used // rows_per_micro))}


def step_batches(
    source: Sequence[dict],
    *,
    seed: int,
    batch_size: int,
    row_length: int,
    rows_per_micro: int,
    reduction: str,
    token_fields: Sequence[str] = (),
) -> grain.MapDataset:
    """A dataset whose item n is the batch of training step n, packed by `micro_batches`.

    Records are shuffled globally, anew in each pass over the source; batches run on across the
    end of a pass, so no record is dropped.
    A record longer than a row is an error of `pack`; `lopd.config.validate` rules it out before.
    """

    def to_batch(records: Sequence[dict]) -> Arrays:
        return micro_batches(
            records,
            row_length=row_length,
            rows_per_micro=rows_per_micro,
            reduction=reduction,
            token_fields=token_fields,
        )

    # `repeat` derives a new shuffling seed for each pass (grain's reseed_each_epoch).
    dataset = grain.MapDataset.source(source).seed(seed).shuffle().repeat()
    return dataset.batch(batch_size, batch_fn=to_batch)
