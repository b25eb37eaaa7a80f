"""Where a training step's row goes: metrics.jsonl, TensorBoard, Weights & Biases."""

import hashlib
import json
import math
import os
import secrets
import sys
import time
from collections.abc import Iterator, Mapping
from typing import TypedDict

import numpy as np
from etils import epath

from lopd.config.settings import MetricsSettings
from lopd.errors import UserError
from lopd.machine import processes, shutdown
from lopd.machine.storage import Growing, write_atomically

METRICS, DRIFT = "metrics.jsonl", "drift.jsonl"
"""The files' names."""


class Rows(TypedDict):
    """The beginning of a file of rows: those up to some step."""

    bytes: int
    """Their size."""
    sha256: str
    """Of them, in hexadecimal."""


NO_ROWS = Rows(bytes=0, sha256=hashlib.sha256().hexdigest())
"""Of a file that is empty, or not there."""


def _read_rows(path: epath.Path, rows: Rows) -> bytes | None:
    """The rows, or None if they are not in the file any more as they were."""
    found = path.read_bytes()[: rows["bytes"]] if path.exists() else b""
    return found if hashlib.sha256(found).hexdigest() == rows["sha256"] else None


def check_rows(folder: epath.Path, rows: Mapping[str, Rows]) -> str:
    """What is wrong with the rows that belong to a checkpoint, by file name; empty if nothing is.

    A training that went on without them would leave files with a gap, and costs that lack a part.
    """
    lost = [name for name in rows if _read_rows(folder / name, rows[name]) is None]
    return f"{' and '.join(lost)} lacks rows that were there then, or has others" if lost else ""


class MetricsFile:
    """`metrics.jsonl` and its like: one JSON object per line, in order, also after a resume.

    In a bucket, rows show after `sync` and at the end.
    """

    def __init__(self, path: epath.Path, rows: Rows = NO_ROWS):
        """Opens the file with its first `rows`, dropping what an interrupted run wrote after them.

        Raises:
          UserError: if they are not there.
        """
        kept = _read_rows(path, rows)
        if kept is None:
            raise UserError(f"{path} has lost rows, or has others: restore it")
        self._growing = Growing(path)
        write_atomically(self._growing.local, kept.decode())
        self._file = self._growing.local.open("ab")
        self._bytes, self._digest = rows["bytes"], hashlib.sha256(kept)

    @property
    def rows(self) -> Rows:
        """The rows so far."""
        return Rows(bytes=self._bytes, sha256=self._digest.hexdigest())

    def write(self, row: dict) -> None:
        """Appends one row; a number that is not finite becomes null, which JSON has."""
        row = {
            name: None if isinstance(x, float) and not math.isfinite(x) else x
            for name, x in row.items()
        }
        line = f"{json.dumps(row)}\n".encode()
        self._file.write(line)
        self._file.flush()
        self._bytes += len(line)
        self._digest.update(line)

    def sync(self) -> None:
        """Makes the rows so far outlast the machine."""
        self._growing.sync()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()
        self._growing.sync()


def flat(row: dict, prefix: str = "") -> Iterator[tuple[str, float | dict]]:
    """(name, number) of all that a row holds but its step: "loss", "heldout/chi2_ci95/00".

    A histogram ("edges" and "counts" of its bins) stays whole; what is None is left out.
    """
    for name, x in row.items():
        if isinstance(x, list):
            x = {f"{i:02}": item for i, item in enumerate(x)}
        if isinstance(x, dict) and x.keys() != {"edges", "counts"}:
            yield from flat(x, f"{prefix}{name}/")
        elif x is not None and name != "step":
            yield f"{prefix}{name}", x


def _tensorboard_histogram(histogram: dict) -> dict:
    """A histogram as arguments of tensorboardX; its sums are those of the bins' middles."""
    edges, counts = np.asarray(histogram["edges"]), np.asarray(histogram["counts"])
    middles = (edges[1:] + edges[:-1]) / 2
    return {
        "min": float(edges[0]),
        "max": float(edges[-1]),
        "num": int(counts.sum()),
        "sum": float(counts @ middles),
        "sum_squares": float(counts @ middles**2),
        "bucket_limits": edges[1:].tolist(),
        "bucket_counts": counts.tolist(),
    }


class TensorBoard:
    """The same rows as TensorBoard event files; in a bucket, after `sync` and at the end."""

    def __init__(self, path: epath.Path, resume_step: int = 0):
        # 1 s, which a run that does not train need not wait for.
        from tensorboardX import event_file_writer, proto, summary

        self._summary, self._event = summary, proto.event_pb2.Event
        self._growing = Growing(path)
        self._growing.local.mkdir(parents=True, exist_ok=True)
        # Not SummaryWriter: it hands events to a thread, and what a checkpoint is to follow could
        # still be in its queue when the run is killed.
        self._writer = event_file_writer.EventsWriter(str(self._growing.local / "events"))
        # What an interrupted run wrote after `resume_step` is marked as void.
        void, start = resume_step + 1, proto.event_pb2.SessionLog.START
        session = proto.event_pb2.SessionLog(status=start)
        self._writer.write_event(self._event(step=void, file_version="brain.Event:2"))
        self._writer.write_event(self._event(step=void, session_log=session))

    def write(self, row: dict) -> None:
        """Adds the scalars and histograms of one row."""
        for name, x in flat(row):
            if isinstance(x, dict):
                summary = self._summary.histogram_raw(name, **_tensorboard_histogram(x))
            else:
                summary = self._summary.scalar(name, x)
            event = self._event(summary=summary, step=row["step"], wall_time=time.time())
            self._writer.write_event(event)
        self._writer.flush()

    def sync(self) -> None:
        """Makes the rows so far outlast the machine."""
        self._growing.sync()

    def close(self) -> None:
        """Writes what is still in memory and closes the file."""
        self._writer.close()
        self._growing.sync()


class WandB:
    """The same rows at Weights & Biases; a continued run goes on in the same place."""

    def __init__(self, project: str, path: epath.Path, settings: dict, resume_step: int = 0):
        import wandb  # optional: what is checked before a run has looked for it

        # Kept beside the rows: a stage that begins anew is another run, also in a folder of the
        # same name, and W&B takes no row of a step that it has.
        kept = path / "wandb_id"
        if not (resume_step and kept.exists()):
            write_atomically(kept, secrets.token_hex(8))
        self._histogram = wandb.Histogram
        self._run = wandb.init(
            project=project,
            name=os.fspath(path),
            id=kept.read_text(),
            resume="allow",
            config=settings,
        )

    def write(self, row: dict) -> None:
        """Reports one row."""
        values = {
            name: self._histogram(np_histogram=(x["counts"], x["edges"]))
            if isinstance(x, dict)
            else x
            for name, x in flat(row)
        }
        self._run.log(values, step=row["step"])

    def sync(self) -> None:
        """Nothing: the rows are sent as they come."""

    def close(self) -> None:
        """Ends the report; called while an error passes through, it is that of a failed run."""
        passing = sys.exc_info()[0]
        self._run.finish(exit_code=int(passing not in (None, shutdown.Stopped)))


def metrics_writers(
    path: epath.Path,
    resume_step: int,
    metrics: MetricsSettings,
    settings: dict,
    rows: Rows = NO_ROWS,
) -> list:
    """Where each step's row goes, in the main process; `metrics.jsonl` is the first.

    Args:
      path: the artefact's.
      resume_step: after which step it goes on.
      metrics: the section of the settings.
      settings: those of the stage, to be shown beside it.
      rows: those of metrics.jsonl up to that step.
    """
    if not processes.is_main():
        return []
    writers = [MetricsFile(path / METRICS, rows)]
    if metrics.tensorboard:
        writers.append(TensorBoard(path / "tensorboard", resume_step))
    if metrics.wandb:
        writers.append(WandB(metrics.wandb, path, settings, resume_step))
    return writers
