"""Settings from plain values, each of its type and within its domain; and changed copies."""

import dataclasses
import functools
import types
import typing
from collections.abc import Mapping
from typing import Any

from lopd.config.domains import Domain
from lopd.config.settings import Settings
from lopd.errors import UserError


def read_key(settings: Settings, key: str) -> Any:
    """The setting of a dotted key, as "teacher.checkpoint"."""
    return functools.reduce(getattr, key.split("."), settings)


def changed(settings: Settings, changes: Mapping[str, Any]) -> Settings:
    """A copy of settings with some of them changed, by dotted key.

    Raises:
      UserError: naming the setting, if there is none of that name, or its value cannot be.
    """
    values = dataclasses.asdict(settings)
    for key, value in changes.items():
        *sections, name = key.split(".")
        target = values
        for section in sections:
            target = target.get(section)
            if not isinstance(target, dict):
                break
        if not isinstance(target, dict) or name not in target:
            raise UserError(f"there is no setting {key}")
        target[name] = value
    return from_values(Settings, values, "")


def from_values(kind: type, values: Mapping[str, Any], prefix: str = "") -> Any:
    """A dataclass of settings from nested values; `prefix` is where they stand, for messages.

    Raises:
      UserError: one line that names the setting, its value and what it must be.
    """
    hints, found = typing.get_type_hints(kind), {}
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for name in values:
        if name not in fields:
            raise UserError(f"{prefix}{name}: there is no such setting")
    for name, value in values.items():
        if dataclasses.is_dataclass(hints[name]):
            found[name] = from_values(hints[name], value, f"{prefix}{name}.")
        else:
            metadata = fields[name].metadata
            found[name] = _checked(value, hints[name], metadata, f"{prefix}{name}")
    return kind(**found)


def _checked(value: Any, annotation: Any, metadata: Mapping, name: str) -> Any:
    """A value of the annotated type within its domain; ints and lists become floats and tuples."""
    alternatives = (annotation,)
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        alternatives = typing.get_args(annotation)
    kinds = [typing.get_origin(a) or a for a in alternatives]
    if value is None:
        if types.NoneType not in kinds:
            raise UserError(f"{name}=None: it must be set")
        return None
    if float in kinds and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if tuple in kinds and isinstance(value, list):
        value = tuple(value)
    if not isinstance(value, tuple(kinds)) or (isinstance(value, bool) and bool not in kinds):
        wanted = " or ".join(k.__name__ for k in kinds if k is not types.NoneType)
        raise UserError(f"{name}={value!r} must be of type {wanted}")
    domain: Domain | None = metadata.get("domain")
    if domain and not domain.holds(value):
        off = ", or None" if types.NoneType in kinds else ""
        raise UserError(f"{name}={value!r} must {domain.text}{off}")
    return value
