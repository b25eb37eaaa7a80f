"""A clean stop on SIGTERM (a preemption notice), SIGINT or SIGHUP, and the process's exit codes.

Long loops ask `requested()` between units of work, bring what they have to safety (close the
shard, save the state) and raise `Stopped`. A second signal ends the process at once.
"""

import contextlib
import signal
import time
from collections.abc import Iterator

EXIT_ERROR = 2
"""Bad input or settings, or no room on disk: running again as it is fails again."""
EXIT_STOPPED = 75
"""Stopped on request, all work so far is safe: the same command continues (EX_TEMPFAIL)."""

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_received: list[float] = []
"""When signals came, by the monotonic clock."""


class Stopped(Exception):
    """Work was brought to safety after a signal; `lopd.main` exits with `EXIT_STOPPED`."""


def requested() -> bool:
    """Whether the process was asked to stop."""
    return bool(_received)


def request() -> None:
    """Asks this process to stop, as a signal to another one of the run has."""
    if not requested():
        _received.append(time.monotonic())


def seconds_since_request() -> float:
    """How long ago the process was asked to stop; 0 if it was not."""
    return time.monotonic() - _received[0] if _received else 0.0


def check() -> None:
    """For loops with nothing to bring to safety.

    Raises:
      Stopped: if the process was asked to stop.
    """
    if requested():
        raise Stopped


@contextlib.contextmanager
def ignored() -> Iterator[None]:
    """Signals do nothing, as all work is safe and the exit code still to be given."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _on_signal(number: int, _frame) -> None:
    _received.append(time.monotonic())
    # A terminal that closes may say so twice: the kernel, and the shell.
    signal.signal(number, signal.SIG_IGN if number == signal.SIGHUP else signal.SIG_DFL)


@contextlib.contextmanager
def on_signals() -> Iterator[None]:
    """Turns the first SIGTERM, SIGINT or SIGHUP into a request; use it in the main thread.

    A SIGHUP that is ignored, as `nohup` has it, stays so.
    """
    _received.clear()
    heard = [x for x in _SIGNALS if x != signal.SIGHUP or signal.getsignal(x) != signal.SIG_IGN]
    before = {number: signal.signal(number, _on_signal) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
