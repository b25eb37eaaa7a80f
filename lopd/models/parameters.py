"""The one table of a decoder's parameters.

Initialisation, shapes, shardings, import and export, the layout for decoding, casts and weight
decay follow from it: a parameter is one row, and nobody guesses from a leaf's name or rank.
"""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict
from jax.sharding import PartitionSpec

from lopd.models.decoder_config import DecoderConfig

Params = dict[str, Any]
"""A tree of nested dicts; layers are stacked on the first axis of their leaves."""
Path = tuple[str, ...]
"""The keys that lead to a leaf."""


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One leaf of the parameters; of a stacked one, what a single layer has."""

    axes: tuple[str, ...]
    """Logical names (`lopd.machine.sharding.RULES`), which also give the sizes."""
    kind: Literal["matrix", "norm", "bias", "embedding"]
    """Norm scales stay in float32 where the rest of a layer is cast to the compute type."""
    name: str
    """In Hugging Face's files; each {} counts along a leading axis: layers, then experts."""
    contracted: int = 0
    """Over how many of its first axes, that of the experts aside, a product sums. Such a matrix
    lies in files as PyTorch's [out, in]."""
    output_first: bool = False
    """Whether decoding on CPU stores it as `projection.OutputFirst`."""
    stacked: bool = True
    """Whether there is one per layer, stacked on a first axis `layers`."""
    shape: tuple[int, ...] = ()
    """Of one layer; `parameter_table` fills it in."""

    @property
    def decays(self) -> bool:
        """Whether weight decay pulls it to zero: matrices (an untied head too) and no others."""
        return self.kind == "matrix"

    @property
    def listed(self) -> int:
        """How many first axes of a layer's part files spread over tensors: 1 for experts."""
        return self.name.count("{}") - self.stacked

    @property
    def file_axes(self) -> tuple[tuple[int, ...], ...]:
        """For each axis of a tensor in a file, our axes that make it up (numbers in `axes`)."""
        own = tuple(range(self.listed, len(self.axes)))
        if self.contracted:
            return own[self.contracted :], own[: self.contracted]
        return (own,) if self.kind == "bias" else tuple((axis,) for axis in own)

    @property
    def file_shape(self) -> tuple[int, ...]:
        """The shape of a tensor in a file."""
        return tuple(math.prod(self.shape[axis] for axis in group) for group in self.file_axes)

    def initializer(self, config: DecoderConfig) -> jax.nn.initializers.Initializer:
        """normal(0, initializer_range) for matrices and embeddings, ones for norms, zero biases."""
        if self.kind == "norm":
            return jax.nn.initializers.ones
        if self.kind == "bias":
            return jax.nn.initializers.zeros
        return jax.nn.initializers.normal(config.initializer_range)


def _norm(name: str, axis: str) -> Parameter:
    return Parameter((axis,), "norm", f"model.layers.{{}}.{name}.weight")


def _bias(name: str, heads: str) -> Parameter:
    return Parameter((heads, "head_dim"), "bias", f"model.layers.{{}}.{name}.bias")


def _dense(name: str, *axes: str, contracted: int = 1) -> Parameter:
    name = f"model.layers.{{}}.{name}.weight"
    return Parameter(axes, "matrix", name, contracted, output_first=True)


def _routed(name: str, *axes: str) -> Parameter:
    return Parameter(axes, "matrix", f"model.layers.{{}}.mlp.{name}.weight", contracted=1)


_OUTSIDE = {
    ("embed",): Parameter(
        ("vocab", "embed"), "embedding", "model.embed_tokens.weight", stacked=False
    ),
    ("final_norm",): Parameter(("norm",), "norm", "model.norm.weight", stacked=False),
}
_HEAD = {
    ("lm_head",): Parameter(("vocab", "embed"), "matrix", "lm_head.weight", stacked=False),
}
_LAYER = {
    ("layers", "input_norm"): _norm("input_layernorm", "norm"),
    ("layers", "post_attention_norm"): _norm("post_attention_layernorm", "norm"),
    ("layers", "attention", "q"): _dense("self_attn.q_proj", "embed", "heads", "head_dim"),
    ("layers", "attention", "k"): _dense("self_attn.k_proj", "embed", "kv_heads", "head_dim"),
    ("layers", "attention", "v"): _dense("self_attn.v_proj", "embed", "kv_heads", "head_dim"),
    ("layers", "attention", "o"): _dense(
        "self_attn.o_proj", "heads", "head_dim", "embed", contracted=2
    ),
}
_QK_NORM = {
    ("layers", "attention", "q_norm"): _norm("self_attn.q_norm", "head_dim"),
    ("layers", "attention", "k_norm"): _norm("self_attn.k_norm", "head_dim"),
}
_ATTENTION_BIAS = {
    ("layers", "attention", "q_bias"): _bias("self_attn.q_proj", "heads"),
    ("layers", "attention", "k_bias"): _bias("self_attn.k_proj", "kv_heads"),
    ("layers", "attention", "v_bias"): _bias("self_attn.v_proj", "kv_heads"),
}
_MLP = {
    ("layers", "mlp", "gate"): _dense("mlp.gate_proj", "embed", "mlp"),
    ("layers", "mlp", "up"): _dense("mlp.up_proj", "embed", "mlp"),
    ("layers", "mlp", "down"): _dense("mlp.down_proj", "mlp", "embed"),
}
_EXPERTS = {
    ("layers", "mlp", "router"): _routed("gate", "embed", "expert"),
    ("layers", "mlp", "gate"): _routed("experts.{}.gate_proj", "expert", "embed", "mlp"),
    ("layers", "mlp", "up"): _routed("experts.{}.up_proj", "expert", "embed", "mlp"),
    ("layers", "mlp", "down"): _routed("experts.{}.down_proj", "expert", "mlp", "embed"),
}

HEAD_NAME = _HEAD[("lm_head",)].name
"""The output matrix in Hugging Face's files; some files of tied models repeat the embedding so."""


def parameters(config: DecoderConfig) -> dict[Path, Parameter]:
    """The table of a model, by path in the parameter tree, in the tree's order."""
    rows = _OUTSIDE | _LAYER | (_EXPERTS if config.num_experts else _MLP)
    rows |= _HEAD if not config.tie_word_embeddings else {}
    rows |= _QK_NORM if config.qk_norm else {}
    rows |= _ATTENTION_BIAS if config.attention_bias else {}
    sizes = {
        "vocab": config.vocab_size,
        "embed": config.hidden_size,
        "norm": config.hidden_size,
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "mlp": config.moe_intermediate_size if config.num_experts else config.intermediate_size,
        "expert": config.num_experts,
    }
    shape = lambda row: tuple(sizes[axis] for axis in row.axes)  # noqa: E731
    return {path: dataclasses.replace(rows[path], shape=shape(rows[path])) for path in sorted(rows)}


def parameter_table(config: DecoderConfig) -> Params:
    """`parameters` as a tree like the model's."""
    return unflatten_dict(parameters(config))


def abstract_params(config: DecoderConfig) -> Params:
    """Shapes and types of the (stacked, float32) parameters, without computing them."""

    def leaf(row: Parameter) -> jax.ShapeDtypeStruct:
        leading = (config.num_hidden_layers,) if row.stacked else ()
        return jax.ShapeDtypeStruct(leading + row.shape, jnp.float32)

    return jax.tree.map(leaf, parameter_table(config))


def logical_axes(config: DecoderConfig) -> Params:
    """The logical axis names of every (stacked) parameter, as a tree of PartitionSpec."""
    names = lambda row: PartitionSpec(*("layers",) * row.stacked, *row.axes)  # noqa: E731
    return jax.tree.map(names, parameter_table(config))


_ALL = _OUTSIDE | _HEAD | _LAYER | _QK_NORM | _ATTENTION_BIAS | _MLP | _EXPERTS


def decay_mask(params: Params) -> Params:
    """Which leaves weight decay pulls to zero, as a tree of bools like `params`.

    Args:
      params: the parameters of any decoder, or a part of them under their own paths, or adapters
        under those of their matrices.

    Raises:
      KeyError: for a leaf that is not in the table.
    """

    def decays(path, leaf) -> bool:
        del leaf
        # Of an adapter, what names its halves is an attribute and no key: it decays as its matrix.
        keys = (key.key for key in path if isinstance(key, jax.tree_util.DictKey))
        return _ALL[tuple(keys)].decays

    return jax.tree_util.tree_map_with_path(decays, params)
