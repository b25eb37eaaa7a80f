"""Reading a finished cache: verified first, then record by record."""

import contextlib
import tempfile
from collections.abc import Iterator

import tensorflow_datasets as tfds
from array_record.python import array_record_module
from etils import epath

from lopd.artefacts.artefact import WAY_OUT, Artefact, damage, open_complete
from lopd.cache.claims import check_manifest, check_shard
from lopd.cache.codec import SPLIT, parser
from lopd.cache.fields import check_record
from lopd.errors import UserError, one_line
from lopd.machine.storage import is_local

_HELD_BYTES = 64 * 2**20
"""A cache whose shards are no larger is held in memory, decoded: seconds at start, and of short
responses, most of whose cost is reading and decoding, a batch is made three times faster."""


def check_cache(artefact: Artefact) -> None:
    """Refuses a finished artefact that holds no records, or whose manifest cannot be of a cache.

    Raises:
      UserError: naming what is wrong.
    """
    check_manifest(artefact.manifest, str(artefact.path))


def open_cache(path: epath.PathLike, what: str = "the cache") -> Artefact:
    """A finished cache, to be read.

    Raises:
      UserError: if there is none, or it is not finished, or it is another artefact.
    """
    artefact = open_complete(path, what)
    check_cache(artefact)
    return artefact


def check_whole(artefact: Artefact) -> None:
    """Refuses one worker's part.

    Raises:
      UserError: saying how to join the parts.
    """
    if artefact.manifest.worker:
        raise UserError(
            f"{artefact.path} is a worker's part of a cache: join the parts with "
            "python -m lopd.cache merge OUT PART..."
        )


def verify(artefact: Artefact, files: epath.Path | None = None) -> None:
    """Compares every file of a finished cache with the manifest: presence, size, checksum.

    An ArrayRecord file with a flipped bit opens, and fails only when that record is read; this
    finds it before any work starts. `files` is where the files are, if not with the manifest.

    Raises:
      UserError: naming the damaged files; or if this is one worker's part.
    """
    check_whole(artefact)
    entries = [*artefact.manifest.shards, *artefact.manifest.files]
    _verify_files(artefact, files or artefact.path, entries)


def _verify_files(artefact: Artefact, files: epath.Path, entries: list[dict]) -> None:
    found = []
    for entry in entries:
        if wrong := damage(files / entry["name"], entry):
            found.append(f"{artefact.path / entry['name']} {wrong}")
    if found:
        more = f" (and {len(found) - 1} more files)" if found[1:] else ""
        raise UserError(f"{found[0]}{more}; {WAY_OUT}")


@contextlib.contextmanager
def _local(path: epath.Path) -> Iterator[epath.Path]:
    """A path on this machine: the path itself, or a temporary copy of the file at a URL.

    What is missing is missing at the path given back too.
    """
    if is_local(path) or not path.exists():
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        yield path.copy(epath.Path(folder) / path.name)


def read_shard(artefact: Artefact, name: str) -> list[dict]:
    """The records of one shard that the manifest lists, in order.

    Raises:
      UserError: if the file is missing or damaged.
    """
    entry = next(s for s in artefact.manifest.shards if s["name"] == name)
    path = artefact.path / name
    parse = parser(artefact.manifest.fields)
    with _local(path) as file:
        if wrong := damage(file, entry):
            raise UserError(f"{path} {wrong}; {WAY_OUT}")
        try:
            reader = array_record_module.ArrayRecordReader(str(file))
            try:
                return [parse(data) for data in reader.read_all()]
            finally:
                reader.close()
        except Exception as error:  # of ArrayRecord's, protobuf's and NumPy's kinds
            raise UserError(f"{path} holds no records as its manifest says ({error})") from error


def verify_records(artefact: Artefact) -> int:
    """`verify`, and every record: decoded, checked, and with the others what the manifest says.

    A worker's part is looked at too, which TFDS cannot open before it is merged.

    Returns:
      The number of records.

    Raises:
      UserError: naming what is wrong.
    """
    _verify_files(artefact, artefact.path, artefact.manifest.files)
    seen: set[tuple[int, int]] = set()
    for shard in artefact.manifest.shards:
        path, records = artefact.path / shard["name"], read_shard(artefact, shard["name"])
        check_shard(shard, records, str(path), seen)
    promised = artefact.outputs.get("responses", len(seen))
    readable = len(seen) if artefact.manifest.worker else len(Records(artefact))
    if readable != len(seen) or len(seen) != promised:
        raise UserError(
            f"{artefact.path}: its shards hold {len(seen)} records, its metadata "
            f"{readable}, its manifest {promised}"
        )
    return len(seen)


class Records:
    """Random access to the records of a verified cache, each checked as it is read.

    A small cache is read at once and held, so there a bad record is found before the first step.
    ArrayRecord reads local files, so a cache at a URL is copied to this machine for as long as
    the object lives.
    """

    def __init__(self, artefact: Artefact):
        self._path, files = str(artefact.path), artefact.path
        if not is_local(files):
            self._copy = tempfile.TemporaryDirectory(prefix="lopd-cache-")
            files = epath.Path(self._copy.name)
            for source in artefact.path.iterdir():
                if not source.is_dir():
                    source.copy(files / source.name)
        verify(artefact, files)
        try:
            self._source = tfds.builder_from_directory(files).as_data_source(
                SPLIT, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
            )
        except Exception as error:  # of a dozen kinds
            said = one_line(error)
            raise UserError(f"{self._path}: TFDS cannot read its metadata ({said})") from error
        self._parse = parser(artefact.manifest.fields)
        small = sum(shard["bytes"] for shard in artefact.manifest.shards) <= _HELD_BYTES
        self._held = [self._read(i) for i in range(len(self))] if small else None

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict:
        return self._read(index) if self._held is None else self._held[index]

    def _read(self, index: int) -> dict:
        try:
            record = self._parse(self._source[index])
        except (RuntimeError, LookupError, ValueError) as error:
            said = one_line(error)
            raise UserError(f"{self._path}, record {index} cannot be read ({said})") from error
        who = f"prompt_id {record['prompt_id']}, sample_id {record['sample_id']}"
        check_record(record, f"{self._path}, record {index} ({who})")
        return record

    def __iter__(self) -> Iterator[dict]:
        return (self[i] for i in range(len(self)))
