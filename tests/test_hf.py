"""Checkpoints in Hugging Face's format: exact round trips, memory, and clear refusals."""

import dataclasses
import fnmatch
import json
import os
import pathlib
import re
import subprocess
import sys

import huggingface_hub
import jax
import numpy as np
import pytest
import safetensors.numpy
import transformers
from helpers.models import (
    MOE,
    TIED,
    UNTIED,
    assert_same,
    mesh_of,
    random_params,
    transformers_model,
)
from helpers.published import PUBLISHED

from lopd.checkpoints import hf_config, hugging_face
from lopd.errors import UserError
from lopd.models import decoder
from lopd.models.presets import PRESETS
from lopd.models.shardings import param_shardings

PARAMETERS = {
    "Qwen3-0.6B": 596_049_920,
    "Qwen3-1.7B": 1_720_574_976,
    "Qwen3-4B": 4_022_468_096,
    "Qwen3-8B": 8_190_735_360,
    "Qwen3-14B": 14_768_307_200,
    "Qwen3-32B": 32_762_123_264,
    "Qwen3-30B-A3B": 30_532_122_624,
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen2.5-1.5B": 1_543_714_304,
    "Qwen2.5-7B": 7_615_616_512,
    "Llama-2-7b-hf": 6_738_415_616,
    "Llama-3.1-8B": 8_030_261_248,
    "Llama-3.2-1B": 1_235_814_400,
    "SmolLM2-135M": 134_515_008,
    "SmolLM2-360M": 361_821_120,
}


@pytest.fixture(scope="session")
def tied_params():
    return random_params(TIED, seed=8)


@pytest.fixture(scope="session")
def moe_params():
    return random_params(MOE, seed=8)


@pytest.fixture
def checkpoint(tmp_path, tied_params):
    """A small sharded checkpoint that a test may damage."""
    hugging_face.save_checkpoint(tmp_path, TIED, tied_params, end_id=1, max_shard_bytes=60_000)
    return tmp_path


def edit_config(path, **changes):
    values = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(values | changes))


def edit_shard(path, edit, number=0):
    """Rewrites one weight file with the `safetensors` package."""
    file = sorted(path.glob("*.safetensors"))[number]
    tensors = safetensors.numpy.load_file(file)
    edit(tensors)
    safetensors.numpy.save_file(tensors, file)


def refused(path, mesh, message):
    with pytest.raises(UserError, match=message) as error:
        hugging_face.load_checkpoint(path, mesh)
    assert "\n" not in str(error.value)


# Round trips


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_export_import_export_is_bit_exact(tmp_path, moe_params, dtype):
    """Through shards and a mesh, to the same files."""
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    options = dict(end_id=1, dtype=dtype, max_shard_bytes=50_000)
    hugging_face.save_checkpoint(first, MOE, moe_params, **options)
    config, params = hugging_face.load_checkpoint(first, mesh_of(2, 2, 2), param_dtype=dtype)
    assert (
        params["layers"]["mlp"]["up"].sharding
        == (param_shardings(MOE, mesh_of(2, 2, 2))["layers"]["mlp"]["up"])
    )
    assert_same(params, jax.tree.map(lambda x: x.astype(dtype), moe_params))
    hugging_face.save_checkpoint(second, config, params, **options)
    names = sorted(p.name for p in first.iterdir())
    assert len(names) > 5
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    sizes = [p.stat().st_size for p in first.glob("*.safetensors")]
    assert max(sizes) < 60_000  # the limit, and a header


@pytest.mark.parametrize("config", [UNTIED, MOE], ids=["dense", "moe"])
def test_reads_what_transformers_writes(tmp_path, config, one_device_mesh):
    """Its config.json, its names and its shards: `save_pretrained` of the installed version."""
    params = random_params(config, seed=9)
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.mkdir()
    hugging_face.save_checkpoint(ours, config, params, end_id=1)
    transformers_model(ours).save_pretrained(theirs, max_shard_size="60KB")
    assert len(list(theirs.glob("*.safetensors"))) > 1
    found_config, found = hugging_face.load_checkpoint(theirs, one_device_mesh)
    assert found_config == config
    assert_same(found, params)


@pytest.mark.parametrize("stored", ["float16", "bfloat16", "float32"])
def test_stored_types_convert_exactly(tmp_path, tied_params, one_device_mesh, stored):
    hugging_face.save_checkpoint(tmp_path, TIED, tied_params, end_id=1, dtype=stored)
    config, params = hugging_face.load_checkpoint(tmp_path, one_device_mesh)
    assert config.dtype == ("bfloat16" if stored == "bfloat16" else "float32")
    assert_same(params, jax.tree.map(lambda x: x.astype(stored).astype("float32"), tied_params))


def test_index_lists_every_tensor_and_the_total(checkpoint):
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())
    total = 0
    for file in set(index["weight_map"].values()):
        tensors = safetensors.numpy.load_file(checkpoint / file)
        assert all(index["weight_map"][name] == file for name in tensors)
        total += sum(x.nbytes for x in tensors.values())
    assert index["metadata"]["total_size"] == total
    assert len(index["weight_map"]) == 2 + 11 * TIED.num_hidden_layers


def test_tied_file_may_repeat_its_embedding_as_head(checkpoint, tied_params, one_device_mesh):
    embed = np.asarray(tied_params["embed"])
    edit_shard(checkpoint, lambda tensors: tensors.update({"lm_head.weight": embed}))
    _, params = hugging_face.load_checkpoint(checkpoint, one_device_mesh)
    assert_same(params, tied_params)


# Memory

_MEMORY = """
import ctypes, gc, pathlib, sys
import jax
from lopd.checkpoints import hugging_face
from lopd.machine import devices


def status(key):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

path, mesh = pathlib.Path(sys.argv[1]), devices.make_mesh({"data": 1, "fsdp": 1, "tensor": 1})
for _ in range(2):  # the first load compiles
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = status("VmRSS")
    _, params = hugging_face.load_checkpoint(path, mesh)
    params_bytes = sum(x.nbytes for x in jax.tree.leaves(params))
    above = status("VmHWM") - before - params_bytes
    del params
print(above, params_bytes)
"""


def test_import_holds_two_tensors_at_most(tmp_path):
    """Peak resident memory beyond the parameters, in a process of its own."""
    config = decoder.DecoderConfig(16384, 512, 2048, 12, 4, 2, 128, dtype="bfloat16")
    params = jax.jit(lambda key: decoder.init_params(config, key))(jax.random.key(0))
    hugging_face.save_checkpoint(
        tmp_path, config, params, end_id=1, dtype="bfloat16", max_shard_bytes=40_000_000
    )
    largest = 16384 * 512 * 2
    out = subprocess.run(
        [sys.executable, "-c", _MEMORY, str(tmp_path)],
        env={**os.environ, "XLA_FLAGS": ""},
        cwd=pathlib.Path(hugging_face.__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    above, params_bytes = map(int, out.stdout.split())
    assert params_bytes > 10 * largest
    assert above <= 2 * largest


# config.json


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config_is_the_preset(name):
    assert hf_config.config_from_hf(PUBLISHED[name]) == PRESETS[name]


@pytest.mark.parametrize("name", PARAMETERS)
def test_preset_has_the_published_number_of_parameters(name):
    shapes = jax.tree.leaves(decoder.abstract_params(PRESETS[name]))
    assert sum(x.size for x in shapes) == PARAMETERS[name]
    untied = ("-8B", "-14B", "-32B", "-A3B", "-7B", "-7b-hf")
    assert PRESETS[name].tie_word_embeddings != name.endswith(untied)


def test_other_architecture_is_refused(checkpoint, one_device_mesh):
    edit_config(checkpoint, model_type="gemma", architectures=["GemmaForCausalLM"])
    refused(
        checkpoint, one_device_mesh, r"model_type='gemma', architectures=\['GemmaForCausalLM'\]"
    )
    edit_config(checkpoint, model_type="qwen3", architectures=["Qwen3ForTokenClassification"])
    refused(checkpoint, one_device_mesh, "Qwen3ForTokenClassification")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(attention_bias=True), "attention_bias=True"),
        (dict(use_sliding_window=True, sliding_window=4096), "use_sliding_window=True"),
        (dict(layer_types=["full_attention", "sliding_attention"]), "layer_types="),
        (dict(rope_scaling={"rope_type": "dynamic", "factor": 4.0}), "rope_type='dynamic'"),
        (dict(rope_scaling={"type": "longrope", "long_factor": [2.0]}), "rope_type='longrope'"),
        (dict(rope_parameters={"rope_type": "su", "rope_theta": 1e6}), "rope_type='su'"),
        (dict(mlp_only_layers=[0, 3]), r"mlp_only_layers=\[0, 3\]"),
        (dict(decoder_sparse_step=2), "decoder_sparse_step=2"),
        (dict(hidden_act="gelu"), "hidden_act='gelu'"),
        (dict(quantization_config={"quant_method": "fp8"}), "quantization_config="),
    ],
)
def test_unimplemented_feature_is_refused_by_name(changes, message):
    with pytest.raises(UserError, match=f"{message}.*not implemented"):
        hf_config.config_from_hf(PUBLISHED["Qwen3-30B-A3B"] | changes)


@pytest.mark.parametrize("field", ["hidden_size", "rope_theta", "num_experts"])
def test_missing_field_is_named(field):
    values = {k: v for k, v in PUBLISHED["Qwen3-30B-A3B"].items() if k != field}
    with pytest.raises(UserError, match=f"config.json lacks {field}"):
        hf_config.config_from_hf(values)


QWEN3 = {k: v for k, v in PUBLISHED["Qwen3-30B-A3B"].items() if k != "torch_dtype"}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"vocab_size": None}, "vocab_size=None must be a whole number"),
        ({"vocab_size": 2**40}, "below 2^31"),
        ({"hidden_size": "64"}, "hidden_size is a text"),
        ({"num_attention_heads": None}, "lacks num_attention_heads"),
        ({"num_attention_heads": 0}, "num_attention_heads=0 must be positive"),
        ({"num_key_value_heads": 1.5}, "num_key_value_heads=1.5 must be a whole number"),
        ({"num_experts": 0}, "lacks num_experts"),
        ({"rope_theta": 0}, "rope_theta=0.0 must be positive"),
        ({"rope_theta": "1e6"}, "rope_theta is a text"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings='no' must be true or false"),
        ({"norm_topk_prob": 1}, "norm_topk_prob=1 must be true or false"),
        ({"eos_token_id": 999_999}, "eos_token_id=999999 is no token"),
        ({"eos_token_id": [151645, -1]}, "is no token"),
        ({"eos_token_id": True}, "is no token"),
        ({"architectures": "Qwen3MoeForCausalLM"}, "architectures is a text"),
        ({"model_type": []}, "model_type is a list"),
        ({"layer_types": "full_attention"}, "layer_types is a text"),
        ({"rope_scaling": 4}, "rope_scaling is a number"),
        ({"rope_scaling": {"rope_type": []}}, "rope_type=[]"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": "4"}}, "factor='4'"),
    ],
)
def test_values_of_another_type_or_range_are_one_error(changes, says):
    with pytest.raises(UserError, match=re.escape(says)):
        hf_config.config_from_hf(QWEN3 | changes)


def test_what_transformers_takes_is_taken():
    """Its other name of silu, its head_dim of a file that says none, theta beside parameters."""
    moe, dense = QWEN3, PUBLISHED["Qwen3-4B-Thinking-2507"]
    expected = hf_config.config_from_hf(moe)
    assert hf_config.config_from_hf(moe | {"hidden_act": "swish"}) == expected
    for published, transformers_config in (
        (moe, transformers.Qwen3MoeConfig),
        (dense, transformers.Qwen3Config),
    ):
        values = {k: v for k, v in published.items() if k != "head_dim"}
        theirs = transformers_config(**values)
        heads = theirs.hidden_size // theirs.num_attention_heads
        expected = getattr(theirs, "head_dim", None) or heads
        assert hf_config.config_from_hf(values).head_dim == expected
    theta = dense["rope_theta"]
    for beside in ({"rope_type": "default"}, {"rope_type": "default", "rope_theta": theta}):
        values = dense | {"rope_parameters": beside}
        theirs = transformers.Qwen3Config(**json.loads(json.dumps(values)))
        found = hf_config.config_from_hf(values).rope_theta
        assert found == theirs.rope_parameters["rope_theta"] == theta


@pytest.mark.parametrize("text", ["[]", "null", "3", "", "[" * 100_000, '{"a":' * 100_000])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_json_that_is_no_object_is_one_error(checkpoint, name, text):
    (checkpoint / name).write_text(text)
    with pytest.raises(UserError, match=rf"{name} (is|holds)"):
        hugging_face.check_checkpoint(checkpoint, TIED, "student.model")


@pytest.mark.parametrize(
    ("weight_map", "says"),
    [
        ([], "weight_map must be an object"),
        ({"a": 3}, "3 is no file name"),
        ({"a": "../x"}, "'../x' is no file name"),
        ({"a": "/etc/passwd"}, "'/etc/passwd' is no file name"),
        ({"a": "model-00001-of-00006.safetensors"}, "says that a is in"),
        ({"a": "none.safetensors"}, "which is not there"),
    ],
)
def test_an_index_is_compared_with_its_files(checkpoint, weight_map, says):
    path = checkpoint / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError, match=re.escape(says)):
        hugging_face.check_checkpoint(checkpoint, TIED, "student.model")


def test_headers_are_enough_to_find_damage(checkpoint):
    hugging_face.check_checkpoint(checkpoint, TIED, "student.model")
    wider = dataclasses.replace(TIED, intermediate_size=TIED.intermediate_size * 2)
    with pytest.raises(UserError, match=r"another shape than student\.model: intermediate_size="):
        hugging_face.check_checkpoint(checkpoint, wider, "student.model")
    file = sorted(checkpoint.glob("*.safetensors"))[-1]
    content = file.read_bytes()
    for damaged in (content[:-1], content[:20], b"", content + b"x"):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match="cut short, damaged or not a safetensors file"):
            hugging_face.check_checkpoint(checkpoint, TIED, "student.model")
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(UserError, match="is no file but a pipe"):
        hugging_face.check_checkpoint(checkpoint, TIED, "student.model")


def test_float64_is_not_called_quantised(checkpoint):
    edit_shard(checkpoint, lambda t: t.update({k: v.astype(np.float64) for k, v in t.items()}))
    with pytest.raises(UserError, match=r"stored as F64; only .*\(convert it to F32\)"):
        hugging_face.check_checkpoint(checkpoint, TIED, "student.model")


def test_missing_and_damaged_config(checkpoint, one_device_mesh):
    (checkpoint / "config.json").write_text("{")
    refused(checkpoint, one_device_mesh, r"config\.json is not JSON")
    (checkpoint / "config.json").unlink()
    refused(checkpoint, one_device_mesh, r"config\.json does not exist")


# Weights


def test_missing_tensor(checkpoint, one_device_mesh):
    edit_shard(checkpoint, lambda tensors: tensors.pop("model.norm.weight"))
    refused(checkpoint, one_device_mesh, r"model\.norm\.weight is in .*, which lacks it$")


def test_unexpected_tensor(checkpoint, one_device_mesh):
    extra = {"model.layers.3.input_layernorm.weight": np.ones(48, np.float32)}
    edit_shard(checkpoint, lambda tensors: tensors.update(extra))
    refused(checkpoint, one_device_mesh, r"has model\.layers\.3\.input_layernorm\.weight, which")


def test_duplicate_tensor(checkpoint, one_device_mesh):
    twice = {"model.norm.weight": np.ones(48, np.float32)}
    edit_shard(checkpoint, lambda tensors: tensors.update(twice), number=1)
    refused(checkpoint, one_device_mesh, r"model\.norm\.weight is in both model-00001")


def test_misshapen_tensor(checkpoint, one_device_mesh):
    wrong = {"model.norm.weight": np.ones(47, np.float32)}
    edit_shard(checkpoint, lambda tensors: tensors.update(wrong))
    refused(checkpoint, one_device_mesh, r"norm\.weight has shape \[47\], .* says \[48\]")


def test_quantised_tensor(checkpoint, one_device_mesh):
    quantised = {"model.norm.weight": np.ones(48, np.int8)}
    edit_shard(checkpoint, lambda tensors: tensors.update(quantised))
    refused(checkpoint, one_device_mesh, r"model\.norm\.weight is stored as I8")


def test_tied_head_that_is_not_the_embedding(checkpoint, tied_params, one_device_mesh):
    other = np.asarray(tied_params["embed"]).copy()
    other[-1, -1] += 1e-3
    edit_shard(checkpoint, lambda tensors: tensors.update({"lm_head.weight": other}))
    refused(checkpoint, one_device_mesh, r"lm_head\.weight differs from the embedding")


@pytest.mark.parametrize("keep", [4, 200, -1])
def test_truncated_file(checkpoint, one_device_mesh, keep):
    file = sorted(checkpoint.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:keep])
    refused(checkpoint, one_device_mesh, "model-00001-of-.* cut short")


def test_file_that_is_not_safetensors(checkpoint, one_device_mesh):
    file = sorted(checkpoint.glob("*.safetensors"))[0]
    file.write_bytes((100).to_bytes(8, "little") + b"x" * 500)
    refused(checkpoint, one_device_mesh, "not a safetensors file")


def test_index_naming_a_missing_file(checkpoint, one_device_mesh):
    sorted(checkpoint.glob("*.safetensors"))[1].unlink()
    refused(checkpoint, one_device_mesh, r"index\.json names model-00002-of-.*, which is not there")


def test_folder_without_weights(checkpoint, one_device_mesh):
    for file in checkpoint.glob("model*"):
        file.unlink()
    refused(checkpoint, one_device_mesh, "no weights to read")


def test_shape_that_does_not_divide(checkpoint):
    refused(checkpoint, mesh_of(1, 1, 4), r"which mesh\.tensor=4 does not divide")


# Names


def test_resolves_a_folder_and_a_hub_name(tmp_path, monkeypatch):
    assert hugging_face.resolve_checkpoint(str(tmp_path)) == tmp_path
    asked = []

    def download(name, allow_patterns, **options):
        asked.append(name)
        files = ("merges.txt", "chat_template.jinja", "README.md", "tokenizer.model")
        assert all(any(fnmatch.fnmatch(x, pattern) for pattern in allow_patterns) for x in files)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert hugging_face.resolve_checkpoint("Qwen/Qwen3-0.6B") == tmp_path
    assert asked == ["Qwen/Qwen3-0.6B"]


def test_unreachable_hub_is_one_clear_error(monkeypatch):
    def download(name, **options):
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(
        UserError, match=r"Qwen/Qwen3-0\.6B: .*ConnectionError: no network.*HF_HUB_OFFLINE"
    ):
        hugging_face.resolve_checkpoint("Qwen/Qwen3-0.6B")


@pytest.mark.parametrize("name", ["/nowhere/model", "./a/b", "nowhere"])
def test_missing_folder_is_not_looked_up_on_the_hub(name, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    with pytest.raises(UserError, match=r"there is no such folder$"):
        hugging_face.resolve_checkpoint(name)
