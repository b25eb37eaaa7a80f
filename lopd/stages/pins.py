"""Which commit of a data set at the Hub a run reads: the one that it read first.

Branches move. `revisions.json` in the working directory remembers what each source meant when it
was first read, so that a run that goes on weeks later, or offline, reads the same. The commit is
also in the settings of every artefact that was made from it. Delete the file to take newer data.
"""

import dataclasses
import json

from etils import epath

from lopd.config.settings import PROMPT_SOURCES, TaskSettings
from lopd.data.hub import PREFIX
from lopd.data.sources import pin
from lopd.errors import UserError
from lopd.machine import processes
from lopd.machine.storage import write_atomically

FILE = "revisions.json"
"""In the working directory: source → source with its commit."""


def known_commits(workdir: epath.Path) -> dict[str, str]:
    """Source → source with its commit, of those that a run in this directory has read.

    Raises:
      UserError: if the file that remembers them is damaged.
    """
    path = workdir / FILE
    if not path.exists():
        return {}
    try:
        return {str(key): str(value) for key, value in json.loads(path.read_text()).items()}
    except (ValueError, AttributeError) as error:
        raise UserError(
            f"{path}: cannot be read ({error}); delete it to take the newest data"
        ) from error


def pinned(task: TaskSettings, workdir: epath.Path) -> TaskSettings:
    """The settings with the commits of their sources, remembered in the working directory.

    A source that cannot be asked for now stays as it is: whoever reads it is told why.
    """
    sources = {key: getattr(task, key).split(",") for key in PROMPT_SOURCES if getattr(task, key)}
    if not any(source.startswith(PREFIX) for found in sources.values() for source in found):
        return task
    known = known_commits(workdir)
    before = dict(known)

    def one(source: str) -> str:
        if source not in known and source.startswith(PREFIX):
            try:
                known[source] = pin(source)
            except UserError:
                return source
        return known.get(source, source)

    found = {key: ",".join(map(one, each)) for key, each in sources.items()}
    if known != before and processes.is_main():
        write_atomically(workdir / FILE, json.dumps(known, indent=2) + "\n")
    return dataclasses.replace(task, **found)
