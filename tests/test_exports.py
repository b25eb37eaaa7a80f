"""What `export` leaves: its tokenizer, number type, end tokens, card, and a disk that is full.

The references are the SentencePiece library, Transformers, and a real disk that fills up.
"""

import dataclasses
import io
import json
import random
import re
import stat
import subprocess
import sys

import huggingface_hub
import jax
import numpy as np
import pytest
import safetensors.numpy
import sentencepiece
import tokenizers
import transformers
from etils import epath
from helpers.commands import REPOSITORY, environment
from helpers.models import MOE, TIED, random_params
from helpers.tiny_run import SETTINGS, open_run, save_models, tiny_settings, use_one_device
from sentencepiece import sentencepiece_model_pb2

from lopd import pipeline
from lopd.artefacts.artefact import Artefact
from lopd.artefacts.fingerprint import params_fingerprint
from lopd.checkpoints import hf_config, hugging_face, orbax
from lopd.data.tokenizers import load_tokenizer
from lopd.errors import UserError
from lopd.models.shardings import param_shardings
from lopd.stages.card import CARD, card
from lopd.stages.stage import load_stage
from lopd.stages.weights import PARAMS

# The tokenizer

HARD = [
    *("", " ", "  ", " a", "a ", "  a  b   c  ", "\n", "\n\n", " \n ", "a\n", "\t", "\r\n"),
    *("What is 357+846?\n", "What is 1, so 2, 3", "What is is", "What▁is▁", "▁", "a▁", " ▁ "),
    *("\xa0x\xa0", "x\u2003y\u3000z\u2028\x85", "\u200b\ufeff", "é e\u0301 e\u0327\u0301"),
    *(
        "🙂👩\u200d👩\u200d👧🏳\ufe0f\u200d🌈🇩🇪",
        "数学の問題：求めよ。한국어",
        "a" + "\u0301" * 9 + "b",
    ),
    *("\x00", "a\x00b", "\x01\x02\x7f\x80", "\U0010ffff", "\ufffd", "\u2047"),
    *("</s>", "1</s>2", "<s>", "<unk>", "<pad>", "<0x0A>", "<0x41>", "<ctrl>", "<|im_end|>"),
    *("x" * 5000, "12" * 2000, "ab " * 2000, " " * 999, "\n" * 999, "</s>" * 200),
]
LINES = [
    *(REPOSITORY / "LICENSE").read_text().splitlines(),
    *5 * ["naïve café ﬁne ①② 数学の問題 한국어 🙂"],
]


def random_texts(pieces, count=1500, seed=0):
    """Of ASCII, odd characters and pieces; and of any characters at all."""
    rng = random.Random(seed)
    pool = [*map(chr, range(128)), *"  \n▁éかﬁ한🙂", "\u0301", "\xa0", "</s>", "<unk>", "What is "]
    pool += [piece.replace("▁", " ") for piece in pieces]
    for _ in range(count):
        yield "".join(rng.choices(pool, k=rng.randint(1, 40)))
        any_character = (rng.randrange(0xE000), rng.randrange(0xE000, 0x110000))
        characters = (chr(rng.choice(any_character)) for _ in range(rng.randint(1, 15)))
        yield "".join(c for c in characters if not 0xD800 <= ord(c) < 0xE000)


def trained(**settings) -> bytes:
    model = io.BytesIO()
    options = {"vocab_size": 400, "hard_vocab_limit": False, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES), model_writer=model, **options | settings
    )
    return model.getvalue()


def write_folder(folder, tokenizer, model=TIED):
    """The export of a model with this tokenizer, as far as `AutoTokenizer` reads it."""
    folder.mkdir(exist_ok=True)
    for name, content in tokenizer.export_files.items():
        (folder / name).write_bytes(content)
    values = hf_config.config_to_hf(model, tokenizer.end_id, "float32")
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def assert_same_ids(folder, model: bytes):
    """Transformers, the file alone, and lopd, which reads tokenizer.json first."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    spec = sentencepiece_model_pb2.ModelProto.FromString(model).trainer_spec
    is_unigram = spec.model_type == spec.UNIGRAM
    pieces = processor.id_to_piece(list(range(processor.vocab_size())))
    texts = HARD + list(random_texts(pieces))
    auto = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    alone = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    again = load_tokenizer(str(folder))
    assert type(again).__name__ == "HuggingFaceTokenizer"
    ties = 0
    for text in texts:
        expected = processor.encode(text)
        found = auto(text)["input_ids"]
        assert alone.encode(text).ids == found == again.encode(text), text
        if found != expected:  # two ways to the same score, of a unigram model only
            assert is_unigram and processor.decode(found) == processor.decode(expected), text
            scores = [sum(processor.get_score(i) for i in ids) for ids in (found, expected)]
            assert scores[0] == pytest.approx(scores[1], rel=1e-5), text
            ties += 1
    assert ties < len(texts) / 100
    assert (folder / "tokenizer.model").read_bytes() == model
    assert again.tokens == pieces and len(auto) == len(pieces)
    assert again.fingerprint == load_tokenizer(str(folder / "tokenizer.model")).fingerprint
    for name in ("eos", "bos", "pad", "unk"):
        expected = getattr(processor, f"{name}_id")()
        assert getattr(auto, f"{name}_token_id") == (None if expected < 0 else expected)
    assert again.end_ids == (processor.eos_id(),)
    return auto, processor


FAMILIES = {
    "qwen3": TIED,
    "qwen3_moe": MOE,
    "llama": dataclasses.replace(TIED, qk_norm=False),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tiny_tokenizer_is_the_same_in_transformers(tmp_path, family):
    """Which makes other tokenizers of the same files for other families, if they let it."""
    tiny = load_tokenizer("tiny")
    assert tiny.fingerprint == "f8eb4fcd74d777be"  # part of the identity of every tiny run
    folder = write_folder(tmp_path / "tiny", tiny, FAMILIES[family])
    assert json.loads((folder / "config.json").read_text())["model_type"] == family
    auto, processor = assert_same_ids(folder, tiny.files["tokenizer.model"])
    assert len(auto) == 21 and auto.eos_token_id == 1
    # llama.cpp aborts at a piece that is not listed here: it would put a space in front.
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert config["added_tokens_decoder"].keys() == {str(i) for i in range(3, 21)}
    text = "What is 357+846?\n7+6=13, so 1203."
    assert auto.decode([*processor.encode(text), 1], skip_special_tokens=True) == text


def test_where_transformers_takes_no_other_tokenizer_none_is_exported(tmp_path):
    """Of a qwen2 model it builds Qwen2's, whatever the files say."""
    shape = dict(tiny_settings().student.model) | {"qk_norm": False, "attention_bias": True}
    with pytest.raises(UserError, match="every qwen2 model for Qwen2's own"):
        pipeline.run(tiny_settings(student__model=shape), str(tmp_path), ("teacher", "export"))
    assert not list(tmp_path.glob("*/manifest.json"))


KINDS = {
    "as Llama 2": dict(model_type="bpe", byte_fallback=True, remove_extra_whitespaces=False),
    "as Gemma": dict(
        model_type="bpe", byte_fallback=True, remove_extra_whitespaces=False, split_digits=True,
        add_dummy_prefix=False, user_defined_symbols=["\n", "\n\n", "▁▁", "<tool>"],
    ),
    "bpe": dict(model_type="bpe", control_symbols=["<ctrl>"], pad_id=3),
    "bpe, whole pieces": dict(model_type="bpe", user_defined_symbols=["\n", "▁is▁", "<tool>"]),
    "unigram": dict(model_type="unigram", control_symbols=["<ctrl>"]),
    "unigram, bytes": dict(
        model_type="unigram", byte_fallback=True, add_dummy_prefix=False, pad_id=3,
        remove_extra_whitespaces=False, user_defined_symbols=["\n"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_sentencepiece_models_of_all_kinds_are_the_same_in_transformers(tmp_path, kind):
    model = trained(normalization_rule_name="identity", **KINDS[kind])
    (tmp_path / "m.model").write_bytes(model)
    tokenizer = load_tokenizer(str(tmp_path / "m.model"))
    assert_same_ids(write_folder(tmp_path / "folder", tokenizer), model)


@pytest.mark.parametrize(
    "settings",
    [
        dict(model_type="bpe"),  # NFKC is SentencePiece's default
        dict(model_type="unigram", normalization_rule_name="nfkc_cf"),
        dict(model_type="bpe", normalization_rule_name="identity", treat_whitespace_as_suffix=True),
        dict(
            model_type="unigram",
            normalization_rule_name="identity",
            user_defined_symbols=["▁is▁"],  # which a unigram model does not always find
        ),
    ],
    ids=["nfkc", "nfkc_cf", "suffix", "unigram, whole pieces"],
)
def test_a_model_that_no_file_is_equal_to_is_refused_before_work(tmp_path, settings):
    (tmp_path / "m.model").write_bytes(trained(**settings))
    workdir = tmp_path / "w"
    shape = dataclasses.asdict(TIED) | {"vocab_size": 512}
    changes = {"teacher__model": shape, "student__model": shape, "prompt_length": 64}
    changes["tokenizer"] = str(tmp_path / "m.model")
    with pytest.raises(UserError, match=r"m\.model: no tokenizer\.json gives .* for the text '.*'"):
        pipeline.run(tiny_settings(**changes), str(workdir), ("teacher", "export"))
    assert not list(workdir.glob("*/manifest.json"))
    # Nothing but an export needs one.
    tokenizer = load_tokenizer(str(tmp_path / "m.model"))
    with pytest.raises(UserError, match="leave export out"):
        _ = tokenizer.export_files


# The stage


@pytest.fixture(scope="module", autouse=True)
def one_device():
    with pytest.MonkeyPatch.context() as patch:
        use_one_device(patch)
        yield


def save_student(workdir, **changes):
    """Artefacts up to `opd`, as their stages would have left them: untrained weights."""
    save_models(workdir, **changes)
    opened = open_run(workdir, tiny_settings(**changes))
    model = opened.model("student")
    params = jax.device_put(random_params(model, 5), param_shardings(model, opened.mesh))
    artefact = Artefact(workdir / "opd")
    made_of = {"sft": "a" * 16, "precompute": "b" * 16}
    artefact.begin("opd", load_stage("opd").settings(opened), made_of)
    orbax.save_params(artefact.path / PARAMS, params)
    outputs = {"model": dataclasses.asdict(model), "fingerprint": params_fingerprint(params)}
    artefact.finish(outputs)
    return params


def export(workdir, **changes):
    pipeline.run(tiny_settings(**changes), str(workdir), ("export",))
    return workdir / "export"


def save_source(folder, settings, dtype):
    """A student's checkpoint of the tiny shape, with its own defaults of sampling."""
    folder.mkdir()
    model = open_run(folder, settings).model("student")
    hugging_face.save_checkpoint(
        epath.Path(folder), model, random_params(model, 1), end_id=1, dtype=dtype,
        generation={"temperature": 0.6, "top_p": 0.95, "do_sample": True, "eos_token_id": 5},
    )  # fmt: skip


def card_of(folder):
    text = (folder / "README.md").read_text()
    return huggingface_hub.ModelCard(text).data.to_dict(), text


def stored(folder):
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    (dtype,) = {x.dtype.name for x in tensors.values()}
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == dtype
    return dtype, tensors


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The export of a student that began with random weights."""
    workdir = tmp_path_factory.mktemp("plain")
    return save_student(workdir), export(workdir)


def test_the_files_of_an_export(plain):
    _, folder = plain
    assert {path.name for path in folder.iterdir()} == {
        *("config.json", "generation_config.json", "manifest.json", "model.safetensors"),
        *("README.md", "tokenizer.json", "tokenizer.model", "tokenizer_config.json"),
    }
    for path in folder.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o644, path.name
    assert stored(folder)[0] == "float32"
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation == {"do_sample": False, "eos_token_id": 1}


def test_the_card_of_random_beginnings(plain):
    _, folder = plain
    data, text = card_of(folder)
    assert data["library_name"] == "transformers" and data["pipeline_tag"] == "text-generation"
    assert "on-policy-distillation" in data["tags"]
    assert "base_model" not in data and "license" not in data
    opd = Artefact(folder.parent / "opd").outputs["fingerprint"]
    teacher = Artefact(folder.parent / "teacher").outputs["fingerprint"]
    fingerprints = (opd, teacher, "f8eb4fcd74d777be")
    made = ("random weights", "3-digit addition", "160 steps of 128 responses", "τ = 1")
    for expected in (*fingerprints, *made, "Not measured", "vllm serve"):
        assert expected in text
    assert str(folder.parent) not in text and "/tmp" not in text


def test_an_evaluation_after_the_export_comes_into_its_card(tmp_path, monkeypatch):
    """Also where it was killed between the card and the manifest that lists it."""
    settings = {"eval__prompts": 4, "eval__models": ("sft", "opd"), "runtime__slots": 8}
    save_student(tmp_path, **settings)
    before = Artefact(export(tmp_path, **settings)).manifest
    whole = (tmp_path / "export" / "README.md").read_text()
    listed = Artefact.list_file

    def killed(artefact, name):
        if name == CARD:
            raise KeyboardInterrupt
        listed(artefact, name)

    both = tiny_settings(**settings)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Artefact, "list_file", killed)
        pipeline.run(both, str(tmp_path), ("eval",))
    assert not Artefact(tmp_path / "export").complete
    assert not Artefact(tmp_path / "eval").complete
    pipeline.run(both, str(tmp_path), ("export", "eval"))

    again = Artefact(tmp_path / "export")
    assert again.complete and not again.damaged() and Artefact(tmp_path / "eval").complete
    assert [x for x in again.manifest.files if x["name"] != CARD] == [
        x for x in before.files if x["name"] != CARD
    ]
    assert [x["name"] for x in again.manifest.files] == [x["name"] for x in before.files]
    text = (tmp_path / "export" / CARD).read_text()
    models = json.loads((tmp_path / "eval" / "summary.json").read_text())["models"]
    for found in (*models["sft"].values(), *models["opd"].values()):
        low, high = found["ci95"]
        assert f"{found['accuracy']:.1%} [{low:.1%}, {high:.1%}]" in text
    assert "Not measured" in whole and "Not measured" not in text


def test_the_code_of_the_card_runs(plain):
    _, folder = plain
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[1]
    code = code.replace("FOLDER", str(folder)).replace('"..."', '"What is 1+2?\\n"')
    printed = io.StringIO()
    exec(code, {"print": lambda text: printed.write(text)})
    assert printed.getvalue()


def test_the_source_says_type_sampling_and_licence(tmp_path):
    source = tmp_path / "source"
    save_source(source, tiny_settings(), "bfloat16")
    (source / "README.md").write_text("---\nlicense: mit\ntags: [x]\n---\n# Source\n")
    changes = {"student__checkpoint": str(source)}
    params = save_student(tmp_path / "w", **changes)
    folder = export(tmp_path / "w", **changes)
    dtype, tensors = stored(folder)
    assert dtype == "bfloat16"
    expected = np.asarray(params["embed"].astype("bfloat16"))
    np.testing.assert_array_equal(tensors["model.embed_tokens.weight"], expected)
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation == {
        "temperature": 0.6, "top_p": 0.95, "do_sample": True, "eos_token_id": 1
    }  # fmt: skip
    data, text = card_of(folder)
    assert data["license"] == "mit" and "a local checkpoint" in text
    assert str(tmp_path) not in text

    with pytest.raises(UserError, match=r"dtype: 'bfloat16' → 'float16'"):
        export(tmp_path / "w", export__dtype="float16", **changes)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_export_dtype_says_otherwise(tmp_path, dtype):
    source = tmp_path / "source"
    save_source(source, tiny_settings(), "bfloat16")
    changes = {"student__checkpoint": str(source), "export__dtype": dtype}
    save_student(tmp_path / "w", **changes)
    assert stored(export(tmp_path / "w", **changes))[0] == dtype


def test_random_beginnings_are_stored_as_they_compute(tmp_path):
    for dtype in ("float32", "bfloat16"):
        opened = open_run(tmp_path, tiny_settings(dtype=dtype))
        assert load_stage("export").settings(opened)["dtype"] == dtype


def test_what_float16_cannot_hold_is_refused(tmp_path):
    params = random_params(TIED, 0)
    params["final_norm"] = params["final_norm"].at[3].set(1e5)
    with pytest.raises(UserError, match=r"model\.norm\.weight holds values beyond float16"):
        hugging_face.save_checkpoint(tmp_path, TIED, params, end_id=1, dtype="float16")


def test_the_hub_knows_the_base_by_its_name(plain, tmp_path, monkeypatch):
    """As of a checkpoint that was downloaded from there."""
    source = tmp_path / "source"
    save_source(source, tiny_settings(), "bfloat16")
    (source / "README.md").write_text("---\n[not: yaml\n---\n")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(source))
    changes = {"student__checkpoint": "org/Base-1B", "teacher__checkpoint": "org/Teacher-2B"}
    monkeypatch.chdir(tmp_path)
    save_student(tmp_path / "w", student__checkpoint="org/Base-1B")
    (tmp_path / "w" / "teacher" / "manifest.json").unlink()
    settings = tiny_settings(**changes)
    opened = open_run(tmp_path / "w", settings)
    text = card(opened, "bfloat16")
    data = huggingface_hub.ModelCard(text).data.to_dict()
    assert data["base_model"] == "org/Base-1B" and "license" not in data
    assert "[org/Teacher-2B](https://huggingface.co/org/Teacher-2B)" in text


def test_a_full_disk_is_one_line_and_leaves_nothing_half(tmp_path):
    """A real one: a small file system, mounted where the export goes."""
    save_student(tmp_path)
    (tmp_path / "export").mkdir()
    exported = [
        *(sys.executable, "-m", "lopd.main", "--stages=export", f"--workdir={tmp_path}"),
        f"--config={REPOSITORY}/configs/tiny.py",
        *(f"--config.{name}={value}" for name, value in SETTINGS.items()),  # as save_student's
    ]
    script = (
        f"mount -t tmpfs -o size=150k tmpfs {tmp_path}/export && {{ "
        + " ".join(f"'{word}'" for word in exported)
        + f"; echo exit $?; ls -A {tmp_path}/export; }}"
    )
    isolated = ["unshare", "--mount", "--map-root-user"]
    try:
        possible = subprocess.run([*isolated, "mount", "-t", "tmpfs", "tmpfs", "/mnt"]).returncode
    except FileNotFoundError:
        possible = 1
    if possible != 0:
        pytest.skip("this machine lets no test mount a file system")
    done = subprocess.run(
        [*isolated, "sh", "-c", script], capture_output=True, text=True, env=environment()
    )
    assert "exit 2" in done.stdout and "Traceback" not in done.stderr, done.stderr
    (line,) = [x for x in done.stderr.splitlines() if x.startswith("lopd: error")]
    assert f"no room left on the disk of {tmp_path}" in line and "free some" in line
    assert done.stdout.split("exit 2")[1].split() == ["manifest.json"]
    # With room it goes on from there.
    folder = export(tmp_path)
    assert Artefact(folder).complete
