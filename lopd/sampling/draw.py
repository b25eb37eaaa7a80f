"""From logits to a sampled token and its two log-probabilities.

Everything is a threshold on probabilities, found by bisection instead of a sort, and a draw that
needs about V / 128 + 128 random numbers instead of V.

Shape letters: B rows, V vocabulary.
"""

import dataclasses
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp

_BLOCK = 128
"""Tokens per block of the two-step draw."""


@dataclasses.dataclass(frozen=True)
class Truncation:
    """Which tokens may be drawn; each rule is applied to what the one before it kept.

    `top_k` most likely ones (0: all; arXiv 1805.04833), then the fewest of these that hold `top_p`
    of their probability (1: all; arXiv 1904.09751), then those at least `min_p` times as likely as
    the likeliest (0: all; arXiv 2407.01082). Ties with the last one kept stay.
    """

    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


@flax.struct.dataclass
class Drawn:
    """A token per row and what it was worth, each [B]."""

    token: jax.Array
    """int32"""
    logprob: jax.Array
    """float32, at temperature 1 over the whole vocabulary."""
    behaviour_logprob: jax.Array
    """float32, of the distribution drawn from: tempered, truncated, renormalised."""


def _largest_threshold(holds: Callable[[jax.Array], jax.Array], rows: int) -> jax.Array:
    """The largest float32 t in [0, 1] with `holds(t)`, per row; it must hold at 0.

    Bisection over the bit patterns, which are ordered as the floats are: exact after 30 steps.
    Each step reads the row once, where a sort of 152k numbers takes some 30 times as long on CPU.
    """
    as_float = lambda bits: jax.lax.bitcast_convert_type(bits, jnp.float32)  # noqa: E731

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) // 2
        held = holds(as_float(middle))
        return jnp.where(held, middle, low), jnp.where(held, high, middle)

    one = jax.lax.bitcast_convert_type(jnp.float32(1), jnp.int32)
    bounds = jnp.zeros(rows, jnp.int32), jnp.full(rows, one + 1)
    return as_float(jax.lax.fori_loop(0, 31, halve, bounds)[0])


def truncate(relative_BV: jax.Array, truncation: Truncation) -> jax.Array:
    """Probabilities relative to the likeliest token's, zero where `truncation` excludes them."""
    B, V = relative_BV.shape
    kept = relative_BV

    def mass(threshold, weights):
        return jnp.sum(jnp.where(relative_BV >= threshold[:, None], weights, 0), axis=-1)

    def keep(threshold):
        return jnp.where(relative_BV >= threshold, kept, 0)

    if 0 < truncation.top_k < V:
        lowest = _largest_threshold(lambda t: mass(t, 1.0) >= truncation.top_k, B)
        kept = keep(lowest[:, None])
    if truncation.top_p < 1:
        wanted = truncation.top_p * kept.sum(axis=-1)
        among = kept
        lowest = _largest_threshold(lambda t: mass(t, among) >= wanted, B)
        kept = keep(lowest[:, None])
    if truncation.min_p > 0:
        kept = keep(truncation.min_p)
    return kept


def _choose(key: jax.Array, kept_V: jax.Array, logits_V: jax.Array, greedy: jax.Array):
    """A token drawn in proportion to `kept`, or the likeliest one.

    Gumbel-max (arXiv 1411.0030) twice: for a block of tokens by the block's sum, then within the
    block. The same distribution as over all tokens at once, as the maximum of a block's perturbed
    logits is again Gumbel-distributed, around the logarithm of its sum.
    """
    kept, logits = _blocks(kept_V, 0), _blocks(logits_V, -jnp.inf)
    block_key, token_key = jax.random.split(key)
    sums = jnp.log(kept.sum(axis=-1)) + jax.random.gumbel(block_key, kept.shape[:1])
    block = jnp.argmax(jnp.where(greedy, logits.max(axis=-1), sums))
    inside = jnp.where(kept[block] > 0, logits[block], -jnp.inf)
    noise = jnp.where(greedy, 0, jax.random.gumbel(token_key, (_BLOCK,)))
    return block * _BLOCK + jnp.argmax(inside + noise)


def _blocks(array_V: jax.Array, fill: float) -> jax.Array:
    """[V] as [V / _BLOCK, _BLOCK], filled up."""
    padding = (0, -len(array_V) % _BLOCK)
    return jnp.pad(array_V, padding, constant_values=fill).reshape(-1, _BLOCK)


def draw(
    logits_BV: jax.Array, keys: jax.Array, temperature: jax.Array, truncation: Truncation
) -> Drawn:
    """Draws a token of each row.

    Args:
      logits_BV: float32.
      keys: a random key per row.
      temperature: what logits are divided by; 0 takes the likeliest token, whose behaviour
        log-probability is then 0 (the choice is certain).
      truncation: what may be drawn.
    """
    at = lambda array, token: jnp.take_along_axis(array, token[:, None], axis=1)[:, 0]  # noqa: E731
    greedy = temperature == 0
    centred = logits_BV - logits_BV.max(axis=-1, keepdims=True)
    tempered = centred / jnp.where(greedy, 1.0, temperature)
    kept = truncate(jnp.exp(tempered), truncation)
    token = jax.vmap(_choose, in_axes=(0, 0, 0, None))(keys, kept, tempered, greedy)
    token = token.astype(jnp.int32)
    behaviour = at(tempered, token) - jnp.log(kept.sum(axis=-1))
    return Drawn(
        token=token,
        logprob=at(centred, token) - jnp.log(jnp.exp(centred).sum(axis=-1)),
        behaviour_logprob=jnp.where(greedy, 0.0, behaviour),
    )
