r"""Mathematics with checkable answers (AIME, HMMT), graded by math-verify.

The answer is what the last `\boxed{…}` of a response holds. math-verify decides whether it equals
the reference; it runs in a sandbox, because there are short answers that it never finishes, and
those must cost a time limit and not the run.
"""

import importlib.util
import pathlib
import re

from lopd.errors import UserError
from lopd.tasks import Verdict
from lopd.tasks.sandbox import Sandbox

_WORKER = pathlib.Path(__file__).with_name("math_verify_worker.py")
_BRACES = re.compile(r"\\.|[{}]", re.DOTALL)


def boxed_answer(response: str) -> str | None:
    r"""The content of the last `\boxed{…}` behind any thinking; None without one."""
    response = response.rpartition("</think>")[2]
    _, box, rest = response.rpartition(r"\boxed{")
    if not box:
        return None
    depth = 1
    for match in _BRACES.finditer(rest):
        depth += {"{": 1, "}": -1}.get(match.group(), 0)
        if depth == 0:
            return rest[: match.start()].strip()
    return None


class MathGrader:
    """math-verify in a process that ends when an answer takes more processor time than the limit.

    Such an answer is ungraded, so a verdict may depend on the machine's speed, though not on what
    else runs on it; such answers are rare. Verdicts are remembered. Use as a context manager, or
    call `close`; the process ends with this one in any case.
    """

    def __init__(self, seconds: float = 10.0):
        self._sandbox = Sandbox(_WORKER, seconds=seconds)
        self._known: dict[tuple[str, str], Verdict] = {}
        self._readable: set[str] = set()

    def __enter__(self) -> "MathGrader":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process."""
        self._sandbox.close()

    def grade(self, reference: str, response: str) -> Verdict:
        """The verdict on a whole response.

        Raises:
          UserError: if math-verify is not installed, or cannot read the reference answer, whatever
            the response.
        """
        if reference not in self._readable:
            self._check_reference(reference)
        answer = boxed_answer(response)
        if answer is None:
            return Verdict(False, None)
        if (reference, answer) not in self._known:
            self._known[reference, answer] = self._verdict(reference, answer)
        return self._known[reference, answer]

    def _check_reference(self, reference: str) -> None:
        if importlib.util.find_spec("math_verify") is None:
            raise UserError("grading needs math-verify: pip install 'lopd[eval]'")
        reply = self._sandbox.ask({"gold": reference})
        if reply is None:
            raise UserError(f"math-verify comes to no end with the reference {reference!r:.80}")
        if "error" in reply:
            raise UserError(reply["error"])
        self._readable.add(reference)

    def _verdict(self, reference: str, answer: str) -> Verdict:
        reply = self._sandbox.ask({"gold": reference, "answer": answer})
        if reply is None:
            return Verdict(False, answer, ungraded=True)
        return Verdict(reply["correct"], reference if reply["correct"] else reply["label"])
