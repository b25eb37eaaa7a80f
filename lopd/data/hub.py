"""Prompt sources at the Hugging Face Hub: `hf:OWNER/NAME[@REVISION][/SPLIT or GLOB]`.

The data are the Parquet and JSONL files of the repository; if it holds none, those of the Hub's own
conversion to Parquet, which is a branch of the repository. Files are named after their split:

    train.jsonl, data/train-00000-of-00002.parquet    the split "train"
    main/test-00000-of-00001.parquet                  "main/test"; "test" if that is clear
    default/train/0000.parquet                        "default/train" or "train" (the conversion)
"""

import dataclasses
import fnmatch
import glob
import re
from collections.abc import Iterable

from etils import epath

from lopd.errors import UserError
from lopd.machine import hub
from lopd.machine.hub import Repository

PREFIX = "hf:"
"""What a source at the Hub begins with."""
SUFFIXES = (".jsonl", ".parquet")
"""Of the files that hold data."""
_CONVERTED = "refs/convert/parquet"
_SOURCE = re.compile(
    r"hf:(?P<name>[\w.-]+/[\w.-]+)(?:@(?P<revision>refs/[\w-]+/[^/@?]+|[^/@?]+))?(?:/(?P<part>.+))?"
)
_SHARD = re.compile(r"(?P<split>.+?)-\d+-of-\d+(?:-[0-9a-f]+)?")


@dataclasses.dataclass(frozen=True)
class HubSource:
    """A source as its parts."""

    repository: Repository
    revision: str | None
    """None: the newest commit of the main branch."""
    part: str | None
    """A split or a glob; None: all there is, or the split "train" of several."""

    def __str__(self) -> str:
        """As users write it."""
        revision = f"@{self.revision}" if self.revision else ""
        return f"{PREFIX}{self.repository.name}{revision}{f'/{self.part}' if self.part else ''}"


def parse(source: str) -> HubSource:
    """The parts of a source without its column map.

    Raises:
      UserError: if it is written in another way.
    """
    match = _SOURCE.fullmatch(source)
    if not match:
        raise UserError(
            f"{source}: a data set of the Hub is hf:OWNER/NAME, with @REVISION and /SPLIT or /GLOB "
            "behind it if need be"
        )
    return HubSource(Repository(match["name"], "dataset"), match["revision"], match["part"])


def _split(file: str) -> str:
    """The split that a data file is of, behind its folder, if that is not `data`."""
    path = epath.Path(file)
    folder, name = path.parent, path.stem
    if name.isdigit():  # as the conversion numbers the files of a split
        folder, name = folder.parent, folder.name
    elif shard := _SHARD.fullmatch(name):
        name = shard["split"]
    return name if str(folder) in (".", "data", "default") else f"{folder}/{name}"


def choose(source: HubSource, files: Iterable[str]) -> list[str]:
    """Those of a repository's files that a source names, in order.

    Raises:
      UserError: if there is none, or they are of several splits and it does not say which.
    """
    data = sorted(file for file in files if file.endswith(SUFFIXES))
    splits = {file: _split(file) for file in data}
    there = ", ".join(dict.fromkeys(splits.values())) or f"no {' or '.join(SUFFIXES)} files"
    part = source.part
    if part and (glob.has_magic(part) or part in data):
        chosen = [file for file in data if fnmatch.fnmatchcase(file, part) or file == part]
        if not chosen:
            raise UserError(f"{source}: no data file is called so; it has {_some(data)}")
        return chosen
    wanted = {part} if part else {*splits.values()}
    if part is None and len(wanted) > 1:
        wanted = {"train"}
    chosen = {f: s for f, s in splits.items() if s in wanted or s.rpartition("/")[2] in wanted}
    if len(found := {*chosen.values()}) > 1:
        raise UserError(
            f"{source}: {', '.join(sorted(found))} could be meant; say which, as in "
            f"{dataclasses.replace(source, part=min(found))}"
        )
    if not chosen:
        raise UserError(f"{source}: has no split {part or 'train'!r}; it has {there}")
    return [*chosen]


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return (", ".join(names[:3]) or f"no {' or '.join(SUFFIXES)} files") + more


def _has_data(repository: Repository, commit: str) -> bool:
    return any(file.endswith(SUFFIXES) for file in hub.list_files(repository, commit))


def pin(source: str) -> str:
    """The source with the commit in place of its revision: from now on it means the same data.

    Raises:
      UserError: if there is no such data set or revision, or the Hub cannot be asked.
    """
    parsed = parse(source)
    if parsed.revision and re.fullmatch(r"[0-9a-f]{40}", parsed.revision):
        return source
    repository = parsed.repository
    commit = hub.find_commit(repository, parsed.revision)
    if parsed.revision is None:
        commit = _with_data(repository, commit)
    return str(dataclasses.replace(parsed, revision=commit))


def _with_data(repository: Repository, commit: str) -> str:
    """The commit, or that of the Hub's conversion to Parquet if it holds no data."""
    try:
        if _has_data(repository, commit):
            return commit
    except UserError as error:
        # Offline there is no list of a commit that nothing was fetched of.
        try:
            return hub.find_commit(repository, _CONVERTED)
        except UserError:
            raise error from None
    try:
        return hub.find_commit(repository, _CONVERTED)
    except UserError as error:
        raise UserError(
            f"{repository.title} holds no {' or '.join(SUFFIXES)} files, and the Hub has not "
            "converted it to Parquet: download it and give the files"
        ) from error


def find_files(source: str) -> tuple[Repository, str, dict[str, int]]:
    """Where a source's files are and their sizes in bytes: repository, commit, path → size.

    Raises:
      UserError: as `pin` and `choose`.
    """
    pinned = parse(pin(source))
    files = hub.list_files(pinned.repository, pinned.revision)
    return pinned.repository, pinned.revision, {f: files[f] for f in choose(parse(source), files)}


def fetch(source: str) -> list[epath.Path]:
    """The files of a source on this machine, downloaded if need be.

    Raises:
      UserError: as `find_files`, or if they cannot be had.
    """
    repository, commit, files = find_files(source)
    folder = hub.download(repository, commit, [glob.escape(file) for file in files])
    return [folder / file for file in files]
