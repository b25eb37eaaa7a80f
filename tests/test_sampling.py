"""Sampling: greedy equals Transformers, sampled tokens follow the softmax, slots do not matter."""

import dataclasses

import numpy as np
import pytest
import torch
import transformers
from conftest import random_params, random_records
from test_scoring import bigram_model

from lopd.models import hf, qwen3
from lopd.sampling.decode import keep_top_p
from lopd.sampling.engine import Request, Sampling, generate
from lopd.scoring import score_responses

END = 1


def run(config, params, requests, sampling, slots=8, **changes):
    options = dict(slots=slots, capacity=64, decode_steps=5, prefill_batch=3) | changes
    decode_params = qwen3.inference_params(config, params)
    responses = list(generate(config, decode_params, requests, sampling, **options))
    return sorted(responses, key=lambda r: r.index)


def ragged_requests(config, count, seed=0):
    rng = np.random.default_rng(seed)
    lengths = [(int(n), 1) for n in rng.integers(1, 20, count)]
    records = random_records(config, lengths, seed)
    return [Request(100 + i, i % 3, r["prompt_tokens"]) for i, r in enumerate(records)]


def test_greedy_equals_transformers_generate(config, params, tmp_path):
    hf.save_checkpoint(tmp_path, config, params, end_id=END)
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


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sampled_tokens_follow_the_softmax(temperature):
    """20,000 first tokens after one prompt against the known distribution (chi-square)."""
    config, params, table = bigram_model()
    count, token = 20_000, 7
    requests = [Request(i, 0, [token]) for i in range(count)]
    sampling = Sampling(temperature, 1, 5, (END,))
    responses = run(config, params, requests, sampling, slots=500, prefill_batch=500)
    observed = np.bincount([r.tokens[0] for r in responses], minlength=config.vocab_size)
    logits = table[token] / temperature
    expected = np.exp(logits - np.log(np.exp(logits).sum())) * count
    common = expected >= 5
    cells_o = np.append(observed[common], observed[~common].sum())
    cells_e = np.append(expected[common], expected[~common].sum())
    statistic = ((cells_o - cells_e) ** 2 / np.maximum(cells_e, 1e-9)).sum()
    freedom = len(cells_e) - 1
    # The 99.99 % point of chi-square, by the Wilson–Hilferty approximation.
    limit = freedom * (1 - 2 / (9 * freedom) + 3.719 * np.sqrt(2 / (9 * freedom))) ** 3
    assert statistic < limit
    for r in responses[:50]:
        np.testing.assert_allclose(r.logprobs[0], table[token, r.tokens[0]], atol=1e-5)
        behaviour = logits[r.tokens[0]] - np.log(np.exp(logits).sum())
        np.testing.assert_allclose(r.behaviour_logprobs[0], behaviour, atol=1e-5)


@pytest.mark.parametrize("top_p", [0.2, 0.5, 0.9])
def test_nucleus_holds_the_fewest_tokens_that_reach_top_p(top_p):
    logits = np.random.default_rng(0).normal(size=(50, 30)).astype(np.float32) * 3
    kept = np.isfinite(keep_top_p(logits, top_p))
    probabilities = np.exp(logits.astype(np.float64))
    probabilities /= probabilities.sum(-1, keepdims=True)
    for p, keep in zip(probabilities, kept, strict=True):
        assert p[keep].sum() >= top_p - 1e-6
        assert p[keep].sum() - p[keep].min() < top_p
        assert keep.all() or p[~keep].max() < p[keep].min()


def test_top_p_samples_the_renormalised_nucleus():
    config, params, table = bigram_model()
    count, token, top_p = 5000, 7, 0.6
    requests = [Request(i, 0, [token]) for i in range(count)]
    sampling = Sampling(1.0, 1, 5, (END,), top_p)
    responses = run(config, params, requests, sampling, slots=500, prefill_batch=500)
    probabilities = np.exp(table[token])
    order = np.argsort(-probabilities)
    size = np.searchsorted(np.cumsum(probabilities[order]), top_p) + 1
    nucleus = order[:size]
    observed = np.bincount([r.tokens[0] for r in responses], minlength=config.vocab_size)
    assert observed[nucleus].sum() == count
    expected = probabilities[nucleus] / probabilities[nucleus].sum()
    sigma = np.sqrt(expected * (1 - expected) / count)
    assert (np.abs(observed[nucleus] / count - expected) < 4 * sigma).all()
    for r in responses[:20]:
        share = probabilities[r.tokens[0]] / probabilities[nucleus].sum()
        np.testing.assert_allclose(r.behaviour_logprobs[0], np.log(share), atol=1e-5)
        np.testing.assert_allclose(r.logprobs[0], table[token, r.tokens[0]], atol=1e-5)


def test_response_does_not_depend_on_slots_or_neighbours(config, params):
    """Bit for bit for permuted requests on the same slots; the same tokens for other counts."""
    requests = ragged_requests(config, 20)
    sampling = Sampling(1.0, 24, 3, (END,))
    expected = run(config, params, requests, sampling)
    order = np.random.default_rng(1).permutation(len(requests))
    permuted = run(config, params, [requests[i] for i in order], sampling)
    for place, i in enumerate(order):
        np.testing.assert_array_equal(permuted[place].tokens, expected[i].tokens)
        np.testing.assert_array_equal(permuted[place].logprobs, expected[i].logprobs)
    for slots, steps in ((1, 7), (20, 1)):
        other = run(config, params, requests, sampling, slots=slots, decode_steps=steps)
        for a, b in zip(expected, other, strict=True):
            np.testing.assert_array_equal(a.tokens, b.tokens)
            np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)


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
