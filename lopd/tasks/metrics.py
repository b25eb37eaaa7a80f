"""Accuracy from several samples per problem, with intervals. Pure functions.

`correct` is a boolean array [problems, samples]. Samples of one problem are not independent, so
every interval is over per-problem scores: the problems are the random draw.

An answer that its grader could not decide is neither right nor wrong. `summarize` leaves it out of
every figure, and the figure's interval reaches from where all such answers are wrong to where all
are right.
"""

import collections
import math
from collections.abc import Callable, Sequence

import numpy as np
from scipy.special import stdtrit

Labels = Sequence[Sequence[str | None]]
"""Of each answer, [problems][samples]; equal answers share one, None is no answer."""


def average(correct: np.ndarray) -> np.ndarray:
    """Per problem, the share of right samples: its mean over problems is avg@k, or mean pass@1."""
    return np.asarray(correct, np.float64).mean(axis=1)


def pass_at_k(correct: np.ndarray, k: int) -> np.ndarray:
    """Per problem, the unbiased estimate of the chance that one of k samples is right.

    With c of n samples right, 1 − C(n−c, k) / C(n, k) (arXiv 2107.03374, equation 1).

    Raises:
      ValueError: unless 1 <= k <= n.
    """
    n = np.shape(correct)[1]
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} from {n} samples per problem")
    wrong = n - np.asarray(correct).sum(axis=1)
    return np.array([1 - math.comb(int(w), k) / math.comb(n, k) for w in wrong])


def _vote(answers: Sequence[tuple[bool, str | None]]) -> float:
    """The chance that the commonest answer is right, ties drawn at random; None does not vote."""
    votes = collections.Counter(
        (right, "" if right else label) for right, label in answers if label is not None
    )
    most = max(votes.values(), default=0)
    winners = [right for (right, _), count in votes.items() if count == most]
    return sum(winners) / len(winners) if winners else 0.0


def majority_at_k(labels: Labels, correct: np.ndarray, k: int) -> np.ndarray:
    """Per problem, the estimated chance that the majority of k samples is right.

    The mean over the n // k consecutive groups of k samples, which are independent given the
    problem. Right answers vote together whatever their label; wrong ones by label; samples with
    label None not at all.

    Raises:
      ValueError: unless 1 <= k <= n.
    """
    n = np.shape(correct)[1]
    if not 1 <= k <= n:
        raise ValueError(f"majority@{k} from {n} samples per problem")
    scores = []
    for rights, names in zip(np.asarray(correct, bool).tolist(), labels, strict=True):
        answers = list(zip(rights, names, strict=True))
        groups = [answers[i : i + k] for i in range(0, n - k + 1, k)]
        scores.append(sum(map(_vote, groups)) / len(groups))
    return np.array(scores)


def clustered_interval(scores: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of the mean of per-problem scores in [0, 1], over draws of problems.

    Wilson's interval with Student's t over problems, for the number of independent trials that
    would have the standard error found: p (1 − p) / (s² / P) for P problems whose scores have mean
    p and variance s². It stays within [0, 1], and is never a point: when all scores are equal, each
    problem counts as one trial. One problem says nothing about others: [0, 1].
    """
    scores = np.asarray(scores, np.float64)
    count, mean = len(scores), float(scores.mean())
    if count < 2:
        return 0.0, 1.0
    variance = float(scores.var(ddof=1))
    same = np.ptp(scores) == 0
    trials = count if same else mean * (1 - mean) * count / variance
    t = float(stdtrit(count - 1, 0.975))
    scale = 1 + t**2 / trials
    center = (mean + t**2 / (2 * trials)) / scale
    half = t / scale * math.sqrt(mean * (1 - mean) / trials + t**2 / (4 * trials**2))
    return max(0.0, center - half), min(1.0, center + half)


def _scores(
    score: Callable[[np.ndarray, Labels], np.ndarray],
    correct: np.ndarray,
    labels: Labels,
    known: np.ndarray,
) -> np.ndarray:
    """A score of each problem from its known samples; problems without one are left out."""
    return np.concatenate(
        [
            score(rights[None, there], [[x for x, k in zip(names, there, strict=True) if k]])
            for rights, names, there in zip(correct, labels, known, strict=True)
            if there.any()
        ]
        or [np.zeros(0)]
    )


def summarize(correct: np.ndarray, labels: Labels, ungraded: np.ndarray | None = None) -> dict:
    """avg@k, pass@k and majority@k for all k samples, each with its 95 % interval, and counts.

    Args:
      correct: bool [problems, samples], False where there is no verdict.
      labels: of each answer, as `lopd.tasks.Verdict.label`.
      ungraded: bool [problems, samples], where there is no verdict (`Verdict.ungraded`); by default
        nowhere. Of a problem's k samples the others count; NaN if there are none at all.

    Raises:
      ValueError: if an answer is both correct and ungraded.
    """
    correct = np.asarray(correct, bool)
    problems, k = correct.shape
    ungraded = np.zeros(correct.shape, bool) if ungraded is None else np.asarray(ungraded, bool)
    if (correct & ungraded).any():
        raise ValueError("an answer without a verdict is called correct")
    figures: dict[str, Callable[[np.ndarray, Labels], np.ndarray]] = {
        f"avg@{k}": lambda rights, names: average(rights),
        f"pass@{k}": lambda rights, names: pass_at_k(rights, rights.shape[1]),
        f"majority@{k}": lambda rights, names: majority_at_k(names, rights, rights.shape[1]),
    }
    found = {}
    for name, score in figures.items():
        values = _scores(score, correct, labels, ~ungraded)
        if not len(values):
            found[name] = {"value": math.nan, "ci95": [0.0, 1.0]}
            continue
        cases = [values]
        if ungraded.any():  # all of them wrong, all of them right
            everything = np.ones(correct.shape, bool)
            cases += [_scores(score, x, labels, everything) for x in (correct, correct | ungraded)]
        lows, highs = zip(*map(clustered_interval, cases), strict=True)
        found[name] = {"value": float(values.mean()), "ci95": [min(lows), max(highs)]}
    return {
        "problems": problems,
        "samples_per_problem": k,
        "ungraded": int(ungraded.sum()),
        **found,
    }
