"""A miniature study from end to end, its sharing and resuming, and the maths of its tables."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import types

import numpy as np
import pytest
import scipy.stats
from helpers import small_study

from lopd.artefacts.artefact import Artefact
from lopd.config import read_settings
from lopd.errors import UserError
from lopd.machine.storage import absolute
from lopd.study import Arm, results, run, table
from lopd.study.store import Store, locked
from lopd.study.write import write


@pytest.fixture(scope="module")
def study():
    return small_study.get_study(read_settings(small_study.get_config()))


@pytest.fixture(scope="module")
def store(study, tmp_path_factory, one_device_mesh):
    """The store after arms sft and lightning with both seeds, and crossed with one."""
    store = Store(absolute(tmp_path_factory.mktemp("study")), one_device_mesh)
    run.run(study, store, run.check(study, store, ("sft", "lightning")), study.seeds)
    run.run(study, store, [study.arm("crossed")], study.seeds[:1])
    return store


def stages(store) -> list[str]:
    """The stage of every artefact."""
    return sorted(path.name.rpartition("-")[0] for path in (store.workdir / "artefacts").iterdir())


def manifests(store) -> dict:
    paths = (store.workdir / "artefacts").glob("*/manifest.json")
    return {path.parent.name: (path.read_bytes(), path.stat().mtime) for path in paths}


def command(workdir, *arguments) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    return subprocess.run(
        [sys.executable, "-m", "lopd.study", f"--config={small_study.__file__}",
         f"--workdir={workdir}", *arguments],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip


def test_arms_share_what_follows_from_the_same_settings_and_inputs(study, store):
    # Two seeds of one π_ref each, one teacher each of two, and a cache for each (seed, scorer).
    expected = {"teacher": 2, "sft_data": 2, "sft": 2, "precompute": 3, "heldout": 3, "opd": 3,
                "eval": 5}  # fmt: skip
    assert {stage: stages(store).count(stage) for stage in expected} == expected
    assert len(stages(store)) == sum(expected.values())
    lightning = run.finished(study, store, study.arm("lightning"), 1)
    crossed = run.finished(study, store, study.arm("crossed"), 1)
    assert lightning["sft"].path == crossed["sft"].path
    inputs = [found["precompute"].manifest.inputs for found in (lightning, crossed)]
    assert inputs[0]["sft"] == inputs[1]["sft"] and inputs[0]["teacher"] != inputs[1]["teacher"]
    assert crossed["precompute"].outputs["sft_teacher"] == inputs[0]["teacher"]


def test_a_second_run_does_nothing_and_an_unfinished_one_is_completed(study, store):
    before = manifests(store)
    arms = [study.arm("sft"), study.arm("lightning")]
    run.run(study, store, arms, study.seeds)
    assert manifests(store) == before
    removed = run.finished(study, store, study.arm("sft"), 2)["eval"].path
    removed.rmtree()
    assert run.finished(study, store, study.arm("sft"), 2) is None
    run.run(study, store, arms, study.seeds)
    after = manifests(store)
    assert after.keys() == before.keys()
    assert {name for name in after if after[name] != before[name]} == {removed.name}
    assert Artefact(removed).complete


def test_results_hold_every_run_and_are_written_by_several_processes(study, store):
    write(study, store, list(study.arms), study.seeds)
    results = json.loads((store.workdir / "results.json").read_text())["runs"]
    found = [(x["arm"], x["seed"]) for x in results]
    assert found == [("sft", 1), ("sft", 2), ("lightning", 1), ("lightning", 2), ("crossed", 1)]
    lightning = results[2]
    assert lightning["accuracy"].keys() == {"addition/greedy", "addition/sampled"}
    assert {"loss", "importance_weight"} <= lightning["final"].keys()
    assert {"ess_fraction", "importance_weight"} <= lightning["heldout"].keys()
    before = manifests(store)
    done = command(store.workdir, "--arms=sft,lightning", "--processes=2")
    assert done.returncode == 0, done.stderr
    assert manifests(store) == before
    text = (store.workdir / "results.json").read_text()
    assert json.loads(text)["runs"] == results[:4]
    page = (store.workdir / "report.html").read_text()
    assert page.count("<svg") == 2 and "lightning − sft" in page and "http://" not in page
    for name in ("core", "gap"):
        assert (store.workdir / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--arms=sft,lihgtning",), "no arm is called 'lihgtning'; there are sft, lightning"),
        (("--config.opd.tua=1",), "--config.opd.tua: there is no setting 'tua'"),
    ],
)
def test_bad_input_is_one_line(tmp_path, arguments, said):
    done = command(tmp_path, *arguments)
    assert done.returncode == 2
    assert said in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "artefacts").exists()


def test_adapters_may_begin_after_what_arms_share(study, tmp_path, one_device_mesh):
    low = Arm("low", {"student.lora.rank": 2})
    more = dataclasses.replace(study, arms=[*study.arms, low])
    assert run.check(more, Store(absolute(tmp_path), one_device_mesh), ("low",)) == [low]
    assert more.after_config(low, 1).student.lora.rank == 2
    assert more.start_config(low, 1).student.lora.rank is None


@pytest.mark.parametrize(
    ("arm", "said"),
    [
        (Arm("x", {"opd.tua": 1}), "arm 'x': there is no setting opd.tua"),
        (Arm("x", {"opd.tau": "one"}), "arm 'x': opd.tau='one' must be of type float"),
        (Arm("x", {"opd.tau": -1.0}), "arm 'x': opd.tau=-1.0 must be positive"),
        (Arm("x", {"sft.steps": 1}), "arm 'x': sft.steps is settled before the arms part"),
        (Arm("x", {"student.checkpoint": "y"}), "student.checkpoint is settled before the arms"),
        (Arm("x", {"student.lora.rank": -1}), "student.lora.rank=-1 must be positive"),
        (Arm("x", teacher="c"), "no teacher is called 'c'; there are plain, b"),
        (Arm("x", student="opq"), "student='opq' must be one of"),
        (Arm("sft"), "two arms are called 'sft'"),
    ],
)
def test_an_arm_that_cannot_be_made_is_refused_before_work(
    study, tmp_path, one_device_mesh, arm, said
):
    more = dataclasses.replace(study, arms=[*study.arms, arm])
    with pytest.raises(UserError) as error:
        run.check(more, Store(absolute(tmp_path), one_device_mesh), ("sft", arm.name))
    assert said in str(error.value)


def test_a_lock_ends_with_its_process(tmp_path):
    path = absolute(tmp_path / "lock")
    code = (
        "import sys, time; from lopd.machine.storage import absolute; from lopd.study.store import "
        "locked\nwith locked(absolute(sys.argv[1])):\n print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    with locked(path, wait=False) as taken:
        assert not taken
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with locked(path, wait=False) as taken:
        assert taken


def test_estimates_equal_scipys():
    rng = np.random.default_rng(0)
    first, second = rng.uniform(size=(2, 5))
    found = table.estimate(first)
    expected = scipy.stats.ttest_1samp(first, 0).confidence_interval(0.95)
    np.testing.assert_allclose([found.low, found.high], expected, rtol=1e-12)
    assert found.mean == pytest.approx(first.mean()) and found.n == 5

    # Seeds that only one arm has do not count.
    a = {**dict(enumerate(first)), 7: 100.0}
    b = {**dict(enumerate(second)), 8: 100.0}
    found = table.paired(a, b)
    expected = scipy.stats.ttest_rel(first, second).confidence_interval(0.95)
    np.testing.assert_allclose([found.low, found.high], expected, rtol=1e-12)
    assert found.mean == pytest.approx((first - second).mean())

    assert table.estimate([0.5]).text() == "50.0"
    assert table.estimate([0.5, 0.7]).text() == "60.0 [−67.1, 187.1]"
    assert table.paired({1: 0.5}, {2: 0.5}) is None


def test_odd_rows_are_left_out_of_the_results(tmp_path, capsys):
    good = [{"step": i, "loss": float(i), "seconds": 1} for i in (1, 2)]
    odd = ['{"step": 3, "loss": "x"}', "[1]", '{"step": 2, "loss": 9.0}', '{"step": 4, "lo']
    (tmp_path / "metrics.jsonl").write_text("\n".join([*map(json.dumps, good), *odd]))
    (tmp_path / "drift.jsonl").write_bytes(
        b'{"step": 1, "heldout": {"chi2": 2.0}}\n{"heldout": \xff'
    )
    found = results._training(types.SimpleNamespace(path=tmp_path))
    assert found == {"final": {"step": 2, "loss": 1.5}, "heldout": {"step": 1, "chi2": 2.0}}
    metrics, drift = capsys.readouterr().err.splitlines()
    assert "metrics.jsonl: left out line 3 (loss" in metrics and "and 1 more" in metrics
    assert "drift.jsonl: left out line 2 (not UTF-8" in drift
