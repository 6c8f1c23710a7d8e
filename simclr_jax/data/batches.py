"""Which images make up a step, and how they reach the device.

The order is a pure function of (seed, epoch), so a run can begin at any step without a stored iterator.
"""

import functools
import math
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from simclr_jax import hosts
from simclr_jax import mesh as meshes
from simclr_jax.data.pack import Pack


class Batch(NamedTuple):
    """A step's images, on the device."""

    canvas: jax.Array  # uint8 [B, S, S, 3]
    extent: jax.Array  # int32 [B, 2], height and width of the image on its canvas
    label: jax.Array  # int32 [B], -1 where an image has none
    ids: jax.Array  # int32 [B], which images of the data set they are


def step_indices(step: int, *, seed: int, images: int, batch_size: int) -> np.ndarray:
    """int32 [batch_size]: the images of `step`, counted from 0; each epoch is a new permutation."""
    steps_per_epoch = images // batch_size
    epoch, position = divmod(step, steps_per_epoch)
    return _order(seed, epoch, images)[position * batch_size : (position + 1) * batch_size]


# Drawn for every step it is 0.6 ms of 50,000 images and 39 of 1.28 million, while the device waits.
@functools.lru_cache(2)
def _order(seed: int, epoch: int, images: int) -> np.ndarray:
    order = np.random.default_rng((seed, epoch)).permutation(images).astype(np.int32)
    order.flags.writeable = False
    return order


class ResidentBatches:
    """The pack lies on the devices; a call sends the indices of its steps and nothing else.

    Attributes:
      steps_per_call: the most steps of a call.
      device_bytes: what lies on each device.
      fetch: (arrays of `call`, indices [B]) to one step's batch, inside the compiled program.
    """

    def __init__(
        self,
        pack: Pack,
        *,
        seed: int,
        batch_size: int,
        steps_per_call: int,
        mesh: Mesh,
        split: bool = False,
    ):
        """Copies `pack` to each device of `mesh`, or with `split` an equal share of its images to each."""
        self.steps_per_call = steps_per_call
        self.fetch = partial(fetch_split, mesh=mesh) if split else fetch
        self._order = dict(seed=seed, images=len(pack), batch_size=batch_size)
        self._indices_sharding = meshes.split(mesh, axis=1)
        everywhere = meshes.replicated(mesh)
        rows = pack.canvas.reshape(len(pack), -1)
        canvas = _split_rows(rows, mesh) if split else hosts.put(rows, everywhere)
        self._arrays = canvas, *hosts.put((pack.extent, pack.label), everywhere)
        self.device_bytes = sum(array.addressable_data(0).nbytes for array in self._arrays)

    def call(self, step: int, count: int) -> tuple[Any, jax.Array]:
        """What `fetch` needs for `count` steps from `step`: the pack, int32 [steps_per_call, B]."""
        rows = [step_indices(step + i, **self._order) for i in range(count)]
        rows += rows[-1:] * (self.steps_per_call - count)  # one shape, so one compilation
        return self._arrays, hosts.put(np.stack(rows), self._indices_sharding)


def fetch(arrays: Any, index: jax.Array) -> Batch:
    """One step's batch of the pack, inside the compiled program.

    Args:
      arrays: canvas uint8 [N, S * S * 3], extent [N, 2] and label [N]. An image is a row: of [N, S, S, 3] a
        TPU's compiler copies the whole pack in every call, to have N last, 3.7 GB for `configs/stl10.py`.
      index: int32 [B].
    """
    canvas, extent, label = arrays
    return Batch(_squares(canvas[index]), extent[index], label[index], index)


def fetch_split(arrays: Any, index: jax.Array, *, mesh: Mesh) -> Batch:
    """As `fetch`, of a canvas whose rows are split over the devices."""

    def collect(canvas: jax.Array, index: jax.Array) -> jax.Array:
        """Each device's share of the batch, from the rows that all devices find among their own."""
        row = index - jax.lax.axis_index("data") * len(canvas)
        own = (row >= 0) & (row < len(canvas))
        found = jnp.where(own[:, None], canvas[jnp.where(own, row, 0)], 0)
        return jax.lax.psum_scatter(found, "data", tiled=True)  # exact: all but one of them are zero

    canvas, extent, label = arrays
    rows = meshes.split(mesh).spec
    collect = jax.shard_map(collect, mesh=mesh, in_specs=(rows, meshes.replicated(mesh).spec), out_specs=rows)
    return Batch(_squares(collect(canvas, index)), extent[index], label[index], index)


def _squares(rows: jax.Array) -> jax.Array:
    """[B, S * S * 3] to [B, S, S, 3]."""
    side = math.isqrt(rows.shape[1] // 3)
    return rows.reshape(len(rows), side, side, 3)


def _split_rows(array: np.ndarray, mesh: Mesh) -> jax.Array:
    """`array` [N, F] cut over the devices by rows, zeros after the last; a process reads its devices'."""
    share = -(-len(array) // mesh.size)

    def read(index: Any) -> np.ndarray:
        rows = array[index[0]]
        missing = share - len(rows)
        return rows if not missing else np.pad(rows, [(0, missing), (0, 0)])

    return jax.make_array_from_callback((share * mesh.size, array.shape[1]), meshes.split(mesh), read)


class StreamedBatches:
    """The pack is too large for the devices: Grain reads the next batches while they work.

    Each process reads the images of its own devices.
    """

    steps_per_call = 1

    def __init__(
        self,
        pack: Pack,
        *,
        seed: int,
        batch_size: int,
        first_step: int,
        total_steps: int,
        mesh: Mesh,
    ):
        """Starts reading at `first_step`, a few batches ahead."""
        self._sharding = meshes.split(mesh)
        self.device_bytes = 2 * batch_size * pack.canvas[0].nbytes // mesh.size  # this batch and the next
        self._indices_sharding = meshes.split(mesh, axis=1)
        order = dict(seed=seed, images=len(pack), batch_size=batch_size)
        places = self._sharding.addressable_devices_indices_map((batch_size,)).values()
        own = np.unique([np.arange(batch_size)[place] for place in places])

        def load(step: int) -> tuple[np.ndarray, ...]:
            batch = step_indices(step, **order)
            index = batch[own]
            # Ascending, a gather walks the file once; a batch's own order means nothing to the loss,
            # but it does to the bits, so the order that was drawn is put back.
            ascending = np.argsort(index)
            canvas = np.empty((len(index), *pack.canvas.shape[1:]), np.uint8)
            canvas[ascending] = pack.canvas[index[ascending]]
            return canvas, pack.extent[index], pack.label[index], batch

        self._batches: Iterator = iter(
            grain.MapDataset.range(first_step, total_steps)
            .map(load)
            .to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4))
        )

    def call(self, step: int, count: int) -> tuple[Any, jax.Array]:
        """The next step's canvas, extent and label, and int32 [1, B] its indices."""
        del step, count  # in order, one at a time
        *arrays, index = next(self._batches)
        return (
            jax.make_array_from_process_local_data(self._sharding, tuple(arrays)),
            hosts.put(index[None], self._indices_sharding),
        )

    @staticmethod
    def fetch(arrays: Any, index: jax.Array) -> Batch:
        """One step's batch, inside the compiled program."""
        canvas, extent, label = arrays
        return Batch(canvas, extent, label, index)
