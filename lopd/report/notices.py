"""What makes a run's figures less than they seem: cut responses, answers without a verdict.

Said above the page, and behind the accuracies when a run ends.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from lopd.config.catalogue import BASE, stage_info
from lopd.sampling.cut import MANY


def _cut(name: str, share: float) -> list[str]:
    if share <= MANY:
        return []
    section = stage_info(name).sampling or name
    return [
        f"{name}: {share:.0%} of the responses were cut at {section}.response_length. Raise it, or "
        "find out why the model does not end"
    ]


def of_stage(name: str, outputs: Mapping[str, Any], steps: Iterable[Mapping]) -> list[str]:
    """On what a stage has sampled.

    Args:
      name: of the stage.
      outputs: its manifest's.
      steps: the rows of its metrics.jsonl, if it has one.
    """
    if not stage_info(name).samples_each_step:
        responses, finished = outputs.get("responses"), outputs.get("finished")
        return _cut(name, 1 - finished / responses) if responses and finished is not None else []
    shares = [row["truncated"] for row in steps if row.get("truncated") is not None]
    return _cut(name, sum(shares) / len(shares)) if shares else []


def of_results(results: Mapping[str, Mapping[str, Mapping]]) -> list[str]:
    """On an evaluation, by model and "test/mode"."""
    found = [(m, f"{m} {task}", r) for m, tasks in results.items() for task, r in tasks.items()]
    # The student before any training has not learnt to end, and is nobody's result.
    cut = [
        f"{what} {1 - r['finished']:.0%}"
        for model, what, r in found
        if model != BASE and 1 - r.get("finished", 1) > MANY
    ]
    lost = [
        f"{what} {r['ungraded']} of {r['n'] + r['ungraded']}"
        for _, what, r in found
        if r.get("ungraded")
    ]
    notices = []
    if cut:
        notices.append(
            "eval: many responses were cut at eval.response_length, and count as wrong: "
            + ", ".join(cut)
        )
    if lost:
        notices.append(
            "eval: answers that could not be graded are left out of the accuracies, and their "
            "intervals reach from all of these wrong to all right: " + ", ".join(lost)
        )
    return notices
