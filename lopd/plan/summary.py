"""The plan of a run on a topology: one line a program, and what it all adds up to."""

import dataclasses
import re
import sys
import time

from jax.sharding import Mesh

from lopd.config.settings import Settings
from lopd.machine import devices
from lopd.plan import meshes
from lopd.plan.recipe import Program, list_programs
from lopd.plan.topology import Topology, tpu_devices


@dataclasses.dataclass(frozen=True)
class Row:
    """One program's line of the plan."""

    stage: str
    """The stage that runs it."""
    name: str
    """The program's."""
    peak_gib: float
    """Of one chip."""
    petaflops: float
    """Of all chips, over all calls."""
    compute_seconds: float
    """The floor that arithmetic sets, over all calls."""
    memory_seconds: float
    """The floor that memory bandwidth sets."""
    seconds: float
    """The higher floor over the utilisation."""
    chip_hours: float
    """Of all chips."""
    advice: str
    """What would make it fit; empty if it does."""


def _compiled_peak_gib(program: Program, mesh: Mesh) -> float:
    """What one chip needs at most, also when the compiler refuses because that is too much."""
    try:
        memory = program.build(mesh).compile().memory_analysis()
        return memory.peak_memory_in_bytes / 2**30
    except RuntimeError as error:
        units = {"M": 2**-10, "G": 1.0, "T": 2.0**10}
        said = r"(?:Used |temporaries \()([\d.]+)([MGT])(?: of [\d.]+[MGT] hbm|\) exceeds)"
        used = re.search(said, str(error))
        if not used:
            raise
        return float(used[1]) * units[used[2]]


def plan(
    settings: Settings, stages: tuple[str, ...], topology: Topology, utilisation: float
) -> tuple[dict[str, int], int, list[Row]]:
    """The mesh, the rows per forward pass, and one `Row` per program.

    Raises:
      UserError: for what cannot be planned.
    """
    chip = topology.chip
    sizes = meshes.given_mesh(settings, topology.chips)
    rows = meshes.rows_for(settings.runtime.rows_per_micro, sizes) if sizes else 0
    if not sizes or not all(
        meshes.divides(p, sizes) for p in list_programs(settings, stages, rows)
    ):
        sizes, rows = meshes.choose(settings, stages, topology)
    on_tpu = chip.platform == "tpu"
    mesh = devices.make_mesh(sizes, tpu_devices(topology)) if on_tpu else None
    lines = []
    for program in list_programs(settings, stages, rows):
        work = program.work(sizes)
        peak = work.peak_bytes / 2**30
        if on_tpu:
            start = time.perf_counter()
            print(
                f"compiling {program.stage}: {program.name} ...",
                end=" ",
                file=sys.stderr,
                flush=True,
            )
            peak = _compiled_peak_gib(program, mesh)
            print(f"{time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
        compute = work.flops / (topology.chips * chip.flops)
        memory = work.bytes_per_chip / chip.bandwidth
        seconds = max(compute, memory) / utilisation
        advice = ""
        if peak > chip.memory_gib:
            way_out = meshes.suggestion(settings, program, sizes, rows, topology, peak)
            advice = f"does not fit, {peak - chip.memory_gib:.1f} GiB over; try {way_out}"
        lines.append(
            Row(
                program.stage,
                program.name,
                peak,
                work.flops / 1e15,
                compute,
                memory,
                seconds,
                program.calls * seconds * topology.chips / 3600,
                advice,
            )
        )
    return sizes, rows, lines


def _table(lines: list[Row], memory_gib: float) -> str:
    """The plan as people read it."""
    head = (
        "stage",
        "program",
        "peak GiB",
        "PFLOP",
        "compute s",
        "memory s",
        "expected s",
        "chip-h",
    )
    cells = [head] + [
        (
            row.stage,
            row.name,
            f"{row.peak_gib:.1f}{'' if row.peak_gib <= memory_gib else ' (!)'}",
            f"{row.petaflops:,.3g}",
            f"{row.compute_seconds:,.3g}",
            f"{row.memory_seconds:,.3g}",
            f"{row.seconds:,.3g}",
            f"{row.chip_hours:,.1f}",
        )
        for row in lines
    ]
    widths = [max(len(line[i]) for line in cells) for i in range(len(head))]
    text = [
        "  ".join(
            c.ljust(w) if i < 2 else c.rjust(w)
            for i, (c, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in cells
    ]
    return "\n".join([text[0], "-" * len(text[0]), *text[1:]])


def report(
    settings: Settings, stages: tuple[str, ...], topology: Topology, utilisation: float
) -> str:
    """Everything that `python -m lopd.plan` prints."""
    sizes, rows, lines = plan(settings, stages, topology, utilisation)
    chip = topology.chip
    mesh = " ".join(f"--config.mesh.{axis}={size}" for axis, size in sizes.items())
    how = "compiled" if chip.platform == "tpu" else "by formula"
    parts = [
        f"{topology.chips} × {topology.kind} ({chip.memory_gib:g} GiB, {chip.flops / 1e12:g} "
        f"bfloat16 TFLOP/s, {chip.bandwidth / 1e9:g} GB/s each); memory per chip is {how}",
        f"settings: {mesh} --config.runtime.rows_per_micro={rows}",
        "",
        _table(lines, chip.memory_gib),
        "",
        f"{sum(row.chip_hours for row in lines):,.0f} chip-hours, "
        f"{sum(row.chip_hours for row in lines) / topology.chips:,.1f} hours, at "
        f"{utilisation:.0%} of the binding floor, and if every response is as long as it may be",
    ]
    parts += [f"{row.stage}: {row.name} {row.advice}" for row in lines if row.advice]
    return "\n".join(parts)
