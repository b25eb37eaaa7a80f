"""From a run's settings to its programs: their shapes, their work, and how often each runs."""

import dataclasses
from collections.abc import Callable

import ml_collections
from jax.sharding import Mesh
from jax.stages import Lowered

from lopd.checkpoints import hf_config, hugging_face
from lopd.errors import UserError
from lopd.models.decoder import DecoderConfig
from lopd.models.presets import PRESETS
from lopd.models.work import Work, scoring_work, training_work
from lopd.objectives.sampled import cross_entropy
from lopd.plan import programs
from lopd.sampling.draw import Truncation
from lopd.sampling.engine import PROMPTS_PER_CALL, prompt_bucket
from lopd.sampling.work import decoding_work, prefill_work
from lopd.stages.objective import make_objective, token_fields

DEFAULT_SLOTS = 128
"""Slots planned for where the settings leave their number to the memory (`runtime.slots=0`)."""


@dataclasses.dataclass(frozen=True)
class Program:
    """One program of a stage: `work(mesh sizes)` by formula, `build(mesh)` to be compiled."""

    stage: str
    name: str
    model: DecoderConfig
    calls: float
    """How often the recipe runs it, responses being as long as they may."""
    rows: int
    """What the mesh's data and fsdp axes split; 0 where they need not."""
    work: Callable[[dict[str, int]], Work]
    build: Callable[[Mesh], Lowered]
    bound_by_memory: bool = False


def model_shape(config: ml_collections.ConfigDict, which: str) -> DecoderConfig:
    """The shape of the "teacher" or "student", from presets or a local folder, never the hub.

    Raises:
      UserError: if it is neither set, nor a preset, nor a folder.
    """
    section = config[which]
    sft = config.sft.checkpoint if which == "student" else ""
    name = section.checkpoint or sft
    if section.model:
        shape = DecoderConfig(**section.model)
    elif name.split("/")[-1] in PRESETS:
        shape = PRESETS[name.split("/")[-1]]
    elif name:
        shape = hf_config.checkpoint_config(hugging_face.resolve_checkpoint(name))
    else:
        raise UserError(f"neither {which}.checkpoint nor {which}.model is set: which {which}?")
    return dataclasses.replace(shape, dtype=config.dtype) if config.dtype else shape


def _training(config, stage: str, responses: str, rows: int) -> Program:
    recipe = config["opd" if stage == "online" else stage]
    which = "teacher" if stage == "teacher" else "student"
    model = model_shape(config, which)
    longest = min(recipe.row_length, config.prompt_length + config[responses].response_length - 1)
    per_row = recipe.row_length // longest
    used_rows = -(-recipe.batch_size // per_row)
    micro_batches = -(-recipe.batch_size // rows)
    shape = dict(rows=rows, row_length=recipe.row_length, remat=config.runtime.remat)
    objective, fields = cross_entropy(), ()
    if stage in ("opd", "online"):
        objective = make_objective(recipe)
        fields = token_fields(recipe, config.precompute.teacher_top_k)
    return Program(
        stage=stage,
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
            **shape,
        ),
        build=lambda mesh: programs.train_step(
            model, recipe, objective, mesh, fields, micro_batches=micro_batches, **shape
        ),
    )


def _responses(config, stage: str) -> int:
    """How many a stage samples; where the settings say "all", as many as are trained on."""
    trained = config.sft if stage == "sft_data" else config.opd
    all_trained = trained.steps * trained.batch_size
    if stage == "online":
        return all_trained
    section = config[stage]
    return (section.prompts or all_trained) * section.samples


def _scoring(config, stage: str, which: str, rows: int) -> Program:
    model, section = model_shape(config, which), config.precompute
    longest = config.prompt_length + section.response_length - 1
    used_rows = _responses(config, stage) / (section.row_length // longest)
    shape = dict(rows=rows, row_length=section.row_length)
    # The student is held as it is trained.
    dtype = model.dtype if which == "teacher" else "float32"
    return Program(
        stage=stage,
        name=f"scoring by {'the teacher' if which == 'teacher' else 'π_ref'}",
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
        build=lambda mesh: programs.scoring(model, mesh, dtype=dtype, **shape),
    )


def _sampling(config, stage: str, which: str) -> list[Program]:
    model, runtime = model_shape(config, which), config.runtime
    section = config["precompute" if stage == "online" else stage]
    responses = _responses(config, stage)
    capacity = config.prompt_length + section.response_length
    # Online, a step's responses are all there are to decode until the longest of them has ended.
    count = config.opd.batch_size if stage == "online" else runtime.slots or DEFAULT_SLOTS
    slots = dict(slots=count, capacity=capacity)
    length = prompt_bucket(config.prompt_length, capacity)
    return [
        Program(
            stage=stage,
            name="prefill",
            model=model,
            calls=responses / PROMPTS_PER_CALL,
            rows=0,
            work=lambda mesh: prefill_work(model, mesh, **slots, length=length),
            build=lambda mesh: programs.prefill(model, mesh, **slots, length=length),
        ),
        Program(
            stage=stage,
            name=f"decode {runtime.decode_steps} tokens",
            model=model,
            calls=responses * section.response_length / (slots["slots"] * runtime.decode_steps),
            rows=0,
            work=lambda mesh: decoding_work(model, mesh, steps=runtime.decode_steps, **slots),
            build=lambda mesh: programs.decoding(
                model,
                mesh,
                steps=runtime.decode_steps,
                truncation=Truncation(section.top_k, section.top_p, section.min_p),
                **slots,
            ),
            bound_by_memory=True,
        ),
    ]


def list_programs(
    config: ml_collections.ConfigDict, stages: tuple[str, ...], rows: int
) -> list[Program]:
    """The programs of the stages that train, sample or score, in order.

    Args:
      config: the run's settings.
      stages: which.
      rows: packed rows per forward pass.
    """
    makers = {
        "teacher": lambda: [_training(config, "teacher", "sft_data", rows)],
        "sft_data": lambda: _sampling(config, "sft_data", "teacher"),
        "sft": lambda: [_training(config, "sft", "sft_data", rows)],
        "precompute": lambda: [
            *_sampling(config, "precompute", "student"),
            _scoring(config, "precompute", "teacher", rows),
            _scoring(config, "precompute", "student", rows),
        ],
        "opd": lambda: [_training(config, "opd", "precompute", rows)],
        "online": lambda: [
            *_sampling(config, "online", "student"),
            _scoring(config, "online", "teacher", rows),
            _training(config, "online", "precompute", rows),
        ],
    }
    given = {
        "sft_data": config.sft.checkpoint or config.sft_data.responses == "given",
        "sft": config.sft.checkpoint,
    }
    wanted = [stage for stage in stages if stage in makers and not given.get(stage)]
    return [program for stage in wanted for program in makers[stage]()]
