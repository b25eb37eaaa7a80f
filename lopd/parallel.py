"""The device mesh, what lies where on it, and the processes that share it."""

import functools
import glob
import os
import sys
import threading
import time
import urllib.request
from collections.abc import Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lopd import shutdown
from lopd.errors import UserError
from lopd.models import qwen3
from lopd.models.sharding import AXES, RULES, spec


def make_mesh(sizes: dict[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of the devices (all by default): axes data, fsdp, tensor; one size may be -1.

    Raises:
      UserError: if the sizes do not multiply to the number of devices.
    """
    shape = [sizes[axis] for axis in AXES]
    devices = jax.devices() if devices is None else devices
    count = len(devices)
    wildcards = shape.count(-1)
    known = int(np.prod([s for s in shape if s != -1]))
    if wildcards == 1 and known > 0 and count % known == 0:
        shape[shape.index(-1)] = count // known
    if min(shape) < 1 or int(np.prod(shape)) != count:
        wanted = ", ".join(f"{axis}={sizes[axis]}" for axis in AXES)
        raise UserError(
            f"mesh {wanted} does not fit {count} devices: the sizes must multiply to "
            f"{count} (one may be -1)"
        )
    types = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(tuple(shape), AXES, axis_types=types, devices=devices)


def check_divisible(config: qwen3.Qwen3Config, mesh: Mesh, what: str) -> None:
    """Refuses a model whose parameters do not split evenly over the mesh.

    Raises:
      UserError: naming the parameter, its axis and the mesh axis.
    """
    axes = jax.tree_util.tree_leaves_with_path(qwen3.logical_axes(config))
    shapes = jax.tree.leaves(qwen3.abstract_params(config))
    for (path, names), leaf in zip(axes, shapes, strict=True):
        for name, size in zip(names, leaf.shape, strict=True):
            mesh_axis = RULES[name]
            if mesh_axis and size % mesh.shape[mesh_axis]:
                raise UserError(
                    f"{what}: {jax.tree_util.keystr(path)} has {name}={size}, which "
                    f"mesh.{mesh_axis}={mesh.shape[mesh_axis]} does not divide"
                )


def param_shardings(config: qwen3.Qwen3Config, mesh: Mesh) -> qwen3.Params:
    """The sharding of every parameter, as a tree like the parameters."""
    return jax.tree.map(
        lambda names: NamedSharding(mesh, spec(*names)),
        qwen3.logical_axes(config),
        is_leaf=lambda x: isinstance(x, PartitionSpec),
    )


def with_shardings(shapes: Any, shardings: Any) -> Any:
    """A tree of shapes and types with the shardings of another like it, to restore arrays into."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        shardings,
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def rows_sharding(mesh: Mesh, leading: int = 0) -> NamedSharding:
    """Arrays whose axis `leading` is rows: split over data and fsdp."""
    return NamedSharding(mesh, spec(*(None,) * leading, "rows"))


def device_memory(mesh: Mesh) -> int:
    """Bytes that one device may use: its own memory, or a CPU device's share of the host's."""
    devices = [d for d in mesh.devices.flat if d.process_index == jax.process_index()]
    stats = devices[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // len(devices)


def _count_from(name: str) -> int:
    try:
        return int(os.environ[name])
    except (KeyError, ValueError) as error:
        raise UserError(
            f"JAX_COORDINATOR_ADDRESS is set, so {name} must be a number, not "
            f"{os.environ.get(name, 'unset')!r}"
        ) from error


def _several_tpu_workers() -> bool:
    """Whether this machine is one worker of several of a TPU slice.

    GKE says so in the environment, a TPU VM in its metadata; a TPU elsewhere (Colab, Kaggle) has
    one worker.
    """
    environment = os.environ
    if "tpu" not in environment.get("JAX_PLATFORMS", "tpu"):
        return False
    workers = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES")
    if workers is None and "TPU_SKIP_MDS_QUERY" not in environment:
        if not glob.glob("/dev/accel[0-9]*") and not glob.glob("/dev/vfio/[0-9]*"):
            return False
        request = urllib.request.Request(
            "http://metadata.google.internal/computeMetadata/v1/instance/attributes/"
            "worker-network-endpoints",
            headers={"Metadata-Flavor": "Google"},
        )
        try:
            with urllib.request.urlopen(request, timeout=10) as response:
                workers = response.read().decode()
        except OSError:
            workers = ""
    return "," in (workers or "") or int(environment.get("MEGASCALE_NUM_SLICES", "1")) > 1


def _cluster() -> dict | None:
    """Arguments for jax.distributed.initialize; None where there is one process.

    Open MPI and the like are not looked for: there, set the three variables.
    """
    if address := os.environ.get("JAX_COORDINATOR_ADDRESS"):
        count, index = _count_from("JAX_NUM_PROCESSES"), _count_from("JAX_PROCESS_ID")
        if not address.rpartition(":")[2].isdigit():
            raise UserError(f"JAX_COORDINATOR_ADDRESS={address} must be HOST:PORT")
        if not 0 <= index < count:
            raise UserError(f"JAX_PROCESS_ID={index} must lie in [0, JAX_NUM_PROCESSES={count})")
        return {
            "coordinator_address": address,
            "num_processes": count,
            "process_id": index,
            "cluster_detection_method": "deactivate",
        }
    # SLURM_STEP_NODELIST is there inside srun only, and not in a shell of salloc or sbatch.
    if "SLURM_STEP_NODELIST" in os.environ and int(os.environ.get("SLURM_NTASKS", "1")) > 1:
        return {"cluster_detection_method": "slurm"}
    return {} if _several_tpu_workers() else None


def initialize(timeout: int = 300) -> None:
    """Joins the other processes of the run, if there are any; to be called before any device use.

    Looks for, in this order: `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`;
    several Slurm tasks (under srun; each takes the GPU of its local number); several TPU workers.
    The last two are jax's own detection. Nothing is started where none is found.

    Args:
      timeout: seconds to wait for the others. jax would abort with a stack trace; this ends the
        process with one line and exit code 2.

    Raises:
      UserError: for variables that make no sense.
    """
    cluster = _cluster()
    if cluster is None:
        return
    where = cluster.get("coordinator_address", "the first worker")

    def give_up() -> None:
        print(
            f"lopd: error: not all processes met at {where} within {timeout} s: is each started, "
            "with the same address and number of processes, and may they reach that port?",
            file=sys.stderr,
            flush=True,
        )
        os._exit(shutdown.EXIT_ERROR)

    watchdog = threading.Timer(timeout, give_up)
    watchdog.daemon = True
    watchdog.start()
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # It would take SIGTERM for itself; `lopd.shutdown` and `any_process` do its work.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(**cluster, initialization_timeout=timeout + 60)
    finally:
        watchdog.cancel()


def is_main() -> bool:
    """Whether this is the process that writes manifests and tells people what happens."""
    # Asked first, because process_index starts the devices, and a mere helper process has none.
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def barrier(name: str) -> None:
    """Returns once every process has come here: after it, what one wrote others may read."""
    if jax.distributed.is_initialized():
        multihost_utils.sync_global_devices(name)


def leave(code: int) -> NoReturn:
    """Ends this process because of an error, which the others may not have met.

    With several processes an ordinary exit waits five minutes for the others, which wait for this
    one. Gone at once, it is missed within two minutes at most. The first process stays for some
    seconds, because the others are aborted with it and may have the same error to report.
    """
    if jax.distributed.is_initialized():
        if is_main():
            time.sleep(5)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def any_process(flag: bool) -> bool | jax.Array:
    """Whether `flag` is true in any process, the same answer in all; every process must call it.

    For decisions that all must take at once, as to stop: a signal reaches the processes at
    different steps, or only one of them. Free with one process. With several the answer is an
    array that arrives behind the work already dispatched, at the cost of one tiny all-reduce:
    a loop that keeps a step in flight should read it (`bool`) together with that step's metrics.
    """
    if jax.process_count() == 1:
        return flag
    devices = make_mesh({"data": -1, "fsdp": 1, "tensor": 1})
    flags = jax.make_array_from_process_local_data(
        NamedSharding(devices, spec("rows")), np.full(jax.local_device_count(), flag)
    )
    return _any(flags, replicated(devices))


class StopVote:
    """Whether any process was asked to stop, for a loop that keeps work in flight and asks at each
    turn; with several processes, all learn of it at the same turn."""

    def __init__(self):
        self._before: bool | jax.Array = False

    def agreed(self) -> bool:
        """Asks; with several processes it answers what was asked a turn ago, without waiting."""
        stop = any_process(shutdown.requested())
        if jax.process_count() > 1:
            stop, self._before = self._before, stop
        if stop:
            shutdown.request()
        return bool(stop)

    def check(self) -> None:
        """`agreed`, for where a stop is an exception.

        Raises:
          Stopped: if it was agreed on.
        """
        if self.agreed():
            raise shutdown.Stopped


def check_stop() -> None:
    """For loops with nothing to bring to safety; every process must call it.

    Raises:
      Stopped: if any process was asked to stop.
    """
    if any_process(shutdown.requested()):
        shutdown.request()
        raise shutdown.Stopped


@functools.partial(jax.jit, static_argnums=1)
def _any(flags: jax.Array, sharding: NamedSharding) -> jax.Array:
    return jax.lax.with_sharding_constraint(jnp.any(flags), sharding)
