"""What a single setting may be. A domain stands beside the default of its setting."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Domain:
    """A condition on a value, and how a message says it: "NAME=VALUE must TEXT"."""

    text: str
    condition: Callable[[Any], bool]
    below: int = 2**31
    """Whole numbers are less: what is counted becomes int32 on the devices."""

    def complaint(self, value: Any) -> str:
        """What a value must be that it is not, and "" if it lies in the domain.

        A number that is not finite lies in none.
        """
        if isinstance(value, float) and not math.isfinite(value):
            return self.text
        if isinstance(value, int) and value >= self.below:
            return f"be below {self.below}"
        return "" if self.condition(value) else self.text


FINITE = Domain("be a finite number", lambda x: True)
"""Any number."""
POSITIVE = Domain("be positive", lambda x: x > 0)
"""Above 0."""
NOT_NEGATIVE = Domain("not be negative", lambda x: x >= 0)
"""0 or more."""
PROBABILITY = Domain("lie in [0, 1]", lambda x: 0 <= x <= 1)
"""0 and 1 included."""
FRACTION = Domain("lie in (0, 1]", lambda x: 0 < x <= 1)
"""0 excluded, 1 included."""
BELOW_1 = Domain("lie in [0, 1)", lambda x: 0 <= x < 1)
"""0 included, 1 excluded."""


def at_least(least: int) -> Domain:
    """Numbers from `least` on."""
    return Domain(f"be at least {least}", lambda x: x >= least)


def one_of(*values: str) -> Domain:
    """A choice of names."""
    return Domain(f"be one of {', '.join(values)}", lambda x: x in values)


def path_setting(separator: str = "") -> Any:
    """A dataclass field for the name of a file, folder or checkpoint; unset by default.

    A leading ~ in it becomes the home directory, in each of several names if a `separator` may
    divide them.
    """
    metadata: dict[str, Any] = {"separator": separator}
    if separator:
        named = lambda x: all(name.strip() for name in x.split(separator))  # noqa: E731
        metadata["domain"] = Domain(f"have a name on each side of every {separator!r}", named)
    return dataclasses.field(default=None, metadata=metadata)


def setting(default: Any, domain: Domain | None = None) -> Any:
    """A dataclass field with a default and, if not every value of its type is meant, a domain."""
    metadata = {"domain": domain} if domain else {}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)
