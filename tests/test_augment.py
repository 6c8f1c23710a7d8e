"""The views, against torchvision (stored reference values), and what they promise by themselves."""

import doctest
import functools
import importlib
import inspect
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from reference import torchvision_cases as cases
from scipy import stats

from simclr_jax import augment, config
from simclr_jax.augment import blur, chain, crop
from simclr_jax.augment import planes as plane
from simclr_jax.benchmark import peers

REFERENCE = np.load(Path(__file__).parent / "reference" / "augment.npz")
AREA, ASPECT = (0.08, 1.0), (3 / 4, 4 / 3)
OPTIONS: dict[str, Any] = {"size": 16, "solarize": 0.2, "mean": (0.1, 0.2, 0.3), "std": (0.5, 0.4, 0.3)}
NOTHING: dict[str, Any] = {"flip": 0, "jitter": 0, "grayscale": 0, "blur": 0, "solarize": 0}
UNNORMALIZED: dict[str, Any] = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
TRACES = []

# Compiling is most of the time of these tests; this halves it.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@jit
def two_views(*batch):
    TRACES.append(batch)
    return augment.random_views(*batch, **OPTIONS)


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


def merged(function):
    """A function of planes as one of an image."""
    return lambda image, *args: plane.merge(function(plane.split(image), *args))


def crop_by_taps(canvas, box, size, flip=False):
    return plane.merge(crop.crop_by_taps(canvas, box, size, flip))


def crop_by_products(canvas, box, size, flip=False, dtype=jnp.float32):
    return plane.merge(crop.crop_by_products(canvas, box, size, flip, dtype))


CROPS = [augment.crop_and_resize, crop_by_taps, crop_by_products]
BLURS = [augment.gaussian_blur, merged(blur.blur_by_shifts), merged(blur.blur_by_products)]


@pytest.mark.parametrize("size", [1, 7, 16, 29])
@pytest.mark.parametrize("crop_and_resize", CROPS)
def test_crop_and_resize_equals_torchvision(size, crop_and_resize):
    boxes = jnp.asarray(REFERENCE[f"crop_boxes_{size}"], jnp.float32)
    canvas = jnp.asarray(REFERENCE["crop_canvas"])
    crops = jit(jax.vmap(lambda box: crop_and_resize(canvas, box, size)))(boxes)
    assert crops.shape == (10, size, size, 3) and crops.dtype == jnp.float32
    assert_close(crops, REFERENCE[f"crop_{size}"])

    def flipped_crop(box, flip):
        return crop_and_resize(canvas, box, size, flip=flip)

    flips = jnp.arange(10) % 2 == 0
    flipped = jit(jax.vmap(flipped_crop))(boxes, flips)
    assert_close(flipped[::2], crops[::2, :, ::-1], 1e-6)
    assert_close(flipped[1::2], crops[1::2], 1e-6)


@pytest.mark.parametrize("dtype, atol", [(jnp.float32, 1e-6), (jnp.bfloat16, 4e-3)])
def test_crop_and_resize_takes_floats(dtype, atol):
    canvas, box = jnp.asarray(REFERENCE["crop_canvas"]), jnp.array([3.0, 2.0, 17.0, 20.0])
    cut = augment.crop_and_resize((canvas / 255).astype(dtype), box, 9)
    assert cut.dtype == jnp.float32
    assert_close(cut, augment.crop_and_resize(canvas, box, 9), atol)


@pytest.mark.parametrize("crop_and_resize", CROPS)
def test_crop_of_any_image_equals_torchvision(crop_and_resize):
    """Hundreds of boxes of images of as many shapes, each at the top left of a canvas that is not square."""
    by_size: dict[int, list] = {}
    ends = np.cumsum([3 * cases.crop_case(number)[2] ** 2 for number in range(cases.CASES)])
    for number, expected in enumerate(np.split(REFERENCE["cases_crop"], ends[:-1])):
        image, box, size = cases.crop_case(number)
        canvas = np.full((13, 15, 3), 255, np.uint8)
        canvas[: image.shape[0], : image.shape[1]] = image
        by_size.setdefault(size, []).append(
            (canvas, np.asarray(box, np.float32), expected.reshape(size, size, 3))
        )
    for size, some in by_size.items():
        canvases, boxes, expected = map(np.stack, zip(*some, strict=True))
        cut = jit(jax.vmap(functools.partial(crop_and_resize, size=size)))(canvases, boxes)
        assert_close(cut, expected)


@pytest.mark.parametrize("dtype, atol", [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)])
@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue", "solarize"])
def test_colours_of_any_image_equal_torchvision(name, dtype, atol):
    pairs = [cases.colour_case(number) for number in range(cases.CASES)]
    images = jnp.asarray(np.stack([image for image, _ in pairs]) / np.float32(255))
    values = jnp.asarray([values[name] for _, values in pairs], jnp.float32)
    expected = REFERENCE[f"cases_{name}"].reshape(images.shape)
    if name == "solarize" and dtype == jnp.bfloat16:  # jumps where rounding passes the threshold
        near = np.abs(images - values[:, None, None, None]) < 4e-3
        images = jnp.where(near, 0, images)
        expected = np.where(near, np.where(values[:, None, None, None] > 0, 0, 1), expected)
    operation = augment.solarize if name == "solarize" else getattr(augment, f"adjust_{name}")
    adjusted = jit(jax.vmap(operation))(images.astype(dtype), values)
    assert adjusted.dtype == dtype
    assert_close(adjusted.astype(jnp.float32), expected, atol)


@pytest.mark.parametrize("gaussian_blur", BLURS)
@pytest.mark.parametrize("dtype, atol", [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)])
def test_blur_of_any_image_equals_torchvision(gaussian_blur, dtype, atol):
    sizes = [cases.blur_case(number)[0].size for number in range(cases.CASES)]
    compiled = jit(gaussian_blur, static_argnums=(2,))
    for number, expected in enumerate(np.split(REFERENCE["cases_blur"], np.cumsum(sizes)[:-1])):
        image, sigma, kernel = cases.blur_case(number)
        blurred = compiled(jnp.asarray(image / np.float32(255)).astype(dtype), sigma, kernel)
        assert_close(blurred.astype(jnp.float32), expected.reshape(image.shape), atol)


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


@pytest.mark.parametrize("gaussian_blur", BLURS)
@pytest.mark.parametrize("number", range(8))
def test_blur_equals_torchvision(number, gaussian_blur):
    image, kernel = unit("blur_image"), int(REFERENCE["blur_kernels"][number])
    blurred = jit(lambda image, sigma: gaussian_blur(image, sigma, kernel))(
        image, REFERENCE["blur_sigmas"][number]
    )
    assert_close(blurred, REFERENCE["blurred"][number])


def jitter_in_order(image, jitter):
    return plane.merge(chain.in_order(plane.split(image), jitter, chain.ON_PLANES))


@pytest.mark.parametrize("color_jitter", [augment.color_jitter, jitter_in_order])
def test_jitter_equals_torchvision_in_all_24_orders(color_jitter):
    def jitter(order):
        factors = [jnp.asarray(value) for value in REFERENCE["jitter"]]
        return color_jitter(unit("colour_image"), augment.Jitter(order, *factors))

    jittered = jit(jax.vmap(jitter))(jnp.asarray(REFERENCE["jitter_orders"]))
    assert_close(jittered, REFERENCE["jittered"])


@pytest.mark.parametrize("left_out", range(16))
def test_jitter_leaves_out_what_is_none(left_out):
    image, order = unit("colour_image"), jnp.array([2, 3, 1, 0])
    values: list[Any] = [
        None if left_out >> number & 1 else jnp.float32(0.3 + 0.2 * number) for number in range(4)
    ]
    jitter = augment.Jitter(order, *values)
    adjusts = (
        augment.adjust_brightness,
        augment.adjust_contrast,
        augment.adjust_saturation,
        augment.adjust_hue,
    )
    expected = image
    for operation in (2, 3, 1, 0):
        if values[operation] is not None:
            expected = adjusts[operation](expected, values[operation])
    assert_close(augment.color_jitter(image, jitter), expected, 1e-6)
    assert_close(jitter_in_order(image, jitter), expected, 1e-6)


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


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue"])
def test_random_adjustments_draw_from_their_range(name):
    image, strength = unit("colour_image"), 0.4
    keys = jax.random.split(jax.random.key(3), 20)
    randomly = functools.partial(getattr(augment, f"random_{name}"), image=image, strength=strength)
    adjusted = jit(jax.vmap(lambda key: randomly(key)))(keys)
    low, high = (-0.4, 0.4) if name == "hue" else (0.6, 1.4)
    values = jax.vmap(lambda key: jax.random.uniform(key, minval=low, maxval=high))(keys)
    expected = jax.vmap(lambda value: getattr(augment, f"adjust_{name}")(image, value))(values)
    assert_close(adjusted, expected)


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_random_operations_happen_or_not(probability):
    key, image = jax.random.key(0), unit("colour_image")
    cases = [
        (augment.random_flip_left_right, {}, augment.flip_left_right(image)),
        (augment.random_grayscale, {}, jnp.repeat(augment.rgb_to_grayscale(image), 3, axis=-1)),
        (augment.random_solarize, {"threshold": 0.4}, augment.solarize(image, 0.4)),
    ]
    for operation, options, changed in cases:
        result = operation(key, image, probability=probability, **options)
        assert_close(result, changed if probability else image, 0)
    strengths = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1}
    jittered = augment.random_color_jitter(key, image, probability=probability, **strengths)
    blurred = augment.random_gaussian_blur(
        key, image, sigma=(1.0, 2.0), kernel_size=3, probability=probability
    )
    for result in (jittered, blurred):
        assert bool(jnp.all(result == image)) is (probability == 0)


def test_frequency_of_each_operation():
    """How often one operation changes a gradient image, 4 standard deviations around 0.3.

    The probabilities are traced here, so that one program does for all.
    """
    names = ("flip", "jitter", "grayscale", "blur", "solarize")
    across, down = jnp.linspace(0, 1, 24 * 3), jnp.linspace(1, 0.2, 24)
    ramp = across.reshape(1, 24, 3) ** 2 * down.reshape(24, 1, 1)
    whole = {"crop_area": (1.0, 1.0), "crop_aspect": (1.0, 1.0), "size": 24}
    count = 500

    def changed(probabilities):
        options = whole | UNNORMALIZED | dict(zip(names, probabilities, strict=True))
        views = augment.random_views(jax.random.key(1), ramp[None], count=count, **options)
        return jnp.max(jnp.abs(views - ramp[None]), axis=(1, 2, 3)) > 1e-3

    compiled = jit(changed)
    frequencies = {
        name: np.mean(compiled(probabilities))
        for name, probabilities in zip(names, 0.3 * np.eye(5), strict=True)
    }
    assert frequencies == pytest.approx(dict.fromkeys(names, 0.3), abs=4 * np.sqrt(0.21 / count))


# --------------------------------------------------------------------------------------- views


def accelerator_views(keys, canvas, extent, *, dtype="float32", **options):
    """The first view of each image in the form for accelerators, which runs on a CPU as well."""
    options = OPTIONS | options
    defaults = inspect.signature(augment.random_views).parameters
    drawn = {
        name: options.get(name, defaults[name].default)
        for name in inspect.signature(augment.sample_view).parameters
        if name not in ("key", "extent")
    }
    size = options["size"]
    settings = chain.Settings(
        size, augment.blur_kernel_size(size), 0.5, options["mean"], options["std"], jnp.dtype(dtype)
    )

    def view(key, canvas, extent):
        sampled = augment.sample_view(jax.random.fold_in(key, 0), extent, **drawn)
        return chain.at_once(sampled, canvas, settings)

    return jax.vmap(view)(keys, canvas, extent)


accelerated_views = jit(accelerator_views)

SWITCHED_OFF = [
    {},
    {"contrast": 0},
    {"hue": 0},
    {"contrast": 0, "hue": 0},
    {"brightness": 0, "saturation": 0},
]


@pytest.mark.parametrize("options", [*SWITCHED_OFF, NOTHING, {"flip": 0, "size": 40}, {"solarize": 0}])
def test_the_three_forms_make_the_same_views(options):
    """Up to rounding; what solarizes jumps where a value lies on the threshold, a few times in a million."""
    batch = make_batch(32)

    @functools.partial(jit, static_argnums=0)
    def views(form, *batch):
        return augment.random_views(*batch, count=1, form=form, **OPTIONS | options)

    plain = np.asarray(views("plain", *batch))
    accelerated = jit(functools.partial(accelerator_views, **options))(*batch)
    for other in (views("fast", *batch), accelerated):
        difference = np.abs(np.asarray(other) - plain)
        assert np.mean(difference > 1e-4) < 1e-4
        assert np.mean(difference) < 1e-5


@pytest.mark.parametrize("form", ["fast", "plain"])
def test_on_accelerators_products_have_all_digits(form):
    """By default a GPU would multiply with ten bits, a TPU with eight."""
    views = jax.jit(functools.partial(augment.random_views, count=1, form=form, **OPTIONS))
    text = views.trace(*make_batch(2)).lower(lowering_platforms=("tpu",)).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line or "convolution" in line]
    assert len(products) >= 4 and all("HIGHEST, " in line or "HIGHEST>" in line for line in products)


def test_bfloat16_views_are_near_float32_views():
    batch = make_batch(64)
    accelerated = functools.partial(accelerator_views, solarize=0, **UNNORMALIZED)
    exact = jit(accelerated)(*batch)
    for views in (
        jit(functools.partial(accelerated, dtype="bfloat16"))(*batch),
        jit(lambda *batch: augment.random_views(*batch, count=1, size=16, dtype="bfloat16"))(*batch),
    ):
        assert views.dtype == jnp.bfloat16
        difference = np.abs(np.asarray(views, np.float32) - exact)
        assert difference.max() < 2e-2 and difference.mean() < 2e-3


def test_canvases_need_not_be_square():
    keys, canvas, _ = make_batch(8)
    wide = canvas[:, :11]
    extent = jnp.full((8, 2), jnp.array([11, 20]))
    fast = jit(lambda *batch: augment.random_views(*batch, count=1, **OPTIONS))
    assert_close(fast(keys, wide), fast(keys, canvas, extent), 1e-6)
    assert_close(accelerated_views(keys, wide, extent), fast(keys, wide, extent), 1e-4)


def test_views_are_ordered_and_differ():
    keys, canvas, extent = make_batch()
    views = two_views(keys, canvas, extent)
    assert views.shape == (16, 16, 16, 3) and views.dtype == jnp.float32
    assert np.all(np.max(np.abs(views[:8] - views[8:]), axis=(1, 2, 3)) > 0.05)
    second = jit(lambda *batch: augment.random_views(*batch, count=1, first=1, **OPTIONS))
    np.testing.assert_array_equal(second(keys, canvas, extent), views[8:])


def test_one_key_is_folded_for_each_image():
    _, canvas, extent = make_batch()
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(5), jnp.arange(8))
    np.testing.assert_array_equal(
        two_views(jax.random.key(5), canvas, extent), two_views(keys, canvas, extent)
    )


def test_view_does_not_depend_on_its_place():
    keys, canvas, extent = make_batch()
    order = jnp.array([5, 2, 0, 0, 7, 1, 3, 4])
    views = two_views(keys, canvas, extent)[jnp.concatenate([order, order + 8])]
    np.testing.assert_array_equal(two_views(keys[order], canvas[order], extent[order]), views)


@pytest.mark.parametrize("make", [two_views, accelerated_views])
def test_views_do_not_depend_on_the_devices(make):
    batch = make_batch()
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    sharded = make(*jax.device_put(batch, sharding))
    assert len(sharded.sharding.device_set) == 4
    assert_close(sharded, make(*batch), 1e-5)


def test_views_compile_once():
    TRACES.clear()
    jax.clear_caches()
    for seed in range(3):
        two_views(*make_batch(seed=seed))
    assert len(TRACES) == 1


def test_pixels_outside_the_extent_do_not_leak():
    keys, canvas, extent = make_batch()
    inside = np.arange(20) < np.asarray(extent)[:, :, None]
    inside = (inside[:, 0, :, None] & inside[:, 1, None, :])[..., None]
    black, white = np.where(inside, canvas, np.uint8(0)), np.where(inside, canvas, np.uint8(255))
    for make in (two_views, accelerated_views):
        np.testing.assert_array_equal(make(keys, black, extent), make(keys, white, extent))
    center = jax.vmap(
        lambda canvas, extent: augment.center_view(canvas, extent, size=16, mean=(0, 0, 0), std=(1, 1, 1))
    )
    np.testing.assert_array_equal(center(black, extent), center(white, extent))


@pytest.mark.parametrize("make", [two_views, accelerated_views])
@pytest.mark.parametrize("extent", [(1, 1), (1, 20), (20, 1), (2, 3)])
def test_tiny_images(extent, make):
    keys, canvas, _ = make_batch()
    views = make(keys, canvas, jnp.tile(jnp.array([extent], jnp.int32), (8, 1)))
    assert_in_range(views)


def test_views_stay_in_range_before_normalisation():
    for seed in range(8):
        assert_in_range(two_views(*make_batch(seed=seed)))


def assert_in_range(views):
    pixels = np.asarray(views) * np.array(OPTIONS["std"]) + np.array(OPTIONS["mean"])
    assert np.all(np.isfinite(pixels)) and pixels.min() >= -1e-6 and pixels.max() <= 1 + 1e-6


def test_zero_probabilities_leave_the_crop():
    keys, canvas, extent = make_batch()

    @jit
    @jax.vmap
    def crop_alone(key, canvas, extent):
        key_crop = jax.random.split(jax.random.fold_in(key, 0), 5)[0]
        return augment.random_resized_crop(key_crop, canvas, extent, size=16, area=AREA, aspect=ASPECT)

    views = jit(lambda *batch: augment.random_views(*batch, count=1, size=16, **NOTHING))(
        keys, canvas, extent
    )
    assert_close(views, crop_alone(keys, canvas, extent), 1e-6)


def test_zero_is_left_out_of_the_program():
    def program(**options):
        def views(*batch):
            return augment.random_views(*batch, form="plain", **OPTIONS | options)

        return str(jax.make_jaxpr(views)(*make_batch(2)))

    # Two convolutions blur; only the hue takes a remainder of floats.
    full, blurless = program(), program(blur=0)
    assert "conv_general_dilated" in full and "conv_general_dilated" not in blurless
    assert program(jitter=0) == program(jitter=0, brightness=0, contrast=0, saturation=0, hue=0)


@pytest.mark.parametrize("make", [augment.random_views, accelerator_views])
def test_gradient_is_finite_where_colours_tie(make):
    keys, canvas, extent = make_batch(4)
    image = canvas.astype(jnp.float32) / 255
    image = image.at[0].set(0.0).at[1].set(1.0).at[2].set(0.5)
    options = OPTIONS | {"jitter": 1.0, "blur": 1.0}
    loss = jit(jax.grad(lambda x: jnp.sum(make(keys, x, extent, **options) ** 2)))
    gradient = loss(image)
    assert np.all(np.isfinite(gradient)) and np.any(gradient[3] != 0)


def test_the_forms_have_the_same_gradient():
    """But where a value lies at a clip's end or two channels tie, up to rounding, on which it may jump."""
    keys, _, extent = make_batch(4)
    image = jax.random.uniform(jax.random.key(6), (4, 20, 20, 3))
    first, second = (
        jit(jax.grad(lambda x, make=make: jnp.sum(make(keys, x, extent, solarize=0) ** 2)))(image)
        for make in (
            accelerator_views,
            lambda *batch, **options: augment.random_views(*batch, count=1, **OPTIONS | options),
        )
    )
    assert np.mean(np.abs(first - second) > 1e-2) < 1e-2
    assert np.mean(np.abs(first)) > 1e-2


def test_normalize_and_center_view():
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.25, 2.0)
    canvas = jnp.asarray(REFERENCE["crop_canvas"])
    image = canvas / 255
    expected = (np.asarray(image) - np.array(mean)) / np.array(std)
    assert_close(augment.normalize(image, mean, std), expected, 1e-6)
    assert_close(augment.center_view(canvas, jnp.array([24, 24]), size=24, mean=mean, std=std), expected)
    wide = augment.center_view(canvas, jnp.array([11, 24]), size=11, mean=(0, 0, 0), std=(1, 1, 1))
    assert_close(wide, image[:11, 6:17], 1e-6)


@pytest.mark.parametrize("size", [5, 20])
def test_center_view_of_a_part_is_that_of_the_part_alone(size):
    canvas = jnp.asarray(REFERENCE["crop_canvas"])
    part = jnp.full_like(canvas, 255).at[:12, :12].set(canvas[4:16, 6:18])
    options: dict[str, Any] = {"size": size, "mean": (0.1, 0.2, 0.3), "std": (0.5, 0.4, 0.3)}

    view, expected = jit(
        lambda: (
            augment.center_view(canvas, jnp.array([20, 24]), crop=0.6, **options),
            augment.center_view(part, jnp.array([12, 12]), crop=1.0, **options),
        )
    )()
    assert_close(view, expected, 1e-6)


@pytest.mark.parametrize(
    ("extent", "size", "crop"), [((32, 32), 28, 0.875), ((48, 40), 10, 0.5), ((20, 24), 32, 0.8)]
)
def test_center_view_equals_resize_and_center_crop_of_torchvision(extent, size, crop):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's own, while it is imported
        if peers.import_torchvision() is None:
            pytest.skip("torchvision is not installed")
        torch = importlib.import_module("torch")
        functional = importlib.import_module("torchvision.transforms.v2.functional")
    image = np.random.default_rng(0).random((*extent, 3), np.float32)
    canvas = jnp.ones((48, 48, 3)).at[: extent[0], : extent[1]].set(image)
    view = jit(lambda: augment.center_view(canvas, jnp.array(extent), size=size, crop=crop, **UNNORMALIZED))()
    resized = functional.resize(
        torch.from_numpy(image).permute(2, 0, 1), [round(size / crop)], antialias=True
    )
    expected = functional.center_crop(resized, [size, size]).permute(1, 2, 0).numpy()
    inner = slice(1, -1)  # at its border theirs has pixels from outside the square as well
    assert_close(view[inner, inner], expected[inner, inner])


@pytest.mark.parametrize("crop", [0.0, -0.5, 1.01, float("nan")])
def test_center_view_refuses_a_part_that_is_none(crop):
    with pytest.raises(ValueError, match=f"crop must be above 0 and at most 1, got {crop}"):
        augment.center_view(
            jnp.zeros((8, 8, 3)), jnp.array([8, 8]), size=4, mean=(0, 0, 0), std=(1, 1, 1), crop=crop
        )


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
        ({"hue": 0.6}, "hue must be a strength in turns between 0 and 0.5, got 0.6"),
        ({"size": 0}, "size must be between 1 and 160.*got 0"),
        ({"size": 161}, r"size must be between 1 and 160, 8 times the canvas's \(20, 20\), got 161"),
        ({"mean": (0.5,)}, "mean must be three numbers"),
        ({"std": (1.0, 1.0, 0.0)}, "std must be three numbers"),
        ({"count": 0}, "count must be at least 1, got 0"),
        ({"form": "slow"}, "form must be one of fast, plain, got 'slow'"),
    ],
)
def test_bad_options(options, message):
    keys, canvas, extent = make_batch(1)
    with pytest.raises(ValueError, match=message):
        augment.random_views(keys, canvas, extent, **OPTIONS | options)


@pytest.mark.parametrize(
    "shape, dtype, value, message",
    [
        ((20, 20), jnp.uint8, 0, r"shape \[H, W, 3\], got \[20, 20\]"),
        ((2, 20, 20, 3), jnp.uint8, 0, "shape"),
        ((20, 20, 4), jnp.uint8, 0, "shape"),
        ((0, 20, 3), jnp.uint8, 0, "shape"),
        ((20, 20, 3), jnp.int32, 0, "uint8, or float in .* got int32"),
        ((20, 20, 3), jnp.float32, 255, r"lie in \[0, 1\], got values from 255 to 255"),
        ((20, 20, 3), jnp.float32, -0.5, r"lie in \[0, 1\]"),
        ((20, 20, 3), jnp.float32, jnp.nan, r"lie in \[0, 1\], got values from nan to nan"),
    ],
)
def test_bad_canvas(shape, dtype, value, message):
    with pytest.raises(ValueError, match=f"canvas must .*{message}"):
        augment.crop_and_resize(jnp.full(shape, value, dtype), jnp.array([0.0, 0.0, 5.0, 5.0]), 4)


@pytest.mark.parametrize(
    "box",
    [(-1, 0, 5, 5), (0, 0, 21, 5), (16, 0, 5, 5), (0, 0, 0, 5), (0, 0, 2.5, 5), (0, 0, float("nan"), 5)],
)
def test_bad_box(box):
    with pytest.raises(ValueError, match=r"box must be .* inside the canvas of \(20, 20\), got"):
        augment.crop_and_resize(jnp.zeros((20, 20, 3)), box, 4)


@pytest.mark.parametrize(
    "extent, message",
    [
        ([[0, 5]], r"extent must be \(height, width\) between 1 and .*\(20, 20\), got \(0, 5\)"),
        ([[5, 21]], r"got \(5, 21\)"),
        ([5, 5], r"integers of shape \[1, 2\], got int32 \[2\]"),
        ([[5.0, 5.0]], r"integers of shape \[1, 2\], got float32"),
    ],
)
def test_bad_extent(extent, message):
    keys, canvas, _ = make_batch(1)
    with pytest.raises(ValueError, match=message):
        augment.random_views(keys, canvas, np.asarray(extent, type(np.ravel(extent)[0])), size=16)


def test_bad_extent_of_a_box():
    with pytest.raises(ValueError, match=r"extent must be \(height, width\) of at least 1, got \(0, 7\)"):
        augment.sample_crop(jax.random.key(0), jnp.array([0, 7]), area=AREA, aspect=ASPECT)


@pytest.mark.parametrize(
    "keys, message",
    [
        (jnp.zeros((1, 2), jnp.uint32), "keys must be typed random keys.*got uint32"),
        (jax.random.split(jax.random.key(0), 3), r"keys must be one key or \[1\], one an image, got \[3\]"),
    ],
)
def test_bad_keys(keys, message):
    _, canvas, extent = make_batch(1)
    with pytest.raises(ValueError, match=message):
        augment.random_views(keys, canvas, extent, size=16)


@pytest.mark.parametrize(
    "operation",
    [
        lambda image: augment.adjust_brightness(image, 1.0),
        lambda image: augment.adjust_contrast(image, 1.0),
        lambda image: augment.adjust_saturation(image, 1.0),
        lambda image: augment.adjust_hue(image, 0.1),
        lambda image: augment.gaussian_blur(image, 1.0, 3),
        lambda image: augment.solarize(image, 0.5),
        lambda image: augment.normalize(image, (0, 0, 0), (1, 1, 1)),
        augment.rgb_to_grayscale,
        augment.flip_left_right,
    ],
)
def test_bad_images(operation):
    for image, message in [
        (jnp.zeros((2, 8, 8, 3)), "image must have shape"),
        (jnp.zeros((8, 8, 1)), "image must have shape"),
        (jnp.zeros((8, 8, 3), jnp.uint8), "image must be float .* got uint8; divide"),
        (jnp.full((8, 8, 3), 2.0), r"image must lie in \[0, 1\], got values from 2 to 2"),
    ]:
        with pytest.raises(ValueError, match=message):
            operation(image)
    with pytest.raises(ValueError, match="image must have shape"):  # while tracing as well
        jax.jit(operation)(jnp.zeros((8, 8)))


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_bad_factor(name):
    with pytest.raises(ValueError, match="factor must be a factor of at least 0, got -1"):
        getattr(augment, f"adjust_{name}")(jnp.zeros((4, 4, 3)), -1)


def test_bad_sigma():
    with pytest.raises(ValueError, match="sigma must be a standard deviation of at least 0, got -1"):
        augment.gaussian_blur(jnp.zeros((4, 4, 3)), -1, 3)


def test_sigma_of_zero_is_no_blur():
    image = unit("blur_image")
    for gaussian_blur in BLURS:
        np.testing.assert_array_equal(jit(lambda image, f=gaussian_blur: f(image, 0.0, 5))(image), image)


@pytest.mark.parametrize("size, kernel", [(8, 3), (32, 3), (64, 7), (96, 9), (128, 13), (224, 23)])
def test_blur_kernel_size(size, kernel):
    assert augment.blur_kernel_size(size) == kernel


# ------------------------------------------------------------------------------------- the API


def public_functions():
    return [getattr(augment, name) for name in augment.__all__ if inspect.isfunction(getattr(augment, name))]


def test_the_example_of_the_package_is_true():
    assert doctest.testmod(augment).failed == 0


def test_defaults_are_those_of_the_config():
    views = config.default_config().views.to_dict()
    for name, parameter in inspect.signature(augment.random_views).parameters.items():
        if name in views and parameter.default is not parameter.empty:
            assert views[name] == parameter.default or jnp.dtype(views[name]) == parameter.default, name


@pytest.mark.parametrize("function", public_functions(), ids=lambda function: function.__name__)
def test_api(function):
    parameters = inspect.signature(function).parameters
    names = list(parameters)
    assert "rng" not in names
    if function.__name__.startswith(("random_", "sample_")):
        assert names[0] in ("key", "keys")
    else:
        assert not {"key", "keys"} & set(names)
    for parameter in parameters.values():
        if parameter.default is not parameter.empty and parameter.name != "extent":
            assert parameter.kind is parameter.KEYWORD_ONLY, parameter
    assert function.__doc__
