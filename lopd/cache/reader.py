"""Reading a finished cache: verified first, then record by record."""

import tensorflow_datasets as tfds

from lopd.artefact import Artefact, file_sha256
from lopd.cache import schema
from lopd.errors import UserError


def verify(artefact: Artefact) -> None:
    """Compares every shard with the manifest: presence, size, checksum.

    An ArrayRecord file with a flipped bit opens, and fails only when that record is read; this
    finds it before any work starts.

    Raises:
      UserError: naming the damaged file.
    """
    for shard in artefact.manifest["shards"]:
        path = artefact.path / shard["name"]
        if not path.exists():
            raise UserError(f"{path} is missing; delete {artefact.path} and run its stage again")
        if path.stat().length != shard["bytes"] or file_sha256(path) != shard["sha256"]:
            raise UserError(
                f"{path} is damaged (size or checksum differs from the manifest); "
                f"delete {artefact.path} and run its stage again"
            )


class Records:
    """Random access to the records of a verified cache, each checked as it is read."""

    def __init__(self, artefact: Artefact):
        verify(artefact)
        self._path = artefact.path
        self._source = tfds.builder_from_directory(artefact.path).as_data_source(schema.SPLIT)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict:
        record = self._source[index]
        who = f"prompt_id {record['prompt_id']}, sample_id {record['sample_id']}"
        schema.check_record(record, f"{self._path}, record {index} ({who})")
        return record
