"""Lightning OPD 2.0's baseline, against an independent reckoning with dictionaries."""

import collections

import numpy as np
import pytest

from lopd.errors import UserError
from lopd.objectives import style_baseline

FOLDS, VOCAB = 5, 12


def make_records(prompts=40, samples=2, seed=0, difference=None) -> list[dict]:
    """Random records; d is `difference(ids, noise)`, or noise of 1 nat."""
    rng = np.random.default_rng(seed)
    records = []
    for prompt in range(prompts):
        for sample in range(samples):
            length = int(rng.integers(1, 40))
            ids = rng.integers(0, VOCAB, length).astype(np.int32)
            ref = -rng.exponential(0.8, length).astype(np.float32)
            d = rng.normal(size=length) if difference is None else difference(ids)
            records.append(
                {
                    "prompt_id": prompt * 7 - 3,
                    "sample_id": sample,
                    "response_tokens": ids,
                    "ref_logprobs": ref,
                    "teacher_logprobs": (ref + d).astype(np.float32),
                }
            )
    return records


def by_hand(records, record) -> list[float]:
    """b̂ of one record from the records of other folds, one token at a time."""
    fold = lambda r: style_baseline._fold(r, FOLDS)  # noqa: E731
    others = [r for r in records if fold(r) != fold(record)]
    tables = collections.defaultdict(lambda: [0.0, 0.0])
    length = sum(len(r["response_tokens"]) for r in others) / len(others)
    total = 0.0

    def keys(r, t):
        position = 0
        while 2 ** (position + 1) - 1 <= t:
            position += 1
        surprisal = sum(-float(r["ref_logprobs"][t]) >= e for e in style_baseline.SURPRISAL_EDGES)
        return [("token", int(r["response_tokens"][t])), ("cell", position, surprisal)]

    for r in others:
        n = len(r["response_tokens"])
        for t in range(n):
            d = float(r["teacher_logprobs"][t]) - float(r["ref_logprobs"][t])
            total += d / n / len(others)
            for key in keys(r, t):
                tables[key][0] += d / n
                tables[key][1] += 1 / n

    def mean(key):
        value, weight = tables[key]
        prior = style_baseline.PRIOR_TOKENS
        return (value * length + prior * total) / (weight * length + prior)

    return [
        sum(mean(key) for key in keys(record, t)) / 2 for t in range(len(record["response_tokens"]))
    ]


def test_baseline_equals_the_reckoning_by_hand():
    records = make_records()
    fitted = style_baseline.fit_baseline(iter(records), FOLDS, VOCAB)
    for record in records[::7]:
        np.testing.assert_allclose(fitted.baseline(record), by_hand(records, record), atol=1e-12)


def test_a_baseline_never_uses_its_own_prompt():
    """Whatever the teacher says of any sample of a prompt, the prompt's b̂ stays, bit for bit."""
    records = make_records()
    before = style_baseline.fit_baseline(records, FOLDS, VOCAB)
    changed = [
        {**r, "teacher_logprobs": r["teacher_logprobs"] - 3} if r["prompt_id"] == 4 else r
        for r in records
    ]
    after = style_baseline.fit_baseline(changed, FOLDS, VOCAB)
    own, other = (
        [r for r in records if (r["prompt_id"] == 4) == is_own] for is_own in (True, False)
    )
    assert len(own) == 2
    for record in own:
        np.testing.assert_array_equal(before.baseline(record), after.baseline(record))
    moved = [np.abs(before.baseline(r) - after.baseline(r)).max() for r in other]
    assert max(moved) > 1e-3  # those of other folds do move


def test_style_is_taken_out():
    """A constant offset goes whole; one per token id by the half that its table stands for."""
    constant = make_records(difference=lambda ids: np.full(len(ids), -0.7))
    fitted = style_baseline.fit_baseline(constant, FOLDS, VOCAB)
    for record in constant[:10]:
        left = fitted.residualise(record)["target_logprobs"] - record["ref_logprobs"]
        np.testing.assert_allclose(left, 0, atol=1e-6)
    offsets = np.random.default_rng(1).normal(size=VOCAB)
    styled = make_records(prompts=3000, difference=lambda ids: offsets[ids])
    fitted = style_baseline.fit_baseline(styled, FOLDS, VOCAB)
    left = np.concatenate([
        fitted.residualise(r)["target_logprobs"].astype(np.float64) - r["ref_logprobs"]
        for r in styled
    ])  # fmt: skip
    ids = np.concatenate([r["response_tokens"] for r in styled])
    found = np.array([left[ids == v].mean() for v in range(VOCAB)])
    np.testing.assert_allclose(found, (offsets - offsets.mean()) / 2, atol=0.05)


def test_samples_of_a_prompt_share_a_fold_and_all_folds_are_used():
    records = make_records()
    folds = {(r["prompt_id"], style_baseline._fold(r, FOLDS)) for r in records}
    assert len(folds) == 40 and {fold for _, fold in folds} == {*range(FOLDS)}


def test_one_prompt_is_one_clear_error():
    with pytest.raises(UserError, match="residual_folds=5"):
        style_baseline.fit_baseline(make_records(prompts=1), FOLDS, VOCAB)
