"""`export`: the trained student as a Hugging Face checkpoint."""

from typing import Any

from lopd.artefacts.artefact import Artefact
from lopd.checkpoints import hf_config, hugging_face, peft_adapter
from lopd.config.catalogue import STUDENT
from lopd.data.tokenizers import SentencePieceTokenizer
from lopd.errors import UserError
from lopd.machine import processes
from lopd.machine.storage import whole_file
from lopd.models import low_rank
from lopd.stages.card import CARD, card
from lopd.stages.run import Run
from lopd.stages.stage import Stage
from lopd.stages.weights import adapter_base, load_params, student_source

ADAPTER = "adapter"
"""Name of the folder, under the artefact, that holds the adapters alone."""


def _dtype(run: Run) -> str:
    """The type of the stored weights: that of the source unless the settings say another."""
    if run.settings.export.dtype:
        return run.settings.export.dtype
    source = student_source(run)
    return hugging_face.stored_dtype(source[1]) if source else run.model(STUDENT).dtype


def _generation(run: Run) -> dict[str, Any]:
    """The source's generation_config.json, with every token at which sampling stops here."""
    source = student_source(run)
    path = source[1] / hugging_face.GENERATION if source else None
    stated = hf_config.read_json(path) if path and path.is_file() else {"do_sample": False}
    ends = list(run.end_ids)
    return {**stated, "eos_token_id": ends if len(ends) > 1 else ends[0]}


def settings(run: Run) -> dict:
    """The tokenizer goes with the weights, which are stored in a type."""
    return {"tokenizer": run.tokenizer.fingerprint, "dtype": _dtype(run)}


def inputs(run: Run) -> dict:
    """The student that OPD made."""
    return {"opd": run.input("opd").outputs["fingerprint"]}


def check(run: Run, stages: tuple[str, ...]) -> None:
    """Refuses what no folder of Hugging Face's form holds: a shape, a tokenizer.

    Raises:
      UserError: naming the flags of a shape that no family has together, or a text of which
        Transformers' tokenizer would make other ids.
    """
    del stages
    if Artefact(run.home("export")).complete:
        return
    family = hf_config.model_type(run.model(STUDENT))
    if family == "qwen2" and isinstance(run.tokenizer, SentencePieceTokenizer):
        raise UserError(
            "export: Transformers takes the tokenizer of every qwen2 model for Qwen2's own, so a "
            "SentencePiece model would be read wrongly; leave export out of --stages"
        )
    _generation(run)
    _ = run.tokenizer.export_files


def write(run: Run, artefact: Artefact) -> dict:
    """Writes weights, settings and tokenizer, and the model card.

    A student with adapters is written with these merged, and its adapters in PEFT's format into a
    folder beside: in the same one, Transformers would take it for an adapter.
    """
    params, dtype, model = load_params(run, "opd"), _dtype(run), run.model(STUDENT)
    hugging_face.save_checkpoint(
        artefact.path,
        model,
        params,
        end_id=run.tokenizer.end_id,
        dtype=dtype,
        generation=_generation(run),
    )
    if lora := low_rank.shape_of(model, params):
        adapters, base = low_rank.adapters_of(params), adapter_base(run)
        peft_adapter.save_adapters(artefact.path / ADAPTER, model, lora, adapters, base)
    if processes.is_main():
        files = {**run.tokenizer.export_files, CARD: card(run, dtype).encode()}
        for name, content in files.items():
            with whole_file(artefact.path / name) as file:
                file.write_bytes(content)
    return {}


stage = Stage(settings, inputs, write, check=check)
