"""Where the activations of the program being traced lie on its mesh.

A jitted program that runs on a mesh is traced under `on_mesh`; the model and the scorer then ask
here instead of being handed the mesh through every call. Without a mesh nothing is constrained.
"""

import contextlib

import jax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

ROW_AXES = ("data", "fsdp")
"""The mesh axes that rows of a batch are split over."""


def on_mesh(mesh: Mesh) -> contextlib.AbstractContextManager:
    """The context to trace a program in that will run on `mesh`."""
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def current_mesh() -> AbstractMesh | None:
    """The mesh that is being traced for, or None outside `on_mesh`."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else mesh


def current_platform() -> str:
    """ "tpu", "gpu" or "cpu": what the program being traced will run on."""
    mesh = current_mesh()
    if mesh is None:
        return jax.default_backend()
    return mesh.abstract_device.platform


def constrain(x: jax.Array, *axes: str | tuple[str, ...] | None) -> jax.Array:
    """`x` with dimension i split over the mesh axes `axes[i]`; unchanged without a mesh."""
    if current_mesh() is None:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*axes))
