"""Step-indexed training batches: what step n reads is a function of (seed, n) and nothing else."""

import collections
import concurrent.futures
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from lopd.data.layout import RESPONSE_STATS, Batch, Layout
from lopd.data.packing import assign_rows, fill_rows
from lopd.data.selection import ALL_TOKENS, TokenSelection, token_weights
from lopd.machine.devices import rows_sharding

_AHEAD = 3
"""Batches prepared before they are asked for."""


def repeated_shares(responses: Sequence[np.ndarray]) -> list[float]:
    """Of each response the share of 8-grams that occurred earlier in it; near 1 in a loop."""
    grams = np.concatenate(responses).astype(np.uint64)
    for shift, odd in ((1, 0x9E3779B97F4A7C15), (2, 0xC2B2AE3D27D4EB4F), (4, 0x165667B19E3779F9)):
        grams[:-shift] = grams[:-shift] * np.uint64(odd) + grams[shift:]  # a hash modulo 2**64
    shares, end = [], 0
    for response in responses:
        start, end = end, end + len(response)
        own = grams[start : max(start, end - 7)]  # those that end within the response
        own.sort()  # np.unique is a hundred times slower on a short array
        shares.append(np.count_nonzero(own[1:] == own[:-1]) / max(len(own), 1))
    return shares


def _stats(records: Sequence[dict], lengths: np.ndarray) -> np.ndarray:
    """Each record's share, its `record_length` being lengths[i], of `response_stats`."""
    prompts, responses = lengths[:, 0], lengths[:, 1]
    positions = prompts + responses - 1
    cut = [not record.get("finished", True) for record in records]
    shares = repeated_shares([record["response_tokens"] for record in records])
    columns = [np.ones(len(records)), positions, positions**2, responses, cut, shares]
    return np.stack(columns, axis=1)


def _micro_batches(lengths: np.ndarray, read: Callable[[int], dict], layout: Layout) -> Batch:
    """`micro_batches` from `record_length`s [B, 3], reading only what this process's rows hold."""
    weights = token_weights(lengths[:, 2], layout.reduction)
    places = assign_rows((lengths[:, :2].sum(axis=1) - 1).tolist(), layout.row_length)
    used = max(row for row, _ in places) + 1
    size, rows = layout.rows_per_micro, layout.own_rows
    micros = -(-len(lengths) // size)
    # Row r of the batch is row r % size of micro-batch r // size.
    local = {row: i for i, row in enumerate(rows)}
    own, own_places = [], []
    for i, (row, offset) in enumerate(places):
        micro, row = divmod(row, size)
        if row in local:
            own.append(i)
            own_places.append((micro * len(rows) + local[row], offset))
    records = [read(i) for i in own]
    records = [
        {**record, "weights": weights[i] * layout.selection.mask(record["response_tokens"])}
        for i, record in zip(own, records, strict=True)
    ]
    arrays, _ = fill_rows(
        records,
        [i + 1 for i in own],
        own_places,
        micros * len(rows),
        layout.row_length,
        (*layout.token_fields, "weights"),
    )
    stats = np.zeros((micros * len(rows), len(RESPONSE_STATS)), np.float32)
    if records:
        np.add.at(stats, [row for row, _ in own_places], _stats(records, lengths[own]))
    arrays = {
        name: a.reshape(micros, len(rows), *a.shape[1:])
        for name, a in {**arrays, "response_stats": stats}.items()
    }
    names = [field if isinstance(field, str) else field.name for field in layout.token_fields]
    fields = {name: arrays.pop(name) for name in names}
    return Batch(**arrays, fields=fields, num_micro=np.int32(-(-used // size)))


def record_length(record: dict, selection: TokenSelection = ALL_TOKENS) -> tuple[int, int, int]:
    """Tokens of the prompt, of the response, and how many of these are trained on."""
    response = record["response_tokens"]
    return len(record["prompt_tokens"]), len(response), selection.count(response)


def micro_batches(records: Sequence[dict], layout: Layout) -> Batch:
    """One global batch as packed micro-batches [M, rows_per_micro, row_length], in NumPy.

    M is fixed by the number of records (each might need a row of its own), so that every batch
    has one shape; `num_micro` says how many micro-batches hold anything, and the training step
    stops there. `weights` carries the loss reduction over the whole batch, 0 where the layout's
    selection leaves a token out; `mask` is of all response tokens. Record i has segment id i + 1.
    With `layout.rows` the arrays hold only these rows of each micro-batch.
    """
    lengths = np.array([record_length(r, layout.selection) for r in records])
    return _micro_batches(lengths, records.__getitem__, layout)


def record_lengths(source: Sequence[dict], selection: TokenSelection = ALL_TOKENS) -> np.ndarray:
    """`record_length` of every record, int32 [N, 3]; each process reads its share."""
    count, size = jax.process_count(), len(source)
    own = range(jax.process_index(), size, count)
    lengths = np.zeros((-(-size // count), 3), np.int32)
    found = [record_length(source[i], selection) for i in own]
    lengths[: len(own)] = np.array(found).reshape(-1, 3)
    # [processes, share, 3]: record i is entry i // processes of process i % processes.
    gathered = np.asarray(multihost_utils.process_allgather(lengths)).reshape(count, -1, 3)
    return gathered.swapaxes(0, 1).reshape(-1, 3)[:size]


@dataclasses.dataclass(frozen=True)
class StepBatches:
    """The batches of a training run, by step (0 is the first), made by `step_batches`."""

    source: Sequence[dict]
    """Records by index."""
    indices: grain.MapDataset
    """Item n: the indices in `source` of the records of step n, int [batch_size]."""
    lengths: np.ndarray | None
    """`record_lengths`, or None where every record of a batch is read anyway."""
    layout: Layout
    reads_params = False
    """See `lopd.training.loop.Batches`."""

    def __getitem__(self, step: int) -> Batch:
        indices = self.indices[step]
        if self.lengths is None:
            return micro_batches([self.source[int(i)] for i in indices], self.layout)
        lengths = self.lengths[indices]
        return _micro_batches(lengths, lambda i: self.source[int(indices[i])], self.layout)

    def iterate(
        self, start: int, stop: int, put: Callable[[Batch], Any] = lambda batch: batch
    ) -> Iterator[Any]:
        """The batches of steps start … stop − 1, made and `put` ahead in a thread of their own."""
        # grain's to_iter_dataset takes 25 ms per batch for this, and seconds to start.
        pool = concurrent.futures.ThreadPoolExecutor(1)
        try:
            ahead = collections.deque()
            for step in range(start, stop):
                ahead.append(pool.submit(lambda step=step: put(self[step])))
                if len(ahead) > _AHEAD:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)

    def reader(
        self, start: int, stop: int, put: Callable[[Batch], Any]
    ) -> Callable[[int, Any], tuple[Any, dict]]:
        """A function of each of the steps start … stop − 1 and its parameters, for the loop.

        It gives the step's batch, `put` on the devices, and what is to be noted of how it was made:
        here nothing.
        """
        ahead = self.iterate(start, stop, put)
        return lambda step, params: (next(ahead), {})

    def records(self, step: int) -> list[dict]:
        """The records of one step, whoever trains on them."""
        return [self.source[int(i)] for i in self.indices[step]]

    def on(self, source: Sequence[dict], chosen: np.ndarray) -> "StepBatches":
        """The same steps with other records: `source[i]` stands for record `chosen[i]` of this one.

        Steps that read a record which is not chosen must not be asked for.

        Args:
          source: new records.
          chosen: indices into the present source, ascending.
        """
        indices = self.indices.map(lambda batch: np.searchsorted(chosen, batch))
        lengths = _lengths(source, self.layout.selection)
        return dataclasses.replace(self, source=source, indices=indices, lengths=lengths)


def _lengths(source: Sequence[dict], selection: TokenSelection) -> np.ndarray | None:
    """`record_lengths` for several processes; one reads every record of a batch anyway."""
    return None if jax.process_count() == 1 else record_lengths(source, selection)


def step_indices(size: int, seed: int, batch_size: int) -> grain.MapDataset:
    """Item n: which of `size` records step n reads, int [batch_size].

    They are shuffled globally, anew in each pass; batches run on across the end of a pass, so no
    record is dropped.
    """
    # `repeat` derives a new shuffling seed for each pass (grain's reseed_each_epoch).
    indices = grain.MapDataset.range(size).seed(seed).shuffle().repeat()
    return indices.batch(batch_size, batch_fn=np.array)


def step_batches(
    source: Sequence[dict], layout: Layout, *, seed: int, batch_size: int
) -> StepBatches:
    """Batches whose item n is what step n trains on, packed by `micro_batches`.

    `step_indices` says which records a step sees. Neither the number of processes nor
    `rows_per_micro` changes that, nor which row of the batch a record is in. With several processes
    each reads the lengths of all records once, and then only the records of its rows.
    A record longer than a row is an error of `assign_rows`; the checks before a run rule it out.

    Args:
      layout: of the rows that this process makes (`Layout.on`).
    """
    indices = step_indices(len(source), seed, batch_size)
    return StepBatches(source, indices, _lengths(source, layout.selection), layout)


def put_batch(batch: Batch, mesh: Mesh, rows_per_micro: int) -> Batch:
    """This process's part of a batch as global arrays, rows split over the mesh."""
    rows = rows_sharding(mesh, leading=1)

    def put(x: np.ndarray) -> jax.Array:
        shape = (x.shape[0], rows_per_micro, *x.shape[2:])
        return jax.make_array_from_process_local_data(rows, x, shape)

    # num_micro stays on the host: jit replicates it.
    return batch.replace(**vars(jax.tree.map(put, batch.stacked)))
