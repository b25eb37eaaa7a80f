"""The accelerators that a run can be planned for, and the topologies they come in."""

import dataclasses
import math
import os
import re

from lopd.errors import UserError


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator: memory, dense bfloat16 arithmetic, memory bandwidth."""

    platform: str
    memory_gib: float
    """What a program may use: of a TPU, what its compiler says; of a GPU, what the driver says."""
    flops: float
    """Peak bfloat16 FLOP/s."""
    bandwidth: float
    """Bytes per second."""
    cores: int = 1
    """Of a TPU chip, as its accelerator type counts them."""
    dimensions: int = 0
    """Of a TPU topology."""
    accelerator: str = ""
    """How the TPU runtime calls it."""


# cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e} (peak compute, HBM bandwidth per chip);
# the data sheets "NVIDIA A100 80GB SXM", "H100 SXM" and "H200 SXM" (dense, without sparsity).
CHIPS = {
    "v4": Chip("tpu", 30.75, 275e12, 1228e9, 2, 3, "v4"),
    "v5e": Chip("tpu", 15.75, 197e12, 819e9, 1, 2, "v5litepod"),
    "v5p": Chip("tpu", 95.74, 459e12, 2765e9, 2, 3, "v5p"),
    "v6e": Chip("tpu", 31.25, 918e12, 1640e9, 1, 2, "v6e"),
    "a100": Chip("gpu", 80.0, 312e12, 2039e9),
    "h100": Chip("gpu", 79.6, 989e12, 3350e9),
    "h200": Chip("gpu", 140.4, 989e12, 4800e9),
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A number of chips of one kind; for TPU with its shape."""

    name: str
    kind: str
    chips: int

    @property
    def chip(self) -> Chip:
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
