"""The families of decoders against Transformers, and the table of parameters behind them."""

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
import safetensors
import torch
import transformers
from helpers.models import (
    MOE,
    TIED,
    assert_same,
    inputs,
    mesh_of,
    our_logprobs,
    random_params,
    transformers_model,
)
from helpers.published import PUBLISHED
from helpers.tiny_run import tiny_settings
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lopd import pipeline
from lopd.checkpoints import hf_config, hugging_face
from lopd.config import DEFAULT_STAGES
from lopd.errors import UserError
from lopd.models import decoder, inference, rotary
from lopd.models.decoder import DecoderConfig
from lopd.models.decoder_config import RopeScaling
from lopd.models.parameters import decay_mask, parameters
from lopd.models.presets import PRESETS
from lopd.sampling.engine import Request, Sampling, generate

LLAMA3 = RopeScaling(
    "llama3", 8.0, original_max_position_embeddings=64, low_freq_factor=1.0, high_freq_factor=4.0
)
YARN = RopeScaling("yarn", 4.0, original_max_position_embeddings=64)

SMALL = dataclasses.replace(
    TIED, vocab_size=40, num_hidden_layers=2, rope_theta=1e4, rms_norm_eps=1e-5
)
LLAMA = dataclasses.replace(SMALL, qk_norm=False, tie_word_embeddings=False)
QWEN2 = dataclasses.replace(LLAMA, attention_bias=True)
CONFIGS = {
    "llama": LLAMA,
    "llama 3.1": dataclasses.replace(LLAMA, rope_scaling=LLAMA3, tie_word_embeddings=True),
    "llama, linear": dataclasses.replace(LLAMA, rope_scaling=RopeScaling("linear", 4.0)),
    "qwen2": QWEN2,
    "qwen3, yarn": dataclasses.replace(SMALL, rope_scaling=YARN),
}
TABLES = {**CONFIGS, "qwen3": SMALL, "qwen3_moe": MOE}


def random_biases_too(config, seed):
    """`random_params`, with biases that are not zero, so that a missed one shows."""
    rng = np.random.default_rng(seed)

    def perturb(path, x):
        if "bias" not in jax.tree_util.keystr(path):
            return x
        return jnp.asarray(rng.normal(0, 0.5, x.shape), x.dtype)

    return jax.tree_util.tree_map_with_path(perturb, random_params(config, seed))


@pytest.fixture(scope="module", params=CONFIGS)
def twin(request, tmp_path_factory):
    """A random model of a family, the folder it was exported to, and what Transformers loads."""
    config = CONFIGS[request.param]
    params = random_biases_too(config, seed=1)
    path = tmp_path_factory.mktemp("twin")
    hugging_face.save_checkpoint(path, config, params, end_id=1)
    theirs = transformers_model(path)
    return types.SimpleNamespace(config=config, params=params, path=path, theirs=theirs)


def test_equals_transformers(twin):
    """States, logits and log-probabilities over rows longer than the original context."""
    tokens, positions, segments = inputs(twin.config, 2, 90)
    hidden, _ = our_logprobs(twin.config, twin.params, tokens, positions, segments)
    logits = hidden @ decoder.output_head(twin.params).T
    with torch.no_grad():
        out = twin.theirs(torch.tensor(np.asarray(tokens)), output_hidden_states=True)
    for ours, theirs in ((hidden, out.hidden_states[-1]), (logits, out.logits)):
        theirs = theirs.numpy()
        assert np.abs(np.asarray(ours) - theirs).max() <= 1e-5 * np.abs(theirs).max()


def test_greedy_generation_equals_transformers(twin):
    """Prefill and cached decoding, past the original context of 64 positions."""
    rng = np.random.default_rng(5)
    prompts = [rng.integers(0, twin.config.vocab_size, n).astype(np.int32) for n in (50, 11)]
    responses = generate(
        twin.config,
        inference.inference_params(twin.config, twin.params),
        [Request(i, 0, prompt) for i, prompt in enumerate(prompts)],
        Sampling(temperature=0.0, max_response=24, seed=0, end_ids=(-1,)),
        slots=2,
        capacity=80,
        decode_steps=8,
    )
    found = {response.index: response.tokens for response in responses}
    settings = transformers.GenerationConfig(max_new_tokens=24, do_sample=False, pad_token_id=0)
    twin.theirs.generation_config = settings
    for i, prompt in enumerate(prompts):
        ids = torch.tensor(prompt)[None].long()
        expected = twin.theirs.generate(ids, attention_mask=torch.ones_like(ids))
        np.testing.assert_array_equal(found[i], expected[0, len(prompt) :].numpy())


def test_reads_what_transformers_writes(twin, tmp_path):
    """`save_pretrained` of the installed version, onto a mesh; and ours again, the same bytes."""
    twin.theirs.save_pretrained(tmp_path)
    config, params = hugging_face.load_checkpoint(tmp_path, mesh_of(2, 2, 2))
    assert config == twin.config
    assert_same(params, twin.params)
    again = tmp_path / "again"
    again.mkdir()
    hugging_face.save_checkpoint(again, config, params, end_id=1)
    for name in ("config.json", "model.safetensors"):
        assert (again / name).read_bytes() == (twin.path / name).read_bytes()


# Rotary scaling


@pytest.mark.parametrize(
    ("name", "scaling"),
    [
        ("Llama-3.1-8B", PRESETS["Llama-3.1-8B"].rope_scaling),
        ("Llama-3.2-1B", PRESETS["Llama-3.2-1B"].rope_scaling),
        ("Llama-2-7b-hf", RopeScaling("linear", 2.0)),
        ("Qwen3-8B", RopeScaling("yarn", 4.0, 32768)),
        ("Qwen2.5-7B", RopeScaling("yarn", 4.0, 32768, attention_factor=0.7)),
        ("Qwen3-8B", RopeScaling("yarn", 2.0, 8192, beta_fast=20, beta_slow=2, truncate=False)),
    ],
)
def test_frequencies_of_published_shapes_equal_transformers(name, scaling):
    config = dataclasses.replace(PRESETS[name], rope_scaling=scaling)
    values = hf_config.config_to_hf(config, 1, "float32")
    theirs = transformers.AutoConfig.for_model(**values)
    expected, factor = ROPE_INIT_FUNCTIONS[scaling.rope_type](theirs, "cpu")
    np.testing.assert_allclose(rotary.scaled_frequencies(config), expected.numpy(), rtol=1e-6)
    cos, _ = rotary.rotary_tables(config, jnp.zeros((1, 1), jnp.int32))
    np.testing.assert_allclose(cos, factor, rtol=1e-6)


BASE = {
    **hf_config.config_to_hf(dataclasses.replace(SMALL, rope_theta=1e6), 1, "float32"),
    "max_position_embeddings": 40960,
}
BARE = {key: value for key, value in BASE.items() if key != "rope_theta"}
BY_HAND = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
FROM_5 = {"rope_type": "default", "rope_theta": 1e6}


@pytest.mark.parametrize(
    "values",
    [
        BASE | {"rope_scaling": BY_HAND},
        BASE | {"rope_scaling": {**BY_HAND, "type": "yarn"}},
        BASE | {"rope_scaling": BY_HAND, "rope_parameters": FROM_5},
        BARE | {"rope_scaling": {**BY_HAND, "rope_theta": 1e6}},
        BARE | {"rope_scaling": {**BY_HAND, "rope_theta": 1e6}, "rope_parameters": FROM_5},
        BARE | {"rope_parameters": {**FROM_5, **BY_HAND}},
        BARE | {"rope_parameters": {**FROM_5, **BY_HAND}, "rope_scaling": None},
        BARE | {"rope_parameters": {**FROM_5, **BY_HAND}, "rope_scaling": {}},
        BARE | {"rope_parameters": {"rope_theta": 1e6, **BY_HAND, "attention_factor": 1.0}},
        BASE | {"rope_scaling": {**BY_HAND, "mscale": 0.7, "mscale_all_dim": 0.5}},
        BASE | {"rope_scaling": {"type": "yarn", "factor": 4.0}},
        BASE | {
            "rope_scaling": {"rope_type": "yarn", "factor": 4.0},
            "original_max_position_embeddings": 16384,
        },
    ],
)  # fmt: skip
def test_yarn_is_read_as_transformers_reads_it(values):
    """Added by hand in every spelling that Transformers 5 takes: its own frequencies and scale."""
    theirs = transformers.AutoConfig.for_model(**json.loads(json.dumps(values)))
    expected, factor = ROPE_INIT_FUNCTIONS["yarn"](theirs, "cpu")
    config = hf_config.config_from_hf(values)
    assert config.rope_theta == 1e6
    np.testing.assert_allclose(rotary.scaled_frequencies(config), expected.numpy(), rtol=1e-6)
    cos, _ = rotary.rotary_tables(config, jnp.zeros((1, 1), jnp.int32))
    np.testing.assert_allclose(cos, factor, rtol=1e-6)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        # Transformers 5 reads rope_theta 10,000 here.
        (BARE | {"rope_scaling": BY_HAND, "rope_parameters": FROM_5}, "rope_theta=1000000.0 in"),
        (BARE | {"rope_scaling": BY_HAND}, "lacks rope_theta"),
        (BASE | {"rope_scaling": {**BY_HAND, "rope_theta": 1e4}}, "rope_theta=1000000.0 and"),
        (
            BASE | {"rope_scaling": BY_HAND, "rope_parameters": {**FROM_5, "rope_theta": 5e6}},
            "rope_theta=5000000.0 in",
        ),
        (
            BASE | {"rope_scaling": BY_HAND, "rope_parameters": {**BY_HAND, "factor": 2.0}},
            "factor=2.0 in",
        ),
        (
            BASE | {"rope_scaling": {"rope_type": "default"}, "rope_parameters": BY_HAND},
            "rope_type='yarn' in",
        ),
        (BASE | {"rope_scaling": {**BY_HAND, "type": "linear"}}, "type='linear' and"),
        (BASE | {"rope_scaling": {"factor": 4.0}}, "no rope_type"),
        (BASE | {"rope_scaling": {**BY_HAND, "factor": None}}, "needs rope_scaling.factor"),
        (BASE | {"rope_scaling": {**BY_HAND, "short_factor": [1.0]}}, "short_factor"),
        (
            BASE | {"rope_scaling": BY_HAND, "original_max_position_embeddings": 4096},
            "original_max_position_embeddings=4096",
        ),
        (BASE | {"rope_scaling": {"type": "YARN", "factor": 4.0}}, "rope_type='YARN'"),
        (BASE | {"rope_scaling": {"type": "mrope"}}, "rope_type='mrope'"),
        (BASE | {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        (BARE | {"rope_parameters": {**FROM_5, "partial_rotary_factor": 0.5}}, "partial_rotary"),
    ],
)
def test_rotary_settings_that_contradict_themselves_are_refused(values, message):
    with pytest.raises(UserError, match=message):
        hf_config.config_from_hf(values)


def test_transformers_loses_theta_beside_scaling_added_by_hand():
    """Why that is refused: if this fails, it can be read (`hf_config._stated_rope`)."""
    values = BARE | {"rope_scaling": dict(BY_HAND), "rope_parameters": dict(FROM_5)}
    assert transformers.AutoConfig.for_model(**values).rope_parameters["rope_theta"] == 10_000


# config.json


def as_hf(config, **changes):
    return hf_config.config_to_hf(config, 1, "float32") | changes


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (as_hf(LLAMA, attention_bias=True), "attention_bias=True"),
        (as_hf(LLAMA, mlp_bias=True), "mlp_bias=True"),
        (as_hf(LLAMA, rope_interleaved=True), "rope_interleaved=True"),
        (as_hf(QWEN2, use_sliding_window=True, sliding_window=64), "use_sliding_window=True"),
        (as_hf(QWEN2, layer_types=["sliding_attention"] * 2), "layer_types="),
        (as_hf(QWEN2, quantization_config={"quant_method": "gptq"}), "quantization_config="),
        (as_hf(LLAMA, hidden_act="gelu"), "hidden_act='gelu'"),
        (as_hf(LLAMA, rope_scaling={"type": "dynamic", "factor": 2.0}), "rope_type='dynamic'"),
        (as_hf(LLAMA, model_type="mistral"), "model_type='mistral'"),
        (as_hf(LLAMA, architectures=["LlamaForSequenceClassification"]), "LlamaForSequence"),
    ],
)
def test_what_a_family_does_not_have_is_refused_by_name(values, message):
    with pytest.raises(UserError, match=f"{message}.*implemented"):
        hf_config.config_from_hf(values)


@pytest.mark.parametrize("field", ["num_key_value_heads", "rope_theta"])
def test_only_llama_may_omit(field):
    values = as_hf(QWEN2)
    del values[field]
    with pytest.raises(UserError, match=f"lacks {field}"):
        hf_config.config_from_hf(values)


@pytest.mark.parametrize(
    ("config", "omitted"),
    [
        (LLAMA, ("head_dim", "num_key_value_heads", "rope_theta")),
        (QWEN2, ("head_dim",)),
    ],
)
@pytest.mark.parametrize("how", ["absent", "null"])
def test_omitted_fields_are_as_transformers_derives_them(config, omitted, how, tmp_path):
    values = {key: value for key, value in as_hf(config).items() if key not in omitted}
    theirs = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**values)
    )
    if how == "null":
        values |= dict.fromkeys(omitted)
    found = hf_config.config_from_hf(values)
    assert found.rope_theta == theirs.config.rope_parameters["rope_theta"]
    theirs.save_pretrained(tmp_path)
    with safetensors.safe_open(tmp_path / "model.safetensors", "numpy") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert shapes == expected_tensors(found)


def test_flags_of_no_family_cannot_be_exported():
    config = dataclasses.replace(QWEN2, qk_norm=True)
    with pytest.raises(UserError, match="qk_norm=True and attention_bias=True"):
        hf_config.config_to_hf(config, 1, "float32")


@pytest.mark.parametrize("config", TABLES.values(), ids=TABLES)
def test_shape_survives_manifests_and_settings(config):
    """Through JSON, as manifests hold it, and through plain dictionaries of settings."""
    plain = dataclasses.asdict(config)
    written = json.loads(json.dumps(plain))
    assert written == plain
    for values in (written, ml_collections.ConfigDict(written)):
        found = DecoderConfig(**values)
        assert found == config and hash(found) == hash(config)
        assert dataclasses.asdict(found) == plain


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "rope_type='dynamic' is not implemented"),
        ({"rope_type": "yarn", "factor": 2.0}, "needs rope_scaling.original_max_position"),
        ({"rope_type": "linear", "factor": 0.5}, "factor=0.5 must be at least 1"),
        ({"rope_type": "linear", "factor": "4"}, "factor='4' must be a positive number"),
        ({"rope_type": "linear", "factor": 2.0, "beta_fast": 3}, "does not use beta_fast=3"),
        ({"rope_type": "linear", "factor": 2.0, "theta": 3}, "theta"),
        (dataclasses.asdict(LLAMA3) | {"high_freq_factor": 1.0}, "low_freq_factor=1.0 must be"),
    ],
)
def test_scaling_in_the_settings_is_checked(scaling, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(LLAMA, rope_scaling=scaling)


def test_published_llama_is_the_preset():
    """meta-llama/Llama-3.2-1B's config.json, as Transformers 4.45 wrote it."""
    published = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "initializer_range": 0.02,
        "intermediate_size": 8192,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 16,
        "num_key_value_heads": 8,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": 128256,
    }
    assert hf_config.config_from_hf(published) == PRESETS["Llama-3.2-1B"]
    assert hf_config.config_from_hf(PUBLISHED["Qwen3-30B-A3B"]).qk_norm


# The table of parameters


def expected_tensors(config) -> dict[str, tuple[int, ...]]:
    """Name and shape of each tensor of a file, by the table."""
    tensors = {}
    for row in parameters(config).values():
        leading = (config.num_hidden_layers,) * row.stacked + row.shape[: row.listed]
        for index in np.ndindex(*leading):
            tensors[row.name.format(*index)] = row.file_shape
    return tensors


@pytest.mark.parametrize("config", TABLES.values(), ids=TABLES)
def test_table_names_what_transformers_saves(config, tmp_path):
    """Exactly the tensors, with their shapes, of a random model that Transformers makes."""
    values = as_hf(config)
    theirs = transformers.AutoConfig.for_model(**values)
    transformers.AutoModelForCausalLM.from_config(theirs).save_pretrained(tmp_path)
    with safetensors.safe_open(tmp_path / "model.safetensors", "numpy") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert shapes == expected_tensors(config)


@pytest.mark.parametrize("config", TABLES.values(), ids=TABLES)
def test_layers_have_the_tables_shapes(config):
    """`Block` draws every leaf of the table, of its shape, and no other."""
    x = jnp.zeros((1, 1, config.hidden_size))
    positions = jnp.zeros((1, 1), jnp.int32)
    rotary_inputs = rotary.rotary_tables(config, positions)
    block = decoder.Block(config)
    drawn = jax.eval_shape(
        lambda key: block.init(key, x, rotary_inputs, positions), jax.random.key(0)
    )
    shapes = {
        ("layers", *(key.key for key in path)): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(drawn["params"])
    }
    rows = parameters(config)
    assert shapes == {path: row.shape for path, row in rows.items() if row.stacked}
    whole = jax.eval_shape(lambda key: decoder.init_params(config, key), jax.random.key(0))
    assert_same_shapes(whole, decoder.abstract_params(config))


def assert_same_shapes(tree, other):
    facts = lambda tree: jax.tree.map(lambda x: (x.shape, str(x.dtype)), tree)  # noqa: E731
    assert facts(tree) == facts(other)


def test_decay_mask():
    """All matrices, an untied head too; no norm, bias or embedding."""
    mask = decay_mask(decoder.abstract_params(QWEN2))
    assert mask == {
        "embed": False,
        "final_norm": False,
        "lm_head": True,
        "layers": {
            "input_norm": False,
            "post_attention_norm": False,
            "attention": {
                **dict.fromkeys(("q", "k", "v", "o"), True),
                **dict.fromkeys(("q_bias", "k_bias", "v_bias"), False),
            },
            "mlp": dict.fromkeys(("gate", "up", "down"), True),
        },
    }
    mask = decay_mask(decoder.abstract_params(MOE))["layers"]
    assert mask["mlp"] == dict.fromkeys(("router", "gate", "up", "down"), True)
    assert not mask["attention"]["q_norm"] and not mask["attention"]["k_norm"]


def test_compute_types():
    """Norm scales stay in float32, matrices and biases are cast."""
    config = dataclasses.replace(QWEN2, dtype="bfloat16")
    params = jax.eval_shape(lambda: decoder.init_params(config, jax.random.key(0)))
    cast = jax.eval_shape(lambda p: decoder.compute_params(config, p), params)
    for path, row in parameters(config).items():
        leaf = cast
        for part in path:
            leaf = leaf[part]
        kept = row.kind == "norm" or not row.stacked
        assert leaf.dtype == ("float32" if kept else "bfloat16"), path


def test_flags_of_no_family_are_refused_before_work(tmp_path):
    """`export` could not name the architecture in config.json."""
    shape = {**tiny_settings().student.model, "attention_bias": True}
    settings = tiny_settings(student__model=shape)
    with pytest.raises(UserError, match="qk_norm=True and attention_bias=True together"):
        pipeline.run(settings, str(tmp_path / "w"), DEFAULT_STAGES)
    assert not (tmp_path / "w").exists()
