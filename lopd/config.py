"""The settings of a run: defaults, validation, and the pieces stages are made from.

A config file's `get_config()` starts from `base_config()` and changes what it needs. Sections
named after a stage belong to that stage. `runtime` and `mesh` hold what may change how fast a
result is reached but never the result; everything else is part of a stage's identity.
"""

import ml_collections
from ml_collections import config_dict

from lopd.errors import UserError
from lopd.models.qwen3 import Qwen3Config
from lopd.objectives import REDUCTIONS

STAGES = ("teacher", "sft_data", "sft", "precompute", "opd", "control", "eval", "export")


def training_recipe(**changes) -> ml_collections.ConfigDict:
    """Optimizer settings of one training stage; the defaults are the paper's (arXiv 2604.13010)."""
    recipe = ml_collections.ConfigDict(
        {
            "steps": 150,
            "batch_size": 256,  # responses per optimizer update
            "learning_rate": 2e-6,
            "schedule": "constant",  # or "cosine"
            "warmup_steps": 0,
            "b1": 0.9,
            "b2": 0.98,
            "eps": 1e-8,
            "weight_decay": 0.1,
            "grad_clip": 1.0,
            "reduction": "sample_mean",  # or "token_mean", "token_sum"
        }
    )
    recipe.update(changes)
    return recipe


def model_section(**shape) -> ml_collections.ConfigDict:
    """A Qwen3 shape, with the field names of Hugging Face's config.json."""
    return ml_collections.ConfigDict(shape)


def base_config() -> ml_collections.ConfigDict:
    """Every setting there is, with its default. Config files fill in what is None or empty."""
    placeholder = config_dict.placeholder
    return ml_collections.ConfigDict(
        {
            "seed": 0,
            "stages": (),  # what runs when --stages is not given
            "tokenizer": "tiny",  # a bundled name, or the path of a SentencePiece model
            "task": {"digits": 3},
            "prompt_length": 16,  # longest prompt, in tokens
            "response_length": 48,  # cap on a response, in tokens
            "row_length": 256,  # positions per packed row
            "teacher": {
                "checkpoint": "",  # a finished stage directory to use instead of training one
                "model": {},
                "problems": placeholder(int),  # ground-truth worked answers to train on
                "label_smoothing": 0.0,
                **training_recipe(),
            },
            "student": {"model": {}},
            "sft_data": {"prompts": placeholder(int), "samples": 1, "temperature": 0.7},
            "sft": {
                "checkpoint": "",  # a finished `sft` directory to use instead of training one
                **training_recipe(),
            },
            "precompute": {
                "prompts": placeholder(int),
                "samples": 1,
                "temperature": 0.7,
                # For ablations only: score with a teacher that did not write the SFT data.
                "allow_inconsistent_teacher": False,
            },
            "opd": {
                "cache": "",  # a finished `precompute` directory to use instead of this run's
                "tau": 10.0,  # advantage clip, nats
                **training_recipe(),
            },
            "control": training_recipe(),
            "eval": {"split": "test", "prompts": 1000, "temperature": 1.0},
            "mesh": {"data": -1, "fsdp": 1, "tensor": 1},
            "runtime": {
                "rows_per_micro": 8,  # packed rows per forward and backward pass
                "slots": 128,  # responses decoded at a time
                "decode_steps": 8,  # tokens decoded between looks at what has finished
                "prefill_batch": 64,  # prompts read per call
                "records_per_shard": 2000,
                "checkpoint_every": 100,  # steps
            },
        }
    )


def qwen3_config(config: ml_collections.ConfigDict, which: str) -> Qwen3Config:
    """The shape of the "teacher" or the "student" model.

    Raises:
      UserError: naming a missing or unknown field.
    """
    try:
        return Qwen3Config(**config[which].model)
    except TypeError as error:
        raise UserError(f"{which}.model: {error}") from error


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def _check_recipe(name: str, recipe: ml_collections.ConfigDict) -> None:
    for key in ("steps", "batch_size", "learning_rate", "grad_clip"):
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
        0 <= recipe.warmup_steps <= recipe.steps,
        f"{name}.warmup_steps={recipe.warmup_steps} must lie between 0 and steps={recipe.steps}",
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
    longest = config.prompt_length + config.response_length
    _require(
        config.prompt_length > 0 and config.response_length > 0,
        f"prompt_length={config.prompt_length} and response_length={config.response_length} "
        "must be positive",
    )
    _require(
        longest - 1 <= config.row_length,
        f"row_length={config.row_length} cannot hold prompt_length={config.prompt_length} + "
        f"response_length={config.response_length} - 1 tokens; raise it to {longest - 1} or more",
    )
    for which in ("teacher", "student"):
        model = qwen3_config(config, which)
        _require(
            config.row_length <= model.max_position_embeddings,
            f"row_length={config.row_length} is more than {which}.model."
            f"max_position_embeddings={model.max_position_embeddings}",
        )
    for name in ("teacher", "sft", "opd", "control"):
        _check_recipe(name, config[name])
    _require(config.opd.tau > 0, f"opd.tau={config.opd.tau} must be positive")
    for name in ("sft_data", "precompute"):
        _require(
            (config[name].prompts or 0) > 0 and config[name].samples > 0,
            f"{name}.prompts={config[name].prompts} and {name}.samples={config[name].samples} "
            "must be positive",
        )
    for name in ("sft_data", "precompute", "eval"):
        _require(
            config[name].temperature >= 0,
            f"{name}.temperature={config[name].temperature} must not be negative",
        )
    _require(
        config.eval.split in ("dev", "test"),
        f"eval.split={config.eval.split!r} must be 'dev' or 'test'",
    )
    for key, value in config.runtime.items():
        _require(value > 0, f"runtime.{key}={value} must be positive")
