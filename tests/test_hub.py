"""Data sets and models of the Hub, from a stand-in of it and by the real huggingface_hub."""

import io
import json

import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest
from helpers import hub_server
from helpers.byte_tokenizer import save_tokenizer

from lopd.checkpoints import hugging_face
from lopd.config.settings import Settings, TaskSettings
from lopd.config.values import changed
from lopd.data import sources
from lopd.data.hub import choose, parse
from lopd.data.tokenizers import load_tokenizer
from lopd.errors import UserError
from lopd.machine.storage import absolute
from lopd.stages import identity
from lopd.stages.pins import FILE, pinned
from lopd.stages.run import Run
from lopd.tasks.prompts import load_tests

CONVERTED = "refs/convert/parquet"


def parquet(*texts: str) -> bytes:
    rows = [{"problem": text, "answer": str(len(text))} for text in texts]
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue()


def jsonl(*texts: str) -> bytes:
    return b"".join(json.dumps({"question": t, "answer": "1"}).encode() + b"\n" for t in texts)


def prompts(source: str) -> list[str]:
    return [x.messages[-1]["content"] for x in sources.load_examples(source)]


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with hub_server.serve() as hub:
        hub_server.use(monkeypatch, hub, tmp_path / "cache")
        yield hub


# Which files


MAIN = {"main/train-00000-of-00001.parquet", "main/test-00000-of-00001.parquet"}
SOCRATIC = {"socratic/train-00000-of-00001.parquet", "socratic/test-00000-of-00001.parquet"}
SHARDS = {"data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"}


@pytest.mark.parametrize(
    ("part", "files", "chosen"),
    [
        ("", {"README.md", "test.jsonl"}, {"test.jsonl"}),
        ("", {"data/dapo-math-17k.parquet"}, {"data/dapo-math-17k.parquet"}),
        ("", SHARDS | {"data/test-00000-of-00001-0f3a.parquet"}, SHARDS),
        ("/test", {"test.jsonl", "train.jsonl"}, {"test.jsonl"}),
        ("/main/test", MAIN | SOCRATIC, {"main/test-00000-of-00001.parquet"}),
        ("/test", MAIN, {"main/test-00000-of-00001.parquet"}),
        ("/train", {"default/train/0000.parquet", "default/train/0001.parquet"},
         {"default/train/0000.parquet", "default/train/0001.parquet"}),
        ("/data/train-*0-of*", SHARDS, {"data/train-00000-of-00002.parquet"}),
        ("/a/b.jsonl", {"a/b.jsonl", "b.jsonl"}, {"a/b.jsonl"}),
    ],
)  # fmt: skip
def test_a_source_names_a_split_a_file_or_a_glob(part, files, chosen):
    assert set(choose(parse(f"hf:me/data{part}"), files)) == chosen


@pytest.mark.parametrize(
    ("part", "files", "says"),
    [
        ("", {"README.md"}, "has no split 'train'; it has no .jsonl or .parquet files"),
        ("/dev", MAIN, "hf:me/data/dev: has no split 'dev'; it has main/test, main/train"),
        ("/test", MAIN | SOCRATIC, r"could be meant; say which, as in hf:me/data/main/test$"),
        ("", {"a.jsonl", "b.jsonl"}, "has no split 'train'; it has a, b"),
        ("/x*.jsonl", {"a.jsonl"}, "no data file is called so; it has a.jsonl"),
    ],
)
def test_what_is_not_there_or_not_clear_is_one_line(part, files, says):
    with pytest.raises(UserError, match=says):
        choose(parse(f"hf:me/data{part}"), files)


@pytest.mark.parametrize("source", ["hf:gsm8k", "hf:", "hf:a/b@", "hf:a/b@v1/"])
def test_a_source_is_written_in_one_way(source):
    with pytest.raises(UserError, match="is hf:OWNER/NAME"):
        parse(source)


# From the Hub


def test_reads_a_split_and_a_revision_with_its_columns(hub):
    hub.add("me/data", {"data/train-00000-of-00001.parquet": parquet("old")}, revision="v1")
    hub.add("me/data", {"train.jsonl": jsonl("one", "two"), "test.jsonl": jsonl("three")})
    assert prompts("hf:me/data") == ["one", "two"]
    assert prompts("hf:me/data/test") == ["three"]
    assert prompts("hf:me/data@v1") == ["old"]
    assert prompts("hf:me/data@v1?prompt=answer") == ["3"]
    assert not any("train.jsonl" in r for r in hub.downloads() if "test.jsonl" in r)


def test_a_script_is_read_as_the_hub_converted_it(hub):
    hub.add("me/script", {"script.py": b"exit()"})
    commit = hub.add("me/script", {"default/train/0000.parquet": parquet("a")}, revision=CONVERTED)
    assert prompts("hf:me/script/train") == ["a"]
    assert sources.pin("hf:me/script/train?prompt=x") == f"hf:me/script@{commit}/train?prompt=x"


def test_several_splits_download_only_what_is_asked_for(hub):
    hub.add("me/data", {"train.jsonl": jsonl("one"), "test.jsonl": jsonl("two")})
    prompts("hf:me/data/test")
    assert not any("train.jsonl" in request for request in hub.downloads())


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("hf:me/none", "data set me/none: the Hub has none of that name, or it is private"),
        ("hf:me/data@v9", "data set me/data has no revision 'v9'"),
        ("hf:me/data/dev", "hf:me/data/dev: has no split 'dev'; it has train"),
        ("hf:me/data?prompt=text", "no column 'text'; it has"),
        ("hf:me/empty", "holds no .jsonl or .parquet files, and the Hub has not converted it"),
    ],
)
def test_a_missing_data_set_revision_split_or_column_is_one_line(hub, source, says):
    hub.add("me/data", {"train.jsonl": jsonl("one")})
    hub.add("me/empty", {"README.md": b""})
    with pytest.raises(UserError, match=says) as error:
        prompts(source)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("closed", "why"),
    [
        ("GatedRepo", "accept them at https://huggingface.co/datasets/me/data"),
        ("RepoNotFound", "or it is private"),
    ],
)
def test_without_a_token_the_line_says_where_to_get_one(hub, monkeypatch, closed, why):
    hub.add("me/data", {"train.jsonl": jsonl("one")})
    hub.add("me/model", {"config.json": b"{}"}, kind="models")
    hub.close("me/data", error=closed)
    hub.close("me/model", kind="models", error=closed)
    with pytest.raises(UserError, match=rf"{why}.*https://huggingface.co/settings/tokens"):
        prompts("hf:me/data")
    with pytest.raises(UserError, match=r"me/model.*https://huggingface.co/settings/tokens"):
        hugging_face.resolve_checkpoint("me/model")
    monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
    assert prompts("hf:me/data") == ["one"]
    assert (hugging_face.resolve_checkpoint("me/model") / "config.json").exists()


def test_a_cut_download_goes_on_where_it_stopped(hub, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    hub.add("me/data", {"train.jsonl": jsonl(*(f"problem {i}" for i in range(2000)))})
    hub.cut["train.jsonl"] = 1
    assert len(prompts("hf:me/data")) == 2000
    assert any(" from " in request for request in hub.downloads())


def test_after_a_download_that_failed_whole_files_stay(hub, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.add("me/data", {"train-0-of-2.jsonl": jsonl("one"), "train-1-of-2.jsonl": jsonl("two")})
    hub.cut["train-1-of-2.jsonl"] = 1000
    with pytest.raises(UserError, match="the same command goes on from what has come"):
        prompts("hf:me/data")
    hub.cut.clear()
    hub.requests.clear()
    assert prompts("hf:me/data") == ["one", "two"]
    assert not any("train-0-of-2" in request for request in hub.downloads())


def test_what_is_in_the_cache_needs_no_hub(hub, monkeypatch):
    hub.add("me/data", {"train.jsonl": jsonl("one"), "test.jsonl": jsonl("two")})
    hub.add("me/script", {"script.py": b""})
    hub.add("me/script", {"default/train/0000.parquet": parquet("a")}, revision=CONVERTED)
    read = ("hf:me/data", "hf:me/script")
    first = [prompts(source) for source in read]
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert [prompts(source) for source in read] == first
    assert hub.requests == []
    with pytest.raises(UserError, match=r"data set me/data: .*HF_HUB_OFFLINE"):
        prompts("hf:me/data/test")
    with pytest.raises(UserError, match=r"data set me/other: .*HF_HUB_OFFLINE"):
        prompts("hf:me/other")


def test_a_tokenizer_of_the_hub_comes_without_weights(hub, tmp_path):
    save_tokenizer(tmp_path / "made")
    files = {path.name: path.read_bytes() for path in (tmp_path / "made").iterdir()}
    hub.add("me/model", files | {"model.safetensors": b"x"}, kind="models")
    run = Run(changed(Settings(), {"tokenizer": "me/model"}), absolute(tmp_path), mesh=None)
    assert run.tokenizer.fingerprint == load_tokenizer(str(tmp_path / "made")).fingerprint
    assert not any("safetensors" in request for request in hub.downloads())
    run = Run(changed(Settings(), {"tokenizer": "me/none"}), absolute(tmp_path), mesh=None)
    with pytest.raises(UserError, match=r"tokenizer=me/none: .*the Hub has none of that name"):
        _ = run.tokenizer
    tiny = Run(changed(Settings(), {"tokenizer": "tiny"}), absolute(tmp_path), mesh=None)
    assert tiny.tokenizer.end_ids


# What a run remembers


def test_a_run_reads_the_commit_that_it_read_first(hub, tmp_path):
    workdir = absolute(tmp_path)
    files = {"train.jsonl": jsonl("one")}
    commit = hub.add("me/data", files)
    task = TaskSettings(sft_prompts="hf:me/data", problems="hf:me/data?prompt=question,file.jsonl")
    expected = TaskSettings(
        sft_prompts=f"hf:me/data@{commit}",
        problems=f"hf:me/data@{commit}?prompt=question,file.jsonl",
    )
    assert pinned(task, workdir) == expected
    hub.add("me/data", {"train.jsonl": jsonl("newer")})
    hub.requests.clear()
    assert pinned(task, workdir) == expected
    assert hub.requests == []
    (tmp_path / FILE).unlink()
    assert pinned(task, workdir) != expected


def test_the_commit_is_in_the_settings_of_what_reads_it_and_of_nothing_else(hub, tmp_path):
    commit = hub.add("me/data", {"train.jsonl": jsonl("one")})
    hub.add("me/tests", {"test.jsonl": jsonl("two")})
    task = {"task.name": "math", "task.sft_prompts": "hf:me/data", "task.problems": "hf:me/tests"}
    run = Run(changed(Settings(), task), absolute(tmp_path), mesh=None)
    assert "problems" not in identity.task_settings(run)["task"] and not hub.requests
    read = identity.task_settings(run, "sft_prompts")["task"]
    assert read["sft_prompts"] == f"hf:me/data@{commit}" and "problems" not in read
    assert [problem.prompt for problem in run.task.tests("test", None, 0)["tests"]]


def test_a_commit_or_a_file_is_what_it_is(hub, tmp_path):
    task = TaskSettings(sft_prompts="file.jsonl", opd_prompts=f"hf:me/data@{'a' * 40}/train")
    assert pinned(task, absolute(tmp_path)) == task
    assert hub.requests == []


def test_a_test_set_is_called_after_its_data_set():
    pinned_source = f"hf:MathArena/hmmt_feb_2025@{'a' * 40}/train?prompt=problem"
    assert sources.source_name(pinned_source) == "hmmt_feb_2025"
    assert sources.source_name("x/aime24.jsonl?prompt=a") == "aime24"


def test_worked_answers_of_gsm8k_are_graded_by_their_last_line(tmp_path):
    rows = [
        {"question": "a", "answer": "She has 2 # and 3.\n#### 1,080"},
        {"question": "b", "answer": "12"},
    ]
    (tmp_path / "gsm8k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    problems = load_tests(str(tmp_path / "gsm8k.jsonl"), "{problem}")
    assert [problem.reference for problem in problems] == ["1,080", "12"]
