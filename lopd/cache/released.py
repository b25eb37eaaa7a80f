"""Import of the Parquet that the authors' released code precomputes, into a cache of ours.

A row holds `prompt` (the rendered text) and `metadata` with `response_tokens`,
`teacher_log_probs`, `loss_mask` and `response` (text). What such a file cannot tell is not made
up: π_ref's log-probabilities, which it lacks, are computed by the caller's `score`; behaviour
log-probabilities are left out of the cache; and a response counts as finished only if its end token
is there, which the released code's passing through text removes from every response.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from lopd.artefacts.artefact import Artefact
from lopd.cache import totals, writer
from lopd.cache.fields import SCORED_FIELDS
from lopd.data.sources import read_rows
from lopd.data.tokenizers import Tokenizer
from lopd.errors import UserError

FIELDS = {k: v for k, v in SCORED_FIELDS.items() if k != "behaviour_logprobs"}
"""What an imported record holds: everything that Lightning OPD trains on."""

_ROWS_ENCODED_AGAIN = 16

Score = Callable[[Sequence[dict]], list[np.ndarray]]
"""Gives log π_ref of the response tokens of each record."""


@dataclasses.dataclass
class Report:
    """What was found, in rows. The last five are skipped, and are in none of the others."""

    rows: int = 0
    imported: int = 0
    """Rows that became records."""
    without_end: int = 0  # imported, but no end token to train, cut ones included
    cut: int = 0  # imported, and at the cap without having ended
    empty: int = 0  # no response tokens
    unscored: int = 0  # no teacher log-probabilities: only phase 1 was run
    mismatched: int = 0  # as many log-probabilities or mask entries as tokens: not so
    masked: int = 0  # zeros in the mask, by which the released code shifts all that follows
    invalid: int = 0  # a log-probability that is NaN, infinite or positive

    def describe(self) -> str:
        """One line for people."""
        skipped = {
            "empty": self.empty,
            "without teacher log-probs": self.unscored,
            "with another number of log-probs or mask entries than tokens": self.mismatched,
            "with zeros in loss_mask": self.masked,
            "with invalid log-probs": self.invalid,
        }
        reasons = ", ".join(f"{count} {why}" for why, count in skipped.items() if count)
        return (
            f"imported {self.imported} of {self.rows} responses; {self.without_end} without their "
            f"end token, of which {self.cut} at the cap; skipped: {reasons or 'none'}"
        )


def _defect(metadata: Mapping, mask: Sequence[int] | None) -> str:
    """The `Report` field that says why a row cannot be imported; "" if it can."""
    tokens, logprobs = metadata.get("response_tokens"), metadata.get("teacher_log_probs")
    if not tokens:
        return "empty"
    if not logprobs:
        return "unscored"
    if len(logprobs) != len(tokens) or (mask is not None and len(mask) != len(tokens)):
        return "mismatched"
    if mask is not None and not all(mask):
        return "masked"
    values = np.array(logprobs, np.float32)  # None becomes NaN
    return "" if np.isfinite(values).all() and (values <= 1e-3).all() else "invalid"


def _check_tokenizer(
    tokens: np.ndarray, text: str | None, tokenizer: Tokenizer, where: str
) -> None:
    """Refuses ids that another tokenizer has made, as far as a row can show it."""
    advice = "use the tokenizer that the file was made with"
    if not 0 <= tokens.min() <= tokens.max() < tokenizer.vocab_size:
        raise UserError(
            f"{where}: ids from {tokens.min()} to {tokens.max()}, the tokenizer has "
            f"{tokenizer.vocab_size}: {advice}"
        )
    # Half of it: where a response was cut, its text need not give the same ids again.
    half = len(tokens) // 2
    if text and tokenizer.encode(text)[:half] != tokens[:half].tolist():
        raise UserError(f"{where}: the tokenizer gives other ids for the response's text: {advice}")


def read_released(
    source: str, tokenizer: Tokenizer, *, prompt_length: int, response_length: int
) -> tuple[list[dict], Report]:
    """The records of released Parquet, without `ref_logprobs`, and what was wrong with the rest.

    Args:
      source: a file, a glob or a folder.
      tokenizer: the one the file was made with; prompts are text there.
      prompt_length: most tokens of a prompt.
      response_length: most tokens of a response; longer ones are cut, as the released code does.

    Raises:
      UserError: if a prompt is too long, ids are not the tokenizer's, or nothing can be imported.
    """
    records, report = [], Report()
    for index, (where, row) in enumerate(read_rows(source)):
        metadata = row.get("metadata")
        if row.get("prompt") is None or not isinstance(metadata, Mapping):
            raise UserError(f"{where}: columns {sorted(row)}, not those of the released code")
        report.rows += 1
        mask = metadata.get("loss_mask") or row.get("loss_mask")
        if defect := _defect(metadata, mask):
            setattr(report, defect, getattr(report, defect) + 1)
            continue
        prompt = row["prompt"]
        prompt = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        if not 0 < len(prompt) <= prompt_length:
            raise UserError(
                f"{where}: the prompt has {len(prompt)} tokens, prompt_length is {prompt_length}"
            )
        tokens = np.array(metadata["response_tokens"], np.int64)
        text = metadata.get("response") if report.imported < _ROWS_ENCODED_AGAIN else None
        _check_tokenizer(tokens, text, tokenizer, where)
        tokens = tokens[:response_length].astype(np.int32)
        finished = int(tokens[-1]) in tokenizer.end_ids
        report.imported += 1
        report.without_end += not finished
        report.cut += not finished and len(tokens) == response_length
        records.append(
            {
                "prompt_id": index,
                "sample_id": 0,
                "prompt_tokens": np.array(prompt, np.int32),
                "response_tokens": tokens,
                "finished": finished,
                "teacher_logprobs": np.array(
                    metadata["teacher_log_probs"][:response_length], np.float32
                ),
            }
        )
    if not records:
        raise UserError(f"{source}: {report.describe()}")
    return records, report


def import_released(
    artefact: Artefact,
    records: Sequence[dict],
    report: Report,
    score: Score,
    *,
    records_per_shard: int,
) -> dict:
    """Adds `ref_logprobs` to what `read_released` gave and writes it as the artefact's shards.

    Shards that an interrupted import has written are not scored again.

    Args:
      score: log π_ref of every response token at temperature 1, one float32 array per record.

    Returns:
      The outputs of the artefact: totals as `precompute` has them, and the report.
    """
    count = -(-len(records) // records_per_shard)
    for index in writer.missing_shards(artefact, count):
        part = records[index * records_per_shard : (index + 1) * records_per_shard]
        scored = [
            {**record, "ref_logprobs": np.asarray(logprobs, np.float32)}
            for record, logprobs in zip(part, score(part), strict=True)
        ]
        counted = totals.of_responses(scored) | totals.of_scores(scored)
        writer.write_shard(artefact, FIELDS, index, count, scored, counted, {})
    writer.write_metadata(artefact)
    return {**writer.outputs(artefact), "imported": dataclasses.asdict(report)}
