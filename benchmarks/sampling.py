"""Sampling on this machine: against its roofline, and against Transformers' `generate`.

    python benchmarks/sampling.py [--model=small-vocabulary]

Random Qwen3 models in float32: `small-vocabulary` has 48 M parameters, V = 32,768, D = 640, 5
layers, 8 query and 2 key/value heads of 128; `qwen3-vocabulary` 47 M, V = 151,936, D = 256, 6
layers. Every token has about the same small chance of being an end token, so both sides draw
response lengths from the same geometric distribution (mean about 96, cap 512); what counts is
response tokens per second, padding excluded. Needs torch and transformers.
"""

import argparse
import dataclasses
import os
import pathlib
import platform
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from lopd.checkpoints import hugging_face
from lopd.machine.setup import prepare
from lopd.models import decoder, inference
from lopd.sampling import decode
from lopd.sampling.draw import Truncation
from lopd.sampling.engine import Request, Sampling, Stats, generate

_SMALL = decoder.DecoderConfig(
    vocab_size=32_768,
    hidden_size=640,
    intermediate_size=1920,
    num_hidden_layers=5,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=128,
)
MODELS = {
    "small-vocabulary": _SMALL,
    "qwen3-vocabulary": dataclasses.replace(
        _SMALL, vocab_size=151_936, hidden_size=256, intermediate_size=768, num_hidden_layers=6
    ),
}
MEAN_LENGTH, CAP, LONGEST_PROMPT = 96, 512, 64


def end_ids(c: decoder.DecoderConfig) -> tuple[int, ...]:
    """One in MEAN_LENGTH tokens; all are about equally likely, as the random weights are small."""
    return tuple(range(round(c.vocab_size / MEAN_LENGTH)))


def best_seconds(function, *args, repeats: int = 5, calls: int = 3) -> float:
    """The fastest of some measurements of one call."""
    jax.block_until_ready(function(*args))
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(calls):
            out = function(*args)
        jax.block_until_ready(out)
        seconds.append((time.perf_counter() - start) / calls)
    return min(seconds)


def limits() -> tuple[float, float]:
    """Measured arithmetic peak (float32 matmul, FLOP/s) and memory bandwidth (read, B/s)."""
    square = jnp.ones((2048, 2048), jnp.float32)
    flops = 2 * 2048**3 / best_seconds(jax.jit(jnp.matmul), square, square)
    stream = jnp.ones(64 * 2**20, jnp.float32)
    bandwidth = stream.nbytes / best_seconds(jax.jit(jnp.sum), stream)
    return flops, bandwidth


def decode_roofline(c, params, rows: int, filled: int, truncation: Truncation) -> None:
    """One decode step of a full batch against what its arithmetic and its bytes cost at least."""
    steps, before = 8, limits()
    state = decode.empty_state(c, rows, rows, CAP + LONGEST_PROMPT)

    def at(state):
        full = jnp.full(rows, filled, jnp.int32)
        return state.replace(position=full, active=jnp.ones(rows, bool))

    seconds = []
    for _ in range(6):
        state = jax.block_until_ready(at(state))
        start = time.perf_counter()
        state, _, active = decode.decode(
            *(c, steps, truncation, params, state, jnp.uint32(0), jnp.float32(0.8)),
            *(jnp.asarray([c.vocab_size]), jnp.int32(10**6)),
        )
        jax.block_until_ready(active)
        seconds.append((time.perf_counter() - start) / steps)
    flops, bandwidth = map(max, before, limits())
    weights = sum(x.size for x in jax.tree.leaves(params))
    positions = rows * (filled + steps / 2)
    heads = c.num_hidden_layers * c.head_dim * positions
    flop = 2 * rows * weights + 4 * c.num_attention_heads * heads
    read = 4 * (weights + 2 * c.num_key_value_heads * heads)
    bound = max(flop / flops, read / bandwidth)
    print(
        f"decode, {rows} rows at {filled} positions, {truncation}: {min(seconds) * 1e3:.1f} ms a "
        f"step; {flop / 1e9:.2f} GFLOP at {flops / 1e9:.0f} GFLOP/s = {flop / flops * 1e3:.1f} ms, "
        f"{read / 1e6:.0f} MB at {bandwidth / 1e9:.1f} GB/s = {read / bandwidth * 1e3:.1f} ms: "
        f"{bound / min(seconds):.0%} of the roofline",
        flush=True,
    )


def prompts(c: decoder.DecoderConfig, count: int) -> list[np.ndarray]:
    """Random prompts of 16 to LONGEST_PROMPT tokens."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(16, LONGEST_PROMPT + 1, count)
    return [rng.integers(len(end_ids(c)), c.vocab_size, n).astype(np.int32) for n in lengths]


def ours(c, params, count: int, slots: int, decode_steps: int, truncation: Truncation) -> float:
    """Response tokens per second while prompts remain."""
    sampling = Sampling(0.8, CAP, 1, end_ids(c), truncation)
    options = dict(slots=slots, capacity=CAP + LONGEST_PROMPT, decode_steps=decode_steps)
    requests = [Request(i, 0, p) for i, p in enumerate(prompts(c, count))]
    for _ in generate(c, params, requests[:4], sampling, **options):
        pass  # compiles
    stats, fed = Stats(), [time.perf_counter(), 0]

    def feed():
        yield from requests
        fed[:] = time.perf_counter(), stats.tokens

    start = time.perf_counter()
    tokens = sum(
        len(r.tokens) for r in generate(c, params, feed(), sampling, stats=stats, **options)
    )
    seconds = time.perf_counter() - start
    rate = fed[1] / (fed[0] - start)
    print(
        f"lopd, {slots} slots, {decode_steps} steps a call: {rate:.0f} tokens/s while prompts "
        f"remain, {stats.occupancy:.1%} of slots occupied; {tokens / seconds:.0f} tokens/s with "
        f"the last responses' wait ({count} responses, {tokens} tokens, {seconds:.1f} s)",
        flush=True,
    )
    return rate


def theirs(c, model, batch: int, batches: int, truncation: Truncation) -> float:
    """Response tokens per second of Transformers' generate on left-padded batches."""
    settings = transformers.GenerationConfig(
        do_sample=True,
        temperature=0.8,
        top_k=truncation.top_k,
        top_p=truncation.top_p,
        max_new_tokens=CAP,
        eos_token_id=list(end_ids(c)),
        pad_token_id=c.vocab_size - 1,
        use_cache=True,
    )
    torch.manual_seed(0)  # a batch lasts as long as its longest response
    texts, tokens, steps, seconds = prompts(c, batch * batches), 0, 0, 0.0
    for start in range(0, len(texts), batch):
        part = texts[start : start + batch]
        ids = torch.zeros(batch, max(map(len, part)), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(part):
            ids[row, -len(prompt) :] = torch.tensor(prompt)
            mask[row, -len(prompt) :] = 1
        begin = time.perf_counter()
        out = model.generate(ids, attention_mask=mask, generation_config=settings)
        seconds += time.perf_counter() - begin
        made = out[:, ids.shape[1] :].numpy()
        steps += made.shape[1]
        ends = np.isin(made, end_ids(c))
        tokens += int(np.where(ends.any(1), ends.argmax(1) + 1, made.shape[1]).sum())
    print(
        f"transformers, batches of {batch}: {tokens / seconds:.0f} tokens/s ({batches} batches, "
        f"{tokens} tokens, {steps} steps, {seconds / steps * 1e3:.0f} ms a step)",
        flush=True,
    )
    return tokens / seconds


def main() -> None:
    """Prints the machine, the work, the rates and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="small-vocabulary")
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--decode_steps", type=int, default=4)
    parser.add_argument("--responses", type=int, default=640)
    parser.add_argument("--batch", type=int, default=64, help="of transformers")
    parser.add_argument("--batches", type=int, default=2)
    parser.add_argument("--top_p", type=float, default=1.0)
    flags = parser.parse_args()
    c = MODELS[flags.model]
    with tempfile.TemporaryDirectory() as folder:
        prepare(folder)
        stacked = decoder.init_params(c, jax.random.key(0))
        checkpoint = pathlib.Path(folder) / "model"
        checkpoint.mkdir()
        hugging_face.save_checkpoint(checkpoint, c, stacked, end_id=0)
        reference = transformers.AutoModelForCausalLM.from_pretrained(
            checkpoint, dtype=torch.float32
        ).eval()
        params = inference.inference_params(c, stacked)
        size = sum(x.size for x in jax.tree.leaves(params))
        print(f"{os.cpu_count()} x {platform.processor() or platform.machine()}, {size / 1e6:.1f}M")
        print(
            f"jax {jax.__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads"
        )
        truncation = Truncation(top_p=flags.top_p)
        for filled in (100, 200):
            decode_roofline(c, params, flags.slots, filled, truncation)
        rate = ours(c, params, flags.responses, flags.slots, flags.decode_steps, truncation)
        if flags.batches:
            with torch.no_grad():
                other = theirs(c, reference, flags.batch, flags.batches, truncation)
            print(f"lopd / transformers: {rate / other:.1f}")


if __name__ == "__main__":
    main()
