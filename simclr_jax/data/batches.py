"""Which images make up a step, and how they reach the device.

The order is a pure function of (seed, epoch), so a run can begin at any step without a stored iterator.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
from jax.sharding import Mesh

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
    order = np.random.default_rng((seed, epoch)).permutation(images)
    return order[position * batch_size : (position + 1) * batch_size].astype(np.int32)


class ResidentBatches:
    """The pack lies on every device; a call sends the indices of its steps and nothing else."""

    def __init__(self, pack: Pack, *, seed: int, batch_size: int, steps_per_call: int, mesh: Mesh):
        """Copies `pack` to the devices of `mesh`."""
        self.steps_per_call = steps_per_call
        self._order = dict(seed=seed, images=len(pack), batch_size=batch_size)
        self._indices_sharding = meshes.split(mesh, axis=1)
        self._arrays = jax.device_put((pack.canvas, pack.extent, pack.label), meshes.replicated(mesh))

    def call(self, step: int, count: int) -> tuple[Any, jax.Array]:
        """What `fetch` needs for `count` steps from `step`: the pack, int32 [steps_per_call, B]."""
        rows = [step_indices(step + i, **self._order) for i in range(count)]
        rows += rows[-1:] * (self.steps_per_call - count)  # one shape, so one compilation
        return self._arrays, jax.device_put(np.stack(rows), self._indices_sharding)

    @staticmethod
    def fetch(arrays: Any, index: jax.Array) -> Batch:
        """One step's batch, inside the compiled program."""
        canvas, extent, label = arrays
        return Batch(canvas[index], extent[index], label[index], index)


class StreamedBatches:
    """The pack is too large for the device: Grain reads the next batches while the device works."""

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
        self._indices_sharding = meshes.split(mesh, axis=1)
        order = dict(seed=seed, images=len(pack), batch_size=batch_size)

        def load(step: int) -> tuple[np.ndarray, ...]:
            index = step_indices(step, **order)
            # Ascending, a gather walks the file once; a batch's own order means nothing to the loss,
            # but it does to the bits, so the order that was drawn is put back.
            ascending = np.argsort(index)
            canvas = np.empty((len(index), *pack.canvas.shape[1:]), np.uint8)
            canvas[ascending] = pack.canvas[index[ascending]]
            return canvas, pack.extent[index], pack.label[index], index

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
            jax.device_put(tuple(arrays), self._sharding),
            jax.device_put(index[None], self._indices_sharding),
        )

    @staticmethod
    def fetch(arrays: Any, index: jax.Array) -> Batch:
        """One step's batch, inside the compiled program."""
        canvas, extent, label = arrays
        return Batch(canvas, extent, label, index)
