"""`consistency`: how far teacher and π_ref are apart on the cache, by position in the response."""

import json

from lopd.artefacts.artefact import Artefact
from lopd.cache import summary
from lopd.cache.reader import Records
from lopd.machine import processes
from lopd.machine.storage import write_atomically
from lopd.stages.run import Run
from lopd.stages.stage import Stage


def settings(run: Run) -> dict:
    """The settings that the figures depend on."""
    return {"bins": run.settings.consistency.bins}


def inputs(run: Run) -> dict:
    """The cache."""
    return {"precompute": run.input("precompute").outputs["fingerprint"]}


def measure(run: Run, artefact: Artefact) -> dict:
    """Writes by_position.json: mean log π_T − log π_ref, and the fraction of tokens far apart."""
    arrays = summary.collect(Records(run.input("precompute")))
    rows = summary.by_position(arrays, run.settings.consistency.bins)
    if processes.is_main():
        write_atomically(artefact.path / "by_position.json", json.dumps(rows, indent=2) + "\n")
    return {"mean": float(arrays.log_ratio.mean())}


stage = Stage(settings, inputs, measure)
