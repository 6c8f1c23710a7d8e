from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from simclr_jax import gradients, losses, resnet, simclr, training
from simclr_jax import mesh as meshes
from simclr_jax.data.batches import Batch

BATCH, SIZE = 16, 16

pytestmark = pytest.mark.usefixtures("quick_compilation")


class Encoder(nnx.Module):
    """Little to compile: two convolutions, a normalisation and a projection head."""

    def __init__(self, norm, dtype):
        rngs = nnx.Rngs(0)
        self.first = nnx.Conv(3, 8, (3, 3), strides=2, dtype=dtype, rngs=rngs)
        self.norm = {
            "batch": lambda: nnx.BatchNorm(8, momentum=0.9, dtype=dtype, rngs=rngs),
            "group": lambda: nnx.GroupNorm(8, num_groups=2, dtype=dtype, rngs=rngs),
        }[norm]()
        self.second = nnx.Conv(8, 16, (3, 3), strides=2, dtype=dtype, rngs=rngs)
        head_norm = "all" if norm == "batch" else "none"
        self.head = simclr.ProjectionHead(
            16, layers=2, hidden=16, out=8, norm=head_norm, dtype=dtype, rngs=rngs
        )

    def __call__(self, images):
        x = nnx.relu(self.second(nnx.relu(self.norm(self.first(images)))))
        return self.head(x.mean(axis=(1, 2)))


def make_batch():
    rng = np.random.default_rng(0)
    return Batch(
        canvas=jnp.asarray(rng.integers(0, 256, (BATCH, SIZE, SIZE, 3)), jnp.uint8),
        extent=jnp.full((BATCH, 2), SIZE, jnp.int32),
        label=jnp.asarray(rng.integers(0, 4, BATCH), jnp.int32),
        ids=jnp.arange(100, 100 + BATCH, dtype=jnp.int32),
    )


def views_of(batch, dtype):
    """Two views of an image, which differ by a draw from the image's own key."""
    keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(0)))(batch.ids)
    noise = jax.vmap(lambda key: jax.random.uniform(key, (2, SIZE, SIZE, 3), dtype))(keys)
    images = batch.canvas.astype(dtype) / 255
    return images + 0.3 * noise[:, 0], images + 0.3 * noise[:, 1]


def joint(batch, dtype=jnp.float32):
    return [jnp.concatenate(views_of(batch, dtype))]


def separate(batch, dtype=jnp.float32):
    return list(views_of(batch, dtype))


def pieces(model=None, *, dtype=jnp.float32, make_views=joint, norm="batch"):
    """Weights, and the arguments of both forms; float64 inside `jax.enable_x64`."""
    graphdef, state = training.create_state(model or Encoder(norm, dtype), optax.sgd(0.1))
    # Off zero, where no gradient of a scale or offset is hidden.
    params, batch_stats = jax.tree.map(
        lambda leaf: leaf.astype(dtype) + (0.5 if leaf.ndim == 1 else 0), (state.params, state.batch_stats)
    )
    arguments = {
        "make_views": partial(make_views, dtype=dtype),
        "forward": partial(training.forward, graphdef),
        "loss": partial(losses.nt_xent, temperature=0.5),
        "make_targets": lambda batch, views: (),
    }
    return (params, batch_stats), arguments


def relative_difference(found, expected):
    """Of two trees, by their norms in float64."""
    found, expected = (
        np.concatenate([np.ravel(np.asarray(leaf, np.float64)) for leaf in jax.tree.leaves(tree)])
        for tree in (found, expected)
    )
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def microbatches(count, unroll=True):
    return partial(gradients.of_microbatches, count=count, unroll=unroll)


def by_hand(count):
    """What microbatches mean, differentiated as it stands: each forwarded by itself, one loss over all."""

    def compute(params, batch_stats, batch, *, make_views, forward, loss, make_targets):
        def objective(params):
            outputs, stats = zip(
                *(
                    forward(params, batch_stats, make_views(jax.tree.map(lambda x: x[k::count], batch)))  # noqa: B023
                    for k in range(count)
                ),
                strict=True,
            )
            size = BATCH // count
            rows = [outputs[i % count][view * size + i // count] for view in range(2) for i in range(BATCH)]
            value, metrics = loss(jnp.stack(rows))
            mean = jax.tree.map(lambda *parts: sum(parts) / count, *stats)
            return value, (metrics, mean)

        (value, (metrics, stats)), gradient = jax.value_and_grad(objective, has_aux=True)(params)
        return gradients.LossGradient(value, metrics, stats, gradient)

    return compute


@pytest.mark.parametrize("make_views", [joint, separate])
@pytest.mark.parametrize("unroll", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-10), ("float32", 1e-5)])
def test_with_batchnorm_it_is_the_gradient_of_each_microbatch_normalised_by_itself(
    make_views, unroll, dtype, tolerance
):
    with jax.enable_x64(dtype == "float64"):
        weights, arguments = pieces(dtype=jnp.dtype(dtype), make_views=make_views)
        batch = make_batch()
        expected = jax.jit(partial(by_hand(4), **arguments))(*weights, batch)
        found = jax.jit(partial(microbatches(4, unroll), **arguments))(*weights, batch)
        assert jax.tree.leaves(found.gradient)[0].dtype == dtype
        for name in ("value", "metrics", "batch_stats", "gradient"):
            assert relative_difference(getattr(found, name), getattr(expected, name)) <= tolerance, name
    assert max(np.abs(leaf).max() for leaf in jax.device_get(jax.tree.leaves(expected.gradient))) > 1e-3


@pytest.mark.parametrize("count", [2, 8])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-10), ("float32", 1e-5)])
def test_without_batchnorm_it_is_the_gradient_of_the_whole_batch(count, dtype, tolerance):
    with jax.enable_x64(dtype == "float64"):
        weights, arguments = pieces(dtype=jnp.dtype(dtype), norm="group")
        batch = make_batch()
        expected = jax.jit(partial(gradients.of_batch, **arguments))(*weights, batch)
        found = jax.jit(partial(microbatches(count), **arguments))(*weights, batch)
        assert relative_difference(found.gradient, expected.gradient) <= tolerance
        assert relative_difference(found.value, expected.value) <= tolerance


def test_adding_up_the_gradients_of_small_batches_is_another_thing():
    weights, arguments = pieces(norm="group")
    batch = make_batch()
    whole = jax.jit(partial(gradients.of_batch, **arguments))
    parts = [whole(*weights, jax.tree.map(lambda x: x[k::2], batch)).gradient for k in range(2)]  # noqa: B023
    summed = jax.tree.map(lambda a, b: (a + b) / 2, *parts)
    assert relative_difference(summed, whole(*weights, batch).gradient) > 0.02


def test_targets_stay_with_their_rows():
    """Cross-entropy with labels, and with what the views themselves give, on many more rows than classes."""
    weights, arguments = pieces(norm="group")

    def make_targets(batch, views):
        teacher = jnp.concatenate([view.mean(axis=(1, 2)) for view in views])
        return jnp.tile(batch.label, 2), teacher

    def loss(logits, labels, teacher):
        value, metrics = losses.cross_entropy(logits, labels)
        return value + jnp.mean((logits[:, :3] - teacher) ** 2), metrics

    arguments |= {"make_targets": make_targets, "loss": loss, "make_views": separate}
    batch = make_batch()
    expected = jax.jit(partial(gradients.of_batch, **arguments))(*weights, batch)
    found = jax.jit(partial(microbatches(4), **arguments))(*weights, batch)
    assert relative_difference(found.gradient, expected.gradient) <= 1e-5
    assert float(found.metrics["accuracy"]) == float(expected.metrics["accuracy"])


# In float32 this small BatchNorm, whose variance is a difference of means, adds rounding of its own (2e-5).
@pytest.mark.parametrize(
    ("norm", "dtype", "tolerance"), [("batch", "float64", 1e-10), ("group", "float32", 1e-5)]
)
def test_four_devices_equal_one(norm, dtype, tolerance):
    with jax.enable_x64(dtype == "float64"):
        weights, arguments = pieces(norm=norm, dtype=jnp.dtype(dtype))
        one = jax.jit(partial(microbatches(2), **arguments))(*weights, make_batch())
        mesh = meshes.data_mesh(BATCH)
        placed = jax.device_put(weights, meshes.replicated(mesh))
        batch = jax.device_put(make_batch(), meshes.split(mesh))
        four = jax.jit(partial(microbatches(2), **arguments))(*placed, batch)
        for name in ("value", "gradient", "batch_stats")[: 3 if norm == "batch" else 2]:
            assert relative_difference(getattr(four, name), getattr(one, name)) <= tolerance, name


def resnet_pieces(remat):
    rngs = nnx.Rngs(0)
    encoder = resnet.ResNet(10, width=0.125, remat=remat, rngs=rngs)
    head = simclr.ProjectionHead(encoder.features, layers=1, hidden=0, out=8, norm="none", rngs=rngs)
    return pieces(simclr.SimCLR(encoder, head))


def test_rematerialisation_changes_nothing_but_what_is_kept():
    results = []
    for remat in (False, True):
        weights, arguments = resnet_pieces(remat)
        results.append(jax.jit(partial(gradients.of_batch, **arguments))(*weights, make_batch()))
    for name in ("value", "metrics", "batch_stats", "gradient"):
        assert relative_difference(*(getattr(result, name) for result in results)) <= 1e-6, name


def saved_bytes(remat):
    """Of the maps that the forward pass keeps for the gradient."""
    weights, arguments = resnet_pieces(remat)
    views = joint(make_batch())

    def keep(params):
        return jax.vjp(lambda params: arguments["forward"](params, weights[1], views)[0], params)[1]

    kept = jax.tree.leaves(jax.eval_shape(keep, weights[0]))
    return sum(array.size * array.dtype.itemsize for array in kept if array.shape[0:1] == (2 * BATCH,))


def test_rematerialisation_keeps_less():
    assert saved_bytes(True) < 0.5 * saved_bytes(False)
