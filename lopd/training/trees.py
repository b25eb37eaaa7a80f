"""The two parameter trees of a training: what is trained, and what stays as it is.

Gradients, moments and checkpoints are of the trainable tree alone. The forward pass sees both.
"""

from typing import Any

from lopd.models.decoder import Params
from lopd.models.low_rank import Adapter, LowRank, adapters_of, base_of


def trainable_and_frozen(params: Params) -> tuple[Params, Params]:
    """The two trees of a model: adapters and the rest where there are any, else all and nothing."""
    adapters = adapters_of(params)
    return (adapters, base_of(params)) if adapters else (params, {})


def merged(trainable: Params, frozen: Params | None) -> Params:
    """The parameters of the model: the disjoint union of two trees of nested dicts.

    A matrix in one and its adapter in the other are a `LowRank`.

    Raises:
      ValueError: naming a parameter that is in both.
    """
    return _merged(trainable, frozen, ()) if frozen else trainable


def _merged(a: Any, b: Any, path: tuple[str, ...]) -> Any:
    if isinstance(a, Adapter):
        return LowRank(b, a)
    if not (isinstance(a, dict) and isinstance(b, dict)):
        raise ValueError(f"{'/'.join(path)} is trainable and frozen")
    both = {name: _merged(a[name], b[name], (*path, name)) for name in a.keys() & b.keys()}
    return {**a, **b, **both}


def part_of(tree: Any, like: Any) -> Any:
    """The leaves of a tree that are in `like` too, as the tree that `like` is."""
    if isinstance(tree, LowRank):
        return tree.adapter if isinstance(like, Adapter) else tree.kernel
    if not isinstance(like, dict):
        return tree
    return {name: part_of(tree[name], below) for name, below in like.items()}
