"""Refresh: `opd` samples its prompts again, from the student as it is by then, and goes on.

Every round is a cache of its own under the artefact, rounds/001 and so on, with a held-out slice
beside it where that stage has run, so that the effective sample size is again that against the
policy which sampled. `rounds` in the artefact's manifest says after which step each began, and
why: an interrupted run goes on with the same ones.
"""

import dataclasses

import jax
import numpy as np

from lopd.artefacts import accounting
from lopd.artefacts.artefact import Artefact, open_complete
from lopd.artefacts.fingerprint import params_fingerprint
from lopd.cache.reader import Records
from lopd.config.catalogue import refreshes
from lopd.data.batches import StepBatches
from lopd.errors import UserError
from lopd.machine import processes
from lopd.models import decoder
from lopd.rollouts.requests import requests_of
from lopd.sampling.engine import Request
from lopd.stages import scored
from lopd.stages.run import Run
from lopd.training.drift import Drift, heldout_batch


def settings(run: Run) -> dict:
    """What the student depends on besides: how a round samples, and when ESS is looked at."""
    if not refreshes(run.settings):
        return {}
    found = scored.cache_settings(run)
    if run.settings.opd.refresh_below is not None:
        found |= scored.heldout_settings(run) | {"drift_every": run.settings.runtime.drift_every}
    return found


def inputs(run: Run) -> dict:
    """The teacher that scores the rounds, and the held-out responses if they decide.

    Raises:
      UserError: as `scored.scoring_inputs`; or for held-out responses made with other settings.
    """
    if not refreshes(run.settings):
        return {}
    found = {"teacher": scored.scoring_inputs(run)["teacher"]}
    if run.exists("heldout"):
        run.input("heldout").check("settings", scored.heldout_settings(run))
    if run.settings.opd.refresh_below is not None:
        found["heldout"] = run.input("heldout").outputs["fingerprint"]
    return found


def round_path(artefact: Artefact, number: int, kind: str = ""):
    """Where a round's cache is, from 1; with "-heldout", its held-out slice."""
    return artefact.path / "rounds" / f"{number:03}{kind}"


def outputs(artefact: Artefact, trained: dict) -> dict:
    """Costs of training with those of the rounds."""
    folder = artefact.path / "rounds"
    caches = sorted(folder.iterdir()) if folder.exists() else []
    parts = [open_complete(path, "a round").outputs["costs"] for path in caches]
    return {"costs": accounting.total([trained["costs"], *parts])}


@dataclasses.dataclass
class CacheRounds:
    """`lopd.training.loop.Rounds` of an artefact; `first` and `drift` are what it begins with."""

    run: Run
    artefact: Artefact
    first: StepBatches
    drift: Drift

    @property
    def _begun(self) -> list[dict]:
        return self.artefact.manifest.rounds

    def due(self, step: int, heldout: dict | None) -> bool:
        """Whether a round begins after this step: as recorded, or else as the settings say."""
        starts = [entry["start"] for entry in self._begun]
        last = starts[-1] if starts else 0
        if step <= last:  # once decided; goes on from a checkpoint before
            return step in starts
        recipe, fraction = self.run.settings.opd, heldout and heldout["ess_fraction"]
        every, below = recipe.refresh_every, recipe.refresh_below
        by_steps = every is not None and step - last >= every
        by_drift = below is not None and fraction is not None and fraction < below
        if not by_steps and not by_drift:
            return False
        self._begun.append({"start": step, "ess_fraction": fraction})
        self.artefact.save()
        return True

    def open(self, step: int, params: decoder.Params) -> tuple[StepBatches, Drift]:
        """The round that the step after `step` belongs to, which is made first if need be."""
        number = sum(entry["start"] <= step for entry in self._begun)
        if number == 0:
            return self.first, self.drift
        entry = self._begun[number - 1]
        chosen = self._chosen(entry["start"])
        cache = Artefact(round_path(self.artefact, number))
        held = Artefact(round_path(self.artefact, number, "-heldout"))
        stages = {"precompute": (cache, lambda: [self.first.source[int(i)] for i in chosen])}
        if self.drift.heldout is not None:
            stages["heldout"] = (held, lambda: Records(self.run.input("heldout")))
        for stage, (place, records) in stages.items():
            if not place.complete:
                if step != entry["start"]:
                    raise UserError(
                        f"{place.path}, which training reads after step {entry['start']}, is not "
                        f"there: restore it, or delete {self.artefact.path}"
                    )
                self._make(stage, place, number, params, requests_of(records()))
        if entry.setdefault("cache", cache.outputs["fingerprint"]) != cache.outputs["fingerprint"]:
            raise UserError(
                f"{cache.path} is another cache than the one that training has begun with: "
                f"restore it, or delete {self.artefact.path}"
            )
        self.artefact.save()
        return self._batches(cache, chosen), self._drift(held, entry["start"])

    def _chosen(self, start: int) -> np.ndarray:
        """The records of the first cache whose prompts are read until the next round, ascending."""
        recipe = self.run.settings.opd
        ahead = min(recipe.steps - start, recipe.refresh_every or recipe.steps)
        return np.unique(np.concatenate([self.first.indices[start + n] for n in range(ahead)]))

    def _make(
        self,
        stage: str,
        place: Artefact,
        number: int,
        params: decoder.Params,
        requests: list[Request],
    ) -> None:
        """Samples and scores one of a round's two caches, or goes on with it."""
        of_cache = stage == "precompute"
        settings = (scored.cache_settings if of_cache else scored.heldout_settings)(self.run)
        student = params_fingerprint(params)
        inputs = {"teacher": self.run.input("teacher").outputs["fingerprint"], "sft": student}
        place.check("settings", settings)
        place.check("inputs", inputs)
        processes.barrier(f"{place.path} looked at")
        place.begin(stage, settings, inputs)
        policy = scored.Policy(params, f", round {number}")
        place.finish(scored.make_scored(self.run, place, stage, requests, policy))

    def _batches(self, cache: Artefact, chosen: np.ndarray) -> StepBatches:
        return self.first.on(Records(cache), chosen)

    def _drift(self, held: Artefact, start: int) -> Drift:
        batch: dict[str, jax.Array] | None = None
        if self.drift.heldout is not None:
            batch = heldout_batch(list(Records(held)), self.run.mesh, self.first.layout)
        return dataclasses.replace(self.drift, heldout=batch, first=start + 1)


def make_rounds(
    run: Run, artefact: Artefact, first: StepBatches, drift: Drift
) -> CacheRounds | None:
    """Rounds after `first` and `drift`, if the settings ask for any."""
    return CacheRounds(run, artefact, first, drift) if refreshes(run.settings) else None
