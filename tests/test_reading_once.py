"""A checkpoint is read and hashed once per stage that uses it."""

import collections

import pytest
from helpers.small_checkpoint import save_small_qwen3
from helpers.tiny_run import run

from lopd.checkpoints import hugging_face
from lopd.data.tokenizers import load_tokenizer
from lopd.stages import weights

pytestmark = pytest.mark.usefixtures("one_device")


def test_checkpoints_are_read_and_hashed_once_per_stage(tmp_path, monkeypatch):
    """Teacher and π_ref are adopted: each stage that uses one reads it once, with one hash."""
    names = ("teacher", "student")
    for seed, name in enumerate(names):
        save_small_qwen3(tmp_path / name, seed, 32, vocab_size=21, eos_token_id=1)
        for file, content in load_tokenizer("tiny").files.items():
            (tmp_path / name / file).write_bytes(content)
    reads, hashes = collections.Counter(), []
    load = hugging_face.load_checkpoint

    def counting_load(path, *args, **kwargs):
        reads[path.name] += 1
        return load(path, *args, **kwargs)

    monkeypatch.setattr(hugging_face, "load_checkpoint", counting_load)
    fingerprint = weights.params_fingerprint
    monkeypatch.setattr(
        weights, "params_fingerprint", lambda p: hashes.append(fingerprint(p)) or hashes[-1]
    )
    given = {
        "teacher__checkpoint": str(tmp_path / "teacher"),
        "sft__checkpoint": str(tmp_path / "student"),
        "sft__teacher": str(tmp_path / "teacher"),
        "teacher__model": {},
        "student__model": {},
    }
    stages = ("precompute", "heldout")
    run(tmp_path, tmp_path / "run", *stages, precompute__prompts=8, heldout__prompts=4, **given)
    # Once when it is adopted, then once in each of the two stages.
    assert reads == dict.fromkeys(names, 3)
    assert len(hashes) == 6 and len({*hashes}) == 2
