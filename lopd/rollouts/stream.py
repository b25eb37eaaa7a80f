"""From requests to shards: one stream of responses, each shard scored and written as it fills.

The sampler is never drained between shards: a slot that comes free takes the next request, of
whichever shard. A shard is closed when its last response has come, so shards may close out of
order. What is held in memory is bounded without further means: while the slowest response is being
decoded the other slots make at most slots × response_length tokens, so the open shards hold no
more than that and one shard; and one more shard is being scored and written.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from lopd.artefacts.artefact import Artefact
from lopd.artefacts.manifest import PlanEntry
from lopd.cache import writer
from lopd.errors import UserError
from lopd.machine import processes
from lopd.machine.progress import bar
from lopd.sampling.cut import CutCounter
from lopd.sampling.engine import Request, Response, Stats

Sample = Callable[[Sequence[Request]], Iterator[Response]]
"""Answers requests, in the order of finishing."""
Finish = Callable[[], writer.Made]
"""Gives a full shard; called in the writer's thread."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which request belongs to which shard, and the shards that are still to be made."""

    requests: Sequence[Request]
    """All of the artefact, in its order."""
    per_shard: int
    """Records of a whole shard."""
    missing: Sequence[int]
    """This worker's shards that the manifest does not list."""

    @property
    def count(self) -> int:
        """Number of shards, with those of other workers."""
        return -(-len(self.requests) // self.per_shard)

    def members(self, shard: int) -> range:
        """The requests of a shard."""
        first = shard * self.per_shard
        return range(first, min(first + self.per_shard, len(self.requests)))


def _digest(requests: Sequence[Request]) -> str:
    digest = hashlib.sha256()
    for request in requests:
        digest.update(f"{request.prompt_id}/{request.sample_id}/".encode())
        digest.update(np.asarray(request.prompt_tokens, np.int32).tobytes())
    return digest.hexdigest()[:16]


def make_plan(
    artefact: Artefact,
    requests: Sequence[Request],
    records_per_shard: int,
    worker: tuple[int, int] | None = None,
) -> Plan:
    """The plan of an artefact, continued or new; of a `worker` (i, N), its part i of N.

    The manifest keeps what the plan follows from, so that a continued run, and a merge, can tell
    that it still holds. A worker makes whole shards of the one plan: they equal a single run's.

    Raises:
      UserError: if the prompts have changed since the artefact was begun, or there are more
        workers than shards.
    """
    # A continued run keeps the shard size it began with: the shards' names depend on it.
    digest = _digest(requests)
    plan = artefact.manifest.plan or PlanEntry(
        requests=len(requests), prompts=digest, records_per_shard=records_per_shard
    )
    artefact.manifest.plan = plan
    if plan["prompts"] != digest:
        raise UserError(
            f"{artefact.path} was begun with other prompts ({plan['requests']} of digest "
            f"{plan['prompts']}, now {len(requests)} of {digest}): restore their "
            f"source, or delete {artefact.path}"
        )
    plan = Plan(requests, plan["records_per_shard"], ())
    mine = range(plan.count)
    if worker:
        index, workers = worker
        if workers > plan.count:
            raise UserError(
                f"--worker={index}/{workers}: {len(requests)} responses are only {plan.count} "
                f"shards; use fewer workers, or lower runtime.records_per_shard={plan.per_shard}"
            )
        artefact.manifest.worker = worker
        mine = mine[plan.count * index // workers : plan.count * (index + 1) // workers]
    missing = writer.missing_shards(artefact, plan.count)
    return dataclasses.replace(plan, missing=[i for i in missing if i in mine])


def response_record(response: Response) -> dict:
    """A response as `lopd.cache.fields.RESPONSE_FIELDS` holds it."""
    return {
        "prompt_id": response.request.prompt_id,
        "sample_id": response.request.sample_id,
        "prompt_tokens": np.asarray(response.request.prompt_tokens, np.int32),
        "response_tokens": response.tokens,
        "finished": response.finished,
        "behaviour_logprobs": response.behaviour_logprobs,
    }


def write_responses(
    artefact: Artefact,
    plan: Plan,
    fields: dict,
    sample: Sample,
    score: Callable[[list[Response]], Finish],
    stats: Stats | None = None,
) -> None:
    """Samples every request of the plan's missing shards and writes them.

    A stop (`lopd.machine.shutdown`) does not wait for responses, which may take minutes: full
    shards are written, responses of the others are sampled again by the next run, which gives the
    same ones.

    Args:
      artefact: where the shards go.
      plan: from `make_plan`.
      fields: of a record.
      sample: gives the responses in any order; raises Stopped, at the same point in all
        processes, once it should end.
      score: dispatches what is to be computed of a full shard, and returns without waiting how to
        finish it.
      stats: what the sampler counts, to be shown.

    Raises:
      Stopped: from `sample`.
    """
    wanted = [i for shard in plan.missing for i in plan.members(shard)]
    filling: dict[int, list[Response]] = {}
    with (
        bar(total=len(wanted), label=artefact.path.name, unit="responses") as progress,
        writer.ShardWriter(artefact, fields, plan.count) as shards,
    ):
        counter = CutCounter(progress)
        for response in sample([plan.requests[i] for i in wanted]):
            shard = wanted[response.index] // plan.per_shard
            filling.setdefault(shard, []).append(response)
            if len(filling[shard]) == len(plan.members(shard)):
                full = sorted(filling.pop(shard), key=lambda r: r.index)
                shards.put(shard, score(full))
            if stats:
                counter.also = (
                    f"{stats.tokens_per_second:,.0f} tokens/s, slots {stats.occupancy:.0%} busy"
                )
            counter.add(response.finished)
            progress.update()
            shards.check()


def finish(artefact: Artefact) -> dict:
    """Makes the shards a dataset, unless they are a worker's part; returns what they amount to."""
    if not artefact.manifest.worker and processes.is_main():
        writer.write_metadata(artefact)
    processes.barrier(f"{artefact.path} written")
    artefact.reload()
    return writer.outputs(artefact)
