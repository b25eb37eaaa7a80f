"""The task, the tokenizer, packing and step-indexed batches."""

import numpy as np
import pytest
from conftest import TIED, random_records

from lopd.data.batches import micro_batches, step_batches
from lopd.data.packing import assign_rows, pack
from lopd.data.tokenizers import load_tokenizer
from lopd.errors import UserError
from lopd.tasks.addition import SPLITS, Addition


def test_splits_are_disjoint_whatever_the_seed():
    task = Addition(2)
    ids = {
        split: set(np.concatenate([task.split_ids(split, 200, seed) for seed in range(5)]).tolist())
        for split in SPLITS
    }
    for a in SPLITS:
        for b in SPLITS:
            assert a == b or not ids[a] & ids[b]
    assert len(set(task.split_ids("test", 200, 0).tolist())) == 200


def test_problem_and_grader():
    task = Addition(3)
    problem = next(task.problems("sft", 1, seed=0))
    left, right = problem.prompt.removeprefix("What is ").removesuffix("?\n").split("+")
    assert int(left) + int(right) == int(problem.answer)
    assert task.grade(problem, problem.solution).correct
    assert not task.grade(problem, problem.solution.replace(f"so {problem.answer}", "so 7")).correct
    assert not task.grade(problem, problem.solution + " so 7.").correct
    assert not task.grade(problem, "").correct
    # 357 + 846, worked by hand.
    known = task.problem((357 - 100) * 900 + 846 - 100)
    assert known.solution == "7+6=13, 5+4+1=10, 3+8+1=12, so 1203."


def test_too_many_problems_is_one_clear_error():
    with pytest.raises(UserError, match="which holds"):
        Addition(1).split_ids("test", 100, 0)


def test_tokenizer_round_trip_and_identity():
    tokenizer = load_tokenizer("tiny")
    for problem in Addition(3).problems("opd", 50, seed=1):
        for text in (problem.prompt, problem.solution):
            ids = tokenizer.encode(text)
            assert tokenizer.decode(ids) == text
            assert max(ids) < tokenizer.vocab_size and 2 not in ids  # nothing unknown
    assert tokenizer.end_id == 1 and len(tokenizer.fingerprint) == 16


def test_missing_and_damaged_tokenizer(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load_tokenizer(str(tmp_path / "none.model"))
    (tmp_path / "bad.model").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="not a SentencePiece model"):
        load_tokenizer(str(tmp_path / "bad.model"))


def test_best_fit_is_deterministic_and_full():
    # Log-normal lengths cut at the cap, as reasoning responses have them.
    drawn = np.random.default_rng(0).lognormal(7.2, 0.6, 500)
    lengths = np.clip(drawn, 50, 4096).astype(int).tolist()
    places = assign_rows(lengths, 4096)
    assert places == assign_rows(lengths, 4096)
    used = np.zeros((max(r for r, _ in places) + 1, 4096), int)
    for n, (row, offset) in zip(lengths, places, strict=True):
        used[row, offset : offset + n] += 1
    assert used.max() == 1 and used.mean() > 0.97
    with pytest.raises(ValueError, match="rows hold 10"):
        assign_rows([3, 11], 10)


def test_pack_puts_every_field_beside_its_target():
    records = random_records(TIED, [(3, 5), (1, 2), (4, 9)], teacher_logprobs=None)
    arrays, spans = pack(records, 16, ["teacher_logprobs"])
    for record, span in zip(records, spans, strict=True):
        np.testing.assert_array_equal(span.read(arrays["targets"]), record["response_tokens"])
        np.testing.assert_array_equal(
            span.read(arrays["teacher_logprobs"]), record["teacher_logprobs"]
        )
        assert span.read(arrays["mask"]).all()
        start = span.start - len(record["prompt_tokens"]) + 1
        assert arrays["positions"][span.row, start] == 0
        np.testing.assert_array_equal(
            arrays["tokens"][span.row, start : span.start + 1], record["prompt_tokens"]
        )
    assert arrays["mask"].sum() == 5 + 2 + 9
    assert (arrays["teacher_logprobs"][~arrays["mask"]] == 0).all()
    assert not arrays["mask"][arrays["segment_ids"] == 0].any()


def test_batches_have_one_shape_and_hold_every_record_each_pass():
    records = [
        {"prompt_tokens": np.array([i]), "response_tokens": np.array([1, 2])} for i in range(10)
    ]
    options = dict(batch_size=4, row_length=8, rows_per_micro=3, reduction="sample_mean")
    dataset = step_batches(records, seed=7, **options)

    def ids(step, ds=dataset):
        batch = ds[step]
        assert batch["tokens"].shape == (2, 3, 8)
        return sorted(batch["tokens"][batch["mask"] & (batch["positions"] == 0)].tolist())

    first_pass = [i for step in range(5) for i in ids(step)]  # two passes, one shared batch
    assert sorted(first_pass) == sorted([*range(10)] * 2)
    again = step_batches(records, seed=7, **options)
    assert [ids(s, again) for s in (3, 1)] == [ids(3), ids(1)]  # any order of reading
    other = step_batches(records, seed=8, **options)
    assert [ids(s) for s in range(3)] != [ids(s, other) for s in range(3)]


def test_unused_micro_batches_are_padding():
    records = random_records(TIED, [(1, 1)] * 8)
    batch = micro_batches(records, row_length=16, rows_per_micro=2, reduction="token_sum")
    assert batch["tokens"].shape == (4, 2, 16) and batch["num_micro"] == 1
    assert not batch["segment_ids"][1:].any() and batch["weights"].sum() == pytest.approx(1)
