"""A cache in figures: lengths, log-probabilities, and how far teacher and π_ref are apart."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from lopd.artefacts.artefact import Artefact
from lopd.cache import totals
from lopd.cache.reader import Records

BARS = "▁▂▃▄▅▆▇█"
"""Block characters of `spark`, from low to high."""
_BINS = 24
_QUANTILES = (1, 5, 25, 50, 75, 95, 99)


@dataclasses.dataclass(frozen=True)
class Arrays:
    """The records' values end to end: one entry per response, or per response token."""

    lengths: np.ndarray
    """Response tokens of each response."""
    prompt_lengths: np.ndarray
    """Prompt tokens of each."""
    finished: np.ndarray
    """Whether it ended by itself."""
    positions: np.ndarray
    """Of every token in its response, from 0."""
    tokens: Mapping[str, np.ndarray]
    """Log-probabilities by field, as far as the records have them."""

    @property
    def log_ratio(self) -> np.ndarray:
        """log π_T − log π_ref of every response token."""
        return self.tokens["teacher_logprobs"] - self.tokens["ref_logprobs"]


def collect(records: Iterable[Mapping]) -> Arrays:
    """Reads all records into arrays."""
    records = list(records)
    lengths = np.array([len(r["response_tokens"]) for r in records])
    names = [name for name in records[0] if name.endswith("_logprobs") and "topk" not in name]
    return Arrays(
        lengths=lengths,
        prompt_lengths=np.array([len(r["prompt_tokens"]) for r in records]),
        finished=np.array([r["finished"] for r in records]),
        positions=np.concatenate([np.arange(n) for n in lengths]),
        tokens={name: np.concatenate([r[name] for r in records]) for name in names},
    )


def by_position(arrays: Arrays, bins: int = _BINS) -> list[dict]:
    """Mean log π_T − log π_ref and the share that is far, by position in the response.

    Bins are equally long; each says from which position to which (exclusive) and how many tokens
    it holds.
    """
    longest = int(arrays.lengths.max())
    width = -(-longest // min(bins, longest))
    place, ratio = arrays.positions // width, arrays.log_ratio.astype(np.float64)
    counts = np.bincount(place)
    means = np.bincount(place, ratio) / counts
    far = np.bincount(place, np.abs(ratio) > totals.FAR) / counts
    return [
        {"from": i * width, "to": (i + 1) * width, "tokens": int(n), "mean": float(m), "far": f}
        for i, (n, m, f) in enumerate(zip(counts, means, far.tolist(), strict=True))
    ]


def spark(values: Sequence[float]) -> str:
    """A line of bars between the smallest value and the largest."""
    low, high = min(values), max(values)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0
    return "".join(BARS[round((v - low) * scale)] for v in values)


def _quantiles(values: np.ndarray) -> str:
    return "  ".join(
        f"p{q} {x:.4g}" for q, x in zip(_QUANTILES, np.percentile(values, _QUANTILES), strict=True)
    )


def _ratio_lines(arrays: Arrays) -> list[str]:
    ratio, teacher = arrays.log_ratio, arrays.tokens["teacher_logprobs"]
    # A handful of the longest responses would set the scale of the whole line.
    curve = [b for b in by_position(arrays) if b["tokens"] >= ratio.size / 1000]
    far = (np.abs(ratio) > totals.FAR).mean()
    step = -(-len(curve) // 8)
    lines = [
        f"log π_T − log π_ref  mean {ratio.mean():+.4f}  sd {ratio.std():.4f}",
        f"                     {_quantiles(ratio)}",
        f"  more than {totals.FAR:g} nat apart: {far:.2%} of tokens",
        f"  by position        mean {spark([b['mean'] for b in curve])}   "
        f"apart {spark([b['far'] for b in curve])}",
    ]
    lines += [
        f"    {b['from']:>6}–{b['to'] - 1:<6} {b['tokens']:>10,} tokens  mean {b['mean']:+.3f}  "
        f"apart {b['far']:.1%}"
        for b in curve[::step]
    ]
    return [
        *lines,
        f"teacher consistency  mean {ratio.mean():+.4f} nats per token; the teacher gives "
        f"{(teacher < totals.UNLIKELY).mean():.3%} of tokens less than e^{totals.UNLIKELY:g}",
        "  If the teacher wrote the SFT data, the mean is a little below 0 and the share near 0;",
        "  tokens it would never choose, again and again at some positions, speak against it. A",
        "  hint, no proof: compare with a cache that is known to be consistent.",
    ]


def _identity_lines(artefact: Artefact) -> list[str]:
    manifest, outputs = artefact.manifest, artefact.outputs
    settings = manifest.settings
    sampling = settings.get(manifest.stage, {})
    known = {k: v for k, v in sampling.items() if isinstance(v, int | float | str)}
    made = {k: v for k, v in outputs.items() if isinstance(v, str)}
    return [
        f"{artefact.path}: {manifest.stage}, {len(manifest.shards)} shards, "
        f"{sum(s['bytes'] for s in manifest.shards) / 2**20:,.1f} MiB",
        "identity             " + "  ".join(f"{k} {v}" for k, v in made.items()),
        "settings             " + "  ".join(f"{k} {v}" for k, v in known.items()),
    ]


def summarize(artefact: Artefact) -> str:
    """The summary as text.

    Raises:
      UserError: if the cache is damaged.
    """
    arrays = collect(Records(artefact))
    histogram = np.histogram(arrays.lengths, bins=_BINS)[0]
    lines = [
        *_identity_lines(artefact),
        f"responses            {len(arrays.lengths):,} of {arrays.lengths.sum():,} tokens; "
        f"prompts of {arrays.prompt_lengths.sum():,}",
        f"finished             {arrays.finished.mean():.2%}; cut at the cap: "
        f"{1 - arrays.finished.mean():.2%}",
        f"response length      mean {arrays.lengths.mean():.1f}  {_quantiles(arrays.lengths)}",
        f"                     {spark(histogram)}  {arrays.lengths.min()} to "
        f"{arrays.lengths.max()}",
    ]
    for name, values in arrays.tokens.items():
        lines.append(f"{name:<21}mean {values.mean():.4f}  {_quantiles(values)}")
    if gap := artefact.outputs.get("sampler_scorer_gap"):
        lines.append(f"|sampler − scorer|   mean {gap['mean']:.2g}  max {gap['max']:.2g} nats")
    if {"teacher_logprobs", "ref_logprobs"} <= arrays.tokens.keys():
        lines += _ratio_lines(arrays)
    return "\n".join(lines)


def _colour(text: str, advantage: float) -> str:
    """Text on red where the teacher finds it worse than π_ref does, on green where better."""
    depth = int(min(abs(advantage), 3) / 3 * 155)
    red, green = (depth + 40, 0) if advantage < 0 else (0, depth + 40)
    return f"\x1b[48;2;{red};{green};0m{text}\x1b[0m"


def show_record(record: Mapping, tokenizer, *, colour: bool) -> str:
    """A record as text: each response token with its advantage log π_T − log π_ref at π_ref.

    With `colour`, a token's background says it, and only advantages beyond one nat are written.
    """
    name = lambda i: tokenizer.decode([i]) or tokenizer.tokens[i]  # noqa: E731
    head = (
        f"prompt_id {record['prompt_id']}  sample_id {record['sample_id']}  "
        f"{len(record['prompt_tokens'])} + {len(record['response_tokens'])} tokens  "
        f"{'finished' if record['finished'] else 'cut'}"
    )
    parts = []
    advantages = None
    if "teacher_logprobs" in record:
        advantages = record["teacher_logprobs"] - record["ref_logprobs"]
    for t, token in enumerate(record["response_tokens"].tolist()):
        text = name(token)
        if advantages is not None:
            advantage = float(advantages[t])
            mark = f"⟨{advantage:+.2f}⟩"
            if colour:
                mark = mark if abs(advantage) > totals.FAR else ""
                text = _colour(text.replace("\n", "⏎"), advantage) + "\n" * text.count("\n")
            text += mark
        parts.append(text)
    prompt = "".join(name(i) for i in record["prompt_tokens"].tolist())
    return f"── {head}\n{prompt.rstrip()}\n→ {''.join(parts)}"
