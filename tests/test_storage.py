"""Paths: which can be opened, and how files come to be there whole. Buckets: test_pipeline."""

import os
import sys

import pytest
from etils import epath
from helpers.tiny_run import tiny_settings

from lopd import pipeline
from lopd.artefacts.artefact import Artefact
from lopd.checkpoints import hugging_face
from lopd.errors import UserError
from lopd.machine import storage


@pytest.mark.parametrize(
    "url", ["abfs://x/run", "hf://x/y", "file:///run", "gs:/bucket/run", "gs://", "gs:///run"]
)
def test_another_url_than_of_a_bucket_is_refused(url):
    with pytest.raises(UserError, match="gs://BUCKET/FOLDER") as caught:
        Artefact(url)
    assert str(caught.value).startswith(f"{url}: ")


@pytest.mark.parametrize("path", ["/a/b", "a:b", "a/b://c", "tfds:gsm8k", "org/model", ""])
def test_what_is_no_url_is_local(path):
    assert storage.is_local(path)


def test_settings_are_looked_at_for_urls_before_work(tmp_path):
    for name in ("opd__cache", "teacher__checkpoint", "task__opd_prompts", "tokenizer"):
        with pytest.raises(UserError, match=r"s4://x/y: this kind of URL"):
            pipeline.run(tiny_settings(**{name: "s4://x/y"}), str(tmp_path / "w"))
    assert not (tmp_path / "w").exists()


def test_a_bucket_needs_gcsfs(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UserError, match=r"gs://unseen: .* pip install gcsfs"):
        storage.absolute("gs://unseen/run")


def test_checkpoints_in_a_bucket_are_refused_wherever_they_are_named(monkeypatch):
    monkeypatch.setattr(storage, "_open_bucket", lambda bucket: None)
    with pytest.raises(UserError, match=r"gs://b/model: safetensors are read from a local folder"):
        hugging_face.resolve_checkpoint("gs://b/model")
    with pytest.raises(UserError, match=r"s3://b/model: this kind of URL"):
        hugging_face.resolve_checkpoint("s3://b/model")


@pytest.mark.parametrize("which", ["student", "sft"])
def test_an_export_that_was_cut_off_is_no_checkpoint(tmp_path, which):
    """Refused before work also where the settings give the shape."""
    export = Artefact(tmp_path / "export")
    export.begin("export", {}, {})
    (export.path / "config.json").write_text("{}")
    settings = {f"{which}__checkpoint": str(export.path)}
    with pytest.raises(UserError, match=r"export is not finished"):
        pipeline.run(tiny_settings(**settings), str(tmp_path / "w"))
    assert not (tmp_path / "w").exists()


def test_what_grows_is_flushed_with_all_its_files(tmp_path, monkeypatch):
    """A directory's own fsync keeps the names of its files and not what is in them."""
    file = tmp_path / "profile" / "plugins" / "trace"
    file.parent.mkdir(parents=True)
    file.write_text("rows")
    flushed, fsync = set(), os.fsync

    def record(descriptor):
        flushed.add(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    storage.Growing(epath.Path(tmp_path / "profile")).sync()
    assert flushed == {str(p) for p in (file, file.parent, tmp_path / "profile")}


def test_a_file_that_fails_on_the_way_is_not_there(tmp_path):
    path = epath.Path(tmp_path) / "file"
    path.write_text("before")
    with pytest.raises(ValueError), storage.whole_file(path) as file:
        file.write_text("half")
        raise ValueError
    assert [p.name for p in tmp_path.iterdir()] == ["file"] and path.read_text() == "before"
    with storage.whole_file(path) as file:
        file.write_text("after")
        assert path.read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["file"] and path.read_text() == "after"
