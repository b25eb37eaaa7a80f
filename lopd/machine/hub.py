"""Repositories of the Hugging Face Hub: their commits, their files, and which of them are here.

All by `huggingface_hub` and its own conventions: the token (`HF_TOKEN`, `hf auth login`), the cache
(`HF_HOME`), the server (`HF_ENDPOINT`) and working offline (`HF_HUB_OFFLINE`). Whole files stay
after a download that was cut; a file that was cut goes on where it stopped, in the same process.
"""

import contextlib
import dataclasses
import logging
from collections.abc import Collection, Iterator

import huggingface_hub
from etils import epath
from huggingface_hub import errors

from lopd.errors import UserError

TOKENS = "https://huggingface.co/settings/tokens"
"""Where a token is made."""
_LOGIN = f"hf auth login, or HF_TOKEN, with a token from {TOKENS}"
_REFUSED = (401, 403)


@dataclasses.dataclass(frozen=True)
class Repository:
    """A repository of the Hub."""

    name: str
    """OWNER/NAME."""
    kind: str
    """As the Hub calls it: "model" or "dataset"."""

    @property
    def title(self) -> str:
        """How people call it."""
        return f"{'data set' if self.kind == 'dataset' else self.kind} {self.name}"

    @property
    def page(self) -> str:
        """Where people read about it."""
        return f"https://huggingface.co/{'datasets/' * (self.kind == 'dataset')}{self.name}"


@contextlib.contextmanager
def _one_line(repository: Repository, revision: str | None = None) -> Iterator[None]:
    """Errors of huggingface_hub, each as a line that says what to do."""
    title = repository.title
    try:
        # Of what is raised as an error here, a warning comes first.
        with _quiet(logging.getLogger("huggingface_hub")):
            yield
    except errors.GatedRepoError as error:
        raise UserError(
            f"{title} is for those who have accepted its terms: accept them at {repository.page}, "
            f"then {_LOGIN}"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"{title}: the Hub has none of that name, or it is private: check the name, or {_LOGIN}"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{title} has no revision {revision!r}") from error
    except (errors.HTTPError, errors.HFValidationError, OSError) as error:
        reason = " ".join(str(error).split())
        response = getattr(error, "response", None)
        if response is not None and response.status_code in _REFUSED:
            raise UserError(f"{title}: the Hub refused it ({reason}); {_LOGIN}") from error
        raise UserError(
            f"{title}: the Hub did not give it ({type(error).__name__}: {reason}), and the cache "
            "on this machine (HF_HOME) does not hold it; check name and network (HF_HUB_OFFLINE, "
            "HF_ENDPOINT), the same command goes on from what has come"
        ) from error


@contextlib.contextmanager
def _quiet(logger: logging.Logger) -> Iterator[None]:
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def find_commit(repository: Repository, revision: str | None = None) -> str:
    """The commit that a revision stands for now; where the Hub does not answer, stood for last.

    Raises:
      UserError: if there is no such repository or revision, or neither Hub nor cache knows it.
    """
    with _one_line(repository, revision):
        try:
            return huggingface_hub.HfApi().resolve_revision(
                repository.name, repo_type=repository.kind, revision=revision
            ).resolved  # fmt: skip
        except errors.RevisionResolutionError as error:
            raise error.__cause__ or OSError(str(error)) from error


def list_files(repository: Repository, commit: str) -> dict[str, int]:
    """The files of a commit and their sizes in bytes, by path: from the cache or the Hub.

    Raises:
      UserError: if neither knows.
    """
    name, kind = repository.name, repository.kind
    with contextlib.suppress(errors.CachedRepoTreeNotFoundError):
        files = huggingface_hub.get_cached_repo_tree(name, repo_type=kind, revision=commit)
        return {file.path: file.size for file in files}
    with _one_line(repository, commit):
        tree = huggingface_hub.HfApi().list_repo_tree(
            name, recursive=True, revision=commit, repo_type=kind
        )
        return {x.path: x.size for x in tree if isinstance(x, huggingface_hub.RepoFile)}


def is_here(repository: Repository, commit: str, file: str) -> bool:
    """Whether the cache holds a file of a commit."""
    found = huggingface_hub.try_to_load_from_cache(
        repository.name, file, revision=commit, repo_type=repository.kind
    )
    return isinstance(found, str)


def download(repository: Repository, revision: str | None, patterns: Collection[str]) -> epath.Path:
    """A folder with the files of a revision that match the patterns, each whole.

    Raises:
      UserError: if it cannot be had, with what to do.
    """
    with _one_line(repository, revision):
        folder = huggingface_hub.snapshot_download(
            repository.name,
            repo_type=repository.kind,
            revision=revision,
            allow_patterns=[*patterns],
        )
    return epath.Path(folder)
