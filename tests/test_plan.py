"""The planner: its formulas against counts made elsewhere, its advice, and its command line."""

import dataclasses
import importlib.util
import json
import math
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from helpers.models import TIED

from configs import qwen3_4b, qwen3_8b
from lopd.config import read_settings
from lopd.config.settings import LoraSettings
from lopd.config.values import changed
from lopd.errors import UserError
from lopd.hardware import CHIPS
from lopd.models import decoder
from lopd.models.flops import forward_flops, training_flops
from lopd.models.low_rank import count_weights
from lopd.models.memory import model_size
from lopd.models.presets import PRESETS
from lopd.objectives.sampled import cross_entropy
from lopd.plan import meshes, programs
from lopd.plan.recipe import list_programs, model_shape
from lopd.plan.summary import plan
from lopd.plan.topology import parse_topology

SETTINGS = read_settings(qwen3_8b.get_config())


@pytest.mark.parametrize(
    ("name", "total", "active"),  # of the model cards, in billions
    [
        ("Qwen3-0.6B", 0.6, None),
        ("Qwen3-8B", 8.2, None),
        ("Qwen3-32B", 32.8, None),
        ("Qwen3-30B-A3B", 30.5, 3.3),
    ],
)
def test_model_sizes_are_the_published_ones(name, total, active):
    size = model_size(PRESETS[name])
    assert round(size.total / 1e9, 1) == total
    if active:
        embedding = PRESETS[name].vocab_size * PRESETS[name].hidden_size
        assert (training_flops(PRESETS[name], 1, 0) / 6 + embedding) / 1e9 == pytest.approx(
            active, abs=0.1
        )


def test_forward_flops_are_what_xla_counts():
    """One layer, so that no scan hides work; every token meets all keys on the CPU."""
    length = 64
    config = dataclasses.replace(
        TIED, vocab_size=512, hidden_size=128, intermediate_size=384, num_hidden_layers=1
    )
    ids = jax.ShapeDtypeStruct((2, length), jnp.int32)

    def logits(params, tokens, positions, segment_ids):
        hidden, _ = decoder.forward(config, params, tokens, positions, segment_ids)
        return hidden @ decoder.output_head(params).T

    compiled = jax.jit(logits).lower(decoder.abstract_params(config), ids, ids, ids).compile()
    counted = compiled.cost_analysis()["flops"]
    assert counted == pytest.approx(forward_flops(config, 2 * length, length), rel=0.1)


@pytest.mark.parametrize(
    ("name", "chips"), [("v5e:4x4", 16), ("v5p:2x2x4", 16), ("H100:8", 8), ("v6e:2x4", 8)]
)
def test_topologies(name, chips):
    assert parse_topology(name).chips == chips


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("h20:8", "no chip is called 'h20'"),
        ("v5e:4x4x4", "write it as v5e:4x4"),
        ("v5p:4x4", "write it as v5p:2x2x4"),
        ("h100", "write it as h100:8"),
    ],
)
def test_unknown_topologies_are_one_clear_error(name, message):
    with pytest.raises(UserError, match=message):
        parse_topology(name)


def test_mesh_shards_weights_over_all_chips_and_rows_follow():
    sizes, rows = meshes.choose(SETTINGS, ("opd",), parse_topology("v5e:4x4"))
    assert sizes == {"data": 1, "fsdp": 16, "tensor": 1}
    assert rows == 16


def test_mesh_that_the_widths_do_not_divide_is_not_chosen():
    """2,560 is a multiple of 512 but not of 1,024; the rest of the chips repeat the weights."""
    sizes, _ = meshes.choose(
        read_settings(qwen3_4b.get_config()), ("opd",), parse_topology("h100:1024")
    )
    assert sizes["fsdp"] * sizes["data"] * sizes["tensor"] == 1024
    assert 2560 % sizes["fsdp"] == 0


def test_chips_that_divide_nothing_only_split_rows():
    sizes, rows = meshes.choose(SETTINGS, ("opd",), parse_topology("h100:7"))
    assert (sizes["data"], rows) == (7, 14)


def test_what_does_not_fit_is_said_with_advice_that_helps():
    _, _, lines = plan(
        changed(SETTINGS, {"runtime.remat": "none"}), ("opd",), parse_topology("a100:2"), 0.5
    )
    (line,) = lines
    assert line.peak_gib > CHIPS["a100"].memory_gib
    over = float(re.search(r"does not fit, ([\d.]+) GiB over", line.advice)[1])
    assert over == pytest.approx(line.peak_gib - CHIPS["a100"].memory_gib, abs=0.06)
    assert "--config.runtime.remat=full" in line.advice or "chips" in line.advice
    chips = re.search(r"try (\d+) chips", line.advice)
    topology = parse_topology(f"a100:{chips[1] if chips else 2}")
    (line,) = plan(SETTINGS, ("opd",), topology, 0.5)[2]
    assert not line.advice


def test_chip_hours_follow_from_the_floor():
    """By hand: 6 · N · tokens plus attention, at half of the peak."""
    (line,) = plan(SETTINGS, ("opd",), parse_topology("h100:8"), 0.5)[2]
    tokens = 256 * 5120
    by_weights = 6 * (PRESETS["Qwen3-8B"].vocab_size * 4096 + 36 * 192_946_432)
    attention = 12 * 36 * 4096 * 5119 / 2
    seconds = tokens * (by_weights + attention) / 989e12 / 8 / 0.5
    assert line.seconds == pytest.approx(seconds, rel=1e-3)
    assert line.chip_hours == pytest.approx(150 * seconds * 8 / 3600, rel=1e-3)


def test_every_stage_lists_its_programs():
    names = [(p.stage, p.name) for p in list_programs(SETTINGS, SETTINGS.stages, 8)]
    assert names == [
        ("sft_data", "prefill"),
        ("sft_data", "decode 8 tokens"),
        ("sft", "training step"),
        ("precompute", "prefill"),
        ("precompute", "decode 8 tokens"),
        ("precompute", "scoring by the teacher"),
        ("precompute", "scoring by π_ref"),
        ("heldout", "prefill"),
        ("heldout", "decode 8 tokens"),
        ("heldout", "scoring by the teacher"),
        ("heldout", "scoring by π_ref"),
        ("opd", "training step"),
    ]


def test_adapters_take_the_base_once_and_moments_of_their_own():
    """By hand: 2 bytes of each frozen weight and 16 of each trained one, and no gradient of the
    frozen ones: 4 FLOPs each."""
    whole, low = SETTINGS, changed(SETTINGS, {"student.lora.rank": 32})
    (step,), (adapted,) = (list_programs(settings, ("opd",), 8) for settings in (whole, low))
    sizes = {"data": 1, "fsdp": 1, "tensor": 1}
    model, size = PRESETS["Qwen3-8B"], model_size(PRESETS["Qwen3-8B"])
    widths = 4096 + 4096, 4096 + 1024, 4096 + 1024, 4096 + 4096, *(4096 + 12288,) * 3
    adapters = 36 * 32 * sum(widths)
    bytes_of = [program.work(sizes).peak_bytes for program in (step, adapted)]
    expected = (16 - 2) * size.total + 2 * size.layers - 16 * adapters  # the layers' cast is spared
    assert bytes_of[0] - bytes_of[1] == pytest.approx(expected, rel=1e-6)
    flops = [program.work(sizes).flops for program in (step, adapted)]
    matmuls = model.vocab_size * 4096 + 36 * 192_937_984
    spared = (2 * matmuls - 6 * adapters) * 256 * 5120
    assert flops[0] - flops[1] == pytest.approx(spared, rel=1e-3)
    scoring = [p for p in list_programs(low, ("precompute",), 8) if "π_ref" in p.name]
    assert scoring[0].work(sizes).peak_bytes < 24 * 2**30


def test_an_adapter_has_the_shape_of_its_base(tmp_path):
    base = {"base_model_name_or_path": "Qwen/Qwen3-0.6B"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(base))
    named = {"sft.checkpoint": str(tmp_path), "student.checkpoint": None}
    found = model_shape(changed(SETTINGS, named), "student")
    assert found == dataclasses.replace(PRESETS["Qwen3-0.6B"], dtype="bfloat16")


def test_programs_of_adapters_have_the_frozen_weights_as_an_argument(one_device_mesh):
    """Lowered as planned, the step and the scoring pass of a small student take its base in
    bfloat16 and have no moments of it."""
    model = dataclasses.replace(TIED, dtype="bfloat16")
    lora, recipe = LoraSettings(rank=2), SETTINGS.opd
    shape = dict(rows=1, row_length=8)
    step = programs.train_step(
        model, recipe, cross_entropy(), one_device_mesh, (), lora, micro_batches=1, **shape
    )
    score = programs.scoring(model, one_device_mesh, lora, dtype="bfloat16", **shape)
    count = count_weights(model, lora)
    for lowered, copies in ((step, 3), (score, 1)):
        leaves = [
            x for x in jax.tree.leaves(lowered.args_info) if jnp.issubdtype(x.dtype, jnp.floating)
        ]
        in_bfloat16 = sum(math.prod(x.shape) for x in leaves if x.dtype == jnp.bfloat16)
        in_float32 = sum(math.prod(x.shape) for x in leaves if x.dtype == jnp.float32)
        assert in_bfloat16 == model_size(model).total
        assert 0 <= in_float32 - copies * count < 200  # the batch's own


def run_plan(*arguments, timeout=400):
    command = [sys.executable, "-m", "lopd.plan", "--config=configs/qwen3_4b.py", *arguments]
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    return subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=timeout)


def test_command_line_for_gpus():
    done = run_plan("--topology=h100:8")
    assert done.returncode == 0, done.stderr
    assert "--config.mesh.fsdp=8" in done.stdout
    assert re.search(r"opd +training step +[\d.]+ ", done.stdout)
    assert re.search(r"[\d,]+ chip-hours", done.stdout)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--topology=h20:8",), "no chip is called 'h20'"),
        ((), "--topology=CHIPS are needed"),
        (("--topology=h100:8", "--config.opd.tau=-1"), "opd.tau=-1"),
    ],
)
def test_mistakes_are_one_line(arguments, message):
    done = run_plan(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu is not installed: pip install 'lopd[tpu]' lets TPU programs compile here",
)
def test_opd_step_of_qwen3_600m_compiles_for_one_v5e_within_its_memory():
    """The whole step, kernels included, at 4,096 tokens with float32 weights and moments."""
    done = run_plan(
        "--topology=v5e:1x1",
        "--stages=opd",
        "--config.student.checkpoint=Qwen/Qwen3-0.6B",
        "--config.prompt_length=512",
        "--config.precompute.response_length=3584",
        "--config.opd.row_length=4096",
        "--config.opd.batch_size=1",
        "--config.runtime.rows_per_micro=1",
    )
    assert done.returncode == 0, done.stderr
    peak = float(re.search(r"training step +([\d.]+) ", done.stdout)[1])
    assert 8.8 < peak <= 9.8
