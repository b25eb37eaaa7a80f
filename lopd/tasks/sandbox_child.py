"""The process behind `lopd.tasks.sandbox.Sandbox`. Imports nothing of lopd.

    python -P sandbox_child.py WORKER SECONDS WALL_SECONDS START_SECONDS MEMORY_BYTES

Loads the Python file WORKER, writes {} and from then on reads one JSON line at a time and writes
the reply of its function `answer`. Ends when its input does.

A request that takes more than SECONDS of processor time ends the process by SIGPROF, one that takes
more than WALL_SECONDS by SIGALRM. The signals have no handlers, so the kernel does it, also in the
middle of a long operation of the interpreter, and when the parent is gone.
Signals that ask a whole job to stop are for the parent to obey, which then closes the input.
"""

import json
import resource
import runpy
import signal
import sys


def limit(seconds: float, wall_seconds: float) -> None:
    """Sets both alarms, or with zeros puts them off."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, wall_seconds)


def main(
    worker: str, seconds: float, wall_seconds: float, start_seconds: float, memory_bytes: int
) -> None:
    """Answers requests until the input ends."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    for number in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(number, signal.SIG_DFL)
    limit(0, start_seconds)
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    out, sys.stdout = sys.stdout, sys.stderr  # what the worker prints is no reply
    answer = runpy.run_path(worker)["answer"]
    reply: dict = {}
    while True:
        limit(0, 0)
        out.write(json.dumps(reply) + "\n")
        out.flush()
        line = sys.stdin.readline()
        if not line:
            return
        limit(seconds, wall_seconds)
        reply = answer(json.loads(line))


if __name__ == "__main__":
    main(sys.argv[1], *map(float, sys.argv[2:5]), int(sys.argv[5]))
