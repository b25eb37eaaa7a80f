"""Meshes: the same result on every one and in any number of processes, and what does not fit."""

import dataclasses
import functools
import os
import re
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from helpers.commands import REPOSITORY
from helpers.mesh_measurements import (
    CONFIGS,
    DENSE,
    MOE,
    ROW_LENGTH,
    batch,
    gradient_program,
    gradients,
    host_params,
    logprobs,
    mesh_of,
)

from lopd.errors import UserError
from lopd.machine import devices, processes, sharding, shutdown
from lopd.machine.sharding import on_mesh
from lopd.models import decoder
from lopd.models.shardings import check_divisible, param_shardings

MESHES = [(2, 1, 1), (1, 4, 1), (1, 2, 2), (2, 2, 2)]


@functools.cache
def on_one_device(kind):
    mesh = mesh_of(1, 1, 1)
    return gradients(kind, mesh) | logprobs(kind, mesh)


def assert_same(found, kind):
    """Every array within 1e-5 of the largest number of the one-device result."""
    expected = on_one_device(kind)
    assert found.keys() <= expected.keys() and found
    for name, value in found.items():
        scale = np.abs(expected[name]).max()
        assert np.abs(value - expected[name]).max() <= 1e-5 * scale, name


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("shape", MESHES)
def test_same_loss_and_gradients_on_every_mesh(shape, kind):
    assert_same(gradients(kind, mesh_of(*shape)), kind)
    assert_same(gradients(kind, mesh_of(*shape), packed=False), kind)


@pytest.mark.parametrize(("shape", "kind"), [*((s, "dense") for s in MESHES), ((2, 2, 2), "moe")])
def test_same_logprobs_on_every_mesh(shape, kind):
    assert_same(logprobs(kind, mesh_of(*shape)), kind)


@pytest.mark.parametrize("kind", CONFIGS)
def test_same_loss_and_gradients_in_smaller_micro_batches(kind):
    assert batch(packed=False, rows_per_micro=4).num_micro == 2
    assert_same(gradients(kind, mesh_of(2, 2, 2), packed=False, rows_per_micro=4), kind)


def test_router_loss_is_that_of_all_tokens():
    """The load-balancing loss of a mesh is that of one device over all rows."""
    micro = batch(True, 8).micro(0)
    rows = [micro.tokens, micro.positions, micro.segment_ids]
    found = []
    for mesh in (mesh_of(1, 1, 1), mesh_of(2, 2, 2)):

        def loss(params, *rows, mesh=mesh):
            with on_mesh(mesh):
                return decoder.forward_with_router_loss(MOE, params, *rows)[1]

        params = jax.device_put(host_params("moe"), param_shardings(MOE, mesh))
        found.append(jax.jit(loss)(params, *jax.device_put(rows, devices.rows_sharding(mesh))))
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5)


@pytest.mark.parametrize("kind", CONFIGS)
def test_weights_are_gathered_and_tokens_are_not(kind):
    """Read from the compiled gradient on 2×2×2, where each device has two of the eight rows.

    The scores alone gather: the hidden states of an fsdp group, to meet every part of the head.
    """
    text = gradient_program(kind, mesh_of(2, 2, 2)).as_text()
    collectives = re.findall(r"= (.*?) (all-gather|all-reduce|all-to-all)\(", text)
    shapes = {
        (name, tuple(map(int, shape.split(","))))
        for result, name in collectives
        for shape in re.findall(r"f32\[([\d,]+)\]", result)
    }
    gathered = {shape for name, shape in shapes if name == "all-gather"}
    assert (DENSE.hidden_size, DENSE.num_attention_heads // 2 * DENSE.head_dim) in gathered
    for name, shape in shapes:
        if ROW_LENGTH in shape[:-1] and shape[-1] > 1:  # more than a number per token
            rows = np.prod(shape[: shape.index(ROW_LENGTH)])
            # The embedding adds its vocabulary parts up for the rows of an fsdp group.
            embedding = (name, shape[-1]) == ("all-reduce", DENSE.hidden_size // 2)
            scores = (name, shape[-1]) == ("all-gather", DENSE.hidden_size)
            assert name != "all-gather" or scores, (name, shape)
            assert rows <= (4 if embedding or scores else 2), (name, shape)


def run_processes(script: list[str], count: int, devices: int, **variables) -> list:
    """Starts a Python program in several processes that find each other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")]),
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": "2",
    }
    return [
        subprocess.Popen(
            [sys.executable, *script],
            env=environment | {"JAX_PROCESS_ID": str(index)} | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(count)
    ]


def test_two_processes_of_four_devices_measure_the_same(tmp_path):
    """Loss, gradients and log-probs of 2×2×2 in two real processes, against one device."""
    script = [
        str(REPOSITORY / "tests/helpers/mesh_measurements.py"),
        str(tmp_path / "found"),
        "2,2,2",
    ]
    for process in run_processes(script, count=2, devices=4):
        errors = process.communicate()[1]
        assert process.returncode == 0, errors
    found = dict(np.load(tmp_path / "found.npz"))
    assert found.pop("processes") == 2
    for kind in CONFIGS:
        own = {name.removeprefix(f"{kind} "): x for name, x in found.items() if kind in name}
        assert own.keys() >= gradients(kind, mesh_of(1, 1, 1)).keys()
        assert_same(own, kind)


@pytest.mark.parametrize("index", [0, 1])
def test_processes_that_do_not_meet_are_one_line(index):
    """The first process without the second, and the second without the first."""
    script = ["-c", "from lopd.machine import processes; processes.initialize(timeout=2)"]
    (process,) = run_processes(script, count=1, devices=1, JAX_PROCESS_ID=str(index))
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 2 and errors.count("\n") == 1
    assert "lopd: error: not all processes met at 127.0.0.1:" in errors


def test_a_process_that_fails_alone_is_gone_at_once(tmp_path):
    """A workdir that only the second process cannot use; the first waits for it meanwhile."""
    (tmp_path / "file").write_text("")
    config = f"--config={REPOSITORY / 'configs/tiny.py'}"
    script = "import os; from absl import app; from lopd import cli, main; import sys; "
    script += "sys.argv[2] += ['/w', '/file/w'][int(os.environ['JAX_PROCESS_ID'])]; "
    script += "app.run(main.main, flags_parser=cli.parse_flags)"
    command = ["-c", script, config, f"--workdir={tmp_path}", "--stages=teacher"]
    first, second = run_processes(command, count=2, devices=1)
    errors = second.communicate(timeout=60)[1]
    assert second.returncode == 2 and "cannot be written" in errors
    assert first.poll() is None
    first.kill()
    first.communicate()


SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "node[1-2]", "SLURM_PROCID": "1",
         "SLURM_LOCALID": "0"}  # fmt: skip
PLAIN = {"JAX_COORDINATOR_ADDRESS": "host:12", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, None),
        (SLURM | {"SLURM_NTASKS": "1"}, None),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2"}, None),  # in salloc's shell
        (SLURM | {"SLURM_NTASKS": "2"}, {"cluster_detection_method": "slurm"}),
        (PLAIN, {"coordinator_address": "host:12", "num_processes": 4, "process_id": 3}),
        (SLURM | {"SLURM_NTASKS": "2"} | PLAIN, {"process_id": 3}),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"}, {}),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "JAX_PLATFORMS": "cpu"}, None),
    ],
)
def test_start_up_finds_its_cluster(monkeypatch, variables, expected):
    started = []
    for name in [n for n in os.environ if n.startswith(("SLURM_", "TPU_", "JAX_"))]:
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(jax.distributed, "initialize", lambda **given: started.append(given))
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    processes.initialize(timeout=5)
    assert len(started) == (expected is not None)
    if expected is not None:
        assert expected.items() <= started[0].items()
        assert started[0]["initialization_timeout"] > 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"JAX_PROCESS_ID": "4"}, r"JAX_PROCESS_ID=4 must lie in \[0, JAX_NUM_PROCESSES=4\)"),
        ({"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES must be a number, not 'two'"),
        ({"JAX_COORDINATOR_ADDRESS": "host"}, "JAX_COORDINATOR_ADDRESS=host must be HOST:PORT"),
    ],
)
def test_start_up_variables_that_make_no_sense(monkeypatch, change, message):
    for name, value in (PLAIN | change).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        processes.initialize()


@pytest.mark.parametrize("sizes", [(3, 1, 1), (-1, 3, 1), (-1, -1, 1), (0, 1, 1)])
def test_mesh_that_does_not_fit_is_one_clear_error(sizes):
    with pytest.raises(UserError, match="does not fit 8 devices"):
        devices.make_mesh(dict(zip(sharding.AXES, sizes, strict=True)))


def test_model_that_does_not_divide_is_one_clear_error():
    narrow = dataclasses.replace(DENSE, num_attention_heads=3, num_key_value_heads=3)
    with pytest.raises(UserError, match=r"heads=3, which mesh\.tensor=2 does not divide"):
        check_divisible(narrow, mesh_of(1, 1, 2), "student.model")


@pytest.mark.parametrize("ask", [processes.check_stop, lambda: processes.StopVote().check()])
def test_a_stop_that_another_process_was_asked_for_counts_from_now(monkeypatch, ask):
    monkeypatch.setattr(shutdown, "_received", [])
    monkeypatch.setattr(processes, "any_process", lambda flag: True)
    with pytest.raises(shutdown.Stopped):
        ask()
    assert shutdown.requested() and 0 <= shutdown.seconds_since_request() < 10
