"""What a record holds, and the names of the files."""

import numpy as np
import tensorflow_datasets as tfds

from lopd.errors import UserError

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

REF_SCORED_FIELDS = RESPONSE_FIELDS | {
    "ref_logprobs": _FLOAT32S,  # log π_ref(a_t | s_t) at temperature 1, by the training forward
}
"""A response that waits for the teacher, where student and teacher take turns."""

SCORED_FIELDS = REF_SCORED_FIELDS | {
    "teacher_logprobs": _FLOAT32S,  # log π_T(a_t | s_t) at temperature 1
}
"""A response with the scores that Lightning OPD trains on."""

_LOGPROB_FIELDS = ("behaviour_logprobs", "teacher_logprobs", "ref_logprobs")
_TOP_K_FIELDS = ("teacher_topk_ids", "teacher_topk_logprobs")


def top_k_fields(top_k: int) -> dict:
    """The teacher's K most likely tokens at each response token, most likely first; {} for K = 0.

    Their log-probabilities are true ones at temperature 1, so what is missing to 1 is the tail.
    They are logits with the log-sum-exp over the vocabulary already subtracted, in float32; so that
    is not stored beside them.
    """
    if not top_k:
        return {}
    shape = (None, top_k)
    return {
        "teacher_topk_ids": tfds.features.Tensor(shape=shape, dtype=np.int32),
        "teacher_topk_logprobs": tfds.features.Tensor(shape=shape, dtype=np.float32),
    }


def _is_logprob(values: np.ndarray) -> bool:
    # Neither holds with a NaN. The ufuncs themselves take half the time of min() and max().
    lowest, highest = np.minimum.reduce(values, axis=None), np.maximum.reduce(values, axis=None)
    return bool(lowest > -np.inf and highest <= 1e-3)


def _check_top_k(record: dict, where: str) -> None:
    ids, logprobs = (record[name] for name in _TOP_K_FIELDS)
    length = len(record["response_tokens"])
    if ids.shape != logprobs.shape or ids.ndim != 2 or len(ids) != length:
        raise UserError(
            f"{where}: top-K of shapes {ids.shape} and {logprobs.shape} for {length} tokens"
        )
    # Rounding in float32 may lift the sum of nearly all probabilities a little above 1.
    if not _is_logprob(logprobs) or (np.exp(logprobs).sum(axis=1) > 1.001).any():
        raise UserError(f"{where}: teacher_topk_logprobs are no log-probabilities")
    if (np.diff(logprobs, axis=1) > 0).any() or (np.diff(np.sort(ids, axis=1), axis=1) == 0).any():
        raise UserError(f"{where}: teacher_topk_ids are not distinct, or not the likeliest first")


def stored_top_k(description: dict) -> int:
    """How many of the teacher's most likely tokens records hold, by their manifest's `fields`."""
    _, shape = description.get(_TOP_K_FIELDS[0], (None, (0,)))
    return shape[-1]


def check_record(record: dict, where: str) -> None:
    """Refuses a record that would silently train on nothing or on garbage.

    Raises:
      UserError: if a response is empty, an id negative, or a log-probability missing, NaN or
        positive.
    """
    length = len(record["response_tokens"])
    if not length or not len(record["prompt_tokens"]):
        raise UserError(f"{where}: empty prompt or response")
    for name in ("prompt_tokens", "response_tokens"):
        if np.minimum.reduce(record[name]) < 0:
            raise UserError(f"{where}: {name} holds a negative id")
    for name in _LOGPROB_FIELDS:
        values = record.get(name)
        if values is None:
            continue
        if len(values) != length:
            raise UserError(f"{where}: {name} has {len(values)} values for {length} tokens")
        if not _is_logprob(values):
            raise UserError(f"{where}: {name} holds a value that is no log-probability")
    if _TOP_K_FIELDS[0] in record:
        _check_top_k(record, where)
