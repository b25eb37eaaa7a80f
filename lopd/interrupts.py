"""Ctrl-C in one line. Every command imports this first, as it takes seconds to import the rest.

Until a run brings its work to safety (`lopd.machine.shutdown`) there is none to save, and
KeyboardInterrupt would not do: it becomes an ImportError in some libraries' modules, and is lost in
callbacks of others.
"""

import os
import signal
import sys

EXIT_INTERRUPTED = 128 + signal.SIGINT
"""As a shell calls it."""


def _end(_number: int, _frame) -> None:
    try:
        os.write(2, b"\nlopd: interrupted\n")
    finally:
        os._exit(EXIT_INTERRUPTED)


def end_at_once() -> None:
    """From now on Ctrl-C ends the process, unless it is ignored, as in the background."""
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def _is_command() -> bool:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec is not None and spec.name.partition(".")[0] == "lopd"


if _is_command():
    end_at_once()
