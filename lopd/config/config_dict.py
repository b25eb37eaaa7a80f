"""Settings as the ConfigDict that config files and the command line change, and back."""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any

import ml_collections
from ml_collections import config_dict

from lopd.config.settings import SamplingSettings, Settings, TrainingRecipe
from lopd.config.values import from_values


def _placeholder(annotation: Any) -> config_dict.FieldReference:
    """An unset entry of a type, as `int | None` says it."""
    (kind,) = (a for a in typing.get_args(annotation) if a is not types.NoneType)
    return config_dict.placeholder(typing.get_origin(kind) or kind)


def _config_dict(section: Any) -> ml_collections.ConfigDict:
    hints = typing.get_type_hints(type(section))
    entries = {}
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            value = _config_dict(value)
        elif value is None:
            value = _placeholder(hints[field.name])
        elif isinstance(value, Mapping):
            value = ml_collections.ConfigDict(dict(value))
        entries[field.name] = value
    return ml_collections.ConfigDict(entries)


def base_config() -> ml_collections.ConfigDict:
    """Every setting there is, with its default. Config files fill in what is None or empty."""
    return _config_dict(Settings())


def training_recipe(**changes: Any) -> ml_collections.ConfigDict:
    """A `TrainingRecipe` to update the section of a training stage with."""
    return _config_dict(TrainingRecipe(**changes))


def sampling_section(**changes: Any) -> ml_collections.ConfigDict:
    """A `SamplingSettings` to update the section of a sampling stage with."""
    return _config_dict(SamplingSettings(**changes))


def model_section(**shape: Any) -> ml_collections.ConfigDict:
    """A model's shape, with the field names of Hugging Face's config.json."""
    return ml_collections.ConfigDict(shape)


def read_settings(config: ml_collections.ConfigDict) -> Settings:
    """The settings that a ConfigDict holds, each within its domain.

    Raises:
      UserError: one line that names the setting, its value and what it must be.
    """
    return from_values(Settings, config.to_dict())
