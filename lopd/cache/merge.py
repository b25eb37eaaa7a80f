"""Joining the parts of a cache that workers have made, each on its own, into the whole."""

from collections.abc import Sequence

from etils import epath

from lopd.artefacts.artefact import Artefact, differences
from lopd.cache import writer
from lopd.cache.claims import check_shard
from lopd.cache.codec import shard_name
from lopd.cache.reader import open_cache, read_shard
from lopd.errors import UserError

_ALIKE = ("stage", "settings", "inputs", "plan", "fields")


def _check_alike(first: Artefact, other: Artefact) -> None:
    for key in _ALIKE:
        if found := differences(getattr(first.manifest, key), getattr(other.manifest, key), key):
            raise UserError(
                f"{first.path} and {other.path} are not parts of one cache: {'; '.join(found)}"
            )


def _collect(parts: Sequence[Artefact]) -> dict[str, tuple[Artefact, dict]]:
    """Every shard of the whole, by name: the part that holds it and its entry there.

    Raises:
      UserError: if prompts are there twice, or not at all.
    """
    found: dict[str, tuple[Artefact, dict]] = {}
    for part in parts:
        _check_alike(parts[0], part)
        for entry in part.manifest.shards:
            if entry["name"] in found:
                raise UserError(
                    f"{found[entry['name']][0].path} and {part.path} hold the same prompts "
                    f"({entry['name']}): give each part once"
                )
            found[entry["name"]] = (part, entry)
    plan = parts[0].manifest.plan
    if plan is None:
        raise UserError(
            f"{parts[0].path}: its manifest lacks the plan that says how many there are"
        )
    count = -(-plan["requests"] // plan["records_per_shard"])
    if others := found.keys() - {shard_name(i, count) for i in range(count)}:
        raise UserError(f"{sorted(others)[0]} is none of the {count} shards of the whole")
    missing = [i for i in range(count) if shard_name(i, count) not in found]
    if missing:
        given = ", ".join("{}/{}".format(*part.manifest.worker) for part in parts)
        raise UserError(
            f"{len(missing)} of {count} shards are missing, the first {missing[0]}: the parts "
            f"given are those of workers {given}; give the others too"
        )
    return found


def merge(out: epath.PathLike, parts: Sequence[epath.PathLike]) -> Artefact:
    """Makes one finished cache of workers' parts: the one that a single run would have made.

    An interrupted merge is continued by doing it again.

    Raises:
      UserError: if the parts are unfinished, damaged, of other settings or inputs, or together
        hold a prompt twice or lack some; or if `out` already is a finished artefact.
    """
    opened = [open_cache(path, "the part to merge") for path in parts]
    for part in opened:
        if not part.manifest.worker:
            raise UserError(f"{part.path} is no worker's part (made with --worker=i/N)")
    found = _collect(opened)
    first = opened[0].manifest
    artefact = Artefact(out)
    if artefact.complete:
        raise UserError(f"{artefact.path} is finished already: merge into another directory")
    artefact.check("settings", first.settings)
    artefact.check("inputs", first.inputs)
    artefact.begin(first.stage, first.settings, first.inputs)
    artefact.manifest.plan, artefact.manifest.fields = first.plan, first.fields
    listed = {entry["name"] for entry in artefact.manifest.shards}
    seen: set[tuple[int, int]] = set()
    for name, (part, entry) in sorted(found.items()):
        check_shard(entry, read_shard(part, name), str(part.path / name), seen)
        if name not in listed:
            writer.copy_shard(artefact, part.path / name, entry)
    artefact.manifest.seconds = sum(part.manifest.seconds for part in opened)
    writer.write_metadata(artefact)
    artefact.finish({**first.outputs, **writer.outputs(artefact)})
    return artefact
