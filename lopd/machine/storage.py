"""Files on the disks of this machine and in buckets, gs://BUCKET/FOLDER.

In a bucket an object appears whole at the end of its upload or not at all. It cannot grow or be
renamed, and there is nothing to flush. Libraries that know local files only (ArrayRecord,
safetensors, TensorBoard, jax.profiler) write them here, and they are uploaded.
"""

import contextlib
import functools
import hashlib
import logging
import os
import re
import socket
import tempfile
from collections.abc import Iterator

from etils import epath

from lopd.errors import UserError


def is_local(path: epath.PathLike) -> bool:
    """Whether a path is on a file system of this machine and not a URL."""
    return not re.match(r"[A-Za-z][\w+.-]*:/", os.fspath(path))


def absolute(path: epath.PathLike) -> epath.Path:
    """A local path from the root, as Orbax needs it; a URL as it is.

    Raises:
      UserError: as `check_url`.
    """
    check_url(path)
    return epath.Path(os.path.abspath(path) if is_local(path) else path)


def check_url(path: epath.PathLike) -> None:
    """Refuses a URL that cannot be used here; any local path passes.

    Raises:
      UserError: for another scheme than gs, without the packages for buckets, or if the bucket is
        not there or does not let itself be looked at.
    """
    if is_local(path):
        return
    url = os.fspath(path)
    match = re.match(r"gs://([^/]+)", url)
    if not match:
        raise UserError(
            f"{url}: this kind of URL cannot be opened; give a folder of a network file system or "
            "of a Google Cloud Storage bucket, as gs://BUCKET/FOLDER"
        )
    _open_bucket(match[0])


@functools.cache
def _open_bucket(bucket: str) -> None:
    """Sets the bucket's client up and sees that it answers, once in a process.

    Asks as Orbax will: gcsfs takes a refusal and an empty bucket for no bucket.
    """
    try:
        import fsspec
        import gcsfs
        from google.api_core import exceptions
        from google.cloud import storage
    except ImportError as error:
        raise UserError(
            f"{bucket}: buckets need packages; pip install gcsfs google-cloud-storage"
        ) from error
    # What it reports, it raises as well.
    logging.getLogger(gcsfs.__name__).setLevel(logging.CRITICAL)
    # Other processes, and TensorStore in this one, write what a kept listing would not show.
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    try:
        storage.Client().get_bucket(bucket.removeprefix("gs://"))
    except exceptions.NotFound as error:
        raise UserError(f"{bucket}: there is no such bucket; make it, or check the name") from error
    except exceptions.Forbidden as error:
        raise UserError(
            f"{bucket}: the account lacks storage.buckets.get, which Orbax needs to list and "
            "delete checkpoints; the role roles/storage.legacyBucketReader has it"
        ) from error
    except Exception as error:  # of a dozen kinds
        raise UserError(
            f"{bucket} cannot be read ({reason(error)}): check its name, the network and the "
            "account's rights (gcloud auth application-default login says who you are)"
        ) from error


def reason(error: Exception) -> str:
    """What an error of a file system says, in one line."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(text.split())[:200]


def sync(path: epath.Path) -> None:
    """Flushes a local file or directory to disk; object stores need no such thing."""
    if not is_local(path):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(path: epath.Path) -> None:
    """`sync` of a folder with all that is in it, or of a file."""
    if not is_local(path):
        return
    if path.is_dir():
        for child in path.iterdir():
            sync_tree(child)
    sync(path)


def file_sha256(path: epath.Path) -> str:
    """SHA-256 of a file's bytes, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def make_folder(path: epath.Path) -> None:
    """Makes a folder that outlasts the machine, with those above it."""
    missing = [folder for folder in (path, *path.parents) if is_local(path) and not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        sync(folder.parent)


def remove_leftovers(folder: epath.Path) -> None:
    """Deletes what killed processes have left of files that they did not finish.

    For whoever is alone in writing there.
    """
    if not is_local(folder):
        return
    for path in folder.iterdir():
        if path.suffix == ".tmp" and not path.is_dir():
            path.unlink(missing_ok=True)


def write_atomically(path: epath.Path, text: str) -> None:
    """Writes a small text file so that a reader sees the old content or the new, never a part.

    Processes that write the same file at once (workers that start together) do no harm.
    """
    if not is_local(path):
        path.write_text(text)
        return
    temporary = path.parent / f".{path.name}.{socket.gethostname()}-{os.getpid()}.tmp"
    with _in_place_of(path, temporary):
        temporary.write_text(text)


@contextlib.contextmanager
def _in_place_of(path: epath.Path, temporary: epath.Path) -> Iterator[None]:
    """Flushes what the block writes at `temporary` and renames it to `path`; on failure neither."""
    try:
        yield
        sync(temporary)
        temporary.replace(path)
    except Exception:
        temporary.unlink(missing_ok=True)  # of a full disk
        raise
    sync(path.parent)


@contextlib.contextmanager
def whole_file(path: epath.Path) -> Iterator[epath.Path]:
    """A local file to write, which is at `path` when the block ends, or nothing is.

    Beside it on a disk, flushed and renamed; elsewhere for a URL, and uploaded.
    """
    if is_local(path):
        temporary = path.parent / f"{path.name}.tmp"
        with _in_place_of(path, temporary):
            yield temporary
        return
    with tempfile.TemporaryDirectory(prefix="lopd-") as folder:
        temporary = epath.Path(folder) / path.name
        yield temporary
        temporary.copy(path, overwrite=True)


class Growing:
    """A file, or a folder of files, that grows.

    It is written at `local`: `path` itself, or for a URL a temporary stand-in. `sync` makes what
    has been written outlast the machine, by flushing or by uploading all of it, so it is for small
    files and for points that are some time apart.
    """

    def __init__(self, path: epath.Path):
        self.path = self.local = path
        if not is_local(path):
            self._folder = tempfile.TemporaryDirectory(prefix="lopd-")
            self.local = epath.Path(self._folder.name) / path.name

    def sync(self) -> None:
        """Makes what has been written so far last."""
        if self.local == self.path:
            sync_tree(self.path)
        else:
            _upload(self.local, self.path)


def _upload(source: epath.Path, target: epath.Path) -> None:
    if source.is_dir():
        for child in source.iterdir():
            _upload(child, target / child.name)
    else:
        source.copy(target, overwrite=True)
