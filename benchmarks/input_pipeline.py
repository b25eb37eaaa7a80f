"""How fast batches are made, against what one accelerator trains on.

    python benchmarks/input_pipeline.py [--records=6000] [--directory=DIR]

Writes a cache of responses of log-normal length (cut at 4,096 tokens, with prompts of about 150),
then reads, checks, packs and lays out batches of 256 as training does, in one thread. The cache is
larger than what is held in memory, so all of it comes from disk; one of few records is held, and
its rates leave reading out. Limit: 20 × 10,000 tokens/s, an H100 that trains an 8B model at about
half its peak.
"""

import argparse
import os
import platform
import tempfile
import time

import numpy as np

from lopd.artefacts.artefact import Artefact
from lopd.cache import totals, writer
from lopd.cache.fields import SCORED_FIELDS
from lopd.cache.reader import Records
from lopd.config.settings import RuntimeSettings
from lopd.data.batches import step_batches
from lopd.data.layout import Layout

TARGET = 20 * 10_000


def long_records(count: int) -> list[dict]:
    """Records with the lengths of long reasoning."""
    rng = np.random.default_rng(0)
    records = []
    for i in range(count):
        prompt, response = rng.integers(80, 250), int(min(4096, rng.lognormal(7.4, 0.7) + 1))
        logprobs = -rng.exponential(0.3, response).astype(np.float32)
        records.append(
            {
                "prompt_id": i,
                "sample_id": 0,
                "prompt_tokens": rng.integers(0, 150_000, prompt).astype(np.int32),
                "response_tokens": rng.integers(0, 150_000, response).astype(np.int32),
                "finished": response < 4096,
                **dict.fromkeys(
                    ("behaviour_logprobs", "teacher_logprobs", "ref_logprobs"), logprobs
                ),
            }
        )
    return records


def make_cache(path: str, records: list[dict]) -> Artefact:
    """A finished cache, in shards as `precompute` makes them by default."""
    artefact = Artefact(path)
    artefact.begin("precompute", {}, {})
    per_shard = RuntimeSettings().records_per_shard
    shards = [records[i : i + per_shard] for i in range(0, len(records), per_shard)]
    for i, shard in enumerate(shards):
        counted = totals.of_responses(shard) | totals.of_scores(shard)
        writer.write_shard(artefact, SCORED_FIELDS, i, len(shards), shard, counted, {})
    writer.write_metadata(artefact)
    artefact.finish(writer.outputs(artefact))
    return artefact


def main() -> None:
    """Prints rates of the whole path and of its parts."""
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--records", type=int, default=6000)
    arguments.add_argument("--directory", default=None)
    options = arguments.parse_args()
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        source = Records(make_cache(folder, long_records(options.records)))
        batches = step_batches(
            source,
            Layout(5120, 8, "sample_mean", ("teacher_logprobs", "ref_logprobs")),
            seed=0,
            batch_size=256,
        )
        steps = max(2, options.records // 256)
        start, full = time.perf_counter(), []
        tokens = 0
        for batch in batches.iterate(0, steps):
            used = int(batch.num_micro)
            rows = (batch.segment_ids > 0).any(axis=-1)
            full.append((batch.segment_ids > 0)[rows].mean())
            tokens += int((batch.segment_ids > 0).sum())
            assert used * 8 >= rows.sum()
        rate = tokens / (time.perf_counter() - start)
        print(f"batches: {rate:,.0f} tokens/s, {rate / TARGET:.1f} × the limit of {TARGET:,}")
        print(f"rows of 5,120 filled to {np.mean(full):.1%} ({steps} batches of 256)")
        start, read = time.perf_counter(), 0
        for i in range(min(512, options.records)):
            record = source[i]
            read += len(record["prompt_tokens"]) + len(record["response_tokens"])
        rate = read / (time.perf_counter() - start)
        print(f"reading and checking alone: {rate:,.0f} tokens/s")


if __name__ == "__main__":
    main()
