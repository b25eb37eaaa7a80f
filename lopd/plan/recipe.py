"""From a run's settings to its programs: their shapes, their work, and how often each runs."""

import dataclasses
from collections.abc import Callable

from jax.sharding import Mesh
from jax.stages import Lowered

from lopd.checkpoints import hf_config, hugging_face, peft_adapter
from lopd.config.catalogue import CATALOGUE, STUDENT, TEACHER, StageInfo
from lopd.config.settings import LoraSettings, Settings
from lopd.config.values import read_key
from lopd.errors import UserError
from lopd.models.decoder import DecoderConfig
from lopd.models.low_rank import count_weights
from lopd.models.presets import PRESETS
from lopd.models.work import Work, scoring_work, training_work
from lopd.objectives.sampled import cross_entropy
from lopd.plan import programs
from lopd.sampling.draw import Truncation
from lopd.sampling.shapes import PROMPTS_PER_CALL, prompt_bucket
from lopd.sampling.work import decoding_work, prefill_work
from lopd.stages.objective import make_objective, token_fields

DEFAULT_SLOTS = 128
"""Slots planned for where the settings leave their number to the memory (`runtime.slots=None`)."""


@dataclasses.dataclass(frozen=True)
class Program:
    """One program of a stage: `work(mesh sizes)` by formula, `build(mesh)` to be compiled."""

    stage: str
    name: str
    """For people: prefill, decode, scoring or step, and of whom."""
    model: DecoderConfig
    """The shape that it computes with."""
    calls: float
    """How often the recipe runs it, responses being as long as they may."""
    rows: int
    """What the mesh's data and fsdp axes split; 0 where they need not."""
    work: Callable[[dict[str, int]], Work]
    build: Callable[[Mesh], Lowered]


def model_shape(settings: Settings, which: str) -> DecoderConfig:
    """The shape of the "teacher" or "student", from presets or a local folder, never the hub.

    Raises:
      UserError: if it is neither set, nor a preset, nor a folder.
    """
    section = getattr(settings, which)
    name = section.checkpoint or (settings.sft.checkpoint if which == STUDENT else None)
    if name and not section.checkpoint and peft_adapter.is_adapter(name):
        name = peft_adapter.read_base(name)
    if section.model:
        shape = DecoderConfig(**section.model)
    elif name and name.split("/")[-1] in PRESETS:
        shape = PRESETS[name.split("/")[-1]]
    elif name:
        shape = hf_config.checkpoint_config(hugging_face.resolve_checkpoint(name))
    else:
        raise UserError(f"neither {which}.checkpoint nor {which}.model is set: which {which}?")
    return dataclasses.replace(shape, dtype=settings.dtype) if settings.dtype else shape


def _adapters(settings: Settings, which: str) -> LoraSettings | None:
    """Those that a model is trained by; None for all its weights."""
    lora = settings.student.lora
    return lora if which == STUDENT and lora.rank is not None else None


def _training(settings: Settings, info: StageInfo, rows: int) -> Program:
    recipe, model = getattr(settings, info.settings_section), model_shape(settings, info.trains)
    response_length = getattr(settings, info.learns_from).response_length
    longest = min(recipe.row_length, settings.prompt_length + response_length - 1)
    per_row = recipe.row_length // longest
    used_rows = -(-recipe.batch_size // per_row)
    micro_batches = -(-recipe.batch_size // rows)
    shape = dict(rows=rows, row_length=recipe.row_length, remat=settings.runtime.remat)
    lora = _adapters(settings, info.trains)
    objective, fields = cross_entropy(), ()
    if info.settings_section == "opd":
        objective = make_objective(recipe)
        fields = token_fields(recipe, settings.precompute.teacher_top_k or 0)
    return Program(
        stage=info.name,
        name="training step",
        model=model,
        calls=recipe.steps,
        rows=rows,
        work=lambda mesh: training_work(
            model,
            mesh,
            used_rows=used_rows,
            context=longest / 2,
            micro_batches=micro_batches,
            adapter_weights=count_weights(model, lora) if lora else None,
            **shape,
        ),
        build=lambda mesh: programs.train_step(
            model, recipe, objective, mesh, fields, lora, micro_batches=micro_batches, **shape
        ),
    )


def count_responses(settings: Settings, info: StageInfo) -> int:
    """How many responses a stage samples; where settings say "all", as many as are trained on."""
    trained = settings.sft if info.name == "sft_data" else settings.opd
    all_trained = trained.steps * trained.batch_size
    if info.samples_each_step:
        return all_trained
    if info.trains:  # opd, refreshed: what the first round trains on is there
        first = settings.opd.refresh_every or 1
        return max(0, trained.steps - first) * trained.batch_size
    section = getattr(settings, info.sampling_section)
    prompts = all_trained if section.prompts is None else section.prompts
    return prompts * section.samples


def _scoring(settings: Settings, info: StageInfo, which: str, rows: int) -> Program:
    model, section = model_shape(settings, which), getattr(settings, info.sampling_section)
    longest = settings.prompt_length + section.response_length - 1
    used_rows = count_responses(settings, info) / (section.row_length // longest)
    shape = dict(rows=rows, row_length=section.row_length)
    # The student is held as it is trained.
    lora = _adapters(settings, which)
    dtype = model.dtype if which == TEACHER or lora else "float32"
    return Program(
        stage=info.name,
        name=f"scoring by {'the teacher' if which == TEACHER else 'π_ref'}",
        model=model,
        calls=used_rows / rows,
        rows=rows,
        work=lambda mesh: scoring_work(
            model,
            mesh,
            context=longest / 2,
            weight_bytes=2 if dtype == "bfloat16" else 4,
            **shape,
        ),
        build=lambda mesh: programs.scoring(model, mesh, lora, dtype=dtype, **shape),
    )


def _sampling(settings: Settings, info: StageInfo, which: str) -> list[Program]:
    model, runtime = model_shape(settings, which), settings.runtime
    section = getattr(settings, info.sampling_section)
    responses = count_responses(settings, info)
    capacity = settings.prompt_length + section.response_length
    # Where every step samples, its responses are all there are to decode until the last has ended.
    count = runtime.slots or DEFAULT_SLOTS
    if info.samples_each_step:
        count = settings.opd.batch_size
    slots = dict(slots=count, capacity=capacity)
    length = prompt_bucket(settings.prompt_length, capacity)
    truncation = Truncation(section.top_k or 0, section.top_p, section.min_p)
    return [
        Program(
            stage=info.name,
            name="prefill",
            model=model,
            calls=responses / PROMPTS_PER_CALL,
            rows=0,
            work=lambda mesh: prefill_work(model, mesh, **slots, length=length),
            build=lambda mesh: programs.prefill(model, mesh, **slots, length=length),
        ),
        Program(
            stage=info.name,
            name=f"decode {runtime.decode_steps} tokens",
            model=model,
            calls=responses * section.response_length / (count * runtime.decode_steps),
            rows=0,
            work=lambda mesh: decoding_work(model, mesh, steps=runtime.decode_steps, **slots),
            build=lambda mesh: programs.decoding(
                model, mesh, steps=runtime.decode_steps, truncation=truncation, **slots
            ),
        ),
    ]


def _is_given(settings: Settings, info: StageInfo) -> bool:
    """Whether the settings name what to use instead, or instead of all that needs it."""
    if info.instead:
        return read_key(settings, info.instead) is not None
    return info.name == "sft_data" and settings.sft.checkpoint is not None


def list_programs(settings: Settings, stages: tuple[str, ...], rows: int) -> list[Program]:
    """The programs of the stages that train, sample into shards or score, in order.

    How much `eval` samples depends on the problems, so it is not among them.

    Args:
      settings: the run's.
      stages: which.
      rows: packed rows per forward pass.
    """
    found = []
    for info in CATALOGUE:
        if info.name not in stages or _is_given(settings, info):
            continue
        if info.splits or info.trains:
            for which in info.samples(settings):
                found += _sampling(settings, info, which)
            found += [_scoring(settings, info, which, rows) for which in info.scores(settings)]
        if info.trains:
            found.append(_training(settings, info, rows))
    return found
