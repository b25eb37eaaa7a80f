"""Runs whose student is trained by adapters: artefacts, resuming, PEFT in and out."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import orbax.checkpoint as ocp
import peft
import pytest
import torch
from helpers.models import random_params, transformers_model
from helpers.tiny_run import interrupt, open_run, run, save_models, tiny_settings

from lopd import pipeline
from lopd.artefacts.artefact import Artefact
from lopd.cache.reader import Records
from lopd.checkpoints import hugging_face, peft_adapter
from lopd.errors import UserError
from lopd.models.low_rank import (
    LowRank,
    adapters_of,
    base_of,
    count_weights,
    is_stored,
    merged_params,
)
from lopd.models.memory import model_size
from lopd.rollouts.passes import resident_bytes
from lopd.stages.scored import scorer
from lopd.stages.weights import load_params

SMALL = {
    "student__lora__rank": 4,
    "sft_data__prompts": 16,
    "sft__steps": 6,
    "sft__batch_size": 8,
    "sft__warmup_steps": 0,
    "sft__learning_rate": 3e-2,
    "precompute__prompts": 16,
    "heldout__prompts": 6,
    "opd__steps": 6,
    "opd__batch_size": 8,
    "opd__warmup_steps": 0,
    "opd__learning_rate": 1e-2,
    "control__steps": 3,
    "control__batch_size": 8,
    "control__warmup_steps": 0,
    "eval__prompts": 8,
    "runtime__checkpoint_every": 2,
    "runtime__drift_every": 3,
    "metrics__tensorboard": False,
}
STAGES = ("sft_data", "sft", "precompute", "heldout", "opd", "control", "eval", "export")

pytestmark = pytest.mark.usefixtures("one_device")


def adapted_run(models, workdir, *stages, **changes):
    """Stages of a run with adapters; π_ref is trained unless it is given."""
    given = {"sft__checkpoint": "", **SMALL, **changes}
    run(models, workdir, *stages, **given)
    return pathlib.Path(workdir)


def opened(models, workdir, **changes):
    given = {"teacher__checkpoint": f"{models}/teacher", **SMALL, **changes}
    return open_run(workdir, tiny_settings(**given))


@pytest.fixture(scope="module")
def base(tiny_models, tmp_path_factory):
    """A base student as a checkpoint."""
    folder = tmp_path_factory.mktemp("base")
    model = opened(tiny_models, folder).model("student")
    hugging_face.save_checkpoint(folder, model, random_params(model, 7), end_id=2)
    return folder


@pytest.fixture(scope="module")
def whole(tiny_models, base, tmp_path_factory):
    """A finished run of all stages."""
    workdir = tmp_path_factory.mktemp("whole")
    return adapted_run(tiny_models, workdir, *STAGES, "online", student__checkpoint=str(base))


def manifest(workdir, stage) -> dict:
    return json.loads((workdir / stage / "manifest.json").read_text())


def metrics(workdir, stage, name="metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (workdir / stage / name).read_text().splitlines()]


def paths(tree) -> set[str]:
    return {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)}


def test_checkpoints_and_weights_hold_adapters_alone(whole):
    names = {f"['{n}']['{half}']" for n in ("q", "k", "v", "o") for half in "ab"}
    expected = {f"['layers']['attention']{name}" for name in names}
    mlp = {f"['{n}']['{half}']" for n in ("gate", "up", "down") for half in "ab"}
    expected |= {f"['layers']['mlp']{name}" for name in mlp}
    read = ocp.StandardCheckpointer().restore
    for stage in ("sft", "opd", "control", "online"):
        assert paths(read(whole / stage / "params")) == expected
        outputs = manifest(whole, stage)["outputs"]["lora"]
        assert outputs["base"] == manifest(whole, "sft")["outputs"]["lora"]["base"]
    state = read(whole / "opd" / "checkpoints" / "4" / "state")
    assert paths(state["params"]) == expected
    arrays = [x for x in jax.tree.leaves(state) if x.ndim > 1]
    assert len(arrays) == 3 * len(expected)


def test_adapters_move_and_the_base_stays(whole, tiny_models, base):
    this = opened(tiny_models, whole, student__checkpoint=str(base))
    ref, trained = load_params(this, "sft"), load_params(this, "opd")
    _, expected = hugging_face.load_checkpoint(base, this.mesh)
    for params in (ref, trained):
        jax.tree.map(np.testing.assert_array_equal, base_of(params), expected)
    for one, other in zip(
        jax.tree.leaves(ref, is_leaf=is_stored), jax.tree.leaves(trained, is_leaf=is_stored),
        strict=True,
    ):  # fmt: skip
        if isinstance(one, LowRank):
            assert np.abs(one.adapter.b).max() > 0
            assert (np.asarray(one.adapter.b) != other.adapter.b).any()
            assert (np.asarray(one.adapter.a) != other.adapter.a).any()


def test_losses_fall_and_ratios_begin_at_one(whole):
    """The π_ref that scored is the one that training starts from, in `opd` and online."""
    assert metrics(whole, "sft")[-1]["loss"] < metrics(whole, "sft")[0]["loss"]
    first = metrics(whole, "opd")[0]
    assert abs(first["importance_weight"] - 1) < 1e-5 and abs(first["ess_fraction"] - 1) < 1e-6
    assert abs(metrics(whole, "online")[3]["importance_weight"] - 1) < 1e-4
    last = metrics(whole, "opd", "drift.jsonl")[-1]["heldout"]
    assert 0 < last["ess_fraction"] < 1
    assert manifest(whole, "precompute")["outputs"]["sampler_scorer_gap"]["max"] < 1e-4
    models = json.loads((whole / "eval" / "summary.json").read_text())["models"]
    assert list(models) == ["teacher", "base", "sft", "opd", "online", "control"]


@pytest.mark.parametrize("stage", ["sft", pytest.param("opd", marks=pytest.mark.slow)])
def test_killed_and_continued_gives_the_same(whole, tiny_models, base, tmp_path, stage):
    """Bit for bit, from a SIGKILL in the middle of a checkpoint's writing."""
    changes = {**SMALL, "sft__checkpoint": "", "student__checkpoint": str(base)}
    for name in ("sft_data", "sft", "precompute", "heldout"):
        if name != stage and not (name != "sft_data" and stage == "sft"):
            (tmp_path / name).symlink_to(whole / name)
    interrupt(tmp_path, tiny_models, stage, f"{stage}/checkpoints/4", **changes)
    assert not (tmp_path / stage / "params").exists()
    adapted_run(tiny_models, tmp_path, stage, student__checkpoint=str(base))
    found, expected = (manifest(where, stage)["outputs"] for where in (tmp_path, whole))
    assert found["fingerprint"] == expected["fingerprint"] and found["lora"] == expected["lora"]


def test_another_base_is_refused_when_training_goes_on(tiny_models, whole, base, tmp_path):
    """The name may be the same: what is compared is the weights."""
    copy = tmp_path / "base"
    model = opened(tiny_models, tmp_path).model("student")
    copy.mkdir()
    hugging_face.save_checkpoint(copy, model, random_params(model, 7), end_id=2)
    (tmp_path / "sft_data").symlink_to(whole / "sft_data")
    changes = {**SMALL, "sft__checkpoint": "", "student__checkpoint": str(copy)}
    interrupt(tmp_path, tiny_models, "sft", "sft/checkpoints/4", **changes)
    hugging_face.save_checkpoint(copy, model, random_params(model, 8), end_id=2)
    with pytest.raises(UserError, match=r"made with other settings \(frozen: "):
        adapted_run(tiny_models, tmp_path, "sft", student__checkpoint=str(copy))


def test_finished_adapters_on_another_base_are_refused(tiny_models, whole, base, tmp_path):
    model = opened(tiny_models, tmp_path).model("student")
    other = tmp_path / "other"
    other.mkdir()
    hugging_face.save_checkpoint(other, model, random_params(model, 8), end_id=2)
    for given, name in ((str(other), str(other)), ("", "random weights of seed 0")):
        this = opened(
            tiny_models, tmp_path, student__checkpoint=given, sft__checkpoint=str(whole / "sft")
        )
        with pytest.raises(UserError, match=rf"lie on weights .* {name} has .*student.checkpoint"):
            load_params(this, "sft")


def test_another_rank_is_another_artefact(whole, tiny_models, base):
    changes = {"student__checkpoint": str(base), "student__lora__rank": 2}
    with pytest.raises(UserError, match=r"student_lora.rank: 4 → 2"):
        adapted_run(tiny_models, whole, "opd", **changes)


def test_memory_counts_the_base_once_and_moments_of_adapters(tiny_models, tmp_path):
    """Beside a teacher in float32: bfloat16 weights to score and to decode, adapters, moments."""
    settings = {"student__lora__rank": 4, "dtype": "bfloat16"}
    this = opened(tiny_models, tmp_path, **settings)
    student, teacher = (scorer(this, who, 128) for who in ("student", "teacher"))
    model = this.model("student")
    weights, adapters = 2 * model_size(model).total, 4 * count_weights(model, this.lora)
    assert student.weight_bytes() == weights + adapters
    assert student.moment_bytes() == 2 * adapters
    held = 4 * model_size(this.model("teacher")).total + 2 * weights + adapters
    assert resident_bytes(student, teacher) == held
    assert resident_bytes(student, teacher, optimizer=True) == held + 2 * adapters


def test_export_is_whole_and_its_adapter_loads_in_peft(whole, tiny_models, base):
    """Merged in Transformers and adapted in PEFT it computes what our weights do."""
    exported = whole / "export"
    merged = transformers_model(exported)  # PEFT is installed: it must not take it for an adapter
    assert not isinstance(merged, peft.PeftModel)
    config = json.loads((exported / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base) and config["r"] == 4
    adapted = peft.AutoPeftModelForCausalLM.from_pretrained(exported / "adapter")
    tokens = torch.arange(3, 19)[None]
    logits = [model(tokens).logits.detach().numpy() for model in (merged, adapted)]
    np.testing.assert_allclose(*logits, atol=1e-5 * np.abs(logits[0]).max())
    assert "rank 4, alpha 32, on q_proj, k_proj" in (exported / "README.md").read_text()
    plain = transformers_model(base)(tokens).logits.detach().numpy()
    assert np.abs(plain - logits[0]).max() > 1e-2
    _, found = hugging_face.load_checkpoint(exported, opened(tiny_models, whole).mesh)
    this = opened(tiny_models, whole, student__checkpoint=str(base))
    expected = merged_params(load_params(this, "opd"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, expected)


@pytest.fixture(scope="module")
def trained_by_peft(base, tmp_path_factory):
    """An adapter of a few steps of PEFT's own, on two of the matrices."""
    folder = tmp_path_factory.mktemp("peft")
    torch.manual_seed(0)
    model = peft.get_peft_model(
        transformers_model(base),
        peft.LoraConfig(
            r=3, lora_alpha=5, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
        ),
    )
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    tokens = torch.randint(3, 21, (4, 12))
    for _ in range(4):
        optimizer.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    return folder, tokens, model.eval()(tokens).logits.detach().numpy()


@pytest.mark.parametrize("lora", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_an_adapter_by_peft_is_a_sft_checkpoint(trained_by_peft, tiny_models, tmp_path, lora):
    """With adapters it is trained on; without, its merged weights are. The base is the one that it
    names, or `student.checkpoint`."""
    folder, tokens, logits = trained_by_peft
    changes = {
        "sft__checkpoint": str(folder),
        "sft__teacher": f"{tiny_models}/teacher",
        "student__model": {},
        "student__lora__rank": 3 if lora else None,
        "student__lora__alpha": 5,
        "student__lora__targets": ("v_proj", "q_proj"),
    }
    workdir = adapted_run(tiny_models, tmp_path, "precompute", "opd", "export", **changes)
    this = opened(tiny_models, tmp_path, **changes)
    found = merged_params(load_params(this, "sft"))
    (tmp_path / "merged").mkdir()
    hugging_face.save_checkpoint(tmp_path / "merged", this.model("student"), found, end_id=2)
    ours = transformers_model(tmp_path / "merged")(tokens).logits.detach().numpy()
    np.testing.assert_allclose(ours, logits, atol=1e-5 * np.abs(logits).max())
    outputs = manifest(workdir, "sft")["outputs"]
    assert outputs["source"] == str(folder) and outputs["lora"]["targets"] == ["q_proj", "v_proj"]
    assert manifest(workdir, "precompute")["inputs"]["sft"] == outputs["fingerprint"]
    assert abs(metrics(workdir, "opd")[0]["importance_weight"] - 1) < 1e-5
    assert ("lora" in manifest(workdir, "opd")["outputs"]) == lora
    assert (workdir / "export" / "adapter").exists() == lora


def test_adapters_start_on_a_whole_sft_checkpoint(tiny_models, base, tmp_path):
    """A π_ref that was trained whole is the base of OPD's adapters; the export names it."""
    changes = {"sft__checkpoint": str(base), "sft__teacher": f"{tiny_models}/teacher"}
    workdir = adapted_run(tiny_models, tmp_path, "precompute", "opd", "export", **changes)
    sft, opd = (manifest(workdir, stage)["outputs"] for stage in ("sft", "opd"))
    assert "lora" not in sft and opd["lora"]["base"] == sft["fingerprint"]
    assert abs(metrics(workdir, "opd")[0]["importance_weight"] - 1) < 1e-6
    config = json.loads((workdir / "export" / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base)


@pytest.mark.slow
def test_in_bfloat16_the_base_lies_in_bfloat16(base, tmp_path):
    """Adapters and their moments stay in float32, and rounding merged weights costs little."""
    changes = {
        "dtype": "bfloat16",
        "student__checkpoint": str(base),
        "sft__checkpoint": "",
        "sft_data__prompts": 8,
    }
    models = tmp_path / "models"
    save_models(models, dtype="bfloat16")
    workdir = adapted_run(models, tmp_path, "sft_data", "sft", "precompute", "opd", **changes)
    params = load_params(opened(models, workdir, **changes), "opd")
    assert {x.dtype.name for x in jax.tree.leaves(base_of(params))} == {"bfloat16"}
    assert {x.dtype.name for x in jax.tree.leaves(adapters_of(params))} == {"float32"}
    state = ocp.StandardCheckpointer().restore(workdir / "opd" / "checkpoints" / "4" / "state")
    assert {x.dtype.name for x in jax.tree.leaves(state) if x.ndim > 1} == {"float32"}
    gap = manifest(workdir, "precompute")["outputs"]["sampler_scorer_gap"]
    assert gap["mean"] < 0.01 and gap["max"] > 0
    assert abs(metrics(workdir, "opd")[0]["importance_weight"] - 1) < 1e-3


def test_refreshed_rounds_are_sampled_by_the_merged_student(tiny_models, whole, base, tmp_path):
    for name in ("sft_data", "sft", "precompute", "heldout"):
        (tmp_path / name).symlink_to(whole / name)
    changes = {"student__checkpoint": str(base), "opd__refresh_every": 3}
    adapted_run(tiny_models, tmp_path, "opd", **changes)
    cache = Artefact(tmp_path / "opd" / "rounds" / "001")
    assert cache.manifest.inputs["sft"] != manifest(whole, "sft")["outputs"]["fingerprint"]
    assert cache.outputs["sampler_scorer_gap"]["max"] < 1e-4 and len(Records(cache)) > 0
    assert abs(metrics(tmp_path, "opd")[3]["importance_weight"] - 1) < 1e-5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 8}, r"has adapters with rank=3.*which student.lora must have too.*rank=8"),
        ({"alpha": 7.0}, "alpha=5.0.*alpha=7.0"),
        ({"targets": ("attention",)}, r"targets=\('q_proj', 'v_proj'\).*targets=\('attention',\)"),
    ],
)
def test_other_adapters_than_those_there_are_refused(
    trained_by_peft, tiny_models, tmp_path, changes, message
):
    settings = {"rank": 3, "alpha": 5.0, "targets": ("q_proj", "v_proj"), **changes}
    settings = {f"student__lora__{name}": x for name, x in settings.items()}
    settings |= {"sft__checkpoint": str(trained_by_peft[0]), "sft__teacher": "x"}
    with pytest.raises(UserError, match=message):
        adapted_run(tiny_models, tmp_path, "precompute", **settings)
    assert not (tmp_path / "sft").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type='IA3' cannot be read"),
        ({"use_dora": True}, "use_dora cannot be read"),
        ({"bias": "all"}, "bias='all' cannot be read"),
        ({"target_modules": "all-linear"}, "target_modules='all-linear' cannot be read"),
        ({"target_modules": ["q_proj", "lm_head"]}, "target_modules has lm_head"),
        ({"target_modules": ["q_proj"]}, r"v_proj.lora_A.weight has shape \(3, 64\).*say None"),
        ({"r": 2}, r"lora_A.weight has shape \(3, 64\).*say \(2, 64\) \(8 such tensors"),
    ],
)
def test_files_of_peft_that_cannot_be_read_are_one_line(
    trained_by_peft, tiny_models, tmp_path, changes, message
):
    config = json.loads((trained_by_peft[0] / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | changes))
    weights = "adapter_model.safetensors"
    (tmp_path / weights).symlink_to(trained_by_peft[0] / weights)
    this = opened(tiny_models, tmp_path)
    with pytest.raises(UserError, match=message):
        peft_adapter.load_adapters(tmp_path, this.model("student"), this.mesh)


def test_experts_have_no_adapters(tmp_path, tiny_models):
    shape = dataclasses.asdict(opened(tiny_models, tmp_path).model("student"))
    shape |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    given = {"teacher__checkpoint": f"{tiny_models}/teacher", "student__model": shape, **SMALL}
    with pytest.raises(UserError, match=r"set student.lora.targets=\('attention',\)"):
        pipeline.run(tiny_settings(**given), str(tmp_path / "run"), ("sft_data", "sft"))
    assert not (tmp_path / "run").exists()
