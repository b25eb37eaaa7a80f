"""Checkpoints and finished weights, both by Orbax."""

import contextlib
import enum
import errno
import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from lopd.artefacts.artefact import WAY_OUT, differences
from lopd.artefacts.fingerprint import params_fingerprint
from lopd.errors import UserError
from lopd.machine import processes
from lopd.machine.storage import is_local, sync, sync_tree
from lopd.models.memory import tree_bytes

_DAMAGE = (ValueError, KeyError, AttributeError, AssertionError, FileNotFoundError)
"""What is raised when a file of a checkpoint was deleted, cut or changed.

Found by doing so to each of them; JSON's and Unicode's errors are ValueErrors.
"""
_DAMAGE_STATUS = ("DATA_LOSS", "FAILED_PRECONDITION", "OUT_OF_RANGE")
"""With which the text of TensorStore's ValueErrors begins then, or with NOT_FOUND. With others, or
with an error of the operating system behind it, a file could not be read for another reason."""


_NO_DAMAGE = ("Bad Request", "Bucket is requester pays")
"""With which the text of gcsfs' own ValueErrors begins."""
_UNFINISHED = ".orbax-checkpoint-tmp"
"""In the name of a folder that Orbax has not finished."""
_PAUSES = (2, 10, 30)
"""Seconds before a checkpoint that could not be read is tried again: nobody may be there to start
the run again."""


def open_manager(
    directory: epath.Path, keep: int = 2, keep_every: int = 0
) -> ocp.CheckpointManager:
    """Asynchronous, atomic checkpoints of the training state, which outlast the machine.

    Args:
      directory: where they are, one folder per step.
      keep: how many of the newest stay.
      keep_every: those whose step this divides stay too; 0 for none.
    """
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep,
        keep_period=keep_every or None,
        enable_async_checkpointing=True,
        cleanup_tmp_directories=True,
        # Called when all files of a checkpoint are written, before it is renamed and an older one
        # is deleted; Orbax flushes nothing.
        async_options=ocp.AsyncOptions(
            post_finalization_callback=lambda: _flush_unfinished(directory)
        ),
    )
    return ocp.CheckpointManager(directory, options=options)


def _flush_unfinished(directory: epath.Path) -> None:
    for path in directory.iterdir() if is_local(directory) else ():
        if _UNFINISHED in path.name:
            sync_tree(path)
    sync(directory)


def save_params(path: epath.Path, params: Any) -> None:
    """Writes finished weights; the directory appears only when it is whole."""
    if processes.is_main():
        for leftover in path.parent.glob(f"{path.name}{_UNFINISHED}*"):
            leftover.rmtree()  # of a run that was killed
    with full_disk_is_an_os_error(), ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, params, force=True)


def load_params(path: epath.Path, target: Any) -> Any:
    """Reads finished weights straight into the shapes, types and shardings of `target`.

    Args:
      path: what `save_params` wrote.
      target: a tree of `jax.ShapeDtypeStruct` (`lopd.models.shardings.abstract_params_on`).

    Raises:
      UserError: if they are damaged.
    """
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(path, target)
    except Exception as error:
        if not _is_damage(error):
            raise
        raise UserError(f"{path} is damaged ({_in_a_line(error)}): {WAY_OUT}") from error


@contextlib.contextmanager
def full_disk_is_an_os_error() -> Iterator[None]:
    """Turns what Orbax raises on a full disk, now or of an earlier save, into OSError(ENOSPC)."""
    try:
        yield
    except Exception as error:
        cause = error
        while cause is not None:
            if "No space left" in str(cause) or getattr(cause, "errno", None) == errno.ENOSPC:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "checkpoint") from error
            cause = cause.__cause__ or cause.__context__
        raise


def check_room(
    directory: epath.Path,
    state: Any,
    weights: Any,
    *,
    steps: int,
    checkpoint_every: int,
    keep_checkpoints: int,
    keep_every: int,
) -> None:
    """Refuses to start on a local disk that cannot hold what a training of so many steps writes.

    While a checkpoint is written, the `keep_checkpoints` before it still lie there, and so do all
    that `keep_every` keeps for good; the weights are written last, beside those that are left. What
    is there already counts.

    Args:
      directory: where the checkpoints are to lie.
      state: what a checkpoint holds, a tree of arrays or of their shapes and types.
      weights: what is written at the end, another one.
      steps: of the whole training.
      checkpoint_every: steps between two checkpoints.
      keep_checkpoints: how many of the newest stay.
      keep_every: those whose step this divides stay too; 0 for none.

    Raises:
      UserError: saying how much is needed and how much there is.
    """
    if not is_local(directory):
        return
    size, last = tree_bytes(state), tree_bytes(weights)
    saves = range(checkpoint_every, steps, checkpoint_every)
    stay = {step for step in saves if keep_every and step % keep_every == 0}
    most = len(stay.union(saves[-keep_checkpoints - 1 :]))
    left = len(stay.union(saves[-keep_checkpoints:]))
    there = len(ocp.utils.checkpoint_steps(directory)) if directory.exists() else 0
    # A stop saves too, whatever is there.
    needed = max(size, (most - there) * size, (left - there) * size + last)
    free = shutil.disk_usage(directory.parent).free
    if free < needed:
        raise UserError(
            f"{directory} needs room for {most} checkpoints of {_gib(size)} ({there} are there) "
            f"and for the weights, {_gib(last)}, but {_gib(free)} is free: free "
            f"{_gib(needed - free)}, or keep fewer with runtime.keep_checkpoints and "
            "runtime.keep_every"
        )


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


def save_state(
    manager: ocp.CheckpointManager,
    step: int,
    state: Any,
    identity: dict[str, Any],
    rows: dict[str, Any],
) -> None:
    """Starts saving; returns once the arrays are off the devices, so they may be donated.

    Args:
      identity: the settings and inputs that the state was made with, for JSON.
      rows: what of the metrics is there by then, for JSON; that of the main process counts.

    Raises:
      OSError: no room left on the disk, also when it was an earlier save that failed.
    """
    content = params_fingerprint(state)
    metadata = {"step": step, "content": content, "identity": identity, "rows": rows}
    metadata["checksum"] = _checksum(metadata)
    args = ocp.args.Composite(
        state=ocp.args.StandardSave(state), metadata=ocp.args.JsonSave(metadata)
    )
    with full_disk_is_an_os_error():
        manager.check_for_errors()
        manager.save(step, args=args, force=True)


Check = Callable[[dict[str, Any]], str]
"""Given the rows of a checkpoint, says what is wrong with those that are there now, if anything."""


def _restore(
    manager: ocp.CheckpointManager, step: int, abstract: Any, check: Check
) -> tuple[Any, dict]:
    """One checkpoint, compared with the fingerprint that was taken before it was written."""
    restored = manager.restore(
        step,
        args=ocp.args.Composite(
            state=ocp.args.StandardRestore(abstract), metadata=ocp.args.JsonRestore()
        ),
    )
    metadata = restored.metadata
    if metadata.pop("checksum") != _checksum(metadata):
        raise ValueError("the checksum of its metadata differs")
    found, expected = params_fingerprint(restored.state), metadata["content"]
    if found != expected:
        raise ValueError(f"its content has fingerprint {found}, but {expected} was saved")
    if wrong := check(metadata["rows"]) if processes.is_main() else "":
        raise ValueError(wrong)
    return restored.state, metadata


def _checksum(metadata: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(metadata, sort_keys=True).encode()).hexdigest()


def _is_damage(error: Exception) -> bool:
    """Whether an error in reading a checkpoint is the fault of what its files hold."""
    if type(error) is Exception and error.__cause__ is not None:  # around one of TensorStore's
        error = error.__cause__
    if not isinstance(error, _DAMAGE) or str(error).startswith(_NO_DAMAGE):
        return False
    status = re.match(r"([A-Z_]+): ", str(error))
    if not status or status[1] == "NOT_FOUND":
        return True
    return status[1] in _DAMAGE_STATUS and "os_error_code" not in str(error)


class _Outcome(enum.IntEnum):
    """Of reading a checkpoint, from good to bad."""

    READ = 0
    DAMAGED = 1
    FAILED = 2


def _worst(outcome: _Outcome) -> _Outcome:
    """What all processes go by: the worst that befell one of them."""
    if jax.process_count() > 1:
        outcome = _Outcome(np.max(multihost_utils.process_allgather(np.array(outcome))))
    return outcome


def _in_a_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _read(
    manager: ocp.CheckpointManager, step: int, abstract: Any, check: Check
) -> tuple[Any, dict] | None:
    """State and metadata of a checkpoint; None if it is damaged, to any process, which is reported.

    Raises:
      UserError: if it could not be read for another reason, which did not pass in _PAUSES.
    """
    for pause in (*_PAUSES, None):
        outcome, found = _Outcome.READ, None
        reason, cause = "another process could not read it", None
        try:
            found = _restore(manager, step, abstract, check)
        except Exception as error:
            outcome = _Outcome.DAMAGED if _is_damage(error) else _Outcome.FAILED
            reason, cause = _in_a_line(error), error
        outcome = _worst(outcome)
        if outcome != _Outcome.FAILED:
            break
        said = f"checkpoint {manager.directory}/{step} could not be read ({reason})"
        if pause is None:
            raise UserError(
                f"{said}: it may be sound, so nothing was deleted; run the same command again "
                "once the cause is gone"
            ) from cause
        print(f"\nlopd: {said}; trying again in {pause} s", file=sys.stderr)
        time.sleep(pause)
    if outcome == _Outcome.READ:
        return found
    print(
        f"\nlopd: checkpoint {manager.directory}/{step} is damaged ({reason}); "
        "trying the one before it",
        file=sys.stderr,
    )
    return None


def restore_newest(
    manager: ocp.CheckpointManager, abstract: Any, identity: dict[str, Any], check: Check
) -> tuple[Any, dict[str, Any]] | None:
    """State and rows of the newest checkpoint that can be gone on from; None if there is none.

    The state is in the shardings of `abstract`. Damaged checkpoints, and those whose rows `check`
    does not find, are reported on stderr, and deleted once an older one has been read.

    Raises:
      UserError: if there are checkpoints but none can be read; if one cannot be read now for a
        reason that may pass, such as permissions, memory or the network, as it may be sound; or if
        the checkpoint was made with another `identity`.
    """
    damaged = []
    for step in sorted(manager.all_steps(), reverse=True):
        if (read := _read(manager, step, abstract, check)) is not None:
            state, metadata = read
            break
        damaged.append(step)
    else:
        if damaged:
            raise UserError(
                f"no checkpoint under {manager.directory} can be gone on from (see above): restore "
                "what is damaged, or delete it to start this stage from its beginning"
            )
        return None
    found = differences(metadata["identity"], identity)
    if found:
        raise UserError(
            f"{manager.directory}/{step} was made with other settings ({'; '.join(found)}): "
            f"restore them, or delete {manager.directory}"
        )
    for step_damaged in damaged:
        manager.delete(step_damaged)
    return state, metadata["rows"]
