"""What is counted of every shard and reported of the cache: lengths, the sampler's and the scorer's
agreement, and how consistent the teacher looks.

Teacher consistency, as far as a cache can tell. π_ref was fine-tuned on some teacher's answers. If
that was the teacher that scores, π_ref's own responses look likely to it: the mean of log π_T −
log π_ref is a little below zero (at temperature 1 it is minus the KL divergence of π_ref from π_T,
which imitation has made small), and hardly any token is next to impossible. Another teacher finds
turns of phrase, formats and end tokens, which π_ref has learnt from the first, unlikely again and
again, mostly at certain positions. This is a hint and no proof: an unfinished SFT widens the gap as
well, related teachers (of one family, or one template) hardly differ, and a lower sampling
temperature raises the mean. Two teachers of the tiny run, trained alike from different seeds,
cannot be told apart on one cache: −0.182 nats and 0.05 % unlikely for the one that wrote the SFT
data, −0.180 nats and 0.01 % for the other. Compare with a cache that is known to be consistent, not
with a constant.
"""

from collections.abc import Mapping, Sequence

import numpy as np

FAR = 1.0
"""|log π_T − log π_ref| above this, in nats, is a token that the teacher judges quite otherwise."""
UNLIKELY = -10.0
"""log π_T below this, in nats, is a token that the teacher would next to never choose."""

RESPONSES = {"responses", "tokens", "finished"}
"""The totals of `of_responses`."""
GAPS = ("gap_sum", "gap_max")
"""The totals of `of_gaps`, which records alone do not give: the sampler's scores are not kept."""


def of_responses(records: Sequence[Mapping]) -> dict:
    """Totals that sampled responses have."""
    return {
        "responses": len(records),
        "tokens": sum(len(r["response_tokens"]) for r in records),
        "finished": sum(bool(r["finished"]) for r in records),
    }


def of_gaps(sampled: Sequence[np.ndarray], scored: Sequence[np.ndarray]) -> dict:
    """Totals of |sampler − scorer|: of π_ref's log-probabilities by decoding and by training."""
    gaps = np.abs(np.concatenate(sampled) - np.concatenate(scored))
    return {"gap_sum": float(gaps.sum(dtype=np.float64)), "gap_max": float(gaps.max())}


def of_scores(records: Sequence[Mapping]) -> dict:
    """Totals of the teacher's scores beside π_ref's."""
    teacher = np.concatenate([r["teacher_logprobs"] for r in records])
    ratio = teacher - np.concatenate([r["ref_logprobs"] for r in records])
    return {
        "log_ratio_sum": float(ratio.sum(dtype=np.float64)),
        "far": int((np.abs(ratio) > FAR).sum()),
        "unlikely": int((teacher < UNLIKELY).sum()),
    }


def add(shards: Sequence[Mapping]) -> dict:
    """The totals of a manifest's shards added up; the largest, for a name that ends in `max`."""
    result: dict = {}
    for shard in shards:
        for name, value in shard["totals"].items():
            combine = max if name.endswith("max") else lambda a, b: a + b
            result[name] = combine(result[name], value) if name in result else value
    return result


def report(totals: Mapping) -> dict:
    """The totals as a cache's outputs have them: counts, and means over response tokens."""
    tokens = totals["tokens"]
    outputs = {name: totals[name] for name in ("responses", "tokens", "finished")}
    if "gap_sum" in totals:
        gap = {"mean": totals["gap_sum"] / tokens, "max": totals["gap_max"]}
        outputs["sampler_scorer_gap"] = gap
    if "log_ratio_sum" in totals:
        outputs["teacher_consistency"] = {
            "mean_log_ratio": totals["log_ratio_sum"] / tokens,
            "far": totals["far"] / tokens,
            "unlikely": totals["unlikely"] / tokens,
        }
    return outputs
