"""House rules for every test: several devices, no silent promotion of ranks, a cache of its own."""

import os

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_rank_promotion", "raise")


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
