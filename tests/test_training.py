from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from packs import patchwork

from simclr_jax import losses, recipe, resnet, simclr, training
from simclr_jax import mesh as meshes
from simclr_jax.checkpoints import Checkpoints
from simclr_jax.config import default_config
from simclr_jax.data.batches import Batch, ResidentBatches

IMAGES, BATCH, SIZE = 32, 8, 16


def make_config(passes="joint", **views):
    """Views that are quick to make, and of which every operation is used."""
    config = default_config()
    config.views.update(
        {"size": SIZE, "crop_area": (0.5, 1.0), "crop_aspect": (0.8, 1.25), "solarize": 0.1}
        | {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1}
        | views
    )
    config.views.update({"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)})
    config.model.passes = passes
    return config


def make_model(norm="batch", head_norm="hidden"):
    rngs = nnx.Rngs(0)
    encoder = resnet.ResNet(10, width=0.125, norm=norm, rngs=rngs)
    head = simclr.ProjectionHead(encoder.features, layers=2, hidden=16, out=8, norm=head_norm, rngs=rngs)
    return simclr.SimCLR(encoder, head)


def make_run(mesh, *, steps_per_call, passes="joint", views=None, rate=0.1, **model):
    config = make_config(passes, **(views or {}))
    schedule = optax.constant_schedule(rate)
    optimizer = optax.sgd(schedule, momentum=0.9)
    graphdef, state = training.create_state(make_model(**model), optimizer)
    batches = ResidentBatches(
        patchwork(IMAGES, SIZE), seed=0, batch_size=BATCH, steps_per_call=steps_per_call, mesh=mesh
    )
    step = partial(
        training.train_step,
        make_views=recipe.build_views(config, mesh),
        forward=partial(training.forward, graphdef),
        loss=partial(losses.nt_xent, temperature=0.5, views=config.views.count + config.views.small_count),
        optimizer=optimizer,
        learning_rate=schedule,
    )
    run_steps = training.make_run_steps(step, batches.fetch, meshes.replicated(mesh))
    return jax.device_put(state, meshes.replicated(mesh)), batches, run_steps


def advance(run, *counts, step=0):
    state, batches, run_steps = run
    history = []
    for count in counts:
        arrays, indices = batches.call(step, count)
        state, metrics = run_steps(jax.random.key(1), state, arrays, indices, count)
        history += [{name: float(values[i]) for name, values in metrics.items()} for i in range(count)]
        step += count
    return jax.device_get(state), history


pytestmark = pytest.mark.usefixtures("quick_compilation")


def compilations(jitted):
    return jitted._cache_size()


def test_a_step_is_traced_once(one_device):
    """For a ResNet-18 a trace takes seconds, on every start."""
    traced = []

    def step(state, batch, key):
        traced.append(key)
        return state + jnp.sum(batch), {"sum": jnp.sum(batch)}

    sharding = meshes.replicated(one_device)
    run_steps = training.make_run_steps(step, lambda arrays, indices: arrays[indices], sharding)
    for count in (2, 3):
        indices = jnp.arange(6).reshape(3, 2)
        state, metrics = run_steps(jax.random.key(0), jnp.float32(0), jnp.arange(6.0), indices, count)
        assert metrics["sum"].tolist() == [1, 5, 9][:count] + [0] * (3 - count)
        assert state == sum(metrics["sum"])
    assert len(traced) == 1


@pytest.fixture(scope="module")
def one_device():
    return jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:1])


def assert_equal_bits(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_close(a, b, tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), a, b)


def test_where_calls_begin_and_end_changes_no_bit_and_compiles_nothing(one_device):
    run = make_run(one_device, steps_per_call=4)
    whole, history = advance(run, 4, 2)
    parts, parts_history = advance(make_run(one_device, steps_per_call=4)[:2] + run[2:], 1, 3, 2)
    assert_equal_bits(whole, parts)
    assert history == parts_history
    assert compilations(run[2]) == 1


def test_single_steps_equal_the_loop_and_compile_once(one_device):
    run = make_run(one_device, steps_per_call=1)
    single, single_history = advance(run, 1, 1, 1)
    looped, looped_history = advance(make_run(one_device, steps_per_call=3), 3)
    assert_close(single, looped, 1e-4)
    assert_close(single_history, looped_history, 1e-4)
    assert compilations(run[2]) == 1
    assert int(single.step) == 3


def test_four_devices_equal_one_with_batchnorm_and_negatives_of_the_whole_batch(one_device):
    one, one_history = advance(make_run(one_device, steps_per_call=1, rate=0.01), 1, 1)
    four, four_history = advance(make_run(meshes.data_mesh(BATCH), steps_per_call=1, rate=0.01), 1, 1)
    assert_close(one, four, 1e-4)
    assert_close(one_history, four_history, 1e-3)


def test_the_same_images_are_learned(one_device):
    run = make_run(one_device, steps_per_call=1, rate=0.05)
    _, history = advance(run, *[1] * 40)
    losses_ = [metrics["loss"] for metrics in history]
    assert np.mean(losses_[-8:]) < np.mean(losses_[:8]) - 0.2
    assert all(metrics["gradient_norm"] > 0 for metrics in history)


@pytest.mark.parametrize("rate", [1e-3, 1e-6, 0.0])
def test_the_norms_are_of_the_gradient_the_new_parameters_and_the_step_between(rate):
    rng = np.random.default_rng(0)
    params, gradient = (
        {name: jnp.float32(rng.normal(size=shape)) for name, shape in (("kernel", (40, 30)), ("bias", (30,)))}
        for _ in range(2)
    )
    optimizer = optax.adamw(rate, weight_decay=0.1)
    state = optimizer.init(params)
    updates, after = optimizer.update(gradient, state, params)
    found, opt_state, norms = jax.jit(training.update, static_argnums=3)(params, state, gradient, optimizer)

    def norm(tree):
        return np.sqrt(sum(np.sum(np.float64(leaf) ** 2) for leaf in jax.tree.leaves(tree)))

    expected = optax.apply_updates(params, updates)
    jax.tree.map(lambda *pair: np.testing.assert_allclose(*pair, rtol=1e-6), found, expected)
    jax.tree.map(lambda *pair: np.testing.assert_allclose(*pair, rtol=1e-6), opt_state, after)
    np.testing.assert_allclose(norms["gradient_norm"], norm(gradient), rtol=1e-6)
    np.testing.assert_allclose(norms["parameter_norm"], norm(expected), rtol=1e-6)
    # Parameters are rounded to 6e-8 of themselves, which is much of a step as small as the second.
    np.testing.assert_allclose(norms["update_norm"], norm(updates), rtol=1e-4 if rate == 1e-3 else 2e-2)


def test_more_and_smaller_views_train_and_four_devices_equal_one(one_device):
    views = {"count": 3, "small_count": 2, "small_size": 8, "small_crop_area": (0.2, 0.5)}
    runs = [
        make_run(mesh, steps_per_call=1, views=views, rate=0.01)
        for mesh in (one_device, meshes.data_mesh(BATCH))
    ]
    (one, one_history), (four, four_history) = (advance(run, 1, 1) for run in runs)
    assert_close(one, four, 1e-4)
    assert_close(one_history, four_history, 1e-3)
    assert one_history[0]["loss"] < np.log(5 * BATCH - 1) + 0.5


@pytest.mark.parametrize("passes", ["joint", "separate"])
def test_views_are_one_array_a_pass(one_device, passes):
    pack = patchwork(IMAGES, SIZE)
    keys = training.image_keys(jax.random.key(0), 0, jnp.arange(BATCH))
    config = make_config(passes, count=2, small_count=1, small_size=8)
    views = jax.jit(recipe.build_views(config, one_device))(keys, pack.canvas[:BATCH], pack.extent[:BATCH])
    sizes = [SIZE, SIZE, 8] if passes == "separate" else [SIZE, 8]
    counts = [1, 1, 1] if passes == "separate" else [2, 1]
    assert [view.shape for view in views] == [
        (count * BATCH, size, size, 3) for count, size in zip(counts, sizes, strict=True)
    ]
    plain = make_config(passes, count=2, small_count=1, small_size=8, form="plain")
    others = jax.jit(recipe.build_views(plain, one_device))(keys, pack.canvas[:BATCH], pack.extent[:BATCH])
    assert_close(views, others, 1e-4)


def test_separate_passes_normalise_each_view_by_itself():
    images = jax.random.uniform(jax.random.key(0), (12, SIZE, SIZE, 3))
    graphdef, state = training.create_state(make_model(), optax.sgd(0.1))
    run = jax.jit(partial(training.forward, graphdef))
    joint, _ = run(state.params, state.batch_stats, [images])
    z, stats = run(state.params, state.batch_stats, [images[:6], images[6:]])
    first, first_stats = run(state.params, state.batch_stats, [images[:6]])
    second, second_stats = run(state.params, first_stats, [images[6:]])
    np.testing.assert_allclose(z, jnp.concatenate([first, second]), atol=1e-5)
    assert_close(stats, second_stats, 1e-5)
    assert np.abs(z - joint).max() > 1e-2


def test_a_model_without_batchnorm_trains_too(one_device):
    run = make_run(one_device, steps_per_call=1, norm="group", head_norm="none")
    state, history = advance(run, 1, 1)
    assert not jax.tree.leaves(state.batch_stats)
    assert np.isfinite(history[-1]["loss"])


def test_an_image_gets_views_of_its_own_every_step():
    optimizer = optax.sgd(0.1)
    keys_seen = []

    def record(keys, canvas, extent):
        keys_seen.append(jax.random.key_data(keys))
        return [jnp.zeros((2 * len(canvas), 2))]

    params = jnp.ones((2,))
    batch = Batch(jnp.zeros((3, 4, 4, 3)), jnp.zeros((3, 2)), jnp.zeros(3, int), jnp.array([5, 6, 7]))
    for step in (0, 1):
        training.train_step(
            training.TrainState(jnp.int32(step), params, {}, optimizer.init(params)),
            batch,
            jax.random.key(0),
            make_views=record,
            forward=lambda params, stats, views: (views[0] + params[None], stats),
            loss=lambda z: (z.sum(), {}),
            optimizer=optimizer,
            learning_rate=optax.constant_schedule(0.1),
        )
    assert len(np.unique(np.concatenate(keys_seen), axis=0)) == 6


def test_a_resumed_run_sees_the_same_pixels(one_device, tmp_path):
    """Step 1 of a run that went on, and of one that was saved after step 0, restored and went on."""
    config, optimizer = make_config("joint", blur=0.0), optax.sgd(0.1)
    batches = ResidentBatches(
        patchwork(IMAGES, SIZE), seed=0, batch_size=BATCH, steps_per_call=1, mesh=one_device
    )
    step = jax.jit(
        partial(
            training.train_step,
            make_views=recipe.build_views(config, one_device),
            forward=lambda weight, stats, views: (views[0] * weight, stats),
            loss=lambda z: (jnp.mean(z**2), {"pixels": z}),
            optimizer=optimizer,
            learning_rate=optax.constant_schedule(0.1),
        )
    )

    def run(state):
        arrays, indices = batches.call(int(state.step), 1)
        return step(state, batches.fetch(arrays, indices[0]), jax.random.key(0))

    weight = jnp.ones(())
    state = training.TrainState(jnp.zeros((), jnp.int32), weight, {}, optimizer.init(weight))
    state, first = run(state)
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1, best_metric="loss")
    checkpoints.save(1, state, seconds=1.0, metrics={"loss": 0.0})
    restored = checkpoints.restore(state)
    checkpoints.close()
    assert restored is not None
    (_, second), (_, resumed) = run(state), run(restored[0])
    np.testing.assert_array_equal(second["pixels"], resumed["pixels"])
    assert np.abs(np.asarray(first["pixels"]) - np.asarray(second["pixels"])).mean() > 0.1
