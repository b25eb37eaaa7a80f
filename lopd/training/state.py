"""The optimizer and the training state; both follow from the tree that is trained."""

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lopd.config.settings import TrainingRecipe
from lopd.machine import devices
from lopd.models import decoder
from lopd.models.parameters import decay_mask


@flax.struct.dataclass
class TrainState:
    """Everything a step changes."""

    step: jax.Array
    """int32, the finished optimizer updates."""
    finite: jax.Array
    """bool, false from the first non-finite loss or gradient on; then nothing changes any more,
    until a run goes on from the saved state."""
    params: decoder.Params
    """The trainable ones."""
    opt_state: optax.OptState


def learning_rate_schedule(recipe: TrainingRecipe) -> optax.Schedule:
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


def make_optimizer(recipe: TrainingRecipe) -> optax.GradientTransformation:
    """Global-norm clipping, then AdamW as the paper uses it (arXiv 2604.13010, appendix).

    To save memory: `mu_dtype="bfloat16"` halves AdamW's first moment, and `optimizer="adafactor"`
    keeps only row and column sums of the second (arXiv 1804.04235), with update clipping at 1 and
    without momentum. Its learning rate stays absolute, not relative to the size of the parameter.
    """
    schedule = learning_rate_schedule(recipe)
    if recipe.optimizer == "adamw":
        update = optax.adamw(
            schedule,
            b1=recipe.b1,
            b2=recipe.b2,
            eps=recipe.eps,
            weight_decay=recipe.weight_decay,
            mask=decay_mask,
            mu_dtype=recipe.mu_dtype,
        )
    else:
        update = optax.chain(
            optax.scale_by_factored_rms(),
            optax.clip_by_block_rms(1.0),
            optax.add_decayed_weights(recipe.weight_decay, mask=decay_mask),
            optax.scale_by_learning_rate(schedule),
        )
    return optax.chain(optax.clip_by_global_norm(recipe.grad_clip), update)


def _moment_sharding(moment, param, sharding: NamedSharding) -> NamedSharding:
    """Where an optimizer's array lies: beside its parameter, also when one axis is summed away."""
    if moment.shape == param.shape:
        return sharding
    axes = tuple(sharding.spec) + (None,) * (param.ndim - len(sharding.spec))
    for summed in range(param.ndim):
        if moment.shape == param.shape[:summed] + param.shape[summed + 1 :]:
            return NamedSharding(sharding.mesh, P(*axes[:summed], *axes[summed + 1 :]))
    return NamedSharding(sharding.mesh, P())


def state_shardings(
    optimizer: optax.GradientTransformation, trainable: decoder.Params, mesh: Mesh
) -> TrainState:
    """The sharding of every leaf of the state; moments lie where their parameter lies.

    Args:
      optimizer: from `make_optimizer`.
      trainable: arrays, or their shapes, each with its NamedSharding on the mesh.
      mesh: the devices.
    """
    shardings = jax.tree.map(lambda x: x.sharding, trainable)
    replicated = devices.replicated(mesh)
    opt_state = optax.tree_utils.tree_map_params(
        optimizer,
        _moment_sharding,
        jax.eval_shape(optimizer.init, trainable),
        trainable,
        shardings,
        transform_non_params=lambda _: replicated,
    )
    return TrainState(replicated, replicated, shardings, opt_state)


def create_state(
    optimizer: optax.GradientTransformation, trainable: decoder.Params, mesh: Mesh
) -> TrainState:
    """A fresh state that starts from `trainable`; args as `state_shardings`'."""
    shardings = state_shardings(optimizer, trainable, mesh)
    opt_state = jax.jit(optimizer.init, out_shardings=shardings.opt_state)(trainable)
    scalars = jax.jit(
        lambda: (jnp.zeros((), jnp.int32), jnp.ones((), bool)),
        out_shardings=(shardings.step, shardings.finite),
    )()
    return TrainState(*scalars, trainable, opt_state)


def abstract_state(
    optimizer: optax.GradientTransformation, trainable: decoder.Params, mesh: Mesh
) -> TrainState:
    """Shapes, types and shardings of the state, to restore a checkpoint into.

    Args as `state_shardings`'.
    """
    shapes = TrainState(
        jax.ShapeDtypeStruct((), jnp.int32),
        jax.ShapeDtypeStruct((), jnp.bool),
        jax.eval_shape(lambda x: x, trainable),
        jax.eval_shape(optimizer.init, trainable),
    )
    return devices.with_shardings(shapes, state_shardings(optimizer, trainable, mesh))
