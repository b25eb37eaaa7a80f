"""Paths: which can be opened, and how files come to be there whole. Buckets: test_pipeline."""

import importlib.util

import pytest
from etils import epath
from tiny_run import tiny_config

from lopd import pipeline, storage
from lopd.artefact import Artefact
from lopd.errors import UserError


@pytest.mark.parametrize(
    "url", ["abfs://x/run", "hf://x/y", "file:///run", "gs:/bucket/run", "gs://", "gs:///run"]
)
def test_a_url_that_epath_would_take_for_a_folder_is_refused(url):
    with pytest.raises(UserError, match="gs://BUCKET/FOLDER") as caught:
        Artefact(url)
    assert str(caught.value).startswith(f"{url}: ")


@pytest.mark.parametrize("path", ["/a/b", "a:b", "a/b://c", "tfds:gsm8k", "org/model", ""])
def test_what_is_no_url_is_local(path):
    assert storage.is_local(path)


def test_settings_are_looked_at_for_urls_before_work(tmp_path):
    for name in ("opd__cache", "teacher__checkpoint", "task__opd_prompts", "tokenizer"):
        with pytest.raises(UserError, match=r"s4://x/y: this kind of URL"):
            pipeline.run(tiny_config(**{name: "s4://x/y"}), str(tmp_path / "w"))
    assert not (tmp_path / "w").exists()


def test_a_bucket_needs_gcsfs(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"gs://unseen: .* pip install gcsfs"):
        storage.absolute("gs://unseen/run")


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
