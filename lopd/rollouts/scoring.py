"""From records to the scores of their response tokens: packed rows, one forward pass each.

Shape letters as in `lopd.models.decoder`.
"""

import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from lopd.data.packing import pack, pad_rows
from lopd.machine.devices import rows_sharding
from lopd.machine.sharding import constrain, current_platform, on_mesh
from lopd.models import decoder
from lopd.models.token_scores import TokenScores, token_scores


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def score_rows(
    config: decoder.DecoderConfig, mesh: Mesh, top_k: int, params: decoder.Params, rows: dict
) -> TokenScores:
    """One forward pass over packed rows [B, T] that are split over the mesh.

    Every device gets all scores, so that every process can read them. On CPU each device takes its
    rows one at a time: products of another number of rows would give a row other last bits, and so
    a cache would depend on the mesh and on how many rows share a pass.
    """

    def score(rows):
        hidden, _ = decoder.forward(
            config, params, rows["tokens"], rows["positions"], rows["segment_ids"]
        )
        return token_scores(hidden, decoder.output_head(params), rows["targets"], top_k=top_k)

    with on_mesh(mesh):
        if current_platform() == "cpu":
            devices = mesh.shape["data"] * mesh.shape["fsdp"]
            turns = lambda x: x.reshape(devices, -1, *x.shape[1:]).swapaxes(0, 1)  # noqa: E731
            scores = jax.lax.map(score, jax.tree.map(turns, rows))
            rejoin = lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:])  # noqa: E731
            scores = jax.tree.map(rejoin, scores)
        else:
            scores = score(rows)
        return jax.tree.map(constrain, scores)


def dispatch_records(
    config: decoder.DecoderConfig,
    params: decoder.Params,
    records: Sequence[Mapping],
    *,
    mesh: Mesh,
    row_length: int,
    rows_per_micro: int,
    top_k: int = 0,
) -> Callable[[], list[TokenScores]]:
    """Starts scoring on the devices; calling what it returns waits for the result.

    Args as `score_responses`, and `top_k`, how many of the most likely tokens to report besides.
    The scores of each record are NumPy arrays [R_i] (top-k: [R_i, k]).
    """
    arrays, spans = pack(records, row_length)
    del arrays["mask"]
    arrays = pad_rows(arrays, -(-len(arrays["tokens"]) // rows_per_micro) * rows_per_micro)
    sharding = rows_sharding(mesh)
    scored = []
    for start in range(0, len(arrays["tokens"]), rows_per_micro):
        rows = {name: a[start : start + rows_per_micro] for name, a in arrays.items()}
        scored.append(score_rows(config, mesh, top_k, params, jax.device_put(rows, sharding)))

    def read() -> list[TokenScores]:
        scores = jax.tree.map(lambda *parts: np.concatenate(parts), *jax.device_get(scored))
        return [jax.tree.map(span.read, scores) for span in spans]

    return read


def score_responses(
    config: decoder.DecoderConfig,
    params: decoder.Params,
    records: Sequence[Mapping],
    *,
    mesh: Mesh,
    row_length: int,
    rows_per_micro: int,
) -> list[np.ndarray]:
    """log π(a_t | s_t) of every response token of every record, at temperature 1.

    One packed forward pass, the same one that training runs.

    Args:
      config: the model's shape.
      params: its (stacked) parameters.
      records: each with `prompt_tokens` and `response_tokens`.
      mesh: the devices; rows are split over them.
      row_length: positions per packed row.
      rows_per_micro: rows per forward pass.

    Returns:
      One float32 array [R_i] per record, in order.
    """
    limits = {"mesh": mesh, "row_length": row_length, "rows_per_micro": rows_per_micro}
    return [s.logprobs for s in dispatch_records(config, params, records, **limits)()]
