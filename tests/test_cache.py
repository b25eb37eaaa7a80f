"""The cache: readable by TFDS alone, safe against crashes and damage."""

import subprocess
import sys

import numpy as np
import pytest

from lopd.artefact import Artefact
from lopd.cache import schema, totals, writer
from lopd.cache.reader import Records, verify
from lopd.errors import UserError


def record(i: int) -> dict:
    n = 1 + i % 4
    return {
        "prompt_id": i,
        "sample_id": i % 2,
        "prompt_tokens": np.arange(1 + i % 3, dtype=np.int32),
        "response_tokens": np.arange(n, dtype=np.int32) + i,
        "finished": bool(i % 2),
        "behaviour_logprobs": np.full(n, -0.25 * i, np.float32),
        "teacher_logprobs": np.full(n, -0.5 * i, np.float32),
        "ref_logprobs": np.full(n, -1.0 * i, np.float32),
    }


def make_cache(path, shards=3, per_shard=4) -> Artefact:
    artefact = Artefact(path)
    artefact.begin("precompute", {}, {})
    for s in range(shards):
        records = [record(s * per_shard + i) for i in range(per_shard)]
        writer.write_shard(
            artefact, schema.SCORED_FIELDS, s, shards, records, totals.of_responses(records)
        )
    writer.write_metadata(artefact)
    artefact.finish({})
    return artefact


def test_tfds_reads_it_in_a_process_without_lopd(tmp_path):
    make_cache(tmp_path)
    program = """
import sys
import tensorflow_datasets as tfds
source = tfds.builder_from_directory(sys.argv[1]).as_data_source("train")
assert len(source) == 12
for i in range(12):
    r = source[i]
    n = 1 + i % 4
    assert r["prompt_id"] == i and r["finished"] == bool(i % 2), r
    assert r["response_tokens"].tolist() == [i + k for k in range(n)]
    assert r["teacher_logprobs"].tolist() == [-0.5 * i] * n
    assert str(r["ref_logprobs"].dtype) == "float32"
assert not any(name.split(".")[0] in ("lopd", "tensorflow", "jax") for name in sys.modules)
print("read", len(source))
"""
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == "read 12\n", done.stderr


def test_records_round_trip(tmp_path):
    records = Records(make_cache(tmp_path))
    assert len(records) == 12
    for i in (0, 5, 11):
        for name, value in record(i).items():
            np.testing.assert_array_equal(records[i][name], value)


@pytest.mark.parametrize("damage", ["bit flip", "truncation", "deletion"])
def test_damaged_shard_is_found_before_it_is_read(tmp_path, damage):
    artefact = make_cache(tmp_path)
    path = tmp_path / artefact.manifest["shards"][1]["name"]
    content = bytearray(path.read_bytes())
    if damage == "bit flip":
        content[len(content) // 2] ^= 4
        path.write_bytes(content)
    elif damage == "truncation":
        path.write_bytes(content[:-7])
    else:
        path.unlink()
    with pytest.raises(UserError, match=f"{path.name} is (damaged|missing)"):
        Records(Artefact(tmp_path))


@pytest.mark.parametrize("value", [np.nan, 0.5, -np.inf])
@pytest.mark.parametrize("field", ["teacher_logprobs", "ref_logprobs", "behaviour_logprobs"])
def test_what_is_no_logprob_is_refused(tmp_path, field, value):
    artefact = Artefact(tmp_path)
    artefact.begin("precompute", {}, {})
    bad = record(3)
    bad[field] = bad[field].copy()
    bad[field][1] = value
    with pytest.raises(UserError, match=f"record 0: {field}"):
        writer.write_shard(artefact, schema.SCORED_FIELDS, 0, 1, [bad], {})
    bad[field] = bad[field][:-1]
    with pytest.raises(UserError, match=f"{field} has 3 values for 4 tokens"):
        writer.write_shard(artefact, schema.SCORED_FIELDS, 0, 1, [bad], {})
    assert "shards" not in artefact.manifest


def test_only_listed_shards_count(tmp_path):
    """A crash between rename and listing leaves a file that is made again, not trusted."""
    artefact = Artefact(tmp_path)
    artefact.begin("precompute", {}, {})
    writer.write_shard(artefact, schema.SCORED_FIELDS, 0, 2, [record(0)], {})
    (tmp_path / schema.shard_name(1, 2)).write_bytes(b"half a shard")
    resumed = Artefact(tmp_path)
    assert writer.missing_shards(resumed, 2) == [1]
    writer.write_shard(resumed, schema.SCORED_FIELDS, 1, 2, [record(1)], {})
    writer.write_metadata(resumed)
    verify(Artefact(tmp_path))


def test_fingerprint_is_of_the_content_alone(tmp_path):
    expected = writer.content_fingerprint(make_cache(tmp_path / "a", shards=3, per_shard=4))
    other_split = make_cache(tmp_path / "b", shards=2, per_shard=6)
    assert writer.content_fingerprint(other_split) == expected
    artefact = Artefact(tmp_path / "c")
    artefact.begin("precompute", {}, {})
    records = [record(i) for i in range(12)]
    records[7]["teacher_logprobs"] = np.nextafter(records[7]["teacher_logprobs"], np.float32(-9))
    writer.write_shard(artefact, schema.SCORED_FIELDS, 0, 1, records, {})
    assert writer.content_fingerprint(artefact) != expected


def test_damaged_manifest_is_one_clear_error(tmp_path):
    make_cache(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format_version": 1, "stage"')
    with pytest.raises(UserError, match=r"manifest\.json is damaged"):
        Artefact(tmp_path)
