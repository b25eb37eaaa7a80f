"""Mixture of experts as pure functions: routing, grouped experts, load balancing.

No token is dropped: tokens are sorted by expert, and each expert multiplies its own contiguous
group, whatever its size.

Shape letters: N tokens, D hidden, E experts, J experts per token, F expert intermediate size.
"""

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class Routing:
    """Which experts each token goes to, and how much each counts."""

    probabilities_NE: jax.Array
    """float32, softmax over all experts."""
    experts_NJ: jax.Array
    """int32, the chosen experts."""
    weights_NJ: jax.Array
    """float32, what the chosen experts' outputs are multiplied by."""


@flax.struct.dataclass
class RouterLoad:
    """Sums over the counted tokens of one layer (or, with a leading axis, of every layer)."""

    assignments_E: jax.Array
    """float32, how often each expert was chosen."""
    probabilities_E: jax.Array
    """float32, summed router probability of each expert; the only part with a gradient."""
    tokens: jax.Array
    """float32, how many tokens were counted."""


def route(logits_NE: jax.Array, experts_per_token: int, normalise: bool) -> Routing:
    """Softmax over all experts in float32, then the best few (Qwen3: best 8 of 128).

    Args:
      logits_NE: router logits.
      experts_per_token: J.
      normalise: make the chosen weights of each token sum to one (`norm_topk_prob`).
    """
    probabilities = jax.nn.softmax(logits_NE.astype(jnp.float32), axis=-1)
    weights, experts = jax.lax.top_k(probabilities, experts_per_token)
    if normalise:
        weights /= weights.sum(axis=-1, keepdims=True)
    return Routing(probabilities, experts, weights)


def experts_mlp(
    x_ND: jax.Array,
    routing: Routing,
    gate_EDF: jax.Array,
    up_EDF: jax.Array,
    down_EFD: jax.Array,
) -> jax.Array:
    """The weighted sum [N, D] of each token's SwiGLU experts, added up in float32."""
    N, J = routing.experts_NJ.shape
    expert_of = routing.experts_NJ.reshape(-1)
    order = jnp.argsort(expert_of, stable=True)
    group_sizes = jnp.bincount(expert_of, length=gate_EDF.shape[0]).astype(jnp.int32)
    rows = x_ND[order // J]
    gate = jax.lax.ragged_dot(rows, gate_EDF, group_sizes)
    up = jax.lax.ragged_dot(rows, up_EDF, group_sizes)
    out = jax.lax.ragged_dot(jax.nn.silu(gate) * up, down_EFD, group_sizes)
    by_token = out[jnp.argsort(order)].reshape(N, J, -1)
    return jnp.einsum("njd,nj->nd", by_token, routing.weights_NJ).astype(x_ND.dtype)


def router_load(routing: Routing, counted_N: jax.Array) -> RouterLoad:
    """The load that the tokens where `counted_N` is true put on each expert."""
    E = routing.probabilities_NE.shape[-1]
    counted = counted_N.astype(jnp.float32)
    chosen = jax.nn.one_hot(routing.experts_NJ, E, dtype=jnp.float32).sum(axis=1)
    return RouterLoad(
        assignments_E=counted @ chosen,
        probabilities_E=counted @ routing.probabilities_NE,
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
