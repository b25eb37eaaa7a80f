"""`opd`: trains the student on the fixed cache. Needs no teacher."""

import json

import numpy as np

from lopd.artefact import Artefact, write_atomically
from lopd.cache.reader import Records
from lopd.context import PARAMS, Context
from lopd.data.batches import step_batches
from lopd.data.tokenizers import Tokenizer
from lopd.errors import UserError
from lopd.objectives import lightning_opd
from lopd.scoring import score_responses
from lopd.stages import common
from lopd.training import checkpoints

ROLLOUTS = 64
"""Cached responses that the trained student scores once more, for the report."""


def settings(ctx: Context) -> dict:
    """What the trained student depends on."""
    return common.stage_settings(ctx, "opd") | common.model_settings(ctx, "student")


def inputs(ctx: Context) -> dict:
    """The cache and the student it starts from.

    Raises:
      UserError: if another student sampled the cache.
    """
    sft, cache = ctx.input("sft"), ctx.input("precompute")
    start, sampled = sft.outputs["fingerprint"], cache.outputs["sft"]
    if start != sampled:
        raise UserError(
            f"the cache {cache.path} was sampled from student {sampled}, but OPD would start "
            f"from {start} ({sft.path}): give the cache of this student, or its checkpoint"
        )
    if cache.manifest["settings"]["tokenizer"] != ctx.tokenizer.fingerprint:
        raise UserError(
            f"the cache {cache.path} was made with tokenizer "
            f"{cache.manifest['settings']['tokenizer']}, the run's is {ctx.tokenizer.fingerprint}"
        )
    return {"sft": start, "precompute": cache.outputs["fingerprint"]}


def run(ctx: Context, artefact: Artefact) -> dict:
    """Huber regression of log π_θ onto log π_T over the cache."""
    recipe, records = ctx.config.opd, Records(ctx.input("precompute"))
    batches = step_batches(
        records,
        seed=ctx.seed("opd order"),
        batch_size=recipe.batch_size,
        row_length=recipe.row_length,
        rows_per_micro=ctx.config.runtime.rows_per_micro,
        reduction=recipe.reduction,
        token_fields=("teacher_logprobs", "ref_logprobs"),
    )
    params = ctx.load_params("sft", "student")
    objective = lightning_opd(recipe.tau)
    outputs = common.train_into(ctx, artefact, "student", params, batches, objective, recipe)
    _write_rollouts(ctx, artefact, records)
    return outputs


def _token_text(tokenizer: Tokenizer, token: int) -> str:
    """A token as people read it; a special one, which decodes to nothing, by its name."""
    piece = tokenizer.tokens[token]
    if "▁" in piece:  # SentencePiece's space, which decoding drops at the start of a text
        return piece.replace("▁", " ")
    return tokenizer.decode([token]) or piece


def _write_rollouts(ctx: Context, artefact: Artefact, records: Records) -> None:
    """Writes rollouts.jsonl: responses with log π_T, log π_ref and the trained log π_θ, in nats.

    Spread evenly over the cache, so that they are a fair sample of it whatever its order.
    """
    count = min(ROLLOUTS, len(records))
    chosen = [records[i * len(records) // count] for i in range(count)]
    student_logprobs = score_responses(
        ctx.model("student"),
        checkpoints.load_params(artefact.path / PARAMS, ctx.model("student"), ctx.mesh),
        chosen,
        mesh=ctx.mesh,
        row_length=ctx.config.opd.row_length,
        rows_per_micro=ctx.config.runtime.rows_per_micro,
    )

    def texts(tokens: np.ndarray) -> list[str]:
        return [_token_text(ctx.tokenizer, int(token)) for token in tokens]

    def numbers(values: np.ndarray) -> list[float]:
        return np.round(values.astype(np.float64), 4).tolist()

    lines = [
        {
            "prompt_id": int(record["prompt_id"]),
            "sample_id": int(record["sample_id"]),
            "prompt": "".join(texts(record["prompt_tokens"])),
            "tokens": texts(record["response_tokens"]),
            "finished": bool(record["finished"]),
            "teacher_logprobs": numbers(record["teacher_logprobs"]),
            "ref_logprobs": numbers(record["ref_logprobs"]),
            "student_logprobs": numbers(student),
        }
        for record, student in zip(chosen, student_logprobs, strict=True)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    write_atomically(artefact.path / "rollouts.jsonl", text)
