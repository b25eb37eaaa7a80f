r"""Mathematics with checkable answers (AIME, HMMT): the paper's prompt, graded by math-verify.

The answer is what the last `\boxed{…}` of a response holds. math-verify decides whether it equals
the reference; it runs in a process of its own, because there are short answers that it never
finishes, and those must cost a time limit and not the run.
"""

import contextlib
import dataclasses
import importlib.util
import itertools
import json
import pathlib
import re
import subprocess
import sys
from collections.abc import Iterator

import ml_collections

from lopd.data.sources import Columns, load_examples, math_prompt, rewrite_prompts
from lopd.data.tokenizers import Tokenizer
from lopd.errors import UserError
from lopd.tasks.metrics import Verdict

_WORKER = pathlib.Path(__file__).with_name("math_worker.py")
_BRACES = re.compile(r"\\.|[{}]", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class MathProblem:
    """One problem: its place in the file, the whole user message, and the reference answer."""

    problem_id: int
    prompt: str
    answer: str

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation to render."""
        return [{"role": "user", "content": self.prompt}]


def load_problems(source: str, columns: Columns | None = None) -> list[MathProblem]:
    """The problems of a source (see `lopd.data.sources`), in its order, in the paper's prompt.

    Raises:
      UserError: if the source cannot be read, or a problem has no answer.
    """
    problems = []
    for i, example in enumerate(load_examples(source, columns=columns)):
        text = example.messages[-1]["content"]
        if example.answer is None:
            raise UserError(f"{source}: problem {i} ({text[:40]!r}…) has no answer to grade by")
        problems.append(MathProblem(i, math_prompt(text), example.answer))
    return problems


def boxed_answer(response: str) -> str | None:
    r"""What the last `\boxed{…}` holds, after the thinking if there is any; None without one."""
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


class Grader:
    """math-verify in a process that ends when an answer takes longer than the limit.

    An answer that runs into the limit, or takes the process with it, is wrong, so a verdict may
    depend on the machine's speed; such answers are rare and counted in `lost`. Verdicts are
    remembered. Use as a context manager, or call `close`.

    Args:
      seconds: limit per answer, in seconds of wall time, without the start of the process.

    Raises:
      UserError: if math-verify is not installed.
    """

    def __init__(self, seconds: float = 10.0):
        if importlib.util.find_spec("math_verify") is None:
            raise UserError("grading needs math-verify: pip install 'lopd[eval]'")
        self.lost = 0
        self._seconds = seconds
        self._process: subprocess.Popen | None = None
        self._known: dict[tuple[str, str], Verdict] = {}

    def __enter__(self) -> "Grader":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def grade(self, gold: str, response: str) -> Verdict:
        """The verdict on a whole response.

        Raises:
          UserError: if math-verify cannot read the reference answer.
        """
        answer = boxed_answer(response)
        if answer is None:
            return Verdict(False, None)
        if (gold, answer) not in self._known:
            self._known[gold, answer] = self._verdict(gold, answer)
        return self._known[gold, answer]

    def _verdict(self, gold: str, answer: str) -> Verdict:
        if self._process is None or self._process.poll() is not None:
            self._start()
        reply = self._exchange(json.dumps({"gold": gold, "answer": answer}) + "\n")
        if reply is None:
            self.lost += 1
            return Verdict(False, answer)
        if "error" in reply:
            raise UserError(reply["error"])
        return Verdict(reply["correct"], gold if reply["correct"] else reply["label"])

    def _start(self) -> None:
        # -P: the worker's own folder, with its math.py, must not come first on the path.
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(_WORKER), str(self._seconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        if self._exchange("") is None:
            raise UserError(f"the grading process does not start: {sys.executable} {_WORKER}")

    def _exchange(self, request: str) -> dict | None:
        """The reply of the process; None, and no process left, if it ended without one."""
        line = ""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(request)
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        if line.endswith("\n"):
            return json.loads(line)
        self.close()
        return None


class Math:
    """Math problems of files or datasets: `task.sft_prompts`, `opd_prompts` and `problems`."""

    name = "math"

    def __init__(self, settings: ml_collections.ConfigDict):
        self._settings = settings
        self._grader: Grader | None = None

    def problems(self, split: str, count: int, seed: int) -> Iterator[MathProblem]:
        """The problems of a source: `count` drawn with the seed, or all, in order, for 0.

        Evaluation problems (any other split than "sft" and "opd") come in the file's order.

        Raises:
          UserError: if the source is not set or cannot be read.
        """
        key = {"sft": "sft_prompts", "opd": "opd_prompts"}.get(split, "problems")
        source = self._settings[key]
        if not source:
            raise UserError(
                f"task.{key} is not set: a JSONL or Parquet file, a TFDS name or folder"
            )
        if key == "problems":
            yield from itertools.islice(load_problems(source), count or None)
            return
        examples = load_examples(source, count=count, seed=seed)
        for i, example in enumerate(rewrite_prompts(examples, math_prompt)):
            yield MathProblem(i, example.messages[-1]["content"], example.answer or "")

    def encode(self, problem: MathProblem, tokenizer: Tokenizer) -> list[int]:
        """The prompt in the checkpoint's chat template."""
        return tokenizer.render(problem.messages, thinking=self._settings.thinking)

    def grade(self, problem: MathProblem, response: str) -> Verdict:
        """math-verify's verdict on what the response boxes."""
        self._grader = self._grader or Grader()
        return self._grader.grade(problem.answer, response)
