"""Import of the released code's Parquet, its defects counted and nothing made up."""

import sys

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
import transformers
from etils import epath
from helpers.commands import REPOSITORY
from helpers.models import random_params
from helpers.qwen3_tokenizer import qwen3_folder
from helpers.tiny_run import tiny_config

from lopd import pipeline
from lopd.artefacts.artefact import Artefact, open_complete
from lopd.cache.__main__ import main
from lopd.cache.reader import Records, verify_records
from lopd.cache.released import import_released, read_released
from lopd.checkpoints import hugging_face
from lopd.config import read_settings
from lopd.data.tokenizers import load_tokenizer
from lopd.errors import UserError
from lopd.models import decoder

END = 1  # of the tiny tokenizer
LIMITS = {"prompt_length": 20, "response_length": 60}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("tiny")


def row(tokenizer, i: int, extra=(), **changes) -> dict:
    """A row as prepare_lightning_opd.py writes it, with parts of `metadata` replaced."""
    text = f"{i % 10}+7={i % 10 + 7}, so {i % 10 + 7}."
    tokens = [*tokenizer.encode(text), *extra]
    metadata = {
        "is_lightning_opd": True,
        "response_tokens": tokens,
        "loss_mask": [1] * len(tokens),
        "response": text,
        "teacher_log_probs": [-0.125 * (t + i) for t in range(len(tokens))],
    }
    return {
        "prompt": f"What is {i % 10}+7?\n",
        "label": "0",
        "metadata": metadata | changes,
    }


def write(path, rows) -> str:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path / "released.parquet")
    return str(path / "released.parquet")


def score(records):
    """Stands for π_ref: distinct values, so that a shift would show."""
    return [-0.5 * np.arange(1, len(r["response_tokens"]) + 1) - r["prompt_id"] for r in records]


def test_records_become_a_cache(tmp_path, tokenizer):
    rows = [row(tokenizer, i) for i in range(7)] + [row(tokenizer, 7, extra=[END])]
    records, report = read_released(write(tmp_path, rows), tokenizer, **LIMITS)
    assert (report.rows, report.imported, report.without_end, report.cut) == (8, 8, 7, 0)
    artefact = Artefact(tmp_path / "cache")
    artefact.begin("precompute", {}, {})
    outputs = import_released(artefact, records, report, score, records_per_shard=3)
    artefact.finish(outputs)
    assert outputs["responses"] == 8 and outputs["finished"] == 1
    assert outputs["imported"]["without_end"] == 7
    cache = Records(Artefact(tmp_path / "cache"))
    assert len(cache) == 8
    for i, original in enumerate(rows):
        record, tokens = cache[i], original["metadata"]["response_tokens"]
        assert record["prompt_tokens"].tolist() == tokenizer.encode(original["prompt"])
        assert record["response_tokens"].tolist() == tokens
        assert record["teacher_logprobs"].tolist() == original["metadata"]["teacher_log_probs"]
        assert record["ref_logprobs"].tolist() == [-0.5 * (t + 1) - i for t in range(len(tokens))]
        assert record["finished"] == (i == 7) and record["prompt_id"] == i
        assert "behaviour_logprobs" not in record


def test_an_interrupted_import_does_not_score_again(tmp_path, tokenizer):
    rows = [row(tokenizer, i) for i in range(6)]
    records, report = read_released(write(tmp_path, rows), tokenizer, **LIMITS)
    artefact = Artefact(tmp_path / "cache")
    artefact.begin("precompute", {}, {})
    scored = []

    def failing(part):
        if len(scored) == 1:
            raise KeyboardInterrupt
        scored.append([r["prompt_id"] for r in part])
        return score(part)

    with pytest.raises(KeyboardInterrupt):
        import_released(artefact, records, report, failing, records_per_shard=2)
    scored = [None, None]
    outputs = import_released(
        Artefact(tmp_path / "cache"), records, report, failing, records_per_shard=2
    )
    assert scored[2:] == [[2, 3], [4, 5]] and outputs["responses"] == 6


def test_defects_are_counted_and_skipped(tmp_path, tokenizer):
    n = len(row(tokenizer, 0)["metadata"]["response_tokens"])
    rows = [
        row(tokenizer, 0),
        row(tokenizer, 0, loss_mask=[1] * (n - 2) + [0, 1]),
        row(tokenizer, 0, teacher_log_probs=[-1.0] * (n - 1)),
        row(tokenizer, 0, teacher_log_probs=[-1.0] * (n + 1)),
        row(tokenizer, 0, loss_mask=[1] * (n - 1)),
        row(tokenizer, 0, teacher_log_probs=None),
        row(tokenizer, 0, response_tokens=[], teacher_log_probs=[], loss_mask=[]),
        row(tokenizer, 0, teacher_log_probs=[-1.0] * (n - 1) + [None]),
        row(tokenizer, 0, teacher_log_probs=[-1.0] * (n - 1) + [float("nan")]),
        row(tokenizer, 0, teacher_log_probs=[-1.0] * (n - 1) + [0.5]),
        row(tokenizer, 3),
    ]
    records, report = read_released(write(tmp_path, rows), tokenizer, **LIMITS)
    assert [r["prompt_id"] for r in records] == [0, 10]  # rows keep their numbers
    assert (report.rows, report.imported, report.masked) == (11, 2, 1)
    assert (report.mismatched, report.unscored, report.empty, report.invalid) == (3, 1, 1, 3)
    assert report.describe() == (
        "imported 2 of 11 responses; 2 without their end token, of which 0 at the cap; skipped: "
        "1 empty, 1 without teacher log-probs, 3 with another number of log-probs or mask entries "
        "than tokens, 1 with zeros in loss_mask, 3 with invalid log-probs"
    )


def test_long_responses_are_cut_and_not_finished(tmp_path, tokenizer):
    rows = [row(tokenizer, 2, extra=[END]), row(tokenizer, 2)]
    n = len(rows[1]["metadata"]["response_tokens"])
    path = write(tmp_path, rows)
    (ended, cut), report = read_released(path, tokenizer, prompt_length=20, response_length=n)
    assert len(ended["response_tokens"]) == len(ended["teacher_logprobs"]) == n
    assert not ended["finished"] and not cut["finished"]
    assert (report.without_end, report.cut) == (2, 2)


def test_prompts_may_be_token_ids(tmp_path, tokenizer):
    ids = tokenizer.encode("What is 2+7?\n")
    path = write(tmp_path, [row(tokenizer, 2) | {"prompt": ids}])
    records, _ = read_released(path, tokenizer, **LIMITS)
    assert records[0]["prompt_tokens"].tolist() == ids


def test_another_tokenizer_is_refused(tmp_path, tokenizer):
    path = write(tmp_path, [row(tokenizer, 2)])
    with pytest.raises(UserError, match="row 0: the tokenizer gives other ids"):
        read_released(path, load_tokenizer(str(qwen3_folder())), **LIMITS | {"prompt_length": 99})
    path = write(tmp_path, [row(tokenizer, 2, extra=[tokenizer.vocab_size])])
    with pytest.raises(
        UserError, match=f"row 0: ids from .* the tokenizer has {tokenizer.vocab_size}"
    ):
        read_released(path, tokenizer, **LIMITS)


def test_what_cannot_be_imported_is_one_clear_error(tmp_path, tokenizer):
    path = write(tmp_path, [row(tokenizer, 2, teacher_log_probs=None)])
    with pytest.raises(UserError, match=r"imported 0 of 1 responses.* 1 without teacher log-probs"):
        read_released(path, tokenizer, **LIMITS)
    path = write(tmp_path, [row(tokenizer, 2)])
    with pytest.raises(UserError, match=r"row 0: the prompt has \d+ tokens, prompt_length is 3"):
        read_released(path, tokenizer, prompt_length=3, response_length=60)
    path = write(tmp_path, [{"prompt": "a", "response": "b"}])
    with pytest.raises(UserError, match=r"columns \['prompt', 'response'\], not those of"):
        read_released(path, tokenizer, **LIMITS)


def test_imported_cache_trains(tmp_path, tokenizer, monkeypatch, capsys):
    """The command makes what `opd.cache` takes; log π_ref equals that of Transformers."""
    model = decoder.DecoderConfig(**tiny_config().student.model)
    student = tmp_path / "student"
    student.mkdir()
    hugging_face.save_checkpoint(
        epath.Path(student), model, random_params(model, 3), end_id=tokenizer.end_id
    )
    rows = [row(tokenizer, i, extra=[END]) for i in range(10)]
    rows[3]["metadata"]["loss_mask"][2] = 0
    settings = [
        f"--config={REPOSITORY / 'configs' / 'tiny.py'}",
        f"--config.sft.checkpoint={student}",
        "--config.prompt_length=20",
        "--config.runtime.records_per_shard=4",
    ]
    arguments = ["import-released", write(tmp_path, rows), str(tmp_path / "cache"), *settings]
    monkeypatch.setattr(sys, "argv", ["lopd.cache", *arguments])
    main()
    assert "imported 9 of 10 responses" in capsys.readouterr().out
    cache = open_complete(tmp_path / "cache", "the cache")
    assert verify_records(cache) == 9
    reference = transformers.AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    for record in Records(cache):
        tokens = np.concatenate([record["prompt_tokens"], record["response_tokens"]])
        with torch.no_grad():
            logits = reference(torch.tensor(tokens[None])).logits[0].double()
        expected = torch.log_softmax(logits, -1)[np.arange(len(tokens) - 1), tokens[1:]]
        response = expected.numpy()[len(record["prompt_tokens"]) - 1 :]
        np.testing.assert_allclose(record["ref_logprobs"], response, atol=1e-4)
    config = tiny_config()
    config.update_from_flattened_dict({
        "opd.cache": str(cache.path), "sft.checkpoint": str(student), "sft.teacher": "theirs",
        "prompt_length": 20, "opd.steps": 2, "opd.warmup_steps": 0, "opd.batch_size": 8,
    })  # fmt: skip
    pipeline.run(read_settings(config), str(tmp_path / "run"), ("opd",))
    inputs = Artefact(tmp_path / "run" / "opd").manifest.inputs
    assert inputs == {"sft": cache.outputs["sft"], "precompute": cache.outputs["fingerprint"]}
