"""Weights of a run's models: read from artefacts and checkpoints, and checked."""

import dataclasses
import os

import jax
from etils import epath

from lopd.artefacts.artefact import Artefact, differences
from lopd.artefacts.fingerprint import params_fingerprint
from lopd.checkpoints import hugging_face, orbax, peft_adapter
from lopd.config.catalogue import STUDENT, TEACHER, stage_info
from lopd.config.settings import LoraSettings
from lopd.errors import UserError
from lopd.models import decoder, low_rank
from lopd.models.shardings import abstract_params_on, check_divisible, param_shardings
from lopd.stages.origins import Adopted, Given
from lopd.stages.run import Run, shape_in

PARAMS = "params"
"""Name of the directory, under a training stage's artefact, that holds its finished weights; of a
student with adapters, these alone."""


def resident_dtype(run: Run, which: str) -> str:
    """The type that a model's weights are held in, adapters aside.

    A teacher that was adopted is frozen, and so is a student under adapters: their weights stay in
    the type that they compute with.
    """
    frozen = run.lora if which == STUDENT else isinstance(run.origin(TEACHER), Adopted)
    return run.model(which).dtype if frozen else "float32"


def describe(run: Run, which: str, params: decoder.Params) -> dict:
    """What a manifest says of weights: the shape, the fingerprint, and what adapters lie on."""
    found = {
        "model": dataclasses.asdict(run.model(which)),
        "fingerprint": params_fingerprint(params),
    }
    if lora := low_rank.shape_of(run.model(which), params):
        base = low_rank.base_of(params)
        found["lora"] = {
            **dataclasses.asdict(lora),
            "base": params_fingerprint(base),
            "dtype": base["embed"].dtype.name,
        }
    return found


# Reading


def read_checkpoint(run: Run, folder: epath.Path, which: str) -> decoder.Params:
    """The weights of a Hugging Face folder, to be used as the "teacher" or the "student".

    A PEFT adapter's are those of its base, with the adapter.
    """
    if which == STUDENT and peft_adapter.is_adapter(folder):
        base = read_checkpoint(run, run.base_folder, which)
        adapters = peft_adapter.load_adapters(folder, run.model(which), run.mesh)
        return low_rank.adapted(base, adapters)
    dtype = run.model(which).dtype if which == TEACHER else resident_dtype(run, which)
    return hugging_face.load_checkpoint(folder, run.mesh, param_dtype=dtype)[1]


def base_params(run: Run, which: str) -> decoder.Params:
    """The weights that training starts from, in their sharding: a base checkpoint's, or random."""
    if which == STUDENT and run.base_checkpoint:
        return read_checkpoint(run, run.base_folder, which)
    model = run.model(which)
    check_divisible(model, run.mesh, f"{which}.model")
    init = jax.jit(
        lambda key: decoder.init_params(model, key),
        out_shardings=param_shardings(model, run.mesh),
    )
    params = init(jax.random.key(run.seed(f"{which} weights")))
    return _held_in(resident_dtype(run, which), params) if which == STUDENT else params


def _held_in(dtype: str, params: decoder.Params) -> decoder.Params:
    return jax.tree.map(lambda x: x.astype(dtype), params)


def student_source(run: Run) -> tuple[str, epath.Path] | None:
    """The checkpoint that the student's weights began as: its name in the settings, its folder.

    Of an adapter that is adopted, its base. None for random weights.
    """
    origin = run.origin("sft")
    if isinstance(origin, Adopted) and not peft_adapter.is_adapter(origin.folder):
        return origin.checkpoint, origin.folder
    return (run.base_checkpoint, run.base_folder) if run.base_checkpoint else None


def check_shape(run: Run, stage: str) -> None:
    """Refuses a finished artefact that holds no model, or one of another shape than is set.

    Raises:
      UserError: naming what differs.
    """
    artefact, which = run.input(stage), stage_info(stage).trains
    found, set_to = shape_in(artefact, stage), dataclasses.asdict(run.model(which))
    if found != set_to:
        raise UserError(
            f"{artefact.path} holds a model of another shape than {which}.model "
            f"({'; '.join(differences(found, set_to))})"
        )


def load_params(run: Run, stage: str) -> decoder.Params:
    """The finished weights of a training stage, checked against its manifest.

    A student's are as this run trains it: with adapters, or, where all weights are trained, merged.

    Raises:
      UserError: if shape or content differ from what the manifest says.
    """
    artefact, which = run.input(stage), stage_info(stage).trains
    model = run.model(which)
    check_shape(run, stage)
    source, lora = (artefact.outputs.get(key) for key in ("source", "lora"))
    if source:
        params = read_checkpoint(run, epath.Path(source), which)
    elif lora:
        source = artefact.path / PARAMS
        adapters = low_rank.abstract_adapters_on(model, _shape(lora), run.mesh)
        adapters = orbax.load_params(source, adapters)
        params = low_rank.adapted(_base_under(run, stage, artefact), adapters)
    else:
        source = artefact.path / PARAMS
        params = orbax.load_params(source, abstract_params_on(model, run.mesh))
    found, expected = params_fingerprint(params), artefact.outputs["fingerprint"]
    if found != expected:
        raise UserError(
            f"{source} has fingerprint {found}, the manifest of {artefact.path} says "
            f"{expected}: the weights have changed; delete {artefact.path} and run it again"
        )
    if which == STUDENT and run.lora is None and lora:
        return _held_in("float32", low_rank.merged_params(params))
    if which == STUDENT and run.lora and not lora:  # a π_ref that adapters are to lie on
        return _held_in(resident_dtype(run, which), params)
    return params


# Adapters


def _shape(entry: dict) -> LoraSettings:
    """The adapters that a manifest tells of."""
    return LoraSettings(entry["rank"], entry["alpha"], tuple(entry["targets"]))


def _base_under(run: Run, stage: str, artefact: Artefact) -> decoder.Params:
    """The weights that the adapters of an artefact lie on: the base's, or those of a π_ref that
    has no adapters.

    Raises:
      UserError: if they are not there.
    """
    lora, info = artefact.outputs["lora"], stage_info(stage)
    if "sft" in info.needs(run.settings) and "lora" not in run.input("sft").outputs:
        base, where = load_params(run, "sft"), run.input("sft").path
    else:
        base = base_params(run, STUDENT)
        where = run.base_checkpoint or f"random weights of seed {run.settings.seed}"
    base = _held_in(lora["dtype"], base)
    found = params_fingerprint(base)
    if found != lora["base"]:
        raise UserError(
            f"the adapters of {artefact.path} lie on weights with fingerprint {lora['base']}, but "
            f"{where} has {found}: name in student.checkpoint what they were trained on"
        )
    return base


def adapter_base(run: Run) -> str | None:
    """The checkpoint that the student's adapters lie on: a name at the hub or an absolute path;
    None where it is weights of this run."""
    origin, name = run.origin("sft"), run.base_checkpoint
    if "lora" not in run.input("sft").outputs:
        name = origin.checkpoint if isinstance(origin, Adopted) else None
    return os.path.abspath(name) if name and os.path.isdir(name) else name


def to_train(run: Run, params: decoder.Params) -> decoder.Params:
    """A student's weights with the adapters that are trained, if any are: its own, or new ones
    that change nothing yet.

    Raises:
      UserError: if its own are of another shape than `student.lora` says.
    """
    model, lora = run.model(STUDENT), run.lora
    there = low_rank.shape_of(model, params)
    if there:
        _check_same(run, there, "the student that training starts from")
    if there or lora is None:
        return params
    key = jax.random.key(run.seed("adapters"))
    return low_rank.adapted(params, low_rank.init_adapters(model, lora, run.mesh, key))


def _check_same(run: Run, there: LoraSettings, what: str) -> None:
    """Refuses adapters that are there and are not those of the settings."""
    wanted, model = run.lora, run.model(STUDENT)
    if wanted is None:
        return
    rows = [low_rank.adapter_rows(model, lora).keys() for lora in (there, wanted)]
    if rows[0] != rows[1] or (there.rank, there.alpha) != (wanted.rank, wanted.alpha):
        raise UserError(
            f"{what} has adapters with rank={there.rank}, alpha={there.alpha} and targets="
            f"{there.targets}, which student.lora must have too, and has rank={wanted.rank}, "
            f"alpha={wanted.alpha} and targets={wanted.targets}"
        )


def check_adapters(run: Run) -> None:
    """Refuses, before any work, adapters that cannot be, or are not those that are there.

    Raises:
      UserError: for adapters on experts; or if `sft.checkpoint` has adapters of another shape than
        `student.lora` says.
    """
    if run.lora:
        low_rank.adapter_rows(run.model(STUDENT), run.lora)
    origin, there = run.origin("sft"), None
    if isinstance(origin, Given):
        there = run.input("sft").outputs.get("lora")
        there = there and _shape(there)
    elif isinstance(origin, Adopted) and peft_adapter.is_adapter(origin.folder):
        there = peft_adapter.read_config(origin.folder)
    if there:
        _check_same(run, there, f"sft.checkpoint={run.settings.sft.checkpoint}")
