"""The device side of sampling: prefill prompts into slots, decode all slots together.

Everything here is pure and jitted once per shape. The state is donated, so the key/value cache is
updated in place.
"""

import functools

import flax.struct
import jax
import jax.numpy as jnp

from lopd.models import qwen3
from lopd.models.kv_cache import KVCache, empty_cache
from lopd.scoring import score_logits


@flax.struct.dataclass
class SlotState:
    """What the device knows of every slot; all arrays lead with [slots]."""

    cache: KVCache
    token: jax.Array  # int32, the last token, which the next step reads
    position: jax.Array  # int32, its position
    generated: jax.Array  # int32, response tokens so far
    active: jax.Array  # bool
    prompt_id: jax.Array  # uint32
    sample_id: jax.Array  # uint32


@flax.struct.dataclass
class DecodeOutput:
    """What each decode step made, each [steps, slots]."""

    token: jax.Array  # int32
    logprob: jax.Array  # float32, at temperature 1
    behaviour_logprob: jax.Array  # float32, of the distribution sampled from
    valid: jax.Array  # bool: the slot was active


def empty_state(config: qwen3.Qwen3Config, slots: int, capacity: int) -> SlotState:
    """All slots idle, with room for `capacity` tokens of prompt and response each."""
    zeros = lambda dtype: jnp.zeros((slots,), dtype)  # noqa: E731
    return SlotState(
        cache=empty_cache(config, slots, capacity),
        token=zeros(jnp.int32),
        position=zeros(jnp.int32),
        generated=zeros(jnp.int32),
        active=zeros(bool),
        prompt_id=zeros(jnp.uint32),
        sample_id=zeros(jnp.uint32),
    )


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def prefill(
    config: qwen3.Qwen3Config,
    params: qwen3.Params,
    state: SlotState,
    tokens_PT: jax.Array,
    lengths: jax.Array,
    slots: jax.Array,
    prompt_id: jax.Array,
    sample_id: jax.Array,
) -> SlotState:
    """Reads P right-padded prompts and puts them into `slots`, ready to decode.

    A slot number past the end marks an empty place in this batch and is dropped. The slot is
    left *at* the last prompt token: the first decode step reads it again and samples from its
    logits, so sampling happens in one place only.
    """
    P, T = tokens_PT.shape
    positions = jnp.broadcast_to(jnp.arange(T), (P, T))
    segment_ids = (positions < lengths[:, None]).astype(jnp.int32)
    _, prefix = qwen3.forward(
        config, params, tokens_PT, positions, segment_ids, empty_cache(config, P, T)
    )
    last = jnp.take_along_axis(tokens_PT, lengths[:, None] - 1, axis=1)[:, 0]
    put = lambda array, values: array.at[slots].set(values, mode="drop")  # noqa: E731
    return SlotState(
        cache=state.cache.insert(prefix, slots),
        token=put(state.token, last),
        position=put(state.position, lengths - 1),
        generated=put(state.generated, 0),
        active=put(state.active, True),
        prompt_id=put(state.prompt_id, prompt_id),
        sample_id=put(state.sample_id, sample_id),
    )


def _gumbel_noise(seed: jax.Array, state: SlotState, vocab_size: int) -> jax.Array:
    """Gumbel noise [slots, V] from (seed, prompt, sample, response position) and nothing else."""

    def noise(prompt_id, sample_id, position):
        key = jax.random.key(seed)
        for part in (prompt_id, sample_id, position):
            key = jax.random.fold_in(key, part)
        return jax.random.gumbel(key, (vocab_size,))

    return jax.vmap(noise)(state.prompt_id, state.sample_id, state.generated)


def keep_top_p(logits: jax.Array, top_p: float) -> jax.Array:
    """Logits [..., V] with all but the nucleus at -inf (arXiv 1904.09751).

    The nucleus is the fewest most likely tokens whose probabilities sum to at least `top_p`;
    tokens as likely as the last of them stay too.
    """
    descending = jnp.sort(logits, axis=-1, descending=True)
    probabilities = jax.nn.softmax(descending, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    last_kept = jnp.sum(before < top_p, axis=-1, keepdims=True) - 1
    threshold = jnp.take_along_axis(descending, last_kept, axis=-1)
    return jnp.where(logits >= threshold, logits, -jnp.inf)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def decode(
    config: qwen3.Qwen3Config,
    steps: int,
    top_p: float,
    params: qwen3.Params,
    state: SlotState,
    seed: jax.Array,
    temperature: jax.Array,
    end_ids: jax.Array,
    max_response: jax.Array,
) -> tuple[SlotState, DecodeOutput]:
    """Decodes every active slot by up to `steps` tokens.

    Sampling is by Gumbel-max over logits / temperature within the nucleus of `top_p`; temperature
    0 is greedy, and its behaviour log-probability is then 0 (the choice is certain). A slot stops
    after any of `end_ids` or `max_response` tokens.
    """
    head = qwen3.output_head(params)

    def step(state: SlotState, _):
        hidden, cache = qwen3.forward(
            config,
            params,
            state.token[:, None],
            state.position[:, None],
            state.active[:, None].astype(jnp.int32),
            state.cache,
        )
        logits = jnp.einsum("bd,vd->bv", hidden[:, 0], head, preferred_element_type=jnp.float32)
        greedy = temperature == 0
        scaled = logits / jnp.where(greedy, 1.0, temperature)
        if top_p < 1:
            scaled = keep_top_p(scaled, top_p)
        noise = jnp.where(greedy, 0.0, _gumbel_noise(seed, state, logits.shape[-1]))
        token = jnp.argmax(scaled + noise, axis=-1).astype(jnp.int32)
        behaviour = jnp.where(greedy, 0.0, score_logits(scaled, token).logprobs)
        output = DecodeOutput(
            token=token,
            logprob=score_logits(logits, token).logprobs,
            behaviour_logprob=behaviour,
            valid=state.active,
        )
        generated = state.generated + state.active
        ends = jnp.isin(token, end_ids) | (generated >= max_response)
        state = state.replace(
            cache=cache,
            token=jnp.where(state.active, token, state.token),
            position=state.position + state.active,
            generated=generated,
            active=state.active & ~ends,
        )
        return state, output

    return jax.lax.scan(step, state, None, length=steps)
