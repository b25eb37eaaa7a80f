"""Where the artefact of a stage comes from: made by this run, given, or adopted."""

import dataclasses
import functools

from etils import epath

from lopd.artefacts.artefact import MANIFEST
from lopd.checkpoints import hf_config, hugging_face
from lopd.machine.storage import absolute


@dataclasses.dataclass(frozen=True)
class Made:
    """This run makes it, or has made it."""


@dataclasses.dataclass(frozen=True)
class Given:
    """A finished artefact that the settings name."""

    path: epath.Path
    named: str
    """As the settings have it."""


@dataclasses.dataclass(frozen=True, eq=False)
class Adopted:
    """A Hugging Face checkpoint that the settings name; an artefact of this run records it."""

    checkpoint: str
    """As the settings have it: a folder or a name at the hub."""

    @functools.cached_property
    def folder(self) -> epath.Path:
        """Where the checkpoint lies on this machine; downloaded if need be.

        Raises:
          UserError: as `hugging_face.resolve_checkpoint`.
        """
        return hugging_face.resolve_checkpoint(self.checkpoint)


Origin = Made | Given | Adopted
"""One of the three."""


def find_origin(named: str | None, holds_weights: bool) -> Origin:
    """The origin of an artefact.

    Args:
      named: what the settings name to use instead of making it.
      holds_weights: whether a checkpoint may stand for it.
    """
    if not named:
        return Made()
    path = absolute(named)
    # What `export` leaves has a manifest too, but is a Hugging Face checkpoint.
    is_artefact = (path / MANIFEST).exists() and not (path / hf_config.CONFIG).exists()
    return Given(path, named) if is_artefact or not holds_weights else Adopted(named)
