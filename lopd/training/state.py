"""The optimizer and the training state, sharded like the parameters."""

import flax.struct
import jax
import jax.numpy as jnp
import ml_collections
import optax
from jax.sharding import Mesh

from lopd import parallel
from lopd.models import qwen3


@flax.struct.dataclass
class TrainState:
    """Everything a step changes. `step` counts finished optimizer updates."""

    step: jax.Array
    params: qwen3.Params
    opt_state: optax.OptState


def learning_rate_schedule(recipe: ml_collections.ConfigDict) -> optax.Schedule:
    """Linear warm-up, then constant or cosine to zero at the last step."""
    if recipe.schedule == "constant":
        after = optax.constant_schedule(recipe.learning_rate)
    else:
        after = optax.cosine_decay_schedule(
            recipe.learning_rate, max(1, recipe.steps - recipe.warmup_steps)
        )
    warmup = optax.linear_schedule(0.0, recipe.learning_rate, recipe.warmup_steps)
    # optax counts from 0; shift so that the first update already moves.
    joined = optax.join_schedules([warmup, after], [recipe.warmup_steps])
    return lambda count: joined(count + 1 if recipe.warmup_steps else count)


def _decayed(params: qwen3.Params) -> qwen3.Params:
    """True for matrices; norm scales and the embedding are not decayed."""

    def decays(path, _):
        names = jax.tree_util.keystr(path)
        return "norm" not in names and "embed" not in names

    return jax.tree_util.tree_map_with_path(decays, params)


def make_optimizer(recipe: ml_collections.ConfigDict) -> optax.GradientTransformation:
    """AdamW with global-norm clipping, as the paper uses it (arXiv 2604.13010, appendix)."""
    return optax.chain(
        optax.clip_by_global_norm(recipe.grad_clip),
        optax.adamw(
            learning_rate_schedule(recipe),
            b1=recipe.b1,
            b2=recipe.b2,
            eps=recipe.eps,
            weight_decay=recipe.weight_decay,
            mask=_decayed,
        ),
    )


def state_shardings(
    config: qwen3.Qwen3Config, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """The sharding of every leaf of the state; moments lie where their parameter lies."""
    params = parallel.param_shardings(config, mesh)
    replicated = parallel.replicated(mesh)
    opt_state = optax.tree_utils.tree_map_params(
        optimizer,
        lambda _, sharding: sharding,
        jax.eval_shape(optimizer.init, qwen3.abstract_params(config)),
        params,
        transform_non_params=lambda _: replicated,
    )
    return TrainState(replicated, params, opt_state)


def create_state(
    config: qwen3.Qwen3Config,
    optimizer: optax.GradientTransformation,
    params: qwen3.Params,
    mesh: Mesh,
) -> TrainState:
    """A fresh state that starts from `params`."""
    shardings = state_shardings(config, optimizer, mesh)
    opt_state = jax.jit(optimizer.init, out_shardings=shardings.opt_state)(params)
    step = jax.device_put(jnp.zeros((), jnp.int32), shardings.step)
    return TrainState(step, params, opt_state)


def abstract_state(
    config: qwen3.Qwen3Config, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """Shapes, types and shardings of the state, to restore a checkpoint into."""
    params = qwen3.abstract_params(config)
    shapes = TrainState(
        jax.ShapeDtypeStruct((), jnp.int32), params, jax.eval_shape(optimizer.init, params)
    )
    return jax.tree.map(
        lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding),
        shapes,
        state_shardings(config, optimizer, mesh),
    )
