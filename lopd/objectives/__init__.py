"""Objectives as pure functions of log-probabilities: per-token losses, weights and diagnostics.

A loss here is per token and unweighted. The reduction lives in the token weights, which are made
from whole responses before packing: the total Σ weight · loss is then independent of packing,
micro-batching and sharding.

`sampled` holds the losses of the sampled token's log-probability, the method first; `divergences`
those of the teacher's top-K; `weights` which tokens count and how much; `choice` what the settings
of `opd` choose among them.
"""

from lopd.objectives.choice import (
    check_settings,
    make_objective,
    needs_top_k,
    token_fields,
    token_selection,
)
from lopd.objectives.sampled import (
    SEQUENCE_LOG_RATIO,
    Batch,
    Objective,
    cross_entropy,
    huber,
    lightning_opd,
)
from lopd.objectives.weights import ALL_TOKENS, REDUCTIONS, TokenSelection, token_weights

__all__ = [
    "ALL_TOKENS",
    "REDUCTIONS",
    "SEQUENCE_LOG_RATIO",
    "Batch",
    "Objective",
    "TokenSelection",
    "check_settings",
    "cross_entropy",
    "huber",
    "lightning_opd",
    "make_objective",
    "needs_top_k",
    "token_fields",
    "token_selection",
    "token_weights",
]
