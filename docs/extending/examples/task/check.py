"""A task of JSON answers, from its source to its verdicts."""

import json
import pathlib
import tempfile

from lopd.config.settings import TaskSettings
from lopd.tasks import make_task

source = pathlib.Path(tempfile.mkdtemp()) / "people.jsonl"
row = {"prompt": "Who wrote Emma, as JSON?", "answer": '{"name": "Jane Austen"}'}
source.write_text(json.dumps(row) + "\n")
task = make_task(TaskSettings(name="json", problems=str(source), prompt="{problem}"))
(problem,) = task.tests("test", None, 0)["people"]
assert problem.prompt == "Who wrote Emma, as JSON?"
assert task.grade(problem, 'So:\n```json\n{"name":  "Jane Austen"}\n```').correct
assert not task.grade(problem, '```json\n{"name": "Jane"}\n```').correct
assert task.grade(problem, "Jane Austen").label is None
