"""The one jitted training step, for SFT and OPD alike: only the objective differs."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from lopd.data.batches import RESPONSE_STATS
from lopd.machine.devices import replicated
from lopd.machine.sharding import on_mesh
from lopd.models import decoder
from lopd.models.token_scores import TokenScores, token_scores
from lopd.objectives.sampled import SEQUENCE_LOG_RATIO, Batch, Objective
from lopd.training.state import TrainState, state_shardings

Metrics = dict[str, jax.Array]
"""Sums or means over a batch, by name."""

_NOT_MEANS = ("loss", "router_loss", "tokens", SEQUENCE_LOG_RATIO)


def _token_scores(params: decoder.Params, hidden_BTD: jax.Array, micro: Batch) -> TokenScores:
    """Scores of the targets and, where a batch carries the teacher's top-K, of these tokens."""
    head, at_ids = decoder.output_head(params), micro.get("teacher_topk_ids")
    return token_scores(hidden_BTD, head, micro["targets"], at_ids_BTK=at_ids)


def forward_scores(
    config: decoder.DecoderConfig, params: decoder.Params, micro: Batch
) -> TokenScores:
    """What the model says of each target of a micro-batch; keeps nothing for a gradient."""
    hidden, _ = decoder.forward(
        config, params, micro["tokens"], micro["positions"], micro["segment_ids"]
    )
    return _token_scores(params, hidden, micro)


def score_sums(
    objective: Objective, scores: TokenScores, micro: Batch, responses: int
) -> tuple[jax.Array, Metrics]:
    """Σ weight · loss of one micro-batch, and the sums of its diagnostics over masked tokens.

    Args:
      responses: at least the number of responses in the whole batch.
    """
    token_loss, diagnostics = objective(scores, micro)
    mask, log_ratio = micro["mask"], diagnostics.pop(SEQUENCE_LOG_RATIO, None)
    sums = {name: jnp.sum(jnp.where(mask, x, 0)) for name, x in diagnostics.items()}
    sums = {name: x.astype(jnp.float32) for name, x in sums.items()}
    sums["tokens"] = jnp.sum(mask, dtype=jnp.float32)
    if log_ratio is not None:
        sums[SEQUENCE_LOG_RATIO] = sequence_sums(log_ratio, micro, responses)
    return jnp.sum(jnp.where(mask, micro["weights"] * token_loss, 0)), sums


def micro_loss(
    config: decoder.DecoderConfig,
    objective: Objective,
    params: decoder.Params,
    micro: Batch,
    *,
    responses: int,
    remat: str = "full",
    router_weight: jax.Array | None = None,
) -> tuple[jax.Array, Metrics]:
    """`score_sums` of the training forward pass, with `loss` among the sums.

    Args:
      remat: what the backward pass keeps, a key of `decoder.REMAT_POLICIES`.
      router_weight: if given, what the router's load-balancing loss is multiplied by and added to
        what is differentiated; the `loss` among the sums stays without it.
    """
    inputs = (config, params, micro["tokens"], micro["positions"], micro["segment_ids"])
    if router_weight is None:
        hidden, router_loss = decoder.forward(*inputs, remat=remat)[0], None
    else:
        hidden, router_loss = decoder.forward_with_router_loss(*inputs, remat=remat)
    scores = _token_scores(params, hidden, micro)
    loss, sums = score_sums(objective, scores, micro, responses)
    sums["loss"] = loss
    if router_loss is not None:
        sums["router_loss"] = router_weight * router_loss
        loss += sums["router_loss"]
    return loss, sums


def sequence_sums(values: jax.Array, micro: Batch, responses: int) -> jax.Array:
    """Σ over the tokens of each response, float32 [responses], by its place in the batch.

    Responses of other micro-batches are 0.
    """
    values = jnp.where(micro["mask"], values, 0)
    return jnp.zeros(responses + 1).at[micro["segment_ids"]].add(values)[1:]


def first_micro_batch(batch: Batch) -> Batch:
    """The first of a batch's micro-batches."""
    return {name: x[0] for name, x in batch.items() if name != "num_micro"}


def sum_over_micro_batches(
    function: Callable[[Batch], Any], batch: Batch, shapes: Any = None
) -> Any:
    """Σ function(micro-batch) over the used micro-batches of a batch, in order.

    The loop runs `num_micro` times, a value and not a shape: a batch that packs into fewer rows
    costs less and compiles nothing. `shapes` are those of the function's result; needed only
    where it may not be traced twice.
    """
    micro_batches = {name: x for name, x in batch.items() if name != "num_micro"}

    def accumulate(i, total):
        micro = jax.tree.map(lambda x: x[i], micro_batches)
        return jax.tree.map(jnp.add, total, function(micro))

    if shapes is None:
        shapes = jax.eval_shape(function, first_micro_batch(batch))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.fori_loop(0, batch["num_micro"], accumulate, zeros)


def token_means(sums: Metrics) -> Metrics:
    """Sums over a batch as means over its tokens, but for what is no sum over tokens."""
    tokens = sums["tokens"]
    return {name: x if name in _NOT_MEANS else x / tokens for name, x in sums.items()}


def named_stats(batch: Batch) -> Metrics:
    """The sums of `response_stats` over a batch, by name."""
    return dict(zip(RESPONSE_STATS, batch["response_stats"].sum(axis=(0, 1)), strict=True))


def batch_gradients(
    config: decoder.DecoderConfig,
    objective: Objective,
    params: decoder.Params,
    batch: Batch,
    remat: str = "full",
    router_coefficient: float = 0.0,
) -> tuple[decoder.Params, Metrics]:
    """Gradient and metrics of one global batch, accumulated over its used micro-batches.

    All sums are float32. Each layer's gradient is added where the total lies, so that no second
    copy of the gradients exists. The router's loss, when it has a coefficient, is the mean over
    the micro-batches.

    Returns:
      The gradient; and `loss`, the token mean of each diagnostic, `tokens`, the sums of
      `response_stats` by name, and (when the objective has it) each response's Σ log-ratio to
      π_ref under SEQUENCE_LOG_RATIO, padded with zeros.
    """
    router_weight = router_coefficient / batch["num_micro"] if router_coefficient else None
    responses = batch["tokens"].shape[0] * batch["tokens"].shape[1]
    loss_of = functools.partial(
        micro_loss, config, objective, responses=responses, remat=remat, router_weight=router_weight
    )
    first = first_micro_batch(batch)
    if len(batch["tokens"]) == 1:
        # Nothing to add up, so gradients stay in the type they are computed in until they are used.
        cast = decoder.compute_params(config, params)
        grads, sums = jax.grad(loss_of, has_aux=True)(cast, first)
        grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
    else:
        totals = jax.tree.map(lambda x: jax.new_ref(jnp.zeros_like(x)), params)

        def accumulate(micro: Batch) -> Metrics:
            loss, backward, sums = jax.vjp(lambda p: loss_of(p, micro), params, has_aux=True)
            backward.with_refs(totals)(jnp.ones_like(loss))
            return sums

        shapes = jax.eval_shape(loss_of, params, first)[1]
        sums = sum_over_micro_batches(accumulate, batch, shapes)
        grads = jax.tree.map(jax.freeze, totals)
    return grads, token_means(sums) | named_stats(batch)


def make_train_step(
    config: decoder.DecoderConfig,
    optimizer: optax.GradientTransformation,
    objective: Objective,
    mesh: Mesh,
    remat: str = "full",
    router_coefficient: float = 0.0,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """One optimizer update on one global batch; the state is donated.

    `remat` is what the backward pass keeps, a key of `decoder.REMAT_POLICIES`.

    An update whose loss or gradient is not finite is not made, and none after it: the state
    stays that of the last good step, for the caller to save and look at.
    """

    def step(state: TrainState, batch: Batch):
        with on_mesh(mesh):
            grads, metrics = batch_gradients(
                config, objective, state.params, batch, remat, router_coefficient
            )
        metrics["grad_norm"] = optax.tree.norm(grads)
        finite = state.finite & jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        updated = TrainState(
            state.step + 1, finite, optax.apply_updates(state.params, updates), opt_state
        )
        kept = state.replace(finite=finite)
        return jax.tree.map(lambda new, old: jnp.where(finite, new, old), updated, kept), metrics

    shardings = state_shardings(config, optimizer, mesh)
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, replicated(mesh)))
