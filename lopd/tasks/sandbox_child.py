"""The process behind `lopd.tasks.sandbox.Sandbox`. Imports nothing of lopd.

    python -P sandbox_child.py WORKER SECONDS START_SECONDS MEMORY_BYTES

Loads the Python file WORKER, writes {} and from then on reads one JSON line at a time and writes
the reply of its function `answer`. Ends when its input does.

A request that takes more than SECONDS ends the process. The alarm has no handler, so the kernel
does it, also in the middle of a long operation of the interpreter, and when the parent is gone.
Signals that ask a whole job to stop are for the parent to obey, which then closes the input.
"""

import json
import resource
import runpy
import signal
import sys


def main(worker: str, seconds: float, start_seconds: float, memory_bytes: int) -> None:
    """Answers requests until the input ends."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, start_seconds)
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    out, sys.stdout = sys.stdout, sys.stderr  # what the worker prints is no reply
    answer = runpy.run_path(worker)["answer"]
    reply: dict = {}
    while True:
        signal.setitimer(signal.ITIMER_REAL, 0)
        out.write(json.dumps(reply) + "\n")
        out.flush()
        line = sys.stdin.readline()
        if not line:
            return
        signal.setitimer(signal.ITIMER_REAL, seconds)
        reply = answer(json.loads(line))


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4]))
