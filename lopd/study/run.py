"""Runs what is missing of a study."""

import time
from collections.abc import Iterator, Sequence

from lopd import preflight
from lopd.artefacts.artefact import Artefact
from lopd.config.values import changed
from lopd.errors import UserError
from lopd.machine import shutdown
from lopd.stages.run import Run
from lopd.study.design import Arm, Study, path_to
from lopd.study.store import Store

_POLL_SECONDS = 1.0


def steps(study: Study, store: Store, arm: Arm, seed: int) -> Iterator[tuple[Run, str]]:
    """The stages of an arm in order; each must be complete before the next is asked for."""
    teachers = {}
    for name in dict.fromkeys((arm.writer, arm.teacher)):
        run = store.open_run(study.teacher_config(name))
        yield run, "teacher"
        teachers[name] = str(run.home("teacher"))
    after = study.after_config(arm, seed)
    given = {"teacher.checkpoint": teachers[arm.teacher]}
    if arm.student != "teacher":
        config = study.start_config(arm, seed)
        start = store.open_run(changed(config, {"teacher.checkpoint": teachers[arm.writer]}))
        yield start, "sft_data"
        yield start, "sft"
        given["sft.checkpoint"] = str(start.home("sft"))
    run = store.open_run(changed(after, given))
    for stage in (*path_to(arm.student), "eval"):
        yield run, stage


def finished(study: Study, store: Store, arm: Arm, seed: int) -> dict[str, Artefact] | None:
    """The artefacts of an arm by stage, or None if one is missing."""
    found = {}
    for run, stage in steps(study, store, arm, seed):
        found[stage] = Artefact(run.home(stage))
        if not found[stage].complete:
            return None
    return found


def check(study: Study, store: Store, names: Sequence[str]) -> list[Arm]:
    """The arms to run, each with settings that pass the pipeline's checks.

    Raises:
      UserError: one line that names the arm, before any work.
    """
    arms = study.check(names)
    for arm in arms:
        before = ("teacher",) if arm.student == "teacher" else ("teacher", "sft_data", "sft")
        start = store.open_run(study.start_config(arm, study.seeds[0]))
        after = store.open_run(study.after_config(arm, study.seeds[0]))
        try:
            preflight.check_settings(start, before)
            preflight.check_settings(after, (*path_to(arm.student), "eval"))
        except UserError as error:
            raise UserError(f"arm {arm.name!r}: {error}") from error
    return arms


def run(study: Study, store: Store, arms: Sequence[Arm], seeds: Sequence[int]) -> None:
    """Runs every arm with every seed, leaving to other processes what they are at.

    Several processes may do the same study, in any order of seeds: a pair of arm and seed that
    another one works on is looked at again at the end, and taken over if that process has ended.
    """
    _make_teachers(study, store, arms)
    waiting = [(seed, arm) for seed in seeds for arm in arms]
    total, started = len(waiting), time.perf_counter()
    while waiting:
        postponed = []
        for seed, arm in waiting:
            shutdown.check()
            with store.locked(f"arm-{arm.name}-{seed}", wait=False) as taken:
                if taken:
                    _run_arm(study, store, arm, seed)
                else:
                    postponed.append((seed, arm))
        if len(postponed) == len(waiting):
            time.sleep(_POLL_SECONDS)
        waiting = postponed
    seconds = time.perf_counter() - started
    print(f"{total} runs complete ({seconds:.0f} s of this process)", flush=True)


def _make_teachers(study: Study, store: Store, arms: Sequence[Arm]) -> None:
    """Makes the teachers that no other process is at, so that several make one each."""
    for name in dict.fromkeys(name for arm in arms for name in (arm.writer, arm.teacher)):
        run = store.open_run(study.teacher_config(name))
        with store.locked(f"teacher-{name}", wait=False) as taken:
            if taken:
                store.make(run, "teacher", f"teacher {name}")


def _run_arm(study: Study, store: Store, arm: Arm, seed: int) -> None:
    if finished(study, store, arm, seed):
        return
    title, spent = f"seed {seed}, {arm.name}", {}
    wall = time.perf_counter()
    for run, stage in steps(study, store, arm, seed):
        shutdown.check()
        cpu = time.process_time()
        store.make(run, stage, f"{title}: {stage}")
        spent[stage] = spent.get(stage, 0.0) + time.process_time() - cpu
    parts = ", ".join(f"{stage} {cpu:.0f}" for stage, cpu in spent.items() if cpu >= 0.5)
    total = sum(spent.values())
    wall = time.perf_counter() - wall
    print(f"{title}: done in {wall:.0f} s, {total:.0f} s of CPU ({parts})", flush=True)
