"""Compiling for a TPU on a machine without one.

The compiler comes with the `libtpu` package, which has to stay out of processes that compute on the CPU: so
it runs in one of its own (`compilers.apart`), with the package's folder on its path.
"""

import importlib.metadata
import importlib.util
import math
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from jax.experimental import topologies

from simclr_jax.errors import UserError

# The first keeps libtpu from asking a cloud's metadata server what machine this is; the next two are what it
# would hear, and without them it complains; the last lets other processes use libtpu at the same time.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_PLATFORMS": "cpu",
}


def find(folder: str) -> str | None:
    """Where libtpu is: `folder`; or with an empty one `""` if it can be imported, None if it cannot.

    Raises:
      UserError: if `folder` has no libtpu.
    """
    if not folder:
        return "" if importlib.util.find_spec("libtpu") else None
    if not (pathlib.Path(folder) / "libtpu" / "libtpu.so").is_file():
        raise UserError(f"there is no libtpu in {folder}; run: pip install --target {folder} libtpu")
    return folder


def environment(folder: str) -> dict[str, str]:
    """Of a process that compiles for a TPU.

    Raises:
      UserError: if libtpu is missing, or not in the folder, which is as for `find`.
    """
    if find(folder) is None:
        raise UserError(
            "the TPU's compiler is missing: pip install --target FOLDER libtpu; then --libtpu=FOLDER"
        )
    path = filter(None, [os.path.abspath(folder) if folder else "", os.environ.get("PYTHONPATH")])
    return _ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(path)}


def devices(target: str, sides: Sequence[int]) -> Sequence[Any]:
    """Chips to compile for, in a process that has the compiler.

    Args:
      target: such as v5e.
      sides: how many, or the rows and columns of a slice.
    """
    # There is no topology of less than a host, which has 4 of these chips.
    slice_name = "x".join(map(str, sides)) if len(sides) > 1 else "2x2"
    topology = topologies.get_topology_desc(f"{target}:{slice_name}", platform="tpu")
    return topology.devices[: math.prod(sides)]


def compiler() -> str:
    """The compiler with its version, in a process that has it."""
    return f"libtpu {importlib.metadata.version('libtpu')}"
