"""Which tokens of a response are trained on, and what each weighs in the loss of a batch."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

REDUCTIONS = ("sample_mean", "token_mean", "token_sum")
"""The ways of `token_weights`."""


def token_weights(trained: Sequence[int], reduction: str) -> np.ndarray:
    """The weight that each trained token of each response of one global batch carries, float32 [N].

    `sample_mean` (the released code's): mean over a response's tokens, then over responses.
    `token_mean`: mean over all tokens. `token_sum` (the paper's): sum over tokens, mean over
    responses. A response without a trained token does not count.

    Args:
      trained: how many tokens of each response are trained on.
    """
    counts = np.asarray(trained, np.float64)
    responses, tokens = max(np.count_nonzero(counts), 1), max(counts.sum(), 1)
    weights = {
        "sample_mean": 1 / (responses * np.maximum(counts, 1)),
        "token_mean": np.full(len(counts), 1 / tokens),
        "token_sum": np.full(len(counts), 1 / responses),
    }[reduction]
    return weights.astype(np.float32)


def share(count: np.float32 | jax.Array, fraction: float) -> np.float32 | jax.Array:
    """⌈fraction · count⌉ in float32: one rounded product, so that NumPy and XLA agree."""
    return -(-(count * np.float32(fraction)) // 1)


@dataclasses.dataclass(frozen=True)
class TokenSelection:
    """Which tokens of each response are trained on; by default all.

    What is known of a response before packing decides `mask`. The entropy of π_θ is known only in
    the step: there `highest_entropy` drops tokens from the mask, but how many it leaves of each
    response is known here, and so the weights are those of the tokens that are left.
    """

    position_fraction: float = 1.0
    """The fraction of each response that may be trained on, its beginning (arXiv 2606.22600)."""
    entropy_fraction: float = 1.0
    """The fraction of these that is trained on, those of highest entropy (arXiv 2604.14084)."""
    masked_ids: tuple[int, ...] = ()
    """Token ids that are never trained on."""

    def mask(self, response_tokens: np.ndarray) -> np.ndarray:
        """Which tokens of a response may be trained on, bool [R]."""
        keep = np.ones(len(response_tokens), bool)
        for token in self.masked_ids:
            keep &= response_tokens != token
        if self.position_fraction < 1:
            keep[int(share(np.float32(len(keep)), self.position_fraction)) :] = False
        return keep

    def count(self, response_tokens: np.ndarray) -> int:
        """How many tokens of a response are trained on."""
        candidates = np.count_nonzero(self.mask(response_tokens))
        return int(share(np.float32(candidates), self.entropy_fraction))


ALL_TOKENS = TokenSelection()
"""Every response token."""
