"""Values as people write them."""

import re
from typing import Any

from markupsafe import Markup


def number(value: float) -> str:
    """A count or a rate with three significant digits or more: 1,234 or 1.62 M."""
    if abs(value) >= 1e9:
        return f"{value / 1e9:.2f} G"
    if abs(value) >= 1e6:
        return f"{value / 1e6:.2f} M"
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"


def duration(seconds: float) -> str:
    """47 s, 3 min 31 s, 2 h 05 min."""
    if seconds < 59.5:
        return f"{seconds:.0f} s" if seconds >= 9.5 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def flops(value: float) -> str:
    """Floating-point operations with three significant digits: 133 GFLOPs."""
    value = float(f"{value:.3g}")
    units = {"E": 1e18, "P": 1e15, "T": 1e12, "G": 1e9, "M": 1e6}
    prefix = next((prefix for prefix, unit in units.items() if value >= unit), "M")
    return f"{number(value / units[prefix])} {prefix}FLOPs"


def signed(value: float, digits: int) -> str:
    """+1.2 or −1.2, with a true minus."""
    return f"{value:+.{digits}f}".replace("-", "−")


def setting(value: Any) -> str:
    """A setting as people write it."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "not set"}[value]
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() and abs(value) < 1e12 else f"{value:g}"
    return str(value) if value != "" else "—"


def math(text: str) -> Markup:
    """Escaped text in which π_T, π_θ and π_ref have true subscripts."""
    return Markup(re.sub(r"π_(T|θ|ref)", r"π<sub>\1</sub>", str(Markup.escape(text))))
