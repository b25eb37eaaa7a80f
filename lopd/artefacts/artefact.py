"""Artefacts: what a stage leaves behind, and the manifest that says what it is.

An artefact is a directory with a `manifest.json`. The manifest is written, atomically, when the
stage starts (`complete: false`, with the settings and inputs it is made from), grows as parts of
it are finished, and is closed at the end. A file counts only when the manifest lists it, with its
size and checksum; when the manifest is closed, all files are flushed and listed. The manifest holds
the checksum of its own text, so that no change to it goes unseen.
"""

import hashlib
import json
import operator
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from etils import epath

from lopd.artefacts.manifest import FORMAT_VERSION, FileEntry, Manifest
from lopd.errors import UserError
from lopd.machine import processes
from lopd.machine.lock import LOCK
from lopd.machine.progress import bar
from lopd.machine.reading import check_regular
from lopd.machine.storage import (
    absolute,
    file_sha256,
    make_folder,
    remove_leftovers,
    sync,
    sync_tree,
    write_atomically,
)

MANIFEST = "manifest.json"
"""The name of the file that makes a directory an artefact."""
_UNLISTED = (LOCK, "checkpoints", "tensorboard", "profile", "wandb_id")
"""Parts that a finished artefact may lose: the lock of its writer, checkpoints, which hold
checksums of their own, and other views of its metrics."""
WAY_OUT = "restore it, or run its stage again, which makes what is damaged again"
"""About a file of an artefact that is damaged."""
_READERS = 4
"""Files that are read at once for their checksums."""


def _text(entries: dict[str, Any]) -> str:
    """The file's text: the manifest's entries, and last the SHA-256 of everything above."""
    content = {key: value for key, value in entries.items() if key != "checksum"}
    checksum = hashlib.sha256(json.dumps(content, indent=2).encode()).hexdigest()
    return json.dumps({**content, "checksum": checksum}, indent=2) + "\n"


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Changes between two JSON-like trees, as `key: old → new` lines."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in sorted(old.keys() | new.keys()):
            found += differences(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else key)
        return found
    return [] if old == new else [f"{prefix}: {old!r} → {new!r}"]


def file_entry(path: epath.Path, name: str) -> FileEntry:
    """The entry of a manifest for the file at `path`."""
    return {"name": name, "bytes": path.stat().length, "sha256": file_sha256(path)}


def damage(path: epath.Path, entry: FileEntry) -> str:
    """The damage of a file that a manifest lists, in words; empty if it is whole."""
    if not path.exists():
        return "is missing"
    if (size := path.stat().length) != entry["bytes"]:
        return f"is damaged ({size} bytes, the manifest says {entry['bytes']})"
    if file_sha256(path) != entry["sha256"]:
        return "is damaged (its checksum differs from the manifest's)"
    return ""


def _files_below(path: epath.Path, name: str = "") -> Iterator[tuple[str, epath.Path]]:
    for child in path.iterdir():
        if child.is_dir():
            yield from _files_below(child, f"{name}{child.name}/")
        else:
            yield f"{name}{child.name}", child


class Artefact:
    """One stage's output directory and its manifest; None where there is none yet."""

    def __init__(self, path: epath.PathLike):
        self.path = absolute(path)
        self.manifest: Manifest | None = self._load()

    def _load(self) -> Manifest | None:
        path = self.path / MANIFEST
        if not path.exists():
            return None
        way_out = f"restore it, or delete {self.path}"
        check_regular(path)
        try:
            text = path.read_bytes().decode()
            entries = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} is damaged ({error}); {way_out}") from error
        version = entries.get("format_version") if isinstance(entries, dict) else None
        if version != FORMAT_VERSION:
            raise UserError(
                f"{path} has format version {version}, this code reads {FORMAT_VERSION}; delete "
                f"{self.path} to make it again"
            )
        # The text is a function of the content, so comparing it finds a change of any byte.
        if text != _text(entries):
            raise UserError(f"{path} is damaged (its checksum differs); {way_out}")
        del entries["checksum"]
        try:
            return Manifest.from_json(entries)
        except ValueError as error:
            raise UserError(
                f"{path} is damaged, or of another version ({error}); {way_out}"
            ) from error

    @property
    def complete(self) -> bool:
        """Whether the stage that makes it has finished."""
        return self.manifest is not None and self.manifest.complete

    @property
    def outputs(self) -> dict[str, Any]:
        """Facts that later stages may rely on: fingerprints, counts, model shape."""
        return self.manifest.outputs

    def check(self, key: str, expected: dict[str, Any]) -> None:
        """Refuses an artefact that was made from other `settings` or `inputs`.

        Raises:
          UserError: naming each difference.
        """
        if self.manifest is None:
            return
        found = differences(getattr(self.manifest, key), json.loads(json.dumps(expected)))
        if found:
            raise UserError(
                f"{self.path} was made with other {key} ({'; '.join(found)}): restore them, "
                f"use another --workdir, or delete {self.path}"
            )

    def begin(
        self, stage: str, settings: dict[str, Any], inputs: dict[str, Any], shared: bool = False
    ) -> None:
        """Opens the artefact for work, keeping what an interrupted run has finished.

        What it has not finished is deleted, unless others, with whom the folder is `shared`, may
        be at it.
        """
        if self.manifest is None:
            make_folder(self.path)
            own = json.loads(json.dumps([settings, inputs]))  # as they will be read
            self.manifest = Manifest(stage, *own)
        if processes.is_main() and not shared:
            remove_leftovers(self.path)
        self.save()

    def reload(self) -> None:
        """Reads the manifest again, as another process may have written it."""
        self.manifest = self._load()

    def save(self) -> None:
        """Writes the manifest as it stands; with several processes, the first one does."""
        if processes.is_main():
            write_atomically(self.path / MANIFEST, _text(self.manifest.to_json()))

    def list_file(self, name: str) -> None:
        """Lists a file that is whole, in the next `save`."""
        others = [entry for entry in self.manifest.files if entry["name"] != name]
        entry = file_entry(self.path / name, name)
        self.manifest.files = sorted([*others, entry], key=operator.itemgetter("name"))

    def lists(self, name: str) -> bool:
        """Whether the manifest lists a file of that name, which no record is in."""
        return any(entry["name"] == name for entry in self.manifest.files)

    def damaged(self) -> dict[str, str]:
        """All files that are listed and not as they were, and what is wrong with each.

        Reads all of them.
        """
        entries = [*self.manifest.shards, *self.manifest.files]
        with (
            bar(
                total=len(entries), label=f"check {self.path.name}", unit="files", delay=2
            ) as progress,
            ThreadPoolExecutor(_READERS) as threads,
        ):

            def look(entry: FileEntry) -> str:
                found = damage(self.path / entry["name"], entry)
                progress.update()
                return found

            found = threads.map(look, entries)
        return {e["name"]: text for e, text in zip(entries, found, strict=True) if text}

    def reopen(self, lost: Collection[str]) -> None:
        """Strikes files off the manifest, which its stage is to make again."""
        for listed in (self.manifest.shards, self.manifest.files):
            listed[:] = [entry for entry in listed if entry["name"] not in lost]
        self.manifest.complete = False
        self.save()

    def rewrite(self, name: str, text: str) -> None:
        """Replaces a text file of a finished artefact; to be called by one process.

        A kill in between leaves it unfinished, and its stage makes the file again.
        """
        self.reopen([name])
        write_atomically(self.path / name, text)
        self.list_file(name)
        self.manifest.complete = True
        self.save()

    def _list_all(self) -> None:
        """Flushes and lists every file of the directory."""
        for child in self.path.iterdir():
            if child.name not in _UNLISTED:
                sync_tree(child)
        sync(self.path)
        apart = {MANIFEST, *(entry["name"] for entry in self.manifest.shards)}
        found = {
            name: path
            for name, path in sorted(_files_below(self.path))
            if name not in apart and name.split("/")[0] not in _UNLISTED
        }
        with ThreadPoolExecutor(_READERS) as threads:
            self.manifest.files = list(threads.map(file_entry, found.values(), found))

    def finish(self, outputs: dict[str, Any]) -> None:
        """Closes the artefact: from now on it is complete, to every process of the run."""
        if processes.is_main():
            self._list_all()
        self.manifest.outputs = outputs
        self.manifest.complete = True
        self.save()
        processes.barrier(f"finished {self.path}")


def open_complete(path: epath.PathLike, what: str) -> Artefact:
    """A finished artefact, to be read.

    Raises:
      UserError: if there is none, or it is not finished.
    """
    artefact = Artefact(path)
    if artefact.manifest is None:
        raise UserError(f"{what}: {artefact.path} holds no {MANIFEST}; run the stage that makes it")
    if not artefact.complete:
        raise UserError(f"{what}: {artefact.path} is not finished; run its stage again")
    return artefact
