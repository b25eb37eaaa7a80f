"""Before a run downloads anything: what it fetches and needs, and all that is missing, in a table.

Asks the Hub for lists of files, and reads the config.json of models that it does not know. Memory,
disk and hours are by formula, hours at half of the binding floor, and as if every response were as
long as it may be. `eval` is left out, as its problems have not been counted.
"""

import dataclasses
import fnmatch
import importlib.util
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import jax
from huggingface_hub import constants

from lopd.artefacts.artefact import Artefact
from lopd.checkpoints import hugging_face
from lopd.config.catalogue import STUDENT, TEACHER, stage_info
from lopd.config.checks import check_settings
from lopd.config.settings import Settings
from lopd.config.values import changed
from lopd.data import hub as hub_data
from lopd.data.sources import split_column_map
from lopd.errors import UserError
from lopd.hardware import find_chip
from lopd.machine import devices, hub
from lopd.machine.hub import Repository
from lopd.machine.storage import absolute, is_local
from lopd.models.low_rank import count_weights
from lopd.models.memory import GIB, model_size
from lopd.models.presets import PRESETS
from lopd.plan import meshes
from lopd.plan.recipe import Program, count_responses, list_programs, model_shape
from lopd.stages.objective import check_objective
from lopd.stages.pins import known_commits

UTILISATION = 0.5
"""Of the binding floor, as `lopd.plan` takes it by default."""
_STATE_BYTES = 12
"""Of a trained weight: itself and two moments, which a checkpoint brings through the host."""
_TOKEN_BYTES = 16
"""Of a response's token in a cache: its id and three log-probabilities."""
_SLOTS = (128, 64, 32, 16, 8, 4)
_READERS = {
    "sft_prompts": ("sft_data",),
    "opd_prompts": ("precompute", "heldout", "online"),
    "problems": ("eval",),
}


@dataclasses.dataclass(frozen=True)
class Fetch:
    """Something of the Hub that the run reads."""

    what: str
    """For people: the setting and the name."""
    total: int
    """Bytes."""
    here: int
    """Bytes of them in the cache."""


@dataclasses.dataclass(frozen=True)
class StageNeeds:
    """The most that one stage needs."""

    stage: str
    device: float
    """Bytes on one device."""
    host: float
    """Bytes of memory of the host."""
    disk: float
    """Bytes in the working directory."""
    hours: float | None
    """None: of devices that nothing is known of."""


@dataclasses.dataclass(frozen=True)
class Needs:
    """All of it."""

    fetches: list[Fetch]
    """Of the Hub."""
    stages: list[StageNeeds]
    """Those that are not complete, but for `eval`."""
    missing: list[str]
    """One line each, with its cure."""
    tight: list[str]
    """What does not fit, by formula."""
    devices: str
    """Those of this machine, for people."""

    @property
    def to_fetch(self) -> int:
        """Bytes that are not in the cache yet."""
        return sum(fetch.total - fetch.here for fetch in self.fetches)


def _or_noted(missing: list[str], work: Callable, *arguments: Any) -> Any:
    """What a function gives; None if it refuses, and then its line is put down, once."""
    try:
        return work(*arguments)
    except UserError as error:
        if str(error) not in missing:
            missing.append(str(error))
        return None


# What is fetched


def _models(settings: Settings) -> Iterator[tuple[str, str]]:
    """Setting and name of every checkpoint that the run reads."""
    for key in ("teacher.checkpoint", "student.checkpoint", "sft.checkpoint"):
        section, name = key.split(".")
        if value := getattr(getattr(settings, section), name):
            yield key, value


def _fetched(what: str, repository: Repository, commit: str, files: dict[str, int]) -> Fetch:
    here = [size for file, size in files.items() if hub.is_here(repository, commit, file)]
    return Fetch(what, sum(files.values()), sum(here))


def _fetch_model(key: str, name: str) -> Fetch | None:
    if not hugging_face.is_hub_name(name):
        if is_local(name) and not absolute(name).is_dir():
            raise UserError(f"{key}={name}: there is no such folder, and it is no name at the Hub")
        return None
    repository = Repository(name, "model")
    commit = hub.find_commit(repository)
    files = {
        file: size
        for file, size in hub.list_files(repository, commit).items()
        if any(fnmatch.fnmatch(file, pattern) for pattern in hugging_face.WANTED)
    }
    return _fetched(f"{key.partition('.')[0]} {name}", repository, commit, files)


def _sources(settings: Settings, stages: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    for key, readers in _READERS.items():
        named = getattr(settings.task, key)
        if settings.task.name == "math" and not named and {*readers} & {*stages}:
            raise UserError(f"task.{key} is not set: a file, or hf:OWNER/NAME")
        for source in (named or "").split(",") if {*readers} & {*stages} else ():
            if source:
                yield key, source


def _fetch_source(key: str, source: str, commits: dict[str, str]) -> Fetch | None:
    location = split_column_map(commits.get(source, source))[0]
    if not location.startswith(hub_data.PREFIX):
        return None
    return _fetched(f"task.{key} {source}", *hub_data.find_files(location))


# What stages need


def _with_shapes(settings: Settings) -> Settings:
    """The settings with a folder of a config.json in place of models whose shape is not known."""
    for key, name in _models(settings):
        if hugging_face.is_hub_name(name) and name.split("/")[-1] not in PRESETS:
            folder = hub.download(
                Repository(name, "model"), None, ["config.json", "adapter_config.json"]
            )
            settings = changed(settings, {key: str(folder)})
    return settings


def _programs(
    settings: Settings, stage: str, sizes: dict[str, int], rows: int, limit: float
) -> list[Program]:
    """The programs of a stage; sampling in as many slots as fit if the settings leave that open."""
    if settings.runtime.slots is not None:
        return list_programs(settings, (stage,), rows)
    for slots in _SLOTS:
        programs = list_programs(changed(settings, {"runtime.slots": slots}), (stage,), rows)
        if all(p.work(sizes).peak_bytes <= limit for p in programs if p.rows == 0):
            break
    return programs


def _trained_weights(settings: Settings, which: str) -> int:
    """How many numbers training changes: all weights of a model, or its adapters."""
    shape, lora = model_shape(settings, which), settings.student.lora
    if which == STUDENT and lora.rank is not None:
        return count_weights(shape, lora)
    return model_size(shape).total


def _disk(settings: Settings, stage: str) -> float:
    info, disk = stage_info(stage), 0.0
    if info.trains:
        weights = _trained_weights(settings, info.trains)
        disk += weights * (4 + _STATE_BYTES * (settings.runtime.keep_checkpoints + 1))
    if stage == "export":
        disk += 4 * model_size(model_shape(settings, STUDENT)).total
    if info.splits:
        length = getattr(settings, info.sampling_section).response_length
        disk += count_responses(settings, info) * length * _TOKEN_BYTES
    return disk


def _host(settings: Settings, stage: str) -> float:
    """Of one process of those that share the work."""
    info = stage_info(stage)
    who = {info.trains, *info.samples(settings), *info.scores(settings)} & {TEACHER, STUDENT}
    shapes = [model_shape(settings, name) for name in who]
    largest = max((4.0 * x.vocab_size * x.hidden_size for x in shapes), default=0.0)
    if stage == "export":
        return float(hugging_face.MAX_SHARD_BYTES)
    if not info.trains:
        return largest
    state = _STATE_BYTES * _trained_weights(settings, info.trains)
    return max(largest, state / jax.process_count())


def _seconds(program: Program, sizes: dict[str, int]) -> float | None:
    chip, count = find_chip(jax.devices()), jax.device_count()
    if chip is None:
        return None
    work = program.work(sizes)
    floor = max(work.flops / (count * chip.flops), work.bytes_per_chip / chip.bandwidth)
    return program.calls * floor / UTILISATION


def _stage_needs(
    settings: Settings, stage: str, programs: list[Program], sizes: dict[str, int]
) -> StageNeeds:
    own = [program for program in programs if program.stage == stage]
    seconds = [_seconds(program, sizes) for program in own]
    return StageNeeds(
        stage,
        max((program.work(sizes).peak_bytes for program in own), default=0.0),
        _host(settings, stage),
        _disk(settings, stage),
        None if None in seconds else sum(seconds) / 3600,
    )


def _device_memory() -> float | None:
    """Bytes that one device has; None if it does not say, as a CPU."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")


def _host_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _free(path: pathlib.Path) -> int:
    """Bytes that are free on the disk of a path, which need not exist."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def _check_memory(
    settings: Settings, programs: list[Program], sizes: dict[str, int], rows: int
) -> Iterator[str]:
    limit = _device_memory()
    if limit is None:
        return
    for program in programs:
        peak = program.work(sizes).peak_bytes
        if peak <= limit:
            continue
        way_out = _way_out(settings, program, sizes, rows, limit)
        yield (
            f"{program.stage}: {program.name} takes {peak / GIB:.1f} GiB of a device's "
            f"{limit / GIB:.1f}: try {way_out}"
        )


def _way_out(
    settings: Settings, program: Program, sizes: dict[str, int], rows: int, limit: float
) -> str:
    shards = sizes["data"] * sizes["fsdp"]
    for key, value, changed_rows in (
        ("runtime.remat", "full", rows),
        ("runtime.rows_per_micro", shards, shards),
    ):
        programs = list_programs(changed(settings, {key: value}), (program.stage,), changed_rows)
        same = [p for p in programs if p.name == program.name]
        if all(p.work(sizes).peak_bytes <= limit for p in same):
            return f"--config.{key}={value}"
    return "more devices (--config.mesh.fsdp), shorter rows and responses, or a smaller model"


def _check_space(needs: list[StageNeeds], fetches: list[Fetch], workdir: str) -> Iterator[str]:
    disk = sum(stage.disk for stage in needs)
    to_fetch = sum(fetch.total - fetch.here for fetch in fetches)
    cache = pathlib.Path(constants.HF_HUB_CACHE)
    if to_fetch > (free := _free(cache)):
        yield (
            f"{_gb(to_fetch)} are to be fetched into {cache}, where {_gb(free)} are free: free "
            "some, or set HF_HOME to a larger disk"
        )
    if is_local(workdir) and disk > (free := _free(pathlib.Path(os.path.abspath(workdir)))):
        yield (
            f"the run may write {_gb(disk)} into --workdir={workdir}, where {_gb(free)} are free: "
            "free some, give another directory, or keep fewer with runtime.keep_checkpoints"
        )
    host = max((stage.host for stage in needs), default=0)
    if host > _host_memory():
        yield (
            f"a stage takes {_gb(host)} of this host's {_gb(_host_memory())} of memory: take a "
            "larger host, or more of them"
        )


def find_fetches(
    settings: Settings, workdir: str, stages: tuple[str, ...]
) -> tuple[list[Fetch], list[str]]:
    """What `stages` read of the Hub; and a line for all that is not there."""
    missing: list[str] = []
    commits = _or_noted(missing, known_commits, absolute(workdir)) or {}
    sources = _or_noted(missing, lambda: [*_sources(settings, stages)]) or []
    found = [_or_noted(missing, _fetch_model, *named) for named in _models(settings)]
    found += [_or_noted(missing, _fetch_source, *named, commits) for named in sources]
    return [*dict.fromkeys(fetch for fetch in found if fetch)], missing


def gather(settings: Settings, workdir: str, stages: tuple[str, ...]) -> Needs:
    """What the run needs; what is refused is put down, and the rest looked at all the same."""
    todo = tuple(s for s in stages if not Artefact(absolute(workdir) / s).complete)
    fetches, missing = find_fetches(settings, workdir, todo)
    _or_noted(missing, check_settings, settings, stages)
    _or_noted(missing, check_objective, settings.opd)
    no_grader = importlib.util.find_spec("math_verify") is None
    if settings.task.name == "math" and "eval" in todo and no_grader:
        missing.append("eval: grading needs math-verify: pip install 'lopd[eval]'")
    tight: list[str] = []
    needs = _or_noted(missing, _all_needs, settings, todo, tight) or []
    tight += _check_space(needs, fetches, workdir)
    memory = _device_memory()
    kind = f"{jax.device_count()} × {jax.devices()[0].device_kind}"
    kind += f" with {memory / GIB:.1f} GiB each" if memory else ""
    return Needs(fetches, needs, missing, tight, kind)


def _all_needs(settings: Settings, stages: tuple[str, ...], tight: list[str]) -> list[StageNeeds]:
    settings = _with_shapes(settings)
    mesh = devices.make_mesh(settings.mesh.sizes)
    sizes, rows = dict(mesh.shape), settings.runtime.rows_per_micro
    limit = _device_memory() or float("inf")
    programs = [p for stage in stages for p in _programs(settings, stage, sizes, rows, limit)]
    for program in programs:
        if not meshes.divides(program, sizes):
            raise UserError(
                f"{program.stage}: the mesh {sizes} does not divide the {program.name} of "
                f"{rows} rows: make runtime.rows_per_micro a multiple of data × fsdp"
            )
    tight += _check_memory(settings, programs, sizes, rows)
    return [
        _stage_needs(settings, stage, programs, sizes)
        for stage in stages
        if stage != "eval" and (stage == "export" or any(p.stage == stage for p in programs))
    ]


# For people


def _gb(count: float) -> str:
    for size, unit in ((1e9, "GB"), (1e6, "MB")):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count / 1e3:,.1f} kB"


def _aligned(rows: list[tuple[str, ...]], left: int) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            c.ljust(w) if i < left else c.rjust(w)
            for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _state(fetch: Fetch) -> str:
    if fetch.here == fetch.total:
        return "in the cache"
    return f"{_gb(fetch.here)} in the cache" if fetch.here else "to be fetched"


def table(needs: Needs) -> str:
    """The needs as people read them."""
    text = []
    if needs.fetches:
        cache = pathlib.Path(constants.HF_HUB_CACHE)
        offline = " (offline: nothing can be)" if constants.is_offline_mode() else ""
        text += _aligned([(f.what, _gb(f.total), _state(f)) for f in needs.fetches], 1)
        text += [f"{_gb(needs.to_fetch)} to be fetched{offline} into {cache}, where "
                 f"{_gb(_free(cache))} are free", ""]  # fmt: skip
    if needs.stages:
        rows = [("stage", "device GiB", "host GiB", "disk GB", "hours")]
        rows += [
            (
                stage.stage,
                f"{stage.device / GIB:.1f}" if stage.device else "",
                f"{stage.host / GIB:.1f}",
                f"{stage.disk / 1e9:.1f}",
                "?" if stage.hours is None else f"{stage.hours:.1f}",
            )
            for stage in needs.stages
        ]
        text += _aligned(rows, 1)
        text += [f"by formula, at most, on {needs.devices}; eval comes on top", ""]
    found = [*needs.missing, *needs.tight]
    text.append("missing or does not fit:" if found else "nothing is missing")
    return "\n".join([*text, *(f"- {line}" for line in found)])


def check(settings: Settings, workdir: str, stages: tuple[str, ...], *, dry_run: bool) -> None:
    """Prints the table in a dry run, or if something is to be fetched.

    A run that goes on is not kept from it by formulas of memory, which are rough.

    Raises:
      UserError: if something is missing; in a dry run also if something does not fit.
    """
    stages = stages or settings.stages
    if not dry_run:
        fetches, _ = find_fetches(settings, workdir, stages)
        if not any(fetch.here < fetch.total for fetch in fetches):
            return  # what is missing, the run's own checks refuse
    needs = gather(settings, workdir, stages)
    if jax.process_index() == 0:
        print(table(needs), flush=True)
    found = needs.missing + (needs.tight if dry_run else [])
    if found:
        more = f" (and {len(found) - 1} more in the list above)" if found[1:] else ""
        raise UserError(found[0] + more)
