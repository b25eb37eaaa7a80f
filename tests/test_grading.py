"""Evaluation by the real math-verify while signals arrive, and what became of lost answers."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest

from lopd.stages import eval as evaluation
from lopd.tasks import Problem, Verdict

ANSWERS = [f"\\frac{{{k}}}{{{k + (k if k % 3 < 2 else 1)}}}" for k in range(2, 26)]
"""To problems whose answer is 1/2: two of three are right, and no two are the same text."""

# Grades as `eval` does, a response every tenth of a second, as a run that signals ask to stop.
EVALUATE = """
import json, sys, time, types
from lopd.config.settings import TaskSettings
from lopd.machine import shutdown
from lopd.stages import eval as evaluation
from lopd.tasks import Problem, make_task

def responses():
    for i, answer in enumerate(answers):
        print(i, flush=True)
        time.sleep(0.1)
        text = "\\\\boxed{" + answer + "}"
        yield types.SimpleNamespace(index=i, tokens=text, finished=True)

answers = json.loads(sys.argv[1])
problem = Problem(0, ({"role": "user", "content": "?"},), reference=r"\\frac12")
run = types.SimpleNamespace(
    task=make_task(TaskSettings(name="math")), tokenizer=types.SimpleNamespace(decode=str)
)
with shutdown.on_signals():
    result, lines = evaluation._grade_one(run, [problem] * 6, responses(), 4)
    print(json.dumps([result, [line["correct"] for line in lines], shutdown.requested()]))
"""


def descendants(pid: int) -> list[int]:
    found = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(x for child in found for x in descendants(int(child)))]


def to_the_group(pid: int) -> None:
    """Ctrl-C in a terminal."""
    os.killpg(pid, signal.SIGINT)


def to_every_process(pid: int) -> None:
    """Slurm's scancel, and the end of a job's time."""
    for one in descendants(pid):
        os.kill(one, signal.SIGTERM)


def hang_up_every_process(pid: int) -> None:
    for one in descendants(pid):
        os.kill(one, signal.SIGHUP)


def kill_the_grader(pid: int) -> None:
    """The kernel, out of memory."""
    for one in descendants(pid)[1:]:
        os.kill(one, signal.SIGKILL)


def evaluate(*signals) -> list:
    process = subprocess.Popen(
        [sys.executable, "-c", EVALUATE, json.dumps(ANSWERS)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        for line in process.stdout:
            if line.startswith("["):
                return json.loads(line)
            if int(line) >= 6 and signals:
                time.sleep(0.11)  # about when it is graded
                signals[0](process.pid)
                signals = signals[1:]
    finally:
        process.kill()
    raise AssertionError(process.stderr.read())


def test_signals_in_the_middle_of_an_evaluation_change_no_verdict():
    undisturbed = evaluate()
    assert undisturbed[0]["ungraded"] == 0 and undisturbed[0]["n"] == 24
    assert undisturbed[1] == [k % 3 < 2 for k in range(2, 26)]
    # A second SIGTERM would end the process, so each kind comes once.
    signals = [kill_the_grader, to_the_group, hang_up_every_process, kill_the_grader]
    disturbed = evaluate(*signals, to_every_process, kill_the_grader, kill_the_grader)
    assert disturbed[:2] == undisturbed[:2] and disturbed[2]


def graded(verdicts, samples=2) -> tuple[dict, list[dict]]:
    """What `eval` makes of verdicts, with None for a response that was cut."""
    answers = iter(verdicts)
    task = types.SimpleNamespace(grade=lambda *_: next(answers), answer_text=lambda _: "3")
    run = types.SimpleNamespace(task=task, tokenizer=types.SimpleNamespace(decode=str))
    problem = Problem(0, ({"role": "user", "content": "?"},), reference="3")
    responses = [
        types.SimpleNamespace(index=i, tokens="ab", finished=verdict is not None)
        for i, verdict in enumerate(verdicts)
    ]
    answers = iter([x for x in verdicts if x is not None])
    problems = [problem] * (len(verdicts) // samples)
    return evaluation._grade_one(run, problems, responses, samples)


RIGHT, WRONG = Verdict(True, "3"), Verdict(False, "4")
LOST = Verdict(False, "5", ungraded=True)


def test_lost_answers_are_no_wrong_ones():
    result, lines = graded([RIGHT, LOST, RIGHT, WRONG, LOST, LOST, WRONG, None])
    assert (result["n"], result["ungraded"]) == (5, 3)
    assert result["accuracy"] == pytest.approx(np.mean([1, 0.5, 0]))  # by problem
    low, high = result["ci95"]
    without = graded([RIGHT, WRONG, RIGHT, WRONG, WRONG, WRONG, WRONG, None])[0]
    everything = graded([RIGHT, RIGHT, RIGHT, WRONG, RIGHT, RIGHT, WRONG, None])[0]
    assert low <= without["ci95"][0] and high >= everything["ci95"][1]
    assert result["finished"] == 7 / 8 and result["mean_response_tokens"] == 2
    assert [line["ungraded"] for line in lines] == [
        False,
        True,
        False,
        False,
        True,
        True,
        False,
        False,
    ]
    assert not any(line["correct"] for line in lines if line["ungraded"])


def test_with_all_answers_graded_nothing_changes():
    result, _ = graded([RIGHT, WRONG, RIGHT, None], samples=1)
    assert (result["accuracy"], result["n"], result["ungraded"]) == (0.5, 4, 0)
    assert "pass@1" not in result
