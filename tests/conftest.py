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
import pytest  # noqa: E402
from helpers.models import TIED, random_params  # noqa: E402

from lopd.machine import devices  # noqa: E402
from lopd.models import decoder  # noqa: E402


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
    from helpers.tiny_run import save_models, use_one_device

    folder = tmp_path_factory.mktemp("models")
    with pytest.MonkeyPatch.context() as patch:
        use_one_device(patch)
        save_models(folder)
    return folder


@pytest.fixture(scope="module")
def one_device():
    """What a module's tests run in this process uses one device."""
    from helpers.tiny_run import use_one_device

    with pytest.MonkeyPatch.context() as patch:
        use_one_device(patch)
        yield


_LONGEST_FIRST = (
    *("test_resume", "test_pipeline", "test_precompute", "test_checkpoints", "test_variants"),
    *("test_sampling", "test_notebooks", "test_refresh", "test_training", "test_families"),
)


def pytest_collection_modifyitems(items):
    """Files that take minutes begin first, so that two processes end together."""
    rank = {name: i for i, name in enumerate(_LONGEST_FIRST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))
