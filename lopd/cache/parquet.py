"""A cache as one Parquet file and back, every value bit for bit.

The file's schema metadata carries the manifest, so that the cache that is made from it is the same
artefact: same settings, inputs, shards' contents and fingerprint.
"""

import json

import numpy as np
import pyarrow
import pyarrow.parquet
from etils import epath

from lopd.artefacts.artefact import Artefact
from lopd.artefacts.manifest import Manifest
from lopd.cache import reader, writer
from lopd.cache.codec import content_digest, from_description
from lopd.errors import UserError
from lopd.machine.storage import whole_file

_MANIFEST = b"lopd.manifest"


def _arrow_type(dtype: str, shape: list) -> pyarrow.DataType:
    kind = pyarrow.from_numpy_dtype(np.dtype(dtype))
    for size in reversed(shape):
        kind = pyarrow.list_(kind) if size is None else pyarrow.list_(kind, size)
    return kind


def _column(values: list, kind: pyarrow.DataType) -> pyarrow.Array:
    # Arrow takes lists of one-dimensional arrays; floats pass through Python's doubles unchanged.
    return pyarrow.array([np.asarray(v).tolist() for v in values], kind)


def to_parquet(artefact: Artefact, file: epath.Path) -> None:
    """Writes a finished cache as a Parquet file, one row group per shard.

    Raises:
      UserError: if the cache is damaged.
    """
    reader.verify(artefact)
    fields = artefact.manifest.fields
    table_schema = pyarrow.schema(
        [(name, _arrow_type(*kind)) for name, kind in fields.items()],
        metadata={_MANIFEST: json.dumps(artefact.manifest.to_json())},
    )
    with (
        whole_file(file) as whole,
        whole.open("wb") as stream,
        pyarrow.parquet.ParquetWriter(stream, table_schema, compression="zstd") as table,
    ):
        for shard in artefact.manifest.shards:
            records = reader.read_shard(artefact, shard["name"])
            columns = [
                _column([r[name] for r in records], table_schema.field(name).type)
                for name in fields
            ]
            table.write_table(pyarrow.Table.from_arrays(columns, schema=table_schema))


def _open(file: epath.Path) -> tuple[pyarrow.parquet.ParquetFile, Manifest]:
    try:
        table = pyarrow.parquet.ParquetFile(file.open("rb"))
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise UserError(f"{file}: no Parquet file that can be read ({error})") from error
    manifest = (table.schema_arrow.metadata or {}).get(_MANIFEST)
    if manifest is None:
        raise UserError(
            f"{file} was not made by `python -m lopd.cache to-parquet`; the released code's files "
            "are read by import-released"
        )
    try:
        return table, Manifest.from_json(json.loads(manifest))
    except ValueError as error:
        raise UserError(f"{file} holds another manifest than this code writes ({error})") from error


def _records(table: pyarrow.Table, fields: dict) -> list[dict]:
    columns = {
        name: [
            np.asarray(value, dtype).reshape([-1 if size is None else size for size in shape])
            for value in table.column(name).to_pylist()
        ]
        for name, (dtype, shape) in fields.items()
    }
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def from_parquet(file: epath.Path, out: epath.PathLike) -> Artefact:
    """Makes the cache that a Parquet file of `to_parquet` was made from.

    An interrupted one is made anew by doing it again.

    Raises:
      UserError: if the file is damaged or of another kind, or `out` is something else.
    """
    table, original = _open(file)
    artefact = Artefact(out)
    if artefact.complete:
        raise UserError(f"{artefact.path} is finished already: give another directory")
    artefact.check("settings", original.settings)
    artefact.check("inputs", original.inputs)
    artefact.begin(original.stage, original.settings, original.inputs)
    fields, count = original.fields, len(original.shards)
    for index, shard in enumerate(original.shards):
        records = _records(table.read_row_group(index), fields)
        where = f"{file}, row group {index}"
        if f"{content_digest(records):064x}" != shard["content"]:
            raise UserError(f"{where}: its content is not what it was: the file is damaged")
        declared = from_description(fields)
        writer.write_shard(
            artefact, declared, index, count, records, shard["totals"], shard.get("costs", {})
        )
    artefact.manifest.plan, artefact.manifest.seconds = original.plan, original.seconds
    writer.write_metadata(artefact)
    artefact.finish(original.outputs)
    return artefact
