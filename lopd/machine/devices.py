"""The device mesh, and where arrays that belong to no model lie on it."""

import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lopd.errors import UserError
from lopd.machine.sharding import AXES, spec


def make_mesh(sizes: dict[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of the devices (all by default): axes data, fsdp, tensor; one size may be -1.

    Raises:
      UserError: if the sizes do not multiply to the number of devices, or JAX finds none.
    """
    shape = [sizes[axis] for axis in AXES]
    try:
        devices = jax.devices() if devices is None else devices
    except (RuntimeError, AssertionError) as error:  # of a platform that is not there
        reason = " ".join(str(error).split()) or "no plugin for it is installed"
        raise UserError(f"JAX finds no devices ({reason}): check JAX_PLATFORMS") from error
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


def with_shardings(shapes: Any, shardings: Any) -> Any:
    """A tree of shapes and types with the shardings of another like it, to restore arrays into."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        shardings,
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def rows_sharding(mesh: Mesh, leading: int = 0) -> NamedSharding:
    """Arrays whose axis `leading` is rows: split over data and fsdp."""
    return NamedSharding(mesh, spec(*(None,) * leading, "rows"))


def device_memory(mesh: Mesh) -> int:
    """Bytes that one device may use: its own memory, or a CPU device's share of the host's."""
    devices = [d for d in mesh.devices.flat if d.process_index == jax.process_index()]
    stats = devices[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // len(devices)
