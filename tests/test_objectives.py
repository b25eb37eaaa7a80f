"""The objective: the identity it rests on, and its independence of how a batch is laid out."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers.models import random_records

from lopd.config.objectives import LOSSES
from lopd.config.settings import OpdSettings, Settings
from lopd.config.values import changed
from lopd.data.batches import micro_batches
from lopd.data.layout import Layout, MicroBatch
from lopd.data.packing import TokenField
from lopd.data.selection import TokenSelection, token_weights
from lopd.data.tokenizers import load_tokenizer
from lopd.errors import UserError
from lopd.models.token_scores import score_logits
from lopd.objectives.sampled import cross_entropy, huber, lightning_opd
from lopd.objectives.token_weights import highest_entropy, train_highest_entropy
from lopd.stages.objective import (
    check_objective,
    make_objective,
    token_fields,
    token_selection,
)
from lopd.training.step import batch_gradients

LENGTHS = [(3, 9), (1, 4), (6, 20), (2, 1), (5, 13), (4, 8), (2, 30), (3, 3)]
FIELDS = ("teacher_logprobs", "ref_logprobs")


DIVERGENCES = ("forward_kl", "reverse_kl", "jensen_shannon")


def scores_of(logits, targets, at_ids=None):
    return score_logits(jnp.asarray(logits), jnp.asarray(targets), at_ids)


def batch_with(**fields) -> MicroBatch:
    """A micro-batch of which only what a loss reads by name matters."""
    nothing = jnp.zeros(0)
    return MicroBatch(*[nothing] * 7, fields=fields)


def opd_recipe(**changes) -> OpdSettings:
    return dataclasses.replace(OpdSettings(), **changes)


@pytest.mark.parametrize("tau", [0.3, 1.0, 10.0])
def test_huber_gradient_is_the_clipped_policy_gradient(tau):
    """∇ huber_τ(log π_T − log π_θ) = −A ∇log π_θ, A = stop_grad(clip(·, −τ, τ)), to 1e-6."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(5, 7, 11)).astype(np.float32) * 2
    targets = rng.integers(0, 11, (5, 7))
    teacher = rng.uniform(-20, 0, (5, 7)).astype(np.float32)
    batch = batch_with(teacher_logprobs=jnp.asarray(teacher), ref_logprobs=jnp.zeros((5, 7)))

    def loss(logits):
        return lightning_opd(tau)(scores_of(logits, targets), batch)[0].sum()

    def policy_gradient(logits):
        logprobs = scores_of(logits, targets).logprobs
        advantage = jax.lax.stop_gradient(jnp.clip(teacher - logprobs, -tau, tau))
        return -(advantage * logprobs).sum()

    ours, theirs = jax.grad(loss)(logits), jax.grad(policy_gradient)(logits)
    assert (np.abs(teacher - scores_of(logits, targets).logprobs) > tau).any()  # clip is active
    np.testing.assert_allclose(ours, theirs, atol=1e-6, rtol=1e-6)
    # And against float64 NumPy, from the formula of the softmax's gradient.
    z = logits.astype(np.float64)
    probabilities = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    chosen = np.eye(11)[targets]
    logprobs = np.log((probabilities * chosen).sum(-1))
    advantage = np.clip(teacher - logprobs, -tau, tau)
    expected = -advantage[..., None] * (chosen - probabilities)
    np.testing.assert_allclose(ours, expected, atol=2e-6, rtol=1e-5)


def test_huber_values():
    np.testing.assert_allclose(huber(jnp.array([-3.0, -0.5, 0, 2]), 1.0), [2.5, 0.125, 0, 1.5])


def test_label_smoothing_is_the_mixture_cross_entropy():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(4, 9)).astype(np.float32)
    targets = rng.integers(0, 9, 4)
    loss, _ = cross_entropy(0.1)(scores_of(logits, targets), batch_with())
    z = logits.astype(np.float64)
    logp = z - np.log(np.exp(z).sum(-1, keepdims=True))
    mixture = 0.9 * np.eye(9)[targets] + 0.1 / 9
    np.testing.assert_allclose(loss, -(mixture * logp).sum(-1), rtol=1e-5)


def test_token_weights():
    lengths = [2, 6]
    np.testing.assert_allclose(token_weights(lengths, "sample_mean"), [1 / 4, 1 / 12])
    np.testing.assert_allclose(token_weights(lengths, "token_mean"), [1 / 8, 1 / 8])
    np.testing.assert_allclose(token_weights(lengths, "token_sum"), [1 / 2, 1 / 2])
    # A response without trained tokens is none.
    np.testing.assert_allclose(token_weights([2, 0, 6], "sample_mean")[[0, 2]], [1 / 4, 1 / 12])
    np.testing.assert_allclose(token_weights([0, 3], "token_sum")[1], 1)


def gradients(config, params, records, objective=lightning_opd(1.0), fields=FIELDS, **layout):  # noqa: B008
    batch = micro_batches(records, Layout(token_fields=fields, **layout))
    step = jax.jit(lambda params, batch: batch_gradients(config, objective, params, batch))
    return step(params, batch)


def divergence_problem(vocab=11, k=11, seed=0):
    """Student logits, teacher log-probs (of all tokens), and a batch with its top-k."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(3, 4, vocab)).astype(np.float32) * 2
    teacher = torch.log_softmax(torch.tensor(rng.normal(size=(3, 4, vocab)) * 2), -1).numpy()
    ids = np.argsort(-teacher, axis=-1)[..., :k].astype(np.int32)
    zeros = jnp.zeros((3, 4))
    batch = batch_with(
        teacher_logprobs=zeros,
        ref_logprobs=zeros,
        teacher_topk_ids=jnp.asarray(ids),
        teacher_topk_logprobs=jnp.asarray(np.take_along_axis(teacher, ids, -1), jnp.float32),
    )
    return logits, teacher, batch


def divergence_and_gradient(name, logits, batch):
    """Value [B, T] and gradient with respect to logits of the sum, by our objective."""
    objective, targets = make_objective(opd_recipe(objective=name)), np.zeros(logits.shape[:2], int)

    def values(logits):
        return objective(scores_of(logits, targets, batch.fields["teacher_topk_ids"]), batch)[0]

    return values(logits), jax.grad(lambda x: values(x).sum())(jnp.asarray(logits))


def float64_divergence(name, logits, teacher, merged):
    """The same in PyTorch float64 over the whole vocabulary, or with ids `merged` [B, T, tail]
    taken together as one outcome."""
    z = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    p, q = torch.tensor(np.exp(teacher)), torch.softmax(z, -1)
    if merged.shape[-1]:
        tail = torch.tensor(merged)
        keep = torch.ones_like(p, dtype=torch.bool).scatter(-1, tail, False)
        shape = (*p.shape[:-1], -1)
        p, q = (
            torch.cat([x[keep].reshape(shape), x.gather(-1, tail).sum(-1, keepdim=True)], -1)
            for x in (p, q)
        )
    kl = lambda a, b: (a * (a / b).log()).sum(-1)  # noqa: E731
    m = (p + q) / 2
    value = {"forward_kl": lambda: kl(p, q), "reverse_kl": lambda: kl(q, p),
             "jensen_shannon": lambda: (kl(p, m) + kl(q, m)) / 2}[name]()  # fmt: skip
    value.sum().backward()
    return value.detach().numpy(), z.grad.numpy()


@pytest.mark.parametrize("k", [11, 10, 4, 1])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergence_equals_float64(name, k):
    """K = V: of the whole vocabulary, with an empty tail. Less: with the rest as one outcome."""
    logits, teacher, batch = divergence_problem(k=k)
    value, gradient = divergence_and_gradient(name, logits, batch)
    merged = np.argsort(-teacher, axis=-1)[..., k:]
    expected, expected_gradient = float64_divergence(name, logits, teacher, merged)
    # A teacher's tail of 1e-4, known from a float32 sum near 1, has an error of 1e-3 in its log.
    atol = 5e-4 if k == 10 else 5e-6
    np.testing.assert_allclose(value, expected, rtol=2e-5, atol=atol)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=2e-5, atol=atol)


@pytest.mark.parametrize("k", [11, 4])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergence_vanishes_at_the_teacher(name, k):
    _, teacher, batch = divergence_problem(k=k)
    value, gradient = divergence_and_gradient(name, teacher.astype(np.float32), batch)
    np.testing.assert_allclose(value, 0, atol=1e-6)
    np.testing.assert_allclose(gradient, 0, atol=1e-6)


def test_the_known_wrong_reverse_kl_differs():
    """Σ over the top-K of p log p/q, without the tail, pushes a perfect student off its teacher."""
    _, teacher, batch = divergence_problem(k=4)

    def wrong(logits):
        student = scores_of(
            logits, np.zeros((3, 4), int), batch.fields["teacher_topk_ids"]
        ).logprobs_at
        return jnp.sum(jnp.exp(student) * (student - batch.fields["teacher_topk_logprobs"]))

    assert jnp.abs(jax.grad(wrong)(teacher.astype(np.float32))).max() > 0.01


@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergence_is_finite_where_a_tail_vanishes(name):
    """Also on padding, whose fields are all zero."""
    logits, _, batch = divergence_problem(k=3)
    sure = np.full_like(logits, -40.0)
    np.put_along_axis(sure, np.asarray(batch.fields["teacher_topk_ids"])[..., :1], 40.0, axis=-1)
    value, gradient = divergence_and_gradient(name, sure, batch)
    assert np.isfinite(value).all() and np.isfinite(gradient).all() and (value > 0.1).any()
    empty = jax.tree.map(jnp.zeros_like, batch)
    value, gradient = divergence_and_gradient(name, logits, empty)
    assert np.isfinite(value).all() and np.isfinite(gradient).all()


def sampled_problem(vocab=11):
    rng = np.random.default_rng(3)
    logits = rng.normal(size=(5, 7, vocab)).astype(np.float32) * 2
    fields = {name: jnp.asarray(rng.uniform(-6, 0, (5, 7)), jnp.float32) for name in FIELDS}
    return logits, rng.integers(0, vocab, (5, 7)), batch_with(**fields)


def test_extrapolation_shifts_the_advantage():
    """λ: −clip(A + (λ − 1)(log π_T − log π_ref)) ∇log π; λ = 1 is the default, bit for bit."""
    logits, targets, batch = sampled_problem()
    loss = lambda x, **s: make_objective(opd_recipe(tau=2.0, **s))(scores_of(x, targets), batch)[0]  # noqa: E731
    np.testing.assert_array_equal(
        loss(logits), lightning_opd(2.0)(scores_of(logits, targets), batch)[0]
    )
    found = jax.grad(lambda x: loss(x, extrapolation=1.25).sum())(logits)
    p = torch.softmax(torch.tensor(logits, dtype=torch.float64), -1).numpy()
    chosen = np.eye(11)[targets]
    teacher, ref = (np.asarray(batch.fields[name], np.float64) for name in FIELDS)
    shifted = teacher - np.log((p * chosen).sum(-1)) + 0.25 * (teacher - ref)
    expected = -np.clip(shifted, -2, 2)[..., None] * (chosen - p)
    np.testing.assert_allclose(found, expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(("name", "advantage"), [("fixed_advantage", -0.1), ("cross_entropy", 1)])
def test_controls_are_constant_advantages(name, advantage):
    logits, targets, batch = sampled_problem()
    objective = make_objective(opd_recipe(objective=name))
    found = jax.grad(lambda x: objective(scores_of(x, targets), batch)[0].sum())(logits)
    p = torch.softmax(torch.tensor(logits, dtype=torch.float64), -1).numpy()
    np.testing.assert_allclose(found, -advantage * (np.eye(11)[targets] - p), atol=1e-6)
    of_method = lightning_opd(10.0)(scores_of(logits, targets), batch)[1]
    for key, x in objective(scores_of(logits, targets), batch)[1].items():
        np.testing.assert_array_equal(x, of_method[key])


def test_importance_weights_on_exact_distributions():
    """Over every token v with probability π_ref(v): E[w] = 1, and the weighted gradient is that
    under π_θ; a cap cuts both."""
    rng = np.random.default_rng(0)
    V, tokens = 9, np.arange(9)[None]
    theta, ref, teacher = rng.normal(size=(3, V)) * 1.5
    log_softmax = lambda z: z - np.log(np.exp(z).sum())  # noqa: E731
    ref, teacher, p = log_softmax(ref), log_softmax(teacher), np.exp(log_softmax(theta))
    batch = batch_with(
        teacher_logprobs=jnp.asarray(teacher[None], jnp.float32),
        ref_logprobs=jnp.asarray(ref[None], jnp.float32),
    )

    def expected_loss(theta, cap):
        objective = make_objective(opd_recipe(importance_cap=cap))
        logits = jnp.broadcast_to(theta, (1, V, V))
        loss, diagnostics = objective(scores_of(logits, tokens), batch)
        mean = jnp.sum(np.exp(ref) * diagnostics["importance_weight"])
        return jnp.sum(np.exp(ref) * loss), mean

    theta32 = jnp.asarray(theta, jnp.float32)
    gradient, mean_weight = jax.grad(expected_loss, has_aux=True)(theta32, 1e9)
    np.testing.assert_allclose(mean_weight, 1, rtol=1e-5)

    def scaled(w):
        return -np.sum((np.exp(ref) * w * (teacher - np.log(p)))[:, None] * (np.eye(V) - p), 0)

    ratio = p / np.exp(ref)
    np.testing.assert_allclose(gradient, scaled(ratio), atol=1e-5)
    assert (ratio > 1.2).any()
    capped = jax.grad(expected_loss, has_aux=True)(theta32, 1.2)[0]
    np.testing.assert_allclose(capped, scaled(np.minimum(ratio, 1.2)), atol=1e-5)


def test_selection_masks_and_counts():
    tokens = np.array([5, 7, 5, 9, 11, 5, 8, 9, 10, 6], np.int32)
    assert TokenSelection().mask(tokens).all() and TokenSelection().count(tokens) == 10
    selection = TokenSelection(position_fraction=0.55, masked_ids=(5, 9))
    assert selection.mask(tokens).tolist() == [False, True, False, False, True] + [False] * 5
    assert TokenSelection(0.5, 0.3, (7,)).count(tokens) == 2  # ⌈0.3 · 4⌉
    assert TokenSelection(0.001).count(tokens) == 1
    for share in (0.1, 0.3, 0.7):  # the rounded product is the one rule
        for n in range(1, 300):
            count = TokenSelection(entropy_fraction=share).count(np.zeros(n))
            assert abs(count - share * n) < 1 + 1e-4 and count >= 1


def test_highest_entropy_equals_sorting_each_response(config):
    """Exactly `count` tokens of each response, whatever row it is packed into."""
    selection = TokenSelection(0.8, 0.3, masked_ids=(4, 5, 6))
    records = random_records(config, LENGTHS)
    rng = np.random.default_rng(1)
    for record in records:
        record["entropy"] = rng.integers(0, 6, len(record["response_tokens"])) / 4  # with ties
    layout = dict(reduction="sample_mean", rows_per_micro=4, row_length=64, selection=selection)
    batch = micro_batches(records, Layout(token_fields=("entropy",), **layout))
    chosen = {}
    for m in range(int(batch.num_micro)):
        micro = batch.micro(m)
        entropy = jnp.asarray(micro.fields["entropy"])
        keep = highest_entropy(entropy, micro, selection.entropy_fraction)
        for i in range(len(records)):
            where = (micro.segment_ids == i + 1) & micro.mask
            if where.any():
                chosen[i] = np.asarray(keep)[where]
    for i, record in enumerate(records):
        entropy = np.where(selection.mask(record["response_tokens"]), record["entropy"], -1)
        best = np.argsort(-entropy, kind="stable")[: selection.count(record["response_tokens"])]
        assert np.flatnonzero(chosen[i]).tolist() == sorted(best.tolist())


def test_selected_loss_does_not_depend_on_packing(config, params):
    """Mask, position and entropy selection, weights and a divergence, all at once; and the loss is
    the mean over the tokens that are left."""
    records = random_records(config, LENGTHS, **dict.fromkeys(FIELDS))
    rng = np.random.default_rng(2)
    for record in records:
        n = len(record["response_tokens"])
        logits = rng.normal(size=(n, config.vocab_size)) * 2
        logprobs = torch.log_softmax(torch.tensor(logits), -1).numpy()
        record["teacher_topk_ids"] = np.argsort(-logprobs, -1)[:, :6].astype(np.int32)
        record["teacher_topk_logprobs"] = -np.sort(-logprobs, -1)[:, :6].astype(np.float32)
    recipe = opd_recipe(
        objective="reverse_kl", top_k=4, position_fraction=0.9, entropy_fraction=0.5,
        masked_tokens=(3, 4),
    )  # fmt: skip
    selection = token_selection(recipe, load_tokenizer("tiny"))
    options = dict(
        objective=make_objective(recipe), fields=token_fields(recipe, 6), selection=selection
    )
    assert options["fields"][2] == TokenField("teacher_topk_ids", 4, np.int32)
    found = [
        gradients(config, params, records, **options, reduction="sample_mean", **layout)
        for layout in (dict(row_length=40, rows_per_micro=1), dict(row_length=64, rows_per_micro=4))
    ]
    (grads, metrics), (other_grads, other) = found
    assert metrics["tokens"] == sum(r for _, r in LENGTHS)  # diagnostics are of all of them
    assert metrics["loss"] > 0.01
    np.testing.assert_allclose(metrics["loss"], other["loss"], rtol=2e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5), grads, other_grads
    )
    # A constant loss comes out as itself: the weights are those of what is left.
    constant = lambda scores, batch: (jnp.ones_like(scores.logprobs), {})  # noqa: E731
    for reduction in ("sample_mean", "token_mean"):
        layout = dict(reduction=reduction, row_length=64, rows_per_micro=4, selection=selection)
        options["objective"] = train_highest_entropy(constant, recipe.entropy_fraction)
        _, metrics = gradients(config, params, records, options["objective"], FIELDS, **layout)
        np.testing.assert_allclose(metrics["loss"], 1, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "reverse_kl", "extrapolation": 1.25}, "extrapolation=1.25 must be 1"),
        ({"objective": "reverse_kl", "residual_folds": 5}, "residual_folds=5 must be None"),
        ({"objective": "forward_kl", "importance_cap": 2.0}, "importance_cap=2.0 must be None"),
    ],
)
def test_settings_that_do_not_go_together_are_one_clear_line(changes, message):
    with pytest.raises(UserError, match=message):
        check_objective(opd_recipe(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "kl"}, "objective='kl' must be one of log_ratio, forward_kl"),
        ({"residual_folds": 1}, "residual_folds=1 must be at least 2"),
        ({"fixed_advantage": 0.1}, "must be negative"),
        ({"position_fraction": 0.0}, r"position_fraction=0.0 must lie in \(0, 1\]"),
        ({"entropy_fraction": 1.5}, r"entropy_fraction=1.5 must lie in \(0, 1\]"),
        ({"importance_cap": -1.0}, "importance_cap=-1.0 must be positive, or None"),
        ({"masked_tokens": (1.5,)}, "masked_tokens"),
        ({"tau": 0.0}, "tau=0.0 must be positive"),
    ],
)
def test_bad_settings_are_one_clear_line(changes, message):
    with pytest.raises(UserError, match=message):
        changed(Settings(), {f"opd.{key}": value for key, value in changes.items()})


def test_every_objective_has_its_name_and_unit():
    for name, (title, unit) in LOSSES.items():
        make_objective(opd_recipe(objective=name))
        assert title and unit == ("nats²" if name == "log_ratio" else "nats")


def test_missing_top_k_and_unknown_tokens_are_one_clear_line():
    with pytest.raises(UserError, match=r"holds K=2: make it with precompute.teacher_top_k=4"):
        token_fields(opd_recipe(objective="forward_kl", top_k=4), 2)
    with pytest.raises(UserError, match="holds K=0"):
        token_fields(opd_recipe(objective="forward_kl"), 0)
    assert token_fields(opd_recipe(), 0) == FIELDS
    tokenizer = load_tokenizer("tiny")
    assert token_selection(opd_recipe(masked_tokens=("</s>", 3)), tokenizer).masked_ids == (1, 3)
    for token in ("nonsense", 21, -1):
        with pytest.raises(UserError, match=f"masked_tokens: {token!r}"):
            token_selection(opd_recipe(masked_tokens=(token,)), tokenizer)


@pytest.mark.parametrize("reduction", ["sample_mean", "token_mean", "token_sum"])
def test_loss_does_not_depend_on_packing_or_micro_batches(config, params, reduction):
    records = random_records(config, LENGTHS, **dict.fromkeys(FIELDS))
    alone = dict(row_length=40, rows_per_micro=1)  # long rows of one or two
    layouts = [dict(row_length=128, rows_per_micro=1), dict(row_length=64, rows_per_micro=4),
               dict(row_length=40, rows_per_micro=8)]  # fmt: skip
    grads, metrics = gradients(config, params, records, reduction=reduction, **alone)
    assert metrics["tokens"] == sum(r for _, r in LENGTHS)
    for layout in layouts:
        other_grads, other = gradients(config, params, records, reduction=reduction, **layout)
        for name in metrics:
            np.testing.assert_allclose(metrics[name], other[name], rtol=2e-5, atol=1e-6)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5), grads, other_grads
        )


def test_loss_equals_float64_by_hand(config, params, one_device_mesh):
    """The reduced loss of a packed batch, from unpacked log-probabilities in NumPy."""
    from lopd.rollouts.scoring import score_responses

    records = random_records(config, LENGTHS, **dict.fromkeys(FIELDS))
    _, metrics = gradients(
        config, params, records, reduction="sample_mean", row_length=64, rows_per_micro=2
    )
    logprobs = score_responses(
        config, params, records, mesh=one_device_mesh, row_length=64, rows_per_micro=1
    )
    losses = []
    for record, student in zip(records, logprobs, strict=True):
        d = record["teacher_logprobs"].astype(np.float64) - student
        a = np.abs(d)
        losses.append(np.where(a <= 1, d**2 / 2, a - 0.5).mean())
    np.testing.assert_allclose(metrics["loss"], np.mean(losses), rtol=1e-5)
