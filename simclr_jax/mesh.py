"""One mesh over all devices: the batch is split over them, everything else is on each of them."""

import os
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from simclr_jax.errors import UserError


def data_mesh(batch_size: int, parts: int = 1) -> Mesh:
    """`mesh_of` all devices, of all processes, over which each microbatch, of `parts`, is split.

    Raises:
      UserError: if the devices cannot share it evenly.
    """
    devices = jax.devices()
    if parts > 1 and batch_size // parts % len(devices):
        raise UserError(
            f"config.train.microbatch_size is {batch_size // parts}, not a multiple of the {len(devices)} "
            "devices; set it to one"
        )
    if batch_size % len(devices):
        raise UserError(
            f"config.train.batch_size is {batch_size}, not a multiple of the {len(devices)} devices; "
            f"set --config.train.batch_size={max(1, batch_size // len(devices)) * len(devices)}"
        )
    return mesh_of(devices)


def mesh_of(devices: Sequence[Any]) -> Mesh:
    """A mesh of `devices` along the axis `data`.

    Axes are Auto, which `jax.make_mesh` does not do by itself: under Explicit axes `z @ z.T` with `z`
    split over `data` raises. Under Auto the program's meaning is global, so BatchNorm statistics and
    NT-Xent's negatives are those of the whole batch whatever the number of devices.
    """
    return jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)


def device_name() -> str:
    """The devices, in words."""
    devices, processes = jax.devices(), jax.process_count()
    on_cpu = devices[0].platform == "cpu"
    name = f"CPU with {os.cpu_count()} cores" if on_cpu else f"{len(devices)} x {devices[0].device_kind}"
    return name if processes == 1 else f"{name} in {processes} processes"


def replicated(mesh: Mesh) -> NamedSharding:
    """The same array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def split(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """The array's `axis` cut over the devices."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, "data"))
