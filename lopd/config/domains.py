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

    def holds(self, value: Any) -> bool:
        """Whether the value lies in the domain; a number that is not finite lies in none."""
        if isinstance(value, float) and not math.isfinite(value):
            return False
        return bool(self.condition(value))


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


def setting(default: Any, domain: Domain | None = None) -> Any:
    """A dataclass field with a default and, if not every value of its type is meant, a domain."""
    metadata = {"domain": domain} if domain else {}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)
