"""The settings of a run: defaults, validation, and the pieces stages are made from.

A config file's `get_config()` starts from `base_config()` and changes what it needs. Sections
named after a stage belong to that stage. `runtime`, `mesh` and `metrics` hold what may change how
fast a result is reached and what is told of it, but never the result; everything else is part of a
stage's identity.
"""

import importlib.util

import ml_collections
from ml_collections import config_dict

from lopd.data.selection import REDUCTIONS
from lopd.errors import UserError
from lopd.models.decoder import REMAT_POLICIES
from lopd.stages.objective import check_settings

MATH_PROMPT = (
    r"Question: {problem} Please reason step by step, and put your final answer within \boxed{}."
)
"""The paper's (arXiv 2604.13010)."""

STAGES = (
    *("teacher", "sft_data", "sft", "precompute", "heldout"),
    *("opd", "online", "control", "eval", "export"),
)
DEFAULT_STAGES = tuple(stage for stage in STAGES if stage != "online")
"""What the method itself needs; `online` is what it is compared with."""


def training_recipe(**changes) -> ml_collections.ConfigDict:
    """Optimizer settings of one training stage; the defaults are the paper's (arXiv 2604.13010)."""
    recipe = ml_collections.ConfigDict(
        {
            "steps": 150,
            "batch_size": 256,  # responses per optimizer update
            "learning_rate": 2e-6,
            "schedule": "constant",  # or "cosine"
            "warmup_steps": 0,
            # "adamw", or to save memory "adafactor" or an AdamW whose first moment is bfloat16.
            "optimizer": "adamw",
            "mu_dtype": "float32",
            "b1": 0.9,
            "b2": 0.98,
            "eps": 1e-8,
            "weight_decay": 0.1,
            "grad_clip": 1.0,
            "reduction": "sample_mean",  # or "token_mean", "token_sum"
            "row_length": 5120,  # positions per packed row
        }
    )
    recipe.update(changes)
    return recipe


def sampling_section(**changes) -> ml_collections.ConfigDict:
    """What a stage samples, and how."""
    section = ml_collections.ConfigDict(
        {
            "prompts": config_dict.placeholder(int),  # how many; "math" takes 0 as all
            "samples": 1,  # responses per prompt
            "temperature": 0.7,
            # What may be drawn; see lopd.sampling.draw.Truncation. 0, 1 and 0 allow all tokens.
            "top_k": 0,
            "top_p": 1.0,
            "min_p": 0.0,
            "response_length": 4096,  # cap on a response, in tokens
        }
    )
    section.update(changes)
    return section


def model_section(**shape) -> ml_collections.ConfigDict:
    """A Qwen3 shape, with the field names of Hugging Face's config.json."""
    return ml_collections.ConfigDict(shape)


def base_config() -> ml_collections.ConfigDict:
    """Every setting there is, with its default. Config files fill in what is None or empty."""
    return ml_collections.ConfigDict(
        {
            "seed": 0,
            "stages": (),  # what runs when --stages is not given
            # A bundled name, a SentencePiece model, or a folder with a tokenizer.json; by default
            # that of student.checkpoint.
            "tokenizer": "",
            "dtype": "",  # compute type of both models; by default what their shapes say
            "task": {
                "name": "addition",  # or "math"
                "digits": 3,  # of the numbers that "addition" adds
                # Of "math": see lopd.data.sources for what a source may be.
                "sft_prompts": "",
                "opd_prompts": "",
                "problems": "",  # with answers, for evaluation; several, separated by commas
                # What {problem} is put into; "{problem}" leaves prompts as they are, as for code.
                "prompt": MATH_PROMPT,
                "thinking": True,  # as the chat template's enable_thinking
            },
            "prompt_length": 1024,  # longest prompt, in tokens
            "teacher": {
                # Instead of training one: a finished `teacher` directory, or a Hugging Face
                # checkpoint (folder or hub name).
                "checkpoint": "",
                "model": {},  # shape; by default that of the checkpoint
                "problems": config_dict.placeholder(int),  # ground-truth worked answers to train on
                "swapped": 0.0,  # share of their columns written as 1+4+5=10 and not 5+4+1=10
                "label_smoothing": 0.0,
                **training_recipe(),
            },
            "student": {
                "checkpoint": "",  # Hugging Face checkpoint of the base; random weights without
                "model": {},  # shape; by default that of the checkpoint
            },
            "sft_data": {
                # Or "given": those of task.sft_prompts, and then sft.teacher says who wrote them.
                "responses": "sampled",
                **sampling_section(),
            },
            "sft": {
                # Instead of training one: a finished `sft` directory, or a Hugging Face
                # checkpoint, and then `teacher` says who wrote its data.
                "checkpoint": "",
                "teacher": "",
                # Of a mixture of experts: add router_aux_loss_coef × the load-balancing loss.
                "router_loss": True,
                **training_recipe(),
            },
            "precompute": {
                # For ablations only: score with a teacher that did not write the SFT data.
                "allow_inconsistent_teacher": False,
                # Store the teacher's K most likely tokens at every position; 0 stores none.
                "teacher_top_k": 0,
                "row_length": 5120,  # positions per packed row of the scoring pass
                **sampling_section(),
            },
            # Rollouts for importance weights: of prompts that `precompute` leaves out, and of
            # π_ref's own distribution, so temperature and top_p stay 1.
            "heldout": {"row_length": 5120, **sampling_section(prompts=0, temperature=1.0)},
            "opd": {
                "cache": "",  # a finished `precompute` directory to use instead of this run's
                "records": 0,  # train on the first so many of the cache; 0: all
                # "log_ratio", the method; on the teacher's top-K "forward_kl", "reverse_kl" or
                # "jensen_shannon"; as controls "fixed_advantage" and "cross_entropy".
                "objective": "log_ratio",
                "tau": 10.0,  # advantage clip, nats
                "extrapolation": 1.0,  # λ: how far beyond π_ref the target is, in distances to π_T
                "residual_folds": 0,  # folds of Lightning OPD 2.0; 0: off, paper: 5
                "fixed_advantage": -0.1,  # of the control of that name
                "top_k": 0,  # how many of the cached top-K to use; 0: all
                # Which tokens are trained on: the first so much of each response, of these the so
                # much with the highest entropy, and never those named here, by token or id.
                "position_fraction": 1.0,
                "entropy_fraction": 1.0,
                "masked_tokens": (),
                "importance_cap": 0.0,  # weigh tokens by min(π_θ/π_ref, cap); 0: all alike
                # Sample the prompts again from the student as it is by then: every so many steps,
                # or when a drift look finds the held-out ESS fraction below this; 0 for never.
                "refresh_every": 0,
                "refresh_below": 0.0,
                **training_recipe(),
            },
            "control": training_recipe(),
            "eval": {
                "split": "test",
                "models": (),  # which to evaluate; by default all that are there
                **sampling_section(temperature=0.6, top_p=0.95),
            },
            "mesh": {"data": -1, "fsdp": 1, "tensor": 1},
            "metrics": {
                "tensorboard": True,  # event files beside each metrics.jsonl
                "wandb": "",  # a Weights & Biases project to report to
            },
            "runtime": {
                "rows_per_micro": 8,  # packed rows per forward and backward pass
                # What the backward pass keeps of a layer: "none" of it is computed again, "dots",
                # "attention", or all of it, "full" (`lopd.models.decoder.REMAT_POLICIES`).
                "remat": "full",
                "slots": 0,  # responses decoded at a time; 0: as many as fit beside the weights
                "decode_steps": 8,  # tokens decoded between looks at what has finished
                "records_per_shard": 512,  # a kill loses the shards that are filling
                "checkpoint_every": 100,  # steps
                "keep_checkpoints": 2,  # the newest so many
                "keep_every": 0,  # and each whose step this divides; 0 for none
                "drift_every": 20,  # steps between full looks at the drift of OPD
                "profile_steps": (0, 0),  # first and last step to trace; (0, 0) for none
            },
        }
    )


def paper_config() -> ml_collections.ConfigDict:
    """The paper's math recipe (arXiv 2604.13010, section 4 and appendix), but for the models.

    Departures, each with its reason: `batch_size` of SFT counts responses and not packed rows,
    because a step's loss must not depend on packing; a response stops at the 4,096 tokens that are
    trained on, where the released code samples 16,384 and cuts; rollouts are drawn at the paper's
    T = 0.8, top-p = 1 and not the released code's 0.7 and 0.9.
    """
    config = base_config()
    config.stages = ("sft_data", "sft", "precompute", "heldout", "opd", "eval", "export")
    config.dtype = "bfloat16"
    config.mesh.update(data=1, fsdp=-1)  # weights over all devices
    config.task.name = "math"
    config.task.thinking = True
    config.sft_data.update(prompts=300_000, temperature=0.7, top_p=0.9, response_length=16_384)
    config.sft.update(
        training_recipe(
            steps=3000,
            learning_rate=8e-5,
            schedule="cosine",
            warmup_steps=300,
            reduction="token_mean",
            row_length=17_408,
        )
    )
    config.precompute.update(prompts=0, temperature=0.8, response_length=4096, row_length=5120)
    config.heldout.update(prompts=256, response_length=4096, row_length=5120)
    config.eval.update(prompts=0, samples=32, temperature=0.6, top_p=0.95, response_length=32_768)
    return config


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def _check_recipe(name: str, recipe: ml_collections.ConfigDict) -> None:
    for key in ("steps", "batch_size", "learning_rate", "grad_clip", "row_length"):
        _require(recipe[key] > 0, f"{name}.{key}={recipe[key]} must be positive")
    _require(
        recipe.reduction in REDUCTIONS,
        f"{name}.reduction={recipe.reduction!r} must be one of {', '.join(REDUCTIONS)}",
    )
    _require(
        recipe.schedule in ("constant", "cosine"),
        f"{name}.schedule={recipe.schedule!r} must be 'constant' or 'cosine'",
    )
    _require(
        recipe.optimizer in ("adamw", "adafactor"),
        f"{name}.optimizer={recipe.optimizer!r} must be 'adamw' or 'adafactor'",
    )
    _require(
        recipe.mu_dtype in ("float32", "bfloat16"),
        f"{name}.mu_dtype={recipe.mu_dtype!r} must be 'float32' or 'bfloat16'",
    )
    _require(
        0 <= recipe.warmup_steps <= recipe.steps,
        f"{name}.warmup_steps={recipe.warmup_steps} must lie between 0 and steps={recipe.steps}",
    )


def _check_sampling(name: str, section: ml_collections.ConfigDict) -> None:
    for key in ("samples", "response_length"):
        _require(section[key] > 0, f"{name}.{key}={section[key]} must be positive")
    _require(section.prompts is not None, f"{name}.prompts is not set: how many prompts?")
    _require(section.prompts >= 0, f"{name}.prompts={section.prompts} must not be negative")
    _require(
        section.temperature >= 0, f"{name}.temperature={section.temperature} must not be negative"
    )
    _require(section.top_k >= 0, f"{name}.top_k={section.top_k} must not be negative")
    _require(0 < section.top_p <= 1, f"{name}.top_p={section.top_p} must lie in (0, 1]")
    _require(0 <= section.min_p <= 1, f"{name}.min_p={section.min_p} must lie in [0, 1]")


def _check_heldout(config: ml_collections.ConfigDict) -> None:
    section = config.heldout
    _require(section.prompts > 0, "heldout.prompts=0: how many prompts are to be held out?")
    whole = sampling_section(temperature=1.0)
    for key in {*whole} - {"prompts", "samples", "response_length"}:
        _require(
            section[key] == whole[key],
            f"heldout.{key}={section[key]} must be {whole[key]}: importance weights need responses "
            "of π_ref's own distribution",
        )


def _check_refresh(recipe: ml_collections.ConfigDict) -> None:
    every, below = recipe.refresh_every, recipe.refresh_below
    _require(every >= 0, f"opd.refresh_every={every} must not be negative")
    _require(0 <= below < 1, f"opd.refresh_below={below} must lie in [0, 1)")
    _require(
        not recipe.residual_folds or not (every or below),
        f"opd.residual_folds={recipe.residual_folds} fits its tables to one whole cache: it must "
        "be 0 with opd.refresh_every or opd.refresh_below",
    )
    _require(
        recipe.extrapolation == 1 or not (every or below),
        f"opd.extrapolation={recipe.extrapolation} leads away from π_ref, which later rounds' "
        "caches do not hold: it must be 1 with opd.refresh_every or opd.refresh_below",
    )


def _check_opd(recipe: ml_collections.ConfigDict, stages: tuple[str, ...]) -> None:
    """What `opd` and `online` can tell of their section alone."""
    check_settings(recipe)
    _check_refresh(recipe)
    if "online" in stages:
        for key, off in (("residual_folds", 0), ("extrapolation", 1.0)):
            _require(
                recipe[key] == off,
                f"opd.{key}={recipe[key]} needs a cache by π_ref, which online OPD has not: "
                f"it must be {off}",
            )


def _check_given_responses(config: ml_collections.ConfigDict) -> None:
    responses = config.sft_data.responses
    _require(
        responses in ("sampled", "given"),
        f"sft_data.responses={responses!r} must be 'sampled' or 'given'",
    )
    if responses == "given":
        _require(
            config.task.name == "math",
            f"sft_data.responses='given': the task {config.task.name!r} comes without responses",
        )
        _require(
            bool(config.sft.teacher),
            "sft_data.responses='given': say in sft.teacher who wrote the responses (the method "
            "needs the teacher that scores to be the same)",
        )


def validate(config: ml_collections.ConfigDict, stages: tuple[str, ...]) -> None:
    """Checks what can be known before any work.

    Raises:
      UserError: one line that names the setting, its value and what it must be.
    """
    for stage in stages:
        _require(
            stage in STAGES,
            f"--stages: no stage is called {stage!r}; there are {', '.join(STAGES)}",
        )
    _require(bool(stages), "no stages to run: give --stages, or config.stages in the config file")
    _require(config.prompt_length > 0, f"prompt_length={config.prompt_length} must be positive")
    for name in ("teacher", "sft", "opd", "control"):
        _check_recipe(name, config[name])
    _require(
        "{problem}" in config.task.prompt,
        f"task.prompt={config.task.prompt!r} has no {{problem}} to put the problem in",
    )
    _check_given_responses(config)
    _check_opd(config.opd, stages)
    _require(
        0 <= config.teacher.swapped <= 1,
        f"teacher.swapped={config.teacher.swapped} must lie in [0, 1]",
    )
    for name in ("sft_data", "precompute", "heldout", "eval"):
        _check_sampling(name, config[name])
    top_k = config.precompute.teacher_top_k
    _require(top_k >= 0, f"precompute.teacher_top_k={top_k} must not be negative")
    # Which rows hold whose responses.
    held = ()
    if "heldout" in stages or ("opd" in stages and config.opd.refresh_below):
        _check_heldout(config)
        held = (("heldout", "heldout"), ("opd", "heldout"))
    for rows, responses in (
        *(("sft", "sft_data"), ("opd", "precompute"), ("precompute", "precompute")),
        *held,
    ):
        longest = config.prompt_length + config[responses].response_length - 1
        _require(
            longest <= config[rows].row_length,
            f"{rows}.row_length={config[rows].row_length} cannot hold prompt_length="
            f"{config.prompt_length} + {responses}.response_length="
            f"{config[responses].response_length} - 1 tokens; raise it to {longest} or more",
        )
    _require(
        config.eval.split in ("dev", "test"),
        f"eval.split={config.eval.split!r} must be 'dev' or 'test'",
    )
    for model in config.eval.models:
        _require(
            model == "base" or model in STAGES,
            f"eval.models: no model is called {model!r}; it is 'base' or a stage that trains one",
        )
    remat = config.runtime.remat
    _require(
        remat in REMAT_POLICIES,
        f"runtime.remat={remat!r} must be one of {', '.join(REMAT_POLICIES)}",
    )
    for key, value in config.runtime.items():
        if key not in ("remat", "slots", "keep_every", "profile_steps"):
            _require(value > 0, f"runtime.{key}={value} must be positive")
    for key in ("slots", "keep_every"):
        value = config.runtime[key]
        _require(value >= 0, f"runtime.{key}={value} must not be negative")
    first, last = config.runtime.profile_steps
    _require(
        0 <= first <= last,
        f"runtime.profile_steps={first, last} must be the first and last step to trace",
    )
    _require(
        not config.metrics.wandb or importlib.util.find_spec("wandb") is not None,
        f"metrics.wandb={config.metrics.wandb!r} needs a package: pip install wandb",
    )
