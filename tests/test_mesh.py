"""The same mathematics on any number of devices."""

import subprocess
import sys
from functools import cache, partial

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from packs import patchwork

from simclr_jax import losses, recipe, resnet, simclr, training
from simclr_jax import mesh as meshes
from simclr_jax.config import default_config
from simclr_jax.data.batches import ResidentBatches
from simclr_jax.errors import UserError

IMAGES, BATCH, SIZE, STEPS = 40, 16, 16, 3


pytestmark = pytest.mark.usefixtures("quick_compilation")


@cache
def train(devices, norm, *, split=False):
    """Loss, gradient and parameters of every step, in one dict of NumPy arrays."""
    mesh = meshes.mesh_of(jax.devices()[:devices])
    config = default_config()
    config.views.update(size=SIZE, crop_area=(0.5, 1.0), jitter=0.0, grayscale=0.0, blur=0.0)
    config.views.update(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    rngs = nnx.Rngs(0)
    encoder = resnet.ResNet(10, width=0.125, stem="cifar", norm=norm, rngs=rngs)
    head_norm = "hidden" if norm == "batch" else "none"
    head = simclr.ProjectionHead(encoder.features, layers=2, hidden=32, out=16, norm=head_norm, rngs=rngs)
    optimizer = optax.chain(optax.trace(0.0), optax.sgd(0.03))  # the trace without decay is the gradient
    graphdef, state = training.create_state(simclr.SimCLR(encoder, head), optimizer)
    batches = ResidentBatches(
        patchwork(IMAGES, SIZE), seed=0, batch_size=BATCH, steps_per_call=1, mesh=mesh, split=split
    )
    step = partial(
        training.train_step,
        make_views=recipe.build_views(config, mesh),
        forward=partial(training.forward, graphdef),
        loss=partial(losses.nt_xent, temperature=0.5),
        optimizer=optimizer,
        learning_rate=optax.constant_schedule(0.03),
    )
    run_steps = training.make_run_steps(step, batches.fetch, meshes.replicated(mesh))
    state = jax.device_put(state, meshes.replicated(mesh))
    found = {}
    for number in range(STEPS):
        state, metrics = run_steps(jax.random.key(1), state, *batches.call(number, 1), 1)
        found[f"{number} loss"] = np.asarray(metrics["loss"])
        gradient = optax.tree.get(state.opt_state, "trace")
        for name, tree in (("gradient", gradient), ("parameters", state.params)):
            for path, leaf in jax.tree.leaves_with_path(tree):
                found[f"{number} {name} {jax.tree_util.keystr(path)}"] = np.asarray(leaf)
    return found


def assert_close(found, expected):
    """Of each parameter the gradient, and all else, to 1e-5; 6.4e-6 is the most that was seen."""
    assert found.keys() == expected.keys()
    for name, value in found.items():
        error = np.linalg.norm(np.float64(value) - expected[name])
        assert error <= 1e-5 * np.linalg.norm(np.float64(expected[name])), name


@pytest.mark.parametrize(("devices", "norm"), [(2, "batch"), (4, "batch"), (4, "group")])
def test_devices_together_equal_one(devices, norm):
    """BatchNorm's statistics and NT-Xent's negatives are those of the whole batch, of a split pack too."""
    assert_close(train(devices, norm, split=devices == 2), train(1, norm))


def test_eight_devices_equal_one(tmp_path):
    file = tmp_path / "eight.npz"
    subprocess.run([sys.executable, __file__, str(file)], check=True)
    with np.load(file) as eight:
        assert_close(dict(eight), train(1, "batch"))


def test_a_batch_that_the_devices_cannot_share_is_refused_with_one_that_they_can():
    assert meshes.data_mesh(8).size == 4
    with pytest.raises(UserError, match=r"10, not a multiple of the 4 devices.*batch_size=8"):
        meshes.data_mesh(10)


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_disable_most_optimizations", True)
    np.savez(sys.argv[1], **train(8, "batch"))
