"""The training step and loop: meshes, resume, schedules, identities."""

import dataclasses
import json

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TIED, random_params, random_records
from jax.sharding import PartitionSpec as P

from lopd import parallel
from lopd.artefact import Artefact
from lopd.config import training_recipe
from lopd.data.batches import step_batches
from lopd.errors import UserError
from lopd.fingerprint import params_fingerprint
from lopd.objectives import cross_entropy, lightning_opd
from lopd.training import checkpoints
from lopd.training.loop import train
from lopd.training.state import create_state, learning_rate_schedule, make_optimizer
from lopd.training.step import make_train_step

FIELDS = ("teacher_logprobs", "ref_logprobs")
CONFIG = dataclasses.replace(TIED, vocab_size=40)  # divides over every mesh below


def batches(count=24, **changes) -> grain.MapDataset:
    lengths = np.random.default_rng(0).integers(1, 20, (count, 2)).tolist()
    records = random_records(CONFIG, lengths, **dict.fromkeys(FIELDS))
    options = dict(seed=1, batch_size=8, row_length=48, rows_per_micro=8, reduction="sample_mean")
    return step_batches(records, token_fields=FIELDS, **(options | changes))


def mesh_of(data, fsdp, tensor):
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    return parallel.make_mesh(sizes, jax.devices()[: data * fsdp * tensor])


def sharded(params, mesh):
    return jax.device_put(params, parallel.param_shardings(CONFIG, mesh))


@pytest.mark.parametrize(
    ("shape", "batch_size"),
    [((2, 1, 1), 8), ((1, 4, 1), 24), ((1, 2, 2), 8), ((2, 2, 2), 24)],
    ids=lambda x: "x".join(map(str, x)) if isinstance(x, tuple) else f"{x} responses",
)
def test_step_is_the_same_on_every_mesh(shape, batch_size):
    """Loss, gradient norm and updated weights on fake devices, against one device.

    The smaller batch is one micro-batch, the larger one is added up over several.
    """
    recipe = training_recipe(learning_rate=1e-3)
    results = []
    for mesh in (mesh_of(1, 1, 1), mesh_of(*shape)):
        optimizer = make_optimizer(recipe)
        step = make_train_step(CONFIG, optimizer, lightning_opd(1.0), mesh)
        state = create_state(CONFIG, optimizer, sharded(random_params(CONFIG, 0), mesh), mesh)
        rows = parallel.rows_sharding(mesh, leading=1)
        batch = {
            k: v if k == "num_micro" else jax.device_put(v, rows)
            for k, v in batches(batch_size=batch_size)[0].items()
        }
        state, metrics = step(state, batch)
        moment = state.opt_state[1][0].mu["layers"]["mlp"]["up"]
        assert moment.sharding == state.params["layers"]["mlp"]["up"].sharding
        results.append((jax.device_get(metrics), jax.device_get(state.params)))
    (metrics, params), (other_metrics, other_params) = results
    for name, value in metrics.items():
        np.testing.assert_allclose(value, other_metrics[name], rtol=1e-5, atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-5), params, other_params)


def run_training(path, steps=7, data=None, params=None, checkpoint_every=3):
    artefact = Artefact(path)
    artefact.begin("opd", {}, {})
    mesh = mesh_of(1, 1, 1)
    final = train(
        artefact,
        CONFIG,
        sharded(random_params(CONFIG, 0) if params is None else params, mesh),
        batches() if data is None else data,
        lightning_opd(1.0),
        training_recipe(steps=steps, learning_rate=1e-3),
        mesh=mesh,
        checkpoint_every=checkpoint_every,
        label="test",
    )
    rows = [json.loads(line) for line in (artefact.path / "metrics.jsonl").read_text().splitlines()]
    timeless = [{k: v for k, v in r.items() if k != "tokens_per_second"} for r in rows]
    return params_fingerprint(final), timeless


class Crash(Exception):
    """Stands for the machine going away."""


def crashing(dataset, step):
    """The dataset, up to a step at which the process dies."""

    class Source:
        def __len__(self):
            return 100

        def __getitem__(self, n):
            if n >= step:
                raise Crash
            return dataset[n]

    return grain.MapDataset.source(Source())


@pytest.mark.parametrize("crash_at", [1, 4, 6])
def test_interrupted_training_ends_bit_identical(tmp_path, crash_at):
    expected = run_training(tmp_path / "whole")
    with pytest.raises(Crash):
        run_training(tmp_path / "broken", data=crashing(batches(), crash_at))
    assert run_training(tmp_path / "broken") == expected
    assert [row["step"] for row in expected[1]] == [1, 2, 3, 4, 5, 6, 7]


def test_non_finite_loss_stops_with_the_step(tmp_path):
    params = random_params(CONFIG, 0)
    params["embed"] = params["embed"].at[3:].set(jnp.nan)
    with pytest.raises(UserError, match="step 1 has loss nan"):
        run_training(tmp_path, params=params)


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
    checkpoints.save_params(tmp_path / "params", sharded(params, mesh_of(1, 1, 1)))
    loaded = checkpoints.load_params(tmp_path / "params", CONFIG, mesh_of(2, 2, 2))
    assert params_fingerprint(loaded) == params_fingerprint(params)
    assert loaded["layers"]["mlp"]["up"].sharding.spec == P(None, "fsdp", "tensor")


@pytest.mark.parametrize("sizes", [(3, 1, 1), (-1, 3, 1), (-1, -1, 1), (0, 1, 1)])
def test_mesh_that_does_not_fit_is_one_clear_error(sizes):
    with pytest.raises(UserError, match="does not fit 8 devices"):
        parallel.make_mesh(dict(zip(parallel.AXES, sizes, strict=True)))


def test_model_that_does_not_divide_is_one_clear_error():
    narrow = dataclasses.replace(CONFIG, num_attention_heads=3, num_key_value_heads=3)
    with pytest.raises(UserError, match=r"heads=3, which mesh\.tensor=2 does not divide"):
        parallel.check_divisible(narrow, mesh_of(1, 1, 2), "student.model")


def test_schedules():
    constant = learning_rate_schedule(training_recipe(learning_rate=1.0, steps=10, warmup_steps=4))
    np.testing.assert_allclose([constant(i) for i in range(6)], [0.25, 0.5, 0.75, 1, 1, 1])
    assert learning_rate_schedule(training_recipe(learning_rate=1.0))(0) == 1.0
    cosine = learning_rate_schedule(
        training_recipe(learning_rate=1.0, steps=10, warmup_steps=0, schedule="cosine")
    )
    np.testing.assert_allclose([cosine(0), cosine(5), cosine(10)], [1, 0.5, 0], atol=1e-6)


def test_decay_spares_norms_and_embeddings():
    """With no gradient only decay moves weights: matrices shrink, the others stay."""
    mesh = mesh_of(1, 1, 1)
    optimizer = make_optimizer(training_recipe(learning_rate=0.1, weight_decay=0.5))
    params = random_params(CONFIG, 0)
    state = create_state(CONFIG, optimizer, params, mesh)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, state.opt_state, params)
    for path, update in jax.tree_util.tree_leaves_with_path(updates):
        name = jax.tree_util.keystr(path)
        still = "norm" in name or "embed" in name
        assert (np.abs(update).max() == 0) == still, name


def test_training_fits_the_teacher(tmp_path):
    """A few steps of cross-entropy on one batch lower its loss: the loop learns at all."""
    mesh = mesh_of(1, 1, 1)
    data = batches(count=8)
    optimizer = make_optimizer(training_recipe(learning_rate=3e-3))
    step = make_train_step(CONFIG, optimizer, cross_entropy(), mesh)
    state = create_state(CONFIG, optimizer, sharded(random_params(CONFIG, 0), mesh), mesh)
    losses = []
    for _ in range(15):
        state, metrics = step(state, data[0])
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.5 * losses[0]
