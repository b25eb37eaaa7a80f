"""A cache as one Parquet file and back, every value bit for bit.

The file's schema metadata carries the manifest, so that the cache that is made from it is the same
artefact: same settings, inputs, shards' contents and fingerprint. What of it records can tell is
computed again from them; the rest is marked as claimed.
"""

import json

import numpy as np
import pyarrow
import pyarrow.parquet
from etils import epath

from lopd.artefacts.artefact import Artefact
from lopd.artefacts.manifest import Manifest
from lopd.cache import reader, writer
from lopd.cache.claims import check_claims, check_manifest, check_shard
from lopd.cache.codec import from_description
from lopd.errors import UserError, one_line
from lopd.machine.reading import check_regular, parse_json
from lopd.machine.storage import whole_file

_MANIFEST = b"lopd.manifest"


def _arrow_type(dtype: str, shape: list) -> pyarrow.DataType:
    kind = pyarrow.from_numpy_dtype(np.dtype(dtype))
    for size in reversed(shape):
        kind = pyarrow.list_(kind) if size is None else pyarrow.list_(kind, size)
    return kind


def _schema(fields: dict, metadata: dict | None = None) -> pyarrow.Schema:
    return pyarrow.schema([(n, _arrow_type(*kind)) for n, kind in fields.items()], metadata)


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
    table_schema = _schema(fields, {_MANIFEST: json.dumps(artefact.manifest.to_json())})
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
    check_regular(file)
    try:
        table = pyarrow.parquet.ParquetFile(file.open("rb"))
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{file}: no Parquet file that can be read ({one_line(error)})") from error
    text = (table.schema_arrow.metadata or {}).get(_MANIFEST)
    if text is None:
        raise UserError(
            f"{file} was not made by `python -m lopd.cache to-parquet`; the released code's files "
            "are read by import-released"
        )
    try:
        manifest = Manifest.from_json(parse_json(text, f"the manifest in {file}"))
    except ValueError as error:
        raise UserError(f"{file} holds another manifest than this code writes ({error})") from error
    check_manifest(manifest, str(file))
    if manifest.worker or not manifest.complete:
        raise UserError(f"{file}: by its manifest it is no finished cache")
    wanted = _schema(manifest.fields)
    if not table.schema_arrow.remove_metadata().equals(wanted):
        raise UserError(f"{file}: its columns are not those that its manifest names")
    if table.num_row_groups != len(manifest.shards) or not manifest.shards:
        raise UserError(
            f"{file} has {table.num_row_groups} row groups, its manifest {len(manifest.shards)}"
        )
    return table, manifest


def _records(table: pyarrow.Table, fields: dict) -> list[dict]:
    columns = {
        name: [
            np.asarray(value, dtype).reshape([-1 if size is None else size for size in shape])
            for value in table.column(name).to_pylist()
        ]
        for name, (dtype, shape) in fields.items()
    }
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _read_row_group(table: pyarrow.parquet.ParquetFile, index: int, fields: dict) -> list[dict]:
    """The records of a row group.

    Raises:
      ValueError: if it is damaged.
    """
    try:
        return _records(table.read_row_group(index), fields)
    except (OSError, pyarrow.ArrowException, TypeError, ValueError) as error:
        raise ValueError(f"damaged ({one_line(error)})") from error


def from_parquet(file: epath.Path, out: epath.PathLike) -> Artefact:
    """Makes the cache that a Parquet file of `to_parquet` was made from.

    What records can tell is computed from them: contents, fingerprint, totals. The rest, which is
    settings, inputs, the identities of the models and the costs, is what the file claims, and
    `claimed_by` in the outputs says so. An interrupted one is made anew by doing it again.

    Raises:
      UserError: if the file is damaged, of another kind, or claims what its records do not bear
        out; or `out` is something else.
    """
    table, original = _open(file)
    for name, value in original.inputs.items():
        if original.outputs.get(name, value) != value:
            raise UserError(
                f"{file} claims {name}={value!r} among its inputs and "
                f"{original.outputs[name]!r} among its outputs"
            )
    artefact = Artefact(out)
    if artefact.complete:
        raise UserError(f"{artefact.path} is finished already: give another directory")
    artefact.check("settings", original.settings)
    artefact.check("inputs", original.inputs)
    artefact.begin(original.stage, original.settings, original.inputs)
    fields, count = original.fields, len(original.shards)
    seen: set[tuple[int, int]] = set()
    for index, shard in enumerate(original.shards):
        where = f"{file}, row group {index}"
        try:
            records = _read_row_group(table, index, fields)
        except ValueError as error:
            raise UserError(f"{where}: {error}") from error
        check_shard(shard, records, where, seen)
        declared = from_description(fields)
        writer.write_shard(
            artefact, declared, index, count, records, shard["totals"], shard["costs"]
        )
    found = writer.outputs(artefact)
    check_claims(original.outputs, {k: v for k, v in found.items() if k != "costs"}, str(file))
    artefact.manifest.plan, artefact.manifest.seconds = original.plan, original.seconds
    writer.write_metadata(artefact)
    artefact.finish({**original.outputs, **found, "claimed_by": str(file)})
    return artefact
