"""Objectives as pure functions of log-probabilities: per-token losses, weights and diagnostics.

A loss here is per token and unweighted. The reduction lives in the token weights, which are made
from whole responses before packing: the total Σ weight · loss is then independent of packing,
micro-batching and sharding.

`sampled` holds the losses of the sampled token's log-probability, the method first; `divergences`
those of the teacher's top-K; `token_weights` what a step adds to the weights; `style_baseline` the
target of Lightning OPD 2.0. What the settings choose among them is `lopd.stages.objective`.
"""
