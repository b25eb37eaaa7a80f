"""The host side of sampling: keeps a fixed number of slots busy until every prompt is answered."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lopd.models import qwen3
from lopd.sampling import decode


@dataclasses.dataclass(frozen=True)
class Request:
    """One response wanted: which prompt, which sample of it, and the prompt's token ids."""

    prompt_id: int
    sample_id: int
    prompt_tokens: Sequence[int]


@dataclasses.dataclass(frozen=True)
class Response:
    """One sampled response, with the ids exactly as sampled.

    `tokens` ends with an end token exactly when `finished`; `logprobs` are at temperature 1 and
    `behaviour_logprobs` those of the distribution sampled from. `index` is the request's place.
    """

    index: int
    request: Request
    tokens: np.ndarray
    logprobs: np.ndarray
    behaviour_logprobs: np.ndarray
    finished: bool


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to sample: temperature (0 is greedy), response cap in tokens, seed, the end tokens, and
    the probability mass that is sampled from (1 is all)."""

    temperature: float
    max_response: int
    seed: int
    end_ids: tuple[int, ...]
    top_p: float = 1.0


def _bucket(length: int) -> int:
    """The power of two at or above a prompt length, so that few shapes are compiled."""
    return max(8, 1 << (length - 1).bit_length())


class _Slot:
    """The request in a slot and what has been decoded for it."""

    def __init__(self, index: int, request: Request):
        self.index = index
        self.request = request
        self.parts: list[tuple[np.ndarray, ...]] = []

    def response(self, end_ids: tuple[int, ...]) -> Response:
        tokens, logprobs, behaviour = (np.concatenate(p) for p in zip(*self.parts, strict=True))
        return Response(
            index=self.index,
            request=self.request,
            tokens=tokens,
            logprobs=logprobs,
            behaviour_logprobs=behaviour,
            finished=int(tokens[-1]) in end_ids,
        )


def generate(
    config: qwen3.Qwen3Config,
    params: qwen3.Params,
    requests: Iterable[Request],
    sampling: Sampling,
    *,
    slots: int,
    capacity: int,
    decode_steps: int,
    prefill_batch: int,
) -> Iterator[Response]:
    """Samples a response for every request, in the order they finish.

    A finished slot is refilled at the next chunk without draining the others. The random key of
    a token depends on (seed, prompt_id, sample_id, position in the response) only, so a response
    does not depend on its slot, on its neighbours or on a restart.

    Args:
      config: the model's shape.
      params: from `qwen3.inference_params`.
      requests: prompts, consumed as slots come free.
      sampling: how to sample.
      slots: responses decoded at a time.
      capacity: positions per slot; at least the longest prompt plus `max_response`.
      decode_steps: tokens decoded on device between looks at what has finished.
      prefill_batch: prompts read per prefill call.
    """
    state = decode.empty_state(config, slots, capacity)
    occupied: list[_Slot | None] = [None] * slots
    pending = enumerate(requests)
    exhausted = False
    while True:
        free = [i for i, slot in enumerate(occupied) if slot is None]
        taken: dict[int, list[int]] = {}
        while free and not exhausted:
            item = next(pending, None)
            if item is None:
                exhausted = True
                break
            slot = free.pop(0)
            occupied[slot] = _Slot(*item)
            # A prompt's bucket may pass a capacity that is not a power of two.
            bucket = min(_bucket(len(item[1].prompt_tokens)), capacity)
            taken.setdefault(bucket, []).append(slot)
        for bucket, members in sorted(taken.items()):
            for start in range(0, len(members), prefill_batch):
                batch = members[start : start + prefill_batch]
                state = _prefill(config, params, state, occupied, batch, bucket, prefill_batch)
        if all(slot is None for slot in occupied):
            return
        state, output = decode.decode(
            config,
            decode_steps,
            sampling.top_p,
            params,
            state,
            jnp.uint32(sampling.seed),
            jnp.float32(sampling.temperature),
            jnp.asarray(sampling.end_ids, jnp.int32),
            jnp.int32(sampling.max_response),
        )
        output, active = jax.device_get((output, state.active))
        counts = output.valid.sum(axis=0)
        for i, slot in enumerate(occupied):
            if slot is None:
                continue
            made = slice(0, counts[i])
            slot.parts.append(
                (output.token[made, i], output.logprob[made, i], output.behaviour_logprob[made, i])
            )
            if not active[i]:
                occupied[i] = None
                yield slot.response(sampling.end_ids)


def _prefill(config, params, state, occupied, members, bucket, prefill_batch):
    """One prefill call for the slots in `members`, padded to `prefill_batch` prompts."""
    tokens = np.zeros((prefill_batch, bucket), np.int32)
    lengths = np.ones(prefill_batch, np.int32)
    slots = np.full(prefill_batch, len(occupied), np.int32)  # past the end: dropped
    ids = np.zeros((2, prefill_batch), np.uint32)
    for row, slot in enumerate(members):
        request = occupied[slot].request
        tokens[row, : len(request.prompt_tokens)] = request.prompt_tokens
        lengths[row] = len(request.prompt_tokens)
        slots[row] = slot
        ids[:, row] = request.prompt_id, request.sample_id
    return decode.prefill(config, params, state, tokens, lengths, slots, *ids)
