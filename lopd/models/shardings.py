"""Where a decoder's parameters lie on a mesh."""

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lopd.errors import UserError
from lopd.machine.sharding import RULES, spec
from lopd.models import decoder


def check_divisible(config: decoder.DecoderConfig, mesh: Mesh, what: str) -> None:
    """Refuses a model whose parameters do not split evenly over the mesh.

    Raises:
      UserError: naming the parameter, its axis and the mesh axis.
    """
    axes = jax.tree_util.tree_leaves_with_path(decoder.logical_axes(config))
    shapes = jax.tree.leaves(decoder.abstract_params(config))
    for (path, names), leaf in zip(axes, shapes, strict=True):
        for name, size in zip(names, leaf.shape, strict=True):
            mesh_axis = RULES[name]
            if mesh_axis and size % mesh.shape[mesh_axis]:
                raise UserError(
                    f"{what}: {jax.tree_util.keystr(path)} has {name}={size}, which "
                    f"mesh.{mesh_axis}={mesh.shape[mesh_axis]} does not divide"
                )


def param_shardings(config: decoder.DecoderConfig, mesh: Mesh) -> decoder.Params:
    """The sharding of every parameter, as a tree like the parameters."""
    return jax.tree.map(
        lambda names: NamedSharding(mesh, spec(*names)),
        decoder.logical_axes(config),
        is_leaf=lambda x: isinstance(x, PartitionSpec),
    )
