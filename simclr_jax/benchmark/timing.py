"""Times functions in turns, tells where that was, and writes it down."""

import contextlib
import datetime
import functools
import importlib.metadata
import os
import pathlib
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from simclr_jax.errors import UserError

IDLE_LOAD = 0.5  # processes on average over the last minute: above it other work runs beside

_PACKAGES = (
    *("simclr_jax", "jax", "jaxlib", "dm-pix", "numpy", "pillow", "torch", "torchvision", "kornia"),
    *("scikit-learn", "faiss-cpu"),
)
_COPIED_BYTES = 256_000_000
_PAUSE_SECONDS = 0.01


class Times(NamedTuple):
    """What the repeats of one function took, in seconds, in the order in which they were run."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle one."""
        return statistics.median(self.seconds)

    def milliseconds(self) -> dict[str, float]:
        """Median, least and most, as JSON has them."""
        figures = {"median": self.median, "least": min(self.seconds), "most": max(self.seconds)}
        return {name: round(1000 * value, 4) for name, value in figures.items()}

    def __str__(self) -> str:
        """`median least-most` in ms."""
        least, most = (short(1000 * extreme(self.seconds)) for extreme in (min, max))
        return f"{short(1000 * self.median)} {least}-{most}"


def short(value: float) -> str:
    """Two or three digits, or all of those before the point: 0.012, 0.12, 1.23, 12.3, 123, 1234."""
    digits = 3 if value < 0.0995 else 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{digits}f}"


def in_turns(functions: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, Times]:
    """Times functions against each other.

    Each is called once without being timed. Then, `repeats` times over, each is called in its turn, so that
    whatever slows the machine down for a while slows all of them.

    Args:
      functions: by name; they return when their work is done.
      repeats: at least 1.
    """
    for function in functions.values():
        function()

    def timed(function: Callable[[], object]) -> float:
        start = time.perf_counter()
        function()
        return time.perf_counter() - start

    return told_in_turns(
        {name: functools.partial(timed, function) for name, function in functions.items()}, repeats
    )


def told_in_turns(functions: Mapping[Any, Callable[[], float]], repeats: int) -> dict[Any, Times]:
    """As `in_turns`, of functions that have been called and tell their time themselves, in seconds."""
    seconds: dict[Any, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            time.sleep(_PAUSE_SECONDS)  # OpenMP's threads spin for a while after their work
            seconds[name].append(function())
    return {name: Times(tuple(values)) for name, values in seconds.items()}


class Program(NamedTuple):
    """A compiled function with its arguments on the device."""

    run: Callable[[], object]  # returns when the result is there
    compile_seconds: float
    moved_bytes: int  # of arguments and results


def compiled(function: Callable[..., Any], *arguments: Any) -> Program:
    """Compiles a function of arrays that returns one array."""
    start = time.perf_counter()
    program = jax.jit(function).lower(*arguments).compile()
    seconds = time.perf_counter() - start
    moved = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((arguments, program.out_info)))
    return Program(lambda: jax.block_until_ready(program(*arguments)), seconds, moved)


@contextlib.contextmanager
def no_kept_compilations() -> Iterator[None]:
    """Within it every program is compiled anew, so that compilation can be timed."""
    before = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)


def copy_rate(repeats: int = 5) -> float:
    """Bytes a second that the device reads and writes, in the best of some copies of 256 MB."""
    program = compiled(lambda array: array + 1, jnp.zeros(_COPIED_BYTES // 4, jnp.float32))
    return program.moved_bytes / min(in_turns({"copy": program.run}, repeats)["copy"].seconds)


def product_rates(side: int, repeats: int, dtype: str = "float32") -> dict[str, float]:
    """Operations a second in a product of two matrices [side, side], the best of some.

    Args:
      side: of the matrices, whose entries are from a normal distribution.
      repeats: timed products of each.
      dtype: of the matrices.

    Returns:
      `JAX`, on the device, in full precision; of float32 on a CPU also `NumPy`.
    """
    matrix = np.random.default_rng(0).standard_normal((side, side), np.float32)
    product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    factors = [jnp.asarray(matrix, dtype)] * 2
    runs: dict[str, Callable[[], object]] = {"JAX": compiled(product, *factors).run}
    if jax.default_backend() == "cpu" and dtype == "float32":
        runs["NumPy"] = lambda: matrix @ matrix
    times = in_turns(runs, repeats)
    return {name: 2 * side**3 / min(time.seconds) for name, time in times.items()}


def cores() -> int:
    """The CPU cores of this machine."""
    return os.cpu_count() or 1


def circumstances() -> dict[str, Any]:
    """Date, versions and hardware, and the commit where this package lies in a git repository."""
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    hardware = {
        "device": str(jax.devices()[0].device_kind),
        "platform": jax.default_backend(),
        "cpu": _processor(),
        "cores": cores(),
    }
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    found = {"date": now, "versions": versions, "hardware": hardware}
    commit = _commit()
    return found | {"commit": commit} if commit else found


def where(hardware: Mapping[str, Any], load: float) -> list[str]:
    """Lines on the machine, of `circumstances()["hardware"]`, and a warning where other work runs on it."""
    lines = [] if hardware["platform"] == "cpu" else [hardware["device"]]
    lines.append(f"{hardware['cpu']}, {hardware['cores']} cores")
    if load > IDLE_LOAD:
        lines.append(
            f"warning: other work runs on this machine (load average {load}) and slows what is timed"
        )
    return lines


def checked_out(text: str) -> pathlib.Path | None:
    """The file that `--out` names, None where it is empty. Raises `UserError` where it cannot be made."""
    if not text:
        return None
    path = pathlib.Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise UserError(f"--out must be a file in a folder that is there; got {text!r}")
    return path


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit, with `-dirty` after it where files were changed since."""

    def git(*arguments: str) -> str:
        here = pathlib.Path(__file__)
        command = ["git", "-C", str(here.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", __file__)  # the repository may be of something around us
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return None
