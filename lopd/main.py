"""Command line: `python -m lopd.main --config=configs/tiny.py --workdir=DIR [--stages=a,b]`.

Any setting can be changed with `--config.section.key=value`. Exit codes: 0 done, 2 bad input or no
room on disk, 75 stopped by a signal with all work safe (`lopd.machine.shutdown`).
"""

import errno
import re
import sys
import tempfile
import traceback
from collections.abc import Callable

from absl import app, flags, logging
from ml_collections import config_flags

from lopd.errors import UserError
from lopd.machine import processes, shutdown

CONFIG = config_flags.DEFINE_config_file("config", None, "The settings file.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Where artefacts go.")
STAGES = flags.DEFINE_list("stages", [], "Stages to run; those of the config by default.")
WORKER = flags.DEFINE_string("worker", "", "i/N: sample part i of N (from 0), to be merged.")


def parse_flags(argv: list[str]) -> list[str]:
    """absl's parsing, with any mistake in a setting as one line."""
    try:
        return flags.FLAGS(argv)
    except (AttributeError, KeyError) as error:
        # ml_collections' "'key'… Did you mean …?" says neither where the key was nor what it is.
        message = str(error.args[0])
        key = re.match(r"\W*(\w+)", message).group(1)
        given = [a.split("=")[0] for a in argv if key in re.split(r"[.=]", a)]
        nearest = re.search(r'mean "(\w+)"', message)
        hint = f"; did you mean {nearest.group(1)!r}?" if nearest else ""
        fail(f"{' '.join(given)}: there is no setting {key!r}{hint}")
    except (flags.Error, TypeError, ValueError, OSError) as error:
        fail(" ".join(str(error).split()))


def _report(message: str) -> None:
    print(f"lopd: error: {message}", file=sys.stderr)


def fail(message: str) -> None:
    """Ends the program with one line."""
    _report(message)
    sys.exit(shutdown.EXIT_ERROR)


def _worker(text: str) -> tuple[int, int] | None:
    if not text:
        return None
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or int(match[1]) >= int(match[2]):
        fail(f"--worker={text} must be i/N with 0 <= i < N, as in --worker=0/4")
    return int(match[1]), int(match[2])


def main(argv: list[str]) -> None:
    """Runs the pipeline."""
    if len(argv) > 1:
        fail(f"unexpected argument {argv[1]!r}; settings are given as --config.key=value")
    if CONFIG.value is None or not WORKDIR.value:
        fail("--config=FILE and --workdir=DIR are needed, as in --config=configs/tiny.py")
    worker = _worker(WORKER.value)
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # Orbax reports every file at INFO
    # Imported here so that a mistake on the command line is reported at once.
    from lopd import pipeline

    guarded(lambda: pipeline.run(CONFIG.value, WORKDIR.value, tuple(STAGES.value), worker))


def guarded(work: Callable[[], None]) -> None:
    """Sets the process up for a working directory, does the work, and ends it with its exit code.

    A mistake of the user's or a full disk is one line; signals are a request to stop.
    """
    from lopd.machine import setup
    from lopd.machine.storage import is_local

    setup.prepare(WORKDIR.value)
    try:
        processes.initialize()
        with shutdown.on_signals():
            work()
    except UserError as error:
        _report(str(error))
        processes.leave(shutdown.EXIT_ERROR)
    except shutdown.Stopped:
        print("\nlopd: stopped; the same command continues from here", file=sys.stderr)
        sys.exit(shutdown.EXIT_STOPPED)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            traceback.print_exc()
            processes.leave(1)
        # Buckets do not fill up; what goes to one, or comes from it, is on a disk on the way.
        where = WORKDIR.value if is_local(WORKDIR.value) else tempfile.gettempdir()
        _report(
            f"no room left on the disk of {where} ({error}): free some and run the same command, "
            "it continues from what is finished"
        )
        processes.leave(shutdown.EXIT_ERROR)
    except Exception:
        traceback.print_exc()
        processes.leave(1)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
