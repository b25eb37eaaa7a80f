"""Metrics and the drift panel, against float64 NumPy on unpacked records; where rows go."""

import contextlib
import json

import jax
import numpy as np
import pytest
from etils import epath
from helpers import training_run
from helpers.models import random_params
from helpers.training_run import CONFIG, batches, mesh_of
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lopd.config.settings import MetricsSettings
from lopd.data.batches import put_batch
from lopd.hardware import peak_flops
from lopd.machine import shutdown
from lopd.models.decoder import DecoderConfig
from lopd.models.flops import training_flops
from lopd.objectives.sampled import lightning_opd
from lopd.rollouts.scoring import score_responses
from lopd.training.drift import (
    ADVANTAGE_EDGES,
    BY_POSITION,
    ess_fraction,
    make_panel,
    panel_row,
    scalars,
    sequence_intervals,
)
from lopd.training.metrics_files import TensorBoard, metrics_writers

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


def by_position(responses: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Sums of what each token has, and how many tokens, in each twentieth of their responses."""
    sums, sizes = np.zeros(20), np.zeros(20, int)
    for values in responses:
        for t, value in enumerate(values):
            sums[20 * t // len(values)] += value
            sizes[20 * t // len(values)] += 1
    return sums, sizes


def test_histogram_and_curves_equal_numpy(panel):
    found, records, logprobs = panel
    row = panel_row(7, found, found)
    advantages = [np.clip(r["teacher_logprobs"] - x, -TAU, TAU)
                  for r, x in zip(records, logprobs, strict=True)]  # fmt: skip
    counts, _ = np.histogram(np.concatenate(advantages), ADVANTAGE_EDGES)
    np.testing.assert_array_equal(row["advantage_histogram"]["counts"], counts)
    ratios = [
        np.expm1(d) - d
        for d in (x - r["ref_logprobs"] for x, r in zip(logprobs, records, strict=True))
    ]
    for name, values in (("advantage", advantages), ("kl_ref", ratios)):
        sums, sizes = by_position(values)
        np.testing.assert_array_equal(row["position_counts"], sizes)
        np.testing.assert_allclose(
            row[f"{name}_by_position"], sums / np.maximum(sizes, 1), rtol=2e-4, atol=1e-5
        )
    for name in BY_POSITION:  # the curve's mean over tokens is the scalar
        mean = np.average(row[f"{name}_by_position"], weights=sizes)
        np.testing.assert_allclose(mean, scalars(found["metrics"])[name], rtol=1e-4, atol=1e-6)
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


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a training of five steps, interrupted after the third and taken up at 2."""
    path = tmp_path_factory.mktemp("trained")
    for steps in (3, 5):
        training_run.run(
            path, mesh=mesh_of(1, 1, 1), steps=steps, checkpoint_every=2, tensorboard=True
        )
    return path


def test_every_name_of_the_contract_is_written(trained):
    rows, drift = training_run.rows_of(trained)
    names = """step loss tokens flops learning_rate grad_norm advantage advantage_sd
        advantage_over_1_nat clipped kl_teacher kl_ref entropy importance_weight
        importance_weight_sd ess_fraction chi2 response_length truncated repetition"""
    contract = names.split()
    assert set(contract) == rows[0].keys() - {"logprob"}
    same = set(contract) - {"step", "flops", "learning_rate", "grad_norm"}
    assert [d["step"] for d in drift] == [5] and same < drift[0]["heldout"].keys()
    timed = json.loads((trained / "metrics.jsonl").read_text().splitlines()[0])
    assert timed["tokens_per_second"] > 0 and 0 <= timed["data_wait"] <= 1


def numbers(row: dict, prefix: str = "") -> dict[str, float]:
    """Every number of a row but those of its histogram, by the name it has in TensorBoard."""
    found = {}
    for name, x in row.items():
        if isinstance(x, list):
            found |= {f"{prefix}{name}/{i:02}": item for i, item in enumerate(x)}
        elif isinstance(x, dict) and name != "advantage_histogram":
            found |= numbers(x, f"{prefix}{name}/")
        elif isinstance(x, int | float) and name != "step":
            found[prefix + name] = x
    return found


def test_every_number_goes_to_tensorboard(trained):
    """All of both files, what was written before the interruption once, and the histogram."""
    sizes = {"histograms": 0, "scalars": 0}
    events = EventAccumulator(str(trained / "tensorboard"), size_guidance=sizes).Reload()
    written: dict[str, dict[int, float]] = {}
    for name in ("metrics.jsonl", "drift.jsonl"):
        for row in map(json.loads, (trained / name).read_text().splitlines()):
            for tag, x in numbers(row).items():
                written.setdefault(tag, {})[row["step"]] = x
    assert written["loss"].keys() == {1, 2, 3, 4, 5} and written["heldout/chi2"].keys() == {5}
    assert {*events.Tags()["scalars"]} == {*written}
    for tag, values in written.items():
        found = {event.step: event.value for event in events.Scalars(tag)}
        assert found == pytest.approx(values, rel=1e-6), tag
    (event,) = events.Histograms("advantage_histogram")
    histogram = event.histogram_value
    assert (event.step, histogram.min, histogram.max) == (5, -5, 5)
    assert histogram.bucket_limit == ADVANTAGE_EDGES[1:].tolist()
    assert histogram.bucket == row["advantage_histogram"]["counts"]
    assert histogram.num == sum(histogram.bucket) == written["tokens"][5]


def test_rows_are_in_tensorboards_file_before_it_is_closed(tmp_path):
    """A checkpoint follows `sync`; a run that is killed then never writes those rows again."""
    writer = TensorBoard(epath.Path(tmp_path) / "tensorboard")
    for row in ROWS:
        writer.write(row)
    writer.sync()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {*events.Tags()["scalars"]} == {name for row in ROWS for name in numbers(row)}
    assert events.Tags()["histograms"] == ["advantage_histogram"]
    writer.close()


ROWS = [
    {"step": 3, "loss": 0.25, "tokens": 7},
    {
        "step": 3,
        "heldout": {"loss": 0.5, "sequences": 8, "chi2_ci95": [0.125, 2.0]},
        "advantage_histogram": {"edges": [-1.0, 0.0, 1.0], "counts": [3, 1]},
        "advantage_by_position": [0.5, -0.5],
    },
]


def wandb_records(folder) -> list:
    """What an offline run has left: protocol buffers in LevelDB's log format, after a header."""
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    content, at, parts, records = path.read_bytes(), 7, b"", []
    while at < len(content):
        if 32768 - at % 32768 < 7:  # the end of a block, too short for a header
            at += 32768 - at % 32768
            continue
        size, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        parts += content[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            records.append(wandb_internal_pb2.Record.FromString(parts))
            parts = b""
    return records


class Failure(Exception):
    """Ends the first of the test's runs."""


def test_rows_go_to_wandb_and_a_continued_run_to_the_same_place(tmp_path, monkeypatch):
    """By the real package, which writes files when it is offline."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    metrics, runs = MetricsSettings(tensorboard=False, wandb="a-project"), []
    for resume_step in (0, 2, 0):  # begun, continued, and made anew in the same folder
        folder = tmp_path / str(len(runs))
        folder.mkdir()
        monkeypatch.setenv("WANDB_DIR", str(folder))
        writers = metrics_writers(epath.Path(tmp_path), resume_step, metrics, {"opd": {"tau": 1.0}})
        with contextlib.suppress(Failure, shutdown.Stopped):
            try:
                for writer in writers:
                    writer.write(ROWS[0])
                writers[1].write(ROWS[1])
                if not runs:
                    raise Failure
                if runs[1:]:
                    raise shutdown.Stopped
            finally:
                for writer in writers:
                    writer.close()
        wandb.teardown()  # the next one is another process's
        runs.append(wandb_records(folder))
    first, second, third = (
        next(r.run for r in run if r.WhichOneof("record_type") == "run") for run in runs
    )
    codes = [r.exit.exit_code for run in runs for r in run if r.WhichOneof("record_type") == "exit"]
    assert codes == [1, 0, 0]
    assert first.run_id == second.run_id != third.run_id
    assert (first.project, first.display_name) == ("a-project", str(tmp_path))
    (row,) = (r.history.item for r in runs[0] if r.WhichOneof("record_type") == "history")
    found = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in row}
    expected = {name: x for written in ROWS for name, x in numbers(written).items()}
    assert expected == {name: found.get(name) for name in expected}
    assert found["_step"] == 3
    histogram = {key: found[f"advantage_histogram/{key}"] for key in ("_type", "bins", "values")}
    assert histogram == {"_type": "histogram", "bins": [-1.0, 0.0, 1.0], "values": [3, 1]}


def test_training_flops_of_qwen3_8b():
    """Against 6 × parameters (8.19e9 less the embedding's 0.62e9) and attention's share."""
    model = DecoderConfig(
        vocab_size=151_936, hidden_size=4096, intermediate_size=12_288, num_hidden_layers=36,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128, tie_word_embeddings=False,
    )  # fmt: skip
    assert training_flops(model, 1, 0) == pytest.approx(6 * (8.19e9 - 0.62e9), rel=2e-3)
    assert training_flops(model, 0, 4096**2) == 6 * 36 * 4096 * 4096**2
    assert peak_flops(jax.devices()) is None  # a CPU
