r"""The process that runs math-verify: one JSON line in, one out. Imports nothing of lopd.

In:  {"gold": TEXT, "answer": TEXT}
Out: {"correct": BOOL, "label": TEXT} or {"error": TEXT}; first of all {} when it is ready.

    python -P math_worker.py SECONDS

An answer that takes more than SECONDS ends the process. math-verify's own time limits are off:
they are Python signal handlers, which run only after a long integer power has finished. Here the
alarm has no handler, so the kernel ends the process, also when its parent is gone.
"""

import json
import logging
import resource
import signal
import sys

_MEMORY_BYTES = 4 << 30
_START_SECONDS = 120


def main() -> None:
    """Answers requests until the input ends."""
    seconds = float(sys.argv[1])
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(_START_SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    logging.disable()
    out, sys.stdout = sys.stdout, sys.stderr
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    extraction = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]

    def read(text: str) -> list:
        return parse(rf"\boxed{{{text}}}", extraction, parsing_timeout=None)

    def answer(request: dict) -> dict:
        gold = read(request["gold"])
        if not gold:
            return {"error": f"math-verify cannot read the reference answer {request['gold']!r}"}
        try:
            found = read(request["answer"])
            correct = bool(found) and verify(gold, found, timeout_seconds=None)
            return {"correct": correct, "label": str(found[0]) if found else request["answer"]}
        except (Exception, RecursionError, MemoryError):  # whatever a strange answer provokes
            return {"correct": False, "label": request["answer"]}

    reply: dict = {}
    while True:
        signal.alarm(0)
        out.write(json.dumps(reply) + "\n")
        out.flush()
        line = sys.stdin.readline()
        if not line:
            return
        signal.setitimer(signal.ITIMER_REAL, seconds)
        reply = answer(json.loads(line))


if __name__ == "__main__":
    main()
