"""Standard output and standard error that may go away: a reader that has left, a full device.

A run's results are files, so it outlives both. A command whose answer is what it prints does not.
"""

import contextlib
import errno
import io
import os
import sys
from collections.abc import Callable, Iterator
from typing import TextIO

from lopd.machine.storage import reason


class Gone(Exception):
    """The standard output of a command that answers on it; `lopd.cli` says so in a line."""

    def __init__(self, error: Exception):
        self.by_reader = getattr(error, "errno", None) == errno.EPIPE
        """Whether whoever read it has had enough, as `head` has."""
        super().__init__(f"standard output cannot be written ({reason(error)})")


class _Guarded:
    """A text stream that hands its loss to `lost` instead of those who write to it."""

    def __init__(self, stream: TextIO, lost: Callable[[Exception], None]):
        self._stream, self._lost = stream, lost

    def __getattr__(self, name: str):
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, work: Callable) -> None:
        try:
            work()
        except (OSError, ValueError) as error:  # ValueError: it is closed
            # What waits in its buffers, and what C libraries write, goes nowhere from now on.
            with contextlib.suppress(OSError, ValueError):
                _to_nowhere(self._stream.fileno())
            self._lost(error)


def _to_nowhere(descriptor: int) -> None:
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, descriptor)
    if nowhere != descriptor:
        os.close(nowhere)


def _open_standard_descriptors() -> None:
    """Opens those that were closed: else the next file that is opened gets what is printed."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            _to_nowhere(descriptor)


def _tolerant(stream: TextIO | None) -> TextIO:
    """The stream, in which a character that its encoding lacks is no error either."""
    if stream is None:
        return open(os.devnull, "w")
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")
    return stream


@contextlib.contextmanager
def guarded(answers: bool) -> Iterator[None]:
    """Standard streams for the commands of lopd, whichever of them are closed or get lost.

    A reader that has left is not worth a word; of another loss of the standard output there is one
    line on the standard error.

    Args:
      answers: whether the standard output holds what the command is for.

    Raises:
      Gone: if `answers`, where the standard output is lost, at the end at the latest.
    """
    before = sys.stdout, sys.stderr
    _open_standard_descriptors()
    if answers and sys.stdout is None:
        raise Gone(OSError("it is closed"))

    def lost(error: Exception) -> None:
        gone = Gone(error)
        if answers:
            raise gone
        if not gone.by_reader:
            print(f"lopd: warning: {gone}; the work goes on without it", file=sys.stderr)

    sys.stdout = _Guarded(_tolerant(sys.stdout), lost)
    sys.stderr = _Guarded(_tolerant(sys.stderr), lambda error: None)
    try:
        yield
        sys.stdout.flush()
    finally:
        with contextlib.suppress(Gone):
            sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before
