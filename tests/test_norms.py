"""Normalisation in bfloat16, against float64 NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from simclr_jax.norms import BatchNorm, GroupNorm


def bfloat16(shape, mean=0.0, scale=1.0):
    return jnp.asarray(mean + scale * np.random.default_rng(0).standard_normal(shape), jnp.bfloat16)


def test_batch_statistics_are_computed_in_float32():
    # Sums and squares near 100 are off by as much as the variance, 1, if they are kept in bfloat16.
    norm = BatchNorm(16, rngs=nnx.Rngs(0))
    values = bfloat16((64, 8, 8, 16), mean=100)
    assert norm(values).dtype == jnp.bfloat16
    exact = np.asarray(values, np.float64)
    np.testing.assert_allclose(norm.mean[...], 0.1 * exact.mean((0, 1, 2)), rtol=1e-4)
    np.testing.assert_allclose(norm.var[...], 0.9 + 0.1 * exact.var((0, 1, 2)), rtol=2e-3)


def test_running_statistics_and_parameters_keep_their_digits():
    norm = BatchNorm(1, rngs=nnx.Rngs(0))
    norm.mean[...], norm.var[...] = jnp.array([100.2]), jnp.array([0.3])
    assert norm.scale is not None and norm.bias is not None
    norm.scale[...], norm.bias[...] = jnp.array([1.003]), jnp.array([-1.003])
    values = bfloat16((50, 1), mean=100)
    found = nnx.view(norm, use_running_average=True)(values)
    exact = (np.asarray(values, np.float64) - 100.2) / np.sqrt(0.3 + 1e-5) * 1.003 - 1.003
    np.testing.assert_allclose(np.asarray(found, np.float64), exact, rtol=2**-8)


@pytest.mark.parametrize("make", [BatchNorm, GroupNorm])
def test_gradients_of_parameters_keep_their_digits(make):
    def total(norm):
        return jnp.sum(norm(bfloat16((7, 11, 13, 32))), dtype=jnp.float32)

    gradient = nnx.grad(total)(make(32, rngs=nnx.Rngs(0)))
    np.testing.assert_array_equal(gradient["bias"][...], 7 * 11 * 13)  # 1001, which bfloat16 has not


def test_group_norm_is_that_of_the_definition():
    values = np.random.default_rng(0).standard_normal((3, 4, 5, 48))
    found = GroupNorm(48, rngs=nnx.Rngs(0))(jnp.asarray(values, jnp.float32))
    groups = values.reshape(3, 20, 16, 3)  # gcd(32, 48) of them
    centred = groups - groups.mean((1, 3), keepdims=True)
    exact = centred / np.sqrt(centred.var((1, 3), keepdims=True) + 1e-5)
    np.testing.assert_allclose(found, exact.reshape(values.shape), atol=1e-5)
