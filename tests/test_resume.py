"""Training that is killed, stopped, moved or damaged, and goes on: in real processes.

LOPD_KILLS (1 by default) is how often each kind of run is killed; 20 by hand.
"""

import functools
import json
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from helpers import training_run

KILLS = int(os.environ.get("LOPD_KILLS", "1"))
TESTS = pathlib.Path(__file__).parent


def start(path, objective, devices=1, **environment) -> subprocess.Popen:
    paths = [str(TESTS), str(TESTS.parent)]
    environment = os.environ | environment | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(paths),
    }  # fmt: skip
    command = [sys.executable, str(TESTS / "helpers" / "training_run.py"), str(path), objective]
    return subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def result(path) -> list:
    return json.loads((path / "result.json").read_text())


def records_read(path) -> dict[int, list[int]]:
    """By step, from 0: the prompt_ids of the records that its processes have read together."""
    steps = {}
    for file in path.glob("read-*.json"):
        for step, ids in json.loads(file.read_text()).items():
            steps.setdefault(int(step), []).extend(ids)
    return {step: sorted(ids) for step, ids in steps.items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """By objective: result and records of an uninterrupted run; seconds from "ready" to its end."""

    @functools.cache
    def run(objective):
        path = tmp_path_factory.mktemp(objective)
        process = start(path, objective)
        assert process.stdout.readline() == "ready\n"
        began = time.monotonic()
        assert process.wait() == 0, process.stderr.read()
        seconds, (_, rows, drift) = time.monotonic() - began, result(path)
        assert [row["step"] for row in rows] == [*range(1, training_run.STEPS + 1)]
        assert [row["step"] for row in drift] == ([7, 14, 21, 24] if objective == "opd" else [])
        return result(path), seconds, records_read(path)

    return run


def end(process, number: int, when) -> bool:
    """Sends a signal when `when(seconds since ready)` says so; False if the run ended before."""
    assert process.stdout.readline() == "ready\n", process.stderr.read()
    began = time.monotonic()
    while process.poll() is None and not when(time.monotonic() - began):
        time.sleep(0.0005)
    process.send_signal(number)
    process.communicate()
    return process.returncode != 0


OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in ("sft", "adapters")]


@pytest.mark.parametrize("objective", ["opd", *OTHERS])
def test_killed_at_random_instants_ends_bit_identical(whole, tmp_path, objective):
    """Every second kill comes as soon as a save is under way."""
    expected, seconds, _ = whole(objective)
    rng = random.Random(objective)
    kills = 0
    while kills < KILLS:
        pause = rng.uniform(0, seconds)
        saving = (kills + (objective == "sft")) % 2

        def instant(passed, saving=saving, pause=pause):
            tmp = (tmp_path / "checkpoints").glob("*tmp*/*")
            return any(tmp) if saving else passed > pause

        ended_by_us = end(start(tmp_path, objective), signal.SIGKILL, instant)
        kills += ended_by_us
        steps = len(training_run.rows_of(tmp_path)[0])
        print(
            f"{objective} {'killed' if ended_by_us else 'finished'} after {steps} steps", flush=True
        )
        if not ended_by_us:  # it had finished: compare, and kill another one
            assert result(tmp_path) == expected
            shutil.rmtree(tmp_path)
    process = start(tmp_path, objective)
    assert process.communicate() is not None and process.returncode == 0
    assert result(tmp_path) == expected


@pytest.mark.parametrize("objective", ["opd", pytest.param("sft", marks=pytest.mark.slow)])
def test_sigterm_saves_and_exits_75(whole, tmp_path, objective):
    expected, seconds, _ = whole(objective)
    stops = 0
    rng = random.Random(0)
    while stops < max(1, KILLS // 4):
        pause = rng.uniform(0, 0.7 * seconds)
        process = start(tmp_path, objective)
        if end(process, signal.SIGTERM, lambda passed, pause=pause: passed > pause):
            assert process.returncode in (75, -signal.SIGTERM)  # the latter before any handler
            rows, _ = training_run.rows_of(tmp_path)
            stops += process.returncode == 75
            if process.returncode == 75 and rows:
                # The last step that ran was saved: nothing is done twice.
                assert (tmp_path / "checkpoints" / str(rows[-1]["step"])).exists()
        else:
            assert result(tmp_path) == expected
            shutil.rmtree(tmp_path)
    process = start(tmp_path, objective)
    assert process.communicate() is not None and process.returncode == 0
    assert result(tmp_path) == expected


def same_to(rows, expected, rtol):
    assert [r["step"] for r in rows] == [r["step"] for r in expected]
    for row, other in zip(rows, expected, strict=True):
        for name in ("tokens", "response_length"):  # of the same records, exactly
            assert row[name] == other[name], (row["step"], name)
        np.testing.assert_allclose(row["loss"], other["loss"], rtol=rtol, err_msg=row["step"])


def interrupted(path, objective, stop_after: int) -> None:
    """A run on one device that was stopped."""
    mesh = training_run.mesh_of(1, 1, 1)

    class Gone(Exception):
        pass

    class Source(list):
        reads = 0

        def __getitem__(self, index):
            Source.reads += 1
            if Source.reads > 8 * stop_after:
                raise Gone
            return list.__getitem__(self, index)

    data = training_run.batches(source=Source(training_run.records()))
    with pytest.raises(Gone):
        training_run.run(path, objective, mesh=mesh, data=data)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


@pytest.mark.parametrize("objective", ["plain", *OTHERS])
@pytest.mark.parametrize("where", ["8 devices", "2 processes"])
def test_goes_on_elsewhere_with_the_same_losses(whole, tmp_path, where, objective):
    interrupted(tmp_path, objective, 9)
    before, _ = training_run.rows_of(tmp_path)
    assert 4 <= len(before) < 9
    first = max(int(p.name) for p in (tmp_path / "checkpoints").glob("[0-9]*"))
    if where == "8 devices":
        mesh = training_run.mesh_of(4, 2, 1)
        data = training_run.noted(training_run.batches(mesh))
        rows = training_run.run(tmp_path, objective, mesh=mesh, data=data)[1]
        read = {step: sorted(ids) for step, ids in data.read.items()}
    else:
        coordinator = f"localhost:{free_port()}"
        processes = [
            start(tmp_path, objective, LOPD_PROCESSES=coordinator, LOPD_PROCESS=str(i))
            for i in range(2)
        ]
        outputs = [process.communicate() for process in processes]
        assert [process.returncode for process in processes] == [0, 0], outputs
        rows, read = result(tmp_path)[1], records_read(tmp_path)
        assert len(list(tmp_path.glob("read-*.json"))) == 2
    (_, expected, _), _, expected_records = whole("opd" if objective == "plain" else objective)
    same_to(rows, expected, rtol=1e-6)
    # Nothing is read of the steps before, and of the others exactly what one process reads.
    assert read == {step: expected_records[step] for step in range(first, training_run.STEPS)}
    assert all(len(set(ids)) == 8 for ids in read.values())
