"""The training step and loop: meshes, checkpoints, failures, schedules, identities."""

import dataclasses
import errno
import functools
import itertools
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath
from helpers import training_run
from helpers.models import random_params
from helpers.training_run import CONFIG, Crash, batches, crashing, mesh_of
from jax.sharding import PartitionSpec as P

from lopd.artefacts.artefact import Artefact
from lopd.artefacts.fingerprint import params_fingerprint
from lopd.cache import reader, writer
from lopd.cache.fields import SCORED_FIELDS
from lopd.cache.reader import Records
from lopd.checkpoints import orbax
from lopd.config.settings import TrainingRecipe
from lopd.errors import UserError
from lopd.machine import processes, shutdown, storage
from lopd.models.shardings import abstract_params_on, param_shardings
from lopd.objectives.sampled import cross_entropy, lightning_opd
from lopd.report import write_report
from lopd.training import metrics_files
from lopd.training.state import (
    abstract_state,
    create_state,
    learning_rate_schedule,
    make_optimizer,
)
from lopd.training.step import make_train_step

# Orbax leaves futures behind when a checkpoint cannot be read.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def sharded(params, mesh, config=CONFIG):
    return jax.device_put(params, param_shardings(config, mesh))


def test_moments_lie_where_their_parameter_lies():
    mesh = mesh_of(2, 2, 2)
    params = sharded(random_params(CONFIG, 0), mesh)
    state = create_state(make_optimizer(TrainingRecipe()), params, mesh)
    for moment in (state.opt_state[1][0].mu, state.opt_state[1][0].nu):
        jax.tree.map(lambda m, p: np.testing.assert_equal(m.sharding, p.sharding), moment, params)


def run_training(path, steps=7, data=None, params=None, **options):
    return training_run.run(
        path,
        mesh=mesh_of(1, 1, 1),
        steps=steps,
        data=batches() if data is None else data,
        params=params,
        **{"checkpoint_every": 3, **options},
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run of seven steps with checkpoints 3 and 6."""
    path = tmp_path_factory.mktemp("whole")
    return path, run_training(path)


@pytest.mark.parametrize("crash_at", [1, 6])
def test_interrupted_training_ends_bit_identical(whole, tmp_path, crash_at):
    with pytest.raises(Crash):
        run_training(tmp_path, data=crashing(batches(), crash_at))
    assert run_training(tmp_path) == whole[1]
    assert [row["step"] for row in whole[1][1]] == [1, 2, 3, 4, 5, 6, 7]


def largest_file(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def truncate(folder):
    path = largest_file(folder)
    path.write_bytes(path.read_bytes()[:1000])


def flip_bit(folder):
    path = largest_file(folder)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [truncate, flip_bit, lambda folder: largest_file(folder).unlink(),
     lambda folder: shutil.rmtree(folder / "metadata")],
    ids=["truncated", "bit flip", "deleted file", "deleted folder"],
)  # fmt: skip
def test_damaged_newest_checkpoint_is_passed_over(whole, tmp_path, capsys, damage):
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    damage(tmp_path / "checkpoints" / "6")
    assert run_training(tmp_path) == whole[1]
    said = capsys.readouterr().err
    assert f"{tmp_path}/checkpoints/6 is damaged" in said and "checkpoints/3" not in said
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["3", "6"]  # made anew


def abstract():
    mesh = mesh_of(1, 1, 1)
    params = sharded(random_params(CONFIG, 0), mesh)
    return abstract_state(make_optimizer(TrainingRecipe()), params, mesh)


def restore(path):
    """(step, state) of the newest checkpoint of a run that can be read."""
    identity = {"settings": {}, "inputs": {}}
    with orbax.open_manager(epath.Path(path) / "checkpoints") as manager:
        state, _ = orbax.restore_newest(manager, abstract(), identity, lambda rows: "")
        return int(state.step), state


def test_any_damage_of_any_file_is_harmless_or_passed_over(whole, tmp_path, capsys):
    """Every file and folder of the newest checkpoint, damaged in one of three ways."""
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    saved = {6: params_fingerprint(restore(tmp_path)[1])}
    shutil.copytree(tmp_path, tmp_path / "older")
    shutil.rmtree(tmp_path / "older" / "checkpoints" / "6")
    saved[3] = params_fingerprint(restore(tmp_path / "older")[1])
    newest, rng = tmp_path / "checkpoints" / "6", random.Random(0)
    shutil.copytree(newest, tmp_path / "sound")
    passed_over, kinds = 0, itertools.cycle(("cut", "flip", "delete"))
    for path, damage in zip(sorted(newest.rglob("*")), kinds, strict=False):
        if path.is_dir():
            shutil.rmtree(path)
        elif damage == "delete":
            path.unlink()
        else:
            content = bytearray(path.read_bytes())
            place = rng.randrange(len(content))
            content[place] ^= 1 << rng.randrange(8)
            path.write_bytes(content if damage == "flip" else content[:place])
        step, state = restore(tmp_path)
        said = capsys.readouterr().err
        assert (step == 3) == ("checkpoints/6 is damaged" in said) == (not newest.exists())
        assert params_fingerprint(state) == saved[step]
        passed_over += step == 3
        shutil.rmtree(newest, ignore_errors=True)
        shutil.copytree(tmp_path / "sound", newest)
    assert passed_over >= 8 and saved[3] != saved[6]


@pytest.mark.parametrize("name", ["state/manifest.ocdbt", "state/array_metadatas/process_0", ""])
def test_what_cannot_be_read_now_is_no_damage(whole, tmp_path, monkeypatch, name):
    """A file that the system refuses to open (a loop of links): it may be sound."""
    monkeypatch.setattr(orbax, "_PAUSES", ())
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    newest = tmp_path / "checkpoints" / "6"
    path = newest / name if name else largest_file(newest)
    content = path.read_bytes()
    path.unlink()
    path.symlink_to(path.name)
    with pytest.raises(UserError, match=r"checkpoints/6 could not be read .*nothing was deleted"):
        restore(tmp_path)
    path.unlink()
    path.write_bytes(content)
    assert restore(tmp_path)[0] == 6


def around(error):
    """As Orbax wraps TensorStore's errors."""
    try:
        raise Exception("Encountered error while reading array index") from error
    except Exception as wrapped:
        return wrapped


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(errno.EACCES, "Permission denied"),
        OSError(errno.EIO, "Input/output error"),
        MemoryError(),
        TypeError("not of the file's making"),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"),
        ValueError('PERMISSION_DENIED: Error opening "zarr" driver'),
        around(ValueError("UNAVAILABLE: CURL error: could not connect")),
        ValueError("FAILED_PRECONDITION: Failed to open: \"d/1\" [os_error_code='107']"),
        ValueError("Bad Request: https://storage.googleapis.com/: invalid grant"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_that_are_no_damage(whole, tmp_path, monkeypatch, capsys, error):
    """They are one line if they stay, and got over if they pass; nothing is deleted."""
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(orbax, "_PAUSES", (0, 0))
    failures, real = [error] * 3, ocp.CheckpointManager.restore

    def failing(*args, **kwargs):
        if failures:
            raise failures.pop()
        return real(*args, **kwargs)

    monkeypatch.setattr(ocp.CheckpointManager, "restore", failing)
    with pytest.raises(UserError, match=r"checkpoints/6 could not be read") as raised:
        restore(tmp_path)
    assert "\n" not in str(raised.value)
    assert capsys.readouterr().err.count("trying again in 0 s") == 2
    failures += [error] * 2
    assert restore(tmp_path)[0] == 6 and not failures


def test_other_bits_in_a_sound_file_are_damage(tmp_path):
    """A checkpoint that reads well but is not what was saved: the fingerprints' work."""
    mesh, optimizer = mesh_of(1, 1, 1), make_optimizer(TrainingRecipe())
    state = create_state(optimizer, sharded(random_params(CONFIG, 0), mesh), mesh)
    with orbax.open_manager(epath.Path(tmp_path)) as manager:
        orbax.save_state(manager, 1, state, {"opd": {"tau": 1}}, {"metrics.jsonl": 7})
        manager.wait_until_finished()
        path = tmp_path / "1" / "metadata" / "metadata"
        text = path.read_text()
        metadata = json.loads(text)
        del metadata["checksum"]
        other = {**metadata, "content": metadata["content"][::-1]}
        for changed in (
            text.replace('"tau": 1', '"tau": 3'),
            json.dumps(other | {"checksum": orbax._checksum(other)}),
        ):
            path.write_text(changed)
            with pytest.raises(UserError, match=r"no checkpoint under .* can be gone on from"):
                orbax.restore_newest(manager, abstract(), {"opd": {"tau": 1}}, lambda rows: "")
        path.write_text(text)
        sound, restore = {"metrics.jsonl": 7}, functools.partial(orbax.restore_newest, manager)
        found = lambda rows: "" if rows == sound else "lost"  # noqa: E731
        restored, rows = restore(abstract(), {"opd": {"tau": 1}}, found)
        assert rows == sound and params_fingerprint(restored) == params_fingerprint(state)
        with pytest.raises(UserError, match=r"settings \(opd.tau: 1 → 3"):
            restore(abstract(), {"opd": {"tau": 3}}, found)


def test_rows_are_on_disk_before_their_checkpoint(tmp_path, monkeypatch):
    on_disk, saved, save = {}, {}, orbax.save_state

    def count_rows(growing):
        if growing.path.suffix == ".jsonl":
            on_disk[growing.path.name] = len(growing.path.read_text().splitlines())

    def note_and_save(manager, step, *rest):
        saved[step] = dict(on_disk)
        save(manager, step, *rest)

    monkeypatch.setattr(storage.Growing, "sync", count_rows)
    monkeypatch.setattr(orbax, "save_state", note_and_save)
    run_training(tmp_path)
    rows = {step: {"metrics.jsonl": step, "drift.jsonl": 0} for step in (3, 6)}
    assert saved == rows


def cut_rows(path, keep):
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:keep]))


def test_rows_lost_before_a_checkpoint_are_made_again(whole, tmp_path, capsys):
    """Going on from checkpoint 6 would leave rows 1 to 4 and 7, and costs that lack two steps."""
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    cut_rows(tmp_path / "metrics.jsonl", keep=4)
    assert run_training(tmp_path) == whole[1]
    said = capsys.readouterr().err
    assert "checkpoints/6 is damaged (ValueError: metrics.jsonl lacks rows" in said
    assert "checkpoints/3 is" not in said


@pytest.mark.parametrize("keep", [0, 2])
def test_rows_lost_before_every_checkpoint_are_named(whole, tmp_path, keep):
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    cut_rows(tmp_path / "metrics.jsonl", keep)
    before = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    with pytest.raises(
        UserError, match=r"no checkpoint under .* can be gone on from \(see above\)"
    ):
        run_training(tmp_path)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == before
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == keep


def test_another_row_before_a_checkpoint_is_found(whole, tmp_path, capsys):
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    drift = tmp_path / "metrics.jsonl"
    drift.write_text(drift.read_text().replace('"step": 5', '"step": 8'))
    assert run_training(tmp_path) == whole[1]
    assert "checkpoints/6 is damaged" in capsys.readouterr().err


def test_a_stop_stays_a_stop_when_metrics_cannot_be_closed(tmp_path, monkeypatch, capsys):
    """A bucket that is away at the end; the other files are closed, the state is saved."""
    closed, close = [], metrics_files.MetricsFile.close

    def failing(file):
        close(file)
        closed.append(file)
        raise OSError("the bucket is away")

    monkeypatch.setattr(metrics_files.MetricsFile, "close", failing)
    with monkeypatch.context() as patch, pytest.raises(shutdown.Stopped):
        patch.setattr(processes.StopVote, "agreed", lambda self: True)
        run_training(tmp_path)
    assert len(closed) == 2
    assert "metrics are not closed (the bucket is away)" in capsys.readouterr().err
    with pytest.raises(OSError, match="the bucket is away"):
        run_training(tmp_path)


def test_keeps_the_newest_and_every_so_many(tmp_path):
    run_training(tmp_path, checkpoint_every=1, keep_checkpoints=1, keep_every=4)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["4", "6"]


def with_free(monkeypatch, path, size):
    free = shutil.disk_usage(path)._replace(free=size)
    monkeypatch.setattr(orbax.shutil, "disk_usage", lambda _: free)


def test_no_room_for_checkpoints_is_known_before_the_first_step(tmp_path, monkeypatch):
    with_free(monkeypatch, tmp_path, 1_000_000)
    with pytest.raises(UserError, match=r"room for 2 checkpoints .* keep fewer"):
        run_training(tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("steps", "every", "keep", "keep_every", "found", "room"),
    [
        (7, 3, 2, 0, (), (2, 1)),  # 3, 6, and the weights
        (7, 7, 2, 0, (), (1, 0)),  # none but that of a stop
        (100, 3, 2, 0, (), (3, 0)),  # 93, 96 and 99, of which the first then goes
        (100, 3, 2, 10, (), (6, 0)),  # 30, 60, 90 for good
        (97, 3, 2, 10, (), (5, 1)),  # 90, 93, 96, of which 90 stays
        (94, 3, 2, 10, (), (5, 0)),  # 87, 90, 93, of which 87 goes
        (100, 3, 2, 0, (3, 6), (1, 0)),
        (7, 3, 2, 0, (3, 6), (1, 0)),  # the weights fit where a stop would save
    ],
)  # fmt: skip
def test_room_that_a_training_needs(
    whole, tmp_path, monkeypatch, steps, every, keep, keep_every, found, room
):
    """`room` is in checkpoints and, of the weights, times that they are there beside these."""
    directory, state = epath.Path(tmp_path) / "checkpoints", abstract()
    for step in found:
        shutil.copytree(whole[0] / "checkpoints" / str(step), directory / str(step))
    size, weights = (sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
                     for tree in (state, state.params))  # fmt: skip
    settings = dict(checkpoint_every=every, keep_checkpoints=keep, keep_every=keep_every)
    needed = room[0] * size + room[1] * weights
    with_free(monkeypatch, tmp_path, needed)
    orbax.check_room(directory, state, state.params, steps=steps, **settings)
    with_free(monkeypatch, tmp_path, needed - 1)
    with pytest.raises(UserError, match=rf"{len(found)} are there"):
        orbax.check_room(directory, state, state.params, steps=steps, **settings)


def fill_up_and_go_on(path, out):
    """On a file system of 2 MB: saves until it is full, and goes on once there is more room."""
    path = pathlib.Path(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(orbax, "check_room", lambda *_, **__: None)
        with pytest.raises(OSError) as raised:
            run_training(path, keep_checkpoints=9, checkpoint_every=1)
        assert raised.value.errno == errno.ENOSPC
        assert list((path / "checkpoints").glob("[0-9]"))
        subprocess.run(["mount", "-o", "remount,size=9m", "none", path], check=True)
        found = run_training(path, keep_checkpoints=9, checkpoint_every=1)
    pathlib.Path(out).write_text(json.dumps(found))


def test_full_disk_loses_nothing(whole, tmp_path):
    """Saves fail on a file system that fills up; the checkpoint before is used afterwards.

    It is mounted by a process in namespaces of its own, which needs no rights on most machines.
    """
    disk, out = tmp_path / "disk", tmp_path / "result.json"
    disk.mkdir()
    alone = ["unshare", "--user", "--map-root-user", "--mount"]
    mount = f"mount -t tmpfs -o size=2m none {disk}"
    if subprocess.run([*alone, "sh", "-c", mount]).returncode:
        pytest.skip("may not mount, also in a namespace of its own")
    script = f"import test_training; test_training.fill_up_and_go_on({str(disk)!r}, {str(out)!r})"
    done = subprocess.run(
        [*alone, "sh", "-c", f'{mount} && exec "$0" -c "$1"', sys.executable, script],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(out.read_text()) == json.loads(json.dumps(whole[1]))


def test_nan_in_a_record_stops_with_its_id_and_can_be_continued(tmp_path):
    """Planted in the data of step 5: all later updates are held back, the state is saved."""
    source = training_run.records()
    data = batches(source=source)
    bad = int(data.indices[4][3])
    first = next(n for n in range(9) if bad in data.indices[n]) + 1
    stage = tmp_path / "opd"
    source[bad]["teacher_logprobs"] = source[bad]["teacher_logprobs"] * np.nan
    with pytest.raises(UserError, match=f"step {first} has loss nan .*1 of its 8 .* {100 + bad}/0"):
        run_training(stage, steps=9, data=data)
    report = json.loads((stage / "failure.json").read_text())
    wrong = [r["prompt_id"] for r in report["records"] if not r["finite"]]
    assert report["step"] == first and wrong == [100 + bad] and len(report["records"]) == 8
    assert [r["step"] for r in training_run.rows_of(stage)[0]] == [*range(1, first)]
    # What was saved is the state of an untroubled run of so many steps.
    if first > 1:
        untroubled = run_training(tmp_path / "w", steps=first - 1, data=batches())[0]
        saved = ocp.StandardCheckpointer().restore(stage / "checkpoints" / str(first - 1) / "state")
        assert params_fingerprint(saved["params"]) == untroubled
    assert (first - 1) % 3  # it was saved because of the stop
    page = write_report([tmp_path]).read_text()
    assert f"opd failed at step {first}<" in page and f"<code>{100 + bad}/0</code>" in page
    continued = run_training(stage, steps=9, data=batches())
    assert continued == run_training(tmp_path / "whole", steps=9)
    assert not (stage / "failure.json").exists()


@pytest.mark.parametrize("held", [True, False])
def test_nan_in_the_cache_stops_with_its_id(tmp_path, monkeypatch, held):
    """In a cache whose checksums are right, so that only reading the record can tell.

    Before the first step where the cache is held in memory, else in the step that reads it.
    """
    source = [{**r, "finished": True, "behaviour_logprobs": r["ref_logprobs"]}
              for r in training_run.records()]  # fmt: skip
    source[9]["teacher_logprobs"][2] = np.nan
    cache = Artefact(tmp_path / "cache")
    cache.begin("precompute", {}, {})
    with monkeypatch.context() as patch:
        patch.setattr(writer, "check_record", lambda *_: None)
        writer.write_shard(cache, SCORED_FIELDS, 0, 1, source, {}, {})
    writer.write_metadata(cache)
    who = r"record 9 \(prompt_id 109, sample_id 0\): teacher_logprobs"
    if held:
        with pytest.raises(UserError, match=who):
            Records(cache)
        return
    monkeypatch.setattr(reader, "_HELD_BYTES", 0)
    data = batches(source=Records(cache))
    with pytest.raises(UserError, match=who):
        run_training(tmp_path / "opd", data=data)


def test_nan_in_a_gradient_stops_with_its_id(tmp_path, monkeypatch):
    """The loss is finite: √0 at the records whose first teacher log-prob is the mark."""
    source = training_run.records()
    source[7]["teacher_logprobs"][0] = -1.5

    def objective(tau):
        def loss(scores, batch):
            values, diagnostics = lightning_opd(tau)(scores, batch)
            zero = scores.logprobs - jax.lax.stop_gradient(scores.logprobs)
            marked = batch.fields["teacher_logprobs"] == -1.5
            return values + jnp.where(
                marked, jnp.sqrt(jnp.where(marked, zero, 1.0)), 0
            ), diagnostics

        return loss

    monkeypatch.setattr(training_run, "lightning_opd", objective)
    with pytest.raises(UserError, match=r"gradient norm (nan|inf) \(1 of its 8 .* 107/0"):
        run_training(tmp_path, steps=9, data=batches(source=source))


def test_every_weight_wrong_names_the_batch(tmp_path):
    params = random_params(CONFIG, 0)
    params["embed"] = params["embed"].at[3:].set(jnp.nan)
    with pytest.raises(UserError, match=r"step 1 has loss nan .*8 of its 8 records"):
        run_training(tmp_path, params=params)


def test_profile_of_some_steps(tmp_path):
    run_training(tmp_path, steps=4, profile_steps=(2, 3))
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_fingerprint_sees_one_bit_and_no_sharding():
    params = random_params(CONFIG, 0)
    expected = params_fingerprint(params)
    assert params_fingerprint(sharded(params, mesh_of(2, 2, 2))) == expected
    bits = np.asarray(params["embed"]).view(np.uint32).copy()
    bits[5, 7] ^= 1
    assert params_fingerprint({**params, "embed": bits.view(np.float32)}) != expected
    swapped = np.asarray(params["embed"])[::-1]
    assert params_fingerprint({**params, "embed": swapped}) != expected


def test_saved_weights_come_back_on_another_mesh(tmp_path):
    params = random_params(CONFIG, 2)
    orbax.save_params(tmp_path / "params", sharded(params, mesh_of(1, 1, 1)))
    loaded = orbax.load_params(tmp_path / "params", abstract_params_on(CONFIG, mesh_of(2, 2, 2)))
    assert params_fingerprint(loaded) == params_fingerprint(params)
    assert loaded["layers"]["mlp"]["up"].sharding.spec == P(None, "fsdp", "tensor")


def test_schedules():
    constant = learning_rate_schedule(TrainingRecipe(learning_rate=1.0, steps=10, warmup_steps=4))
    np.testing.assert_allclose([constant(i) for i in range(6)], [0.25, 0.5, 0.75, 1, 1, 1])
    assert learning_rate_schedule(TrainingRecipe(learning_rate=1.0))(0) == 1.0
    cosine = learning_rate_schedule(
        TrainingRecipe(learning_rate=1.0, steps=10, warmup_steps=0, schedule="cosine")
    )
    np.testing.assert_allclose([cosine(0), cosine(5), cosine(10)], [1, 0.5, 0], atol=1e-6)


def test_decay_spares_norms_and_embeddings():
    """With no gradient only decay moves weights: matrices shrink, the others stay."""
    mesh = mesh_of(1, 1, 1)
    optimizer = make_optimizer(TrainingRecipe(learning_rate=0.1, weight_decay=0.5))
    params = sharded(random_params(CONFIG, 0), mesh)
    state = create_state(optimizer, params, mesh)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, state.opt_state, params)
    for path, update in jax.tree_util.tree_leaves_with_path(updates):
        name = jax.tree_util.keystr(path)
        still = "norm" in name or "embed" in name
        assert (np.abs(update).max() == 0) == still, name


@pytest.mark.parametrize("changes", [{"optimizer": "adafactor"}, {"mu_dtype": "bfloat16"}])
def test_memory_options_shard_save_and_learn(tmp_path, changes):
    """On a mesh moments lie beside their parameters; a killed run ends as the whole one."""
    mesh = mesh_of(1, 2, 2)
    wide = dataclasses.replace(CONFIG, hidden_size=128, intermediate_size=256, num_hidden_layers=2)
    recipe = TrainingRecipe(steps=4, learning_rate=3e-3, **changes)
    optimizer = make_optimizer(recipe)
    state = create_state(optimizer, sharded(random_params(wide, 0), mesh, wide), mesh)
    size = sum(x.nbytes for x in jax.tree.leaves(state.opt_state))
    weights = sum(x.nbytes for x in jax.tree.leaves(state.params))
    if "optimizer" in changes:
        rms = state.opt_state[1][0]
        row, column = rms.v_row["layers"]["mlp"]["up"], rms.v_col["layers"]["mlp"]["up"]
        assert {row.shape, column.shape} == {(2, 128), (2, 256)}
        assert {row.sharding.spec, column.sharding.spec} == {P(None, "fsdp"), P(None, "tensor")}
        assert size < 0.5 * weights
    else:
        mu = state.opt_state[1][0].mu["layers"]["mlp"]["up"]
        assert mu.dtype == jnp.bfloat16 and mu.sharding.spec == P(None, "fsdp", "tensor")
        assert size < 1.51 * weights
    expected = run_training(tmp_path / "whole", steps=4, recipe={**changes}, checkpoint_every=2)
    losses = [row["loss"] for row in expected[1]]
    assert losses[-1] < losses[0]
    data = crashing(batches(), 3)
    with pytest.raises(Crash):
        run_training(tmp_path, steps=4, data=data, recipe={**changes}, checkpoint_every=2)
    again = run_training(tmp_path, steps=4, recipe={**changes}, checkpoint_every=2)
    assert again == expected


def test_training_fits_the_teacher(tmp_path):
    """A few steps of cross-entropy on one batch lower its loss: the loop learns at all."""
    mesh = mesh_of(1, 1, 1)
    data = batches(source=training_run.records(8))
    optimizer = make_optimizer(TrainingRecipe(learning_rate=3e-3))
    params = sharded(random_params(CONFIG, 0), mesh)
    step = make_train_step(CONFIG, optimizer, cross_entropy(), params, mesh)
    state = create_state(optimizer, params, mesh)
    losses = []
    for _ in range(15):
        state, metrics = step(state, {}, data[0])
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.5 * losses[0]
