"""What a run needs before anything is rented: memory, time and chip-hours of every program.

    python -m lopd.plan --config=configs/qwen3_8b.py --topology=v5e:4x4 [--config.key=value ...]

For a TPU topology every program is compiled, on a machine without a TPU, and its memory is what
the compiler says. For GPUs everything is by formula. Nothing is downloaded: hub names stand for
the shapes in `lopd.models.presets`.
"""

import dataclasses
import re
import sys
import time

from absl import app, flags, logging

from lopd.errors import UserError
from lopd.machine import devices
from lopd.main import CONFIG, STAGES, fail, parse_flags
from lopd.plan.topology import Topology, parse_topology, prepare_environment, tpu_devices

TOPOLOGY = flags.DEFINE_string("topology", None, "Chips, as in v5e:4x4, v5p:2x2x4 or h100:8.")
UTILISATION = flags.DEFINE_float(
    "utilisation", 0.5, "Share of the binding floor (compute or memory) that is reached.", 0.01, 1
)


@dataclasses.dataclass(frozen=True)
class Row:
    """One program's line of the plan."""

    stage: str
    name: str
    peak_gib: float
    petaflops: float
    compute_seconds: float
    memory_seconds: float
    seconds: float
    chip_hours: float
    advice: str


def _compiled_peak_gib(program, mesh) -> float:
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


def plan(config, stages: tuple[str, ...], topology: Topology, utilisation: float):
    """The mesh, the rows per forward pass, and one `Row` per program.

    Raises:
      UserError: for what cannot be planned.
    """
    from lopd.plan import meshes
    from lopd.plan.recipe import list_programs

    chip = topology.chip
    sizes = meshes.given_mesh(config, topology.chips)
    rows = meshes.rows_for(config.runtime.rows_per_micro, sizes) if sizes else 0
    if not sizes or not all(meshes.divides(p, sizes) for p in list_programs(config, stages, rows)):
        sizes, rows = meshes.choose(config, stages, topology)
    on_tpu = chip.platform == "tpu"
    mesh = devices.make_mesh(sizes, tpu_devices(topology)) if on_tpu else None
    lines = []
    for program in list_programs(config, stages, rows):
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
            way_out = meshes.suggestion(config, program, sizes, rows, topology, peak)
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


def report(config, stages, topology: Topology, utilisation: float) -> str:
    """Everything that `python -m lopd.plan` prints."""
    sizes, rows, lines = plan(config, stages, topology, utilisation)
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


def _parse_flags(argv: list[str]) -> list[str]:
    """Sets the environment up ahead of the config file, which may import jax."""
    named = re.search(r"--?topology[= ](\S+)", " ".join(argv))
    if named:
        try:
            prepare_environment(parse_topology(named[1]))
        except UserError as error:
            fail(str(error))
    return parse_flags(argv)


def main(argv: list[str]) -> None:
    """Prints the plan."""
    if len(argv) > 1 or CONFIG.value is None or not TOPOLOGY.value:
        fail("--config=FILE and --topology=CHIPS are needed, as in --topology=v5e:4x4 or h100:8")
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
    from lopd import config as lopd_config

    config, stages = CONFIG.value, tuple(STAGES.value) or tuple(CONFIG.value.stages)
    try:
        lopd_config.validate(config, stages)
        print(report(config, stages, parse_topology(TOPOLOGY.value), UTILISATION.value))
    except UserError as error:
        fail(str(error))


if __name__ == "__main__":
    app.run(main, flags_parser=_parse_flags)
