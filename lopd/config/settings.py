"""Every setting of a run: its type, its default, what it may be, and what it means.

The dataclasses here are what the code works with. `lopd.config.config_dict` makes of them the
ConfigDict that config files change and the command line overrides, and the frozen dataclasses of
that again; nothing below the commands sees a ConfigDict. `None` stands for off, or for all, or
for "as it fits", as each setting says; a number means that number.

Sections named after a stage belong to that stage. `runtime`, `mesh` and `metrics` hold what may
change how fast a result is reached and what is told of it, but never the result; everything else is
part of a stage's identity. Rules that concern one setting stand beside it, rules on several in
`lopd.config.checks`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from lopd.config.domains import (
    BELOW_1,
    FINITE,
    FRACTION,
    NOT_NEGATIVE,
    POSITIVE,
    PROBABILITY,
    Domain,
    at_least,
    one_of,
    path_setting,
    setting,
)
from lopd.config.objectives import LOSSES

MATH_PROMPT = (
    r"Question: {problem} Please reason step by step, and put your final answer within \boxed{}."
)
"""The paper's (arXiv 2604.13010)."""


@dataclasses.dataclass(frozen=True)
class TrainingRecipe:
    """Optimizer settings of one training stage; the defaults are the paper's (arXiv 2604.13010)."""

    steps: int = setting(150, POSITIVE)
    """Optimizer updates."""
    batch_size: int = setting(256, POSITIVE)
    """Responses per optimizer update."""
    learning_rate: float = setting(2e-6, POSITIVE)
    """The highest that the schedule reaches."""
    schedule: str = setting("constant", one_of("constant", "cosine"))
    """After the warm-up: "constant", or half a cosine down to 0."""
    warmup_steps: int = setting(0, NOT_NEGATIVE)
    """Steps in which the rate rises from 0, in a straight line."""
    optimizer: str = setting("adamw", one_of("adamw", "adafactor"))
    """To save memory "adafactor", or an AdamW whose first moment is bfloat16 (`mu_dtype`)."""
    mu_dtype: str = setting("float32", one_of("float32", "bfloat16"))
    """The type of AdamW's first moment."""
    b1: float = setting(0.9, BELOW_1)
    """Decay of AdamW's first moment."""
    b2: float = setting(0.98, BELOW_1)
    """Decay of AdamW's second moment."""
    eps: float = setting(1e-8, POSITIVE)
    """What AdamW adds to the root of the second moment."""
    weight_decay: float = setting(0.1, NOT_NEGATIVE)
    """Of matrices, times the learning rate; norms, biases and embeddings do not decay."""
    grad_clip: float = setting(1.0, POSITIVE)
    """Largest global norm of the gradient."""
    reduction: str = setting("sample_mean", one_of("sample_mean", "token_mean", "token_sum"))
    """How a batch's token losses add up: see `lopd.data.selection.token_weights`."""
    row_length: int = setting(5120, at_least(2))
    """Positions per packed row."""


@dataclasses.dataclass(frozen=True)
class SamplingSettings:
    """What a stage samples, and how."""

    prompts: int | None = setting(None, POSITIVE)
    """How many; None: all."""
    samples: int = setting(1, POSITIVE)
    """Responses per prompt."""
    temperature: float = setting(0.7, NOT_NEGATIVE)
    """0 is greedy."""
    top_k: int | None = setting(None, POSITIVE)
    """What may be drawn (`lopd.sampling.draw.Truncation`): the likeliest tokens; None: all."""
    top_p: float = setting(1.0, FRACTION)
    """The smallest set of likeliest tokens with at least this probability."""
    min_p: float = setting(0.0, PROBABILITY)
    """Tokens with at least this fraction of the likeliest token's probability."""
    response_length: int = setting(4096, POSITIVE)
    """Most tokens of a response."""


PROMPT_SOURCES = ("sft_prompts", "opd_prompts", "problems")
"""Settings of the task that name where prompts are from."""


@dataclasses.dataclass(frozen=True)
class TaskSettings:
    """What is learnt: a verifiable task, and where its prompts are from."""

    name: str = "addition"
    """Or "math" (`lopd.tasks.make_task`)."""
    digits: int = setting(3, POSITIVE)
    """Of the numbers that "addition" adds."""
    sft_prompts: str | None = path_setting()
    """Of "math": a source of prompts (`lopd.data.sources`)."""
    opd_prompts: str | None = path_setting()
    """The same for `precompute`, `heldout` and `online`."""
    problems: str | None = path_setting(",")
    """With answers, for evaluation; several sources are separated by commas."""
    prompt: str = setting(
        MATH_PROMPT, Domain("have {problem}, to put the problem in", lambda x: "{problem}" in x)
    )
    """What {problem} is put into; "{problem}" leaves prompts as they are, as for code."""
    thinking: bool = True
    """As the chat template's enable_thinking."""
    long_prompts: str = setting("refuse", one_of("refuse", "leave_out"))
    """Training prompts of more than `prompt_length` tokens: "leave_out" says how many it were."""


@dataclasses.dataclass(frozen=True)
class TeacherSettings(TrainingRecipe):
    """The teacher: a checkpoint, or (tiny runs) one that is trained on worked answers."""

    checkpoint: str | None = path_setting()
    """Instead of training one: a finished `teacher` directory, or a Hugging Face checkpoint
    (folder or hub name)."""
    model: Mapping[str, Any] = setting({})
    """Its shape; empty: that of the checkpoint."""
    problems: int | None = setting(None, POSITIVE)
    """Worked answers to train on; None: all."""
    swapped: float = setting(0.0, PROBABILITY)
    """Share of their columns written as 1+4+5=10 and not 5+4+1=10."""
    label_smoothing: float = setting(0.0, BELOW_1)
    """Of its cross-entropy, towards the uniform distribution."""


ADAPTED_GROUPS = ("attention", "mlp")
"""Groups of matrices that can have adapters, as `student.lora.targets` names them."""
ADAPTED_MODULES = (
    *("q_proj", "k_proj", "v_proj", "o_proj"),
    *("gate_proj", "up_proj", "down_proj"),
)
"""Single matrices that can have one, by their names in Hugging Face's files."""


@dataclasses.dataclass(frozen=True)
class LoraSettings:
    """Low-rank adapters (arXiv 2106.09685), trained in place of the student's weights W.

    A matrix becomes W + alpha / rank · A B, W stays as it is. There is no dropout.
    """

    rank: int | None = setting(None, POSITIVE)
    """Columns of A and rows of B; None: no adapters, all weights are trained."""
    alpha: float = setting(32.0, POSITIVE)
    """A B is multiplied by alpha / rank."""
    targets: tuple[str, ...] = setting(
        ADAPTED_GROUPS,
        Domain(
            f"name some of {', '.join((*ADAPTED_GROUPS, *ADAPTED_MODULES))}",
            lambda x: len(x) > 0 and {*x} <= {*ADAPTED_GROUPS, *ADAPTED_MODULES},
        ),
    )
    """Matrices that have adapters: of attention, of MLPs, or single ones by their names in Hugging
    Face's files. A mixture of experts can have them on attention only."""


@dataclasses.dataclass(frozen=True)
class StudentSettings:
    """The base student, and what of it is trained."""

    checkpoint: str | None = path_setting()
    """A Hugging Face checkpoint; None: random weights."""
    model: Mapping[str, Any] = setting({})
    """Its shape; empty: that of the checkpoint."""
    lora: LoraSettings = LoraSettings()
    """Adapters, for `sft`, `opd`, `online` and `control` alike."""


@dataclasses.dataclass(frozen=True)
class SftDataSettings(SamplingSettings):
    """The responses that SFT learns from."""

    responses: str = setting("sampled", one_of("sampled", "given"))
    """Or "given": those of task.sft_prompts, and then sft.teacher says who wrote them."""


@dataclasses.dataclass(frozen=True)
class SftSettings(TrainingRecipe):
    """Fine-tuning of the base student."""

    checkpoint: str | None = path_setting()
    """Instead of training one: a finished `sft` directory, a Hugging Face checkpoint or a PEFT
    adapter, and then `teacher` says who wrote its data."""
    teacher: str | None = path_setting()
    """Who wrote the SFT data, where this run cannot know: the name in `teacher.checkpoint`, or
    any other."""
    router_loss: bool = True
    """Of a mixture of experts: add router_aux_loss_coef × the load-balancing loss."""


@dataclasses.dataclass(frozen=True)
class PrecomputeSettings(SamplingSettings):
    """The cache: π_ref samples, teacher and π_ref score."""

    allow_inconsistent_teacher: bool = False
    """For ablations only: score with a teacher that did not write the SFT data."""
    teacher_top_k: int | None = setting(None, POSITIVE)
    """Store the teacher's K most likely tokens at every position; None: none."""
    row_length: int = setting(5120, at_least(2))
    """Positions per packed row of the scoring pass."""


@dataclasses.dataclass(frozen=True)
class HeldoutSettings(SamplingSettings):
    """Rollouts for importance weights, of prompts that `precompute` leaves out.

    They are π_ref's own distribution, so temperature and truncation stay as they are here.
    """

    prompts: int = setting(0, NOT_NEGATIVE)
    temperature: float = setting(1.0, NOT_NEGATIVE)
    row_length: int = setting(5120, at_least(2))
    """Positions per packed row of the scoring pass."""


@dataclasses.dataclass(frozen=True)
class OpdSettings(TrainingRecipe):
    """On-policy distillation on the cache, or online: what is minimised, on which tokens."""

    cache: str | None = path_setting()
    """A finished `precompute` directory to use instead of this run's."""
    records: int | None = setting(None, POSITIVE)
    """Train on this many records, the first of the cache; None: all."""
    objective: str = setting("log_ratio", one_of(*LOSSES))
    """The method; on the teacher's top-K "forward_kl", "reverse_kl" or "jensen_shannon"; as
    controls "fixed_advantage" and "cross_entropy"."""
    tau: float = setting(10.0, POSITIVE)
    """Advantage clip, nats."""
    extrapolation: float = setting(1.0, FINITE)
    """λ: how far beyond π_ref the target is, in distances to π_T."""
    residual_folds: int | None = setting(
        None, Domain("be at least 2 and at most 1000", lambda x: 2 <= x <= 1000)
    )
    """Folds of Lightning OPD 2.0 (`lopd.objectives.style_baseline`; paper: 5); None: off."""
    fixed_advantage: float = setting(-0.1, Domain("be negative", lambda x: x < 0))
    """Of the control of that name."""
    top_k: int | None = setting(None, POSITIVE)
    """How many of the cached top-K to use; None: all."""
    position_fraction: float = setting(1.0, FRACTION)
    """Train on this fraction of each response, its beginning."""
    entropy_fraction: float = setting(1.0, FRACTION)
    """Of these, on the fraction of the tokens with the highest entropy."""
    masked_tokens: tuple[str | int, ...] = ()
    """Never train on these, named by token or id."""
    importance_cap: float | None = setting(None, POSITIVE)
    """Weigh tokens by min(π_θ/π_ref, cap); None: all alike."""
    refresh_every: int | None = setting(None, POSITIVE)
    """Sample the prompts again from the current student every so many steps; None: never."""
    refresh_below: float | None = setting(None, Domain("lie in (0, 1)", lambda x: 0 < x < 1))
    """The same when a drift look finds the held-out ESS fraction below this; None: never."""


@dataclasses.dataclass(frozen=True)
class EvalSettings(SamplingSettings):
    """Accuracy of the models of a run."""

    temperature: float = setting(0.6, NOT_NEGATIVE)
    """Of the sampled figures; greedy ones are made besides."""
    top_p: float = setting(0.95, FRACTION)
    """Of the sampled figures."""
    split: str = setting("test", one_of("dev", "test"))
    """Which problems of the task; "dev" is for tuning settings."""
    models: tuple[str, ...] | None = setting(None, Domain("name a model", lambda x: len(x) > 0))
    """Which to evaluate; None: all that are there."""


@dataclasses.dataclass(frozen=True)
class ExportSettings:
    """The student as a Hugging Face checkpoint."""

    dtype: str | None = setting(None, one_of("float32", "bfloat16", "float16"))
    """Type of the stored weights; None: that of the checkpoint that the student started from, or
    of a student with random weights the type that it computes with."""


@dataclasses.dataclass(frozen=True)
class MeshSettings:
    """Devices along each axis of the mesh; one of them may be -1, the rest of the devices."""

    data: int = -1
    """Copies of the model, each with its own rows."""
    fsdp: int = 1
    """Parts of weights, moments and rows."""
    tensor: int = 1
    """Parts of heads, MLPs and vocabulary."""

    @property
    def sizes(self) -> dict[str, int]:
        """By the name of the axis."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class MetricsSettings:
    """Where metrics go besides each stage's metrics.jsonl."""

    tensorboard: bool = True
    """Event files beside each metrics.jsonl."""
    wandb: str | None = None
    """A Weights & Biases project to report to."""


@dataclasses.dataclass(frozen=True)
class RuntimeSettings:
    """How the work is done."""

    rows_per_micro: int = setting(8, POSITIVE)
    """Packed rows per forward and backward pass."""
    remat: str = setting("full", one_of("full", "attention", "dots", "none"))
    """What the backward pass computes again (`lopd.models.decoder.REMAT_POLICIES`)."""
    slots: int | None = setting(None, POSITIVE)
    """Responses decoded at a time; None: as many as fit beside the weights."""
    decode_steps: int = setting(8, POSITIVE)
    """Tokens decoded between looks for responses that have finished."""
    records_per_shard: int = setting(512, POSITIVE)
    """A kill loses the shards that are filling."""
    checkpoint_every: int = setting(100, POSITIVE)
    """Steps."""
    keep_checkpoints: int = setting(2, POSITIVE)
    """How many of the newest stay."""
    keep_every: int | None = setting(None, POSITIVE)
    """Each whose step this divides stays too; None: none."""
    drift_every: int = setting(20, POSITIVE)
    """Steps between full looks at the drift of OPD."""
    profile_steps: tuple[int, int] | None = setting(
        None,
        Domain(
            "be the first and last step to trace",
            lambda x: len(x) == 2 and 0 < x[0] <= x[1],
        ),
    )
    """First and last step to trace; None: no trace."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """All settings of a run."""

    seed: int = setting(0, Domain("lie in [0, 2^63)", lambda x: x >= 0, below=2**63))
    """Every random choice of a run follows from it."""
    stages: tuple[str, ...] = ()
    """What runs when --stages is not given."""
    tokenizer: str | None = path_setting()
    """A bundled name, a SentencePiece model, a folder with a tokenizer.json, or a model of the hub;
    None: that of student.checkpoint."""
    dtype: str | None = setting(None, one_of("float32", "bfloat16"))
    """Compute type of both models; None: what their shapes say."""
    task: TaskSettings = TaskSettings()
    prompt_length: int = setting(1024, POSITIVE)
    """Most tokens of a prompt."""
    teacher: TeacherSettings = TeacherSettings()
    student: StudentSettings = StudentSettings()
    sft_data: SftDataSettings = SftDataSettings()
    sft: SftSettings = SftSettings()
    precompute: PrecomputeSettings = PrecomputeSettings()
    heldout: HeldoutSettings = HeldoutSettings()
    opd: OpdSettings = OpdSettings()
    control: TrainingRecipe = TrainingRecipe()
    """More SFT steps instead of OPD."""
    eval: EvalSettings = EvalSettings()
    export: ExportSettings = ExportSettings()
    mesh: MeshSettings = MeshSettings()
    metrics: MetricsSettings = MetricsSettings()
    runtime: RuntimeSettings = RuntimeSettings()
