"""What several stages do alike: sample into shards, and train into an artefact."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence

import grain
import jax
import ml_collections
import numpy as np

from lopd import shutdown
from lopd.artefact import Artefact
from lopd.cache import writer
from lopd.context import PARAMS, Context
from lopd.errors import UserError
from lopd.fingerprint import params_fingerprint
from lopd.models import hf, qwen3
from lopd.objectives import Objective
from lopd.parallel import check_divisible, param_shardings
from lopd.progress import bar
from lopd.sampling.engine import Request, Response, Sampling, generate
from lopd.tasks import Problem
from lopd.training import checkpoints
from lopd.training.loop import train


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


def base_params(ctx: Context, which: str) -> qwen3.Params:
    """The weights that training starts from, in their sharding: a base checkpoint's, or random."""
    model = ctx.model(which)
    if which == "student" and ctx.config.student.checkpoint:
        return ctx.read_checkpoint(hf.resolve_checkpoint(ctx.config.student.checkpoint), which)
    check_divisible(model, ctx.mesh, f"{which}.model")
    init = jax.jit(
        lambda key: qwen3.init_params(model, key), out_shardings=param_shardings(model, ctx.mesh)
    )
    return init(jax.random.key(ctx.seed(f"{which} weights")))


def train_into(
    ctx: Context,
    artefact: Artefact,
    which: str,
    params: qwen3.Params,
    batches: grain.MapDataset,
    objective: Objective,
    recipe: ml_collections.ConfigDict,
) -> dict:
    """Trains a model, saves its weights under the artefact, and returns their identity."""
    model = ctx.model(which)
    params = train(
        artefact,
        model,
        params,
        batches,
        objective,
        recipe,
        mesh=ctx.mesh,
        checkpoint_every=ctx.config.runtime.checkpoint_every,
        label=artefact.path.name,
        remat=ctx.config.runtime.remat,
    )
    checkpoints.save_params(artefact.path / PARAMS, params)
    return {"model": dataclasses.asdict(model), "fingerprint": params_fingerprint(params)}


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
    params: qwen3.Params,
    section: ml_collections.ConfigDict,
    purpose: str,
    temperature: float | None = None,
) -> Callable[[Sequence[Request]], Iterator[Response]]:
    """A function from requests to responses (in order of finishing) for one model.

    `section` says how (`lopd.config.sampling_section`); a `temperature` overrides its.
    """
    model, runtime = ctx.model(which), ctx.config.runtime
    decode_params = qwen3.inference_params(model, params)
    sampling = Sampling(
        temperature=section.temperature if temperature is None else temperature,
        top_p=section.top_p,
        max_response=section.response_length,
        seed=ctx.seed(purpose),
        end_ids=ctx.tokenizer.end_ids,
    )

    def sample(wanted: Sequence[Request]) -> Iterator[Response]:
        return generate(
            model,
            decode_params,
            wanted,
            sampling,
            slots=runtime.slots,
            capacity=ctx.config.prompt_length + section.response_length,
            decode_steps=runtime.decode_steps,
            prefill_batch=runtime.prefill_batch,
        )

    return sample


def response_record(response: Response) -> dict:
    """A response as `cache.schema.RESPONSE_FIELDS` holds it."""
    return {
        "prompt_id": response.request.prompt_id,
        "sample_id": response.request.sample_id,
        "prompt_tokens": np.asarray(response.request.prompt_tokens, np.int32),
        "response_tokens": response.tokens,
        "finished": response.finished,
        "behaviour_logprobs": response.behaviour_logprobs,
    }


def write_responses(
    ctx: Context,
    artefact: Artefact,
    fields: dict,
    wanted: Sequence[Request],
    sample: Callable[[Sequence[Request]], Iterator[Response]],
    to_records: Callable[[list[Response]], list[dict]],
) -> dict:
    """Samples every request into shards, skipping those that an interrupted run has finished.

    Returns:
      Totals: responses, response tokens, and the share that ended by itself.
    """
    # A continued run keeps the shard size it began with: the shards' names depend on it.
    default = ctx.config.runtime.records_per_shard
    per_shard = artefact.manifest.setdefault("records_per_shard", default)
    count = -(-len(wanted) // per_shard)
    done = writer.shards_written(artefact)
    totals = artefact.manifest.setdefault("totals", {"responses": 0, "tokens": 0, "finished": 0})
    progress = bar(
        total=len(wanted), initial=totals["responses"], label=artefact.path.name, unit="responses"
    )
    for index in range(done, count):
        responses = []
        for response in sample(wanted[index * per_shard : (index + 1) * per_shard]):
            shutdown.check()
            responses.append(response)
            progress.update()
        responses.sort(key=lambda r: r.index)
        totals["responses"] += len(responses)
        totals["tokens"] += sum(len(r.tokens) for r in responses)
        totals["finished"] += sum(r.finished for r in responses)
        writer.write_shard(artefact, fields, index, count, to_records(responses))
    progress.close()
    writer.write_metadata(artefact, fields)
    return {**totals, "fingerprint": writer.content_fingerprint(artefact)}
