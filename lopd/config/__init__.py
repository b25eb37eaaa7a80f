"""The settings of a run, and the table of its stages: pure data, below everything else."""

from lopd.config.catalogue import DEFAULT_STAGES, STAGES
from lopd.config.config_dict import (
    base_config,
    model_section,
    read_settings,
    sampling_section,
    training_recipe,
)
from lopd.config.one_chip import one_chip_config
from lopd.config.overlays import overlaid
from lopd.config.paper import paper_config
from lopd.config.settings import MATH_PROMPT

__all__ = [
    "DEFAULT_STAGES",
    "MATH_PROMPT",
    "STAGES",
    "base_config",
    "model_section",
    "one_chip_config",
    "overlaid",
    "paper_config",
    "read_settings",
    "sampling_section",
    "training_recipe",
]
