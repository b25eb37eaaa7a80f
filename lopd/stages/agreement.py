"""What tokenizers, chat templates and end tokens of a run's models must agree on.

Checked before anything is sampled. A teacher answers, and scores, prompts that are rendered by the
run's tokenizer; if its own template renders them otherwise, it works off its distribution and
nothing else shows it. A base student learns the run's template and ends, whatever its own are.
"""

import itertools
import os
from collections.abc import Iterator, Sequence

from lopd.artefacts.artefact import Artefact
from lopd.data.tokenizers import Tokenizer, check_same_vocabulary, has_tokenizer, load_tokenizer
from lopd.errors import UserError
from lopd.stages.origins import Adopted, Given
from lopd.stages.run import Run
from lopd.tasks import Problem


def check_agreement(run: Run, problems: Sequence[Problem]) -> None:
    """Compares the checkpoints and artefacts that the settings name with the run's tokenizer.

    Args:
      run: the run.
      problems: some that it will ask, to be rendered by each template.

    Raises:
      UserError: where they differ, with what each makes of an example.
    """
    for name in ("teacher", "sft", "precompute"):
        if isinstance(run.origin(name), Given):
            _check_given(run, run.input(name), name)
    teacher = run.teacher_tokenizer
    for name, origin in (("teacher", run.origin("teacher")), ("sft", run.origin("sft"))):
        if not isinstance(origin, Adopted):
            continue
        tokenizer = teacher if name == "teacher" else _of_student(run, str(origin.folder))
        if tokenizer is None:
            continue
        who = f"{name}.checkpoint={origin.checkpoint}"
        check_same_vocabulary(tokenizer, run.tokenizer, f"the tokenizers of {who} and the run")
        _check_templates(run, tokenizer, who, str(origin.folder), problems)
    if run.base_checkpoint:
        own = _of_student(run, str(run.base_folder))
        who = f"student.checkpoint={run.base_checkpoint}"
        if own is not None:
            check_same_vocabulary(own, run.tokenizer, f"the tokenizers of {who} and the run")
    if teacher is not None:
        _check_ends(run, teacher)


def _of_student(run: Run, folder: str) -> Tokenizer | None:
    """The tokenizer in a student's folder; None if there is none, or it is the run's."""
    if os.path.realpath(run.tokenizer_folder) == os.path.realpath(folder):
        return run.tokenizer
    return load_tokenizer(folder) if has_tokenizer(folder) else None


def _check_given(run: Run, artefact: Artefact, name: str) -> None:
    """Refuses an artefact from elsewhere that was made with other ids, or another template."""
    settings, own = artefact.manifest.settings, run.tokenizer
    for key, what in (("tokenizer", own.fingerprint), ("chat_template", own.template_fingerprint)):
        if settings.get(key, what) != what:
            raise UserError(
                f"the {name} artefact {artefact.path} was made with {key} {settings[key]!r}, the "
                f"run's (of {run.tokenizer_source}) is {what!r}: set tokenizer to the one that it "
                "was made with"
            )


def _differences(run: Run, other: Tokenizer, problems: Sequence[Problem]) -> Iterator[tuple]:
    """For each problem that is rendered otherwise: which, and both texts."""
    for problem in problems:
        mine = run.task.encode(problem, run.tokenizer)
        try:
            theirs = run.task.encode(problem, other)
        except UserError:  # without a template there is nothing to differ from
            return
        if list(mine) != list(theirs):
            yield problem, *_around([run.tokenizer.decode(x, special=True) for x in (mine, theirs)])


def _around(texts: Sequence[str], before: int = 60, length: int = 240) -> list[str]:
    """Of two texts the part around the first difference."""
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(*texts, strict=False))
    start = max(0, len([*same]) - before)
    return [("…" if start else "") + text[start : start + length] for text in texts]


def _check_templates(
    run: Run, other: Tokenizer, who: str, folder: str, problems: Sequence[Problem]
) -> None:
    """Refuses a model whose own template renders the run's prompts, or ends turns, otherwise."""
    way_out = (
        f"set tokenizer={folder}, so that prompts are rendered as it knows them, or give a model "
        "of the same template"
    )
    for problem, mine, theirs in _differences(run, other, problems):
        raise UserError(
            f"the chat templates differ: prompt {problem.problem_id} is {mine!r} by the run's "
            f"tokenizer ({run.tokenizer_source}), and {theirs!r} by {who}: {way_out}"
        )
    ends = run.tokenizer.turn_end, other.turn_end
    if None not in ends and ends[0] != ends[1]:
        mine, theirs = (f"…the answer{other.tokens[i]}" for i in ends)
        raise UserError(
            f"the chat templates differ: an answer ends {mine!r} by the run's tokenizer "
            f"({run.tokenizer_source}), and {theirs!r} by {who}: {way_out}"
        )


def _check_ends(run: Run, teacher: Tokenizer) -> None:
    """Refuses responses that are to end with a token that the teacher never ends with.

    What the teacher itself writes ends as it does, and sampling stops at `Run.end_ids`, so there a
    Base/Instruct pair may name different tokens.
    """
    learnt: dict[str, int] = {}
    if run.settings.sft_data.responses == "given" and not isinstance(run.origin("sft"), Adopted):
        learnt[f"the responses of {run.settings.task.sft_prompts}"] = run.tokenizer.end_id
    if isinstance(origin := run.origin("sft"), Adopted):
        own = _of_student(run, str(origin.folder))
        learnt[f"the answers of sft.checkpoint={origin.checkpoint}"] = (own or run.tokenizer).end_id
    names = run.tokenizer.tokens
    for what, end in learnt.items():
        if end not in teacher.end_ids:
            theirs = ", ".join(f"'…the answer{names[i]}'" for i in teacher.end_ids)
            raise UserError(
                f"{what} end as '…the answer{names[end]}', those of "
                f"teacher.checkpoint={run.settings.teacher.checkpoint} as {theirs}: the teacher "
                "would score every end as next to impossible; use a tokenizer and data that end "
                "turns as the teacher does"
            )
