"""The device mesh, what lies where on it, and the processes that share it."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lopd.errors import UserError
from lopd.models import qwen3
from lopd.sharding import AXES, RULES, spec


def make_mesh(sizes: dict[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of the devices (all by default): axes data, fsdp, tensor; one size may be -1.

    Raises:
      UserError: if the sizes do not multiply to the number of devices.
    """
    shape = [sizes[axis] for axis in AXES]
    devices = jax.devices() if devices is None else devices
    count = len(devices)
    wildcards = shape.count(-1)
    known = int(np.prod([s for s in shape if s != -1]))
    if wildcards == 1 and known > 0 and count % known == 0:
        shape[shape.index(-1)] = count // known
    if min(shape) < 1 or int(np.prod(shape)) != count:
        wanted = ", ".join(f"{axis}={sizes[axis]}" for axis in AXES)
        raise UserError(
            f"mesh {wanted} does not fit {count} devices: the sizes must multiply to "
            f"{count} (one may be -1)"
        )
    types = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(tuple(shape), AXES, axis_types=types, devices=devices)


def check_divisible(config: qwen3.Qwen3Config, mesh: Mesh, what: str) -> None:
    """Refuses a model whose parameters do not split evenly over the mesh.

    Raises:
      UserError: naming the parameter, its axis and the mesh axis.
    """
    axes = jax.tree_util.tree_leaves_with_path(qwen3.logical_axes(config))
    shapes = jax.tree.leaves(qwen3.abstract_params(config))
    for (path, names), leaf in zip(axes, shapes, strict=True):
        for name, size in zip(names, leaf.shape, strict=True):
            mesh_axis = RULES[name]
            if mesh_axis and size % mesh.shape[mesh_axis]:
                raise UserError(
                    f"{what}: {jax.tree_util.keystr(path)} has {name}={size}, which "
                    f"mesh.{mesh_axis}={mesh.shape[mesh_axis]} does not divide"
                )


def param_shardings(config: qwen3.Qwen3Config, mesh: Mesh) -> qwen3.Params:
    """The sharding of every parameter, as a tree like the parameters."""
    return jax.tree.map(
        lambda names: NamedSharding(mesh, spec(*names)),
        qwen3.logical_axes(config),
        is_leaf=lambda x: isinstance(x, PartitionSpec),
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def rows_sharding(mesh: Mesh, leading: int = 0) -> NamedSharding:
    """Arrays whose axis `leading` is rows: split over data and fsdp."""
    return NamedSharding(mesh, spec(*(None,) * leading, "rows"))
