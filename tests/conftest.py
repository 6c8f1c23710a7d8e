"""House rules for every test: several devices, no silent promotion of ranks, a cache of its own."""

import contextlib
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # on a machine with a GPU or TPU too

import jax
import pytest
from etils.epath import backend, gpath
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import _registry
from jax.experimental.compilation_cache import compilation_cache

from simclr_jax import paths

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
    """Besides, no time to compile programs that another run here has had; all of it for commands as well."""
    folder = str(cache_folder / "xla")
    with _jax_options(jax_compilation_cache_dir=folder, jax_persistent_cache_min_compile_time_secs=0.3):
        compilation_cache.reset_cache()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")
            patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
            yield
    compilation_cache.reset_cache()


class _ObjectStorage(DirFileSystem):
    """gs:// in a local folder. As on object storage, there is no appending, and folders come with files."""

    cachable = False
    root = ""

    def __init__(self, **options):
        super().__init__(self.root, LocalFileSystem(auto_mkdir=True))

    @classmethod
    def _strip_protocol(cls, path):
        return path.removeprefix("gs://").rstrip("/")

    def open(self, path, mode="rb", **options):
        assert mode in ("r", "rb", "w", "wb"), mode
        return super().open(path, mode, **options)

    def makedirs(self, path, exist_ok=False):
        raise AssertionError(f"makes {path}, and gcsfs a bucket that is not there")


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """A folder whose content is that of gs://bucket; what other caches keep goes to a folder of the test."""
    folder = tmp_path / "storage" / "bucket"
    folder.mkdir(parents=True)
    monkeypatch.setattr(_ObjectStorage, "root", str(folder.parent))
    for protocol in ("gs", "gcs"):
        monkeypatch.setitem(_registry, protocol, _ObjectStorage)
    monkeypatch.setattr(gpath, "_is_tf_installed", lambda: False)  # or it reads gs:// with TensorFlow
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "local"))
    forget = (backend.fsspec_backend._get_filesystem.cache_clear, paths._require_bucket.cache_clear)
    for clear in forget:
        clear()
    yield folder
    for clear in forget:
        clear()
