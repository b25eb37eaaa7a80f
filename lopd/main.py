"""Command line: `python -m lopd.main --config=configs/tiny.py [--workdir=DIR] [--stages=a,b]`.

Artefacts go to `runs/NAME`, NAME being the settings file's, or where `--workdir` says.
Any setting can be changed with `--config.section.key=value`. `--dry-run` says what would be
fetched, what is needed and all that is missing. Exit codes: 0 done, 2 bad input or no room on disk,
75 stopped by a signal with all work safe (`lopd.machine.shutdown`).
"""

import lopd.interrupts  # noqa: F401  # isort: skip

import re

from absl import app, flags

from lopd import cli

DRY_RUN = flags.DEFINE_bool(
    "dry-run", False, "Say what would be fetched, what is needed and what is missing; then end."
)


def _worker(text: str) -> tuple[int, int] | None:
    if not text:
        return None
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or int(match[1]) >= int(match[2]):
        cli.fail(f"--worker={text} must be i/N with 0 <= i < N, as in --worker=0/4")
    return int(match[1]), int(match[2])


def main(argv: list[str]) -> None:
    """Runs the pipeline."""
    settings = cli.settings_and_workdir(argv, "--config=configs/tiny.py")
    worker = _worker(cli.WORKER.value)
    # Imported here so that a mistake on the command line is reported at once.
    from lopd import pipeline
    from lopd.plan import needs

    stages, workdir = tuple(cli.STAGES.value), cli.WORKDIR.value

    def work() -> None:
        needs.check(settings, workdir, stages, dry_run=DRY_RUN.value)
        if not DRY_RUN.value:
            pipeline.run(settings, workdir, stages, worker)

    cli.guarded(work)


if __name__ == "__main__":
    with cli.door():
        app.run(main, flags_parser=cli.parse_flags)
