"""Command line: `python -m lopd.study --config=configs/reproduction.py [--workdir=DIR]`.

Runs what is missing of the study and writes results.json, results.md, figures and report.html
into DIR, or `runs/NAME` for a settings file NAME.py. Any setting that all arms share can be changed
with `--config.section.key=value`. Exit codes as those of `lopd.main`.
"""

import lopd.interrupts  # noqa: F401  # isort: skip

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

from absl import app, flags
from ml_collections import config_flags

from lopd import cli
from lopd.cli import STAGES, WORKDIR, WORKER, fail
from lopd.config.settings import Settings
from lopd.errors import UserError
from lopd.machine import shutdown
from lopd.machine.storage import absolute, is_local

SEEDS = flags.DEFINE_list("seeds", [], "Seeds to run, in order; by default the study's.")
ARMS = flags.DEFINE_list("arms", [], "Arms to run and to show; by default all.")
PROCESSES = flags.DEFINE_integer(
    "processes", 1, "Share the work, on CPUs, between so many processes.", lower_bound=1
)


def _child(number: int, seeds: Sequence[int]) -> subprocess.Popen:
    """One of several processes: a part of the cores, and seeds of its own first."""
    own = [*seeds[number :: PROCESSES.value]]
    order = ",".join(map(str, own + [seed for seed in seeds if seed not in own]))
    given = [a for a in sys.argv[1:] if not a.lstrip("-").startswith(("processes", "seeds"))]
    log = os.path.join(WORKDIR.value, f"process-{number}.log")
    with open(log, "w") as stderr, _on_cores(number):
        command = [sys.executable, "-m", "lopd.study", *given, f"--seeds={order}"]
        return subprocess.Popen(command, stderr=stderr)


@contextlib.contextmanager
def _on_cores(number: int) -> Iterator[None]:
    """What is started here keeps to a share of the cores, where the system can do that."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    all_cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(all_cores)[number :: PROCESSES.value] or all_cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, all_cores)


def _run_processes(seeds: Sequence[int]) -> None:
    """Runs the study in several processes, and ends when all have; one that fails ends all.

    Raises:
      UserError: if one fails; its log says why.
      Stopped: after a signal, when all have brought their work to safety.
    """
    os.makedirs(WORKDIR.value, exist_ok=True)
    processes = [_child(number, seeds) for number in range(PROCESSES.value)]
    failed = None
    while any(process.poll() is None for process in processes):
        codes = [process.poll() for process in processes]
        failed = next((i for i, code in enumerate(codes) if code), failed)
        if failed is not None or shutdown.requested():
            for process in processes:
                if process.poll() is None:
                    process.terminate()
            for process in processes:
                process.wait()
        time.sleep(0.2)
    shutdown.check()
    codes = [process.returncode for process in processes]
    if any(codes):
        failed = failed if failed is not None else next(i for i, code in enumerate(codes) if code)
        log = os.path.join(WORKDIR.value, f"process-{failed}.log")
        with open(log) as file:
            lines = file.read().split("\n")
        said = [line for line in lines if line.strip()][-1:] or ["no message"]
        raise UserError(
            f"a process of the study ended with code {codes[failed]}: {said[0]} ({log})"
        )


def _study(settings: Settings) -> None:
    from lopd.machine import devices
    from lopd.study import design, run
    from lopd.study.store import Store
    from lopd.study.write import write

    study = design.load(config_flags.get_config_filename(flags.FLAGS["config"]), settings)
    seeds = [int(seed) for seed in SEEDS.value] or [*study.seeds]
    store = Store(absolute(WORKDIR.value), devices.make_mesh(study.base.mesh.sizes))
    arms = run.check(study, store, ARMS.value)
    if PROCESSES.value > 1:
        _run_processes(seeds)
    else:
        run.run(study, store, arms, seeds)
    with store.locked("report"):
        write(study, store, arms, sorted({*study.seeds, *seeds}))


def main(argv: list[str]) -> None:
    """Runs the study and writes its results."""
    settings = cli.settings_and_workdir(argv, "--config=configs/reproduction.py")
    if STAGES.value or WORKER.value:
        fail("--stages and --worker are of lopd.main; a study's arms say what runs")
    if not is_local(WORKDIR.value):
        fail(f"--workdir={WORKDIR.value}: a study needs a local directory, for its locks")
    if not all(seed.isdecimal() for seed in SEEDS.value):
        fail(f"--seeds={','.join(SEEDS.value)} must be numbers, as in --seeds=21,22")
    cli.guarded(lambda: _study(settings))


if __name__ == "__main__":
    with cli.door():
        app.run(main, flags_parser=cli.parse_flags)
