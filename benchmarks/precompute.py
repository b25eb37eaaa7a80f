"""Whether sampling and scoring in one job cost more than the two alone.

    python benchmarks/precompute.py [--prompts=512]

A student of 8 M parameters answers prompts of the addition task, a teacher of 13 M and π_ref score
the responses (mean 144 tokens, cap 256), and shards of 128 are written: `precompute` as it
is. Then the sampler alone on the same prompts, and the scorers alone on the same records, shards
queued up. On a machine whose cores do both, the job can take no less than the sum: what it takes
more is what the host does that nothing hides (bookkeeping, writing, checksums, hand-overs).
"""

import argparse
import dataclasses
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
from lopd.config import read_settings
from lopd.machine import devices
from lopd.machine.setup import prepare
from lopd.models import decoder
from lopd.models.shardings import param_shardings
from lopd.rollouts.passes import Job, Scorer, sample_and_score
from lopd.stages import scored
from lopd.stages.run import Run

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
SHAPE = dict(vocab_size=128, num_key_value_heads=2, head_dim=64)
STUDENT = dict(
    SHAPE, hidden_size=384, intermediate_size=1024, num_hidden_layers=5, num_attention_heads=6
)
TEACHER = dict(
    SHAPE, hidden_size=512, intermediate_size=1280, num_hidden_layers=5, num_attention_heads=8
)
SHARD = 128


def open_run(folder: pathlib.Path, prompts: int) -> Run:
    """A run of `precompute` on the tiny config's task."""
    config = runpy.run_path(str(REPOSITORY / "configs" / "tiny.py"))["get_config"]()
    config.precompute.update(prompts=prompts, response_length=256, row_length=320, temperature=1.0)
    config.runtime.update(records_per_shard=SHARD, slots=64)
    config.teacher.model.update(TEACHER)
    config.student.model.update(STUDENT)
    settings = read_settings(config)
    return Run(settings, epath.Path(folder), devices.make_mesh(settings.mesh.sizes))


def scorer(run: Run, which: str, seed: int) -> Scorer:
    """The teacher or the student, with weights that nobody trained and that are there already."""
    model = run.model(which)
    init = jax.jit(
        lambda key: decoder.init_params(model, key), out_shardings=param_shardings(model, run.mesh)
    )
    params = jax.block_until_ready(init(jax.random.key(seed)))
    made = scored.scorer(run, which, run.settings.precompute.row_length)
    return dataclasses.replace(made, load=lambda: params)


def make_job(run: Run) -> Job:
    """A small `precompute`: both models, their mesh, and the requests to answer and score."""
    return Job(
        student=scorer(run, "student", 1),
        teacher=scorer(run, "teacher", 0),
        sampler=scored.sampler_plan(run, "student", run.settings.precompute, "precompute sampling"),
        records_per_shard=run.settings.runtime.records_per_shard,
    )


def whole_job(job: Job, folder: pathlib.Path, requests: list) -> tuple[float, Artefact]:
    """Seconds of the whole job, the loading of weights left out."""
    artefact = Artefact(folder)
    artefact.begin("precompute", {}, {})
    start = time.perf_counter()
    artefact.finish(sample_and_score(job, artefact, requests))
    return time.perf_counter() - start, artefact


def sampling_alone(job: Job, requests: list) -> tuple[float, int]:
    """Seconds, and response tokens."""
    start = time.perf_counter()
    sample = job.sampler.make(job.student.load(), responses=len(requests))
    tokens = sum(len(response.tokens) for response in sample(requests))
    return time.perf_counter() - start, tokens


def scoring_alone(job: Job, records: list[dict]) -> float:
    """Seconds."""
    dispatch = [one.dispatcher(one.load()) for one in (job.student, job.teacher)]
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
        run = open_run(folder, options.prompts)
        job, requests = make_job(run), scored.training_requests(run)
        for repeat in range(options.repeats + 1):
            seconds, artefact = whole_job(job, folder / f"cache-{repeat}", requests)
            sampling, tokens = sampling_alone(job, requests)
            scoring = scoring_alone(job, list(Records(artefact)))
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
