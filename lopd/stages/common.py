"""What several stages do alike: make requests, sample, and train into an artefact."""

import dataclasses
from collections.abc import Iterable, Sequence

import jax
import ml_collections

from lopd.artefacts import accounting
from lopd.artefacts.artefact import Artefact
from lopd.artefacts.fingerprint import params_fingerprint
from lopd.checkpoints import hugging_face, orbax
from lopd.data.batches import StepBatches, step_batches
from lopd.data.packing import TokenField
from lopd.data.selection import ALL_TOKENS, TokenSelection
from lopd.errors import UserError
from lopd.machine.processes import StopVote
from lopd.models import decoder, inference
from lopd.models.shardings import check_divisible, param_shardings
from lopd.objectives.sampled import Objective
from lopd.sampling.draw import Truncation
from lopd.sampling.engine import Request, Sampler, Sampling
from lopd.sampling.placement import sampling_mesh, slots_that_fit
from lopd.stages.run import PARAMS, Context
from lopd.tasks import Problem
from lopd.training.drift import Drift
from lopd.training.loop import Batches, Rounds, train


def stage_settings(ctx: Context, section: str, *shared: str) -> dict:
    """The settings a stage's result depends on: its section, the named others, and the seed.

    Paths of given artefacts are left out: what they hold is compared by fingerprint.
    """
    config = ctx.config.to_dict()
    own = {k: v for k, v in config[section].items() if k not in ("checkpoint", "cache", "teacher")}
    return {
        "seed": config["seed"],
        "tokenizer": ctx.tokenizer.fingerprint,
        "chat_template": ctx.tokenizer.template_fingerprint,
        section: own,
        **{key: config[key] for key in shared},
    }


def declared_teacher(ctx: Context) -> str:
    """Who is declared, in `sft.teacher`, to have written the SFT data.

    The same name as `teacher.checkpoint` stands for that teacher's weights; another name stays a
    name, which equals no fingerprint.
    """
    declared = ctx.config.sft.teacher
    if declared and declared == ctx.config.teacher.checkpoint:
        return ctx.input("teacher").outputs["fingerprint"]
    return declared or "not declared"


def model_settings(ctx: Context, which: str) -> dict:
    """The shape of a model, as part of a stage's settings."""
    return {f"{which}_model": dataclasses.asdict(ctx.model(which))}


def base_params(ctx: Context, which: str) -> decoder.Params:
    """The weights that training starts from, in their sharding: a base checkpoint's, or random."""
    model = ctx.model(which)
    if which == "student" and ctx.config.student.checkpoint:
        return ctx.read_checkpoint(
            hugging_face.resolve_checkpoint(ctx.config.student.checkpoint), which
        )
    check_divisible(model, ctx.mesh, f"{which}.model")
    init = jax.jit(
        lambda key: decoder.init_params(model, key), out_shardings=param_shardings(model, ctx.mesh)
    )
    return init(jax.random.key(ctx.seed(f"{which} weights")))


def batch_order(ctx: Context, recipe: ml_collections.ConfigDict, purpose: str) -> dict:
    """What says which records a step reads, for `step_indices`."""
    return {"seed": ctx.seed(f"{purpose} order"), "batch_size": recipe.batch_size}


def batch_rows(
    ctx: Context,
    recipe: ml_collections.ConfigDict,
    token_fields: Sequence[str | TokenField] = (),
    selection: TokenSelection = ALL_TOKENS,
) -> dict:
    """How a batch's records become rows, for `make_layout`."""
    return {
        "row_length": recipe.row_length,
        "rows_per_micro": ctx.config.runtime.rows_per_micro,
        "reduction": recipe.reduction,
        "token_fields": token_fields,
        "selection": selection,
        "mesh": ctx.mesh,
    }


def make_batches(
    ctx: Context,
    source: Sequence[dict],
    recipe: ml_collections.ConfigDict,
    purpose: str,
    token_fields: Sequence[str | TokenField] = (),
    selection: TokenSelection = ALL_TOKENS,
) -> StepBatches:
    """The step-indexed batches of a training stage, in an order of its own."""
    order = batch_order(ctx, recipe, purpose)
    rows = batch_rows(ctx, recipe, token_fields, selection)
    return step_batches(source, **order, **rows)


def train_into(
    ctx: Context,
    artefact: Artefact,
    which: str,
    params: decoder.Params,
    batches: Batches,
    objective: Objective,
    recipe: ml_collections.ConfigDict,
    *,
    drift: Drift | None = None,
    rounds: Rounds | None = None,
    router_coefficient: float = 0.0,
) -> dict:
    """Trains a model, saves its weights under the artefact, and returns identity and costs."""
    model = ctx.model(which)
    params = train(
        artefact,
        model,
        params,
        batches,
        objective,
        recipe,
        mesh=ctx.mesh,
        runtime=ctx.config.runtime,
        metrics=ctx.config.metrics,
        drift=drift,
        rounds=rounds,
        router_coefficient=router_coefficient,
    )
    orbax.save_params(artefact.path / PARAMS, params)
    return {
        "model": dataclasses.asdict(model),
        "fingerprint": params_fingerprint(params),
        "costs": accounting.of_training(artefact),
    }


def make_requests(
    ctx: Context, problems: Iterable[Problem], samples: int = 1
) -> tuple[list[Problem], list[Request]]:
    """The problems, and a request for each sample of each, rendered and tokenised once.

    Raises:
      UserError: if a prompt is longer than `prompt_length`.
    """
    problems, requests = list(problems), []
    for problem in problems:
        prompt = ctx.task.encode(problem, ctx.tokenizer)
        if len(prompt) > ctx.config.prompt_length:
            raise UserError(
                f"prompt {problem.problem_id} has {len(prompt)} tokens, more than "
                f"prompt_length={ctx.config.prompt_length}: raise it"
            )
        requests += [Request(problem.problem_id, sample, prompt) for sample in range(samples)]
    return problems, requests


def sampler(
    ctx: Context,
    which: str,
    params: decoder.Params,
    section: ml_collections.ConfigDict,
    purpose: str,
    temperature: float | None = None,
    *,
    responses: int | None = None,
    reserved: int = 0,
) -> Sampler:
    """What answers requests (in order of finishing) for one model, and counts what it does.

    `section` says how (`lopd.config.sampling_section`); a `temperature` overrides its. There are no
    more slots than `responses`, the most that a whole job asks for: the same number in a continued
    run. They leave `reserved` bytes per device to what else comes while they are held. While it is
    at work it raises `Stopped` a decode call or two after a signal to any process.
    """
    model, runtime = ctx.model(which), ctx.config.runtime
    sampling = Sampling(
        temperature=section.temperature if temperature is None else temperature,
        max_response=section.response_length,
        seed=ctx.seed(purpose),
        end_ids=ctx.tokenizer.end_ids,
        truncation=Truncation(section.top_k, section.top_p, section.min_p),
    )
    mesh = sampling_mesh(model, ctx.mesh)
    decode_params = inference.inference_params(model, params, param_shardings(model, mesh))
    capacity = ctx.config.prompt_length + section.response_length
    jax.block_until_ready(decode_params)  # what making them took is free again
    return Sampler(
        model,
        decode_params,
        sampling,
        slots=slots_that_fit(model, capacity, mesh, runtime.slots, responses, reserved),
        capacity=capacity,
        decode_steps=runtime.decode_steps,
        mesh=mesh,
        check=StopVote().check,
    )
