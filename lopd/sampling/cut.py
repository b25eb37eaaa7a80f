"""Responses that were cut at the limit, said as soon as they are many.

A model that is to think longer than it may gives few whole answers: its accuracy falls for want of
room, and training on what is left teaches it to stop early.
"""

import dataclasses

import tqdm

MANY = 0.25
"""The share of cut responses above which it is said."""
_FIRST = 8
"""Responses before which a share says nothing."""


@dataclasses.dataclass
class CutCounter:
    """Counts cut responses for a bar, which shows their share while that is above MANY."""

    progress: tqdm.tqdm
    """The bar."""
    also: str = ""
    """What else the bar shows."""
    count: int = 0
    """Responses so far."""
    cut: int = 0
    """How many of them were cut."""
    _said: bool = False

    def add(self, finished: bool) -> None:
        """Counts one that ended by itself, or was cut."""
        self.count += 1
        self.cut += not finished
        many = self.count >= _FIRST and self.cut > MANY * self.count
        shown = [f"{self.cut / self.count:.0%} CUT at the length limit"] if many else []
        self.progress.set_postfix_str(
            ", ".join([*filter(None, [self.also]), *shown]), refresh=many and not self._said
        )
        self._said |= many
