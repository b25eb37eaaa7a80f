"""`export`: the trained student as a Hugging Face checkpoint."""

from lopd.artefacts.artefact import Artefact
from lopd.checkpoints import hf_config, hugging_face
from lopd.config.catalogue import STUDENT
from lopd.machine import processes
from lopd.stages.run import Run
from lopd.stages.stage import Stage
from lopd.stages.weights import load_params


def settings(run: Run) -> dict:
    """The tokenizer goes with the weights."""
    return {"tokenizer": run.tokenizer.fingerprint}


def inputs(run: Run) -> dict:
    """The student that OPD made."""
    return {"opd": run.input("opd").outputs["fingerprint"]}


def check(run: Run, stages: tuple[str, ...]) -> None:
    """Refuses a shape that no family of Hugging Face's has, as a `config.json` must name one.

    Raises:
      UserError: naming the flags that do not go together.
    """
    del stages
    hf_config.model_type(run.model(STUDENT))


def write(run: Run, artefact: Artefact) -> dict:
    """Writes safetensors, config.json, generation_config.json and the tokenizer."""
    params, end_id = load_params(run, "opd"), run.tokenizer.end_id
    hugging_face.save_checkpoint(artefact.path, run.model(STUDENT), params, end_id=end_id)
    if processes.is_main():
        for name, content in run.tokenizer.files.items():
            (artefact.path / name).write_bytes(content)
    return {}


stage = Stage(settings, inputs, write, check=check)
