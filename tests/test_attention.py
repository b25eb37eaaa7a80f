"""Attention over packed rows against float64 NumPy: values, gradients, and what is never seen."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.models import TIED
from jax.experimental.pallas import tpu as pltpu

from lopd.machine import devices
from lopd.machine.sharding import on_mesh
from lopd.models import attention, blocked_attention, decode_attention, decoder

ROWS, HEADS, KV_HEADS, HEAD_DIM = 2, 4, 2, 8


def packed_ids(length, seed=0):
    """Two rows of segments of random length; the first row ends in padding."""
    rng = np.random.default_rng(seed)
    ids = np.zeros((ROWS, length), np.int32)
    for row in range(ROWS):
        cuts = np.sort(rng.choice(np.arange(1, length), 3, replace=False))
        for segment, part in enumerate(np.split(np.arange(length), cuts), start=1):
            ids[row, part] = segment
    ids[0, cuts[-1] :] = 0
    return ids


def inputs(length, seed=0, head_dim=HEAD_DIM):
    rng = np.random.default_rng(seed)
    shape = lambda heads: (ROWS, length, heads, head_dim)  # noqa: E731
    q, k, v = (rng.normal(size=shape(h)) for h in (HEADS, KV_HEADS, KV_HEADS))
    return (q, k, v), packed_ids(length, seed), rng.normal(size=shape(HEADS))


def float64_attention(q, k, v, ids, d_out):
    """Output and gradients of sum(output · d_out), one query head of one row at a time."""
    out, grads = np.zeros_like(q), [np.zeros_like(x) for x in (q, k, v)]
    d_q, d_k, d_v = grads
    scale = q.shape[-1] ** -0.5
    for b, h in np.ndindex(q.shape[0], q.shape[2]):
        g = h // (q.shape[2] // k.shape[2])
        scores = scale * q[b, :, h] @ k[b, :, g].T
        seen = np.tril(ids[b][:, None] == ids[b][None, :])
        p = np.where(seen, np.exp(scores - scores.max(-1, keepdims=True)), 0)
        p /= p.sum(-1, keepdims=True)
        out[b, :, h] = p @ v[b, :, g]
        d_p = d_out[b, :, h] @ v[b, :, g].T
        d_scores = scale * p * (d_p - (p * d_p).sum(-1, keepdims=True))
        d_q[b, :, h] = d_scores @ k[b, :, g]
        d_k[b, :, g] += d_scores.T @ q[b, :, h]
        d_v[b, :, g] += p.T @ d_out[b, :, h]
    return out, grads


def check_equals_float64(attend, length, head_dim=HEAD_DIM, sharding=None):
    (q, k, v), ids, d_out = inputs(length, head_dim=head_dim)
    out, grads = float64_attention(q, k, v, ids, d_out)

    @jax.jit
    def run(q, k, v):
        found, backward = jax.vjp(lambda *qkv: attend(*qkv, jnp.asarray(ids)), q, k, v)
        return found, backward(jnp.asarray(d_out, jnp.float32))

    found, found_grads = run(*(jax.device_put(np.float32(x), sharding) for x in (q, k, v)))
    np.testing.assert_allclose(found, out, atol=1e-5)
    for a, b in zip(found_grads, grads, strict=True):
        np.testing.assert_allclose(a, b, atol=3e-5)


@pytest.mark.parametrize("length", [8, 24, 32, 37])
def test_xla_equals_float64(monkeypatch, length):
    """Rows of one block, of a few, of a length that blocks do not divide, of one to four spans."""
    monkeypatch.setattr(blocked_attention, "BLOCK", 8)
    check_equals_float64(attention.xla_attention, length)


def decoding_inputs(B, H, K, C, N=128):
    """float32 queries, keys and values of B rows, and how many positions each holds."""
    rng = np.random.default_rng(0)
    shapes = (B, H, N), (B, K, C, N), (B, K, C, N)
    lengths = rng.integers(1, C + 1, B)
    lengths[:4] = 1, 128, 129, C
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes], lengths


def float64_decoding(q, k, v, lengths):
    out = np.zeros(q.shape)
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    for b, h in np.ndindex(q.shape[:2]):
        keys, values = (x[b, h * k.shape[1] // q.shape[1], : lengths[b]] for x in (k, v))
        scores = q.shape[2] ** -0.5 * keys @ q[b, h]
        weights = np.exp(scores - scores.max())
        out[b, h] = weights @ values / weights.sum()
    return out


def attend_stored(q, k, v, lengths):
    """`attend_filled` to keys in their plain order."""
    k = decode_attention.store_keys(jnp.asarray(k), k.shape[2])
    return decode_attention.attend_filled(q, k, v, lengths)


def check_rows_do_not_see_others(attend, arrays, lengths):
    """Every row is bit for bit the same whatever the other rows hold."""
    found = np.asarray(attend(*arrays, lengths))
    changed = np.random.default_rng(1).integers(1, arrays[1].shape[2] + 1, len(lengths))
    others = np.where(np.arange(len(lengths)) % 2, lengths, changed)
    same = lengths == others
    assert len(lengths) / 3 < same.sum() < len(lengths)
    np.testing.assert_array_equal(np.asarray(attend(*arrays, others))[same], found[same])


def test_decoding_equals_float64_in_blocks_of_rows():
    """Rows of 1 to 384 positions, which share a block with others of like length."""
    arrays, lengths = decoding_inputs(B=24, H=4, K=2, C=384)
    assert decode_attention.block_rows(2, 384, 128, 4) < 24
    attend = jax.jit(attend_stored)
    np.testing.assert_allclose(
        attend(*arrays, lengths), float64_decoding(*arrays, lengths), atol=1e-5
    )
    check_rows_do_not_see_others(attend, arrays, lengths)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("capacity", [40, 384])
def test_keys_written_one_by_one_are_those_stored_at_once(monkeypatch, platform, capacity):
    """Across the border of a chunk, and of a chunk that is not square; one row is idle."""
    monkeypatch.setattr(decode_attention, "current_platform", lambda: platform)
    (_, keys, _), _ = decoding_inputs(B=4, H=4, K=2, C=capacity, N=16)
    start = np.array([0, 17, 20, 30]) if capacity == 40 else np.array([0, 125, 127, 250])
    active = jnp.array([True, True, False, True])
    known = np.where(np.arange(capacity)[:, None] < start[:, None, None, None], keys, 7)
    cache = decode_attention.store_keys(jnp.asarray(known), capacity)
    for step in range(6):
        positions = start + step
        new = keys[np.arange(4), :, positions]
        cache = decode_attention.write_keys(cache, jnp.asarray(new), jnp.asarray(positions), active)
    ends = np.where(active, start + 6, start)
    expected = np.where(np.arange(capacity)[:, None] < ends[:, None, None, None], keys, 7)
    np.testing.assert_array_equal(
        cache, decode_attention.store_keys(jnp.asarray(expected), capacity)
    )
    assert (np.asarray(cache) == expected).all() == (platform == "tpu")


def test_decoding_on_tpu_equals_float64(monkeypatch):
    """The program of JAX's kernel, interpreted. It reads four chunks of 128 at a time: the row of
    640 positions ends within its second piece, which is filled up with pages that are not its."""
    monkeypatch.setattr(decode_attention, "current_platform", lambda: "tpu")
    arrays, lengths = decoding_inputs(B=6, H=4, K=2, C=640)
    arrays = [x.astype(jnp.bfloat16) for x in arrays]
    with pltpu.force_tpu_interpret_mode():
        attend = jax.jit(attend_stored)
        assert "paged_attention" in attend.lower(*arrays, lengths).as_text()
        found = np.float32(attend(*arrays, lengths))
        check_rows_do_not_see_others(attend, arrays, lengths)
    np.testing.assert_allclose(found, float64_decoding(*arrays, lengths), atol=0.01)


def test_splash_kernel_equals_float64():
    """The TPU kernel's own program, interpreted; length and head dim are both padded."""
    check_equals_float64(
        functools.partial(attention.splash_attention, interpret=True), length=200, head_dim=16
    )


def test_cudnn_arguments_equal_float64():
    """What cuDNN is asked for, computed by XLA: the kernel itself needs a GPU."""
    check_equals_float64(functools.partial(attention.cudnn_attention, implementation="xla"), 32)


@pytest.mark.parametrize(
    ("platform", "dtype", "length", "chosen"),
    [
        ("cpu", jnp.float32, 64, attention.xla_attention),
        ("tpu", jnp.bfloat16, 4096, attention.splash_attention),
        ("gpu", jnp.bfloat16, 5120, attention.cudnn_attention),
        ("gpu", jnp.bfloat16, 32768, attention.xla_attention),  # the mask would be 2 GiB a row
        ("gpu", jnp.float32, 4096, attention.xla_attention),
    ],
)
def test_platforms_choose_their_kernel(platform, dtype, length, chosen):
    q = jax.ShapeDtypeStruct((1, length, 16, 128), dtype)
    assert attention._choose(platform, q) is chosen


def test_attention_on_a_mesh_is_the_same():
    mesh = devices.make_mesh({"data": 1, "fsdp": 2, "tensor": 2}, jax.devices()[:4])

    def attend(*args):
        with on_mesh(mesh):
            return attention.attend(*args)

    check_equals_float64(attend, 16, sharding=devices.replicated(mesh))


def test_no_gradient_crosses_a_segment_or_time(monkeypatch):
    monkeypatch.setattr(blocked_attention, "BLOCK", 8)
    (q, k, v), ids, _ = inputs(32)
    reach = jax.jit(
        jax.grad(lambda kv, b, t: attention.attend(q, kv[0], kv[1], jnp.asarray(ids))[b, t].sum())
    )
    q, kv = jnp.asarray(q, jnp.float32), tuple(jnp.asarray(x, jnp.float32) for x in (k, v))
    for b, t in ((0, 3), (0, 30), (1, 17), (1, 31)):
        moved = sum(np.abs(np.asarray(g)).sum(axis=(2, 3)) for g in reach(kv, b, t))
        seen = np.zeros((ROWS, 32), bool)
        seen[b] = (ids[b] == ids[b, t]) & (np.arange(32) <= t)
        np.testing.assert_array_equal(moved > 0, seen)


def test_training_memory_is_linear_in_row_length():
    """Temporary memory of a compiled gradient: each doubling of a long row adds twice as much."""
    config = dataclasses.replace(TIED, num_hidden_layers=2, hidden_size=16, intermediate_size=16)
    params = decoder.abstract_params(config)

    def temporary_bytes(length):
        rows = jax.ShapeDtypeStruct((1, length), jnp.int32)

        def loss(params, tokens, positions, ids):
            hidden, _ = decoder.forward(config, params, tokens, positions, ids, remat="full")
            return jnp.square(hidden).sum()

        compiled = jax.jit(jax.grad(loss)).lower(params, rows, rows, rows).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, middle, long = (temporary_bytes(n) for n in (4096, 8192, 16384))
    assert long < 2.1 * middle < 4.5 * short


def test_every_remat_policy_gives_the_same_gradient():
    params = decoder.init_params(TIED, jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (2, 12), 3, TIED.vocab_size)
    positions, ids = jnp.broadcast_to(jnp.arange(12), (2, 12)), jnp.ones((2, 12), jnp.int32)

    @functools.partial(jax.jit, static_argnums=0)
    def gradient(remat, params):
        loss = lambda p: jnp.square(  # noqa: E731
            decoder.forward(TIED, p, tokens, positions, ids, remat=remat)[0]
        ).sum()
        return jax.grad(loss)(params)

    expected = gradient("none", params)
    for remat in set(decoder.REMAT_POLICIES) - {"none"}:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
            expected,
            gradient(remat, params),
        )
