"""The processes that share a run: start-up, barriers, and stops that all agree on."""

import functools
import glob
import os
import sys
import threading
import time
import urllib.request
from typing import NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from lopd.errors import UserError
from lopd.machine import devices, shutdown
from lopd.machine.sharding import spec


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
    # It would take SIGTERM for itself; `lopd.machine.shutdown` and `any_process` do its work.
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
    everywhere = devices.make_mesh({"data": -1, "fsdp": 1, "tensor": 1})
    flags = jax.make_array_from_process_local_data(
        NamedSharding(everywhere, spec("rows")), np.full(jax.local_device_count(), flag)
    )
    return _any(flags, devices.replicated(everywhere))


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
