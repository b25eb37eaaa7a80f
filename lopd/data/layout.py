"""How records become a batch, and the batch: packed micro-batches as one typed tree of arrays."""

import dataclasses
from typing import Any, Self

import flax.struct
import jax
import numpy as np
from jax.sharding import Mesh

from lopd.data.packing import TokenField
from lopd.data.selection import ALL_TOKENS, TokenSelection
from lopd.machine.devices import replicated, rows_sharding

RESPONSE_STATS = (
    "responses",
    "positions",
    "positions_squared",
    "response_length",
    "truncated",
    "repetition",
)
"""Columns of `response_stats`: sums over the responses of a packed row.

`positions` are the row positions that a response takes with its prompt; `repetition` is of
`lopd.data.batches.repeated_shares`.
"""

Array = jax.Array | np.ndarray | jax.ShapeDtypeStruct
"""On a device, on the host, or only its shape and type."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the records of a batch are laid out in rows, and what the batch carries of each."""

    row_length: int
    """Positions per packed row."""
    rows_per_micro: int
    """Rows per forward and backward pass."""
    reduction: str
    """How token losses add up (`lopd.data.selection.token_weights`)."""
    token_fields: tuple[str | TokenField, ...] = ()
    """Fields of a record that a loss reads beside its tokens (`lopd.data.packing.pack`)."""
    selection: TokenSelection = ALL_TOKENS
    """Which tokens are trained on."""
    rows: tuple[int, ...] | None = None
    """The rows of each micro-batch that this process makes, ascending; None: all."""

    @property
    def own_rows(self) -> tuple[int, ...]:
        """The rows of each micro-batch that this process makes."""
        return tuple(range(self.rows_per_micro)) if self.rows is None else self.rows

    def on(self, mesh: Mesh) -> Self:
        """The same, for the rows that this process's devices hold."""
        held = rows_sharding(mesh).addressable_devices_indices_map((self.rows_per_micro,))
        rows = np.concatenate([np.arange(self.rows_per_micro)[index] for index in held.values()])
        return dataclasses.replace(self, rows=tuple(np.unique(rows).tolist()))


@flax.struct.dataclass
class MicroBatch:
    """Packed rows [rows, T] of one forward pass: what an objective sees of a batch."""

    tokens: Array
    """int32, the row's tokens."""
    targets: Array
    """int32, the token behind each; what belongs to a response token stands where it is the
    target (`lopd.data.packing`)."""
    positions: Array
    """int32, places within the sequence."""
    segment_ids: Array
    """int32, i + 1 for record i of the batch; 0 is padding."""
    mask: Array
    """bool, where the target is a response token."""
    weights: Array
    """float32, what the target's loss counts for in the whole batch; 0 where not trained on."""
    response_stats: Array
    """float32 [rows, len(RESPONSE_STATS)], sums over the responses of each row."""
    fields: dict[str, Array]
    """Arrays that losses read by name, as in `Layout.token_fields`: [rows, T (, width)]."""


@flax.struct.dataclass
class Batch(MicroBatch):
    """One global batch: arrays as a MicroBatch's with a leading axis M of micro-batches."""

    num_micro: Array
    """int32, how many of the M hold anything; the others are padding."""

    @property
    def most_responses(self) -> int:
        """At least the number of responses in the batch: each might need a row of its own."""
        return self.tokens.shape[0] * self.tokens.shape[1]

    @property
    def stacked(self) -> MicroBatch:
        """All micro-batches, [M, rows, ...]."""
        names = (field.name for field in dataclasses.fields(MicroBatch))
        return MicroBatch(**{name: getattr(self, name) for name in names})

    def micro(self, index: int | jax.Array) -> MicroBatch:
        """One micro-batch; the index may be traced."""
        return jax.tree.map(lambda x: x[index], self.stacked)


def abstract_batch(layout: Layout, micro_batches: int, mesh: Mesh) -> Batch:
    """Shapes, types and shardings of a batch of M micro-batches, to lower a step for."""
    shape = (micro_batches, layout.rows_per_micro, layout.row_length)
    sharding = rows_sharding(mesh, leading=1)

    def array(dtype: Any, shape: tuple[int, ...] = shape) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    fields = {}
    for field in layout.token_fields:
        if isinstance(field, str):
            fields[field] = array(np.float32)
        else:
            fields[field.name] = array(field.dtype, (*shape, field.width))
    return Batch(
        tokens=array(np.int32),
        targets=array(np.int32),
        positions=array(np.int32),
        segment_ids=array(np.int32),
        mask=array(np.bool_),
        weights=array(np.float32),
        response_stats=array(np.float32, (*shape[:2], len(RESPONSE_STATS))),
        fields=fields,
        num_micro=jax.ShapeDtypeStruct((), np.int32, sharding=replicated(mesh)),
    )
