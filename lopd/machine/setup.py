"""Process-wide set-up that makes programs start and run faster."""

import ctypes
import os
import sys

import jax

from lopd.machine.storage import is_local

# glibc's mallopt parameters (malloc.h).
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def _keep_freed_memory() -> None:
    """Stops glibc from giving every freed buffer back to the kernel.

    XLA's CPU programs allocate and free their temporaries on each call; without this a third of
    the time of a small model goes into page faults.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return  # not glibc
    libc.mallopt(_M_MMAP_MAX, 0)
    libc.mallopt(_M_TOP_PAD, 64 << 20)
    libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def prepare(workdir: str) -> None:
    """Tunes the allocator and keeps compiled programs under `workdir` for the next start.

    `JAX_COMPILATION_CACHE_DIR`, if set, names another place for them.
    """
    if sys.platform == "linux":
        _keep_freed_memory()
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", os.path.join(workdir, "compiled"))
        if not is_local(workdir):  # JAX keeps its programs in buckets, XLA's C++ nothing
            jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
