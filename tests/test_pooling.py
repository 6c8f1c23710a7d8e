"""The stem's max pool, against Flax's."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from simclr_jax.pooling import max_pool


def pooled_and_gradient(pool, x):
    output, pull_back = jax.vjp(pool, x)
    return output, *pull_back(jnp.cos(output))


@pytest.mark.parametrize(("size", "same"), [(5, False), (6, False), (24, False), (5, True), (6, True)])
@pytest.mark.parametrize("ties", [False, True])
def test_output_and_gradient_equal_flax(size, same, ties):
    x = jax.random.normal(jax.random.key(1), (3, size, size + 1, 4))
    x = jnp.round(x) if ties else x
    padding: Any = "SAME" if same else ((1, 1), (1, 1))
    ours = pooled_and_gradient(lambda x: max_pool(x, same), x)
    theirs = pooled_and_gradient(lambda x: nnx.max_pool(x, (3, 3), (2, 2), padding), x)
    np.testing.assert_array_equal(ours[0], theirs[0])
    np.testing.assert_allclose(ours[1], theirs[1], atol=1e-6)


def test_not_a_number_is_not_lost():
    x = jnp.zeros((1, 6, 6, 1)).at[0, 1, 1, 0].set(jnp.nan)
    assert np.isnan(max_pool(x, False))[0, :, :, 0].tolist() == [[True, True, False]] * 2 + [[False] * 3]


@pytest.mark.parametrize(("platform", "operations"), [("tpu", 1), ("cuda", 0), ("cpu", 0)])
def test_xla_pools_on_a_tpu_alone(platform, operations):
    compute = jax.jit(lambda x: pooled_and_gradient(lambda x: max_pool(x, False), x))
    traced = compute.trace(jnp.zeros((2, 8, 8, 4), jnp.bfloat16))
    program = traced.lower(lowering_platforms=(platform,)).as_text()
    assert program.count("stablehlo.reduce_window") == operations
    assert program.count("stablehlo.select_and_scatter") == operations
