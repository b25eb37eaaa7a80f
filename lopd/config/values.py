"""Settings from plain values, each of its type and within its domain; and changed copies."""

import dataclasses
import functools
import os
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
    return from_values(Settings, values)


def from_values(kind: type, values: Mapping[str, Any], prefix: str = "") -> Any:
    """A dataclass of settings from nested values; `prefix` is where they stand, for messages.

    Raises:
      UserError: one line that names the setting, its value and what it must be.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"{prefix.rstrip('.')}={values!r} must be a section of settings")
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


def _fits(value: Any, annotation: Any) -> bool:
    """Whether a value is of an annotated type, the items of a tuple included."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, a) for a in arguments)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if arguments[-1] is ...:
            return all(_fits(x, arguments[0]) for x in value)
        return len(value) == len(arguments) and all(map(_fits, value, arguments))
    if isinstance(value, bool):
        return annotation is bool
    return isinstance(value, origin or annotation)


def _name(annotation: Any) -> str:
    """An annotated type as people write it."""
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)


def _checked(value: Any, annotation: Any, metadata: Mapping, name: str) -> Any:
    """A value of the annotated type within its domain.

    Ints and lists become floats and tuples, and an empty text becomes None where that may be.
    """
    may_be_unset = _fits(None, annotation)
    if isinstance(value, str) and not value.strip() and may_be_unset:
        value = None
    if value is None:
        if not may_be_unset:
            raise UserError(f"{name}=None: it must be set")
        return None
    if isinstance(value, list):
        value = tuple(value)
    if type(value) is int and not _fits(value, annotation) and _fits(0.0, annotation):
        value = float(value)
    if not _fits(value, annotation):
        wanted = " or ".join(
            _name(a)
            for a in (typing.get_args(annotation) if may_be_unset else (annotation,))
            if a is not types.NoneType
        )
        raise UserError(f"{name}={value!r} must be of type {wanted}")
    domain: Domain | None = metadata.get("domain")
    if domain and (wanted := domain.complaint(value)):
        off = ", or None" if may_be_unset else ""
        raise UserError(f"{name}={value!r} must {wanted}{off}")
    if "separator" in metadata:
        separator = metadata["separator"]
        parts = value.split(separator) if separator else [value]
        value = separator.join(os.path.expanduser(part) for part in parts)
    return value
