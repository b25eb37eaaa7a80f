"""What the stages that train do alike: batches of records, weights into an artefact."""

import dataclasses
from collections.abc import Sequence

from lopd.artefacts import accounting
from lopd.artefacts.artefact import Artefact
from lopd.cache.reader import Records
from lopd.checkpoints import orbax
from lopd.config.catalogue import STUDENT
from lopd.config.settings import TrainingRecipe
from lopd.data.batches import StepBatches, step_batches
from lopd.data.layout import Layout
from lopd.data.packing import TokenField
from lopd.data.selection import ALL_TOKENS, TokenSelection
from lopd.models import decoder
from lopd.objectives.sampled import Objective, cross_entropy
from lopd.stages.run import Run
from lopd.stages.weights import PARAMS, describe
from lopd.training.drift import Drift
from lopd.training.loop import Batches, Rounds, train
from lopd.training.trees import merged, trainable_and_frozen


def batch_order(run: Run, recipe: TrainingRecipe, purpose: str) -> dict:
    """What says which records a step reads, for `step_indices`."""
    return {"seed": run.seed(f"{purpose} order"), "batch_size": recipe.batch_size}


def batch_rows(
    run: Run,
    recipe: TrainingRecipe,
    token_fields: Sequence[str | TokenField] = (),
    selection: TokenSelection = ALL_TOKENS,
) -> Layout:
    """How a batch's records become rows of this process."""
    rows = run.settings.runtime.rows_per_micro
    layout = Layout(recipe.row_length, rows, recipe.reduction, tuple(token_fields), selection)
    return layout.on(run.mesh)


def make_batches(
    run: Run,
    source: Sequence[dict],
    recipe: TrainingRecipe,
    purpose: str,
    token_fields: Sequence[str | TokenField] = (),
    selection: TokenSelection = ALL_TOKENS,
) -> StepBatches:
    """The step-indexed batches of a training stage, in an order of its own."""
    order = batch_order(run, recipe, purpose)
    return step_batches(source, batch_rows(run, recipe, token_fields, selection), **order)


@dataclasses.dataclass(frozen=True)
class Trained:
    """What a training stage has made."""

    params: decoder.Params
    outputs: dict
    """Shape, fingerprint and costs."""


def train_into(
    run: Run,
    artefact: Artefact,
    which: str,
    params: decoder.Params,
    batches: Batches,
    objective: Objective,
    recipe: TrainingRecipe,
    *,
    drift: Drift | None = None,
    rounds: Rounds | None = None,
    router_coefficient: float = 0.0,
) -> Trained:
    """Trains a model and saves its weights under the artefact; its adapters, if it has them."""
    model = run.model(which)
    trainable, frozen = trainable_and_frozen(params)
    trained = train(
        artefact,
        model,
        trainable,
        batches,
        objective,
        recipe,
        frozen=frozen,
        mesh=run.mesh,
        runtime=run.settings.runtime,
        metrics=run.settings.metrics,
        drift=drift,
        rounds=rounds,
        router_coefficient=router_coefficient,
    )
    orbax.save_params(artefact.path / PARAMS, trained)
    params = merged(trained, frozen)
    costs = accounting.of_training(artefact)
    return Trained(params, {**describe(run, which, params), "costs": costs})


# Fine-tuning, of `sft` and `control`


def router_coefficient(run: Run) -> float:
    """Weight of the router's load-balancing loss: 0 but for a mixture of experts in SFT."""
    model = run.model(STUDENT)
    wanted = model.num_experts and run.settings.sft.router_loss
    return model.router_aux_loss_coef if wanted else 0.0


def router_settings(run: Run) -> dict:
    """The load-balancing loss is of a micro-batch, so its size is part of the result."""
    if not router_coefficient(run):
        return {}
    return {"rows_per_micro": run.settings.runtime.rows_per_micro}


def data_inputs(run: Run) -> dict:
    """The SFT data, and who wrote it."""
    outputs = run.input("sft_data").outputs
    return {"sft_data": outputs["fingerprint"], "teacher": outputs["teacher"]}


def fine_tune(
    run: Run, artefact: Artefact, params: decoder.Params, recipe: TrainingRecipe, purpose: str
) -> dict:
    """SFT from `params`, in an order of `purpose`; `teacher` in the outputs says whose answers it
    learnt from."""
    data = run.input("sft_data")
    trained = train_into(
        run,
        artefact,
        STUDENT,
        params,
        make_batches(run, Records(data), recipe, purpose),
        cross_entropy(),
        recipe,
        router_coefficient=router_coefficient(run),
    )
    return {**trained.outputs, "teacher": data.outputs["teacher"]}
