"""The one jitted training step, for SFT and OPD alike: only the objective differs."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from lopd.models import qwen3
from lopd.models.sharding import on_mesh
from lopd.objectives import Batch, Objective
from lopd.parallel import replicated
from lopd.scoring import token_scores
from lopd.training.state import TrainState, state_shardings

Metrics = dict[str, jax.Array]


def micro_loss(
    config: qwen3.Qwen3Config,
    objective: Objective,
    params: qwen3.Params,
    micro: Batch,
    remat: str = "full",
) -> tuple[jax.Array, Metrics]:
    """Σ weight · loss of one micro-batch, and the sums of its diagnostics over masked tokens."""
    hidden, _ = qwen3.forward(
        config, params, micro["tokens"], micro["positions"], micro["segment_ids"], remat=remat
    )
    scores = token_scores(hidden, qwen3.output_head(params), micro["targets"])
    loss, diagnostics = objective(scores, micro)
    mask = micro["mask"]
    sums = {name: jnp.sum(jnp.where(mask, x, 0)) for name, x in diagnostics.items()}
    sums = {name: x.astype(jnp.float32) for name, x in sums.items()}
    sums["tokens"] = jnp.sum(mask, dtype=jnp.float32)
    return jnp.sum(jnp.where(mask, micro["weights"] * loss, 0)), sums


def batch_gradients(
    config: qwen3.Qwen3Config,
    objective: Objective,
    params: qwen3.Params,
    batch: Batch,
    remat: str = "full",
) -> tuple[qwen3.Params, Metrics]:
    """Gradient and metrics of one global batch, accumulated over its used micro-batches.

    The loop runs `num_micro` times, a value and not a shape: a batch that packs into fewer rows
    costs less and compiles nothing. All sums are float32. Each layer's gradient is added where
    the total lies, so that no second copy of the gradients exists.
    """
    micro_batches = {name: x for name, x in batch.items() if name != "num_micro"}
    first = jax.tree.map(lambda x: x[0], micro_batches)
    loss_of = lambda params, micro: micro_loss(config, objective, params, micro, remat)  # noqa: E731
    if len(batch["tokens"]) == 1:
        # Nothing to add up, so gradients stay in the type they are computed in until they are used.
        cast = qwen3.compute_params(config, params)
        (loss, sums), grads = jax.value_and_grad(loss_of, has_aux=True)(cast, first)
        grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
    else:
        totals = jax.tree.map(lambda x: jax.new_ref(jnp.zeros_like(x)), params)

        def accumulate(i, sums):
            micro = jax.tree.map(lambda x: x[i], micro_batches)
            loss, backward, more = jax.vjp(lambda p: loss_of(p, micro), params, has_aux=True)
            backward.with_refs(totals)(jnp.ones_like(loss))
            return jax.tree.map(jnp.add, sums, (loss, more))

        shapes = jax.eval_shape(loss_of, params, first)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        loss, sums = jax.lax.fori_loop(0, batch["num_micro"], accumulate, zeros)
        grads = jax.tree.map(jax.freeze, totals)
    tokens = sums.pop("tokens")
    metrics = {name: x / tokens for name, x in sums.items()}
    return grads, {"loss": loss, **metrics, "tokens": tokens}


def make_train_step(
    config: qwen3.Qwen3Config,
    optimizer: optax.GradientTransformation,
    objective: Objective,
    mesh: Mesh,
    remat: str = "full",
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """One optimizer update on one global batch; the state is donated.

    `remat` is what the backward pass keeps, a key of `qwen3.REMAT_POLICIES`.
    """

    def step(state: TrainState, batch: Batch):
        with on_mesh(mesh):
            grads, metrics = batch_gradients(config, objective, state.params, batch, remat)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics["grad_norm"] = optax.tree.norm(grads)
        return TrainState(state.step + 1, params, opt_state), metrics

    shardings = state_shardings(config, optimizer, mesh)
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, replicated(mesh)))
