"""Where a study keeps its artefacts: each once, whichever arms and processes want it.

An artefact follows from its stage's settings and inputs (that is what its manifest holds), so their
digest is its name. Two arms that agree on them share it without having to say so.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator

from etils import epath
from jax.sharding import Mesh

from lopd import pipeline
from lopd.artefacts.artefact import Artefact
from lopd.config.settings import Settings
from lopd.machine import shutdown
from lopd.stages.run import Run

_POLL_SECONDS = 0.5


@contextlib.contextmanager
def locked(path: epath.Path, wait: bool = True) -> Iterator[bool]:
    """Holds a lock file, which the kernel lets go of when the process ends, however it ends.

    Gives whether the lock was taken: false only without `wait`, if another process holds it.

    Raises:
      Stopped: when asked to stop while waiting.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        yield _take(descriptor, wait)
    finally:
        os.close(descriptor)


def _take(descriptor: int, wait: bool) -> bool:
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if not wait:
                return False
            shutdown.check()
            time.sleep(_POLL_SECONDS)


class Store:
    """The artefacts of a study, in WORKDIR/artefacts/STAGE-DIGEST."""

    def __init__(self, workdir: epath.Path, mesh: Mesh):
        self.workdir = workdir
        self._mesh = mesh

    def open_run(self, settings: Settings) -> Run:
        """A run with these settings, whose artefacts lie in the store."""
        found: dict[str, epath.Path] = {}

        def locate(run: Run, stage: str) -> epath.Path:
            if stage not in found:  # what a stage reads is complete and changes no more
                made_with, inputs = pipeline.identify(run, stage)
                text = json.dumps({"settings": made_with, "inputs": inputs}, sort_keys=True)
                digest = hashlib.sha256(text.encode()).hexdigest()[:12]
                found[stage] = self.workdir / "artefacts" / f"{stage}-{digest}"
            return found[stage]

        return Run(settings, self.workdir, self._mesh, locate=locate)

    def make(self, run: Run, stage: str, title: str) -> None:
        """Runs a stage unless its artefact is complete; waits if another process is at it."""
        path = run.place(stage)
        if not Artefact(path).complete:
            with self.locked(path.name):
                pipeline.run_stage(run, stage, title)

    def locked(self, name: str, wait: bool = True):
        """The lock of that name; see `locked`."""
        return locked(self.workdir / "locks" / name, wait)
