"""Shared fixtures: a small model, its Transformers twin, and eight fake devices."""

import os
import pathlib
import tempfile

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # else an installed libtpu looks for its chips
_COMPILED = pathlib.Path(tempfile.gettempdir()) / "lopd-test-compiled"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_COMPILED))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

from lopd.machine import devices  # noqa: E402
from lopd.models import decoder  # noqa: E402

TIED = decoder.DecoderConfig(
    vocab_size=37,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=16,
    initializer_range=0.2,
    max_position_embeddings=512,
)


@pytest.fixture(scope="session")
def config() -> decoder.DecoderConfig:
    return TIED


@pytest.fixture(scope="session")
def params(config):
    return random_params(config, seed=0)


@pytest.fixture(scope="session")
def one_device_mesh():
    sizes = {"data": 1, "fsdp": 1, "tensor": 1}
    return devices.make_mesh(sizes, jax.devices()[:1])


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory):
    """A folder with an untrained teacher and π_ref, as their stages would have left them."""
    from tiny_run import save_models, use_one_device

    folder = tmp_path_factory.mktemp("models")
    with pytest.MonkeyPatch.context() as patch:
        use_one_device(patch)
        save_models(folder)
    return folder


@pytest.fixture(scope="module")
def one_device():
    """What a module's tests run in this process uses one device."""
    from tiny_run import use_one_device

    with pytest.MonkeyPatch.context() as patch:
        use_one_device(patch)
        yield


def random_params(config: decoder.DecoderConfig, seed: int) -> decoder.Params:
    """Parameters whose norm scales are random too, so that a missed one shows."""
    params = decoder.init_params(config, jax.random.key(seed))
    rng = np.random.default_rng(seed)

    def perturb(path, x):
        if "norm" not in jax.tree_util.keystr(path):
            return x
        return jax.numpy.asarray(rng.uniform(0.5, 1.5, x.shape), x.dtype)

    return jax.tree_util.tree_map_with_path(perturb, params)


def random_records(config, lengths, seed=0, **fields) -> list[dict]:
    """Records with (prompt, response) lengths, random ids, and float fields drawn in [−2, 0]."""
    rng = np.random.default_rng(seed)
    records = []
    for prompt, response in lengths:
        record = {
            "prompt_tokens": rng.integers(3, config.vocab_size, prompt).astype(np.int32),
            "response_tokens": rng.integers(3, config.vocab_size, response).astype(np.int32),
        }
        for name in fields:
            record[name] = rng.uniform(-2, 0, response).astype(np.float32)
        records.append(record)
    return records
