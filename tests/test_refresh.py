"""Refresh: rounds of the cache begin when they should, and survive being killed."""

import json
import sys

import numpy as np
import pytest
from helpers.tiny_run import interrupt, run

from lopd.artefacts.artefact import Artefact
from lopd.cache import __main__ as cache_main
from lopd.cache.reader import Records
from lopd.errors import UserError

SMALL = {
    "precompute__prompts": 20,
    "opd__steps": 9,
    "opd__batch_size": 4,
    "opd__warmup_steps": 0,
    "opd__learning_rate": 3e-3,
    "runtime__checkpoint_every": 2,
    "runtime__drift_every": 2,
    "runtime__records_per_shard": 4,
}
EVERY = SMALL | {"opd__refresh_every": 3}


pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def models(tiny_models, tmp_path_factory):
    """Teacher and π_ref, with a cache and held-out responses beside them."""
    run(tiny_models, tiny_models, "precompute", "heldout", **SMALL)
    return tiny_models


def refreshed(models, workdir, **changes) -> Artefact:
    """OPD in a folder of its own, on the shared cache and held-out responses."""
    (workdir / "heldout").symlink_to(models / "heldout")
    return run(models, workdir, "opd", opd__cache=f"{models}/precompute", **changes)


@pytest.fixture(scope="module")
def whole(models, tmp_path_factory):
    """An uninterrupted run with a round every three steps."""
    return refreshed(models, tmp_path_factory.mktemp("whole"), **EVERY)


def rows(artefact: Artefact, name: str) -> list[dict]:
    return [json.loads(x) for x in (artefact.path / f"{name}.jsonl").read_text().splitlines()]


def ids(records) -> set[int]:
    return {int(r["prompt_id"]) for r in records}


def test_rounds_by_steps_are_caches_of_the_student_of_then(whole, models, monkeypatch, capsys):
    assert [entry["start"] for entry in whole.manifest.rounds] == [3, 6]
    first, student = Records(Artefact(models / "precompute")), set()
    for number, entry in enumerate(whole.manifest.rounds, start=1):
        folder = whole.path / "rounds" / f"{number:03}"
        for path in (folder, folder.with_name(f"{number:03}-heldout")):
            monkeypatch.setattr(sys, "argv", ["lopd.cache", "verify", str(path)])
            cache_main.main()
        assert capsys.readouterr().out.count("all right") == 2
        cache = Artefact(folder)
        assert entry["cache"] == cache.outputs["fingerprint"]
        student.add(cache.outputs["sft"])
        # Three steps of four responses: of 20 prompts no more than those are sampled.
        fresh = list(Records(cache))
        assert 8 <= len(fresh) <= 12 and ids(fresh) < ids(first)
        old = {int(r["prompt_id"]): r["response_tokens"].tolist() for r in first}
        assert any(old[int(r["prompt_id"])] != r["response_tokens"].tolist() for r in fresh)
    assert len(student) == 2 and Artefact(models / "sft").outputs["fingerprint"] not in student
    costs = whole.outputs["costs"]
    assert costs["sampling"]["tokens"] > 0 and {*costs} == {"sampling", "scoring", "training"}


def test_weights_are_those_against_the_student_that_sampled(whole):
    """Exactly 1 where a round begins, and E[w] = 1 within its interval all the time."""
    for row in rows(whole, "metrics"):
        is_first = row["step"] in (1, 4, 7)
        assert (abs(row["importance_weight"] - 1) < 1e-5) == is_first, row["step"]
    looks = rows(whole, "drift")
    assert [look["step"] for look in looks] == [2, 4, 6, 7, 8, 9]
    for look in looks:
        heldout = look["heldout"]
        if look["step"] in (4, 7):
            assert heldout["ess_fraction"] == pytest.approx(1, abs=1e-6)
            assert heldout["sequence_weight"] == pytest.approx(1, abs=1e-5)
        else:
            assert heldout["ess_fraction"] < 0.9999
    assert (
        np.mean([r["kl_teacher"] for r in rows(whole, "metrics")[-2:]])
        < 0.9 * (rows(whole, "metrics")[0]["kl_teacher"])
    )


def same_run(found: Artefact, expected: Artefact) -> None:
    assert found.outputs["fingerprint"] == expected.outputs["fingerprint"]
    assert found.manifest.rounds == expected.manifest.rounds
    assert rows(found, "drift") == rows(expected, "drift")
    losses = [[r["loss"] for r in rows(a, "metrics")] for a in (found, expected)]
    assert losses[0] == losses[1]


def test_killed_in_a_round_and_after_it_ends_bit_identical(models, whole, tmp_path):
    (tmp_path / "heldout").symlink_to(models / "heldout")
    given = {"opd__cache": f"{models}/precompute"}
    opd = tmp_path / "opd"
    one = opd / "rounds" / "001"
    interrupt(tmp_path, models, "opd", "opd/rounds/001/*record-00001-of-*", **given, **EVERY)
    assert not Artefact(one).complete and [r["start"] for r in Artefact(opd).manifest.rounds] == [3]
    interrupt(tmp_path, models, "opd", "opd/checkpoints/6", **given, **EVERY)
    assert Artefact(one).complete and not (opd / "checkpoints" / "6").exists()
    same_run(run(models, tmp_path, "opd", **given, **EVERY), whole)


def test_rounds_by_ess_begin_at_the_look_that_falls_below(models, tmp_path):
    below = {"opd__refresh_below": 0.97, "runtime__drift_every": 1}
    artefact = refreshed(models, tmp_path, **SMALL | below)
    looks = {r["step"]: r["heldout"]["ess_fraction"] for r in rows(artefact, "drift")}
    starts = [step for step, fraction in looks.items() if fraction < 0.97 and step < 9]
    assert starts and [r["start"] for r in artefact.manifest.rounds] == starts
    assert [r["ess_fraction"] for r in artefact.manifest.rounds] == [looks[s] for s in starts]
    assert all(looks[start + 1] == pytest.approx(1, abs=1e-6) for start in starts)
    with pytest.raises(UserError, match="drift_every: 1 → 2"):  # it decides, so it may not change
        opd = {"opd__cache": f"{models}/precompute", "runtime__drift_every": 2}
        run(models, tmp_path, "opd", **SMALL | below | opd)


def test_what_refresh_needs_is_asked_for_before_any_work(models, tmp_path):
    given = {"opd__cache": f"{models}/precompute"}
    with pytest.raises(UserError, match="the heldout artefact"):
        run(models, tmp_path, "opd", **SMALL, **given, opd__refresh_below=0.5)
    with pytest.raises(UserError, match="the teacher artefact"):
        run(models, tmp_path, "opd", **EVERY, **given, teacher__checkpoint=None)
    with pytest.raises(UserError, match=r"opd.refresh_below=1.5 must lie in"):
        run(models, tmp_path, "opd", **SMALL, **given, opd__refresh_below=1.5)
    assert not (tmp_path / "opd").exists()
