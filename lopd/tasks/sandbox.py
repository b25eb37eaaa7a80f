"""A process with limits, for work that may hang, eat all memory or crash: JSON in, JSON out.

It protects the run from accidents, not from malice: the worker sees the same files and network as
the run. `lopd.tasks.sandbox_child` is what runs in it.
"""

import contextlib
import json
import os
import pathlib
import selectors
import signal
import subprocess
import sys
import time

from lopd.errors import UserError

_CHILD = pathlib.Path(__file__).with_name("sandbox_child.py")
_PATIENCE = 6
"""How much longer than its processor time a request may take by the clock: other processes want the
processor too, and a grader that shares it must not lose answers to them."""
_GRACE = 5.0
"""Seconds after which the parent ends a process whose own alarm has not."""


class Sandbox:
    """Puts requests to the function `answer(request: dict) -> dict` of a Python file.

    The process starts with the first request and is replaced when it is lost. It is in a session of
    its own, so that Ctrl-C in a terminal or a job's SIGTERM, which this process may take its time
    to obey, does not end it under a request. Use as a context manager, or call `close`.

    Args:
      worker: the file. It is loaded without its folder on the path.
      seconds: processor time of one request.
      memory_bytes: address space of the process.
      start_seconds: wall time until the file is loaded.
      wall_seconds: wall time of one request; by default six times its processor time.
    """

    def __init__(
        self,
        worker: str | os.PathLike,
        *,
        seconds: float,
        memory_bytes: int = 4 << 30,
        start_seconds: float = 120.0,
        wall_seconds: float | None = None,
    ):
        self.lost = 0
        """Requests without a reply."""
        self._worker, self._seconds = worker, seconds
        self._start_seconds, self._memory_bytes = start_seconds, memory_bytes
        self._wall_seconds = wall_seconds or _PATIENCE * seconds
        self._process: subprocess.Popen | None = None
        self._ended_by: int | None = None
        """The signal that the last process ended by, if it did."""

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process, with any that it has started in its session."""
        if self._process is None:
            return
        process, self._process = self._process, None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        self._ended_by = -process.returncode

    def ask(self, request: dict) -> dict | None:
        """The worker's reply; None, counted in `lost`, if the process was lost over it.

        It is asked a second time unless it has had all its processor time: else the loss may be an
        accident. Another process took the memory, or the machine stood still.

        Raises:
          UserError: if the process does not start.
        """
        for _ in range(2):
            if self._process is None or self._process.poll() is not None:
                self._start()
            reply = self._exchange(json.dumps(request) + "\n", self._wall_seconds)
            if reply is not None:
                return reply
            if self._ended_by == signal.SIGPROF:
                break
        self.lost += 1
        return None

    def _start(self) -> None:
        limits = (self._seconds, self._wall_seconds, self._start_seconds, self._memory_bytes)
        # -P: the folder of the child must not come first on the path, where its neighbours would
        # stand for modules of the same names.
        command = [sys.executable, "-P", _CHILD, self._worker, *limits]
        for _ in range(2):
            self.close()
            self._process = subprocess.Popen(
                list(map(str, command)),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            if self._exchange("", self._start_seconds) is not None:
                return
        raise UserError(f"the process does not start: {' '.join(map(str, command))}")

    def _exchange(self, request: str, seconds: float) -> dict | None:
        """The reply of the process; None, and no process left, if it gave none."""
        line = b""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(request.encode())
            self._process.stdin.flush()
            line = self._read_line(time.monotonic() + seconds + _GRACE)
        if line.endswith(b"\n"):
            return json.loads(line)
        self.close()
        return None

    def _read_line(self, deadline: float) -> bytes:
        """The process's output up to a line's end, its own end, or the deadline."""
        line, output = b"", self._process.stdout.fileno()
        with selectors.DefaultSelector() as ready:
            ready.register(output, selectors.EVENT_READ)
            while not line.endswith(b"\n") and ready.select(max(0.0, deadline - time.monotonic())):
                part = os.read(output, 1 << 16)
                if not part:
                    break
                line += part
        return line
