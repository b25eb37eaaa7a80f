"""The model card of an export: its README.md, as the Hugging Face hub shows it.

It says where the model comes from, by names at the hub and fingerprints. Folders of this machine
mean nothing elsewhere and are left out. What the run has evaluated is in it; `eval` adds it where
it comes after `export`.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import huggingface_hub
import yaml
from etils import epath

import lopd
from lopd.artefacts.artefact import Artefact
from lopd.checkpoints import hugging_face
from lopd.config.catalogue import BASE, CATALOGUE, STUDENT
from lopd.machine import processes
from lopd.stages.origins import Given
from lopd.stages.run import Run
from lopd.stages.weights import student_source

CARD = "README.md"
"""The file of a checkpoint that describes it."""


def card(run: Run, dtype: str) -> str:
    """The card of the student of `opd`, with what is known when it is written.

    Args:
      run: the run.
      dtype: type of the stored weights.
    """
    source = student_source(run)
    base, folder = source if source else (None, None)
    named = _public(base)
    data = huggingface_hub.ModelCardData(
        base_model=named,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["lopd", "on-policy-distillation"],
        **(_licence(folder) if folder else {}),
    )
    title = f"{named.rpartition('/')[2]}, distilled" if named else "A distilled student"
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {title}",
        "A student language model that learnt on its own responses, by Lightning OPD "
        "([arXiv 2604.13010](https://arxiv.org/abs/2604.13010)) with "
        f"lopd {lopd.__version__}.",
        "## Where it comes from",
        _table(("", ""), _origin_rows(run, base, dtype)),
        "## Accuracy",
        _accuracy(run, dtype),
        "## Use",
        _use(run),
        "## Fingerprints",
        "Of the weights in float32, and of what they were made with.",
        _table(("", "fingerprint"), _fingerprint_rows(run)),
    ]
    return "\n\n".join(parts) + "\n"


def add_accuracies(run: Run) -> None:
    """Writes the card of a finished export of this run again, now that there is an evaluation.

    A kill in between leaves the export unfinished, and the next run makes it again.
    """
    if not processes.is_main():
        return
    export = Artefact(run.home("export"))
    if not export.complete or export.manifest.inputs != {"opd": _opd(run).outputs["fingerprint"]}:
        return
    export.rewrite(CARD, card(run, export.manifest.settings["dtype"]))


# Where it comes from


def _public(checkpoint: str | None) -> str | None:
    """The name of a checkpoint if others know it by that name."""
    return checkpoint if checkpoint and hugging_face.is_hub_name(checkpoint) else None


def _described(checkpoint: str | None, without: str) -> str:
    if not checkpoint:
        return without
    named = _public(checkpoint)
    return f"[{named}](https://huggingface.co/{named})" if named else "a local checkpoint"


def _licence(folder: epath.Path) -> dict[str, Any]:
    """What the card of the source says of its licence."""
    try:
        stated = huggingface_hub.metadata_load(folder / CARD) or {}
    except (OSError, ValueError, yaml.YAMLError):  # there is none, or none that can be read
        return {}
    keys = ("license", "license_name", "license_link")
    return {key: stated[key] for key in keys if isinstance(stated.get(key), str)}


def _opd(run: Run) -> Artefact:
    return run.input("opd")


def _made_with(run: Run, stage: str, section: str) -> Mapping[str, Any]:
    """A section of the settings that the artefact of `stage` was made with; empty if unknown."""
    return run.input(stage).manifest.settings.get(section, {}) if run.exists(stage) else {}


def _training(recipe: Mapping[str, Any]) -> str:
    return (
        f"{recipe['steps']} steps of {recipe['batch_size']} responses, learning rate "
        f"{recipe['learning_rate']:g} ({recipe['schedule']}), {recipe['optimizer']}"
    )


def _origin_rows(run: Run, base: str | None, dtype: str) -> Iterable[tuple[str, str]]:
    settings = run.settings
    given = isinstance(run.origin("sft"), Given)
    yield "base", _described(base, "that of another run's `sft`" if given else "random weights")
    trained = "trained in the same run" if run.exists("teacher") else "not named in the settings"
    yield "teacher", _described(settings.teacher.checkpoint, trained)
    task = settings.task
    yield "task", f"{task.digits}-digit addition" if task.name == "addition" else task.name
    if sft := _made_with(run, "sft", "sft"):
        yield "SFT", _training(sft)
    if asked := _made_with(run, "precompute", "precompute"):
        prompts = "all prompts" if asked["prompts"] is None else f"{asked['prompts']} prompts"
        yield (
            "rollouts",
            f"{prompts} × {asked['samples']}, temperature {asked['temperature']:g}, up to "
            f"{asked['response_length']} tokens",
        )
    made = _opd(run).manifest.settings
    if opd := made.get("opd"):
        yield "OPD", f"{_training(opd)}; {opd['objective']}, τ = {opd['tau']:g}"
    if lora := _opd(run).outputs.get("lora"):
        yield (
            "adapters",
            f"rank {lora['rank']}, alpha {lora['alpha']:g}, on {', '.join(lora['targets'])}; "
            "merged here, and alone in `adapter/`",
        )
    yield "seed", str(made.get("seed", settings.seed))
    yield "weights", f"stored as {dtype}"


def _fingerprint_rows(run: Run) -> Iterable[tuple[str, str]]:
    opd = _opd(run)
    yield "student", opd.outputs["fingerprint"]
    names = {"sft": "π_ref", "precompute": "rollouts", "teacher": "teacher"}
    found = dict(opd.manifest.inputs)
    if run.exists("teacher"):
        found["teacher"] = run.input("teacher").outputs["fingerprint"]
    yield from ((names[key], found[key]) for key in names if key in found)
    yield "tokenizer", run.tokenizer.fingerprint
    if run.tokenizer.template_fingerprint:
        yield "chat template", run.tokenizer.template_fingerprint


# Accuracy and use


def _accuracy(run: Run, dtype: str) -> str:
    """A table of what an evaluation of this student has found, or that there is none."""
    manifest, student = Artefact(run.home("eval")).manifest, _opd(run).outputs["fingerprint"]
    if manifest is None or manifest.inputs.get("opd") != student or "opd" not in manifest.results:
        return (
            "Not measured when this was written; what `lopd` measures is in the run's "
            "`eval/summary.json`."
        )
    titles = {info.name: info.title for info in CATALOGUE} | {BASE: "Base"}
    models = {name: titles[name] for name in manifest.results}
    rows = []
    for test in manifest.results["opd"]:
        cells = []
        for name in models:
            found = manifest.results[name][test]
            low, high = found["ci95"]
            cells.append(f"{found['accuracy']:.1%} [{low:.1%}, {high:.1%}]")
        found = manifest.results["opd"][test]
        rows.append((test, str(found["n"]), f"{found['temperature']:g}", *cells))
    split = manifest.settings["eval"]["split"]
    return (
        f"On the {split} problems, with 95 % intervals; this model is {titles['opd']}. Measured "
        f"on the weights in float32, computing in {run.model(STUDENT).dtype}; the files hold "
        f"them as {dtype}.\n\n" + _table(("problems", "n", "temperature", *models.values()), rows)
    )


def _use(run: Run) -> str:
    chat = bool(run.tokenizer.template_fingerprint)
    if chat:
        encode = (
            'messages = [{"role": "user", "content": "..."}]\n'
            "inputs = tokenizer.apply_chat_template(\n"
            '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt",\n'
            f"    enable_thinking={run.settings.task.thinking},\n)"
        )
    else:
        encode = 'inputs = tokenizer("...", return_tensors="pt")'
    length = run.settings.eval.response_length
    task, prompt = run.settings.task, ""
    if task.name != "addition":
        prompt = f"\n\nA problem is put into this prompt:\n\n```text\n{task.prompt}\n```"
    return f"""\
FOLDER is the folder of this file, or its name at the hub. Transformers:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER")
model = AutoModelForCausalLM.from_pretrained("FOLDER", dtype="auto")
{encode}
output = model.generate(**inputs, max_new_tokens={length})
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
```

vLLM:

```console
vllm serve FOLDER
```

llama.cpp, whose repository has the converter:

```console
python convert_hf_to_gguf.py FOLDER --outfile model.gguf
llama-cli -m model.gguf
```{prompt}"""


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
