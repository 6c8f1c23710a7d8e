"""Compiling for an NVIDIA GPU on a machine without one.

JAX's CUDA plugin, `pip install "jax[cuda13]"`, compiles for a GPU that is described to it. It cannot try
which way to multiply or to convolve is the fastest there, and the memory that one works in is not counted.
"""

import importlib.metadata
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jax.experimental import topologies

from simclr_jax.errors import UserError

_PLUGINS = ("jax-cuda13-plugin", "jax-cuda12-plugin")


class Gpu(NamedTuple):
    """A GPU as its data sheet, and the table of compute capabilities in CUDA's programming guide, have it."""

    name: str
    capability: tuple[int, int]
    cores: int  # streaming multiprocessors
    lanes: int  # float32 units of each
    threads: int  # at once in each
    shared_bytes: int  # of each
    shared_bytes_of_block: int
    cache_bytes: int
    ghz: float
    bytes_per_second: float
    memory_bytes: float


GPUS: Mapping[str, Gpu] = {
    "t4": Gpu("Tesla T4", (7, 5), 40, 64, 1024, 65536, 65536, 4 << 20, 1.59, 320e9, 15.8e9),
    "l4": Gpu("NVIDIA L4", (8, 9), 58, 128, 1536, 102400, 101376, 48 << 20, 2.04, 300e9, 23.6e9),
    "a100": Gpu(
        "NVIDIA A100-SXM4-40GB", (8, 0), 108, 64, 2048, 167936, 166912, 40 << 20, 1.41, 1555e9, 42.3e9
    ),
    "h100": Gpu(
        "NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 2048, 233472, 232448, 50 << 20, 1.98, 3352e9, 84.9e9
    ),
}


def compiler() -> str | None:
    """The CUDA plugin with its version, None where none is installed."""
    for name in _PLUGINS:
        try:
            return f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def environment() -> dict[str, str]:
    """Of a process that compiles for a GPU. Raises `UserError` if the plugin is missing."""
    if compiler() is None:
        raise UserError('the GPU\'s compiler is missing: pip install "jax[cuda13]"')
    return {"JAX_PLATFORMS": "cpu"}


def devices(target: str, sides: Sequence[int]) -> Sequence[Any]:
    """GPUs of `GPUS` in one host to compile for: so many as the product of `sides`."""
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=_description(GPUS[target]), topology=f"1x1x{math.prod(sides)}"
    )
    return topology.devices


def _description(gpu: Gpu) -> str:
    """The text form of XLA's `GpuTargetConfigProto`."""
    major, minor = gpu.capability
    return f"""
gpu_device_info {{
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  core_count: {gpu.cores}
  fpus_per_core: {gpu.lanes}
  clock_rate_ghz: {gpu.ghz}
  memory_bandwidth: {gpu.bytes_per_second:.0f}
  device_memory_size: {gpu.memory_bytes:.0f}
  l2_cache_size: {gpu.cache_bytes}
  shared_memory_per_core: {gpu.shared_bytes}
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {gpu.shared_bytes_of_block}
  threads_per_core_limit: {gpu.threads}
  threads_per_block_limit: 1024
  threads_per_warp: 32
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 13 }}
device_description_str: "{gpu.name}"
"""
