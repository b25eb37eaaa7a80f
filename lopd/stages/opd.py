"""`opd`: trains the student on the fixed cache. Needs no teacher, but for refreshing the cache."""

from lopd.artefact import Artefact
from lopd.cache.reader import Records
from lopd.context import Context
from lopd.errors import UserError
from lopd.objectives import Objective, lightning_opd
from lopd.report.rollouts import write_rollouts
from lopd.stages import common, refresh
from lopd.training.diagnostics import Drift, make_drift


def settings(ctx: Context) -> dict:
    """What the trained student depends on."""
    own = common.stage_settings(ctx, "opd") | common.model_settings(ctx, "student")
    return own | refresh.settings(ctx)


def inputs(ctx: Context) -> dict:
    """The cache and the student it starts from.

    Raises:
      UserError: if another student sampled the cache.
    """
    sft, cache = ctx.input("sft"), ctx.input("precompute")
    start, sampled = sft.outputs["fingerprint"], cache.outputs["sft"]
    if start != sampled:
        raise UserError(
            f"the cache {cache.path} was sampled from student {sampled}, but OPD would start "
            f"from {start} ({sft.path}): give the cache of this student, or its checkpoint"
        )
    if cache.manifest["settings"]["tokenizer"] != ctx.tokenizer.fingerprint:
        raise UserError(
            f"the cache {cache.path} was made with tokenizer "
            f"{cache.manifest['settings']['tokenizer']}, the run's is {ctx.tokenizer.fingerprint}"
        )
    found = {"sft": start, "precompute": cache.outputs["fingerprint"]}
    return found | refresh.inputs(ctx)


FIELDS = ("teacher_logprobs", "ref_logprobs")
"""What the objective reads of a record's tokens."""


def make_objective(ctx: Context) -> Objective:
    """The per-token loss, of the offline and the online arm alike."""
    return lightning_opd(ctx.config.opd.tau)


def make_drift_panel(ctx: Context, layout: dict, objective: Objective) -> Drift:
    """The drift panel, with the held-out T = 1 responses if that stage has run."""
    heldout = None
    if ctx.exists("heldout"):
        heldout = list(Records(ctx.input("heldout")))
    return make_drift(
        ctx.model("student"),
        objective,
        ctx.mesh,
        every=ctx.config.runtime.drift_every,
        heldout=heldout,
        layout=layout,
    )


def run(ctx: Context, artefact: Artefact) -> dict:
    """Huber regression of log π_θ onto log π_T over the cache."""
    recipe = ctx.config.opd
    cache = Records(ctx.input("precompute"))
    batches = common.make_batches(ctx, cache, recipe, "opd", FIELDS)
    params = ctx.load_params("sft", "student")
    objective = make_objective(ctx)
    drift = make_drift_panel(ctx, batches.layout, objective)
    rounds = refresh.make_rounds(ctx, artefact, batches, drift)
    outputs = common.train_into(
        ctx, artefact, "student", params, batches, objective, recipe, drift=drift, rounds=rounds
    )
    write_rollouts(ctx, artefact, cache)
    return outputs | refresh.outputs(artefact, outputs)
