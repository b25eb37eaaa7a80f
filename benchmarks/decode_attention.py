"""Ways of decode attention on this accelerator, beside the bytes they must read.

    python benchmarks/decode_attention.py [--rows=128] [--capacity=5120]

One layer of Qwen3-8B in bfloat16, rows evenly spread over 1 to the capacity. `attend_filled` is
what the sampler uses. The others take the cache as it lies, every head of every row as a sequence
of its own: JAX's paged attention for TPU, cuDNN told the lengths, and all positions with a mask,
which the others' results are compared with. A capacity over 128 is a multiple of it.
"""

import argparse
import functools
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from sampling import best_seconds

from lopd.models import decode_attention


def dense(q_BHN, k_BKCN, v_BKCN, lengths_B, implementation: str):
    """`jax.nn.dot_product_attention`, told the lengths."""
    B, H, N = q_BHN.shape
    K, C = k_BKCN.shape[1:3]
    out = jax.nn.dot_product_attention(
        q_BHN.reshape(B * K, 1, H // K, N),
        k_BKCN.reshape(B * K, C, 1, N),
        v_BKCN.reshape(B * K, C, 1, N),
        key_value_seq_lengths=jnp.repeat(lengths_B, K),
        implementation=implementation,
    )
    return out.reshape(B, H, N)


def pages(q_BHN, k_BKCN, v_BKCN, lengths_B):
    """JAX's kernel for TPU."""
    B, H, N = q_BHN.shape
    K = k_BKCN.shape[1]
    q = q_BHN.reshape(B, K, H // K, N)
    return decode_attention.attend_pages(q, k_BKCN, v_BKCN, lengths_B).reshape(B, H, N)


def main() -> None:
    """Prints a line for each way."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--capacity", type=int, default=5120)
    options = parser.parse_args()
    device, B, C = jax.devices()[0], options.rows, options.capacity
    H, K, N = 32, 8, 128
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (
        jax.random.normal(key, shape, jnp.bfloat16)
        for key, shape in zip(keys, ((B, H, N), (B, K, C, N), (B, K, C, N)), strict=True)
    )
    lengths = jnp.asarray(np.linspace(1, C, B).astype(np.int32))
    lengths = jax.random.permutation(jax.random.key(1), lengths)
    filled = int(lengths.sum()) * K * N * 2 * 2
    stream = jnp.ones(2**28, jnp.bfloat16)
    bandwidth = stream.nbytes / best_seconds(jax.jit(jnp.sum), stream)
    print(f"{device.device_kind}, jax {jax.__version__}, {bandwidth / 1e9:.0f} GB/s read")
    print(f"{B} rows of {C}: {filled / 2**20:.0f} MiB filled, {filled / bandwidth * 1e3:.3f} ms")
    ways = {"all, masked": functools.partial(dense, implementation="xla")}
    ways["attend_filled"] = decode_attention.attend_filled
    if device.platform == "gpu":
        ways["cuDNN, lengths"] = functools.partial(dense, implementation="cudnn")
    if device.platform == "tpu":
        ways["paged attention"] = pages
    stored, reference = decode_attention.store_keys(k, C), None
    for name, way in ways.items():
        function, keys = jax.jit(way), stored if name == "attend_filled" else k
        out = np.asarray(function(q, keys, v, lengths), np.float32)
        reference = out if reference is None else reference
        seconds = best_seconds(function, q, keys, v, lengths, calls=10)
        print(
            f"{name:16} {seconds * 1e3:8.3f} ms, {filled / bandwidth / seconds:4.0%} of the bytes' "
            f"bandwidth, differs by {np.abs(out - reference).max():.2g}",
            flush=True,
        )


if __name__ == "__main__":
    main()
