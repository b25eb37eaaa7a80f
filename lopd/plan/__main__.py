"""What a run needs before anything is rented: memory, time and chip-hours of every program.

    python -m lopd.plan --config=configs/qwen3_8b.py --topology=v5e:4x4 [--config.key=value ...]

For a TPU topology every program is compiled, on a machine without a TPU, and its memory is what
the compiler says. For GPUs everything is by formula. Nothing is downloaded: hub names stand for
the shapes in `lopd.models.presets`.
"""

import lopd.interrupts  # noqa: F401  # isort: skip

import re
import signal

from absl import app, flags

from lopd import cli
from lopd.plan.topology import parse_topology, prepare_environment

TOPOLOGY = flags.DEFINE_string("topology", None, "Chips, as in v5e:4x4, v5p:2x2x4 or h100:8.")
UTILISATION = flags.DEFINE_float(
    "utilisation", 0.5, "Share of the binding floor (compute or memory) that is reached.", 0.01, 1
)


def _parse_flags(argv: list[str]) -> list[str]:
    """Sets the environment up ahead of the config file, which may import jax."""
    named = re.search(r"--?topology[= ](\S+)", " ".join(argv))
    if named:
        with cli.one_line_errors():
            prepare_environment(parse_topology(named[1]))
    return cli.parse_flags(argv)


def main(argv: list[str]) -> None:
    """Prints the plan."""
    if len(argv) > 1 or cli.CONFIG.value is None or not TOPOLOGY.value:
        cli.fail(
            "--config=FILE and --topology=CHIPS are needed, as in --topology=v5e:4x4 or h100:8"
        )
    settings = cli.settings()
    # Imported here: it starts jax, for which the environment had to be ready.
    from lopd.config.checks import check_settings
    from lopd.plan.summary import report
    from lopd.stages.objective import check_objective

    stages = tuple(cli.STAGES.value) or settings.stages
    with cli.one_line_errors():
        check_settings(settings, stages)
        check_objective(settings.opd)
        print(report(settings, stages, parse_topology(TOPOLOGY.value), UTILISATION.value))


if __name__ == "__main__":
    with cli.door(answers=True):
        # XLA compiles for minutes, in which Python does not come to its handlers.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        app.run(main, flags_parser=_parse_flags)
