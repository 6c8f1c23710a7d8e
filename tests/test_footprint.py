import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from simclr_jax import footprint, mesh, recipe, rehearsal, training
from simclr_jax.config import check, default_config, derive

IMAGES, SIZE = 32, 32


def make_config(**changes):
    config = default_config()
    config.data.dataset = "shapes"
    config.data.canvas_size = config.views.size = SIZE
    config.model.depth = 10
    config.model.width = 0.5
    config.model.stem = "cifar"
    config.train.batch_size = IMAGES
    config.optimizer.name = "sgd"
    config.update_from_flattened_dict(changes)
    check(config)
    return config


def make_start(config):
    """Shapes only: nothing is computed."""
    devices = mesh.mesh_of(jax.devices()[:1])
    return recipe.abstract_start(config, derive(config, 10 * IMAGES), devices), devices


def views():
    return [jax.ShapeDtypeStruct((2 * IMAGES, SIZE, SIZE, 3), jnp.float32)]


def parts(config):
    start, _ = make_start(config)
    found = footprint.step_parts(
        start.graphdef,
        start.state,
        views=views(),
        loss=lambda outputs: jnp.sum(outputs**2),
        microbatches=recipe.microbatches(config) > 1,
    )
    return {part.name: part for part in found}


def encoder_flops():
    """Of one forward pass, from the shapes of a ResNet-10 of half width with a 3x3 stem.

    A 3x3 kernel meets (3 side - 2)² pixels of a map, those beside it not counted, and one of stride 2
    (3 side - 1)².
    """
    total = 3 * 32 * (3 * SIZE - 2) ** 2
    channels, side = 32, SIZE
    for stage, out in enumerate((32, 64, 128, 256)):
        side //= 2 if stage else 1
        total += channels * out * (3 * side - (1 if stage else 2)) ** 2 + out * out * (3 * side - 2) ** 2
        total += channels * out * side**2 if stage else 0
        channels = out
    return 2 * 2 * IMAGES * total


def test_flops_and_parameters_are_those_of_the_convolutions():
    found = parts(make_config())
    head = 2 * 2 * IMAGES * (256 * 512 + 512 * 128)
    stem = 2 * 2 * IMAGES * 3 * 32 * (3 * SIZE - 2) ** 2
    assert found["encoder"].flops == encoder_flops()
    assert found["head"].flops == head
    assert found["gradient"].flops == 2 * (encoder_flops() + head) - stem  # views have no gradient
    model = recipe.build_model(make_config())
    assert found["encoder"].parameters == optax.tree.size(nnx.state(model.encoder, nnx.Param))
    assert found["head"].parameters == optax.tree.size(nnx.state(model.head, nnx.Param))


def test_microbatches_embed_twice_and_rematerialisation_is_in_the_gradient():
    plain = parts(make_config())
    cached = parts(
        make_config(**{"train.microbatch_size": 8, "model.batch_norm": "microbatch"}),
    )
    again = parts(make_config(**{"train.remat": True}))
    assert cached["encoder"].flops == 2 * plain["encoder"].flops
    assert cached["gradient"].flops == plain["gradient"].flops
    assert again["gradient"].flops == plain["gradient"].flops + plain["encoder"].flops


def test_views_are_counted_on_all_devices_and_twice_with_microbatches():
    config = make_config()
    start, one = make_start(config)
    cached = make_config(**{"train.microbatch_size": 8, "model.batch_norm": "microbatch"})
    views, *others = rehearsal.step_parts(config, start, one)
    # Crop and blur are each a product from the left and one from the right of all three colours.
    assert views == footprint.Part("views", 0, 2 * IMAGES * 4 * 2 * 3 * SIZE**3)
    assert [part.name for part in others] == ["encoder", "head", "loss", "gradient"]
    assert rehearsal.step_parts(config, start, mesh.mesh_of(jax.devices()))[0] == views
    assert rehearsal.step_parts(cached, start, one)[0].flops == 2 * views.flops


def estimate(config, data_bytes=0):
    start, devices = make_start(config)
    return rehearsal.estimate(config, start, devices, data_bytes=data_bytes)


def test_the_estimate_counts_state_images_and_the_maps_around_convolutions():
    config = make_config()
    found = estimate(config, data_bytes=1000)
    parameters = sum(part.parameters for part in parts(config).values())
    statistics = 2 * (32 * 3 + 64 * 3 + 128 * 3 + 256 * 3 + 512)
    # Parameters and momentum, running means and variances, and two counters.
    assert found.state == pytest.approx(4 * (2 * parameters + statistics), abs=16)
    assert found.data == 1000 + IMAGES * SIZE**2 * 3
    # What comes out of and goes into each convolution, in numbers an image: stem, then stages of (32, 16,
    # 8, 4) pixels; each map that two convolutions read counts once.
    maps = (
        3 + 32 + sum(c * s for c, s in [(4 * 32, 1), (5 * 64, 1 / 4), (5 * 128, 1 / 16), (5 * 256, 1 / 64)])
    )
    work = 4 * 2 * IMAGES * SIZE**2 * (3 + maps) + 4 * parameters
    assert found.work == pytest.approx(work, rel=0.15)
    assert found.total == found.state + found.data + found.work


def test_the_estimate_falls_with_microbatches_rematerialisation_and_bfloat16():
    whole = estimate(make_config()).work
    cached = {"train.microbatch_size": 8, "model.batch_norm": "microbatch"}
    assert estimate(make_config(**cached)).work < 0.5 * whole
    assert estimate(make_config(**{"train.remat": True})).work < 0.8 * whole
    assert estimate(make_config(**{"model.dtype": "bfloat16"})).work < 0.75 * whole


def test_out_of_memory_names_batch_views_an_estimate_and_three_settings():
    config = make_config()
    start, devices = make_start(config)
    said = rehearsal.out_of_memory(config, start, devices, data_bytes=0)
    assert "\n" not in said
    assert f"a batch of {IMAGES} images with views of {SIZE} pixels" in said
    assert "GB" in said
    for setting in ("train.microbatch_size=", "batch_norm=microbatch", "bfloat16", "train.remat=True"):
        assert setting in said
    part = int(said.split("microbatch_size=")[1].split()[0])
    assert IMAGES % part == 0 and part < IMAGES
    small = make_config(
        **{"train.microbatch_size": part, "model.batch_norm": "microbatch", "train.remat": True}
        | {"model.dtype": "bfloat16"}
    )
    start, devices = make_start(small)
    said = rehearsal.out_of_memory(small, start, devices, data_bytes=0)
    assert "remat" not in said and "bfloat16" not in said
    assert "train.batch_size" in said and "views.size" in said


def test_the_compilers_figure_counts_the_donated_state_once():
    state = training.TrainState(jnp.int32(0), jnp.zeros(1000), {}, jnp.zeros(500))

    def step(state, images):
        rest = jnp.sum(images) + jnp.sum(jnp.sort(state.params))
        return state.replace(params=state.params + rest), rest

    program = jax.jit(step, donate_argnums=0).lower(state, jnp.zeros((300,))).compile()
    found = footprint.compiled_memory(program, state)
    assert found.state == 4 * 1501
    assert found.data == pytest.approx(1200, abs=64)
    assert 0 < found.work < 20_000
    assert found.total == sum(found)
    assert np.isfinite(found.total)
