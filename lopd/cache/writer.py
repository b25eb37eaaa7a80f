"""Writing shards so that a crash at any instant leaves only whole ones."""

from collections.abc import Sequence

import tensorflow_datasets as tfds
from array_record.python import array_record_module

from lopd.artefact import Artefact, file_sha256, sync
from lopd.cache import schema


def _records_in(path) -> int:
    reader = array_record_module.ArrayRecordReader(str(path))
    try:
        return reader.num_records()
    finally:
        reader.close()


def write_shard(
    artefact: Artefact, fields: dict, index: int, count: int, records: Sequence[dict]
) -> None:
    """Writes shard `index` of `count` and lists it in the manifest.

    The order is what makes it safe: write `*.tmp`, close, reopen and count (a file that was
    never closed opens silently with no records), flush, rename, list.
    """
    features = schema.features(fields)
    path = artefact.path / schema.shard_name(index, count)
    temporary = path.parent / f"{path.name}.tmp"
    writer = array_record_module.ArrayRecordWriter(str(temporary), "group_size:1")
    for i, record in enumerate(records):
        schema.check_record(record, f"shard {index}, record {i}")
        writer.write(features.serialize_example(record))
    writer.close()
    if _records_in(temporary) != len(records):
        raise OSError(f"{temporary}: wrote {len(records)} records, read {_records_in(temporary)}")
    sync(temporary)
    entry = {
        "name": path.name,
        "records": len(records),
        "bytes": temporary.stat().length,
        "sha256": file_sha256(temporary),
        "content": f"{schema.content_digest(records):064x}",
    }
    temporary.replace(path)
    sync(path.parent)
    artefact.manifest.setdefault("shards", []).append(entry)
    artefact.save()


def content_fingerprint(artefact: Artefact) -> str:
    """16 hex digits that identify a cache's records, independent of order and sharding."""
    total = sum(int(shard["content"], 16) for shard in artefact.manifest["shards"]) % 2**256
    return f"{total:064x}"[:16]


def shards_written(artefact: Artefact) -> int:
    """How many shards an interrupted run has finished; shards are written in order."""
    return len(artefact.manifest.get("shards", []))


def write_metadata(artefact: Artefact, fields: dict) -> None:
    """Adds the TFDS files once all shards are there, so that TFDS opens the directory."""
    shards = artefact.manifest["shards"]
    tfds.folder_dataset.write_metadata(
        data_dir=artefact.path,
        features=schema.features(fields),
        split_infos=[
            schema.split_info(
                artefact.path, [s["records"] for s in shards], sum(s["bytes"] for s in shards)
            )
        ],
        check_data=False,
    )
