"""Sampling: greedy equals Transformers, sampled tokens follow the softmax, slots do not matter."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import torch
import transformers
from helpers.models import TIED, bigram_model, random_params, random_records

from lopd.checkpoints import hugging_face
from lopd.errors import UserError
from lopd.machine import devices, sharding
from lopd.models import decoder, inference, presets
from lopd.models.decode_attention import CHUNK, block_rows
from lopd.models.shardings import param_shardings
from lopd.objectives.sampled import huber
from lopd.rollouts.scoring import score_responses
from lopd.sampling import placement
from lopd.sampling.draw import Truncation, draw, truncate
from lopd.sampling.engine import Request, Sampling, Stats, generate

END = 1


def run(config, params, requests, sampling, slots=8, **changes):
    options = dict(slots=slots, capacity=64, decode_steps=5) | changes
    decode_params = inference.inference_params(config, params)
    responses = list(generate(config, decode_params, requests, sampling, **options))
    return sorted(responses, key=lambda r: r.index)


def ragged_requests(config, count, seed=0):
    rng = np.random.default_rng(seed)
    lengths = [(int(n), 1) for n in rng.integers(1, 20, count)]
    records = random_records(config, lengths, seed)
    return [Request(100 + i, i % 3, r["prompt_tokens"]) for i, r in enumerate(records)]


def test_greedy_equals_transformers_generate(config, params, tmp_path):
    hugging_face.save_checkpoint(tmp_path, config, params, end_id=END)
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    requests = ragged_requests(config, 5)
    responses = run(config, params, requests, Sampling(0.0, 40, 0, (END,)), slots=2)
    for request, response in zip(requests, responses, strict=True):
        prompt = torch.tensor(np.asarray(request.prompt_tokens))[None].long()
        expected = reference.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=40,
            do_sample=False,
            pad_token_id=0,
        )[0, prompt.shape[1] :].numpy()
        np.testing.assert_array_equal(response.tokens, expected)
        assert response.finished == (expected[-1] == END)


def reference_distribution(logits, temperature, truncation):
    """What may be drawn and with which probability, in float64, by sorting."""
    logits = np.asarray(logits, np.float64) / temperature
    p = np.exp(logits - logits.max())
    order = np.argsort(-p, kind="stable")
    kept = order[: truncation.top_k or None]
    if truncation.top_p < 1:
        cumulative = np.cumsum(p[kept]) / p[kept].sum()
        kept = kept[: np.searchsorted(cumulative, truncation.top_p) + 1]
    kept = kept[p[kept] >= truncation.min_p * p.max()]
    out = np.zeros_like(p)
    out[kept] = p[kept] / p[kept].sum()
    return out


def assert_drawn_from(tokens, expected):
    """Chi-square over cells that expect at least 5; nothing outside the support. p > 1e-4."""
    observed = np.bincount(tokens, minlength=len(expected))
    assert observed[expected == 0].sum() == 0
    expected = expected * len(tokens)
    common = expected >= 5
    observed = np.append(observed[common], observed[~common].sum())
    expected = np.append(expected[common], expected[~common].sum())
    cells = expected > 0
    assert scipy.stats.chisquare(observed[cells], expected[cells]).pvalue > 1e-4


WAYS = {
    "plain": (1.0, Truncation()),
    "tempered": (0.6, Truncation()),
    "top_k": (1.3, Truncation(top_k=5)),
    "top_p": (1.0, Truncation(top_p=0.6)),
    "min_p": (0.8, Truncation(min_p=0.1)),
    "all": (0.7, Truncation(top_k=12, top_p=0.9, min_p=0.05)),
}


@pytest.mark.parametrize("way", WAYS)
def test_sampled_tokens_follow_the_exact_distribution(way):
    """20,000 first tokens after one prompt, from the whole engine, against float64."""
    temperature, truncation = WAYS[way]
    config, params, table = bigram_model()
    count, token = 20_000, 7
    requests = [Request(i, 0, [token]) for i in range(count)]
    sampling = Sampling(temperature, 1, 5, (END,), truncation)
    responses = run(config, params, requests, sampling, slots=512, capacity=8, decode_steps=1)
    assert len(responses) == count
    expected = reference_distribution(table[token], temperature, truncation)
    assert_drawn_from([r.tokens[0] for r in responses], expected)
    for r in responses[:200]:
        drawn = r.tokens[0]
        np.testing.assert_allclose(r.logprobs[0], table[token, drawn], atol=1e-4)
        np.testing.assert_allclose(r.behaviour_logprobs[0], np.log(expected[drawn]), atol=1e-4)


@pytest.mark.parametrize("way", WAYS)
def test_drawing_from_a_large_vocabulary(way):
    """More tokens than a block of the two-step draw holds; 20,000 rows at once."""
    temperature, truncation = WAYS[way]
    if truncation.top_k:
        truncation = dataclasses.replace(truncation, top_k=200)
    logits = np.random.default_rng(3).normal(size=700).astype(np.float32) * 2
    keys = jax.random.split(jax.random.key(1), 20_000)
    rows = jnp.broadcast_to(jnp.asarray(logits), (len(keys), len(logits)))
    drawn = jax.jit(draw, static_argnums=3)(rows, keys, temperature, truncation)
    assert_drawn_from(drawn.token, reference_distribution(logits, temperature, truncation))


@pytest.mark.parametrize("way", ["top_k", "top_p", "min_p", "all"])
def test_truncation_keeps_exactly_the_right_tokens(way):
    """Per row, with logits so far apart that float32 underflows, and in rows of equal logits."""
    temperature, truncation = WAYS[way]
    rng = np.random.default_rng(0)
    logits = (rng.normal(size=(60, 300)) * rng.uniform(0.1, 60, (60, 1))).astype(np.float32)
    scaled = logits / np.float32(temperature)
    kept = truncate(jnp.exp(scaled - scaled.max(-1, keepdims=True)), truncation) > 0
    for row, keep in zip(logits, kept, strict=True):
        np.testing.assert_array_equal(
            keep, reference_distribution(row, temperature, truncation) > 0
        )
    assert (truncate(jnp.ones((1, 300)), truncation) > 0).all()  # ties stay


def test_fresh_responses_weigh_one_and_give_the_gradient_of_any_others(config, params):
    """Of responses drawn at T = 1, within sampling errors: E[π_θ/π_ref] is 1, and the gradient of
    OPD at π_θ = π_ref is that of other fresh responses (offline and online at the start). Of
    responses drawn at T = 0.5 neither is."""
    prompts = ragged_requests(config, 400)
    teacher = random_params(config, 1)
    # Along which all distributions become flatter.
    direction = {**jax.tree.map(jnp.zeros_like, params), "final_norm": -params["final_norm"]}
    moved = jax.tree.map(lambda x, d: x + 0.05 * d, params, direction)
    drawn = {
        name: run(config, params, prompts, Sampling(temperature, 8, seed, (END,)), slots=64)
        for name, temperature, seed in (("fresh", 1.0, 1), ("others", 1.0, 2), ("cold", 0.5, 1))
    }

    def packed(responses):
        tokens = np.zeros((len(responses), 32), np.int32)
        mask = np.zeros(tokens.shape, bool)
        for row, r in enumerate(responses):
            first = len(r.request.prompt_tokens)
            ids = [*r.request.prompt_tokens, *r.tokens]
            tokens[row, : len(ids)], mask[row, first : len(ids)] = ids, True
        return jnp.asarray(tokens), jnp.asarray(mask)

    @jax.jit
    def logprobs(params, tokens):
        """[R, T] of each token but the first, given those before it."""
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        hidden, _ = decoder.forward(config, params, tokens, positions, jnp.ones_like(tokens))
        logits = jnp.einsum("btd,vd->btv", hidden[:, :-1], decoder.output_head(params))
        of_next = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=2)
        return jnp.pad(of_next[..., 0], ((0, 0), (1, 0)))

    def weights(responses):
        tokens, mask = packed(responses)
        ratio = logprobs(moved, tokens) - logprobs(params, tokens)
        return np.exp(np.asarray(jnp.where(mask, ratio, 0).sum(axis=1), np.float64))

    def slopes(responses):
        """Of each response's loss along `direction`."""
        tokens, mask = packed(responses)
        target = logprobs(teacher, tokens)

        def losses(params):
            difference = target - logprobs(params, tokens)
            return jnp.where(mask, huber(difference, 1.0), 0).sum(axis=1)

        return np.asarray(jax.jvp(losses, (params,), (direction,))[1], np.float64)

    def errors(values, expected, variance=0.0):
        """How many standard errors the mean is away."""
        return abs(values.mean() - expected) / np.sqrt(values.var() / len(values) + variance)

    w, g = ({name: f(r) for name, r in drawn.items()} for f in (weights, slopes))
    assert w["fresh"].std() > 0.05
    assert errors(w["fresh"], 1) < 3 and errors(w["others"], 1) < 3 and errors(w["cold"], 1) > 4
    mean, variance = g["others"].mean(), g["others"].var() / len(prompts)
    assert errors(g["fresh"], mean, variance) < 3 and errors(g["cold"], mean, variance) > 4


def wide_model():
    """Wide enough for XLA to multiply 1, 7, 32 and 64 rows with different rounding, and for
    attention to read rows in blocks."""
    config = dataclasses.replace(
        TIED, vocab_size=300, hidden_size=512, intermediate_size=768, num_hidden_layers=2
    )
    config = dataclasses.replace(config, initializer_range=0.05, head_dim=64)
    return config, random_params(config, 3)


def assert_same_responses(found, expected):
    """Every field bit for bit, matched by request."""
    key = lambda r: (r.request.prompt_id, r.request.sample_id)  # noqa: E731
    expected = {key(r): r for r in expected}
    for response in found:
        other = expected[key(response)]
        for field in ("tokens", "logprobs", "behaviour_logprobs", "finished"):
            np.testing.assert_array_equal(getattr(response, field), getattr(other, field))


def test_responses_are_the_same_whatever_the_slots_order_or_neighbours():
    """Float32, bit for bit: 1, 7, 32 and 100 slots, other orders, steps and subsets."""
    config, params = wide_model()
    rng = np.random.default_rng(0)
    requests = [
        Request(i, i % 3, rng.integers(3, 300, n)) for i, n in enumerate(rng.integers(1, 17, 40))
    ]
    sampling = Sampling(1.0, 140, 3, tuple(range(6)), Truncation(top_p=0.95))
    settings = dict(slots=32, capacity=256, decode_steps=8)
    expected = run(config, params, requests, sampling, **settings)
    assert max(len(r.tokens) for r in expected) > CHUNK  # rows of one chunk and of two
    assert block_rows(config.num_key_value_heads, 256, config.head_dim, 4) < 32
    for changes in (dict(slots=7, decode_steps=8), dict(slots=100, decode_steps=5)):
        found = run(config, params, requests, sampling, **settings | changes)
        assert len(found) == len(requests)
        assert_same_responses(found, expected)
    shuffled = [requests[i] for i in rng.permutation(len(requests))]
    assert_same_responses(run(config, params, shuffled, sampling, **settings), expected)
    alone = run(config, params, requests[:5], sampling, **settings | dict(slots=1))
    assert_same_responses(alone, expected)
    resumed = run(config, params, requests[23:], sampling, **settings)
    assert_same_responses(resumed, expected)


def test_a_mesh_gives_the_same_responses():
    """Rows over data bit for bit; with heads over tensor the same tokens."""
    config = dataclasses.replace(TIED, vocab_size=40)
    params = random_params(config, 0)
    requests = ragged_requests(config, 20)
    sampling = Sampling(1.0, 24, 3, (END,))
    expected = run(config, params, requests, sampling)
    for sizes, exact in (((2, 1, 1), True), ((1, 2, 2), False)):
        trained_on = devices.make_mesh(
            dict(zip(sharding.AXES, sizes, strict=True)), jax.devices()[: math.prod(sizes)]
        )
        mesh = placement.sampling_mesh(config, trained_on)
        assert tuple(mesh.shape.values()) == ((2, 1, 1) if exact else (2, 1, 2))
        shardings = param_shardings(config, mesh)
        spread = jax.device_put(params, param_shardings(config, trained_on))
        spread = inference.inference_params(config, spread, shardings)
        options = dict(slots=20, capacity=64, decode_steps=5, mesh=mesh)
        found = list(generate(config, spread, requests, sampling, **options))
        if exact:
            assert_same_responses(found, expected)
        for a, b in zip(sorted(found, key=lambda r: r.index), expected, strict=True):
            np.testing.assert_array_equal(a.tokens, b.tokens)
            np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)


def test_finished_slots_are_refilled_and_counted():
    """Responses of 1 to 40 tokens on 64 slots: nine in ten slots are at work while prompts last."""
    config, params, _ = bigram_model()
    requests = [Request(i, 0, [7]) for i in range(1500)]
    stats = Stats()
    sampling = Sampling(1.0, 40, 5, (END, 2))
    options = dict(slots=128, capacity=48, decode_steps=1, stats=stats)
    responses = run(config, params, requests, sampling, **options)
    assert stats.responses == len(requests) == len(responses)
    assert stats.tokens == sum(len(r.tokens) for r in responses)
    assert 0.9 < stats.occupancy <= 1
    assert stats.tokens_per_second > 0


def test_slots_are_chosen_from_the_memory_that_is_left(one_device_mesh):
    """Qwen3-8B in bfloat16: 144 KiB of keys and values per position (36 layers, 8 heads of 128)."""
    config = presets.PRESETS["Qwen3-8B"]
    capacity = 5120
    per_slot = capacity * 144 * 1024 + 16 * config.vocab_size
    assert placement.slots_for(config, capacity, 60 * per_slot, shards=1, tensor=1) == 56
    assert placement.slots_for(config, capacity, 5 * per_slot, shards=4, tensor=1) == 20
    assert placement.slots_for(config, capacity, 10**15, shards=1, tensor=8) == 256
    with pytest.raises(UserError, match="response of up to 5120 positions"):
        placement.slots_for(config, capacity, per_slot - 1, shards=1, tensor=1)
    assert placement.slots_that_fit(TIED, 64, one_device_mesh) == 256


def test_slots_that_do_not_fit_are_refused(one_device_mesh, monkeypatch):
    per_slot = placement.slot_bytes(TIED, 64, tensor=1)
    fits = dict(config=TIED, capacity=64, bytes_per_device=5 * per_slot, shards=4, tensor=1)
    assert placement.slots_for(**fits, slots=20) == 20
    assert placement.slots_for(**fits, slots=3) == 3
    with pytest.raises(UserError, match=r"runtime.slots=21: memory is left for 20 responses"):
        placement.slots_for(**fits, slots=21)
    # Half of what the host has left, less what is reserved.
    monkeypatch.setattr(placement, "_available_host_memory", lambda: 32 * per_slot)
    left = functools.partial(placement.slots_that_fit, TIED, 64, one_device_mesh)
    assert (left(), left(slots=16), left(reserved=16 * per_slot)) == (16, 16, 8)
    with pytest.raises(UserError, match="lower it, or set it to None"):
        left(slots=9, reserved=16 * per_slot)
    with pytest.raises(UserError, match="and 0 MiB are left beside the weights"):
        left(reserved=64 * per_slot)


def test_samples_of_a_prompt_differ_and_follow_the_seed(config, params):
    prompt = [5, 6, 7]
    requests = [Request(9, sample, prompt) for sample in range(6)]
    first = run(config, params, requests, Sampling(1.0, 12, 3, (END,)))
    again = run(config, params, requests, Sampling(1.0, 12, 3, (END,)))
    other = run(config, params, requests, Sampling(1.0, 12, 4, (END,)))
    texts = {tuple(r.tokens) for r in first}
    assert len(texts) > 1
    assert texts == {tuple(r.tokens) for r in again}
    assert texts != {tuple(r.tokens) for r in other}


def test_logprobs_equal_transformers_in_float64(config, params, tmp_path):
    """Both kinds, of every token of whole responses, to 1e-4."""
    hugging_face.save_checkpoint(tmp_path, config, params, end_id=END)
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    truncation = Truncation(top_k=20, top_p=0.9, min_p=0.01)
    sampling = Sampling(0.7, 30, 1, (END,), truncation)
    for response in run(config, params, ragged_requests(config, 8), sampling):
        start = len(response.request.prompt_tokens)
        ids = np.concatenate([response.request.prompt_tokens, response.tokens])
        with torch.no_grad():
            logits = reference(torch.tensor(ids)[None].long()).logits[0, start - 1 : -1].numpy()
        for i, token in enumerate(response.tokens):
            plain = reference_distribution(logits[i], 1.0, Truncation())
            drawn_from = reference_distribution(logits[i], 0.7, truncation)
            np.testing.assert_allclose(response.logprobs[i], np.log(plain[token]), atol=1e-4)
            behaviour = np.log(drawn_from[token])
            np.testing.assert_allclose(response.behaviour_logprobs[i], behaviour, atol=1e-4)


def test_logprobs_equal_the_training_forward(config, params, one_device_mesh):
    requests = ragged_requests(config, 12)
    responses = run(config, params, requests, Sampling(0.7, 30, 1, (END,)))
    records = [
        {"prompt_tokens": r.request.prompt_tokens, "response_tokens": r.tokens} for r in responses
    ]
    scored = score_responses(
        config, params, records, mesh=one_device_mesh, row_length=64, rows_per_micro=2
    )
    for response, logprobs in zip(responses, scored, strict=True):
        np.testing.assert_allclose(response.logprobs, logprobs, atol=1e-4)


def test_end_token_is_there_exactly_when_the_response_ended():
    """A model that ends after token 7 and never otherwise; one response ends, one is cut."""
    config, params, _ = bigram_model()
    embed = np.eye(config.vocab_size, config.hidden_size, dtype=np.float32)
    head = np.zeros((config.vocab_size, config.hidden_size), np.float32)
    for token in range(config.vocab_size):
        following = {3: 7, 7: END}.get(token, 8 + token % 2)  # 3 → 7 → end; 8 and 9 alternate
        head[following, token] = 50.0
    params = {**params, "embed": embed, "lm_head": head}
    requests = [Request(0, 0, [3]), Request(1, 0, [8])]
    ends, cut = run(config, params, requests, Sampling(1.0, 6, 0, (END,)))
    assert ends.finished and ends.tokens.tolist() == [7, END]
    assert not cut.finished and END not in cut.tokens and len(cut.tokens) == 6
    # Training puts weight on the end token of the first and on no end token of the second.
    from lopd.data.packing import pack

    records = [
        {"prompt_tokens": r.request.prompt_tokens, "response_tokens": r.tokens} for r in (ends, cut)
    ]
    arrays, _ = pack(records, 32)
    assert (arrays["targets"][arrays["mask"]] == END).sum() == 1
    assert arrays["mask"].sum() == len(ends.tokens) + len(cut.tokens)


def test_padding_rows_of_the_vocabulary_are_normalised_alike(one_device_mesh):
    """A vocabulary larger than the tokenizer's: sampler and scorer divide by the same sum."""
    config = dataclasses.replace(bigram_model()[0], vocab_size=64)
    params = random_params(config, 4)
    (response,) = run(config, params, [Request(0, 0, [3, 4])], Sampling(1.0, 8, 0, (END,)))
    record = {"prompt_tokens": np.array([3, 4]), "response_tokens": response.tokens}
    (scored,) = score_responses(
        config, params, [record], mesh=one_device_mesh, row_length=32, rows_per_micro=1
    )
    np.testing.assert_allclose(response.logprobs, scored, atol=1e-5)
