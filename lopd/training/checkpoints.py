"""Checkpoints and finished weights, both by Orbax."""

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import Mesh

from lopd import parallel
from lopd.models import qwen3


def open_manager(directory: epath.Path, every: int) -> ocp.CheckpointManager:
    """Asynchronous, atomic checkpoints of the training state; the newest two are kept."""
    options = ocp.CheckpointManagerOptions(
        max_to_keep=2, save_interval_steps=every, enable_async_checkpointing=True
    )
    return ocp.CheckpointManager(directory, options=options)


def save_params(path: epath.Path, params: qwen3.Params) -> None:
    """Writes finished weights; the directory appears only when it is whole."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, params, force=True)


def load_params(path: epath.Path, config: qwen3.Qwen3Config, mesh: Mesh) -> qwen3.Params:
    """Reads finished weights straight into their sharding on the mesh."""
    target = jax.tree.map(
        lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding),
        qwen3.abstract_params(config),
        parallel.param_shardings(config, mesh),
    )
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path, target)


def save_state(manager: ocp.CheckpointManager, step: int, state) -> None:
    """Starts saving; returns once the arrays are off the devices, so they may be donated."""
    manager.save(step, args=ocp.args.StandardSave(state))


def restore_state(manager: ocp.CheckpointManager, step: int, abstract):
    """The training state of that step, in the shardings of `abstract`."""
    return manager.restore(step, args=ocp.args.StandardRestore(abstract))
