"""The safetensors format, one tensor at a time.

The `safetensors` package maps or returns whole files. Here a tensor is read or written by its
place in the file, so that host memory holds one tensor, and any path that `epath` opens will do.
A file is: the header's length (8 bytes, little-endian), the header (JSON), the data.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping

import ml_dtypes
import numpy as np
from etils import epath

from lopd.artefact import sync
from lopd.errors import UserError

DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
"""The number types that weights come in, by their name in the header."""


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies, and what it is."""

    path: epath.Path
    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int
    """Bytes from the start of the file."""

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """Its values; one copy on the host."""
        with self.path.open("rb") as file:
            file.seek(self.offset)
            buffer = np.empty(self.nbytes + 64, np.uint8)
            # JAX takes over an array on a CPU device without a copy if it lies on 64 bytes.
            start = -buffer.ctypes.data % 64
            buffer = buffer[start : start + self.nbytes]
            file.readinto(buffer.data)
            return buffer.view(self.dtype).reshape(self.shape)


def read_header(path: epath.Path) -> dict[str, StoredTensor]:
    """The tensors of a file, by name; reads no values.

    Raises:
      UserError: if the file is cut short or is not safetensors, or holds a type that is not in
        DTYPES.
    """
    size = path.stat().length
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 + length:
            raise UserError(
                f"{path} has {size} bytes, too few for its header: it is cut short or not "
                "safetensors; download it again"
            )
        text = file.read(length)
    try:
        header = json.loads(text)
    except ValueError as error:
        raise UserError(f"{path} is not a safetensors file: its header is not JSON") from error
    header.pop("__metadata__", None)
    end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if size != end:
        raise UserError(
            f"{path} has {size} bytes, its header says {end}: it is cut short or damaged; "
            "download it again"
        )
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise UserError(
                f"{path}: {name} is stored as {entry['dtype']}; only {', '.join(DTYPES)} can be "
                "read (no quantised weights)"
            )
        tensors[name] = StoredTensor(
            path,
            tuple(entry["shape"]),
            DTYPES[entry["dtype"]],
            8 + length + entry["data_offsets"][0],
        )
    return tensors


def write(
    path: epath.Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: np.dtype,
    load: Callable[[str], np.ndarray],
) -> None:
    """Writes a file, asking `load` for each tensor when its turn comes.

    Args:
      path: the file.
      shapes: the shape of every tensor, in the order of the file.
      dtype: the type of all of them, one of DTYPES.
      load: from name to values.
    """
    type_name = next(name for name, known in DTYPES.items() if known == dtype)
    # The metadata is how Transformers knows PyTorch's [out, in] layout.
    header, position = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        end = position + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": type_name, "shape": shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in shapes:
            file.write(np.ascontiguousarray(load(name)).view(np.uint8).data)
    sync(path)
