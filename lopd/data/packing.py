"""Packing: several responses, with their prompts, in each row of a fixed length.

Layout. A sequence is its prompt followed by its response. A row holds tokens x_0 … x_{n−1} of a
sequence at consecutive offsets and, at the same offsets, the *targets* x_1 … x_n. Everything that
belongs to a response token (mask, weight, log-probabilities) therefore sits where that token is
the target: the offsets P − 1 … P + R − 2 of a sequence with P prompt and R response tokens.
"""

import bisect
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

Arrays = dict[str, np.ndarray]
"""By name, all with the same leading axes."""


class TokenField(NamedTuple):
    """A record's field [R, at least width] of which each response token has `width` values."""

    name: str
    """In the record and in the batch."""
    width: int
    dtype: type
    """In the batch."""


class Span(NamedTuple):
    """Where one response lies in packed rows: row, first target offset, and length."""

    row: int
    start: int
    """In the row."""
    length: int

    def read(self, values: np.ndarray) -> np.ndarray:
        """This response's slice of an array [rows, row_length, ...]."""
        return values[self.row, self.start : self.start + self.length]


def sequence_length(record: Mapping) -> int:
    """Row positions that a record takes: all its tokens but the last, which is only a target."""
    return len(record["prompt_tokens"]) + len(record["response_tokens"]) - 1


def assign_rows(lengths: Sequence[int], row_length: int) -> list[tuple[int, int]]:
    """(row, offset) of every sequence: best fit, longest first, ties by order. Deterministic.

    Raises:
      ValueError: if a sequence is longer than a row.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    free: list[tuple[int, int]] = []  # (space left, row), sorted
    places = [(0, 0)] * len(lengths)
    for i in order:
        length = lengths[i]
        if length > row_length:
            raise ValueError(f"sequence {i} has {length} tokens, rows hold {row_length}")
        fitting = bisect.bisect_left(free, (length, -1))
        space, row = free.pop(fitting) if fitting < len(free) else (row_length, len(free))
        places[i] = (row, row_length - space)
        bisect.insort(free, (space - length, row))
    return places


def fill_rows(
    records: Sequence[Mapping],
    segments: Sequence[int],
    places: Sequence[tuple[int, int]],
    rows: int,
    row_length: int,
    token_fields: Sequence[str | TokenField] = (),
) -> tuple[Arrays, list[Span]]:
    """Lays records out at their places; what `pack` does once it has found the places.

    Args:
      records: as in `pack`.
      segments: the segment id of each, at least 1.
      places: the (row, offset) of each.
      rows: how many rows to make.
      row_length, token_fields: as in `pack`.
    """
    int_fields = ("tokens", "targets", "positions", "segment_ids")
    arrays: Arrays = {name: np.zeros((rows, row_length), np.int32) for name in int_fields}
    arrays["mask"] = np.zeros((rows, row_length), bool)
    scalars = [field for field in token_fields if isinstance(field, str)]
    vectors = [field for field in token_fields if isinstance(field, TokenField)]
    arrays |= {name: np.zeros((rows, row_length), np.float32) for name in scalars}
    arrays |= {f.name: np.zeros((rows, row_length, f.width), f.dtype) for f in vectors}
    spans, positions = [], np.arange(row_length, dtype=np.int32)
    for segment, record, (row, offset) in zip(segments, records, places, strict=True):
        prompt, response = record["prompt_tokens"], record["response_tokens"]
        sequence = np.concatenate([prompt, response])
        length = len(sequence) - 1
        window = row, slice(offset, offset + length)
        arrays["tokens"][window] = sequence[:-1]
        arrays["targets"][window] = sequence[1:]
        arrays["positions"][window] = positions[:length]
        arrays["segment_ids"][window] = segment
        span = Span(row, offset + len(prompt) - 1, len(response))
        span.read(arrays["mask"])[:] = True
        for name in scalars:
            span.read(arrays[name])[:] = record[name]
        for field in vectors:
            span.read(arrays[field.name])[:] = record[field.name][:, : field.width]
        spans.append(span)
    return arrays, spans


def pack(
    records: Sequence[Mapping], row_length: int, token_fields: Sequence[str | TokenField] = ()
) -> tuple[Arrays, list[Span]]:
    """Packs records into as few rows as best fit finds.

    Args:
      records: each with `prompt_tokens` and `response_tokens` (non-empty), and the named fields.
      row_length: positions per row.
      token_fields: names of per-response-token float fields (or scalars, repeated over the
        response) to lay out beside their targets, and fields of several values per token.

    Returns:
      Arrays [rows, row_length]: `tokens`, `targets`, `positions`, `segment_ids` (int32, 0 is
      padding), `mask` (bool, true where the target is a response token) and the token fields
      (float32, or [rows, row_length, width] in a type of their own); and the span of each record,
      in order.
    """
    places = assign_rows([sequence_length(r) for r in records], row_length)
    rows = max(row for row, _ in places) + 1
    segments = range(1, len(records) + 1)
    return fill_rows(records, segments, places, rows, row_length, token_fields)


def pad_rows(arrays: Arrays, rows: int) -> Arrays:
    """Appends rows of padding up to `rows`."""
    return {
        name: np.pad(a, [(0, rows - len(a))] + [(0, 0)] * (a.ndim - 1))
        for name, a in arrays.items()
    }
