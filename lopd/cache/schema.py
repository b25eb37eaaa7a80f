"""What a record holds, and the names of the files."""

import hashlib
from collections.abc import Sequence

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from lopd.errors import UserError

NAME = "cache"
SPLIT = "train"

_INT32S = tfds.features.Tensor(shape=(None,), dtype=np.int32)
_FLOAT32S = tfds.features.Tensor(shape=(None,), dtype=np.float32)

RESPONSE_FIELDS = {
    "prompt_id": tfds.features.Scalar(np.int64),
    "sample_id": tfds.features.Scalar(np.int32),
    "prompt_tokens": _INT32S,
    "response_tokens": _INT32S,  # ends with the end token exactly when `finished`
    "finished": tfds.features.Scalar(np.bool_),  # ended by itself, was not cut at the cap
    "behaviour_logprobs": _FLOAT32S,  # of the distribution really sampled from (its T, top-p)
}
"""A sampled response, as SFT reads it. Log-probabilities are one per response token, in nats."""

SCORED_FIELDS = RESPONSE_FIELDS | {
    "teacher_logprobs": _FLOAT32S,  # log π_T(a_t | s_t) at temperature 1
    "ref_logprobs": _FLOAT32S,  # log π_ref(a_t | s_t) at temperature 1, by the training forward
}
"""A response with the scores that Lightning OPD trains on."""

_LOGPROB_FIELDS = ("behaviour_logprobs", "teacher_logprobs", "ref_logprobs")


def features(fields: dict) -> tfds.features.FeaturesDict:
    """The TFDS description of records with these fields."""
    return tfds.features.FeaturesDict(fields)


def shard_name(index: int, count: int) -> str:
    """The file name that TFDS expects of a shard."""
    return f"{NAME}-{SPLIT}.array_record-{index:05d}-of-{count:05d}"


def check_record(record: dict, where: str) -> None:
    """Refuses a record that would silently train on nothing or on garbage.

    Raises:
      UserError: if a response is empty, or a log-probability is missing, NaN or positive.
    """
    length = len(record["response_tokens"])
    if not length or not len(record["prompt_tokens"]):
        raise UserError(f"{where}: empty prompt or response")
    for name in _LOGPROB_FIELDS:
        values = record.get(name)
        if values is None:
            continue
        if len(values) != length:
            raise UserError(f"{where}: {name} has {len(values)} values for {length} tokens")
        if not (np.isfinite(values).all() and (values <= 1e-3).all()):
            raise UserError(f"{where}: {name} holds a value that is no log-probability")


def content_digest(records: Sequence[dict]) -> int:
    """A 256-bit identity of records, whatever their order and however they are split in shards.

    The sum of each record's SHA-256 over its fields, so digests of shards add up. File checksums
    cannot serve: serialising the same record twice may order its fields differently.
    """
    total = 0
    for record in records:
        digest = hashlib.sha256()
        for name in sorted(record):
            value = np.asarray(record[name])
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
