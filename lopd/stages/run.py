"""What every stage is handed: the settings, where to work, and what follows from them."""

import dataclasses
import functools
import zlib
from collections.abc import Callable

import ml_collections
import numpy as np
from etils import epath
from jax.sharding import Mesh

from lopd.artefacts.artefact import MANIFEST, Artefact, open_complete
from lopd.artefacts.fingerprint import params_fingerprint
from lopd.checkpoints import hf_config, hugging_face, orbax
from lopd.data.tokenizers import Tokenizer, load_tokenizer
from lopd.errors import UserError
from lopd.machine.storage import absolute
from lopd.models.decoder import DecoderConfig, Params
from lopd.models.shardings import abstract_params_on
from lopd.tasks import Task, make_task

PARAMS = "params"
"""Name of the directory, under a training stage's artefact, that holds its finished weights."""


@dataclasses.dataclass(frozen=True)
class Context:
    """One run: its settings, its directory and its devices."""

    config: ml_collections.ConfigDict
    workdir: epath.Path
    mesh: Mesh
    worker: tuple[int, int] | None = None
    """(i, N): this process samples part i of N, counted from 0, into a directory of its own."""
    locate: Callable[["Context", str], epath.Path] | None = None
    """Says where the artefact of a stage lies, if not in WORKDIR/STAGE (`lopd.study.store`)."""

    @property
    def tokenizer_source(self) -> str:
        """Where the run's tokenizer is from: the one named, or the student's checkpoint."""
        name = self.config.tokenizer or self.config.student.checkpoint or self.external("sft")
        if not name:
            raise UserError("tokenizer is not set, and no student.checkpoint to take it of")
        return name

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The run's tokenizer."""
        name = self.tokenizer_source
        return load_tokenizer(
            name if self.config.tokenizer else hugging_face.resolve_checkpoint(name)
        )

    def home(self, stage: str) -> epath.Path:
        """The directory of the whole artefact of `stage`."""
        return self.locate(self, stage) if self.locate else self.workdir / stage

    def place(self, stage: str) -> epath.Path:
        """The directory that this process makes the artefact of `stage`, or its part of it, in."""
        home = self.home(stage)
        return home.parent / "{}-{}-of-{}".format(home.name, *self.worker) if self.worker else home

    @functools.cached_property
    def task(self) -> Task:
        """The run's verifiable task."""
        return make_task(self.config.task)

    def model(self, which: str) -> DecoderConfig:
        """The shape of the "teacher" or the "student": as set, or as its checkpoint says.

        Raises:
          UserError: naming a missing or unknown field, or what is not set.
        """
        section, stage = self.config[which], "teacher" if which == "teacher" else "sft"
        checkpoint = self.config.student.checkpoint if which == "student" else ""
        checkpoint = checkpoint or self.external(stage)
        if section.model:
            try:
                model = DecoderConfig(**section.model)
            except TypeError as error:
                raise UserError(f"{which}.model: {error}") from error
        elif checkpoint:
            model = hf_config.checkpoint_config(hugging_face.resolve_checkpoint(checkpoint))
        elif self.given(stage):
            model = DecoderConfig(**self.input(stage).outputs["model"])
        else:
            raise UserError(f"neither {which}.checkpoint nor {which}.model is set: which {which}?")
        return dataclasses.replace(model, dtype=self.config.dtype) if self.config.dtype else model

    def seed(self, purpose: str) -> int:
        """A 32-bit seed for one purpose, from the run's seed: streams never coincide."""
        entropy = [self.config.seed, zlib.crc32(purpose.encode())]
        return int(np.random.SeedSequence(entropy).generate_state(1)[0])

    def _instead(self, stage: str) -> str:
        """What the settings name instead of running `stage`; the empty string for nothing."""
        paths = {
            "teacher": self.config.teacher.checkpoint,
            "sft": self.config.sft.checkpoint,
            "precompute": self.config.opd.cache,
        }
        return paths.get(stage, "")

    def given(self, stage: str) -> str:
        """The finished artefact to use instead of running `stage`, or the empty string."""
        path = self._instead(stage)
        if not path or stage == "precompute":
            return path
        # What `export` leaves has a manifest too, but is a Hugging Face checkpoint.
        folder = absolute(path)
        is_artefact = (folder / MANIFEST).exists() and not (folder / hf_config.CONFIG).exists()
        return path if is_artefact else ""

    def external(self, stage: str) -> str:
        """The Hugging Face checkpoint to use as the result of `stage`, or the empty string."""
        return "" if self.given(stage) else self._instead(stage)

    def exists(self, stage: str) -> bool:
        """Whether the artefact of `stage` can be read: given, or finished in this run."""
        return bool(self.given(stage)) or Artefact(self.home(stage)).complete

    def input(self, stage: str) -> Artefact:
        """The finished artefact of `stage`: the one given in the settings, or this run's.

        Raises:
          UserError: if it is missing or unfinished.
        """
        given = self.given(stage)
        return open_complete(given or self.home(stage), f"the {stage} artefact")

    def read_checkpoint(self, path: epath.Path, which: str) -> Params:
        """The weights of a Hugging Face folder, to be used as the "teacher" or the "student".

        A teacher is frozen: its weights stay in the type that it computes with.
        """
        dtype = self.model(which).dtype if which == "teacher" else "float32"
        return hugging_face.load_checkpoint(path, self.mesh, param_dtype=dtype)[1]

    def load_params(self, stage: str, which: str) -> Params:
        """The finished weights of a training stage, checked against its manifest.

        Raises:
          UserError: if shape or content differ from what the manifest says.
        """
        artefact = self.input(stage)
        model = self.model(which)
        if artefact.outputs["model"] != dataclasses.asdict(model):
            raise UserError(
                f"{artefact.path} holds a model of shape {artefact.outputs['model']}, the "
                f"settings say {which}.model={dataclasses.asdict(model)}"
            )
        source = artefact.outputs.get("source")
        if source:
            params = self.read_checkpoint(epath.Path(source), which)
        else:
            source = artefact.path / PARAMS
            params = orbax.load_params(source, abstract_params_on(model, self.mesh))
        found, expected = params_fingerprint(params), artefact.outputs["fingerprint"]
        if found != expected:
            raise UserError(
                f"{source} has fingerprint {found}, the manifest of {artefact.path} says "
                f"{expected}: the weights have changed; delete {artefact.path} and run it again"
            )
        return params
