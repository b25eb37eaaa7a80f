"""One run: its settings, its directory, its devices, and what follows from them."""

import dataclasses
import functools
import itertools
import zlib
from collections.abc import Callable

import numpy as np
from etils import epath
from jax.sharding import Mesh

from lopd.artefacts.artefact import Artefact, open_complete
from lopd.checkpoints import hf_config, hugging_face, peft_adapter
from lopd.config.catalogue import CATALOGUE, TEACHER
from lopd.config.settings import LoraSettings, Settings, TaskSettings
from lopd.config.values import read_key
from lopd.data.tokenizers import Tokenizer, load_tokenizer
from lopd.errors import UserError
from lopd.models.decoder import DecoderConfig
from lopd.rollouts.requests import Prompts
from lopd.stages.origins import Adopted, Given, Made, Origin, find_origin
from lopd.stages.pins import pinned
from lopd.tasks import Task, make_task


def shape_in(artefact: Artefact, stage: str) -> dict:
    """The shape of the model in a finished artefact that is to be the one of `stage`.

    Raises:
      UserError: if it holds none.
    """
    shape = artefact.outputs.get("model")
    if not isinstance(shape, dict) or "fingerprint" not in artefact.outputs:
        made = artefact.manifest.stage
        raise UserError(
            f"the {stage} artefact: {artefact.path} holds no model; it is that of {made!r}"
        )
    return shape


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """What every stage is handed. What it holds is found out once."""

    settings: Settings
    workdir: epath.Path
    """Where artefacts are, each in the directory of its stage."""
    mesh: Mesh
    worker: tuple[int, int] | None = None
    """(i, N): this process samples part i of N, counted from 0, into a directory of its own."""
    locate: Callable[["Run", str], epath.Path] | None = None
    """Says where the artefact of a stage lies, if not in WORKDIR/STAGE (`lopd.study.store`)."""

    def seed(self, purpose: str) -> int:
        """A 32-bit seed for one purpose, from the run's seed: streams never coincide."""
        entropy = [self.settings.seed, zlib.crc32(purpose.encode())]
        return int(np.random.SeedSequence(entropy).generate_state(1)[0])

    # Prompts

    @property
    def tokenizer_source(self) -> str:
        """Where the run's tokenizer is from: the one named, or the student's checkpoint."""
        name = self.settings.tokenizer or self.base_checkpoint
        if not name and isinstance(origin := self.origin("sft"), Adopted):
            name = origin.checkpoint
        if not name:
            raise UserError("tokenizer is not set, and no student.checkpoint to take it of")
        return name

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The run's tokenizer."""
        return load_tokenizer(self.tokenizer_folder)

    @functools.cached_property
    def tokenizer_folder(self) -> str:
        """The file or folder, or the bundled name, that the run's tokenizer is read from."""
        source = self.tokenizer_source
        if not self.settings.tokenizer:
            return str(self._student_folder)
        return hugging_face.resolve_tokenizer(source)

    @functools.cached_property
    def teacher_tokenizer(self) -> Tokenizer | None:
        """That of a teacher that is a checkpoint; None for one that this run has trained."""
        origin = self.origin(TEACHER)
        return load_tokenizer(str(origin.folder)) if isinstance(origin, Adopted) else None

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The tokens at which sampling stops, the canonical one first.

        Those of the run's tokenizer, and those by which the teacher ends: it answers first, and the
        student learns its ends. A base checkpoint may name `<|endoftext|>` alone where its teacher
        ends with `<|im_end|>`.
        """
        ends = (one.end_ids for one in (self.tokenizer, self.teacher_tokenizer) if one)
        return tuple(dict.fromkeys(itertools.chain(*ends)))

    @functools.cached_property
    def task_settings(self) -> TaskSettings:
        """Those of the task, each source at the Hub at the commit that this run reads."""
        return pinned(self.settings.task, self.workdir)

    @functools.cached_property
    def task(self) -> Task:
        """The run's verifiable task."""
        return make_task(self.task_settings)

    @functools.cached_property
    def prompts(self) -> Prompts:
        """The run's prompts, each source read, split and tokenised once."""
        return Prompts(self.task, self.tokenizer, self.settings, self.seed)

    # Artefacts

    def home(self, stage: str) -> epath.Path:
        """The directory of the whole artefact of `stage`."""
        return self.locate(self, stage) if self.locate else self.workdir / stage

    def place(self, stage: str) -> epath.Path:
        """The directory that this process makes the artefact of `stage`, or its part of it, in."""
        home = self.home(stage)
        return home.parent / "{}-{}-of-{}".format(home.name, *self.worker) if self.worker else home

    @functools.cached_property
    def _origins(self) -> dict[str, Origin]:
        return {
            info.name: find_origin(read_key(self.settings, info.instead), bool(info.trains))
            for info in CATALOGUE
            if info.instead
        }

    def origin(self, stage: str) -> Origin:
        """Where the artefact of `stage` comes from."""
        return self._origins.get(stage, Made())

    def exists(self, stage: str) -> bool:
        """Whether the artefact of `stage` can be read: given, or finished in this run."""
        return isinstance(self.origin(stage), Given) or Artefact(self.home(stage)).complete

    def input(self, stage: str) -> Artefact:
        """The finished artefact of `stage`: the one given in the settings, or this run's.

        Raises:
          UserError: if it is missing or unfinished.
        """
        origin = self.origin(stage)
        path = origin.path if isinstance(origin, Given) else self.home(stage)
        return open_complete(path, f"the {stage} artefact")

    # Models

    @functools.cached_property
    def _student_folder(self) -> epath.Path:
        """The folder of the checkpoint that the student's shape and tokenizer are taken from."""
        return self.base_folder if self.base_checkpoint else self.origin("sft").folder

    @functools.cached_property
    def base_checkpoint(self) -> str | None:
        """The base student's checkpoint: the one named, or that of an adapter that is adopted."""
        name, origin = self.settings.student.checkpoint, self.origin("sft")
        if not name and isinstance(origin, Adopted) and peft_adapter.is_adapter(origin.folder):
            name = peft_adapter.read_base(origin.folder)
        return name

    @functools.cached_property
    def base_folder(self) -> epath.Path:
        """The folder of the base student's checkpoint."""
        return hugging_face.resolve_checkpoint(self.base_checkpoint)

    @property
    def lora(self) -> LoraSettings | None:
        """The adapters that the student is trained by; None: all its weights are trained."""
        lora = self.settings.student.lora
        return None if lora.rank is None else lora

    def model(self, which: str) -> DecoderConfig:
        """The shape of the "teacher" or the "student": as set, or as its checkpoint says.

        Raises:
          UserError: naming a missing or unknown field, or what is not set.
        """
        return self._teacher_model if which == TEACHER else self._student_model

    @functools.cached_property
    def _teacher_model(self) -> DecoderConfig:
        return self._model("teacher", "teacher", self.settings.teacher.model)

    @functools.cached_property
    def _student_model(self) -> DecoderConfig:
        return self._model("student", "sft", self.settings.student.model)

    def _model(self, which: str, stage: str, shape: dict) -> DecoderConfig:
        origin = self.origin(stage)
        if shape:
            try:
                model = DecoderConfig(**shape)
            except TypeError as error:
                raise UserError(f"{which}.model: {error}") from error
        elif which == "student" and self.base_checkpoint:
            model = hf_config.checkpoint_config(self.base_folder)
        elif isinstance(origin, Adopted):
            model = hf_config.checkpoint_config(origin.folder)
        elif isinstance(origin, Given):
            model = self._given_model(stage)
        else:
            raise UserError(f"neither {which}.checkpoint nor {which}.model is set: which {which}?")
        dtype = self.settings.dtype
        return dataclasses.replace(model, dtype=dtype) if dtype else model

    def _given_model(self, stage: str) -> DecoderConfig:
        """The shape of the model in an artefact that the settings name."""
        artefact = self.input(stage)
        try:
            return DecoderConfig(**shape_in(artefact, stage))
        except TypeError as error:
            raise UserError(f"{artefact.path}: the model of its manifest: {error}") from error
