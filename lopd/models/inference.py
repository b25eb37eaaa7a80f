"""The parameters as repeated decoding reads them."""

from collections.abc import Callable

import jax
from jax.sharding import NamedSharding, PartitionSpec

from lopd.models import decoder
from lopd.models.low_rank import merged_layer
from lopd.models.parameters import Parameter, parameter_table
from lopd.models.projection import OutputFirst


def inference_params(
    config: decoder.DecoderConfig, params: decoder.Params, shardings: decoder.Params | None = None
) -> decoder.Params:
    """Parameters for repeated decoding; see `to_inference_params`."""
    return to_inference_params(config, shardings)(params)


def to_inference_params(
    config: decoder.DecoderConfig, shardings: decoder.Params | None = None
) -> Callable[[decoder.Params], decoder.Params]:
    """What makes parameters for repeated decoding: compute type, one dict per layer, no stack.

    It is compiled once, for weights that change. Results may share memory with what they were made
    of: donating that ends them.

    Separate layers let a cached forward update each layer's key/value buffers in place, which a
    scan over stacked layers cannot (it would copy the whole cache every token). On CPU what
    the table calls `output_first` is stored so. Adapters are merged into their matrices, in float32
    and one layer at a time, before anything is rounded.

    Args:
      config: the model's shape.
      shardings: where the results are to lie, as a tree like `params`; by default where jit puts
        them.
    """
    platform = jax.default_backend()
    if shardings:
        platform = shardings["embed"].mesh.devices.flat[0].platform

    rows = parameter_table(config)["layers"]

    def one_layer(stacked, take):
        """Of each leaf `take(leaf, order)`, the order that its axes are stored in."""

        def store(row: Parameter, leaf):
            contracted = row.contracted if platform == "cpu" and row.output_first else 0
            stored = take(leaf, (*range(contracted, len(row.axes)), *range(contracted)))
            return OutputFirst(stored, contracted) if contracted else stored

        return jax.tree.map(store, rows, stacked)

    def convert(params):
        cast = lambda x: x.astype(config.compute_dtype)  # noqa: E731

        def weights(i):
            def take(stacked, order):
                one = merged_layer(jax.tree.map(lambda x: x[i], stacked))
                return cast(one).transpose(order)

            return take

        layers = (one_layer(params["layers"], weights(i)) for i in range(config.num_hidden_layers))
        outside = {name: cast(x) for name, x in params.items() if name != "layers"}
        return {**outside, "layers": tuple(layers)}

    def sharding(x, order):
        return NamedSharding(x.mesh, PartitionSpec(*(x.spec[1 + axis] for axis in order)))

    if shardings:
        layer = one_layer(shardings["layers"], sharding)
        shardings = {**shardings, "layers": (layer,) * config.num_hidden_layers}
    return jax.jit(convert, out_shardings=shardings)
