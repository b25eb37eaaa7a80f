"""What the page's two browsers are given: rollouts, and graded evaluation responses."""

import json
from collections.abc import Sequence

from lopd.report.reading import Run

# How much text the browsers may put into one page, whatever the run's size.
_ROLLOUT_TOKENS = 35_000
_RESPONSE_CHARACTERS = 500_000


def rollout_data(runs: Sequence[Run]) -> list[dict]:
    """The rollouts of every run as the browser reads them, whole ones up to a number of tokens."""
    found = []
    for index, run in enumerate(runs):
        budget = _ROLLOUT_TOKENS // len(runs)
        for rollout in run.rollouts:
            budget -= len(rollout["tokens"])
            if budget < 0 and found and found[-1]["run"] == index:
                break
            found.append(
                {
                    "run": index,
                    "id": f"{rollout['prompt_id']}"
                    + (f".{rollout['sample_id']}" if rollout["sample_id"] else ""),
                    "prompt": rollout["prompt"],
                    "tokens": rollout["tokens"],
                    "finished": rollout["finished"],
                    "teacher": [round(v, 3) for v in rollout["teacher_logprobs"]],
                    "before": [round(v, 3) for v in rollout["ref_logprobs"]],
                    "after": [round(v, 3) for v in rollout["student_logprobs"]],
                }
            )
    return found


def response_data(runs: Sequence[Run], models: Sequence[str]) -> dict:
    """Evaluation problems with every model's first response, up to a number of characters."""
    problems, modes = [], dict.fromkeys(())
    for index, run in enumerate(runs):
        by_problem: dict[tuple[str, int], dict] = {}
        for model in [m for m in models if m in run.responses]:
            for row in run.responses[model]:
                modes.setdefault(row["mode"])
                test = row.get("test", "")
                problem = by_problem.setdefault(
                    (test, row["problem"]),
                    {"run": index, "test": test, "prompt": row["prompt"],
                     "answer": row["answer"], "models": {}},
                )  # fmt: skip
                problem["models"].setdefault(model, {})[row["mode"]] = [
                    row["response"],
                    None if row.get("ungraded") else row["correct"],
                    row["finished"],
                ]
        budget = _RESPONSE_CHARACTERS // len(runs)
        # The first problems of every test set, so that none is left out.
        for place in sorted(by_problem, key=lambda place: (place[1], place[0])):
            budget -= len(json.dumps(by_problem[place]))
            if budget < 0:
                break
            problems.append(by_problem[place])
    shown = [m for m in models if any(m in problem["models"] for problem in problems)]
    tests = list(dict.fromkeys(problem["test"] for problem in problems))
    return {"problems": problems, "modes": list(modes), "models": shown, "tests": tests}
