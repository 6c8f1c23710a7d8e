"""The views against torchvision itself, where it is installed, on images and parameters new each time."""

import importlib
import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from simclr_jax import augment
from simclr_jax.benchmark import peers

CASES = 60


@pytest.fixture(scope="module")
def tv():
    """(torch, torchvision.transforms.v2.functional, torchvision.transforms)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's own, while it is imported
        if peers.import_torchvision() is None:
            pytest.skip("torchvision is not installed")
        names = ("torch", "torchvision.transforms.v2.functional", "torchvision.transforms")
        return tuple(importlib.import_module(name) for name in names)


@pytest.fixture
def rng():
    seed = np.random.SeedSequence().entropy
    print(f"seed {seed}")  # shown where the test fails
    return np.random.default_rng(seed)


def random_image(rng, *, largest=40):
    return rng.integers(0, 256, (*rng.integers(2, largest + 1, 2), 3), np.uint8)


def to_tensor(torch, image):
    return torch.from_numpy(np.moveaxis(image, -1, 0).astype(np.float32) / 255)


def assert_close(actual, tensor):
    np.testing.assert_allclose(actual, np.moveaxis(tensor.numpy(), 0, -1), rtol=0, atol=1e-5)


def test_crop_and_resize(tv, rng):
    torch, functional, _ = tv
    sizes = rng.integers(1, 41, 4)
    for number in range(CASES):
        image, size = random_image(rng), int(sizes[number % len(sizes)])
        height, width = (int(rng.integers(1, side + 1)) for side in image.shape[:2])
        top, left = (
            int(rng.integers(0, a - b + 1)) for a, b in zip(image.shape, (height, width), strict=False)
        )
        flip = bool(rng.integers(2))
        canvas = np.full((40, 41, 3), 255, np.uint8)
        canvas[: image.shape[0], : image.shape[1]] = image
        box = np.array([top, left, height, width], np.float32)
        expected = functional.resized_crop(
            to_tensor(torch, image), top, left, height, width, [size, size], antialias=True
        )
        expected = functional.horizontal_flip(expected) if flip else expected
        cut = jax.jit(augment.crop_and_resize, static_argnums=2)(canvas, box, size, flip=flip)
        assert_close(cut, expected)


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue"])
def test_colours(tv, rng, name):
    torch, functional, _ = tv
    image = random_image(rng)
    image[0, 0] = image[0, 0, 0]
    low, high = (-0.5, 0.5) if name == "hue" else (0.0, 3.0)
    values = rng.uniform(low, high, CASES).astype(np.float32)
    unit = jnp.asarray(image / np.float32(255))
    ours = jax.jit(jax.vmap(lambda value: getattr(augment, f"adjust_{name}")(unit, value)))(values)
    for value, adjusted in zip(values, ours, strict=True):
        assert_close(adjusted, getattr(functional, f"adjust_{name}")(to_tensor(torch, image), float(value)))


def test_grayscale_and_solarize(tv, rng):
    torch, functional, _ = tv
    image = random_image(rng)
    unit = jnp.asarray(image / np.float32(255))
    gray = functional.rgb_to_grayscale(to_tensor(torch, image), num_output_channels=1)
    assert_close(augment.rgb_to_grayscale(unit), gray)
    threshold = float(rng.integers(0, 255) + 0.5) / 255  # between two values, where rounding cannot matter
    assert_close(augment.solarize(unit, threshold), functional.solarize(to_tensor(torch, image), threshold))


def test_blur(tv, rng):
    torch, functional, _ = tv
    for _ in range(8):
        image = random_image(rng)
        kernel = 2 * int(rng.integers(0, min(image.shape[:2]))) + 1
        blur = jax.jit(lambda image, sigma, kernel=kernel: augment.gaussian_blur(image, sigma, kernel))
        for sigma in rng.uniform(0.1, 4, 4):
            expected = functional.gaussian_blur(to_tensor(torch, image), [kernel] * 2, [float(sigma)] * 2)
            assert_close(blur(jnp.asarray(image / np.float32(255)), sigma), expected)


def test_boxes_come_from_the_same_distribution(tv):
    torch, _, transforms = tv
    torch.manual_seed(1)
    extent, area, aspect = (30, 47), (0.08, 1.0), (3 / 4, 4 / 3)
    theirs = np.array(
        [transforms.RandomResizedCrop.get_params(torch.empty(3, *extent), area, aspect) for _ in range(2000)]
    )
    sample = jax.jit(
        jax.vmap(lambda key: augment.sample_crop(key, jnp.array(extent), area=area, aspect=aspect))
    )
    ours = np.asarray(sample(jax.random.split(jax.random.key(2), 2000)))
    for column in range(4):
        result = stats.ks_2samp(ours[:, column], theirs[:, column])
        assert math.isfinite(result.pvalue) and result.pvalue > 1e-3, column  # pyright: ignore


def test_jitter_parameters_come_from_the_same_distribution(tv):
    torch, _, transforms = tv
    torch.manual_seed(3)
    jitter = transforms.ColorJitter(0.8, 0.8, 0.8, 0.2)
    drawn = [
        transforms.ColorJitter.get_params(jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
        for _ in range(2000)
    ]
    strengths = {"brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "hue": 0.2}
    ours = jax.jit(jax.vmap(lambda key: augment.sample_jitter(key, **strengths)))(
        jax.random.split(jax.random.key(4), 2000)
    )
    for column in range(1, 5):
        values = np.array([row[column] for row in drawn], np.float64)
        result = stats.ks_2samp(np.asarray(ours[column]), values)
        assert result.pvalue > 1e-3, column  # pyright: ignore[reportAttributeAccessIssue]
    theirs = np.unique(np.stack([row[0] for row in drawn]), axis=0, return_counts=True)[1]
    orders = np.unique(np.asarray(ours.order), axis=0, return_counts=True)[1]
    assert len(orders) == len(theirs) == 24
    assert stats.chi2_contingency([orders, theirs]).pvalue > 1e-3  # pyright: ignore
