"""Mixture of experts as pure functions: routing, grouped experts, load balancing.

No token is dropped: tokens are sorted by expert, and each expert multiplies its own contiguous
group, whatever its size.

Shape letters: B batch, T length, N tokens, D hidden, E experts, J experts per token, F expert
intermediate size.
"""

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from lopd.machine.sharding import ROWS, current_mesh, divides, spec


@flax.struct.dataclass
class Routing:
    """Which experts each token goes to, and how much each counts; leading axes as the tokens'."""

    probabilities: jax.Array
    """float32 [..., E], softmax over all experts."""
    experts: jax.Array
    """int32 [..., J], the chosen experts."""
    weights: jax.Array
    """float32 [..., J], what the chosen experts' outputs are multiplied by."""


@flax.struct.dataclass
class RouterLoad:
    """Sums over the counted tokens of one layer (or, with a leading axis, of every layer)."""

    assignments_E: jax.Array
    """float32, how often each expert was chosen."""
    probabilities_E: jax.Array
    """float32, summed router probability of each expert; the only part with a gradient."""
    tokens: jax.Array
    """float32, how many tokens were counted."""


def route(logits: jax.Array, experts_per_token: int, normalise: bool) -> Routing:
    """Softmax over all experts in float32, then the best few (Qwen3: best 8 of 128).

    Args:
      logits: router logits [..., E].
      experts_per_token: J.
      normalise: make the chosen weights of each token sum to one (`norm_topk_prob`).
    """

    def choose(logits):
        probabilities = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
        weights, experts = jax.lax.top_k(probabilities, experts_per_token)
        if normalise:
            weights /= weights.sum(axis=-1, keepdims=True)
        return Routing(probabilities, experts, weights)

    # The partitioner cannot split top_k: it would gather the probabilities of all tokens.
    mesh = _mesh_of_rows(logits)
    return (jax.shard_map(choose, mesh=mesh, in_specs=ROWS, out_specs=ROWS) if mesh else choose)(
        logits
    )


def _mesh_of_rows(x: jax.Array) -> AbstractMesh | None:
    """The mesh that the program is traced for, if it has devices to split the rows of `x` over."""
    mesh = current_mesh()
    return mesh if mesh is not None and mesh.size > 1 and divides(mesh, x, "rows") else None


def _local_experts(x_BTD, experts_BTJ, weights_BTJ, gate_EDF, up_EDF, down_EFD) -> jax.Array:
    """The weighted sum over each token's experts, float32 [B, T, D]."""
    J = experts_BTJ.shape[-1]
    expert_of = experts_BTJ.reshape(-1)
    order = jnp.argsort(expert_of, stable=True)
    group_sizes = jnp.bincount(expert_of, length=gate_EDF.shape[0]).astype(jnp.int32)
    rows = x_BTD.reshape(-1, x_BTD.shape[-1])[order // J]
    gate = jax.lax.ragged_dot(rows, gate_EDF, group_sizes)
    up = jax.lax.ragged_dot(rows, up_EDF, group_sizes)
    out = jax.lax.ragged_dot(jax.nn.silu(gate) * up, down_EFD, group_sizes)
    by_token = out[jnp.argsort(order)].reshape(*experts_BTJ.shape, -1)
    return jnp.einsum("btjd,btj->btd", by_token, weights_BTJ)


def _varying(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Lets `x` differ along mesh axes where it is the same so far: its gradient is summed here."""
    return jax.lax.pcast(x, axes, to="varying")


def _experts_on_a_shard(x_BTD, experts_BTJ, weights_BTJ, gate, up, down) -> jax.Array:
    """What one device of a mesh does: its own tokens, all of D, its part of F."""
    x_BTD, weights_BTJ = (_varying(a, ("tensor",)) for a in (x_BTD, weights_BTJ))
    # Said before the gather, so that gradients are scattered over fsdp before data adds them up.
    gate, up, down = (_varying(w, ("data",)) for w in (gate, up, down))
    gate, up = (jax.lax.all_gather(w, "fsdp", axis=1, tiled=True) for w in (gate, up))
    down = jax.lax.all_gather(down, "fsdp", axis=2, tiled=True)
    out = _local_experts(x_BTD, experts_BTJ, weights_BTJ, gate, up, down)
    return jax.lax.psum(out, "tensor")


def experts_mlp(
    x_BTD: jax.Array,
    routing: Routing,
    gate_EDF: jax.Array,
    up_EDF: jax.Array,
    down_EFD: jax.Array,
) -> jax.Array:
    """The weighted sum [B, T, D] of each token's SwiGLU experts, added up in float32.

    Traced for a mesh (`sharding.on_mesh`), every device sorts and multiplies its own tokens only:
    they stay where their row is, and each device gathers the experts' D over fsdp, as FSDP does
    with a dense layer, and holds its own part of F over tensor. So every device works the same
    whatever the router does, and no token is dropped. What it costs: 3·E·D·F weights a layer cross
    the fsdp axis, where sending tokens to their experts would move about 2·J·D numbers a token;
    for Qwen3-30B-A3B (E = 128, F = 768, J = 8) that is less only from 18,000 tokens a device and
    pass on.
    """
    experts_of = _local_experts
    if mesh := _mesh_of_rows(x_BTD):
        columns, rows = spec("expert", "embed", "mlp"), spec("expert", "mlp", "embed")
        experts_of = jax.shard_map(
            _experts_on_a_shard,
            mesh=mesh,
            in_specs=(ROWS, ROWS, ROWS, columns, columns, rows),
            out_specs=ROWS,
        )
    out = experts_of(x_BTD, routing.experts, routing.weights, gate_EDF, up_EDF, down_EFD)
    return out.astype(x_BTD.dtype)


def router_load(routing: Routing, counted: jax.Array) -> RouterLoad:
    """The load that the tokens where `counted` [...] is true put on each expert, over the mesh."""
    E = routing.probabilities.shape[-1]
    counted = counted.astype(jnp.float32)
    chosen = jax.nn.one_hot(routing.experts, E, dtype=jnp.float32).sum(axis=-2)
    return RouterLoad(
        assignments_E=jnp.einsum("...,...e->e", counted, chosen),
        probabilities_E=jnp.einsum("...,...e->e", counted, routing.probabilities),
        tokens=counted.sum(),
    )


def load_balancing_loss(load: RouterLoad) -> jax.Array:
    """E · Σ_e f_e · P_e over all tokens of all layers (arXiv 2101.03961, equations 4 to 6).

    f_e is the mean number of times expert e is chosen by a token, P_e its mean probability. The
    value is J when the load is even, and as in Transformers the layers are pooled, not averaged.

    Args:
      load: of every layer, with a leading axis.
    """
    tokens = jnp.maximum(load.tokens.sum(), 1.0)
    chosen = load.assignments_E.sum(axis=0) / tokens
    probability = load.probabilities_E.sum(axis=0) / tokens
    return chosen.shape[0] * jnp.sum(chosen * probability)
