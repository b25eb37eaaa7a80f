"""The topologies that accelerators come in, and devices to compile for without having them."""

import dataclasses
import math
import os
import re

from lopd.errors import UserError
from lopd.hardware import CHIPS, Chip


@dataclasses.dataclass(frozen=True)
class Topology:
    """A number of chips of one kind; for TPU with its shape."""

    name: str
    """As given."""
    kind: str
    chips: int

    @property
    def chip(self) -> Chip:
        """Each of them."""
        return CHIPS[self.kind]


def parse_topology(name: str) -> Topology:
    """`v5e:4x4`, `v5p:2x2x4` or `h100:8`.

    Raises:
      UserError: if there is no such chip, or its topologies are written in another way.
    """
    kind, _, shape = name.lower().partition(":")
    if kind not in CHIPS:
        raise UserError(
            f"--topology={name}: no chip is called {kind!r}; there are {', '.join(CHIPS)}"
        )
    dimensions = max(1, CHIPS[kind].dimensions)
    if not re.fullmatch("x".join([r"[1-9]\d*"] * dimensions), shape):
        example = {1: "8", 2: "4x4", 3: "2x2x4"}[dimensions]
        raise UserError(f"--topology={name}: write it as {kind}:{example}")
    return Topology(name.lower(), kind, math.prod(int(n) for n in shape.split("x")))


def prepare_environment(topology: Topology) -> None:
    """Lets libtpu compile on a machine without a TPU. To be called before jax is imported."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    if topology.chip.platform != "tpu":
        return
    # Otherwise libtpu asks the cloud's metadata server what it runs on, and waits for an answer.
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ["TPU_WORKER_HOSTNAMES"] = "localhost"
    cores = topology.chips * topology.chip.cores
    os.environ["TPU_ACCELERATOR_TYPE"] = f"{topology.chip.accelerator}-{cores}"
    # Several plans may run at a time: nothing of a real TPU is locked by compiling.
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def tpu_devices(topology: Topology) -> list:
    """Devices that programs can be compiled for, though not run on.

    Raises:
      UserError: if libtpu is not installed or does not know the topology.
    """
    from jax.experimental import topologies

    # A host has a tray of 2 × 2 chips, unless the whole topology is one chip.
    options = {"chips_per_host_bounds": (1, 1, 1)} if topology.chips == 1 else {}
    try:
        return topologies.get_topology_desc(topology.name, "tpu", **options).devices
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"--topology={topology.name} cannot be compiled for here ({reason}); libtpu comes "
            "with pip install 'lopd[tpu]'"
        ) from error
