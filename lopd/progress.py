"""What people see while a run works: progress bars and metric files."""

import json
import sys
from collections.abc import Iterable, Iterator

import tqdm
from etils import epath


def bar(iterable: Iterable | None = None, *, total: int, label: str, unit: str, initial: int = 0):
    """A progress bar with rate and time left; in a log file, a line every ten seconds."""
    return tqdm.tqdm(
        iterable,
        total=total,
        initial=initial,
        desc=f"{label:<10}",
        unit=f" {unit}",
        dynamic_ncols=True,
        mininterval=0.2 if sys.stderr.isatty() else 10,
        smoothing=0.1,
    )


def counted(items: Iterable, progress: tqdm.tqdm) -> Iterator:
    """The items, each counted on the bar as it comes."""
    for item in items:
        progress.update()
        yield item


class MetricsFile:
    """`metrics.jsonl`: one JSON object per step, in order, also after a resume."""

    def __init__(self, path: epath.Path, resume_step: int = 0):
        """Opens the file, dropping what an interrupted run wrote after `resume_step`."""
        kept = []
        if resume_step and path.exists():
            for line in path.read_text().splitlines():
                try:
                    row = json.loads(line)
                except ValueError:
                    break  # the last line of a killed run
                if row["step"] <= resume_step:
                    kept.append(line)
        path.write_text("".join(line + "\n" for line in kept))
        self._file = path.open("a")

    def write(self, row: dict) -> None:
        """Appends one row."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()
