"""One writer at a time in a folder: on this machine, on a network file system or in a bucket.

The holder writes who it is into a file of the folder, and a sign of life every few seconds. On a
disk it holds the kernel's lock of that file besides, which ends with the process, however it ends.
Where that lock does not reach, from another host or in a bucket, a holder that has shown no sign of
life for a while is dead. Nobody's clock is compared with another's.
"""

import contextlib
import dataclasses
import datetime
import fcntl
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator

from etils import epath

from lopd.errors import UserError
from lopd.machine import shutdown
from lopd.machine.storage import is_local, make_folder, reason, remove_leftovers

LOCK = ".lock"
"""The file's name."""
_SIGN_OF_LIFE = 10.0
"""Seconds between two signs of life."""
_DEAD_AFTER = 35.0
"""Seconds without one, after which a holder counts as dead."""
_POLL = 1.0


class _Busy(Exception):
    """Another process holds the lock, or has taken it."""


def _process_space() -> str:
    """In what a process id means the same process: one start of one machine, one container."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


@dataclasses.dataclass(frozen=True)
class _Holder:
    """The process that holds a lock, as the file says."""

    host: str
    pid: int
    since: str
    space: str
    token: str
    """Nobody else's."""

    @classmethod
    def this(cls) -> "_Holder":
        now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        return cls(socket.gethostname(), os.getpid(), now, _process_space(), secrets.token_hex(8))

    @classmethod
    def read(cls, text: str) -> "_Holder | None":
        """The holder that a file names; None if it is empty, or nothing that a holder writes."""
        try:
            entries = json.loads(text)
            del entries["beat"]
            return cls(**entries)
        except (ValueError, TypeError, KeyError):
            return None

    def text(self, beat: int) -> str:
        """The file's content with a sign of life."""
        return json.dumps({**dataclasses.asdict(self), "beat": beat}) + "\n"

    @property
    def kernel(self) -> str:
        """The kernel it runs on, which knows its locks."""
        return self.space.partition(" ")[0] or self.host

    def has_ended(self, space: str) -> bool:
        """Whether it is known, in such a space, that there is no such process any more."""
        if not space or self.space != space:
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass
        return False


class _LocalFile:
    """The file on a disk, open, and with the kernel's lock where the file system has it."""

    def __init__(self, path: epath.Path):
        self._path = os.fspath(path)
        while True:
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                self.kernel_lock = self._take_kernel_lock()
                # Who held it may have deleted it meanwhile: then this is not the file any more.
                if os.path.samestat(os.fstat(self._descriptor), os.stat(self._path)):
                    return
            except FileNotFoundError:
                pass
            except _Busy as error:
                text = self.read()
                self.close()
                raise _Busy(text) from error
            self.close()

    def _take_kernel_lock(self) -> bool:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise _Busy from error
        except OSError:
            return False
        return True

    def read(self) -> str:
        return os.pread(self._descriptor, 4096, 0).decode(errors="replace")

    def write(self, text: str) -> None:
        content = text.encode()
        os.pwrite(self._descriptor, content, 0)
        os.ftruncate(self._descriptor, len(content))

    def delete(self) -> None:
        os.unlink(self._path)

    def close(self) -> None:
        os.close(self._descriptor)


class _Object:
    """The object in a bucket, which is written only if it is still as it was read or written."""

    kernel_lock = False

    def __init__(self, path: epath.Path):
        from google.api_core import exceptions
        from google.cloud import storage

        self._errors = exceptions
        bucket, _, name = os.fspath(path).removeprefix("gs://").partition("/")
        self._blob, self._generation = storage.Client().bucket(bucket).blob(name), 0

    def read(self) -> str:
        try:
            self._blob.reload()
            self._generation = self._blob.generation
            return self._blob.download_as_bytes().decode(errors="replace")
        except self._errors.NotFound:
            self._generation = 0
            return ""

    def write(self, text: str) -> None:
        try:
            self._blob.upload_from_string(text, if_generation_match=self._generation)
        except self._errors.PreconditionFailed as error:
            raise _Busy from error
        self._generation = self._blob.generation

    def delete(self) -> None:
        self._blob.delete(if_generation_match=self._generation)

    def close(self) -> None:
        pass


def _lives(file: _LocalFile | _Object, other: _Holder, this: _Holder) -> bool:
    """Whether the process that a file names still holds the lock; may take a while to tell."""
    if (file.kernel_lock and other.kernel == this.kernel) or other.has_ended(this.space):
        return False
    print(
        f"lopd: process {other.pid} on {other.host} has left its lock; waiting {_DEAD_AFTER:.0f} "
        "s for a sign of life",
        file=sys.stderr,
        flush=True,
    )
    before, end = file.read(), time.monotonic() + _DEAD_AFTER
    while time.monotonic() < end:
        shutdown.check()
        time.sleep(_POLL)
        if file.read() != before:
            return True
    return False


def _take(path: epath.Path, holder: _Holder) -> _LocalFile | _Object:
    """The file, which from now on names `holder`.

    Raises:
      UserError: if another process holds the lock, naming it.
    """
    text, file = "", None
    try:
        file = _LocalFile(path) if is_local(path) else _Object(path)
        text = file.read()
        other = _Holder.read(text)
        if other and _lives(file, other, holder):
            raise _Busy(text)
        file.write(holder.text(0))
        return file
    except _Busy as error:
        other = _Holder.read(str(error) or text)
        who = f"process {other.pid} on {other.host}, since {other.since}" if other else "another"
        raise UserError(
            f"{path.parent} is in use by {who}: wait for its end, or use another folder"
        ) from error
    except BaseException:
        if file:
            file.close()
        raise


def _show_life(file: _LocalFile | _Object, holder: _Holder, ended: threading.Event) -> None:
    beat = 0
    while not ended.wait(_SIGN_OF_LIFE):
        beat += 1
        with contextlib.suppress(Exception):  # of a network, which may come back
            try:
                if file.kernel_lock and holder.token not in file.read():
                    raise _Busy
                file.write(holder.text(beat))
            except _Busy:
                # Going on would write between the other one's files; a kill is survived.
                print(
                    "lopd: error: another process has taken this one for dead and gone on in its "
                    "place",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(shutdown.EXIT_ERROR)


@contextlib.contextmanager
def held(folder: epath.Path, name: str = LOCK) -> Iterator[None]:
    """Holds the lock of a folder, which is made if need be, while the block runs.

    Raises:
      UserError: if another process holds it, naming host, process and since when; or if nothing
        can be written there.
    """
    made, holder = not folder.exists(), _Holder.this()
    try:
        make_folder(folder)
        file = _take(folder / name, holder)
    except (UserError, shutdown.Stopped):
        raise
    except Exception as error:  # the clients of buckets have their own kinds
        raise UserError(f"{folder} cannot be written: {reason(error)}") from error
    if name == LOCK:
        remove_leftovers(folder)
    ended = threading.Event()
    thread = threading.Thread(target=_show_life, args=(file, holder, ended), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        with contextlib.suppress(Exception):  # it is dead to others in a while
            file.delete()
        file.close()
        if made and is_local(folder):
            with contextlib.suppress(OSError):
                os.rmdir(folder)  # unless something is there by now
