"""Everything that a run can be refused for before any work: settings, models, files, artefacts."""

import jax

from lopd.artefacts.artefact import WAY_OUT, Artefact, open_complete
from lopd.cache.reader import check_cache, check_whole
from lopd.checkpoints import peft_adapter
from lopd.checkpoints.hugging_face import check_checkpoint
from lopd.config.catalogue import CATALOGUE, STUDENT, TEACHER, stage_info
from lopd.config.checks import check_settings as check_settings_alone
from lopd.data.tokenizers import check_vocabulary
from lopd.errors import UserError
from lopd.machine import processes
from lopd.machine.storage import check_url, reason
from lopd.models.shardings import check_divisible
from lopd.stages.adopt import adoption
from lopd.stages.agreement import check_agreement
from lopd.stages.objective import check_objective
from lopd.stages.origins import Adopted, Given, Made
from lopd.stages.run import Run
from lopd.stages.stage import Stage, load_stage
from lopd.stages.weights import check_adapters, check_shape

_EXAMPLES = 8
"""Problems of each set that the checkpoints' templates are compared on."""


def stage_of(run: Run, name: str) -> Stage:
    """What makes the artefact of `name` in this run: its stage, or the adoption of a checkpoint."""
    return adoption(name) if isinstance(run.origin(name), Adopted) else load_stage(name)


def _uses_teacher(run: Run, stages: tuple[str, ...]) -> bool:
    """Whether some stage needs the teacher's weights, or a checkpoint for them is named."""
    if isinstance(run.origin("teacher"), Adopted):
        return True
    for name in stages:
        info = stage_info(name)
        who = (info.trains, *info.samples(run.settings), *info.scores(run.settings))
        if TEACHER in who:
            return True
    return False


def _check_urls(run: Run) -> None:
    """Refuses URLs that would otherwise fail only hours into the run."""
    task = run.settings.task
    problems = (task.problems or "").split(",")
    for path in (task.sft_prompts, task.opd_prompts, *problems, run.settings.opd.cache):
        if path:
            check_url(path)


def _check_positions(run: Run, which: str, stages: tuple[str, ...]) -> None:
    """Refuses stages whose prompt plus response runs past a model's max_position_embeddings."""
    limit = run.model(which).max_position_embeddings
    for name in stages:
        info = stage_info(name)
        if which in (*info.samples(run.settings), *info.scores(run.settings)):
            section = info.sampling_section
            longest = run.settings.prompt_length
            longest += getattr(run.settings, section).response_length
            if longest > limit:
                raise UserError(
                    f"prompt_length + {section}.response_length = {longest} is more than the "
                    f"{which}'s max_position_embeddings={limit}"
                )


def check_settings(run: Run, stages: tuple[str, ...]) -> None:
    """Everything that can be refused by the settings and the models' shapes.

    Raises:
      UserError: one line that says what is wrong.
    """
    settings = run.settings
    check_settings_alone(settings, stages)
    check_objective(settings.opd)
    _check_urls(run)
    for which in (TEACHER, STUDENT):
        if which == TEACHER and not _uses_teacher(run, stages):
            continue
        model = run.model(which)
        _check_positions(run, which, stages)
        check_divisible(model, run.mesh, f"{which}.model")
        check_vocabulary(run.tokenizer, model.vocab_size, f"the embedding of {which}.model")
    check_adapters(run)
    top_k = settings.precompute.teacher_top_k
    if top_k and _uses_teacher(run, stages) and top_k > run.model(TEACHER).vocab_size:
        raise UserError(f"precompute.teacher_top_k={top_k}: the teacher has fewer tokens")
    rows, split = settings.runtime.rows_per_micro, run.mesh.shape["data"] * run.mesh.shape["fsdp"]
    if rows % split:
        raise UserError(
            f"runtime.rows_per_micro={rows} must be a multiple of data × fsdp = {split}"
        )


def _check_made(run: Run, name: str, wanted: bool) -> None:
    """Refuses an artefact that is there and was made from other settings, and bad prompts."""
    origin = run.origin(name)
    if isinstance(origin, Given):
        given = open_complete(origin.path, f"the {name} artefact given in the settings")
        if stage_info(name).trains:
            check_shape(run, name)
        else:
            check_cache(given)
            check_whole(given)
    elif wanted or isinstance(origin, Adopted):
        stage = stage_of(run, name)
        artefact = Artefact(run.home(name) if isinstance(origin, Adopted) else run.place(name))
        artefact.check("settings", stage.settings(run))
        if not artefact.complete:
            stage.read_prompts(run)


def _check_read(run: Run, stages: tuple[str, ...]) -> None:
    """Refuses finished artefacts of this run that the stages read, made from other settings.

    Not only those that they read themselves: π_ref is of other settings where its data is.
    """
    waiting = [*stages, *(n for s in stages for n in stage_info(s).reads_if_there)]
    seen: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name in seen or not isinstance(run.origin(name), Made):
            continue
        seen.add(name)
        waiting += [*stage_info(name).needs(run.settings), *load_stage(name).reads(run)]
        if name not in stages and (made := Artefact(run.home(name))).complete:
            made.check("settings", load_stage(name).settings(run))


def _reads(run: Run, name: str) -> set[str]:
    """The stages whose artefacts a stage reads itself, if they are there."""
    info = stage_info(name)
    return {*info.needs(run.settings), *info.reads_if_there, *load_stage(name).reads(run)}


def _check_undamaged(run: Run, stages: tuple[str, ...]) -> None:
    """Refuses artefacts that the stages read and do not make, if one of their files is damaged.

    Theirs are looked at, and made again, in their turn.
    """
    made = {name for name in stages if not _is_given(run, name)}
    found = ""
    for name in sorted(set().union(*(_reads(run, name) for name in made)) - made):
        if processes.is_main() and run.exists(name) and not found:
            artefact = run.input(name)
            for file, wrong in artefact.damaged().items():
                found = found or f"{artefact.path / file} {wrong}"
    if processes.any_process(bool(found)):
        found = found or "the first process has found damage"
        raise UserError(f"{found}: {WAY_OUT}")


def check_artefacts(run: Run, stages: tuple[str, ...]) -> None:
    """Refuses what is there and was made from other settings, and what is needed and not there.

    Raises:
      UserError: one line that says what is wrong.
    """
    _check_checkpoints(run, stages)
    for info in CATALOGUE:
        _check_made(run, info.name, info.name in stages)
    _check_read(run, stages)
    check_agreement(run, run.prompts.read(_EXAMPLES))
    for name in stages:
        load_stage(name).check(run, stages)
    # A stage reads artefacts that are given, already there, or about to be made.
    for name in stages:
        made_elsewhere = isinstance(run.origin(name), Given | Adopted)
        for needed in () if made_elsewhere else stage_info(name).needs(run.settings):
            if needed not in stages and not isinstance(run.origin(needed), Given | Adopted):
                run.input(needed)
        # What is there already fits now or never.
        needs = stage_info(name).needs(run.settings)
        if needs and all(run.exists(n) and (_is_given(run, n) or n not in stages) for n in needs):
            load_stage(name).inputs(run)
    _check_undamaged(run, stages)


def _is_given(run: Run, name: str) -> bool:
    return isinstance(run.origin(name), Given)


def _check_checkpoints(run: Run, stages: tuple[str, ...]) -> None:
    """Refuses Hugging Face checkpoints that lack a tensor, or are of another shape than set."""
    models = {"sft": STUDENT, "teacher": TEACHER}
    origins = {name: run.origin(name) for name in models}
    # Resolved now, so that what is missing shows before any work.
    folders = [
        (x.folder, models[n])
        for n, x in origins.items()
        if isinstance(x, Adopted) and not peft_adapter.is_adapter(x.folder)
    ]
    if run.base_checkpoint:
        folders.append((run.base_folder, STUDENT))
    for folder, which in folders:
        check_checkpoint(folder, run.model(which), f"{which}.model")
    student = origins["sft"]
    scored = any(stage_info(name).scores(run.settings) for name in stages)
    if isinstance(student, Adopted) and scored and not run.settings.sft.teacher:
        raise UserError(
            f"sft.checkpoint={student.checkpoint} was fine-tuned elsewhere: say in sft.teacher "
            "who wrote its data (the method needs the teacher that scores to be the same)"
        )


def check_writable(run: Run) -> None:
    """Every process can write in the working directory, and it is the same one.

    Raises:
      UserError: saying why it cannot.
    """
    workdir, process = run.workdir, jax.process_index()
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
