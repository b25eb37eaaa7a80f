"""What is compared before anything is sampled: tokenizers, templates and ends of a run's models,
and the settings of finished stages that are only read."""

import re

import jax
import pytest
from helpers.byte_tokenizer import END_OF_TEXT, IM_END, TEMPLATE, save_tokenizer
from helpers.models import random_params
from helpers.tiny_run import run, save_models, tiny_settings, use_one_device

from lopd import pipeline
from lopd.checkpoints import hugging_face
from lopd.config.values import changed
from lopd.data.tokenizers import load_tokenizer
from lopd.errors import UserError
from lopd.models.decoder_config import DecoderConfig
from lopd.stages.run import Run

ROWS = 320
"""Of embeddings: more than there are tokens."""


def save_model(folder, rows=ROWS, seed=0, **tokenizer):
    """A small checkpoint with a tokenizer; returns its folder."""
    folder.mkdir(parents=True)
    shape = DecoderConfig(rows, 16, 16, 1, 2, 1, 8, max_position_embeddings=512)
    hugging_face.save_checkpoint(folder, shape, random_params(shape, seed), end_id=IM_END)
    save_tokenizer(folder, **tokenizer)
    return folder


@pytest.fixture
def started(monkeypatch):
    """Nothing is run; the list holds what would have been."""
    use_one_device(monkeypatch)
    found = []
    monkeypatch.setattr(pipeline, "_run_stages", lambda one, ordered: found.append(one))
    monkeypatch.setattr(pipeline, "_print_summary", lambda *_: None)
    return found


def start(tmp_path, teacher, student, stages=("sft_data", "sft"), **changes) -> None:
    """A run of math with two checkpoints, up to where its stages would begin."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "1+1?", "response": "2"}\n{"prompt": "2+2?", "response": "4"}\n')
    settings = {
        "task.name": "math",
        "task.sft_prompts": str(prompts),
        "task.prompt": "{problem}",
        "tokenizer": None,
        "prompt_length": 80,
        "sft_data.prompts": None,
        "teacher.model": {},
        "student.model": {},
        "teacher.checkpoint": str(teacher),
        "student.checkpoint": str(student),
    }
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    pipeline.run(changed(tiny_settings(), settings | changes), str(tmp_path / "w"), stages)


def test_a_base_and_a_chat_model_whose_ends_differ_are_a_pair(tmp_path, started):
    """Qwen3's: the base names <|endoftext|> only, and its template ends turns as the teacher's."""
    chat = save_model(tmp_path / "chat", rows=ROWS + 8)
    base = save_model(tmp_path / "base", ends=(END_OF_TEXT,), seed=1)
    start(tmp_path, chat, base)
    (one,) = started
    assert one.end_ids == (IM_END, END_OF_TEXT)


def test_sampling_stops_where_the_teacher_ends(tmp_path, started):
    """A template without a special token behind the answer leaves the base <|endoftext|> alone."""
    template = TEMPLATE.replace("<|im_end|>\n{% endfor", "\n{% endfor")
    teacher = save_model(tmp_path / "teacher", template=template, ends=(IM_END,))
    base = save_model(tmp_path / "base", template=template, ends=(END_OF_TEXT,))
    start(tmp_path, teacher, base)
    assert started[0].end_ids == (END_OF_TEXT, IM_END)
    assert load_tokenizer(str(base)).end_ids == (END_OF_TEXT,)


@pytest.mark.parametrize(
    ("template", "parts"),
    [
        (
            TEMPLATE.replace("assistant\n", "assistant\n<think>\n"),
            ["prompt 0 is '<|im_start|>user\\n1+1?", "assistant\\n<think>\\n' by teacher"],
        ),
        (
            TEMPLATE.replace("<|im_end|>\n", "{{ '<|endoftext|>' if m.role == 'assistant' else "
                             "'<|im_end|>' }}\n"),
            ["ends '…the answer<|im_end|>'", "'…the answer<|endoftext|>' by teacher"],
        ),
    ],
)  # fmt: skip
def test_templates_that_differ_are_shown_side_by_side(tmp_path, started, template, parts):
    teacher = save_model(tmp_path / "teacher", template=template)
    with pytest.raises(UserError, match="the chat templates differ") as error:
        start(tmp_path, teacher, save_model(tmp_path / "base"))
    assert all(part in str(error.value) for part in parts) and "\n" not in str(error.value)
    start(tmp_path, teacher, tmp_path / "base", tokenizer=str(teacher))  # the way out it names


def test_templates_that_write_the_same_are_the_same(tmp_path, started):
    other = TEMPLATE.replace("{% for m in messages %}", "{%- for m in messages %}")
    teacher = save_model(tmp_path / "teacher", template=other)
    start(tmp_path, teacher, save_model(tmp_path / "base"))
    start(tmp_path, save_model(tmp_path / "bare", template=None), tmp_path / "base")
    assert len(started) == 2


def test_a_students_own_ids_must_be_the_runs(tmp_path, started):
    teacher = save_model(tmp_path / "teacher")
    base = save_model(tmp_path / "base", extra=("<extra>",))
    with pytest.raises(UserError, match=r"student\.checkpoint=.*one has 260 ids, the other 259"):
        start(tmp_path, teacher, base, tokenizer=str(teacher))


def test_given_responses_end_as_the_teacher_does(tmp_path, started):
    base = save_model(tmp_path / "base")
    given = {"sft_data__responses": "given", "sft__teacher": "somebody"}
    start(tmp_path, save_model(tmp_path / "chat"), base, **given)
    bare = save_model(tmp_path / "bare", template=None, ends=(END_OF_TEXT,))
    with pytest.raises(UserError, match=re.escape("…the answer<|im_end|>', those of")):
        start(tmp_path, bare, base, **given)
    path = tmp_path / "ended.jsonl"
    path.write_text('{"prompt": "1+1?", "response": "2<|im_end|>"}\n')
    with pytest.raises(UserError, match=r"holds the end token '<\|im_end\|>': leave it out"):
        start(tmp_path, tmp_path / "chat", base, task__sft_prompts=str(path), **given)


def test_a_damaged_student_shows_before_the_teacher_answers(tmp_path, started):
    base = save_model(tmp_path / "base")
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(UserError, match=r"model\.safetensors is cut short"):
        start(tmp_path, save_model(tmp_path / "teacher"), base)
    assert not started


def test_a_checkpoint_of_another_shape_than_set_is_refused(tmp_path, started):
    base = save_model(tmp_path / "base")
    shape = dict(vocab_size=ROWS, hidden_size=32, intermediate_size=16, num_hidden_layers=1,
                 num_attention_heads=2, num_key_value_heads=1, head_dim=8)  # fmt: skip
    with pytest.raises(UserError, match=r"another shape than student\.model: hidden_size=16, not"):
        start(tmp_path, save_model(tmp_path / "teacher"), base, student__model=shape)


# Settings of stages that are only read


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A working directory with a cache, and the models that made it."""
    folder = tmp_path_factory.mktemp("read")
    save_models(folder / "models")
    with pytest.MonkeyPatch.context() as patch:
        use_one_device(patch)
        run(folder / "models", folder / "w", "precompute", "heldout")
    return folder


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"precompute__temperature": 1.0}, "precompute.temperature: 0.7 → 1.0"),
        ({"precompute__prompts": 39}, "prompts: 40 → 39"),
        ({"heldout__prompts": 11}, "heldout.prompts: 12 → 11"),
        ({"seed": 1}, "seed: 0 → 1"),
        ({"task__digits": 2}, "task.digits: 3 → 2"),
    ],
)
def test_settings_of_what_is_only_read_are_compared(finished, started, changes, says):
    with pytest.raises(UserError, match=re.escape(says)):
        run(finished / "models", finished / "w", "opd", **changes)
    assert not started


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"opd__tau": 3.0, "control__steps": 70, "eval__samples": 2, "sft__steps": 99},
        {"runtime__rows_per_micro": 4, "metrics__tensorboard": False},
        {"task__problems": "elsewhere.jsonl", "task__sft_prompts": "elsewhere.jsonl"},
    ],
)
def test_what_a_stage_does_not_depend_on_may_change(finished, started, changes):
    run(finished / "models", finished / "w", "opd", **changes)
    assert isinstance(started[0], Run) and jax.devices()


def test_opd_may_not_ask_for_more_records_than_there_are(finished, started):
    with pytest.raises(UserError, match=r"opd\.records=41: the cache holds 40"):
        run(finished / "models", finished / "w", "opd", opd__records=41)
    with pytest.raises(UserError, match=r"opd\.records=81: the cache holds 80"):
        changes = {"opd__records": 81, "precompute__samples": 2}
        run(finished / "models", finished / "v", "precompute", "opd", **changes)


def test_what_is_given_must_be_of_its_kind(finished, started):
    for given in ("teacher__checkpoint", "sft__checkpoint"):
        with pytest.raises(UserError, match="holds no model; it is that of 'precompute'"):
            run(finished / "models", finished / "v", "opd",
                **{given: str(finished / "w" / "precompute")})  # fmt: skip
    with pytest.raises(UserError, match="is no cache, but the artefact of the stage 'sft'"):
        run(finished / "models", finished / "v", "opd", opd__cache=str(finished / "models/sft"))
