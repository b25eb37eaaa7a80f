"""Writing shards so that a crash at any instant leaves only whole ones."""

import errno
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import tensorflow_datasets as tfds
from array_record.python import array_record_module
from etils import epath

from lopd.artefacts import accounting
from lopd.artefacts.artefact import Artefact, damage, file_entry
from lopd.artefacts.manifest import Costs, ShardEntry
from lopd.cache import totals
from lopd.cache.codec import (
    content_digest,
    describe,
    features,
    from_description,
    shard_name,
    split_info,
)
from lopd.cache.fields import check_record
from lopd.errors import UserError
from lopd.machine import processes, shutdown
from lopd.machine.storage import sync, whole_file


def _records_in(path: epath.Path) -> int:
    reader = array_record_module.ArrayRecordReader(str(path))
    try:
        return reader.num_records()
    finally:
        reader.close()


def _write_records(path: epath.Path, serialized: Sequence[bytes]) -> None:
    """Writes a local ArrayRecord file and makes sure that it is whole and on the disk.

    It is reopened and counted: a file that was never closed opens silently with no records.
    """
    try:
        writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
        for data in serialized:
            writer.write(data)
        writer.close()
    except RuntimeError as error:
        # ArrayRecord has no other sign of it than the text.
        if "No space left" in str(error) or "quota" in str(error):
            raise OSError(errno.ENOSPC, "No space left on device", str(path)) from error
        raise
    if _records_in(path) != len(serialized):
        raise OSError(f"{path}: wrote {len(serialized)} records, read {_records_in(path)}")
    sync(path)


def _list(artefact: Artefact, entry: ShardEntry) -> None:
    shards = [s for s in artefact.manifest.shards if s["name"] != entry["name"]]
    artefact.manifest.shards = sorted([*shards, entry], key=lambda s: s["name"])
    artefact.save()


def write_shard(
    artefact: Artefact,
    fields: dict,
    index: int,
    count: int,
    records: Sequence[dict],
    counted: dict,
    costs: Costs,
) -> None:
    """Writes shard `index` of `count` and lists it, with its totals `counted` and its costs.

    The order is what makes it safe: write a temporary file, close, reopen and count, flush,
    rename, list. Shards may come in any order; the manifest lists them in theirs.
    """
    description = features(fields)
    for i, record in enumerate(records):
        check_record(record, f"shard {index}, record {i}")
    serialized = [description.serialize_example(record) for record in records]
    path = artefact.path / shard_name(index, count)
    content = f"{content_digest(records):064x}"
    about = {"records": len(records), "content": content, "totals": counted, "costs": costs}
    with whole_file(path) as file:
        _write_records(file, serialized)
        entry = file_entry(file, path.name)
    artefact.manifest.fields = describe(fields)
    _list(artefact, entry | about)


def copy_shard(artefact: Artefact, source: epath.Path, entry: ShardEntry) -> None:
    """Copies a shard of another artefact, whose manifest's `entry` it is, and lists it.

    Raises:
      UserError: if the copy is not what the entry says.
    """
    with whole_file(artefact.path / entry["name"]) as file:
        source.copy(file, overwrite=True)
        if found := damage(file, entry):
            raise UserError(f"{source} {found}")
    _list(artefact, entry)


class Made(NamedTuple):
    """A shard that is to be written."""

    records: Sequence[dict]
    """In their order."""
    totals: dict
    """Counts and sums over them (`lopd.cache.totals`)."""
    costs: Costs
    """Of making them; empty if they are not told."""


class ShardWriter:
    """Writes shards in a thread, one at a time, while the caller goes on; a context manager.

    With several processes, all make them and the first one writes.

    A failure is raised in the caller at the next `put` or `check`, or at the end; nothing is
    written after it.
    """

    def __init__(self, artefact: Artefact, fields: dict, count: int):
        self._artefact, self._fields, self._count = artefact, fields, count
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="shard-writer")
        self._last: Future | None = None

    def put(self, index: int, make: Callable[[], Made]) -> None:
        """Waits until the shard before is safe, then hands over shard `index`.

        Args:
          index: of the shard.
          make: called in the thread.
        """

        def write() -> None:
            made = make()
            if processes.is_main():
                write_shard(self._artefact, self._fields, index, self._count, *made)

        self._wait()
        self._last = self._thread.submit(write)

    def check(self) -> None:
        """Raises what went wrong in the thread, if anything did by now."""
        if self._last is not None and self._last.done():
            self._wait()

    def _wait(self) -> None:
        if self._last is not None:
            last, self._last = self._last, None
            last.result()

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind, *_) -> None:
        self._thread.shutdown(wait=True)
        if kind in (None, shutdown.Stopped):
            self._wait()


def content_fingerprint(artefact: Artefact) -> str:
    """16 hex digits that identify a cache's records, independent of order and sharding."""
    total = sum(int(shard["content"], 16) for shard in artefact.manifest.shards) % 2**256
    return f"{total:064x}"[:16]


def outputs(artefact: Artefact) -> dict:
    """Totals, costs and identity of the shards that a manifest lists."""
    shards = artefact.manifest.shards
    costs = accounting.total(shard["costs"] for shard in shards)
    return {
        **totals.report(totals.add(shards)),
        "fingerprint": content_fingerprint(artefact),
        **({"costs": costs} if costs else {}),
    }


def missing_shards(artefact: Artefact, count: int) -> list[int]:
    """The shards, of `count`, that the manifest does not list yet."""
    listed = {shard["name"] for shard in artefact.manifest.shards}
    return [i for i in range(count) if shard_name(i, count) not in listed]


def write_metadata(artefact: Artefact) -> None:
    """Adds the TFDS files once all shards are there, so that TFDS opens it."""
    shards = artefact.manifest.shards
    fields = from_description(artefact.manifest.fields)
    tfds.folder_dataset.write_metadata(
        data_dir=artefact.path,
        features=features(fields),
        split_infos=[
            split_info(
                artefact.path, [s["records"] for s in shards], sum(s["bytes"] for s in shards)
            )
        ],
        check_data=False,
    )
