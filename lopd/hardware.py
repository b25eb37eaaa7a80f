"""The accelerators that a run can be planned for, and the topologies they come in."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator: memory, dense bfloat16 arithmetic, memory bandwidth."""

    platform: str
    """As JAX calls it."""
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
# the data sheets "NVIDIA A100 80GB SXM", "H100 SXM", "H200 SXM" and "L4", and the whitepaper of the
# Ada architecture (RTX 4090, sums in float32); dense, without sparsity.
CHIPS = {
    "v4": Chip("tpu", 30.75, 275e12, 1228e9, 2, 3, "v4"),
    "v5e": Chip("tpu", 15.75, 197e12, 819e9, 1, 2, "v5litepod"),
    "v5p": Chip("tpu", 95.74, 459e12, 2765e9, 2, 3, "v5p"),
    "v6e": Chip("tpu", 31.25, 918e12, 1640e9, 1, 2, "v6e"),
    "a100": Chip("gpu", 80.0, 312e12, 2039e9),
    "h100": Chip("gpu", 79.6, 989e12, 3350e9),
    "h200": Chip("gpu", 140.4, 989e12, 4800e9),
    "l4": Chip("gpu", 22.5, 121e12, 300e9),
    "rtx4090": Chip("gpu", 24.0, 165.2e12, 1008e9),
}

_PEAK_BF16 = {
    # Dense bfloat16 FLOP/s of one device, by a part of the name that jax gives the device; the
    # first that fits counts. What nobody plans for is from the vendors' data sheets.
    "B200": 2250e12,
    "H200": CHIPS["h200"].flops,
    "H100 PCIe": 756e12,
    "H100": CHIPS["h100"].flops,
    "A100": CHIPS["a100"].flops,
    "TPU v6": CHIPS["v6e"].flops,
    "TPU v5p": CHIPS["v5p"].flops,
    "TPU v5 lite": CHIPS["v5e"].flops,
    "TPU v5": CHIPS["v5p"].flops,
    "TPU v4": CHIPS["v4"].flops,
}


_BY_NAME = {
    "H200": "h200",
    "H100": "h100",
    "A100": "a100",
    "RTX 4090": "rtx4090",
    "L4": "l4",
    "TPU v6": "v6e",
    "TPU v5p": "v5p",
    "TPU v5 lite": "v5e",
    "TPU v5": "v5p",
    "TPU v4": "v4",
}
"""The chip that a part of the name stands for that jax gives the device; the first counts."""


def find_chip(devices: Sequence[Any]) -> Chip | None:
    """The chip that the devices are; None if it is in no table, as a CPU."""
    for name, chip in _BY_NAME.items():
        if re.search(rf"\b{name}\b|{name}(?!\d)", devices[0].device_kind, re.IGNORECASE):
            return CHIPS[chip]
    return None


def peak_flops(devices: Sequence[Any]) -> float | None:
    """Their bfloat16 peak together, in FLOP/s; None where it is not known, as of a CPU."""
    for name, peak in _PEAK_BF16.items():
        if name.lower() in devices[0].device_kind.lower():
            return peak * len(devices)
    return None
