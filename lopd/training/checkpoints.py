"""Checkpoints and finished weights, both by Orbax."""

import contextlib
import errno
import os
import shutil
import sys
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from lopd import parallel
from lopd.artefact import differences
from lopd.errors import UserError
from lopd.fingerprint import params_fingerprint
from lopd.models import qwen3
from lopd.storage import is_local


def open_manager(
    directory: epath.Path, keep: int = 2, keep_every: int = 0
) -> ocp.CheckpointManager:
    """Asynchronous, atomic checkpoints of the training state.

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
    )
    return ocp.CheckpointManager(directory, options=options)


def save_params(path: epath.Path, params: qwen3.Params) -> None:
    """Writes finished weights; the directory appears only when it is whole."""
    with full_disk_is_an_os_error(), ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, params, force=True)


def load_params(path: epath.Path, config: qwen3.Qwen3Config, mesh: Mesh) -> qwen3.Params:
    """Reads finished weights straight into their sharding on the mesh."""
    target = parallel.with_shardings(
        qwen3.abstract_params(config), parallel.param_shardings(config, mesh)
    )
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path, target)


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


def check_room(directory: epath.Path, abstract: Any, keep: int) -> None:
    """Refuses to start on a local disk that cannot hold the checkpoints.

    While one is written the `keep` before it still lie there; those there already count.

    Raises:
      UserError: saying how much is needed and how much there is.
    """
    if not is_local(directory):
        return
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(abstract))
    there = len(ocp.utils.checkpoint_steps(directory)) if directory.exists() else 0
    needed = size * max(1, keep + 1 - there)
    free = shutil.disk_usage(directory.parent).free
    if free < needed:
        raise UserError(
            f"{directory} needs room for {keep + 1} checkpoints of {_gib(size)} ({there} are "
            f"there), but {_gib(free)} is free: free {_gib(needed - free)} or keep fewer with "
            "runtime.keep_checkpoints"
        )


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


def save_state(
    manager: ocp.CheckpointManager, step: int, state: Any, identity: dict[str, Any]
) -> None:
    """Starts saving; returns once the arrays are off the devices, so they may be donated.

    Args:
      identity: the settings and inputs that the state was made with, for JSON.

    Raises:
      OSError: no room left on the disk, also when it was an earlier save that failed.
    """
    metadata = {"step": step, "content": params_fingerprint(state), "identity": identity}
    args = ocp.args.Composite(
        state=ocp.args.StandardSave(state), metadata=ocp.args.JsonSave(metadata)
    )
    with full_disk_is_an_os_error():
        manager.check_for_errors()
        manager.save(step, args=args, force=True)


def _restore(manager: ocp.CheckpointManager, step: int, abstract: Any) -> tuple[Any, dict]:
    """One checkpoint, compared with the fingerprint that was taken before it was written."""
    restored = manager.restore(
        step,
        args=ocp.args.Composite(
            state=ocp.args.StandardRestore(abstract), metadata=ocp.args.JsonRestore()
        ),
    )
    found, expected = params_fingerprint(restored.state), restored.metadata["content"]
    if found != expected:
        raise ValueError(f"its content has fingerprint {found}, but {expected} was saved")
    return restored.state, restored.metadata


def _agreed(success: bool) -> bool:
    """Whether every process succeeded."""
    if jax.process_count() == 1:
        return success
    return bool(np.all(multihost_utils.process_allgather(np.array(success))))


def restore_newest(
    manager: ocp.CheckpointManager, abstract: Any, identity: dict[str, Any]
) -> tuple[int, Any]:
    """(step, state) of the newest checkpoint that can be read, in the shardings of `abstract`.

    Damaged ones are reported on stderr, and deleted once an older one has been read. Without
    any checkpoint the answer is (0, None).

    Raises:
      UserError: if there are checkpoints but none can be read, or if the checkpoint was made with
        another `identity`.
    """
    damaged = []
    for step in sorted(manager.all_steps(), reverse=True):
        state, metadata, reason = None, None, "another process could not read it"
        try:
            state, metadata = _restore(manager, step, abstract)
        except Exception as error:  # whatever a damaged file makes Orbax or TensorStore raise
            reason = " ".join(str(error).split())[:200] or type(error).__name__
        if _agreed(state is not None):
            break
        damaged.append(step)
        print(
            f"\nlopd: checkpoint {manager.directory}/{step} is damaged ({reason}); "
            "trying the one before it",
            file=sys.stderr,
        )
    else:
        if damaged:
            raise UserError(
                f"no checkpoint under {manager.directory} can be read (see above): delete it to "
                "start this stage from its beginning"
            )
        return 0, None
    found = differences(metadata["identity"], identity)
    if found:
        raise UserError(
            f"{manager.directory}/{step} was made with other settings ({'; '.join(found)}): "
            f"restore them, or delete {manager.directory}"
        )
    for step_damaged in damaged:
        manager.delete(step_damaged)
    return step, state
