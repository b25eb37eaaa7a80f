"""The shape and numerics of a decoder, with the field names of Hugging Face's `config.json`."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from lopd.errors import UserError

ROPE_FIELDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "linear": ((), ()),
    "llama3": (("original_max_position_embeddings", "low_freq_factor", "high_freq_factor"), ()),
    "yarn": (
        ("original_max_position_embeddings",),
        ("beta_fast", "beta_slow", "attention_factor", "truncate"),
    ),
}
"""rope_type → the fields that it needs beside `factor`, and those that it may have."""


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are changed for longer contexts; see `lopd.models.rotary`.

    Fields that a type does not use are None, and so are those of YaRN that keep their default.
    """

    rope_type: str
    """linear, llama3 (Llama 3.1 and later) or yarn."""
    factor: float
    """By how much the context grows."""
    original_max_position_embeddings: int | None = None
    """Longest position before the change."""
    low_freq_factor: float | None = None
    """Wavelengths longer than the original context over this are stretched by the whole factor."""
    high_freq_factor: float | None = None
    """Wavelengths shorter than the original context over this stay."""
    beta_fast: float | None = None
    """32 by default."""
    beta_slow: float | None = None
    """1 by default."""
    attention_factor: float | None = None
    """Factor of queries and keys; 0.1 · ln(factor) + 1 by default."""
    truncate: bool | None = None
    """Whether the range of changed dimensions is rounded to whole ones; true by default."""

    def __post_init__(self):
        if not isinstance(self.rope_type, str) or self.rope_type not in ROPE_FIELDS:
            raise UserError(
                f"model: rope_type={self.rope_type!r} is not implemented; there are "
                f"{', '.join(ROPE_FIELDS)}, and no rope_scaling for none"
            )
        needed, optional = ROPE_FIELDS[self.rope_type]
        names = [field.name for field in dataclasses.fields(self)]
        stated = [name for name in names if getattr(self, name) is not None]
        for name in ("factor", *needed):
            if name not in stated:
                raise UserError(f"model: rope_type={self.rope_type} needs rope_scaling.{name}")
        for name in stated:
            value = getattr(self, name)
            if name not in ("rope_type", "factor", *needed, *optional):
                raise UserError(f"model: rope_type={self.rope_type} does not use {name}={value!r}")
            if name == "truncate" and not isinstance(value, bool):
                raise UserError(f"model: rope_scaling.truncate={value!r} must be true or false")
            if name not in ("rope_type", "truncate") and (
                isinstance(value, bool)
                or not isinstance(value, int | float)
                or not 0 < value < 2**31
            ):
                raise UserError(f"model: rope_scaling.{name}={value!r} must be a positive number")
        if self.factor < 1:
            raise UserError(f"model: rope_scaling.factor={self.factor} must be at least 1")
        for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
            below, above = getattr(self, low), getattr(self, high)
            if below is not None and above is not None and below >= above:
                raise UserError(f"model: {low}={below} must be less than {high}={above}")


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Shape and numerics of a decoder, with the field names of Hugging Face's `config.json`.

    `num_experts` of 0 is a dense model; otherwise every layer is a mixture of experts, and
    `intermediate_size` goes unused. `dtype` is the compute type; parameters are held in float32
    unless a caller casts them. The defaults are Qwen3's; `lopd.checkpoints.hf_config.FAMILIES`
    says which flags each family has.
    """

    vocab_size: int
    """Rows of the embedding, padding included."""
    hidden_size: int
    """Width of the residual stream."""
    intermediate_size: int
    num_hidden_layers: int
    """Blocks of attention and MLP."""
    num_attention_heads: int
    """Of queries."""
    num_key_value_heads: int
    """Of keys and values; each serves a group of query heads."""
    head_dim: int
    """Of each head; need not be hidden_size / heads."""
    rope_theta: float = 1e6
    """Base of the rotary frequencies."""
    rms_norm_eps: float = 1e-6
    """Added to the mean square in every RMSNorm."""
    tie_word_embeddings: bool = True
    """Whether the head is the embedding."""
    max_position_embeddings: int = 40960
    """Positions that the model was trained for."""
    initializer_range: float = 0.02
    """Standard deviation of random weights."""
    num_experts: int = 0
    num_experts_per_tok: int = 0
    """Experts that each token is sent to."""
    moe_intermediate_size: int = 0
    """Width of one expert."""
    norm_topk_prob: bool = False
    """Whether the chosen experts' weights are made to sum to 1."""
    router_aux_loss_coef: float = 0.001
    """Of the load-balancing loss in SFT."""
    dtype: str = "float32"
    qk_norm: bool = True
    """RMSNorm on each head's queries and keys, as Qwen3 has it."""
    attention_bias: bool = False
    """Biases on queries, keys and values (not on the output), as Qwen2 has them."""
    rope_scaling: RopeScaling | None = None
    """Also taken as a mapping, which is what settings and manifests hold."""

    def __post_init__(self):
        scaling = self.rope_scaling
        if scaling is not None and not isinstance(scaling, RopeScaling):
            object.__setattr__(self, "rope_scaling", _rope_scaling(scaling))
        for field in dataclasses.fields(self):
            _check_value(field.name, field.type, getattr(self, field.name))
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"model: num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise UserError(f"model: head_dim={self.head_dim} must be even (rotary embedding)")
        if self.num_experts and not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise UserError(
                f"model: num_experts_per_tok={self.num_experts_per_tok} must lie between 1 and "
                f"num_experts={self.num_experts}"
            )
        if self.num_experts and self.moe_intermediate_size < 1:
            raise UserError("model: a mixture of experts needs moe_intermediate_size")

    @property
    def compute_dtype(self) -> jnp.dtype:
        """The type of activations and matmul operands."""
        return jnp.dtype(self.dtype)


_POSITIVE = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"),
    *("num_attention_heads", "num_key_value_heads", "max_position_embeddings"),
    *("rope_theta", "rms_norm_eps"),
)
_DTYPES = ("float32", "bfloat16")


def _check_value(name: str, kind: Any, value: Any) -> None:
    """Refuses a value of a field that is of another type, or outside what the field may be."""
    wanted = {int: "a whole number", float: "a number", bool: "true or false", str: "a name"}
    if kind not in wanted:
        return
    allowed = (int, float) if kind is float else (kind,)
    if not isinstance(value, allowed) or (isinstance(value, bool) and kind is not bool):
        raise UserError(f"model: {name}={value!r} must be {wanted[kind]}")
    if name == "dtype" and value not in _DTYPES:
        raise UserError(f"model: dtype={value!r} must be one of {', '.join(_DTYPES)}")
    if kind in (int, float) and not -(2**31) < value < 2**31:  # nor NaN
        raise UserError(f"model: {name}={value} must be a finite number below 2^31")
    if name in _POSITIVE and value <= 0:
        raise UserError(f"model: {name}={value} must be positive")
    if kind in (int, float) and value < 0:
        raise UserError(f"model: {name}={value} must not be negative")


def _rope_scaling(values: Any) -> RopeScaling | None:
    """From a mapping (an empty one says nothing is scaled)."""
    if not hasattr(values, "keys"):
        raise UserError(f"model: rope_scaling={values!r} must be a mapping, with a rope_type")
    try:
        return RopeScaling(**values) if len(values) else None
    except TypeError as error:
        raise UserError(f"model: rope_scaling: {error}") from error
