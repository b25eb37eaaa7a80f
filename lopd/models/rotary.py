"""Rotary position embedding (arXiv 2104.09864), and its scalings for longer contexts.

Shape letters as in `lopd.models.decoder`.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from lopd.models.decoder_config import DecoderConfig, RopeScaling


def rotate(x_BTHN: jax.Array, cos_BTN: jax.Array, sin_BTN: jax.Array) -> jax.Array:
    """Queries or keys turned by their positions' angles; the halves of N are the pairs."""
    first, second = jnp.split(x_BTHN.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos_BTN[:, :, None], sin_BTN[:, :, None]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BTHN.dtype)


def rotary_tables(config: DecoderConfig, positions_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines [B, T, N/2] in float32 for absolute positions.

    With YaRN both are multiplied by its attention factor, which so scales queries and keys.
    """
    if config.rope_scaling is None:
        exponent = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim
        angles = positions_BT.astype(jnp.float32)[..., None] / config.rope_theta**exponent
        return jnp.cos(angles), jnp.sin(angles)
    frequencies = scaled_frequencies(config).astype(np.float32)
    angles = positions_BT.astype(jnp.float32)[..., None] * frequencies
    size = _attention_factor(config.rope_scaling)
    return size * jnp.cos(angles), size * jnp.sin(angles)


def scaled_frequencies(config: DecoderConfig) -> np.ndarray:
    """Radians per position of each pair of dimensions, float64 [N/2]."""
    N, scaling = config.head_dim, config.rope_scaling
    frequencies = config.rope_theta ** -(np.arange(0, N, 2) / N)
    unchanged = {"linear": _none, "llama3": _by_wavelength, "yarn": _by_dimension}
    kept = unchanged[scaling.rope_type](config, frequencies)
    return frequencies * (kept + (1 - kept) / scaling.factor)


def _none(config: DecoderConfig, frequencies: np.ndarray) -> np.ndarray:
    """Position interpolation (arXiv 2306.15595): all frequencies are divided by the factor."""
    del config
    return np.zeros_like(frequencies)


def _by_wavelength(config: DecoderConfig, frequencies: np.ndarray) -> np.ndarray:
    """Llama 3.1: frequencies that turn often within the original context keep their value.

    Below `low_freq_factor` turns a frequency is divided, from `high_freq_factor` on it is kept, and
    in between the two are mixed.
    """
    scaling = config.rope_scaling
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    return np.clip((turns - low) / (high - low), 0, 1)


def _by_dimension(config: DecoderConfig, frequencies: np.ndarray) -> np.ndarray:
    """YaRN (arXiv 2309.00071, section 3.2): as Llama 3.1, but linear in the dimension's number."""
    N, scaling = config.head_dim, config.rope_scaling

    def pair_of(turns: float) -> float:
        """The pair of dimensions, counted with fractions, that turns so often."""
        length = scaling.original_max_position_embeddings
        return N * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    first, last = pair_of(scaling.beta_fast or 32), pair_of(scaling.beta_slow or 1)
    if scaling.truncate in (None, True):
        first, last = math.floor(first), math.ceil(last)
    # The bound N - 1, though there are N / 2 pairs, is that of the authors' code and Transformers'.
    first, last = max(first, 0), min(last, N - 1)
    divided = (np.arange(len(frequencies)) - first) / ((last - first) or 0.001)
    return 1 - np.clip(divided, 0, 1)


def _attention_factor(scaling: RopeScaling) -> float:
    """What queries and keys are multiplied by (arXiv 2309.00071, equation 22)."""
    if scaling.rope_type != "yarn":
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    return 0.1 * math.log(scaling.factor) + 1
