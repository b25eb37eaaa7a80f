"""Costs of a stage's work: seconds, tokens and model FLOPs of each kind of work.

Costs are {kind: {"seconds", "tokens", "flops"}}, the kinds "sampling", "scoring" and "training",
and stand in a stage's outputs. Seconds are wall time with compilation; of a run that was killed,
what is in the result counts, and not what had to be done again. Tokens are those of responses,
once for each model that scores them.
FLOPs are the formula's (`lopd.models.flops`), prompts included.
"""

import json
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from lopd.artefacts.artefact import Artefact
from lopd.artefacts.manifest import Costs
from lopd.data.packing import sequence_length
from lopd.machine import processes
from lopd.models.decoder import DecoderConfig
from lopd.models.flops import training_flops

_UNITS = ("seconds", "tokens", "flops")


def forward(models: Sequence[DecoderConfig], records: Sequence[Mapping], seconds: float) -> dict:
    """The cost of sampling records, or of scoring them, by each of `models`.

    Sampling counts as one forward pass over prompt and response, as its cache spares the rest.
    """
    lengths = np.array([sequence_length(r) for r in records], np.float64)
    positions, squared = float(lengths.sum()), float(np.square(lengths).sum())
    tokens = len(models) * sum(len(r["response_tokens"]) for r in records)
    flops = sum(training_flops(model, positions, squared) / 3 for model in models)
    return dict(zip(_UNITS, (seconds, tokens, flops), strict=True))


def total(parts: Iterable[Costs]) -> Costs:
    """Costs added up, kind by kind."""
    summed: Costs = {}
    for part in parts:
        for kind, cost in part.items():
            before = summed.get(kind, dict.fromkeys(_UNITS, 0))
            summed[kind] = {unit: before[unit] + cost[unit] for unit in _UNITS}
    return summed


def as_columns(costs: Costs) -> dict[str, float]:
    """Costs of one step's batch as columns of metrics.jsonl, which `of_training` reads again."""
    return {f"{kind}_{unit}": x for kind, cost in costs.items() for unit, x in cost.items()}


def _of_row(row: Mapping) -> Costs:
    kinds = [k for k in ("sampling", "scoring") if f"{k}_seconds" in row]
    costs = {kind: {unit: row[f"{kind}_{unit}"] for unit in _UNITS} for kind in kinds}
    training = {unit: row[unit] for unit in _UNITS}
    training["seconds"] -= sum(cost["seconds"] for cost in costs.values())
    return {**costs, "training": training}


def of_training(artefact: Artefact) -> Costs:
    """The costs of a training stage, from the rows that its steps have left.

    To be called by the process that writes them; others get none.
    """
    if not processes.is_main():
        return {}
    lines = (artefact.path / "metrics.jsonl").read_text().splitlines()
    return total(_of_row(json.loads(line)) for line in lines)
