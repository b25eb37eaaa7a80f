"""The OPD training step and teacher scoring: tokens/s, utilisation, memory; and PyTorch beside it.

    python benchmarks/training_step.py --model=42m --rows=2 --length=1024 --torch
    python benchmarks/training_step.py --model=qwen3-1.7b --rows=2 --length=4096 \\
        --dtype=bfloat16 --torch

One row holds one response after a short prompt, so both sides do the same work: a forward, the
log-probability of every token, Huber regression onto given teacher log-probabilities, a backward,
clipping and AdamW on float32 master weights. Utilisation is model FLOPs (no recomputation counted)
over a matmul peak measured in the same run.
"""

import argparse
import gc
import os
import resource
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np

from lopd.config.settings import TrainingRecipe
from lopd.data.batches import micro_batches, put_batch
from lopd.data.layout import Layout
from lopd.machine import devices, setup
from lopd.models import decoder
from lopd.models.flops import training_flops
from lopd.models.presets import PRESETS
from lopd.models.shardings import param_shardings
from lopd.objectives.sampled import lightning_opd
from lopd.rollouts.scoring import score_responses
from lopd.training.state import create_state, make_optimizer
from lopd.training.step import make_train_step

SMALL = {"42m": decoder.DecoderConfig(32_768, 512, 1536, 8, 8, 4, 64)}
PROMPT = 64
RECIPE = TrainingRecipe(learning_rate=1e-5)
TAU = 10.0


def matmul_peak(dtype, seconds: float = 3.0) -> float:
    """FLOP/s of a large square matmul in `dtype`."""
    size = 2048 if jax.default_backend() == "cpu" else 8192
    a = jnp.ones((size, size), dtype)
    multiply = jax.jit(lambda a, b: a @ b)
    multiply(a, a).block_until_ready()
    best, end = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        multiply(a, a).block_until_ready()
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def records(config: decoder.DecoderConfig, rows: int, length: int) -> list[dict]:
    """`rows` responses that fill a row each."""
    rng = np.random.default_rng(0)
    ids = lambda n: rng.integers(0, config.vocab_size, n).astype(np.int32)  # noqa: E731
    count = length - PROMPT + 1
    scores = lambda: rng.uniform(-2, 0, count).astype(np.float32)  # noqa: E731
    return [
        {
            "prompt_tokens": ids(PROMPT),
            "response_tokens": ids(count),
            "teacher_logprobs": scores(),
            "ref_logprobs": scores(),
        }
        for _ in range(rows)
    ]


def timed(step, steps: int, wait) -> tuple[float, float]:
    """Seconds of the first call, and of a later one (the median)."""
    start = time.perf_counter()
    wait(step())
    first, times = time.perf_counter() - start, []
    for _ in range(steps):
        start = time.perf_counter()
        wait(step())
        times.append(time.perf_counter() - start)
    return first, float(np.median(times))


def jax_step(config, mesh, data, args):
    """A function that makes one update; the state lives in it."""
    optimizer = make_optimizer(RECIPE)
    params = jax.jit(
        lambda key: decoder.init_params(config, key),
        out_shardings=param_shardings(config, mesh),
    )(jax.random.key(0))
    state = create_state(optimizer, params, mesh)
    train = make_train_step(config, optimizer, lightning_opd(TAU), params, mesh, args.remat)
    fields = ("teacher_logprobs", "ref_logprobs")
    layout = Layout(args.length, args.rows, "sample_mean", fields)
    batch = put_batch(micro_batches(data, layout), mesh, args.rows)

    def step():
        nonlocal state
        state, metrics = train(state, {}, batch)
        return metrics["loss"]

    return step


def torch_step(config, data, args):
    """The same update by PyTorch and Transformers' Qwen3, with autocast for bfloat16."""
    import torch
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = transformers.Qwen3Config(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        tie_word_embeddings=config.tie_word_embeddings,
        attn_implementation="sdpa",
        use_cache=False,
    )
    model = transformers.Qwen3ForCausalLM(shape).to(device)
    model.train()
    if args.checkpointing:
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=RECIPE.learning_rate, betas=(0.9, 0.98), weight_decay=0.1,
        fused=True,
    )  # fmt: skip
    tokens = torch.tensor(
        np.stack([np.concatenate([r["prompt_tokens"], r["response_tokens"]]) for r in data]),
        dtype=torch.long, device=device,
    )  # fmt: skip
    teacher = torch.tensor(np.stack([r["teacher_logprobs"] for r in data]), device=device)

    def step():
        with torch.autocast(device, torch.bfloat16, enabled=args.dtype == "bfloat16"):
            logits = model(tokens[:, :-1]).logits[:, PROMPT - 1 :].float()
        chosen = logits.gather(-1, tokens[:, PROMPT:, None])[..., 0]
        logprobs = chosen - torch.logsumexp(logits, -1)
        loss = torch.nn.functional.huber_loss(logprobs, teacher, delta=TAU)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.detach()

    return step, lambda loss: loss.item()


def report(name, tokens, flops, first, seconds, peak) -> None:
    """One line of the table."""
    print(
        f"{name:<28}{tokens / seconds:>12,.0f}{seconds:>10.3f}{flops / seconds / 1e12:>10.3f}"
        f"{flops / seconds / peak:>9.1%}{first:>10.1f}",
        flush=True,
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="42m", help="42m, or a preset of lopd.models.presets")
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--remat", default="full", help="a key of decoder.REMAT_POLICIES")
    parser.add_argument("--torch", action="store_true", help="also PyTorch, on the same device")
    parser.add_argument("--checkpointing", action="store_true", help="PyTorch: recompute too")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as compiled:
        setup.prepare(compiled)
        run(args)


def run(args: argparse.Namespace) -> None:
    """Measures and prints."""
    config = (SMALL | dict(PRESETS))[args.model]
    config = config.__class__(**{**config.__dict__, "dtype": args.dtype})
    mesh = devices.make_mesh({"data": 1, "fsdp": -1, "tensor": 1})
    data = records(config, args.rows, args.length)
    tokens = args.rows * args.length
    training = training_flops(config, tokens, tokens * args.length)
    peak = matmul_peak(jnp.dtype(args.dtype)) * mesh.size
    parameters = sum(x.size for x in jax.tree.leaves(decoder.abstract_params(config)))
    print(
        f"{jax.devices()[0].device_kind} × {mesh.size}, {os.cpu_count()} cores, "
        f"jax {jax.__version__}; {args.model} ({parameters / 1e6:.0f} M parameters), "
        f"{args.rows} rows × {args.length}, {args.dtype}; "
        f"matmul peak {peak / 1e12:.3f} TFLOP/s"
    )
    print(f"{'':28}{'tokens/s':>12}{'seconds':>10}{'TFLOP/s':>10}{'of peak':>9}{'first s':>10}")
    if args.torch:
        step, wait = torch_step(config, data, args)
        report("PyTorch OPD step", tokens, training, *timed(step, args.steps, wait), peak)
        del step, wait
        gc.collect()
    step = jax_step(config, mesh, data, args)
    report("lopd OPD step", tokens, training, *timed(step, args.steps, jax.block_until_ready),
           peak)  # fmt: skip
    del step
    gc.collect()
    params = jax.jit(
        lambda key: jax.tree.map(lambda x: x.astype(args.dtype), decoder.init_params(config, key)),
        out_shardings=param_shardings(config, mesh),
    )(jax.random.key(0))
    score = lambda: score_responses(  # noqa: E731
        config, params, data, mesh=mesh, row_length=args.length, rows_per_micro=args.rows
    )
    report("lopd scoring", tokens, training / 3, *timed(score, args.steps, lambda x: x), peak)
    stats = jax.devices()[0].memory_stats() or {}
    memory = stats.get(
        "peak_bytes_in_use", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    print(f"peak memory of the process or device: {memory / 2**30:.2f} GiB")


if __name__ == "__main__":
    main()
