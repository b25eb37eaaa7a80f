"""Trainable and frozen parameters, handed in as two trees."""

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from helpers import training_run
from helpers.models import random_params
from helpers.training_run import CONFIG, Crash, batches, crashing, mesh_of

from lopd.artefacts.fingerprint import params_fingerprint
from lopd.config.settings import TrainingRecipe
from lopd.data.batches import put_batch
from lopd.models.shardings import param_shardings
from lopd.objectives.sampled import lightning_opd
from lopd.training.state import create_state, make_optimizer
from lopd.training.step import batch_gradients, make_train_step
from lopd.training.trees import merged, part_of

OBJECTIVE, RECIPE = lightning_opd(1.0), TrainingRecipe(learning_rate=1e-3)
LEAVES = ("['embed']", "['layers']['mlp']['up']")
"""What is frozen here: a leaf of the first level, and one below with others beside it."""


def split(params):
    """The trainable and the frozen tree."""
    params = jax.tree.map(lambda x: x, params)  # dicts of its own
    mlp = dict(params["layers"]["mlp"])
    layers = {**params["layers"], "mlp": mlp}
    frozen = {"embed": params.pop("embed"), "layers": {"mlp": {"up": mlp.pop("up")}}}
    return {**params, "layers": layers}, frozen


def placed(mesh):
    return jax.device_put(random_params(CONFIG, 0), param_shardings(CONFIG, mesh))


def by_path(tree):
    return {jax.tree_util.keystr(k): x for k, x in jax.tree_util.tree_leaves_with_path(tree)}


def assert_same(found, expected):
    found, expected = by_path(found), by_path(expected)
    assert found.keys() == expected.keys()
    for path, x in expected.items():
        np.testing.assert_array_equal(found[path], x, err_msg=path)


def test_trees_are_split_and_joined():
    params = random_params(CONFIG, 0)
    trainable, frozen = split(params)
    assert by_path(frozen).keys() == set(LEAVES) and not by_path(trainable).keys() & set(LEAVES)
    assert_same(merged(trainable, frozen), params)
    assert_same(part_of(params, frozen), frozen)
    assert_same(part_of(params, trainable), trainable)
    assert merged(params, None) is params is merged(params, {})
    with pytest.raises(ValueError, match="layers/mlp/up is trainable and frozen"):
        merged(params, {"layers": {"mlp": {"up": params["layers"]["mlp"]["up"]}}})


@pytest.mark.parametrize(
    ("mesh", "rows_per_micro"), [((1, 1, 1), 8), ((1, 1, 1), 4), ((2, 2, 2), 4)]
)
def test_frozen_leaves_have_no_gradient_and_the_others_have_theirs(mesh, rows_per_micro):
    mesh = mesh_of(*mesh)
    params, data = placed(mesh), batches(mesh, rows_per_micro=rows_per_micro)
    batch = put_batch(data[0], mesh, rows_per_micro)
    trainable, frozen = split(params)
    gradient = jax.jit(
        lambda trainable, frozen: batch_gradients(
            CONFIG, OBJECTIVE, trainable, batch, frozen=frozen
        )
    )
    expected, metrics = gradient(params, {})
    found, found_metrics = gradient(trainable, frozen)
    assert by_path(found).keys() == by_path(trainable).keys()
    for path, x in by_path(found).items():
        np.testing.assert_array_equal(x, by_path(expected)[path], err_msg=path)
    assert found_metrics["loss"] == metrics["loss"]


def test_the_rest_moves_as_when_the_frozen_gradient_is_masked():
    """Three steps, bit for bit those whose update of the frozen leaves is left out by hand."""
    mesh = mesh_of(1, 1, 1)
    data, recipe = batches(mesh), TrainingRecipe(learning_rate=1e-3, grad_clip=1e9)
    optimizer = make_optimizer(recipe)
    trainable, frozen = split(placed(mesh))
    before = jax.device_get(frozen)
    state = create_state(optimizer, trainable, mesh)
    moments = state.opt_state[1][0]
    for tree in (moments.mu, moments.nu):
        assert by_path(tree).keys() == by_path(trainable).keys()
    step = make_train_step(CONFIG, optimizer, OBJECTIVE, trainable, mesh)

    whole = placed(mesh)
    masked = optimizer.init(whole)

    @jax.jit
    def reference(params, opt_state, batch):
        grads, _ = batch_gradients(CONFIG, OBJECTIVE, params, batch)
        trained, still = split(grads)
        grads = merged(trained, jax.tree.map(jnp.zeros_like, still))
        updates, opt_state = optimizer.update(grads, opt_state, params)
        moved, _ = split(jax.tree.map(jnp.add, params, updates))
        return merged(moved, split(params)[1]), opt_state

    for n in range(3):
        batch = put_batch(data[n], mesh, 8)
        state, _ = step(state, frozen, batch)
        whole, masked = reference(whole, masked, batch)
    for path, x in by_path(state.params).items():
        np.testing.assert_array_equal(x, by_path(whole)[path], err_msg=path)
        assert np.abs(np.asarray(x) - by_path(placed(mesh))[path]).max() > 1e-4, path
    assert_same(frozen, before)  # still there: not donated


def test_training_with_a_frozen_embedding_can_be_continued(tmp_path):
    """A killed run ends bit for bit as the whole one; checkpoints hold what is trained alone."""
    options = dict(mesh=mesh_of(1, 1, 1), steps=7, frozen=("embed",), checkpoint_every=3)
    whole = training_run.run(tmp_path / "whole", **options)
    with pytest.raises(Crash):
        training_run.run(tmp_path / "killed", data=crashing(batches(), 6), **options)
    assert training_run.run(tmp_path / "killed", **options) == whole
    saved = ocp.StandardCheckpointer().restore(tmp_path / "whole" / "checkpoints" / "6" / "state")
    assert "embed" not in saved["params"] and not any("embed" in k for k in by_path(saved))
    everything = training_run.run(tmp_path / "everything", **{**options, "frozen": ()})
    assert everything[0] != whole[0]
    losses = [row["loss"] for row in whole[1]]
    assert losses[0] == everything[1][0]["loss"] and losses[-1] < losses[0]


def test_the_drift_panel_sees_the_whole_model(tmp_path):
    """Frozen leaves must reach it: with other ones it finds something else."""
    rows = []
    for seed in (0, 1):
        params = {**random_params(CONFIG, 0), "embed": random_params(CONFIG, seed)["embed"]}
        options = dict(mesh=mesh_of(1, 1, 1), steps=1, frozen=("embed",), params=params)
        rows.append(training_run.run(tmp_path / str(seed), **options)[2][0]["heldout"]["logprob"])
    assert abs(rows[0] - rows[1]) > 1e-3


def test_fingerprints_follow_the_tree():
    trainable, frozen = split(random_params(CONFIG, 0))
    names = {params_fingerprint(x) for x in (trainable, frozen, merged(trainable, frozen))}
    assert len(names) == 3
