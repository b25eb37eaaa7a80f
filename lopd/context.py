"""What every stage is handed: the settings, where to work, and what follows from them."""

import dataclasses
import functools
import zlib

import ml_collections
import numpy as np
from etils import epath
from jax.sharding import Mesh

from lopd.artefact import Artefact, open_complete
from lopd.config import qwen3_config
from lopd.data.tokenizers import Tokenizer, load_tokenizer
from lopd.errors import UserError
from lopd.fingerprint import params_fingerprint
from lopd.models.qwen3 import Params, Qwen3Config
from lopd.tasks.addition import Addition
from lopd.training import checkpoints

PARAMS = "params"
"""Name of the directory, under a training stage's artefact, that holds its finished weights."""


@dataclasses.dataclass(frozen=True)
class Context:
    """One run: its settings, its directory and its devices."""

    config: ml_collections.ConfigDict
    workdir: epath.Path
    mesh: Mesh

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The run's tokenizer."""
        return load_tokenizer(self.config.tokenizer)

    @functools.cached_property
    def task(self) -> Addition:
        """The run's verifiable task."""
        return Addition(self.config.task.digits)

    def model(self, which: str) -> Qwen3Config:
        """The shape of the "teacher" or the "student"."""
        return qwen3_config(self.config, which)

    def seed(self, purpose: str) -> int:
        """A 32-bit seed for one purpose, from the run's seed: streams never coincide."""
        entropy = [self.config.seed, zlib.crc32(purpose.encode())]
        return int(np.random.SeedSequence(entropy).generate_state(1)[0])

    def given(self, stage: str) -> str:
        """The path of an artefact to use instead of running `stage`, or the empty string."""
        paths = {
            "teacher": self.config.teacher.checkpoint,
            "sft": self.config.sft.checkpoint,
            "precompute": self.config.opd.cache,
        }
        return paths.get(stage, "")

    def exists(self, stage: str) -> bool:
        """Whether the artefact of `stage` can be read: given, or finished in this run."""
        return bool(self.given(stage)) or Artefact(self.workdir / stage).complete

    def input(self, stage: str) -> Artefact:
        """The finished artefact of `stage`: the one given in the settings, or this run's.

        Raises:
          UserError: if it is missing or unfinished.
        """
        given = self.given(stage)
        return open_complete(given or self.workdir / stage, f"the {stage} artefact")

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
        params = checkpoints.load_params(artefact.path / PARAMS, model, self.mesh)
        found, expected = params_fingerprint(params), artefact.outputs["fingerprint"]
        if found != expected:
            raise UserError(
                f"{artefact.path / PARAMS} has fingerprint {found}, its manifest says "
                f"{expected}: the weights are damaged; delete {artefact.path} and train again"
            )
        return params
