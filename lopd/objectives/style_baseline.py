"""Lightning OPD 2.0: takes out of the teacher's scores what is mere style (arXiv 2607.28449).

Where the teacher that scores did not write the SFT data, d_t = log π_T(a_t) − log π_ref(a_t) holds,
besides what is right and wrong, how the two teachers differ in style. A baseline b̂ predicts d_t
from what tells nothing of the problem, and the advantage becomes

    A_t = log π_T − b̂_t − log π_θ,    b̂_t = ½ · E[d | token id] + ½ · E[d | position, surprisal],

with the surprisal −log π_ref(a_t). The means are cross-fitted: prompts are split into folds, and a
response's baseline comes from the folds without its prompt. Every response weighs the same, and
means of few tokens are shrunk towards the mean of all. The two halves are averaged, as the paper
has it: of an offset that only the token id explains, half is taken out.

Bins and strength of the shrinkage are ours. The paper's clip is τ = 0.2, to be set as `opd.tau`.
"""

import dataclasses
import zlib
from collections.abc import Iterable

import numpy as np

from lopd.errors import UserError

PRIOR_TOKENS = 10.0
"""Tokens that the mean of all counts for in every other mean."""
POSITIONS = 20
"""Bins of the position, each twice as long as the one before: 0, 1–2, 3–6, 7–14, …"""
SURPRISAL_EDGES = np.array([0.001, 0.01, 0.1, 0.3, 1.0, 2.0, 4.0])
"""Between the bins of the surprisal, in nats."""
_CELLS = POSITIONS * (len(SURPRISAL_EDGES) + 1)


def _difference(record: dict) -> np.ndarray:
    return record["teacher_logprobs"].astype(np.float64) - record["ref_logprobs"]


def _cells(record: dict) -> np.ndarray:
    """The position × surprisal bin of each response token."""
    # frexp gives the number of bits of t + 1, without a logarithm's rounding.
    position = np.frexp(np.arange(1.0, len(record["response_tokens"]) + 1))[1] - 1
    surprisal = np.searchsorted(SURPRISAL_EDGES, -record["ref_logprobs"], side="right")
    return np.minimum(position, POSITIONS - 1) * (len(SURPRISAL_EDGES) + 1) + surprisal


def _fold(record: dict, folds: int) -> int:
    """The fold of a record's prompt; all samples of a prompt share it."""
    return zlib.crc32(int(record["prompt_id"]).to_bytes(8, "little", signed=True)) % folds


def _other_folds(sums: np.ndarray) -> np.ndarray:
    """[folds, ...] to the sums over the other folds, added up and never subtracted."""
    return np.stack([np.delete(sums, f, axis=0).sum(axis=0) for f in range(len(sums))])


def _shrunk_means(
    sums: np.ndarray, weights: np.ndarray, mean: np.ndarray, mean_length: np.ndarray
) -> np.ndarray:
    """Means [folds, bins] from the other folds. Weights are in responses; × length, in tokens."""
    tokens = _other_folds(weights) * mean_length[:, None]
    values = _other_folds(sums) * mean_length[:, None]
    return (values + PRIOR_TOKENS * mean[:, None]) / (tokens + PRIOR_TOKENS)


@dataclasses.dataclass(frozen=True)
class StyleBaseline:
    """b̂ as tables, made by `fit_baseline`: row f serves the prompts of fold f, and saw none."""

    by_token: np.ndarray
    """Mean of d by token id, float64 [folds, V]."""
    by_cell: np.ndarray
    """Mean of d by position × surprisal bin, float64 [folds, cells]."""

    def baseline(self, record: dict) -> np.ndarray:
        """b̂_t of each response token, float64 [R], in nats."""
        fold = _fold(record, len(self.by_token))
        by_token = self.by_token[fold, record["response_tokens"]]
        return 0.5 * by_token + 0.5 * self.by_cell[fold, _cells(record)]

    def residualise(self, record: dict) -> dict:
        """The record with `target_logprobs`: log π_T − b̂, which may exceed 0."""
        target = record["teacher_logprobs"] - self.baseline(record)
        return {**record, "target_logprobs": target.astype(np.float32)}


def fit_baseline(records: Iterable[dict], folds: int, vocab_size: int) -> StyleBaseline:
    """One pass over scored records; holds the tables and one record at a time.

    Args:
      records: with `prompt_id`, `response_tokens`, `teacher_logprobs`, `ref_logprobs`.
      folds: K of the cross-fitting, at least 2.
      vocab_size: every token id is below it.

    Raises:
      UserError: if all prompts fall into one fold.
    """
    token_sums, token_weights = np.zeros((2, folds, vocab_size))
    cell_sums, cell_weights = np.zeros((2, folds, _CELLS))
    responses, tokens = np.zeros((2, folds))
    for record in records:
        fold, d = _fold(record, folds), _difference(record)
        weight = 1 / len(d)
        for sums, weights, index in (
            (token_sums, token_weights, record["response_tokens"]),
            (cell_sums, cell_weights, _cells(record)),
        ):
            np.add.at(sums[fold], index, weight * d)
            np.add.at(weights[fold], index, weight)
        responses[fold] += 1
        tokens[fold] += len(d)
    others = _other_folds(responses)
    if not others.all():
        raise UserError(
            f"opd.residual_folds={folds}: all prompts of the cache fall into one fold; a baseline "
            "needs more prompts"
        )
    mean = _other_folds(cell_sums.sum(axis=1)) / others
    mean_length = _other_folds(tokens) / others
    return StyleBaseline(
        _shrunk_means(token_sums, token_weights, mean, mean_length),
        _shrunk_means(cell_sums, cell_weights, mean, mean_length),
    )
