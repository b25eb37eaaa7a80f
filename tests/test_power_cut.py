"""A power cut at any instant: what was flushed is there, of the rest only names, or nothing.

The disk is simulated by noting what is flushed while a run works. LOPD_POWER_CUTS (2 by default) is
how many instants are tried, each with both kinds of loss; 40 by hand.
"""

import contextlib
import os
import pathlib
import random
import stat
import threading

import pytest
from helpers.tiny_run import run, save_models, use_one_device

from lopd.artefacts.artefact import Artefact

CUTS = int(os.environ.get("LOPD_POWER_CUTS", "2"))
STAGES = ("precompute", "heldout", "opd", "eval", "export")
CHANGES = {
    "opd__steps": 6,
    "opd__warmup_steps": 1,
    "opd__batch_size": 8,
    "runtime__checkpoint_every": 2,
    "runtime__drift_every": 2,
    "metrics__tensorboard": False,
    "eval__prompts": 4,
    "eval__samples": 1,
}


class Disk:
    """What of a folder would outlast the machine, at each flush and each rename since the start.

    A state is {path: content, or None for a folder}.
    """

    def __init__(self, root: pathlib.Path, patch: pytest.MonkeyPatch):
        self._root, self._guard = root, threading.Lock()
        self._contents: dict[int, bytes] = {}
        self._names: dict[int, dict[str, int]] = {}
        self._held: list[int] = []  # so that no number of an inode is used twice
        self.states: list[tuple[dict, dict]] = []
        flush, replace = os.fsync, os.replace

        def fsync(descriptor):
            flush(descriptor)
            with self._guard:
                self._note(os.dup(descriptor))

        def replaced(*args, **kwargs):
            replace(*args, **kwargs)
            with self._guard:
                self._cut()

        patch.setattr(os, "fsync", fsync)
        patch.setattr(os, "replace", replaced)

    def _note(self, descriptor: int) -> None:
        self._held.append(descriptor)
        what = os.fstat(descriptor)
        if stat.S_ISDIR(what.st_mode):
            with os.scandir(descriptor) as entries:
                self._names[what.st_ino] = {e.name: e.inode() for e in entries}
        else:
            self._contents[what.st_ino] = os.pread(descriptor, what.st_size, 0)
        self._cut()

    def _cut(self) -> None:
        names: dict = {}
        for folder, _, files in os.walk(self._root):
            path = pathlib.Path(folder).relative_to(self._root)
            names[path] = None
            for name in files:
                with contextlib.suppress(FileNotFoundError):  # another thread's
                    inode = os.stat(os.path.join(folder, name)).st_ino
                    names[path / name] = self._contents.get(inode, b"")
        self.states.append((names, self._flushed()))

    def _flushed(self) -> dict:
        """Only what lies in folders that were flushed with its name in them."""
        state: dict = {}

        def add(path: pathlib.Path, inode: int) -> None:
            if inode in self._contents:
                state[path] = self._contents[inode]
            elif inode in self._names:
                state[path] = None
                for name, child in self._names[inode].items():
                    add(path / name, child)

        if self._root.exists():
            add(pathlib.Path(), os.stat(self._root).st_ino)
        return state


def lay_out(state: dict, folder: pathlib.Path) -> None:
    for path, content in state.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            (folder / path).mkdir(parents=True, exist_ok=True)
        else:
            (folder / path).write_bytes(content)


def result(workdir: pathlib.Path) -> dict:
    """What another run must make again, bit for bit."""
    outputs = {stage: dict(Artefact(workdir / stage).outputs) for stage in STAGES}
    for found in outputs.values():
        found.pop("costs", None)
    files = ["eval/summary.json", "opd/drift.jsonl", "export/model.safetensors"]
    rows = (workdir / "opd" / "metrics.jsonl").read_text().splitlines()
    return {
        "outputs": outputs,
        "rows": len(rows),
        **{name: (workdir / name).read_bytes() for name in files},
    }


@pytest.mark.slow
def test_a_power_cut_loses_nothing_that_is_not_made_again(tmp_path):
    models, whole = tmp_path / "models", tmp_path / "whole"
    with pytest.MonkeyPatch.context() as patch:
        use_one_device(patch)
        save_models(models)
        with pytest.MonkeyPatch.context() as recording:
            disk = Disk(whole, recording)
            run(models, whole, *STAGES, **CHANGES)
        expected, rng = result(whole), random.Random(0)
        print(f"{len(disk.states)} instants")
        for instant in sorted(rng.sample(range(len(disk.states)), CUTS)):
            for kind, state in zip(("names only", "nothing"), disk.states[instant], strict=True):
                workdir = tmp_path / f"{instant}-{kind}"
                lay_out(state, workdir)
                run(models, workdir, *STAGES, **CHANGES)
                assert result(workdir) == expected, f"instant {instant}, {kind}"
                assert not list(workdir.rglob("*.tmp"))
