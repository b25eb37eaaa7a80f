"""Tensors in safetensors files, one at a time in and one file at a time out."""

import dataclasses
import math
import os
import re
from collections.abc import Mapping

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
from etils import epath

from lopd.errors import UserError
from lopd.machine.reading import check_regular
from lopd.machine.storage import reason, whole_file

DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
"""The number types that weights come in, by their name in a file."""

_READ_BYTES = 1 << 22


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies, and what it is."""

    path: epath.Path
    name: str
    """In the file."""
    shape: tuple[int, ...]
    """As the file has it, before any transposition."""
    dtype: np.dtype

    def read(self) -> np.ndarray:
        """Its values; one copy on the host."""
        # JAX takes over an array on a CPU device without a copy if it lies on 64 bytes.
        nbytes = math.prod(self.shape) * self.dtype.itemsize
        buffer = np.empty(nbytes + 64, np.uint8)
        start = -buffer.ctypes.data % 64
        values = buffer[start : start + nbytes].view(self.dtype).reshape(self.shape)
        step = max(1, _READ_BYTES * self.shape[0] // nbytes)
        for first in range(0, self.shape[0], step):
            rows = slice(first, min(first + step, self.shape[0]))
            # Opened anew each time: pages of a mapped file count as ours until it is closed.
            with safetensors.safe_open(self.path, "numpy") as file:
                values[rows] = file.get_slice(self.name)[rows]
        return values


def read_header(path: epath.Path) -> dict[str, StoredTensor]:
    """The tensors of a local file, by name; reads no values.

    Raises:
      UserError: if the file is cut short or is not safetensors, or holds a type that is not in
        DTYPES.
    """
    check_regular(path)
    try:
        with safetensors.safe_open(path, "numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            types = {name: part.get_dtype() for name, part in slices.items()}
            shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
    except OSError as error:
        raise UserError(f"{path} cannot be read: {reason(error)}") from error
    except safetensors.SafetensorError as error:
        raise UserError(
            f"{path} is cut short, damaged or not a safetensors file ({error}); download it again"
        ) from error
    for name, found in types.items():
        if found not in DTYPES:
            why = "convert it to F32" if found == "F64" else "quantised weights cannot"
            raise UserError(
                f"{path}: {name} is stored as {found}; only {', '.join(DTYPES)} can be read ({why})"
            )
    return {name: StoredTensor(path, name, shapes[name], DTYPES[types[name]]) for name in shapes}


def write(path: epath.Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a file.

    Raises:
      OSError: if the disk is full or fails; then there is no file.
    """
    # The metadata is how Transformers knows PyTorch's [out, in] layout.
    contiguous = {name: np.ascontiguousarray(x) for name, x in tensors.items()}
    with whole_file(path) as file:
        try:
            safetensors.numpy.save_file(contiguous, os.fspath(file), metadata={"format": "pt"})
        except safetensors.SafetensorError as error:  # the library's own, also for a full disk
            if not (number := re.search(r"os error (\d+)", str(error))):
                raise
            code = int(number[1])
            raise OSError(code, os.strerror(code), os.fspath(path)) from error
        os.chmod(file, 0o644)  # the library lets nobody else read it
