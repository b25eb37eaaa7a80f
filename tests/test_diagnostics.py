"""Metrics and the drift panel, against float64 NumPy on unpacked records; where rows go."""

import json

import jax
import numpy as np
import pytest
import training_run
from conftest import random_params
from etils import epath
from training_run import CONFIG, batches, mesh_of

from lopd.config import base_config
from lopd.data.batches import put_batch
from lopd.models.qwen3 import Qwen3Config
from lopd.objectives import lightning_opd
from lopd.progress import metrics_writers
from lopd.scoring import score_responses
from lopd.training.diagnostics import (
    ADVANTAGE_EDGES,
    ess_fraction,
    make_panel,
    panel_row,
    scalars,
    sequence_intervals,
)
from lopd.training.utilisation import peak_flops, training_flops

TAU = 1.0


@pytest.fixture(scope="module")
def panel():
    """What the panel finds on one batch, its records, and their student log-probs."""
    mesh, params, data = mesh_of(1, 1, 1), random_params(CONFIG, 0), batches()
    look = make_panel(CONFIG, lightning_opd(TAU), mesh)
    found = jax.device_get(look(params, put_batch(data[0], mesh, 8)))
    records = data.records(0)
    logprobs = score_responses(CONFIG, params, records, mesh=mesh, row_length=48, rows_per_micro=8)
    return found, records, [x.astype(np.float64) for x in logprobs]


def test_scalars_equal_float64_by_hand(panel):
    found, records, logprobs = panel
    teacher = np.concatenate([r["teacher_logprobs"] for r in records]).astype(np.float64)
    ref = np.concatenate([r["ref_logprobs"] for r in records]).astype(np.float64)
    student = np.concatenate(logprobs)
    difference, log_ratio = teacher - student, student - ref
    advantage, weight = np.clip(difference, -TAU, TAU), np.exp(log_ratio)
    sequences = np.exp([x.sum() - r["ref_logprobs"].astype(np.float64).sum()
                        for x, r in zip(logprobs, records, strict=True)])  # fmt: skip
    fraction = sequences.sum() ** 2 / (len(records) * np.square(sequences).sum())
    expected = {
        "tokens": len(student),
        "advantage": advantage.mean(),
        "advantage_sd": advantage.std(),
        "advantage_over_1_nat": (np.abs(difference) > 1).mean(),
        "clipped": (np.abs(difference) > TAU).mean(),
        "kl_teacher": (np.exp(difference) - 1 - difference).mean(),
        "kl_ref": (weight - 1 - log_ratio).mean(),
        "logprob": student.mean(),
        "importance_weight": weight.mean(),
        "importance_weight_sd": weight.std(),
        "ess_fraction": fraction,
        "chi2": 1 / fraction - 1,
        "response_length": np.mean([len(x) for x in logprobs]),
        "truncated": 0.0,
        "repetition": 0.0,
    }
    row = scalars(found["metrics"])
    for name, value in expected.items():
        np.testing.assert_allclose(row[name], value, rtol=2e-4, atol=1e-6, err_msg=name)
    assert {"loss", "entropy"} == row.keys() - expected.keys()


def test_histogram_and_curve_equal_numpy(panel):
    found, records, logprobs = panel
    row = panel_row(7, found, found)
    advantages = [np.clip(r["teacher_logprobs"] - x, -TAU, TAU)
                  for r, x in zip(records, logprobs, strict=True)]  # fmt: skip
    counts, _ = np.histogram(np.concatenate(advantages), ADVANTAGE_EDGES)
    np.testing.assert_array_equal(row["advantage_histogram"]["counts"], counts)
    sums, sizes = np.zeros(20), np.zeros(20, int)
    for values in advantages:
        for t, value in enumerate(values):
            sums[20 * t // len(values)] += value
            sizes[20 * t // len(values)] += 1
    np.testing.assert_array_equal(row["position_counts"], sizes)
    np.testing.assert_allclose(row["advantage_by_position"], sums / np.maximum(sizes, 1), atol=1e-5)
    heldout = row["heldout"]
    assert heldout["sequences"] == len(records) and row["step"] == 7
    low, high = heldout["sequence_weight_ci95"]
    assert low <= heldout["sequence_weight"] <= high
    json.dumps(row, allow_nan=False)


def test_ess_and_chi2_of_known_weights():
    """Log-normal weights: χ² = e^{σ²} − 1, ESS fraction e^{−σ²}; and no overflow far out."""
    drawn = 0.5 * np.random.default_rng(0).standard_normal(200_000)
    np.testing.assert_allclose(ess_fraction(drawn), np.exp(-0.25), rtol=0.01)
    assert ess_fraction(drawn + 2000) == pytest.approx(float(ess_fraction(drawn)))
    found = sequence_intervals(drawn[:256] - 0.125)
    low, high = found["sequence_weight_ci95"]
    assert low < 1 < high  # E[w] = 1
    low, high = found["chi2_ci95"]
    assert low < np.exp(0.25) - 1 < high
    assert np.isfinite(sequence_intervals(np.array([0.0, 5000.0]))["sequence_weight"])


def test_every_name_of_the_contract_is_written(tmp_path):
    _, rows, drift = training_run.run(tmp_path, mesh=mesh_of(1, 1, 1), steps=3)
    names = """step loss tokens flops learning_rate grad_norm advantage advantage_sd
        advantage_over_1_nat clipped kl_teacher kl_ref entropy importance_weight
        importance_weight_sd ess_fraction chi2 response_length truncated repetition"""
    contract = names.split()
    assert set(contract) == rows[0].keys() - {"logprob"}
    same = set(contract) - {"step", "flops", "learning_rate", "grad_norm"}
    assert [d["step"] for d in drift] == [3] and same < drift[0]["heldout"].keys()
    timed = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert timed["tokens_per_second"] > 0 and 0 <= timed["data_wait"] <= 1


def test_rows_go_to_tensorboard_too(tmp_path):
    from tensorboardX.proto.event_pb2 import Event

    writers = metrics_writers(epath.Path(tmp_path), 0, base_config().metrics, {})
    for writer in writers:
        writer.write({"step": 3, "loss": 0.25})
        writer.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 3, "loss": 0.25}
    content = next((tmp_path / "tensorboard").iterdir()).read_bytes()
    events, at = [], 0
    while at < len(content):  # length, checksum, event, checksum
        size = int.from_bytes(content[at : at + 8], "little")
        events.append(Event.FromString(content[at + 12 : at + 12 + size]))
        at += 16 + size
    values = [(e.step, v.tag, v.simple_value) for e in events for v in e.summary.value]
    assert values == [(3, "loss", 0.25)]


def test_training_flops_of_qwen3_8b():
    """Against 6 × parameters (8.19e9 less the embedding's 0.62e9) and attention's share."""
    model = Qwen3Config(
        vocab_size=151_936, hidden_size=4096, intermediate_size=12_288, num_hidden_layers=36,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128, tie_word_embeddings=False,
    )  # fmt: skip
    assert training_flops(model, 1, 0) == pytest.approx(6 * (8.19e9 - 0.62e9), rel=2e-3)
    assert training_flops(model, 0, 4096**2) == 6 * 36 * 4096 * 4096**2
    assert peak_flops(jax.devices()) is None  # a CPU
