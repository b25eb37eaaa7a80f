r"""Prompts from files, and mathematics with checkable answers (AIME, HMMT) by math-verify.

The answer is what the last `\boxed{…}` of a response holds. math-verify decides whether it equals
the reference; it runs in a process of its own, because there are short answers that it never
finishes, and those must cost a time limit and not the run.
"""

import contextlib
import dataclasses
import importlib.util
import json
import pathlib
import re
import subprocess
import sys
from collections.abc import Iterator

import ml_collections

from lopd.data.sources import Example, Messages, fill_prompt, load_examples, split_column_map
from lopd.data.tokenizers import Tokenizer
from lopd.errors import UserError
from lopd.tasks.metrics import Verdict

_WORKER = pathlib.Path(__file__).with_name("math_verify_worker.py")
_BRACES = re.compile(r"\\.|[{}]", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class MathProblem:
    """One problem: its place in the source, the conversation that asks it, and what is known."""

    problem_id: int
    messages: Messages
    answer: str | None
    response: str | None

    @property
    def prompt(self) -> str:
        """The text of the last turn."""
        return self.messages[-1]["content"]


def _to_problem(problem_id: int, example: Example, template: str) -> MathProblem:
    last = example.messages[-1]
    asked = {**last, "content": fill_prompt(template, last["content"])}
    messages = (*example.messages[:-1], asked)
    return MathProblem(problem_id, messages, example.answer, example.response)


def load_tests(source: str, template: str) -> list[MathProblem]:
    """The problems of a source (see `lopd.data.sources`), in its order, each with its answer.

    Raises:
      UserError: if the source cannot be read, or a problem has no answer.
    """
    problems = []
    for i, example in enumerate(load_examples(source)):
        if example.answer is None:
            text = example.messages[-1]["content"]
            raise UserError(f"{source}: problem {i} ({text[:40]!r}…) has no answer to grade by")
        problems.append(_to_problem(i, example, template))
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
    """Problems of files or datasets: `task.sft_prompts`, `opd_prompts` and `problems`.

    `task.problems` may name several sources, separated by commas.
    """

    name = "math"

    def __init__(self, settings: ml_collections.ConfigDict):
        self._settings = settings
        self._grader: Grader | None = None

    def _source(self, key: str) -> str:
        if not self._settings[key]:
            raise UserError(
                f"task.{key} is not set: a JSONL or Parquet file, a TFDS name or folder"
            )
        return self._settings[key]

    def problems(self, split: str, count: int, seed: int) -> Iterator[MathProblem]:
        """The prompts of a source: `count` drawn with the seed, or all, in order, for 0.

        Raises:
          UserError: if the source is not set or cannot be read.
        """
        examples = load_examples(self._source(f"{split}_prompts"), count=count, seed=seed)
        for i, example in enumerate(examples):
            yield _to_problem(i, example, self._settings.prompt)

    def tests(self, split: str, count: int, seed: int) -> dict[str, list[MathProblem]]:
        """The first `count` problems of every source (all for 0), by the name of its file.

        Raises:
          UserError: if a source is not set or cannot be read, or two have the same name.
        """
        del split, seed
        tests = {}
        for source in self._source("problems").split(","):
            name = pathlib.Path(split_column_map(source)[0]).stem
            if name in tests:
                raise UserError(f"task.problems={self._settings.problems}: two are called {name}")
            tests[name] = load_tests(source, self._settings.prompt)[: count or None]
        return tests

    def encode(self, problem: MathProblem, tokenizer: Tokenizer) -> list[int]:
        """The prompt in the checkpoint's chat template."""
        return tokenizer.render(problem.messages, thinking=self._settings.thinking)

    def grade(self, problem: MathProblem, response: str) -> Verdict:
        """math-verify's verdict on what the response boxes."""
        self._grader = self._grader or Grader()
        return self._grader.grade(problem.answer, response)
