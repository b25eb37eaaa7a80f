"""Rules on several settings at once, which need nothing but the settings.

What one setting may be stands beside it in `lopd.config.settings`; what needs models, files or
artefacts is in `lopd.preflight`.
"""

import importlib.util
from collections.abc import Iterable

from lopd.config.catalogue import BASE, CATALOGUE, STAGES, refreshes, stage_info
from lopd.config.settings import HeldoutSettings, OpdSettings, Settings
from lopd.errors import UserError


def require(condition: bool, message: str) -> None:
    """Raises UserError with the message unless the condition holds."""
    if not condition:
        raise UserError(message)


def _check_stages(stages: Iterable[str]) -> None:
    for stage in stages:
        require(
            stage in STAGES,
            f"--stages: no stage is called {stage!r}; there are {', '.join(STAGES)}",
        )
    require(bool(stages), "no stages to run: give --stages, or config.stages in the config file")


def _check_recipes(settings: Settings) -> None:
    for info in CATALOGUE:
        if info.trains and not info.section:
            recipe = getattr(settings, info.name)
            require(
                recipe.warmup_steps <= recipe.steps,
                f"{info.name}.warmup_steps={recipe.warmup_steps} must lie between 0 and "
                f"steps={recipe.steps}",
            )


def _check_heldout(section: HeldoutSettings) -> None:
    require(section.prompts > 0, "heldout.prompts=0: how many prompts are to be held out?")
    whole = HeldoutSettings()
    for key in ("temperature", "top_k", "top_p", "min_p"):
        require(
            getattr(section, key) == getattr(whole, key),
            f"heldout.{key}={getattr(section, key)} must be {getattr(whole, key)}: importance "
            "weights need responses of π_ref's own distribution",
        )


def _check_refresh(settings: Settings) -> None:
    opd, refreshed = settings.opd, refreshes(settings)
    require(
        opd.residual_folds is None or not refreshed,
        f"opd.residual_folds={opd.residual_folds} fits its tables to one whole cache: it must "
        "be None with opd.refresh_every or opd.refresh_below",
    )
    require(
        opd.extrapolation == 1 or not refreshed,
        f"opd.extrapolation={opd.extrapolation} leads away from π_ref, which later rounds' "
        "caches do not hold: it must be 1 with opd.refresh_every or opd.refresh_below",
    )


def _check_online(opd: OpdSettings) -> None:
    for key, off in (("residual_folds", None), ("extrapolation", 1.0)):
        require(
            getattr(opd, key) == off,
            f"opd.{key}={getattr(opd, key)} needs a cache by π_ref, which online OPD has not: "
            f"it must be {off}",
        )


def _check_given_responses(settings: Settings) -> None:
    if settings.sft_data.responses == "given":
        require(
            bool(settings.sft.teacher),
            "sft_data.responses='given': say in sft.teacher who wrote the responses (the method "
            "needs the teacher that scores to be the same)",
        )
        require(
            bool(settings.task.sft_prompts),
            "sft_data.responses='given' are those of task.sft_prompts, which is not set",
        )


def _check_rows(settings: Settings, stages: tuple[str, ...], held_out: bool) -> None:
    """Every row can hold the longest prompt and response that are trained on or scored in it."""
    pairs = {("sft", "sft_data"), ("opd", "precompute"), ("precompute", "precompute")}
    for name in stages:
        info = stage_info(name)
        if info.learns_from and info.name != "teacher":  # its answers are not sampled
            pairs.add((info.settings_section, info.learns_from))
    if held_out:
        pairs |= {("heldout", "heldout"), ("opd", "heldout")}
    for rows, responses in sorted(pairs):
        row_length = getattr(settings, rows).row_length
        response_length = getattr(settings, responses).response_length
        longest = settings.prompt_length + response_length - 1
        require(
            longest <= row_length,
            f"{rows}.row_length={row_length} cannot hold prompt_length="
            f"{settings.prompt_length} + {responses}.response_length="
            f"{response_length} - 1 tokens; raise it to {longest} or more",
        )


def _check_eval_models(settings: Settings) -> None:
    for model in settings.eval.models or ():
        require(
            model == BASE or (model in STAGES and bool(stage_info(model).trains)),
            f"eval.models: no model is called {model!r}; it is 'base' or a stage that trains one",
        )


def check_settings(settings: Settings, stages: tuple[str, ...]) -> None:
    """Refuses what can be known from the settings alone.

    Raises:
      UserError: one line that names the setting, its value and what it must be.
    """
    _check_stages(stages)
    _check_recipes(settings)
    _check_given_responses(settings)
    _check_refresh(settings)
    if "online" in stages:
        _check_online(settings.opd)
    held_out = "heldout" in stages or ("opd" in stages and settings.opd.refresh_below is not None)
    if held_out:
        _check_heldout(settings.heldout)
    _check_rows(settings, stages, held_out)
    _check_eval_models(settings)
    wandb = settings.metrics.wandb
    require(
        not wandb or importlib.util.find_spec("wandb") is not None,
        f"metrics.wandb={wandb!r} needs a package: pip install wandb",
    )
