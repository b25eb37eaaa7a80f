"""Where a decoder's parameters lie on a mesh."""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lopd.errors import UserError
from lopd.machine.sharding import RULES, spec
from lopd.models.decoder_config import DecoderConfig
from lopd.models.parameters import Params, abstract_params, logical_axes, parameter_table


def check_divisible(config: DecoderConfig, mesh: Mesh, what: str) -> None:
    """Refuses a model whose parameters do not split evenly over the mesh.

    Raises:
      UserError: naming the parameter, its axis and the mesh axis.
    """
    for path, row in jax.tree_util.tree_leaves_with_path(parameter_table(config)):
        for name, size in zip(row.axes, row.shape, strict=True):
            mesh_axis = RULES[name]
            if mesh_axis and size % mesh.shape[mesh_axis]:
                raise UserError(
                    f"{what}: {jax.tree_util.keystr(path)} has {name}={size}, which "
                    f"mesh.{mesh_axis}={mesh.shape[mesh_axis]} does not divide"
                )


def param_shardings(config: DecoderConfig, mesh: Mesh) -> Params:
    """The sharding of every parameter, as a tree like the parameters."""
    return jax.tree.map(
        lambda names: NamedSharding(mesh, spec(*names)),
        logical_axes(config),
        is_leaf=lambda x: isinstance(x, PartitionSpec),
    )


def abstract_params_on(config: DecoderConfig, mesh: Mesh, dtype: str = "float32") -> Params:
    """Shapes, types and shardings of the parameters, to restore into or to count bytes of."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype), sharding=sharding),
        abstract_params(config),
        param_shardings(config, mesh),
    )
