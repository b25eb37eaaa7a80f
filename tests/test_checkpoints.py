"""The stages on Hugging Face checkpoints: random weights, real files, the real tokenizer."""

import json
import re
import shutil
import subprocess
import sys

import peft
import pytest
import torch
import transformers
from helpers.commands import REPOSITORY, environment, refused
from helpers.qwen3_tokenizer import qwen3_folder
from helpers.small_checkpoint import save_small_qwen3

from lopd.artefacts.artefact import Artefact
from lopd.cache.reader import Records
from lopd.data.tokenizers import load_tokenizer

CONFIG = REPOSITORY / "configs" / "qwen3_8b.py"
SETTINGS = {
    "dtype": "float32",
    "prompt_length": 96,
    "sft_data.prompts": 6,
    "sft_data.samples": 1,
    "sft_data.response_length": 12,
    "sft.steps": 2,
    "sft.warmup_steps": 1,
    "sft.batch_size": 4,
    "sft.row_length": 128,
    "precompute.response_length": 12,
    "precompute.row_length": 128,
    "heldout.prompts": 2,
    "heldout.response_length": 12,
    "heldout.row_length": 128,
    "opd.steps": 2,
    "opd.batch_size": 4,
    "opd.row_length": 128,
    "eval.samples": 2,
    "eval.response_length": 8,
    "runtime.slots": 4,
    "runtime.rows_per_micro": 2,
}


def make_checkpoint(folder, seed, hidden_size):
    """A small Qwen3 written by Transformers, with the real tokenizer beside it."""
    save_small_qwen3(folder, seed, hidden_size, vocab_size=151_936, eos_token_id=151_645)
    for path in qwen3_folder().iterdir():
        shutil.copy(path, folder)
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Checkpoints of a teacher and a student, prompts and problems."""
    root = tmp_path_factory.mktemp("files")
    make_checkpoint(root / "teacher", 0, 32)
    student = make_checkpoint(root / "student", 1, 16)
    # As a base checkpoint has them: the end of a turn is not among the end tokens.
    defaults = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "do_sample": True}
    generation = {"eos_token_id": 151_643, "pad_token_id": 151_643, **defaults}
    (student / "generation_config.json").write_text(json.dumps(generation))
    (student / "chat_template.jinja").write_text(
        json.loads((student / "tokenizer_config.json").read_text())["chat_template"]
    )
    (student / "vocab.json").write_text("{}")  # for programs that want another form
    for name, count in (("sft", 8), ("opd", 9), ("problems", 3)):
        rows = [
            {"problem": f"{name}: what is {i} + 1?", "answer": str(i + 1)} for i in range(count)
        ]
        (root / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return root


def run(files, workdir, stages="", **changes):
    settings = SETTINGS | {
        "teacher.checkpoint": files / "teacher",
        "student.checkpoint": files / "student",
        "task.sft_prompts": files / "sft.jsonl",
        "task.opd_prompts": files / "opd.jsonl",
        "task.problems": files / "problems.jsonl",
    }
    settings |= {k.replace("__", "."): v for k, v in changes.items()}
    command = [
        *(sys.executable, "-m", "lopd.main", f"--config={CONFIG}", f"--workdir={workdir}"),
        *([f"--stages={stages}"] if stages else []),
        *(f"--config.{key}={value}" for key, value in settings.items()),
    ]
    return subprocess.run(command, capture_output=True, text=True, env=environment())


@pytest.fixture(scope="module")
def finished(files, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    done = run(files, workdir)
    assert done.returncode == 0, done.stderr
    return workdir


def test_all_stages_run_and_the_student_generates_in_transformers(files, finished):
    export = finished / "export"
    model = transformers.AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(export)
    messages = [{"role": "user", "content": "What is 2 + 2?"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
    out = model.generate(ids["input_ids"], max_new_tokens=4, do_sample=False)
    assert out.shape[1] > ids["input_ids"].shape[1]
    models = json.loads((finished / "eval" / "summary.json").read_text())["models"]
    assert list(models) == ["teacher", "base", "sft", "opd"]
    assert (
        models["opd"]["problems/sampled"]["n"] == 6
        and "pass@2" in models["opd"]["problems/sampled"]
    )
    # The weights moved: the export is not the base checkpoint.
    base = transformers.AutoModelForCausalLM.from_pretrained(files / "student")
    assert not torch.equal(base.model.norm.weight, model.model.norm.weight)


def test_the_export_has_every_end_token_and_the_files_of_its_source(files, finished):
    export, student = finished / "export", files / "student"
    generation = json.loads((export / "generation_config.json").read_text())
    assert generation == {
        "eos_token_id": [151_645, 151_643], "pad_token_id": 151_643,
        "temperature": 0.6, "top_p": 0.95, "top_k": 20, "do_sample": True,
    }  # fmt: skip
    loaded = transformers.GenerationConfig.from_pretrained(export)
    assert loaded.eos_token_id == [*load_tokenizer(str(student)).end_ids]
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "vocab.json"):
        assert (export / name).read_bytes() == (student / name).read_bytes()


def test_eval_of_a_checkpoint_alone(files, finished, tmp_path):
    """Of one that `export` wrote, whose manifest does not make it an artefact to go on from."""
    changes = dict(
        teacher__checkpoint="", student__checkpoint="", sft__checkpoint=finished / "export"
    )
    two = f"{files / 'problems.jsonl'},{files / 'opd.jsonl'}?prompt=problem&answer=answer"
    done = run(files, tmp_path, "eval", task__problems=two, **changes)
    assert done.returncode == 0, done.stderr
    models = json.loads((tmp_path / "eval" / "summary.json").read_text())["models"]
    assert list(models) == ["sft"]
    counts = {test: result["n"] for test, result in models["sft"].items()}
    assert counts == {
        "problems/greedy": 3,
        "opd/greedy": 9,
        "problems/sampled": 6,
        "opd/sampled": 18,
    }
    assert len((tmp_path / "eval" / "responses_sft.jsonl").read_text().splitlines()) == 36


def test_sft_on_responses_that_came_with_the_prompts(files, tmp_path):
    """No teacher is loaded; another teacher than the one declared may not score."""
    rows = [{"prompt": f"What is {i}?", "response": "It is " * i + f"{i}."} for i in range(8)]
    (tmp_path / "given.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    changes = dict(sft_data__responses="given", task__sft_prompts=tmp_path / "given.jsonl")
    refused(run(files, tmp_path / "w", "sft_data", **changes), "sft.teacher")
    changes |= dict(sft__teacher="QwQ")
    done = run(files, tmp_path / "w", "sft_data,sft", teacher__checkpoint="", **changes)
    assert done.returncode == 0, done.stderr
    records = Records(Artefact(tmp_path / "w" / "sft_data"))
    tokenizer = load_tokenizer(str(files / "student"))
    for record in records:
        prompt = tokenizer.decode(record["prompt_tokens"])
        number = int(re.search(r"What is (\d+)\?", prompt).group(1))
        expected = [*tokenizer.encode(rows[number]["response"]), tokenizer.end_id]
        assert record["response_tokens"].tolist() == expected[:12]
        assert record["finished"] == (len(expected) <= 12)
    refused(run(files, tmp_path / "w", "precompute", **changes), "teacher QwQ wrote the SFT data")


def test_sft_model_from_elsewhere_needs_its_teacher_declared(files, tmp_path):
    sft = {"sft__checkpoint": files / "student"}
    refused(run(files, tmp_path, "precompute", **sft), "sft.teacher")
    done = run(files, tmp_path, "precompute", sft__teacher="somebody else", **sft)
    assert done.returncode == 2 and "somebody else wrote the SFT data" in done.stderr
    done = run(files, tmp_path / "w", "precompute,opd", sft__teacher=files / "teacher", **sft)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_adapters_of_an_adapter_by_peft(files, tmp_path):
    """The command from adapter to adapter: shape, tokenizer and weights are those of the base that
    the adapter names."""
    base = transformers.AutoModelForCausalLM.from_pretrained(files / "student")
    config = peft.LoraConfig(r=2, lora_alpha=32, target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    changes = dict(
        student__checkpoint="",
        student__lora__rank=2,
        student__lora__targets=("q_proj",),
        sft__checkpoint=tmp_path / "adapter",
        sft__teacher=files / "teacher",
    )
    done = run(files, tmp_path / "run", "precompute,opd,eval,export", **changes)
    assert done.returncode == 0, done.stderr
    models = json.loads((tmp_path / "run" / "eval" / "summary.json").read_text())["models"]
    assert list(models) == ["teacher", "base", "sft", "opd"]
    tokens = torch.arange(100, 120)[None]
    export = tmp_path / "run" / "export"
    merged = transformers.AutoModelForCausalLM.from_pretrained(export)(tokens).logits
    adapted = peft.AutoPeftModelForCausalLM.from_pretrained(export / "adapter")(tokens).logits
    torch.testing.assert_close(merged, adapted, rtol=0, atol=1e-5 * merged.abs().max().item())


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"task__opd_prompts": ""}, ["task.opd_prompts is not set"]),
        ({"task__opd_prompts": "/nowhere.jsonl"}, ["/nowhere.jsonl"]),
        ({"prompt_length": 12}, ["prompt_length=12"]),
        ({"student__checkpoint": "/nowhere"}, ["/nowhere", "no such folder"]),
    ],
    ids=["unset source", "missing source", "long prompt", "missing checkpoint"],
)
def test_bad_input_is_one_line_before_any_work(files, tmp_path, changes, parts):
    refused(run(files, tmp_path / "w", **changes), *parts)
    assert not (tmp_path / "w" / "sft_data").exists()


def test_tokenizers_of_teacher_and_student_must_agree(files, tmp_path):
    shutil.copytree(files / "teacher", tmp_path / "teacher")
    path = tmp_path / "teacher" / "tokenizer.json"
    text = path.read_text().replace('"<|im_end|>"', '"<|im_over|>"')
    path.write_text(text)
    config = tmp_path / "teacher" / "tokenizer_config.json"
    config.write_text(config.read_text().replace("<|im_end|>", "<|im_over|>"))
    done = run(files, tmp_path / "w", teacher__checkpoint=tmp_path / "teacher")
    refused(done, "<|im_over|>", "<|im_end|>")


def test_with_nothing_configured_one_line_says_what_it_needs():
    command = [sys.executable, "-m", "lopd.main"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    refused(done, "--config=FILE is needed")
