"""`heldout`: rollouts of π_ref on OPD prompts that are not trained on, scored like the cache.

They are drawn from π_ref's own distribution (temperature 1, the whole of it), so that
E[π_θ(x) / π_ref(x)] = 1 for every θ and the importance weights and the effective sample size
measure drift alone (arXiv 2604.13010, bounds); on training tokens they would measure memorisation
too.
"""

from lopd.artefacts.artefact import Artefact
from lopd.stages import scored
from lopd.stages.run import Run
from lopd.stages.stage import Stage


def sample_and_score(run: Run, artefact: Artefact) -> dict:
    """Samples and scores."""
    return scored.make_scored(run, artefact, "heldout", scored.heldout_requests(run))


stage = Stage(
    scored.heldout_settings,
    scored.inputs_beside_cache,
    sample_and_score,
    read_prompts=scored.heldout_requests,
)
