"""The objectives of `opd` by their names in the settings: title and unit of the loss."""

from typing import NamedTuple


class LossName(NamedTuple):
    """How people call the number that an objective minimises, and its unit."""

    title: str
    """For an axis."""
    unit: str


LOSSES = {
    "log_ratio": LossName("Huber loss", "nats²"),
    "forward_kl": LossName("KL(π_T‖π_θ)", "nats"),
    "reverse_kl": LossName("KL(π_θ‖π_T)", "nats"),
    "jensen_shannon": LossName("Jensen–Shannon divergence", "nats"),
    "fixed_advantage": LossName("−advantage · log π_θ", "nats"),
    "cross_entropy": LossName("Cross-entropy", "nats"),
}
"""The objectives that `opd.objective` may name; SFT minimises the last.

The loss of a step is the token mean, or what `reduction` says, of this.
"""
