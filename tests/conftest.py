"""House rules for every test: several devices, no silent promotion of ranks, a cache of its own."""

import contextlib
import os

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, help="of tests/test_kills.py, on a run of configs/shapes.py")


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory):
    """The package's cache, shared by the workers of one test run and by the commands they start."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cache"
    previous = os.environ.get("SIMCLR_JAX_CACHE")
    os.environ["SIMCLR_JAX_CACHE"] = str(folder)
    yield folder
    if previous is None:
        del os.environ["SIMCLR_JAX_CACHE"]
    else:
        os.environ["SIMCLR_JAX_CACHE"] = previous


@contextlib.contextmanager
def _jax_options(**options):
    previous = {name: jax.config.values[name] for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
    yield
    for name, value in previous.items():
        jax.config.update(name, value)


@pytest.fixture(scope="module")
def quick_compilation():
    """Half the time to compile, and the same numbers to the tolerances of the tests that ask for it."""
    with _jax_options(jax_disable_most_optimizations=True):
        yield


@pytest.fixture(scope="module")
def kept_compilations(quick_compilation, cache_folder):
    """Besides, no time to compile programs that another run here has had."""
    folder = str(cache_folder / "xla")
    with _jax_options(jax_compilation_cache_dir=folder, jax_persistent_cache_min_compile_time_secs=0.3):
        compilation_cache.reset_cache()
        yield
    compilation_cache.reset_cache()
