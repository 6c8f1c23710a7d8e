"""FLOPs as counted in what JAX traced, against XLA's analysis of the same program, and by rules of loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from simclr_jax import flops
from simclr_jax import mesh as meshes
from simclr_jax.convolution import convolve

LEFT, RIGHT = jax.ShapeDtypeStruct((6, 10), jnp.float32), jax.ShapeDtypeStruct((10, 4), jnp.float32)
PRODUCT = 2 * 6 * 10 * 4


def by_xla(function, *arguments):
    """Of a program of one product, which XLA's analysis tells exactly."""
    return jax.jit(function).lower(*arguments).cost_analysis()["flops"]  # pyright: ignore


@pytest.mark.parametrize(
    ("lhs", "rhs", "options"),
    [
        ((2, 9, 8, 3), (3, 3, 3, 5), {"padding": "SAME"}),
        ((2, 9, 8, 3), (3, 3, 3, 5), {"padding": "VALID", "window_strides": (2, 1)}),
        ((2, 9, 8, 3), (7, 7, 3, 5), {"padding": [(3, 3), (3, 2)], "window_strides": (2, 2)}),
        ((2, 9, 8, 3), (3, 2, 3, 5), {"padding": "SAME", "rhs_dilation": (2, 3)}),
        ((2, 9, 8, 3), (3, 3, 3, 5), {"padding": [(1, 2), (2, 1)], "lhs_dilation": (2, 3)}),
        ((2, 9, 8, 6), (3, 3, 2, 9), {"padding": "SAME", "feature_group_count": 3}),
        ((4, 9, 8, 3), (3, 3, 3, 6), {"padding": "SAME", "batch_group_count": 2}),
        ((2, 9, 8, 3), (1, 1, 3, 5), {"padding": [(-1, 0), (0, -2)]}),
    ],
)
def test_of_a_convolution_they_are_those_that_xla_counts(lhs, rhs, options):
    def convolution(x, kernel):
        given = {"window_strides": (1, 1)} | options
        return jax.lax.conv_general_dilated(x, kernel, **given, dimension_numbers=("NHWC", "HWIO", "NHWC"))

    arguments = jnp.zeros(lhs), jnp.zeros(rhs)
    assert flops.count(convolution, *arguments) == by_xla(convolution, *arguments) > 0


@pytest.mark.parametrize(
    ("formula", "shapes"),
    [("ij,jk->ik", ((6, 10), (10, 4))), ("bij,bkj->bik", ((3, 6, 10), (3, 4, 10))), ("i,i->", ((7,), (7,)))],
)
def test_of_a_product_they_are_those_that_xla_counts(formula, shapes):
    product = functools.partial(jnp.einsum, formula)
    arguments = [jnp.zeros(shape) for shape in shapes]
    # XLA has one addition less for each sum.
    sums = np.size(product(*arguments))
    assert flops.count(product, *arguments) == pytest.approx(by_xla(product, *arguments), abs=sums)


def test_a_loop_counts_as_often_as_it_runs():
    def scanned(left, right):
        return jax.lax.scan(lambda carry, _: (carry, carry @ right), left, None, length=5)[1]

    def counted(left, right):
        return jax.lax.fori_loop(0, 3, lambda i, total: total + left @ right, jnp.zeros((6, 4)))

    def open_ended(left, right, count):
        return jax.lax.fori_loop(0, count, lambda i, total: total + left @ right, jnp.zeros((6, 4)))

    assert flops.count(scanned, LEFT, RIGHT) == 5 * PRODUCT
    assert flops.count(counted, LEFT, RIGHT) == 3 * PRODUCT
    assert flops.count(open_ended, LEFT, RIGHT, jax.ShapeDtypeStruct((), jnp.int32)) == PRODUCT


def test_a_loop_counts_what_it_carries_into_its_next_round():
    def squared(matrix):
        """The first of two that are carried, which becomes the second."""
        return jax.lax.scan(lambda pair, _: ((pair[1], pair[1] @ pair[1]), None), (matrix, matrix), length=4)

    square = jax.ShapeDtypeStruct((8, 8), jnp.float32)
    assert flops.count(lambda matrix: squared(matrix)[0][0], square) == 4 * 2 * 8**3


def test_of_a_choice_by_platform_it_is_the_form_of_accelerators():
    def chosen(left, right):
        return jax.lax.platform_dependent(
            left, right, cpu=lambda left, right: 2 * (left @ right) + left @ right, default=jnp.matmul
        )

    assert flops.count(chosen, LEFT, RIGHT) == PRODUCT


def test_a_convolution_with_a_form_for_cpus_counts_as_it_is_defined():
    x, kernel = jax.ShapeDtypeStruct((2, 8, 8, 64), jnp.float32), jnp.zeros((3, 3, 64, 64))
    defined = 2 * 2 * 64 * 64 * (3 * 8 - 2) ** 2
    assert flops.count(functools.partial(convolve, stride=1), x, kernel) == defined

    def gradient(x, kernel):
        return jax.grad(lambda kernel: jnp.sum(jnp.square(jnp.asarray(convolve(x, kernel, 1)))))(kernel)

    assert flops.count(gradient, x, kernel) == 2 * defined  # none of the images


def test_what_nobody_asks_for_does_not_count():
    def half(left, right):
        both = jax.jit(lambda left, right: (left @ right, right.T @ left.T))(left, right)
        return both[0]

    assert flops.count(half, LEFT, RIGHT) == PRODUCT
    assert flops.count(lambda left, right: left, LEFT, RIGHT) == 0


def test_what_is_computed_again_for_the_gradient_counts_again():
    def layer(right, left):
        return jnp.tanh(left @ right)

    def step(layer, right, left):
        return jax.value_and_grad(lambda right: jnp.sum(layer(right, left)))(right)

    assert flops.count(functools.partial(step, layer), RIGHT, LEFT) == 2 * PRODUCT
    assert flops.count(functools.partial(step, jax.checkpoint(layer)), RIGHT, LEFT) == 3 * PRODUCT


def test_devices_count_together():
    mesh = meshes.mesh_of(jax.devices())
    rows = meshes.split(mesh).spec
    left = jax.ShapeDtypeStruct((8 * mesh.size, 10), jnp.float32)
    product = jax.shard_map(
        jnp.matmul, mesh=mesh, in_specs=(rows, meshes.replicated(mesh).spec), out_specs=rows
    )
    assert flops.count(product, left, RIGHT) == 2 * 8 * mesh.size * 10 * 4
