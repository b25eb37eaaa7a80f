"""Rules for what the page is made from: each value that breaks one is left out, and named.

A rule takes a value and raises `Odd` with what is wrong, in a few words, or returns the value as
the page may rely on it. Rules of containers name the member.
"""

import itertools
import json
import math
import re
from collections.abc import Callable
from typing import Any

from etils import epath

from lopd.machine.storage import reason

Rule = Callable[[Any], Any]
"""See above."""

_MOST = 1e40
"""Float32, which all figures come from, ends at 3.4e38."""
_LONGEST = 30
_SHOWN = 3
"""How many of a file's oddities a note spells out."""


class Odd(Exception):
    """What is wrong with a value; inside of another one, with its place there."""

    def __init__(self, what: str, place: str = ""):
        super().__init__(f"{place} {what}".strip())
        self.what, self.place = what, place

    def inside(self, name: str) -> "Odd":
        """The same of the value that holds it under a name, or an index in brackets."""
        joint = "." if self.place and not self.place.startswith("[") else ""
        return Odd(self.what, f"{name}{joint}{self.place}")


def _called(value: Any) -> str:
    text = json.dumps(value, default=str, ensure_ascii=True)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


# Rules


def number(value: Any) -> float | int:
    """A number that can be drawn."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise Odd(f"{_called(value)} is no number")
    if not abs(value) <= _MOST:  # nor NaN
        raise Odd(f"{_called(value)} is no finite number" if value != value else "out of range")
    return value if abs(value) < 2**53 else float(value)


def count(value: Any) -> int:
    """An integer from 0 on."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= 10**12:
        raise Odd(f"{_called(value)} is no count")
    return value


def positive(value: Any) -> int:
    """An integer from 1 on."""
    if count(value) == 0:
        raise Odd("is 0")
    return value


def share(value: Any) -> float:
    """A number from 0 to 1."""
    if not 0 <= number(value) <= 1:
        raise Odd(f"{_called(value)} is not between 0 and 1")
    return value


def amount(value: Any) -> float:
    """A number from 0 on."""
    if (value := number(value)) < 0:
        raise Odd(f"{_called(value)} is less than 0")
    return value


def text(value: Any) -> str:
    """A text."""
    if not isinstance(value, str):
        raise Odd(f"{_called(value)} is no text")
    return value


def flag(value: Any) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise Odd(f"{_called(value)} is neither true nor false")
    return value


def interval(value: Any) -> list:
    """[low, high]."""
    low, high = list_of(number, length=2)(value)
    if low > high:
        raise Odd(f"{_called(value)} is no interval")
    return [low, high]


def anything(value: Any) -> Any:
    """No rule."""
    return value


def list_of(rule: Rule, length: int | None = None, least: int = 0) -> Rule:
    """A list whose items all keep a rule."""

    def checked(value: Any) -> list:
        if not isinstance(value, list):
            raise Odd(f"{_called(value)} is no list")
        if len(value) < least or length not in (None, len(value)):
            raise Odd(f"holds {len(value)} values")
        return [_member(f"[{i}]", rule, item) for i, item in enumerate(value)]

    return checked


def none_or(rule: Rule) -> Rule:
    """null, or what keeps a rule."""
    return lambda value: None if value is None else rule(value)


def mapping(value: Any) -> dict:
    """An object."""
    if not isinstance(value, dict):
        raise Odd(f"{_called(value)} is no object")
    return value


def record(
    needed: dict[str, Rule], optional: dict[str, Rule] | None = None, others: Rule = anything
) -> Rule:
    """An object with members by their names, and a rule for all others."""

    def checked(value: Any) -> dict:
        found = {}
        for name in needed:
            if name not in mapping(value):
                raise Odd("is missing", name)
        rules = needed | (optional or {})
        for name, item in mapping(value).items():
            found[name] = _member(name, rules.get(name, others), item)
        return found

    return checked


def _member(name: str, rule: Rule, value: Any) -> Any:
    try:
        return rule(value)
    except Odd as odd:
        raise odd.inside(name if len(name) <= _LONGEST else f"{name[:_LONGEST]}…") from odd


def _equally_long(rule: Rule, *names: str) -> Rule:
    """A record whose lists of these names, those that it has, are equally long."""

    def checked(value: Any) -> dict:
        found = rule(value)
        lengths = {name: len(found[name]) for name in names if name in found}
        if len({*lengths.values()}) > 1:
            raise Odd(f"{' and '.join(lengths)} differ in length")
        return found

    return checked


def _histogram(value: Any) -> dict:
    found = record({"edges": list_of(number, least=2), "counts": list_of(amount)})(value)
    edges = found["edges"]
    if len(edges) != len(found["counts"]) + 1 or edges != sorted({*edges}):
        raise Odd("edges do not rise around counts")
    return found


# Values that are none are not odd: a figure that is not finite is written as null.
_figure = none_or(number)
_BY_POSITION = [f"{name}_by_position" for name in ("advantage", "kl_teacher", "kl_ref", "entropy")]
_LOGPROBS = ("teacher_logprobs", "ref_logprobs", "student_logprobs")


def _held_out(value: Any) -> dict:
    found = mapping(value)
    kept = {}
    for name, item in found.items():
        rule = none_or(interval) if name.endswith("_ci95") else _figure
        if (item := _member(name, rule, item)) is not None:
            kept[name] = item
    return kept


METRICS = record({"step": count}, others=_figure)
"""A row of metrics.jsonl."""
DRIFT = _equally_long(
    record(
        {"step": count},
        {
            "heldout": none_or(_held_out),
            "advantage_histogram": none_or(_histogram),
            "position_counts": list_of(amount, least=1),
            **{name: list_of(_figure, least=1) for name in _BY_POSITION},
        },
    ),
    "position_counts",
    *_BY_POSITION,
)
"""A row of drift.jsonl."""
ROLLOUT = _equally_long(
    record(
        {
            "prompt_id": count,
            "sample_id": count,
            "prompt": text,
            "tokens": list_of(text, least=1),
            "finished": flag,
            **{name: list_of(number) for name in _LOGPROBS},
        }
    ),
    "tokens",
    *_LOGPROBS,
)
"""A row of rollouts.jsonl."""
RESPONSE = record(
    {
        "mode": text,
        "problem": count,
        "prompt": text,
        "response": text,
        "answer": text,
        "correct": flag,
        "finished": flag,
    },
    {"sample": count, "test": text, "ungraded": flag},
)
"""A row of responses_*.jsonl."""


def _as_written(value: Any) -> Any:
    """A number that may be none, as text, since JSON knows no NaN."""
    try:
        return (
            str(float(value))
            if isinstance(value, str)
            else "nan"
            if value is None
            else number(value)
        )
    except ValueError as error:
        raise Odd(f"{_called(value)} is no number") from error


FAILURE = record(
    {
        "step": count,
        "loss": _as_written,
        "grad_norm": _as_written,
        "records": list_of(record({"finite": flag})),
    }
)
"""failure.json."""


def _figure_or_score(value: Any) -> Any:
    if isinstance(value, dict):  # avg@k, pass@k, majority@k
        return record({"value": number, "ci95": interval})(value)
    return number(value)


RESULT = record(
    {"accuracy": share, "n": positive, "ci95": interval},
    {"finished": share, "mean_response_tokens": amount, "ungraded": count},
    others=_figure_or_score,
)
"""The figures of a model on one test set, sampled in one way."""


def _cost(value: Any) -> dict:
    return record({"seconds": amount, "flops": amount})(value)


_OUTPUTS = {
    "fingerprint": text,
    "source": text,
    "tokens": count,
    "responses": count,
    "finished": count,
    "sampler_scorer_gap": record({"max": amount}),
    "teacher_consistency": record({"mean_log_ratio": number}),
    "costs": record({}, others=_cost),
    "model": record({"num_hidden_layers": count, "hidden_size": count}),
}
"""Entries of a manifest's outputs that the page shows."""


# Files


class Oddities:
    """What was left out of one file."""

    def __init__(self, path: epath.Path):
        self.path = path
        self.found: list[str] = []

    @property
    def notes(self) -> list[str]:
        """All of it as one note, the first few spelt out; none if there is nothing."""
        if not self.found:
            return []
        shown, more = self.found[:_SHOWN], len(self.found) - _SHOWN
        rest = [f"and {more:,} more"] if more > 0 else []
        return [f"{self.path.parent.name}/{self.path.name}: left out {', '.join([*shown, *rest])}"]

    def checked(self, rule: Rule, value: Any, where: str) -> Any:
        """The value, or None, noted, if it breaks the rule."""
        try:
            return rule(value)
        except Odd as odd:
            self.found.append(f"{where} ({odd})")
            return None


def _finite(value: Any, name: str, odd: list[str]) -> Any:
    """The value with null for numbers that are not finite, whose names go to `odd`."""
    if isinstance(value, dict):
        return {key: _finite(x, f"{name}.{key}" if name else key, odd) for key, x in value.items()}
    if isinstance(value, list):
        return [_finite(x, f"{name}[{i}]", odd) for i, x in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        odd.append(name)
        return None
    return value


def parse(data: bytes, infinite: list[str]) -> Any:
    """JSON that can be shown, with null for numbers that are not finite, whose names are kept.

    Raises:
      Odd: where it is none, is nested too deeply, or holds half a character.
    """
    try:
        value = _finite(json.loads(data.decode()), "", infinite)
        if re.search(rb"\\u[dD][89a-fA-F]", data):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise Odd(f"not UTF-8 at byte {error.start}") from error
    except UnicodeEncodeError as error:
        raise Odd("half of a surrogate pair") from error
    except RecursionError as error:
        raise Odd("nested too deeply") from error
    except ValueError as error:
        raise Odd("not JSON, or cut") from error
    return value


def _content(odd: Oddities) -> bytes:
    """A file's content; nothing if it is not there, or, noted, cannot be read."""
    try:
        return odd.path.read_bytes() if odd.path.exists() else b""
    except OSError as error:
        odd.found.append(f"all of it ({reason(error)})")
        return b""


def read_whole(odd: Oddities, rule: Rule) -> Any:
    """The one value of a JSON file; None, noted, if it does not keep the rule."""
    if not odd.path.exists():
        return None
    return odd.checked(lambda data: rule(parse(data, [])), _content(odd), "all of it")


def read_lines(odd: Oddities, rule: Rule) -> list[dict]:
    """The rows of a JSON-lines file that keep a rule; the others are noted."""
    found = []
    # Not splitlines(): JSON leaves U+2028 and others as they are inside its strings.
    for place, line in enumerate(_content(odd).split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            infinite: list[str] = []
            found.append(rule(parse(line, infinite)))
        except Odd as what:
            odd.found.append(f"line {place} ({what})")
        else:
            odd.found += [f"{name} of line {place} (not finite)" for name in infinite]
    return found


def rising(rows: list[dict], odd: Oddities) -> list[dict]:
    """Rows whose steps rise; the others are noted."""
    kept: list[dict] = []
    for row in rows:
        last = kept[-1]["step"] if kept else -1
        if row["step"] > last:
            kept.append(row)
        else:
            odd.found.append(f"a row of step {row['step']} behind that of step {last}")
    return kept


def missing_steps(rows: list[dict]) -> str:
    """Steps without a row between those that have one; empty if there are none."""
    gaps = []
    for before, after in itertools.pairwise(rows):
        first, last = before["step"] + 1, after["step"] - 1
        if first <= last:
            gaps.append(f"{first}" if first == last else f"{first} to {last}")
    return ", ".join(gaps[:_SHOWN] + (["and more"] if len(gaps) > _SHOWN else []))


def clean_outputs(outputs: dict, odd: Oddities) -> dict:
    """A manifest's outputs without entries that the page could not show."""
    known = outputs.keys() & _OUTPUTS.keys()
    bad = {x for x in known if odd.checked(_OUTPUTS[x], outputs[x], f"outputs.{x}") is None}
    return {name: value for name, value in outputs.items() if name not in bad}


def clean_results(models: Any, where: str, odd: Oddities) -> dict[str, dict]:
    """Accuracies by model and "test/mode", those that the page can show."""
    found: dict[str, dict] = {}
    for model, tasks in (odd.checked(mapping, models, where) or {}).items():
        if not re.fullmatch(r"[\w-]+", model):
            odd.found.append(f"{where}.{_called(model)} (no name of a model)")
            continue
        for task, result in (odd.checked(mapping, tasks, f"{where}.{model}") or {}).items():
            place = f"{where}.{model}.{_called(task).strip(chr(34))}"
            if (good := odd.checked(RESULT, result, place)) is not None:
                found.setdefault(model, {})[task] = good
    return found
