"""The report: one self-contained HTML page of a run, or of several side by side."""

import sys
from collections.abc import Sequence

from etils import epath

from lopd.machine.storage import write_atomically

PAGE, COMPARISON = "report.html", "comparison.html"
"""File names: of the page of one run, of that of several."""


def write_report(workdirs: Sequence[epath.PathLike]) -> epath.Path:
    """Writes the page into the first working directory; its name tells one run from several.

    A page that would be the same is left as it is.

    Returns:
      Where it is.

    Raises:
      UserError: if a directory does not exist or holds no run.
    """
    # Imported here: Matplotlib takes a second, for which not every command need wait.
    from lopd.report import page, reading

    runs = reading.read_runs(list(workdirs))
    path = epath.Path(runs[0].path) / (PAGE if len(runs) == 1 else COMPARISON)
    # A folder's name may hold bytes that are no text.
    data = page.render(runs).encode(errors="replace")
    if not path.exists() or path.read_bytes() != data:
        write_atomically(path, data.decode())
    return path


def write_after_run(workdir: epath.PathLike, failed: bool = False) -> epath.Path | None:
    """The report of a run that has ended; what prevents it is one line of warning, not an error.

    Not even that after a run that `failed`: its own error is the line to read.
    """
    try:
        return write_report([workdir])
    except Exception as error:  # whatever it is, it must not hide how the run has ended
        reason = " ".join(str(error).split()) or type(error).__name__
        if not failed:
            print(
                f"lopd: warning: no report ({reason}); python -m lopd.report {workdir} tries again",
                file=sys.stderr,
            )
        return None
