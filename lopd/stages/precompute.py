"""`precompute`: π_ref samples, teacher and π_ref score, once. No teacher exists after this job."""

from lopd.artefacts.artefact import Artefact
from lopd.sampling.engine import Request
from lopd.stages import scored
from lopd.stages.run import Run
from lopd.stages.stage import Stage


def requests(run: Run) -> list[Request]:
    """One request per OPD prompt and sample."""
    return run.prompts.opd.requests(run.settings.precompute.samples)


def sample_and_score(run: Run, artefact: Artefact) -> dict:
    """Makes the cache."""
    return scored.make_scored(run, artefact, "precompute", requests(run))


stage = Stage(scored.cache_settings, scored.scoring_inputs, sample_and_score, read_prompts=requests)
