"""The forms of a convolution that CPUs get, against its definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from simclr_jax.convolution import convolve, stem, winograd


def definition(x, kernel, cotangent, stride):
    """Output and gradients, as sums of float64 products of shifted maps."""
    x, kernel, cotangent = (np.asarray(a, np.float64) for a in (x, kernel, cotangent))
    side, height, width = len(kernel), *x.shape[1:3]
    half = side // 2
    padded = np.pad(x, ((0, 0), (half, half), (half, half), (0, 0)))
    output, of_padded, of_kernel = np.zeros_like(cotangent), np.zeros_like(padded), np.zeros_like(kernel)
    for i in range(side):
        for j in range(side):
            met = np.s_[:, i : i + height : stride, j : j + width : stride]
            output += padded[met] @ kernel[i, j]
            of_padded[met] += cotangent @ kernel[i, j].T
            of_kernel[i, j] = np.tensordot(padded[met], cotangent, ((0, 1, 2), (0, 1, 2)))
    return output, of_padded[:, half : half + height, half : half + width], of_kernel


# Sides even and odd, parts of images and a number of images that has no divisors.
CASES = {
    "winograd": (8, (8, 6), 128, 136, 3, 1),
    "winograd in parts": (12, (32, 32), 128, 128, 3, 1),
    "winograd, odd sides": (3, (7, 9), 128, 128, 3, 1),
    "winograd, thirteen images": (13, (40, 38), 128, 128, 3, 1),
    "64 channels": (4, (12, 10), 64, 64, 3, 1),  # winograd's or XLA's by the version of jax
    "narrow": (8, (10, 12), 16, 24, 3, 1),
    "narrow in parts": (60, (32, 32), 16, 32, 3, 1),
    "odd sides": (4, (3, 3), 128, 136, 3, 1),
    "odd sides of two lengths": (3, (5, 3), 128, 128, 3, 1),
    "odd sides, few channels": (4, (3, 3), 64, 64, 3, 1),
    "few channels": (4, (6, 6), 8, 64, 3, 1),
    "stride": (4, (8, 8), 128, 136, 3, 2),
    "stride in parts": (12, (32, 32), 128, 128, 3, 2),
    "stride, odd sides": (3, (7, 9), 128, 128, 3, 2),
    "stride, one odd side": (3, (8, 5), 128, 128, 3, 2),
    "stride, one pixel": (4, (1, 1), 64, 64, 3, 2),
    "stride, narrow": (4, (8, 7), 16, 32, 3, 2),
    "stride, few channels": (4, (8, 8), 8, 64, 3, 2),
    "smaller than the kernel": (4, (2, 2), 64, 72, 3, 1),
    "smaller, one pixel": (3, (1, 1), 8, 6, 3, 1),
    "smaller, one axis": (3, (2, 5), 8, 6, 3, 1),
    "smaller, stride": (3, (2, 5), 8, 6, 3, 2),
    "smaller, stem": (3, (6, 5), 3, 8, 7, 2),
    "smaller, stem of two pixels": (3, (2, 1), 3, 8, 7, 2),
    "smaller, wide kernel": (3, (2, 3), 4, 8, 7, 1),
    "shortcut": (4, (8, 7), 64, 96, 1, 2),
    "pixelwise": (4, (5, 6), 16, 8, 1, 1),
    "stem": (6, (96, 64), 3, 64, 7, 2),
    "narrow stem": (6, (40, 40), 3, 32, 7, 2),
    "odd stem": (2, (33, 32), 3, 64, 7, 2),
    "stem of small images": (6, (32, 32), 3, 64, 3, 1),
    "stem of small images in parts": (60, (32, 30), 3, 32, 3, 1),
    "deep stem": (4, (33, 30), 3, 32, 3, 2),
    "images pixelwise": (4, (8, 7), 3, 32, 1, 1),
}


@functools.cache
def values(case):
    n, sides, channels, out, side, stride = CASES[case]
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, *sides, channels)).astype(np.float32)
    kernel = rng.normal(size=(side, side, channels, out)).astype(np.float32) / side / channels**0.5
    shape = jax.eval_shape(lambda: convolve(jnp.asarray(x), jnp.asarray(kernel), stride)).shape
    return x, kernel, rng.normal(size=shape).astype(np.float32), stride


def output_and_gradients(function, x, kernel, cotangent, stride):
    output, pull_back = jax.vjp(lambda x, kernel: function(x, kernel, stride), x, kernel)
    return output, *pull_back(cotangent)


def lowered(case):
    """The text of the program, before XLA's compiler."""
    x, kernel, cotangent, stride = values(case)
    compute = jax.jit(output_and_gradients, static_argnums=(0, 4))
    return compute.lower(convolve, x, kernel, cotangent, stride).as_text()


@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients_are_those_of_the_definition(case):
    x, kernel, cotangent, stride = values(case)
    found = jax.jit(output_and_gradients, static_argnums=(0, 4))(convolve, x, kernel, cotangent, stride)
    expected = definition(x, kernel, cotangent, stride)
    for got, wanted in zip(found, expected, strict=True):
        assert got.dtype == jnp.float32 and got.shape == wanted.shape
        np.testing.assert_allclose(got, wanted, rtol=0, atol=2e-5 * float(np.std(wanted)))


def test_the_stem_of_blocks_is_that_of_the_definition():
    x, kernel, cotangent, stride = values("narrow stem")  # by blocks or by XLA's by the version of jax
    expected = definition(x, kernel, cotangent, stride)[0]
    found = stem.convolve(jnp.asarray(x), jnp.asarray(kernel))
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * float(np.std(expected)))


@pytest.mark.parametrize(
    ("case", "loops"),
    [
        ("winograd", 0),
        ("winograd in parts", 3),
        ("winograd, thirteen images", 3),
        ("narrow in parts", 1),
        ("stride", 0),
        ("stride in parts", 3),
        ("stem", 1),
        ("smaller than the kernel", 0),
    ],
)
def test_large_maps_are_computed_in_parts_and_small_ones_at_once(case, loops):
    assert lowered(case).count("stablehlo.while") == loops


def test_other_types_and_platforms_get_the_convolution():
    x, kernel, cotangent, _ = values("winograd")
    compute = jax.jit(output_and_gradients, static_argnums=(0, 4))

    def convolutions(dtype, **platform):
        given = [array.astype(dtype) for array in (x, kernel, cotangent)]
        return compute.trace(convolve, *given, 1).lower(**platform).as_text().count("stablehlo.convolution")

    assert convolutions(np.float32) == 0
    assert convolutions(jnp.bfloat16) == 3
    assert convolutions(np.float32, lowering_platforms=("cuda",)) == 3
    assert convolutions(np.float32, lowering_platforms=("tpu",)) == 3


@pytest.mark.parametrize(
    ("case", "count"),
    [
        ("few channels", 3),
        ("narrow", 2),
        ("stride, few channels", 3),
        ("stride, narrow", 1),
        ("narrow stem", 2),
        ("stem of small images", 2),
        ("deep stem", 2),
    ],
)
def test_with_few_channels_only_what_gains_by_it_is_not_xlas(case, count):
    assert lowered(case).count("stablehlo.convolution") == count


@pytest.mark.parametrize("case", ["smaller than the kernel", "smaller, stem"])
def test_small_maps_in_bfloat16_are_rounded_once(case):
    *arrays, stride = values(case)
    x, kernel, cotangent = (jnp.asarray(array, jnp.bfloat16) for array in arrays)
    found = jax.jit(output_and_gradients, static_argnums=(0, 4))(convolve, x, kernel, cotangent, stride)
    for got, wanted in zip(found, definition(x, kernel, cotangent, stride), strict=True):
        assert got.dtype == jnp.bfloat16 and got.shape == wanted.shape
        np.testing.assert_allclose(got.astype(np.float32), wanted, rtol=2**-8, atol=1e-5)


def test_convolutions_of_one_shape_are_traced_once(monkeypatch):
    traced = []
    compute = winograd.convolve
    monkeypatch.setattr(winograd, "convolve", lambda *a, **kw: traced.append(0) or compute(*a, **kw))
    x, kernel = jnp.zeros((3, 6, 14, 128)), jnp.zeros((3, 3, 128, 128))  # of no other test

    def twice(x, kernel):
        return jnp.sum(convolve(convolve(x, kernel, 1), kernel, 1))

    jax.jit(jax.grad(twice, argnums=(0, 1))).trace(x, kernel)
    assert len(traced) == 2  # the output, and the gradient of the input


@pytest.mark.parametrize("transforms", [winograd.TWO, winograd.FOUR], ids=["two", "four"])
def test_the_transforms_are_those_of_a_convolution(transforms):
    signal, weights = np.arange(1.0, len(transforms.input) + 1) ** 2, np.array([0.3, -2.0, 5.0])
    transformed = np.array(transforms.input) @ signal * (np.array(transforms.kernel) @ weights)
    expected = np.correlate(signal, weights, "valid")
    np.testing.assert_allclose(np.array(transforms.output) @ transformed, expected, rtol=1e-12)
