"""The precompute job: what it makes must not depend on how, when and where it was interrupted.

`LOPD_KILLS=20 pytest tests/test_precompute.py -k killed` kills more often than CI has time for.
"""

import collections
import errno
import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import torch
from helpers.models import random_params, transformers_model
from helpers.tiny_run import REPOSITORY, SETTINGS, open_run, run, save_models, tiny_settings

from lopd import config as lopd_config
from lopd.artefacts.artefact import Artefact
from lopd.cache import merge, reader, totals, writer
from lopd.cache.codec import shard_name
from lopd.cache.fields import RESPONSE_FIELDS
from lopd.cache.reader import Records
from lopd.checkpoints import hugging_face
from lopd.config.checks import check_settings
from lopd.errors import UserError
from lopd.machine import devices, shutdown
from lopd.rollouts import passes, stream
from lopd.sampling import decode, placement
from lopd.sampling.engine import Request, Response, Sampling
from lopd.stages import scored
from lopd.stages.weights import load_params


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A teacher and a π_ref, as their stages would have left them: untrained weights."""
    folder = tmp_path_factory.mktemp("models")
    save_models(folder)
    return folder


def content(artefact: Artefact) -> dict:
    """All that must be alike of two caches that hold the same."""
    manifest = json.loads(json.dumps(artefact.manifest.to_json()))
    assert manifest["complete"]
    for entry in [*manifest["shards"], *manifest["files"]]:
        del entry["sha256"], entry["bytes"]  # serialised fields may come in another order
    for costs in (manifest["outputs"]["costs"], *(shard["costs"] for shard in manifest["shards"])):
        for cost in costs.values():
            assert cost.pop("seconds") >= 0
    return {key: value for key, value in manifest.items() if key != "seconds"}


@pytest.fixture(scope="module")
def whole(models, tmp_path_factory):
    """An uninterrupted run."""
    return run(models, tmp_path_factory.mktemp("whole"), "precompute")


def test_records_are_what_they_say(whole, models):
    """Lengths, ids and ends of every record, and the totals over them."""
    records = list(Records(whole))
    assert [r["sample_id"] for r in records] == [0] * 40
    assert len({int(r["prompt_id"]) for r in records}) == 40
    end = 1
    for r in records:
        assert (r["response_tokens"][:-1] != end).all()
        assert r["finished"] == (r["response_tokens"][-1] == end)
        assert r["finished"] or len(r["response_tokens"]) == 40
    outputs = whole.outputs
    assert outputs["responses"] == 40
    assert outputs["tokens"] == sum(len(r["response_tokens"]) for r in records)
    ratio = np.concatenate([r["teacher_logprobs"] - r["ref_logprobs"] for r in records])
    consistency = outputs["teacher_consistency"]
    assert consistency["mean_log_ratio"] == pytest.approx(ratio.mean(), rel=1e-4)
    assert consistency["far"] == pytest.approx((np.abs(ratio) > 1).mean())
    assert outputs["sampler_scorer_gap"]["max"] < 1e-4
    for name in ("teacher", "sft"):
        assert outputs[name] == Artefact(models / name).outputs["fingerprint"]


@pytest.mark.parametrize(("slots", "decode_steps"), [(1, 8), (7, 8), (32, 3)])
def test_content_does_not_depend_on_slots(models, whole, tmp_path, slots, decode_steps):
    """`whole` was made with 8."""
    changes = {"runtime__slots": slots, "runtime__decode_steps": decode_steps}
    assert content(run(models, tmp_path, "precompute", **changes)) == content(whole)


def test_slots_follow_from_memory_unless_they_are_set(models, monkeypatch):
    """By default 256 a device, which here is there, and no more than the job has responses."""
    assert lopd_config.paper_config().runtime.slots is None

    def slots(number, responses=None):
        opened = open_run(models, tiny_settings(runtime__slots=number))
        params = random_params(opened.model("student"), 0)
        plan = scored.sampler_plan(opened, "student", opened.settings.precompute, "")
        return plan.make(params, responses=responses).slots

    count = jax.device_count()
    assert (slots(None), slots(None, 12), slots(20, 12), slots(8, 12)) == (256 * count, 12, 12, 8)
    monkeypatch.setattr(placement, "_available_host_memory", lambda: count * 2**17)
    assert 0 < slots(None) < 20
    with pytest.raises(UserError, match=r"runtime\.slots=20000: memory is left for"):
        slots(20_000)
    with pytest.raises(UserError, match=r"runtime\.slots=20000: memory is left for"):
        slots(20_000, 10_000)
    assert slots(20_000, 1) == 1


@pytest.fixture(scope="module")
def twins(models, tmp_path_factory):
    """The teacher and π_ref as Transformers reads what we export, in float64."""
    folder, opened, found = tmp_path_factory.mktemp("twins"), open_run(models, tiny_settings()), {}
    for stage, which in (("teacher", "teacher"), ("sft", "student")):
        (folder / stage).mkdir()
        params = load_params(opened, stage)
        hugging_face.save_checkpoint(folder / stage, opened.model(which), params, end_id=1)
        found[stage] = transformers_model(folder / stage, torch.float64)
    return found


def float64_logprobs(model, record, temperature=1.0, top_p=1.0) -> np.ndarray:
    """log p of a record's response under a Transformers model: tempered, cut off, renormalised."""
    tokens = np.concatenate([record["prompt_tokens"], record["response_tokens"]])
    first = len(record["prompt_tokens"]) - 1
    with torch.no_grad():
        logits = model(torch.tensor(tokens[None].astype(np.int64))).logits[0, first:-1].numpy()
    assert logits.dtype == np.float64
    p = np.exp((logits - logits.max(-1, keepdims=True)) / temperature)
    p /= p.sum(-1, keepdims=True)
    order = np.argsort(-p, axis=-1)
    ordered = np.take_along_axis(p, order, -1)
    dropped = np.cumsum(ordered, -1) - ordered >= top_p  # those before it hold enough
    np.put_along_axis(p, order, np.where(dropped, 0, ordered), -1)
    p /= p.sum(-1, keepdims=True)
    return np.log(np.take_along_axis(p, record["response_tokens"][:, None].astype(int), -1)[:, 0])


@pytest.mark.parametrize("top_p", [1.0, 0.6])
def test_logprobs_equal_transformers_in_float64(models, whole, twins, tmp_path, top_p):
    """All three of a dozen records, those of sampling at the cache's temperature and truncation."""
    cache, temperature = whole, tiny_settings().precompute.temperature
    assert temperature != 1
    if top_p < 1:
        changes = {"precompute__prompts": 12, "precompute__top_p": top_p}
        cache = run(models, tmp_path, "precompute", **changes)
    records = list(Records(cache))[:12]
    for record in records:
        expected = {
            "behaviour_logprobs": float64_logprobs(twins["sft"], record, temperature, top_p),
            "ref_logprobs": float64_logprobs(twins["sft"], record),
            "teacher_logprobs": float64_logprobs(twins["teacher"], record),
        }
        for name, value in expected.items():
            np.testing.assert_allclose(record[name], value, atol=1e-4, rtol=0, err_msg=name)


def test_workers_merged_are_the_single_run(models, whole, tmp_path):
    parts = [run(models, tmp_path, "precompute", worker=(i, 3)).path for i in range(3)]
    held = [len(Artefact(p).manifest.shards) for p in parts]
    assert held == [1, 2, 2]
    with pytest.raises(UserError, match=r"2 of 5 shards are missing, the first 1"):
        merge.merge(tmp_path / "m", [parts[0], parts[2]])
    with pytest.raises(UserError, match="hold the same prompts"):
        merge.merge(tmp_path / "m", [*parts, parts[1]])
    with pytest.raises(UserError, match="no worker's part"):
        merge.merge(tmp_path / "m", [whole.path])
    with pytest.raises(UserError, match="a worker's part of a cache: join"):
        Records(Artefact(parts[0]))
    assert [reader.verify_records(Artefact(part)) for part in parts] == [8, 16, 16]
    merged = merge.merge(tmp_path / "precompute", parts[::-1])
    assert content(merged) == content(whole)
    assert reader.verify_records(merged) == 40
    other = run(models, tmp_path / "other", "precompute", worker=(1, 3), precompute__top_p=0.5)
    with pytest.raises(UserError, match=r"not parts of one cache: settings.precompute.top_p"):
        merge.merge(tmp_path / "m", [parts[0], other.path, parts[2]])
    with pytest.raises(UserError, match=r"--worker=5/6: 40 responses are only 5 shards"):
        run(models, tmp_path, "precompute", worker=(5, 6))
    with pytest.raises(UserError, match="--worker splits sft_data, precompute, heldout only"):
        run(models, tmp_path, "precompute", "opd", worker=(0, 2))


def test_an_interrupted_merge_is_continued(models, whole, tmp_path, monkeypatch):
    parts = [run(models, tmp_path, "precompute", worker=(i, 2)).path for i in range(2)]
    copy, calls = writer.copy_shard, itertools.count()

    def failing(*args):
        if next(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        copy(*args)

    monkeypatch.setattr(writer, "copy_shard", failing)
    with pytest.raises(OSError, match="No space left"):
        merge.merge(tmp_path / "m", parts)
    assert len(Artefact(tmp_path / "m").manifest.shards) == 3
    assert content(merge.merge(tmp_path / "m", parts)) == content(whole)
    assert next(calls) == 6  # the three that were there were not copied again


def test_models_in_turns_make_the_same(models, whole, tmp_path, monkeypatch, capsys):
    """Too little memory for both: all sampling, then the teacher; also after a stop between."""
    monkeypatch.setattr(devices, "device_memory", lambda mesh: 1)
    load, loaded = scored.load_params, []

    def failing(opened, stage):
        loaded.append(stage)
        if loaded == ["sft", "teacher"]:
            raise KeyboardInterrupt
        return load(opened, stage)

    monkeypatch.setattr(scored, "load_params", failing)
    with pytest.raises(KeyboardInterrupt):
        run(models, tmp_path, "precompute")
    assert "student and teacher would take" in capsys.readouterr().out
    waiting = reader.read_shard(
        Artefact(tmp_path / "precompute" / passes.SAMPLED), shard_name(3, 5)
    )
    assert "ref_logprobs" in waiting[0] and "teacher_logprobs" not in waiting[0]
    monkeypatch.setattr(devices, "device_memory", lambda mesh: 2**40)  # goes on as it began
    assert content(run(models, tmp_path, "precompute")) == content(whole)
    assert loaded == ["sft", "teacher", "teacher"]  # nothing was sampled again
    assert not (tmp_path / "precompute" / passes.SAMPLED).exists()


def test_top_k_of_the_teacher(models, whole, tmp_path):
    """With all tokens it is the teacher's whole distribution; the rest of the record stays."""
    few = run(models, tmp_path / "few", "precompute", precompute__teacher_top_k=3)
    every = run(models, tmp_path / "every", "precompute", precompute__teacher_top_k=21)
    for plain, top, full in zip(*map(Records, (whole, few, every)), strict=True):
        for name, value in plain.items():
            np.testing.assert_array_equal(top[name], value)
        ids, logprobs = full["teacher_topk_ids"], full["teacher_topk_logprobs"]
        np.testing.assert_array_equal(np.sort(ids, axis=1), np.tile(np.arange(21), (len(ids), 1)))
        np.testing.assert_allclose(np.exp(logprobs).sum(axis=1), 1, atol=1e-5)
        sampled = np.take_along_axis(
            logprobs, np.argmax(ids == full["response_tokens"][:, None], axis=1)[:, None], 1
        )
        np.testing.assert_allclose(sampled[:, 0], plain["teacher_logprobs"], atol=1e-5)
        np.testing.assert_array_equal(top["teacher_topk_ids"], ids[:, :3])
        np.testing.assert_allclose(top["teacher_topk_logprobs"], logprobs[:, :3], atol=1e-6)


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """Another teacher, and another π_ref."""
    folder = tmp_path_factory.mktemp("others")
    save_models(folder, first_seed=5)
    return folder


def test_another_teacher_is_refused_unless_allowed(models, others, tmp_path):
    given = {"teacher__checkpoint": f"{others}/teacher"}
    with pytest.raises(UserError, match="wrote the SFT data") as error:
        run(models, tmp_path, "precompute", **given)
    assert str(models / "sft") in str(error.value)
    given["precompute__allow_inconsistent_teacher"] = True
    assert run(models, tmp_path, "precompute", **given).complete


def test_cache_of_another_student_is_refused(others, whole, tmp_path):
    with pytest.raises(UserError, match="sampled from student") as error:
        run(others, tmp_path, "opd", opd__cache=str(whole.path))
    assert str(whole.path) in str(error.value)


def test_resident_bytes_counts_every_copy(models):
    def resident(**changes) -> int:
        opened = open_run(models, tiny_settings(**changes))
        scorers = [scored.scorer(opened, which, 128) for which in ("student", "teacher")]
        return passes.resident_bytes(*scorers)

    sizes = {which: 0 for which in ("teacher", "student")}
    for which in sizes:
        leaves = jax.tree.leaves(random_params(open_run(models, tiny_settings()).model(which), 0))
        sizes[which] = sum(leaf.size for leaf in leaves)
    assert resident() == 4 * (sizes["teacher"] + sizes["student"])
    half = {"dtype": "bfloat16", "teacher__checkpoint": str(models)}  # no artefact: adopted
    assert resident(**half) == 2 * sizes["teacher"] + 6 * sizes["student"]


def test_heldout_is_disjoint_and_of_the_same_schema(models, whole, tmp_path):
    held = run(models, tmp_path, "heldout")
    records = list(Records(held))
    assert len(records) == 12
    trained = {r["prompt_tokens"].tobytes() for r in Records(whole)}
    assert not trained & {r["prompt_tokens"].tobytes() for r in records}
    assert held.manifest.fields == whole.manifest.fields
    for r in records:  # drawn from the distribution that they are scored by
        np.testing.assert_allclose(r["behaviour_logprobs"], r["ref_logprobs"], atol=1e-4)


def test_heldout_leaves_out_what_a_given_cache_holds(models, tmp_path):
    """A cache from elsewhere may hold any prompt: here, those that would be held out."""
    more = run(models, tmp_path, "precompute", precompute__prompts=46)
    given = {"opd__cache": str(more.path), "sft__checkpoint": str(models / "sft")}
    assert len(scored.heldout_requests(open_run(tmp_path, tiny_settings(**given)))) == 6


def test_all_prompts_means_all_but_the_held_out(models, monkeypatch):
    """`precompute.prompts=None`, as of a file of problems."""
    opened = open_run(models, tiny_settings(precompute__prompts=None))
    every = list(opened.task.problems("opd", 50, 0))
    monkeypatch.setattr(type(opened.task), "problems", lambda *args: iter(every))
    train, held = opened.prompts.opd.problems, opened.prompts.heldout.problems
    assert (len(train), len(held)) == (38, 12)
    assert sorted(p.problem_id for p in train + held) == sorted(p.problem_id for p in every)
    assert scored.cache_settings(opened)["heldout_prompts"] == 12


def test_prompts_are_read_split_and_tokenised_once(models, tmp_path, monkeypatch):
    """By all stages of a run together, checks before work included."""
    calls, addition = collections.Counter(), type(open_run(models, tiny_settings()).task)
    problems, encode = addition.problems, addition.encode

    def counting_problems(task, split, *args):
        calls[split] += 1
        return problems(task, split, *args)

    def counting_encode(task, problem, tokenizer):
        calls["prompts"] += 1
        return encode(task, problem, tokenizer)

    monkeypatch.setattr(addition, "problems", counting_problems)
    monkeypatch.setattr(addition, "encode", counting_encode)
    run(models, tmp_path, "precompute", "heldout")
    assert calls == {"opd": 1, "prompts": 40 + 12}


@pytest.mark.parametrize(
    ("setting", "value"), [("temperature", 0.8), ("top_p", 0.9), ("prompts", 0)]
)
def test_heldout_must_be_of_the_reference_itself(setting, value):
    settings = tiny_settings(**{f"heldout__{setting}": value})
    with pytest.raises(UserError, match=f"heldout.{setting}={value}"):
        check_settings(settings, ("heldout",))


def test_changed_prompts_are_refused(models, tmp_path):
    artefact = Artefact(tmp_path / "precompute")
    artefact.begin("precompute", {}, {})
    requests = [Request(i, 0, [3, 4, i]) for i in range(20)]
    assert stream.make_plan(artefact, requests, 8).missing == [0, 1, 2]
    requests[7] = Request(7, 0, [3, 4, 9])
    with pytest.raises(UserError, match="was begun with other prompts"):
        stream.make_plan(artefact, requests, 8)


def test_a_gap_between_sampler_and_scorer_is_said_once(models, tmp_path, monkeypatch, caplog):
    dispatch = passes.dispatch_records

    def off(*args, **kwargs):
        read = dispatch(*args, **kwargs)
        return lambda: [s.replace(logprobs=s.logprobs - 0.01) for s in read()]

    monkeypatch.setattr(passes, "dispatch_records", off)
    artefact = run(models, tmp_path, "precompute", precompute__prompts=16)
    (message,) = [r.getMessage() for r in caplog.records if "sampler and scorer" in r.getMessage()]
    assert "differ by 0.01 nats (max over a shard)" in message and "at most 0.0001" in message
    assert artefact.outputs["sampler_scorer_gap"]["mean"] == pytest.approx(0.01, rel=1e-2)


# The job's own mechanics, with a sampler that the test controls.


def fake_plan(artefact, count=24):
    requests = [Request(i, 0, [3, 4]) for i in range(count)]
    return stream.make_plan(artefact, requests, 8)


def fake_response(index: int, request: Request) -> Response:
    n = 1 + index % 3
    logprobs = np.full(n, -0.5 - request.prompt_id, np.float32)
    tokens = np.full(n, request.prompt_id, np.int32)
    return Response(index, request, tokens, logprobs, logprobs, finished=True)


def store(responses):
    records = [stream.response_record(r) for r in responses]
    return lambda: writer.Made(records, totals.of_responses(records), {})


@pytest.fixture
def job(tmp_path):
    artefact = Artefact(tmp_path / "sft_data")
    artefact.begin("sft_data", {}, {})
    return artefact


def write(artefact, sample):
    plan = fake_plan(artefact)
    stream.write_responses(artefact, plan, RESPONSE_FIELDS, sample, store)


def test_one_stream_fills_shards_in_any_order(job):
    artefact = job
    streams, order = [], random.Random(0).sample(range(24), 24)

    def sample(requests):
        streams.append(len(requests))
        yield from (fake_response(i, requests[i]) for i in order)

    write(artefact, sample)
    assert streams == [24]
    names = [s["name"] for s in artefact.manifest.shards]
    assert names == [shard_name(i, 3) for i in range(3)]
    for i, name in enumerate(names):
        records = reader.read_shard(artefact, name)
        assert [int(r["prompt_id"]) for r in records] == list(range(8 * i, 8 * i + 8))


def test_shards_are_written_while_sampling_goes_on(job):
    """The slowest response, of the first shard, comes only when the other two are on the disk."""
    artefact = job

    def sample(requests):
        yield from (fake_response(i, requests[i]) for i in range(1, 24))
        deadline = time.monotonic() + 20
        while not (artefact.path / shard_name(2, 3)).exists():
            assert time.monotonic() < deadline, "nothing is written while the sampler works"
            time.sleep(0.01)
        yield fake_response(0, requests[0])

    write(artefact, sample)
    assert writer.missing_shards(artefact, 3) == []


def test_a_failed_write_stops_the_job_and_is_made_up_for(job, monkeypatch):
    artefact = job
    write_shard, calls = writer.write_shard, itertools.count()

    def failing(*args):
        if next(calls) == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        write_shard(*args)

    sampled = []

    def sample(requests):
        for i, request in enumerate(requests):
            sampled.append(request.prompt_id)
            yield fake_response(i, request)
            time.sleep(0.01)  # as real ones take

    monkeypatch.setattr(writer, "write_shard", failing)
    with pytest.raises(OSError, match="No space left"):
        write(artefact, sample)
    assert len(sampled) < 24 and writer.missing_shards(artefact, 3) == [1, 2]
    sampled.clear()
    write(Artefact(artefact.path), sample)
    assert sampled == list(range(8, 24))


def test_a_stop_writes_full_shards_and_no_others(job):
    artefact = job

    def sample(requests):
        yield from (fake_response(i, requests[i]) for i in range(12))
        raise shutdown.Stopped

    with pytest.raises(shutdown.Stopped):
        write(artefact, sample)
    assert writer.missing_shards(artefact, 3) == [1, 2]


def test_a_failed_write_is_not_hidden_by_a_stop(job, monkeypatch):
    artefact = job

    def failing(*args):
        time.sleep(0.05)  # until the stop is there
        raise OSError(errno.ENOSPC, "No space left on device")

    def sample(requests):
        yield from (fake_response(i, requests[i]) for i in range(8))
        raise shutdown.Stopped

    monkeypatch.setattr(writer, "write_shard", failing)
    with pytest.raises(OSError, match="No space left"):
        write(artefact, sample)


def test_a_stop_waits_for_no_response(models, tmp_path, monkeypatch):
    """No end token and 50 decode calls to the cap: asked to stop in the third, there is no other.

    With several processes there is one more, as the answer is read a call late.
    """
    made, decode_once = [], decode.decode

    def counting(*args):
        made.append(args)
        return decode_once(*args)

    monkeypatch.setattr(decode, "decode", counting)
    endless = {"end_ids": ()}
    monkeypatch.setattr(passes, "Sampling", lambda **fields: Sampling(**fields | endless))
    monkeypatch.setattr(shutdown, "requested", lambda: len(made) >= 3)
    changes = {"precompute__response_length": 400, "precompute__row_length": 411}
    with pytest.raises(shutdown.Stopped):
        run(models, tmp_path, "precompute", **changes, opd__row_length=411)
    assert len(made) == 3


# Real processes and signals.

PROCESS = {"precompute.prompts": 320, "runtime.slots": 8, "runtime.records_per_shard": 8}


def start(models, workdir, variables=None, **changes) -> subprocess.Popen:
    settings = SETTINGS | PROCESS | {
        "teacher.checkpoint": models / "teacher", "sft.checkpoint": models / "sft"
    } | changes  # fmt: skip
    command = [
        *(sys.executable, "-m", "lopd.main", f"--config={REPOSITORY / 'configs/tiny.py'}"),
        *(f"--workdir={workdir}", "--stages=precompute"),
        *(f"--config.{key}={value}" for key, value in settings.items()),
    ]
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    return subprocess.Popen(
        command,
        env=environment | {"JAX_PLATFORMS": "cpu", "TQDM_DISABLE": "1"} | (variables or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def listed(workdir) -> int:
    """Shards that the manifest lists; -1 before there is one."""
    artefact = Artefact(workdir / "precompute")
    return -1 if artefact.manifest is None else len(artefact.manifest.shards)


def wait_for(process, workdir, shards: int) -> bool:
    """Waits until so many shards are listed; false if the process ended before."""
    while process.poll() is None and listed(workdir) < shards:
        time.sleep(0.01)
    return process.poll() is None


def finish(process) -> str:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out


@pytest.fixture(scope="module")
def undisturbed(models, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed")
    finish(start(models, workdir))
    return Artefact(workdir / "precompute")


def test_killed_at_random_instants_it_makes_the_same(models, undisturbed, tmp_path):
    """SIGKILL, each time at another instant of the job's life, until it has been enough."""
    kills = int(os.environ.get("LOPD_KILLS", "3"))
    instants, workdir, survived = random.Random(5), tmp_path / "0", [-1]

    def check_whole():
        finish(start(models, workdir))
        artefact = Artefact(workdir / "precompute")
        assert content(artefact) == content(undisturbed)
        assert reader.verify_records(artefact) == 320

    while kills:
        process = start(models, workdir)
        # From somewhere in the start of the process, or after some shards, and a bit.
        if wait_for(process, workdir, survived[-1] + instants.choice([0, 1, 1, 2])):
            time.sleep(instants.uniform(0, 0.3))
        process.kill()
        process.communicate()
        survived.append(listed(workdir))
        assert survived[-1] >= survived[-2]
        kills -= survived[-1] < 40
        if survived[-1] == 40:  # too late to say anything: once more from the start
            check_whole()
            workdir = tmp_path / str(len(survived))
            survived.append(-1)
    print(f"shards listed after each kill: {survived[1:]} of 40")
    check_whole()


def start_two(models, workdir) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    variables = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    return [start(models, workdir, variables | {"JAX_PROCESS_ID": str(i)}) for i in range(2)]


def test_two_processes_make_the_same(models, undisturbed, tmp_path):
    """Each samples and scores half of the rows, as on two hosts; SIGTERM to one stops both."""
    both = start_two(models, tmp_path)
    assert wait_for(both[0], tmp_path, 2)
    both[1].send_signal(signal.SIGTERM)
    for process in both:
        _, err = process.communicate(timeout=60)
        assert process.returncode == shutdown.EXIT_STOPPED, err
    assert 2 <= listed(tmp_path) < 40
    for process in start_two(models, tmp_path):
        finish(process)
    assert content(Artefact(tmp_path / "precompute")) == content(undisturbed)


def test_sigterm_stops_with_full_shards_closed(models, undisturbed, tmp_path):
    process = start(models, tmp_path)
    assert wait_for(process, tmp_path, 2)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == shutdown.EXIT_STOPPED, err
    assert "stopped; the same command continues" in err
    assert 2 <= listed(tmp_path) < 40
    assert not list((tmp_path / "precompute").glob("*.tmp"))
    assert "Not finished: precompute." in (tmp_path / "report.html").read_text()
    assert "continued" in finish(start(models, tmp_path))
    assert content(Artefact(tmp_path / "precompute")) == content(undisturbed)


def stopped_by_a_full_disk(process) -> None:
    """The job ends with one line, and progress above it."""
    _, err = process.communicate(timeout=120)
    assert process.returncode == shutdown.EXIT_ERROR, err
    *progress, last = (line for line in err.replace("\r", "\n").splitlines() if line.strip())
    assert last.startswith("lopd: error: no room left on the disk"), err
    assert all(line.startswith("precompute") for line in progress), err


def block_manifest(process, workdir) -> None:
    """/dev/full where the process will write its manifest; tried again while it writes one."""
    name = f".manifest.json.{socket.gethostname()}-{process.pid}.tmp"
    while True:
        try:
            return (workdir / "precompute" / name).symlink_to("/dev/full")
        except FileExistsError:
            time.sleep(0.001)


def test_a_full_disk_is_one_line_and_can_be_continued(models, undisturbed, tmp_path):
    """/dev/full answers every write as a full disk does: of a shard, then of the manifest."""
    workdir = tmp_path / "w"
    process = start(models, workdir)
    assert wait_for(process, workdir, 1)
    blocked = workdir / "precompute" / f"{shard_name(12, 40)}.tmp"
    blocked.symlink_to("/dev/full")
    stopped_by_a_full_disk(process)
    blocked.unlink(missing_ok=True)

    before = listed(workdir)
    process = start(models, workdir)
    assert wait_for(process, workdir, before + 1)
    block_manifest(process, workdir)
    stopped_by_a_full_disk(process)
    # A shard is in place that no manifest lists; the manifest before is whole.
    in_place = len(list((workdir / "precompute").glob("*.array_record-*")))
    assert before < listed(workdir) == in_place - 1 < 39
    assert not list((workdir / "precompute").glob("**/*.tmp"))
    finish(start(models, workdir))
    assert content(Artefact(workdir / "precompute")) == content(undisturbed)
