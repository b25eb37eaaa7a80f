"""Low-rank adapters (arXiv 2106.09685): matrices W + scale · A B, of which A and B are trained.

An adapter stands under the path of its matrix. Trained parameters are a tree of adapters, frozen
ones the base model's; together, in one tree, a matrix and its adapter are a `LowRank`.
"""

import dataclasses
import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding

from lopd.config.settings import ADAPTED_MODULES, LoraSettings
from lopd.errors import UserError
from lopd.machine.sharding import spec
from lopd.models.decoder_config import DecoderConfig
from lopd.models.parameters import Parameter, Params, Path, parameters
from lopd.models.projection import StoredWeight, project


@flax.struct.dataclass
class Adapter:
    """A and B of one matrix, or of that of every layer with a leading axis."""

    a: jax.Array
    """The matrix's contracted axes, then the rank."""
    b: jax.Array
    """The rank, then the matrix's other axes."""
    alpha: float = flax.struct.field(pytree_node=False)
    """A B is multiplied by alpha / rank."""

    @property
    def scale(self) -> float:
        """What A B is multiplied by."""
        return self.alpha / self.a.shape[-1]


@flax.struct.dataclass
class LowRank(StoredWeight):
    """A matrix with its adapter."""

    kernel: jax.Array
    """The matrix as it was."""
    adapter: Adapter

    def product(self, x: jax.Array) -> jax.Array:
        """x W + scale · (x A) B."""
        kernel, a, b = (w.astype(x.dtype) for w in (self.kernel, self.adapter.a, self.adapter.b))
        contracted = a.ndim - 1
        inner = project(x, a, contracted) * self.adapter.scale
        return project(x, kernel, contracted) + project(inner, b)

    def merged(self) -> jax.Array:
        """W + scale · A B of one layer, in float32."""
        product = jnp.tensordot(self.adapter.a, self.adapter.b, 1, precision="highest")
        return self.kernel.astype(jnp.float32) + self.adapter.scale * product


def is_stored(x: Any) -> bool:
    """For `is_leaf`: whether this is one weight, of several arrays."""
    return isinstance(x, StoredWeight)


def merged_layer(weight: jax.Array | LowRank) -> jax.Array:
    """One layer's weight as one array; an adapted matrix in float32."""
    return weight.merged() if isinstance(weight, LowRank) else weight


@jax.jit
def merged_params(params: Params) -> Params:
    """Stacked parameters without adapters: merged into their matrices, and these in float32."""

    def merge(weight):
        return jax.vmap(merged_layer)(weight) if isinstance(weight, LowRank) else weight

    return jax.tree.map(merge, params, is_leaf=is_stored)


# Trees


def adapted(base: Params, adapters: Params) -> Params:
    """The parameters of a model with its adapters: `base`, with a `LowRank` wherever one is."""
    if isinstance(adapters, Adapter):
        return LowRank(base, adapters)
    return {**base, **{name: adapted(base[name], below) for name, below in adapters.items()}}


def base_of(params: Params) -> Params:
    """The parameters without adapters, which are left out."""
    kernel = lambda x: x.kernel if isinstance(x, LowRank) else x  # noqa: E731
    return jax.tree.map(kernel, params, is_leaf=is_stored)


def adapters_of(params: Params) -> Params:
    """The adapters alone, under the paths of their matrices; {} if there are none."""
    flat = {path: x.adapter for path, x in flatten_dict(params).items() if isinstance(x, LowRank)}
    return unflatten_dict(flat)


def shape_of(config: DecoderConfig, params: Params) -> LoraSettings | None:
    """Rank, alpha and single matrices of the adapters among a model's parameters, if there are."""
    flat = flatten_dict(adapters_of(params))
    for adapter in flat.values():
        rows = parameters(config)
        modules = {_module(rows[path]) for path in flat}
        targets = tuple(name for name in ADAPTED_MODULES if name in modules)
        return LoraSettings(adapter.a.shape[-1], adapter.alpha, targets)
    return None


def adapter_weights(tree: Any) -> int:
    """How many numbers the adapters in a tree have together."""
    leaves = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, Adapter))
    return sum(x.a.size + x.b.size for x in leaves if isinstance(x, Adapter))


# Shapes

_OF_ATTENTION = {"attention", "q_proj", "k_proj", "v_proj", "o_proj"}


@dataclasses.dataclass(frozen=True)
class AdapterRows:
    """The two halves of a matrix's adapter, as rows of the table of parameters."""

    a: Parameter
    """From the matrix's inputs to the rank."""
    b: Parameter
    """From the rank to the matrix's outputs."""


def adapter_rows(config: DecoderConfig, lora: LoraSettings) -> dict[Path, AdapterRows]:
    """The adapters of a model, by the path of their matrix, in the tree's order.

    Names are those of PEFT's files, and so is how a tensor lies there: [rank, in] and [out, rank].

    Raises:
      UserError: for experts, which have none.
    """
    if config.num_experts and not {*lora.targets} <= _OF_ATTENTION:
        raise UserError(
            f"student.lora.targets={lora.targets!r}: a mixture of experts can have adapters on "
            "attention only, set student.lora.targets=('attention',)"
        )
    found = {}
    for path, row in parameters(config).items():
        if row.stacked and row.kind == "matrix" and {path[1], _module(row)} & {*lora.targets}:
            kept = row.contracted
            name = "base_model.model." + row.name.removesuffix("weight")
            found[path] = AdapterRows(
                Parameter(
                    (*row.axes[:kept], "rank"),
                    "matrix",
                    f"{name}lora_A.weight",
                    contracted=kept,
                    shape=(*row.shape[:kept], lora.rank),
                ),
                Parameter(
                    ("rank", *row.axes[kept:]),
                    "matrix",
                    f"{name}lora_B.weight",
                    contracted=1,
                    shape=(lora.rank, *row.shape[kept:]),
                ),
            )
    return found


def count_weights(config: DecoderConfig, lora: LoraSettings) -> int:
    """How many numbers a model's adapters have, of all layers together."""
    rows = adapter_rows(config, lora).values()
    one_layer = sum(math.prod(row.shape) for pair in rows for row in (pair.a, pair.b))
    return config.num_hidden_layers * one_layer


def _module(row: Parameter) -> str:
    return row.name.split(".")[-2]


def abstract_adapters_on(config: DecoderConfig, lora: LoraSettings, mesh: Mesh) -> Params:
    """Shapes and shardings of a model's float32 adapters, which lie as their matrices do."""

    def leaf(row: Parameter) -> jax.ShapeDtypeStruct:
        shape = (config.num_hidden_layers, *row.shape)
        sharding = NamedSharding(mesh, spec("layers", *row.axes))
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)

    rows = adapter_rows(config, lora)
    return unflatten_dict(
        {path: Adapter(leaf(row.a), leaf(row.b), lora.alpha) for path, row in rows.items()}
    )


def init_adapters(config: DecoderConfig, lora: LoraSettings, mesh: Mesh, key: jax.Array) -> Params:
    """Adapters that change nothing yet: B is zero, A uniform within ± 1/√(inputs), as in PEFT."""
    target = abstract_adapters_on(config, lora, mesh)

    def init(key):
        flat = flatten_dict(target)
        keys = jax.random.split(key, len(flat))
        return unflatten_dict(
            {
                path: Adapter(
                    _uniform(keys[i], leaf.a.shape),
                    jnp.zeros(leaf.b.shape, leaf.b.dtype),
                    leaf.alpha,
                )
                for i, (path, leaf) in enumerate(flat.items())
            }
        )

    return jax.jit(init, out_shardings=jax.tree.map(lambda x: x.sharding, target))(key)


def _uniform(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    bound = math.prod(shape[1:-1]) ** -0.5
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)
