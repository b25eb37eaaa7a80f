"""Mathematics: boxed answers, math-verify in its process, and what is made of the verdicts."""

import itertools
import math
import pathlib
import time
import types

import numpy as np
import pytest

from lopd.config.settings import MATH_PROMPT, TaskSettings
from lopd.errors import UserError
from lopd.rollouts.requests import PromptSet
from lopd.stages import eval as evaluation
from lopd.tasks import Problem, Verdict, make_task, math_grader, metrics
from lopd.tasks.math_grader import MathGrader, boxed_answer
from lopd.tasks.prompts import load_tests

PROBLEMS = str(pathlib.Path(__file__).parent / "data" / "aime_like.jsonl")
HANGS = "9^{9^{9^{9}}}"


@pytest.fixture(scope="module")
def grader():
    with MathGrader(seconds=20) as grader:
        yield grader


def test_problems_are_read_with_the_papers_prompt():
    problems = load_tests(PROBLEMS, MATH_PROMPT)
    assert [(p.problem_id, p.reference) for p in problems] == [
        (0, "001"),
        (1, r"\frac{3}{2}"),
        (2, r"\sqrt{5}, -\sqrt{5}"),
    ]
    assert problems[2].messages == (
        {
            "role": "user",
            "content": "Question: Find all real $x$ with $x^2 = 5$. Please reason step by step, "
            r"and put your final answer within \boxed{}.",
        },
    )


def test_problem_without_answer_is_named(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"problem": "a", "answer": "1"}\n{"problem": "b"}\n')
    with pytest.raises(UserError, match=r"p\.jsonl: problem 1 \('b'…\) has no answer"):
        load_tests(str(tmp_path / "p.jsonl"), "{problem}")


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"so \boxed{42}.", "42"),
        (r"first \boxed{1}, no: $\boxed{ \frac{1}{2} }$", r"\frac{1}{2}"),
        (r"<think>\boxed{1}</think> it is \boxed{2}", "2"),
        (r"<think>\boxed{1}</think> it is 2", None),
        (r"<think> cut off \boxed{3} in the middle", "3"),
        (r"\boxed{\left\{ 1, 2 \right.}", r"\left\{ 1, 2 \right."),
        (r"\boxed{\text{a}{b{c}}} }", r"\text{a}{b{c}}"),
        (r"\boxed{unclosed {x}", None),
        (r"\boxed{}", ""),
        ("no box", None),
        ("", None),
    ],
)
def test_boxed_answer(response, answer):
    assert boxed_answer(response) == answer


@pytest.mark.parametrize(
    ("gold", "answer", "correct"),
    [
        ("001", "1", True),
        ("204", "204.0", True),
        ("204", "205", False),
        ("73", r"73^\circ", True),
        ("10000", "10{,}000", True),
        (r"\frac{3}{2}", "1.5", True),
        (r"\frac{3}{2}", r"\dfrac32", True),
        (r"\frac{3}{2}", "3/2", True),
        (r"\frac{3}{2}", r"\frac{2}{3}", False),
        (r"\sqrt{5}, -\sqrt{5}", r"-\sqrt{5}, \sqrt{5}", True),
        (r"\sqrt{5}, -\sqrt{5}", r"\sqrt{5}", False),
        (r"1-\frac{2}{\pi}", r"\frac{\pi-2}{\pi}", True),
        ("5", "", False),
        ("5", "???", False),
        ("5", r"\frac{", False),
    ],
)
def test_math_verify_grades(grader, gold, answer, correct):
    verdict = grader.grade(gold, rf"I think it is \boxed{{{answer}}}.")
    assert verdict.correct is correct
    assert (verdict.label == gold) is correct


def test_equal_wrong_answers_share_a_label(grader):
    labels = {grader.grade("7", rf"\boxed{{{a}}}").label for a in ("0.5", r"\frac12", "1/2")}
    assert len(labels) == 1
    assert grader.grade("7", "seven") == Verdict(False, None)


def test_unreadable_reference_is_an_error(grader):
    with pytest.raises(UserError, match="cannot read the reference answer"):
        grader.grade("", r"\boxed{1}")


def test_an_answer_that_hangs_is_killed_and_has_no_verdict():
    with MathGrader(seconds=3) as grader:
        assert grader.grade("204", r"\boxed{204}").correct
        start = time.monotonic()
        expected = Verdict(False, HANGS, ungraded=True)
        assert grader.grade("204", rf"\boxed{{{HANGS}}}") == expected
        assert 3 <= time.monotonic() - start < 30  # one try: it has had its processor time
        assert grader.grade("204", r"\boxed{204.0}") == Verdict(True, "204")  # a new process
        start = time.monotonic()
        assert grader.grade("204", rf"\boxed{{{HANGS}}}") == expected
        assert time.monotonic() - start < 3  # remembered


def test_the_task_of_math_reads_prompts_and_grades_their_references(tmp_path):
    settings = TaskSettings(name="math", problems=PROBLEMS, prompt="{problem}")
    task = make_task(settings)
    ((name, problems),) = task.tests("test", 2, 0).items()
    assert (name, len(problems)) == ("aime_like", 2)
    assert task.grade(problems[1], r"\boxed{1.5}") == Verdict(True, r"\frac{3}{2}")
    assert task.answer_text(problems[1]) == r"\frac{3}{2}"
    assert task.worked_answers(None, 0, 0.0) is None
    with pytest.raises(UserError, match=r"task\.opd_prompts is not set"):
        list(task.problems("opd", None, 0))
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "response": "b"}\n{"prompt": "c"}\n')
    task = make_task(TaskSettings(name="math", sft_prompts=str(tmp_path / "p.jsonl")))
    assert [p.response for p in task.problems("sft", None, 0)] == ["b", None]
    assert len(list(task.problems("sft", 1, 0))) == 1
    with pytest.raises(UserError, match="must be 'addition' or 'math'"):
        make_task(TaskSettings(name="maths"))


def random_answers(rng, problems, samples):
    """Labels 0 to 3 or None, where label "0" is right."""
    drawn = rng.choice([0, 1, 2, 3, 4], p=[0.4, 0.25, 0.15, 0.1, 0.1], size=(problems, samples))
    labels = [[None if x == 4 else str(x) for x in row] for row in drawn]
    return drawn == 0, labels


def test_pass_at_k_is_the_mean_over_all_subsets():
    correct, _ = random_answers(np.random.default_rng(0), 6, 8)
    for k in range(1, 9):
        brute = [
            np.mean([any(row[i] for i in chosen) for chosen in itertools.combinations(range(8), k)])
            for row in correct
        ]
        np.testing.assert_allclose(metrics.pass_at_k(correct, k), brute, rtol=0, atol=1e-12)
    np.testing.assert_allclose(metrics.pass_at_k(correct, 1), metrics.average(correct))
    for k in (0, 9):
        with pytest.raises(ValueError, match=f"pass@{k} from 8"):
            metrics.pass_at_k(correct, k)


def test_majority_by_hand():
    labels = [
        ["a", "b", "b", "c"],  # b wins
        ["a", "a", "b", "b"],  # a tie of two
        [None, None, None, "a"],  # the only vote
        [None] * 4,  # no vote
        ["a", "x", "x", "y"],  # right ones vote together, whatever their labels
    ]
    correct = np.array([
        [0, 1, 1, 0],
        [1, 1, 0, 0],
        [0, 0, 0, 1],
        [0, 0, 0, 0],
        [1, 0, 0, 1],
    ], bool)  # fmt: skip
    assert metrics.majority_at_k(labels, correct, 4).tolist() == [1, 0.5, 1, 0, 0.5]
    # Pairs, ties split: (½·a|b, b|c → 0.5, 0.5), (1, 0), (no vote, 1), (0, 0), (0.5, 0.5).
    assert metrics.majority_at_k(labels, correct, 2).tolist() == [0.5, 0.5, 0.5, 0, 0.5]
    np.testing.assert_allclose(metrics.majority_at_k(labels, correct, 1), correct.mean(1))


def test_majority_matches_every_outcome_of_the_votes():
    """The true chance, by enumeration of all draws of k labels, against many samples."""
    chances = {"0": 0.4, "1": 0.25, "2": 0.15, "3": 0.1, None: 0.1}
    k, true = 3, 0.0
    for draw in itertools.product(chances, repeat=k):
        counts = {x: draw.count(x) for x in draw if x is not None}
        winners = [x for x, n in counts.items() if n == max(counts.values())]
        true += math.prod(chances[x] for x in draw) * ("0" in winners) / max(1, len(winners))
    correct, labels = random_answers(np.random.default_rng(1), 50, 600)
    estimate = metrics.majority_at_k(labels, correct, k).mean()
    assert abs(estimate - true) < 4 * 0.5 / math.sqrt(50 * 200)


def test_interval_by_hand():
    # Scores 0, ½, ½, 1: p = ½, s² = 1/6, so ½·½ / (1/24) = 6 trials; t(3) = 3.1824463.
    t, n = 3.182446305284263, 6
    half = t / (1 + t**2 / n) * math.sqrt(0.25 / n + t**2 / (4 * n * n))
    expected = (0.5 - half, 0.5 + half)
    assert metrics.clustered_interval(np.array([0, 0.5, 0.5, 1])) == pytest.approx(expected)


@pytest.mark.parametrize("scores", [[0.0] * 30, [1.0] * 30, [0.5] * 30, [1.0, 0.0], [0.3]])
def test_interval_is_never_a_point_and_stays_in_range(scores):
    low, high = metrics.clustered_interval(np.array(scores))
    assert 0 <= low <= np.mean(scores) <= high <= 1 and high - low > 0.05


def test_interval_covers_when_samples_of_a_problem_agree():
    """30 problems, 32 samples: hard problems fail nearly always, easy ones nearly never."""
    rng = np.random.default_rng(0)
    ours = naive = 0
    for _ in range(1000):
        scores = rng.binomial(32, rng.beta(1, 0.5, 30)) / 32
        low, high = metrics.clustered_interval(scores)
        ours += low <= 2 / 3 <= high
        p = scores.mean()
        naive += abs(p - 2 / 3) <= 1.96 * math.sqrt(p * (1 - p) / (30 * 32))
    assert 930 <= ours <= 980
    assert naive < 600  # what treating the samples as independent would give


def test_interval_of_one_sample_per_problem_is_nearly_wilsons():
    scores = np.array([1.0] * 700 + [0.0] * 300)
    z = 1.959964
    center = (700 + z**2 / 2) / (1000 + z**2)
    half = z / (1000 + z**2) * math.sqrt(700 * 300 / 1000 + z**2 / 4)
    expected = (center - half, center + half)
    assert metrics.clustered_interval(scores) == pytest.approx(expected, abs=2e-4)


def test_summary_names_k_and_counts():
    correct, labels = random_answers(np.random.default_rng(2), 5, 4)
    summary = metrics.summarize(correct, labels)
    assert summary["problems"] == 5 and summary["samples_per_problem"] == 4
    assert summary["avg@4"]["value"] == pytest.approx(correct.mean())
    assert summary["pass@4"]["value"] == pytest.approx(correct.any(axis=1).mean())
    assert summary["ungraded"] == 0
    with pytest.raises(ValueError, match="without a verdict is called correct"):
        metrics.summarize(correct, labels, correct)
    for name in ("avg@4", "pass@4", "majority@4"):
        low, high = summary[name]["ci95"]
        assert low <= summary[name]["value"] <= high


def test_answers_without_a_verdict_are_neither_right_nor_wrong():
    correct = np.array([[1, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]], bool)
    labels = [["a", "a", "b", "c"], ["b", "b", "c", "c"], ["a", "b", "b", "c"]]
    ungraded = np.array([[0, 0, 1, 0], [1, 1, 1, 1], [0, 1, 1, 0]], bool)
    found = metrics.summarize(correct, labels, ungraded)
    assert found["ungraded"] == 7
    # Problem 1 has no verdict at all; of the others, the samples that have one.
    assert found["avg@4"]["value"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert found["pass@4"]["value"] == 1
    assert found["majority@4"]["value"] == pytest.approx((1 + 1 / 2) / 2)
    wrong = metrics.summarize(correct, labels)
    right = metrics.summarize(correct | ungraded, labels)
    for name in ("avg@4", "pass@4", "majority@4"):
        low, high = found[name]["ci95"]
        assert low <= wrong[name]["ci95"][0] and high >= right[name]["ci95"][1]
        assert low <= found[name]["value"] <= high
    none = metrics.summarize(correct & False, labels, ~ungraded | ungraded)
    assert np.isnan(none["avg@4"]["value"]) and none["avg@4"]["ci95"] == [0, 1]


def test_evaluation_without_its_grader_is_refused_before_work(monkeypatch):
    """math-verify is an extra: its absence must not show only after all training."""
    assert [*evaluation.prompts(run_of("1"))] == ["aime"]
    monkeypatch.setattr(math_grader.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="grading needs math-verify"):
        evaluation.prompts(run_of("1"))


def run_of(*references):
    """A run of math that has problems with these answers to evaluate on."""
    problems = [
        Problem(i, ({"role": "user", "content": "?"},), x) for i, x in enumerate(references)
    ]
    return types.SimpleNamespace(
        task=make_task(TaskSettings(name="math")),
        prompts=types.SimpleNamespace(tests={"aime": PromptSet(problems, [[1]] * len(problems))}),
    )


@pytest.mark.parametrize("reference", ["", "}", "$", r"\frac{1}{", "{3"])
def test_every_reference_is_read_before_work(reference):
    """What math-verify takes for a text alone is equal to no other way of writing it."""
    with pytest.raises(UserError, match=r"aime, problem 1 .*cannot read the reference answer"):
        evaluation.prompts(run_of("025", reference))


def test_references_as_they_are_published_can_be_read():
    evaluation.prompts(
        run_of(
            "025", r"\frac{9 \sqrt{23}}{23}", r"[1,2)", "1,000", r"2^{25} \cdot 26!", r"\text{B}"
        )
    )
