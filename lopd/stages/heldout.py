"""`heldout`: rollouts of π_ref on OPD prompts that are not trained on, scored like the cache.

They are drawn from π_ref's own distribution (temperature 1, the whole of it), so that
E[π_θ(x) / π_ref(x)] = 1 for every θ and the importance weights and the effective sample size
measure drift alone (arXiv 2604.13010, bounds); on training tokens they would measure memorisation
too.
"""

import numpy as np

from lopd.artefacts.artefact import Artefact
from lopd.cache.reader import Records
from lopd.sampling.engine import Request
from lopd.stages import common, precompute
from lopd.stages.run import Context


def settings(ctx: Context) -> dict:
    """What the held-out rollouts depend on."""
    own = common.stage_settings(ctx, "heldout", "task", "prompt_length", "dtype")
    trained = ctx.config.precompute
    return own | {"precompute_prompts": trained.prompts, "teacher_top_k": trained.teacher_top_k}


def inputs(ctx: Context) -> dict:
    """The teacher that scores and the student that samples; a cache that was given instead."""
    return precompute.inputs_beside_cache(ctx)


def _trained_on(ctx: Context) -> set[bytes]:
    """The token ids of every training prompt: of the cache that was given, or of this run."""
    if ctx.given("precompute"):
        trained = (r["prompt_tokens"] for r in Records(ctx.input("precompute")))
    else:
        trained = (r.prompt_tokens for r in precompute.prompts(ctx))
    return {np.asarray(tokens, np.int32).tobytes() for tokens in trained}


def prompts(ctx: Context) -> list[Request]:
    """One request per held-out prompt and sample; one whose tokens are trained on is left out."""
    trained = _trained_on(ctx)
    problems = precompute.opd_problems(ctx)[1]
    requests = common.make_requests(ctx, problems, ctx.config.heldout.samples)[1]
    return [r for r in requests if np.asarray(r.prompt_tokens, np.int32).tobytes() not in trained]


def run(ctx: Context, artefact: Artefact) -> dict:
    """Samples and scores."""
    return precompute.sample_and_score(ctx, artefact, "heldout", prompts(ctx))
