"""The views, against torchvision (stored reference values), and what they promise by themselves."""

import functools
import inspect
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from scipy import stats

from simclr_jax import augment

REFERENCE = np.load(Path(__file__).parent / "reference" / "augment.npz")
AREA, ASPECT = (0.08, 1.0), (3 / 4, 4 / 3)
OPTIONS: dict[str, Any] = {
    "size": 16,
    "crop_area": AREA,
    "crop_aspect": ASPECT,
    "flip": 0.5,
    "brightness": 0.8,
    "contrast": 0.8,
    "saturation": 0.8,
    "hue": 0.2,
    "jitter": 0.8,
    "grayscale": 0.2,
    "blur": 0.5,
    "blur_sigma": (0.1, 2.0),
    "solarize": 0.2,
    "solarize_threshold": 0.5,
    "mean": (0.0, 0.0, 0.0),
    "std": (1.0, 1.0, 1.0),
}
PLAIN: dict[str, Any] = OPTIONS | {"flip": 0, "jitter": 0, "grayscale": 0, "blur": 0, "solarize": 0}
TRACES = []

# Compiling is most of the time of these tests; this halves it.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@jit
def two_views(*batch):
    TRACES.append(batch)
    return augment.two_views(*batch, **OPTIONS)


@jit
@functools.partial(jax.vmap, in_axes=(0, None))
def sample_crops(key, extent):
    return augment.sample_crop(key, extent, area=AREA, aspect=ASPECT)


def unit(name: str) -> jax.Array:
    """A stored uint8 image as float32 in [0, 1]."""
    return jnp.asarray(REFERENCE[name], jnp.float32) / 255


def assert_close(actual, desired, atol=1e-5):
    np.testing.assert_allclose(actual, desired, rtol=0, atol=atol)


def make_batch(count: int = 8, side: int = 20, seed: int = 0):
    rng = np.random.default_rng(seed)
    keys = jax.vmap(jax.random.key)(jnp.arange(count))
    canvas = jnp.asarray(rng.integers(0, 256, (count, side, side, 3), np.uint8))
    extent = jnp.asarray(rng.integers(side // 2, side + 1, (count, 2)), jnp.int32)
    return keys, canvas, extent


# ----------------------------------------------------------------------------- torchvision, exact


@pytest.mark.parametrize("size", [1, 7, 16, 29])
def test_crop_and_resize_equals_torchvision(size):
    boxes = jnp.asarray(REFERENCE[f"crop_boxes_{size}"], jnp.float32)
    canvas = jnp.asarray(REFERENCE["crop_canvas"])
    crops = jit(jax.vmap(lambda box: augment.crop_and_resize(canvas, box, size)))(boxes)
    assert crops.shape == (10, size, size, 3) and crops.dtype == jnp.float32
    assert_close(crops, REFERENCE[f"crop_{size}"])

    def flipped_crop(box, flip):
        return augment.crop_and_resize(canvas, box, size, flip=flip)

    flips = jnp.arange(10) % 2 == 0
    flipped = jit(jax.vmap(flipped_crop))(boxes, flips)
    assert_close(flipped[::2], crops[::2, :, ::-1], 1e-6)
    assert_close(flipped[1::2], crops[1::2], 1e-6)


@pytest.mark.parametrize("dtype, atol", [(jnp.float32, 1e-6), (jnp.bfloat16, 4e-3)])
def test_crop_and_resize_takes_floats(dtype, atol):
    canvas, box = jnp.asarray(REFERENCE["crop_canvas"]), jnp.array([3.0, 2.0, 17.0, 20.0])
    crop = augment.crop_and_resize((canvas / 255).astype(dtype), box, 9)
    assert crop.dtype == jnp.float32
    assert_close(crop, augment.crop_and_resize(canvas, box, 9), atol)


@pytest.mark.parametrize(
    "name, parameters",
    [
        ("adjust_brightness", "factors"),
        ("adjust_contrast", "factors"),
        ("adjust_saturation", "factors"),
        ("adjust_hue", "turns"),
    ],
)
def test_colours_equal_torchvision(name, parameters):
    image, operation = unit("colour_image"), getattr(augment, name)
    adjust = jit(jax.vmap(lambda value: operation(image, value)))
    assert_close(adjust(REFERENCE[parameters]), REFERENCE[name.removeprefix("adjust_")])


def test_grayscale_equals_torchvision():
    assert_close(augment.rgb_to_grayscale(unit("colour_image")), REFERENCE["gray"])
    image = augment.random_grayscale(jax.random.key(0), unit("colour_image"), probability=1.0)
    assert_close(image, np.repeat(REFERENCE["gray"], 3, axis=-1))


def test_solarize_equals_torchvision():
    for threshold, expected in zip(REFERENCE["thresholds"], REFERENCE["solarized"], strict=True):
        solarized = augment.random_solarize(
            jax.random.key(0), unit("colour_image"), threshold=threshold, probability=1.0
        )
        assert_close(solarized, expected)


@pytest.mark.parametrize("number", range(8))
def test_blur_equals_torchvision(number):
    image, kernel = unit("blur_image"), int(REFERENCE["blur_kernels"][number])
    blur = jit(lambda image, sigma: augment.gaussian_blur(image, sigma, kernel))
    assert_close(blur(image, REFERENCE["blur_sigmas"][number]), REFERENCE["blurred"][number])


def test_jitter_equals_torchvision_in_all_24_orders():
    def jitter(order):
        factors = [jnp.asarray(value) for value in REFERENCE["jitter"]]
        return augment.color_jitter(unit("colour_image"), augment.Jitter(order, *factors))

    jittered = jit(jax.vmap(jitter))(jnp.asarray(REFERENCE["jitter_orders"]))
    assert_close(jittered, REFERENCE["jittered"])


def test_jitter_leaves_out_what_is_none():
    image = unit("colour_image")
    saturation, brightness = jnp.float32(0.3), jnp.float32(1.7)
    order = jnp.array([2, 3, 0, 1])
    jitter = augment.Jitter(order, brightness, None, saturation, None)
    expected = augment.adjust_brightness(augment.adjust_saturation(image, saturation), brightness)
    assert_close(augment.color_jitter(image, jitter), expected, 1e-6)
    nothing = augment.Jitter(order, None, None, None, None)
    assert augment.color_jitter(image, nothing) is image
    hue = augment.Jitter(order, None, None, None, jnp.float32(0.2))
    assert_close(augment.color_jitter(image, hue), augment.adjust_hue(image, 0.2), 1e-6)


def test_channel_first_equals_channel_last():
    image = unit("colour_image")
    planes = jnp.moveaxis(image, -1, -3)
    jitter = augment.sample_jitter(jax.random.key(0), brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2)

    @functools.partial(jit, static_argnames="axis")
    def operations(image, axis):
        return (
            augment.adjust_contrast(image, 0.4, channel_axis=axis),
            augment.adjust_saturation(image, 0.4, channel_axis=axis),
            augment.adjust_hue(image, 0.4, channel_axis=axis),
            augment.gaussian_blur(image, 1.3, 5, channel_axis=axis),
            augment.color_jitter(image, jitter, channel_axis=axis),
            augment.normalize(image, (0.1, 0.2, 0.3), (1, 2, 3), channel_axis=axis),
        )

    for first, last in zip(operations(planes, -3), operations(image, -1), strict=True):
        assert_close(jnp.moveaxis(first, -3, -1), last, 1e-6)


# ---------------------------------------------------------------- torchvision, in distribution


@pytest.mark.parametrize("number", range(5))
def test_crops_are_distributed_as_torchvisions(number):
    """Two-sample Kolmogorov-Smirnov tests; at equal distributions p < 1e-3 once in a thousand."""
    extent = jnp.asarray(REFERENCE["sample_extents"][number], jnp.int32)
    keys = jax.random.split(jax.random.key(number), 4000)
    ours = np.asarray(sample_crops(keys, extent))
    theirs = REFERENCE["sample_boxes"][number].astype(np.float32)

    corners, sizes = ours[:, :2], ours[:, 2:]
    assert np.all(ours == np.round(ours))
    assert np.all(corners >= 0) and np.all(sizes >= 1)
    assert np.all(corners + sizes <= np.asarray(extent))

    def statistics(boxes):
        top, left, height, width = boxes.T
        return {
            "top": top,
            "left": left,
            "area": height * width,
            "aspect": width / height,
            "bottom": top + height,
            "right": left + width,
        }

    for name, values in statistics(ours).items():
        result: Any = stats.ks_2samp(values, statistics(theirs)[name])
        assert result.pvalue > 1e-3, f"{name}: {result}"


@pytest.mark.parametrize(
    "extent, area, aspect, box",
    [
        # Torchvision's fallback: no crop of the whole area has that aspect ratio.
        ((20, 100), (1.0, 1.0), (0.75, 4 / 3), (0, 36, 20, 27)),
        ((100, 20), (1.0, 1.0), (0.75, 4 / 3), (36, 0, 27, 20)),
        ((1, 1), (0.08, 1.0), (0.75, 4 / 3), (0, 0, 1, 1)),
        ((1, 9), (1.0, 1.0), (0.75, 4 / 3), (0, 4, 1, 1)),
        ((9, 1), (1.0, 1.0), (0.75, 4 / 3), (4, 0, 1, 1)),
    ],
)
def test_crop_falls_back_to_the_centre(extent, area, aspect, box):
    for seed in range(3):
        sampled = augment.sample_crop(jax.random.key(seed), jnp.array(extent), area=area, aspect=aspect)
        np.testing.assert_array_equal(sampled, box)


def test_jitter_is_drawn_as_torchvisions():
    def sample(key):
        return augment.sample_jitter(key, brightness=0.8, contrast=0.4, saturation=1.5, hue=0.2)

    jitter = jit(jax.vmap(sample))(jax.random.split(jax.random.key(0), 4800))
    ranges = ((0.2, 1.8), (0.6, 1.4), (0.0, 2.5), (-0.2, 0.2))
    for values, (low, high) in zip(jitter[1:], ranges, strict=True):
        result: Any = stats.kstest(np.asarray(values), stats.uniform(low, high - low).cdf)
        assert result.pvalue > 1e-3
        assert low <= values.min() and values.max() <= high
    _, counts = np.unique(np.asarray(jitter.order), axis=0, return_counts=True)
    assert len(counts) == 24
    chi_square: Any = stats.chisquare(counts)
    assert chi_square.pvalue > 1e-3


def test_frequency_of_each_operation():
    """How often one operation changes a gradient image, 4 standard deviations around 0.3.

    The probabilities are traced here, so that one program does for all.
    """
    names = ("flip", "jitter", "grayscale", "blur", "solarize")
    across, down = jnp.linspace(0, 1, 24 * 3), jnp.linspace(1, 0.2, 24)
    ramp = across.reshape(1, 24, 3) ** 2 * down.reshape(24, 1, 1)
    whole = {"crop_area": (1.0, 1.0), "crop_aspect": (1.0, 1.0), "size": 24}

    def changed(probabilities, key):
        options = OPTIONS | whole | dict(zip(names, probabilities, strict=True))
        view = augment.random_view(key, ramp, jnp.array([24, 24]), **options)
        return jnp.max(jnp.abs(view - ramp)) > 1e-3

    count = 500
    keys = jax.random.split(jax.random.key(1), count)
    changes = jit(jax.vmap(jax.vmap(changed, (None, 0)), (0, None)))(0.3 * jnp.eye(5), keys)
    frequencies = dict(zip(names, np.mean(changes, axis=1), strict=True))
    assert frequencies == pytest.approx(dict.fromkeys(names, 0.3), abs=4 * np.sqrt(0.21 / count))


# --------------------------------------------------------------------------------------- views


def test_views_are_ordered_and_differ():
    keys, canvas, extent = make_batch()
    views = two_views(keys, canvas, extent)
    assert views.shape == (16, 16, 16, 3) and views.dtype == jnp.float32
    assert np.all(np.max(np.abs(views[:8] - views[8:]), axis=(1, 2, 3)) > 0.05)
    one_view = jit(lambda *image: augment.random_view(*image, **OPTIONS))
    for number in range(2):
        for image in range(8):
            key = jax.random.fold_in(keys[image], number)
            assert_close(views[8 * number + image], one_view(key, canvas[image], extent[image]))


def test_view_does_not_depend_on_its_place():
    keys, canvas, extent = make_batch()
    order = jnp.array([5, 2, 0, 0, 7, 1, 3, 4])
    views = two_views(keys, canvas, extent)[jnp.concatenate([order, order + 8])]
    np.testing.assert_array_equal(two_views(keys[order], canvas[order], extent[order]), views)


def test_views_do_not_depend_on_the_devices():
    batch = make_batch()
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    sharded = jit(lambda *a: augment.two_views(*a, **OPTIONS), out_shardings=sharding)(
        *jax.device_put(batch, sharding)
    )
    assert len(sharded.sharding.device_set) == 4
    assert_close(sharded, two_views(*batch), 1e-6)


def test_views_compile_once():
    for seed in range(3):
        two_views(*make_batch(seed=seed))
    assert len(TRACES) == 1


def test_pixels_outside_the_extent_do_not_leak():
    keys, canvas, extent = make_batch()
    inside = np.arange(20) < np.asarray(extent)[:, :, None]
    inside = (inside[:, 0, :, None] & inside[:, 1, None, :])[..., None]
    black, white = np.where(inside, canvas, np.uint8(0)), np.where(inside, canvas, np.uint8(255))
    np.testing.assert_array_equal(two_views(keys, black, extent), two_views(keys, white, extent))
    center = jax.vmap(
        lambda canvas, extent: augment.center_view(canvas, extent, size=16, mean=(0, 0, 0), std=(1, 1, 1))
    )
    np.testing.assert_array_equal(center(black, extent), center(white, extent))


@pytest.mark.parametrize("extent", [(1, 1), (1, 20), (20, 1), (2, 3)])
def test_tiny_images(extent):
    keys, canvas, _ = make_batch()
    views = two_views(keys, canvas, jnp.tile(jnp.array([extent], jnp.int32), (8, 1)))
    assert np.all(np.isfinite(views)) and views.min() >= -1e-6 and views.max() <= 1 + 1e-6


def test_views_stay_in_range_before_normalisation():
    for seed in range(8):
        views = two_views(*make_batch(seed=seed))
        assert views.min() >= -1e-6 and views.max() <= 1 + 1e-6


def test_zero_probabilities_leave_the_crop():
    keys, canvas, extent = make_batch()

    @jit
    @jax.vmap
    def crop(key, canvas, extent):
        key_crop = jax.random.split(jax.random.fold_in(key, 0), 5)[0]
        return augment.random_resized_crop(key_crop, canvas, extent, size=16, area=AREA, aspect=ASPECT)

    views = jit(lambda *batch: augment.two_views(*batch, **PLAIN))(keys, canvas, extent)
    assert_close(views[:8], crop(keys, canvas, extent), 1e-6)


def test_zero_is_left_out_of_the_program():
    def program(**options):
        def views(*batch):
            return augment.two_views(*batch, **OPTIONS | options)

        return str(jax.make_jaxpr(views)(*make_batch(2)))

    # Two matrix products crop, two blur; only the hue rounds down.
    full, blurless, hueless = program(), program(blur=0), program(hue=0.0)
    assert full.count("dot_general") == 4 and blurless.count("dot_general") == 2
    assert "= floor " in full and "= floor " not in hueless
    assert program(jitter=0) == program(jitter=0, brightness=0, contrast=0, saturation=0, hue=0)


def test_gradient_is_finite_where_colours_tie():
    keys, canvas, extent = make_batch(4)
    image = canvas.astype(jnp.float32) / 255
    image = image.at[0].set(0.0).at[1].set(1.0).at[2].set(0.5)
    options = OPTIONS | {"jitter": 1.0, "blur": 1.0}
    loss = jit(jax.grad(lambda x: jnp.sum(augment.two_views(keys, x, extent, **options) ** 2)))
    gradient = loss(image)
    assert np.all(np.isfinite(gradient)) and np.any(gradient[3] != 0)


def test_normalize_and_center_view():
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.25, 2.0)
    canvas = jnp.asarray(REFERENCE["crop_canvas"])
    image = canvas / 255
    expected = (np.asarray(image) - np.array(mean)) / np.array(std)
    assert_close(augment.normalize(image, mean, std), expected, 1e-6)
    assert_close(augment.center_view(canvas, jnp.array([24, 24]), size=24, mean=mean, std=std), expected)
    wide = augment.center_view(canvas, jnp.array([11, 24]), size=11, mean=(0, 0, 0), std=(1, 1, 1))
    assert_close(wide, image[:11, 6:17], 1e-6)


# ------------------------------------------------------------------------------ bad arguments


@pytest.mark.parametrize(
    "options, message",
    [
        ({"crop_area": (1.0, 0.08)}, r"crop_area must be \(low, high\).*\(1.0, 0.08\)"),
        ({"crop_area": (0.08, 1.5)}, "crop_area must be"),
        ({"crop_aspect": (0.0, 1.0)}, "crop_aspect must be"),
        ({"blur_sigma": (2.0, 0.1)}, "blur_sigma must be"),
        ({"blur_kernel": 4}, "blur_kernel must be odd.*got 4"),
        ({"blur_kernel": 33}, "blur_kernel must be odd and between 1 and 31.*got 33"),
        ({"flip": 1.5}, "flip must be a probability.*got 1.5"),
        ({"jitter": -0.1}, "jitter must be a probability"),
        ({"grayscale": 2}, "grayscale must be a probability"),
        ({"blur": float("nan")}, "blur must be a probability"),
        ({"solarize": 1.1}, "solarize must be a probability"),
        ({"brightness": -0.4}, "brightness must be a strength of at least 0, got -0.4"),
        ({"contrast": float("nan")}, "contrast must be a strength"),
        ({"saturation": -1}, "saturation must be a strength"),
        ({"hue": 0.6}, "hue must be a strength between 0 and 0.5.*got 0.6"),
        ({"size": 0}, "size must be at least 1"),
        ({"mean": (0.5,)}, "mean must be three numbers"),
        ({"std": (1.0, 1.0, 0.0)}, "std must be three numbers"),
    ],
)
def test_bad_options(options, message):
    keys, canvas, extent = make_batch(1)
    with pytest.raises(ValueError, match=message):
        augment.random_view(keys[0], canvas[0], extent[0], **OPTIONS | options)


@pytest.mark.parametrize(
    "shape, dtype, message",
    [
        ((20, 20), jnp.uint8, r"shape \[S, S, 3\], got \(20, 20\)"),
        ((2, 20, 20, 3), jnp.uint8, "shape"),
        ((20, 20, 4), jnp.uint8, "shape"),
        ((20, 20, 3), jnp.int32, "uint8, or float in .* got int32"),
    ],
)
def test_bad_canvas(shape, dtype, message):
    with pytest.raises(ValueError, match=f"canvas must .*{message}"):
        augment.crop_and_resize(jnp.zeros(shape, dtype), jnp.array([0.0, 0.0, 5.0, 5.0]), 4)


@pytest.mark.parametrize("size, kernel", [(8, 3), (32, 3), (64, 7), (96, 9), (128, 13), (224, 23)])
def test_blur_kernel_size(size, kernel):
    assert augment.blur_kernel_size(size) == kernel


# ------------------------------------------------------------------------------------- the API


def public_functions():
    return [
        function
        for name, function in inspect.getmembers(augment, inspect.isfunction)
        if not name.startswith("_") and function.__module__ == augment.__name__
    ]


@pytest.mark.parametrize("function", public_functions(), ids=lambda function: function.__name__)
def test_api(function):
    parameters = inspect.signature(function).parameters
    names = list(parameters)
    assert "rng" not in names
    if function.__name__.startswith(("random_", "sample_")):
        assert names[0] == "key"
    else:
        assert "key" not in names
    for parameter in parameters.values():
        if parameter.default is not parameter.empty:
            assert parameter.kind is parameter.KEYWORD_ONLY, parameter
    assert function.__doc__
