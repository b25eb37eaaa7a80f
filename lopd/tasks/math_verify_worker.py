r"""math-verify, as `lopd.tasks.sandbox` runs it. Imports nothing of lopd.

A request is {"gold": TEXT, "answer": TEXT}, the reply {"correct": BOOL, "label": TEXT}; or
{"gold": TEXT}, the reply {} or {"error": TEXT}. math-verify's own time limits are off: they are
Python signal handlers, which run only after a long integer power has finished.
"""

import logging

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

logging.disable()
_EXTRACTION = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]


def _read(text: str) -> list:
    return parse(rf"\boxed{{{text}}}", _EXTRACTION, parsing_timeout=None)


def _readable(text: str) -> bool:
    try:
        gold = _read(text)
        as_value = any(not isinstance(value, str) for value in gold)
        return as_value and verify(gold, gold, timeout_seconds=None)
    except MemoryError:
        raise
    except Exception:  # whatever a strange text provokes
        return False


def answer(request: dict) -> dict:
    """Whether the answer equals the reference, and what equal answers share.

    Without an answer, whether the reference can be read. What is read as a text alone would equal
    no other way of writing it.
    """
    if "answer" not in request:
        said = f"math-verify cannot read the reference answer {request['gold']!r:.80}"
        return {} if _readable(request["gold"]) else {"error": said}
    gold = _read(request["gold"])
    try:
        found = _read(request["answer"])
        correct = bool(found) and verify(gold, found, timeout_seconds=None)
        return {"correct": correct, "label": str(found[0]) if found else request["answer"]}
    except MemoryError:
        raise  # the sandbox's limit: no verdict
    except Exception:  # whatever a strange answer provokes
        return {"correct": False, "label": request["answer"]}
