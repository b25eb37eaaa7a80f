"""What people see while a run works: progress bars and metric files."""

import sys
from collections.abc import Iterable, Iterator

import tqdm

from lopd.machine import processes


def bar(
    iterable: Iterable | None = None,
    *,
    total: int,
    label: str,
    unit: str,
    initial: int = 0,
    delay: float = 0.0,
):
    """A progress bar with rate and time left; in a log file, a line every ten seconds.

    What may be done at once has none before `delay` seconds are over.
    """
    return tqdm.tqdm(
        iterable,
        total=total,
        initial=initial,
        delay=delay,
        desc=f"{label:<10}",
        unit=f" {unit}",
        # Left out where it is not needed, as it would win over TQDM_DISABLE.
        **({} if processes.is_main() else {"disable": True}),
        dynamic_ncols=True,
        mininterval=0.2 if sys.stderr.isatty() else 10,
        smoothing=0.1,
    )


def counted(items: Iterable, progress: tqdm.tqdm) -> Iterator:
    """The items, each counted on the bar as it comes."""
    for item in items:
        progress.update()
        yield item
