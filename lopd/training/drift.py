"""Figures that a run is judged by: scalars of each step and, now and then, the drift panel.

Importance weights are w = π_θ / π_ref. On the responses that are trained on, a mean below 1
measures memorisation; on fresh ones sampled from π_ref at T = 1, E[w] = 1 for every θ, and the
spread of w measures how far π_θ has drifted: the variance of w is χ²(π_θ‖π_ref), which the bounds
on the gap to on-policy training go by (arXiv 2604.13010).
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lopd.data.batches import micro_batches, put_batch
from lopd.data.layout import Batch, Layout, MicroBatch
from lopd.machine.devices import replicated
from lopd.machine.sharding import on_mesh
from lopd.models import decoder
from lopd.objectives.sampled import SEQUENCE_LOG_RATIO, Objective
from lopd.training.step import (
    Metrics,
    forward_scores,
    named_stats,
    score_sums,
    sequence_sums,
    sum_over_micro_batches,
    token_means,
)

ADVANTAGE_EDGES = np.linspace(-5, 5, 41)
"""Of the histogram, in nats; what lies beyond is counted in the outermost bins."""
POSITION_BINS = 20
"""Of the per-position curves: equal parts of each response."""
BY_POSITION = ("advantage", "kl_teacher", "kl_ref", "entropy")
"""The diagnostics that have such a curve, as NAME_by_position."""
_RESAMPLES = 1000


def ess_fraction(log_weights: np.ndarray, axis: int = -1) -> np.ndarray:
    """(Σw)² / (n Σw²), the effective share of a sample, from log w in float64.

    1 / ess_fraction − 1 estimates χ²(π_θ‖π_ref), with the weights normalised to mean 1.
    """
    log_weights = np.asarray(log_weights, np.float64)
    weights = np.exp(log_weights - log_weights.max(axis=axis, keepdims=True))
    total, squares = weights.sum(axis=axis), np.square(weights).sum(axis=axis)
    return np.square(total) / (log_weights.shape[axis] * squares)


def _mean_weight(log_weights: np.ndarray) -> np.ndarray:
    return np.exp(np.minimum(log_weights, 700.0)).mean(axis=-1)  # e^700 is still a float64


def sequence_intervals(log_weights: np.ndarray) -> dict:
    """Mean weight, ESS fraction and χ² over whole responses, with 95 % bootstrap intervals."""
    log_weights = np.asarray(log_weights, np.float64)
    size = len(log_weights)
    drawn = log_weights[np.random.default_rng(0).integers(0, size, (_RESAMPLES, size))]
    statistics = {
        "sequence_weight": _mean_weight,
        "ess_fraction": ess_fraction,
        "chi2": lambda x: 1 / ess_fraction(x) - 1,
    }
    row = {}
    for name, statistic in statistics.items():
        row[name] = float(statistic(log_weights))
        row[f"{name}_ci95"] = np.percentile(statistic(drawn), [2.5, 97.5]).tolist()
    return row


def scalars(metrics: dict[str, np.ndarray]) -> dict[str, float]:
    """The flat row of a step (or of a panel) from what it left on the device.

    Squares become standard deviations over tokens, sums over responses become means, and the
    log-ratios of whole responses ESS fraction and χ².
    """
    metrics = dict(metrics)
    responses = int(metrics.pop("responses"))
    for name in ("response_length", "truncated", "repetition"):
        metrics[name] = metrics[name] / responses
    for name in ("positions", "positions_squared"):
        del metrics[name]
    row = {}
    for name, x in metrics.items():
        if name == SEQUENCE_LOG_RATIO:
            fraction = float(ess_fraction(x[:responses]))
            row |= {"ess_fraction": fraction, "chi2": 1 / fraction - 1}
        elif name.endswith("_squared"):
            mean = float(metrics[name.removesuffix("_squared")])
            variance = max(0.0, float(x) - mean**2)
            row[name.replace("_squared", "_sd")] = variance**0.5
        else:
            row[name] = float(x)
    return row


def _panel_sums(objective: Objective, scores, micro: MicroBatch, responses: int) -> dict:
    """Sums over one micro-batch: those of a step, a histogram, and curves over positions."""
    loss, sums = score_sums(objective, scores, micro, responses)
    mask = micro.mask.astype(jnp.float32)
    diagnostics = objective(scores, micro)[1]
    edges, bins = ADVANTAGE_EDGES, len(ADVANTAGE_EDGES) - 1
    column = jnp.clip(
        jnp.searchsorted(jnp.asarray(edges), diagnostics["advantage"], side="right") - 1,
        0,
        bins - 1,
    )
    # In which part of its response each target lies.
    segment, far = micro.segment_ids, jnp.iinfo(jnp.int32).max
    length = sequence_sums(jnp.ones_like(mask), micro, responses)
    first = (
        jnp.full(responses + 1, far).at[segment].min(jnp.where(micro.mask, micro.positions, far))
    )
    place = (micro.positions - first[segment]) * POSITION_BINS
    part = place // jnp.maximum(length[segment - 1].astype(jnp.int32), 1)
    part = jnp.clip(part, 0, POSITION_BINS - 1)
    by_position = {
        name: jnp.zeros(POSITION_BINS).at[part].add(jnp.where(micro.mask, diagnostics[name], 0))
        for name in BY_POSITION
    }
    return {
        "sums": {**sums, "loss": loss},
        "histogram": jnp.zeros(bins).at[column].add(mask),
        "position_counts": jnp.zeros(POSITION_BINS).at[part].add(mask),
        "by_position": by_position,
    }


def make_panel(
    config: decoder.DecoderConfig, objective: Objective, mesh: Mesh
) -> Callable[[decoder.Params, Batch], dict]:
    """A jitted evaluation of a batch, without gradients, by `panel_row` for people."""

    def panel(params: decoder.Params, batch: Batch) -> dict:

        def look(micro: MicroBatch) -> dict:
            scores = forward_scores(config, params, micro)
            return _panel_sums(objective, scores, micro, batch.most_responses)

        with on_mesh(mesh):
            found = sum_over_micro_batches(look, batch)
        metrics: Metrics = token_means(found.pop("sums")) | named_stats(batch)
        return {"metrics": metrics, **found}

    return jax.jit(panel, out_shardings=replicated(mesh))


def panel_row(step: int, train: dict, heldout: dict | None) -> dict:
    """One line of drift.jsonl from what the panel left on the device for both batches.

    Like the row of metrics.jsonl it shows the parameters that the step started from.
    """
    if heldout is not None:
        metrics = heldout["metrics"]
        sequences = int(metrics["responses"])
        heldout = {
            **scalars(metrics),
            **sequence_intervals(metrics[SEQUENCE_LOG_RATIO][:sequences]),
            "sequences": sequences,
        }
    counts = train["position_counts"]
    return {
        "step": step,
        "heldout": heldout,
        "advantage_histogram": {
            "edges": ADVANTAGE_EDGES.tolist(),
            "counts": train["histogram"].astype(int).tolist(),
        },
        **{
            f"{name}_by_position": (sums / np.maximum(counts, 1)).tolist()
            for name, sums in train["by_position"].items()
        },
        "position_counts": counts.astype(int).tolist(),
    }


@dataclasses.dataclass(frozen=True)
class Drift:
    """The drift panel of one run: its program, and the held-out responses if there are any."""

    panel: Callable[[decoder.Params, Batch], dict]
    every: int
    """Steps between looks."""
    heldout: Batch | None
    """The held-out responses as one batch; None: there are none."""
    first: int = 0
    """A step that is looked at besides: a round's first, where π_θ still is the π_ref of its
    responses."""

    def look(self, params: decoder.Params, batch: Batch) -> tuple[dict, dict | None]:
        """Dispatches the panel on the step's batch and on the held-out one; waits for neither."""
        heldout = None if self.heldout is None else self.panel(params, self.heldout)
        return self.panel(params, batch), heldout


def make_drift(
    config: decoder.DecoderConfig,
    objective: Objective,
    mesh: Mesh,
    *,
    every: int,
    heldout: Sequence[dict] | None,
    layout: Layout,
) -> Drift:
    """The drift panel; `heldout` are records as those of the cache, packed by `layout` once."""
    batch = None if heldout is None else heldout_batch(heldout, mesh, layout)
    return Drift(make_panel(config, objective, mesh), every, batch)


def heldout_batch(heldout: Sequence[dict], mesh: Mesh, layout: Layout) -> Batch:
    """Held-out records as `Drift.heldout`; args as `make_drift`'s."""
    return put_batch(micro_batches(heldout, layout.on(mesh)), mesh, layout.rows_per_micro)
