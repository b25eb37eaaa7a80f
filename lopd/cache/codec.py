"""How records become bytes and files that TFDS knows: serialised, described, digested, named."""

import hashlib
import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from tensorflow_datasets.proto import tf_example_pb2

from lopd.cache.fields import SCORED_FIELDS, top_k_fields
from lopd.errors import UserError

NAME = "cache"
"""Name of the dataset in its TFDS metadata."""


SPLIT = "train"
"""The only split."""


def features(fields: dict) -> tfds.features.FeaturesDict:
    """The TFDS description of records with these fields."""
    return tfds.features.FeaturesDict(fields)


def shard_name(index: int, count: int) -> str:
    """The file name that TFDS expects of a shard."""
    return f"{NAME}-{SPLIT}.array_record-{index:05d}-of-{count:05d}"


def describe(fields: dict) -> dict:
    """The fields as a manifest has them: name → [dtype, shape]."""
    return {name: [np.dtype(f.np_dtype).name, list(f.shape)] for name, f in fields.items()}


def check_description(description: Any, where: str) -> None:
    """Refuses fields that are not those of responses; `where` is named.

    Raises:
      UserError: naming the first that is missing, unknown, or of another type or shape.
    """
    if not isinstance(description, dict):
        raise UserError(f"{where} is no cache: its manifest names no fields of records")
    top_k = description.get("teacher_topk_ids")
    try:
        k = top_k[1][1] if top_k else 0
        known = describe(SCORED_FIELDS | top_k_fields(k if isinstance(k, int) and k > 0 else 0))
    except (TypeError, LookupError):
        known = describe(SCORED_FIELDS)
    needed = known.keys() - {"behaviour_logprobs", "ref_logprobs", "teacher_logprobs"}
    for name in sorted(needed - description.keys()):
        raise UserError(f"{where}: its manifest lacks the field {name} of records")
    for name, kind in description.items():
        if known.get(name) != kind:
            wanted = f", not {known[name]}" if name in known else ", which no record has"
            raise UserError(f"{where}: its manifest has the field {name}, {kind!r:.80}{wanted}")


def from_description(description: dict) -> dict:
    """The inverse of `describe`."""
    return {
        name: tfds.features.Tensor(shape=tuple(shape), dtype=np.dtype(dtype))
        for name, (dtype, shape) in description.items()
    }


def parser(description: dict) -> Callable[[bytes], dict]:
    """The parser of serialised TFDS records with the fields that `describe` has described.

    It gives what TFDS' `deserialize_example_np` does, which takes most of the time of making a
    batch of short responses.
    """
    lists = {"f": "float_list.value", "i": "int64_list.value", "b": "int64_list.value"}
    fields = []
    for name, (dtype, shape) in description.items():
        kind = np.dtype(dtype).kind
        read, scalar = operator.attrgetter(lists[kind]), bool if kind == "b" else int
        sizes = [-1 if size is None else size for size in shape]
        fields.append((name, read, scalar, np.dtype(dtype), sizes))

    def parse(data: bytes) -> dict:
        features, record = tf_example_pb2.Example.FromString(data).features.feature, {}
        for name, read, scalar, dtype, sizes in fields:
            values = read(features[name])
            value = np.array(values, dtype) if sizes else scalar(values[0])
            record[name] = value.reshape(sizes) if len(sizes) > 1 else value
        return record

    return parse


_DTYPES = {name: field.np_dtype for name, field in (SCORED_FIELDS | top_k_fields(1)).items()}


def content_digest(records: Sequence[dict]) -> int:
    """A 256-bit identity of records, whatever their order and however they are split in shards.

    The sum of each record's SHA-256 over its fields, so digests of shards add up. File checksums
    cannot serve: serialising the same record twice may order its fields differently.
    """
    total = 0
    for record in records:
        digest = hashlib.sha256()
        for name in sorted(record):
            value = np.asarray(record[name], _DTYPES[name])
            digest.update(f"{name}{value.shape}".encode())
            digest.update(value.tobytes())
        total += int.from_bytes(digest.digest(), "big")
    return total % 2**256


def split_info(data_dir: epath.Path, shard_lengths: list[int], num_bytes: int):
    """The TFDS description of the only split."""
    return tfds.core.SplitInfo(
        name=SPLIT,
        shard_lengths=shard_lengths,
        num_bytes=num_bytes,
        filename_template=tfds.core.ShardedFileTemplate(
            data_dir=data_dir,
            dataset_name=NAME,
            split=SPLIT,
            filetype_suffix="array_record",
        ),
    )
