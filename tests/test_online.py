"""Online OPD: the offline path in all but where a batch comes from."""

import itertools
import json

import jax
import numpy as np
import pytest
from helpers.tiny_run import interrupt, open_run, run, tiny_settings

from lopd import pipeline
from lopd.artefacts.artefact import Artefact
from lopd.cache.reader import Records
from lopd.data.batches import micro_batches, put_batch, step_batches
from lopd.errors import UserError
from lopd.machine import processes, shutdown
from lopd.rollouts.scoring import score_responses
from lopd.stages import online, training
from lopd.stages.objective import batch_contents, make_objective
from lopd.stages.run import Run
from lopd.stages.weights import load_params
from lopd.training.step import batch_gradients

SMALL = {
    "precompute__prompts": 20,
    "opd__steps": 8,
    "opd__batch_size": 8,
    "opd__warmup_steps": 0,
    "opd__learning_rate": 3e-3,
    "runtime__checkpoint_every": 3,
    "runtime__drift_every": 4,
}


pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def models(tiny_models):
    return tiny_models


def small_run(models, workdir, **changes) -> Run:
    given = {"teacher__checkpoint": f"{models}/teacher", "sft__checkpoint": f"{models}/sft"}
    return open_run(workdir, tiny_settings(**given, **SMALL, **changes))


@pytest.fixture(scope="module")
def whole(models, tmp_path_factory):
    """An uninterrupted run."""
    return run(models, tmp_path_factory.mktemp("whole"), "online", **SMALL)


@pytest.fixture(scope="module")
def batches(models, tmp_path_factory):
    """(run, its online batches, π_ref)."""
    opened = small_run(models, tmp_path_factory.mktemp("batches"))
    params = load_params(opened, "sft")
    return opened, online.OnlineBatches(opened, params), params


def ids(records) -> list[tuple[int, int]]:
    return [(int(r["prompt_id"]), int(r["sample_id"])) for r in records]


def test_a_step_reads_the_prompts_of_the_offline_step(batches, models):
    """In the order of a cache that holds request i as its record i; also past the first pass."""
    opened, source, params = batches
    cache = run(models, opened.workdir, "precompute", **SMALL)
    offline = training.make_batches(opened, Records(cache), opened.settings.opd, "opd")
    for step in range(4):  # 20 prompts are two and a half batches
        assert ids(vars(r) for r in source.requests(step)) == ids(offline.records(step))
    assert ids(source.rollouts(3, params)[0]) == ids(offline.records(3))


def test_rollouts_are_drawn_afresh_at_every_step_and_scored(batches, models):
    opened, source, params = batches
    first, costs = source.rollouts(0, params)
    again, _ = source.rollouts(0, params)
    prompts = {key: r["response_tokens"].tolist() for key, r in zip(ids(first), first, strict=True)}
    assert [r["response_tokens"].tolist() for r in again] == [*prompts.values()]
    later = [r for step in (2, 3) for r in source.rollouts(step, params)[0]]
    both = [r for r in later if ids([r])[0] in prompts]
    assert both and any(r["response_tokens"].tolist() != prompts[ids([r])[0]] for r in both)
    limits = {"mesh": opened.mesh, "row_length": 128, "rows_per_micro": 8}
    for field, which, weights in (
        ("ref_logprobs", "student", params),
        ("teacher_logprobs", "teacher", load_params(opened, "teacher")),
    ):
        expected = score_responses(opened.model(which), weights, first, **limits)
        for record, scores in zip(first, expected, strict=True):
            np.testing.assert_allclose(record[field], scores, atol=1e-5)
    tokens = sum(len(r["response_tokens"]) for r in first)
    assert costs["sampling"]["tokens"] == costs["scoring"]["tokens"] == tokens


def test_first_gradient_is_the_offline_one(batches):
    """The rollouts of step 1 as a cache: the same loss and gradient, bit for bit."""
    opened, source, params = batches
    model, objective = opened.model("student"), make_objective(opened.settings.opd)
    local, _ = source.reader(0, 1, lambda batch: batch)(0, params)
    cache = source.records(0)
    rows = training.batch_rows(
        opened, opened.settings.opd, **batch_contents(opened.settings.opd, opened.tokenizer, 0, "")
    )
    offline = step_batches(cache, rows, seed=0, batch_size=len(cache))
    step = offline.indices[0]
    assert sorted(step) == [*range(8)] and list(step) != sorted(step)  # shuffled: put it back
    offline = micro_batches(offline.source, offline.layout)
    gradient = jax.jit(lambda p, b: batch_gradients(model, objective, p, b))
    found = [gradient(params, put_batch(b, opened.mesh, 8)) for b in (local, offline)]
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_array_equal(a, b)
    loss = jax.device_get(found[0][1])
    assert loss["importance_weight"] == pytest.approx(1, abs=1e-5)  # nothing has moved yet
    assert loss["loss"] > 0 and float(jax.tree.leaves(found[0][0])[0].std()) > 0


def test_student_nears_the_teacher_and_costs_are_told(whole):
    rows = [json.loads(x) for x in (whole.path / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [*range(1, 9)]
    assert np.mean([r["kl_teacher"] for r in rows[-2:]]) < 0.7 * rows[0]["kl_teacher"]
    for r in rows:  # of π_θ that sampled, not of π_ref
        assert r["importance_weight"] == pytest.approx(1, abs=1e-4) and r["data_wait"] <= 1
    costs = whole.outputs["costs"]
    assert {*costs} == {"sampling", "scoring", "training"}
    tokens = sum(r["tokens"] for r in rows)
    assert all(c["tokens"] == tokens and c["seconds"] > 0 for c in costs.values())
    assert costs["training"]["flops"] == pytest.approx(3 * costs["sampling"]["flops"])
    assert sum(c["seconds"] for c in costs.values()) == pytest.approx(
        sum(r["seconds"] for r in rows)
    )


def same_run(found: Artefact, expected: Artefact) -> None:
    assert found.outputs["fingerprint"] == expected.outputs["fingerprint"]
    rows = [
        [json.loads(x) for x in (a.path / "metrics.jsonl").read_text().splitlines()]
        for a in (found, expected)
    ]
    for a, b in zip(*rows, strict=True):
        assert a["loss"] == b["loss"] and a["tokens"] == b["tokens"], a["step"]


def test_killed_and_continued_is_bit_identical(models, whole, tmp_path):
    interrupt(tmp_path, models, "online", "online/checkpoints/6", **SMALL)
    assert (tmp_path / "online" / "checkpoints" / "3").exists()
    same_run(run(models, tmp_path, "online", **SMALL), whole)


def test_stopped_while_it_samples_and_continued_is_bit_identical(
    models, whole, tmp_path, monkeypatch
):
    asked = itertools.count(1)

    def check(self):  # asked at each decode call, of which a step has at most six
        if next(asked) == 12:
            raise shutdown.Stopped

    with monkeypatch.context() as patch, pytest.raises(shutdown.Stopped):
        patch.setattr(processes.StopVote, "check", check)
        run(models, tmp_path, "online", **SMALL)
    rows = (tmp_path / "online" / "metrics.jsonl").read_text().splitlines()
    assert 1 <= len(rows) < 8
    assert (tmp_path / "online" / "checkpoints" / str(len(rows))).exists()  # the last whole step
    same_run(run(models, tmp_path, "online", **SMALL), whole)


def test_eval_and_report_know_it(models, whole):
    found = run(models, whole.path.parent, "eval", **SMALL, eval__prompts=4)
    assert {"sft", "online"} <= {*found.outputs["models"]}
    assert "Online OPD" in (whole.path.parent / "report.html").read_text()


def test_what_online_needs_is_asked_for_before_any_work(models, tmp_path):
    settings = tiny_settings(sft__checkpoint=f"{models}/sft", **SMALL)
    with pytest.raises(UserError, match="the teacher artefact"):
        pipeline.run(settings, str(tmp_path), ("online",))
    with pytest.raises(UserError, match="--worker splits"):
        run(models, tmp_path, "online", worker=(0, 2), **SMALL)
    long = {"precompute__response_length": 50_000, "precompute__row_length": 60_000}
    with pytest.raises(UserError, match="max_position_embeddings"):
        run(models, tmp_path, "online", **SMALL, **long, opd__row_length=60_000)
    assert not (tmp_path / "online").exists()
