"""Prompt and SFT sources: every kind of file and schema, and one clear error for each mistake."""

import json
import os

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tensorflow_datasets as tfds
from array_record.python import array_record_module

from lopd.config import MATH_PROMPT
from lopd.data import sources
from lopd.data.sources import load_examples
from lopd.errors import UserError

DAPO_TEXT = (
    "Solve the following math problem step by step. The last line of your response should be of "
    "the form Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n"
    "Find $x$.\n\nIt is an\n\ninteger.\n\n"
    'Remember to put your answer on its own line after "Answer:".'
)
USER = {"role": "user", "content": "1+1?"}
ROWS = {
    "dapo": (
        {"prompt": [USER], "reward_model": {"ground_truth": "2"}, "ability": "MATH"},
        ("1+1?", "2", None),
    ),
    "dapo as text": (
        {"prompt": "1+1?", "reward_model": {"ground_truth": "2"}},
        ("1+1?", "2", None),
    ),
    "dapo of slime": ({"prompt": [USER], "label": "2"}, ("1+1?", "2", None)),
    "openthoughts": (
        {
            "conversations": [{"from": "human", "value": "1+1?"}, {"from": "gpt", "value": "two"}],
            "domain": "math",
            "difficulty": None,
        },
        ("1+1?", None, "two"),
    ),
    "epicoder": ({"instruction": "1+1?", "output": "two"}, ("1+1?", None, "two")),
    "messages": (
        {"messages": [USER, {"role": "assistant", "content": "two"}], "answer": "2"},
        ("1+1?", "2", "two"),
    ),
    "prompt": ({"prompt": "1+1?", "answer": 2, "response": "two"}, ("1+1?", "2", "two")),
    "prompt only": ({"prompt": "1+1?"}, ("1+1?", None, None)),
    "aime": ({"id": 60, "problem": "1+1?", "answer": "2", "url": "x"}, ("1+1?", "2", None)),
    "aime 2024": ({"ID": "2024-I-1", "Problem": "1+1?", "Answer": 2}, ("1+1?", "2", None)),
}  # fmt: skip


def write_jsonl(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write_parquet(path, rows) -> str:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return str(path)


def summary(example):
    assert [m["role"] for m in example.messages] == ["user"]
    return example.messages[0]["content"], example.answer, example.response


@pytest.mark.parametrize("write", [write_jsonl, write_parquet])
@pytest.mark.parametrize("schema", ROWS)
def test_schemas_are_recognised(tmp_path, schema, write):
    row, expected = ROWS[schema]
    path = write(tmp_path / ("data.jsonl" if write is write_jsonl else "data.parquet"), [row])
    assert [summary(e) for e in load_examples(path)] == [expected]


def test_multi_turn_and_system_messages(tmp_path):
    turns = [
        {"role": "system", "content": "Be brief."},
        USER,
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "sure?"},
        {"role": "assistant", "content": "yes"},
    ]
    (example,) = load_examples(write_jsonl(tmp_path / "a.jsonl", [{"messages": turns}]))
    assert example.messages == tuple(turns[:-1]) and example.response == "yes"
    (open_turn,) = load_examples(write_jsonl(tmp_path / "b.jsonl", [{"messages": turns[:-1]}]))
    assert open_turn.messages == example.messages and open_turn.response is None
    assert open_turn.example_id == example.example_id


def test_column_map(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"q": "1+1?", "meta": {"final": 2.5}, "r": "two"}])
    mapped = f"{path}?prompt=q&answer=meta.final&response=r"
    assert [summary(e) for e in load_examples(mapped)] == [("1+1?", "2.5", "two")]
    assert [summary(e) for e in load_examples(f"{path}?prompt=q")] == [("1+1?", None, None)]
    with pytest.raises(UserError, match=r"a\.jsonl, line 1: no column 'question'; it has \['meta'"):
        load_examples(f"{path}?prompt=question")
    with pytest.raises(UserError, match="the column map is not"):
        load_examples(f"{path}?prompt=q&solution=r")


def tfds_folder(path, features, rows, name="prompts"):
    path.mkdir(parents=True)
    features = tfds.features.FeaturesDict(features)
    template = tfds.core.ShardedFileTemplate(
        data_dir=path, dataset_name=name, split="train", filetype_suffix="array_record"
    )
    writer = array_record_module.ArrayRecordWriter(
        str(path / f"{name}-train.array_record-00000-of-00001"), "group_size:1"
    )
    for row in rows:
        writer.write(features.serialize_example(features.encode_example(row)))
    writer.close()
    tfds.folder_dataset.write_metadata(
        data_dir=path,
        features=features,
        split_infos=[
            tfds.core.SplitInfo(
                name="train", shard_lengths=[len(rows)], num_bytes=0, filename_template=template
            )
        ],
        check_data=False,
    )
    return str(path)


TFDS_FEATURES = {
    "messages": tfds.features.Sequence(
        {"role": tfds.features.Text(), "content": tfds.features.Text()}
    ),
    "answer": tfds.features.Scalar(np.int64),
}
TFDS_ROWS = [
    {"messages": [USER, {"role": "assistant", "content": f"réponse {i}"}], "answer": i}
    for i in range(2)
]


def test_tfds_folder_and_name(tmp_path):
    folder = tfds_folder(tmp_path / "prompts" / "1.0.0", TFDS_FEATURES, TFDS_ROWS)
    expected = [("1+1?", "0", "réponse 0"), ("1+1?", "1", "réponse 1")]
    assert [summary(e) for e in sources.read_examples(folder)] == expected
    tfds.core.add_data_dir(tmp_path)
    assert [summary(e) for e in sources.read_examples("tfds:prompts:1.0.0")] == expected
    with pytest.raises(UserError, match="TFDS finds no such dataset"):
        load_examples("tfds:no_such_dataset")


def test_folders_and_globs_are_read_in_order_of_name(tmp_path):
    for i in (2, 0, 1):
        write_jsonl(tmp_path / f"part-{i}.jsonl", [{"prompt": f"p{i}"}])
    (tmp_path / "README.md").write_text("not data")
    for source in (str(tmp_path), str(tmp_path / "part-*.jsonl")):
        assert [e.messages[0]["content"] for e in load_examples(source)] == ["p0", "p1", "p2"]


def numbered(tmp_path, count, name="n.jsonl", reverse=False):
    rows = [{"prompt": f"prompt {i}", "answer": i} for i in range(count)]
    return write_jsonl(tmp_path / name, rows[::-1] if reverse else rows)


def test_duplicates_are_dropped_by_normalised_prompt(tmp_path):
    texts = ["a  b", "a b", " a\nb ", "caf\u00e9", "cafe\u0301", "A b", "a b c"]
    path = write_jsonl(tmp_path / "d.jsonl", [{"prompt": t} for t in texts])
    kept = [e.messages[0]["content"] for e in load_examples(path)]
    assert kept == ["a  b", "caf\u00e9", "A b", "a b c"]


def test_sample_is_a_function_of_seed_and_prompts(tmp_path):
    path, reversed_path = numbered(tmp_path, 200), numbered(tmp_path, 200, "r.jsonl", reverse=True)
    drawn = load_examples(path, count=50, seed=3)
    assert drawn == load_examples(path, count=50, seed=3)
    assert drawn == load_examples(reversed_path, count=50, seed=3)
    assert drawn[:20] == load_examples(path, count=20, seed=3)
    assert drawn != load_examples(path, count=50, seed=4)
    assert len({e.example_id for e in drawn}) == 50
    # Uniform: over 400 seeds each prompt is in a quarter of the samples (σ = 8.7 of 100).
    examples = load_examples(path)
    times = np.zeros(200)
    for seed in range(400):
        for e in sources.sample(examples, 50, seed):
            times[int(e.answer)] += 1
    assert times.mean() == 100 and abs(times - 100).max() < 5 * 8.7 and 7 < times.std() < 10.5


def test_sample_by_hand(tmp_path):
    """Recorded once: a change here changes which prompts every run trains on."""
    drawn = load_examples(numbered(tmp_path, 100), count=4, seed=0)
    assert [e.answer for e in drawn] == ["78", "46", "54", "98"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no prompts"),
        (b"\n\n", "holds no prompts"),
        (b'{"prompt": "a"}\n{"prompt": \n', r"bad\.jsonl, line 2 is not JSON"),
        (b'{"prompt": "a"}\n\n["b"]\n', r"bad\.jsonl, line 3: not a JSON object, but list"),
        (b'{"prompt": "\xff"}\n', r"bad\.jsonl, line 1 is not JSON"),
        (b'{"b": 1, "a": 2}\n', r"line 1: unknown columns \['a', 'b'\]"),
        (b'{"prompt": "a"}\n{"text": "b"}\n', r"line 2: no column 'prompt'; it has \['text'\]"),
        (b'{"prompt": "a"}\n{"prompt": "  "}\n', "line 2: the prompt is empty"),
        (b'{"prompt": []}\n', "line 1: the prompt is empty"),
        (b'{"messages": [{"role": "assistant", "content": "x"}]}\n', "line 1: the prompt is empty"),
        (b'{"messages": [{"role": "user"}]}\n', "line 1: a message is not role and content"),
        (b'{"messages": ["hi"]}\n', "line 1: a message is not role and content"),
        (b'{"prompt": "a", "answer": ["x"]}\n', "line 1: column answer holds list, not text"),
        (b'{"prompt": "a\\ud800b"}\n', r"line 1: 'a\\ud800b' is no Unicode text"),
        (b'{"prompt": "a", "answer": "\\udc00"}\n', "line 1: .* is no Unicode text"),
        (b'{"prompt": ' + b"[" * 100_000 + b"\n", "line 1 is nested too deep"),
    ],
)
def test_bad_content_is_one_clear_error(tmp_path, content, message):
    (tmp_path / "bad.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_examples(str(tmp_path / "bad.jsonl"))


def test_bad_sources_are_one_clear_error(tmp_path):
    with pytest.raises(UserError, match=r"none\.jsonl: no such file"):
        load_examples(str(tmp_path / "none.jsonl"))
    with pytest.raises(UserError, match=r"a folder without \.jsonl or \.parquet files"):
        load_examples(str(tmp_path))
    (tmp_path / "a.csv").write_text("prompt\n")
    with pytest.raises(UserError, match=r"a\.csv: not one of \.jsonl, \.parquet"):
        load_examples(str(tmp_path / "a.csv"))
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(UserError, match=r"a\.parquet: not a Parquet file"):
        load_examples(str(tmp_path / "a.parquet"))
    with pytest.raises(UserError, match="11 prompts asked for, but it holds 10 distinct"):
        load_examples(numbered(tmp_path, 10), count=11)
    with pytest.raises(UserError, match=r"s3://b/x\.parquet: this kind of URL"):
        load_examples("s3://b/x.parquet")


def test_prompt_template_is_filled_and_dapos_instructions_are_taken_off():
    tail = r" Please reason step by step, and put your final answer within \boxed{}."
    assert sources.fill_prompt(MATH_PROMPT, "Find $x$.\n") == "Question: Find $x$." + tail
    unwrapped = "Question: Find $x$.\n\nIt is an\n\ninteger." + tail
    assert sources.fill_prompt(MATH_PROMPT, DAPO_TEXT) == unwrapped
    assert sources.fill_prompt("{problem}", DAPO_TEXT) == DAPO_TEXT.strip()


def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "zero.jsonl").symlink_to("/dev/zero")
    for name in ("pipe.jsonl", "zero.jsonl", ""):
        with pytest.raises(UserError, match="is no file but a pipe, a socket or a device"):
            load_examples(str(tmp_path / name))  # "": the folder
    with pytest.raises(UserError, match="a source of prompts has no name"):
        load_examples("?prompt=text")


def test_damaged_pages_of_parquet_are_one_error(tmp_path):
    path = tmp_path / "bad.parquet"
    prompts = [f"{i * 7919 % 1000} {i}" for i in range(2000)]
    pyarrow.parquet.write_table(pyarrow.table({"prompt": prompts}), path, row_group_size=500)
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 200] = b"\xff" * 200
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"bad\.parquet: damaged behind row \d+"):
        load_examples(str(path))
