"""Whether sampling and scoring in one job cost more than the two alone.

    python benchmarks/precompute.py [--prompts=512]

A student of 8 M parameters answers prompts of the addition task, a teacher of 13 M and π_ref score
the responses (mean 144 tokens, cap 256), and shards of 128 are written: `precompute` as it
is. Then the sampler alone on the same prompts, and the scorers alone on the same records, shards
queued up. On a machine whose cores do both, the job can take no less than the sum: what it takes
more is what the host does that nothing hides (bookkeeping, writing, checksums, hand-overs).
"""

import argparse
import os
import pathlib
import platform
import runpy
import sys
import tempfile
import time

import jax
from etils import epath

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from lopd.artefacts.artefact import Artefact
from lopd.cache.reader import Records
from lopd.checkpoints import hugging_face
from lopd.machine import devices
from lopd.machine.setup import prepare
from lopd.models import decoder
from lopd.stages import common, precompute, rollouts
from lopd.stages.run import Context

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
SHAPE = dict(vocab_size=128, num_key_value_heads=2, head_dim=64)
STUDENT = dict(
    SHAPE, hidden_size=384, intermediate_size=1024, num_hidden_layers=5, num_attention_heads=6
)
TEACHER = dict(
    SHAPE, hidden_size=512, intermediate_size=1280, num_hidden_layers=5, num_attention_heads=8
)
SHARD = 128


def context(folder: pathlib.Path, prompts: int) -> Context:
    """A run of `precompute` on the tiny config's task, with weights that nobody trained."""
    config = runpy.run_path(str(REPOSITORY / "configs" / "tiny.py"))["get_config"]()
    config.precompute.update(prompts=prompts, response_length=256, row_length=320, temperature=1.0)
    config.runtime.update(records_per_shard=SHARD, slots=64)
    mesh = devices.make_mesh(config.mesh.to_dict())
    for seed, (name, shape) in enumerate({"teacher": TEACHER, "sft": STUDENT}.items()):
        model = decoder.DecoderConfig(**shape)
        (folder / name).mkdir(exist_ok=True)
        params = decoder.init_params(model, jax.random.key(seed))
        hugging_face.save_checkpoint(epath.Path(folder / name), model, params, end_id=1)
        config[name].checkpoint = str(folder / name)
    config.teacher.model.update(TEACHER)
    config.student.model.update(STUDENT)
    return Context(config, epath.Path(folder), mesh)


def job(ctx: Context, folder: pathlib.Path, weights: dict) -> tuple[float, Artefact]:
    """Seconds of the whole job, the loading of weights left out."""
    artefact = Artefact(folder)
    artefact.begin("precompute", {}, {})
    plan = rollouts.make_plan(ctx, artefact, precompute.prompts(ctx))
    start = time.perf_counter()
    precompute._sampling_pass(
        ctx, artefact, "precompute", plan, weights["teacher"], precompute.Student(weights["sft"])
    )
    artefact.finish(rollouts.finish(ctx, artefact))
    return time.perf_counter() - start, artefact


def sampling_alone(ctx: Context, weights: dict) -> tuple[float, int]:
    """Seconds, and response tokens."""
    requests = precompute.prompts(ctx)
    start = time.perf_counter()
    sample = common.sampler(
        *(ctx, "student", weights["sft"], ctx.config.precompute, "precompute sampling"),
        responses=len(requests),
    )
    tokens = sum(len(response.tokens) for response in sample(requests))
    return time.perf_counter() - start, tokens


def scoring_alone(ctx: Context, weights: dict, records: list[dict]) -> float:
    """Seconds."""
    dispatch = [
        precompute.dispatcher(ctx, which, weights[name], "precompute")
        for which, name in (("student", "sft"), ("teacher", "teacher"))
    ]
    start = time.perf_counter()
    shards = [records[i : i + SHARD] for i in range(0, len(records), SHARD)]
    for finish in [score(shard) for shard in shards for score in dispatch]:
        finish()
    return time.perf_counter() - start


def main() -> None:
    """Prints the three times, and the job's against the sum of the others."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    machine = platform.processor() or platform.machine()
    print(f"{machine}, {os.cpu_count()} cores, jax {jax.__version__}")
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        prepare(name)
        ctx = context(folder, options.prompts)
        weights = {
            which: hugging_face.load_checkpoint(epath.Path(folder / which), ctx.mesh)[1]
            for which in ("teacher", "sft")
        }
        for repeat in range(options.repeats + 1):
            seconds, artefact = job(ctx, folder / f"cache-{repeat}", weights)
            sampling, tokens = sampling_alone(ctx, weights)
            scoring = scoring_alone(ctx, weights, list(Records(artefact)))
            if repeat:  # the first compiles
                print(
                    f"{options.prompts} responses, {tokens} tokens: job {seconds:.2f} s "
                    f"({tokens / seconds:.0f} tokens/s); sampling alone {sampling:.2f} s "
                    f"({tokens / sampling:.0f} tokens/s), scoring alone {scoring:.2f} s "
                    f"({tokens / scoring:.0f} tokens/s a pair): the job takes "
                    f"{seconds / (sampling + scoring) - 1:+.1%} of their sum",
                    flush=True,
                )


if __name__ == "__main__":
    main()
