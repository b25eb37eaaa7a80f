"""The one jitted training step, for SFT and OPD alike: only the objective differs."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from lopd.data.layout import RESPONSE_STATS, Batch, MicroBatch
from lopd.machine.devices import replicated
from lopd.machine.sharding import on_mesh
from lopd.models import decoder
from lopd.models.token_scores import TokenScores, token_scores
from lopd.objectives.sampled import SEQUENCE_LOG_RATIO, Objective
from lopd.training.state import TrainState, state_shardings
from lopd.training.trees import merged, part_of

Metrics = dict[str, jax.Array]
"""Sums or means over a batch, by name."""

_NOT_MEANS = ("loss", "router_loss", "tokens", SEQUENCE_LOG_RATIO)


def _token_scores(params: decoder.Params, hidden_BTD: jax.Array, micro: MicroBatch) -> TokenScores:
    """Scores of the targets and, where a batch carries the teacher's top-K, of these tokens."""
    head, at_ids = decoder.output_head(params), micro.fields.get("teacher_topk_ids")
    return token_scores(hidden_BTD, head, micro.targets, at_ids_BTK=at_ids)


def forward_scores(
    config: decoder.DecoderConfig, params: decoder.Params, micro: MicroBatch
) -> TokenScores:
    """The model's scores of each target of a micro-batch; keeps nothing for a gradient."""
    hidden, _ = decoder.forward(config, params, micro.tokens, micro.positions, micro.segment_ids)
    return _token_scores(params, hidden, micro)


def score_sums(
    objective: Objective, scores: TokenScores, micro: MicroBatch, responses: int
) -> tuple[jax.Array, Metrics]:
    """Σ weight · loss of one micro-batch, and the sums of its diagnostics over masked tokens.

    Args:
      responses: at least the number of responses in the whole batch.
    """
    token_loss, diagnostics = objective(scores, micro)
    mask, log_ratio = micro.mask, diagnostics.pop(SEQUENCE_LOG_RATIO, None)
    sums = {name: jnp.sum(jnp.where(mask, x, 0)) for name, x in diagnostics.items()}
    sums = {name: x.astype(jnp.float32) for name, x in sums.items()}
    sums["tokens"] = jnp.sum(mask, dtype=jnp.float32)
    if log_ratio is not None:
        sums[SEQUENCE_LOG_RATIO] = sequence_sums(log_ratio, micro, responses)
    return jnp.sum(jnp.where(mask, micro.weights * token_loss, 0)), sums


def micro_loss(
    config: decoder.DecoderConfig,
    objective: Objective,
    params: decoder.Params,
    micro: MicroBatch,
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
    inputs = (config, params, micro.tokens, micro.positions, micro.segment_ids)
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


def sequence_sums(values: jax.Array, micro: MicroBatch, responses: int) -> jax.Array:
    """Σ over the tokens of each response, float32 [responses], by its place in the batch.

    Responses of other micro-batches are 0.
    """
    values = jnp.where(micro.mask, values, 0)
    return jnp.zeros(responses + 1).at[micro.segment_ids].add(values)[1:]


def sum_over_micro_batches(
    function: Callable[[MicroBatch], Any], batch: Batch, shapes: Any = None
) -> Any:
    """Σ function(micro-batch) over the used micro-batches of a batch, in order.

    The loop runs `num_micro` times, a value and not a shape: a batch that packs into fewer rows
    costs less and compiles nothing. `shapes` are those of the function's result; needed only
    where it may not be traced twice.
    """

    def accumulate(i, total):
        return jax.tree.map(jnp.add, total, function(batch.micro(i)))

    if shapes is None:
        shapes = jax.eval_shape(function, batch.micro(0))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.fori_loop(0, batch.num_micro, accumulate, zeros)


def token_means(sums: Metrics) -> Metrics:
    """Sums over a batch as means over its tokens, but for what is no sum over tokens."""
    tokens = sums["tokens"]
    return {name: x if name in _NOT_MEANS else x / tokens for name, x in sums.items()}


def named_stats(batch: Batch) -> Metrics:
    """The sums of `response_stats` over a batch, by name."""
    return dict(zip(RESPONSE_STATS, batch.response_stats.sum(axis=(0, 1)), strict=True))


def batch_gradients(
    config: decoder.DecoderConfig,
    objective: Objective,
    trainable: decoder.Params,
    batch: Batch,
    remat: str = "full",
    router_coefficient: float = 0.0,
    frozen: decoder.Params | None = None,
) -> tuple[decoder.Params, Metrics]:
    """Gradient and metrics of one global batch, accumulated over its used micro-batches.

    All sums are float32. Each layer's gradient is added where the total lies, so that no second
    copy of the gradients exists. The router's loss, when it has a coefficient, is the mean over
    the micro-batches.

    Args:
      config: the model's shape.
      objective: the per-token loss.
      trainable: the parameters that have a gradient.
      batch: what it is of.
      remat: what the backward pass keeps, a key of `decoder.REMAT_POLICIES`.
      router_coefficient: weight of a mixture of experts' load-balancing loss.
      frozen: the model's other parameters.

    Returns:
      The gradient, a tree like `trainable`; and `loss`, the token mean of each diagnostic,
      `tokens`, the sums of `response_stats` by name, and (when the objective has it) each
      response's Σ log-ratio to π_ref under SEQUENCE_LOG_RATIO, padded with zeros.
    """
    router_weight = router_coefficient / batch.num_micro if router_coefficient else None
    options = dict(responses=batch.most_responses, remat=remat, router_weight=router_weight)

    def loss_of(trainable, frozen, micro):
        return micro_loss(config, objective, merged(trainable, frozen), micro, **options)

    if len(batch.tokens) == 1:
        # Nothing to add up, so gradients stay in the type they are computed in until they are used.
        cast = decoder.compute_params(config, merged(trainable, frozen))
        trained, still = (part_of(cast, tree) for tree in (trainable, frozen or {}))
        grads, sums = jax.grad(loss_of, has_aux=True)(trained, still, batch.micro(0))
        grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
    else:
        totals = jax.tree.map(lambda x: jax.new_ref(jnp.zeros_like(x)), trainable)

        def accumulate(micro: MicroBatch) -> Metrics:
            loss, backward, sums = jax.vjp(
                lambda trainable: loss_of(trainable, frozen, micro), trainable, has_aux=True
            )
            backward.with_refs(totals)(jnp.ones_like(loss))
            return sums

        shapes = jax.eval_shape(loss_of, trainable, frozen, batch.micro(0))[1]
        sums = sum_over_micro_batches(accumulate, batch, shapes)
        grads = jax.tree.map(jax.freeze, totals)
    return grads, token_means(sums) | named_stats(batch)


def make_train_step(
    config: decoder.DecoderConfig,
    optimizer: optax.GradientTransformation,
    objective: Objective,
    trainable: decoder.Params,
    mesh: Mesh,
    remat: str = "full",
    router_coefficient: float = 0.0,
) -> Callable[[TrainState, decoder.Params, Batch], tuple[TrainState, Metrics]]:
    """One optimizer update on one global batch, of (state, frozen parameters, batch).

    The state is donated, the frozen parameters ({} for none) are not. An update whose loss or
    gradient is not finite is not made, and none after it: the state stays that of the last good
    step, for the caller to save and examine.

    Args:
      config, objective, remat, router_coefficient: as `batch_gradients`'.
      optimizer: from `make_optimizer`.
      trainable: arrays, or their shapes, like the state's, each with its sharding.
      mesh: the devices.
    """

    def step(state: TrainState, frozen: decoder.Params, batch: Batch):
        with on_mesh(mesh):
            grads, metrics = batch_gradients(
                config, objective, state.params, batch, remat, router_coefficient, frozen
            )
        metrics["grad_norm"] = optax.tree.norm(grads)
        finite = state.finite & jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        updated = TrainState(
            state.step + 1, finite, optax.apply_updates(state.params, updates), opt_state
        )
        kept = state.replace(finite=finite)
        return jax.tree.map(lambda new, old: jnp.where(finite, new, old), updated, kept), metrics

    shardings = state_shardings(optimizer, trainable, mesh)
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, replicated(mesh)))
