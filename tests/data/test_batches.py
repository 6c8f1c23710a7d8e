import jax
import numpy as np
import pytest

from simclr_jax import mesh as meshes
from simclr_jax.data.batches import ResidentBatches, StreamedBatches, step_indices
from simclr_jax.data.pack import Pack

IMAGES, BATCH = 22, 4


def make_pack():
    rng = np.random.default_rng(0)
    return Pack(
        canvas=rng.integers(0, 256, (IMAGES, 8, 8, 3), np.uint8),
        extent=rng.integers(1, 9, (IMAGES, 2), np.int32),
        label=np.zeros(IMAGES, np.int32),
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


@pytest.mark.parametrize("first_step", [0, 7])
def test_streamed_equals_resident(first_step):
    pack, mesh = make_pack(), meshes.data_mesh(BATCH)
    resident = ResidentBatches(pack, seed=3, batch_size=BATCH, steps_per_call=4, mesh=mesh)
    streamed = StreamedBatches(
        pack, seed=3, batch_size=BATCH, first_step=first_step, total_steps=12, mesh=mesh
    )
    arrays, rows = resident.call(first_step, 3)
    assert rows.shape == (4, BATCH)
    for step in range(3):
        expected = jax.jit(resident.fetch)(arrays, rows[step])
        stream_arrays, stream_rows = streamed.call(first_step + step, 1)
        assert stream_rows.shape == (1, BATCH)
        jax.tree.map(np.testing.assert_array_equal, streamed.fetch(stream_arrays, stream_rows[0]), expected)
        np.testing.assert_array_equal(expected.canvas, pack.canvas[np.asarray(rows[step])])
