"""The cache: readable by TFDS alone, safe against crashes and damage."""

import functools
import hashlib
import json
import os
import random
import re
import subprocess
import sys

import jax
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tensorflow_datasets as tfds
from etils import epath

from lopd.artefacts import artefact as artefact_module
from lopd.artefacts.artefact import Artefact, open_complete
from lopd.cache import merge, parquet, reader, summary, totals, writer
from lopd.cache.__main__ import main
from lopd.cache.codec import shard_name
from lopd.cache.fields import (
    SCORED_FIELDS,
    check_record,
    top_k_fields,
)
from lopd.cache.reader import Records, read_shard, verify, verify_records
from lopd.data.batches import step_batches
from lopd.data.layout import Layout
from lopd.data.tokenizers import load_tokenizer
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
            artefact, SCORED_FIELDS, s, shards, records, totals.of_responses(records), {}
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


@pytest.fixture(params=["held in memory", "read one by one"])
def way_of_reading(request, monkeypatch):
    """A test cache is small; as if it were not, in the second case."""
    if request.param == "read one by one":
        monkeypatch.setattr(reader, "_HELD_BYTES", 0)


def test_records_round_trip(tmp_path, way_of_reading):
    records = Records(make_cache(tmp_path))
    assert len(records) == 12
    for i in (0, 5, 11):
        for name, value in record(i).items():
            np.testing.assert_array_equal(records[i][name], value)


def test_batches_are_the_same_however_records_are_read(tmp_path, monkeypatch):
    cache = make_cache(tmp_path)
    layout = Layout(32, 2, "token_mean", ("teacher_logprobs", "ref_logprobs"))
    options = dict(layout=layout, seed=1, batch_size=5)
    read = []
    monkeypatch.setattr(reader, "check_record", lambda record, where: read.append(where))
    held = step_batches(Records(cache), **options)
    assert len(read) == 12
    from_memory = [held[step] for step in range(6)]  # two and a half passes
    assert len(read) == 12
    monkeypatch.setattr(reader, "_HELD_BYTES", sum(s["bytes"] for s in cache.manifest.shards) - 1)
    one_by_one = step_batches(Records(cache), **options)
    assert len(read) == 12
    for step, expected in enumerate(from_memory):
        same = functools.partial(np.testing.assert_array_equal, strict=True)
        jax.tree.map(same, one_by_one[step], expected)
    assert len(read) == 12 + 6 * 5


def test_records_are_those_that_tfds_reads(tmp_path, way_of_reading):
    cache = make_top_k_cache(tmp_path)
    theirs = tfds.builder_from_directory(tmp_path).as_data_source("train")
    by_shard = [r for s in cache.manifest.shards for r in read_shard(cache, s["name"])]
    for ours in (list(Records(cache)), by_shard):
        assert len(ours) == 10
        for mine, other in zip(ours, theirs, strict=True):
            assert mine.keys() == other.keys()
            for name, value in other.items():
                assert type(mine[name]) is type(value), name
                np.testing.assert_array_equal(mine[name], value, strict=True, err_msg=name)


def damage_somehow(path, kind: str, rng: random.Random) -> None:
    """One flipped bit, some bytes less, or no file at all."""
    content = bytearray(path.read_bytes())
    if kind == "bit flip":
        place = rng.randrange(8 * len(content))
        content[place // 8] ^= 1 << place % 8
        path.write_bytes(content)
    elif kind == "truncation":
        path.write_bytes(content[: rng.randrange(len(content))])
    else:
        path.unlink()


@pytest.mark.parametrize("kind", ["bit flip", "truncation", "deletion"])
def test_every_damage_is_found_by_verify_and_before_training(tmp_path, kind):
    """In any file, wherever in it: shards, manifest, and what TFDS reads."""
    make_cache(tmp_path)
    files = sorted(tmp_path.iterdir())
    assert len(files) == 6
    rng = random.Random(kind)
    for round_ in range(100):
        path = files[round_ % len(files)]
        content = path.read_bytes()
        damage_somehow(path, kind, rng)
        with pytest.raises(UserError, match=re.escape(path.name)):
            verify_records(open_complete(tmp_path, "the cache"))
        with pytest.raises(UserError, match=re.escape(path.name)):
            Records(open_complete(tmp_path, "the cache"))  # as every training stage reads it
        path.write_bytes(content)
    assert verify_records(open_complete(tmp_path, "the cache")) == 12


def test_verify_looks_into_records_too(tmp_path):
    """A cache whose checksums are right, but which holds a prompt twice."""
    artefact = Artefact(tmp_path)
    artefact.begin("precompute", {}, {})
    for s in range(2):
        writer.write_shard(artefact, SCORED_FIELDS, s, 2, [record(3)], {}, {})
    writer.write_metadata(artefact)
    artefact.finish({})
    with pytest.raises(UserError, match="record 0: prompt 3, sample 1 is there twice"):
        verify_records(artefact)


@pytest.mark.parametrize("value", [np.nan, 0.5, -np.inf])
@pytest.mark.parametrize("field", ["teacher_logprobs", "ref_logprobs", "behaviour_logprobs"])
def test_what_is_no_logprob_is_refused(tmp_path, field, value):
    artefact = Artefact(tmp_path)
    artefact.begin("precompute", {}, {})
    bad = record(3)
    bad[field] = bad[field].copy()
    bad[field][1] = value
    with pytest.raises(UserError, match=f"record 0: {field}"):
        writer.write_shard(artefact, SCORED_FIELDS, 0, 1, [bad], {}, {})
    bad[field] = bad[field][:-1]
    with pytest.raises(UserError, match=f"{field} has 3 values for 4 tokens"):
        writer.write_shard(artefact, SCORED_FIELDS, 0, 1, [bad], {}, {})
    assert not artefact.manifest.shards


def test_only_listed_shards_count(tmp_path):
    """A crash between rename and listing leaves a file that is made again, not trusted."""
    artefact = Artefact(tmp_path)
    artefact.begin("precompute", {}, {})
    writer.write_shard(artefact, SCORED_FIELDS, 0, 2, [record(0)], {}, {})
    (tmp_path / shard_name(1, 2)).write_bytes(b"half a shard")
    resumed = Artefact(tmp_path)
    assert writer.missing_shards(resumed, 2) == [1]
    writer.write_shard(resumed, SCORED_FIELDS, 1, 2, [record(1)], {}, {})
    writer.write_metadata(resumed)
    verify(Artefact(tmp_path))


def test_a_workers_part_is_verified_before_it_is_merged(tmp_path, monkeypatch, capsys):
    part = Artefact(tmp_path)
    part.begin("precompute", {}, {})
    part.manifest.worker = (1, 3)
    for s in (1, 2):
        records = [record(s), record(s + 4)]
        counted = totals.of_responses(records)
        writer.write_shard(part, SCORED_FIELDS, s, 4, records, counted, {})
    part.finish({"responses": 4})
    said = f"{tmp_path}: part 1/3 of a cache, 4 records in 2 shards, all right\n"
    assert command(monkeypatch, capsys, "verify", tmp_path) == (0, said, "")
    shard = tmp_path / shard_name(2, 4)
    content = shard.read_bytes()
    for kind in ("bit flip", "truncation", "deletion"):
        damage_somehow(shard, kind, random.Random(kind))
        code, out, err = command(monkeypatch, capsys, "verify", tmp_path)
        assert (code, out) == (2, "") and err.count("\n") == 1 and shard.name in err
        shard.write_bytes(content)
    part.manifest.shards[0]["content"] = part.manifest.shards[1]["content"]
    part.save()
    with pytest.raises(UserError, match="2 records that are not those of the manifest"):
        verify_records(open_complete(tmp_path, "the part"))


def test_fingerprint_is_of_the_content_alone(tmp_path):
    expected = writer.content_fingerprint(make_cache(tmp_path / "a", shards=3, per_shard=4))
    other_split = make_cache(tmp_path / "b", shards=2, per_shard=6)
    assert writer.content_fingerprint(other_split) == expected
    artefact = Artefact(tmp_path / "c")
    artefact.begin("precompute", {}, {})
    records = [record(i) for i in range(12)]
    records[7]["teacher_logprobs"] = np.nextafter(records[7]["teacher_logprobs"], np.float32(-9))
    writer.write_shard(artefact, SCORED_FIELDS, 0, 1, records, {}, {})
    assert writer.content_fingerprint(artefact) != expected


def test_damaged_manifest_is_one_clear_error(tmp_path):
    make_cache(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format_version": 1, "stage"')
    with pytest.raises(UserError, match=r"manifest\.json is damaged"):
        Artefact(tmp_path)


def test_a_manifest_is_written_and_read_as_what_it_is(tmp_path):
    """All entries that there are; those that are unset are not in the file."""
    artefact = make_cache(tmp_path)
    entries = json.loads((tmp_path / "manifest.json").read_text())
    always = {"stage", "settings", "inputs", "complete", "code_version", "outputs", "seconds"}
    assert entries.keys() == always | {"format_version", "checksum", "fields", "shards", "files"}
    artefact.manifest.worker = (1, 3)
    artefact.manifest.plan = {"requests": 12, "prompts": "ab", "records_per_shard": 4}
    artefact.manifest.shards[0]["costs"] = {"scoring": {"seconds": 1.5, "tokens": 3, "flops": 1e9}}
    artefact.manifest.rounds = [
        {"start": 3, "ess_fraction": None},
        {"start": 6, "ess_fraction": 0.5, "cache": "cd"},
    ]
    artefact.manifest.results = {"sft": {"addition/greedy": {"accuracy": 1.0}}}
    artefact.save()
    again = Artefact(tmp_path)
    assert again.manifest == artefact.manifest and again.manifest.worker == (1, 3)
    assert {type(s["bytes"]) for s in again.manifest.shards} == {int}
    with pytest.raises(AttributeError):
        again.manifest.shard = []  # a slip of the pen is no entry


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(settings=3), "settings is int, not an object"),
        (lambda m: m.update(complete=1), "complete is int, not bool"),
        (lambda m: m.update(seconds="3"), "seconds is str, not float"),
        (lambda m: m.update(seconds=True), "seconds is bool, not float"),
        (lambda m: m.update(outputs=None), "outputs is null, not an object"),
        (lambda m: m.update(shards={}), "shards is an object, not a list"),
        (lambda m: m["shards"][1].update(bytes=1.5), r"shards\[1\]\.bytes is float, not int"),
        (lambda m: m["shards"][1].pop("sha256"), r"shards\[1\]\.sha256 is missing"),
        (lambda m: m["shards"][0].update(crc=3), r"shards\[0\]\.crc is no entry of a manifest"),
        (lambda m: m.update(worker=[1]), "worker has 1 items, not 2"),
        (lambda m: m.update(worker=3), "worker is int, not a list"),
        (lambda m: m.update(plan={"requests": 3}), r"plan\.prompts is missing"),
        (lambda m: m.update(rounds=[{"start": 3}]), r"rounds\[0\]\.ess_fraction is missing"),
        (lambda m: m.update(state="new"), "state is no entry of a manifest"),
        (lambda m: m.pop("stage"), "stage is missing"),
    ],
)
def test_a_manifest_of_other_types_is_one_clear_error(tmp_path, change, message):
    """Sound by its checksum, as another program may have written it."""
    make_cache(tmp_path)
    path = tmp_path / "manifest.json"
    entries = json.loads(path.read_text())
    change(entries)
    path.write_text(artefact_module._text(entries))
    with pytest.raises(UserError, match=rf"manifest\.json is damaged, or of .*\({message}\)") as e:
        Artefact(tmp_path)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/b", "..", ""])
def test_a_shard_lies_in_its_artefact(tmp_path, name):
    """`merge` would copy it to where its name says."""
    path = make_cache(tmp_path / "cache").path / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["shards"][0]["name"] = name
    content = {key: value for key, value in manifest.items() if key != "checksum"}
    checksum = hashlib.sha256(json.dumps(content, indent=2).encode()).hexdigest()
    path.write_text(json.dumps({**content, "checksum": checksum}, indent=2) + "\n")
    with pytest.raises(UserError, match="is no file name"):
        Artefact(tmp_path / "cache")


@pytest.mark.parametrize("text", ["[]", "3", '"manifest"', "null", '{"format_version": 2}'])
def test_a_manifest_of_another_version_is_one_clear_error(tmp_path, text):
    make_cache(tmp_path)
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=r"has format version (2|None), this code reads 4"):
        Artefact(tmp_path)


TOP_K = 3


def record_with_top_k(i: int) -> dict:
    """Probabilities 0.5, 0.25, 0.125 of three tokens, at every position."""
    n = 1 + i % 4
    ids = (np.arange(n)[:, None] + np.array([7, 2, 9])).astype(np.int32)
    logprobs = np.log(np.tile(np.float32([0.5, 0.25, 0.125]), (n, 1)))
    return record(i) | {"teacher_topk_ids": ids, "teacher_topk_logprobs": logprobs}


def make_top_k_cache(path) -> Artefact:
    artefact = Artefact(path)
    artefact.begin("precompute", {"tokenizer": load_tokenizer("tiny").fingerprint}, {})
    fields = SCORED_FIELDS | top_k_fields(TOP_K)
    for s in range(2):
        records = [record_with_top_k(s * 5 + i) for i in range(5)]
        counted = totals.of_responses(records) | totals.of_scores(records)
        writer.write_shard(artefact, fields, s, 2, records, counted, {})
    writer.write_metadata(artefact)
    artefact.finish({**writer.outputs(artefact), "tokenizer": "tiny"})
    return artefact


def test_top_k_round_trip(tmp_path):
    records = Records(make_top_k_cache(tmp_path))
    for i in (0, 3, 9):
        assert records[i].keys() == record_with_top_k(i).keys()
        for name, value in record_with_top_k(i).items():
            np.testing.assert_array_equal(records[i][name], value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda ids, p: (ids[:-1], p[:-1]), r"top-K of shapes \(3, 3\) and \(3, 3\) for 4 tokens"),
        (lambda ids, p: (ids, p + np.float32(0.2)), "are no log-probabilities"),
        (lambda ids, p: (ids, np.where(p < -2, np.nan, p)), "are no log-probabilities"),
        (lambda ids, p: (ids, p[:, ::-1]), "not the likeliest first"),
        (lambda ids, p: (ids * 0, p), "not distinct"),
    ],
)
def test_what_is_no_top_k_is_refused(change, message):
    bad = record_with_top_k(3)
    names = ("teacher_topk_ids", "teacher_topk_logprobs")
    bad |= dict(zip(names, change(*(bad[n] for n in names)), strict=True))
    with pytest.raises(UserError, match=message):
        check_record(bad, "here")


def bits(artefact: Artefact) -> list[dict]:
    return [{n: np.asarray(v).tobytes() for n, v in r.items()} for r in Records(artefact)]


def test_parquet_and_back_is_bit_for_bit(tmp_path):
    cache = make_top_k_cache(tmp_path / "a")
    file = epath.Path(tmp_path / "cache.parquet")
    parquet.to_parquet(cache, file)
    table = pyarrow.parquet.read_table(file)  # as anyone reads it
    assert table.column("teacher_logprobs").to_pylist()[5] == [-2.5, -2.5]
    assert str(table.field("prompt_id").type) == "int64"
    back = parquet.from_parquet(file, tmp_path / "b")
    assert bits(back) == bits(cache)
    assert [r["prompt_tokens"].dtype for r in Records(back)] == [np.int32] * 10
    assert back.outputs == cache.outputs | {"claimed_by": str(file)}
    assert verify_records(back) == 10
    with pytest.raises(UserError, match="is finished already"):
        parquet.from_parquet(file, tmp_path / "b")


def test_parquet_that_is_not_ours_or_was_changed_is_refused(tmp_path):
    file = epath.Path(tmp_path / "cache.parquet")
    parquet.to_parquet(make_top_k_cache(tmp_path / "a"), file)
    table = pyarrow.parquet.read_table(file)
    finished = pyarrow.array([not x for x in table.column("finished").to_pylist()])
    changed = table.set_column(table.column_names.index("finished"), "finished", finished)
    changed = changed.replace_schema_metadata(table.schema.metadata)
    pyarrow.parquet.write_table(changed, file, row_group_size=5)
    with pytest.raises(UserError, match="row group 0: 5 records that are not those"):
        parquet.from_parquet(file, tmp_path / "b")
    pyarrow.parquet.write_table(table.replace_schema_metadata({}), file)
    with pytest.raises(UserError, match="was not made by"):
        parquet.from_parquet(file, tmp_path / "c")
    file.write_bytes(b"PAR1 and nothing else")
    with pytest.raises(UserError, match="no Parquet file that can be read"):
        parquet.from_parquet(file, tmp_path / "d")


def edit_manifest(artefact: Artefact, edit) -> None:
    """Changes a manifest as whoever writes one can: with the checksum of the new text."""
    path = artefact.path / "manifest.json"
    entries = json.loads(path.read_text())
    edit(entries)
    path.write_text(artefact_module._text(entries))


def claims(file, edit) -> None:
    """Rewrites a Parquet file with other claims in its manifest, and the same rows."""
    table = pyarrow.parquet.ParquetFile(file)
    manifest = json.loads(table.schema_arrow.metadata[b"lopd.manifest"])
    edit(manifest)
    groups = [table.read_row_group(i) for i in range(table.num_row_groups)]
    schema = groups[0].schema.with_metadata({b"lopd.manifest": json.dumps(manifest)})
    with pyarrow.parquet.ParquetWriter(str(file), schema) as writes:
        for group in groups:
            writes.write_table(group.replace_schema_metadata(schema.metadata))


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda m: m["outputs"].update(fingerprint="0" * 16), "fingerprint is '0000000000000000'"),
        (lambda m: m["outputs"].update(responses=3), "responses is 3 by the manifest"),
        (lambda m: m["shards"][0]["totals"].update(log_ratio_sum=99.0), "log_ratio_sum is 99.0"),
        (lambda m: m["shards"][0]["totals"].update(gap_sum=-1.0), "gap_sum is -1.0"),
        (lambda m: m["shards"][0]["totals"].update(luck=1), "luck is 1"),
        (lambda m: m["shards"][0].update(name="../x"), "'../x' is no file name"),
        (lambda m: m["shards"][0].update(name="manifest.json"), "is no name of a shard"),
        (lambda m: m["shards"][0].update(costs={"sampling": {"seconds": 1}}), "cost {'seconds'"),
        (lambda m: m["shards"].pop(), "2 row groups, its manifest 1"),
        (lambda m: m["inputs"].update(sft="1" * 16), "among its inputs"),
        (lambda m: m.update(worker=[0, 2]), "no finished cache"),
        (lambda m: m["fields"].update(prompt_id=["foo", []]), "the field prompt_id"),
        (lambda m: m.pop("fields"), "is no cache"),
    ],
)
def test_claims_of_a_parquet_file_are_compared_with_its_records(tmp_path, edit, says):
    cache = make_top_k_cache(tmp_path / "a")
    edit_manifest(cache, lambda m: m["inputs"].update(sft="0" * 16))
    edit_manifest(cache, lambda m: m["outputs"].update(sft="0" * 16))
    file = epath.Path(tmp_path / "cache.parquet")
    parquet.to_parquet(Artefact(tmp_path / "a"), file)
    claims(file, edit)
    with pytest.raises(UserError, match=re.escape(says)):
        parquet.from_parquet(file, tmp_path / "b")
    assert not (tmp_path / "x").exists() and not Artefact(tmp_path / "b").complete


@pytest.mark.parametrize("damage", ["page", "pipe", "column"])
def test_parquet_that_cannot_be_read_is_one_error(tmp_path, damage):
    file = epath.Path(tmp_path / "cache.parquet")
    parquet.to_parquet(make_top_k_cache(tmp_path / "a"), file)
    if damage == "page":
        content = bytearray(file.read_bytes())
        content[40:60] = b"\xff" * 20
        file.write_bytes(content)
    elif damage == "column":
        table = pyarrow.parquet.read_table(file)
        pyarrow.parquet.write_table(table.drop(["finished"]), file, row_group_size=5)
    else:
        file.unlink()
        os.mkfifo(file)
    with pytest.raises(UserError, match=r"damaged|are not those|is no file but a pipe"):
        parquet.from_parquet(file, tmp_path / "b")


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda m: m["shards"][0].update(name="../x"), "'../x' is no file name"),
        (lambda m: m["shards"][0].update(name="/tmp/x"), "'/tmp/x' is no file name"),
        (lambda m: m["shards"][0].update(name="manifest.json"), "is no name of a shard"),
        (lambda m: m["shards"][0].update(name=shard_name(0, 9)), "is none of the 2 shards"),
        (lambda m: m["shards"].append(m["shards"][0] | {"name": shard_name(5, 9)}), "is none of"),
        (lambda m: m["shards"][0].update(records=99), "2 records that are not those"),
        (lambda m: m["shards"][0].update(content="f" * 64), "2 records that are not those"),
        (lambda m: m["shards"][0]["totals"].update(responses=99), "responses is 99"),
        (lambda m: m["shards"][0].update(totals={}), "no totals"),
        (lambda m: m.pop("plan"), "lacks the plan"),
        (lambda m: m["plan"].update(records_per_shard=0), "the plan of its manifest"),
        (lambda m: m.update(worker=[5, 2]), "part (5, 2)"),
    ],
)
def test_a_part_whose_manifest_cannot_be_is_not_merged(tmp_path, edit, says):
    part = Artefact(tmp_path / "part")
    part.begin("precompute", {}, {})
    part.manifest.worker = (0, 1)
    part.manifest.plan = {"requests": 4, "prompts": "", "records_per_shard": 2}
    for s in range(2):
        records = [record(2 * s), record(2 * s + 1)]
        counted = totals.of_responses(records) | totals.of_scores(records)
        writer.write_shard(part, SCORED_FIELDS, s, 2, records, counted, {})
    part.finish({"responses": 4})
    edit_manifest(part, edit)
    with pytest.raises(UserError, match=re.escape(says)):
        merge.merge(tmp_path / "out", [tmp_path / "part"])
    assert not (tmp_path / "x").exists() and not Artefact(tmp_path / "out").complete


@pytest.mark.parametrize("name", ["verify", "summary", "show"])
def test_what_is_no_cache_is_one_line(tmp_path, monkeypatch, capsys, name):
    other = Artefact(tmp_path / "sft")
    other.begin("sft", {}, {})
    other.finish({"fingerprint": "0" * 16})
    code, _, stderr = command(monkeypatch, capsys, name, tmp_path / "sft")
    assert code == 2 and stderr.endswith("is no cache, but the artefact of the stage 'sft'\n")
    code, _, stderr = command(monkeypatch, capsys, name, "")
    assert code == 2 and "a path is empty" in stderr
    monkeypatch.setenv("HOME", str(tmp_path))
    assert "the stage 'sft'" in command(monkeypatch, capsys, name, "~/sft")[2]


def test_a_manifest_nested_too_deep_is_one_error(tmp_path):
    (tmp_path / "manifest.json").write_text('{"a":' * 100_000 + "1" + "}" * 100_000)
    with pytest.raises(UserError, match="is damaged"):
        Artefact(tmp_path)


def test_summary_by_position():
    """Two responses whose log-ratio is known at each position."""
    ratios = [[0.0, 2.0, -1.5, 0.5], [1.0, 0.0]]
    records = [
        {
            "prompt_tokens": np.arange(2),
            "response_tokens": np.arange(len(ratio)),
            "finished": True,
            "teacher_logprobs": np.float32(ratio) - 3,
            "ref_logprobs": np.full(len(ratio), -3, np.float32),
        }
        for ratio in ratios
    ]
    curve = summary.by_position(summary.collect(records), bins=2)
    assert [(b["from"], b["to"], b["tokens"]) for b in curve] == [(0, 2, 4), (2, 4, 2)]
    assert [b["mean"] for b in curve] == [0.75, -0.5] and [b["far"] for b in curve] == [0.25, 0.5]
    counted = totals.of_scores(records)
    assert counted == {"log_ratio_sum": 2.0, "far": 2, "unlikely": 0}
    records[0]["teacher_logprobs"] = records[0]["teacher_logprobs"] - 8
    assert totals.of_scores(records)["unlikely"] == 3


def command(monkeypatch, capsys, *arguments) -> tuple[int, str, str]:
    """`python -m lopd.cache ARGUMENTS`: exit code, standard output, standard error."""
    monkeypatch.setattr(sys, "argv", ["lopd.cache", *map(str, arguments)])
    try:
        code = main() or 0
    except SystemExit as end:
        code = end.code
    return code, *capsys.readouterr()


def test_commands(tmp_path, monkeypatch, capsys):
    run = lambda *arguments: command(monkeypatch, capsys, *arguments)  # noqa: E731
    cache = make_top_k_cache(tmp_path / "a")
    assert run("verify", cache.path) == (
        0,
        f"{cache.path}: 10 records in 2 shards, all right\n",
        "",
    )
    code, text, _ = run("summary", cache.path)
    assert code == 0 and "10 of 23 tokens" in text and "teacher consistency  mean +2.3" in text
    code, text, _ = run("show", cache.path, "--record=2", "--count=3")
    assert code == 0 and text.count("── prompt_id") == 3
    assert text.count("⟨+1.00⟩") == 3 and "3 + 3 tokens" in text
    assert run("to-parquet", cache.path, tmp_path / "c.parquet")[0] == 0
    assert run("from-parquet", tmp_path / "c.parquet", tmp_path / "b")[0] == 0
    assert verify_records(open_complete(tmp_path / "b", "it")) == 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["verify", "nowhere"], "nowhere holds no manifest.json"),
        (["summary", "CACHE"], "array_record-00001-of-00002 is damaged"),
        (["show", "CACHE", "--tokenizer=nowhere.model"], "nowhere.model"),
        (["show", "CACHE", "--record=99"], "is damaged"),
        (["to-parquet", "CACHE", "x.parquet"], "is damaged"),
        (["from-parquet", "nowhere.parquet", "x"], "nowhere.parquet"),
        (["merge", "x", "CACHE"], "no worker's part"),
        (["import-released", "f.parquet", "x"], "needs --config=FILE"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_command_errors_are_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    make_top_k_cache(tmp_path / "a")
    shard = tmp_path / "a" / shard_name(1, 2)
    shard.write_bytes(shard.read_bytes()[:-1])
    monkeypatch.chdir(tmp_path)
    arguments = ["a" if a == "CACHE" else a for a in arguments]
    code, out, err = command(monkeypatch, capsys, *arguments)
    assert (code, out) == (2, "") and err.count("\n") == 1, err
    assert err.startswith("lopd: error: ") and message in err


def test_colours_on_a_terminal():
    tokenizer = load_tokenizer("tiny")
    text = summary.show_record(record(3), tokenizer, colour=True)
    assert text.count("\x1b[48;2;0;") == 4  # each of the four tokens, on green: A = +1.5
    assert text.count("⟨+1.50⟩") == 4
    assert "⟨" not in summary.show_record(record(1), tokenizer, colour=True)  # A = +0.5
