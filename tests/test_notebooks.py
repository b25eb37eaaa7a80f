"""The notebooks, executed top to bottom with small settings; and what is committed of them."""

import ast
import json
import re

import nbclient
import nbformat
import pytest
import tensorflow_datasets as tfds
import tokenizers
import transformers
from helpers.commands import BATCHES, REPOSITORY, SMALL, environment
from helpers.small_checkpoint import save_small_qwen3

from lopd.config import MATH_PROMPT

NOTEBOOKS = REPOSITORY / "notebooks"
CHAT = (
    "{% for turn in messages %}<|im_start|>{{ turn.role }}\n{{ turn.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ARMS = ("lightning_aa", "lightning_ab", "lightning_ba", "lightning_bb")
TWO_STEPS = {"steps": 2, "batch_size": 4, "row_length": 208}
FEW_TOKENS = {"response_length": 8, "row_length": 208}


def read(name):
    return nbformat.read(NOTEBOOKS / name, as_version=4)


def execute(name, **parameters):
    """The cells of a notebook by id, after a run with other values in the cell `parameters`.

    An error in a cell is raised here.
    """
    notebook = read(name)
    cell = next(c for c in notebook.cells if "parameters" in c.metadata.get("tags", []))
    assert {node.targets[0].id for node in ast.parse(cell.source).body} == parameters.keys()
    cell.source = "\n".join(f"{key} = {value!r}" for key, value in parameters.items())
    place = {"metadata": {"path": str(NOTEBOOKS)}}
    client = nbclient.NotebookClient(notebook, kernel_name="python3", resources=place, timeout=300)
    client.execute(env=environment() | {"PYTHONPATH": str(REPOSITORY), "TQDM_DISABLE": "1"})
    return {cell.id: cell for cell in notebook.cells}


def code_cells(cells):
    return [cell for cell in cells if cell.cell_type == "code"]


def text(cell) -> str:
    return "".join(out.text for out in cell.outputs if out.output_type == "stream")


def data(cell, mime) -> list[str]:
    return [out.data[mime] for out in cell.outputs if mime in out.get("data", {})]


def assert_pictures(cells, *names):
    for name in names:
        (picture,) = data(cells[name], "image/png")
        assert len(picture) > 5000, name


def assert_quiet(cells):
    """No error, and nothing on standard error, such as a warning."""
    for cell in code_cells(cells):
        for out in cell.outputs:
            assert out.output_type != "error" and out.get("name") != "stderr", (cell.id, out)


@pytest.fixture(scope="module")
def tour(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tour")
    runs = [
        {"arm": arm, "accuracy": {"addition/greedy": {"accuracy": accuracy + 0.1 * seed}}}
        for arm, accuracy in zip(ARMS, (0.8, 0.5, 0.4, 0.7), strict=True)
        for seed in range(3)
    ]
    (folder / "results.json").write_text(json.dumps({"runs": runs}))
    stages = ("teacher", "sft_data", "sft", "precompute", "heldout", "opd", "eval")
    cells = execute(
        "lightning_opd.ipynb",
        WORKDIR=str(folder / "run"),
        CHANGES={**SMALL, **BATCHES, "stages": stages, "runtime.checkpoint_every": 100},
        REPRODUCTION=str(folder / "results.json"),
    )
    return folder / "run", cells


def test_tour_runs_to_its_end_with_pictures(tour):
    workdir, cells = tour
    assert_quiet(cells.values())
    pictures = ("accuracy", "score-picture", "spread", "huber", "drift", "consistency")
    assert_pictures(cells, *pictures)
    models = json.loads((workdir / "eval" / "summary.json").read_text())["models"]
    assert list(models) == ["teacher", "base", "sft", "opd"]
    for name, tasks in models.items():
        shown = next(x for x in text(cells["run"]).splitlines() if re.match(rf"{name}\b", x))
        for result in tasks.values():
            assert f"{result['accuracy']:.1%}" in shown


def test_tour_shows_the_cache_as_it_is(tour):
    """The coloured tokens are those of cached responses, with their advantages."""
    workdir, cells = tour
    cache = tfds.builder_from_directory(workdir / "precompute").as_data_source("train")
    (page,) = data(cells["colour"], "text/html")
    rows = page.split("<tr>")[1:]
    assert len(rows) == 5
    shown = [float(x) for x in re.findall(r'title="([^ ]+) nats"', rows[3])]
    record = cache[0]
    assert shown == pytest.approx(record["teacher_logprobs"] - record["ref_logprobs"], abs=0.006)
    assert f"{len(cache)} responses" in text(cells["cache"])


def test_tour_steps_by_hand(tour):
    _, cells = tour
    before, after = map(float, re.search(r"nats² +(\S+) +(\S+)", text(cells["step"])).groups())
    assert 0 < after < before
    size, difference = re.findall(r"(?:gradient|difference) ([\d.e+-]+)", text(cells["identity"]))
    assert float(difference) < 1e-5 * float(size)
    gap = re.search(r"differ by (\S+) nats", text(cells["score"])).group(1)
    assert 0 < float(gap) < 1e-4


def make_checkpoint(folder, seed, hidden_size):
    """A small Qwen3 and a byte-level tokenizer with Qwen3's turns, both written by Transformers."""
    ends = ["<|im_end|>", "<|im_start|>"]
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320,
        show_progress=False,
        special_tokens=ends,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator([MATH_PROMPT], trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=ends[0])
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    save_small_qwen3(folder, seed, hidden_size, vocab_size=320, eos_token_id=0)
    return str(folder)


def test_hugging_face_checkpoint_goes_through_to_export(tmp_path):
    workdir = tmp_path / "run"
    small = {
        **{f"sft.{key}": value for key, value in TWO_STEPS.items()},
        **{f"opd.{key}": value for key, value in TWO_STEPS.items()},
        **{f"precompute.{key}": value for key, value in FEW_TOKENS.items()},
    }
    cells = execute(
        "huggingface.ipynb",
        TEACHER=make_checkpoint(tmp_path / "teacher", 0, 32),
        STUDENT=make_checkpoint(tmp_path / "student", 1, 16),
        PROMPTS="",
        PROBLEMS="",
        WORKDIR=str(workdir),
        CHANGES={
            **small,
            "dtype": "float32",
            "prompt_length": 200,
            "sft.warmup_steps": 1,
            "sft_data.prompts": 6,
            "sft_data.response_length": 8,
            "precompute.prompts": 12,
            "eval.prompts": 4,
            "eval.response_length": 8,
            "runtime.slots": 8,
            "runtime.rows_per_micro": 2,
        },
    )
    assert_pictures(cells, "curves")
    assert "accuracy on problems" in text(cells["run"])
    models = json.loads((workdir / "eval" / "summary.json").read_text())["models"]
    assert list(models) == ["teacher", "base", "sft", "opd"]
    gap = re.search(r"mean difference (\S+) nats, 8 tokens", text(cells["export"])).group(1)
    assert float(gap) < 2e-4
    exported = transformers.AutoModelForCausalLM.from_pretrained(workdir / "export")
    assert exported.config.hidden_size == 16


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.name)
def test_what_is_committed(path):
    """Small, of one run from top to bottom, and without a word of the machine that it ran on."""
    assert path.stat().st_size < 1_500_000
    notebook = read(path.name)
    nbformat.validate(notebook)
    cells = code_cells(notebook.cells)
    assert_quiet(cells)
    outputs = json.dumps([cell.outputs for cell in cells])
    assert not re.search(r"/(home|root|tmp|work|Users|content|usr|opt)/", outputs)
    if path.name == "lightning_opd.ipynb":
        assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
        assert sum(bool(data(cell, "image/png")) for cell in cells) >= 5
