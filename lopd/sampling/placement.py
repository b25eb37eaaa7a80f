"""Where weights and slots lie while sampling, and how many slots fit beside the weights."""

import math
import os
import pathlib

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh

from lopd.errors import UserError
from lopd.models.decoder_config import DecoderConfig
from lopd.models.memory import slot_bytes

MAX_SLOTS_PER_DEVICE = 256
"""Beyond it the weights cost little of a step's time, and the last responses wait longer."""

_SHARE = {"cpu": 0.5}
"""Of the memory left, what slots may take. A host's memory is not ours alone."""
_SHARE_OF_ACCELERATOR = 0.9


def tensor_for_sampling(config: DecoderConfig, devices: int) -> int:
    """The most of `devices` that can share the weights: they split heads, MLP and vocabulary."""
    width = config.moe_intermediate_size if config.num_experts else config.intermediate_size
    return math.gcd(devices, config.num_key_value_heads, config.vocab_size, width)


def sampling_mesh(config: DecoderConfig, mesh: Mesh) -> Mesh:
    """The same devices with as much of fsdp as possible turned into tensor, and the rest into data.

    A decode step does little work per weight, so weights should stay where they are: split over
    fsdp, all of them would be gathered for every token. Every device then holds 1 / tensor of the
    weights. What limits tensor are key/value heads, of which each device needs whole ones.
    """
    tensor = tensor_for_sampling(config, mesh.shape["fsdp"] * mesh.shape["tensor"])
    devices = mesh.devices.reshape(-1, 1, tensor)
    return Mesh(devices, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


def sampling_sizes(config: DecoderConfig, sizes: dict[str, int]) -> dict[str, int]:
    """The axis sizes of `sampling_mesh`, from those of the mesh."""
    chips = sizes["data"] * sizes["fsdp"] * sizes["tensor"]
    tensor = tensor_for_sampling(config, sizes["fsdp"] * sizes["tensor"])
    return {"data": chips // tensor, "fsdp": 1, "tensor": tensor}


def _available_host_memory() -> int:
    """Bytes that programs can still take without swapping."""
    try:
        lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
        kib = next(line.split()[1] for line in lines if line.startswith("MemAvailable:"))
        return int(kib) * 1024
    except (OSError, StopIteration):  # not Linux
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _left_per_device(mesh: Mesh, reserved: int) -> int:
    """Bytes for slots on the fullest of this process' devices; not above 0 if there are none."""
    devices = mesh.local_devices
    platform = devices[0].platform
    stats = [device.memory_stats() for device in devices]
    if platform == "cpu" or not all(stats):
        free = _available_host_memory() // len(devices)
    else:
        free = min(s["bytes_limit"] - s["bytes_in_use"] for s in stats)
    return int((free - reserved) * _SHARE.get(platform, _SHARE_OF_ACCELERATOR))


def slots_for(
    config: DecoderConfig,
    capacity: int,
    bytes_per_device: int,
    shards: int,
    tensor: int,
    slots: int = 0,
    responses: int | None = None,
) -> int:
    """`slots` if they fit; for 0, those that do; no more than `responses`, which a job asks for.

    `bytes_per_device` / `slot_bytes` rows fit on each of `shards` devices. What is chosen from them
    is rounded down to a multiple of 8 rows a device, at most MAX_SLOTS_PER_DEVICE. The step of 8
    keeps small differences of free memory from changing compiled programs.

    Raises:
      UserError: if `slots`, or not one slot, fit.
    """
    per_slot = slot_bytes(config, capacity, tensor)
    fitting = bytes_per_device // per_slot
    if fitting < 1:
        raise UserError(
            f"sampling: a response of up to {capacity} positions takes {per_slot / 2**20:.0f} MiB "
            f"per device, and {max(bytes_per_device, 0) / 2**20:.0f} MiB are left beside the "
            "weights: shorten prompt_length or response_length, or raise mesh.tensor"
        )
    if -(-min(slots, responses or slots) // shards) > fitting:
        raise UserError(
            f"runtime.slots={slots}: memory is left for {fitting * shards} responses of up to "
            f"{capacity} positions at a time ({per_slot / 2**20:.2g} MiB each per device, and "
            f"{bytes_per_device / 2**20:.0f} MiB are left beside the weights): lower it, or set it "
            "to None for as many as fit"
        )
    rows = min(fitting, MAX_SLOTS_PER_DEVICE)
    chosen = slots or (rows - rows % 8 if rows >= 8 else rows) * shards
    return min(chosen, responses or chosen)


def slots_that_fit(
    config: DecoderConfig,
    capacity: int,
    mesh: Mesh,
    slots: int = 0,
    responses: int | None = None,
    reserved: int = 0,
) -> int:
    """`slots_for` the memory that is left right now; the same number in every process.

    To be called when the weights are in place; `reserved` bytes per device are left to what else
    comes while slots are held.
    """
    left = _left_per_device(mesh, reserved)
    if jax.process_count() > 1:
        # In MiB: without x64, jax arrays hold 32 bits.
        left = int(np.min(multihost_utils.process_allgather(np.int32(left >> 20)))) << 20
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    return slots_for(config, capacity, left, shards, mesh.shape["tensor"], slots, responses)
