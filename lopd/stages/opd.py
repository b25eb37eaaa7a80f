"""`opd`: trains the student on the fixed cache. Needs no teacher, but for refreshing the cache."""

import functools
from collections.abc import Callable, Sequence

import grain

from lopd.artefacts.artefact import Artefact
from lopd.cache.fields import stored_top_k
from lopd.cache.reader import Records
from lopd.config.catalogue import STUDENT
from lopd.errors import UserError
from lopd.objectives.style_baseline import fit_baseline
from lopd.rollouts.examples import write_rollouts
from lopd.rollouts.scoring import score_responses
from lopd.stages import identity, panel, refresh, training
from lopd.stages.objective import (
    batch_contents,
    make_objective,
    needs_top_k,
    token_fields,
    token_selection,
)
from lopd.stages.run import Run
from lopd.stages.stage import Stage
from lopd.stages.weights import load_params, to_train


def settings(run: Run) -> dict:
    """The settings that the trained student depends on."""
    own = identity.stage_settings(run, "opd") | identity.model_settings(run, STUDENT)
    return own | refresh.settings(run)


def inputs(run: Run) -> dict:
    """The cache and the student it starts from.

    Raises:
      UserError: if another student sampled the cache, or it was made with another tokenizer.
    """
    sft, cache = run.input("sft"), run.input("precompute")
    start, sampled = sft.outputs["fingerprint"], cache.outputs["sft"]
    if start != sampled:
        raise UserError(
            f"the cache {cache.path} was sampled from student {sampled}, but OPD would start "
            f"from {start} ({sft.path}): give the cache of this student, or its checkpoint"
        )
    if cache.manifest.settings["tokenizer"] != run.tokenizer.fingerprint:
        raise UserError(
            f"the cache {cache.path} was made with tokenizer "
            f"{cache.manifest.settings['tokenizer']}, the run's is {run.tokenizer.fingerprint}"
        )
    found = {"sft": start, "precompute": cache.outputs["fingerprint"]}
    return found | refresh.inputs(run)


def check(run: Run, stages: tuple[str, ...]) -> None:
    """What the settings ask of the tokenizer and of caches, made or to be made by `stages`.

    Raises:
      UserError: if a masked token is unknown, or a cache holds too few responses or too few of
        the top-K.
    """
    recipe, to_be_made = run.settings.opd, run.settings.precompute.teacher_top_k or 0
    token_selection(recipe, run.tokenizer)
    if recipe.records is not None:
        held = _responses(run, stages)
        if held is not None and recipe.records > held:
            raise UserError(f"opd.records={recipe.records}: the cache holds {held} responses")
    if not needs_top_k(recipe):
        return
    stored, where = to_be_made, "the cache to be made"
    if run.exists("precompute"):
        cache = run.input("precompute")
        stored, where = stored_top_k(cache.manifest.fields), str(cache.path)
    token_fields(recipe, stored, where)
    used = recipe.top_k or stored
    if run.exists("heldout"):
        held = stored_top_k(run.input("heldout").manifest.fields)
    else:
        held = to_be_made if "heldout" in stages else used
    if held < used:
        raise UserError(
            f"the held-out responses have the teacher's top K={held}, opd.objective="
            f"{recipe.objective!r} uses {used}: set opd.top_k={held}, or make them with "
            f"precompute.teacher_top_k={used}"
        )


def _responses(run: Run, stages: tuple[str, ...]) -> int | None:
    """How many responses the cache has, or will have; None if it is neither there nor made."""
    if run.exists("precompute"):
        return run.input("precompute").outputs.get("responses")
    if "precompute" not in stages:
        return None
    return len(run.prompts.opd.problems) * run.settings.precompute.samples


def record_source(run: Run, cache: Records) -> tuple[Sequence[dict], Callable[[dict], dict] | None]:
    """The records that are trained on, and what was done to each: to be done to held-out ones too.

    The first `opd.records` of the cache; with `opd.residual_folds` also the teacher's scores less
    the style baseline that is fitted to them here, in one pass.

    Raises:
      UserError: if the cache holds fewer records.
    """
    recipe = run.settings.opd
    count = recipe.records or len(cache)
    if count > len(cache):
        raise UserError(f"opd.records={count}: the cache holds {len(cache)}")
    source = grain.MapDataset.source(cache)[:count]
    if recipe.residual_folds is None:
        return source, None
    records = (cache[i] for i in range(count))
    baseline = fit_baseline(records, recipe.residual_folds, run.model(STUDENT).vocab_size)
    return source.map(baseline.residualise), baseline.residualise


def train(run: Run, artefact: Artefact) -> dict:
    """Minimises `opd.objective` over the cache; by default Huber regression onto log π_T."""
    recipe, precompute = run.settings.opd, run.input("precompute")
    cache = Records(precompute)
    source, transform = record_source(run, cache)
    stored = stored_top_k(precompute.manifest.fields)
    contents = batch_contents(recipe, run.tokenizer, stored, str(precompute.path))
    batches = training.make_batches(run, source, recipe, "opd", **contents)
    objective = make_objective(recipe)
    drift = panel.make_panel(run, batches.layout, objective, transform)
    trained = training.train_into(
        run,
        artefact,
        STUDENT,
        to_train(run, load_params(run, "sft")),
        batches,
        objective,
        recipe,
        drift=drift,
        rounds=refresh.make_rounds(run, artefact, batches, drift),
    )
    score = functools.partial(
        score_responses,
        run.model(STUDENT),
        trained.params,
        mesh=run.mesh,
        row_length=recipe.row_length,
        rows_per_micro=run.settings.runtime.rows_per_micro,
    )
    write_rollouts(artefact.path / "rollouts.jsonl", cache, run.tokenizer, score)
    return trained.outputs | refresh.outputs(artefact, trained.outputs)


stage = Stage(settings, inputs, train, check=check)
