"""Which mesh a run would take on a topology, and what would make it fit."""

import itertools
from collections.abc import Iterator

from jax.sharding import AbstractMesh, AxisType

from lopd.config.settings import Settings
from lopd.config.values import changed
from lopd.errors import UserError
from lopd.machine import sharding
from lopd.models.memory import GIB
from lopd.models.shardings import check_divisible
from lopd.plan.recipe import Program, list_programs
from lopd.plan.topology import Topology

HEADROOM = 0.92
"""Share of a chip's memory that a formula may fill: formulas are rough."""

Sizes = dict[str, int]
"""Axis of the mesh → devices along it."""


def divides(program: Program, sizes: Sizes) -> bool:
    """Whether the mesh splits the program's weights and rows evenly."""
    mesh = AbstractMesh(
        tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes)
    )
    try:
        check_divisible(program.model, mesh, "")
    except UserError:
        return False
    return program.rows % (sizes["data"] * sizes["fsdp"]) == 0


def candidates(chips: int) -> Iterator[Sizes]:
    """Every mesh of so many chips: as little tensor, then as much fsdp as there can be.

    Sharded weights cost least to exchange when only rows are split besides; tensor parallelism
    exchanges activations in every layer, and data parallelism holds weights more than once.
    """
    sizes = [n for n in range(1, chips + 1) if chips % n == 0]
    for tensor, data in itertools.product(sizes, sizes):
        if chips % (tensor * data) == 0:
            yield {"data": data, "fsdp": chips // (tensor * data), "tensor": tensor}


def rows_for(rows: int, sizes: Sizes) -> int:
    """`rows`, rounded up to what the mesh divides."""
    shards = sizes["data"] * sizes["fsdp"]
    return -(-rows // shards) * shards


def given_mesh(settings: Settings, chips: int) -> Sizes | None:
    """The mesh of the settings, where they have sizes of their own that fit; else None."""
    sizes = {axis: settings.mesh.sizes[axis] for axis in sharding.AXES}
    known = [n for n in sizes.values() if n > 0]
    for axis, n in sizes.items():
        if n == -1 and len(known) == 2 and chips % (known[0] * known[1]) == 0:
            sizes[axis] = chips // (known[0] * known[1])
    return sizes if sizes["data"] * sizes["fsdp"] * sizes["tensor"] == chips else None


def choose(settings: Settings, stages: tuple[str, ...], topology: Topology) -> tuple[Sizes, int]:
    """The first candidate that fits by formula, or the one nearest to fitting; and its rows.

    There always is one: with all chips on `data`, nothing but rows has to divide.
    """
    limit, nearest = HEADROOM * topology.chip.memory_gib * GIB, None
    for sizes in candidates(topology.chips):
        rows = rows_for(settings.runtime.rows_per_micro, sizes)
        programs = list_programs(settings, stages, rows)
        if not all(divides(program, sizes) for program in programs):
            continue
        peak = max(program.work(sizes).peak_bytes for program in programs)
        if peak <= limit:
            return sizes, rows
        nearest = min(nearest or (peak, sizes, rows), (peak, sizes, rows), key=lambda t: t[0])
    return nearest[1:]


def suggestion(
    settings: Settings,
    program: Program,
    sizes: Sizes,
    rows: int,
    topology: Topology,
    peak_gib: float,
) -> str:
    """The smallest change after which `program` would fit, judged by its formula.

    The formula is scaled to agree with `peak_gib`, what the program really takes.
    """
    scale = peak_gib * GIB / program.work(sizes).peak_bytes
    limit = topology.chip.memory_gib * GIB

    def fits(changes: dict, rows: int, sizes: Sizes) -> bool:
        same = [
            p
            for p in list_programs(changed(settings, changes), (program.stage,), rows)
            if (p.name, p.stage) == (program.name, program.stage)
        ]
        return all(scale * p.work(sizes).peak_bytes <= limit for p in same)

    shards = sizes["data"] * sizes["fsdp"]
    per_chip = dict(sizes, data=1, fsdp=sizes["data"] * sizes["fsdp"])
    tries: list[tuple[str, dict, int, Sizes]] = [
        ("--config.runtime.remat=full", {"runtime.remat": "full"}, rows, sizes),
        (f"--config.runtime.rows_per_micro={shards}", {}, shards, sizes),
        (f"--config.mesh.data=1 --config.mesh.fsdp={per_chip['fsdp']}", {}, rows, per_chip),
    ]
    for slots in (64, 32, 16):
        change = {"runtime.slots": slots}
        text = " ".join(f"--config.{key}={value}" for key, value in change.items())
        tries.append((text, change, rows, sizes))
    for text, changes, changed_rows, changed_sizes in tries:
        if fits(changes, changed_rows, changed_sizes):
            return text
    for factor in (2, 4, 8, 16, 32, 64):
        more = dict(sizes, fsdp=factor * sizes["fsdp"])
        if fits({}, max(rows, more["data"] * more["fsdp"]), more):
            return f"{factor * topology.chips} chips (fsdp={more['fsdp']})"
    return "shorter rows and responses, or chips with more memory"
