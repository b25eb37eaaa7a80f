"""The host side of sampling: keeps a fixed number of slots busy until every prompt is answered."""

import collections
import contextlib
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lopd.machine.sharding import on_mesh
from lopd.models import decoder
from lopd.sampling import decode
from lopd.sampling.draw import Truncation
from lopd.sampling.shapes import (
    PROMPTS_PER_CALL,
    group_shape,
    prompt_bucket,
    prompts_at_once,
    row_shards,
)

_IN_FLIGHT = 2
"""Decode calls dispatched before the oldest is read, so that the device never waits for the host.
A group alone is then one call ahead of what is known about it; several groups take turns."""


@dataclasses.dataclass(frozen=True)
class Request:
    """One response wanted: which prompt, which sample of it, and the prompt's token ids."""

    prompt_id: int
    """Below 2^32."""
    sample_id: int
    """From 0, among the samples of a prompt."""
    prompt_tokens: Sequence[int]
    """Rendered and tokenised."""


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
    what may be drawn."""

    temperature: float
    max_response: int
    """The cap."""
    seed: int
    end_ids: tuple[int, ...]
    """Tokens that end a response."""
    truncation: Truncation = dataclasses.field(default_factory=Truncation)


@dataclasses.dataclass
class Stats:
    """What a `generate` has done so far, for progress displays."""

    slots: int = 0
    """Responses decoded at a time."""
    responses: int = 0
    """Finished ones."""
    tokens: int = 0
    """Response tokens, those of unfinished responses included."""
    started: float = dataclasses.field(default_factory=time.monotonic)
    """By the monotonic clock."""
    _offered: int = 0
    _used: int = 0

    @property
    def tokens_per_second(self) -> float:
        """Since sampling started, compilation included."""
        return self.tokens / max(time.monotonic() - self.started, 1e-9)

    @property
    def occupancy(self) -> float:
        """Share of the slots' decode steps that made a token, while prompts remained."""
        return self._used / max(self._offered, 1)

    def count(self, tokens: int, offered: int, prompts_remain: bool) -> None:
        """Adds one decode call, which could have made `offered` tokens."""
        self.tokens += tokens
        if prompts_remain:
            self._used += tokens
            self._offered += offered


class _Slot:
    """The request in a slot and what has been decoded for it."""

    def __init__(self, index: int, request: Request):
        self.index = index
        self.request = request
        self.parts: list[tuple[np.ndarray, ...]] = []
        self.dispatched = 0  # decode steps asked for
        self.done = False

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


@dataclasses.dataclass
class _Group:
    """Rows that are decoded by one call; only as many of them are in use as there are slots."""

    state: decode.RowState
    slots: dict[int, _Slot | None]
    """By row; rows that are never used are not in it."""

    def free(self) -> list[int]:
        return [row for row, slot in self.slots.items() if slot is None]

    def undispatched(self, max_response: int) -> bool:
        """Whether a further decode call could make a token, for all that is known here."""
        return any(s is not None and s.dispatched < max_response for s in self.slots.values())


@dataclasses.dataclass
class _Call:
    """A decode call in flight, and who was in which row when it was dispatched."""

    group: _Group
    slots: list[tuple[int, _Slot]]
    prompts_remain: bool
    results: tuple


class _Engine:
    """The state of one `generate`."""

    def __init__(self, config, params, sampling, slots, capacity, decode_steps, mesh, stats):
        self.config, self.params, self.sampling = config, params, sampling
        self.capacity, self.decode_steps, self.mesh = capacity, decode_steps, mesh
        self.platform = mesh.devices.flat[0].platform if mesh else jax.default_backend()
        self.stats = stats
        stats.slots = slots
        if not stats.tokens:
            stats.started = time.monotonic()
        with self.on_mesh():
            self.rows = group_shape(config, slots, capacity, mesh)[0]
        self.groups = [
            self._group(min(self.rows, slots - first)) for first in range(0, slots, self.rows)
        ]
        self.arguments = (
            jnp.uint32(sampling.seed),
            jnp.float32(sampling.temperature),
            jnp.asarray(sampling.end_ids, jnp.int32),
            jnp.int32(sampling.max_response),
        )

    def _group(self, slots: int) -> _Group:
        """Idle rows, and which of them are slots: the same number on each device, or one less."""
        shards = row_shards(self.mesh)
        used, per_device = -(-slots // shards), self.rows // shards
        with self.on_mesh():
            cached = group_shape(self.config, slots, self.capacity, self.mesh)[1]
            state = decode.empty_state(self.config, self.rows, cached, self.capacity)
        usable = [row for row in range(self.rows) if row % per_device < used]
        return _Group(state, dict.fromkeys(usable[:slots]))

    def on_mesh(self):
        """The context to call `decode` in; none for one device."""
        if self.mesh is None or self.mesh.size == 1:
            return contextlib.nullcontext()
        return on_mesh(self.mesh)

    def fill(self, group: _Group, pending: Iterator[tuple[int, Request]]) -> bool:
        """Puts pending requests into free slots; False once there are none left."""
        taken: dict[int, list[int]] = {}
        remain = True
        for row in group.free():
            item = next(pending, None)
            if item is None:
                remain = False
                break
            group.slots[row] = _Slot(*item)
            bucket = prompt_bucket(len(item[1].prompt_tokens), self.capacity)
            taken.setdefault(bucket, []).append(row)
        for bucket, members in sorted(taken.items()):
            at_once = prompts_at_once(bucket, row_shards(self.mesh), self.platform)
            size = max(PROMPTS_PER_CALL, at_once)
            for start in range(0, len(members), size):
                self._prefill(group, members[start : start + size], bucket, at_once)
        return remain

    def _prefill(self, group: _Group, members: Sequence[int], bucket: int, at_once: int) -> None:
        """One prefill call for the slots in `members`."""
        size = max(PROMPTS_PER_CALL, at_once)
        tokens = np.zeros((size, bucket), np.int32)
        length = np.ones(size, np.int32)
        row = np.full(size, self.rows, np.int32)  # past the end: dropped
        ids = np.zeros((2, size), np.uint32)
        for place, member in enumerate(members):
            request = group.slots[member].request
            tokens[place, : len(request.prompt_tokens)] = request.prompt_tokens
            length[place] = len(request.prompt_tokens)
            row[place] = member
            ids[:, place] = request.prompt_id, request.sample_id
        prompts = decode.Prompts(np.int32(len(members)), tokens, length, row, *ids)
        with self.on_mesh():
            group.state = decode.prefill(self.config, at_once, self.params, group.state, prompts)

    def dispatch(self, group: _Group, prompts_remain: bool) -> _Call:
        """Starts the decoding of all slots of a group by some steps."""
        with self.on_mesh():
            group.state, *results = decode.decode(
                self.config,
                self.decode_steps,
                self.sampling.truncation,
                self.params,
                group.state,
                *self.arguments,
            )
        slots = [(row, slot) for row, slot in group.slots.items() if slot is not None]
        for _, slot in slots:
            slot.dispatched += self.decode_steps
        return _Call(group, slots, prompts_remain, tuple(results))

    def collect(self, call: _Call) -> Iterator[Response]:
        """Waits for a call, frees the slots that finished in it and yields their responses."""
        output, active = jax.device_get(call.results)
        counts = output.valid.sum(axis=0)
        offered = self.decode_steps * len(call.group.slots)
        self.stats.count(int(counts.sum()), offered, call.prompts_remain)
        drawn = output.drawn
        for row, slot in call.slots:
            if slot.done:
                continue
            made = slice(0, counts[row])
            slot.parts.append(
                (
                    drawn.token[made, row],
                    drawn.logprob[made, row],
                    drawn.behaviour_logprob[made, row],
                )
            )
            if not active[row]:
                slot.done = True
                call.group.slots[row] = None
                self.stats.responses += 1
                yield slot.response(self.sampling.end_ids)


def generate(
    config: decoder.DecoderConfig,
    params: decoder.Params,
    requests: Iterable[Request],
    sampling: Sampling,
    *,
    slots: int,
    capacity: int,
    decode_steps: int,
    mesh: Mesh | None = None,
    stats: Stats | None = None,
    check: Callable[[], None] | None = None,
) -> Iterator[Response]:
    """Samples a response for every request, in the order they finish.

    A finished slot is refilled at the next call without draining the others. A response is a
    function of the weights, the request's prompt, prompt_id and sample_id, and `sampling`: not of
    its slot, its neighbours, a restart, or any other argument. In float32 that holds bit for bit,
    as every program then has the same number of rows (`EXACT_ROWS`); in other types it does for
    one number of slots and one mesh, and beyond it as far as the platform's kernels round alike.

    Args:
      config: the model's shape.
      params: from `inference.inference_params`.
      requests: prompts, consumed as slots come free.
      sampling: how to sample.
      slots: responses decoded at a time.
      capacity: positions per slot; at least the longest prompt plus `max_response`.
      decode_steps: tokens decoded on device between looks at what has finished.
      mesh: what `params` are spread over: slots lie over data and fsdp, heads over tensor. Every
        process of a run passes the same requests and gets the same responses.
      stats: counts what is done, for progress displays.
      check: called before each decode call, in every process at the same ones; what it raises ends
        the sampling, however long the responses still are.
    """
    engine = _Engine(
        config, params, sampling, slots, capacity, decode_steps, mesh, stats or Stats()
    )
    pending = enumerate(requests)
    remain = True
    in_flight: collections.deque[_Call] = collections.deque()
    for group in itertools.cycle(engine.groups):
        if remain:
            remain = engine.fill(group, pending)
        dispatched = group.undispatched(sampling.max_response)
        if dispatched:
            if check:
                check()
            in_flight.append(engine.dispatch(group, remain))
        elif not in_flight and not any(
            g.undispatched(sampling.max_response) for g in engine.groups
        ):
            return
        if in_flight and (len(in_flight) == _IN_FLIGHT or not dispatched):
            yield from engine.collect(in_flight.popleft())


@dataclasses.dataclass(frozen=True)
class Sampler:
    """A model and how to sample from it; call it with requests. Fields as `generate`'s."""

    config: decoder.DecoderConfig
    params: decoder.Params
    sampling: Sampling
    slots: int
    """Responses decoded at a time."""
    capacity: int
    """Positions of a slot: prompt and response."""
    decode_steps: int
    """Tokens decoded between looks at the host."""
    mesh: Mesh
    stats: Stats = dataclasses.field(default_factory=Stats)
    """Of all calls together."""
    check: Callable[[], None] | None = None
    """Called between decode calls; may raise to stop."""

    def __call__(self, requests: Iterable[Request]) -> Iterator[Response]:
        """See `generate`."""
        return generate(
            self.config,
            self.params,
            requests,
            self.sampling,
            slots=self.slots,
            capacity=self.capacity,
            decode_steps=self.decode_steps,
            mesh=self.mesh,
            stats=self.stats,
            check=self.check,
        )
