"""A pack of images for tests that train on no matter what."""

import numpy as np

from simclr_jax.data.pack import Pack


def patchwork(images, size):
    """Images [size, size, 3] of 4x4 patches of one random colour each, so that a crop changes them little."""
    patches = np.random.default_rng(0).integers(0, 256, (images, 4, 4, 3), np.uint8)
    return Pack(
        canvas=patches.repeat(size // 4, axis=1).repeat(size // 4, axis=2),
        extent=np.full((images, 2), size, np.int32),
        label=np.zeros(images, np.int32),
        class_names=("a",),
        name="random",
        unreadable=0,
    )
