"""rollouts.jsonl: cached responses as the trained student sees them, left by `opd` for the page."""

import json
from collections.abc import Callable, Sequence

import numpy as np
from etils import epath

from lopd.data.tokenizers import Tokenizer
from lopd.machine import processes
from lopd.machine.storage import write_atomically

ROLLOUTS = 64
"""How many."""


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """A token as people read it; a special one, which decodes to nothing, by its name.

    A model may sample a row of its embedding that no token belongs to: that is <its number>.
    """
    if token >= tokenizer.vocab_size:
        return f"<{token}>"
    piece = tokenizer.tokens[token]
    if "▁" in piece:  # SentencePiece's space, which decoding drops at the start of a text
        return piece.replace("▁", " ")
    return tokenizer.decode([token]) or piece


def write_rollouts(
    path: epath.Path,
    records: Sequence[dict],
    tokenizer: Tokenizer,
    score: Callable[[Sequence[dict]], list[np.ndarray]],
) -> None:
    """Writes responses with log π_T, log π_ref and the trained log π_θ, in nats.

    Spread evenly over the cache, so that they are a fair sample of it whatever its order.

    Args:
      path: the file.
      records: of the cache.
      tokenizer: the run's.
      score: gives log π_θ of every response token of some records.
    """
    count = min(ROLLOUTS, len(records))
    chosen = [records[i * len(records) // count] for i in range(count)]

    def texts(tokens: np.ndarray) -> list[str]:
        return [token_text(tokenizer, int(token)) for token in tokens]

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
        for record, student in zip(chosen, score(chosen), strict=True)
    ]
    if processes.is_main():
        write_atomically(path, "".join(json.dumps(line) + "\n" for line in lines))
