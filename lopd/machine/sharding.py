"""The one table that maps logical axes onto the mesh, and the mesh that a program is traced for.

Parameters, optimizer state, activations, key/value caches and batches all derive their sharding
from `RULES`. What needs a model's parameters, devices or processes is in `lopd.models.shardings`,
`lopd.machine.devices` or `lopd.machine.processes`.
"""

import math
from contextlib import AbstractContextManager

import jax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

AXES = ("data", "fsdp", "tensor")
"""Of every mesh, in this order."""

RULES: dict[str, str | tuple[str, ...] | None] = {
    # parameters
    "layers": None,
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "expert": None,
    "norm": None,
    "rank": None,
    # activations, batches and caches
    "rows": ("data", "fsdp"),
    "group_rows": "data",  # the rows of an fsdp group together
    "length": None,
    "hidden": None,
}
"""Logical axis → mesh axis (or axes).

Experts are split like any other matrix, `embed` over fsdp and `mlp` over tensor, so every device
holds an equal part of every expert whatever the router does (see `lopd.models.moe`).
"""


def spec(*names: str | None) -> PartitionSpec:
    """The PartitionSpec of an array whose axes have these logical names (None: not split)."""
    return PartitionSpec(*(name and RULES[name] for name in names))


ROW_AXES = RULES["rows"]
"""The mesh axes that the rows of a batch are split over."""
ROWS = spec("rows")
"""Anything whose first axis is rows of a batch: tokens [B, T], hidden states [B, T, D]."""


def on_mesh(mesh: Mesh) -> AbstractContextManager:
    """While this is entered, inside a jitted function or around it, programs are traced for `mesh`.

    `constrain` and the mixture of experts then lay out activations themselves. Without it they
    leave everything to the partitioner: the result is the same, the communication is not.
    """
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def current_mesh() -> AbstractMesh | None:
    """The mesh of the innermost `on_mesh`; None outside."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else mesh


def current_platform() -> str:
    """ "tpu", "gpu" or "cpu": what the program being traced will run on."""
    mesh = current_mesh()
    return jax.default_backend() if mesh is None else mesh.abstract_device.platform


def parts(mesh: Mesh | AbstractMesh, name: str | None) -> int:
    """Into how many parts the rules split a logical axis on this mesh."""
    axes = name and RULES[name]
    axes = (axes,) if isinstance(axes, str) else axes or ()
    return math.prod(mesh.shape[axis] for axis in axes)


def divides(mesh: Mesh | AbstractMesh, x: jax.Array, *names: str | None) -> bool:
    """Whether every axis of `x`, by its logical name, splits evenly."""
    return not any(size % parts(mesh, name) for size, name in zip(x.shape, names, strict=False))


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Asks the partitioner to lay `x` out by the logical names of its first axes.

    An array that does not divide over the mesh, as a short batch, is left as it is.
    """
    mesh = current_mesh()
    if mesh is None or not divides(mesh, x, *names):
        return x
    return jax.lax.with_sharding_constraint(x, spec(*names))
