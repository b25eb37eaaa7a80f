"""The settings of a run, and the table of its stages."""

from lopd.config.settings import (
    DEFAULT_STAGES,
    MATH_PROMPT,
    STAGES,
    base_config,
    model_section,
    paper_config,
    sampling_section,
    training_recipe,
    validate,
)

__all__ = [
    "DEFAULT_STAGES",
    "MATH_PROMPT",
    "STAGES",
    "base_config",
    "model_section",
    "paper_config",
    "sampling_section",
    "training_recipe",
    "validate",
]
