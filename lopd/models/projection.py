"""Products of activations and weights, as XLA computes them fastest.

On TPU and GPU that is what it makes of a plain product. On CPU the orientation of the operands
decides: of 200 GFLOP/s (2 cores), 64 rows times a weight [640, 1920] reach 148, the weight as
[1920, 640] on the left side of the product 185.
"""

import abc
import math

import flax.struct
import jax
import jax.numpy as jnp

from lopd.machine.sharding import current_platform


class StoredWeight(abc.ABC):
    """A matrix that is stored otherwise than as one array, and knows how to multiply.

    It is a tree of arrays and stands in the place of the matrix among the parameters.
    """

    @abc.abstractmethod
    def product(self, x: jax.Array) -> jax.Array:
        """The product over the last axes of `x` and the first of the matrix, in `x`'s type."""


@flax.struct.dataclass
class OutputFirst(StoredWeight):
    """A weight whose output axes come first, for products of few rows on CPU."""

    array: jax.Array
    """The axes of the output, then the contracted ones."""
    contracted: int = flax.struct.field(pytree_node=False)
    """How many axes are contracted."""

    def product(self, x: jax.Array, dtype: jnp.dtype | None = None) -> jax.Array:
        """The product over the last axes of `x` and of the weight; in `x`'s type by default."""
        kept = self.array.ndim - self.contracted
        size = math.prod(self.array.shape[kept:])
        rows, columns = x.shape[: x.ndim - self.contracted], self.array.shape[:kept]
        weight, x = self.array.reshape(-1, size), x.reshape(-1, size)
        contract_last = (((1,), (1,)), ((), ()))
        product = jax.lax.dot_general(weight, x, contract_last, preferred_element_type=dtype)
        # Without barriers XLA would turn the product round again, or compute what follows from
        # the transposed array, row by row.
        product = jax.lax.optimization_barrier(jax.lax.optimization_barrier(product).T)
        return product.reshape(*rows, *columns)


def project(x: jax.Array, kernel: jax.Array | StoredWeight, contracted: int = 1) -> jax.Array:
    """The product over the last `contracted` axes of `x` and the first of `kernel`."""
    if isinstance(kernel, StoredWeight):
        return kernel.product(x)
    if current_platform() != "cpu":
        return jnp.tensordot(x, kernel, contracted)
    # The gradient's product would take operands that XLA first transposes, in the loop that
    # computes them: as slow as the product itself. Behind barriers it reads them as they lie.
    out_shape = x.shape[: x.ndim - contracted] + kernel.shape[contracted:]
    size = math.prod(kernel.shape[:contracted])
    x, kernel = jax.lax.optimization_barrier(x.reshape(-1, size)), kernel.reshape(size, -1)
    return jax.lax.optimization_barrier(x @ kernel).reshape(out_shape)


def project_to_vocabulary(hidden_BD: jax.Array, head_VD: jax.Array) -> jax.Array:
    """Float32 logits [B, V] of few rows."""
    if current_platform() == "cpu":
        return OutputFirst(head_VD, 1).product(hidden_BD, jnp.float32)
    return jnp.einsum("bd,vd->bv", hidden_BD, head_VD, preferred_element_type=jnp.float32)
