"""Cutout, Sobel, noise and quarter turns, against NumPy, SciPy and torchvision."""

import functools
import importlib
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage, stats

from simclr_jax import augment
from simclr_jax.benchmark import peers

# Compiling is most of the time of these tests; this halves it.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
DTYPES = [(jnp.float32, 1e-6), (jnp.bfloat16, 4e-3)]


@pytest.fixture
def rng():
    seed = np.random.SeedSequence().entropy
    print(f"seed {seed}")  # shown where the test fails
    return np.random.default_rng(seed)


def keys(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


def assert_close(actual, desired, atol=1e-6):
    np.testing.assert_allclose(np.asarray(actual, np.float64), desired, rtol=0, atol=atol)


# ------------------------------------------------------------------------------------------- cutout


def slow_cutout(image, center, side):
    """As in DeVries and Taylor's code: corners beside the centre, clipped to the image."""
    image, (height, width) = image.copy(), image.shape[:2]
    top, left = center[0] - side // 2, center[1] - side // 2
    bottom, right = top + side, left + side
    image[max(0, top) : min(height, bottom), max(0, left) : min(width, right)] = 0
    return image


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_cutout_equals_a_slice_set_to_zero(dtype, rng):
    image = jnp.asarray(rng.uniform(0.1, 1, (13, 17, 3)), dtype)
    centers = np.stack([rng.integers(0, 13, 60), rng.integers(0, 17, 60)], axis=1)
    sides = rng.integers(0, 30, 60)
    made = jit(jax.vmap(augment.cutout, (None, 0, 0)))(image, centers, sides)
    assert made.dtype == dtype
    for result, center, side in zip(made, centers, sides, strict=True):
        np.testing.assert_array_equal(result, slow_cutout(np.asarray(image), center, int(side)))


def test_cutout_takes_small_integers():
    image = jnp.ones((9, 9, 3))
    made = augment.cutout(image, np.array([1, 2], np.uint8), np.uint8(6))  # a corner at -2, -1
    np.testing.assert_array_equal(made, slow_cutout(np.asarray(image), (1, 2), 6))


def test_a_random_cutouts_centre_is_any_pixel_with_the_same_probability():
    cut = jit(jax.vmap(functools.partial(augment.random_cutout, side=1), (0, None)))
    holes = np.asarray(cut(keys(12_000), jnp.ones((4, 6, 3))))[..., 0] == 0
    assert (holes.sum(axis=(1, 2)) == 1).all()
    assert stats.chisquare(holes.sum(axis=0).ravel()).pvalue > 1e-3


# -------------------------------------------------------------------------------------------- sobel


def slow_sobel(image):
    gradient = [
        np.stack([ndimage.sobel(channel, axis, mode="mirror") for channel in np.moveaxis(image, -1, 0)], -1)
        for axis in (0, 1)
    ]
    return np.minimum(np.hypot(*gradient) / 4, 1)


@pytest.mark.parametrize(("dtype", "atol"), DTYPES)
@pytest.mark.parametrize("shape", [(11, 8, 3), (2, 9, 3), (1, 5, 3)])
def test_sobel_equals_scipy(dtype, atol, shape, rng):
    image = jnp.asarray(rng.uniform(0, 1, shape), dtype)
    made = jit(augment.sobel)(image)
    assert made.dtype == dtype
    assert_close(made, slow_sobel(np.asarray(image, np.float64)), atol)


def test_sobel_is_1_on_a_straight_edge_and_0_where_nothing_changes():
    image = jnp.zeros((8, 8, 3)).at[:, 4:].set(1)
    expected = np.zeros((8, 8, 3))
    expected[:, 3:5] = 1
    np.testing.assert_array_equal(augment.sobel(image), expected)
    np.testing.assert_array_equal(augment.sobel(jnp.full((5, 5, 3), 0.7)), 0)


# -------------------------------------------------------------------------------------------- noise


@pytest.mark.parametrize(("dtype", "atol"), DTYPES)
def test_noise_is_added_and_clipped(dtype, atol, rng):
    image = jnp.asarray(rng.uniform(0, 1, (7, 9, 3)), dtype)
    noise = rng.normal(0, 0.5, image.shape).astype(np.float32)
    made = augment.add_noise(image, noise)
    assert made.dtype == dtype
    assert_close(made, np.clip(np.asarray(image, np.float64) + noise, 0, 1), atol)


@pytest.mark.parametrize("sigma", [0.02, 0.1])
def test_random_noise_is_normal_and_each_values_own(sigma):
    gray = jnp.full((60, 60, 3), 0.5)
    noise = np.asarray(augment.random_gaussian_noise(jax.random.key(0), gray, sigma=sigma)) - 0.5
    assert stats.kstest(noise.ravel() / sigma, "norm").pvalue > 1e-3
    for ours, neighbours in ((noise[1:], noise[:-1]), (noise[..., 0], noise[..., 1])):
        assert abs(np.corrcoef(ours.ravel(), neighbours.ravel())[0, 1]) < 0.05


# ----------------------------------------------------------------------------------------- rotation


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_quarter_turns_are_numpys(dtype, rng):
    image = jnp.asarray(rng.uniform(0, 1, (6, 6, 3)), dtype)
    turns = np.arange(-5, 6)
    made = jit(jax.vmap(augment.rotate_quarter_turns, (None, 0)))(image, turns)
    assert made.dtype == dtype
    for number, result in zip(turns, made, strict=True):
        np.testing.assert_array_equal(result, np.rot90(np.asarray(image), int(number)))


def test_random_turns_are_equally_likely(rng):
    image = jnp.asarray(rng.uniform(0, 1, (3, 3, 3)), jnp.float32)
    made = jit(jax.vmap(augment.random_quarter_turns, (0, None)))(keys(4_000), image)
    found = [(np.asarray(made) == np.rot90(image, turns)).all(axis=(1, 2, 3)) for turns in range(4)]
    assert np.sum(found) == 4_000
    assert stats.chisquare(np.sum(found, axis=1)).pvalue > 1e-3


# ------------------------------------------------------------------------------------- all of them


RANDOM = {
    "cutout": functools.partial(augment.random_cutout, side=5),
    "sobel": augment.random_sobel,
    "noise": augment.random_gaussian_noise,
}


@pytest.mark.parametrize("name", RANDOM)
def test_each_comes_with_its_probability(name, rng):
    image = jnp.asarray(rng.uniform(0.2, 0.8, (8, 8, 3)), jnp.float32)

    @jit
    @functools.partial(jax.vmap, in_axes=(0, None))
    def changes(key, probability):
        return jnp.any(RANDOM[name](key, image, probability=probability) != image)

    assert not changes(keys(200), 0.0).any()
    assert changes(keys(200), 1.0).all()
    count = int(changes(keys(2_000), 0.3).sum())
    assert stats.binomtest(count, 2_000, 0.3).pvalue > 1e-3


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", ["cutout", "noise", "turns"])
def test_the_same_key_gives_the_same_bits_in_the_range_and_type(name, dtype, rng):
    image = jnp.asarray(rng.integers(0, 2, (10, 10, 3)), dtype)  # black and white, which noise leaves first
    apply = jit(jax.vmap((RANDOM | {"turns": augment.random_quarter_turns})[name], (0, None)))
    made = apply(keys(20), image)
    assert made.dtype == dtype and made.shape == (20, 10, 10, 3)
    assert made.min() >= 0 and made.max() <= 1
    np.testing.assert_array_equal(made, apply(keys(20), image))
    assert (made != apply(keys(20, seed=1), image)).any()


BAD = {
    "image": lambda image: augment.sobel(image[..., :1]),
    "float": lambda image: augment.sobel((255 * image).astype(jnp.uint8)),
    "side": lambda image: augment.cutout(image, jnp.array([1, 1]), -1),
    "whole": lambda image: augment.cutout(image, jnp.array([1, 1]), 2.5),
    "center": lambda image: augment.cutout(image, jnp.array([1.0, 1.0]), 2),
    "shape": lambda image: augment.add_noise(image, jnp.zeros(3)),
    "sigma": lambda image: augment.random_gaussian_noise(jax.random.key(0), image, sigma=-1.0),
    "square": lambda image: augment.rotate_quarter_turns(image[1:], 1),
    "turns": lambda image: augment.rotate_quarter_turns(image, 1.0),
    "probability": lambda image: augment.random_sobel(jax.random.key(0), image, probability=1.5),
}


@pytest.mark.parametrize("word", BAD)
def test_bad_arguments_are_named(word):
    with pytest.raises(ValueError, match=word) as raised:
        BAD[word](jnp.full((4, 4, 3), 0.5))
    assert "\n" not in str(raised.value)


# -------------------------------------------------------------------------- torchvision, if it is there


@pytest.fixture(scope="module")
def tv():
    """(torch, torchvision.transforms.v2.functional)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's own, while it is imported
        if peers.import_torchvision() is None:
            pytest.skip("torchvision is not installed")
        names = ("torch", "torchvision.transforms.v2.functional")
        return tuple(importlib.import_module(name) for name in names)


def test_all_that_torchvision_has_equals_it(tv, rng):
    torch, functional = tv
    image = rng.uniform(0, 1, (12, 12, 3)).astype(np.float32)
    tensor = torch.from_numpy(image).permute(2, 0, 1)

    def back(tensor):
        return tensor.permute(1, 2, 0).numpy()

    for turns in range(4):
        rotated = back(functional.rotate(tensor, 90 * turns))
        np.testing.assert_array_equal(augment.rotate_quarter_turns(jnp.asarray(image), turns), rotated)
    erased = back(functional.erase(tensor, 2, 4, 6, 6, torch.zeros(3, 1, 1)))
    np.testing.assert_array_equal(augment.cutout(jnp.asarray(image), jnp.array([5, 7]), 6), erased)
    torch.manual_seed(0)
    theirs = back(functional.gaussian_noise(torch.full((3, 60, 60), 0.9)))  # a sixth of the values is clipped
    ours = augment.random_gaussian_noise(jax.random.key(0), jnp.full((60, 60, 3), 0.9))
    same: Any = stats.ks_2samp(theirs.ravel(), np.asarray(ours).ravel())
    assert same.pvalue > 1e-3
