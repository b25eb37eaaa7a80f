"""The task, the tokenizer, packing and step-indexed batches."""

import dataclasses
import time

import jax
import numpy as np
import pytest
import sentencepiece
from helpers.models import TIED, random_records

from lopd.config.settings import TaskSettings
from lopd.data.batches import (
    micro_batches,
    put_batch,
    record_length,
    record_lengths,
    repeated_shares,
    step_batches,
)
from lopd.data.layout import Batch, Layout, abstract_batch
from lopd.data.packing import TokenField, assign_rows, pack
from lopd.data.tokenizers import load_tokenizer
from lopd.errors import UserError
from lopd.machine import devices
from lopd.tasks import Problem, Verdict, tiny_tokenizer
from lopd.tasks.addition import SPLITS, Addition
from lopd.tasks.prompts import PromptTask


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
    answer, worked = task.answer_text(problem), problem.response
    assert int(left) + int(right) == int(answer)
    assert task.grade(problem, worked).correct
    assert not task.grade(problem, worked.replace(f"so {answer}", "so 7")).correct
    assert not task.grade(problem, worked + " so 7.").correct
    assert not task.grade(problem, "").correct
    # 357 + 846, worked by hand.
    known = task.problem((357 - 100) * 900 + 846 - 100)
    assert known.response == "7+6=13, 5+4+1=10, 3+8+1=12, so 1203."
    other = task.problem(known.problem_id, 1.0)
    assert other.response == "6+7=13, 1+4+5=10, 1+8+3=12, so 1203."
    assert other.prompt == known.prompt and task.grade(known, other.response).correct


def test_worked_answers_are_those_of_the_teachers_split_made_when_read():
    task = Addition(2)
    answers = task.worked_answers(30, 5, 1.0)
    ids = task.split_ids("teacher", 30, 5)
    assert len(answers) == 30 and [a.problem_id for a in answers] == ids.tolist()
    assert answers[7] == task.problem(int(ids[7]), 1.0) != task.problem(int(ids[7]))
    assert len(task.worked_answers(None, 5, 0.0)) == len(task.split_ids("teacher", None, 5)) == 4050
    np.testing.assert_array_equal(task.split_ids("teacher", None, 5)[:30], ids)


class Unreadable:
    """A reference that only its grader may touch."""

    def _refuse(self, *_):
        raise AssertionError("the reference was read")

    __getattribute__ = __str__ = __repr__ = __eq__ = __hash__ = __bool__ = __len__ = _refuse


def test_only_the_grader_reads_a_reference():
    """Prompts, tokens and another problem's answer go without it."""
    opaque = Problem(3, ({"role": "user", "content": "What is 10+11?\n"},), reference=Unreadable())
    task, tokenizer = Addition(2), load_tokenizer("tiny")
    assert opaque.prompt == "What is 10+11?\n"
    assert tokenizer.decode(task.encode(opaque, tokenizer)) == opaque.prompt
    seen = []

    def grade(reference, response):
        seen.append((reference is opaque.reference, response))
        return Verdict(True, "x")

    settings = TaskSettings(name="anything")
    assert PromptTask("anything", settings, grade).grade(opaque, "text") == Verdict(True, "x")
    assert seen == [(True, "text")]


def test_too_many_problems_is_one_clear_error():
    with pytest.raises(UserError, match="which holds"):
        Addition(1).split_ids("test", 100, 0)


def test_tokenizer_round_trip_and_identity():
    tokenizer = load_tokenizer("tiny")
    for problem in Addition(3).problems("opd", 50, seed=1):
        for text in (problem.prompt, problem.response):
            ids = tokenizer.encode(text)
            assert tokenizer.decode(ids) == text
            assert max(ids) < tokenizer.vocab_size and 2 not in ids  # nothing unknown
    assert tokenizer.end_id == 1 and len(tokenizer.fingerprint) == 16


def test_the_bundled_tokenizer_is_the_one_that_its_script_makes():
    """Piece by piece: the file also names the version that has written it."""
    made = sentencepiece.SentencePieceProcessor(model_proto=tiny_tokenizer.train())
    assert made.id_to_piece([*range(made.vocab_size())]) == load_tokenizer("tiny").tokens


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
    layout = Layout(row_length=8, rows_per_micro=3, reduction="sample_mean")
    dataset = step_batches(records, layout, seed=7, batch_size=4)

    def ids(step, ds=dataset):
        batch = ds[step]
        assert batch.tokens.shape == (2, 3, 8)
        return sorted(batch.tokens[batch.mask & (batch.positions == 0)].tolist())

    first_pass = [i for step in range(5) for i in ids(step)]  # two passes, one shared batch
    assert sorted(first_pass) == sorted([*range(10)] * 2)
    again = step_batches(records, layout, seed=7, batch_size=4)
    assert [ids(s, again) for s in (3, 1)] == [ids(3), ids(1)]  # any order of reading
    other = step_batches(records, layout, seed=8, batch_size=4)
    assert [ids(s) for s in range(3)] != [ids(s, other) for s in range(3)]


def test_unused_micro_batches_are_padding():
    records = random_records(TIED, [(1, 1)] * 8)
    batch = micro_batches(records, Layout(16, 2, "token_sum"))
    assert batch.tokens.shape == (4, 2, 16) and batch.num_micro == 1
    assert batch.most_responses == 8 and batch.response_stats.shape == (4, 2, 6)
    assert not batch.segment_ids[1:].any() and batch.weights.sum() == pytest.approx(1)


def test_processes_read_only_their_rows_and_make_the_same_batch():
    """Two and four processes of one batch, against one that makes it all."""
    lengths = np.random.default_rng(1).integers(1, 20, (30, 2)).tolist()
    records = random_records(TIED, lengths, teacher_logprobs=None)
    read = []

    class Source(list):
        def __getitem__(self, index):
            read.append(index)
            return list.__getitem__(self, index)

    layout = Layout(48, 4, "token_mean", ("teacher_logprobs",))
    options = dict(seed=3, batch_size=12)
    whole = step_batches(records, layout, **options)
    known = np.array([record_length(r) for r in records], np.int32)
    np.testing.assert_array_equal(record_lengths(records), known)
    for rows_of in ([[0, 1], [2, 3]], [[0], [1], [2], [3]], [[0, 2], [1, 3]]):
        for step in (0, 4):
            parts = []
            read.clear()
            for rows in rows_of:
                own = dataclasses.replace(layout, rows=tuple(rows))
                batches = step_batches(Source(records), own, **options)
                part = dataclasses.replace(batches, lengths=known)
                parts.append((np.array(rows), part[step]))
            assert sorted(read) == sorted(whole.indices[step].tolist())  # each record once
            for rows, part in parts:
                mine = jax.tree.map(lambda x, rows=rows: x[:, rows], whole[step].stacked)
                jax.tree.map(np.testing.assert_array_equal, part.stacked, mine)
                assert part.num_micro == whole[step].num_micro


def test_micro_batch_size_changes_no_row():
    records = random_records(TIED, np.random.default_rng(1).integers(1, 20, (24, 2)).tolist())
    rows = []
    for size in (2, 4, 8):
        batch = step_batches(records, Layout(48, size, "token_mean"), seed=3, batch_size=8)[2]
        rows.append(jax.tree.map(lambda x: x.reshape(8, *x.shape[2:]), batch.stacked))
    for other in rows[1:]:
        jax.tree.map(np.testing.assert_array_equal, other, rows[0])


FIELDS = ("teacher_logprobs", TokenField("ids", 3, np.int32))


def field_records(count):
    lengths = np.random.default_rng(1).integers(1, 20, (count, 2)).tolist()
    records = random_records(TIED, lengths, teacher_logprobs=None)
    for record in records:
        record["ids"] = np.arange(4 * len(record["response_tokens"]), dtype=np.int32).reshape(-1, 4)
    return records


def test_a_batch_holds_what_losses_read_under_its_name_and_nothing_else():
    batch = micro_batches(field_records(6), Layout(48, 2, "token_mean", FIELDS))
    assert batch.fields.keys() == {"teacher_logprobs", "ids"}
    assert batch.fields["ids"].shape == (3, 2, 48, 3)
    assert (batch.fields["teacher_logprobs"][~batch.mask] == 0).all()
    second = batch.micro(1)
    assert not hasattr(second, "num_micro") and second.tokens.shape == (2, 48)
    np.testing.assert_array_equal(second.fields["ids"], batch.fields["ids"][1])
    np.testing.assert_array_equal(second.weights, batch.weights[1])
    # A tree of arrays: it passes through jit as what it is.
    traced = jax.jit(lambda b: b)(batch)
    assert isinstance(traced, Batch)
    jax.tree.map(np.testing.assert_array_equal, traced, batch)


def test_the_abstract_batch_is_the_batch_without_its_numbers():
    mesh = devices.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    layout = Layout(48, 4, "token_mean", FIELDS)
    batch = put_batch(micro_batches(field_records(8), layout.on(mesh)), mesh, 4)
    expected = abstract_batch(layout, 2, mesh)
    assert jax.tree.structure(batch) == jax.tree.structure(expected)
    for found, shape in zip(jax.tree.leaves(batch), jax.tree.leaves(expected), strict=True):
        assert (found.shape, found.dtype) == (shape.shape, shape.dtype)
        if found.ndim:
            assert found.sharding == shape.sharding


def test_layouts_are_values():
    """Equal ones are equal, also for a process's rows; what is not a layout's is refused."""
    mesh = devices.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    layout = Layout(48, 4, "token_mean")
    assert layout.own_rows == (0, 1, 2, 3) == layout.on(mesh).rows
    assert layout.on(mesh) == layout.on(mesh) != layout == Layout(48, 4, "token_mean")
    assert hash(layout) == hash(Layout(48, 4, "token_mean"))
    with pytest.raises(dataclasses.FrozenInstanceError):
        layout.row_length = 3


def test_repeated_shares():
    rng = np.random.default_rng(0)
    fresh = rng.integers(0, 50_000, 500).astype(np.int32)
    loop = np.tile(fresh[:10], 50)
    grams = [tuple(loop[i : i + 8]) for i in range(493)]
    expected = 1 - len(set(grams)) / 493
    assert expected > 0.9
    # Neighbours do not count: the 8-grams of `loop[:7]` and across borders are no one's.
    responses = [fresh, loop, loop[:7], loop[:8], fresh[:1], loop, fresh[:7]]
    assert repeated_shares(responses) == pytest.approx([0, expected, 0, 0, 0, expected, 0])
    assert repeated_shares([fresh[:3]]) == [0]


def test_large_batches_pack_in_no_time():
    """Best fit of 20,000 sequences: a quadratic search would take minutes."""
    lengths = np.random.default_rng(0).integers(50, 4096, 20_000).tolist()
    start = time.process_time()
    assign_rows(lengths, 4096)
    assert time.process_time() - start < 2
