r"""Prompts, and answers or responses that come with them, from files and TFDS datasets.

A source is one of

    FILE.jsonl, FILE.parquet      or a glob of them, or a folder that holds them
    a folder prepared by TFDS     (dataset_info.json and features.json)
    tfds:NAME[/CONFIG][:VERSION]  a dataset prepared in TFDS's data directory
    hf:OWNER/NAME[@REVISION][/SPLIT or GLOB]  a data set at the Hugging Face Hub (`lopd.data.hub`)

and a row is one example. Known schemas are found by their columns (`SCHEMAS`); anything else needs
a column map behind the source, `SOURCE?prompt=COLUMN&answer=COLUMN&response=COLUMN`. Rows are read
one by one: a source may be larger than memory, the examples kept from it may not.
"""

import dataclasses
import glob
import hashlib
import heapq
import json
import math
import pathlib
import re
import unicodedata
import urllib.parse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from lopd.data import hub
from lopd.errors import UserError
from lopd.machine.reading import check_regular, parse_json
from lopd.machine.storage import check_url, is_local

Messages = tuple[dict[str, str], ...]
"""The turns of a conversation, each with "role" and "content"."""

_ROLES = {"human": "user", "gpt": "assistant"}
_TURN_KEYS = (("role", "from"), ("content", "value"))
_PARQUET_ROWS = 256


@dataclasses.dataclass(frozen=True)
class Columns:
    """Which column holds what; a dot reaches into a nested one, as in `reward_model.ground_truth`.

    The prompt column holds a text, or a list of messages (`role`/`content` or `from`/`value`). Of
    messages that end with the assistant's, that turn is the response.
    """

    prompt: str
    answer: str = ""
    """What graders compare with."""
    response: str = ""


SCHEMAS = (
    Columns("messages", answer="answer"),
    Columns("conversations"),  # OpenThoughts3-1.2M
    Columns("instruction", response="output"),  # EpiCoder-func-380k
    Columns("prompt", answer="reward_model.ground_truth", response="response"),  # DAPO-Math-17k
    Columns("prompt", answer="label", response="response"),  # DAPO-Math-17k, as slime has it
    Columns("prompt", answer="answer", response="response"),
    Columns("problem", answer="answer"),  # AIME 2024, AIME 2025, HMMT 2025
    Columns("Problem", answer="Answer"),
    Columns("question", answer="answer"),
)
"""Schemas recognised without a column map: the first whose prompt and answer are there, or, if
there is none, the first whose prompt is."""


@dataclasses.dataclass(frozen=True)
class Example:
    """One prompt: the turns before the assistant's, and what the source knows beside them.

    `example_id` (16 hex digits) depends on the prompt's text alone, up to white space and Unicode
    composition: the same prompt has the same one in every file.
    """

    messages: Messages
    answer: str | None
    """What graders compare with; None: the source has none."""
    response: str | None
    """What came with the prompt; None: nothing."""
    example_id: str


def prompt_digest(messages: Messages) -> str:
    """Identity of a prompt: 16 hex digits of its roles and normalised texts."""
    turns = [
        (m["role"], " ".join(unicodedata.normalize("NFC", m["content"]).split())) for m in messages
    ]
    return hashlib.sha256(json.dumps(turns).encode()).hexdigest()[:16]


def _jsonl_rows(path: epath.Path) -> Iterator[tuple[str, dict]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            row = parse_json(line, where)
            if not isinstance(row, dict):
                raise UserError(f"{where}: not a JSON object, but {type(row).__name__}")
            yield where, row


def _parquet_rows(path: epath.Path) -> Iterator[tuple[str, dict]]:
    import pyarrow
    import pyarrow.parquet

    with path.open("rb") as file:
        try:
            parquet = pyarrow.parquet.ParquetFile(file)
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{path}: not a Parquet file ({_first_line(error)})") from error
        number, batches = 0, parquet.iter_batches(_PARQUET_ROWS)
        while True:
            try:
                rows = next(batches).to_pylist()
            except StopIteration:
                return
            # A page that is damaged, or text that is no UTF-8.
            except (pyarrow.ArrowException, OSError, ValueError) as error:
                raise UserError(
                    f"{path}: damaged behind row {number} ({_first_line(error)})"
                ) from error
            for row in rows:
                yield f"{path}, row {number}", row
                number += 1


_READERS = {".jsonl": _jsonl_rows, ".parquet": _parquet_rows}
"""By the suffix of a file: what gives its rows, each with the place where it was found."""


def _plain(value: Any) -> Any:
    """A TFDS value as JSON would have it: text for bytes, lists for arrays and sequences."""
    if isinstance(value, bytes):
        return value.decode(errors="surrogateescape")  # refused as text that is no Unicode
    if isinstance(value, np.ndarray | list):
        return [_plain(v) for v in value]
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        plain = {k: _plain(v) for k, v in value.items()}
        # TFDS turns a sequence of messages into one message of sequences.
        messages = set(plain) in ({"role", "content"}, {"from", "value"})
        if messages and all(isinstance(v, list) for v in plain.values()):
            first, second = plain
            pairs = zip(plain[first], plain[second], strict=True)
            return [{first: a, second: b} for a, b in pairs]
        return plain
    return value


def _tfds_rows(source: str) -> Iterator[tuple[str, dict]]:
    import tensorflow_datasets as tfds

    try:
        if source.startswith("tfds:"):
            builder = tfds.builder(source.removeprefix("tfds:"), try_gcs=False)
        else:
            builder = tfds.builder_from_directory(source)
        splits = sorted(builder.info.splits)
    except Exception as error:  # damaged descriptions raise errors of a dozen kinds
        raise UserError(f"{source}: TFDS finds no such dataset ({_first_line(error)})") from error
    split = splits[0] if len(splits) == 1 else "train"
    if split not in splits:
        raise UserError(
            f"{source}: has the splits {splits or 'none'}, no 'train'; prepare it with TFDS first"
        )
    try:
        rows = builder.as_data_source(split)
    except NotImplementedError as error:
        raise UserError(
            f"{source}: not stored as ArrayRecord; prepare it with file_format='array_record'"
        ) from error
    except Exception as error:
        raise UserError(f"{source}: TFDS cannot read it ({_first_line(error)})") from error
    for number in range(len(rows)):
        where = f"{source}, {split} row {number}"
        try:
            row = _plain(rows[number])
        except Exception as error:  # of ArrayRecord's, protobuf's and TFDS's kinds
            raise UserError(f"{where}: damaged ({_first_line(error)})") from error
        yield where, row


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:300] or type(error).__name__


def _files(source: str) -> list[epath.Path]:
    path = epath.Path(source)
    if path.is_dir():
        return sorted(p for p in path.iterdir() if p.suffix in _READERS)
    if glob.has_magic(source) and not path.exists():
        return sorted(path.parent.glob(path.name))
    return [path] if path.exists() else []


def read_rows(source: str) -> Iterator[tuple[str, dict]]:
    """The rows of a source with where each was found ("FILE, line 7"), files in order of name.

    Raises:
      UserError: if nothing is there, or a row cannot be read.
    """
    if not source.strip():
        raise UserError("a source of prompts has no name: give a file, a folder or a dataset")
    check_url(source)
    if source.startswith("tfds:") or (epath.Path(source) / "dataset_info.json").exists():
        if not is_local(source):
            raise UserError(
                f"{source}: TFDS reads prepared folders from a local disk only; copy it here "
                "(gcloud storage cp -r)"
            )
        yield from _tfds_rows(source)
        return
    files = hub.fetch(source) if source.startswith(hub.PREFIX) else _files(source)
    if not files:
        raise UserError(
            f"{source}: no such file, or a folder without {' or '.join(_READERS)} files"
        )
    for path in files:
        if path.suffix not in _READERS:
            raise UserError(f"{path}: not one of {', '.join(_READERS)}")
        check_regular(path)
        yield from _READERS[path.suffix](path)


def _get(row: Any, column: str) -> Any:
    """The value of a column, dots reaching into nested ones; None where there is none."""
    for key in column.split("."):
        row = row.get(key) if isinstance(row, Mapping) else None
    return row


def find_columns(row: Mapping, where: str) -> Columns:
    """The schema that a row follows.

    Raises:
      UserError: naming the columns found, if it is none of `SCHEMAS`.
    """
    prompts = [s for s in SCHEMAS if _get(row, s.prompt) is not None]
    answered = [s for s in prompts if s.answer and _get(row, s.answer) is not None]
    if not prompts:
        raise UserError(
            f"{where}: unknown columns {sorted(row)}; say which holds the prompt by putting "
            "?prompt=COLUMN&answer=COLUMN behind the source"
        )
    return (answered or prompts)[0]


def _check_unicode(text: str, where: str) -> None:
    """Refuses halves of surrogate pairs, which JSON can hold and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: {text[max(0, error.start - 10) : error.end + 10]!r} is no Unicode text"
        ) from error


def _messages(value: Any, where: str) -> Messages:
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    messages = []
    for turn in value if isinstance(value, Sequence) else ():
        role, content = (_get(turn, a if _get(turn, a) is not None else b) for a, b in _TURN_KEYS)
        if not isinstance(role, str) or not isinstance(content, str):
            raise UserError(f"{where}: a message is not role and content, or from and value")
        _check_unicode(content, where)
        _check_unicode(role, where)
        messages.append({"role": _ROLES.get(role, role), "content": content})
    return tuple(messages)


def _text(row: Mapping, column: str, where: str) -> str | None:
    value = _get(row, column) if column else None
    if value is None:
        return None
    if isinstance(value, str):
        _check_unicode(value, where)
        return value
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return str(value)
    raise UserError(f"{where}: column {column} holds {type(value).__name__}, not text")


def to_example(row: Mapping, columns: Columns, where: str) -> Example:
    """The example in a row.

    Raises:
      UserError: if the prompt's column is missing or its last user turn is empty; `where` is named.
    """
    value = _get(row, columns.prompt)
    if value is None:
        raise UserError(f"{where}: no column {columns.prompt!r}; it has {sorted(row)}")
    messages = _messages(value, where)
    response = _text(row, columns.response, where)
    if messages and messages[-1]["role"] == "assistant":
        response = messages[-1]["content"]
        messages = messages[:-1]
    if not messages or not messages[-1]["content"].strip():
        raise UserError(f"{where}: the prompt is empty")
    answer = _text(row, columns.answer, where)
    return Example(messages, answer, response, prompt_digest(messages))


def split_column_map(source: str) -> tuple[str, Columns | None]:
    """The source without its column map, and the map, if it has one.

    Raises:
      UserError: if the map names anything but prompt, answer and response.
    """
    location, mark, text = source.rpartition("?prompt=")
    if not mark:
        return source, None
    try:
        pairs = urllib.parse.parse_qs("prompt=" + text, strict_parsing=True)
        return location, Columns(**{name: values[0] for name, values in pairs.items()})
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{source}: the column map is not ?prompt=COLUMN&answer=COLUMN&response=COLUMN"
        ) from error


def source_name(source: str) -> str:
    """A short name for a source: of its file or folder, or of its data set at the Hub."""
    location = split_column_map(source)[0]
    if location.startswith(hub.PREFIX):
        return hub.parse(location).repository.name.rpartition("/")[2]
    return pathlib.Path(location).stem


def pin(source: str) -> str:
    """The source, and if it is at the Hub, with the commit in place of its revision.

    Raises:
      UserError: as `lopd.data.hub.pin`.
    """
    location = split_column_map(source)[0]
    if not location.startswith(hub.PREFIX):
        return source
    return hub.pin(location) + source.removeprefix(location)


def read_examples(source: str) -> Iterator[Example]:
    """The examples of a source, in its order; the first row's schema holds for all.

    Raises:
      UserError: if the source or a row of it cannot be read or understood.
    """
    location, columns = split_column_map(source)
    for where, row in read_rows(location):
        columns = columns or find_columns(row, where)
        yield to_example(row, columns, where)


def deduplicate(examples: Iterable[Example]) -> Iterator[Example]:
    """The first example of each prompt."""
    seen = set()
    for example in examples:
        if example.example_id not in seen:
            seen.add(example.example_id)
            yield example


def sample(examples: Iterable[Example], count: int, seed: int) -> list[Example]:
    """`count` examples drawn with a seed, in random order; fewer only if there are no more.

    Every prompt's place is a hash of (seed, prompt), so the draw does not depend on the order of
    the files, and the first n of a larger sample are the sample of n. Prompts must be distinct.
    """

    def place(example: Example) -> bytes:
        return hashlib.sha256(f"{seed}/{example.example_id}".encode()).digest()

    return heapq.nsmallest(count, examples, key=place)


def load_examples(source: str, *, count: int | None = None, seed: int = 0) -> list[Example]:
    """The distinct prompts of a source, in its order; or `count` of them, drawn with a seed.

    Raises:
      UserError: if the source cannot be read, is empty, or has fewer prompts than asked for.
    """
    examples = deduplicate(read_examples(source))
    chosen = list(examples) if count is None else sample(examples, count, seed)
    if not chosen:
        raise UserError(f"{source}: holds no prompts")
    if count is not None and len(chosen) < count:
        raise UserError(f"{source}: {count} prompts asked for, but it holds {len(chosen)} distinct")
    return chosen


_DAPO_WRAPPER = re.compile(
    r"Solve the following math problem step by step\. [^\n]*\n\n(.*)\n\n"
    r'Remember to put your answer on its own line after "Answer:"\.\s*',
    re.DOTALL,
)


_WORKED = re.compile(r".*\n#### *(.+?)\s*", re.DOTALL)


def final_answer(answer: str) -> str:
    """The answer behind the worked one that GSM8K (arXiv 2110.14168) has: what follows its ####."""
    worked = _WORKED.fullmatch(answer)
    return worked.group(1) if worked else answer


def fill_prompt(template: str, text: str) -> str:
    """The template with the text in place of `{problem}`.

    The instructions that DAPO-Math-17k wraps around its problems ask for another form of answer
    than the paper's prompt, and are taken off first; the template "{problem}" leaves all as it is.
    """
    wrapped = _DAPO_WRAPPER.fullmatch(text) if template != "{problem}" else None
    return template.replace("{problem}", (wrapped.group(1) if wrapped else text).strip())
