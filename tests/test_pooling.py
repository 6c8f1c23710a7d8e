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
def test_output_and_gradient_equal_flax_where_nothing_ties(size, same):
    x = jax.random.normal(jax.random.key(1), (3, size, size + 1, 4))
    padding: Any = "SAME" if same else ((1, 1), (1, 1))
    ours = pooled_and_gradient(lambda x: max_pool(x, same), x)
    theirs = pooled_and_gradient(lambda x: nnx.max_pool(x, (3, 3), (2, 2), padding), x)
    np.testing.assert_array_equal(ours[0], theirs[0])
    np.testing.assert_allclose(ours[1], theirs[1], atol=1e-6)


def test_pixels_that_tie_share_the_gradient_of_a_window():
    gradient = jax.grad(lambda x: jnp.sum(max_pool(x, False)))(jnp.ones((1, 3, 3, 1)))
    assert np.sum(gradient) == 4 and np.min(gradient) > 0


def test_accelerators_get_one_operation():
    compute = jax.jit(lambda x: pooled_and_gradient(lambda x: max_pool(x, False), x))
    traced = compute.trace(jnp.zeros((2, 8, 8, 4), jnp.bfloat16))
    for platform in ("cuda", "tpu"):
        program = traced.lower(lowering_platforms=(platform,)).as_text()
        assert program.count("stablehlo.reduce_window") == 1
        assert program.count("stablehlo.select_and_scatter") == 1
    assert "reduce_window" not in traced.lower().as_text()
