"""Runs the stages in order: skips what is complete, continues what is partial, refuses the rest."""

import json
import time

import jax
import ml_collections
from etils import epath

from lopd import config as lopd_config
from lopd import report
from lopd.artefacts.artefact import Artefact, open_complete
from lopd.checkpoints import hugging_face
from lopd.data.tokenizers import check_same_vocabulary, check_vocabulary, load_tokenizer
from lopd.errors import UserError
from lopd.machine import devices, processes, shutdown
from lopd.machine.storage import absolute, check_url, reason
from lopd.models.shardings import check_divisible
from lopd.stages import (
    adopt,
    control,
    export,
    heldout,
    online,
    opd,
    precompute,
    refresh,
    sft,
    sft_data,
    teacher,
)
from lopd.stages import eval as evaluation
from lopd.stages.run import Context

STAGES = {
    "teacher": teacher,
    "sft_data": sft_data,
    "sft": sft,
    "precompute": precompute,
    "heldout": heldout,
    "opd": opd,
    "online": online,
    "control": control,
    "eval": evaluation,
    "export": export,
}


WORKER_STAGES = ("sft_data", "precompute", "heldout")
"""Stages that `--worker` can split: those that sample into shards."""

_REPORT_WITHIN = 15
"""Seconds after a signal in which a page is still begun; it takes some three."""

# Whose position limit a stage's responses must keep within.
_SAMPLED = {"teacher": {*WORKER_STAGES}, "student": {"precompute", "heldout"}}
_READ_PROMPTS = (sft_data, precompute, heldout, online, evaluation)
_NEEDS = {
    "teacher": (),
    "sft_data": ("teacher",),
    "sft": ("sft_data",),
    "precompute": ("teacher", "sft"),
    "heldout": ("teacher", "sft"),
    "opd": ("sft", "precompute"),
    "online": ("teacher", "sft"),
    "control": ("sft", "sft_data"),
    "eval": (),
    "export": ("opd",),
}


def _needs(ctx: Context, stage: str) -> tuple[str, ...]:
    """The artefacts that a stage reads."""
    if ctx.given(stage) or ctx.external(stage) or (stage == "sft_data" and sft_data.given(ctx)):
        return ()
    if stage == "opd" and refresh.wanted(ctx.config):
        decides = ("heldout",) if ctx.config.opd.refresh_below else ()
        return (*_NEEDS[stage], "teacher", *decides)
    return _NEEDS[stage]


def _sections(ctx: Context, stages: tuple[str, ...]) -> set[str]:
    """The stages, and those by whose settings others of them sample."""
    resamples = "online" in stages or ("opd" in stages and refresh.wanted(ctx.config))
    return {*stages, *(("precompute",) if resamples else ())}


def _check_writable(workdir: epath.Path) -> None:
    """Every process can write in the directory, and it is the same one."""
    process = jax.process_index()
    probe = workdir / f".write-probe-{process}"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
    except Exception as error:  # the clients of buckets have their own kinds
        raise UserError(f"--workdir={workdir} cannot be written: {reason(error)}") from error
    processes.barrier("probes written")
    shared = (workdir / ".write-probe-0").exists()
    if processes.any_process(not shared):
        raise UserError(
            f"--workdir={workdir} is not the same directory on all {jax.process_count()} "
            "processes: give a network file system or a bucket (gs://) that all of them see"
        )
    probe.unlink()


def _say(text: str) -> None:
    if processes.is_main():
        print(text, flush=True)


def _uses_teacher(ctx: Context, stages: tuple[str, ...]) -> bool:
    if ctx.external("teacher") or {"teacher", "precompute", "heldout"} & _sections(ctx, stages):
        return True
    return "sft_data" in stages and not sft_data.given(ctx)


def _check_urls(config: ml_collections.ConfigDict) -> None:
    """Refuses URLs that a stage would come upon after hours."""
    task = config.task
    for path in (task.sft_prompts, task.opd_prompts, *task.problems.split(","), config.opd.cache):
        check_url(path)


def check_settings(ctx: Context, stages: tuple[str, ...]) -> None:
    """Everything that can be refused by looking at the settings alone.

    Raises:
      UserError: one line that says what is wrong.
    """
    lopd_config.validate(ctx.config, stages)
    _check_urls(ctx.config)
    for which in ("teacher", "student"):
        if which == "teacher" and not _uses_teacher(ctx, stages):
            continue
        model = ctx.model(which)
        for name in _SAMPLED[which] & _sections(ctx, stages):
            longest = ctx.config.prompt_length + ctx.config[name].response_length
            if longest > model.max_position_embeddings:
                raise UserError(
                    f"prompt_length + {name}.response_length = {longest} is more than the "
                    f"{which}'s max_position_embeddings={model.max_position_embeddings}"
                )
        check_divisible(model, ctx.mesh, f"{which}.model")
        check_vocabulary(ctx.tokenizer, model.vocab_size, f"the embedding of {which}.model")
    top_k = ctx.config.precompute.teacher_top_k
    if top_k and _uses_teacher(ctx, stages) and top_k > ctx.model("teacher").vocab_size:
        raise UserError(f"precompute.teacher_top_k={top_k}: the teacher has fewer tokens")
    rows, split = ctx.config.runtime.rows_per_micro, ctx.mesh.shape["data"] * ctx.mesh.shape["fsdp"]
    if rows % split:
        raise UserError(
            f"runtime.rows_per_micro={rows} must be a multiple of data × fsdp = {split}"
        )


def _check_artefacts(ctx: Context, stages: tuple[str, ...]) -> None:
    """Refuses what is there and was made from other settings, and what is needed and not there."""
    for name, stage in STAGES.items():
        artefact = Artefact(ctx.place(name) if name in stages else ctx.home(name))
        if ctx.given(name):
            open_complete(ctx.given(name), f"the {name} artefact given in the settings")
        elif ctx.external(name):
            artefact.check("settings", adopt.settings(ctx, name))
        elif name in stages:
            artefact.check("settings", stage.settings(ctx))
            if stage in _READ_PROMPTS and not artefact.complete:
                stage.prompts(ctx)
    if "opd" in stages:
        opd.check_before_work(ctx, stages)
    if "online" in stages:
        opd.batch_contents(ctx, ctx.config.precompute.teacher_top_k, "what online OPD scores")
    # A stage reads artefacts that are given, already there, or about to be made.
    for name in stages:
        for needed in _needs(ctx, name):
            if not ctx.given(needed) and not ctx.external(needed) and needed not in stages:
                ctx.input(needed)
    _check_checkpoints(ctx, stages)


def _check_checkpoints(ctx: Context, stages: tuple[str, ...]) -> None:
    """What Hugging Face checkpoints must agree on before any is used."""
    for path in (ctx.external("sft"), ctx.config.student.checkpoint):
        if path:
            hugging_face.resolve_checkpoint(path)
    if ctx.external("teacher"):
        teacher = hugging_face.resolve_checkpoint(ctx.external("teacher"))
        check_same_vocabulary(
            load_tokenizer(teacher), ctx.tokenizer, f"the tokenizers of {teacher} and the student"
        )
    scored = {"precompute", "heldout"} & _sections(ctx, stages)
    if ctx.external("sft") and scored and not ctx.config.sft.teacher:
        raise UserError(
            f"sft.checkpoint={ctx.external('sft')} was fine-tuned elsewhere: say in sft.teacher "
            "who wrote its data (the method needs the teacher that scores to be the same)"
        )


def run(
    config: ml_collections.ConfigDict,
    workdir: str,
    stages: tuple[str, ...] = (),
    worker: tuple[int, int] | None = None,
) -> None:
    """Runs stages (those of the config by default) in a working directory.

    With a `worker` (i, N), samples part i of N into WORKDIR/STAGE-i-of-N, for
    `python -m lopd.cache merge`.

    Raises:
      UserError: for bad settings, before any work; or for an artefact made with other ones.
    """
    stages = tuple(stages) or tuple(config.stages)
    ctx = Context(config, absolute(workdir), devices.make_mesh(config.mesh.to_dict()), worker)
    if worker and not {*stages} <= {*WORKER_STAGES}:
        raise UserError(
            f"--worker splits {', '.join(WORKER_STAGES)} only: say which with --stages, once what "
            "they need is there"
        )
    check_settings(ctx, stages)
    _check_artefacts(ctx, stages)
    _check_writable(ctx.workdir)
    ordered = [name for name in STAGES if name in stages or ctx.external(name)]
    try:
        _run_stages(ctx, ordered)
    except shutdown.Stopped:
        # What a stop was for may come half a minute after the signal, and leaving with the right
        # code goes before a page.
        if processes.is_main() and shutdown.seconds_since_request() < _REPORT_WITHIN:
            with shutdown.ignored():
                _write_report(ctx, failed=True)
        raise
    except BaseException:
        # What the stages have left is looked at most after a failure.
        if processes.is_main():
            _write_report(ctx, failed=True)
        raise
    if processes.is_main():
        _print_summary(ctx, ordered)
        _write_report(ctx, failed=False)


def _run_stages(ctx: Context, ordered: list[str]) -> None:
    for number, name in enumerate(ordered, start=1):
        processes.check_stop()
        title = f"[{number}/{len(ordered)}] {name}"
        if ctx.given(name):
            _say(f"{title}: given, {ctx.given(name)}")
            continue
        run_stage(ctx, name, title)


def _write_report(ctx: Context, failed: bool) -> None:
    page = report.write_after_run(ctx.workdir, failed)
    if page:
        print(f"report: {page}", flush=True)


def identify(ctx: Context, name: str) -> tuple[dict, dict]:
    """The settings and the inputs that a stage's artefact is made from: all that it depends on.

    Raises:
      UserError: if an artefact that it reads is missing or does not fit.
    """
    if ctx.external(name):
        return adopt.settings(ctx, name), adopt.inputs(ctx, name)
    return STAGES[name].settings(ctx), STAGES[name].inputs(ctx)


def run_stage(ctx: Context, name: str, title: str) -> None:
    """Runs or continues one stage, or skips it if its artefact is complete."""
    artefact = Artefact(ctx.home(name) if ctx.external(name) else ctx.place(name))
    settings, inputs = identify(ctx, name)
    artefact.check("settings", settings)
    artefact.check("inputs", inputs)
    if artefact.complete:
        _say(f"{title}: complete, skipped")
        return
    _say(f"{title}{': continued' if artefact.manifest else ''}")
    processes.barrier(f"{name} looked at")  # before it changes
    start = time.perf_counter()
    artefact.begin(name, settings, inputs)
    before = artefact.manifest["seconds"]
    external = ctx.external(name)
    outputs = adopt.run(ctx, artefact, name) if external else STAGES[name].run(ctx, artefact)
    artefact.manifest["seconds"] = before + time.perf_counter() - start
    artefact.finish(outputs)


def _print_accuracies(results: dict) -> None:
    """For each test set a table: models down, ways of sampling across."""
    first = next(iter(results["models"].values()))
    for test in dict.fromkeys(task.rpartition("/")[0] for task in first):
        tasks = [task for task in first if task.rpartition("/")[0] == test]
        print(f"\naccuracy on {test} ('{results['split']}'), 95 % interval")
        print(f"{'':10}" + "".join(f"{task.rpartition('/')[2]:>26}{'n':>8}" for task in tasks))
        for model, by_task in results["models"].items():
            cells = "".join(
                f"{by_task[t]['accuracy']:>10.1%}  "
                f"[{by_task[t]['ci95'][0]:5.1%}, {by_task[t]['ci95'][1]:5.1%}]{by_task[t]['n']:>8}"
                for t in tasks
            )
            print(f"{model:10}{cells}")


def _print_summary(ctx: Context, stages: list[str]) -> None:
    """Accuracies, if there are any, and the time that each stage took."""
    summary = ctx.workdir / "eval" / "summary.json"
    if summary.exists():
        _print_accuracies(json.loads(summary.read_text()))
    seconds = {}
    for name in stages:
        artefact = Artefact(ctx.place(name))
        if artefact.complete:
            seconds[name] = artefact.manifest["seconds"]
    times = "  ".join(f"{name} {s:.0f}" for name, s in seconds.items())
    print(f"\nseconds: {times}  total {sum(seconds.values()):.0f}\nresults in {ctx.workdir}")
