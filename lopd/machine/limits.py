"""Limits on the time and the memory of a piece of this process's work."""

import contextlib
import pathlib
import resource
import signal
import threading
from collections.abc import Iterator

_STATM = pathlib.Path("/proc/self/statm")


@contextlib.contextmanager
def limited(seconds: float, memory_bytes: int) -> Iterator[None]:
    """Work of the interpreter that may not end by itself, in the main thread.

    One long operation of a library is not interrupted before its end. In another thread time is
    not limited, and where there is no /proc memory is not.

    Raises:
      TimeoutError: after so many seconds.
      MemoryError: where the process would take so much more than before.
    """
    with _time(seconds), _memory(memory_bytes):
        yield


@contextlib.contextmanager
def _time(seconds: float) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def over(*_) -> None:
        raise TimeoutError(f"it takes more than {seconds:g} seconds")

    handler = signal.signal(signal.SIGALRM, over)
    # Again each second: what raises in the middle of other clean-up may be swallowed.
    before = signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *before)
        signal.signal(signal.SIGALRM, handler)


@contextlib.contextmanager
def _memory(nbytes: int) -> Iterator[None]:
    if not _STATM.exists():
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = int(_STATM.read_text().split()[0]) * resource.getpagesize() + nbytes
    least = min(x for x in (wanted, soft, hard) if x != resource.RLIM_INFINITY)
    resource.setrlimit(resource.RLIMIT_AS, (least, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
