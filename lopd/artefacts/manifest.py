"""The entries of an artefact's manifest.json as types, and the way from and to JSON.

An entry that a stage does not make is left out of the file. What a file holds besides, or of
another type, is refused: nobody would read it, or somebody would stumble over it later.
"""

import contextlib
import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, NotRequired, TypedDict

import lopd
from lopd.machine.reading import is_file_name

FORMAT_VERSION = 4
"""Of manifests and of what they describe; another one is refused."""

Costs = dict[str, dict[str, float]]
"""Kind of work → seconds, tokens and FLOPs (`lopd.artefacts.accounting`)."""


class FileEntry(TypedDict):
    """A file of the artefact."""

    name: str
    """Its path from the directory of the artefact."""
    bytes: int
    """Its size."""
    sha256: str
    """Of its content, in hexadecimal."""


class ShardEntry(FileEntry):
    """A shard of records."""

    records: int
    content: str
    """The digest of the records in hexadecimal (`lopd.cache.codec.content_digest`)."""
    totals: dict[str, int | float]
    """Counts and sums over them (`lopd.cache.totals`)."""
    costs: Costs
    """Of sampling and scoring them; empty if that was done elsewhere."""


class PlanEntry(TypedDict):
    """Says which request belongs to which shard."""

    requests: int
    """How many."""
    prompts: str
    """A digest of the requests."""
    records_per_shard: int
    """Of a whole shard."""


class RoundEntry(TypedDict):
    """A round of sampling anew."""

    start: int
    """The step after which it began."""
    ess_fraction: float | None
    """Of the drift panel at that step; None if there was none."""
    cache: NotRequired[str]
    """The fingerprint of the round's cache, once it is made."""


@dataclasses.dataclass(slots=True)
class Manifest:
    """An artefact's origin, progress and results."""

    stage: str
    """Which stage makes it."""
    settings: dict[str, Any]
    """That its content depends on."""
    inputs: dict[str, Any]
    """Fingerprints of what it is made from, by name."""
    complete: bool = False
    """Whether the stage has finished."""
    code_version: str = lopd.__version__
    """Of the lopd that began it."""
    outputs: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Facts that later stages may rely on: fingerprints, counts, model shape."""
    seconds: float = 0.0
    """Wall time of all runs that have worked on it."""
    plan: PlanEntry | None = None
    """Of sampled records."""
    worker: tuple[int, int] | None = None
    """(i, N): this is part i of N, from 0, to be merged with the others."""
    fields: dict[str, list] | None = None
    """Of a record: name → [dtype, shape] (`lopd.cache.codec.describe`)."""
    shards: list[ShardEntry] = dataclasses.field(default_factory=list)
    """Those that are whole, by name."""
    files: list[FileEntry] = dataclasses.field(default_factory=list)
    """All others that are whole; once it is complete, all that there are (`Artefact.finish`)."""
    rounds: list[RoundEntry] = dataclasses.field(default_factory=list)
    """Of `opd` with refreshes, in order."""
    results: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Of an evaluation: model → test set and mode → figures."""

    def to_json(self) -> dict[str, Any]:
        """The entries of the file, without those that are unset and without its checksum."""
        entries: dict[str, Any] = {"format_version": FORMAT_VERSION}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in _ALWAYS or (value is not None and value != {} and value != []):
                entries[field.name] = value
        return entries

    @classmethod
    def from_json(cls, entries: Any) -> "Manifest":
        """The inverse of `to_json`.

        Raises:
          ValueError: in one line, what is no manifest of this version about it.
        """
        if not isinstance(entries, dict):
            raise ValueError("it is no JSON object")
        entries = dict(entries)
        if (version := entries.pop("format_version", None)) != FORMAT_VERSION:
            raise ValueError(f"its format version is {version}, this code reads {FORMAT_VERSION}")
        manifest = _typed(entries, cls, "")
        # What lies elsewhere is no file of the artefact, and would be written there.
        for entry in manifest.shards:
            if not is_file_name(entry["name"]):
                raise ValueError(f"{entry['name']!r} is no file name")
        for entry in manifest.files:
            if {"", ".", ".."} & {*entry["name"].split("/")}:
                raise ValueError(f"{entry['name']!r} is no path of a file")
        return manifest


_ALWAYS = ("stage", "settings", "inputs", "complete", "code_version", "outputs", "seconds")


def _typed(value: Any, kind: Any, name: str) -> Any:
    """A JSON value as what an annotation says.

    Raises:
      ValueError: naming the entry that is of another type, missing or unknown.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        return _one_of(value, arguments, name)
    if kind is Manifest or typing.is_typeddict(kind):
        return kind(**_members(value, kind, name))
    if origin is tuple:
        items = _of_type(value, list, name)
        if len(items) != len(arguments):
            raise ValueError(f"{name} has {len(items)} items, not {len(arguments)}")
        return tuple(_typed(x, k, name) for x, k in zip(items, arguments, strict=True))
    if origin is list:
        return [_typed(x, arguments[0], f"{name}[{i}]") for i, x in _pairs(value, list, name)]
    if origin is dict:
        return {k: _typed(x, arguments[1], f"{name}.{k}") for k, x in _pairs(value, dict, name)}
    return _of_type(value, kind, name)


def _pairs(value: Any, kind: type, name: str) -> list[tuple]:
    found = _of_type(value, kind, name)
    return list(found.items() if kind is dict else enumerate(found))


def _one_of(value: Any, kinds: tuple, name: str) -> Any:
    """A value of one of several types; the complaint is of the first."""
    for kind in kinds[1:]:
        with contextlib.suppress(ValueError):
            return _typed(value, kind, name)
    return _typed(value, kinds[0], name)


def _of_type(value: Any, kind: type, name: str) -> Any:
    # JSON has one kind of number: 0 is a float, but True is no number.
    allowed = (int, float) if kind is float else (kind,)
    if not isinstance(value, allowed) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{name or 'it'} is {_called(type(value))}, not {_called(kind)}")
    return value


def _called(kind: type) -> str:
    return {types.NoneType: "null", dict: "an object", list: "a list"}.get(kind, kind.__name__)


def _members(value: Any, kind: Any, name: str) -> dict[str, Any]:
    """The members of an object by their annotations, none missing and none more."""
    entries: Mapping = _of_type(value, dict, name)
    hints, prefix = typing.get_type_hints(kind), f"{name}." if name else ""
    required = {*_ALWAYS} if kind is Manifest else kind.__required_keys__
    if unknown := sorted(entries.keys() - hints.keys()):
        raise ValueError(f"{prefix}{unknown[0]} is no entry of a manifest")
    if missing := sorted(required - entries.keys()):
        raise ValueError(f"{prefix}{missing[0]} is missing")
    return {key: _typed(x, hints[key], f"{prefix}{key}") for key, x in entries.items()}
