"""Artefacts: what a stage leaves behind, and the manifest that says what it is.

An artefact is a directory with a `manifest.json`. The manifest is written, atomically, when the
stage starts (`complete: false`, with the settings and inputs it is made from), grows as parts of
it are finished, and is closed at the end. A file counts only when the manifest lists it. The
manifest holds the checksum of its own text, so that no change to it goes unseen.
"""

import hashlib
import json
from typing import Any

from etils import epath

import lopd
from lopd.errors import UserError
from lopd.machine import processes
from lopd.machine.storage import absolute, write_atomically

MANIFEST = "manifest.json"
"""The name of the file that makes a directory an artefact."""
FORMAT_VERSION = 2
"""Of manifests and of what they describe; another one is refused."""


def _manifest_text(manifest: dict[str, Any]) -> str:
    """The file's text: the manifest, and last the SHA-256 of everything above."""
    content = {key: value for key, value in manifest.items() if key != "checksum"}
    checksum = hashlib.sha256(json.dumps(content, indent=2).encode()).hexdigest()
    return json.dumps({**content, "checksum": checksum}, indent=2) + "\n"


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """What changed between two JSON-like trees, as `key: old → new` lines."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in sorted(old.keys() | new.keys()):
            found += differences(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else key)
        return found
    return [] if old == new else [f"{prefix}: {old!r} → {new!r}"]


class Artefact:
    """One stage's output directory and its manifest (a plain dict, `manifest`)."""

    def __init__(self, path: epath.PathLike):
        self.path = absolute(path)
        self.manifest: dict[str, Any] | None = self._load()

    def _load(self) -> dict[str, Any] | None:
        path = self.path / MANIFEST
        if not path.exists():
            return None
        try:
            text = path.read_bytes().decode()
            manifest = json.loads(text)
        except ValueError as error:
            raise UserError(
                f"{path} is damaged ({error}); restore it, or delete {self.path}"
            ) from error
        if manifest.get("format_version") != FORMAT_VERSION:
            raise UserError(
                f"{path} has format version {manifest.get('format_version')}, this code reads "
                f"{FORMAT_VERSION}; delete {self.path} to make it again"
            )
        # The text is a function of the content, so comparing it finds a change of any byte.
        if text != _manifest_text(manifest):
            raise UserError(
                f"{path} is damaged (its checksum differs); restore it, or delete {self.path}"
            )
        del manifest["checksum"]
        return manifest

    @property
    def complete(self) -> bool:
        """Whether the stage that makes it has finished."""
        return self.manifest is not None and self.manifest["complete"]

    @property
    def outputs(self) -> dict[str, Any]:
        """What later stages may rely on: fingerprints, counts, model shape."""
        return self.manifest["outputs"]

    def check(self, key: str, expected: dict[str, Any]) -> None:
        """Refuses an artefact that was made from other `settings` or `inputs`.

        Raises:
          UserError: naming each difference.
        """
        if self.manifest is None:
            return
        found = differences(self.manifest[key], json.loads(json.dumps(expected)))
        if found:
            raise UserError(
                f"{self.path} was made with other {key} ({'; '.join(found)}): restore them, "
                f"use another --workdir, or delete {self.path}"
            )

    def begin(self, stage: str, settings: dict[str, Any], inputs: dict[str, Any]) -> None:
        """Opens the artefact for work, keeping what an interrupted run has finished."""
        if self.manifest is None:
            self.path.mkdir(parents=True, exist_ok=True)
            self.manifest = {
                "format_version": FORMAT_VERSION,
                "stage": stage,
                "complete": False,
                "code_version": lopd.__version__,
                "settings": json.loads(json.dumps(settings)),
                "inputs": json.loads(json.dumps(inputs)),
                "outputs": {},
                "seconds": 0.0,
            }
        self.save()

    def reload(self) -> None:
        """Reads the manifest again, as another process may have written it."""
        self.manifest = self._load()

    def save(self) -> None:
        """Writes the manifest as it stands; with several processes, the first one does."""
        if processes.is_main():
            write_atomically(self.path / MANIFEST, _manifest_text(self.manifest))

    def finish(self, outputs: dict[str, Any]) -> None:
        """Closes the artefact: from now on it is complete, to every process of the run."""
        self.manifest["outputs"] = outputs
        self.manifest["complete"] = True
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
