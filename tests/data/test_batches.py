import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from simclr_jax import mesh as meshes
from simclr_jax import recipe
from simclr_jax.config import default_config, derive
from simclr_jax.data.batches import ResidentBatches, StreamedBatches, step_indices
from simclr_jax.data.pack import Pack

IMAGES, BATCH = 22, 4


def make_pack(images=IMAGES):
    rng = np.random.default_rng(0)
    return Pack(
        canvas=rng.integers(0, 256, (images, 8, 8, 3), np.uint8),
        extent=rng.integers(1, 9, (images, 2), np.int32),
        label=np.arange(images, dtype=np.int32),
        class_names=("a",),
        name="random",
        unreadable=0,
    )


def order(epoch, seed=0):
    steps = range(5 * epoch, 5 * (epoch + 1))
    return [step_indices(step, seed=seed, images=IMAGES, batch_size=BATCH) for step in steps]


def test_an_epoch_shows_no_image_twice_and_drops_the_ragged_batch():
    shown = np.concatenate(order(0))
    assert len(shown) == 20 == len(set(shown.tolist()))
    assert set(shown.tolist()) <= set(range(IMAGES))


def test_every_epoch_and_every_seed_has_an_order_of_its_own():
    orders = [np.concatenate(order(*pair)).tolist() for pair in [(0, 0), (1, 0), (0, 1), (1, 1)]]
    assert len({tuple(one) for one in orders}) == 4
    assert np.concatenate(order(1)).tolist() == orders[1]


def assert_same_steps(pack, ours, reference, first_step, steps=3):
    """Steps of `ours`, one a call, and of `reference`, in one call."""
    arrays, rows = reference.call(first_step, steps)
    for i in range(steps):
        expected = jax.jit(reference.fetch)(arrays, rows[i])
        own_arrays, own_rows = ours.call(first_step + i, 1)
        found = jax.jit(ours.fetch)(own_arrays, own_rows[0])
        jax.tree.map(np.testing.assert_array_equal, found, expected)
        np.testing.assert_array_equal(found.canvas, pack.canvas[np.asarray(rows[i])])


@pytest.mark.parametrize("images", [24, IMAGES, 21, 5])
def test_split_over_the_devices_equals_a_copy_on_each(images):
    """Also where the last device has fewer rows than the others, or none."""
    pack, mesh = make_pack(images), meshes.data_mesh(BATCH)
    options: dict[str, Any] = dict(seed=3, batch_size=BATCH, steps_per_call=3, mesh=mesh)
    split = ResidentBatches(pack, **options, split=True)
    assert_same_steps(pack, split, ResidentBatches(pack, **options), 2)
    canvas = split.call(0, 1)[0][0]
    assert {shard.data.shape[0] for shard in canvas.addressable_shards} == {-(-images // mesh.size)}


def test_a_device_reads_no_rows_but_its_own():
    read = []

    class Rows(np.ndarray):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    pack, mesh = make_pack(), meshes.data_mesh(BATCH)
    pack = dataclasses.replace(pack, canvas=pack.canvas.view(Rows))
    ResidentBatches(pack, seed=0, batch_size=BATCH, steps_per_call=1, mesh=mesh, split=True)
    assert sorted((rows.start or 0, rows.stop) for rows in read) == [(0, 6), (6, 12), (12, 18), (18, 24)]


@pytest.mark.parametrize("first_step", [0, 7])
def test_streamed_equals_resident(first_step):
    pack, mesh = make_pack(), meshes.data_mesh(BATCH)
    resident = ResidentBatches(pack, seed=3, batch_size=BATCH, steps_per_call=4, mesh=mesh)
    streamed = StreamedBatches(
        pack, seed=3, batch_size=BATCH, first_step=first_step, total_steps=12, mesh=mesh
    )
    assert resident.call(first_step, 3)[1].shape == (4, BATCH)
    assert_same_steps(pack, streamed, resident, first_step)


@pytest.mark.parametrize(
    ("devices_worth", "kind", "share"),
    [
        (1, ResidentBatches, IMAGES),
        (0.9, ResidentBatches, 6),
        (0.25, ResidentBatches, 6),
        (0.2, StreamedBatches, 1),
    ],
)
def test_the_pack_lies_on_each_device_or_on_all_together_or_streams(devices_worth, kind, share):
    """By the memory of a device, here as a share of the pack's size."""
    config, pack, mesh = default_config(), make_pack(), meshes.data_mesh(BATCH)
    config.train.batch_size = BATCH
    config.run.memory_gb = devices_worth * pack.canvas.nbytes / 1e9
    batches = recipe.build_batches(config, pack, derive(config, IMAGES), mesh, first_step=0)
    assert isinstance(batches, kind)
    canvas = batches.call(0, 1)[0][0]
    assert {len(shard.data) for shard in canvas.addressable_shards} == {share}
