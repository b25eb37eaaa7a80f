"""Claims of a cache's manifest, compared with its records.

A checksum says that a file is as its manifest was written, not that the manifest is true.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from lopd.artefacts.manifest import Manifest, ShardEntry
from lopd.cache import totals
from lopd.cache.codec import check_description, content_digest, shard_name
from lopd.cache.fields import check_record
from lopd.errors import UserError

_UNITS = {"seconds", "tokens", "flops"}


def _is_amount(value: Any) -> bool:
    return isinstance(value, int | float) and 0 <= value < math.inf


def _check_entry(shard: ShardEntry, where: str) -> None:
    # Another name might be that of another file, or one that nobody reads.
    number = re.fullmatch(r".*-(\d{5,9})-of-(\d{5,9})", shard["name"])
    if not number or shard["name"] != shard_name(int(number[1]), int(number[2])):
        raise UserError(f"{where}: {shard['name']!r} is no name of a shard")
    name = shard["name"]
    if shard["records"] < 1 or shard["bytes"] < 0:
        raise UserError(f"{where}: its manifest gives {name} a size that no file has")
    if not re.fullmatch("[0-9a-f]{64}", shard["content"]):
        raise UserError(f"{where}: its manifest has no digest of {name}")
    if not shard["totals"].keys() >= totals.RESPONSES:
        raise UserError(f"{where}: its manifest has no totals of {name}")
    for kind, cost in shard["costs"].items():
        if cost.keys() != _UNITS or not all(map(_is_amount, cost.values())):
            raise UserError(f"{where}: its manifest says that {kind} of {name} cost {cost}")


def check_manifest(manifest: Manifest, where: str) -> None:
    """Refuses the manifest of an artefact that is no cache, or one that no cache can have.

    Raises:
      UserError: naming what is wrong; `where` is named.
    """
    if manifest.fields is None or not manifest.shards:
        raise UserError(f"{where} is no cache, but the artefact of the stage {manifest.stage!r}")
    check_description(manifest.fields, where)
    plan = manifest.plan
    if plan and min(plan["requests"], plan["records_per_shard"]) < 1:
        raise UserError(f"{where}: the plan of its manifest is {plan}")
    if manifest.worker and not 0 <= manifest.worker[0] < manifest.worker[1]:
        raise UserError(f"{where}: its manifest says that it is part {manifest.worker}")
    for shard in manifest.shards:
        _check_entry(shard, where)


def _same(claimed: Any, found: Any) -> bool:
    """Whether a claim is so. Sums may differ in their last bits."""
    if isinstance(found, dict):
        return isinstance(claimed, dict) and all(_same(claimed.get(k), found[k]) for k in found)
    if isinstance(found, float) and isinstance(claimed, int | float):
        return math.isclose(claimed, found, rel_tol=1e-6, abs_tol=1e-9)
    return claimed == found


def check_claims(claimed: Mapping, found: Mapping, where: str) -> None:
    """Refuses claims that are not what was found of the same name.

    Raises:
      UserError: naming the claim.
    """
    for name in claimed.keys() & found.keys():
        if not _same(claimed[name], found[name]):
            raise UserError(
                f"{where}: {name} is {claimed[name]!r:.80} by the manifest, and "
                f"{found[name]!r:.80} by the records"
            )


def check_shard(
    shard: ShardEntry, records: Sequence[dict], where: str, seen: set[tuple[int, int]]
) -> None:
    """Refuses records that are invalid, there twice, or not what their entry claims.

    Args:
      shard: the entry.
      records: of it, in order.
      where: for messages.
      seen: (prompt_id, sample_id) of the shards before; those of this one are added.

    Raises:
      UserError: naming the record or the claim.
    """
    for i, record in enumerate(records):
        check_record(record, f"{where}, record {i}")
        key = (int(record["prompt_id"]), int(record["sample_id"]))
        if key in seen:
            raise UserError(f"{where}, record {i}: prompt {key[0]}, sample {key[1]} is there twice")
        seen.add(key)
    if len(records) != shard["records"] or f"{content_digest(records):064x}" != shard["content"]:
        raise UserError(f"{where}: {len(records)} records that are not those of the manifest")
    counted = totals.of_responses(records)
    if {"ref_logprobs", "teacher_logprobs"} <= records[0].keys():
        counted |= totals.of_scores(records)
    check_claims(shard["totals"], counted, where)
    for name in shard["totals"].keys() - counted.keys():
        if name not in totals.GAPS or not _is_amount(shard["totals"][name]):
            raise UserError(f"{where}: {name} is {shard['totals'][name]} by the manifest")
