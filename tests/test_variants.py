"""The `opd` stage with every objective, on one made-up cache; what it refuses before work."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from helpers.models import random_params
from helpers.tiny_run import tiny_config

from lopd import pipeline
from lopd.artefacts.artefact import Artefact
from lopd.artefacts.fingerprint import params_fingerprint
from lopd.cache import totals, writer
from lopd.cache.fields import SCORED_FIELDS, top_k_fields
from lopd.checkpoints import orbax
from lopd.config import read_settings
from lopd.errors import UserError
from lopd.machine import devices
from lopd.machine.storage import absolute
from lopd.models.shardings import param_shardings
from lopd.stages.run import Run
from lopd.stages.scored import heldout_settings
from lopd.stages.weights import PARAMS

VOCAB, STORED_K, RECORDS = 21, 8, 24


def variant_config(**changes):
    config = tiny_config()
    recipe = {"steps": 3, "warmup_steps": 0, "batch_size": 8, "row_length": 64}
    config.opd.update({**recipe, **changes})
    config.runtime.update(drift_every=2)
    config.metrics.tensorboard = False
    config.student.model.num_hidden_layers = 1
    return config


def make_records(seed: int, count: int) -> list[dict]:
    """Random responses whose teacher is a random distribution at every token."""
    rng, records = np.random.default_rng(seed), []
    for i in range(count):
        length = int(rng.integers(2, 30))
        tokens = rng.integers(3, VOCAB, length).astype(np.int32)
        logits = rng.normal(size=(length, VOCAB)) * 2
        logprobs = (logits - np.log(np.exp(logits).sum(-1, keepdims=True))).astype(np.float32)
        ids = np.argsort(-logprobs, axis=-1)[:, :STORED_K].astype(np.int32)
        records.append(
            {
                "prompt_id": seed * 1000 + i,
                "sample_id": 0,
                "prompt_tokens": rng.integers(3, VOCAB, 5).astype(np.int32),
                "response_tokens": tokens,
                "finished": False,
                "behaviour_logprobs": np.full(length, -3.0, np.float32),
                "ref_logprobs": rng.uniform(-4, -2, length).astype(np.float32),
                "teacher_logprobs": logprobs[np.arange(length), tokens],
                "teacher_topk_ids": ids,
                "teacher_topk_logprobs": np.take_along_axis(logprobs, ids, -1),
            }
        )
    return records


def write_cache(path, records, sft: str, settings: dict, top_k: int = STORED_K) -> None:
    artefact = Artefact(path)
    artefact.begin(path.name, settings, {})
    fields = SCORED_FIELDS | top_k_fields(top_k)
    records = [{name: r[name] for name in fields} for r in records]
    counted = totals.of_responses(records) | totals.of_scores(records)
    writer.write_shard(artefact, fields, 0, 1, records, counted, {})
    writer.write_metadata(artefact)
    artefact.finish({**writer.outputs(artefact), "sft": sft})


@pytest.fixture(scope="module")
def made(tmp_path_factory, one_device_mesh):
    """π_ref, a cache with the teacher's top 8, one without, and held-out responses.

    All on one device, for which programs compile in a fraction of the time.
    """
    patch = pytest.MonkeyPatch()
    patch.setattr(devices, "make_mesh", lambda sizes: one_device_mesh)
    yield write_artefacts(tmp_path_factory)
    patch.undo()


def write_artefacts(tmp_path_factory):
    folder, config = tmp_path_factory.mktemp("made"), variant_config()
    settings = read_settings(config)
    opened = Run(settings, absolute(folder), devices.make_mesh(settings.mesh.sizes))
    model = opened.model("student")
    params = jax.device_put(random_params(model, 0), param_shardings(model, opened.mesh))
    artefact = Artefact(folder / "sft")
    artefact.begin("sft", {}, {})
    orbax.save_params(artefact.path / PARAMS, params)
    sft = params_fingerprint(params)
    artefact.finish({"model": dataclasses.asdict(model), "fingerprint": sft, "teacher": "t"})
    cache, heldout = {"tokenizer": opened.tokenizer.fingerprint}, heldout_settings(opened)
    write_cache(folder / "precompute", make_records(1, RECORDS), sft, cache)
    write_cache(folder / "plain", make_records(1, RECORDS), sft, cache, top_k=0)
    write_cache(folder / "heldout", make_records(2, 8), sft, heldout)
    few = [{**r, **{name: r[name][:, :4] for name in top_k_fields(4)}} for r in make_records(2, 8)]
    write_cache(folder / "few", few, sft, heldout, top_k=4)
    return folder


def run(made, workdir, cache="precompute", heldout="heldout", **changes) -> list[dict]:
    """Three steps; the rows of metrics.jsonl."""
    workdir.mkdir(exist_ok=True)
    (workdir / "heldout").unlink(missing_ok=True)
    (workdir / "heldout").symlink_to(made / heldout)
    config = variant_config(cache=str(made / cache), **changes)
    config.sft.checkpoint = str(made / "sft")
    pipeline.run(read_settings(config), str(workdir), ("opd",))
    return [json.loads(x) for x in (workdir / "opd" / "metrics.jsonl").read_text().splitlines()]


VARIANTS = {
    "reverse_kl": {"objective": "reverse_kl", "top_k": 2, "masked_tokens": ("</s>", 5)},
    "jensen_shannon": {"objective": "jensen_shannon", "entropy_fraction": 0.5},
    "fixed_advantage": {
        "objective": "fixed_advantage",
        "position_fraction": 0.3,
        "importance_cap": 2.0,
    },
    "residual": {"residual_folds": 5, "tau": 0.2, "extrapolation": 1.25, "records": 16},
}


@pytest.fixture(scope="module")
def method(made, tmp_path_factory):
    return run(made, tmp_path_factory.mktemp("method"))


REPEATED = ("jensen_shannon", "fixed_advantage")
"""Whose parts test_objectives.py holds against float64."""


@pytest.mark.parametrize(
    "name",
    [pytest.param(x, marks=pytest.mark.slow) if x in REPEATED else x for x in VARIANTS],
)
def test_objectives_train_and_report_alike(made, method, tmp_path, name):
    rows = run(made, tmp_path, **VARIANTS[name])
    assert len(rows) == 3 and all(np.isfinite(list(row.values())).all() for row in rows)
    assert rows[0].keys() == method[0].keys()
    if name != "residual":  # the first batch and student are those of the method
        for key in ("importance_weight", "entropy", "kl_ref", "advantage", "clipped", "tokens"):
            np.testing.assert_allclose(rows[0][key], method[0][key], rtol=1e-4, err_msg=key)
    assert not np.isclose(rows[0]["loss"], method[0]["loss"], rtol=1e-3)
    drift = [json.loads(x) for x in (tmp_path / "opd" / "drift.jsonl").read_text().splitlines()]
    assert [row["step"] for row in drift] == [2, 3] and drift[0]["heldout"]["sequences"] == 8
    assert (tmp_path / "report.html").exists()


def test_refused_before_work(made, tmp_path):
    for message, changes in {
        "plain holds K=0": {"cache": "plain", "objective": "forward_kl"},
        "holds K=8": {"objective": "forward_kl", "top_k": 9},
        "held-out responses have the teacher's top K=4": {
            "heldout": "few",
            "objective": "forward_kl",
        },
        "masked_tokens: 'x y'": {"masked_tokens": ("x y",)},
        "records=25: the cache": {"records": 25},
    }.items():
        with pytest.raises(UserError, match=message):
            run(made, tmp_path, **changes)
        assert not (tmp_path / "opd" / "metrics.jsonl").exists()
