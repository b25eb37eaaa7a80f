"""The command line, in real processes: a whole run, a second one, kills, and bad input."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest
import tensorflow_datasets as tfds
import torch
import transformers
from helpers import gcs_server
from helpers.commands import command, environment, module, refused, run

STAGES = ["teacher", "sft_data", "sft", "precompute", "heldout", "opd", "control", "export", "eval"]


def outcome(workdir) -> dict:
    """All that a run produced and another must produce again, bit for bit."""
    manifests = {}
    for stage in STAGES:
        manifest = json.loads((workdir / stage / "manifest.json").read_text())
        assert manifest["complete"]
        del manifest["seconds"], manifest["checksum"]
        for cost in manifest["outputs"].get("costs", {}).values():
            del cost["seconds"]
        for file in manifest.get("shards", []):
            del file["sha256"]  # the same records may be serialised in another field order
            for cost in file["costs"].values():
                del cost["seconds"]
        # Orbax names files at random, and rows hold times.
        manifest["files"] = sorted({file["name"].partition("/")[0] for file in manifest["files"]})
        manifests[stage] = manifest
    weights = (workdir / "export" / "model.safetensors").read_bytes()
    return {"manifests": manifests, "weights": weights,
            "summary": json.loads((workdir / "eval" / "summary.json").read_text())}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished run, given its directory as people do: by a relative path."""
    workdir = tmp_path_factory.mktemp("whole")
    done = run(os.path.relpath(workdir))
    assert done.returncode == 0, done.stderr
    return workdir, done


def test_every_stage_runs_and_says_so(whole):
    workdir, done = whole
    for number, stage in enumerate(STAGES, start=1):
        assert f"[{number}/9] {stage}" in done.stdout
    assert "accuracy on addition ('test')" in done.stdout and "seconds: teacher" in done.stdout
    # The live line, where the peak of the device is not known.
    assert all(f"{name}=" in done.stderr for name in ("loss", "tok/s", "FLOP/s"))
    models = json.loads((workdir / "eval" / "summary.json").read_text())["models"]
    assert list(models) == ["teacher", "base", "sft", "opd", "control"]
    for tasks in models.values():
        for result in tasks.values():
            assert result["n"] == 16
            assert result["ci95"][0] <= result["accuracy"] <= result["ci95"][1]
    for stage in ("teacher", "sft", "opd", "control"):
        rows = [json.loads(x) for x in (workdir / stage / "metrics.jsonl").read_text().splitlines()]
        assert [r["step"] for r in rows] == [1, 2, 3, 4, 5, 6]
    gap = json.loads((workdir / "precompute" / "manifest.json").read_text())["outputs"]
    assert gap["sampler_scorer_gap"]["max"] < 1e-4


def test_second_run_does_nothing(whole):
    workdir, _ = whole
    before = {p: p.stat().st_mtime_ns for p in workdir.rglob("*") if p.is_file()}
    start = time.monotonic()
    done = run(workdir)
    assert done.returncode == 0 and done.stdout.count("complete, skipped") == 9
    assert time.monotonic() - start < 60
    assert before == {p: p.stat().st_mtime_ns for p in workdir.rglob("*") if p.is_file()}


def test_exported_student_loads_in_transformers(whole):
    workdir, _ = whole
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        workdir / "export", dtype=torch.float32, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.generate(torch.tensor([[4, 8, 7, 7]]), max_new_tokens=4).shape[1] > 4


def test_the_export_answers_in_transformers_as_here(whole):
    """From text to text: the greedy answers of `eval`, by `AutoTokenizer` and `generate`."""
    workdir, _ = whole
    tokenizer = transformers.AutoTokenizer.from_pretrained(workdir / "export")
    model = transformers.AutoModelForCausalLM.from_pretrained(workdir / "export")
    lines = (workdir / "eval" / "responses_opd.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["mode"] == "greedy"]
    assert len(rows) == 16
    for row in rows:
        ids = tokenizer(row["prompt"], return_tensors="pt")["input_ids"]
        out = model.generate(ids, max_new_tokens=40)[0, ids.shape[1] :]
        assert (out[-1].item() == tokenizer.eos_token_id) == row["finished"]
        assert tokenizer.decode(out, skip_special_tokens=True) == row["response"]


def test_the_card_has_the_accuracies_of_the_run(whole):
    workdir, _ = whole
    text = (workdir / "export" / "README.md").read_text()
    models = json.loads((workdir / "eval" / "summary.json").read_text())["models"]
    for tasks in models.values():
        for found in tasks.values():
            low, high = found["ci95"]
            assert f"{found['accuracy']:.1%} [{low:.1%}, {high:.1%}]" in text
    assert "| Teacher | Base | SFT | OPD | Control |" in text and str(workdir) not in text


def test_rollouts_hold_what_transformers_says_of_the_student(whole):
    """Every token's log-probability in rollouts.jsonl, and the cached ones beside it."""
    workdir, _ = whole
    lines = (workdir / "opd" / "rollouts.jsonl").read_text().splitlines()
    rollouts = [json.loads(line) for line in lines]
    assert len(rollouts) == 64 and len({r["prompt_id"] for r in rollouts}) == 64
    source = tfds.builder_from_directory(workdir / "precompute").as_data_source("train")
    cache = {record["prompt_id"]: record for record in source}
    model = transformers.AutoModelForCausalLM.from_pretrained(workdir / "export")
    for rollout in rollouts[::8]:
        record = cache[rollout["prompt_id"]]
        prompt, response = record["prompt_tokens"], record["response_tokens"]
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
        expected = torch.log_softmax(logits.float(), -1)[range(len(response)), response]
        np.testing.assert_allclose(rollout["student_logprobs"], expected, atol=2e-4)
        for name in ("teacher_logprobs", "ref_logprobs"):
            np.testing.assert_allclose(rollout[name], record[name], atol=1e-4)
        assert rollout["finished"] == (rollout["tokens"][-1] == "</s>") == record["finished"]
        assert rollout["prompt"].startswith("What is ") and rollout["prompt"].endswith("?\n")


def test_run_ends_with_its_report(whole):
    workdir, done = whole
    assert f"report: {workdir / 'report.html'}" in done.stdout and "warning" not in done.stderr
    page = (workdir / "report.html").read_text()
    assert "9 of 9 stages complete" in page and len(page) < 3_000_000


@pytest.mark.slow
def test_killed_in_each_stage_and_run_again_gives_the_same(whole, tmp_path):
    """SIGKILL soon after each stage has begun, and once more; then to the end.

    In precompute and opd the run in a bucket is killed.
    """
    for stage in [s for s in STAGES if s not in ("precompute", "heldout", "opd", "export")]:
        for pause in (0.0, 1.5):
            process = subprocess.Popen(
                command(tmp_path), env=environment(), stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )  # fmt: skip
            manifest = tmp_path / stage / "manifest.json"
            while process.poll() is None and not manifest.exists():
                time.sleep(0.01)
            time.sleep(pause)
            process.send_signal(signal.SIGKILL)
            process.wait()
    done = run(tmp_path)
    assert done.returncode == 0, done.stderr
    assert outcome(tmp_path) == outcome(whole[0])


@pytest.fixture(scope="module")
def bucket():
    with gcs_server.serve() as bucket:
        yield bucket


@pytest.fixture(scope="module")
def whole_in_bucket(bucket, tmp_path_factory):
    """A run in gs://bucket/run, killed twice: a copy of what is there then, and its output."""
    points = {  # in the middle of precompute, and while OPD saves a checkpoint
        "run/precompute/cache": lambda names: len(names) >= 2,
        "run/opd/checkpoints/4/": lambda names: names and not any("commit" in n for n in names),
    }
    environment_ = environment(bucket.environment)
    for prefix, when in points.items():
        process = subprocess.Popen(
            command("gs://bucket/run"), env=environment_, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        bucket.kill(process, prefix, when)
        assert process.returncode == -signal.SIGKILL
    done = run("gs://bucket/run", more_environment=bucket.environment)
    assert done.returncode == 0, done.stderr
    return bucket.download("run/", tmp_path_factory.mktemp("bucket")), done


def test_killed_and_continued_in_a_bucket_gives_the_same(whole, whole_in_bucket):
    """Every stage in a bucket, by the real clients of a server: the artefacts of a local run."""
    workdir, done = whole_in_bucket
    assert "precompute: complete, skipped" in done.stdout and "opd: continued" in done.stdout
    assert outcome(workdir) == outcome(whole[0])
    for stage in ("teacher", "sft", "opd", "control"):
        rows = [json.loads(x) for x in (workdir / stage / "metrics.jsonl").read_text().splitlines()]
        assert [r["step"] for r in rows] == [1, 2, 3, 4, 5, 6]
        events = list((workdir / stage / "tensorboard").iterdir())
        assert len(events) == (2 if stage == "opd" else 1) and all(e.stat().st_size for e in events)
        assert sorted(p.name for p in (workdir / stage / "checkpoints").iterdir()) == ["2", "4"]
    drift = [(w / "opd" / "drift.jsonl").read_text() for w in (workdir, whole[0])]
    assert drift[0] == drift[1]
    assert "report: gs://bucket/run/report.html" in done.stdout and "warning" not in done.stderr
    assert "9 of 9 stages complete" in (workdir / "report.html").read_text()


def test_damage_in_a_bucket_is_found(whole_in_bucket, bucket):
    shard = next(name for name in bucket.names("run/precompute/cache") if "00003-of" in name)
    bucket.write(shard, bucket.read(shard)[:-1])
    where, clients = "gs://bucket/run/precompute", environment(bucket.environment)
    refused(module("lopd.cache", "verify", where, environment=clients), f"{shard} is damaged")


def test_a_bucket_that_cannot_be_used_is_one_line(bucket):
    read_only = run("gs://readonly/run", more_environment=bucket.environment)
    refused(read_only, "gs://readonly/run cannot be written: 403")
    for name, says in {
        "nobucket": "there is no such bucket",
        "objectsonly": "lacks storage",
    }.items():
        done = module("lopd.report", f"gs://{name}/x", environment=environment(bucket.environment))
        refused(done, f"gs://{name}: ", says)


def test_unknown_setting_names_the_nearest(tmp_path):
    done = run(tmp_path / "w", opd__learning_rat=0.1)
    refused(done, "opd.learning_rat", "learning_rate")
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"opd.steps": "many"}, ["opd.steps", "many"]),
        ({"opd.tau": -1}, ["opd.tau=-1"]),
        ({"sft.schedule": "linear"}, ["sft.schedule='linear'", "cosine"]),
        ({"opd.row_length": 50}, ["opd.row_length=50", "raise it to 51"]),
        ({"precompute.response_length": 50_000}, ["opd.row_length=128", "raise it to 50011"]),
        (
            {
                "precompute.response_length": 50_000,
                "precompute.row_length": 60_000,
                "opd.row_length": 60_000,
            },
            ["precompute.response_length = 50012", "max_position_embeddings=40960"],
        ),
        ({"prompt_length": 4}, ["prompt_length=4"]),
        ({"student.model.vocab_size": 12}, ["embedding of student.model has 12 rows", "20"]),
        ({"mesh.tensor": 3}, ["tensor=3", "1 devices"]),
        ({"teacher.checkpoint": "/nowhere"}, ["/nowhere", "no such folder"]),
        ({"tokenizer": "/nowhere.model"}, ["/nowhere.model", "no such file"]),
        ({"task.digits": 9}, ["task.digits=9"]),
        ({"student.model.num_key_value_heads": 0}, ["num_key_value_heads=0 must be positive"]),
        ({"student.model.hidden_size": 0}, ["hidden_size=0 must be positive"]),
        ({"seed": -1}, ["seed=-1 must lie in"]),
        ({"runtime.profile_steps": "(1,)"}, ["profile_steps=(1,) must be of type tuple[int, int]"]),
        ({"task.name": "math"}, ["teacher trains on worked answers", "teacher.checkpoint"]),
        ({"eval.response_length": 50_000}, ["eval.response_length = 50012", "40948 or less"]),
        ({"opd.records": 0}, ["opd.records=0", "must be positive, or None"]),
        ({"sft.b1": 2}, ["sft.b1=2.0", "must lie in [0, 1)"]),
        ({"opd.steps": None}, ["opd.steps=None", "must be set"]),
        ({"sft.learning_rate": "inf"}, ["sft.learning_rate=inf"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_setting_is_one_line_before_any_work(tmp_path, settings, parts):
    done = run(tmp_path / "w", **{k.replace(".", "__"): v for k, v in settings.items()})
    refused(done, *parts)
    assert not (tmp_path / "w" / "teacher").exists()


def test_other_mistakes_on_the_command_line(tmp_path):
    refused(run(tmp_path, stages="teacher,sftt"), "sftt", "precompute")
    for name, text, says in (
        ("none", None, "none.py does not exist"),
        ("cut", "def get_config(:", "not Python, line 1"),
        ("other", "x = 1", "has no get_config()"),
    ):
        if text is not None:
            (tmp_path / f"{name}.py").write_text(text)
        refused(run(tmp_path, config=str(tmp_path / f"{name}.py")), says)
    refused(run(tmp_path, config=str(tmp_path)), "is a folder")
    refused(run(tmp_path, more_environment={"JAX_PLATFORMS": "quantum"}), "check JAX_PLATFORMS")
    refused(run(tmp_path, stages="opd"), str(tmp_path / "sft"))
    (tmp_path / "file").write_text("")
    refused(run(tmp_path / "file" / "below"), str(tmp_path / "file" / "below"), "cannot be written")


def test_other_settings_are_refused_with_the_difference(whole):
    refused(run(whole[0], opd__tau=3.0), str(whole[0] / "opd"), "opd.tau: 1.0 → 3.0")


def empty(path):
    path.write_bytes(b"")


def cut(path):
    path.write_bytes(path.read_bytes()[:-20])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "teacher/params/manifest.ocdbt": cut,
    "sft_data/cache-train.array_record-00001-of-00003": flip,
    "sft/params/_METADATA": empty,
    "precompute/features.json": empty,
    "opd/rollouts.jsonl": cut,
    "control/metrics.jsonl": cut,
    "eval/responses_opd.jsonl": cut,
    "eval/summary.json": empty,
    "export/model.safetensors": empty,
    "export/config.json": pathlib.Path.unlink,
}
"""A file of each finished artefact."""


def test_damage_to_what_is_finished_is_named_and_made_again(whole, tmp_path):
    workdir = tmp_path / "w"
    shutil.copytree(whole[0], workdir)
    for name, damage in DAMAGES.items():
        damage(workdir / name)
    done = run(workdir)
    assert done.returncode == 0, done.stderr
    named = [line for line in done.stdout.splitlines() if "made again" in line]
    stages = [name.partition("/")[0] for name in DAMAGES]
    for stage in stages:
        line = next(line for line in named if f" {stage}: " in line)
        assert any(name in line for name in DAMAGES), line
    assert len(named) == len({*stages})
    assert outcome(workdir) == outcome(whole[0])
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        made = [len((path / "opd" / name).read_text().splitlines()) for path in (workdir, whole[0])]
        assert made[0] == made[1]


def test_damage_to_what_another_stage_reads_is_named(whole, tmp_path):
    workdir = tmp_path / "w"
    shutil.copytree(whole[0], workdir)
    shutil.rmtree(workdir / "eval")
    shutil.rmtree(workdir / "export")
    empty(workdir / "sft" / "params" / "_METADATA")
    refused(run(workdir, "eval"), str(workdir / "sft" / "params"), "damaged", "run its stage again")
    shutil.copytree(whole[0] / "sft", workdir / "sft", dirs_exist_ok=True)
    cut(workdir / "opd" / "params" / "manifest.ocdbt")
    refused(run(workdir, "export", opd__steps=6), str(workdir / "opd" / "params"), "damaged")


def test_damaged_caches_are_found(whole, tmp_path):
    """One flipped bit in the cache stops OPD before it starts."""
    workdir = tmp_path / "w"
    shutil.copytree(whole[0], workdir)
    shutil.rmtree(workdir / "opd")
    shard = next((workdir / "precompute").glob("*array_record-00002*"))
    flip(shard)
    refused(run(workdir, "opd"), shard.name, "damaged")
    assert not (workdir / "opd").exists()
