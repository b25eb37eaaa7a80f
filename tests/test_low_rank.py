"""Low-rank adapters: PEFT and PyTorch are the reference, in float32."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import pytest
import torch
from flax.traverse_util import flatten_dict
from helpers import mesh_measurements, training_run
from helpers.models import (
    MOE,
    TIED,
    UNTIED,
    forward,
    inputs,
    mesh_of,
    random_params,
    transformers_model,
)

from lopd.artefacts.fingerprint import params_fingerprint
from lopd.checkpoints import hugging_face, peft_adapter
from lopd.config.settings import LoraSettings, TrainingRecipe
from lopd.errors import UserError
from lopd.machine import devices
from lopd.machine.sharding import on_mesh
from lopd.models import decoder, inference
from lopd.models.flops import training_flops
from lopd.models.low_rank import (
    Adapter,
    abstract_adapters_on,
    adapted,
    adapter_weights,
    adapters_of,
    base_of,
    init_adapters,
    merged_params,
    shape_of,
)
from lopd.models.shardings import param_shardings
from lopd.models.token_scores import token_scores
from lopd.objectives.sampled import lightning_opd
from lopd.training.state import make_optimizer
from lopd.training.step import batch_gradients
from lopd.training.trees import merged, part_of, trainable_and_frozen

LORA = LoraSettings(rank=4, alpha=6.0)


def random_adapters(config, lora=LORA, mesh=None, seed=1):
    """Adapters whose B is not zero."""
    mesh = mesh or mesh_of(1, 1, 1)
    made = init_adapters(config, lora, mesh, jax.random.key(seed))
    rng = np.random.default_rng(seed)

    def fill(x):
        values = rng.normal(0, 0.1, x.shape).astype(np.float32)
        return jax.device_put(values, x.sharding)

    return jax.tree.map(
        lambda x: x.replace(b=fill(x.b)), made, is_leaf=lambda x: isinstance(x, Adapter)
    )


def in_peft(folder, config, params, lora=LORA):
    """The same model with its adapters in PEFT, through files that we have written."""
    folder.mkdir(exist_ok=True)
    base = base_of(params)
    hugging_face.save_checkpoint(folder, config, base, end_id=2)
    peft_adapter.save_adapters(folder / "adapter", config, lora, adapters_of(params), str(folder))
    model = transformers_model(folder)
    return peft.PeftModel.from_pretrained(model, folder / "adapter", is_trainable=True)


def close(found, expected, name=""):
    """Within 1e-5 of the largest number of the array."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape, name
    scale = np.abs(expected).max()
    assert scale > 0, name
    np.testing.assert_allclose(found / scale, expected / scale, atol=1e-5, err_msg=name)


def our_loss(config, params, tokens, positions, segments):
    hidden, _ = decoder.forward(config, params, tokens, positions, segments)
    scores = token_scores(hidden[:, :-1], decoder.output_head(params), tokens[:, 1:])
    return -scores.logprobs.mean()


def their_loss(model, tokens):
    tokens = torch.tensor(np.asarray(tokens)).long()
    logits = model(tokens).logits[:, :-1]
    return torch.nn.functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]), tokens[:, 1:].reshape(-1)
    )


def their_halves(model, config, lora, what):
    """{(path, half): stacked values, as ours} of what each of PEFT's parameters is turned into."""
    named = dict(model.named_parameters())
    found = {}
    for path, pair in peft_adapter.adapter_rows(config, lora).items():
        for half in ("a", "b"):
            row = getattr(pair, half)
            layers = [
                what(named[row.name.format(i).replace(".weight", ".default.weight")])
                for i in range(config.num_hidden_layers)
            ]
            found["/".join(path) + "." + half] = np.stack([x.T.reshape(row.shape) for x in layers])
    return found


def halves(adapters):
    return {
        "/".join(path) + "." + half: getattr(x, half)
        for path, x in flatten_dict(adapters).items()
        for half in ("a", "b")
    }


@pytest.mark.parametrize(
    ("config", "targets"),
    [
        (TIED, ("attention", "mlp")),
        (UNTIED, ("q_proj", "v_proj")),
        pytest.param(UNTIED, ("mlp", "o_proj"), marks=pytest.mark.slow),
    ],
)
def test_forward_gradients_and_ten_steps_are_those_of_peft(tmp_path, config, targets):
    lora = dataclasses.replace(LORA, targets=targets)
    params = adapted(random_params(config, 0), random_adapters(config, lora))
    batch = inputs(config, 3, 17)
    model = in_peft(tmp_path / "base", config, params, lora)
    trainable, frozen = trainable_and_frozen(params)

    hidden, _ = forward(config, params, *batch)
    logits = hidden @ decoder.output_head(params).T
    close(logits, model(torch.tensor(np.asarray(batch[0])).long()).logits.detach(), "logits")

    @jax.jit
    def loss_and_gradient(trainable):
        return jax.value_and_grad(lambda t: our_loss(config, merged(t, frozen), *batch))(trainable)

    loss, gradient = loss_and_gradient(trainable)
    reference = their_loss(model, batch[0])
    reference.backward()
    np.testing.assert_allclose(loss, reference.item(), rtol=1e-5)
    expected = their_halves(model, config, lora, lambda x: x.grad.numpy().copy())
    for name, x in halves(gradient).items():
        close(x, expected[name], name)
    assert halves(gradient).keys() == expected.keys()

    rate, decay = 3e-3, 0.1
    trained = [x for x in model.parameters() if x.requires_grad]
    theirs = torch.optim.AdamW(trained, rate, (0.9, 0.98), 1e-8, decay)
    recipe = TrainingRecipe(learning_rate=rate, weight_decay=decay, grad_clip=1e9)
    ours = make_optimizer(recipe)
    state = ours.init(trainable)
    for _ in range(10):
        updates, state = ours.update(loss_and_gradient(trainable)[1], state, trainable)
        trainable = optax.apply_updates(trainable, updates)
        theirs.zero_grad()
        their_loss(model, batch[0]).backward()
        theirs.step()
    expected = their_halves(model, config, lora, lambda x: x.detach().numpy().copy())
    for name, x in halves(trainable).items():
        close(x, expected[name], name)

    whole = model.merge_and_unload()
    whole.save_pretrained(tmp_path / "merged")
    found = merged_params(merged(trainable, frozen))
    _, expected = hugging_face.load_checkpoint(tmp_path / "merged", mesh_of(1, 1, 1))
    jax.tree.map(close, found, expected)


def orthogonal(shape, rng):
    return np.stack([np.linalg.qr(rng.normal(size=shape[1:]))[0] for _ in range(shape[0])])


def test_a_full_rank_moves_the_matrices_as_their_own_gradient_does():
    """One layer, B = 0 and A an orthogonal square: a small step of A and B moves W by −η s² G."""
    heads = dict(num_attention_heads=3, num_key_value_heads=3, head_dim=16)  # 48 throughout
    config = dataclasses.replace(TIED, num_hidden_layers=1, intermediate_size=48, **heads)
    lora, rng = LoraSettings(rank=48, alpha=96.0), np.random.default_rng(0)
    params, batch = random_params(config, 0), inputs(config, 2, 11)
    adapters = jax.tree.map(
        lambda x: x.replace(a=orthogonal((1, 48, 48), rng).reshape(x.a.shape).astype(np.float32)),
        init_adapters(config, lora, mesh_of(1, 1, 1), jax.random.key(0)),
        is_leaf=lambda x: isinstance(x, Adapter),
    )
    gradient = jax.jit(jax.grad(lambda p: our_loss(config, p, *batch)))(params)
    adapter_gradient = jax.jit(jax.grad(lambda a: our_loss(config, merged(a, params), *batch)))
    of_adapters = adapter_gradient(adapters)
    rate = 0.25
    moved = jax.tree.map(lambda x, g: x - rate * g, adapters, of_adapters)
    # A's gradient is zero while B is: after one step it is B alone that has moved.
    found = jax.tree.map(jnp.subtract, merged_params(merged(moved, params)), params)
    found, expected = flatten_dict(found), flatten_dict(gradient)
    for path in flatten_dict(adapters):
        close(found[path] / -(rate * 2.0**2), expected[path], path)
    again = adapter_gradient(moved)
    assert all(np.abs(x.a).max() > 0 for x in flatten_dict(again).values())


@pytest.mark.parametrize("config", [TIED, UNTIED])
def test_sampling_reads_what_merging_gives(config):
    """Bit for bit, whatever the layout that decoding takes; and prefill agrees with the forward."""
    params = adapted(random_params(config, 0), random_adapters(config))
    found = inference.inference_params(config, params)
    expected = inference.inference_params(config, merged_params(params))
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    half = dataclasses.replace(config, dtype="bfloat16")
    frozen = jax.tree.map(lambda x: x.astype("bfloat16"), base_of(params))
    params = adapted(frozen, adapters_of(params))
    found = inference.inference_params(half, params)
    expected = inference.inference_params(half, merged_params(params))
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert {x.dtype.name for x in jax.tree.leaves(found)} == {"bfloat16"}


def test_new_adapters_change_nothing_and_start_as_those_of_peft():
    params, lora = random_params(TIED, 0), LoraSettings(rank=4)
    mesh = mesh_of(1, 1, 1)
    made = init_adapters(TIED, lora, mesh, jax.random.key(0))
    batch = inputs(TIED, 2, 9)
    hidden = [forward(TIED, x, *batch)[0] for x in (params, adapted(params, made))]
    np.testing.assert_array_equal(*hidden)
    layer = peft.tuners.lora.Linear(
        torch.nn.Linear(80, 48), "x", config=peft.LoraConfig(r=4, lora_alpha=32), r=4
    )
    theirs, ours = layer.lora_A["x"].weight.detach().numpy(), made["layers"]["mlp"]["down"].a
    bound = 80**-0.5
    assert 0.9 * bound < np.abs(theirs).max() <= bound and 0.9 * bound < ours.max() <= bound
    np.testing.assert_allclose(ours.std(), theirs.std(), rtol=0.1)
    other = init_adapters(TIED, lora, mesh, jax.random.key(1))
    drawn = [*flatten_dict(made).values(), *flatten_dict(other).values()]
    assert len({float(x.a[i].ravel()[0]) for x in drawn for i in range(3)}) == 2 * 7 * 3


def test_trees_are_joined_and_parted():
    base, adapters = random_params(UNTIED, 0), random_adapters(UNTIED)
    params = merged(adapters, base)
    same = functools.partial(jax.tree.map, np.testing.assert_array_equal)
    same(params, adapted(base, adapters))
    same(part_of(params, adapters), adapters)
    same(part_of(params, base), base)
    trainable, frozen = trainable_and_frozen(params)
    same(trainable, adapters), same(frozen, base)
    assert trainable_and_frozen(base) == (base, {})
    assert shape_of(UNTIED, params).rank == 4 and shape_of(UNTIED, base) is None
    assert adapter_weights(params) == sum(x.size for x in jax.tree.leaves(adapters))


def test_a_fingerprint_knows_base_adapter_and_alpha():
    base, adapters = random_params(TIED, 0), random_adapters(TIED)
    louder = jax.tree.map(
        lambda x: x.replace(alpha=7.0), adapters, is_leaf=lambda x: isinstance(x, Adapter)
    )
    half = jax.tree.map(lambda x: x.astype("bfloat16"), base)
    wide = jax.tree.map(lambda x: x.astype("float32"), half)
    names = {
        params_fingerprint(tree)
        for tree in (
            base,
            adapted(base, adapters),
            adapted(base, louder),
            adapted(random_params(TIED, 1), adapters),
            adapted(base, random_adapters(TIED, seed=2)),
            adapted(half, adapters),
        )
    }
    assert len(names) == 6
    assert params_fingerprint(adapted(wide, adapters)) in names  # as whole weights' do


@pytest.mark.parametrize(
    ("kind", "mesh"),
    [
        ("dense", (2, 2, 2)),
        pytest.param("dense", (1, 4, 1), marks=pytest.mark.slow),
        pytest.param("moe", (1, 2, 2), marks=pytest.mark.slow),
    ],
)
def test_same_gradients_and_merged_weights_on_every_mesh(kind, mesh):
    config = mesh_measurements.CONFIGS[kind]
    lora = LoraSettings(rank=3, targets=("attention",) if kind == "moe" else ("attention", "mlp"))

    def measure(mesh):
        base = jax.device_put(mesh_measurements.host_params(kind), param_shardings(config, mesh))
        adapters = random_adapters(config, lora, mesh)
        whole = devices.replicated(mesh)
        batch = mesh_measurements.batch(True, 8)
        rows = devices.rows_sharding(mesh, leading=1)
        batch = jax.tree.map(lambda x: jax.device_put(x, rows if np.ndim(x) else whole), batch)

        def program(adapters, base):
            with on_mesh(mesh):
                grads, metrics = batch_gradients(
                    config, lightning_opd(1.0), adapters, batch, frozen=base
                )
            return grads, metrics["loss"], merged_params(merged(adapters, base))

        lowered = jax.jit(program).lower(adapters, base)
        return lowered.compile({"xla_backend_optimization_level": 0})(adapters, base)

    jax.tree.map(close, measure(mesh_of(*mesh)), measure(mesh_of(1, 1, 1)))


def test_adapters_lie_as_their_matrices_do():
    mesh = mesh_of(2, 2, 2)
    adapters = random_adapters(dataclasses.replace(TIED, vocab_size=40), mesh=mesh)
    specs = {name: tuple(x.sharding.spec) for name, x in halves(adapters).items()}
    assert specs["layers/attention/q.a"] == (None, "fsdp", None)
    assert specs["layers/attention/q.b"] == (None, None, "tensor", None)
    assert specs["layers/attention/o.a"] == (None, "tensor", None, None)
    assert specs["layers/attention/o.b"] == (None, None, "fsdp")
    assert specs["layers/mlp/down.a"] == (None, "tensor", None)
    assert specs["layers/mlp/gate.b"] == (None, None, "tensor")


def test_frozen_weights_have_no_gradient_products():
    """By XLA's count of one layer: no product is left that would be their gradient, the head's and
    the embedding's among them."""
    config = dataclasses.replace(
        TIED, vocab_size=512, hidden_size=128, intermediate_size=384, num_hidden_layers=1
    )
    lora, length = LoraSettings(rank=4), 32
    base = decoder.abstract_params(config)
    adapters = abstract_adapters_on(config, lora, mesh_of(1, 1, 1))
    adapters = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), adapters)
    ids = jax.ShapeDtypeStruct((4, length), jnp.int32)

    def flops(trainable, frozen):
        def loss(trainable, frozen, *batch):
            hidden, _ = decoder.forward(config, merged(trainable, frozen), *batch)
            head = decoder.output_head(merged(trainable, frozen))
            return token_scores(hidden, head, batch[0]).logprobs.mean()

        lowered = jax.jit(jax.grad(loss)).lower(trainable, frozen, ids, ids, ids)
        return lowered.compile().cost_analysis()["flops"]

    spared = flops(base, {}) - flops(adapters, base)
    count = adapter_weights(adapters)
    formula = [training_flops(config, 4 * length, 0, n) for n in (None, count)]
    assert spared == pytest.approx(formula[0] - formula[1], rel=0.1)


def test_experts_have_none():
    with pytest.raises(UserError, match=r"attention only, set student.lora.targets="):
        random_adapters(MOE, LoraSettings(rank=2))
    with pytest.raises(UserError, match=r"attention only"):
        random_adapters(MOE, LoraSettings(rank=2, targets=("q_proj", "up_proj")))
    made = random_adapters(MOE, LoraSettings(rank=2, targets=("attention",)))
    assert [path[-1] for path in flatten_dict(made)] == ["k", "o", "q", "v"]


@pytest.mark.slow
def test_training_on_a_mesh_can_be_continued_bit_for_bit(tmp_path):
    """Killed on 2×2×2 it ends there as the whole run does, and that as on one device."""
    options = dict(mesh=mesh_of(2, 2, 2), steps=7, checkpoint_every=3)
    data = training_run.batches(options["mesh"])
    whole = training_run.run(tmp_path / "whole", "adapters", data=data, **options)
    with pytest.raises(training_run.Crash):
        crashing = training_run.crashing(data, 6)
        training_run.run(tmp_path / "killed", "adapters", data=crashing, **options)
    assert training_run.run(tmp_path / "killed", "adapters", data=data, **options) == whole
    one = training_run.run(tmp_path / "one", "adapters", **{**options, "mesh": mesh_of(1, 1, 1)})
    for row, other in zip(one[1], whole[1], strict=True):
        np.testing.assert_allclose(row["loss"], other["loss"], rtol=1e-6)
        assert row["flops"] == other["flops"]
    assert one[1][-1]["loss"] < one[1][0]["loss"]
    full = training_run.run(tmp_path / "full", "plain", mesh=mesh_of(1, 1, 1), steps=1)
    assert 0.65 < one[1][0]["flops"] / full[1][0]["flops"] < 0.8  # two thirds and the adapters
