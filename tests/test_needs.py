"""The table before a download: what is fetched and needed, and all that is missing, at once."""

import json
import runpy

import jax
import pytest
from helpers import hub_server
from helpers.commands import REPOSITORY
from helpers.published import PUBLISHED

from lopd.config import read_settings
from lopd.config.values import changed
from lopd.errors import UserError
from lopd.hardware import CHIPS, find_chip
from lopd.machine.hub import Repository, download
from lopd.plan import needs

ROWS = b'{"question": "1+1?", "answer": "#### 2"}\n'
GSM8K = {"main/train.jsonl": ROWS * 50, "main/test.jsonl": ROWS}
MODEL = {"config.json": b"{}", "model.safetensors": b"x" * 4000, "pytorch_model.bin": b"x" * 9000}


class Device:
    """A device as jax describes it."""

    def __init__(self, device_kind: str, gib: float = 0):
        self.device_kind, self._stats = device_kind, {"bytes_limit": int(gib * 2**30)}

    def memory_stats(self):
        return self._stats


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with hub_server.serve() as hub:
        hub_server.use(monkeypatch, hub, tmp_path / "cache")
        hub.add("openai/gsm8k", GSM8K)
        hub.add("Qwen/Qwen3-4B", MODEL, kind="models")
        hub.add("Qwen/Qwen3-0.6B-Base", MODEL, kind="models")
        yield hub


def settings(**changes):
    path = REPOSITORY / "configs" / "qwen3_0_6b.py"
    recipe = read_settings(runpy.run_path(str(path))["get_config"]("small"))
    changes = {"runtime__rows_per_micro": 8} | changes  # the mesh is eight devices
    return changed(recipe, {key.replace("__", "."): value for key, value in changes.items()})


def find(one, workdir):
    return needs.gather(one, str(workdir), one.stages)


def test_says_what_is_fetched_and_what_is_here(hub, tmp_path):
    found = find(settings(), tmp_path)
    assert [(fetch.what, fetch.total, fetch.here) for fetch in found.fetches] == [
        ("teacher Qwen/Qwen3-4B", 4002, 0),  # without what nobody reads
        ("student Qwen/Qwen3-0.6B-Base", 4002, 0),
        ("task.sft_prompts hf:openai/gsm8k/main/train", 50 * len(ROWS), 0),
        ("task.opd_prompts hf:openai/gsm8k/main/train", 50 * len(ROWS), 0),
        ("task.problems hf:openai/gsm8k/main/test", len(ROWS), 0),
    ]
    assert not hub.downloads() and not found.missing
    download(Repository("Qwen/Qwen3-4B", "model"), None, ["*.safetensors"])
    assert find(settings(), tmp_path).fetches[0].here == 4000


def test_says_what_every_stage_needs(hub, tmp_path, capsys):
    one = settings()
    needs.check(one, str(tmp_path), (), dry_run=True)
    text = capsys.readouterr().out
    for stage in ("sft_data", "sft", "precompute", "heldout", "opd", "export"):
        assert f"\n{stage} " in text
    assert text.endswith("nothing is missing\n")
    by_name = {stage.stage: stage for stage in find(one, tmp_path).stages}
    weights = 0.596e9  # of Qwen3-0.6B
    assert by_name["sft"].disk == pytest.approx(weights * (4 + 12 * 3), rel=0.01)
    assert by_name["sft_data"].device > 2 * 4.0e9 / jax.device_count()  # the teacher in bfloat16
    assert by_name["opd"].hours is None  # of a CPU nobody knows
    adapted = {s.stage: s for s in find(settings(student__lora__rank=8), tmp_path).stages}
    assert adapted["sft"].disk < by_name["sft"].disk / 20


def test_says_all_that_is_missing_at_once(hub, tmp_path, capsys):
    one = settings(
        teacher__checkpoint="Qwen/none",
        task__opd_prompts="hf:openai/gsm8k/main/dev",
        task__problems="hf:openai/none",
        sft__warmup_steps=1000,
    )
    with pytest.raises(UserError, match=r"Qwen/none.* \(and 3 more in the list above\)$"):
        needs.check(one, str(tmp_path), (), dry_run=True)
    listed = capsys.readouterr().out.partition("missing or does not fit:")[2]
    for part in ("Qwen/none", "no split 'main/dev'", "openai/none", "sft.warmup_steps=1000"):
        assert part in listed
    with pytest.raises(UserError, match="Qwen/none"):
        needs.check(one, str(tmp_path), (), dry_run=False)


def test_what_does_not_fit_is_said_with_a_cure(hub, tmp_path, monkeypatch, capsys):
    one = settings()
    small = [Device("NVIDIA L4", gib=0.7)] * 8
    monkeypatch.setattr(jax, "local_devices", lambda: small)
    monkeypatch.setattr(needs, "_free", lambda path: 10_000)
    monkeypatch.setattr(needs, "_host_memory", lambda: 1000)
    found = find(one, tmp_path)
    assert any("of a device's 0.7: try " in line for line in found.tight)
    for part in ("set HF_HOME to a larger disk", "runtime.keep_checkpoints", "a larger host"):
        assert any(part in line for line in found.tight), part
    with pytest.raises(UserError):
        needs.check(one, str(tmp_path), (), dry_run=True)
    needs.check(one, str(tmp_path), (), dry_run=False)  # formulas are rough


def test_nothing_is_said_of_a_run_that_has_all_it_needs(hub, tmp_path, capsys):
    local = dict.fromkeys(("teacher__checkpoint", "student__checkpoint"), str(tmp_path))
    sources = ("task__sft_prompts", "task__opd_prompts", "task__problems")
    needs.check(
        settings(**local, **dict.fromkeys(sources, "a.jsonl")), str(tmp_path), (), dry_run=False
    )
    assert capsys.readouterr().out == "" and not hub.requests


def test_offline_it_says_so(hub, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE"):
        needs.check(settings(), str(tmp_path), (), dry_run=True)
    assert not hub.requests


def test_an_unknown_shape_is_read_from_its_config(hub, tmp_path):
    config = PUBLISHED["Qwen3-4B-Thinking-2507"] | {"num_hidden_layers": 2}
    hub.add("me/small", MODEL | {"config.json": json.dumps(config).encode()}, kind="models")
    found = find(settings(student__checkpoint="me/small"), tmp_path)
    assert not found.missing
    assert {request.rpartition("/")[2] for request in hub.downloads()} == {"config.json"}


@pytest.mark.parametrize(
    ("kind", "chip"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5p", "v5p"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", None),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("cpu", None),
    ],
)
def test_hours_are_of_the_chip_that_is_there(kind, chip):
    assert find_chip([Device(kind)]) == (CHIPS[chip] if chip else None)
