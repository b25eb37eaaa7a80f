"""Runs the stages in order: skips what is complete, continues what is partial, refuses the rest."""

import contextlib
import time
from collections.abc import Iterator

from etils import epath

from lopd import preflight, report
from lopd.artefacts.artefact import Artefact
from lopd.config.catalogue import CATALOGUE, STAGES, stage_info
from lopd.config.settings import Settings
from lopd.errors import UserError
from lopd.machine import devices, lock, processes, shutdown
from lopd.machine.storage import absolute
from lopd.preflight import stage_of
from lopd.report import notices, rows
from lopd.stages.origins import Adopted, Given
from lopd.stages.run import Run

_REPORT_WITHIN = 15
"""Seconds after a signal in which a page is still begun; it takes some three."""


def _say(text: str) -> None:
    if processes.is_main():
        print(text, flush=True)


def run(
    settings: Settings,
    workdir: str,
    stages: tuple[str, ...] = (),
    worker: tuple[int, int] | None = None,
) -> None:
    """Runs stages (those of the settings by default) in a working directory.

    With a `worker` (i, N), samples part i of N into WORKDIR/STAGE-i-of-N, for
    `python -m lopd.cache merge`.

    Raises:
      UserError: for bad settings, before any work; or for an artefact made with other ones.
    """
    stages = tuple(stages) or settings.stages
    one = Run(settings, absolute(workdir), devices.make_mesh(settings.mesh.sizes), worker)
    if worker:
        _check_splits(stages)
    preflight.check_settings(one, stages)
    with _alone(one):
        preflight.check_artefacts(one, stages)
        preflight.check_writable(one)
        _run_all(one, [name for name in STAGES if name in stages or _is_adopted(one, name)])


@contextlib.contextmanager
def _alone(run: Run) -> Iterator[None]:
    """Refuses a second run in the same directory; of several processes, the first sees to it."""
    name = "{}-{}-of-{}".format(lock.LOCK, *run.worker) if run.worker else lock.LOCK
    error = None
    with contextlib.ExitStack() as held:
        if processes.is_main():
            try:
                held.enter_context(lock.held(run.workdir, name))
            except UserError as refusal:
                error = refusal
        if processes.any_process(error is not None):
            raise error or UserError(f"--workdir={run.workdir}: see the first process's error")
        yield


def _run_all(run: Run, ordered: list[str]) -> None:
    """The stages, and what is said and left at the end, whichever it is."""
    try:
        _run_stages(run, ordered)
    except shutdown.Stopped:
        # What a stop was for may come half a minute after the signal, and leaving with the right
        # code goes before a page.
        if processes.is_main() and shutdown.seconds_since_request() < _REPORT_WITHIN:
            with shutdown.ignored():
                _write_report(run, failed=True)
        raise
    except BaseException:
        # After a failure people want to see above all what the stages have left.
        if processes.is_main():
            _write_report(run, failed=True)
        raise
    if processes.is_main():
        _print_summary(run, ordered)
        _write_report(run, failed=False)


def _check_splits(stages: tuple[str, ...]) -> None:
    can = [info.name for info in CATALOGUE if info.splits]
    if not {*stages} <= {*can}:
        raise UserError(
            f"--worker splits {', '.join(can)} only: say which with --stages, once what "
            "they need is there"
        )


def _is_adopted(run: Run, name: str) -> bool:
    return isinstance(run.origin(name), Adopted)


def _run_stages(run: Run, ordered: list[str]) -> None:
    for number, name in enumerate(ordered, start=1):
        processes.check_stop()
        title = f"[{number}/{len(ordered)}] {name}"
        if isinstance(origin := run.origin(name), Given):
            _say(f"{title}: given, {origin.named}")
            continue
        run_stage(run, name, title)


def identify(run: Run, name: str) -> tuple[dict, dict]:
    """The settings and the inputs that a stage's artefact is made from: all that it depends on.

    Raises:
      UserError: if an artefact that it reads is missing or does not fit.
    """
    stage = stage_of(run, name)
    return stage.settings(run), stage.inputs(run)


def run_stage(run: Run, name: str, title: str) -> None:
    """Runs or continues one stage, or skips it if its artefact is complete."""
    adopted = _is_adopted(run, name)
    artefact = Artefact(run.home(name) if adopted else run.place(name))
    settings, inputs = identify(run, name)
    artefact.check("settings", settings)
    artefact.check("inputs", inputs)
    _reopen_damaged(artefact, title)
    if artefact.complete:
        _say(f"{title}: complete, skipped")
        return
    _say(f"{title}{': continued' if artefact.manifest else ''}")
    processes.barrier(f"{name}: state read")  # before it changes
    start = time.perf_counter()
    artefact.begin(name, settings, inputs, shared=adopted and run.worker is not None)
    before = artefact.manifest.seconds
    outputs = stage_of(run, name).run(run, artefact)
    artefact.manifest.seconds = before + time.perf_counter() - start
    artefact.finish(outputs)


def _reopen_damaged(artefact: Artefact, title: str) -> None:
    """Strikes what is damaged off an artefact, and says so: its stage then makes it again."""
    if artefact.manifest is None:
        return
    if processes.is_main() and (found := artefact.damaged()):
        first = next(iter(found))
        more = f" (and {len(found) - 1} more)" if found.keys() - {first} else ""
        _say(f"{title}: {artefact.path / first} {found[first]}{more}; what is lost is made again")
        artefact.reopen(found)
    processes.barrier(f"{artefact.path} verified")
    artefact.reload()


# What is said at the end


def _write_report(run: Run, failed: bool) -> None:
    page = report.write_after_run(run.workdir, failed)
    if page:
        print(f"report: {page}", flush=True)


def _print_accuracies(split: str, models: dict[str, dict]) -> None:
    """For each test set a table: models down, ways of sampling across."""
    tasks = dict.fromkeys(task for found in models.values() for task in found)
    for test in dict.fromkeys(task.rpartition("/")[0] for task in tasks):
        shown = [task for task in tasks if task.rpartition("/")[0] == test]
        print(f"\naccuracy on {test} ('{split}'), 95 % interval")
        print(f"{'':10}" + "".join(f"{task.rpartition('/')[2]:>26}{'n':>8}" for task in shown))
        for model, by_task in models.items():
            print(f"{model:10}" + "".join(_cell(by_task[task]) for task in shown))


def _cell(result: dict) -> str:
    low, high = result["ci95"]
    return f"{result['accuracy']:>10.1%}  [{low:5.1%}, {high:5.1%}]{result['n']:>8}"


def _finished(path: epath.Path) -> Artefact | None:
    """An artefact to say something of, if it is finished and can be read."""
    with contextlib.suppress(UserError):
        artefact = Artefact(path)
        return artefact if artefact.complete else None


def _steps(name: str, artefact: Artefact) -> list[dict]:
    """The rows of a stage that says what it has sampled step by step."""
    if not stage_info(name).samples_each_step:
        return []
    return rows.read_lines(rows.Oddities(artefact.path / "metrics.jsonl"), rows.METRICS)


def _print_summary(run: Run, stages: list[str]) -> None:
    """Accuracies, if there are any, what to know of them, and the time that each stage took."""
    done = {name: found for name in stages if (found := _finished(run.place(name)))}
    said = []
    for name, artefact in done.items():
        said += notices.of_stage(name, artefact.outputs, _steps(name, artefact))
    if evaluation := _finished(run.workdir / "eval"):
        results = evaluation.manifest.results
        _print_accuracies(evaluation.manifest.settings["eval"]["split"], results)
        said += notices.of_results(results)
    for notice in said:
        print(f"\nlopd: warning: {notice}")
    times = "  ".join(f"{name} {a.manifest.seconds:.0f}" for name, a in done.items())
    total = sum(a.manifest.seconds for a in done.values())
    print(f"\nseconds: {times}  total {total:.0f}\nresults in {run.workdir}")
