"""`opd`: trains the student on the fixed cache. Needs no teacher, but for refreshing the cache."""

from collections.abc import Callable, Sequence

import grain

from lopd.artefacts.artefact import Artefact
from lopd.cache.reader import Records
from lopd.errors import UserError
from lopd.objectives.sampled import Objective
from lopd.objectives.style_baseline import fit_baseline
from lopd.rollouts.examples import write_rollouts
from lopd.stages import common, refresh
from lopd.stages.objective import make_objective, needs_top_k, token_fields, token_selection
from lopd.stages.run import Context
from lopd.training.drift import Drift, make_drift


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


def stored_top_k(cache: Artefact) -> int:
    """How many of the teacher's most likely tokens a cache holds at every position."""
    _, shape = cache.manifest["fields"].get("teacher_topk_ids", (None, (0,)))
    return shape[-1]


def check_before_work(ctx: Context, stages: tuple[str, ...]) -> None:
    """What the settings ask of the tokenizer and of caches, made or to be made by `stages`.

    Raises:
      UserError: if a masked token is unknown, or a cache holds too few of the top-K.
    """
    recipe, to_be_made = ctx.config.opd, ctx.config.precompute.teacher_top_k
    token_selection(recipe, ctx.tokenizer)
    if not needs_top_k(recipe):
        return
    stored, where = to_be_made, "the cache to be made"
    if ctx.exists("precompute"):
        cache = ctx.input("precompute")
        stored, where = stored_top_k(cache), str(cache.path)
    token_fields(recipe, stored, where)
    used = recipe.top_k or stored
    if ctx.exists("heldout"):
        held = stored_top_k(ctx.input("heldout"))
    else:
        held = to_be_made if "heldout" in stages else used
    if held < used:
        raise UserError(
            f"the held-out responses have the teacher's top K={held}, opd.objective="
            f"{recipe.objective!r} uses {used}: set opd.top_k={held}, or make them with "
            f"precompute.teacher_top_k={used}"
        )


def record_source(
    ctx: Context, cache: Records
) -> tuple[Sequence[dict], Callable[[dict], dict] | None]:
    """The records that are trained on, and what was done to each: to be done to held-out ones too.

    The first `opd.records` of the cache; with `opd.residual_folds` also the teacher's scores less
    the style baseline that is fitted to them here, in one pass.

    Raises:
      UserError: if the cache holds fewer records.
    """
    recipe = ctx.config.opd
    count = recipe.records or len(cache)
    if count > len(cache):
        raise UserError(f"opd.records={count}: the cache holds {len(cache)}")
    source = grain.MapDataset.source(cache)[:count]
    if not recipe.residual_folds:
        return source, None
    records = (cache[i] for i in range(count))
    baseline = fit_baseline(records, recipe.residual_folds, ctx.model("student").vocab_size)
    return source.map(baseline.residualise), baseline.residualise


def batch_contents(ctx: Context, stored_top_k: int, where: str) -> dict:
    """What a batch carries of each record, and of which tokens, for `make_layout`.

    Raises:
      UserError: if the objective needs more of the teacher's top-K than is stored.
    """
    recipe = ctx.config.opd
    return {
        "token_fields": token_fields(recipe, stored_top_k, where),
        "selection": token_selection(recipe, ctx.tokenizer),
    }


def make_drift_panel(
    ctx: Context,
    layout: dict,
    objective: Objective,
    transform: Callable[[dict], dict] | None = None,
) -> Drift:
    """The drift panel, with the held-out T = 1 responses if that stage has run."""
    heldout = None
    if ctx.exists("heldout"):
        heldout = list(Records(ctx.input("heldout")))
        heldout = [transform(record) for record in heldout] if transform else heldout
    return make_drift(
        ctx.model("student"),
        objective,
        ctx.mesh,
        every=ctx.config.runtime.drift_every,
        heldout=heldout,
        layout=layout,
    )


def run(ctx: Context, artefact: Artefact) -> dict:
    """Minimises `opd.objective` over the cache; by default Huber regression onto log π_T."""
    recipe, precompute = ctx.config.opd, ctx.input("precompute")
    cache = Records(precompute)
    source, transform = record_source(ctx, cache)
    contents = batch_contents(ctx, stored_top_k(precompute), str(precompute.path))
    batches = common.make_batches(ctx, source, recipe, "opd", **contents)
    params = ctx.load_params("sft", "student")
    objective = make_objective(recipe)
    drift = make_drift_panel(ctx, batches.layout, objective, transform)
    rounds = refresh.make_rounds(ctx, artefact, batches, drift)
    outputs = common.train_into(
        ctx, artefact, "student", params, batches, objective, recipe, drift=drift, rounds=rounds
    )
    write_rollouts(ctx, artefact, cache)
    return outputs | refresh.outputs(artefact, outputs)
